"""`mmgen sample`: the same images as `model.sample`, files whole or not at all, interrupted runs continued."""

# ruff: noqa: F811 (fixtures are imported)

from __future__ import annotations

import json
import os
from pathlib import Path

import forks
import numpy as np
import pytest
from PIL import Image
from sampled import colour_model, model, pixels, record, run  # noqa: F401
from tiny_model import make_model

import mmgen
from mmgen.errors import ConfigError
from mmgen.sampling import drawing, folder as sample_folder
from mmgen.sampling import missing as sample_drawing


def same(a: np.ndarray, b: np.ndarray) -> bool:
    """Equal but for the last bit of rounding: batches of other sizes take other paths through the same sums."""
    return a.shape == b.shape and np.abs(a.astype(int) - b.astype(int)).max() <= 1 and (a != b).mean() < 0.01


def test_png_folder(model, tmp_path):
    out = tmp_path / "out"
    table = run(model, "--num", 20, "--out", out, "--seed", 3, "--steps", 2)
    assert "20" in table and str(out) in table
    expected = mmgen.load(model).sample(20, steps=2, seed=3).images
    assert np.array_equal(pixels(out), expected[:, 0].numpy())
    assert sorted(p.name for p in out.glob("*.png")) == [f"{i:06d}.png" for i in range(20)]
    found = record(out / "samples.json")
    wanted = {
        "complete": True,
        "num": 20,
        "steps": 2,
        "nfe": 2,
        "seed": 3,
        "guidance": 1.0,
        "data": "digits",
        "kind": "imm",
    }
    assert wanted.items() <= found.items() and found["model"] == str(model) and len(found["times"]) == 3
    assert {p.suffix for p in out.iterdir()} == {".png", ".json"}  # nothing temporary


def test_labels_are_readable_as_a_data_set(model, tmp_path):
    run(model, "--num", 25, "--out", tmp_path / "out", "--classes", "balanced")
    listed = record(tmp_path / "out" / "dataset.json")["labels"]
    assert listed == [[f"{i:06d}.png", i % 10] for i in range(25)]


def test_colour_and_unconditional(colour_model, tmp_path):
    run(colour_model, "--num", 5, "--out", tmp_path / "out")
    assert np.array_equal(pixels(tmp_path / "out"), mmgen.load(colour_model).sample(5).images.permute(0, 2, 3, 1).numpy())
    assert not (tmp_path / "out" / "dataset.json").exists() and record(tmp_path / "out" / "samples.json")["classes"] is None


def test_batch_size_has_no_influence(model, tmp_path):
    run(model, "--num", 33, "--out", tmp_path / "a", "--batch-size", 33, "--steps", 4, "--sampler", "restart")
    run(model, "--num", 33, "--out", tmp_path / "b", "--batch-size", 5, "--steps", 4, "--sampler", "restart")
    assert same(pixels(tmp_path / "a"), pixels(tmp_path / "b"))


def test_only_missing_images_are_drawn(model, tmp_path):
    out = tmp_path / "out"
    command = (model, "--num", 12, "--out", out, "--batch-size", 4)
    run(*command)
    before = {p.name: (p.stat().st_mtime_ns, p.stat().st_ino) for p in out.iterdir()}
    content = pixels(out)
    run(*command)
    assert {p.name: (p.stat().st_mtime_ns, p.stat().st_ino) for p in out.glob("*.png")}.items() <= before.items()
    assert before["samples.json"] == ((out / "samples.json").stat().st_mtime_ns, (out / "samples.json").stat().st_ino)
    for i in (0, 7, 8):
        (out / f"{i:06d}.png").unlink()
    (out / ".tmp-killed.png").write_bytes(b"half a file")
    run(*command)
    changed = {p.name for p in out.glob("0*.png") if (p.stat().st_mtime_ns, p.stat().st_ino) != before[p.name]}
    assert changed == {"000000.png", "000007.png", "000008.png"}
    assert same(pixels(out), content) and not (out / ".tmp-killed.png").exists()


