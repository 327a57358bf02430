import datasets
import numpy as np
import pytest
from PIL import Image

from optimum_mixrank.calibration.images.sources import load_image_dataset
from optimum_mixrank.runtime.access import hub_reached_by


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path_factory):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def write_images(folder, count):
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(count):
        Image.new("RGB", (6, 4), (index, 0, 0)).save(folder / f"{index}.png")


def in_memory(count=5):
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])})
    images = [Image.new("RGB", (6, 4), (index, 0, 0)) for index in range(count)]
    return datasets.Dataset.from_dict({"image": images, "label": [i % 2 for i in range(count)]}, features=features)


def assert_undecoded(data, count, columns=("image", "label")):
    assert isinstance(data, datasets.Dataset)
    assert data.column_names == list(columns)
    assert len(data) == count
    assert data.features["image"] == datasets.Image(decode=False)
    assert set(data[0]["image"]) == {"bytes", "path"}


def test_plain_folder_with_a_broken_file(tmp_path):
    write_images(tmp_path, 3)
    (tmp_path / "broken.png").write_bytes(b"")
    assert_undecoded(load_image_dataset(tmp_path), 4, ["image"])


def test_class_folders(tmp_path):
    for name in ("cat", "dog"):
        write_images(tmp_path / name, 2)
    data = load_image_dataset(str(tmp_path))
    assert_undecoded(data, 4)
    assert data.features["label"].names == ["cat", "dog"]


def test_split_folders(tmp_path):
    for split, count in (("train", 3), ("val", 1)):
        for name in ("cat", "dog"):
            write_images(tmp_path / split / name, count)
    assert_undecoded(load_image_dataset(tmp_path), 6)
    assert_undecoded(load_image_dataset(tmp_path, split="validation"), 2)
    assert_undecoded(load_image_dataset(tmp_path, default_splits=("test", "validation")), 2)
    with pytest.raises(ValueError, match="split='test' does not exist; the splits are train, validation"):
        load_image_dataset(tmp_path, split="test")
    with pytest.raises(ValueError, match="several splits: train, validation. Name one with `split`"):
        load_image_dataset(tmp_path, default_splits=("test",))


def test_parquet(tmp_path):
    file = tmp_path / "train.parquet"
    in_memory().to_parquet(file)
    assert_undecoded(load_image_dataset(file), 5)
    assert_undecoded(load_image_dataset(tmp_path), 5)
    folder = tmp_path / "data[v1]"
    folder.mkdir()
    in_memory().to_parquet(folder / "a[1].parquet")
    assert_undecoded(load_image_dataset(folder / "a[1].parquet"), 5)
    with pytest.raises(ValueError, match=r"data\[v1\]', since its name contains one of .*; rename it"):
        load_image_dataset(folder)


@pytest.mark.parametrize("splits", [(), ("test",), ("train", "test")], ids=str)
def test_saved_to_disk(tmp_path, splits):
    data = datasets.DatasetDict({split: in_memory() for split in splits}) if splits else in_memory()
    data.save_to_disk(tmp_path)
    assert_undecoded(load_image_dataset(tmp_path), 5)
    with pytest.raises(ValueError, match="revision cannot be applied to a folder written by `save_to_disk`"):
        load_image_dataset(tmp_path, revision="main")


def test_in_memory():
    assert_undecoded(load_image_dataset(in_memory()), 5)
    assert_undecoded(load_image_dataset(datasets.DatasetDict({"train": in_memory(3), "test": in_memory(4)})), 3)
    with pytest.raises(ValueError, match="split='test' cannot be chosen: this is one dataset without splits"):
        load_image_dataset(in_memory(), split="test")
    with pytest.raises(ValueError, match="token cannot be applied to a dataset in memory"):
        load_image_dataset(in_memory(), token="secret", revision=None)
    with pytest.raises(TypeError, match="source is a list, not an image dataset; give a folder"):
        load_image_dataset([])


def test_hub(monkeypatch):
    calls = []

    def load_dataset(*args, **kwargs):
        calls.append((args, kwargs))
        return datasets.DatasetDict({"train": in_memory(7)})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert_undecoded(load_image_dataset("user/birds", revision="v1", token="secret", cache_dir="c", name="small"), 7)
    assert_undecoded(load_image_dataset("mnist", num_samples=2), 2)
    assert calls == [
        (("user/birds",), {"revision": "v1", "token": "secret", "cache_dir": "c", "name": "small"}),
        (("mnist",), {}),
    ]
    calls.clear()
    with hub_reached_by({"token": "secret", "cache_dir": "of models", "revision": "of the model"}):
        load_image_dataset("user/birds")
        load_image_dataset("user/birds", token="another")
    assert [given for _, given in calls] == [{"token": "secret"}, {"token": "another"}]


def test_streams(tmp_path, caplog, monkeypatch):
    # `datasets` lets threads end in peace before the interpreter may.
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0, raising=False)
    (tmp_path / "data").mkdir()
    for shard in range(4):
        in_memory(10).to_parquet(tmp_path / "data" / f"train-{shard:05}-of-00004.parquet")

    def draw(count, seed=0):
        return load_image_dataset(tmp_path, num_samples=count, seed=seed, streaming=True)

    drawn = draw(12)
    assert_undecoded(drawn, 12)
    assert drawn.features["label"].names == ["cat", "dog"]
    assert drawn[:] == draw(12)[:] != draw(12, seed=1)[:]
    assert not caplog.records
    assert len(draw(41)) == 40
    assert "The dataset holds 40 images, fewer than the 41 to draw; all of them are used" in caplog.text
    with pytest.raises(ValueError, match="streaming=True needs num_samples"):
        draw(None)
    with pytest.raises(ValueError, match="split='test' does not exist; the splits are train"):
        load_image_dataset(tmp_path, split="test", num_samples=1, streaming=True)


