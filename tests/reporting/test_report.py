import dataclasses
import json
import os

import pytest
from reporting.reports import mixed_report, vit_report

from optimum_mixrank.reporting import REPORT_NAME, CompressionReport, LayerReport, format_table


def layer(name="encoder.layer.0.query", shape=(8, 8), rank=2, kept_energy=0.75, targeted=True):
    m, n = shape
    after = m * n if rank is None else rank * (m + n)
    return LayerReport(name, shape, rank, kept_energy if rank else None, targeted, m * n, after)


def make_report(**changes):
    layers = [
        layer(),
        layer("encoder.layer.0.key", rank=None),
        layer("encoder.layer.0.fc", (16, 8), None, None, False),
    ]
    before, after = sum(each.parameters_before for each in layers), sum(each.parameters_after for each in layers)
    fields = {
        "layers": layers,
        "settings": {"compression_ratio": 0.1, "rank_pattern": {"key": 3}, "target_modules": None},
        "environment": {"python": "3.11.2", "threads": 2},
        "model_parameters_before": before + 44,
        "model_parameters_after": after + 44,
        "bytes_on_disk_before": 1200,
        "bytes_on_disk_after": 1072,
        "dtype_on_disk_before": "float16",
        "dtype_on_disk_after": "float32",
        "flops_before": 10**9,
        "flops_after": 8 * 10**8,
        "calibration": {"num_images": 512, "num_tokens": 8704, "num_broken": 1},
        "seconds": {"calibrate": 1.25, "decompose": 0.1},
        "evaluation": {
            "num_images": 100,
            "top1": 0.83,
            "reference_top1": 0.87,
            "kl": 0.1 + 0.2,
            "feature_error": None,
        },
    }
    return CompressionReport(**{**fields, **changes})


def test_ratios_against_the_definitions():
    report = make_report()
    # 64 -> 32 factored, 64 targeted but dense, 128 excluded; 44 parameters outside of the encoder's weights.
    assert report.kept_of_encoder == pytest.approx(224 / 256)
    assert report.removed_of_encoder == pytest.approx(32 / 256)
    assert report.removed_of_targets == pytest.approx(32 / 128)
    assert report.removed_of_model == pytest.approx(32 / 300)
    assert report.layers[0].kept == 0.5


def test_nothing_targeted_is_nothing_removed():
    assert make_report(layers=[layer(targeted=False)]).removed_of_targets == 0


@pytest.mark.parametrize(
    "changes",
    [{}, {"evaluation": None, "flops_before": None, "bytes_on_disk_before": None}, {"settings": {"pattern": (1, 2)}}],
    ids=["full", "sparse", "tuple"],
)
def test_json_round_trip_is_exact(changes, tmp_path):
    report = make_report(**changes)
    text = json.dumps(report.to_dict())
    assert CompressionReport.from_dict(json.loads(text)) == report
    assert json.dumps(CompressionReport.from_dict(json.loads(text)).to_dict()) == text
    assert CompressionReport.load(report.save(tmp_path / "report.json")) == report


def test_both_ratios_stand_in_the_file(tmp_path):
    report = make_report()
    content = json.loads(report.save(tmp_path).read_text())
    assert (content["removed_of_model"], content["removed_of_targets"], content["kept_of_encoder"]) == (
        report.removed_of_model,
        report.removed_of_targets,
        report.kept_of_encoder,
    )


def test_folder_or_file(tmp_path):
    report = make_report()
    assert report.save(tmp_path) == tmp_path / REPORT_NAME == tmp_path / "mixrank_report.json"
    assert CompressionReport.load(tmp_path) == CompressionReport.load(tmp_path / REPORT_NAME) == report


def test_save_replaces_and_leaves_nothing_beside(tmp_path):
    make_report().save(tmp_path)
    report = make_report(evaluation=None)
    report.save(tmp_path)
    assert CompressionReport.load(tmp_path) == report
    assert [path.name for path in tmp_path.iterdir()] == [REPORT_NAME]
    assert (tmp_path / REPORT_NAME).stat().st_mode & 0o777 == 0o644


def test_a_failing_save_keeps_the_old_report(tmp_path, monkeypatch):
    old = make_report()
    old.save(tmp_path)

    def fail(*args):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        make_report(evaluation=None).save(tmp_path)
    assert CompressionReport.load(tmp_path) == old
    assert [path.name for path in tmp_path.iterdir()] == [REPORT_NAME]


def test_replace_fills_in_later_findings():
    report = dataclasses.replace(make_report(evaluation=None), evaluation={"top1": 0.5})
    assert report == make_report(evaluation={"top1": 0.5})


def test_unknown_fields_of_a_newer_version_are_named(caplog):
    content = {**make_report().to_dict(), "colour": "blue"}
    content["layers"][0]["smell"] = "none"
    with caplog.at_level("WARNING"):
        from transformers.utils import logging

        logging.enable_propagation()
        try:
            assert CompressionReport.from_dict(content) == make_report()
        finally:
            logging.disable_propagation()
    assert "colour" in caplog.text
    assert "smell" in caplog.text


@pytest.mark.parametrize("field", ["layers", "settings", "model_parameters_before"])
def test_missing_field(field):
    content = make_report().to_dict()
    del content[field]
    with pytest.raises(ValueError, match=f"The report lacks {field}"):
        CompressionReport.from_dict(content)


def test_missing_field_of_a_layer():
    content = make_report().to_dict()
    del content["layers"][1]["rank"]
    with pytest.raises(ValueError, match="A layer of the report lacks rank"):
        CompressionReport.from_dict(content)


def test_file_that_is_not_a_report(tmp_path):
    (tmp_path / REPORT_NAME).write_text("[1]")
    with pytest.raises(ValueError, match="holds a list, not a compression report"):
        CompressionReport.load(tmp_path)


def test_values_that_json_does_not_know():
    with pytest.raises(TypeError, match="settings of a report must hold JSON values only"):
        make_report(settings={"dtype": object()})
    with pytest.raises(ValueError, match="evaluation of a report must not hold NaN or Inf"):
        make_report(evaluation={"kl": float("nan")})


def test_structures_survive_json_and_reports_of_earlier_versions_have_none():
    made = mixed_report()
    content = json.loads(json.dumps(made.to_dict()))
    assert CompressionReport.from_dict(content) == made
    assert content["layers"][4]["shape_after"] == [200, 64]
    for each in content["layers"]:
        each.pop("shape_after", None)
        each.pop("members", None)
    earlier = CompressionReport.from_dict(content)
    assert {layer.rank_text for layer in earlier.layers} == {"40", "20", "30", "10", "dense"}
    assert all(layer.shape_after == layer.shape and layer.kept_units == 1 for layer in earlier.layers)
    assert all("members" not in layer for layer in earlier.to_dict()["layers"])


def test_a_report_is_short_where_it_is_not_asked_for_its_table():
    made = vit_report()
    assert len(repr(made).splitlines()) == 1 and "layers factored" in repr(made)
    assert str(made) == format_table(made)
    assert made._repr_html_().startswith('<iframe srcdoc="&lt;!DOCTYPE html&gt;')
