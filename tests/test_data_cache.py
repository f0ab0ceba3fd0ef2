"""From a name to a data set: decoding once, the cache, corrupt images, and where words lead."""

from __future__ import annotations

import dataclasses
import errno
import io
import json
import os
import shutil
import subprocess
import sys
import threading

import numpy as np
import pytest
from PIL import Image

from mmgen import data
from mmgen.data import cache, decoding
from mmgen.data.hub import files_needed
from mmgen.data.image_source import ImageSource
from mmgen.errors import ConfigError, DataError
from mmgen.system import lock

RGB = np.random.default_rng(1).integers(0, 256, (7, 6, 6, 3), dtype=np.uint8)


@pytest.fixture(autouse=True)
def own_places(tmp_path, monkeypatch):
    """No test sees this machine's cache or data, or the network."""
    import huggingface_hub.constants as constants

    monkeypatch.setenv("MMGEN_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("MMGEN_DATA_DIR", raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))


@pytest.fixture
def folder(tmp_path):
    """Seven 6x6 images in two classes: 0..3 in a, 4..6 in b."""
    for i, rgb in enumerate(RGB):
        path = tmp_path / "pictures" / ("a" if i < 4 else "b") / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rgb).save(path)
    return tmp_path / "pictures"


def entries(tmp_path) -> list:
    return [p for p in (tmp_path / "cache" / "data").iterdir() if p.is_dir()]


def in_memory_source(images: list[bytes], labels=None) -> ImageSource:
    return ImageSource("test", lambda i: f"image {i}", len(images), lambda i: images[i], labels, None, "fingerprint")


def grey_png(size=6, value=3, mode="L") -> bytes:
    file = io.BytesIO()
    Image.new(mode, (size, size), value).save(file, "PNG")
    return file.getvalue()


# ---- what comes out


def test_pixels_and_labels_are_those_on_disk(folder):
    dataset = data.load(str(folder))
    np.testing.assert_array_equal(dataset.images, RGB.transpose(0, 3, 1, 2))
    assert dataset.images.dtype == np.uint8 and not dataset.images.flags.writeable
    assert dataset.labels.tolist() == [0, 0, 0, 0, 1, 1, 1] and dataset.labels.dtype == np.int64
    assert (len(dataset), dataset.resolution, dataset.channels, dataset.num_classes) == (7, 6, 3, 2)
    assert dataset.class_counts == [4, 3] and dataset.class_names == ["a", "b"] and dataset.name == str(folder)
    assert dataset.description == "class folders: 7 images, 2 classes, 3x6x6"


def test_chunks_join_in_order(folder, monkeypatch):
    monkeypatch.setattr(decoding, "_CHUNK_BYTES", 1)
    many = [grey_png(2, value) for value in range(100)]
    steps = []
    dataset = cache.prepare(in_memory_source(many), None, None, progress=lambda *step: steps.append(step))
    assert dataset.images[:, 0, 0, 0].tolist() == list(range(100)) and dataset.channels == 1
    assert len(steps) == 7 and steps[-1] == (100, 100)


def test_digits_are_the_embedded_integers_scaled(tmp_path):
    dataset = data.load("digits")
    assert dataset.images.shape == (1797, 1, 8, 8) and dataset.num_classes == 10
    assert dataset.class_counts == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    # the first digit of the UCI file, a zero, as it is printed in scikit-learn's documentation
    top = [[0, 0, 5, 13, 9, 1, 0, 0], [0, 0, 13, 15, 10, 15, 5, 0]]
    np.testing.assert_array_equal(dataset.images[0, 0, :2], np.round(np.array(top) * 255 / 16))
    assert dataset.labels[:10].tolist() == list(range(10))
    assert not (tmp_path / "cache").exists()
    assert data.load("digits", resolution=16, channels=3).images.shape == (1797, 3, 16, 16)
    with pytest.raises(DataError, match="no split 'test'"):
        data.load("digits", split="test")


