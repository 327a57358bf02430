"""How a profile of budgets is shown."""

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
    ]


def test_other_structures_are_counted():
    choices = {
        "query": LayerChoice(9, shared=True),
        "key": LayerChoice(9, shared=True),
        "fc1": LayerChoice(None, width=20),
        "fc2": LayerChoice(5, width=20),
    }
    [_, line] = str(RankProfile([BudgetPoint(0.5, 0.5, 0.1, choices)], "nats per image")).splitlines()
    assert line == "  50.0%    50.0%  0.1, 2 of 4 layers share a first factor, 2 have fewer hidden units"


def test_the_suffix_gives_the_format_of_the_plot(tmp_path):
    assert PROFILE.plot(tmp_path / "profile.png").read_bytes().startswith(b"\x89PNG")
    assert PROFILE.plot(str(tmp_path / "profile.svg")).read_text().lstrip().startswith("<?xml")
