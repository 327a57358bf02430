"""The number of parameters of a model of which only the configuration is at hand."""

from __future__ import annotations

import torch
from transformers import AutoModel

from ..runtime.access import hub_access
from ..runtime.files import is_local_path
from ..runtime.formatting import quote
from .architecture import named_class, read_config
from .configuration import MixRankConfig
from .files import count_parameters
from .loading import insert_factored_layers
from .rank_map import QUANT_METHOD, quantization_method


def parameters_like(name: str) -> int:
    """Return how many parameters a model has, by its configuration; no weights are read and none take up memory.

    Args:
        name: Hub id or folder; a Hub id may end in `@` and a branch, tag or commit. The class is the one that its
            configuration names, head included, or the bare encoder if it names none. Of a checkpoint that this package has
            compressed, the factors count.

    Raises:
        OSError: if there is no such model.
        ValueError: if its configuration cannot be read, or needs code that comes with it.
    """
    what = f"like={quote(name)}: the parameters of this model cannot be counted"
    try:
        repository, _, revision = (name, "", "") if is_local_path(name) else name.partition("@")
        access = {**hub_access(), **({"revision": revision} if revision else {})}
        config = read_config(repository, {"trust_remote_code": False, **access})
        found = named_class(config, name) if getattr(config, "architectures", None) else AutoModel
        with torch.device("meta"):
            model = AutoModel.from_config(config, trust_remote_code=False) if found is AutoModel else found(config)
        stored = getattr(config, "quantization_config", None)
        if isinstance(stored, dict) and quantization_method(stored) == QUANT_METHOD:
            insert_factored_layers(model, MixRankConfig.from_dict(stored).factored_layers)
    except ImportError as error:
        raise ValueError(f"{what}. {error}") from error
    except (OSError, ValueError) as error:
        raise type(error)(f"{what}. {error} Or give the number as target_parameters.") from error
    return count_parameters(model)
