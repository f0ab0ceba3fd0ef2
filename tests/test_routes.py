"""One decoder: a set of images against itself is 0, whatever way each side takes, however nasty the images are."""

from __future__ import annotations

import io
import itertools
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mmgen import data
from mmgen.metrics.features import build_extractor
from mmgen.metrics.image_sets import dataset_images, image_set
from mmgen.metrics.reference_sets import collect_reference
from mmgen.metrics.score import score

SIDE, COPIES = 8, 4
ORIENTATION = 0x0112
RANDOM = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MMGEN_CACHE", str(tmp_path / "cache"))


def colour() -> Image.Image:
    return Image.fromarray(RANDOM.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8))


def png(image: Image.Image, **options) -> tuple[str, bytes]:
    return encoded(image, "PNG", **options)


def encoded(image: Image.Image, kind: str, **options) -> tuple[str, bytes]:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return {"PNG": "png", "JPEG": "jpg", "TIFF": "tif"}[kind], file.getvalue()


def turned(kind: str, orientation: int) -> tuple[str, bytes]:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    return encoded(colour(), kind, exif=exif)


def with_alpha() -> Image.Image:
    image = colour()
    image.putalpha(Image.fromarray(RANDOM.integers(0, 256, (SIDE, SIDE), dtype=np.uint8)))
    return image


def transparent_palette() -> tuple[str, bytes]:
    return png(colour().quantize(16), transparency=3)


NASTY = {
    "plain": lambda: png(colour()),
    "turned jpeg": lambda: turned("JPEG", 6),
    "mirrored png": lambda: turned("PNG", 2),
    "16 bit": lambda: png(Image.fromarray(RANDOM.integers(0, 65536, (SIDE, SIDE), dtype=np.uint16))),
    "32 bit tiff": lambda: encoded(Image.fromarray(RANDOM.integers(0, 65536, (SIDE, SIDE), dtype=np.int32)), "TIFF"),
    "alpha": lambda: png(with_alpha()),
    "grey with alpha": lambda: png(with_alpha().convert("LA")),
    "palette": lambda: png(colour().quantize(16)),
    "transparent palette": transparent_palette,
    "cmyk": lambda: encoded(colour().convert("CMYK"), "JPEG"),
    "grey": lambda: png(colour().convert("L")),
    "one bit": lambda: png(colour().convert("1")),
}


def files(kinds) -> dict[str, bytes]:
    made = [NASTY[kind]() for kind in kinds for _ in range(COPIES)]
    return {f"{i:03d}.{suffix}": raw for i, (suffix, raw) in enumerate(made)}


def routes(place: Path, images: dict[str, bytes]) -> dict[str, object]:
    """The same images, by each way that `mmgen fid` and the training commands know."""
    import pyarrow
    import pyarrow.parquet

    folder, archive, table, npz = place / "folder", place / "a.zip", place / "a.parquet", place / "a.npz"
    folder.mkdir()
    for name, raw in images.items():
        (folder / name).write_bytes(raw)
    with zipfile.ZipFile(archive, "w") as file:
        for name, raw in images.items():
            file.writestr(name, raw)
    pyarrow.parquet.write_table(pyarrow.table({"image": list(images.values())}), table)
    trained = data.load(str(folder))
    np.savez(npz, np.asarray(trained.images).transpose(0, 2, 3, 1))
    sets = {"--data": dataset_images(trained), "resized": dataset_images(data.load(str(folder), resolution=SIDE))}
    return sets | {word.suffix or "folder": image_set(str(word)) for word in (folder, archive, table, npz)}


@pytest.mark.parametrize("kinds", [list(NASTY), ["grey", "16 bit", "one bit", "grey with alpha"]], ids=["colour", "grey"])
def test_a_set_against_itself_is_zero_by_every_route(tmp_path, kinds):
    sets = routes(tmp_path, files(kinds))
    pixels = {name: np.stack(list(one.read(0, one.length, False))) for name, one in sets.items()}
    extractor = build_extractor("pixels")
    for (name, samples), (other, reference) in itertools.product(sets.items(), sets.items()):
        np.testing.assert_array_equal(pixels[name], pixels[other], err_msg=f"{name} against {other}")
        found = score(samples, collect_reference(reference, extractor), extractor)
        assert abs(next(iter(found.metrics.values()))) < 1e-6, f"{name} against {other}"


def test_the_images_are_nasty():
    """Each kind is one that another decoder reads otherwise, or of another mode: the test above can fail."""
    modes = {kind: Image.open(io.BytesIO(make()[1])) for kind, make in NASTY.items()}
    assert {image.mode for image in modes.values()} >= {"RGB", "RGBA", "LA", "L", "P", "CMYK", "1", "I;16", "I"}
    assert [kind for kind, image in modes.items() if image.getexif().get(ORIENTATION, 1) != 1] == ["turned jpeg", "mirrored png"]
    assert "transparency" in modes["transparent palette"].info
