"""Loggers that follow Transformers' verbosity, and print if the program has not configured logging itself.

`transformers.logging.set_verbosity_info()` and the like apply to this package too. A level set for the package itself
takes precedence: `logging.getLogger("optimum_mixrank").setLevel(logging.INFO)`.
"""

from __future__ import annotations

import logging
import sys

from tqdm import tqdm
from transformers.utils import logging as transformers_logging


_ROOT = logging.getLogger(__name__.split(".")[0])

_FOLLOW = 1
"""Level of the package's logger while Transformers' verbosity decides: below every level in use."""


def get_logger(name: str) -> logging.Logger:
    """Return the logger of a module of this package, given its `__name__`."""
    if _ROOT.level == logging.NOTSET:
        _ROOT.setLevel(_FOLLOW)
    if not any(isinstance(handler, _Console) for handler in _ROOT.handlers):
        _ROOT.addHandler(_Console())
    logger = logging.getLogger(name)
    # Filters of a logger do not apply to its children: each needs its own.
    logger.addFilter(_is_wanted)
    return logger


def _is_wanted(record: logging.LogRecord) -> bool:
    return _ROOT.level != _FOLLOW or record.levelno >= transformers_logging.get_verbosity()


class _Console(logging.Handler):
    """Prints to stderr, above progress bars, unless the program has handlers of its own."""

    def emit(self, record: logging.LogRecord) -> None:
        if logging.getLogger().handlers:
            return
        try:
            tqdm.write(self.format(record), file=sys.stderr)
        except Exception:
            self.handleError(record)
