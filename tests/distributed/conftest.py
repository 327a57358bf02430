"""Several processes on the CPU, whatever the machine has."""

import os

import pytest


@pytest.fixture(scope="session")
def environment():
    # One thread each, so that the same batch gives the same floating point numbers in any process.
    return {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
