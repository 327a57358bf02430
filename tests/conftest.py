"""Threads: several test processes at once must not fight for the cores."""

import os


if "PYTEST_XDIST_WORKER" in os.environ:
    # Before torch is imported, here and in the processes that tests start.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
