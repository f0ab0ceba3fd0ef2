"""Layouts on disk: what each yields, and what is refused in which words."""

from __future__ import annotations

import io
import json
import os
import zipfile

import numpy as np
import pytest
from PIL import Image

from mmgen.data.sources import open_source
from mmgen.data.splits import parts_missing, select_split, split_of
from mmgen.errors import DataError

COLOURS = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (9, 9, 9), (200, 100, 0), (0, 100, 200)]


def png(colour) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (4, 4), colour).save(file, "PNG")
    return file.getvalue()


def colours(source) -> list[tuple[int, int, int]]:
    """The top left pixel of every image, by Pillow."""
    return [Image.open(io.BytesIO(source.read(i))).getpixel((0, 0)) for i in range(source.length)]


def write(path, content: bytes):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


@pytest.fixture(scope="module")
def table():
    """Six images, ClassLabel `kind`, an integer column `other`."""
    import datasets

    features = datasets.Features(
        {
            "picture": datasets.Image(),
            "kind": datasets.ClassLabel(names=["cat", "dog", "owl"]),
            "other": datasets.Value("int32"),
            "words": datasets.Value("string"),
        }
    )
    rows = {
        "picture": [{"bytes": png(c), "path": None} for c in COLOURS],
        "kind": [0, 1, 0, 1, 0, 1],
        "other": [3, 3, 2, 2, 1, 1],
        "words": ["x"] * 6,
    }
    return datasets.Dataset.from_dict(rows, features=features)


# ---- tables


def test_hub_layout_of_parquet(table, tmp_path):
    folder = tmp_path / "plain"
    folder.mkdir()
    table.select([0, 1]).to_parquet(folder / "train-00000-of-00002.parquet")
    table.select([2, 3]).to_parquet(folder / "train-00001-of-00002.parquet")
    table.select([4, 5]).to_parquet(folder / "test-00000-of-00001.parquet")
    source = open_source(tmp_path)
    assert colours(source) == COLOURS[:4]
    assert source.labels.tolist() == [0, 1, 0, 1] and source.labels.dtype == np.int64
    assert source.class_names == ["cat", "dog", "owl"]
    assert source.names(3) == "row 1 of plain/train-00001-of-00002.parquet"
    assert "4 images, 3 classes" in source.description and "picture" in source.description
    assert colours(open_source(tmp_path, split="test")) == COLOURS[4:]
    with pytest.raises(DataError, match="no split 'val'.*test, train"):
        open_source(tmp_path, split="val")


def test_row_groups_are_read_in_any_order(table, tmp_path):
    import pyarrow.parquet as pq

    whole = tmp_path / "whole.parquet"
    table.to_parquet(whole)
    pq.write_table(pq.read_table(whole), tmp_path / "groups.parquet", row_group_size=1)
    source = open_source(tmp_path / "groups.parquet")
    for i in (5, 0, 3, 3, 1, 4, 2, 0):
        assert Image.open(io.BytesIO(source.read(i))).getpixel((0, 0)) == COLOURS[i]


def test_an_incomplete_download_is_told(table, tmp_path):
    table.to_parquet(tmp_path / "train-00001-of-00003.parquet")
    assert "2 of its 3 files are not there" in open_source(tmp_path).description


def test_saved_dataset_and_dict(table, tmp_path):
    import datasets

    table.select([3, 1]).save_to_disk(tmp_path / "one")  # an indices mapping too
    source = open_source(tmp_path / "one")
    assert colours(source) == [COLOURS[3], COLOURS[1]] and source.labels.tolist() == [1, 1]
    both = datasets.DatasetDict({"train": table.select(range(4)), "val": table.select(range(4, 6))})
    both.save_to_disk(tmp_path / "both")
    assert colours(open_source(tmp_path / "both")) == COLOURS[:4]
    assert colours(open_source(tmp_path / "both", split="validation")) == COLOURS[4:]
    with pytest.raises(DataError, match="no split 'test'"):
        open_source(tmp_path / "both", split="test")
    with pytest.raises(DataError, match="no split 'test'"):
        open_source(tmp_path / "one", split="test")


def test_arrow_files(table, tmp_path):
    table.save_to_disk(tmp_path / "saved")
    shard = next((tmp_path / "saved").glob("data-*.arrow"))
    write(tmp_path / "cache" / "x-train.arrow", shard.read_bytes())
    write(tmp_path / "cache" / "cache-0123.arrow", b"a result of map, not the data")
    source = open_source(tmp_path / "cache")
    assert colours(source) == COLOURS and source.class_names == ["cat", "dog", "owl"]


