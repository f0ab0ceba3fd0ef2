"""Tars, metadata files, captions, subsets and links: what each yields, and what is said of what is not read."""

from __future__ import annotations

import os
import shutil

import numpy as np
import pytest
from pictures import COLOURS, colours, folder_of, parquet_of, png, tar_of, zip_of

from mmgen import data
from mmgen.data.captions import with_captions
from mmgen.data.hub import files_needed
from mmgen.data.sources import open_source
from mmgen.errors import DataError

pytestmark = pytest.mark.usefixtures("own_cache")
ROWS = [f'{{"file_name": "{i}.png", "label": "{name}", "text": "a {name} {i}"}}' for i, name in enumerate(("dog", "cat", "dog"))]
IMAGES = {f"{i}.png": png(i) for i in range(3)}


def texts(source) -> list[list[str]]:
    return source.captions().to_pylist()


# Tars


def sample(i: int, **parts) -> dict[str, object]:
    return {f"{i:05d}.{ending}": content for ending, content in {"jpg": png(i, "PNG"), **parts}.items()}


def test_webdataset(tmp_path):
    tar_of(tmp_path / "x-train-0000.tar", {**sample(0, cls="7", txt="red"), **sample(1, cls="3", txt="green")})
    tar_of(tmp_path / "x-train-0001.tar", sample(2, cls="0", txt="blue"))
    tar_of(tmp_path / "x-val-0000.tar", sample(3, cls="1", txt="grey"))
    source = open_source(tmp_path)
    assert colours(source) == COLOURS[:3] and source.labels.tolist() == [7, 3, 0]
    assert texts(source) == [["red"], ["green"], ["blue"]]
    assert source.names(2) == "00002.jpg of x-train-0001.tar" and "split train" in source.description
    assert [colours(source)[i] for i in (2, 0, 1)] == [COLOURS[i] for i in (2, 0, 1)]  # any image at any time
    assert colours(open_source(tmp_path, split="val")) == [COLOURS[3]]
    assert colours(open_source(tmp_path / "x-val-0000.tar")) == [COLOURS[3]]


def test_samples_of_the_same_name_in_two_tars(tmp_path):
    for i in range(2):
        tar_of(tmp_path / f"{i:05d}.tar", {"0.png": png(i), "0.cls": str(i)})
    source = open_source(tmp_path)
    assert colours(source) == COLOURS[:2] and source.labels.tolist() == [0, 1]


def test_img2dataset(tmp_path):
    """The tars are the images; the tables beside them hold addresses."""
    tar_of(tmp_path / "00000.tar", {**sample(0, json={"caption": "red", "url": "x"}), **sample(1, json={"caption": "green"})})
    parquet_of(tmp_path / "wrong" / "00000.parquet")
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"url": ["x"], "caption": ["red"]}), tmp_path / "00000.parquet")
    shutil.rmtree(tmp_path / "wrong")
    source = open_source(tmp_path)
    assert colours(source) == COLOURS[:2] and texts(source) == [["red"], ["green"]] and source.labels is None
    assert open_source(tmp_path, caption_column="url").captions().to_pylist() == [["x"], []]


def test_class_folders_within_a_tar(tmp_path):
    source = open_source(tar_of(tmp_path / "x.tar", {"pets/dog/0.png": png(0), "pets/cat/1.png": png(1)}))
    assert source.class_names == ["cat", "dog"] and source.labels.tolist() == [1, 0]


def test_a_sample_with_two_images(tmp_path):
    place = tar_of(tmp_path / "x.tar", {"0.jpg": png(0), "0.mask.png": png(3), "1.jpg": png(1), "1.mask.png": png(4)})
    assert colours(open_source(place)) == COLOURS[:2]
    assert colours(open_source(place, image_column="mask.png")) == COLOURS[3:5]
    with pytest.raises(DataError, match="images called jpg, mask.png: choose with --image-column"):
        open_source(place, image_column="png")


def test_incomplete_samples_are_named(tmp_path):
    place = tar_of(tmp_path / "x.tar", {**sample(0, cls="1"), **sample(1)})
    with pytest.raises(DataError, match="1 of 2 images have no label .the first is 00001.jpg of x.tar"):
        open_source(place)