def test_what_a_power_cut_damaged_is_drawn_anew(model, tmp_path):
    out = tmp_path / "out"
    run(model, "--num", 6, "--out", out)
    content = pixels(out)
    stamps = {p.name: p.stat().st_mtime_ns for p in out.glob("*.png")}
    made = record(out / "samples.json")
    (out / "samples.json").write_text(json.dumps({**made, "complete": False}))
    (out / "000001.png").write_bytes(b"")
    whole = (out / "000004.png").read_bytes()
    (out / "000004.png").write_bytes(whole[:40] + bytes(len(whole) - 40))
    run(model, "--num", 6, "--out", out)
    changed = {p.name for p in out.glob("*.png") if p.stat().st_mtime_ns != stamps[p.name]}
    assert changed == {"000001.png", "000004.png"} and same(pixels(out), content)
    assert record(out / "samples.json") == made


def test_complete_means_on_the_disk(model, tmp_path, monkeypatch):
    """Each image, also those of a run that was interrupted, and the folder's list of them; not the disks of the whole machine."""
    seen, out, flush = [], tmp_path / "out", sample_folder.flush_to_disk

    def watched(path):
        seen.append((Path(path).name, record(out / "samples.json")["complete"]))
        flush(path)

    monkeypatch.setattr(os, "sync", None)
    monkeypatch.setattr(sample_folder, "flush_to_disk", watched)
    for num in (6, 6, 8):
        run(model, "--num", num, "--out", out, "--batch-size", 4)
    images = [f"{i:06d}.png" for i in range(8)]
    assert sorted(seen) == sorted((name, False) for name in [*images[:6], "out", *images, "out"])  # nothing the second time


def test_more_images_continue(model, tmp_path):
    run(model, "--num", 4, "--out", tmp_path / "out")
    old = (tmp_path / "out" / "000003.png").stat().st_mtime_ns
    run(model, "--num", 9, "--out", tmp_path / "out", "--batch-size", 2)
    assert (tmp_path / "out" / "000003.png").stat().st_mtime_ns == old
    assert same(pixels(tmp_path / "out"), mmgen.load(model).sample(9).images[:, 0].numpy())
    assert record(tmp_path / "out" / "samples.json")["num"] == 9
    assert len(record(tmp_path / "out" / "dataset.json")["labels"]) == 9
    with pytest.raises(ConfigError, match="--num is 4, but it holds 9"):
        run(model, "--num", 4, "--out", tmp_path / "out")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("--seed", 1), "seed would be 1, not 0"),
        (("--steps", 4), "steps would be 4, not 2"),
        (("--guidance", 2), "guidance would be 2.0, not 1.0"),
        (("--classes", "3"), "classes would be 3, not random"),
        (("--sampler", "restart"), "sampler would be restart"),
        (("--grid", "uniform"), "grid would be uniform"),
        (("--eta", "2"), "grid would be eta"),
    ],
)
def test_samples_of_other_settings_are_refused(model, tmp_path, change, said):
    for out in (tmp_path / "out", tmp_path / "out.npz"):
        run(model, "--num", 3, "--steps", 2, "--out", out)
        with pytest.raises(ConfigError, match=said):
            run(model, "--num", 3, "--steps", 2, "--out", out, *change)
        run(model, "--num", 2, "--steps", 2, "--out", out, *change, "--overwrite")
    assert len(pixels(tmp_path / "out")) == 2 and len(np.load(tmp_path / "out.npz")["arr_0"]) == 2


def test_same_times_under_another_name_are_the_same_settings(model, tmp_path):
    run(model, "--num", 2, "--steps", 2, "--out", tmp_path / "out")
    run(model, "--num", 3, "--steps", 2, "--out", tmp_path / "out", "--eta", "1.4")
    assert len(pixels(tmp_path / "out")) == 3


def test_another_model_is_refused(model, tmp_path):
    other = make_model(tmp_path / "other.safetensors", channels=1, num_classes=10)
    run(model, "--num", 2, "--out", tmp_path / "out")
    with pytest.raises(ConfigError, match="the model is .*other.safetensors"):
        run(other, "--num", 2, "--out", tmp_path / "out")


