"""Activations on disk are the same as in memory, and their files are removed."""

import pytest
import torch
from compensation.cases import FAMILIES, compress, config, images

from optimum_mixrank.calibration.targets import encoder_linears
from optimum_mixrank.compensation.compensator import ActivationStorage
from optimum_mixrank.compensation.layerwise.spilling import Spill, StoredCall, spilled
from optimum_mixrank.compensation.segments import Call, SegmentReplay, find_segments
from optimum_mixrank.pipeline import compress as pipeline


def echo(*args, **kwargs):
    return args, kwargs


def test_a_stored_call_is_the_call(tmp_path):
    hidden, mask = torch.randn(2, 3, 4).transpose(1, 2), torch.tensor([True, False])
    with spilled(True, tmp_path) as keep:
        stored = keep["original"](3, Call((hidden, (7, 7), hidden), {"mask": mask, "flag": None}))
        assert not any(isinstance(each, torch.Tensor) for each in (*stored.args, *stored.kwargs.values()))
        args, kwargs = stored(echo)
        assert torch.equal(args[0], hidden) and args[1] == (7, 7) and torch.equal(args[2], hidden)
        assert torch.equal(kwargs["mask"], mask) and kwargs["flag"] is None
        # The file is replaced; what was read from it stays valid.
        keep["original"](3, Call((hidden + 1,), {}))
        assert torch.equal(args[0], hidden)
        assert len(list(tmp_path.iterdir())) == 1
    assert not list(tmp_path.iterdir())


def test_files_are_removed_after_an_error_too(tmp_path):
    with pytest.raises(RuntimeError, match="in between"), spilled(True, tmp_path) as keep:
        keep["compressed"](0, Call((torch.ones(2),), {}))
        raise RuntimeError("in between")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_replay_from_disk_equals_that_from_memory(family, tmp_path):
    model = FAMILIES[family]().eval()
    segments = find_segments(model, [target.name for target in encoder_linears(model)])
    batches = list(images(6).split(4))
    with spilled(True, tmp_path) as keep:
        held = SegmentReplay(model, segments, batches)
        stored = SegmentReplay(model, segments, batches, keep["original"])
        assert stored.num_bytes == 0 < held.num_bytes
        assert sum(path.stat().st_size for path in tmp_path.iterdir()) > held.num_bytes
        goes_on = True
        while goes_on:
            for one, two in zip(held.calls, stored.calls, strict=True):
                assert isinstance(two, StoredCall)
                assert torch.equal(one(held.segment)[0], two(stored.segment)[0])
            goes_on = held.advance()
            assert stored.advance() == goes_on


@pytest.mark.parametrize("family", ["vit", "swin"])
@pytest.mark.parametrize("step", ["sequential", "residual"])
@pytest.mark.usefixtures("short_residuals")
def test_a_compression_with_activations_on_disk_is_the_same_bit_by_bit(family, step, monkeypatch, tmp_path):
    settings = config(compensation=[step])
    model = FAMILIES[family]()
    direct, _ = compress(model, settings)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    monkeypatch.setattr(pipeline, "IN_MEMORY", ActivationStorage(on_disk=True))
    stored, store = [], Spill.__call__

    def spy(self, index, call):
        stored.append(store(self, index, call))
        assert stored[-1].path.is_relative_to(tmp_path) and stored[-1].path.is_file()
        return stored[-1]

    monkeypatch.setattr(Spill, "__call__", spy)
    again, _ = compress(model, settings)
    assert stored and not list(tmp_path.iterdir())
    for name, tensor in direct.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name
