"""The verdict on a result, from what was measured."""

import dataclasses

import pytest
from reporting.reports import vit_report

from optimum_mixrank.reporting import format_table
from optimum_mixrank.reporting.verdict import verdict


BEST = {"metric": "kfac", "compensation": ["sequential"], "compression_ratio": 0.6}


def judged(fidelity, settings=BEST, images=1024):
    counted = {"num_images": images, "num_tokens": 0, "num_broken": 0}
    fidelity = {"num_images": 52, "held_out": True, **fidelity}
    return dataclasses.replace(vit_report(), fidelity=fidelity, settings=settings, calibration=counted)


@pytest.mark.parametrize(
    ("fidelity", "word"),
    [
        ({"agreement": 0.99, "kl": 0.002}, "good"),
        ({"agreement": 0.95, "kl": 0.02}, "good"),
        ({"agreement": 0.91, "kl": 0.084}, "usable"),
        ({"agreement": 0.69, "kl": 0.6}, "broken"),
        ({"agreement": 0.99, "kl": None}, "broken"),
        ({"feature_error": 0.01}, "good"),
        ({"feature_error": 0.1}, "usable"),
        ({"feature_error": 0.5}, "broken"),
        ({"feature_error": None}, "broken"),
    ],
)
def test_what_was_measured_decides(fidelity, word):
    found = verdict(judged(fidelity))
    assert found.word == word and bool(found.advice) == (word != "good")
    assert "52 held-out images" in found.reason


@pytest.mark.parametrize(
    ("settings", "images", "advice"),
    [
        ({**BEST, "metric": "second_moment", "compensation": []}, 1024, "recipe 'best', or a ratio below 0.6"),
        (BEST, 64, "more calibration images, or a ratio below 0.6"),
        (BEST, 1024, "recipe 'distilled' with a few thousand images, or a ratio below 0.6"),
        ({**BEST, "compensation": ["sequential", "distillation"]}, 5000, "a ratio below 0.6"),
        ({**BEST, "target_latency": 0.4}, 64, "more calibration images, or a larger target_latency"),
        ({**BEST, "target_parameters": 1000}, 64, "more calibration images, or a larger size"),
    ],
)
def test_advice_is_what_was_not_done(settings, images, advice):
    found = verdict(judged({"agreement": 0.8, "kl": 0.4}, settings, images))
    assert str(found) == (
        f"broken: the same class as the original on 80.0% of 52 held-out images, KL 0.4 nats. Next: {advice}"
    )


@pytest.mark.parametrize(("count", "advice"), [(13, "13 say little"), (1, "1 says little")])
def test_few_images_are_said_to_be_few(count, advice):
    found = verdict(judged({"num_images": count, "agreement": 1.0, "kl": 0.01}))
    assert found.word == "good" and found.advice == f"more images, since {advice}"
    assert f"of {count} held-out image{'s' if count > 1 else ''}, " in found.reason


def test_values_that_are_not_finite_are_named():
    assert str(verdict(judged({"agreement": 0.1, "kl": None}))) == (
        "broken: NaN or Inf on 52 held-out images. Next: compress in float32 (dtype='float32')"
    )


def test_there_is_none_without_images():
    assert verdict(vit_report()) is None
    assert "Verdict" not in format_table(vit_report())


def test_the_table_and_the_page_show_it():
    made = judged({"agreement": 0.8, "kl": 0.4})
    lines = format_table(made).splitlines()
    (start,) = (number for number, line in enumerate(lines) if line.startswith("Verdict "))
    assert " ".join(" ".join(lines[start:]).split()) == f"Verdict {verdict(made)}"
    assert max(map(len, lines)) <= 100
    page = made.to_html()
    assert '<p class="verdict"><strong>Broken.</strong> The same class as the original on 80.0% of 52' in page
    assert "verdict" not in vit_report().to_html().replace(".verdict {", "")