@pytest.mark.parametrize("layout", ["parquet", "saved"])
def test_path_instead_of_bytes(layout, tmp_path):
    import datasets

    write(tmp_path / "pictures" / "a.png", png(COLOURS[4]))
    features = datasets.Features({"image": datasets.Image()})
    rows = {"image": [{"bytes": None, "path": str(tmp_path / "pictures" / "a.png")}]}
    table = datasets.Dataset.from_dict(rows, features=features)
    (tmp_path / "data").mkdir()
    if layout == "parquet":
        import pyarrow.parquet as pq

        pq.write_table(table.data.table, tmp_path / "data" / "x.parquet")  # to_parquet would embed the bytes
    else:
        table.save_to_disk(tmp_path / "data")
    source = open_source(tmp_path / "data")
    assert colours(source) == [COLOURS[4]] and source.labels is None


def test_columns_by_option(table, tmp_path):
    path = tmp_path / "x.parquet"
    table.to_parquet(path)
    assert open_source(path, label_column="other").labels.tolist() == [3, 3, 2, 2, 1, 1]
    assert open_source(path, label_column="other").class_names is None
    assert open_source(path, label_column="other").fingerprint != open_source(path).fingerprint
    with pytest.raises(DataError, match="no column 'knid': did you mean 'kind'"):
        open_source(path, label_column="knid")
    with pytest.raises(DataError, match="'picture'.*Image, not labels.*Valid: kind, other, words"):
        open_source(path, label_column="picture")
    with pytest.raises(DataError, match="'other'.*int32, not images.*picture"):
        open_source(path, image_column="other")


def test_two_columns_of_images(table, tmp_path):
    two = table.add_column("mask", [{"bytes": png(c), "path": None} for c in reversed(COLOURS)])
    import datasets

    two = two.cast_column("mask", datasets.Image())
    two.to_parquet(tmp_path / "x.parquet")
    with pytest.raises(DataError, match=r"several columns of images \(picture, mask\).*--image-column"):
        open_source(tmp_path / "x.parquet")
    assert colours(open_source(tmp_path / "x.parquet", image_column="mask")) == COLOURS[::-1]
    two.rename_column("picture", "image").to_parquet(tmp_path / "y.parquet")
    assert colours(open_source(tmp_path / "y.parquet")) == COLOURS  # image and mask: the usual name is meant


