"""Compressions that are interrupted in all processes at the same time, and resumed."""

import hashlib

from calibration.pictures import processor, write
from compensation.cases import config, images
from models import tiny_vit

from optimum_mixrank import MixRankCompressor
from optimum_mixrank.calibration.images import collating
from optimum_mixrank.compensation.training.whitening import WhitenedAdam
from optimum_mixrank.pipeline import compress as pipeline


VIT = tiny_vit()


class Interruption(Exception):  # noqa: N818 - not an error of the compression
    pass


def compress(processes, folder, name, source, run=None, **changes):
    settings = config(**{"epochs": 2, "train_batch_size": 8, **changes})
    compressor = MixRankCompressor(VIT, processor())
    arguments = {"resume_directory": run, "save_interval": 1e-9, "batch_size": 4, "max_broken_share": 0.1}
    compressor.compress(settings, source, folder / name, **arguments)
    return hashlib.sha256((folder / name / "model.safetensors").read_bytes()).hexdigest()


def interrupted(processes, folder, name, owner, function, calls, source, **changes):
    """Return hashes of an undisturbed compression, and of one that was interrupted at a call with the given number."""
    undisturbed = compress(processes, folder, f"{name}-undisturbed", source, **changes)
    original, count = getattr(owner, function), 0

    def interrupting(*arguments, **options):
        nonlocal count
        count += 1
        if count == calls:
            raise Interruption
        return original(*arguments, **options)

    run = folder / f"{name}-run"
    setattr(owner, function, interrupting)
    try:
        compress(processes, folder, name, source, run, **changes)
    except Exception as error:
        assert count == calls, error
    finally:
        setattr(owner, function, original)
    assert count == calls
    entries = sorted(file.name for file in run.iterdir())
    return {
        "undisturbed": undisturbed,
        "entries": entries,
        "resumed": compress(processes, folder, name, source, run, **changes),
        "left": run.exists(),
    }


def case_after_calibration(processes, folder):
    paths = sorted(map(str, write(folder / f"files-{processes.index}", 36, broken=[2, 17]).iterdir()))
    decoded = []
    decode = collating.decode_image
    collating.decode_image = lambda item, *args: decoded.append(item) or decode(item, *args)
    try:
        result = interrupted(
            processes, folder, "calibration", pipeline, "factorize_layers", 1, paths, compensation=[], metric="kfac"
        )
    finally:
        collating.decode_image = decode
    return {**result, "decoded": len(decoded), "own": sum(processes.owns(batch) for batch in range(9))}


def case_training(processes, folder):
    source = list(images(40).split(8))
    steps = ["sequential", "distillation"]
    return interrupted(
        processes, folder, "training", WhitenedAdam, "step", 5, source, compensation=steps, metric="svd"
    )
