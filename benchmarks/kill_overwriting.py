"""Kill the saving of a checkpoint over an older one at every file operation, and open what is there.

    python benchmarks/kill_overwriting.py

The places are a plain folder, a folder behind a link, and a mount point (a tmpfs, which only root may mount; it is skipped
otherwise), each with nothing but the older checkpoint, and with a file of the user's beside it; the older checkpoint is one
file or shards. For each of them, a process saves the new checkpoint of the shipped Fashion-MNIST model and gets SIGKILL
before its first operation on files, then before its second, and so on until it comes to its end.

Checked are, after every kill, that plain `from_pretrained` opens the old or the new model, told by their logits, and that
the user's file is there; and that saving once more leaves the new checkpoint, the user's file, and nothing else.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForImageClassification, PreTrainedModel
from transformers.utils import logging

from optimum_mixrank import MixRankCompressor, MixRankConfig
from optimum_mixrank.checkpoint import replacing


SHIPPED = Path(__file__).parent.parent / "examples" / "fashion_mnist"
PLACES = ("plain", "link", "mount")
OPERATIONS = ("replace", "rename", "link", "unlink", "mkdir", "rmdir", "fsync")
IMAGES = torch.randn(4, 3, 28, 28, generator=torch.Generator().manual_seed(0))
USERS = "thesis.tex"


@dataclass(frozen=True)
class Checkpoints:
    """The older checkpoint in both forms, the model that is to replace it, and the logits of both."""

    older: dict[str, Path]
    compressor: MixRankCompressor
    model: PreTrainedModel
    logits: tuple[torch.Tensor, torch.Tensor]


def logits_of(model: PreTrainedModel) -> torch.Tensor:
    """Return the logits of a few fixed images."""
    with torch.no_grad():
        return model.eval()(pixel_values=IMAGES).logits


def make(folder: Path) -> Checkpoints:
    """Compress the shipped model by two ratios, and save the first result."""
    compressor = MixRankCompressor.from_pretrained(SHIPPED / "model")
    old, new = (
        compressor.compress(MixRankConfig(recipe="fast", compression_ratio=ratio), list(IMAGES.split(2)))
        for ratio in (0.3, 0.6)
    )
    older = {"one file": folder / "whole", "shards": folder / "shards"}
    compressor.save_pretrained(old, older["one file"])
    compressor.save_pretrained(old, older["shards"], max_shard_size="1MB")
    return Checkpoints(older, compressor, new, (logits_of(old), logits_of(new)))


@contextlib.contextmanager
def place(kind: str, folder: Path) -> Iterator[Path]:
    """Provide an output of a kind in a folder.

    Raises:
        OSError: if nothing may be mounted.
    """
    output = folder / "out"
    if kind == "plain":
        yield output
    elif kind == "link":
        (folder / "target").mkdir()
        output.symlink_to(folder / "target")
        yield output
    else:
        output.mkdir()
        mounted = subprocess.run(["mount", "-t", "tmpfs", "tmpfs", str(output)], capture_output=True, text=True)
        if mounted.returncode:
            raise OSError(mounted.stderr.strip())
        try:
            yield output
        finally:
            subprocess.run(["umount", str(output)], check=True)


def save(checkpoints: Checkpoints, output: Path, kill_at: int | None) -> bool:
    """Save the new checkpoint in a process of its own; return whether it came to its end before it was killed."""
    child = os.fork()
    if child == 0:
        try:
            if kill_at is not None:
                _kill_before(kill_at)
            checkpoints.compressor.save_pretrained(checkpoints.model, output, overwrite=True)
            os._exit(0)
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return False
    if os.waitstatus_to_exitcode(status):
        raise SystemExit(f"Saving to {output} failed.")
    return True


def _kill_before(number: int) -> None:
    """Kill this process before the operation with this number."""
    left = [number]

    def counted(function: Callable[..., object]) -> Callable[..., object]:
        def wrapped(*args: object, **kwargs: object) -> object:
            if not left[0]:
                os.kill(os.getpid(), signal.SIGKILL)
            left[0] -= 1
            return function(*args, **kwargs)

        return wrapped

    for name in OPERATIONS:
        setattr(os, name, counted(getattr(os, name)))
    replacing.exchange = counted(replacing.exchange)


def prepare(output: Path, older: Path, with_file: bool) -> None:
    """Put the older checkpoint into a place, whatever is there."""
    output.mkdir(exist_ok=True)
    for each in output.iterdir():
        shutil.rmtree(each) if each.is_dir() else each.unlink()
    shutil.copytree(older, output, dirs_exist_ok=True)
    if with_file:
        (output / USERS).write_text("mine")


def problem_after(checkpoints: Checkpoints, output: Path, with_file: bool) -> tuple[str, str]:
    """Return which of the two checkpoints opens, and what is wrong, if anything is."""
    if with_file and not (output / USERS).is_file():
        return "", "the file of the user's is gone"
    try:
        found = logits_of(AutoModelForImageClassification.from_pretrained(output))
    except Exception as error:
        return "", f"it does not open: {type(error).__name__}: {error}"
    for name, expected in zip(("old", "new"), checkpoints.logits, strict=True):
        if torch.equal(found, expected):
            return name, ""
    return "", "it opens as neither"


def kill_everywhere(checkpoints: Checkpoints, folder: Path, output: Path, older: Path, with_file: bool) -> list[str]:
    """Kill at one operation after the other; print what opened, and return the problems."""
    opened: Counter[str] = Counter()
    problems, number, finished = [], 0, False
    expected = {"README.md", "config.json", "mixrank_report.json", "model.safetensors", "report.html"}
    expected |= {"preprocessor_config.json"} & set(os.listdir(older)) | ({USERS} if with_file else set())
    beside = set(os.listdir(folder)) | {"out"}
    while not finished:
        prepare(output, older, with_file)
        finished = save(checkpoints, output, number)
        found, problem = problem_after(checkpoints, output, with_file)
        opened[found] += not finished
        if not problem:
            save(checkpoints, output, None)
            left = (set(os.listdir(output)) ^ expected) | (set(os.listdir(folder)) - beside)
            problem = f"left over or missing: {', '.join(sorted(left)[:3])}" if left else ""
        if problem:
            problems.append(f"operation {number}: {problem}")
        number += 1
    print(f"{number - 1} kills, {opened['old']} opened the old, {opened['new']} the new", end="", flush=True)
    return problems


def main(arguments: Sequence[str] | None = None) -> int:
    """Run; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--places", nargs="+", choices=PLACES, default=list(PLACES), help="default: all")
    args = parser.parse_args(arguments)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    # A fork must not inherit the threads of others.
    torch.set_num_threads(1)
    failures = 0
    with tempfile.TemporaryDirectory() as older_folder:
        checkpoints = make(Path(older_folder))
        for kind in args.places:
            with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
                try:
                    output = stack.enter_context(place(kind, Path(folder)))
                except OSError as error:
                    print(f"{kind}: skipped, nothing may be mounted ({error})")
                    continue
                for form, older in checkpoints.older.items():
                    for with_file in (False, True):
                        print(f"{kind}, {form}, {'with a file beside' if with_file else 'alone'}: ", end="")
                        problems = kill_everywhere(checkpoints, Path(folder), output, older, with_file)
                        failures += len(problems)
                        print("".join(f"\n  {each}" for each in problems))
    print(f"{failures} problems")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
