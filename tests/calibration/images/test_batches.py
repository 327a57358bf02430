import os
import signal

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, TensorDataset
from transformers import ViTImageProcessor

from optimum_mixrank.calibration.images.batches import ImageBatches
from optimum_mixrank.runtime.distributed import Processes


SIZE = 8


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path_factory):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def processor(channels=3, **changes):
    arguments = {
        "size": {"height": SIZE, "width": SIZE},
        "image_mean": [0.5] * channels,
        "image_std": [0.25] * channels,
    }
    return ViTImageProcessor(**{**arguments, **changes})


def pictures(count, mode="RGB"):
    generator = np.random.default_rng(0)
    arrays = generator.integers(0, 256, (count, 10, 14, 3), dtype=np.uint8)
    return [Image.fromarray(array).convert(mode) for array in arrays]


def write(folder, count, broken=()):
    folder.mkdir(exist_ok=True)
    for index, picture in enumerate(pictures(count)):
        path = folder / f"{index:02}.png"
        picture.save(path)
        if index in broken:
            path.write_bytes(path.read_bytes()[:100])
    return folder


def labelled(count):
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(num_classes=3)})
    return datasets.Dataset.from_dict(
        {"image": pictures(count), "label": [index % 3 for index in range(count)]}, features=features
    )


def expected(count):
    return processor()(images=pictures(count), return_tensors="pt")["pixel_values"]


def joined(batches):
    return torch.cat([batch.pixel_values for batch in batches])


class Photos(torch.utils.data.Dataset):
    """A PyTorch dataset that has a length, but no end of its own."""

    def __len__(self):
        return 5

    def __getitem__(self, index):
        return pictures(5)[index % 5], index


@pytest.mark.parametrize("kind", ["dataset", "torch-formatted", "folder", "pictures", "paths", "tuple"])
def test_images(tmp_path, kind):
    folder = write(tmp_path / "images", 5)
    source = {
        "dataset": labelled(5),
        "torch-formatted": labelled(5).with_format("torch"),
        "folder": str(folder),
        "pictures": pictures(5),
        "paths": sorted(folder.iterdir()),
        "tuple": tuple(pictures(5)),
    }[kind]
    batches = ImageBatches(source, image_processor=processor(), batch_size=2)
    assert (batches.num_images, len(batches)) == (5, 3)
    for _ in range(2):
        found = list(batches)
        assert [batch.num_images for batch in found] == [2, 2, 1]
        assert all(batch.labels is None for batch in found)
        assert joined(found).dtype == torch.float32
        torch.testing.assert_close(joined(found), expected(5), rtol=0, atol=0)
    assert batches.broken == []


@pytest.mark.parametrize("kind", ["generator", "stream", "transformed", "torch dataset", "DataLoader", "rows"])
def test_images_one_after_another(kind):
    transformed = labelled(5)
    transformed.set_transform(lambda rows: {"image": rows["image"]})
    source = {
        "generator": iter(pictures(5)),
        "stream": labelled(5).to_iterable_dataset(),
        "transformed": transformed,
        "torch dataset": Photos(),
        "DataLoader": DataLoader(Photos(), batch_size=None),
        "rows": [{"image": picture, "id": 1} for picture in pictures(5)],
    }[kind]
    found = list(ImageBatches(source, image_processor=processor(), batch_size=2))
    assert [batch.num_images for batch in found] == [2, 2, 1]
    torch.testing.assert_close(joined(found), expected(5), rtol=0, atol=0)


@pytest.mark.parametrize(
    "kind",
    ["batches", "mappings", "processor output", "pairs", "single", "tensor", "DataLoader", "dataset", "transformed"],
)
def test_pixel_values(kind):
    pixels = expected(5)
    pairs = TensorDataset(pixels, torch.arange(5))
    stored = datasets.Dataset.from_dict({"pixel_values": pixels.numpy(), "labels": range(5)})
    transformed = labelled(5)
    transformed.set_transform(lambda rows: processor()(images=rows["image"], return_tensors="pt"))
    source = {
        "batches": [pixels[:2], pixels[2:4], pixels[4:]],
        "mappings": [{"pixel_values": pixels[i : i + 2], "labels": torch.arange(5)[i : i + 2]} for i in (0, 2, 4)],
        "processor output": [processor()(images=pictures(5))],
        "pairs": [(pixels[:4], torch.arange(4)), (pixels[4:], [4])],
        "single": list(pixels),
        "tensor": pixels,
        "DataLoader": DataLoader(pairs, batch_size=2),
        "dataset": stored,
        "transformed": transformed,
    }[kind]
    batches = ImageBatches(source, batch_size=2)
    assert batches.num_images == 5
    for _ in range(2):
        found = list(batches)
        torch.testing.assert_close(joined(found), pixels, rtol=0, atol=0)
        if kind in ("mappings", "pairs", "DataLoader", "dataset"):
            assert torch.cat([batch.labels for batch in found]).tolist() == list(range(5))
        else:
            assert all(batch.labels is None for batch in found)
    if kind == "DataLoader":
        assert len(batches) == 3


