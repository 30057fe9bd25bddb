import io
import warnings

import numpy as np
import pytest
from images import animation, grey_png_16, phone_photo, photo, saved, transparent_png
from PIL import Image, UnidentifiedImageError

from paella_diffusers.pipelines import image_reading
from paella_diffusers.pipelines.image_reading import load_image, open_image, to_grey, to_rgb

BOMB = "has more than .* pixels and could be a decompression bomb"


def test_photos_are_upright():
    image = load_image(phone_photo(64, 48))
    assert image.size == (48, 64) and image.mode == "RGB"
    upright = photo(64, 48).transpose(Image.Transpose.ROTATE_270)  # clockwise
    assert np.abs(np.asarray(image, int) - np.asarray(upright, int)).mean() < 4  # JPEG
    assert to_rgb(image).tobytes() == image.tobytes()  # and not turned again


@pytest.mark.parametrize("kind", ["RGBA", "LA", "palette", "colour key"])
def test_transparent_is_white_and_black_in_masks(kind):
    image = Image.open(transparent_png())
    if kind == "LA":
        image = image.convert("LA")
    elif kind == "palette":
        image = Image.fromarray(np.repeat([[0, 1]], 32, axis=1).astype(np.uint8)).convert("P")
        image.putpalette([255, 0, 0, 0, 0, 0])
        image = Image.open(saved(image, "PNG", transparency=1))
        assert image.mode == "P"
    elif kind == "colour key":
        image = Image.open(saved(image.convert("RGB"), "PNG", transparency=(0, 0, 0)))
        assert image.mode == "RGB"
    half = image.width // 2
    red = (76, 76, 76) if kind == "LA" else (255, 0, 0)
    for background, value in (("white", 255), ("black", 0)):
        result = np.asarray(to_rgb(image, background=background))
        assert (result[:, :half] == red).all() and (result[:, half:] == value).all()
    assert (np.asarray(to_grey(image))[:, half:] == 0).all()


def test_sixteen_bits():
    image = Image.open(grey_png_16(256, 4))
    assert image.mode == "I;16"
    expected = np.linspace(0, 65535, 256).astype(np.uint16) / 257
    assert np.abs(np.asarray(to_rgb(image))[0, :, 0] - expected).max() <= 0.5
    wide = Image.fromarray(np.asarray(image).astype(np.int32))
    assert wide.mode == "I" and to_rgb(wide).tobytes() == to_rgb(image).tobytes()
    other_order = Image.frombytes("I;16B", image.size, np.asarray(image).astype(">u2").tobytes())
    assert to_rgb(other_order).tobytes() == to_rgb(image).tobytes()


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (np.array([[0, 128, 255]], np.int32), [0, 128, 255]),  # mode I, but 8 bits
        (np.array([[0, 0.5, 1]], np.float32), [0, 128, 255]),
        (np.array([[0, 127.6, 255]], np.float32), [0, 128, 255]),  # as Pillow converts grey to F
    ],
)
def test_other_ranges(values, expected):
    assert np.asarray(to_rgb(Image.fromarray(values)))[0, :, 1].tolist() == expected


@pytest.mark.parametrize(
    "values", [np.array([[-1, 5]], np.int32), np.array([[70000]], np.int32), np.array([[300, np.nan]], np.float32)]
)
def test_values_that_are_no_brightness_are_refused(values):
    with pytest.raises(ValueError, match=r"photo\.tif has PIL mode [IF] with values from .*: bring them to 0 … \d+ first"):
        to_rgb(Image.fromarray(values), "photo.tif")


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "YCbCr", "HSV"])
def test_other_modes_are_the_same_picture(mode):
    expected = np.asarray(photo(40, 30).convert(mode).convert("RGB"))
    assert (np.asarray(to_rgb(photo(40, 30).convert(mode))) == expected).all()


@pytest.mark.parametrize("mode", ["LA", "La", "RGBA", "RGBa"])
def test_modes_with_transparency_are_put_on_white(mode):
    """In `La` and `RGBa`, colours are multiplied by their opacity."""
    image = Image.new(mode.upper(), (40, 30), 0).convert(mode)
    assert (np.asarray(to_rgb(image)) == 255).all()


def test_cmyk_jpeg():
    image = load_image(saved(photo(64, 48).convert("CMYK"), "JPEG", quality=95))
    assert np.abs(np.asarray(image, int) - np.asarray(photo(64, 48), int)).mean() < 4


def test_animations_say_so_once(caplog):
    image_reading._say_first_frame.cache_clear()
    for _ in range(2):
        assert np.asarray(load_image(animation()))[0, 0].tolist() == [255, 0, 0]
    assert [record.message for record in caplog.records] == [
        "An image has several frames: only the one that it stands at, the first unless moved, is taken."
    ]


def test_masks_are_grey_bytes():
    grey = Image.linear_gradient("L")
    assert to_grey(grey).tobytes() == grey.tobytes()


@pytest.mark.parametrize("limit", [1000, 2000])  # Pillow refuses from twice the limit on, and warns before that
def test_decompression_bombs_are_refused_by_name(monkeypatch, tmp_path, limit):
    path = tmp_path / "bomb.png"
    Image.new("1", (60, 40)).save(path)
    lazy = Image.open(path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ValueError, match=rf"bomb\.png {BOMB}"):
            load_image(path)
        with pytest.raises(ValueError, match=rf"`image` {BOMB}"):
            to_rgb(lazy)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    assert load_image(path).size == (60, 40)
    lazy.close()


@pytest.mark.parametrize("suffix", [".eps", ".png", ".jpg"])
def test_postscript_is_not_interpreted(monkeypatch, tmp_path, suffix):
    from PIL import EpsImagePlugin

    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *args, **kwargs: pytest.fail("Ghostscript was called"))
    path = tmp_path / f"picture{suffix}"
    photo(8, 8).save(path, "EPS")
    with pytest.raises(UnidentifiedImageError, match="picture.* is not a picture in one of the formats PNG, JPEG"):
        load_image(path)
    with pytest.raises(ValueError, match="`image` is an EPS file"):
        to_rgb(Image.open(path))


def test_damaged_files_are_refused_by_name(tmp_path):
    whole = saved(photo(64, 48), "PNG").getvalue()
    files = {
        "cut.png": whole[: len(whole) // 2],
        "noise.png": whole[:40] + bytes(len(whole) - 40),
        "cut-early.png": whole[:20],
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises((ValueError, OSError), match=rf"{name} (cannot be decoded|is not a picture)"):
            load_image(tmp_path / name)
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(UnidentifiedImageError, match="text.png is not a picture"):
        load_image(tmp_path / "text.png")
    with pytest.raises(UnidentifiedImageError, match="the upload is not a picture"):
        load_image(io.BytesIO(b"no picture"), "the upload")
    with pytest.raises(FileNotFoundError, match="nowhere.png"):
        load_image(tmp_path / "nowhere.png")


def test_only_the_header_is_read_at_first():
    content = saved(photo(64, 48), "PNG").getvalue()
    with open_image(io.BytesIO(content[: len(content) // 2])) as image:
        assert image.size == (64, 48)
