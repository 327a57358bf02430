"""Entries are either complete or not there."""

import errno
import os
import shutil

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from mutations import is_same, mutations
from safetensors import SafetensorError

from optimum_mixrank.runtime.files import replaced_file
from optimum_mixrank.runtime.journal import Journal


def test_an_entry_comes_back_as_it_was(tmp_path):
    journal = Journal(tmp_path, interval=0)
    tensor = torch.randn(5, 3)
    tensors = {"a": tensor, "transposed": tensor.T, "same": tensor, "half": tensor.half(), "none": torch.zeros(0)}
    journal.save("entry", tensors, {"number": 3, "text": "ä"})
    entry = journal.load("entry")
    assert entry.values == {"number": 3, "text": "ä"}
    assert all(torch.equal(entry.tensors[name], value) for name, value in tensors.items())
    assert Journal(tmp_path, process=1).load("entry") is None
    assert journal.part("step").load("entry") is None


def test_only_the_main_process_writes_shared_entries(tmp_path):
    other = Journal(tmp_path, process=1)
    other.save("entry", {}, {"by": 1}, shared=True)
    assert other.load("entry", shared=True) is None
    Journal(tmp_path).save("entry", {}, {"by": 0}, shared=True)
    other.save("entry", {}, {"by": 1}, shared=True)
    assert other.load("entry", shared=True).values == {"by": 0}


def test_clearing_a_part_leaves_the_rest(tmp_path):
    for process in (0, 1):
        journal = Journal(tmp_path, process=process)
        for part in (journal, journal.part("step1"), journal.part("step10")):
            part.save("own", {})
            part.save("shared", {}, shared=True)
    Journal(tmp_path).part("step1").clear()
    left = {path.name for path in tmp_path.iterdir()}
    assert "step1-own.1.safetensors" in left and len(left) == 7
    assert not left & {"step1-own.0.safetensors", "step1-shared.safetensors"}


def test_without_a_folder_nothing_is_kept():
    journal = Journal()
    journal.save("entry", {"a": torch.ones(1)})
    assert not journal.is_kept and not journal.due() and journal.load("entry") is None
    journal.clear()


def test_a_damaged_entry_is_named(tmp_path):
    (tmp_path / "entry.0.safetensors").write_bytes(b"half of it")
    with pytest.raises(ValueError, match=r"entry\.0\.safetensors' is damaged"):
        Journal(tmp_path).load("entry")


@given(mutate=mutations(), empty=st.booleans())
def test_no_damage_goes_unnoticed(tmp_path_factory, mutate, empty):
    journal = Journal(tmp_path_factory.getbasetemp(), run="this")
    tensors = {} if empty else {"a": torch.arange(6.0), "b": torch.tensor(3), "c": torch.ones(2, 2).bfloat16()}
    values = {"results": [{"kept": True}], "layers": {"one": {"rank": 3}}}
    journal.save("damaged", tensors, values)
    path = journal.path("damaged")
    shutil.copy(path, path.with_name("undamaged"))
    mutate(path)
    if not is_same(path.with_name("undamaged"), path):
        with pytest.raises(
            ValueError, match=r"damaged.0.safetensors' (is damaged .*|belongs to another run); remove .*"
        ):
            journal.load("damaged")


def test_entries_of_other_runs_and_other_names_are_refused(tmp_path):
    one, other = Journal(tmp_path, run="one"), Journal(tmp_path, run="other")
    one.save("entry", {"a": torch.ones(1)})
    assert Journal(tmp_path).load("entry").run == "one"
    with pytest.raises(ValueError, match="belongs to another run; remove .* and start over"):
        other.load("entry")
    one.path("entry").rename(one.path("renamed"))
    with pytest.raises(ValueError, match="is damaged .*; remove .* and start over"):
        one.load("renamed")


@pytest.mark.parametrize(
    "error",
    [OSError(errno.ENOSPC, "No space left on device"), SafetensorError("I/O error: No space (os error 28)")],
    ids=["python", "safetensors"],
)
def test_a_full_disk_leaves_the_earlier_content(tmp_path, error):
    file = tmp_path / "file"
    file.write_text("earlier")
    message = r"No space left on device: '.*file' could not be written"
    with pytest.raises(OSError, match=message), replaced_file(file) as temporary:
        temporary.write_text("half")
        raise error
    assert file.read_text() == "earlier" and os.listdir(tmp_path) == ["file"]


def test_a_real_limit_on_the_size_of_files(tmp_path):
    resource = pytest.importorskip("resource")
    journal = Journal(tmp_path)
    journal.save("entry", {"a": torch.ones(10)})
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        with pytest.raises(OSError, match=r"File too large: '.*' could not be written"):
            journal.save("entry", {"a": torch.ones(100_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert len(journal.load("entry").tensors["a"]) == 10 and len(os.listdir(tmp_path)) == 1
