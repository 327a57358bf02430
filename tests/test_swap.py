"""One folder in the place of another: old or new stands there at every moment."""

import pytest

from optimum_mixrank import swap


@pytest.fixture(params=["exchange", "two_renames"])
def way(request, monkeypatch):
    if request.param == "two_renames":
        monkeypatch.setattr(swap, "_exchange", lambda first, second: False)
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
    source = folder(tmp_path / ".out.saving-12345678", "new")
    swap.put_in_place(source, destination)
    assert [file.name for file in destination.iterdir()] == ["file"]
    swap.remove_leftovers(destination)
    assert [each.name for each in tmp_path.iterdir()] == ["out"]


def test_linux_exchanges_in_one_step(tmp_path):
    first, second = folder(tmp_path / "first", "1"), folder(tmp_path / "second", "2")
    if not swap._exchange(first, second):
        pytest.skip("this system or file system cannot")
    assert (first / "file").read_text() == "2" and (second / "file").read_text() == "1"


def test_the_old_folder_comes_back_when_the_new_one_cannot_be_moved(tmp_path, monkeypatch):
    monkeypatch.setattr(swap, "_exchange", lambda first, second: False)
    destination = folder(tmp_path / "out", "old")
    with pytest.raises(FileNotFoundError):
        swap.put_in_place(tmp_path / "missing", destination)
    assert (destination / "file").read_text() == "old"
    assert [each.name for each in tmp_path.iterdir()] == ["out"]


def test_the_old_folder_comes_back_after_a_kill_between_two_renames(tmp_path):
    aside = tmp_path / ".out.old-abcdefgh"
    aside.mkdir()
    folder(aside / "out", "old")
    swap.recover(tmp_path / "out")
    assert (tmp_path / "out" / "file").read_text() == "old"
    assert [each.name for each in tmp_path.iterdir()] == ["out"]


def test_leftovers_of_other_outputs_stay(tmp_path):
    names = [".out.saving-abcdefgh", ".out2.saving-abcdefgh", ".out.saving-abc", "out.unfinished", ".out"]
    for name in names:
        folder(tmp_path / name, "")
    swap.remove_leftovers(tmp_path / "out")
    assert sorted(each.name for each in tmp_path.iterdir()) == sorted(names[1:])