def test_parquet_agrees_with_pillow(tmp_path):
    import datasets

    features = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(names=["x", "y", "z"])})
    rows = {"img": [Image.fromarray(rgb) for rgb in RGB], "label": [0, 1] * 3 + [0]}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "train.parquet")
    dataset = data.load(str(tmp_path / "train.parquet"))
    np.testing.assert_array_equal(dataset.images, RGB.transpose(0, 3, 1, 2))
    assert dataset.num_classes == 3 and dataset.class_counts == [4, 3, 0]  # z has a name but no image


def test_importing_loads_nothing_heavy():
    code = "import sys, mmgen.data; print([m for m in ('torch', 'datasets', 'numpy', 'PIL') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


# ---- the cache


def test_the_second_time_nothing_is_decoded(folder, monkeypatch):
    first = data.load(str(folder))

    def refuse(*_):
        raise AssertionError("decoded again")

    monkeypatch.setattr(decoding, "open_image", refuse)
    second = data.load(str(folder))
    np.testing.assert_array_equal(first.images, second.images)
    assert second.labels.tolist() == first.labels.tolist() and second.description == first.description
    with pytest.raises(AssertionError):
        data.load(str(folder), resolution=4)  # another entry


@pytest.mark.parametrize("damage", ["cut", "grown", "labels", "meta", "gone"])
def test_a_damaged_entry_is_made_again(damage, folder, tmp_path):
    good = np.array(data.load(str(folder)).images)
    (entry,) = entries(tmp_path)
    images = entry / "images.npy"
    if damage == "cut":
        os.truncate(images, images.stat().st_size - 5)
    elif damage == "grown":
        images.write_bytes(images.read_bytes() + b"x")
    elif damage == "labels":
        np.save(entry / "labels.npy", np.zeros(3, dtype=np.int64))
    elif damage == "meta":
        (entry / "meta.json").write_text("{")
    else:
        images.unlink()
    again = data.load(str(folder))
    np.testing.assert_array_equal(again.images, good)
    assert again.labels.tolist() == [0, 0, 0, 0, 1, 1, 1]


def test_fingerprint_is_of_the_content(folder, tmp_path):
    here = data.load(str(folder)).fingerprint
    shutil.copytree(folder, tmp_path / "copy")
    assert data.load(str(tmp_path / "copy")).fingerprint == here
    Image.fromarray(RGB[0]).save(tmp_path / "copy" / "b" / "4.png")
    assert data.load(str(tmp_path / "copy")).fingerprint != here


def test_a_changed_folder_is_decoded_again(folder):
    data.load(str(folder))
    (folder / "b" / "6.png").unlink()
    assert len(data.load(str(folder))) == 6


def test_full_disk_is_one_sentence_and_leaves_nothing(folder, tmp_path, monkeypatch):
    class FullDisk(io.FileIO):
        def write(self, content):
            if self.tell() + memoryview(content).nbytes > 300:  # the header still fits
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return super().write(content)

    with monkeypatch.context() as patch:
        patch.setattr(cache, "open", FullDisk, raising=False)
        with pytest.raises(DataError, match="No space left on device: make room there.*; or set MMGEN_CACHE"):
            data.load(str(folder))
    assert [p for p in (tmp_path / "cache" / "data").iterdir() if p.suffix != ".lock"] == []
    assert len(data.load(str(folder))) == 7  # and it works once there is room


def test_too_little_room_is_told_before_decoding(folder, monkeypatch):
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(cache.shutil, "disk_usage", lambda _: usage._replace(free=100))
    with pytest.raises(DataError, match="set MMGEN_CACHE to a folder with more room"):
        data.load(str(folder))


def test_images_npy_is_a_plain_file_numpy_reads(folder, tmp_path):
    data.load(str(folder))
    (entry,) = entries(tmp_path)
    np.testing.assert_array_equal(np.load(entry / "images.npy", allow_pickle=False), RGB.transpose(0, 3, 1, 2))
    status = (entry / "images.npy").stat()
    assert status.st_size == 128 + 7 * 3 * 6 * 6