def test_lengths_that_cannot_be_known():
    class Batches(torch.utils.data.Sampler):
        def __iter__(self):
            return iter([[0, 1, 1], [2]])

    source = TensorDataset(expected(3))
    for loader in (DataLoader(source, batch_sampler=Batches()), DataLoader(iter_dataset(), batch_size=2)):
        batches = ImageBatches(loader)
        assert batches.num_images is None
        assert len(joined(batches)) == 4
    assert ImageBatches(DataLoader(source, batch_size=2, drop_last=True)).num_images == 2
    generator = ImageBatches(pixels for pixels in expected(3))
    assert generator.num_images is None
    with pytest.raises(TypeError, match="A generator of `pixel_values` does not tell its number of batches"):
        len(generator)


def iter_dataset():
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(expected(4))

    return Stream()


def test_a_generator_serves_once():
    batches = ImageBatches(pixels for pixels in expected(3))
    assert len(joined(batches)) == 3
    with pytest.raises(ValueError, match="generator was used up by an earlier pass; give a list or a DataLoader"):
        next(iter(batches))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_dtype(dtype):
    assert joined(ImageBatches([expected(2).to(dtype)])).dtype == torch.float32
    assert joined(ImageBatches([expected(2)], dtype=dtype)).dtype == dtype


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA"])
def test_grey_models(mode):
    # Grey as they are, or colours turned grey; both also where the processor would make colours of grey pictures.
    source = pictures(3, mode)
    pixels = joined(ImageBatches(source, image_processor=processor(1), num_channels=1))
    assert pixels.shape == (3, 1, SIZE, SIZE)
    resized = [picture.convert("RGB").convert("L").resize((SIZE, SIZE), Image.BILINEAR) for picture in source]
    reference = (np.stack([np.asarray(picture) for picture in resized]) / 255 - 0.5) / 0.25
    np.testing.assert_allclose(pixels[:, 0], reference, atol=1e-5)


def test_wrong_channels():
    with pytest.raises(ValueError, match=r"shape \[2, 3, 8, 8\]; the model needs \[batch, 1, height, width\]"):
        list(ImageBatches([expected(2)], num_channels=1))
    with pytest.raises(ValueError, match=r"of item 0 have the shape \[1, 3, 8, 8\]; the model needs \[batch, 4"):
        list(ImageBatches(pictures(1), image_processor=processor(), num_channels=4))


@pytest.mark.parametrize("num_workers", [0, 1])
def test_broken_files_are_left_out(tmp_path, caplog, num_workers):
    folder = write(tmp_path / "images", 20, broken=[7])
    batches = ImageBatches(folder, image_processor=processor(), batch_size=3, num_workers=num_workers)
    for _ in range(2):
        found = list(batches)
        torch.testing.assert_close(joined(found), expected(20)[[i for i in range(20) if i != 7]], rtol=0, atol=0)
        assert batches.num_images == 20
        assert batches.broken == [str(folder / "07.png")]
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert f"Broken image left out: {folder / '07.png'} cannot be decoded" in record.message


class Fatal(torch.utils.data.Dataset):
    """Pixels of which reading some ends the process that reads them, as a lack of memory does."""

    def __len__(self):
        return 6

    def __getitem__(self, index):
        if index == 4:
            os.kill(os.getpid(), signal.SIGKILL)
        return expected(6)[index]


def test_a_worker_that_dies_is_an_error():
    # Among several processes, a dataset of tensors is read by index.
    batches = ImageBatches(Fatal(), batch_size=2, num_workers=1, processes=Processes(index=0, count=2))
    with pytest.raises(RuntimeError, match="worker"):
        list(batches)


def test_an_error_in_a_worker_reads_as_in_the_main_process():
    messages = []
    for num_workers in (0, 1):
        with pytest.raises(ValueError) as error:
            list(ImageBatches(pictures(2), image_processor=processor(image_std=[0, 1, 1]), num_workers=num_workers))
        messages.append(str(error.value))
    assert messages[0] == messages[1] and "contain NaN or Inf" in messages[0]


