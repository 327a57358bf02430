"""Images and labels to evaluate on, through `MixRankCompressor`."""

import io
from pathlib import Path

import datasets
import fsspec
import numpy as np
import pytest
import torch
import transformers
from calibration.pictures import processor, write
from families.catalogue import FAMILIES
from models import segformer, tiny_swin, tiny_vit
from PIL import Image
from torch.utils.data import DataLoader, TensorDataset

from optimum_mixrank import MixRankCompressor, MixRankConfig, load_image_dataset


SHIPPED = Path(__file__).parents[2] / "examples" / "fashion_mnist"
CLASSES = {index: f"class {index}" for index in range(5)}


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path_factory):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


@pytest.fixture
def compressor():
    model = tiny_vit()
    model.config.id2label = dict(CLASSES)
    return MixRankCompressor(model, processor())


def evaluate(compressor, *args, **options):
    return compressor.evaluate(compressor.model, *args, **options)


@pytest.mark.parametrize(
    ("folders", "reason"),
    [
        (["class 1"], "all of them lie in one folder, 'class 1'; put the images of each class into"),
        (["", "class 1"], "they lie at different depths of folders; put the images of each class into"),
        (["class 0/a", "class 1"], "they lie at different depths of folders"),
    ],
)
def test_folders_without_labels(compressor, tmp_path, caplog, folders, reason):
    for folder in folders:
        write(tmp_path / folder, 2)
    result = evaluate(compressor, tmp_path, num_samples=1)
    assert (result.num_images, result.top1, result.agreement) == (1, None, 1.0)
    assert f"The images have no labels, so accuracy is not measured: {reason}" in caplog.text


def test_missing_labels_are_named_once(compressor, tmp_path, caplog):
    write(tmp_path, 2)
    folder = str(tmp_path)
    compressor.check_evaluation(folder)
    assert evaluate(compressor, folder).top1 is None
    assert caplog.text.count("The images have no labels") == 1
    assert evaluate(compressor, folder).top1 is None
    assert caplog.text.count("The images have no labels") == 2


@pytest.mark.parametrize("name", ["Segformer, segmentation", "CLIP", "LLaVA", "MGP-STR"])
def test_classes_of_images_are_passed_over_where_the_model_has_none(tmp_path, caplog, name):
    """The folders have names that no configuration knows; classes of pixels, tokens and two towers are none of images."""
    for folder in ("cat", "dog", "hen"):
        write(tmp_path / folder, 1)
    model = FAMILIES[name].make()
    compressor = MixRankCompressor(model, processor())
    with caplog.at_level("INFO", "optimum_mixrank"):
        compressor.check_evaluation(str(tmp_path))
        result = evaluate(compressor, tmp_path)
    assert (result.num_images, result.top1) == (3, None) and result.kind != "classes"
    assert f"Labels are not used: {type(model).__name__} returns {result.kind}" in caplog.text


def test_labels_that_were_asked_for_are_not_left_out_quietly(tmp_path, caplog):
    for folder in ("cat", "dog"):
        write(tmp_path / folder, 1)
    compressor = MixRankCompressor(segformer(), processor())
    assert evaluate(compressor, tmp_path).top1 is None and "Labels are not used" not in caplog.text
    assert evaluate(compressor, tmp_path, label_column="label").top1 is None
    assert "Labels are not used: SegformerForSemanticSegmentation returns segmentation" in caplog.text


def test_several_parts_of_a_labelled_image(tmp_path):
    """MiniCPM-V's processor divides large images, so that there are more parts than labels."""
    if not FAMILIES["MiniCPM-V 4.6"].exists:
        pytest.skip("This release of Transformers does not have it.")
    for folder in ("cat", "dog"):
        write(tmp_path / folder, 1)
    sizes = {"patch_size": 8, "scale_resolution": 16, "max_slice_nums": 4}
    compressor = MixRankCompressor(
        FAMILIES["MiniCPM-V 4.6"].make(), transformers.MiniCPMV4_6ImageProcessorPil(**sizes)
    )
    result = evaluate(compressor, tmp_path)
    assert result.kind == "features" and result.num_images > 2 and result.feature_error == 0


def test_datasets_without_labels(compressor, tmp_path, caplog):
    paths = [str(path) for path in write(tmp_path, 2).iterdir()]
    data = datasets.Dataset.from_dict({"image": paths, "breed": [0, 1]}).cast_column("image", datasets.Image())
    assert evaluate(compressor, data).top1 is None
    assert "no column `label` or `labels`; name one of image, breed with label_column, if it has them" in caplog.text
    assert evaluate(compressor, data, label_column="breed").top1 is not None
    caplog.clear()
    encoder = MixRankCompressor(compressor.model.vit, processor())
    assert encoder.evaluate(encoder.model, data).feature_error == 0
    assert not [record for record in caplog.records if record.levelname == "WARNING"]


