"""A run that is cut off continues from where it was and ends with the same result, bit by bit."""

import copy
import gc
import shutil
import subprocess
import sys

import pytest
from calibration.pictures import processor, write
from compensation.cases import config, images
from models import tiny_swin, tiny_vit

from optimum_mixrank import MixRankCompressor
from optimum_mixrank.calibration.result import Calibration
from optimum_mixrank.compensation.compensator import ActivationStorage
from optimum_mixrank.compensation.layerwise.spilling import Spill
from optimum_mixrank.pipeline import compressor
from optimum_mixrank.pipeline.memory import plan_memory
from optimum_mixrank.pipeline.unfinished import discard
from optimum_mixrank.reporting import CompressionReport
from optimum_mixrank.runtime.journal import Journal


IMAGES = images(24)


class CutOff(BaseException):
    """The end of a process, as far as Python can tell it."""


@pytest.fixture
def cut_off(monkeypatch):
    """Let the process end when an entry has been written so many times, or has begun to be written."""
    kept = {Journal: Journal.save, Calibration: Calibration.save}

    def prepare(count, before):
        written = []

        def watch(save):
            def watched(self, *arguments, **options):
                written.append(arguments[0])
                if len(written) == count and before:
                    raise CutOff
                save(self, *arguments, **options)
                if len(written) == count:
                    raise CutOff

            return watched

        for cls, save in kept.items():
            monkeypatch.setattr(cls, "save", watch(save))
        return written

    return prepare


def compress(out, run=None, model=None, source=None, image_processor=None, max_memory=None, **changes):
    settings = config(**{"epochs": 1, "train_batch_size": 8, **changes})
    compressor = MixRankCompressor(copy.deepcopy(model or tiny_vit()), image_processor)
    source = list(IMAGES.split(6)) if source is None else source
    compressor.compress(
        settings,
        source,
        out,
        resume_directory=run,
        save_interval=1e-9,
        batch_size=6,
        max_broken_share=0.1,
        max_memory=max_memory,
    )
    return (out / "model.safetensors").read_bytes(), (out / "config.json").read_bytes()


