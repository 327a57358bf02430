"""The report as a page."""

import dataclasses
import functools
import json
import re
from html.parser import HTMLParser

import pytest
from models import pixels, tiny_swin, tiny_vit
from reporting.reports import EVALUATION, layer, mixed_report, report, swin_report, vit_report

from optimum_mixrank import MixRankCompressor, MixRankConfig
from optimum_mixrank.reporting import HTML_NAME, CompressionReport
from optimum_mixrank.reporting.colours import BREAK_EVEN, FACTORED, INK, ON_DARK, PAPER, SERIES, SHARED, UNITS, WIDTH
from optimum_mixrank.runtime.formatting import format_count


RATIOS = (0.2, 0.46, 0.7)
FINDINGS = {
    "model_name": "some/vit-base",
    "settings": {"compression_ratio": 0.46, "metric": "kfac", "rank_pattern": {"query": 3}, "max_rank_ratio": None},
    "environment": {"python": "3.11.2", "optimum-mixrank": "9.8.7", "device": "Some GPU", "threads": 2},
    "bytes_on_disk_before": 343_000_000,
    "bytes_on_disk_after": 184_000_000,
    "flops_before": 35_100_000_000,
    "flops_after": 18_900_000_000,
    "calibration": {"num_images": 512, "num_tokens": 100_864, "num_broken": 1},
    "seconds": {"calibrate": 12.34, "allocate": 0.2},
    "predicted_loss": 0.25,
    "profile": [
        {"compression_ratio": ratio, "model_parameters": round((1 - ratio) * 21e6), "loss": ratio**2}
        for ratio in RATIOS
    ],
    "loss_unit": "nats per image",
    "compensation": [
        {"name": "sequential", "kept": True, "error_before": 0.4, "error_after": 0.1, "details": {"layers": 70}},
        {"name": "blocks", "kept": False, "error_before": 0.1, "error_after": 0.125, "details": {}},
    ],
    "evaluation": EVALUATION,
}


def full_report(**changes):
    made = vit_report(depth=3, **{**FINDINGS, **changes})
    share = 0.25 / sum(each.rank is not None for each in made.layers)
    layers = [
        each if each.rank is None else dataclasses.replace(each, predicted_loss=share, kept_energy=0.9 + 0.004 * i)
        for i, each in enumerate(made.layers)
    ]
    return dataclasses.replace(made, layers=layers)


@functools.cache
def full_page():
    return full_report().to_html()


class Page(HTMLParser):
    """What a reader of the page gets."""

    def __init__(self, html):
        super().__init__()
        self.html, self.tags, self.attributes, self.tables, self.texts = html, [], [], [], []
        self.pictures, self.in_cell = [], False
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, *pair) for pair in attrs]
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
            self.in_cell = True
        elif tag == "svg":
            self.pictures.append(dict(attrs))

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)

    def handle_endtag(self, tag):
        if tag in ("td", "th"):
            self.in_cell = False

    def handle_data(self, data):
        self.texts.append(data)
        if self.in_cell:
            self.tables[-1][-1][-1] += data.strip()

    @property
    def text(self):
        return " ".join(" ".join(self.texts).replace("\u00a0", " ").split())

    def values(self, name):
        return [value for _, key, value in self.attributes if key == name]


def test_the_page_shows_everything_in_the_report():
    made = full_report()
    removed = f"{100 * made.removed_of_model:.1f} %"
    page = Page(full_page())
    for words in (
        f"some/vit-base, {removed} smaller",
        f"{made.model_parameters_after:,} of {made.model_parameters_before:,} (−{removed})",
        "184,000,000 of 343,000,000 (−46.4 %)",
        "18.9 G of 35.1 G (−46.2 %)",
        "83.00 % original 87.40 % (−4.40 points)",
        "97.00 % original 98.00 % (−1.00 points)",
        "90.50 % on 1,000 images",
        "0.1912 nats",
        "0.25 nats per image, before compensation",
        "12.5 s in all",
    ):
        assert words in page.text
    rows = [row for table in page.tables for row in table]
    for each in made.layers:
        (row,) = (row for row in rows if row[0] == each.name.removeprefix("encoder.layer."))
        rank = ("dense" if each.targeted else "excluded") if each.rank is None else str(each.rank)
        assert row[2] == rank and row[5:7] == [f"{each.parameters_before:,}", f"{each.parameters_after:,}"]
    assert ["sequential", "0.4", "0.1", "−75.0\u00a0%", "", "kept"] in rows
    assert ["blocks", "0.1", "0.125", "+25.0\u00a0%", "", "not kept"] in rows
    for key, value in {**made.environment, **made.calibration}.items():
        assert [key, str(value)] in rows
    assert ["rank_pattern", '{"query": 3}'] in rows and ["max_rank_ratio", "None"] in rows
    assert ["calibrate", "12.3 s"] in rows


