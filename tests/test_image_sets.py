"""Images to be scored: every kind of file, decoded as for training, or refused by name."""

from __future__ import annotations

import io
import json
import pickle
import shutil
import struct
import tracemalloc
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from mmgen.errors import DataError
from mmgen.metrics.collect import collect
from mmgen.metrics.features import build_extractor
from mmgen.metrics.image_sets import ImageSet, image_set
from mmgen.metrics.npz_images import NpzImages

PIXELS = np.random.default_rng(0).integers(0, 256, (5, 6, 7, 3), dtype=np.uint8)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MMGEN_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def folder(tmp_path):
    place = tmp_path / "images"
    place.mkdir()
    for i, image in enumerate(PIXELS):
        Image.fromarray(image).save(place / f"{i}.png")
    return place


def whole(images, colour=True):
    return images.read(0, images.length, colour)


# ---- npz


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz_is_read_in_any_order(tmp_path, save):
    save(tmp_path / "a.npz", PIXELS, np.arange(5))
    file = NpzImages(tmp_path / "a.npz")
    assert (file.length, file.shape) == (5, (3, 6, 7))
    for start, stop in ((0, 2), (2, 5), (4, 5), (1, 3), (0, 5)):
        np.testing.assert_array_equal(file.read(start, stop), PIXELS[start:stop].transpose(0, 3, 1, 2))


def test_npz_without_a_channel_axis_is_grey(tmp_path):
    np.savez(tmp_path / "a.npz", PIXELS[..., 0])
    images = image_set(str(tmp_path / "a.npz"))
    np.testing.assert_array_equal(whole(images, colour=False), PIXELS[:, None, :, :, 0])
    np.testing.assert_array_equal(whole(images), np.repeat(PIXELS[:, None, :, :, 0], 3, axis=1))


@pytest.mark.parametrize(
    "content, message",
    [
        ({"arr_0": PIXELS / np.float32(255)}, "arr_0 .* is float32: save uint8 0..255"),
        ({"arr_0": PIXELS.transpose(0, 3, 1, 2)}, r"shape \[5, 3, 6, 7\], not \[N, H, W, 3\]"),
        ({"arr_0": np.asfortranarray(PIXELS)}, "Fortran"),
        ({"images": PIXELS}, "holds images, but no arr_0"),
        ({"arr_0": np.array([None, 1])}, "is object"),
        ({"arr_0": PIXELS[:0]}, "holds no images: its arr_0 is empty"),
    ],
)
def test_npz_of_something_else_is_refused(tmp_path, content, message):
    np.savez(tmp_path / "a.npz", **content)
    with pytest.raises(DataError, match=message):
        image_set(str(tmp_path / "a.npz"))


def test_damaged_npz_is_named(tmp_path):
    np.savez_compressed(tmp_path / "a.npz", PIXELS)
    whole_file = (tmp_path / "a.npz").read_bytes()
    (tmp_path / "cut.npz").write_bytes(whole_file[: len(whole_file) // 2])
    with pytest.raises(DataError, match="cut.npz is damaged"):
        image_set(str(tmp_path / "cut.npz"))
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": (9, 6, 7, 3)})
    with zipfile.ZipFile(tmp_path / "short.npz", "w") as archive:
        archive.writestr("arr_0.npy", header.getvalue() + PIXELS.tobytes())
    with pytest.raises(DataError, match=r"short.npz is damaged .*of shape \[9, 6, 7, 3\], and holds"):
        image_set(str(tmp_path / "short.npz"))
    content = (tmp_path / "short.npz").read_bytes()
    said = content.rindex(b"PK\x01\x02") + 24  # of the size, in the directory at the end
    (tmp_path / "lies.npz").write_bytes(content[:said] + struct.pack("<I", 10**9) + content[said + 4 :])
    images = image_set(str(tmp_path / "lies.npz"))
    with pytest.raises(DataError, match="lies.npz is damaged"):
        images.read(0, 9, True)


# ---- folders, as Pillow's convert("RGB") has it


def test_folder_in_order_of_names(folder):
    images = image_set(str(folder))
    np.testing.assert_array_equal(np.stack(whole(images)), PIXELS.transpose(0, 3, 1, 2))
    assert images.names(3).endswith("3.png") and images.beside == folder / "scores.json"


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "P", "1", "CMYK"])
def test_modes_become_rgb(tmp_path, folder, mode):
    image = Image.fromarray(PIXELS[0]).convert(mode)
    if mode == "RGBA":
        image.putalpha(Image.fromarray(PIXELS[1, :, :, 0]))  # dropped, not blended
    suffix = "tif" if mode == "CMYK" else "png"
    image.save(folder / f"0.{suffix}")
    if suffix != "png":
        (folder / "0.png").unlink()
    expected = np.asarray(image.convert("RGB")).transpose(2, 0, 1)
    np.testing.assert_array_equal(image_set(str(folder)).read(0, 1, True)[0], expected)


