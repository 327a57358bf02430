import io
import os
import zipfile

import fsspec
import numpy as np
import pytest
from PIL import EpsImagePlugin, Image

from optimum_mixrank.calibration.images.decoding import BrokenImageError, decode_image
from optimum_mixrank.runtime.formatting import type_of


GREY = np.tile(np.arange(0, 250, 10, dtype=np.uint8), (17, 1))


def encoded(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def test_forms(tmp_path):
    picture = Image.fromarray(np.stack([GREY, GREY // 2, 255 - GREY], axis=-1))
    path = tmp_path / "a.png"
    picture.save(path)
    data = path.read_bytes()
    items = [
        picture,
        path,
        str(path),
        data,
        bytearray(data),
        {"bytes": data, "path": "elsewhere.png"},
        {"bytes": None, "path": str(path)},
        {"path": str(path)},
        np.asarray(picture),
    ]
    for item in items:
        decoded = decode_image(item)
        assert decoded.mode == "RGB"
        np.testing.assert_array_equal(np.asarray(decoded), np.asarray(picture))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "HSV"])
def test_modes(mode):
    image = Image.fromarray(GREY).convert("RGB").convert(mode)
    decoded = decode_image(image)
    assert (decoded.mode, decoded.size) == ("RGB", image.size)
    np.testing.assert_array_equal(np.asarray(decoded), np.asarray(image.convert("RGB")))


@pytest.mark.parametrize(
    ("mode", "kind"), [("LA", "PNG"), ("RGBA", "PNG"), ("P", "GIF"), ("CMYK", "JPEG"), ("1", "PNG"), ("L", "WEBP")]
)
def test_encoded_modes(mode, kind):
    decoded = decode_image(encoded(Image.fromarray(GREY).convert("RGB").convert(mode), kind))
    assert (decoded.mode, decoded.size) == ("RGB", (25, 17))


def test_transparency_is_dropped():
    decoded = decode_image(Image.new("RGBA", (2, 2), (10, 20, 30, 0)))
    assert decoded.getpixel((0, 0)) == (10, 20, 30)


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bits_are_scaled(kind):
    # 257 maps 8 bits to 16 exactly; dark pictures must stay dark.
    for grey in (GREY, GREY // 100):
        decoded = decode_image(encoded(Image.fromarray(grey.astype(np.uint16) * 257), kind))
        np.testing.assert_array_equal(np.asarray(decoded)[..., 1], grey)
    nearly_black = decode_image(encoded(Image.fromarray(np.full((4, 4), 100, dtype=np.uint16)), kind))
    assert nearly_black.getextrema() == ((0, 0),) * 3


def test_older_pillow_opens_sixteen_bits_as_integers():
    decoded = decode_image(Image.fromarray(GREY.astype(np.int32) * 257))
    np.testing.assert_array_equal(np.asarray(decoded)[..., 0], GREY)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        pytest.param(np.full((4, 4), 70000, dtype=np.int32), "more than 16 bits; convert", id="32 bits"),
        pytest.param(np.zeros((4, 4), dtype=np.float32), "no defined range; convert", id="float"),
    ],
)
def test_pixels_without_a_range(array, message):
    with pytest.raises(BrokenImageError, match=message):
        decode_image(Image.fromarray(array))


@pytest.mark.parametrize("shape", [(17, 25), (17, 25, 1), (17, 25, 3), (17, 25, 4)], ids=str)
def test_arrays(shape):
    array = np.broadcast_to(GREY.reshape(17, 25, *[1] * (len(shape) - 2)), shape).copy()
    np.testing.assert_array_equal(np.asarray(decode_image(array))[..., 0], GREY)


def test_exif_orientation():
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise
    image = Image.new("RGB", (20, 10))
    image.paste((255, 255, 255), (0, 0, 10, 10))
    decoded = decode_image(encoded(image, "PNG", exif=exif))
    assert decoded.size == (10, 20)
    assert decoded.getpixel((5, 2)) == (255, 255, 255)
    assert decoded.getpixel((5, 17)) == (0, 0, 0)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        pytest.param(b"", "the file is empty", id="empty"),
        pytest.param(b"no image at all", "cannot identify image", id="text"),
        pytest.param(encoded(Image.effect_noise((64, 64), 50), "JPEG")[:600], "truncated", id="truncated JPEG"),
        pytest.param(encoded(Image.effect_noise((64, 64), 50), "PNG")[:600], "", id="truncated PNG"),
        pytest.param(b"\x89PNG\r\n\x1a\n" + bytes(30), "", id="PNG of zeros"),
    ],
)
def test_broken_files_are_named(tmp_path, content, reason):
    path = tmp_path / "broken.jpg"
    path.write_bytes(content)
    for item in (path, {"bytes": content, "path": str(path)}):
        with pytest.raises(BrokenImageError, match=f"{path} cannot be decoded: .*{reason}") as caught:
            decode_image(item)
        assert caught.value.name == str(path)
    with pytest.raises(BrokenImageError, match="row 7 cannot be decoded"):
        decode_image(content, name="row 7")


