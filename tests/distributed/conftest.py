"""Several processes on the CPU, even on a machine with GPUs."""

import os

import pytest


@pytest.fixture(scope="session")
def environment():
    # With one thread each, the same batch gives the same floating-point numbers in any process.
    return {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
