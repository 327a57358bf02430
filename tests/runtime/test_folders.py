"""Where the new content of a folder is written, and how folders take each other's place."""

import os

import pytest

from optimum_mixrank.runtime import folders
from optimum_mixrank.runtime.files import temporary_prefix


def folder(path, content=""):
    path.mkdir()
    (path / "file").write_text(content)
    return path


def test_linux_exchanges_in_one_step(tmp_path):
    first, second = folder(tmp_path / "first", "1"), folder(tmp_path / "second", "2")
    if not folders.exchange(first, second):
        pytest.skip("this system or file system cannot")
    assert (first / "file").read_text() == "2" and (second / "file").read_text() == "1"


def test_a_free_place_is_taken(tmp_path):
    (tmp_path / "empty").mkdir()
    for name in ("missing", "empty"):
        assert folders.take_place(folder(tmp_path / "new", name), tmp_path / name)
        assert (tmp_path / name / "file").read_text() == name
    assert not folders.take_place(folder(tmp_path / "new"), tmp_path / "missing")
    assert (tmp_path / "missing" / "file").read_text() == "missing"


def test_permissions_of_the_old_folder_stay(tmp_path):
    (tmp_path / "out").mkdir(mode=0o750)
    folders.take_place(folder(tmp_path / "new"), tmp_path / "out")
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o750


def test_the_current_folder_keeps_its_name(tmp_path, monkeypatch):
    (tmp_path / "here" / "below").mkdir(parents=True)
    assert folders.can_be_renamed(tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here" / "below")
    assert not folders.can_be_renamed(tmp_path / "here")


def test_a_mount_point_keeps_its_name():
    assert not folders.can_be_renamed(folders.resolved("/"))


def test_links_are_followed(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "missing")
    assert folders.resolved(tmp_path / "link") == folders.resolved(tmp_path) / "missing"


@pytest.mark.parametrize("name", ["out", "a" * 255])
def test_only_leftovers_of_this_output_are_removed(tmp_path, name):
    (tmp_path / name).mkdir()
    prefix = temporary_prefix(name, folders.INSIDE)
    left = [folder(tmp_path / f"{prefix}0123abcd"), folder(tmp_path / name / f"{folders.INSIDE}0123abcd")]
    other = [".other.saving-0123abcd", f"{prefix}0123", f"{prefix}thesis01", "out.unfinished"[-200:]]
    for each in other:
        folder(tmp_path / each)
    in_use = folder(tmp_path / name / f"{folders.INSIDE}89abcdef")
    folders.remove_leftovers(tmp_path / name, keep=in_use.name)
    assert not any(each.exists() for each in left)
    assert sorted(os.listdir(tmp_path)) == sorted([name, *other]) and os.listdir(tmp_path / name) == [in_use.name]


def test_a_folder_that_another_process_writes_is_not_a_leftover(tmp_path):
    with folders.staging_folder(tmp_path / "out", inside=False) as writing:
        pid = os.fork()
        if pid == 0:
            folders.remove_leftovers(tmp_path / "out")
            os._exit(0)
        os.waitpid(pid, 0)
        assert writing.is_dir()