@pytest.mark.parametrize("damage", ["cut", "garbage", "two of one name"])
def test_damaged_tars(damage, tmp_path):
    place = tar_of(tmp_path / "x.tar", sample(0))
    if damage == "cut":
        place.write_bytes(place.read_bytes()[:700])
        with pytest.raises(DataError, match="cut short|not a whole tar"):
            data.load(str(place))
    elif damage == "garbage":
        place.write_bytes(b"x" * 5000)
        with pytest.raises(DataError, match="not a whole tar archive.*unpack it"):
            open_source(place)
    else:
        shutil.copy(place, tmp_path / "y.tar")
        import tarfile

        with tarfile.open(place, "a") as archive:
            archive.add(tmp_path / "y.tar", "00000.jpg")
        with pytest.raises(DataError, match="holds two files '00000.jpg'"):
            open_source(place)


# Metadata


@pytest.mark.parametrize("kind", ["folder", "zip"])
@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet"])
def test_metadata(suffix, kind, tmp_path):
    content = "\n".join(ROWS)
    if suffix == "csv":
        content = "file_name,label,text\n0.png,dog,a dog 0\n1.png,cat,a cat 1\n2.png,dog,a dog 2\n"
    elif suffix == "parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        rows = {"file_name": list(IMAGES), "label": ["dog", "cat", "dog"], "text": ["a dog 0", "a cat 1", "a dog 2"]}
        pq.write_table(pa.table(rows), tmp_path / "rows")
        content = (tmp_path / "rows").read_bytes()
    files = {f"train/{name}": what for name, what in {**IMAGES, f"metadata.{suffix}": content}.items()}
    place = folder_of(tmp_path / "d", files) if kind == "folder" else zip_of(tmp_path / "d.zip", files)
    source = open_source(place)
    assert source.labels.tolist() == [1, 0, 1] and source.class_names == ["cat", "dog"]
    assert texts(source) == [["a dog 0"], ["a cat 1"], ["a dog 2"]] and "with captions" in source.description
    with pytest.raises(DataError, match="no column 'colour'.*Valid: label, text"):
        open_source(place, label_column="colour")


def test_metadata_that_do_not_match(tmp_path):
    stranger = '{"file_name": "9.png", "label": "owl", "text": "x"}'
    folder_of(tmp_path, {**IMAGES, "metadata.jsonl": "\n".join([*ROWS[:2], stranger])})
    with pytest.raises(DataError, match="1 of 3 images have no label .the first is .*2.png"):
        open_source(tmp_path)
    folder_of(tmp_path, {"metadata.jsonl": ROWS[0].replace("dog", "owl", 1) + "\n" + "\n".join(ROWS)})
    with pytest.raises(DataError, match="gives .*0.png two labels, 'owl' and 'dog'"):
        open_source(tmp_path)
    folder_of(tmp_path, {"metadata.jsonl": '{"name": "0.png"}\n'})
    with pytest.raises(DataError, match="no column file_name: it has name"):
        open_source(tmp_path)
    folder_of(tmp_path, {"metadata.jsonl": "{nonsense"})
    with pytest.raises(DataError, match="cannot read .*metadata.jsonl"):
        open_source(tmp_path)


def test_metadata_lead_nowhere_else(tmp_path):
    """Names are looked up among the images that are there."""
    (tmp_path / "secret.png").write_bytes(png(5))
    folder_of(tmp_path / "d", {"0.png": png(0), "metadata.jsonl": '{"file_name": "../secret.png", "text": "x"}'})
    source = open_source(tmp_path / "d")
    assert colours(source) == [COLOURS[0]] and texts(source) == [[]]


# Captions


def test_captions_in_a_table(tmp_path):
    words = [["one", " two "], ["three"], ["four"], ["five"], ["six"], ["seven"]]
    source = open_source(parquet_of(tmp_path / "x.parquet", sentences=words, other=[f"t{i}" for i in range(6)], label=[0, 1] * 3))
    assert texts(source)[:2] == [["one", "two"], ["three"]] and "captions in column sentences" in source.description
    assert texts(open_source(tmp_path / "x.parquet", caption_column="other"))[0] == ["t0"]
    with pytest.raises(DataError, match="--caption-column: column 'label' of .* is int64, not captions: Valid|did you mean"):
        open_source(tmp_path / "x.parquet", caption_column="label")


