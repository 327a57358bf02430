"""Which blocks of a model can be replayed one after the other, and which layers cannot be followed in that way.

A model may hold several stacks of blocks (an encoder, a decoder, heads for each layer), call a block twice, or look at the
outputs of all blocks. What replaying gives is compared with the model itself, on a few images.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from ..runtime.distributed import SINGLE_PROCESS, Processes
from ..runtime.forward import evaluation_mode, placement
from ..runtime.hooks import hooks_removed_on_exit
from ..runtime.inputs import ModelInputs
from ..runtime.logging import get_logger
from ..runtime.outputs import PLAIN_CALL, ModelCall
from ..runtime.stacks import blocks_around
from .segments import Call, SegmentReplay


logger = get_logger(__name__)

_IMAGES = 2
"""Number of images on which replaying is compared with the model."""


@dataclass(frozen=True)
class Route:
    """The segments of a model that can be replayed.

    Attributes:
        segments: In the order of their calls.
        left_out: Module names of layers that cannot be followed.
        own_outputs: Whether every segment has to be replaced by its own output; see `SegmentReplay`.
    """

    segments: tuple[str, ...]
    left_out: frozenset[str] = frozenset()
    own_outputs: bool = False


def find_route(
    model: nn.Module,
    names: Sequence[str],
    batches: Sequence[ModelInputs],
    call: ModelCall = PLAIN_CALL,
    processes: Processes = SINGLE_PROCESS,
) -> Route:
    """Return the segments around layers of a model, as far as they can be replayed; one line names what cannot.

    Args:
        model: The original model.
        names: Module names of the layers.
        batches: Images of this process.
        call: How the model is called.
        processes: The processes that share the images; all get the same route.
    """
    own = None
    with processes.raise_on_all_ranks():
        if batches:
            with evaluation_mode(model):
                own = _find_route(model, names, ModelInputs.of(batches[0])[:_IMAGES], call)
    found = next((each for each in processes.gather(own) if each is not None), Route(()))
    if found.left_out:
        shown = sorted(found.left_out)
        more = f" and {len(shown) - 3} more" if len(shown) > 3 else ""
        logger.info(f"Layer-wise steps leave out layers that cannot be followed: {', '.join(shown[:3])}{more}.")
    return found


def _find_route(model: nn.Module, names: Sequence[str], batch: ModelInputs, call: ModelCall) -> Route:
    around = {name: next(iter(blocks_around(model, name)), "") for name in names}
    counts, calls = _observed(model, names, set(around.values()) - {""}, batch, call)
    # A list of linear layers holds no blocks, but the layers themselves.
    followed = [name for name in names if counts[name] == 1 and around[name] in calls and around[name] != name]
    wanted = {around[name] for name in followed}
    segments = [segment for segment in calls if segment in wanted]
    for own_outputs in (False, True):
        failed = _first_failure(model, segments, own_outputs, batch, call, calls)
        if failed is None:
            break
    while failed is not None:
        segments.remove(failed)
        failed = _first_failure(model, segments, True, batch, call, calls)
    kept = {name for name in followed if around[name] in segments}
    return Route(tuple(segments), frozenset(set(names) - kept), own_outputs)


def _observed(
    model: nn.Module, names: Sequence[str], segments: set[str], batch: ModelInputs, call: ModelCall
) -> tuple[Counter[str], dict[str, Call]]:
    """Return how often layers are called, and the calls of segments that are called once, in their order."""
    counts: Counter[str] = Counter()
    calls: dict[str, Call] = {}
    handles = [
        model.get_submodule(name).register_forward_pre_hook(lambda *_, name=name: counts.update([name]))
        for name in {*names, *segments}
    ]
    handles += [
        model.get_submodule(name).register_forward_pre_hook(
            lambda module, args, kwargs, name=name: calls.update({name: Call(args, kwargs)}), with_kwargs=True
        )
        for name in segments
    ]
    with hooks_removed_on_exit(handles):
        call.run(model, batch.to(*placement(model)))
    return counts, {name: found for name, found in calls.items() if counts[name] == 1}


def _first_failure(
    model: nn.Module,
    segments: Sequence[str],
    own_outputs: bool,
    batch: ModelInputs,
    call: ModelCall,
    calls: dict[str, Call],
) -> str | None:
    """Return the first segment whose inputs are not those in the model when it is replayed; None if there is none."""
    if not segments:
        return None
    position = 0
    try:
        replay = SegmentReplay(model, segments, [batch], call=call, own_outputs=own_outputs)
        while True:
            if not _same(replay.calls[0], calls[segments[position]]):
                return segments[position]
            if not replay.advance():
                return None
            position += 1
    except Exception as error:
        failed = segments[min(position + 1, len(segments) - 1)]
        logger.debug(f"Block {failed!r} is not replayed, since that fails ({type(error).__name__}: {error}).")
        return failed


def _same(found: Call, expected: Call) -> bool:
    pairs = list(zip(found.tensors, expected.tensors, strict=False))
    if len(found.tensors) != len(expected.tensors):
        return False
    return all(
        a.shape == b.shape and (torch.equal(a, b) or torch.allclose(a.float(), b.float(), 1e-3, 1e-5, equal_nan=True))
        for a, b in pairs
    )
