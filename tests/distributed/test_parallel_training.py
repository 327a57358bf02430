"""Models whose layers share factors or have lost units are trained in several processes."""

import pytest
from distributed.launching import SEVERAL, ResultsOfModule


@pytest.fixture(scope="module")
def found(results):
    return ResultsOfModule(results, "training_cases")


@pytest.mark.parametrize("count", SEVERAL)
@pytest.mark.parametrize("layout", ["factors", "pivoted"])
@pytest.mark.parametrize("kind", ["data_parallel", "fully_sharded"])
def test_several_processes_take_the_steps_of_one(found, kind, layout, count):
    for each in found[count]:
        result = each[f"{kind}_{layout}"]
        assert "error" not in result, result
        assert result["difference"] < 1e-4 < 1e-2 < result["moved"]