def test_plain_bytes_without_feature_types(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = {"jpg": [png(c) for c in COLOURS], "cls": list(range(6)), "json": [b"{}"] * 6}
    pq.write_table(pa.table(columns), tmp_path / "x.parquet")
    source = open_source(tmp_path / "x.parquet")
    assert colours(source) == COLOURS and source.labels.tolist() == list(range(6))
    pq.write_table(pa.table({"number": [1, 2], "words": ["a", "b"]}), tmp_path / "y.parquet")
    with pytest.raises(DataError, match=r"no column that is known to hold images; it has number \(int64\), words"):
        open_source(tmp_path / "y.parquet")


@pytest.mark.parametrize("missing", [-1, None])
def test_missing_labels(missing, tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    image = [png(c) for c in COLOURS]
    pq.write_table(pa.table({"image": image, "label": pa.array([missing] * 6, "int64")}), tmp_path / "x.parquet")
    assert open_source(tmp_path / "x.parquet").labels is None
    labels = pa.array([0, 1, missing, 1, missing, 0], "int64")
    pq.write_table(pa.table({"image": image, "label": labels}), tmp_path / "x.parquet")
    with pytest.raises(DataError, match=r"column label: 2 of 6 images have no label \(the first is row 2 of x.parquet"):
        open_source(tmp_path / "x.parquet")


def test_files_of_two_data_sets_are_not_mixed(table, tmp_path):
    for variant in ("small", "large"):
        (tmp_path / variant).mkdir()
        table.to_parquet(tmp_path / variant / "train.parquet")
    with pytest.raises(DataError, match="side by side .large, small.: give the path of one"):
        open_source(tmp_path)
    assert open_source(tmp_path / "small").length == 6
    (tmp_path / "mixed").mkdir()
    table.to_parquet(tmp_path / "mixed" / "a.parquet")
    table.rename_column("picture", "photo").to_parquet(tmp_path / "mixed" / "b.parquet")
    with pytest.raises(DataError, match="not parts of one data set"):
        open_source(tmp_path / "mixed")


def test_damaged_parquet(table, tmp_path):
    table.to_parquet(tmp_path / "x.parquet")
    whole = (tmp_path / "x.parquet").read_bytes()
    (tmp_path / "x.parquet").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match="x.parquet .is the download complete"):
        open_source(tmp_path)
    (tmp_path / "x.parquet").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 120000000\n")
    with pytest.raises(DataError, match="git lfs pull"):
        open_source(tmp_path)


# ---- folders


@pytest.mark.parametrize("below", ["", "train/"])
def test_class_folders_sorted_by_name(below, tmp_path):
    write(tmp_path / f"{below}b/1.PNG", png(COLOURS[1]))
    write(tmp_path / f"{below}a/deeper/2.png", png(COLOURS[2]))
    write(tmp_path / f"{below}b/0.jpeg", png(COLOURS[0]))
    write(tmp_path / f"{below}b/notes.txt", b"no image")
    write(tmp_path / ".hidden/x.png", b"no image")
    if below:
        write(tmp_path / "test/a/9.png", png(COLOURS[3]))
    source = open_source(tmp_path)
    assert colours(source) == [COLOURS[2], COLOURS[0], COLOURS[1]]
    assert source.labels.tolist() == [0, 1, 1] and source.class_names == ["a", "b"]
    assert source.names(0) == str(tmp_path / f"{below}a/deeper/2.png")
    if below:
        assert colours(open_source(tmp_path, split="test")) == [COLOURS[3]]
    else:
        with pytest.raises(DataError, match="no split 'test'"):
            open_source(tmp_path, split="test")


def test_flat_folder_has_no_labels(tmp_path):
    for i in (2, 0, 1):
        write(tmp_path / f"{i}.png", png(COLOURS[i]))
    source = open_source(tmp_path)
    assert colours(source) == COLOURS[:3] and source.labels is None and source.class_names is None
    assert source.description == "image folder: 3 images, no labels"
    write(tmp_path / "sub" / "x.png", png(COLOURS[3]))
    with pytest.raises(DataError, match="both directly .0.png. and in folders .sub."):
        open_source(tmp_path)
    with pytest.raises(DataError, match="have no columns"):
        open_source(tmp_path, image_column="image")


def test_one_folder_of_images_is_no_class(tmp_path):
    write(tmp_path / "img_align" / "x.png", png(COLOURS[0]))
    assert open_source(tmp_path).labels is None


def test_links_that_leave_the_folder_are_not_followed(tmp_path):
    write(tmp_path / "outside" / "secret.png", png(COLOURS[5]))
    write(tmp_path / "data" / "a.png", png(COLOURS[0]))
    os.symlink(tmp_path / "outside" / "secret.png", tmp_path / "data" / "b.png")
    os.symlink(tmp_path / "outside", tmp_path / "data" / "more")
    os.symlink(tmp_path / "data", tmp_path / "data" / "loop")
    os.symlink(tmp_path / "data" / "a.png", tmp_path / "data" / "c.png")
    source = open_source(tmp_path / "data")
    assert colours(source) == [COLOURS[0], COLOURS[0]]  # a.png, and c.png, which stays inside
    assert "3 links" in source.description


def test_fingerprint_follows_the_files(tmp_path):
    write(tmp_path / "a.png", png(COLOURS[0]))
    before = open_source(tmp_path).fingerprint
    assert open_source(tmp_path).fingerprint == before
    os.utime(tmp_path / "a.png", ns=(1, 1))
    assert open_source(tmp_path).fingerprint != before


# ---- EDM


def edm_zip(path, entries: dict[str, bytes], labels: object = "absent"):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
        if labels != "absent":
            archive.writestr("dataset.json", json.dumps({"labels": labels}))
    return path


EDM = {f"00000/img{i:08d}.png": png(COLOURS[i]) for i in (2, 0, 1)}
EDM_NAMES = sorted(EDM)


def test_edm_zip_and_folder(tmp_path):
    labels = [[EDM_NAMES[2], 6], [EDM_NAMES[0], 0], [EDM_NAMES[1], 3]]
    source = open_source(edm_zip(tmp_path / "x.zip", EDM, labels))
    assert colours(source) == COLOURS[:3] and source.labels.tolist() == [0, 3, 6]
    assert "7 classes" in source.description
    for name, content in EDM.items():
        write(tmp_path / "folder" / name, content)
    write(tmp_path / "folder" / "dataset.json", json.dumps({"labels": labels}).encode())
    folder = open_source(tmp_path / "folder")
    assert colours(folder) == COLOURS[:3] and folder.labels.tolist() == [0, 3, 6]


@pytest.mark.parametrize("labels", [None, "absent"])
def test_edm_zip_without_labels(labels, tmp_path):
    source = open_source(edm_zip(tmp_path / "x.zip", EDM, labels))
    assert source.labels is None and colours(source) == COLOURS[:3]


def test_edm_zip_refusals(tmp_path):
    with pytest.raises(DataError, match="1 of 3 images have no label .the first is 00000/img00000001.png of x.zip"):
        open_source(edm_zip(tmp_path / "x.zip", EDM, [[EDM_NAMES[0], 0], [EDM_NAMES[2], 1]]))
    with pytest.raises(DataError, match=r"\[0.5, 0.5\], not an integer"):
        open_source(edm_zip(tmp_path / "x.zip", EDM, [[EDM_NAMES[0], [0.5, 0.5]]]))
    with pytest.raises(DataError, match="latents"):
        open_source(edm_zip(tmp_path / "x.zip", {"0/img-mean-std.npy": b""}))
    (tmp_path / "x.zip").write_bytes(b"PK no zip")
    with pytest.raises(DataError, match="is the download complete"):
        open_source(tmp_path / "x.zip")


@pytest.mark.parametrize("name", ["../x.png", "/etc/x.png", "a/../../x.png", "..\\x.png", "C:/x.png"])
def test_zip_entries_that_climb_are_refused(name, tmp_path):
    with pytest.raises(DataError, match="leads out of it"):
        open_source(edm_zip(tmp_path / "x.zip", {**EDM, name: png(COLOURS[0])}))


# ---- refusals


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("imagenet-0000.tar", "tar archive.*unpack"),
        ("cifar-10-python.tar.gz", "tar archive.*unpack"),
        ("arrays.npz", "NumPy arrays.*write them as images"),
        ("data.mdb", "LMDB.*export"),
        ("data_batch_1", "pickles.*--data cifar10"),
        ("train-images-idx3-ubyte.gz", "MNIST.*ylecun/mnist"),
    ],
)
def test_other_layouts_are_refused_with_advice(name, says, tmp_path):
    write(tmp_path / "d" / name, b"content")
    for place in (tmp_path / "d", tmp_path / "d" / name):
        with pytest.raises(DataError, match=says):
            open_source(place)