def test_foreign_pictures_are_neither_mixed_nor_deleted(model, tmp_path):
    (tmp_path / "photo.jpg").write_bytes(b"dear")
    for more in ((), ("--overwrite",)):
        with pytest.raises(ConfigError, match="photo.jpg"):
            run(model, "--num", 2, "--out", tmp_path, *more)
    assert [p.name for p in tmp_path.iterdir()] == ["photo.jpg"]
    (tmp_path / "photo.jpg").rename(tmp_path / "notes.txt")
    run(model, "--num", 2, "--out", tmp_path)
    assert (tmp_path / "notes.txt").read_bytes() == b"dear"


def test_npz(model, colour_model, tmp_path):
    run(model, "--num", 10, "--out", tmp_path / "a.npz", "--classes", "balanced", "--batch-size", 4)
    with np.load(tmp_path / "a.npz", allow_pickle=False) as found:
        images, labels = found["arr_0"], found["arr_1"]
    assert images.dtype == np.uint8 and labels.dtype == np.int64 and labels.tolist() == list(range(10))
    expected = mmgen.load(model).sample(10, classes="balanced", batch_size=4).images
    assert np.array_equal(images, expected.permute(0, 2, 3, 1).numpy())
    assert {p.name for p in tmp_path.iterdir()} == {"a.npz", "a.npz.json"}
    run(colour_model, "--num", 3, "--format", "npz", "--out", tmp_path / "folder")
    with np.load(tmp_path / "folder" / "samples.npz") as found:
        assert found.files == ["arr_0"] and found["arr_0"].shape == (3, 8, 8, 3)


def test_npz_continues_from_parts_and_grows(model, tmp_path, monkeypatch):
    drawn = []

    def failing(model, chosen, indices, *more, real=sample_drawing.draw):
        if len(drawn) == 3:
            raise KeyboardInterrupt
        drawn.append(list(indices))
        return real(model, chosen, indices, *more)

    file = tmp_path / "a.npz"
    monkeypatch.setattr(sample_drawing, "draw", failing)
    with pytest.raises(SystemExit) as stop:
        run(model, "--num", 20, "--out", file, "--batch-size", 4)
    assert stop.value.code == 130
    assert not file.exists() and not record(tmp_path / "a.npz.json")["complete"]
    assert len(list((tmp_path / "a.npz.parts").iterdir())) == 3
    drawn.clear()
    run(model, "--num", 20, "--out", file, "--batch-size", 8)
    assert drawn == [list(range(12, 20))]
    drawn.clear()
    run(model, "--num", 20, "--out", file)
    assert drawn == []
    run(model, "--num", 23, "--out", file)
    assert drawn == [[20, 21, 22]]
    assert same(np.load(file)["arr_0"][..., 0], mmgen.load(model).sample(23).images[:, 0].numpy())
    assert {p.name for p in tmp_path.iterdir()} == {"a.npz", "a.npz.json"} and record(tmp_path / "a.npz.json")["num"] == 23


def test_a_file_without_record_is_not_overwritten_unasked(model, tmp_path):
    (tmp_path / "a.npz").write_bytes(b"results of a year")
    with pytest.raises(ConfigError, match="without a record"):
        run(model, "--num", 2, "--out", tmp_path / "a.npz")
    run(model, "--num", 2, "--out", tmp_path / "a.npz", "--overwrite")
    assert len(np.load(tmp_path / "a.npz")["arr_1"]) == 2


def test_grid(model, tmp_path):
    run(model, "--num", 30, "--out", tmp_path / "g.png", "--classes", "balanced")
    picture = Image.open(tmp_path / "g.png")
    assert picture.width > picture.height and picture.width >= 10 * 64  # one class per column, enlarged
    assert {p.name for p in tmp_path.iterdir()} == {"g.png", "g.png.json"}
    stamp = (tmp_path / "g.png").stat().st_mtime_ns
    run(model, "--num", 30, "--out", tmp_path / "g.png", "--classes", "balanced")
    assert (tmp_path / "g.png").stat().st_mtime_ns == stamp
    run(model, "--num", 40, "--out", tmp_path / "g.png", "--classes", "balanced")
    assert Image.open(tmp_path / "g.png").height > picture.height


