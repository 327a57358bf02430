"""A run that all processes break off at the same time, and start again."""

import hashlib

from calibration.pictures import processor, write
from compensation.cases import config, images
from models import tiny_vit

from optimum_mixrank import MixRankCompressor
from optimum_mixrank.calibration.fisher import GradientCollector
from optimum_mixrank.calibration.images import collating
from optimum_mixrank.compensation.training import loop as training


VIT = tiny_vit()


class BrokenOffError(Exception):
    """The end."""


def compress(processes, folder, name, source, run=None, **changes):
    settings = config(**{"epochs": 2, "train_batch_size": 8, **changes})
    compressor = MixRankCompressor(VIT, processor())
    arguments = {"resume_directory": run, "save_interval": 1e-9, "batch_size": 4, "max_broken_share": 0.1}
    compressor.compress(settings, source, folder / name, **arguments)
    return hashlib.sha256((folder / name / "model.safetensors").read_bytes()).hexdigest()


def broken_off(processes, folder, name, owner, method, calls, source, **changes):
    """Hashes of an undisturbed run and of one in which a method failed at a call with this number."""
    undisturbed = compress(processes, folder, f"{name}-undisturbed", source, **changes)
    original, count = getattr(owner, method), 0

    def failing(*arguments, **options):
        nonlocal count
        count += 1
        if count == calls:
            raise BrokenOffError
        return original(*arguments, **options)

    run = folder / f"{name}-run"
    setattr(owner, method, failing)
    try:
        compress(processes, folder, name, source, run, **changes)
        raise AssertionError("it was to fail")
    except Exception as error:
        assert "AssertionError" not in repr(error), error
    finally:
        setattr(owner, method, original)
    entries = sorted(file.name for file in run.iterdir())
    return {
        "undisturbed": undisturbed,
        "entries": entries,
        "resumed": compress(processes, folder, name, source, run, **changes),
        "left": run.exists(),
    }


def case_calibration(processes, folder):
    paths = sorted(map(str, write(folder / f"files-{processes.index}", 36, broken=[2, 17]).iterdir()))
    decoded = []
    decode = collating.decode_image
    collating.decode_image = lambda item, name: decoded.append(item) or decode(item, name)
    try:
        found = broken_off(
            processes, folder, "calibration", GradientCollector, "update", 4, paths, compensation=[], metric="kfac"
        )
    finally:
        collating.decode_image = decode
    # Undisturbed, until it broke off in the fourth batch, and from there.
    return {**found, "decoded": len(decoded), "own": len([i for i in range(9) if processes.owns(i)])}


def case_training(processes, folder):
    source = list(images(40).split(8))
    steps = ["sequential", "distillation"]
    return broken_off(
        processes, folder, "training", training.WhitenedAdam, "step", 5, source, compensation=steps, metric="svd"
    )
