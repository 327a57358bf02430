"""What a budget would cost, before anything is compressed."""

import pytest
from models import pixels, tiny_vit

from optimum_mixrank import MixRankCompressor, MixRankConfig


RATIOS = (0.2, 0.4, 0.6, 0.8)


@pytest.mark.parametrize(("metric", "unit"), [("kfac", "nats per image"), ("second_moment", "normalised energies")])
def test_profile_is_monotone_and_agrees_with_compress(metric, unit):
    compressor = MixRankCompressor(tiny_vit())
    calibration = compressor.calibrate([pixels(16)], metric)
    config = MixRankConfig(recipe="best", metric=metric, compression_scope="targets", compensation=[])
    profile = compressor.profile(calibration, config, RATIOS[::-1])
    assert [point.ratio for point in profile.points] == list(RATIOS)
    assert unit in profile.unit
    losses = [point.loss for point in profile.points]
    assert losses == sorted(losses) and losses[0] < losses[-1]
    for point in profile.points:
        assert point.kept <= 1 - point.ratio + 1e-9
        config.compression_ratio = point.ratio
        compressor.compress(config, calibration=calibration)
        report = compressor.report
        assert {layer.name: layer.rank for layer in report.layers} == dict(point.ranks)
        assert report.kept_of_encoder == pytest.approx(point.kept)


def test_a_ratio_out_of_reach_is_an_error():
    compressor = MixRankCompressor(tiny_vit())
    calibration = compressor.calibrate([pixels(16)], "kfac")
    with pytest.raises(ValueError, match=r"compression_ratio=0\.99 .* cannot be reached"):
        compressor.profile(calibration, MixRankConfig(compression_scope="targets"), (0.5, 0.99))