@pytest.mark.parametrize("ending", ["txt", "caption"])
def test_captions_beside_images(ending, tmp_path):
    folder_of(tmp_path, {"a/0.png": png(0), "b/1.png": png(1), f"a/0.{ending}": "\ufeffred\n", f"b/1.{ending}": "green"})
    source = open_source(tmp_path)
    assert texts(source) == [["red"], ["green"]] and source.class_names == ["a", "b"] and "left out" not in source.description


def test_coco(tmp_path):
    images = [{"id": 7, "file_name": "1.png"}, {"id": 9, "file_name": "0.png"}]
    notes = [{"image_id": 7, "caption": "green"}, {"image_id": 9, "caption": "red"}, {"image_id": 7, "caption": "grass"}]
    folder_of(tmp_path, {"val/0.png": png(0), "val/1.png": png(1), "c.json": {"images": images, "annotations": notes}})
    source = open_source(tmp_path / "val", captions=str(tmp_path / "c.json"))
    assert texts(source) == [["red"], ["green", "grass"]]
    (tmp_path / "c.json").write_text("[]")
    with pytest.raises(DataError, match="c.json is not COCO's captions"):
        texts(open_source(tmp_path / "val", captions=str(tmp_path / "c.json")))


def test_a_file_of_captions(tmp_path):
    folder_of(tmp_path / "i", IMAGES)
    (tmp_path / "c.csv").write_text("file_name,prompt\n1.png,b\n0.png,a\n2.png,c\n")
    assert texts(open_source(tmp_path / "i", captions=str(tmp_path / "c.csv"))) == [["a"], ["b"], ["c"]]
    with pytest.raises(DataError, match="only COCO's .json, and .jsonl"):
        open_source(tmp_path / "i", captions="c.doc")


def test_missing_captions_are_named_and_stop(tmp_path):
    place = folder_of(tmp_path / "d", {**IMAGES, "0.txt": "red", "1.txt": " \n", "2.txt": "blue"})
    with pytest.raises(DataError, match="1 of 3 images have no caption.*the first is .*1.png.*--on-corrupt skip"):
        data.load(str(place), with_captions=True)
    assert len(data.load(str(place))) == 3  # nobody asks for captions
    some = data.load(str(place), with_captions=True, on_corrupt="skip")
    assert some.captions.to_pylist() == [["red"], ["blue"]] and len(some) == 2 and "1 that cannot be read" in some.description
    again = data.load(str(place), with_captions=True, on_corrupt="skip")  # from the cache
    assert again.captions.to_pylist() == [["red"], ["blue"]] and again.fingerprint == some.fingerprint
    (place / "0.txt").write_text("rot")
    changed = data.load(str(place), with_captions=True, on_corrupt="skip")
    assert changed.captions.to_pylist()[0] == ["rot"] and changed.fingerprint != some.fingerprint


def test_no_captions_at_all(tmp_path):
    with pytest.raises(DataError, match="it has no captions; name their column with --caption-column"):
        with_captions(open_source(folder_of(tmp_path, IMAGES)), "stop")


# Subsets


README = """---
configs:
- config_name: small
  data_files:
  - split: train
    path: data/small-*.parquet
  - split: test
    path: [data/t-small.parquet]
- config_name: large
  default: {default}
  data_files: "data/large/**"
---
# Pictures
"""