@pytest.mark.parametrize("locks", [True, False])
def test_processes_that_build_the_same_entry_do_not_break_each_other(locks, folder, monkeypatch):
    if not locks:  # a file system without them
        monkeypatch.setattr(lock, "fcntl", None)
    counted = []
    real = decoding.open_image
    monkeypatch.setattr(decoding, "open_image", lambda raw: counted.append(1) or real(raw))
    results, errors = [], []

    def build():
        try:
            results.append(data.load(str(folder)))
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=build) for _ in range(4)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert not errors and len(results) == 4
    for dataset in results:
        np.testing.assert_array_equal(dataset.images, RGB.transpose(0, 3, 1, 2))
    if locks:
        assert len(counted) <= 7 + 1  # one build: one image to settle the size and colour, then all


def test_leftovers_of_killed_processes_go_but_not_those_being_written(folder, tmp_path):
    old, new = (tmp_path / "cache" / "data" / name for name in (".tmp-old", ".tmp-new"))
    for place in (old, new):
        place.mkdir(parents=True)
        (place / "images.npy").write_bytes(b"half")
    for path in (old / "images.npy", old):
        os.utime(path, (1, 1))
    data.load(str(folder))
    assert not old.exists() and new.exists()


# ---- images that do not fit


def test_corrupt_image_stops_by_name(folder):
    whole = (folder / "b" / "5.png").read_bytes()
    (folder / "b" / "5.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"b/5.png cannot be read as an image .*truncated.*--on-corrupt skip"):
        data.load(str(folder))


def test_skipping_keeps_labels_aligned(folder, tmp_path):
    (folder / "a" / "0.png").write_bytes(b"text")
    (folder / "a" / "3.png").write_bytes(b"")
    dataset = data.load(str(folder), on_corrupt="skip")
    kept = [1, 2, 4, 5, 6]
    np.testing.assert_array_equal(dataset.images, RGB[kept].transpose(0, 3, 1, 2))
    assert dataset.labels.tolist() == [0, 0, 1, 1, 1]
    assert "2 that cannot be read left out" in dataset.description and "a/3.png" in dataset.description
    (entry,) = entries(tmp_path)
    assert len(json.loads((entry / "meta.json").read_text())["skipped"]) == 2
    with pytest.raises(DataError, match="a/0.png cannot be read"):  # another policy is another entry
        data.load(str(folder))


@pytest.mark.parametrize("resolution", [None, 6])
def test_all_corrupt(resolution):
    source = in_memory_source([b"text"] * 20)
    with pytest.raises(DataError, match="none of the 20 images can be read"):
        cache.prepare(source, resolution, None, on_corrupt="skip")
    with pytest.raises(DataError, match="none of the 20 images can be read"):
        cache.prepare(source, 6, 3, on_corrupt="skip")


def test_mixed_sizes_need_a_resolution(folder):
    Image.fromarray(RGB[5][:5, :4]).save(folder / "b" / "5.png")
    with pytest.raises(DataError, match="b/5.png is 4x5, but the first image is 6x6: give --resolution"):
        data.load(str(folder))
    assert data.load(str(folder), resolution=6).images.shape == (7, 3, 6, 6)
    Image.fromarray(RGB[0][:5]).save(folder / "a" / "0.png")
    with pytest.raises(DataError, match="a/0.png is 6x5, not square: give --resolution"):
        data.load(str(folder))


def test_channels_follow_the_first_images():
    grey = [grey_png() for _ in range(20)]
    assert cache.prepare(in_memory_source(grey), None, None).channels == 1
    early, late = list(grey), list(grey)
    early[9] = late[18] = grey_png(value=(1, 2, 3), mode="RGB")
    assert cache.decode_in_memory(in_memory_source(early), None, None).channels == 3
    late_source = dataclasses.replace(in_memory_source(late), fingerprint="another")
    with pytest.raises(DataError, match="image 18 is in colour.*--channels 3"):
        cache.prepare(late_source, None, None)
    assert cache.prepare(late_source, None, 3).images[18, :, 0, 0].tolist() == [1, 2, 3]


@pytest.mark.parametrize("options", [{"resolution": 0}, {"channels": 4}, {"on_corrupt": "skipp"}])
def test_impossible_options(options):
    with pytest.raises(ConfigError, match="impossible|did you mean 'skip'"):
        data.load("digits", **options)


# ---- where words lead


def test_words_lead_to_the_data_folder(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("MMGEN_DATA_DIR", str(tmp_path / "sets"))
    shutil.copytree(folder, tmp_path / "sets" / "cifar10")
    shutil.copytree(folder, tmp_path / "sets" / "someone" / "flowers")
    for name in ("cifar10", "uoft-cs/cifar10", "someone/flowers"):
        assert len(data.load(name)) == 7
    with pytest.raises(DataError, match="did you mean 'cifar10'.*digits.*someone") as told:
        data.load("cifar")
    assert str(told.value).count("cifar10") == 2  # proposed, and once in the list
    with pytest.raises(DataError, match="no file or folder ./cifar10"):
        data.load("./cifar10")


def hub_cache(tmp_path, files: dict[str, bytes]):
    """The hub's cache as it is after a download: a snapshot of links into blobs."""
    repo = tmp_path / "hub" / "datasets--someone--flowers"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text("0" * 40)
    (repo / "blobs").mkdir()
    for i, (name, content) in enumerate(files.items()):
        (repo / "blobs" / f"blob{i}").write_bytes(content)
        link = repo / "snapshots" / ("0" * 40) / name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(repo / "blobs" / f"blob{i}", link.parent))


def test_the_hub_cache_is_enough_offline(tmp_path):
    import datasets

    table = datasets.Dataset.from_dict(
        {"image": [Image.fromarray(rgb) for rgb in RGB]}, features=datasets.Features({"image": datasets.Image()})
    )
    table.to_parquet(tmp_path / "x.parquet")
    content = (tmp_path / "x.parquet").read_bytes()
    hub_cache(tmp_path, {"data/train-00000-of-00001.parquet": content, "data/test-00000-of-00002.parquet": content})
    np.testing.assert_array_equal(data.load("someone/flowers").images, RGB.transpose(0, 3, 1, 2))
    with pytest.raises(DataError, match="only a part of it in .*hub.*HF_HUB_OFFLINE is set.*hf download"):
        data.load("someone/flowers", split="test")  # one of its two files is not there


def test_a_hub_id_that_is_nowhere_says_where_it_looked(tmp_path, monkeypatch):
    monkeypatch.setenv("MMGEN_DATA_DIR", str(tmp_path / "sets"))
    with pytest.raises(DataError) as caught:
        data.load("someone/nothing")
    message = str(caught.value)
    for place in ("sets/someone/nothing", "sets/nothing", str(tmp_path / "hub"), "HF_HUB_OFFLINE is set", "give DIR"):
        assert place in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("error", "says"), [("GatedRepoError", "accept the terms at"), ("RepositoryNotFoundError", "knows no data set")]
)
def test_what_the_hub_answers_is_told(error, says, monkeypatch):
    import huggingface_hub

    raised = getattr(huggingface_hub.errors, error)
    answer = raised.__new__(raised)  # its constructor wants a response, of another library in every version
    Exception.__init__(answer, "401 Client Error")

    def refuse(*_, **__):
        raise answer

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", refuse)
    with pytest.raises(DataError, match=says):
        data.load("someone/flowers")