def test_classes_by_name_in_metadata(compressor, tmp_path):
    write(tmp_path, 3)
    rows = [f"{index:02}.png,class {index}" for index in range(3)]
    (tmp_path / "metadata.csv").write_text("\n".join(["file_name,label", *rows]))
    assert evaluate(compressor, tmp_path).top1 is not None
    (tmp_path / "metadata.csv").write_text("\n".join(["file_name,label", *rows]).replace("class 2", "class x"))
    with pytest.raises(ValueError, match=r"3 classes, the model 5; the model does not know \['class x'\]"):
        evaluate(compressor, tmp_path)


def sources(folder):
    paths = sorted(str(path) for path in write(folder, 6).iterdir())
    tensors = torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    data = datasets.Dataset.from_dict({"image": paths}).cast_column("image", datasets.Image())
    return {
        "list": paths,
        "dataset": data,
        "dict": datasets.DatasetDict({"test": data}),
        "tensor": tensors,
        "pytorch": TensorDataset(tensors),
        "pixels": datasets.Dataset.from_dict({"pixel_values": tensors.tolist()}),
    }


@pytest.mark.parametrize("kind", ["list", "dataset", "dict", "tensor", "pytorch", "pixels"])
def test_a_number_of_images_is_honoured_for_every_source(compressor, tmp_path, kind):
    source = sources(tmp_path)[kind]
    assert evaluate(compressor, source, num_samples=4).num_images == 4
    if kind != "dict":
        with pytest.raises(ValueError, match="split='test' cannot be chosen: a .* has no splits; leave it out"):
            evaluate(compressor, source, split="test")


def test_options_that_a_source_has_no_use_for(compressor, tmp_path):
    paths = sources(tmp_path)["list"]
    loader = DataLoader(TensorDataset(torch.zeros(4, 3, 32, 32)), batch_size=2)
    for source, name in (
        (loader, "DataLoader"),
        ([torch.zeros(4, 3, 32, 32)] * 3, "list"),
        (iter(paths), "list_iterator"),
    ):
        with pytest.raises(
            ValueError, match=f"num_samples=2 cannot be drawn from a {name} of batches or without a length"
        ):
            evaluate(compressor, source, num_samples=2)
    for count in (0, 1.5):
        with pytest.raises(ValueError, match=f"num_samples={count} is not an integer of at least 1"):
            evaluate(compressor, paths, num_samples=count)
    for option in ("image_column", "label_column"):
        with pytest.raises(
            ValueError, match=f"{option}='x' needs items with columns, but item 0 is a str; leave it out"
        ):
            evaluate(compressor, paths, **{option: "x"})


@pytest.mark.parametrize("model", ["trained", "tiny"])
def test_labels_in_another_order_are_warned_about(compressor, tmp_path, caplog, model):
    if model == "trained":
        compressor = MixRankCompressor.from_pretrained(str(SHIPPED / "model"))
        data = datasets.load_dataset(str(SHIPPED / "data"), split="test").select(range(100))
        classes = data.features["label"].names
        moved = datasets.ClassLabel(names=[f"n{index}" for index in range(10)])
        labels = [(label + 1) % 10 for label in data["label"]]
    else:
        data = datasets.Dataset.from_dict({"image": [str(path) for path in write(tmp_path, 40).iterdir()]})
        data = data.cast_column("image", datasets.Image())
        images = processor()(images=data["image"][:], return_tensors="pt").pixel_values
        with torch.no_grad():
            labels = ((compressor.model(images).logits.argmax(1) + 1) % 5).tolist()
        classes, moved = list(CLASSES.values()), datasets.Value("int64")
    wrong = data.select_columns("image").add_column("label", labels).cast_column("label", moved)
    assert evaluate(compressor, wrong, batch_size=50).reference_top1 < 0.2
    assert "Probably the labels of the dataset are in another order than the classes of the model" in caplog.text
    caplog.clear()
    right = [(label - 1) % len(classes) for label in labels]
    named = data.select_columns("image").add_column("label", right)
    assert evaluate(compressor, named.cast_column("label", datasets.ClassLabel(names=classes))).reference_top1 > 0.8
    assert "another order" not in caplog.text


