"""The phases of a compression: how long each takes, and one log line about it."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from .formatting import format_duration
from .logging import get_logger
from .malloc import trim_heap


logger = get_logger(__name__)


@dataclass
class Phase:
    """A running or finished phase: the details for its log line, and its duration, 0 while it runs."""

    details: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def add_detail(self, *details: str) -> None:
        """Add details to the log line."""
        self.details.extend(details)


@contextmanager
def phase(done: str, level: int = logging.INFO) -> Iterator[Phase]:
    """Time a phase; at its end log what was done, with details and duration: `Calibrated: 512 images, 12.3 s`.

    After an error nothing is logged. Inside `bounded_heap`, memory freed before and in the phase returns to the system.
    """
    trim_heap()
    current = Phase()
    start = time.perf_counter()
    yield current
    trim_heap()
    current.seconds = time.perf_counter() - start
    logger.log(level, f"{done}: {', '.join([*current.details, format_duration(current.seconds)])}")
