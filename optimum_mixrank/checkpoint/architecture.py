"""Which class a checkpoint is opened with: the one that it names, if Transformers or the user knows it."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import transformers
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from transformers import AutoConfig, AutoModel, AutoModelForImageClassification, PretrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto
from transformers.utils import cached_file

from ..runtime.access import why_unreachable
from ..runtime.files import is_local_path, similar_paths
from ..runtime.formatting import listed, quote, shorten, type_of
from .rank_map import QUANT_METHOD, quantization_method
from .self_contained import refers_here


_REMEDY = (
    "Pass the class as `auto_class=…` (on the command line, `--auto-class package.module.Class`), or register it with "
    "`AutoModel….register`."
)


def read_config(path: str | Path, hub_kwargs: dict[str, Any]) -> Any:
    """Return the configuration of a checkpoint, which may be an untrusted file.

    Raises:
        OSError: if there is no such checkpoint.
        ValueError: if its `config.json` cannot be understood.
    """
    check_exists(path)
    _check_reachable(str(path), hub_kwargs)
    try:
        return AutoConfig.from_pretrained(path, **hub_kwargs)
    except ImportError:
        raise
    except OSError as error:
        near = "" if Path(path).expanduser().exists() else similar_paths(str(path), folders_only=True)
        if not near:
            raise
        raise OSError(f"{error} There is no local folder {str(path)!r} either; {near}") from error
    except Exception as error:
        folder = Path(path).expanduser()
        if folder.is_dir() and not (folder / "config.json").is_file():
            raise ValueError(
                f"The folder {str(path)!r} holds no config.json; name the folder of a model saved by `save_pretrained`."
            ) from error
        reason = shorten(" ".join(str(error).split()) or type(error).__name__, 600)
        raise ValueError(
            f"The config.json of {str(path)!r} cannot be read: {_odd_field(path, hub_kwargs) or reason}"
        ) from error


def is_compressed_checkpoint(path: str | Path, hub_kwargs: dict[str, Any]) -> bool:
    """Return whether a checkpoint was compressed by this library.

    Raises:
        OSError, ValueError: as `read_config`.
    """
    stored = getattr(read_config(path, hub_kwargs), "quantization_config", None)
    return quantization_method(stored) == QUANT_METHOD


def check_exists(path: str | Path) -> None:
    """Check that a name is that of a folder, or could be one on the Hub.

    Raises:
        FileNotFoundError: if it is neither; the message lists folders with similar names.
    """
    name = str(path)
    folder = Path(name).expanduser()
    if not name:
        raise FileNotFoundError("The name of the model is empty; give a folder with a config.json, or a Hub id.")
    if folder.is_dir():
        return
    if not folder.exists() and not isinstance(path, Path) and not is_local_path(name):
        with suppress(HFValidationError):
            validate_repo_id(name)
            return
    found = "is a file" if folder.exists() else "does not exist"
    if not folder.parent.is_dir():
        found += f", nor does the folder {str(folder.parent)!r}"
    hint = similar_paths(name, folders_only=True) or "give a folder with a config.json, or a Hub id."
    raise FileNotFoundError(f"The model {name!r} {found}; {hint}")


def _check_reachable(name: str, hub_kwargs: dict[str, Any]) -> None:
    """Check that a model that is not a local folder is in the cache, or that the Hub can be reached.

    Raises:
        OSError: if it is neither; the message lists folders with similar names.
    """
    # Through proxies of its own, a request may get further than this one.
    otherwise = any(hub_kwargs.get(each) for each in ("subfolder", "local_files_only", "proxies"))
    if otherwise or Path(name).expanduser().exists():
        return
    # Transformers 4.57 has a cache of its own, where `TRANSFORMERS_CACHE` is set.
    found = cached_file(
        name,
        "config.json",
        cache_dir=hub_kwargs.get("cache_dir"),
        revision=hub_kwargs.get("revision"),
        local_files_only=True,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    if found is not None:
        return
    reason = why_unreachable()
    if reason:
        hint = similar_paths(name, folders_only=True) or "name a folder with a config.json, or connect to the network."
        raise OSError(
            f"The model {name!r} is neither a local folder nor in the cache, and the Hub cannot be reached ({reason}); "
            f"{hint}"
        )


def _odd_field(path: str | Path, hub_kwargs: dict[str, Any]) -> str | None:
    """Return what is wrong with a field of a configuration over which Transformers stumbles, if it is known."""
    try:
        stored, _ = PretrainedConfig.get_config_dict(path, **hub_kwargs)
    except Exception:
        # The first error says more than this one.
        return None
    quantization = stored.get("quantization_config") if isinstance(stored, dict) else None
    if quantization is None or isinstance(quantization, dict):
        return None
    return f"quantization_config={quote(quantization)} is not an object; remove the field from a dense checkpoint."


def load_named(
    path: str | Path, config: Any, auto_class: Any, *, complete: bool = False, **kwargs: Any
) -> PreTrainedModel:
    """Load a checkpoint with a given class, or with the one that its configuration names.

    Args:
        path: Local folder or Hub id.
        config: The checkpoint's configuration.
        auto_class: A class with `from_pretrained`; None is the class that the configuration names. If it names none, as in
            checkpoints of timm itself, see `_unnamed_class`; it has to be all that the checkpoint holds.
        complete: Whether every parameter has to be in the checkpoint.
        **kwargs: Arguments of Transformers' `from_pretrained`.

    Raises:
        ValueError: if the class is unknown, or the checkpoint does not hold what the model needs.
    """
    if _is_timm(config) and "num_classes" in (config.model_args or {}):
        # timm notes the number of classes twice, and Transformers passes it twice.
        config.model_args = {name: value for name, value in config.model_args.items() if name != "num_classes"}
        kwargs["config"] = config
    if auto_class is not None and not complete:
        return auto_class.from_pretrained(path, **kwargs)
    is_given = auto_class is not None
    is_guess = auto_class is None and not getattr(config, "architectures", None)
    if auto_class is None:
        auto_class = (
            _unnamed_class(config) if is_guess else named_class(config, path, bool(kwargs.get("trust_remote_code")))
        )
    model, found = auto_class.from_pretrained(path, output_loading_info=True, **kwargs)
    parameters = dict(model.named_parameters())
    missing = sorted(name for name in found["missing_keys"] if name in parameters)
    unexpected = sorted(found["unexpected_keys"])
    if is_guess and (missing or unexpected):
        raise ValueError(
            f"The config.json of {str(path)!r} names no class in `architectures`, and the checkpoint is not a bare "
            f"{type(model).__name__}: {listed(unexpected or missing)} would be {'lost' if unexpected else 'random'}. "
            f"{_REMEDY}"
        )
    if complete and unexpected and not is_given:
        raise ValueError(
            f"{str(path)!r} holds {listed(unexpected)}, which would be lost: the class that its config.json names, "
            f"{type(model).__name__}, has no place for them. {_REMEDY}"
        )
    if complete and missing:
        raise ValueError(
            f"{str(path)!r} lacks {listed(missing)}, which {type(model).__name__} has and which would be random. The "
            "checkpoint is damaged, or belongs to another class; name that by `auto_class` or `--auto-class`."
        )
    return model


def _unnamed_class(config: Any) -> Any:
    """Return the class for a configuration that names none: a classifier of timm if it has classes, else the encoder."""
    return AutoModelForImageClassification if _is_timm(config) and config.num_labels else AutoModel


def _is_timm(config: Any) -> bool:
    return getattr(config, "model_type", None) == "timm_wrapper"


def named_class(config: Any, path: str | Path, trust_remote_code: bool = False) -> Any:
    """Return the class that a configuration names in `architectures`.

    Classes that were registered for the configuration (`AutoModelForImageClassification.register`) come before those of
    Transformers. Code that comes with the checkpoint is used only if it is trusted, and not instead of this package.

    Raises:
        ValueError: if there is no such model class, or it belongs to another configuration.
    """
    architectures = config.architectures
    where = f"The config.json of {str(path)!r} has architectures={quote(architectures)}"
    if not isinstance(architectures, list | tuple) or not all(isinstance(each, str) for each in architectures):
        raise ValueError(f"{where}, which is not a list of class names. {_REMEDY}")
    name = architectures[0]
    if trust_remote_code:
        for auto_name, reference in (getattr(config, "auto_map", None) or {}).items():
            if (
                isinstance(reference, str)
                and not refers_here(reference)
                and reference.rpartition(".")[2] == name
                and auto_name.startswith("AutoModel")
            ):
                return getattr(transformers, auto_name)
    for registered in _registered_classes(type(config)):
        if registered.__name__ == name:
            return registered
    found = getattr(transformers, name, None) if name.isidentifier() else None
    is_model = isinstance(found, type) and issubclass(found, PreTrainedModel)
    if not is_model or name.endswith("PreTrainedModel"):
        raise ValueError(
            f"{where}, but {quote(name)} is not a model class of Transformers {transformers.__version__}. {_REMEDY}"
        )
    if not isinstance(config, getattr(found, "config_class", None) or ()):
        raise ValueError(f"{where}, but {name} is not a class for {type_of(config)}. {_REMEDY}")
    return found


def import_class(name: str) -> Any:
    """Return a class by name: one of Transformers (`AutoModelForImageClassification`) or `package.module.Class`.

    Raises:
        ValueError: if there is no such class, or it cannot load checkpoints.
    """
    module, _, attribute = name.rpartition(".")
    try:
        found = getattr(importlib.import_module(module) if module else transformers, attribute, None)
    except (ImportError, TypeError, ValueError) as error:
        raise ValueError(
            f"--auto-class {name!r}: {module!r} cannot be imported ({error}). Install it, or add its folder to PYTHONPATH."
        ) from error
    if not isinstance(found, type) or not hasattr(found, "from_pretrained"):
        raise ValueError(
            f"--auto-class {name!r} is not a class with `from_pretrained`; name one of Transformers, such as "
            "AutoModelForImageClassification, or package.module.Class."
        )
    return found


def _registered_classes(config_class: type) -> Iterator[type]:
    for auto_class in vars(modeling_auto).values():
        mapping = getattr(auto_class, "_model_mapping", None) if isinstance(auto_class, type) else None
        found = None if mapping is None else mapping.get(config_class, None)
        yield from found if isinstance(found, tuple) else () if found is None else (found,)
