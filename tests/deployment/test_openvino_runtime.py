import logging
import sys

import pytest

from optimum_mixrank.deployment.openvino_runtime import _stdout_left_alone


@pytest.mark.parametrize("bars", [True, False])
def test_what_nncf_prints_does_not_reach_stdout(bars, monkeypatch, capsys):
    monkeypatch.setattr("optimum_mixrank.deployment.openvino_runtime.is_progress_bar_enabled", lambda: bars)
    logger = logging.getLogger("nncf")
    monkeypatch.setattr(logger, "handlers", [logging.StreamHandler(sys.stdout)])
    before = logger.handlers
    with _stdout_left_alone():
        print("a table")
        logger.warning("a message")
    assert logger.handlers is before
    stdout, stderr = capsys.readouterr()
    assert stdout == "" and (stderr == "a table\na message\n" if bars else stderr == "")
