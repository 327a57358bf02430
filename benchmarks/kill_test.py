"""Kill real compressions at random moments of every phase, go on with the same command, and compare the results.

    python benchmarks/kill_test.py --times 50 --seed 0
    python benchmarks/kill_test.py --times 20 --processes 2
    python benchmarks/kill_test.py --overwriting

The command is `optimum-cli mixrank compress` on the shipped Fashion-MNIST model. It runs undisturbed twice, which gives
the expected files and how long each phase takes. Then, again and again: it starts, gets SIGKILL at a moment drawn
uniformly over a phase, the phases taking turns, and starts again until it comes to its end, sometimes killed once or
twice more on the way. Every other time the output holds an older checkpoint that is to be replaced.

Checked are, after every kill, that the output is as it was before or complete; and at the end, that the SHA-256 of every
file is that of the undisturbed run, and that nothing else is left. Only what the report states of time and memory is
left out.

With `--overwriting`, only the last step is killed, while it replaces an older checkpoint in a plain folder, behind a link
and on a mount point, at every single operation on files; see `kill_overwriting.py`.

Phases are told by what lies on the disk: no run yet (start), its folder (decoding and calibration), its statistics
(decomposition, allocation, factorization, compensation), the folder that is being saved (saving), the new output
(tidying up).
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path


SHIPPED = Path(__file__).parent.parent / "examples" / "fashion_mnist"
PHASES = ("start", "calibration", "compensation", "saving", "tidying")
LIMIT = 600.0


@dataclass
class Started:
    """A run of the command in a process group of its own.

    Attributes:
        poll: Exit code, or None while it runs.
        group: Of its processes.
        log: What it prints.
    """

    poll: Callable[[], int | None]
    group: int
    log: Path

    def kill(self) -> None:
        """End all its processes at once."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.group, signal.SIGKILL)
        while self.poll() is None:
            time.sleep(0.001)


class Command:
    """The command, and what it has left on the disk.

    Args:
        folder: For all output.
        options: Of `optimum-cli mixrank compress` beside model, dataset and output.
        processes: That share the work.
        fork: Start it as a copy of this process, which has imported everything already.
    """

    def __init__(self, folder: Path, options: Sequence[str], processes: int = 1, fork: bool = False) -> None:
        self.out = folder / "out"
        self._folder = folder
        self._options = options
        self._processes = processes
        self._fork = fork
        if fork:
            import optimum_mixrank.pipeline.compressor  # noqa: F401 - so that no copy has to

    def start(self, *more: str) -> Started:
        """Start it."""
        arguments = ["mixrank", "compress", "--model", f"{SHIPPED / 'model'}", "--dataset", f"{SHIPPED / 'data'}"]
        arguments += ["--split", "calibration", "--output", str(self.out), "--quiet", *self._options, *more]
        log = self._folder / "log.txt"
        if self._fork:
            return _fork(arguments, log)
        command = [sys.executable, "-m"]
        if self._processes > 1:
            command += ["accelerate.commands.launch", "--multi_gpu", f"--num_processes={self._processes}"]
            command += [
                "--num_machines=1",
                "--mixed_precision=no",
                "--dynamo_backend=no",
                "--main_process_port=0",
                "-m",
            ]
        command += ["optimum.commands.optimum_cli", *arguments]
        environment = {**os.environ, "ACCELERATE_USE_CPU": "true"} if self._processes > 1 else None
        with log.open("w") as stream:
            process = subprocess.Popen(
                command, stdout=stream, stderr=subprocess.STDOUT, start_new_session=True, env=environment
            )
        return Started(process.poll, process.pid, log)

    @property
    def unfinished(self) -> Path:
        """Where it notes what is finished."""
        return self.out.with_name("out.unfinished")

    def phase(self, before: tuple[int, int] | None) -> str:
        """Where it is, by what lies on the disk.

        Args:
            before: What identified the output before, see `output_identity`.
        """
        if self.output_identity() != before:
            return "tidying"
        if any(self._folder.glob(".out.saving-*")):
            return "saving"
        if any(self.unfinished.glob("statistics-*.safetensors")):
            return "compensation"
        return "calibration" if (self.unfinished / "run.safetensors").exists() else "start"

    def output_identity(self) -> tuple[int, int] | None:
        """Of the output folder; None if there is none."""
        try:
            status = self.out.stat()
        except FileNotFoundError:
            return None
        return status.st_dev, status.st_ino

    def clear(self) -> None:
        """Remove everything."""
        for each in self._folder.iterdir():
            shutil.rmtree(each) if each.is_dir() else each.unlink()

    def leftovers(self) -> list[str]:
        """What lies beside the output."""
        return sorted(each.name for each in self._folder.iterdir() if each.name not in ("out", "log.txt"))


def _fork(arguments: Sequence[str], log: Path) -> Started:
    child = os.fork()
    if child == 0:
        os.setsid()
        with log.open("w") as stream:
            os.dup2(stream.fileno(), 1)
            os.dup2(stream.fileno(), 2)
        from optimum.commands.optimum_cli import main

        sys.argv = ["optimum-cli", *arguments]
        code = 1
        try:
            main()
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1
        finally:
            os._exit(code)
    found: list[int] = []

    def poll() -> int | None:
        if not found:
            process, status = os.waitpid(child, os.WNOHANG)
            if process:
                found.append(os.waitstatus_to_exitcode(status))
        return found[0] if found else None

    return Started(poll, child, log)


def hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of every file; of what states times and peaks of memory, without them."""
    found = {}
    for file in sorted(folder.rglob("*")):
        content = file.read_bytes()
        if file.name == "mixrank_report.json":
            report = json.loads(content)
            del report["seconds"], report["memory"]
            content = json.dumps(report).encode()
        elif file.suffix in (".md", ".html"):
            content = re.sub(rb"\b[\d.,]+ (s|[KMG]iB)\b", b"-", content)
        found[file.name] = hashlib.sha256(content).hexdigest()
    return found


def undisturbed(command: Command) -> tuple[dict[str, str], dict[str, float]]:
    """The expected files, and the seconds that each phase takes."""
    command.clear()
    begun = {"start": time.monotonic()}
    run = command.start()
    while run.poll() is None:
        begun.setdefault(command.phase(None), time.monotonic())
        time.sleep(0.001)
    if run.poll() != 0:
        raise SystemExit(f"The undisturbed run failed:\n{run.log.read_text()}")
    ends = [*list(begun.values())[1:], time.monotonic()]
    return hashes(command.out), {name: end - start for (name, start), end in zip(begun.items(), ends, strict=True)}


def kill_in(command: Command, phase: str, delay: float, *more: str) -> tuple[str, Started]:
    """Start the command and kill it so many seconds after a phase has begun; where it was, or `end` if it was over."""
    before = command.output_identity()
    run = command.start(*more)
    wanted = PHASES[PHASES.index(phase) :]
    while run.poll() is None and command.phase(before) not in wanted:
        time.sleep(0.001)
    until = time.monotonic() + delay
    while run.poll() is None and time.monotonic() < until:
        time.sleep(0.001)
    if run.poll() is not None:
        return "end", run
    reached = command.phase(before)
    run.kill()
    return reached, run


def main() -> int:
    """Run; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=50, help="runs that are killed at least once; default 50")
    parser.add_argument("--seed", type=int, default=0, help="of the moments; default 0")
    parser.add_argument("--processes", type=int, default=1, help="that share the work; default 1")
    parser.add_argument("--fork", action="store_true", help="start runs as copies of this process: no time to import")
    parser.add_argument("--num-samples", default="160", help="calibration images; default 160")
    parser.add_argument("--compensation", nargs="+", default=["sequential", "blocks", "distillation"])
    parser.add_argument("--overwriting", action="store_true", help="kill only the replacing of a checkpoint")
    args = parser.parse_args()
    if args.overwriting:
        # It needs models in memory, which all else here leaves to the command.
        import kill_overwriting

        return kill_overwriting.main([])
    options = ["--num-samples", args.num_samples, "--epochs", "2", "--batch-size", "16", "--save-interval", "0.05"]
    options += ["--compensation", *args.compensation, "--seed", "1"]
    draw = random.Random(args.seed)
    kills: Counter[str] = Counter()
    failures: list[str] = []
    with tempfile.TemporaryDirectory() as older_folder, tempfile.TemporaryDirectory() as folder:
        command = Command(Path(folder), options, args.processes, args.fork)
        # Twice, since nothing can be expected that is not the same each time; at the first, files are read from a disk.
        first, _ = undisturbed(command)
        expected, seconds = undisturbed(command)
        if first != expected:
            raise SystemExit("Two undisturbed runs have different results, so that none can be expected.")
        print("undisturbed: " + ", ".join(f"{name} {seconds.get(name, 0):.2f} s" for name in PHASES), flush=True)
        older = Path(older_folder) / "out"
        command.out.rename(older)
        # So that old and new cannot be taken for each other.
        with (older / "README.md").open("a") as card:
            card.write("An older checkpoint.\n")
        old = hashes(older)
        for number in range(args.times):
            more = ["--overwrite"] if number % 2 else []
            command.clear()
            if more:
                shutil.copytree(older, command.out)
            phase, problem = PHASES[number % len(PHASES)], ""
            reached, allowed = [], [expected, old if more else {}]
            for _ in range(draw.choice((1, 1, 2, 3))):
                found, run = kill_in(command, phase, draw.uniform(0, seconds.get(phase, 0)), *more)
                reached.append(found)
                now = hashes(command.out) if command.out.exists() else {}
                if now not in allowed:
                    problem = f"output is half-written: {sorted(now)}"
                if found == "end" or (now == expected and not command.unfinished.exists()):
                    break
                phase = draw.choice(PHASES)
            kills.update(each for each in reached if each != "end")
            if (hashes(command.out) if command.out.exists() else {}) != expected or command.unfinished.exists():
                run = command.start(*more)
                limit = time.monotonic() + LIMIT
                while run.poll() is None and time.monotonic() < limit:
                    time.sleep(0.01)
                run.kill()
                if run.poll() != 0:
                    problem = problem or f"exit code {run.poll()}: {run.log.read_text()[-500:]}"
            found_files = hashes(command.out) if command.out.exists() else {}
            if found_files != expected:
                differing = sorted(
                    name for name in {**expected, **found_files} if expected.get(name) != found_files.get(name)
                )
                problem = problem or f"other files: {', '.join(differing)}"
            elif command.leftovers() and reached[-1] != "tidying":
                problem = problem or f"left over: {', '.join(command.leftovers())}"
            print(f"{number + 1:>4}  killed in {', '.join(reached):<40}  {problem or 'the same'}", flush=True)
            if problem:
                failures.append(problem)
    print("\nphase         kills")
    for name in PHASES:
        print(f"{name:<12}  {kills[name]:>5}")
    print(f"\n{args.times} runs, {sum(kills.values())} kills, {len(failures)} differ")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
