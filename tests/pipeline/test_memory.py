"""What a compression is estimated to need, and what it does within a limit."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from models import pixels, tiny_swin, tiny_vit

from optimum_mixrank import MixRankCompressor, MixRankConfig
from optimum_mixrank.calibration.sites import find_sites
from optimum_mixrank.calibration.targets import encoder_linears
from optimum_mixrank.calibration.task import joint_layers, required_statistics
from optimum_mixrank.compensation.compensator import ActivationStorage
from optimum_mixrank.compensation.segments import SegmentReplay, find_segments
from optimum_mixrank.decomposition import METRICS, Statistic
from optimum_mixrank.pipeline.memory import (
    DEVICE,
    DISK,
    HOST,
    MemoryTask,
    fit_memory,
    parse_limits,
    plan_memory,
    split_layers,
    statistics_bytes,
)
from optimum_mixrank.pipeline.memory_probe import LayerSize, ModelSize, probe_model
from optimum_mixrank.reporting import format_table


SETTINGS = {"compression_scope": "targets", "compression_ratio": 0.4}


def block(index, width=64, tokens=10):
    names = [("q", 1, 1), ("k", 1, 1), ("v", 1, 1), ("o", 1, 1), ("fc1", 4, 1), ("fc2", 1, 4)]
    leaders = {"k": "q", "v": "q"}
    return [
        LayerSize(f"{index}.{name}", (m * width, n * width), tokens, f"{index}.{leaders.get(name, name)}")
        for name, m, n in names
    ]


SIZE = ModelSize(
    layers=[layer for index in range(4) for layer in block(index)],
    weights=4 * 4 * 12 * 64 * 64,
    pixels=3000,
    forward=50_000,
    backward=500_000,
    boundary=10 * 64 * 4,
    outputs=10 * 64 * 9 * 4,
)


def task(metric="kfac", **changes):
    required = {layer.name: METRICS.create(metric).required_statistics(*layer.shape) for layer in SIZE.layers}
    values = {
        "num_images": 8,
        "batch_size": 4,
        **{name: changes.pop(name) for name in ("num_images",) if name in changes},
    }
    return MemoryTask(MixRankConfig(**SETTINGS, **{"compensation": ["sequential"], **changes}), required, **values)


def test_layers_that_share_an_input_count_its_statistics_once():
    covariance = {layer.name: frozenset({Statistic.INPUT_COVARIANCE}) for layer in SIZE.layers}
    assert statistics_bytes(block(0)[:3], covariance) == 8 * 64 * 64
    gradients = {layer.name: frozenset({Statistic.GRADIENT_MOMENT}) for layer in SIZE.layers}
    assert statistics_bytes(block(0)[:3], gradients) == 3 * 8 * 64 * 64


@pytest.mark.parametrize("make", [tiny_vit, tiny_swin])
@pytest.mark.parametrize("metric", ["second_moment", "kfac", "mean_input"])
def test_statistics_take_what_was_estimated(make, metric):
    model = make()
    targets = encoder_linears(model)
    size = probe_model(model, targets, with_gradients=metric == "kfac")
    required = {target.name: METRICS.create(metric).required_statistics(*target.shape) for target in targets}
    layers = MixRankCompressor(model).calibrate([pixels(2)], metric, structures=["rank"]).layers
    tensors = {
        id(tensor): tensor.numel() * tensor.element_size()
        for statistics in layers.values()
        for tensor in (getattr(statistics, statistic.value) for statistic in Statistic)
        if tensor is not None
    }
    estimated = statistics_bytes(size.layers, required)
    # Of Swin's windows there is one mean for all.
    fewer = 0.8 if (make, metric) == (tiny_swin, "mean_input") else 1
    assert fewer * estimated <= sum(tensors.values()) <= estimated
    assert {layer.tokens for layer in size.layers} == {s.num_tokens // 2 for s in layers.values()}


def test_compensation_keeps_the_representative_input():
    settings = task("mean_input", compensation=["residual"])
    needed = {name: required - {Statistic.INPUT_MEAN} for name, required in settings.required.items()}
    held = [
        plan_memory(SIZE, each).phases["factorize"][HOST]
        for each in (settings, dataclasses.replace(settings, required={}))
    ]
    assert held[0] - held[1] == pytest.approx(statistics_bytes(SIZE.layers, needed), abs=1)


@pytest.mark.parametrize("make", [tiny_vit, tiny_swin])
def test_statistics_of_sites_take_what_was_estimated(make):
    model = make()
    targets = encoder_linears(model)
    sites = find_sites(model, targets, ["shared", "width"])
    size = probe_model(model, targets, with_gradients=True)
    required = required_statistics([METRICS.create("kfac")], targets, sites)
    layers = MixRankCompressor(model).calibrate([pixels(2)], "kfac").layers
    storages = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for statistics in layers.values()
        for tensor in (getattr(statistics, statistic.value) for statistic in Statistic)
        if tensor is not None
    }
    assert sum(storages.values()) == statistics_bytes(size.layers, required, joint_layers(sites))


def test_layers_of_a_site_are_calibrated_in_the_same_pass():
    compressor = MixRankCompressor(tiny_vit())
    plan = compressor.memory_plan(MixRankConfig(compression_scope="targets"), num_images=8)
    sites = find_sites(compressor.model, encoder_linears(compressor.model), ["shared", "width"])
    least = compressor.memory_plan(
        MixRankConfig(compression_scope="targets", compensation=[]), num_images=8, max_memory=plan.peak("host") - 1
    )
    for site in sites:
        names = {layer.name for layer in site.layers}
        assert sum(bool(names & set(group)) for group in least.groups) == 1


def test_a_probe_leaves_the_model_alone():
    model = tiny_vit().train()
    size = probe_model(model, encoder_linears(model), with_gradients=True)
    assert model.training and torch.is_grad_enabled()
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())
    assert 0 < size.forward < size.backward
    assert size.boundary == 17 * 32 * 4
    assert size.outputs == 17 * (5 * 32 + 64) * 4


@pytest.mark.parametrize("passes", [1, 2, 3, 100])
def test_groups_hold_every_layer_once_and_sharers_together(passes):
    groups = split_layers(SIZE.layers, passes)
    assert len(groups) == min(passes, 16)
    assert [layer for group in groups for layer in group] == SIZE.layers
    for group in groups:
        names = {layer.name for layer in group}
        assert all(layer.leader in names for layer in group)


def test_more_passes_need_less_for_statistics():
    required = task().required
    largest = [max(statistics_bytes(group, required) for group in split_layers(SIZE.layers, n)) for n in (1, 2, 4)]
    assert largest[0] > largest[1] > largest[2]
    peaks = [plan_memory(SIZE, task(compensation=[]), passes).phases["calibrate"][HOST] for passes in (1, 2)]
    assert peaks[0] > peaks[1]


def test_a_limit_is_kept_to_or_refused():
    plan = plan_memory(SIZE, task(compensation=[]))
    assert fit_memory(SIZE, task(compensation=[]), {HOST: plan.peak(HOST)}).passes == 1
    tight = fit_memory(SIZE, task(compensation=[]), {HOST: plan.peak(HOST) - 1})
    assert tight.passes > 1 and tight.peak(HOST) < plan.peak(HOST)
    with pytest.raises(ValueError, match=r"max_memory allows 0 MiB on the host, but at least .* MiB on the host is"):
        fit_memory(SIZE, task(), {HOST: 1000})


def test_outputs_of_the_original_that_do_not_fit_are_computed_again():
    many = task(num_images=2000)
    plan = plan_memory(SIZE, many)
    kept = 2 * 2000 * SIZE.outputs
    # A place of its own for what computes: there recomputing goes before the disk.
    gpu = dataclasses.replace(SIZE, on_host=False)
    plan = plan_memory(gpu, many)
    tight = fit_memory(gpu, many, {DEVICE: plan.peak(DEVICE) - 1})
    assert (tight.passes, tight.storage) == (1, ActivationStorage(0, on_disk=False))
    assert tight.peak(DEVICE) == plan.peak(DEVICE) - kept


def test_activations_go_to_the_disk_where_they_do_not_fit():
    many = task(num_images=2000)
    plan = plan_memory(SIZE, many)
    activations = 2 * 2 * 2000 * SIZE.boundary
    assert plan.peak(DISK) == 0
    tight = fit_memory(SIZE, many, {HOST: plan.peak(HOST) - 1})
    assert tight.passes == 1 and tight.storage.on_disk and tight.storage.max_output_bytes > 0
    assert tight.peak(HOST) == plan.peak(HOST) - activations and tight.peak(DISK) == activations
    assert "on the disk" in str(tight) and "on the disk" not in str(plan)
    recomputed = plan_memory(SIZE, many, storage=ActivationStorage(0)).peak(HOST)
    both = fit_memory(SIZE, many, {HOST: recomputed - 1})
    assert both.storage == ActivationStorage(0, on_disk=True)
    with pytest.raises(ValueError, match=r"smaller batch_size, fewer images, mirror=False, or compensation=\[\]"):
        fit_memory(SIZE, many, {HOST: 1000})


@pytest.mark.parametrize("make", [tiny_vit, tiny_swin])
@torch.no_grad()
def test_what_a_boundary_takes_is_what_is_held_there(make):
    model = make().eval()
    targets = encoder_linears(model)
    size = probe_model(model, targets, with_gradients=False)
    replay = SegmentReplay(model, find_segments(model, [target.name for target in targets]), [pixels(3)])
    held = [replay.num_bytes]
    while replay.advance():
        held.append(replay.num_bytes)
    assert max(held) == 3 * size.boundary


def test_a_disk_without_room_is_refused_before_work_starts(monkeypatch):
    compressor = MixRankCompressor(tiny_vit())
    on_disk = ActivationStorage(on_disk=True)
    monkeypatch.setattr(
        "optimum_mixrank.pipeline.memory.fit_memory",
        lambda size, task, limits: plan_memory(size, task, storage=on_disk),
    )
    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=1))
    with pytest.raises(ValueError, match=r"do not fit into max_memory, and not into .* set TMPDIR to a folder"):
        compressor.compress(MixRankConfig(**SETTINGS), [pixels(8)], max_memory="1GiB")


def test_a_gpu_has_a_place_of_its_own():
    plan = plan_memory(dataclasses.replace(SIZE, on_host=False), task())
    assert plan.peak("device") > plan.peak(HOST) > 0
    assert "on the device" in str(plan) and "sequential" not in str(plan)


def test_steps_that_train_are_named_as_not_counted():
    plan = plan_memory(SIZE, task(compensation=["sequential", "distillation"]))
    assert plan.not_counted == ("distillation",)
    assert "not counted: distillation" in str(plan)


@pytest.mark.parametrize(
    ("given", "device", "limits"),
    [
        ("2GiB", None, {"host": 2**31}),
        (1000, 0, {"host": 1000, "device": 1000}),
        ({"cpu": "1GB", 1: "2MiB", 0: 5}, 1, {"host": 10**9, "device": 2**21}),
        ({0: "2MiB"}, None, {}),
    ],
)
def test_limits_are_written_as_for_accelerate(given, device, limits):
    assert parse_limits(given, device) == limits


@pytest.mark.parametrize(
    ("wrong", "message"),
    [("much", "max_memory='much' is not a size"), (0, "not positive"), ({"gpu": 5}, "has the key 'gpu'")],
)
def test_wrong_limits(wrong, message):
    with pytest.raises(ValueError, match=message):
        parse_limits(wrong, None)


@pytest.mark.parametrize("recipe", ["fast", "best"])
def test_several_passes_give_the_same_model(recipe, monkeypatch):
    images = [pixels(16, seed=seed) for seed in range(2)]
    config = MixRankConfig(recipe=recipe, **SETTINGS)
    compressor = MixRankCompressor(tiny_vit())
    whole = compressor.compress(config, images, max_memory="1GiB")
    assert compressor.report.memory["passes"] == 1
    needed = compressor.report.memory["estimated_bytes"]["host"]

    def in_passes(size, task, limits):
        assert limits == {HOST: 10 * needed}
        return plan_memory(size, task, passes=3, storage=ActivationStorage(0))

    monkeypatch.setattr("optimum_mixrank.pipeline.memory.fit_memory", in_passes)
    parts = compressor.compress(config, images, max_memory=10 * needed)
    assert compressor.report.memory["passes"] == 3
    assert whole.state_dict().keys() == parts.state_dict().keys()
    for name, tensor in parts.state_dict().items():
        torch.testing.assert_close(tensor, whole.state_dict()[name], rtol=1e-4, atol=1e-5)


def test_memory_is_estimated_only_under_a_limit(monkeypatch, caplog):
    compressor = MixRankCompressor(tiny_vit())
    config = MixRankConfig(recipe="fast", **SETTINGS)
    with monkeypatch.context() as patched:
        patched.setattr("optimum_mixrank.pipeline.memory.probe_model", None)
        patched.setattr("optimum_mixrank.runtime.malloc._set_mmap_threshold", None)
        compressor.compress(config, [pixels(8)])
    assert compressor.report.memory == {}
    caplog.set_level("INFO", "optimum_mixrank")
    compressor.compress(config, [pixels(8)], max_memory="1GiB")
    memory = compressor.report.memory
    assert memory["estimated_bytes"] == {"host": compressor.memory_plan(config, 8).peak(HOST)}
    assert (memory["passes"], memory["disk_bytes"], memory["not_counted"]) == (1, 0, [])
    assert "Memory in addition to the model" in caplog.text and "Memory, estimated" in format_table(compressor.report)
    assert type(compressor.report).from_dict(compressor.report.to_dict()) == compressor.report
    assert "Memory in addition to the model" in str(compressor.memory_plan(config))


def test_what_cannot_be_done_is_refused_before_anything_changes():
    model = tiny_vit()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"at least .* is needed .* smaller batch_size"):
        MixRankCompressor(model).compress(MixRankConfig(**SETTINGS), [pixels(8)], inplace=True, max_memory="1KiB")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_limit_is_checked_before_images_are_decoded(monkeypatch):
    decoded = []
    monkeypatch.setattr("optimum_mixrank.pipeline.compress._decode", lambda *args: decoded.append(1))
    compressor = MixRankCompressor(tiny_vit())
    with pytest.raises(ValueError, match="max_memory allows"):
        compressor.compress(MixRankConfig(**SETTINGS), [pixels(8)], max_memory="1KiB")
    assert not decoded


def test_images_that_can_be_seen_only_once_are_refused_in_several_passes(monkeypatch):
    monkeypatch.setattr(
        "optimum_mixrank.pipeline.memory.fit_memory",
        lambda size, task, limits: plan_memory(size, task, passes=2),
    )
    with pytest.raises(ValueError, match="was used up by an earlier pass"):
        MixRankCompressor(tiny_vit()).compress(
            MixRankConfig(recipe="fast", **SETTINGS), iter([pixels(8)]), max_memory="1GiB"
        )