def test_few_images_prove_nothing_about_labels(compressor, tmp_path, caplog):
    for label in CLASSES.values():
        write(tmp_path / label, 1)
    assert evaluate(compressor, tmp_path).reference_top1 < 0.5
    assert "another order" not in caplog.text


def test_images_of_another_size_than_the_model_takes(tmp_path):
    compressor = MixRankCompressor(tiny_vit(), processor())
    message = r"have 64 × 48 pixels, but the model takes 32 × 32, the image_size .* `crop_size` of the image processor"
    for metric, compensation in (("kfac", []), ("svd", ["blocks"])):
        settings = MixRankConfig(recipe="fast", metric=metric, compensation=compensation)
        with pytest.raises(ValueError, match=message):
            compressor.compress(settings, [torch.zeros(8, 3, 64, 48)])
    with pytest.raises(ValueError, match=message):
        evaluate(compressor, [torch.zeros(2, 3, 64, 48)])
    # Swin takes any size.
    swin = MixRankCompressor(tiny_swin(), processor())
    assert evaluate(swin, [torch.randn(2, 3, 64, 64)]).num_images == 2


@pytest.fixture
def remote():
    """Images in the memory file system of fsspec."""
    system = fsspec.filesystem("memory")
    generator = np.random.default_rng(0)
    for index in range(4):
        buffer = io.BytesIO()
        Image.fromarray(generator.integers(0, 256, (40, 36, 3), dtype=np.uint8)).save(buffer, "PNG")
        system.pipe(f"/pictures/{index}.png", buffer.getvalue())
    yield "memory://pictures"
    system.rm("/pictures", recursive=True)


def test_images_that_are_not_local_files(compressor, remote, tmp_path):
    stream = datasets.load_dataset("imagefolder", data_files=f"{remote}/*.png", streaming=True)["train"]
    paths = [f"{remote}/{index}.png" for index in range(4)]
    rows = datasets.Dataset.from_dict({"image": paths}).cast_column("image", datasets.Image())
    local = [tmp_path / f"{index}.png" for index in range(4)]
    for index, path in enumerate(local):
        path.write_bytes(fsspec.filesystem("memory").cat(f"/pictures/{index}.png"))
    found = {
        name: compressor.calibrate(source, "second_moment").data_fingerprint
        for name, source in {"local": local, "paths": paths, "rows": rows, "stream": stream}.items()
    }
    assert len(set(found.values())) == 1
    assert evaluate(compressor, stream).num_images == 4


def test_a_stream_is_downloaded_once(compressor, remote):
    drawn = load_image_dataset(
        "imagefolder", data_files=f"{remote}/*.png", streaming=True, num_samples=4, image_column="image"
    )
    assert all(image["path"].startswith("memory://") and image["bytes"] for image in drawn["image"])
    assert evaluate(compressor, drawn).num_images == 4


def test_a_limit_on_pixels_can_be_raised(compressor, tmp_path):
    paths = list(write(tmp_path, 4).iterdir())
    with pytest.raises(ValueError, match=r"At least 4 of 4 images \(100.0%\) cannot be decoded"):
        evaluate(compressor, paths, max_image_pixels=1000)
    assert evaluate(compressor, paths, max_image_pixels=1440).num_images == 4
    assert compressor.calibrate(paths, max_image_pixels=1440).num_images == 4
    with pytest.raises(ValueError, match="max_image_pixels=0 is not a positive number of pixels"):
        evaluate(compressor, paths, max_image_pixels=0)
    with pytest.raises(ValueError, match="There are no images to use"):
        evaluate(compressor, paths, max_image_pixels=1000, max_broken_share=1.0)


@pytest.mark.parametrize("streaming", [False, True])
def test_other_columns_of_images_are_not_decoded(compressor, tmp_path, monkeypatch, streaming):
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", lambda *args: pytest.fail("Ghostscript was started"))
    (tmp_path / "mask.jpg").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\nshowpage\n")
    (tmp_path / "broken.png").write_bytes(b"no picture")
    paths = [str(path) for path in write(tmp_path / "pictures", 2).iterdir()]
    others = [str(tmp_path / name) for name in ("mask.jpg", "broken.png")]
    data = datasets.Dataset.from_dict({"image": paths, "mask": others})
    for column in ("image", "mask"):
        data = data.cast_column(column, datasets.Image())
    source = data.to_iterable_dataset() if streaming else data
    assert evaluate(compressor, source, image_column="image").num_images == 2
    drawn = load_image_dataset(data, image_column="image", num_samples=1)
    assert drawn[0]["mask"]["bytes"] is None