def test_several_steps(model, tmp_path):
    run(model, "--num", 3, "--steps", "1,2,1", "--out", tmp_path / "out", "--guidance", 1.5)
    loaded = mmgen.load(model)
    for steps in (1, 2):
        found = tmp_path / "out" / f"steps-{steps}"
        expected = loaded.sample(3, steps=steps, guidance=1.5).images
        assert np.array_equal(pixels(found), expected[:, 0].numpy()) and record(found / "samples.json")["nfe"] == 2 * steps
    run(model, "--num", 3, "--steps", "1,2", "--out", tmp_path / "a.npz")
    assert (tmp_path / "a-steps-1.npz").is_file() and (tmp_path / "a-steps-2.npz.json").is_file()
    with pytest.raises(ConfigError, match="steps-1"):
        run(model, "--num", 3, "--out", tmp_path / "out")


@pytest.mark.parametrize(
    ("classes", "expected"),
    [("3,5", [3, 5, 3, 5]), ("nine,Zero, 4", [9, 0, 4, 9]), ("7", [7] * 4), ("balanced", [0, 1, 2, 3])],
)
def test_classes(model, tmp_path, classes, expected):
    run(model, "--num", 4, "--out", tmp_path / "a.npz", "--classes", classes)
    assert np.load(tmp_path / "a.npz")["arr_1"].tolist() == expected


def test_random_classes_are_as_frequent_as_in_the_data(tmp_path):
    path = make_model(tmp_path / "m.safetensors", channels=1, num_classes=3, class_counts=[0, 300, 100])
    run(path, "--num", 200, "--out", tmp_path / "a.npz")
    assert np.bincount(np.load(tmp_path / "a.npz")["arr_1"], minlength=3)[1:] == pytest.approx([150, 50], abs=20)


def test_processes_share_the_work(model, tmp_path):
    """Two members of a process_group, one after the other: the second must not redo what the first was to do."""
    loaded, chosen = mmgen.load(model), mmgen.sampling.drawing.plan(mmgen.load(model).config, mmgen.sampling.drawing.SampleSettings())
    shares = []
    for index in (0, 1):
        process_group = sample_drawing.ProcessGroup(index, 2)
        shares += [i for indices, _ in sample_drawing.draw_missing(loaded, chosen, range(3, 20), 20, process_group) for i in indices]
    assert sorted(shares) == list(range(3, 20))


@pytest.mark.slow
def test_progress_lines(model, tmp_path):
    done = forks.run("-m", "mmgen", "sample", model, "--num", "8", "--out", tmp_path / "out", "--device", "cpu")
    assert done.returncode == 0, done.stderr
    line = json.loads(done.stderr.splitlines()[-1])
    assert line["images"] == line["of"] == 8 and line["images_per_second"] > 0


def test_compiled_samples_are_the_same_and_compiled_once(model, tmp_path, monkeypatch):
    """Also the last batch, which is smaller. With a backend that only counts."""
    from torch._dynamo.testing import CompileCounter

    counter, original = CompileCounter(), drawing.compile_network
    monkeypatch.setattr(drawing, "compile_network", lambda network: original(network, counter))
    run(model, "--num", 5, "--out", tmp_path / "out", "--batch-size", 2, "--compile")
    assert np.array_equal(pixels(tmp_path / "out"), mmgen.load(model).sample(5, batch_size=2).images[:, 0].numpy())
    assert counter.frame_count == 1
    assert "compile" not in record(tmp_path / "out" / "samples.json")  # it decides nothing
    with pytest.raises(ConfigError, match="compile must be True or False, not 'no'"):
        mmgen.load(model).sample(1, compile="no")
