"""Images, archives and links that are made to harm: as folders, in zips, in parquet, and as samples to be scored."""

from __future__ import annotations

import json
import os
import struct
import sys
import zipfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hostile import answered, bounded, command, refused, tried
from hostile_images import BAD, EPS, ODD, STRIP, encoded, encrypted, picture, zip_of

from mmgen import data
from mmgen.data import resolve
from mmgen.data.cache import cache_root
from mmgen.errors import DataError

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("own_cache"), pytest.mark.filterwarnings("ignore:Duplicate name")]
GOOD = encoded(picture())


def folder_of(place, *contents: bytes, suffix: str = ".png"):
    place.mkdir(parents=True, exist_ok=True)
    for i, content in enumerate(contents):
        (place / f"{i}{suffix}").write_bytes(content)
    return place


def parquet_of(place, *contents: bytes):
    pq.write_table(pa.table({"image": [{"bytes": content, "path": None} for content in contents]}), place)
    return place


@pytest.mark.parametrize("name", BAD)
def test_bad_images(name, tmp_path):
    """Each behind a good one: trained on, scored, and left out where that is asked for; as files, in a zip, in a table."""
    bad = BAD[name]
    folder = folder_of(tmp_path / "images", GOOD, bad)
    (tmp_path / "images.zip").write_bytes(zip_of([("0.png", GOOD), ("1.png", bad)]))
    table = parquet_of(tmp_path / "table.parquet", GOOD, bad)
    for place in (folder, tmp_path / "images.zip", table):
        for options in ({}, {"resolution": 8}, {"resolution": 8, "channels": 3}):
            answered(data.load, str(place), **options)
        tried.append(f"{name} left out")
        with bounded():
            assert len(data.load(str(place), resolution=8, on_corrupt="skip")) == 1
    assert not list(cache_root().glob("data/.tmp-*"))
    refused("fid", folder, "--features", "pixels", "--save-stats", "s.npz", status=3)


@pytest.mark.parametrize("name", BAD)
def test_bad_images_alone(name, tmp_path):
    folder = folder_of(tmp_path / "images", BAD[name])
    arguments = ["train-imm", "--data", folder, "--preset", "digits-imm", "--unconditional", "--out", tmp_path / "run"]
    refused(*arguments, status=3)
    refused(*arguments, "--on-corrupt", "skip", status=3)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ODD)
def test_odd_images(name, tmp_path):
    """Whole ones are read, whatever they are, in bounded memory."""
    tried.append(f"odd image {name}")
    folder = folder_of(tmp_path / "images", GOOD, ODD[name])
    with bounded():
        assert len(data.load(str(folder), resolution=8)) == 2


def test_many_large_images(tmp_path):
    """Four of 81 million pixels: one at a time is in memory, whatever the number of threads."""
    tried.append("four large images")
    with bounded(2**30):
        assert len(data.load(str(folder_of(tmp_path / "images", *[ODD["9,000 x 9,000"]] * 4)), resolution=8)) == 4
    refused("fid", tmp_path / "images", "--features", "pixels", "--save-stats", "s.npz", status=3)


def test_a_strip(tmp_path):
    answered(data.load, str(folder_of(tmp_path / "strips", STRIP)), resolution=1024)


def test_no_program_is_run(tmp_path, monkeypatch):
    """EPS is a program that Pillow has Ghostscript run: it is not even asked."""
    import subprocess

    monkeypatch.setattr(subprocess, "Popen", lambda *a, **k: pytest.fail("a program was started"))
    monkeypatch.setattr(subprocess, "check_call", lambda *a, **k: pytest.fail("a program was started"))
    answered(data.load, str(folder_of(tmp_path / "eps", EPS)), resolution=8)


# Zips


def labels(value) -> bytes:
    return value if isinstance(value, bytes) else json.dumps({"labels": value}).encode()


def directory(content: bytes, place: int, value: bytes) -> bytes:
    """A zip with a change in its directory's first entry."""
    start = content.index(b"PK\x01\x02") + place
    return content[:start] + value + content[start + len(value) :]


def lying(size: int) -> bytes:
    return directory(zip_of([("0.png", GOOD)]), 24, struct.pack("<I", size))


