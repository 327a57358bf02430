import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from reporting.reports import layer, mixed_report, report, swin_report, vit_report

import optimum_mixrank
from optimum_mixrank.reporting import LayerReport, plot_ranks
from optimum_mixrank.reporting.plots import draw_ranks


REPORTS = {
    "vit": vit_report,
    "swin": swin_report,
    "mixed": mixed_report,
    "deep": lambda: vit_report(depth=60),
    "one-layer": lambda: report([layer("encoder.fc", (4, 4), 1)]),
    "all-dense": lambda: report([layer(f"encoder.layer.{i}.fc", (4, 4), None) for i in range(2)]),
}


@pytest.mark.parametrize("make", [pytest.param(make, id=name) for name, make in REPORTS.items()])
def test_png_with_something_on_it(make, tmp_path):
    path = plot_ranks(make(), tmp_path / "ranks.png")
    with Image.open(path) as image:
        assert image.format == "PNG"
        assert min(image.size) > 300
        assert len(image.convert("RGB").getcolors(2**24)) > 10


def test_svg_says_every_rank_and_the_parameters(tmp_path):
    made = vit_report()
    import matplotlib

    with matplotlib.rc_context({"svg.fonttype": "none"}):
        text = plot_ranks(made, tmp_path / "ranks.svg").read_text()
    for each in made.layers:
        if each.rank is not None:
            assert f">{each.rank}</text>" in text
    for words in ("dense", "excl.", "break-even rank", "query", "intermediate.dense", "768 x 768", "block"):
        assert words in text
    assert f"{made.removed_of_model:.1%} of the model removed" in text


def bars_of(axes):
    """Bars by the name of their layer, and boxes of hidden units in the order of blocks."""
    named = {patch.get_gid(): patch for patch in axes.patches if patch.get_gid()}
    return named, [patch for patch in axes.patches if not patch.get_gid()]


@pytest.mark.parametrize(("layout", "of_three", "of_one"), [("pivoted", 64, 64), ("factors", 48, 32)])
def test_shared_factors_and_hidden_units(layout, of_three, of_one):
    figure = draw_ranks(mixed_report(layout))
    query, _, _, _, first, second = figure.axes
    bars, boxes = bars_of(query)
    assert not boxes
    shared, alone = (
        bars["encoder.layer.0.attention.attention.query"],
        bars["encoder.layer.1.attention.attention.query"],
    )
    assert (shared.get_height(), alone.get_height()) == (40 / 64, 20 / 64)
    assert shared.get_facecolor() != alone.get_facecolor()
    assert [text.get_text() for text in query.texts][:2] == ["40*", "20"]
    # A factor for three layers breaks even later than one for each, and pivoted ones only at full rank.
    lines = [line.get_segments()[0][0][1] for line in query.collections]
    assert lines == [limit / 64 for limit in (of_three, of_one) if limit < 64]

    bars, boxes = bars_of(first)
    assert [box.get_height() for box in boxes] == [200 / 256, 100 / 256]
    assert [bar.get_height() for bar in bars.values()] == [200 / 256 * 30 / 64, 100 / 256 * 30 / 64]
    assert {"200", "100", "30"} <= {text.get_text() for text in first.texts}
    bars, boxes = bars_of(second)
    assert bars["encoder.layer.1.output.dense"].get_height() == boxes[1].get_height() == 100 / 256
    assert "dense" in {text.get_text() for text in second.texts}
    labels = {text.get_text() for text in figure.legends[0].get_texts()}
    assert {"* rank of a shared first factor", "hidden units kept, number above", "dense"} <= labels
    assert ("break-even rank" in labels) == bool(lines)


def test_no_bar_is_higher_than_its_full_rank_where_few_rows_share_a_large_factor():
    # Key and value of grouped queries have fewer rows than the rank of the common factor.
    names = tuple(f"encoder.layer.0.{part}" for part in ("query", "key"))
    layers = [
        LayerReport(name, (rows, 64), 40, 0.9, True, rows * 64, 1000, members=names)
        for name, rows in zip(names, (64, 16), strict=True)
    ]
    for axes in draw_ranks(report(layers)).axes:
        assert all(bar.get_height() == 40 / 64 for bar in bars_of(axes)[0].values())


def test_the_legend_fits_beside_few_blocks(tmp_path):
    made = mixed_report()
    layers = [*made.layers[:-1], layer("encoder.layer.1.output.dense", (4, 4), None, targeted=False)]
    figure = draw_ranks(report([*layers, layer("encoder.layer.2.output.dense", (4, 4), None)]))
    figure.savefig(tmp_path / "ranks.png")
    frame, page = figure.legends[0].get_window_extent(), figure.bbox
    assert page.x0 <= frame.x0 and frame.x1 <= page.x1
    assert frame.y0 >= figure.axes[0].get_window_extent().y1


def test_swin_has_stages_and_its_reduction(tmp_path):
    import matplotlib

    with matplotlib.rc_context({"svg.fonttype": "none"}):
        text = plot_ranks(swin_report(), tmp_path / "ranks.svg").read_text()
    for words in (">reduction</", ">2.5</", ">stage.block</"):
        assert words in text


@pytest.mark.parametrize("suffix", [".png", ".svg", ".pdf"])
def test_same_report_same_file(suffix, tmp_path):
    made = vit_report(depth=2)
    first, second = (plot_ranks(made, tmp_path / f"{name}{suffix}").read_bytes() for name in ("a", "b"))
    assert first == second


def test_needs_no_display_and_no_pyplot(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name not in ("DISPLAY", "MPLBACKEND")}
    environment["PYTHONPATH"] = os.pathsep.join(
        map(str, (Path(optimum_mixrank.__file__).parents[1], Path(__file__).parents[1]))
    )
    code = (
        "import sys\n"
        "from optimum_mixrank.reporting import plot_ranks\n"
        "assert 'matplotlib' not in sys.modules\n"
        "from reporting.reports import vit_report\n"
        f"plot_ranks(vit_report(depth=2), {str(tmp_path / 'ranks.png')!r})\n"
        "print('matplotlib.pyplot' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "False"


def test_settings_of_matplotlib_are_left_alone(tmp_path):
    import matplotlib

    before = dict(matplotlib.rcParams)
    plot_ranks(vit_report(depth=1), tmp_path / "ranks.svg")
    assert dict(matplotlib.rcParams) == before


@pytest.mark.parametrize("name", ["ranks", "ranks.jpg"])
def test_unknown_suffix(name, tmp_path):
    with pytest.raises(ValueError, match=rf"'{name}' has the suffix .*choose one of \.png, \.svg, \.pdf"):
        plot_ranks(vit_report(), tmp_path / name)


def test_no_layer(tmp_path):
    with pytest.raises(ValueError, match="no layer to draw"):
        plot_ranks(report([]), tmp_path / "ranks.png")