def test_workers_are_not_fewer_than_none():
    with pytest.raises(ValueError, match="num_workers=-1 is negative"):
        ImageBatches(pictures(1), image_processor=processor(), num_workers=-1)


def test_labels_stay_with_their_images(tmp_path):
    folder = write(tmp_path / "images", 9, broken=[4])
    files = [str(path) for path in sorted(folder.iterdir())]
    data = datasets.Dataset.from_dict({"image": files, "label": list(range(9))})
    batches = ImageBatches(
        data, image_processor=processor(), batch_size=2, label_column="label", label_map=range(100, 109),
        max_broken_share=0.2,
    )  # fmt: skip
    labels = torch.cat([batch.labels for batch in batches])
    assert labels.dtype == torch.int64
    assert labels.tolist() == [100, 101, 102, 103, 105, 106, 107, 108]


@pytest.mark.parametrize("known", [True, False], ids=["length known", "stream"])
def test_too_many_broken_files(tmp_path, known):
    files = sorted(write(tmp_path / "images", 12, broken=[1, 3, 8]).iterdir())
    source = files if known else iter(files)
    tolerant = ImageBatches(files if known else iter(files), image_processor=processor(), max_broken_share=0.25)
    assert len(joined(tolerant)) == 9
    batches = ImageBatches(source, image_processor=processor(), batch_size=2, max_broken_share=0.1)
    seen = []
    with pytest.raises(
        ValueError,
        match=r"At least (2|3) of 12 images \((16.7|25.0)%\) .* max_broken_share=0.1 tolerates. The first are .*01.png, "
        r".*03.png.*\. Repair or remove them, or raise max_broken_share",
    ):
        seen.extend(batches)
    # With a known length, the second broken file ends it.
    assert sum(batch.num_images for batch in seen) == (1 if known else 9)


def test_share_is_compared_exactly(tmp_path):
    files = sorted(write(tmp_path / "images", 2, broken=[1]).iterdir())
    source = [files[0]] * 71 + [files[1]] * 29
    assert len(joined(ImageBatches(source, image_processor=processor(), max_broken_share=0.29))) == 71


def test_nothing_usable(tmp_path):
    files = sorted(write(tmp_path / "images", 2, broken=[0, 1]).iterdir())
    with pytest.raises(ValueError, match=r"no images to use \(2 broken ones were left out\)"):
        list(ImageBatches(files, image_processor=processor(), max_broken_share=1))
    for source in ([], labelled(1).select([]), iter([]), [torch.zeros(0, 3, 8, 8)]):
        with pytest.raises(ValueError, match=r"no images to use \(0 broken ones were left out\)"):
            list(ImageBatches(source, image_processor=processor()))


def test_images_without_a_processor():
    message = "Images need the model's image processor: pass `image_processor=AutoImageProcessor.from_pretrained"
    for source in (labelled(2), pictures(2)):
        with pytest.raises(ValueError, match=message):
            ImageBatches(source)
    with pytest.raises(ValueError, match=message):
        list(ImageBatches(iter(pictures(2))))


@pytest.mark.parametrize("kind", ["one batch", "two batches", "pixel_values", "one mapping", "batches"])
def test_different_sizes(kind):
    sizes = [Image.new("RGB", (10, 10)), Image.new("RGB", (10, 12))]
    source = {
        "one batch": sizes,
        "two batches": sizes,
        "pixel_values": [torch.zeros(3, 10, 10), torch.zeros(3, 12, 10)],
        "one mapping": [{"pixel_values": [torch.zeros(3, 10, 10), torch.zeros(3, 12, 10)]}],
        "batches": [torch.zeros(2, 3, 10, 10), torch.zeros(2, 3, 12, 10)],
    }[kind]
    sizes = r"different sizes: \[3, 10, 10\] and \[3, 12, 10\]|not a tensor .*equal size"
    message = rf"({sizes}).*; let the image processor resize"
    with pytest.raises(ValueError, match=message):
        list(
            ImageBatches(
                source, image_processor=processor(do_resize=False), batch_size=1 if kind == "two batches" else 2
            )
        )


@pytest.mark.parametrize(
    ("values", "message"),
    [
        pytest.param(
            torch.full((2, 3, 4, 4), torch.nan), "of item 1 contain NaN or Inf; check the image processor", id="nan"
        ),
        pytest.param(
            torch.full((2, 3, 4, 4), torch.inf), "of item 1 contain NaN or Inf; check the image processor", id="inf"
        ),
        pytest.param(
            torch.zeros(2, 3, 4, 4, dtype=torch.uint8), "dtype torch.uint8; give floating point values", id="uint8"
        ),
        pytest.param(torch.zeros(2, 4), r"have the shape \[2, 4\]; the model needs", id="matrix"),
    ],
)
def test_unusable_pixel_values(values, message):
    with pytest.raises(ValueError, match=message):
        list(ImageBatches([torch.zeros(2, 3, 4, 4), values]))


