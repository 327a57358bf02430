"""Several processes go on together with what they had finished."""

import pytest
from distributed.launching import run_cases


COUNT = 2


@pytest.fixture(scope="module")
def found(tmp_path_factory, environment):
    folder = tmp_path_factory.mktemp("resuming")
    return run_cases("resuming_cases", COUNT, folder / "cases", environment)


@pytest.mark.parametrize("case", ["calibration", "training"])
def test_the_result_is_that_of_an_undisturbed_run(found, case):
    for each in found:
        assert "error" not in each[case], each[case]
        assert each[case]["resumed"] == each[case]["undisturbed"] == found[0][case]["undisturbed"]
        assert not each[case]["left"]


def test_each_process_goes_on_with_its_own_batches(found):
    for index, each in enumerate(found):
        assert f"calibration.{index}.safetensors" in each["calibration"]["entries"]
        own = [4 * batch + image for batch in range(index, 9, COUNT) for image in range(4)]
        again = own[4 * 3 :]
        assert each["calibration"]["decoded"] == 2 * len(own) - len(own[4 * 4 :]) + len(again)


def test_training_goes_on_between_two_steps(found):
    assert "step1-training.safetensors" in found[0]["training"]["entries"]