CASES = {
    "one_shot": {"compensation": []},
    "sequential": {"compensation": ["sequential"]},
    "residual_of_swin": {"compensation": ["residual"], "model": tiny_swin(), "layout": "factors"},
    "diagonal": {"compensation": [], "metric": "diagonal"},
    "mean_input": {"compensation": [], "metric": "mean_input"},
    "training": {"compensation": ["sequential", "blocks", "distillation"]},
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.usefixtures("short_residuals")
def test_after_any_entry(case, cut_off, tmp_path):
    expected = compress(tmp_path / "undisturbed", **CASES[case])
    out, run = tmp_path / "out", tmp_path / "out.unfinished"
    entries = cut_off(10**6, before=False)
    assert compress(out, run, **CASES[case]) == expected
    total = len(entries)
    assert total > 2 and not run.exists()
    for count in sorted({1, 2, 3, total // 2, total - 1, total}):
        out = tmp_path / f"out-{count}"
        cut_off(count, before=count % 2 == 0)
        with pytest.raises(CutOff):
            compress(out, run, **CASES[case])
        assert not out.exists() and (count == 1 or run.is_dir())
        cut_off(10**6, before=False)
        assert compress(out, run, **CASES[case]) == expected
        assert not run.exists()


def test_activations_left_on_the_disk_are_not_used_again(cut_off, monkeypatch, tmp_path):
    sequential = {"compensation": ["sequential"]}
    expected = compress(tmp_path / "undisturbed", **sequential)
    on_disk = ActivationStorage(on_disk=True)
    monkeypatch.setattr(
        "optimum_mixrank.pipeline.memory.fit_memory",
        lambda size, task, limits: plan_memory(size, task, storage=on_disk),
    )
    seen, keep = set(), Spill.__call__

    def watched(self, index, call):
        kept = keep(self, index, call)
        seen.add(kept.path.parent)
        return kept

    monkeypatch.setattr(Spill, "__call__", watched)
    out, run = tmp_path / "out", tmp_path / "run"
    entries = cut_off(10**6, before=False)
    sequential["max_memory"] = "1GiB"
    assert compress(out, run, **sequential) == expected
    assert seen == {run}
    # What a process leaves that has no time to clean up.
    interrupted(cut_off, tmp_path / "again", run, len(entries) - 3, **sequential)
    left = run / "activations-original-7.0.safetensors"
    left.write_bytes(b"half of a file")
    cut_off(10**6, before=False)
    assert compress(tmp_path / "again", run, **sequential) == expected
    assert not run.exists()


def test_training_on_high_resolution_images_goes_on(cut_off, tmp_path):
    folder = write(tmp_path / "images", 24, broken=[2, 17])
    changes = {
        "compensation": ["distillation"],
        "metric": "second_moment",
        "source": [str(path) for path in sorted(folder.iterdir())],
        "image_processor": processor(),
    }
    expected = compress(tmp_path / "undisturbed", **changes)
    entries = cut_off(10**6, before=False)
    assert compress(tmp_path / "whole", tmp_path / "run", **changes) == expected
    # In the middle of the epoch.
    last = len(entries) - 3
    interrupted(cut_off, tmp_path / "out", tmp_path / "run", last, **changes)
    assert compress(tmp_path / "out", tmp_path / "run", **changes) == expected


def interrupted(cut_off, out, run, count=2, **changes):
    cut_off(count, before=False)
    with pytest.raises(CutOff):
        compress(out, run, **changes)
    cut_off(10**6, before=False)


FAST = {"compensation": []}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"compression_ratio": 0.4}, "compression_ratio was 0.5 and is 0.4"),
        ({"model": tiny_vit(num_labels=4)}, "different one: model changed[;.]"),
        ({"model": tiny_vit(layer_norm_eps=1e-3)}, "model's config.json changed[;.]"),
        ({"source": list(IMAGES[:18].split(6))}, "num_images was 24 and is 18"),
        ({"source": list(IMAGES.flip(0).split(6))}, "The statistics were taken from images with the fingerprint"),
    ],
    ids=["config", "weights", "model_config", "fewer_images", "other_images"],
)
def test_another_run_is_refused_and_the_unfinished_one_stays(cut_off, tmp_path, changes, message):
    out, run = tmp_path / "out", tmp_path / "run"
    interrupted(cut_off, out, run, **FAST)
    with pytest.raises(ValueError, match=message):
        compress(out, run, **{**FAST, **changes})
    assert not out.exists()
    assert compress(out, run, **FAST) == compress(tmp_path / "undisturbed", **FAST)


def test_a_run_that_fails_before_anything_is_finished_does_not_bind_the_next(tmp_path):
    out, run = tmp_path / "out", tmp_path / "run"
    with pytest.raises(ValueError, match="which needs at least 2"):
        compress(out, run, source=[IMAGES[:1]], compensation=["sequential"])
    assert not run.exists()
    with pytest.raises(ValueError, match="max_memory='lots' is not a size"):
        compress(out, run, max_memory="lots")
    assert not run.exists()
    compress(out, run, **FAST)


def test_why_a_run_failed_is_told_though_its_folder_is_gone(tmp_path, monkeypatch):
    run = tmp_path / "run"

    def fail(_):
        shutil.rmtree(run)
        raise ValueError("the reason")

    monkeypatch.setattr(compressor, "compress", fail)
    with pytest.raises(ValueError, match="the reason"):
        compress(tmp_path / "out", run, **FAST)


