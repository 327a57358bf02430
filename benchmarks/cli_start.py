"""How much slower `optimum-cli --help` is with the commands of this package than without them.

    python benchmarks/cli_start.py --repeats 20

Both are started in turns, each first as often as the other. Without means that an empty module takes the place of the one
by which `optimum-cli` finds the commands. Printed are, in seconds on the clock and on the processors, the medians and the
median of the differences within pairs with a 95 % interval (sign test). What else runs on the machine lengthens the
former.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time

from optimum_mixrank.evaluation.latency import median_interval


WITH = "from optimum.commands.optimum_cli import main; main()"
WITHOUT = (
    f"import sys, types; sys.modules['optimum.commands.register.register_mixrank'] = types.ModuleType('none'); {WITH}"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=20, help="pairs that are timed; default 20")
    args = parser.parse_args()
    programs = {"with": WITH, "without": WITHOUT}
    assert b"mixrank" in _help(WITH) and b"mixrank" not in _help(WITHOUT)
    clock: dict[str, list[float]] = {name: [] for name in programs}
    processor: dict[str, list[float]] = {name: [] for name in programs}
    for repeat in range(args.repeats):
        for name in sorted(programs, reverse=bool(repeat % 2)):
            start, used = time.perf_counter(), _used_by_children()
            _help(programs[name])
            clock[name].append(time.perf_counter() - start)
            processor[name].append(_used_by_children() - used)
    print(json.dumps({"clock": _compared(clock), "processor": _compared(processor)}, indent=2))


def _compared(seconds: dict[str, list[float]]) -> dict[str, float]:
    differences = [ours - theirs for ours, theirs in zip(seconds["with"], seconds["without"], strict=True)]
    low, high = median_interval(differences)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return {**medians, "difference": statistics.median(differences), "low": low, "high": high}


def _used_by_children() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def _help(program: str) -> bytes:
    return subprocess.run([sys.executable, "-c", program, "--help"], check=True, capture_output=True).stdout


if __name__ == "__main__":
    main()