def test_only_what_is_needed_is_downloaded(tmp_path, monkeypatch, folder):
    import huggingface_hub

    names = ["README.md", "d/train-00000-of-00001.parquet", "d/test-00000-of-00001.parquet"]
    assert files_needed(names, "test", "x/y") == ["d/test-00000-of-00001.parquet"]
    assert files_needed(["logo.png", "a/[1].png", "b/2.jpg"], "train", "x/y") == ["a/[1].png", "b/2.jpg"]
    with pytest.raises(DataError, match="neither parquet files nor folders of images.*hf download x/y"):
        files_needed(["train-0000.tar.gz", "logo.png"], "train", "x/y")

    class Info:
        sha = "1" * 40
        siblings = [type("File", (), {"rfilename": name}) for name in ("a/[1].png", "b/2.png", "README.md")]

    asked = {}

    def download(repo, **options):
        if options.get("local_files_only"):
            raise FileNotFoundError
        asked.update(options, repo=repo)
        return str(folder)

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda *_, **__: Info)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert len(data.load("someone/flowers")) == 7
    assert asked["allow_patterns"] == ["a/[[]1].png", "b/2.png"] and asked["revision"] == Info.sha
    assert asked["repo"] == "someone/flowers" and asked["repo_type"] == "dataset"
