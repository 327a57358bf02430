"""How a profile of budgets is shown."""

import json

import pytest
from reporting.reports import layer, report

from optimum_mixrank.allocation.choice import LayerChoice
from optimum_mixrank.allocation.profile import BudgetPoint
from optimum_mixrank.reporting.profile import RankProfile


PROFILE = RankProfile(
    [
        BudgetPoint(0.2, 0.79, 0.0125, {"layer.0.fc1": LayerChoice(), "layer.0.fc2": LayerChoice(12)}),
        BudgetPoint(0.4, 0.58, 0.25, {"layer.0.fc1": LayerChoice(9), "layer.0.fc2": LayerChoice(6)}),
    ],
    "nats per image",
)


def test_a_line_per_budget():
    assert str(PROFILE).splitlines() == [
        "  ratio     kept  predicted loss (nats per image)",
        "  20.0%    79.0%  0.0125",
        "  40.0%    58.0%  0.25",
        "",
        "Ranks at ratio 20.0%",
        "block    fc1  fc2",
        "    0  dense   12",
        "",
        "Ranks at ratio 40.0%",
        "block  fc1  fc2",
        "    0    9    6",
    ]


def test_blocks_show_shared_factors_and_hidden_units():
    choices = {}
    for block, shared in enumerate((True, False)):
        for part in ("query", "key"):
            choices[f"layer.{block}.{part}"] = LayerChoice(7 + block, shared=shared)
        choices[f"layer.{block}.fc1"] = LayerChoice(12, width=40 if block else None)
        choices[f"layer.{block}.fc2"] = LayerChoice(None, width=40 if block else None)
    profile = RankProfile([BudgetPoint(0.5, 0.4, 1.0, choices)], "nats per image")
    assert str(profile).splitlines()[3:] == [
        "Ranks at ratio 50.0%; * one first factor for several layers",
        "block  query  key           fc1              fc2",
        "    0     7*   7*            12            dense",
        "    1      8    8  12, 40 units  dense, 40 units",
    ]
    [point] = json.loads(json.dumps(profile.to_dict()))["points"]
    assert point["ranks"]["layer.1.fc1"] == 12 and point["ranks"]["layer.1.fc2"] is None
    assert point["choices"]["layer.0.query"] == {"rank": 7, "shared": True, "width": None, "loss": 0.0}


def test_blocks_of_stages():
    names = ("stages.0.blocks.0.fc", "stages.0.blocks.1.fc", "stages.0.reduction", "stages.1.blocks.0.fc")
    point = BudgetPoint(0.5, 0.4, 1.0, {name: LayerChoice(3) for name in names})
    lines = str(RankProfile([point], "nats per image")).splitlines()[4:]
    assert [line.split() for line in lines] == [
        ["block", "fc", "reduction"],
        ["0.0", "3"],
        ["0.1", "3", "3"],
        ["1.0", "3"],
    ]


def test_the_plot_says_what_layers_become(tmp_path):
    import matplotlib

    choices = [LayerChoice(2, shared=True), LayerChoice(2, width=5), LayerChoice(2), LayerChoice()]
    named = {f"layer.{index}.fc": choice for index, choice in enumerate(choices)}
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        text = (
            RankProfile([BudgetPoint(0.5, 0.4, 1.0, named)], "nats per image")
            .plot(tmp_path / "profile.svg")
            .read_text()
        )
    for words in ("fewer hidden units", "a shared first factor", "factors of its own", "dense"):
        assert f">{words}</text>" in text


def test_other_structures_are_counted():
    choices = {
        "query": LayerChoice(9, shared=True),
        "key": LayerChoice(9, shared=True),
        "fc1": LayerChoice(None, width=20),
        "fc2": LayerChoice(5, width=20),
    }
    line = str(RankProfile([BudgetPoint(0.5, 0.5, 0.1, choices)], "nats per image")).splitlines()[1]
    assert line == "  50.0%    50.0%  0.1, 2 of 4 layers share a first factor, 2 layers have fewer hidden units"


def test_the_suffix_gives_the_format_of_the_plot(tmp_path):
    assert PROFILE.plot(tmp_path / "profile.png").read_bytes().startswith(b"\x89PNG")
    assert PROFILE.plot(str(tmp_path / "profile.svg")).read_text().lstrip().startswith("<?xml")
    with pytest.raises(ValueError, match=r"'\.txt'; choose one of \.png, \.svg, \.pdf"):
        PROFILE.plot(tmp_path / "profile.txt")


def measured(**fidelity):
    return report([layer("fc1", (4, 4), 1)], settings={"compression_ratio": 0.4}, fidelity=fidelity)


def test_one_measurement_gives_estimates_for_all_budgets():
    found = PROFILE.calibrated(measured(num_images=100, held_out=True, kl=0.5, agreement=0.8))
    # Losses are 0.0125 and 0.25: KL is twice the loss, and disagreement grows with the root.
    points = found.to_dict()["points"]
    assert [point["estimated_kl"] for point in points] == pytest.approx([0.025, 0.5])
    assert [point["estimated_agreement"] for point in points] == pytest.approx([1 - 0.2 * 0.05**0.5, 0.8])
    lines = str(found).splitlines()
    assert lines[0].split()[:4] == ["ratio", "kept", "KL", "agreement"]
    assert lines[2].split()[:4] == ["40.0%", "58.0%", "0.5", "80.0%"]
    assert "on 100 images" in lines[3]
    assert "measured" not in PROFILE.to_dict() and "agreement" not in str(PROFILE)


def test_what_cannot_calibrate_is_refused():
    with pytest.raises(ValueError, match="no agreement and KL"):
        PROFILE.calibrated(measured(num_images=100, held_out=True, feature_error=0.1))
    with pytest.raises(ValueError, match=r"compression_ratio=0\.4 is not one of the profile's: 0\.2"):
        RankProfile(PROFILE.points[:1], PROFILE.unit).calibrated(measured(num_images=1, kl=0.1, agreement=0.9))
