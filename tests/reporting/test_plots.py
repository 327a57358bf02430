import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from reporting.reports import layer, report, swin_report, vit_report

import optimum_mixrank
from optimum_mixrank.reporting import plot_ranks


REPORTS = {
    "vit": vit_report,
    "swin": swin_report,
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