def test_shared_factors_and_hidden_units():
    page = Page(mixed_report().to_html())
    for words in (
        "pairs of thin factors, layers with the same input may share the first of them, and MLPs have fewer hidden units",
        "hidden units 300 of 512, in 2 MLPs",
        "share first factors 3 layers in 1 group",
        "rank of a shared first factor",
        "the box around a bar is as high as the share of them that is left",
        "encoder.layer.0.attention.attention.query: rank 40 of 64, first factor shared by 3 layers",
        "encoder.layer.0.intermediate.dense: rank 30 of 64, 78.1 % of the hidden units",
        "encoder.layer.1.output.dense: dense, 39.1 % of the hidden units",
    ):
        assert words in page.text
    rows = {row[0]: row for table in page.tables for row in table}
    assert rows["0.attention.attention.query"][1:3] == ["64 × 64", "40 shared"]
    assert rows["1.output.dense"][1:3] == ["64 × 100 of 256", "dense"]
    narrow = report([each for each in mixed_report().layers if each.rank is None])
    assert "MLPs have fewer hidden units; made by" in Page(narrow.to_html()).text
    plain = Page(swin_report().to_html())
    assert "pairs of thin factors; made by" in plain.text and "hidden units" not in plain.text


@pytest.mark.parametrize(
    "render",
    [full_page, lambda: swin_report().to_html(), lambda: mixed_report().to_html()],
    ids=["full", "swin", "mixed"],
)
def test_nothing_is_loaded_and_no_script_runs(render):
    page = Page(render())
    assert not {"script", "link", "img", "image", "iframe", "object", "embed", "base", "a"} & set(page.tags)
    assert not page.values("src") and not page.values("srcset")
    assert not [key for _, key, _ in page.attributes if key.startswith("on")]
    references = page.values("href") + re.findall(r"url\(([^)]*)\)", page.html)
    assert references and all(reference.startswith("#") for reference in references)
    assert "://" not in page.html and "@import" not in page.html
    identities = page.values("id")
    assert len(identities) == len(set(identities))
    assert {reference.removeprefix("#") for reference in references} <= set(identities)


def test_every_picture_has_words_in_its_place():
    made = full_report()
    page = Page(full_page())
    # Two accuracies need no picture.
    assert len(page.pictures) == 4 and len(Page(made.to_html(others=[made])).pictures) == 5
    for picture in page.pictures:
        assert picture["role"] == "img"
        for identity in picture["aria-labelledby"].split():
            (text,) = re.findall(rf'<(?:title|desc) id="{identity}">([^<]+)</', page.html)
            assert text.strip()
    # Numbers at the axes are read as they stand.
    assert "$" not in page.text
    assert "of 18 layers 16 are factored with ranks from 115" in page.text.lower()
    size = format_count(made.model_parameters_after)
    assert f"Measured KL, in nats per image: {size} parameters: 0.191" in page.text
    # Where a bar is too narrow for its rank, pointing at it tells.
    assert "encoder.layer.0.attention.attention.query: rank 115 of 768, 90.00 % of its energy" in page.text


def test_colours_follow_the_theme():
    html = full_page()
    pictures = "".join(re.findall(r"<svg.*?</svg>", html, re.DOTALL))
    # White is that of the figures on the bars.
    assert set(re.findall(r"#[0-9a-f]{6}\b", pictures)) == {"#ffffff"}
    assert not re.search(r"(fill|stroke): (black|white)", pictures)
    used, defined = set(re.findall(r"var\((--[\w-]+)\)", html)), set(re.findall(r"(--[\w-]+):", html))
    assert used <= defined
    for scheme in ("light", "dark"):
        assert f':root[data-theme="{scheme}"] {{ color-scheme: {scheme};' in html
    assert "@media (prefers-color-scheme: dark) { :root { color-scheme: dark;" in html


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_contrast(dark):
    """WCAG 2: 4.5 for text, 3 for lines, points and areas."""

    def shown(colour):
        return ON_DARK[colour] if dark else colour

    assert contrast(shown(INK), shown(PAPER)) > 4.5
    for colour in (FACTORED, SHARED, BREAK_EVEN, *SERIES):
        assert contrast(shown(colour), shown(PAPER)) > 3
    assert min(contrast("#ffffff", shown(colour)) for colour in (FACTORED, SHARED)) > 4
    assert contrast(shown(UNITS), shown(PAPER)) > 4.5
    # Numbers and lines stand in boxes of hidden units too.
    assert contrast(shown(INK), shown(WIDTH)) > 4.5 and contrast(shown(BREAK_EVEN), shown(WIDTH)) > 3


