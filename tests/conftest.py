"""What holds for all tests: threads, who runs what, examples of property tests, and reports without pictures."""

import functools
import os

import pytest
from hypothesis import HealthCheck, settings


if "PYTEST_XDIST_WORKER" in os.environ:
    # Several test processes at once must not fight for the cores. Before torch is imported, here and in the processes
    # that tests start.
    os.environ.setdefault("OMP_NUM_THREADS", "1")


# The same examples every time. A machine under load is slow, which is no fault of the code.
settings.register_profile(
    "mixrank", max_examples=50, derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("mixrank")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Tests of a file share its fixtures, and those of `distributed` a start of several processes: keep them together."""
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            file = nodeid.split("::")[0]
            return "distributed" if "/distributed/" in file else file

    return ByFile(config, log)


_WITH_PICTURES = {"reporting"}


@pytest.fixture(autouse=True, scope="module")
def pages_without_pictures(request):
    """Drawing takes longer than compressing and saving a tiny model; commands that tests start as programs do draw."""
    if request.path.parent.name in _WITH_PICTURES:
        yield
        return
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("optimum_mixrank.reporting.html.draw_pictures", lambda *reports: [])
        yield


@pytest.fixture
def short_residuals(monkeypatch):
    """A few steps of "residual", for tests in which it does not matter how well they end."""
    from optimum_mixrank.compensation.layerwise.residual import ResidualCompensator

    short = functools.partialmethod(ResidualCompensator.__init__, steps=60)
    monkeypatch.setattr(ResidualCompensator, "__init__", short)
