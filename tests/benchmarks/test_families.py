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
    flat = " ".join(page.split())
    always = "Of 2 families, 1 passes compress, reload, dense return and training, 1 is refused, and 0 fail."
    assert f"- Transformers 5.0: {always} *compile* was not tried, *export* passes for 1 of 1 tried." in flat
    assert "C (4.57)" in page and "| C |" not in page
    of_timm = {"timm": "1.0", "transformers": "5.0", "families": {"D": {**YES, **tried, "train": "E: no gradients"}}}
    of_timm = script["render"](records, of_timm).removeprefix(page.rstrip("\n"))
    always = "Of 1 family, 0 pass compress, reload, dense return and training, 0 are refused, and 1 fails."
    assert f"- timm 1.0 under Transformers 5.0: {always} *compile* and *export* were not tried." in " ".join(
        of_timm.split()
    )
    assert "| D | 25% (50%) |" in of_timm and "| ✓ | ✓ | ✓ | ✗ | · | · |" in of_timm
    assert "### What fails" in of_timm and "- D, train, Transformers 5.0: no gradients" in of_timm


def test_checks_on_request_are_counted_on_their_own(script):
    families = {"A": {**YES, "compile": "yes", "export": "E: no"}, "B": {**YES, "compile": "E: no"}, "C": dict(YES)}
    counted = script["summary"]({"families": families})
    assert counted.startswith("Of 3 families, 3 pass ") and "and 0 fail." in counted
    assert counted.endswith(" *compile* passes for 1 of 2 tried, *export* passes for 0 of 1 tried.")


def test_what_fails_for_the_original_too_is_told_apart(script):
    alike = {**YES, "compile": "yes", "export": "GuardError: u0 is not known", "original_fails": ["export"]}
    families = {"A": alike, "B": dict(alike), "C": {**YES, "export": "AssertionError: outputs differ"}}
    page = script["render"]({"5.x": {"transformers": "5.0", "families": families}})
    assert "| A |  |  | ✓ | ✓ | ✓ | ✓ | ✓ | (✗) |" in page and "| C |  |  | ✓ | ✓ | ✓ | ✓ | · | ✗ |" in page
    counted = "*export* passes for 0 of 3 tried (for 2 of the other 3 it fails for the original model too)."
    assert counted in " ".join(page.split())
    assert "- export, Transformers 5.0, GuardError: A; B" in page and "- A, export" not in page
    assert "- C, export, Transformers 5.0: outputs differ" in page
    reloaded = {"A": {**YES, "reload": "AssertionError: a key is missing", "original_fails": ["reload"]}}
    assert " and 1 fails, as the original does. " in script["summary"]({"families": reloaded})
    worse = {**reloaded, "B": {**YES, "dense": "AssertionError: outputs differ"}}
    assert " and 2 fail, 1 of them as the original does. " in script["summary"]({"families": worse})


def test_lines_of_the_page_are_no_longer_than_those_of_others(script):
    refused = "ValueError: " + "is a text model " * 20
    families = {"A": {"refused": refused}, "B": {**YES, "export": refused}}
    page = script["render"]({"5.x": {"transformers": "5.0", "families": families}})
    assert max(map(len, page.splitlines())) <= 124 and "\n  " in page


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["vit"], "There is no family 'vit'; did you mean 'ViT'"),
        (["DINOv2, clasifier"], "did you mean 'DINOv2, classifier'"),
        (["--timm", "BERT"], "There is no family 'BERT' with this choice of --timm, but there is one with the other."),
        (["qqqqqqqq"], "There is no family 'qqqqqqqq', nor one of a similar name."),
    ],
)
def test_a_misspelt_family_is_answered_with_near_names(given, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [SCRIPT.name, *given])
    with pytest.raises(SystemExit) as error:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    assert error.value.code == 2 and message in capsys.readouterr().err


def test_what_is_recorded_is_not_tried_again(tmp_path, monkeypatch, capsys):
    path = tmp_path / "record.json"
    path.write_text(json.dumps({"families": {"ViT": dict(YES)}}))
    monkeypatch.setattr(sys, "argv", [SCRIPT.name, "ViT", "BERT", "--record", str(path)])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    families = json.loads(path.read_text())["families"]
    assert families["ViT"] == YES and "is a text model" in families["BERT"]["refused"]
    assert "ViT {" not in capsys.readouterr().out