def contrast(*colours):
    low, high = sorted(luminance(colour) for colour in colours)
    return (high + 0.05) / (low + 0.05)


def luminance(colour):
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_the_theme_can_be_chosen():
    made = full_report()
    assert '<html lang="en">' in full_page()
    assert '<html lang="en" data-theme="dark">' in made.to_html(theme="dark")
    with pytest.raises(ValueError, match="theme='blue' is unknown; choose one of 'light', 'dark'"):
        made.to_html(theme="blue")


def test_strings_from_anywhere_stay_strings():
    evil = "<script>alert(1)</script>&\"'$\\frac{$"
    made = full_report(
        model_name=evil,
        settings={evil: evil, "rank_pattern": {evil: 3}},
        environment={"device": evil},
        calibration={evil: evil},
        seconds={evil: 1.0},
        compensation=[{**FINDINGS["compensation"][0], "name": evil, "details": {evil: evil}}],
        loss_unit=evil,
    )
    first = dataclasses.replace(made.layers[0], name=f"encoder.layer.0.{evil}")
    page = Page(dataclasses.replace(made, layers=[first, *made.layers[1:]]).to_html())
    assert not {"script", "a", "img"} & set(page.tags)
    assert page.text.count(evil) > 10
    assert [evil, evil] in [row for table in page.tables for row in table]


@pytest.mark.parametrize("settings", [{}, {"axes.facecolor": "black", "text.usetex": True, "svg.fonttype": "path"}])
def test_same_report_same_page_whatever_the_settings_of_matplotlib(settings):
    import matplotlib

    with matplotlib.rc_context(settings):
        before = dict(matplotlib.rcParams)
        assert full_report().to_html() == full_page()
        assert dict(matplotlib.rcParams) == before


@pytest.mark.parametrize(
    ("made", "pictures"),
    [
        (vit_report(depth=1), ["Ranks", "Kept energy over depth"]),
        (
            vit_report(depth=1, evaluation={"num_images": 7, "feature_error": 0.01}),
            ["Ranks", "Kept energy over depth"],
        ),
        (report([layer("encoder.fc", (4, 4), None)]), ["Ranks"]),
        (report([layer("encoder.fc", (4, 4), 1)], profile=FINDINGS["profile"], loss_unit="x"), None),
        (report([layer("fc", (4, 4), 1)], evaluation={"num_images": 7, "top1": 0.5}), None),
        (CompressionReport([], {}, {}, 10, 10), []),
    ],
    ids=["plain", "features", "dense", "no-common-unit", "no-original", "no-layers"],
)
def test_what_is_not_known_is_left_out(made, pictures):
    page = Page(made.to_html())
    titles = re.findall(r"<h3>(.*?)</h3>", page.html)
    if pictures is not None:
        assert titles == pictures
    assert len(page.pictures) == len(titles)
    assert "None" not in page.text and "nan" not in page.text
    assert ("Not evaluated" in page.text) == (made.evaluation is None)


def test_other_compressions_stand_beside():
    other = full_report(
        evaluation={**FINDINGS["evaluation"], "top1": 0.7, "kl": 0.5}, model_parameters_after=7_000_000
    )
    alone, beside = full_page(), full_report().to_html([other])
    assert "7.00 M parameters: 0.5" in beside and "7.00 M parameters: 0.5" not in alone
    assert "7.00 M parameters: 70.00" in beside
    diamonds = [html.count("var(--c-b03a2e)") for html in (alone, beside)]
    assert diamonds[1] > diamonds[0]


def test_measured_losses_are_compared_without_a_prediction_in_their_unit():
    reports = [
        full_report(loss_unit="sum of normalised energies", evaluation={"num_images": 100, "kl": kl, "top1": top1})
        for kl, top1 in ((0.1, 1.0), (0.2, 0.0))
    ]
    alone, beside = (Page(reports[0].to_html(others)) for others in ([], reports[1:]))
    assert ("loss (sum of normalised energies)" in alone.text) and ("measured KL of the result" not in alone.text)
    assert ("loss (nats per image)" in beside.text) and ("predicted, before compensation" not in beside.text)
    assert "measured KL of the result" in beside.text


