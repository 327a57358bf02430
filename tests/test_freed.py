"""Memory that has been freed."""

import pytest

from optimum_mixrank.runtime import malloc as freed


@pytest.fixture
def mallopt(monkeypatch):
    calls = []
    monkeypatch.setattr(freed, "_function", lambda name, *arguments: lambda *values: calls.append((name, *values)))
    freed.set_mmap_threshold.cache_clear()
    yield calls
    freed.set_mmap_threshold.cache_clear()


def test_large_blocks_are_kept_apart_once(mallopt, monkeypatch):
    for name in ("MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES"):
        monkeypatch.delenv(name, raising=False)
    freed.set_mmap_threshold()
    freed.set_mmap_threshold()
    assert mallopt == [("mallopt", freed._MMAP_THRESHOLD, freed.LARGE_BLOCK)]


@pytest.mark.parametrize(
    ("name", "value"),
    [("MALLOC_MMAP_THRESHOLD_", "1073741824"), ("GLIBC_TUNABLES", "glibc.malloc.mmap_threshold=1073741824")],
)
def test_a_threshold_of_the_users_stays(name, value, mallopt, monkeypatch):
    monkeypatch.setenv(name, value)
    freed.set_mmap_threshold()
    assert mallopt == []
