"""Refuse models whose layers compute something else than their weights say, or keep their weights in another form.

A factored layer replaces `W x + b`. An adapter adds to it, a parametrization or a mask computes `W` anew at each call, and
a quantized `W` holds no numbers to decompose; all of them would be lost, or saved under names that nothing reads.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Sequence
from types import FunctionType
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn.utils.parametrize import is_parametrized
from torch.nn.utils.prune import BasePruningMethod

from ..checkpoint.names import Target
from ..checkpoint.rank_map import QUANT_METHOD, quantization_method
from ..runtime.formatting import with_article


if TYPE_CHECKING:
    from transformers import PreTrainedModel

_ADAPTERS = ("peft", "adapters", "loralib", "lycoris")
_QUANTIZERS = (
    "aqlm",
    "auto_gptq",
    "auto_round",
    "awq",
    "bitsandbytes",
    "compressed_tensors",
    "eetq",
    "gptqmodel",
    "hqq",
    "optimum.gptq",
    "optimum.quanto",
    "quark",
    "quanto",
    "torch.ao",
    "torchao",
)

MERGE = (
    "Merge it first and compress the result: `PeftModel.from_pretrained(model, adapter).merge_and_unload()`, with the "
    "model as it was before the adapter."
)

_UNQUANTIZED = "Compress the original instead; quantization comes after compression, not before."


def check_model(model: PreTrainedModel) -> None:
    """Check that a model holds no adapters, no quantized layers and no weights that are computed at each call.

    Nor may its weights be tensors that gradients cannot pass through. Convolutions whose weights are computed in every
    model of the class, as those of the positions in Wav2Vec 2.0, are allowed, since they are saved and read as they are.

    Raises:
        ValueError: otherwise; the message names the first such layer and the remedy.
    """
    computing = {name for name, module in model.named_modules() if _computes_weights(module)}
    for name in _computing_by_design(model, computing) if computing else ():
        computing.discard(name)
    for name, module in model.named_modules():
        if _comes_from(module, _ADAPTERS):
            raise ValueError(
                f"Layer {name!r} belongs to an adapter that is not merged ({_kind(module)}); compressing would change the "
                "layers below it and save the adapter alone. " + MERGE
            )
        # Hooks of Accelerate are partial functions, which are copied together with their module.
        if isinstance(vars(module).get("forward"), FunctionType):
            raise ValueError(
                f"The `forward` of {name or type(model).__name__!r} was replaced by a function, such as a compiled one, "
                "which a copy of the model would share with the original. Restore it (`del module.forward`), and wrap or "
                "compile the result instead."
            )
        if _comes_from(module, _QUANTIZERS):
            raise ValueError(f"Layer {name!r} is quantized ({_kind(module)}). {_UNQUANTIZED}")
        if name in computing:
            raise ValueError(
                f"A parameter of layer {name!r} is computed at each call (by a parametrization, weight norm, spectral "
                "norm or a pruning mask), so no checkpoint of plain weights can hold it. Make it permanent first: "
                "`torch.nn.utils.parametrize.remove_parametrizations`, `remove_weight_norm`, `remove_spectral_norm` or "
                "`prune.remove`."
            )
    if getattr(model, "_hf_peft_config_loaded", False):
        raise ValueError(f"This {type(model).__name__} has an adapter that is not merged. {MERGE}")
    made_for_inference = next((name for name, parameter in model.named_parameters() if parameter.is_inference()), None)
    if made_for_inference is not None:
        raise ValueError(
            f"The weights of this {type(model).__name__} were made inside `torch.inference_mode()`, the first is "
            f"{made_for_inference!r}; no gradient can pass through them. Load or make the model outside of it."
        )
    quantizer = getattr(model, "hf_quantizer", None)
    stored = getattr(quantizer, "quantization_config", None) or getattr(model.config, "quantization_config", None)
    method = quantization_method(stored)
    if method not in (None, QUANT_METHOD):
        raise ValueError(f"This {type(model).__name__} is quantized (quant_method={method!r}). {_UNQUANTIZED}")


def check_targets(targets: Sequence[Target]) -> None:
    """Check that every targeted layer is an ordinary linear layer with a weight of its own.

    Raises:
        ValueError: otherwise; the message names the layer and the remedy.
    """
    owners: dict[int, str] = {}
    for target in targets:
        linear, weight = target.module, target.module.weight
        leave_out = f"Leave it out with exclude_modules=[{target.name!r}]"
        if type(linear).forward is not nn.Linear.forward:
            raise ValueError(
                f"Layer {target.name!r} is {with_article(_kind(linear))} with a `forward` of its own, which a factored "
                f"layer would lose. {leave_out}, or replace it by an `nn.Linear` that computes the same."
            )
        if type(weight) not in (nn.Parameter, torch.Tensor) or not weight.is_floating_point():
            raise ValueError(
                f"The weight of layer {target.name!r} is {with_article(_kind(weight))} of {weight.dtype}, not a plain "
                f"tensor of floating-point numbers. {_UNQUANTIZED}"
            )
        other = owners.setdefault(id(weight), target.name)
        if other != target.name:
            raise ValueError(
                f"Layers {other!r} and {target.name!r} share one weight, which a checkpoint of factors cannot express. "
                "Give each a copy of its own."
            )


def check_uses(model: nn.Module, targets: Sequence[Target]) -> None:
    """Check that no targeted layer has a second place in the model, as in a block that is used twice.

    Raises:
        ValueError: otherwise; the message names both places and the remedy.
    """
    modules = {id(target.module): target.name for target in targets}
    seconds: dict[str, str] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        first = modules.get(id(module), name)
        if first != name:
            seconds.setdefault(first, name)
    if seconds:
        first, second = next(iter(seconds.items()))
        raise ValueError(
            f"One layer is used in two places, {first!r} and {second!r}, which a checkpoint of factors cannot express: "
            "each place would get weights of its own. Give each place a copy (`copy.deepcopy`), or leave such layers out "
            f"with exclude_modules={list(seconds)!r}."
        )


def _computes_weights(module: nn.Module) -> bool:
    """Return whether a module computes a weight at each call, by a parametrization or a hook."""
    return is_parametrized(module) or any(map(_computes_weight, module._forward_pre_hooks.values()))


def _computes_weight(hook: object) -> bool:
    """Return whether a hook computes a weight before each call: weight norm and spectral norm of old, pruning."""
    return isinstance(hook, BasePruningMethod) or type(hook).__module__.startswith("torch.nn.utils.")


def _computing_by_design(model: PreTrainedModel, names: Collection[str]) -> set[str]:
    """Return those of the modules, none of them linear, that compute a weight in every model of this class."""
    try:
        # Some initial values are drawn from the generator of the process even so.
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            fresh = dict(type(model)(copy.deepcopy(model.config)).named_modules())
    except Exception:
        # A class that cannot be made again says nothing of its design.
        return set()
    own = dict(model.named_modules())
    return {
        name
        for name in names
        if name in fresh and not isinstance(own[name], nn.Linear) and _structure(fresh[name]) == _structure(own[name])
    }


def _structure(module: nn.Module) -> tuple[dict[str, tuple[int, ...]], dict[str, str]]:
    """Return the shapes of what a module stores, and the classes of the modules in it, its parametrizations among them."""
    shapes = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    return shapes, {name: type(each).__qualname__ for name, each in module.named_modules()}


def _comes_from(module: nn.Module, packages: Sequence[str]) -> bool:
    return any(f"{type(module).__module__}.".startswith(f"{package}.") for package in packages)


def _kind(value: object) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}"
