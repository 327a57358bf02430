"""The phases of a compression: how long each took, and a line about it at its end."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from .freed import return_freed_memory
from .messages import get_logger


logger = get_logger(__name__)


@dataclass
class Phase:
    """A phase that runs, or has run.

    Attributes:
        facts: What its line tells, in order.
        seconds: How long it took; 0 while it runs.
    """

    facts: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def tell(self, *facts: str) -> None:
        """Add to the line at the end."""
        self.facts.extend(facts)


@contextmanager
def phase(done: str, level: int = logging.INFO) -> Iterator[Phase]:
    """Time a phase; at its end say so in one line, `Calibrated: 512 images, 12.3 s`. After an error nothing is said.

    What was freed before it and in it goes back to the system.

    Args:
        done: What has been done then.
        level: Of the message.
    """
    return_freed_memory()
    current = Phase()
    start = time.perf_counter()
    yield current
    return_freed_memory()
    current.seconds = time.perf_counter() - start
    logger.log(level, f"{done}: {', '.join([*current.facts, duration(current.seconds)])}")


def duration(seconds: float) -> str:
    """`0.12 s`, `12.3 s`, `2 min 5 s` or `1 h 2 min`."""
    if seconds < 1:
        return f"{seconds:.2f} s"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def count(number: float) -> str:
    """`950`, `25.6 k` or `1.3 M`."""
    if number < 1000:
        return f"{number:.0f}"
    return f"{number / 1e3:.1f} k" if number < 1e6 else f"{number / 1e6:.1f} M"


def size(num_bytes: float) -> str:
    """`4.7 MB`."""
    return f"{count(num_bytes)}B" if num_bytes >= 1000 else f"{num_bytes:.0f} B"
