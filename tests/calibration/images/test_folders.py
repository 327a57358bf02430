import io
import json
import logging
import os
import shutil
import tarfile
import zipfile

import datasets
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from optimum_mixrank.calibration.images.decoding import decode_image
from optimum_mixrank.calibration.images.folders import missing_labels
from optimum_mixrank.calibration.images.sources import load_image_dataset


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path_factory):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def picture(number=0):
    buffer = io.BytesIO()
    Image.new("RGB", (6, 4), (number, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def write(folder, *names):
    for name in names:
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(picture())
    return folder


def found(folder, **options):
    """The images of a dataset by their path in the folder, with the names of their classes."""
    data = load_image_dataset(folder, **options)
    names = [os.path.relpath(image["path"], folder).replace(os.sep, "/") for image in data["image"]]
    labels = data.features["label"].int2str(data["label"][:]) if "label" in data.features else [None] * len(names)
    return dict(zip(names, labels, strict=True))


FLAT = dict.fromkeys(
    [
        "ILSVRC2012_val_00000003.JPEG",
        "a b#%.png",
        "cat*.png",
        "d::e.png",
        "n01440764_10042.Jpg",
        "test_0.jpg",
        "train-1.png",
        "valid.PNG",
        "x?.png",
        "é[v1].png",
    ]
)


def test_names_of_files_mean_nothing(tmp_path):
    assert found(write(tmp_path, *FLAT)) == FLAT
    assert found(tmp_path, default_splits=("validation", "test")) == FLAT
    with pytest.raises(ValueError, match="split='test' does not exist; the splits are train"):
        found(tmp_path, split="test")


@pytest.mark.parametrize("name", ["images[v1]", "a::b", "cat*", "train", "val_2", "x?y", "file: #1 %20"])
def test_the_name_of_the_folder_means_nothing(tmp_path, name):
    folder = write(tmp_path / name, "cat/1.png", "dog/2.png")
    assert found(folder) == {"cat/1.png": "cat", "dog/2.png": "dog"}
    assert decode_image(load_image_dataset(folder)[0]["image"]).size == (6, 4)


@pytest.mark.parametrize(
    "classes",
    [
        ["cat", "train"],
        ["bullet train", "cat"],
        ["cat", "valid"],
        ["cat", "test tube", "train"],
        ["bullet train", "steam train", "train"],
        ["cat", "train", "valid"],
        ["dev", "eval", "train", "x[v1]", "y::z"],
    ],
    ids=",".join,
)
def test_classes_that_are_called_like_splits(tmp_path, classes):
    names = {f"{name}/{index}.png": name for name in classes for index in range(2)}
    assert found(write(tmp_path, *names), default_splits=("validation", "test")) == dict(sorted(names.items()))


word = st.sampled_from(
    ["train", "valid", "test", "val", "dev", "eval", "cat", "a", "[v1]", "*", "1", " ", "_", "-", "."]
)


@given(names=st.sets(st.lists(word, min_size=1, max_size=3).map("".join), min_size=1, max_size=6))
def test_every_image_of_a_flat_folder_is_used(names, tmp_path_factory):
    folder = write(tmp_path_factory.mktemp("flat"), *(f"x{name}.png" for name in names))
    assert set(found(folder)) == {file.name for file in folder.iterdir()}


@pytest.mark.parametrize(
    ("train", "validation"),
    [("train", "val"), ("training", "validation"), ("data/train", "data/valid"), ("train_set", "val_set")],
)
def test_folders_of_splits(tmp_path, train, validation):
    write(
        tmp_path, f"{train}/cat/1.png", f"{train}/train/2.png", f"{validation}/cat/3.png", f"{validation}/test/4.png"
    )
    assert list(found(tmp_path)) == [f"{train}/cat/1.png", f"{train}/train/2.png"]
    assert found(tmp_path, split="validation") == {
        f"{validation}/cat/3.png": "cat",
        f"{validation}/test/4.png": "test",
    }


def test_splits_without_classes(tmp_path):
    write(tmp_path, "train/1.png", "train/2.png", "test/3.png")
    assert found(tmp_path) == {"train/1.png": None, "train/2.png": None}
    assert found(tmp_path, split="test") == {"test/3.png": None}


def test_other_images_beside_splits(tmp_path, caplog):
    write(tmp_path, "train/cat/1.png", "train/dog/2.png", "val/cat/3.png", "val/dog/4.png", "figures/5.png")
    with pytest.raises(
        ValueError, match="splits train and validation, and other images, such as 'figures/5.png'; name"
    ):
        found(tmp_path)
    assert found(tmp_path, split="validation") == {"val/cat/3.png": "cat", "val/dog/4.png": "dog"}
    write(tmp_path / "flat", "train/1.png", "val/2.png", "cat/3.png")
    assert found(tmp_path / "flat") == {"cat/3.png": "cat", "train/1.png": "train", "val/2.png": "val"}
    assert "called train and validation, and others beside them; all are read as classes" in caplog.text


def test_other_files_beside_images(tmp_path, caplog):
    caplog.set_level(logging.INFO, "optimum_mixrank")
    write(tmp_path, "a.png", "b.Avif", ".hidden.png", "._a.png", ".thumbs/a.png", "__MACOSX/a.png")
    for index in range(5):
        (tmp_path / f"{index}.json").write_text("{}")
        (tmp_path / f"a.png.{index}.txt").write_text("")
    (tmp_path / "README.md").write_text("# Pictures\n---\n: no metadata")
    (tmp_path / "LICENSE").write_text("")
    with zipfile.ZipFile(tmp_path / "all.zip", "w") as archive:
        archive.writestr("a.png", picture())
    datasets.Dataset.from_dict({"image": [1]}).to_parquet(tmp_path / "features.parquet")
    assert list(found(tmp_path)) == ["a.png", "b.Avif"]
    assert (
        f"Files in {str(tmp_path)!r} without the ending of an image are left out: .json (5), .md (1), .txt (5)."
        in caplog.text
    )
    assert (
        f"{str(tmp_path)!r} holds 2 images; other files in it are left out: files without an ending (1), hidden images (1)"
        ", parquet, arrow or tar files (1), zip archives (1)."
    ) in caplog.text


def test_parquet_with_a_few_pictures(tmp_path, caplog):
    data = datasets.Dataset.from_dict({"image": [picture()] * 3}).cast_column("image", datasets.Image())
    for index in range(2):
        data.to_parquet(tmp_path / f"train-{index:05}-of-00002.parquet")
    write(tmp_path, "logo.png")
    assert len(load_image_dataset(tmp_path)) == 6
    assert "its images (1), such as 'logo.png', are left out" in caplog.text


def test_a_card_that_names_the_files_is_followed(tmp_path):
    write(tmp_path, "a/1.png", "b/2.png", "c/3.png")
    configs = [{"config_name": "default", "data_files": [{"split": "test", "path": "a/*.png"}]}]
    (tmp_path / "README.md").write_text(f"---\nconfigs: {json.dumps(configs)}\n---\n")
    assert list(found(tmp_path)) == ["a/1.png"]


def test_links(tmp_path):
    write(tmp_path / "elsewhere", "1.png", "2.png")
    folder = write(tmp_path / "images", "cat/3.png")
    (folder / "dog").symlink_to(tmp_path / "elsewhere")
    (folder / "cat" / "loop").symlink_to(folder)
    (folder / "cat" / "gone.png").symlink_to(folder / "nothing")
    assert found(folder) == {"cat/3.png": "cat", "cat/gone.png": "cat", "dog/1.png": "dog", "dog/2.png": "dog"}


@pytest.mark.parametrize("name", ["plain", "images[v1]", "test_2"])
@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_metadata(tmp_path, caplog, name, kind):
    folder = write(tmp_path / name, "test_1.png", "a/2.png", "b/3.png")
    rows = [{"file_name": "test_1.png", "caption": "one"}, {"file_name": "a/2.png", "caption": "two"}]
    lines = ["file_name,caption", *(",".join(row.values()) for row in rows)]
    (folder / f"metadata.{kind}").write_text("\n".join(lines if kind == "csv" else map(json.dumps, rows)))
    data = load_image_dataset(folder)
    assert data["caption"][:] == ["one", "two"]
    assert [decode_image(image).size for image in data["image"]] == [(6, 4)] * 2
    assert f"1 of 3 images in {str(folder)!r} have no row in metadata.{kind} and are left out" in caplog.text


def test_metadata_of_splits(tmp_path, caplog):
    write(tmp_path, "train/1.png", "test/2.png")
    (tmp_path / "metadata.csv").write_text("file_name\ntrain/1.png\n")
    assert list(found(tmp_path)) == ["train/1.png"]
    assert "metadata.csv in" in caplog.text and "is left out, since the folder has one folder per split" in caplog.text
    (tmp_path / "metadata.csv").unlink()
    for split, number in (("train", 1), ("test", 2)):
        (tmp_path / split / "metadata.csv").write_text(f"file_name,caption\n{number}.png,{number}\n")
    assert load_image_dataset(tmp_path, split="test")["caption"][:] == [2]


def test_metadata_without_names_of_files(tmp_path):
    write(tmp_path, "1.png")
    (tmp_path / "metadata.csv").write_text("picture,caption\n1.png,one\n")
    with pytest.raises(
        ValueError, match="metadata.csv in .* cannot be read as a list of images: .*file_name.* rename it"
    ):
        load_image_dataset(tmp_path)


@pytest.mark.parametrize("streaming", [False, True])
def test_zip_archives(tmp_path, streaming):
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
        for name in ("cat/1.png", "dog/2.JPG", "notes.txt", "__MACOSX/cat/1.png"):
            archive.writestr(name, picture())
    data = load_image_dataset(tmp_path, num_samples=2, streaming=streaming)
    assert data.features["label"].names == ["cat", "dog"]
    assert [decode_image(image).size for image in data["image"]] == [(6, 4)] * 2


def test_a_zip_archive_per_split(tmp_path):
    for split in ("train", "val"):
        with zipfile.ZipFile(tmp_path / f"{split}.zip", "w") as archive:
            archive.writestr(f"cat/{split}.png", picture())
    assert load_image_dataset(tmp_path, split="validation")[0]["image"]["path"].startswith("zip://cat/val.png::")
    (tmp_path / "val.zip").write_bytes(b"no archive")
    with pytest.raises(ValueError, match="val.zip' cannot be read as a zip archive: File is not a zip file"):
        load_image_dataset(tmp_path)


def test_tar_archives(tmp_path):
    with tarfile.open(tmp_path / "images.tar.gz", "w:gz") as archive:
        for index in range(3):
            member = tarfile.TarInfo(f"{index}.png")
            member.size = len(picture())
            archive.addfile(member, io.BytesIO(picture()))
    data = load_image_dataset(tmp_path)
    assert [decode_image(image).size for image in data["png"]] == [(6, 4)] * 3
    with tarfile.open(tmp_path / "images.tar.gz", "w:gz") as archive:
        for name in ("a.png", "b.jpg"):
            archive.addfile(tarfile.TarInfo(name))
    with pytest.raises(ValueError, match="that are not a WebDataset; name one of them as the dataset"):
        load_image_dataset(tmp_path)


def test_streaming_a_folder(tmp_path):
    write(tmp_path, *(f"cat/test_{index}.png" for index in range(9)), "dog/1.png")
    assert len(found(tmp_path, num_samples=10, streaming=True)) == 10


def test_names_that_are_not_unicode(tmp_path):
    try:
        (tmp_path / os.fsdecode(b"\xff.png")).write_bytes(picture())
    except OSError:
        pytest.skip("the file system refuses such names")
    with pytest.raises(ValueError, match=r"The name of the file .*\.png' is not Unicode; rename it"):
        load_image_dataset(tmp_path)


@pytest.mark.parametrize(
    ("paths", "reason"),
    [
        (["/x/cat/1.png", "/x/cat/2.png"], "all of them lie in one folder, 'cat'"),
        (["/x/1.png", "/x/cat/2.png"], "they lie at different depths of folders"),
        (["/x/dog/1.png", "/x/cat/2.png"], None),
    ],
)
def test_missing_labels(paths, reason):
    assert missing_labels(paths) == reason


@pytest.mark.parametrize("ending", [".zip", ".tar", ".tar.gz"])
def test_an_archive_is_read_like_the_folder_in_it(tmp_path, ending):
    write(tmp_path / "images", "cat/train_0.png", "cat/val_1.jpg", "dog/2.png")
    path = tmp_path / f"images{ending}"
    shutil.make_archive(
        str(tmp_path / "images"), {".zip": "zip", ".tar": "tar"}.get(ending, "gztar"), tmp_path / "images"
    )
    data = load_image_dataset(path)
    assert [decode_image(image).size for image in data["image"]] == [(6, 4)] * 3 and data["label"] == [0, 0, 1]
    # A changed archive is not taken for the one before.
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("1.png", picture())
    if ending == ".zip":
        assert len(load_image_dataset(path)) == 1


def test_a_file_that_is_not_an_archive_of_images(tmp_path):
    (tmp_path / "a.zip").write_bytes(b"no archive")
    with pytest.raises(ValueError, match="a.zip' is not an archive of images; name one, or a folder of images"):
        load_image_dataset(tmp_path / "a.zip")
    with zipfile.ZipFile(tmp_path / "b.zip", "w") as archive:
        archive.writestr("notes.txt", "")
    with pytest.raises(ValueError, match="b.zip' is not an archive of images"):
        load_image_dataset(tmp_path / "b.zip")


def test_a_split_without_classes_leaves_those_of_the_others(tmp_path):
    write(tmp_path, "train/cat/1.png", "train/dog/2.png", "test/3.png", "test/4.png")
    assert load_image_dataset(tmp_path, split="train")["label"] == [0, 1]
    assert load_image_dataset(tmp_path, split="test").column_names == ["image"]


def test_an_image_beside_the_folder_of_a_split(tmp_path, caplog):
    write(tmp_path, "train/cat/1.png", "train/dog/2.png", "cover.jpg")
    assert len(load_image_dataset(tmp_path)) == 3
    assert "other images beside it, such as 'cover.jpg'" in caplog.text
    assert load_image_dataset(tmp_path, split="train")["label"] == [0, 1]


def test_metadata_of_one_split_hides_no_other(tmp_path, caplog):
    write(tmp_path, "train/1.png", "train/2.png", "val/3.png")
    (tmp_path / "train" / "metadata.csv").write_text("file_name,label\n1.png,a\n2.png,b\n")
    assert len(load_image_dataset(tmp_path, split="validation")) == 1
    assert "train/metadata.csv" in caplog.text and "put one into each of them" in caplog.text


@pytest.mark.parametrize("name", ["a::b.png", "[1]*.png"])
def test_names_in_archives_that_mean_something_else(tmp_path, name):
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
        archive.writestr(name, picture())
    with pytest.raises(ValueError, match="mean something else in a path; extract the archive"):
        load_image_dataset(tmp_path)
