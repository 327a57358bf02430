"""The C library is told to return memory only under a memory limit."""

import pytest
import torch

from optimum_mixrank.runtime import malloc
from optimum_mixrank.runtime.malloc import bounded_heap, trim_heap


@pytest.fixture
def calls(monkeypatch):
    """Calls of the C library's functions, which are not made; the environment sets no threshold."""
    found = []
    monkeypatch.setattr(malloc, "_function", lambda name, *arguments: lambda *values: found.append((name, *values)))
    for name in ("MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES"):
        monkeypatch.delenv(name, raising=False)
    return found


def test_large_blocks_and_freed_pages_are_returned_inside(calls):
    with bounded_heap(True):
        assert calls == [("mallopt", malloc._MMAP_THRESHOLD, malloc.LARGE_BLOCK)]
        trim_heap()
        assert calls[1:] == [("malloc_trim", 0)]
        trim_heap(torch.device("cuda"))
    trim_heap()
    assert len(calls) == 2


def test_nothing_happens_without_a_limit(calls):
    trim_heap()
    with bounded_heap(False):
        trim_heap()
    assert not calls


def test_nothing_happens_after_an_error(calls):
    with pytest.raises(KeyError), bounded_heap(True):
        raise KeyError
    trim_heap()
    assert len(calls) == 1


@pytest.mark.parametrize(
    ("name", "value"),
    [("MALLOC_MMAP_THRESHOLD_", "1073741824"), ("GLIBC_TUNABLES", "glibc.malloc.mmap_threshold=1073741824")],
)
def test_a_threshold_of_the_user_is_respected(name, value, calls, monkeypatch):
    monkeypatch.setenv(name, value)
    with bounded_heap(True):
        trim_heap()
    assert calls == [("malloc_trim", 0)]


def test_the_real_allocator_accepts_both_calls():
    with bounded_heap(True):
        trim_heap()
