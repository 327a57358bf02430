import datasets
import pytest

from optimum_mixrank.evaluation.labels import find_label_column, map_labels


MODEL = {"tench": 0, "church": 4, "Golf ball": 8}


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
    names = {"Crane": 0, "crane": 1}
    assert map_labels(dataset(["crane", "Crane"]), "label", names) == [1, 0]


def test_by_index(caplog):
    names = {f"LABEL_{index}": index for index in range(3)}
    assert map_labels(dataset(["n01", "n02", "n03"]), "label", names) == [0, 1, 2]
    assert "labels are matched by index" in caplog.text


@pytest.mark.parametrize(
    ("names", "unknown"),
    [
        pytest.param(["n01", "n02"], "'n01', 'n02'", id="other names and number"),
        pytest.param(["church", "tench", "golf"], "'golf'", id="only some names"),
    ],
)
def test_classes_that_do_not_match(names, unknown):
    message = rf"dataset has {len(names)} classes, the model 3; the model does not know \[{unknown}\].*label2id"
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
