"""Every measure against its definition, on outputs for which its value is known."""

import pytest
import torch

from optimum_mixrank.evaluation.measures import MEASURES, Comparison, PairMeasure
from optimum_mixrank.runtime.model_output import ModelOutput, binary


def compared(original, output):
    comparison = Comparison()
    comparison.add(original, output, len(original.tensors[0]))
    return comparison.result()[1]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def random(*shape, seed=0):
    return torch.randn(*shape, generator=generator(seed))


def detection(scores, classes, boxes):
    """Boxes of one image with one softmax over three classes and nothing, given scores and classes."""
    logits = torch.full((len(scores), 4), -20.0)
    for row, (score, each) in enumerate(zip(scores, classes, strict=True)):
        logits[row, each], logits[row, 3] = torch.tensor([score, 1 - score]).log()
    return ModelOutput(distributions=(logits[None],), features=(torch.tensor(boxes)[None],), kind="detection")


LEFT, RIGHT, SHIFTED = [0.2, 0.5, 0.2, 0.4], [0.8, 0.5, 0.2, 0.4], [0.22, 0.5, 0.2, 0.4]


@pytest.mark.parametrize(
    ("found", "share"),
    [
        (detection([0.8, 0.9], [1, 0], [RIGHT, SHIFTED]), 1.0),
        (detection([0.8, 0.9], [2, 0], [RIGHT, SHIFTED]), 0.5),  # another class
        (detection([0.8, 0.9], [0, 0], [LEFT, SHIFTED]), 0.5),  # one box is used once
        (detection([0.8, 0.9], [1, 1], [LEFT, LEFT]), 0.0),
        (detection([0.1, 0.2], [1, 0], [RIGHT, LEFT]), 1.0),  # the order counts, not the scores
    ],
)
def test_matched_boxes(found, share):
    original = detection([0.9, 0.7], [0, 1], [LEFT, RIGHT])
    assert compared(original, found)["matched_boxes"] == share


def test_of_an_image_without_sure_boxes_the_best_is_compared():
    original = detection([0.2, 0.1], [0, 1], [LEFT, RIGHT])
    assert compared(original, detection([0.3, 0.1], [0, 1], [LEFT, LEFT]))["matched_boxes"] == 1.0
    assert compared(original, detection([0.1, 0.3], [0, 1], [LEFT, RIGHT]))["matched_boxes"] == 0.0


def test_a_single_value_per_image_correlates_with_nothing():
    values = random(4, 1)
    found = compared(ModelOutput(features=(values,)), ModelOutput(features=(values * 1.1,)))
    assert found.keys() == {"feature_error"} and found["feature_error"] == pytest.approx(0.01)
    both = ModelOutput(features=(values, random(4, 6)))
    assert compared(both, both)["correlation"] == pytest.approx(1)


def quadrangle(box):
    """A rectangle as its centre and the four corners, as offsets that are stored with a half added."""
    x, y, width, height = box
    corners = [(-width, -height), (width, -height), (width, height), (-width, height)]
    return [x, y, *(0.5 + each / 2 for corner in corners for each in corner)]


def test_quadrangles_are_matched_by_the_boxes_around_them():
    """As PP-DocLayout V4 returns them."""
    original, found = (
        [(0.9, 0.7), (0, 1), (LEFT, RIGHT)],
        [(0.8, 0.9), (2, 0), (RIGHT, SHIFTED)],
    )
    plain, turned = (
        [detection(*each[:2], [form(box) for box in each[2]]) for each in (original, found)]
        for form in (list, quadrangle)
    )
    assert compared(*turned)["matched_boxes"] == compared(*plain)["matched_boxes"] == 0.5


def test_boxes_with_a_sigmoid_per_class():
    logits, boxes = torch.tensor([[[3.0, -3.0], [-3.0, 3.0]]]), torch.tensor([[LEFT, RIGHT]])
    original = ModelOutput(distributions=(binary(logits),), features=(boxes,), kind="detection")
    other = ModelOutput(distributions=(binary(logits.flip(-1)),), features=(boxes,), kind="detection")
    assert compared(original, original)["matched_boxes"] == 1.0
    assert compared(original, other)["matched_boxes"] == 0.0


def test_iou_of_class_maps():
    a = torch.tensor([[[0, 0], [1, 1]], [[2, 2], [2, 2]]])
    b = torch.tensor([[[0, 1], [1, 1]], [[2, 2], [2, 2]]])
    outputs = [
        ModelOutput(distributions=(torch.nn.functional.one_hot(each, 4).float(),), kind="segmentation")
        for each in (a, b)
    ]
    found = compared(*outputs)
    # Classes 0 and 1 of the first image have 1 of 2 and 2 of 3 pixels in common; class 3 is nowhere.
    assert found["mask_iou"] == pytest.approx(((1 / 2 + 2 / 3) / 2 + 1) / 2)
    assert found["agreement"] == pytest.approx((3 / 4 + 1) / 2)


def test_iou_of_masks():
    a = torch.tensor([[[[1.0, 1], [-1, -1]], [[-1, -1], [-1, -1]]]])
    b = torch.tensor([[[[1.0, -1], [-1, -1]], [[-1, -1], [-1, -1]]]])
    outputs = [ModelOutput(distributions=(binary(each),), kind="masks") for each in (a, b)]
    assert compared(*outputs)["mask_iou"] == pytest.approx((1 / 2 + 1) / 2)


