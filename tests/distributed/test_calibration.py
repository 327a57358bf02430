"""Two and three real processes give the statistics of one process, up to rounding.

Products are rounded in the precision of the model, and each process subtracts the mean of its own first batch before it
multiplies. The sums and the merging are in float64.
"""

import pytest
from distributed import calibration_cases
from distributed.launching import COUNTS, SEVERAL, ResultsOfModule
from safetensors.torch import load_file


CASES = [name.removeprefix("case_") for name in vars(calibration_cases) if name.startswith("case_")]


@pytest.fixture(scope="module")
def found(results):
    return ResultsOfModule(results, "calibration_cases")


@pytest.mark.parametrize("count", SEVERAL)
@pytest.mark.parametrize("case", CASES)
def test_all_processes_have_the_statistics_of_one(found, case, count):
    [alone] = (each[case] for each in found[1])
    assert "error" not in alone, alone
    expected = load_file(alone["file"])
    for each in found[count]:
        for what in ("num_images", "broken", "fingerprints", "layers"):
            assert each[case][what] == alone[what]
        # All processes hold the same bits.
        assert each[case]["tensors"] == found[count][0][case]["tensors"]
    together = load_file(found[count][0][case]["file"])
    assert together.keys() == expected.keys()
    tolerance = 1e-12 if case.endswith("float64") else 1e-5
    for name, tensor in expected.items():
        assert (together[name] - tensor).abs().max() <= tolerance * tensor.abs().max(), name


@pytest.mark.parametrize("count", COUNTS)
def test_every_image_is_decoded_once(found, count):
    decoded = [each["paths_of_which_one_is_broken"]["decoded"] for each in found[count]]
    assert sorted(name for names in decoded for name in names) == [f"{index:02}.png" for index in range(13)]
    # The processes take turns with batches of four.
    for process, names in enumerate(decoded):
        assert all(int(name[:2]) // 4 % count == process for name in names) and names


@pytest.mark.parametrize("count", COUNTS)
def test_each_process_reads_only_its_share_of_a_dataset_with_a_transform(found, count):
    read = [each["a_dataset_with_a_transform"]["read"] for each in found[count]]
    for process, numbers in enumerate(read):
        # Every process reads the first row, to find out what the dataset contains.
        own = [number for number in range(11) if number // 4 % count == process]
        assert sorted(set(numbers)) == sorted({0, *own})


@pytest.mark.parametrize("count", COUNTS)
def test_only_the_main_process_prints(found, count):
    for case in CASES:
        printed = ["Calibrating" in each[case]["stderr"] for each in found[count]]
        assert printed == [True] + [False] * (count - 1)
    warned = ["Broken image left out" in each["paths_of_which_one_is_broken"]["stderr"] for each in found[count]]
    assert warned == [True] + [False] * (count - 1)
