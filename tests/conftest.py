"""Threads: several test processes at once must not fight for the cores. Property tests: the same examples every time."""

import os

from hypothesis import HealthCheck, settings


if "PYTEST_XDIST_WORKER" in os.environ:
    # Before torch is imported, here and in the processes that tests start.
    os.environ.setdefault("OMP_NUM_THREADS", "1")


# A machine under load is slow, which is no fault of the code.
settings.register_profile(
    "mixrank", max_examples=50, derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("mixrank")
