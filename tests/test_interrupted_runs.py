"""A run that is cut off goes on from where it was and ends with the same result, bit by bit."""

import copy

import pytest
from compensation.cases import config, images
from models import tiny_swin, tiny_vit

from optimum_mixrank import MixRankCompressor
from optimum_mixrank.journal import Journal


IMAGES = images(24)


class CutOff(BaseException):
    """The end of a process, as far as Python can tell it."""


@pytest.fixture
def cut_off(monkeypatch):
    """Let the process end when an entry has been written so many times, or has begun to be written."""
    save = Journal.save

    def prepare(count, before):
        written = []

        def watched(self, *arguments, **options):
            written.append(arguments[0])
            if len(written) == count and before:
                raise CutOff
            save(self, *arguments, **options)
            if len(written) == count:
                raise CutOff

        monkeypatch.setattr(Journal, "save", watched)
        return written

    return prepare


def compress(out, run=None, model=None, source=None, interval=1e-9, **changes):
    settings = config(**{"epochs": 1, "train_batch_size": 8, **changes})
    compressor = MixRankCompressor(copy.deepcopy(model or tiny_vit()))
    source = list(IMAGES.split(6)) if source is None else source
    compressor.compress(settings, source, out, resume_directory=run, save_interval=interval, batch_size=6)
    return (out / "model.safetensors").read_bytes(), (out / "config.json").read_bytes()


CASES = {
    "one_shot": {"compensation": []},
    "sequential": {"compensation": ["sequential"]},
    "residual_of_swin": {"compensation": ["residual"], "model": tiny_swin(), "layout": "factors"},
    "diagonal": {"compensation": [], "metric": "diagonal"},
    "mean_input": {"compensation": [], "metric": "mean_input"},
    "training": {"compensation": ["sequential", "blocks", "distillation"]},
}


@pytest.mark.parametrize("case", CASES)
def test_after_any_entry(case, cut_off, tmp_path):
    expected = compress(tmp_path / "undisturbed", **CASES[case])
    out, run = tmp_path / "out", tmp_path / "out.unfinished"
    entries = cut_off(10**6, before=False)
    assert compress(out, run, **CASES[case]) == expected
    total = len(entries)
    assert total > 4 and not run.exists()
    for count in range(1, total + 1):
        out = tmp_path / f"out-{count}"
        cut_off(count, before=count % 2 == 0)
        with pytest.raises(CutOff):
            compress(out, run, **CASES[case])
        assert not out.exists() and (count == 1 or run.is_dir())
        cut_off(10**6, before=False)
        assert compress(out, run, **CASES[case]) == expected
        assert not run.exists()