def test_a_stream_without_known_columns_is_refused(monkeypatch):
    stream = datasets.IterableDataset.from_generator(lambda: iter([{"image": None}]))
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: datasets.IterableDatasetDict(train=stream))
    with pytest.raises(ValueError, match="does not tell its columns before it is read"):
        load_image_dataset("user/birds", num_samples=1, streaming=True)


@pytest.mark.parametrize("source", ["./images", "~/no-such-images", "/no/images", "data/many/images", "../x"])
def test_missing_paths_are_not_hub_ids(monkeypatch, source):
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: pytest.fail("asked the Hub"))
    with pytest.raises(FileNotFoundError, match="There is no folder or file .*images or a Hub id"):
        load_image_dataset(source)


def test_unusable_paths(tmp_path):
    (tmp_path / "a.png").write_bytes(b"")
    with pytest.raises(
        ValueError, match="is a file, but neither a parquet file nor an archive .*; name a folder of images"
    ):
        load_image_dataset(tmp_path / "a.png")
    with pytest.raises(FileNotFoundError, match="There is no folder or file"):
        load_image_dataset(tmp_path / "gone")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="empty' is empty; name a folder of images"):
        load_image_dataset(tmp_path / "empty")
    with pytest.raises(FileNotFoundError, match="The name of the dataset is empty"):
        load_image_dataset("")


def test_the_picture_of_the_ranks_makes_no_dataset_of_a_checkpoint(tmp_path):
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes(b"{}")
    Image.new("RGB", (8, 8)).save(tmp_path / "ranks.png")
    with pytest.raises(ValueError, match="holds a model and no images; name a folder of images"):
        load_image_dataset(tmp_path)
    Image.new("RGB", (8, 8)).save(tmp_path / "cat.png")
    assert len(load_image_dataset(tmp_path)) == 2


def test_arguments_that_do_not_exist(tmp_path):
    in_memory().to_parquet(tmp_path / "a.parquet")
    for source in (tmp_path, in_memory()):
        with pytest.raises(TypeError, match=r"There is no argument `num_images`; did you mean `num_samples`\?"):
            load_image_dataset(source, num_images=3)
        with pytest.raises(TypeError, match="There is no argument `ratio`; the loader of `datasets` has none of this"):
            load_image_dataset(source, ratio=3)
    with pytest.raises(ValueError, match="token, revision cannot be applied to a dataset in memory; leave them out"):
        load_image_dataset(in_memory(), token="secret", revision="main")


def test_image_columns(tmp_path):
    two = in_memory().add_column("thumbnail", [None] * 5).cast_column("thumbnail", datasets.Image())
    with pytest.raises(
        ValueError, match=r"several columns hold images \(image, thumbnail\); name one .* are image, label, thumbnail"
    ):
        load_image_dataset(two)
    assert_undecoded(load_image_dataset(two, image_column="image"), 5, ["image", "label", "thumbnail"])
    with pytest.raises(ValueError, match="no column holds images; .* The columns are label"):
        load_image_dataset(in_memory().select_columns("label"))
    with pytest.raises(ValueError, match="image_column='photo' does not exist; the columns are image, label"):
        load_image_dataset(in_memory(), image_column="photo")
    with pytest.raises(
        ValueError, match="Column 'label' holds ClassLabel.* instead of images; name another with image_column"
    ):
        load_image_dataset(in_memory(), image_column="label")


@pytest.mark.parametrize("form", ["path", "bytes"])
def test_image_column_by_name(tmp_path, form):
    write_images(tmp_path, 2)
    files = [str(tmp_path / f"{index}.png") for index in range(2)]
    values = files if form == "path" else [(tmp_path / f"{index}.png").read_bytes() for index in range(2)]
    data = load_image_dataset(datasets.Dataset.from_dict({"Image": values, "id": [0, 1]}))
    assert data.features["Image"] == datasets.Image(decode=False)
    assert data[1]["Image"][form] == values[1]


def test_draw(caplog):
    data = in_memory(50)
    numbered = data.add_column("number", list(range(50)))

    def draw(count, seed):
        return load_image_dataset(numbered, num_samples=count, seed=seed)["number"][:]

    assert draw(10, 0) == draw(10, 0)
    assert draw(10, 0) != draw(10, 1)
    assert len(set(draw(10, 0))) == 10
    counts = np.bincount(np.concatenate([draw(10, seed) for seed in range(20)]), minlength=50)
    assert counts.max() < 15
    assert not caplog.records
    assert draw(60, 0) == list(range(50))
    assert "The dataset holds 50 images, fewer than the 60 to draw; all of them are used" in caplog.text
    for count in (0, True, 1.5):
        with pytest.raises(ValueError, match=f"num_samples={count} is not an integer of at least 1"):
            draw(count, 0)
