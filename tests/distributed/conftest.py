"""Several processes on the CPU, even on a machine with GPUs."""

import os

import pytest
from distributed.launching import Results


@pytest.fixture(scope="session")
def environment():
    # With one thread each, the same batch gives the same floating-point numbers in any process.
    return {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="session")
def results(tmp_path_factory, environment):
    return Results(tmp_path_factory.mktemp("cases"), environment)
