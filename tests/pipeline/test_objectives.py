"""Models with other outputs than classes, from compression to evaluation without labels."""

import pytest
import torch
from families.catalogue import FAMILIES
from families.checks import settings

from optimum_mixrank import MixRankCompressor
from optimum_mixrank.reporting.html import render_html
from optimum_mixrank.reporting.table import format_table
from optimum_mixrank.reporting.verdict import verdict


CASES = {
    "YOLOS": ("detection", {"matched_boxes", "kl", "feature_error"}, "boxes found by both"),
    "Conditional DETR": ("detection", {"matched_boxes", "kl", "feature_error"}, "boxes found by both"),
    "Segformer, segmentation": ("segmentation", {"mask_iou", "agreement", "kl"}, "IoU of masks"),
    "SAM": ("masks", {"mask_iou", "kl"}, "IoU of masks"),
    "Depth Anything": ("depth", {"feature_error", "correlation"}, "relative error of the output"),
    "ViTPose": ("heatmaps", {"feature_error", "correlation"}, "relative error of the output"),
    "MGP-STR": ("tokens", {"agreement", "kl"}, "the same class"),
    "CLIP, tower": ("embeddings", {"cosine_similarity", "retrieval_agreement", "feature_error"}, "cosine similarity"),
}
OFTEN = ("YOLOS", "Segformer, segmentation", "Depth Anything", "CLIP, tower")


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in OFTEN else pytest.mark.slow) for n in CASES])
def test_from_compression_to_evaluation(name):
    kind, measures, reason = CASES[name]
    family = FAMILIES[name]
    model, batches = family.make(), family.batches()
    compressor = MixRankCompressor(model)
    compressed = compressor.compress(
        settings(compensation=["sequential"], compression_ratio=0.5, probed_images=0), batches
    )
    fidelity = compressor.report.fidelity
    assert fidelity["kind"] == kind and reason in verdict(compressor.report).reason
    # Of the few images that are held out no nearest one can be found.
    assert measures - {"retrieval_agreement"} <= set(fidelity)

    result = compressor.evaluate(compressed, batches)
    assert result.kind == kind and result.top1 is None
    values = {key: value for key, value in result.to_dict().items() if value is not None}
    assert set(values) == measures | {"num_images", "kind"}
    itself = compressor.evaluate(model, batches) if name in OFTEN else None
    for measure in () if itself is None else measures:
        best = 0.0 if measure in ("kl", "feature_error") else 1.0
        assert itself.to_dict()[measure] == pytest.approx(best, abs=1e-9)
        assert abs(values[measure] - best) > 0 or measure in (
            "matched_boxes",
            "retrieval_agreement",
            "mask_iou",
            "agreement",
        )
    assert compressor.report.evaluation == result.to_dict()
    text, page = format_table(compressor.report), render_html(compressor.report)
    assert "Left out" in text and "The targeted layers are" in page


def test_detections_are_distilled():
    family = FAMILIES["YOLOS"]
    model, batches = family.make(), family.batches()
    compressor = MixRankCompressor(model)
    config = settings(
        compensation=["distillation"], compression_ratio=0.5, probed_images=0, epochs=2, train_batch_size=4
    )
    compressor.compress(config, batches)
    (step,) = compressor.report.compensation
    assert all(torch.isfinite(torch.tensor(step["details"]["errors"])))
