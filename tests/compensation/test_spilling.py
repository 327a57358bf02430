"""Activations on the disk are those in memory, and go with the work."""

import pytest
import torch
from compensation.cases import FAMILIES, compress, config, images

from optimum_mixrank.calibration.targets import encoder_linears
from optimum_mixrank.compensation.layerwise.spilling import StoredCall, spilled
from optimum_mixrank.compensation.segments import Call, SegmentReplay, find_segments
from optimum_mixrank.pipeline.memory_plan import plan_memory


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
        # Written over, while what was read before is still there.
        keep["original"](3, Call((hidden + 1,), {}))
        assert torch.equal(args[0], hidden)
        assert len(list(tmp_path.iterdir())) == 1
    assert not list(tmp_path.iterdir())


def test_files_go_after_an_error_too(tmp_path):
    with pytest.raises(RuntimeError, match="in between"), spilled(True, tmp_path) as keep:
        keep["compressed"](0, Call((torch.ones(2),), {}))
        raise RuntimeError("in between")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_replay_from_the_disk_is_the_replay(family, tmp_path):
    model = FAMILIES[family]().eval()
    segments = find_segments(model, [target.name for target in encoder_linears(model)])
    batches = list(images(6).split(4))
    with spilled(True, tmp_path) as keep:
        ours = SegmentReplay(model, segments, batches)
        stored = SegmentReplay(model, segments, batches, keep["original"])
        assert stored.num_bytes == 0 < ours.num_bytes
        assert sum(path.stat().st_size for path in tmp_path.iterdir()) > ours.num_bytes
        goes_on = True
        while goes_on:
            for one, two in zip(ours.calls, stored.calls, strict=True):
                assert isinstance(two, StoredCall)
                assert torch.equal(one(ours.segment)[0], two(stored.segment)[0])
            goes_on = ours.advance()
            assert stored.advance() == goes_on


@pytest.mark.parametrize("family", ["vit", "swin"])
@pytest.mark.parametrize("step", ["sequential", "residual"])
def test_a_spilled_compression_is_the_same_bit_by_bit(family, step, monkeypatch, tmp_path):
    settings = config(compensation=[step])
    model = FAMILIES[family]()
    direct, report = compress(model, settings)
    assert report.memory["disk_bytes"] == 0
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    monkeypatch.setattr(
        "optimum_mixrank.pipeline.memory_limits.plan_memory", lambda size, task: plan_memory(size, task, spills=True)
    )
    again, report = compress(model, settings)
    assert report.memory["disk_bytes"] > 0 and not list(tmp_path.iterdir())
    for name, tensor in direct.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name