def test_channels_are_those_that_training_would_take(folder):
    assert image_set(str(folder)).shape(colour=False)[0] == 3
    Image.fromarray(PIXELS[0, :, :, 0]).save(folder / "0.png")
    assert image_set(str(folder)).shape(colour=False)[0] == 3  # the others are in colour
    for i in range(5):
        Image.fromarray(np.repeat(PIXELS[i, :, :, :1], 3, axis=2)).save(folder / f"{i}.png")
    assert image_set(str(folder)).shape(colour=False)[0] == 1


def test_a_colour_image_after_many_grey_ones_is_refused_by_name(tmp_path):
    for i in range(17):
        Image.fromarray(PIXELS[0, :, :, 0] if i < 16 else PIXELS[0]).save(tmp_path / f"{i:02d}.png")
    images = image_set(str(tmp_path))
    assert images.read(16, 17, True)[0].shape[0] == 3
    with pytest.raises(DataError, match="16.png cannot be scored: it is in colour, but the first images are grey"):
        images.read(16, 17, False)


def test_floats_are_refused_by_name(folder):
    (folder / "0.png").unlink()
    Image.fromarray(np.full((6, 7), 60_000, np.float32)).save(folder / "0.tif")
    with pytest.raises(DataError, match=r"0\.tif cannot be scored: .*floating-point"):
        image_set(str(folder)).read(0, 1, True)


def test_unreadable_image_is_named(folder):
    content = (folder / "2.png").read_bytes()
    (folder / "2.png").write_bytes(content[:40])
    with pytest.raises(DataError, match="2.png cannot be scored"):
        image_set(str(folder)).read(0, 5, True)


def test_first_images(folder):
    assert len(whole(image_set(str(folder)).first(3))) == 3
    with pytest.raises(DataError, match="has 5 images, fewer than the 6 asked for"):
        image_set(str(folder)).first(6)


def test_samples_bring_their_record(folder):
    record = {"format": 1, "num": 5, "complete": True, "steps": 2}
    (folder / "samples.json").write_text(json.dumps(record))
    assert image_set(str(folder)).record == record
    (folder / "samples.json").write_text(json.dumps({**record, "complete": False}))
    with pytest.raises(DataError, match="a part only of its 5 samples: run the same `mmgen sample` command again"):
        image_set(str(folder))


# ---- fingerprints


def test_fingerprint_is_of_the_content(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "copy")
    first = image_set(str(folder)).fingerprint()
    assert image_set(str(tmp_path / "copy")).fingerprint() == first
    assert image_set(str(folder)).fingerprint() == first  # now remembered
    Image.fromarray(PIXELS[1]).save(folder / "0.png")
    assert image_set(str(folder)).fingerprint() != first
    assert image_set(str(tmp_path / "copy")).fingerprint() == first


def test_fingerprint_of_npz_depends_on_pixels_and_shape_alone(tmp_path):
    np.savez(tmp_path / "a.npz", PIXELS)
    np.savez_compressed(tmp_path / "b.npz", PIXELS)
    np.savez(tmp_path / "c.npz", PIXELS.reshape(5, 7, 6, 3))
    a, b, c = (image_set(str(tmp_path / f"{name}.npz")).fingerprint() for name in "abc")
    assert a == b != c


# ---- the pass over them


def test_grad_mode_of_the_caller_is_left_alone(folder):
    from mmgen.metrics.features import build_extractor
    from mmgen.metrics.stream import features_of

    for _, features, _ in features_of(image_set(str(folder)), [range(0, 3), range(3, 5)], build_extractor("pixels"), "cpu"):
        assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
        assert not features.is_inference()


@pytest.mark.parametrize("size", [1, 3])
def test_kept_features_are_in_the_order_of_the_images(folder, size):
    from mmgen.metrics.collect import Wanted, collect
    from mmgen.metrics.features import build_extractor
    from mmgen.system.processes import ProcessGroup

    images, parts = image_set(str(folder)), []
    for index in range(size):  # the last process gets what all have seen, pickled as on the way between processes
        process_group = ProcessGroup(index, size, gather=lambda part: parts.append(pickle.dumps(part)) or [pickle.loads(p) for p in parts])
        found = collect(images, build_extractor("pixels"), Wanted(keep=True), batch_size=1, process_group=process_group)
    expected = PIXELS.transpose(0, 3, 1, 2).reshape(5, -1) / 127.5 - 1
    np.testing.assert_allclose(found.kept.numpy(), expected, atol=1e-6)
    np.testing.assert_allclose(found.statistics.mean.numpy(), expected.mean(0), atol=1e-12)


def test_batches_are_planned_as_they_are_needed():
    """What is claimed to hold a million images, and does not, costs no memory before the first is read."""

    def read(start, stop, colour):
        raise DataError("there is none")

    images = ImageSet("many", "", 10**6, read, str, threaded=False)
    tracemalloc.start()
    with pytest.raises(DataError, match="there is none"):
        collect(images, build_extractor("pixels"), batch_size=1)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**22  # a million ranges are 50 times as much
