"""How much of a model the targeted layers are, and what the rest of it is."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from torch import nn

from ..checkpoint.names import Target
from ..runtime.forward import evaluation_mode
from ..runtime.hooks import hooks_removed_on_exit
from ..runtime.logging import get_logger
from ..runtime.outputs import ModelCall
from ..runtime.stacks import is_stack


if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = get_logger(__name__)

TEXT, DECODERS, EXCLUDED = "language and text layers", "decoders", "layers of the blocks not targeted"
CONVOLUTIONS, EMBEDDINGS, VECTORS = "convolutions", "embeddings", "biases and normalizations"
POOLING, MERGERS, HEADS, OTHERS = "pooling heads", "mergers and projections", "heads", "other layers"
"""The kinds of parameters that are left out."""

_BY_NAME = {
    POOLING: r"pool",
    MERGERS: r"merger|merge|projector|projection|connector|resampler|qformer|perceiver|abstractor|aligner|modality",
    HEADS: r"(^|\.)(classifier|score|lm_head|cls_classifier|[a-z0-9_]*head|class_embed|bbox_embed|[a-z_]*predictor|"
    r"[a-z_]*classifier)(\.|$)",
    DECODERS: r"decoder|decode_head|neck|upsampl",
    EMBEDDINGS: r"embed|token|position|prompt|quer(y|ies)(\.|$)",
}
"""The kinds of parameters outside of the blocks, by what their modules are called; the first that fits counts."""


@dataclass(frozen=True)
class Reach:
    """The parameters of a model, each counted once.

    Attributes:
        targeted: Weights of the targeted layers.
        targeted_by_images: Those of them that run when images go in.
        images: All that belong to what runs when images go in; None if the model could not be run.
        left_out: Those that are not targeted, by kind.
    """

    targeted: int
    targeted_by_images: int
    images: int | None
    left_out: dict[str, int] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return the counts as JSON values, the largest kinds first."""
        kinds = dict(sorted(self.left_out.items(), key=lambda item: -item[1]))
        return {**asdict(self), "left_out": kinds}


def measure_reach(model: PreTrainedModel, targets: Sequence[Target], call: ModelCall) -> Reach:
    """Count the parameters of a model that are targeted, and those that are left out by kind.

    Args:
        model: The original model.
        targets: The layers that are compressed.
        call: How it is called; it runs once.
    """
    targeted = {id(target.module.weight) for target in targets}
    called = _called(model, call)
    places = _Places(model)
    counts: dict[str, int] = {}
    total = reached = images = 0
    for name, parameter in model.named_parameters():
        owner = name.rpartition(".")[0]
        # Some modules use the weights of others without calling them.
        runs = called is None or owner in called or owner.rpartition(".")[0] in called
        images += parameter.numel() if runs else 0
        if id(parameter) in targeted:
            total += parameter.numel()
            reached += parameter.numel() if runs else 0
            continue
        kind = places.kind(name, parameter) if runs else _kind_of_text(name)
        counts[kind] = counts.get(kind, 0) + parameter.numel()
    return Reach(total, reached, None if called is None else images, counts)


def _kind_of_text(name: str) -> str:
    return DECODERS if re.search(r"(^|\.)decoder(\.|$)", name) else TEXT


def _called(model: nn.Module, call: ModelCall) -> set[str] | None:
    """Return the names of all modules that run when images go in, or None if the model does not run."""
    called: set[str] = set()
    handles = [
        module.register_forward_pre_hook(lambda module, args, name=name: called.add(name))
        for name, module in model.named_modules(remove_duplicate=False)
    ]
    try:
        with hooks_removed_on_exit(handles), evaluation_mode(model):
            call.run(model, call.example_for(model))
    except Exception as error:
        # A figure for the report must not stop a compression.
        logger.debug(f"What images reach of {type(model).__name__} is unknown: {error}")
        return None
    return called


class _Places:
    """Says of what kind the parameters of a model are."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._modules = dict(model.named_modules(remove_duplicate=False))
        inside = {id(each) for module in model.modules() if is_stack(module) for each in module.modules()}
        self._in_blocks = {name for name, module in self._modules.items() if id(module) in inside}
        base = getattr(model, "base_model", model)
        self._base = {id(module) for module in base.modules()}
        # Attention over a learned query, outside of the blocks, pools the features of an image.
        self._pools = tuple(self._pooling(inside))

    def _pooling(self, inside: set[int]) -> Iterator[str]:
        for name, module in self._modules.items():
            if isinstance(module, nn.MultiheadAttention) and id(module) not in inside:
                yield f"{name.rpartition('.')[0]}."

    def kind(self, name: str, parameter: nn.Parameter) -> str:
        """Return the kind of a parameter of something that runs when images go in."""
        owner = name.rpartition(".")[0]
        module = self._modules[owner]
        if name.startswith(self._pools):
            return POOLING
        if isinstance(module, nn.Embedding):
            return EMBEDDINGS
        is_convolution = isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.ConvTranspose2d)
        if is_convolution and "patch" in owner and module.kernel_size == module.stride:
            return EMBEDDINGS
        is_vector = parameter.numel() == max(parameter.shape, default=1)
        if is_vector and re.fullmatch(r"weight|bias|.*(norm|scale|gamma|beta|bias|lambda).*", name.rpartition(".")[2]):
            return VECTORS
        if is_convolution:
            return CONVOLUTIONS
        if owner in self._in_blocks:
            # A decoder may have blocks too, beside those of the encoder.
            return EXCLUDED if id(module) in self._base else DECODERS
        return next((kind for kind, pattern in _BY_NAME.items() if re.search(pattern, name)), OTHERS)
