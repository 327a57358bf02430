"""Each phase of a compression logs one line when it ends."""

import logging

import pytest
from models import pixels, tiny_vit

from optimum_mixrank import MixRankCompressor, MixRankConfig
from optimum_mixrank.runtime.phases import phase


@pytest.fixture(autouse=True)
def info(caplog):
    with caplog.at_level(logging.INFO, "optimum_mixrank"):
        yield


def test_a_line_per_phase(tmp_path, caplog):
    compressor = MixRankCompressor(tiny_vit())
    images = [pixels(8), pixels(8, seed=1)]
    model = compressor.compress(
        MixRankConfig(compression_ratio=0.3, compression_scope="targets", compensation=["sequential"]), images
    )
    compressor.evaluate(model, images)
    compressor.save_pretrained(model, tmp_path / "out")
    lines = [record.getMessage() for record in caplog.records if record.name == "optimum_mixrank.runtime.phases"]
    beginnings = [
        "Decoded: 16 images, ",
        # Sixteen patches and the class token.
        "Calibrated: 16 images, 272 tokens per layer, ",
        # Query, key and value by themselves and together, and the output of attention; MLPs are chosen from as a whole.
        "Decomposed: 10 layers, ",
        "Chose hidden units: 2 blocks, ",
        "Measured losses: 12 structures, ",
        "Allocated: ranks ",
        "Factorized: ",
        "Compensated (sequential): error on 2 held-out images ",
        "Compared with the original: 2 images, ",
        "Evaluated: 16 images, agreement ",
        f"Saved: {tmp_path / 'out'}, ",
    ]
    assert [line[: len(beginning)] for line, beginning in zip(lines, beginnings, strict=True)] == beginnings
    assert all(line.endswith(" s") for line in lines)
    (step,) = compressor.report.compensation
    assert f"{step['error_before']:.4g} -> {step['error_after']:.4g}, {'' if step['kept'] else 'not '}kept" in lines[7]


def test_a_phase_tells_its_details_and_its_duration(caplog):
    with phase("Calibrated") as calibrating:
        calibrating.add_detail("512 images", "3 layers")
        assert calibrating.seconds == 0
    assert caplog.messages == [f"Calibrated: 512 images, 3 layers, {calibrating.seconds:.2f} s"]


def test_a_phase_that_fails_logs_nothing(caplog):
    with pytest.raises(ValueError, match="no luck"), phase("Tried"):
        raise ValueError("no luck")
    assert not caplog.messages
