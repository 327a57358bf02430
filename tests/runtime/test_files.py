"""Files that are either complete or not there, with the permissions of new files."""

import os

import pytest

from optimum_mixrank.runtime.files import check_writable_file, is_local_path, replaced_file


@pytest.fixture
def umask():
    before = os.umask(0o022)
    yield os.umask
    os.umask(before)


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_permissions_are_those_of_new_files(tmp_path, umask, mask, mode):
    umask(mask)
    with replaced_file(tmp_path / "file") as temporary:
        temporary.write_text("new")
    assert (tmp_path / "file").stat().st_mode & 0o777 == mode


def test_after_an_error_the_old_file_stays_alone(tmp_path):
    (tmp_path / "file").write_text("old")
    with pytest.raises(ZeroDivisionError), replaced_file(tmp_path / "file") as temporary:
        temporary.write_text("new")
        raise ZeroDivisionError
    assert [(each.name, each.read_text()) for each in tmp_path.iterdir()] == [("file", "old")]


def test_a_link_is_followed(tmp_path):
    (tmp_path / "target").write_text("old")
    (tmp_path / "link").symlink_to(tmp_path / "target")
    with replaced_file(tmp_path / "link") as temporary:
        temporary.write_text("new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "target").read_text() == "new"


def test_the_longest_name_works(tmp_path):
    path = tmp_path / ("a" * 255)
    check_writable_file(path)
    with replaced_file(path) as temporary:
        temporary.write_text("new")
    assert os.listdir(tmp_path) == ["a" * 255]


@pytest.mark.parametrize("name", ["a" * 256, "missing/file", "file/file", "."])
def test_what_cannot_be_written_is_refused_before_work(tmp_path, name):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"cannot be written .*; choose another place|is a folder; name a file in it"):
        check_writable_file(tmp_path / name)
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("name", ["/tmp/folder/original", "some/folder/original", "./original", "~/original", "~"])
def test_paths_that_do_not_exist_are_told_from_hub_ids(name):
    assert is_local_path(name)


@pytest.mark.parametrize("name", ["google/vit-base-patch16-224", "vit"])
def test_hub_ids_are_not_paths(name):
    assert not is_local_path(name)


def test_an_existing_folder_is_a_path(tmp_path, monkeypatch):
    (tmp_path / "google" / "vit").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert is_local_path("google/vit")
