"""Messages obey Transformers' verbosity, and go to the program's own handlers where it has some."""

import logging
import subprocess
import sys

import pytest
from models import pixels, tiny_vit
from transformers.utils import logging as transformers_logging

from optimum_mixrank import MixRankCompressor, MixRankConfig
from optimum_mixrank.runtime.formatting import count, duration, size
from optimum_mixrank.runtime.logging import get_logger
from optimum_mixrank.runtime.phases import phase


ROOT = logging.getLogger("optimum_mixrank")


@pytest.fixture(autouse=True)
def levels():
    before = transformers_logging.get_verbosity(), ROOT.level
    # A command that ran in this process before may have set it.
    ROOT.setLevel(logging.NOTSET)
    get_logger("optimum_mixrank.tests")
    yield
    transformers_logging.set_verbosity(before[0])
    ROOT.setLevel(before[1])


@pytest.mark.parametrize(
    ("verbosity", "expected"),
    [
        (logging.ERROR, ["error"]),
        (logging.WARNING, ["warning", "error"]),
        (logging.INFO, ["info", "warning", "error"]),
        (logging.DEBUG, ["debug", "info", "warning", "error"]),
    ],
)
def test_transformers_verbosity_holds(verbosity, expected, caplog):
    transformers_logging.set_verbosity(verbosity)
    logger = get_logger("optimum_mixrank.somewhere.deep")
    for level in ("debug", "info", "warning", "error"):
        getattr(logger, level)(level)
    assert caplog.messages == expected


def test_a_level_of_its_own_goes_first(caplog):
    transformers_logging.set_verbosity_error()
    ROOT.setLevel(logging.INFO)
    get_logger("optimum_mixrank.somewhere").info("spoken")
    ROOT.setLevel(logging.ERROR)
    transformers_logging.set_verbosity_debug()
    get_logger("optimum_mixrank.somewhere").warning("unspoken")
    assert caplog.messages == ["spoken"]


def test_a_line_per_phase(tmp_path, caplog):
    transformers_logging.set_verbosity_info()
    compressor = MixRankCompressor(tiny_vit())
    images = [pixels(8), pixels(8, seed=1)]
    model = compressor.compress(
        MixRankConfig(compression_ratio=0.3, compression_scope="targets", compensation=["sequential"]), images
    )
    compressor.evaluate(model, images)
    compressor.save_pretrained(model, tmp_path / "out")
    ours = [record.getMessage() for record in caplog.records if record.name == "optimum_mixrank.runtime.phases"]
    beginnings = [
        "Decoded: 16 images, ",
        # Sixteen patches and the class token.
        "Calibrated: 16 images, 272 tokens per layer, ",
        "Decomposed: 12 layers, ",
        "Allocated: ranks ",
        "Factorized: ",
        "Compensated (sequential): error on 2 held-out images ",
        "Evaluated: 16 images, agreement ",
        f"Saved: {tmp_path / 'out'}, ",
    ]
    assert [line[: len(beginning)] for line, beginning in zip(ours, beginnings, strict=True)] == beginnings
    assert all(line.endswith(" s") for line in ours)
    (step,) = compressor.report.compensation
    assert f"{step['error_before']:.4g} -> {step['error_after']:.4g}, {'' if step['kept'] else 'not '}kept" in ours[5]


def test_a_phase_that_fails_says_nothing(caplog):
    transformers_logging.set_verbosity_info()
    with pytest.raises(ValueError, match="no luck"), phase("Tried"):
        raise ValueError("no luck")
    assert not caplog.messages


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (duration(0.123), "0.12 s"),
        (duration(12.34), "12.3 s"),
        (duration(125.4), "2 min 5 s"),
        (duration(3723), "1 h 2 min"),
        (count(950), "950"),
        (count(25_600), "25.6 k"),
        (count(1_300_000), "1.3 M"),
        (size(812), "812 B"),
        (size(4_700_000), "4.7 MB"),
    ],
)
def test_numbers_are_short(text, expected):
    assert text == expected


PROGRAM = """
import logging, sys, transformers
if sys.argv[1] == "handlers":
    logging.basicConfig(format="theirs %(message)s")
from optimum_mixrank.messages import get_logger
get_logger("optimum_mixrank.somewhere").info("not yet")
transformers.logging.set_verbosity_info()
get_logger("optimum_mixrank.somewhere").info("spoken")
"""


@pytest.mark.parametrize(("handlers", "expected"), [("no", "spoken\n"), ("handlers", "theirs spoken\n")])
def test_spoken_once_to_stderr_or_to_the_handlers_of_the_program(handlers, expected):
    command = [sys.executable, "-c", PROGRAM, handlers]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert result.stderr == expected and not result.stdout
