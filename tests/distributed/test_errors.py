"""An error in one process is raised in all, and none is left waiting."""

import pytest
from distributed.launching import COUNTS, SEVERAL, ResultsOfModule


@pytest.fixture(scope="module")
def found(results):
    return ResultsOfModule(results, "error_cases")


ANYWHERE = {
    "broken_images": "ValueError: At least 2 of 12 images (16.7%) cannot be decoded, more than max_broken_share=0.05",
    "nan_in_an_image": "ValueError: `pixel_values` of item 1 contain NaN or Inf",
    "images_of_two_sizes": "ValueError: Images of different sizes: [3, 32, 32] and [3, 64, 64]",
    "no_images": "ValueError: There are no images to use",
    "a_source_that_fails": "the disk is gone",
    "a_source_that_fails_at_once": "FileNotFoundError: there is no disk",
    "a_folder_with_files": "is not empty; choose another",
    "a_full_disk": "OSError: No space left on device",
    "in_place": "no luck",
    "training_that_diverges": "ValueError: Distilling: the loss is nan in epoch 1; lower learning_rate=",
    "training_that_fails": "MemoryError: out of memory",
}
AMONG_SEVERAL = {
    "different_orders": "ValueError: The processes were given different images, or the same in different orders",
    "different_lists": "ValueError: The processes were given different images",
    "a_prepared_loader": "shares its batches out over the processes already",
    "different_weights": "ValueError: The processes hold models with different weights",
}


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("case", ANYWHERE)
def test_errors_are_those_of_one_process(found, case, count):
    for each in found[count]:
        assert ANYWHERE[case] in each[case]["error"]


@pytest.mark.parametrize("count", SEVERAL)
@pytest.mark.parametrize("case", AMONG_SEVERAL)
def test_errors_that_occur_only_among_several_processes(found, case, count):
    for each in found[count]:
        assert AMONG_SEVERAL[case] in each[case]["error"]
    assert "error" not in found[1][0][case]


@pytest.mark.parametrize("count", COUNTS)
def test_the_processes_are_in_step_afterwards(found, count):
    assert [each["work_after_all_that"]["num_images"] for each in found[count]] == [12] * count
    assert all(each["in_place"]["same"] for each in found[count])


@pytest.mark.parametrize("count", COUNTS)
def test_an_accelerator_may_be_made_later(found, count):
    for each in found[count]:
        assert each["work_then_an_accelerator"].get("precision") == "bf16", each["work_then_an_accelerator"]
        assert each["work_then_an_accelerator"]["num_images"] == [12, 12]


@pytest.mark.parametrize("count", COUNTS)
def test_nothing_was_written(found, results, count):
    assert found[count]
    folder = results.folder / str(count) / "error_cases"
    assert [file.name for file in (folder / "full").iterdir()] == ["notes.txt"]
    assert not (folder / "new").exists()