def test_non_finite_image_is_named():
    single = list(torch.zeros(5, 3, 4, 4))
    single[3][0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match="`pixel_values` of item 3 contain NaN"):
        list(ImageBatches(single))


@pytest.mark.parametrize(
    "source",
    [3, None, torch.zeros(3, 8, 8), {"pixel_values": torch.zeros(1, 3, 8, 8)}, b"\x89PNG", Image.new("RGB", (4, 4))],
    ids=["number", "none", "tensor", "mapping", "bytes", "picture"],
)
def test_a_value_that_is_not_a_source(source):
    with pytest.raises(TypeError, match=r"is not a source of images; .*\(a single batch goes into a list\)"):
        ImageBatches(source)


@pytest.mark.parametrize("item", [3, "pair", (1, 2, 3)], ids=str)
def test_unusable_items(item):
    items = [expected(1), (expected(1), 0, 1) if item == "pair" else item]
    with pytest.raises(TypeError, match="item 1 is a"):
        list(ImageBatches(iter(items), image_processor=processor()))


def test_mixed_items():
    with pytest.raises(ValueError, match="Images and `pixel_values` are mixed"):
        list(ImageBatches(iter([*expected(1), *pictures(1)]), image_processor=processor()))


def test_columns():
    with pytest.raises(ValueError, match="label_column='class' does not exist; the columns are image, label"):
        ImageBatches(labelled(2), image_processor=processor(), label_column="class")
    with pytest.raises(ValueError, match="image_column='photo' does not exist; the columns are image, label"):
        ImageBatches(labelled(2), image_processor=processor(), image_column="photo")
    with pytest.raises(
        ValueError, match=r"A batch has no `pixel_values` \(item 0\), .* no column holds images; .* are pixels, labels"
    ):
        list(ImageBatches(iter([{"pixels": expected(1), "labels": 1}])))
    with pytest.raises(
        ValueError, match="label_column='class' does not exist in item 0; the columns are pixel_values"
    ):
        list(ImageBatches([{"pixel_values": expected(1)}], label_column="class"))


def test_labels_of_other_tasks_do_not_disturb():
    masks = {"pixel_values": expected(2), "labels": torch.zeros(2, 4, 4, dtype=torch.long)}
    boxes = {"pixel_values": expected(2), "labels": [{"boxes": torch.zeros(1, 4)}] * 2}
    assert [batch.labels for batch in ImageBatches([masks, boxes])] == [None, None]


@pytest.mark.parametrize(
    ("label", "label_map"), [(-1, None), (3, [0, 1, 2]), (-1, [0, 1, 2]), ("cat", None), ("cow", {"cat": 0})], ids=str
)
def test_labels_without_a_class(label, label_map):
    data = datasets.Dataset.from_dict({"image": pictures(1), "label": [label]})
    batches = ImageBatches(data, image_processor=processor(), label_column="label", label_map=label_map)
    with pytest.raises(ValueError, match=f"The label {label!r} of item 0 is not a class of the model"):
        list(batches)


def test_missing_labels():
    data = datasets.Dataset.from_dict({"image": pictures(2), "label": [0, None]})
    with pytest.raises(ValueError, match="item 1 has no label in column 'label'; leave out images without a class"):
        list(ImageBatches(data, image_processor=processor(), label_column="label"))
    with pytest.raises(ValueError, match="item 0 has 1 labels for 2 images"):
        list(ImageBatches([(expected(2), [1])]))


def test_named_labels():
    data = datasets.Dataset.from_dict({"image": pictures(2), "label": ["dog", "cat"]})
    batches = ImageBatches(data, image_processor=processor(), label_column="label", label_map={"cat": 3, "dog": 7})
    assert next(iter(batches)).labels.tolist() == [7, 3]


@pytest.mark.parametrize(
    ("argument", "value", "message"),
    [
        ("batch_size", 0, "batch_size=0 is not a positive"),
        ("max_broken_share", 1.5, r"max_broken_share=1.5 is not in"),
    ],
)
def test_arguments(argument, value, message):
    with pytest.raises(ValueError, match=message):
        ImageBatches([expected(1)], **{argument: value})
