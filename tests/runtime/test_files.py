"""Folders that take the place of others, and files that are complete or not there."""

import os

import pytest

from optimum_mixrank.runtime import folders
from optimum_mixrank.runtime.files import check_writable_file, replaced_file


def folder(path, content):
    path.mkdir()
    (path / "file").write_text(content)
    return path


def test_linux_exchanges_in_one_step(tmp_path):
    first, second = folder(tmp_path / "first", "1"), folder(tmp_path / "second", "2")
    if not folders.exchange(first, second):
        pytest.skip("this system or file system cannot")
    assert (first / "file").read_text() == "2" and (second / "file").read_text() == "1"


def test_leftovers_of_other_outputs_stay(tmp_path):
    names = [".out.saving-abcdef01", ".out2.saving-abcdef01", ".out.saving-abc", "out.unfinished", ".out"]
    for name in names:
        folder(tmp_path / name, "")
    folders.remove_leftovers(tmp_path / "out")
    assert sorted(each.name for each in tmp_path.iterdir()) == sorted(names[1:])


def test_a_file_behind_a_link_is_replaced(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "file")
    with replaced_file(tmp_path / "link") as temporary:
        temporary.write_text("new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "file").read_text() == "new"
    assert sorted(os.listdir(tmp_path)) == ["file", "link"]


def test_a_file_that_cannot_be_written_is_refused(tmp_path):
    with pytest.raises(IsADirectoryError, match="is a folder"):
        check_writable_file(tmp_path)
    for path in (tmp_path / "none" / "file", tmp_path / ("a" * 300)):
        with pytest.raises(OSError, match="cannot be written"):
            check_writable_file(path)