def test_iou_of_queries():
    masks = torch.tensor([[[[9.0, 9], [-9, -9]], [[-9, -9], [9, 9]]]])
    classes = torch.tensor([[[9.0, 0, 0], [0, 9.0, 0]]])
    outputs = [
        ModelOutput(distributions=(each, binary(masks)), kind="segments") for each in (classes, classes.flip(1))
    ]
    assert compared(outputs[0], outputs[0])["mask_iou"] == 1.0
    # Each class has moved to the other half.
    assert compared(*outputs)["mask_iou"] == 0.0


@pytest.mark.parametrize("kind", ["segmentation", "tokens"])
def test_kl_is_the_mean_over_places(kind):
    a, b = random(2, 3, 5, 4), random(2, 3, 5, 4, seed=1)
    p, q = a.double().softmax(-1), b.double().softmax(-1)
    found = compared(*(ModelOutput(distributions=(each,), kind=kind) for each in (a, b)))
    assert found["kl"] == pytest.approx((p * (p / q).log()).sum(-1).mean().item())
    assert found["agreement"] == pytest.approx((a.argmax(-1) == b.argmax(-1)).double().mean().item())


def test_similarity_of_embeddings():
    a = random(20, 8)
    b = a + 0.6 * random(20, 8, seed=1)
    found = compared(*(ModelOutput(features=(each,), kind="embeddings") for each in (a, b)))
    assert found["cosine_similarity"] == pytest.approx(torch.cosine_similarity(a, b).mean().item(), rel=1e-5)
    nearest = []
    for each in (a, b):
        unit = each / each.norm(dim=1, keepdim=True)
        nearest.append((unit @ unit.T - 2 * torch.eye(20)).argmax(1))
    assert 0 < found["retrieval_agreement"] < 1
    assert found["retrieval_agreement"] == (nearest[0] == nearest[1]).double().mean().item()


def test_the_nearest_image_may_be_in_another_batch():
    a = random(12, 8)
    b = a + 0.5 * random(12, 8, seed=1)
    whole, parts = Comparison(), Comparison()
    outputs = [ModelOutput(features=(each,), kind="embeddings") for each in (a, b)]
    whole.add(*outputs, 12)
    for rows in (slice(0, 5), slice(5, 12)):
        parts.add(*(ModelOutput(features=(each[rows],), kind="embeddings") for each in (a, b)), rows.stop - rows.start)
    assert parts.result()[1] == pytest.approx(whole.result()[1])
    few = Comparison()
    few.add(*(ModelOutput(features=(each[:2],), kind="embeddings") for each in (a, b)), 2)
    assert "retrieval_agreement" not in few.result()[1]


def test_correlation():
    a = random(3, 4, 5)
    for b, expected in ((2 * a + 3, 1.0), (-a, -1.0), (a, 1.0)):
        found = compared(*(ModelOutput(features=(each,), kind="depth") for each in (a, b)))
        assert found["correlation"] == pytest.approx(expected)
    flat = torch.ones(2, 3)
    for other, expected in ((flat, 1.0), (random(2, 3), 0.0)):
        found = compared(*(ModelOutput(features=(each,), kind="depth") for each in (flat, other)))
        assert found["correlation"] == expected


def test_other_kinds_cannot_be_compared():
    with pytest.raises(ValueError, match="different heads"):
        compared(ModelOutput(features=(random(2, 3),), kind="depth"), ModelOutput(logits=random(2, 3)))


def test_one_registration_adds_a_measure(monkeypatch):
    monkeypatch.setattr(MEASURES, "_classes", dict(MEASURES._classes))

    class WithinATenth(PairMeasure):
        name, label, kinds = "within_a_tenth", "depth within a tenth", ("depth",)

        def values(self, original, output):
            (a,), (b,) = original.features, output.features
            return ((a - b).abs() <= 0.1 * a.abs()).flatten(1).double().mean(dim=1)

    MEASURES.register(WithinATenth)
    a = random(2, 4, 4)
    found = compared(*(ModelOutput(features=(each,), kind="depth") for each in (a, 1.05 * a)))
    assert found["within_a_tenth"] == 1.0


class Several:
    """Processes whose values are known."""

    def __init__(self, *others):
        self.others, self.values = others, []

    def gather(self, value):
        self.values.append(value)
        return [value, *self.others]


def test_several_processes_are_compared_like_one():
    outputs = [ModelOutput(features=(each,), kind="embeddings") for each in (random(12, 8), random(12, 8, seed=1))]
    whole, first, second, idle = (Comparison() for _ in range(4))
    whole.add(*outputs, 12)
    for comparison, rows in ((first, slice(0, 5)), (second, slice(5, 12))):
        parts = [ModelOutput(features=(each.features[0][rows],), kind="embeddings") for each in outputs]
        comparison.add(*parts, rows.stop - rows.start)
    states = Several()
    for comparison in (first, second):
        comparison.result(states)
    # A process without images knows neither kind nor measures.
    kind, values = idle.result(Several(*states.values))
    assert (kind, values) == (whole.result()[0], pytest.approx(whole.result()[1]))