def test_a_lazily_opened_image_is_decoded(tmp_path):
    path = tmp_path / "cut.jpg"
    path.write_bytes(encoded(Image.effect_noise((64, 64), 50), "JPEG")[:600])
    with Image.open(path) as image, pytest.raises(BrokenImageError, match="cut.jpg cannot be decoded: .*truncated"):
        decode_image(image)


@pytest.mark.parametrize("item", [None, {"bytes": None, "path": None}], ids=str)
def test_missing_images(item):
    with pytest.raises(BrokenImageError, match="row 3 cannot be decoded: the dataset holds no image here"):
        decode_image(item, name="row 3")


def test_missing_file(tmp_path):
    with pytest.raises(BrokenImageError, match=r"gone\.png cannot be decoded: .*No such file"):
        decode_image(tmp_path / "gone.png")


def test_implausibly_large_images(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 400)
    # Pillow would read up to twice as many.
    with pytest.raises(BrokenImageError, match=r"more than max_image_pixels=400 pixels \(25 × 17\)"):
        decode_image(encoded(Image.fromarray(GREY)))
    with pytest.raises(BrokenImageError, match="more than max_image_pixels=100 pixels .*; raise max_image_pixels"):
        decode_image(encoded(Image.fromarray(GREY)), max_image_pixels=100)
    assert decode_image(encoded(Image.fromarray(GREY)), max_image_pixels=425).size == (25, 17)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    assert decode_image(encoded(Image.fromarray(GREY)), max_image_pixels=425).size == (25, 17)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    assert decode_image(encoded(Image.fromarray(GREY))).size == (25, 17)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF", "PPM", "MPO"])
def test_formats(kind):
    assert decode_image(encoded(Image.fromarray(GREY), kind)).size == (25, 17)


@pytest.mark.parametrize("kind", ["TIFF", "GIF", "PNG", "WEBP", "MPO"])
def test_the_first_of_several_frames(tmp_path, kind):
    exif = Image.Exif()
    exif[0x0112] = 6
    first, second = (Image.fromarray(grey).convert("RGB") for grey in (GREY, 255 - GREY))
    path = tmp_path / "frames.image"
    first.save(path, kind, save_all=True, append_images=[second], **({} if kind == "GIF" else {"exif": exif}))
    decoded = decode_image(path)
    assert decoded.size == ((25, 17) if kind == "GIF" else (17, 25))
    assert np.asarray(decoded).mean() == pytest.approx(GREY.mean(), abs=5)
    np.testing.assert_array_equal(np.asarray(decoded), np.asarray(decode_image(path.read_bytes())))


POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n(run) print\nshowpage\n"


def test_nothing_is_executed(monkeypatch, tmp_path):
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *args, **kwargs: pytest.fail("started Ghostscript"))
    path = tmp_path / "picture.jpg"
    path.write_bytes(POSTSCRIPT)
    for item in (POSTSCRIPT, path, {"bytes": POSTSCRIPT, "path": "picture.jpg"}):
        with pytest.raises(
            BrokenImageError, match="cannot identify image: it is damaged, or not in a supported format"
        ):
            decode_image(item)
    with Image.open(path) as image, pytest.raises(BrokenImageError, match="a PostScript file, which Pillow would run"):
        decode_image(image)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no such files")
def test_only_regular_files_are_read(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    for path in (tmp_path / "pipe.png", "/dev/zero", tmp_path):
        for item in (path, {"bytes": None, "path": str(path)}):
            with pytest.raises(BrokenImageError, match="it is not a regular file"):
                decode_image(item)


def test_files_of_any_size_are_refused_before_they_are_read(tmp_path):
    with (tmp_path / "large.png").open("wb") as file:
        file.write(encoded(Image.fromarray(GREY)))
        file.truncate(1 << 36)
    with pytest.raises(
        BrokenImageError, match="large.png cannot be decoded: the file has more than 782,936,744 bytes"
    ):
        decode_image(tmp_path / "large.png")


def test_paths_that_datasets_opens(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("b/c.png", encoded(Image.fromarray(GREY)))
    fsspec.filesystem("memory").pipe("/c.png", encoded(Image.fromarray(GREY)))
    for path in (f"zip://b/c.png::{tmp_path / 'a.zip'}", "memory://c.png"):
        for item in (path, {"bytes": None, "path": path}):
            assert decode_image(item).size == (25, 17)
    with pytest.raises(BrokenImageError, match="memory://gone.png cannot be decoded"):
        decode_image("memory://gone.png")
    (tmp_path / "d::e.png").write_bytes(encoded(Image.fromarray(GREY)))
    assert decode_image(str(tmp_path / "d::e.png")).size == (25, 17)


@pytest.mark.parametrize(
    "item",
    [3, np.zeros((4, 4)), np.zeros((2, 3, 4, 4), dtype=np.uint8), {"bytes": b"", "label": 1}, {}],
    ids=["number", "float array", "batch", "row", "empty mapping"],
)
def test_what_holds_no_image(item):
    with pytest.raises(TypeError, match=f"item 2 is {type_of(item)}, which cannot hold an image; give PIL images"):
        decode_image(item, name="item 2")