@pytest.mark.parametrize("count", [3, 5], ids=["statistics", "compensated"])
def test_work_of_another_run_is_refused(cut_off, tmp_path, count):
    settings = {"compensation": ["sequential"], "metric": "kfac"}
    for number in (1, 2):
        interrupted(cut_off, tmp_path / "out", tmp_path / f"run{number}", count, **settings, seed=number)
    copied = max((tmp_path / "run2").glob("*.safetensors"), key=lambda path: path.stat().st_mtime_ns)
    shutil.copy(copied, tmp_path / "run1" / copied.name)
    message = f"{copied.name}' belongs to another run.* remove '.*run1' and start over"
    with pytest.raises(ValueError, match=message):
        compress(tmp_path / "out", tmp_path / "run1", **settings, seed=1)
    assert not (tmp_path / "out").exists()


def test_a_changed_image_file_is_noticed_before_work(cut_off, tmp_path):
    write(tmp_path / "images", 13, broken=[5])
    paths = sorted((tmp_path / "images").iterdir())
    arguments = {"source": [str(path) for path in paths], "image_processor": processor(), **FAST}
    out, run = tmp_path / "out", tmp_path / "run"
    interrupted(cut_off, out, run, **arguments)
    content = paths[3].read_bytes()
    paths[3].write_bytes(paths[4].read_bytes())
    with pytest.raises(ValueError, match="different one: images changed[.]"):
        compress(out, run, **arguments)
    paths[3].write_bytes(content)
    assert compress(out, run, **arguments) == compress(tmp_path / "undisturbed", **arguments)


def test_a_resumed_run_reports_the_time_of_every_step(cut_off, tmp_path):
    out, run = tmp_path / "out", tmp_path / "run"
    interrupted(cut_off, out, run, **FAST)
    compress(out, run, **FAST)
    seconds = CompressionReport.load(out).seconds
    assert set(seconds) == {"calibrate", "decompose", "allocate", "profile", "factorize", "compensate"}
    assert min(seconds.values()) >= 0


def test_after_saving_but_before_the_folder_is_removed(tmp_path, monkeypatch):
    out, run = tmp_path / "out", tmp_path / "run"
    with monkeypatch.context() as patched:
        patched.setattr("optimum_mixrank.pipeline.unfinished.UnfinishedRun.close", cut)
        with pytest.raises(CutOff):
            compress(out, run, **FAST)
    expected = (out / "model.safetensors").read_bytes(), (out / "config.json").read_bytes()
    # The output is not taken for somebody else's; after the end it is.
    assert compress(out, run, **FAST) == expected and not run.exists()
    with pytest.raises(FileExistsError, match="is not empty"):
        compress(out, run, **FAST)


def test_a_folder_with_other_files_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"holds other files \('notes.txt'\)"):
        compress(tmp_path / "out", tmp_path, **FAST)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_two_processes_do_not_work_on_one_run(cut_off, tmp_path, monkeypatch):
    out, run = tmp_path / "out", tmp_path / "run"
    interrupted(cut_off, out, run, **FAST)
    monkeypatch.setattr("optimum_mixrank.pipeline.unfinished._LOCK_TIMEOUT", 0.1)
    program = "import sys, filelock; lock = filelock.FileLock(sys.argv[1]); lock.acquire(); print(flush=True); input()"
    # What this process holds of the run that was cut off is let go.
    gc.collect()
    with subprocess.Popen(
        [sys.executable, "-c", program, str(run / "lock")], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        other.stdout.readline()
        for work in (lambda: compress(out, run, **FAST), lambda: discard(run)):
            with pytest.raises(ValueError, match="Another process is working on the unfinished run in"):
                work()
        other.kill()
    assert compress(out, run, **FAST) == compress(tmp_path / "undisturbed", **FAST)
    assert not run.exists()


def test_the_folder_stays_until_the_model_is_saved(tmp_path):
    compressor = MixRankCompressor(tiny_vit())
    run = tmp_path / "run"
    model = compressor.compress(config(**FAST), [IMAGES], resume_directory=run)
    assert run.is_dir()
    compressor.save_pretrained(model, tmp_path / "out")
    assert not run.exists()


def cut(*arguments):
    raise CutOff
