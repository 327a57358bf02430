"""Check, while weights are loaded, that the files of a checkpoint fill every factored layer, and fit it.

Transformers draws what a file lacks at random and only reports it, and stops at tensors of a wrong size with an error that
does not say which layer they belong to.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from ..runtime.formatting import listed, quote, shorten
from .files import StoredTensor, tensors_in
from .modeling import FactoredLinear, GuardedLinear
from .names import canonical_names
from .narrowing import narrow_from


_FACTORS = ("factor_a.weight", "factor_a.bias", "factor_b.weight", "factor_b.bias")
_FLOATS = {"F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"}
_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_INITIALIZE = "_initialize_missing_keys"
_REMEDY = "The checkpoint is damaged, or was not saved with this rank map; copy, download or save it again."


def check_stored_tensors(model: nn.Module, files: Iterable[str]) -> None:
    """Check the headers of safetensors files against the model that is to be filled, before any weight is read.

    Names that the model's linear layers do not have are ignored: they may be renamed while loading.

    Raises:
        ValueError: if a tensor of a linear layer does not fit it; the message names the layer.
    """
    tensors = tensors_in(Path(file) for file in files if str(file).endswith(".safetensors"))
    layers = _names_on_disk(model)
    for key, tensor in tensors.items():
        found = _split(key)
        if found is not None and found[0] in layers:
            canonical, module = layers[found[0]]
            _check_tensor(canonical, module, found[1], tensor.shape, tensor.dtype in _FLOATS, tensor)


def check_unexpected_names(model: nn.Module, names: Iterable[str]) -> None:
    """Check that no factor of a linear layer is among the names of tensors that have no place in the model.

    Raises:
        ValueError: if there is one; the message names the layer.
    """
    layers = _names_on_disk(model)
    for name in names:
        found = _split(name)
        if found is not None and found[0] in layers:
            canonical, module = layers[found[0]]
            _check_place(canonical, module, found[1])


def check_each_tensor(model: nn.Module) -> Callable[[], None]:
    """Check each tensor of a linear layer when it is loaded by `load_state_dict`; return what ends the checks."""
    handles = []
    for canonical, module in _linear_layers(model).values():
        parts = module.named_modules() if isinstance(module, FactoredLinear) else [("", module)]
        for part, child in parts:
            handles.append(
                child.register_load_state_dict_pre_hook(_hook(canonical, module, f"{part}." if part else ""))
            )

    def remove() -> None:
        for handle in handles:
            handle.remove()

    return remove


def _hook(canonical: str, module: nn.Module, part: str) -> Callable[..., None]:
    def check(child: nn.Module, state: Mapping[str, Tensor], prefix: str, *args: Any) -> None:
        for name in ("weight", "bias"):
            tensor = state.get(f"{prefix}{name}")
            if tensor is not None:
                _check_tensor(canonical, module, part + name, tuple(tensor.shape), tensor.is_floating_point(), tensor)

    return check


def refuse_missing_factors(model: nn.Module) -> None:
    """Make Transformers stop where it is about to initialize the parameters that it has not found in the files.

    `check_filled` has to be called when the model has been loaded.
    """
    initialize = getattr(model, _INITIALIZE)

    def checked(*args: Any, **kwargs: Any) -> None:
        delattr(model, _INITIALIZE)
        check_initialized(model, args)
        initialize(*args, **kwargs)

    setattr(model, _INITIALIZE, checked)


def check_initialized(model: nn.Module, args: Sequence[Any]) -> None:
    """Check, when Transformers is about to initialize what it has not found in the files, that no factor is missing.

    Args:
        model: The model.
        args: What Transformers passes to the method that initializes.

    Raises:
        ValueError: if one is; the message names the layer.
    """
    # Transformers 4.57 passes the names and initializes first; 5.x initializes last, what has no flag.
    uninitialized = next((set(each) for each in args if isinstance(each, list)), None)
    missing = [
        f"{name} of {canonical!r}"
        for module_name, (canonical, module) in _linear_layers(model).items()
        if _is_ours(module)
        for name, parameter in module.named_parameters()
        # The empty `weight` holds no value that could be wrong; a joint layer is looked at by itself.
        if parameter.numel()
        and not name.startswith("joint.")
        and _is_missing(f"{module_name}.{name}", parameter, uninitialized)
    ]
    if missing:
        raise ValueError(
            f"The checkpoint lacks tensors of factored layers, or they do not fit: {listed(missing)}. {_remedy(model)}"
        )


def _remedy(model: nn.Module) -> str:
    """Return what to do about tensors that are not found, which another release of Transformers may call otherwise."""
    written = str(getattr(getattr(model, "config", None), "transformers_version", None) or transformers.__version__)
    if written.partition(".")[0] == transformers.__version__.partition(".")[0]:
        return _REMEDY
    return (
        f"The checkpoint was written under Transformers {shorten(written)}, whose names of tensors the "
        f"{type(model).__name__} of {transformers.__version__} does not know; open it under that release."
    )


def _is_missing(name: str, parameter: Tensor, uninitialized: set[str] | None) -> bool:
    if uninitialized is not None:
        return name in uninitialized
    # What is offloaded to disk stays on the meta device; what is missing has been moved away from it.
    return not (parameter.is_meta or getattr(parameter, "_is_hf_initialized", False))


def check_filled(model: nn.Module) -> None:
    """Check a model that has been loaded.

    Raises:
        RuntimeError: if this release of Transformers did not ask for the check of `refuse_missing_factors`.
        ValueError: if a factor has a dtype that linear layers cannot compute with.
    """
    if _INITIALIZE in vars(model):
        raise RuntimeError(
            f"Transformers {transformers.__version__} loads weights in a way that this version of optimum-mixrank does not "
            "know, so that missing factors would go unnoticed. Upgrade with `pip install --upgrade optimum-mixrank`."
        )
    for canonical, module in _linear_layers(model).values():
        if _is_ours(module):
            for name, parameter in module.named_parameters():
                if parameter.dtype not in _DTYPES:
                    raise ValueError(
                        f"{name} of the factored layer {canonical!r} has dtype {parameter.dtype}, which is no "
                        f"floating-point dtype to compute in. {_REMEDY}"
                    )


def _check_tensor(
    canonical: str, module: nn.Module, name: str, shape: tuple[int, ...], is_float: bool, tensor: StoredTensor | Tensor
) -> None:
    _check_place(canonical, module, name)
    expected = tuple(module.get_parameter(name).shape) if _has_parameter(module, name) else None
    is_factored = _is_ours(module)
    if is_factored and not is_float:
        raise ValueError(
            f"{name} of the factored layer {canonical!r} is stored as {tensor.dtype}, which is not a floating-point dtype. "
            f"{_REMEDY}"
        )
    if isinstance(module, GuardedLinear) and name == "weight" and shape != expected:
        raise ValueError(
            f"{canonical!r} is stored as a dense layer, but is in the rank map. A dense model that was made from this "
            "configuration, as by `from_config`, has to be saved without its `quantization_config`."
        )
    if not is_factored and name == "weight" and shape == (0,):
        raise ValueError(f"{canonical!r} is stored as a factored layer, but is not in the rank map. {_REMEDY}")
    if is_factored and expected is not None and shape != expected:
        raise ValueError(
            f"{name} of the factored layer {canonical!r} is stored with shape {quote(list(shape))}; by the rank map it has "
            f"shape {list(expected)}. {_REMEDY}"
        )


def _check_place(canonical: str, module: nn.Module, name: str) -> None:
    """Refuse a factor, or a bias of a factor, for which the layer has no place."""
    if name not in _FACTORS or _has_parameter(module, name):
        return
    if isinstance(module, FactoredLinear):
        raise ValueError(f"The checkpoint holds {name} of {canonical!r}, a layer without bias. {_REMEDY}")
    if isinstance(module, GuardedLinear):
        raise ValueError(f"The checkpoint holds {name} of {canonical!r}, which shares its factors. {_REMEDY}")
    raise ValueError(f"The checkpoint holds {name} of {canonical!r}, which is not in its rank map. {_REMEDY}")


def _is_ours(module: nn.Module) -> bool:
    """Return whether the rank map describes a layer."""
    return isinstance(module, GuardedLinear) or narrow_from(module) is not None


def _has_parameter(module: nn.Module, name: str) -> bool:
    return any(each == name for each, _ in module.named_parameters())


def _split(key: str) -> tuple[str, str] | None:
    """Split the name of a tensor into that of a linear layer and its own."""
    for name in (*_FACTORS, "weight", "bias"):
        if key.endswith(f".{name}"):
            return key[: -len(name) - 1], name
    return None


def _linear_layers(model: nn.Module) -> dict[str, tuple[str, nn.Module]]:
    """Return the canonical name and the module of every linear layer by module name."""
    return {name: (canonical, model.get_submodule(name)) for name, canonical in canonical_names(model).items()}


def _names_on_disk(model: nn.Module) -> dict[str, tuple[str, nn.Module]]:
    """Return the same by every name that the layer may have in a file, with and without the prefix of the base model."""
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    return dict(_spellings(_linear_layers(model), prefix))


def _spellings(
    layers: Mapping[str, tuple[str, nn.Module]], prefix: str
) -> Iterator[tuple[str, tuple[str, nn.Module]]]:
    for name, layer in layers.items():
        for spelling in (name, layer[0]):
            bare = spelling.removeprefix(prefix)
            yield bare, layer
            yield prefix + bare, layer