def test_folder_or_file_and_nothing_beside(tmp_path):
    made = full_report()
    assert made.save_html(tmp_path) == tmp_path / HTML_NAME == tmp_path / "report.html"
    assert 'data-theme="dark"' in made.save_html(tmp_path / "other.html", theme="dark").read_text()
    assert (tmp_path / HTML_NAME).read_text() == full_page()
    assert {path.name for path in tmp_path.iterdir()} == {HTML_NAME, "other.html"}


CONFIG = {"recipe": "best", "compression_ratio": 0.3}


@pytest.mark.parametrize("metric", ["kfac", "second_moment"])
def test_a_compression_saves_its_page(tmp_path, metric):
    compressor = MixRankCompressor(tiny_vit())
    config = MixRankConfig(metric=metric, **CONFIG)
    model = compressor.compress(config, [pixels(16)], save_directory=tmp_path / "out")
    made = compressor.report
    page = (tmp_path / "out" / HTML_NAME).read_text()
    assert page == made.to_html()
    assert ("Predicted loss over depth" in page) == (metric == "kfac")
    assert "Loss over parameters" in page

    ratios = [budget["compression_ratio"] for budget in made.profile]
    losses = [budget["loss"] for budget in made.profile]
    assert ratios == sorted(ratios) and 0.3 in ratios and len(ratios) > 3
    assert losses == sorted(losses)
    chosen = made.profile[ratios.index(0.3)]
    assert chosen["model_parameters"] == made.model_parameters_after == sum(p.numel() for p in model.parameters())
    if metric == "kfac":
        assert chosen["loss"] == pytest.approx(made.predicted_loss)
        assert sum(each.predicted_loss or 0 for each in made.layers) == pytest.approx(made.predicted_loss)
    else:
        assert made.predicted_loss is None and all(each.predicted_loss is None for each in made.layers)
    assert CompressionReport.load(tmp_path / "out") == made


def test_a_compression_of_swin_by_flops(tmp_path):
    compressor = MixRankCompressor(tiny_swin())
    compressor.compress(MixRankConfig(cost="flops", **CONFIG), [pixels(16)], save_directory=tmp_path / "out")
    made = compressor.report
    (chosen,) = (budget for budget in made.profile if budget["compression_ratio"] == 0.3)
    assert chosen["model_parameters"] == made.model_parameters_after
    assert ">reduction</text>" in (tmp_path / "out" / HTML_NAME).read_text()


def test_the_name_of_a_folder_without_the_path_to_it(tmp_path):
    tiny_vit().save_pretrained(tmp_path / "secret" / "small-vit")
    compressor = MixRankCompressor.from_pretrained(tmp_path / "secret" / "small-vit")
    compressor.compress(MixRankConfig(**CONFIG), [pixels(16)], save_directory=tmp_path / "out")
    page = (tmp_path / "out" / HTML_NAME).read_text()
    assert "small-vit" in page and "secret" not in page


def test_a_page_that_cannot_be_made_costs_no_checkpoint(tmp_path, monkeypatch, caplog):
    from transformers.utils import logging

    def fail(*arguments):
        raise RuntimeError("no font")

    monkeypatch.setattr("optimum_mixrank.reporting.report.render_html", fail)
    compressor = MixRankCompressor(tiny_vit())
    logging.enable_propagation()
    try:
        compressor.compress(MixRankConfig(**CONFIG), [pixels(16)], save_directory=tmp_path / "out")
    finally:
        logging.disable_propagation()
    assert "without 'report.html', which could not be created: no font" in caplog.text
    assert json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["rank_map"]
    assert not (tmp_path / "out" / HTML_NAME).exists()


def test_errors_after_repair_are_a_column_of_the_table():
    made = full_report()
    names = [layer.name for layer in made.layers]
    errors = {name: round(0.01 * (position + 1), 2) for position, name in enumerate(names[:-1])}
    details = {"layers": len(errors), "layer_errors": errors}
    step = {"name": "sequential", "kept": True, "error_before": 0.2, "error_after": 0.1, "details": details}
    page = dataclasses.replace(made, compensation=[step]).to_html()
    assert "layer errors" not in page and "error after repair" in page
    assert "<td>0.03</td>" in page
    assert "error after repair" not in dataclasses.replace(made, compensation=[{**step, "kept": False}]).to_html()
