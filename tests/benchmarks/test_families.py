"""The script that tries families, and the page that it writes."""

import json
import runpy
import sys

import pytest
from shipped import ROOT


SCRIPT = ROOT / "benchmarks" / "families.py"
YES = dict.fromkeys(("compress", "reload", "dense", "train"), "yes")


@pytest.fixture
def script():
    return runpy.run_path(str(SCRIPT))


def test_the_page_is_that_of_the_records(script):
    page = (ROOT / "docs" / "families.md").read_text(encoding="utf-8")
    assert page == script["render"](script["read_records"](), script["read_timm_record"]()), (
        "write it again: python benchmarks/families.py --render docs/families.md"
    )


def test_the_record_is_of_the_catalogue(script):
    from families.catalogue import FAMILIES
    from families.timm_catalogue import TIMM_FAMILIES

    for record in script["read_records"]().values():
        assert set(record["families"]) <= set(FAMILIES)
    assert set((script["read_timm_record"]() or {"families": {}})["families"]) <= set(TIMM_FAMILIES)


def test_what_stands_in_the_page(script):
    tried = {"targeted": 0.25, "targeted_of_images": 0.5, "part": "get_image_features", "objective": "embeddings"}
    records = {
        "5.x": {
            "transformers": "5.0",
            "families": {"A": {**YES, **tried, "export": "yes"}, "B": {"refused": "ValueError: B is a text model."}},
        },
        "4.57": {
            "transformers": "4.57",
            "families": {"A": {**YES, **tried, "train": "AssertionError: no <b>gradients"}, "C": {"absent": True}},
        },
    }
    page = script["render"](records)
    assert "| A | 25% (50%) | embeddings of `get_image_features` | ✓ ✓ | ✓ ✓ | ✓ ✓ | ✓ ✗ | · · | ✓ · |" in page
    assert "- A, train, Transformers 4.57: no ‹b›gradients" in page and "- B: B is a text model." in page
    assert "Of 2 families, 1 pass every check, 1 are refused, and 0 fail." in page
    assert "C (4.57)" in page and "| C |" not in page
    of_timm = {"timm": "1.0", "transformers": "5.0", "families": {"D": {**YES, **tried, "train": "E: no gradients"}}}
    of_timm = script["render"](records, of_timm).removeprefix(page.rstrip("\n"))
    assert (
        "- timm 1.0 under Transformers 5.0: Of 1 families, 0 pass every check, 0 are refused, and 1 fails." in of_timm
    )
    assert "| D | 25% (50%) |" in of_timm and "| ✓ | ✓ | ✓ | ✗ | · | · |" in of_timm
    assert "### What fails" in of_timm and "- D, train, Transformers 5.0: no gradients" in of_timm


def test_what_is_recorded_is_not_tried_again(tmp_path, monkeypatch, capsys):
    path = tmp_path / "record.json"
    path.write_text(json.dumps({"families": {"ViT": dict(YES)}}))
    monkeypatch.setattr(sys, "argv", [SCRIPT.name, "ViT", "BERT", "--record", str(path)])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    families = json.loads(path.read_text())["families"]
    assert families["ViT"] == YES and "is a text model" in families["BERT"]["refused"]
    assert "ViT {" not in capsys.readouterr().out
