"""Several processes resume an interrupted compression together."""

import pytest
from distributed.launching import SEVERAL, ResultsOfModule


in_several = pytest.mark.parametrize("count", SEVERAL)


@pytest.fixture(scope="module")
def found(results):
    return ResultsOfModule(results, "resuming_cases")


@in_several
@pytest.mark.parametrize("case", ["after_calibration", "training"])
def test_the_result_is_that_of_an_undisturbed_run(found, case, count):
    for each in found[count]:
        assert "error" not in each[case], each[case]
        assert each[case]["resumed"] == each[case]["undisturbed"] == found[count][0][case]["undisturbed"]
        assert not each[case]["left"]


@in_several
def test_statistics_of_a_finished_pass_are_kept(found, count):
    for each in found[count]:
        result = each["after_calibration"]
        assert any(entry.startswith("statistics-") for entry in result["entries"])
        # Images are decoded by the undisturbed and by the interrupted compression, each of which compares its result with
        # the original on them, and not again for statistics.
        assert result["decoded"] == 2 * 2 * 4 * result["own"]


@in_several
def test_training_is_resumed_between_two_steps(found, count):
    assert "step1-training.safetensors" in found[count][0]["training"]["entries"]