ZIPS = {
    **{f"a name that leads out: {name}": zip_of([("0.png", GOOD), (name, GOOD)]) for name in (
        "../x.png", "a/../../x.png", "/etc/x.png", "\\x.png", "..\\x.png", "C:\\x.png", "C:/x.png", "c:x.png", "//host/x.png",
        ".", "..")},
    "a bomb": zip_of([("0.png", bytes(300_000_000))]),
    "a bomb of labels": zip_of([("0.png", GOOD), ("dataset.json", bytes(200_000_000))]),
    "a bomb of brackets": zip_of([("0.png", GOOD), ("dataset.json", b"[" * 50_000_000)]),
    "a bomb in bzip2": zip_of([("0.png", bytes(100_000_000))], zipfile.ZIP_BZIP2),
    "a bomb in LZMA": zip_of([("0.png", bytes(100_000_000))], zipfile.ZIP_LZMA),
    "encrypted": encrypted(zip_of([("0.png", GOOD)])),
    "two of one name": zip_of([("0.png", GOOD), ("0.png", encoded(picture(seed=1)))]),
    "an unknown compression": directory(zip_of([("0.png", GOOD)]), 10, b"\x63\0"),
    "a size that lies, too small": lying(10), "a size of 4 GB": lying(2**32 - 2),
    "an entry elsewhere": directory(zip_of([("0.png", GOOD)]), 42, struct.pack("<I", 2**31)),
    "no images": zip_of([("a.txt", b"x")]), "nothing in it": zip_of([]),
    "cut short": zip_of([("0.png", GOOD)])[:-30], "only its end": b"PK\x05\x06" + bytes(18), "empty": b"",
    "no zip": b"text " * 100,
    "a zip in a zip": zip_of([("0.zip", zip_of([("0.png", GOOD)]))]),
}  # fmt: skip
LABELS = {
    "deep": b'{"labels":' + b"[" * 100_000, "a list": b"[]", "null": b"null", "no labels": b'{"label": []}',
    "broken": b'{"labels":',
    "not UTF-8": b'{"labels": "\xff"}', "a number": b'{"labels": 5}', "texts": labels([["0.png", "a"]]),
    "floats": labels([["0.png", 1.5]]),
    "true": labels([["0.png", True]]), "vectors": labels([["0.png", [0, 1]]]), "null labels": labels([["0.png", None]]),
    "negative": labels([["0.png", -5]]), "large": labels([["0.png", 10**7]]), "beyond 64 bits": labels([["0.png", 10**30]]),
    "thousands of digits": b'{"labels": [["0.png", ' + b"9" * 5000 + b"]]}", "NaN": labels([["0.png", float("nan")]]),
    "triples": labels([["0.png", 0, 0]]), "lists as names": labels([[["0.png"], 0]]), "no pairs": labels([1, 2]),
    "of another image": labels([["../0.png", 0], ["/etc/passwd", 1]]), "of one of two": labels([["0.png", 0], ["../1.png", 0]]),
}  # fmt: skip


@pytest.mark.parametrize("name", ZIPS)
def test_zips(name, tmp_path):
    place = tmp_path / "data.zip"
    place.write_bytes(ZIPS[name])
    answered(data.load, str(place))
    refused("fid", place, "--features", "pixels", "--save-stats", "s.npz", status=3)


@pytest.mark.parametrize("name", LABELS)
def test_labels(name, tmp_path):
    """dataset.json in a zip and in a folder. Of a folder, another program's file of that name is passed over; what names none of
    the images gives no labels."""
    place = tmp_path / "data.zip"
    place.write_bytes(zip_of([("0.png", GOOD), ("1.png", GOOD), ("dataset.json", LABELS[name])]))
    folder = folder_of(tmp_path / "data", GOOD, GOOD)
    (folder / "dataset.json").write_bytes(LABELS[name])
    if name == "of another image":
        assert data.load(str(place)).labels is None
        return
    answered(data.load, str(place))
    with bounded():
        try:
            assert data.load(str(folder)).labels is None
        except DataError as error:
            assert "\n" not in str(error)


# Links


@pytest.mark.skipif(sys.platform == "win32", reason="links need rights there")
def test_links(tmp_path):
    """Those that leave the folder are not followed, those that go round end, and both are said."""
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "secret.png").write_bytes(GOOD)
    folder = tmp_path / "data"
    folder.mkdir()
    for name, target in (("out.png", "../secret/secret.png"), ("away", "../secret"), ("root", "/"), ("round", "."),
                         ("gone.png", "x"),
                         ("itself.png", "itself.png"), ("etc.png", "/etc/passwd"), ("zero.png", "/dev/zero")):  # fmt: skip
        os.symlink(target, folder / name)
    sentence = refused("train-imm", "--data", folder, "--preset", "digits-imm", status=3)
    assert "not followed" in sentence and "8 links" in sentence
    (folder / "inside").mkdir()
    (folder / "inside" / "0.png").write_bytes(GOOD)
    os.symlink("..", folder / "inside" / "up")
    os.symlink("inside/0.png", folder / "1.png")
    tried.append("links within")
    with bounded():
        source = resolve.resolve(str(folder / "inside"))
    assert source.length == 1 and "link" in source.description
    answered(data.load, str(folder))  # images both directly and in folders


def test_pipes_and_devices(tmp_path):
    (tmp_path / "data").mkdir()
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "data" / "0.png")
    answered(data.load, str(tmp_path / "data"))
    for place in ("/dev/null", "/dev/zero", "/dev/stdin"):
        answered(data.load, place)


def test_labels_that_are_a_link(tmp_path):
    """dataset.json that leads out of the folder is not read."""
    (tmp_path / "labels.json").write_bytes(labels([["0.png", 3]]))
    folder = folder_of(tmp_path / "data", GOOD)
    os.symlink("../labels.json", folder / "dataset.json")
    tried.append("labels by a link")
    assert data.load(str(folder)).labels is None


def test_the_harness_sees():
    """A command that works is not taken for one that is refused."""
    assert command("--version")[0] == 0
    with pytest.raises(AssertionError, match="exit status 0"):
        refused("--version")
