"""One folder in the place of another: old or new stands there at every moment, where the system can exchange names."""

import pytest

from optimum_mixrank.runtime import files


@pytest.fixture(params=["exchange", "file by file"])
def way(request, monkeypatch):
    if request.param == "file by file":
        monkeypatch.setattr(files, "_exchange", lambda first, second: False)
    return request.param


def folder(path, content):
    path.mkdir()
    (path / "file").write_text(content)
    return path


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("before", ["none", "empty", "full"])
def test_the_new_folder_stands(tmp_path, before):
    destination = tmp_path / "out"
    if before != "none":
        destination.mkdir()
    if before == "full":
        (destination / "old").write_text("old")
        folder(destination / "file", "a folder of that name")
    source = folder(tmp_path / ".out.saving-12345678", "new")
    files.put_in_place(source, destination, last="file")
    assert [file.name for file in destination.iterdir()] == ["file"]
    assert (destination / "file").read_text() == "new"
    files.remove_leftovers(destination)
    assert [each.name for each in tmp_path.iterdir()] == ["out"]


def test_linux_exchanges_in_one_step(tmp_path):
    first, second = folder(tmp_path / "first", "1"), folder(tmp_path / "second", "2")
    if not files._exchange(first, second):
        pytest.skip("this system or file system cannot")
    assert (first / "file").read_text() == "2" and (second / "file").read_text() == "1"


def test_file_by_file_the_folder_is_incomplete_until_the_end(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_exchange", lambda first, second: False)
    destination, source = folder(tmp_path / "out", "old"), folder(tmp_path / "new", "new")
    for name in ("a", "z"):
        (source / name).write_text("new")
    moved = []
    replace = type(source).replace

    def watched(self, target):
        moved.append((self.name, (destination / "file").exists()))
        return replace(self, target)

    monkeypatch.setattr(type(source), "replace", watched)
    files.put_in_place(source, destination, last="file")
    assert sorted(moved[:2]) == [("a", False), ("z", False)] and moved[2] == ("file", False)
    assert (destination / "file").read_text() == "new"


def test_file_by_file_nothing_new_is_lost_where_a_file_cannot_be_moved(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_exchange", lambda first, second: False)
    destination, source = folder(tmp_path / "out", "old"), folder(tmp_path / ".out.saving-abcdefgh", "new")
    (source / "weights").write_text("new")
    replace = type(source).replace

    def locked(self, target):
        if self.name == "weights":
            raise PermissionError("the file is in use")
        return replace(self, target)

    monkeypatch.setattr(type(source), "replace", locked)
    with pytest.raises(OSError, match=r"could not be replaced completely \(the file is in use\).* in '.*out\.rest'"):
        files.put_in_place(source, destination, last="file")
    assert not (destination / "file").exists()
    assert {each.name: each.read_text() for each in (tmp_path / "out.rest").iterdir()} == {
        "file": "new",
        "weights": "new",
    }


def test_leftovers_of_other_outputs_stay(tmp_path):
    names = [".out.saving-abcdefgh", ".out2.saving-abcdefgh", ".out.saving-abc", "out.unfinished", ".out"]
    for name in names:
        folder(tmp_path / name, "")
    files.remove_leftovers(tmp_path / "out")
    assert sorted(each.name for each in tmp_path.iterdir()) == sorted(names[1:])
