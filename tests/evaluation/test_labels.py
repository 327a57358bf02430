import datasets
import pytest

from optimum_mixrank.evaluation.labels import find_label_column, map_labels


MODEL = {0: "tench", 4: "church", 8: "Golf ball"}


def dataset(names, column="label"):
    features = datasets.Features({column: datasets.ClassLabel(names=names)})
    return datasets.Dataset.from_dict({column: list(range(len(names)))}, features=features)


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        pytest.param(["church", "golf BALL", "tench"], [4, 8, 0], id="another order and case"),
        pytest.param(["Church"], [4], id="some classes of the model"),
    ],
)
def test_by_name(names, expected, caplog):
    assert map_labels(dataset(names), "label", MODEL) == expected
    assert not caplog.records


def test_names_that_differ_by_case():
    names = {0: "Crane", 1: "crane"}
    assert map_labels(dataset(["crane", "Crane"]), "label", names) == [1, 0]


def test_by_index(caplog):
    names = {index: f"LABEL_{index}" for index in range(3)}
    assert map_labels(dataset(["n01", "n02", "n03"]), "label", names) == [0, 1, 2]
    assert "labels are matched by index" in caplog.text


TWO_CRANES = {0: "cock", 1: "crane", 2: "crate", 3: "crane"}
"""As in ImageNet, where a bird and a machine have the same name."""


@pytest.mark.parametrize(
    "names",
    [
        pytest.param(["cock", "crane", "crate", "crane2"], id="told apart by the dataset"),
        pytest.param(["n01", "n02", "n03", "n04"], id="folders of another name"),
        pytest.param(["Cock", "n02", "crate", "crane"], id="some names"),
    ],
)
def test_a_name_of_two_classes_is_matched_by_index(names, caplog):
    assert map_labels(dataset(names), "label", TWO_CRANES) == [0, 1, 2, 3]
    unknown = [name for name in names if name.lower() not in TWO_CRANES.values()]
    assert ", ".join(unknown[:3]) in caplog.text and "labels are matched by index" in caplog.text


def test_a_name_of_two_classes_that_no_index_tells():
    message = r"dataset has 2 classes, the model 4; the model has several classes for each of \['crane'\]"
    with pytest.raises(ValueError, match=message):
        map_labels(dataset(["crate", "crane"]), "label", TWO_CRANES)
    # Where that name is not needed, the others are enough.
    assert map_labels(dataset(["crate", "cock"]), "label", TWO_CRANES) == [2, 0]


@pytest.mark.parametrize(
    ("names", "unknown"),
    [
        pytest.param(["n01", "n02"], "'n01', 'n02'", id="other names and number"),
        pytest.param(["church", "tench", "golf"], "'golf'", id="only some names"),
    ],
)
def test_classes_that_do_not_match(names, unknown):
    message = rf"dataset has {len(names)} classes, the model 3; the model does not know \[{unknown}\].*id2label"
    with pytest.raises(ValueError, match=message):
        map_labels(dataset(names), "label", MODEL)


def test_numbers_are_taken_as_they_are():
    assert map_labels(datasets.Dataset.from_dict({"label": [0, 2]}), "label", MODEL) is None


@pytest.mark.parametrize(
    ("data", "column"),
    [
        pytest.param(dataset(["a", "b"], "breed"), "breed", id="class label"),
        pytest.param(datasets.Dataset.from_dict({"labels": [1], "image": [2]}), "labels", id="by name"),
        pytest.param(datasets.Dataset.from_dict({"image": [2]}), None, id="none"),
    ],
)
def test_find_label_column(data, column):
    assert find_label_column(data) == column