def test_nothing_to_read(tmp_path):
    with pytest.raises(DataError, match="is empty.*parquet"):
        open_source(tmp_path)
    write(tmp_path / "notes.txt", b"text")
    with pytest.raises(DataError, match="holds no images"):
        open_source(tmp_path)
    with pytest.raises(DataError, match="no data set that mmgen knows"):
        open_source(tmp_path / "notes.txt")
    write(tmp_path / "x.png", png(COLOURS[0]))
    with pytest.raises(DataError, match="single image"):
        open_source(tmp_path / "x.png")


# ---- names of splits


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("plain_text/train-00000-of-00001.parquet", "train"),
        ("plain_text/test/0000.parquet", "test"),
        ("data/validation-00003-of-00014-abcdef.parquet", "validation"),
        ("cifar10-train-00000-of-00002.arrow", "train"),
        ("val.parquet", "validation"),
        ("unsupervised-00000-of-00001.parquet", "unsupervised"),
        ("contest/latest.parquet", None),
        ("constrained.parquet", None),
        ("train/part-test.parquet", "test"),
    ],
)
def test_split_of(name, split):
    assert split_of(name) == split


def test_files_without_a_split_are_train_only_if_no_other_is():
    assert select_split(["b.parquet", "a.parquet"], "train", "x") == ["a.parquet", "b.parquet"]
    assert select_split(["a.parquet", "train.parquet"], "train", "x") == ["train.parquet"]
    assert parts_missing(["train-00000-of-00002.parquet", "d/test-00001-of-00002.parquet", "x.parquet"]) == 2
