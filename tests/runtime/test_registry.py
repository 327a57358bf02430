"""Registries: names, built-in classes that are imported on demand, and foreign classes."""

import subprocess
import sys

import pytest

from optimum_mixrank import MixRankConfig
from optimum_mixrank.runtime.registry import ALLOCATORS, COMPENSATORS, METRICS, Registry


REGISTRIES = {"metric": METRICS, "allocation": ALLOCATORS, "compensation": COMPENSATORS}


class Sign:
    name = "sign"


@pytest.fixture
def registry():
    return Registry("metric", {"svd": "decomposition.svd"})


def test_built_in_names_come_first(registry):
    registry.register(Sign)
    assert list(registry) == ["svd", "sign"] and len(registry) == 2
    assert "svd" in registry and "sign" in registry and "other" not in registry


@pytest.mark.parametrize("field", REGISTRIES)
def test_every_built_in_name_leads_to_its_class(field):
    for name, cls in REGISTRIES[field].items():
        assert cls.name == name
        assert type(REGISTRIES[field].create(name)) is cls


def test_register_returns_the_class_and_create_an_instance(registry):
    assert registry.register(Sign) is Sign
    assert registry["sign"] is Sign
    assert isinstance(registry.create("sign"), Sign)


def test_an_unknown_name_is_answered_with_the_known_ones(registry):
    registry.register(Sign)
    with pytest.raises(ValueError, match="metric='other' is unknown; choose one of 'svd', 'sign'"):
        registry.create("other")
    with pytest.raises(KeyError):
        registry["other"]


def test_a_name_can_be_registered_once(registry):
    registry.register(Sign)
    with pytest.raises(ValueError, match="metric='sign' is registered already; choose another name"):
        registry.register(type("Other", (), {"name": "sign"}))


@pytest.mark.parametrize(
    ("field", "name"), [(field, name) for field, registry in REGISTRIES.items() for name in registry]
)
def test_a_foreign_class_cannot_take_a_built_in_name(field, name):
    """Not even before the built-in class has been imported."""
    for registry in (REGISTRIES[field], Registry(field, {name: "not.imported.yet"})):
        with pytest.raises(ValueError, match=f"{field}={name!r} is registered already"):
            registry.register(type("Foreign", (), {"name": name}))
    assert REGISTRIES[field][name].__module__.startswith("optimum_mixrank.")


def test_a_registered_metric_is_a_choice_of_the_configuration(monkeypatch):
    monkeypatch.setattr(METRICS, "_classes", dict(METRICS._classes))
    with pytest.raises(ValueError, match="metric='sign' is unknown"):
        MixRankConfig(metric="sign")
    METRICS.register(Sign)
    assert MixRankConfig(metric="sign").metric == "sign"


def test_names_are_known_without_importing_the_classes():
    code = (
        "import sys; from optimum_mixrank.runtime.registry import ALLOCATORS, COMPENSATORS, METRICS; "
        "print(*METRICS, *ALLOCATORS, *COMPENSATORS, 'kfac' in METRICS); "
        "print([name for name in sys.modules if name == 'torch' or name.startswith('optimum_mixrank.decomposition')]); "
        "print(METRICS['svd'].name, 'optimum_mixrank.decomposition.svd' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    names, imported, resolved = result.stdout.splitlines()
    assert names.split() == [*METRICS, *ALLOCATORS, *COMPENSATORS, "True"]
    assert (imported, resolved) == ("[]", "svd True")
