"""The peak of memory that benchmarks measure."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch


FILE = Path(__file__).parents[2] / "benchmarks" / "peak_memory.py"
SIZE = 64 * 2**20


@pytest.fixture
def peak_memory():
    spec = importlib.util.spec_from_file_location("peak_memory", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells the peak of a process")
def test_a_peak_is_remembered_until_the_next_measurement(peak_memory):
    peak = peak_memory.PeakMemory()
    if peak.host is None:
        pytest.skip("the kernel does not tell the memory of this process")
    torch.ones(SIZE, dtype=torch.uint8)
    # The kernel counts pages in batches, and other tests may have left memory that is used again.
    assert SIZE / 2 < peak.host < 2 * SIZE
    assert peak.resident > peak.host
    assert peak.device is None
    assert peak_memory.PeakMemory().host < SIZE / 4


def test_elsewhere_it_is_unknown(peak_memory, monkeypatch):
    monkeypatch.setattr(peak_memory, "_kernel_bytes", lambda name: None)
    peak = peak_memory.PeakMemory()
    assert peak.resident is None and peak.host is None
