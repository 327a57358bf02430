"""What is checked of a family: compression, reloading, the way back to a dense model, a step of training, and more."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from optimum_mixrank import MixRankCompressor, MixRankConfig, to_dense
from optimum_mixrank.runtime.inputs import ModelInputs
from optimum_mixrank.runtime.outputs import ModelCall
from optimum_mixrank.runtime.parts import part_of, takes

from .zoo import Family


def settings(**changes: Any) -> MixRankConfig:
    """Return a configuration for a tiny model: the default recipe, with few images and a ratio for the targets alone."""
    few = {"compression_ratio": 0.3, "compression_scope": "targets", "seed": 0, "probed_images": 2}
    return MixRankConfig(**{**few, **changes})


def tensors_of(output: Any) -> list[Tensor]:
    """Return all tensors of an output, however they are nested."""
    if isinstance(output, Tensor):
        return [output]
    if isinstance(output, Mapping):
        return [tensor for value in output.values() for tensor in tensors_of(value)]
    if isinstance(output, Sequence) and not isinstance(output, str):
        return [tensor for value in output for tensor in tensors_of(value)]
    return []


CHECKS = ("compress", "reload", "dense", "train")
"""What is always checked."""

COSTLY = ("compile", "export")
"""What is checked where it is asked for."""


def check_family(family: Family, config: MixRankConfig | None = None, also: Sequence[str] = ()) -> dict[str, Any]:
    """Compress, save, reload, return to dense and train; return what came of each, `"yes"` or the error.

    What fails of reloading and of `COSTLY` for the original model too is listed as `"original_fails"`.

    Args:
        family: The family.
        config: How it is compressed.
        also: Which of `COSTLY` to check too.
    """
    torch.manual_seed(0)
    model = family.make()
    batches = family.batches()
    compressor = MixRankCompressor(model)
    results: dict[str, Any] = {}
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with tempfile.TemporaryDirectory() as folder:
        made = compressor.compress(config or settings(), batches, save_directory=folder).eval()
        results["compress"] = "yes"
        changed = [name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])]
        assert not changed, f"the original changed: {changed[:3]}"
        report = compressor.report
        assert report is not None
        results["targeted"] = report.targeted_of_model
        results["targeted_of_images"] = report.targeted_of_images
        call = ModelCall().bound(made, ModelInputs(batches[0])[:1])
        results["part"] = call.part or "whole"
        results["objective"] = call(made, batches[0]).kind
        always: dict[str, Callable[[], None]] = {
            "reload": lambda: _check_reloaded(made, family, folder, batches[0], call),
            "dense": lambda: _check_dense(made, batches[0], call),
            "train": lambda: _check_training(made, batches[0], call),
        }
        for name, check in always.items():
            results[name] = _outcome(check)
        if results["reload"] != "yes" and _outcome(lambda: _check_original(model, family, batches[0], call)) != "yes":
            results["original_fails"] = ["reload"]
        costly = {"compile": _check_compiled, "export": _check_exported}
        for name in also:
            results[name] = _outcome(partial(costly[name], made, batches[0], call))
            if results[name] != "yes" and _outcome(partial(costly[name], model.eval(), batches[0], call)) != "yes":
                results.setdefault("original_fails", []).append(name)
    return results


def _outcome(check: Callable[[], None]) -> str:
    """Return `"yes"`, or the error that a check ends with."""
    try:
        check()
    except Exception as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return "yes"


def _outputs(model: nn.Module, batch: dict[str, Tensor], call: ModelCall) -> list[Tensor]:
    with torch.no_grad():
        return tensors_of(call.run(model, ModelInputs(batch)))


def _check_reloaded(made: Any, family: Family, folder: str, batch: dict[str, Tensor], call: ModelCall) -> None:
    reloaded, found = type(made).from_pretrained(folder, output_loading_info=True)
    assert not found["missing_keys"] and not found["unexpected_keys"], found
    reloaded.eval()
    state = reloaded.state_dict()
    for name, tensor in made.state_dict().items():
        assert torch.equal(state[name], tensor), f"{name} differs"
    # Weights in a file begin at any address, which some kernels round by: copies begin at even ones.
    outputs = (_outputs(copy.deepcopy(each), batch, call) for each in (made, reloaded))
    for before, after in zip(*outputs, strict=True):
        # A family whose random weights give NaN needs others: nothing could be compared.
        assert not before.isnan().any(), "NaN in the outputs"
        assert torch.equal(before, after), "outputs differ"


def _check_original(model: Any, family: Family, batch: dict[str, Tensor], call: ModelCall) -> None:
    with tempfile.TemporaryDirectory() as folder:
        model.eval().save_pretrained(folder)
        _check_reloaded(model, family, folder, batch, call)


def _check_dense(made: Any, batch: dict[str, Tensor], call: ModelCall) -> None:
    dense = to_dense(copy.deepcopy(made))
    with tempfile.TemporaryDirectory() as folder:
        dense.save_pretrained(folder)
        reloaded = type(made).from_pretrained(folder).eval()
    for before, after in zip(_outputs(made, batch, call), _outputs(reloaded, batch, call), strict=True):
        if before.is_floating_point():
            assert torch.allclose(before, after, rtol=1e-2, atol=1e-3, equal_nan=True), "outputs differ"


def _check_training(made: Any, batch: dict[str, Tensor], call: ModelCall) -> None:
    # Some families, such as Idefics, hold their towers frozen.
    model = copy.deepcopy(made).train().requires_grad_()
    output = call.select(model, call.run(model, ModelInputs(batch)), len(ModelInputs(batch)))
    sum(tensor.square().mean() for tensor in output.tensors).backward()
    # Of a tower whose last block is not used, such as LLaVA's, that block alone may have been compressed.
    assert any(each.grad is not None and bool(each.grad.count_nonzero()) for each in model.parameters()), (
        "no gradients"
    )


class _Part(nn.Module):
    """What of a model takes the inputs, as a module of its own."""

    def __init__(self, model: nn.Module, call: ModelCall) -> None:
        super().__init__()
        self.model, self.part = model, call.part

    def forward(self, **inputs: Tensor) -> Any:
        return part_of(self.model, self.part)(**inputs)


def _given(made: Any, batch: dict[str, Tensor], call: ModelCall) -> tuple[nn.Module, dict[str, Tensor], list[Tensor]]:
    """Return the part, its inputs and its outputs."""
    part, inputs = _Part(made, call).eval(), dict(ModelInputs(batch).only(takes(part_of(made, call.part))))
    # Some draw random masks.
    torch.manual_seed(0)
    with torch.no_grad():
        return part, inputs, tensors_of(part(**inputs))


def _check_compiled(made: Any, batch: dict[str, Tensor], call: ModelCall) -> None:
    part, inputs, expected = _given(made, batch, call)
    torch._dynamo.reset()
    # The graphs of Inductor, without the compiler of C++.
    compiled = torch.compile(part, backend="aot_eager")
    torch.manual_seed(0)
    with torch.no_grad():
        _check_close(expected, tensors_of(compiled(**inputs)))


def _check_exported(made: Any, batch: dict[str, Tensor], call: ModelCall) -> None:
    part, inputs, expected = _given(made, batch, call)
    with torch.no_grad():
        program = torch.export.export(part, (), inputs, strict=False)
        torch.manual_seed(0)
        _check_close(expected, tensors_of(program.module()(**inputs)))


def _check_close(expected: Sequence[Tensor], found: Sequence[Tensor]) -> None:
    for before, after in zip(expected, found, strict=True):
        if before.is_floating_point():
            assert torch.allclose(before, after, rtol=1e-3, atol=1e-4), "outputs differ"
