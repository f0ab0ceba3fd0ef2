"""Pictures: every pixel of a tile is where it belongs, and files arrive whole."""

from __future__ import annotations

import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from mmgen.errors import MmgenError
from mmgen.report.images import grid, is_whole_png, labelled_rows, png_bytes, save_png


def noise(*shape: int) -> torch.Tensor:
    return torch.randint(0, 255, shape, generator=torch.Generator().manual_seed(0)).to(torch.uint8)


@pytest.mark.parametrize("channels, mode", [(1, "L"), (3, "RGB")])
def test_png_returns_the_pixels(tmp_path, channels, mode):
    image = noise(channels, 5, 7)
    for given in (image, image.numpy()):
        save_png(tmp_path / "new" / "a.png", given)
        with Image.open(tmp_path / "new" / "a.png") as read:
            assert read.mode == mode and read.format == "PNG"
            pixels = np.asarray(read).reshape(5, 7, channels)
        assert np.array_equal(pixels, image.numpy().transpose(1, 2, 0))
    assert [f.name for f in (tmp_path / "new").iterdir()] == ["a.png"]


def test_a_damaged_png_is_seen(tmp_path):
    file = tmp_path / "a.png"
    save_png(file, torch.randint(256, (3, 8, 8), dtype=torch.uint8))
    content = file.read_bytes()
    assert is_whole_png(file) and not is_whole_png(tmp_path / "none.png")
    for size in range(len(content) - 4):  # the last four bytes are the checksum of nothing ...
        file.write_bytes(content[:size])
        assert not is_whole_png(file), size
    for place in range(len(content) - 12):  # ... and the last twelve an end that holds nothing
        file.write_bytes(content[:place] + bytes([content[place] ^ 16]) + content[place + 1 :])
        assert not is_whole_png(file), place
    side = struct.pack(">I", 10**6)
    header = b"IHDR" + side + side + content[24:29]
    file.write_bytes(content[:12] + header + struct.pack(">I", zlib.crc32(header)) + content[33:])
    assert not is_whole_png(file)  # a million pixels a side


def test_png_of_a_picture(tmp_path):
    picture = grid(noise(3, 1, 4, 4), 2)
    save_png(tmp_path / "grid.png", picture)
    with Image.open(tmp_path / "grid.png") as read:
        assert np.array_equal(np.asarray(read), np.asarray(picture))


def test_png_refusals(tmp_path):
    for wrong in (torch.zeros(3, 4, 4), noise(4, 4), noise(2, 4, 4), noise(4, 4, 3)):
        with pytest.raises(ValueError):
            save_png(tmp_path / "a.png", wrong)
    (tmp_path / "file").write_text("")
    with pytest.raises(MmgenError, match="cannot write"):
        save_png(tmp_path / "file" / "a.png", noise(1, 4, 4))


@pytest.mark.parametrize("channels", [1, 3])
def test_grid_places_every_tile(channels):
    images = noise(5, channels, 4, 6)
    picture = np.asarray(grid(images, 3, scale=2, padding=3))
    assert picture.shape == (2 * (8 + 3) + 3, 3 * (12 + 3) + 3, 3)
    covered = np.zeros(picture.shape[:2], bool)
    for i in range(5):
        top, left = 3 + (i // 3) * 11, 3 + (i % 3) * 15
        tile = picture[top : top + 8, left : left + 12]
        covered[top : top + 8, left : left + 12] = True
        expected = images[i].expand(3, 4, 6).numpy().transpose(1, 2, 0)
        for dy in range(2):
            for dx in range(2):
                assert np.array_equal(tile[dy::2, dx::2], expected)
    assert (picture[~covered] == 255).all()  # the sixth place and the gaps are white


@pytest.mark.parametrize("size, tile", [(8, 64), (28, 84), (32, 64), (64, 64), (100, 100)])
def test_small_images_are_enlarged(size, tile):
    assert grid(noise(1, 1, size, size), 4, padding=0).size == (tile, tile)


def test_grid_without_padding_and_refusals():
    assert grid(noise(4, 3, 2, 2), 2, scale=1, padding=0).size == (4, 4)
    for images, columns, scale in [
        (noise(0, 3, 2, 2), 2, 1),
        (noise(2, 4, 2, 2), 2, 1),
        (torch.zeros(2, 3, 2, 2), 2, 1),
        (noise(2, 3, 2, 2), 0, 1),
        (noise(2, 3, 2, 2), 1, 0),
    ]:
        with pytest.raises(ValueError):
            grid(images, columns, scale=scale)


def test_labelled_rows():
    rows = [("1 step", noise(10, 1, 8, 8)), ("2 steps", noise(10, 1, 8, 8)), ("real", noise(23, 3, 8, 8))]
    picture = np.asarray(labelled_rows(rows, columns=10, scale=4, padding=2))
    line = 32 + 2
    edge = picture.shape[1] - 14 - (10 * line + 2)  # where the tiles begin
    assert picture.shape[0] == 2 * 14 + 5 * line + 3 * 2 + 2 * 7
    first = np.asarray(grid(rows[0][1], 10, scale=4))
    assert np.array_equal(picture[14 : 14 + line + 2, edge : edge + 10 * line + 2], first)
    captions = picture[:, :edge]
    assert (captions < 128).any() and (captions[:, :7] == 255).all()  # written, and not cut off at the left
    for top, bottom in ((14, 14 + line), (14 + line + 9, 14 + 2 * line + 9)):
        assert (captions[top:bottom] < 128).any()  # one beside each row


def test_labelled_rows_of_different_sizes_and_refusal():
    picture = labelled_rows([("a", noise(2, 1, 8, 8)), ("a long caption, jq", noise(1, 3, 80, 80))])
    assert picture.mode == "RGB"
    with pytest.raises(ValueError, match="at least one row"):
        labelled_rows([])


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 8, 8), (3, 5, 7), (3, 64, 64), (1, 70, 300)], ids=str)
def test_a_png_file_holds_the_pixels(shape, tmp_path):
    """Small ones are encoded here, larger ones by Pillow; checksums are right in both."""
    image = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    (tmp_path / "a.png").write_bytes(png_bytes(image))
    assert is_whole_png(tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as found:
        assert found.mode == ("RGB" if shape[0] == 3 else "L")
        assert np.array_equal(np.asarray(found), image.transpose(1, 2, 0) if shape[0] == 3 else image[0])
