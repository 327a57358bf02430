"""Several processes resume an interrupted compression together."""

import pytest
from distributed.launching import run_cases


COUNT = 2


@pytest.fixture(scope="module")
def found(tmp_path_factory, environment):
    folder = tmp_path_factory.mktemp("resuming")
    return run_cases("resuming_cases", COUNT, folder / "cases", environment)


@pytest.mark.parametrize("case", ["after_calibration", "training"])
def test_the_result_is_that_of_an_undisturbed_run(found, case):
    for each in found:
        assert "error" not in each[case], each[case]
        assert each[case]["resumed"] == each[case]["undisturbed"] == found[0][case]["undisturbed"]
        assert not each[case]["left"]


def test_statistics_of_a_finished_pass_are_kept(found):
    for each in found:
        result = each["after_calibration"]
        assert any(entry.startswith("statistics-") for entry in result["entries"])
        # Images are decoded by the undisturbed and by the interrupted compression, and not again.
        assert result["decoded"] == 2 * 4 * result["own"]


def test_training_is_resumed_between_two_steps(found):
    assert "step1-training.safetensors" in found[0]["training"]["entries"]
