import pytest
from reporting.reports import EVALUATION, layer, mixed_report, report, swin_report, vit_report

from optimum_mixrank.reporting import format_table


def table_lines(text):
    return text.split("\n\n")[0].splitlines()


@pytest.mark.parametrize("make", [vit_report, swin_report], ids=["vit", "swin"])
def test_every_layer_has_a_line_with_its_figures(make):
    made = make()
    lines = table_lines(format_table(made, width=200))
    prefix = "encoder.layers." if make is swin_report else "encoder.layer."
    for each in made.layers:
        (line,) = (line for line in lines if line.startswith(each.name.removeprefix(prefix) + " "))
        cells = line.split()[1:]
        rank = ("dense" if each.targeted else "excluded") if each.rank is None else str(each.rank)
        energy = [] if each.kept_energy is None else [f"{each.kept_energy:.2%}"]
        sizes = [f"{each.parameters_before:,}", f"{each.parameters_after:,}", f"{each.kept:.1%}"]
        assert cells == [str(each.shape[0]), "x", str(each.shape[1]), rank, *energy, *sizes]


def test_shared_factors_and_hidden_units():
    text = format_table(mixed_report())
    rows = {line.split()[0]: line for line in table_lines(text)}
    assert " 64 x 64  40 shared  " in rows["0.attention.attention.query"]
    assert " 64 x 64         20  " in rows["1.attention.attention.query"]
    assert " 200 of 256 x 64  " in rows["0.intermediate.dense"]
    assert " 64 x 100 of 256      dense  " in rows["1.output.dense"]
    facts = text.splitlines()
    assert "Shared first factors             3 layers in 1 group" in facts
    assert "Hidden units kept                300 of 512, in 2 MLPs" in facts
    plain = format_table(vit_report())
    assert "Shared first" not in plain and "Hidden units" not in plain


@pytest.mark.parametrize("make", [vit_report, swin_report, mixed_report], ids=["vit", "swin", "mixed"])
def test_fits_a_terminal_and_is_aligned(make):
    lines = format_table(make()).splitlines()
    assert max(map(len, lines)) <= 100
    rows = table_lines(format_table(make()))[1:]
    assert len({len(row) for row in rows}) == 1


def test_long_names_keep_both_ends():
    lines = format_table(
        report([layer("a." + "x" * 200 + f".{end}", (4, 4), 1) for end in ("query", "key")])
    ).splitlines()
    assert max(map(len, lines)) <= 100
    assert any(line.startswith("query") or ".query " in line for line in lines)


def test_totals():
    made = vit_report()
    text = format_table(made)
    targeted = [each for each in made.layers if each.targeted]
    before, after = (sum(getattr(each, f"parameters_{when}") for each in targeted) for when in ("before", "after"))
    (line,) = (line for line in text.splitlines() if line.startswith("targeted layers"))
    assert line.split()[-3:] == [f"{before:,}", f"{after:,}", f"{after / before:.1%}"]
    assert "  70 of 71  " in line
    (line,) = (line for line in text.splitlines() if line.startswith("all encoder linears"))
    assert line.split()[-1] == f"{made.kept_of_encoder:.1%}"


def test_both_ratios_are_given():
    made = vit_report()
    text = format_table(made)
    assert f"{made.removed_of_model:.2%}" in text
    assert f"{made.removed_of_targets:.2%}" in text
    assert f"{made.kept_of_encoder:.2%}" in text


def test_summary():
    made = vit_report(
        flops_before=35_000_000_000,
        flops_after=14_000_000_000,
        bytes_on_disk_before=400,
        bytes_on_disk_after=100,
        calibration={"num_images": 512, "num_tokens": 100864, "num_broken": 3},
        seconds={"calibrate": 12.34, "allocate": 0.2},
        evaluation={**EVALUATION, "gained": 0.01, "lost": 0.054},
    )
    summary = format_table(made).split("\n\n", 1)[1]
    for piece in (
        "35.0 G -> 14.0 G  (-60.0%)",
        "400 -> 100  (-75.0%)",
        "512 images (3 broken ones left out), 100,864 tokens",
        "calibrate 12.3 s, allocate 0.2 s",
        "Evaluation on 1,000 images; 95% intervals in brackets",
        "87.40% -> 83.00%  (-4.40 points: -5.94 to -2.84)",
        "98.00% -> 97.00%  (-1.00 points)",
        "90.50%  (88.52% to 92.17%)",
        "0.1912 nats",
    ):
        assert piece in summary
    assert "relative error" not in summary


def test_another_dtype_on_the_disk_is_named():
    sizes = {"bytes_on_disk_before": 400, "bytes_on_disk_after": 300, "dtype_on_disk_before": "float16"}
    for after, text in (("float32", "400 -> 300  (-25.0%; float16 -> float32)"), ("float16", "400 -> 300  (-25.0%)")):
        assert text in format_table(vit_report(**sizes, dtype_on_disk_after=after))


def test_what_is_not_known_is_left_out():
    text = format_table(vit_report(evaluation={"num_images": 7, "top1": 0.5, "feature_error": 0.01}))
    assert not any(word in text for word in ("FLOPs", "Bytes", "Calibration", "Time", "None", "agreement", "KL("))
    assert "top-1 accuracy                 50.00%  (" in text
    assert "0.01" in text


def test_one_layer_keeps_its_name():
    assert "encoder.layer.0.query" in format_table(report([layer("encoder.layer.0.query", (4, 4), 1)]))
