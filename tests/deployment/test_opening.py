import pytest

from optimum_mixrank import export_model, open_exported


def test_a_damaged_file_is_named_with_the_remedy(one_model, tmp_path):
    file = export_model(one_model, tmp_path, "torch").file
    content = file.read_bytes()
    for damaged in (content[: len(content) // 2], b""):
        file.write_bytes(damaged)
        with pytest.raises(
            ValueError, match=r"model.pt2' cannot be opened: it is damaged, .*; export the model again"
        ):
            open_exported(file)
