"""One image -> pixels: every mode Pillow opens, what is refused, and ADM's crop."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from mmgen.data import decode
from mmgen.data.image_source import CorruptImage


def encoded(image: Image.Image, format: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def test_rgb_pixels_are_those_saved():
    rgb = noise(6, 6, 3)
    got = decode.decode(encoded(Image.fromarray(rgb)), 6, 3)
    assert got.dtype == np.uint8 and got.flags.c_contiguous
    np.testing.assert_array_equal(got, rgb.transpose(2, 0, 1))


def test_grey_is_repeated_for_three_channels_and_kept_for_one():
    grey = noise(5, 5)
    raw = encoded(Image.fromarray(grey))
    np.testing.assert_array_equal(decode.decode(raw, 5, 1), grey[None])
    np.testing.assert_array_equal(decode.decode(raw, 5, 3), np.stack([grey] * 3))


def test_alpha_is_dropped_not_blended():
    rgba = noise(4, 4, 4)
    np.testing.assert_array_equal(decode.decode(encoded(Image.fromarray(rgba)), 4, 3), rgba[..., :3].transpose(2, 0, 1))
    la = noise(4, 4, 2)
    np.testing.assert_array_equal(decode.decode(encoded(Image.fromarray(la)), 4, 1), la[None, ..., 0])


def test_palette_with_and_without_transparency(recwarn):
    index = noise(4, 4) % 3
    colours = np.array([[255, 0, 0], [0, 200, 0], [9, 8, 7]], dtype=np.uint8)
    image = Image.fromarray(index)
    image.putpalette(colours.tobytes())
    expected = colours[index].transpose(2, 0, 1)
    np.testing.assert_array_equal(decode.decode(encoded(image), 4, 3), expected)
    np.testing.assert_array_equal(decode.decode(encoded(image, transparency=bytes([0, 255, 128])), 4, 3), expected)
    assert not recwarn.list


def test_one_bit_becomes_black_and_white():
    bits = noise(8, 8) > 127
    np.testing.assert_array_equal(decode.decode(encoded(Image.fromarray(bits)), 8, 1)[0], bits * 255)


def test_cmyk():
    image = Image.new("CMYK", (8, 8), (0, 255, 255, 0))  # full magenta and yellow: red
    got = decode.decode(encoded(image, "JPEG", quality=100), 8, 3).astype(int)
    assert np.abs(got - np.array([255, 0, 0])[:, None, None]).max() <= 3


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_16_bit_grey_is_scaled_not_clipped(format):
    values = np.array([[0, 257, 128], [385, 386, 65535], [32768, 65279, 300]], dtype=np.uint16)
    expected = np.round(values / 257)
    np.testing.assert_array_equal(decode.decode(encoded(Image.fromarray(values), format), 3, 1)[0], expected)


def test_exif_orientation_turns_the_image_upright():
    upright = noise(8, 8, 3)
    exif = Image.Exif()
    exif[0x0112] = 6  # shown after a quarter turn clockwise, so stored after one counter-clockwise
    raw = encoded(Image.fromarray(np.rot90(upright).copy()), "PNG", exif=exif)
    np.testing.assert_array_equal(decode.decode(raw, 8, 3), upright.transpose(2, 0, 1))


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (b"", "empty"),
        (b"hello, I am a text file", "not an image"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00", "git lfs pull"),
        (encoded(Image.fromarray(noise(64, 64, 3)))[:3000], "truncated"),
        (encoded(Image.fromarray(noise(64, 64, 3)), "JPEG")[:1500], "truncated"),
        (encoded(Image.new("F", (4, 4)), "TIFF"), "floating-point"),
        (encoded(Image.new("1", (20000, 10000))), "pixels"),
    ],
)
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_what_cannot_be_read_is_refused(raw, reason):
    with pytest.raises(CorruptImage, match=reason):
        decode.decode(raw, 4, 3)


def test_a_strip_that_would_explode_when_enlarged_is_refused():
    with pytest.raises(CorruptImage, match="pixels"):
        decode.decode(encoded(Image.new("L", (1, 100_000))), 256, 1)


@pytest.mark.parametrize(
    ("mode", "colour", "grey"),
    [("L", 7, True), ("1", 1, True), ("RGB", (7,) * 3, True), ("RGB", (7, 7, 8), False), ("RGBA", (1, 2, 3, 9), False)],
)
def test_is_grey(mode, colour, grey):
    assert decode.is_grey(Image.new(mode, (3, 3), colour)) is grey


def test_crop_leaves_the_right_size_untouched():
    image = Image.fromarray(noise(16, 16, 3))
    assert decode.centre_crop(image, 16) is image


def test_crop_halves_with_exact_block_means():
    """40x32 -> 8: two halvings give 10x8, no bicubic step, one column lost on each side."""
    grey = noise(32, 40)
    values = grey.astype(float)
    for _ in range(2):
        for axis in (1, 0):  # Pillow works on rows, rounds to 8 bits, then on columns
            first, second = (np.take(values, range(k, values.shape[axis], 2), axis) for k in (0, 1))
            values = np.floor((first + second) / 2 + 0.5)
    np.testing.assert_array_equal(np.asarray(decode.centre_crop(Image.fromarray(grey), 8)), values[:, 1:9])


def _bicubic_matrix(size: int, new_size: int) -> np.ndarray:
    """Antialiased bicubic resizing (Keys, a = -0.5) as a matrix [new_size, size], from the definition."""
    scale = size / new_size
    support = max(scale, 1.0)
    centres = (np.arange(new_size) + 0.5) * scale
    x = np.abs((np.arange(size)[None] + 0.5 - centres[:, None]) / support)
    near = 1.5 * x**3 - 2.5 * x**2 + 1
    far = -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    weights = np.where(x < 1, near, np.where(x < 2, far, 0))
    return weights / weights.sum(1, keepdims=True)


@pytest.mark.parametrize(("width", "height", "resolution"), [(75, 50, 16), (31, 45, 20), (9, 7, 12), (50, 33, 33)])
def test_crop_against_a_plain_reference(width, height, resolution):
    grey = noise(height, width)
    values = grey.astype(float)
    while min(values.shape) >= 2 * resolution:  # BOX over an odd side is not 2x2: weigh by overlap
        values = _box_matrix(values.shape[0]) @ values @ _box_matrix(values.shape[1]).T
    scale = resolution / min(values.shape)
    h, w = (round(s * scale) for s in values.shape)
    values = _bicubic_matrix(values.shape[0], h) @ values @ _bicubic_matrix(values.shape[1], w).T
    top, left = (h - resolution) // 2, (w - resolution) // 2
    expected = values[top : top + resolution, left : left + resolution].clip(0, 255)
    got = np.asarray(decode.centre_crop(Image.fromarray(grey), resolution))
    assert got.shape == (resolution, resolution)
    assert np.abs(got - expected).max() <= 1.5 + 0.5  # Pillow rounds to 8 bits after each pass


def _box_matrix(size: int) -> np.ndarray:
    """Pillow's BOX to half the size: every pixel whose centre lies within the window counts alike."""
    scale = size / (size // 2)
    centres = (np.arange(size // 2) + 0.5) * scale
    offset = (np.arange(size)[None] + 0.5 - centres[:, None]) / scale
    weights = ((offset > -0.5) & (offset <= 0.5)).astype(float)
    return weights / weights.sum(1, keepdims=True)