def test_subsets_by_readme_and_by_folder(tmp_path):
    parquet_of(tmp_path / "data" / "small-0.parquet", label=[1] * 6)
    parquet_of(tmp_path / "data" / "t-small.parquet", label=[2] * 6)
    parquet_of(tmp_path / "data" / "large" / "train.parquet", label=[3] * 6)
    (tmp_path / "README.md").write_text(README.format(default="true"))
    assert open_source(tmp_path, subset="small").labels.tolist() == [1] * 6
    assert open_source(tmp_path, subset="small", split="test").labels.tolist() == [2] * 6
    assert open_source(tmp_path, subset="large").labels.tolist() == [3] * 6
    with pytest.raises(DataError, match="no subset 'smal': did you mean 'small'"):
        open_source(tmp_path, subset="smal")
    with pytest.raises(DataError, match="no split 'val'"):
        open_source(tmp_path, subset="small", split="val")
    names = [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.parquet")]
    assert files_needed(names, "train", "x/y", "large") == ["data/large/train.parquet"]
    (tmp_path / "README.md").write_text("---\nconfigs: [[\n---\n")  # no YAML: folders alone
    assert open_source(tmp_path, subset="large").labels.tolist() == [3] * 6


def test_what_has_no_subsets_or_revisions_says_so(tmp_path):
    place = parquet_of(tmp_path / "x.parquet")
    with pytest.raises(DataError, match="--subset a: .*no subsets"):
        data.load(str(place), subset="a")
    with pytest.raises(DataError, match="--revision main: .*only the hub has revisions"):
        data.load(str(place), revision="main")
    with pytest.raises(DataError, match="leave --subset out"):
        data.load("digits", subset="a")


# Links and the cache


def test_links_are_followed_where_that_is_asked_for(tmp_path):
    folder_of(tmp_path / "outside", {"1.png": png(1), "deep/2.png": png(2)})
    folder_of(tmp_path / "data", {"a/0.png": png(0)})
    os.symlink(tmp_path / "outside", tmp_path / "data" / "b")
    os.symlink(tmp_path / "data", tmp_path / "data" / "b" / "round")
    source = open_source(tmp_path / "data")
    assert source.length == 1
    assert "1 link that leads out of the folder, or nowhere, not followed (see --follow-links)" in source.description
    source = open_source(tmp_path / "data", follow_links=True)
    assert colours(source) == COLOURS[:3] and source.class_names == ["a", "b"] and "1 link " in source.description  # round
    (tmp_path / "data" / "table.parquet").symlink_to(parquet_of(tmp_path / "x.parquet"))
    assert open_source(tmp_path / "data", follow_links=True).length == 6


@pytest.mark.parametrize("layout", ["folder", "zip", "parquet"])
def test_an_edit_that_changes_neither_size_nor_time_is_seen(layout, tmp_path):
    """Within one tick of the file system's clock, or by a tool that restores times."""
    make = {"folder": lambda i: folder_of(tmp_path / "d", {"a/0.bmp": png(i, "BMP"), "b/1.bmp": png(3, "BMP")}),
            "zip": lambda i: zip_of(tmp_path / "d.zip", {"0.bmp": png(i, "BMP")}),
            "parquet": lambda i: _same_size(tmp_path / "d.parquet", i)}[layout]  # fmt: skip
    seen = []
    for i in (0, 1):
        place = make(i)
        files = sorted(place.rglob("*.bmp")) if place.is_dir() else [place]
        for file in files:
            os.utime(file, ns=(10**18, 10**18))
        size = files[0].stat().st_size
        seen.append((size, tuple(data.load(str(place), channels=3).images[0, :, 0, 0])))
    assert seen[0][0] == seen[1][0], "the edit must not change the size"
    assert seen[0][1] == COLOURS[0] and seen[1][1] == COLOURS[1]


def _same_size(place, i):
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"image": [png(i, "BMP")]}), place, compression="none", use_dictionary=False, write_statistics=False)
    return place


def test_large_files_with_coarse_times_are_looked_into(tmp_path):
    from mmgen.data.image_source import identity

    place, content = tmp_path / "x.bin", np.zeros(1 << 20, np.uint8)
    found = []
    for position in (None, 0, 1 << 19, (1 << 20) - 1):
        content[:] = 0
        if position is not None:
            content[position] = 1
        content.tofile(place)
        for time in (10**18, 10**18 + 1):
            os.utime(place, ns=(time, time))
            found.append(identity([place])[0][-1])
    assert len(set(found[::2])) == 4 and set(found[1::2]) == {""}


@pytest.mark.slow
def test_many_rows_in_flat_memory(tmp_path):
    """A hundredth of ImageNet's rows, whole: `python -m tests.imagenet_rehearsal`."""
    from imagenet_rehearsal import rehearse, write_rows

    write_rows(tmp_path, 12_811, 3)
    length, _, memory = rehearse(tmp_path, tmp_path / "cache")
    assert length == 12_811 and max(memory) - memory[1] < 32 << 20
