"""Full disks, read-only folders, two runs in one, clocks that go back, data that change: each is answered by name."""

import contextlib
import errno
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from test_training import Quiet, tiny
from tiny_model import make_model

import mmgen
from mmgen.system import lock
from mmgen.errors import MmgenError, TrainingError
from mmgen.system.files import remove_leftovers, replacing, replacing_folder
from mmgen.report.images import save_png
from mmgen.system.lock import only_run_in
from mmgen.sampling.file import write_npz
from mmgen.sampling.folder import write_png
from mmgen.sampling.record import Origin
from mmgen.sampling.drawing import SampleSettings
from mmgen.system.tensor_files import save_array, save_tensors, save_torch
from mmgen.models.files import read_config
from mmgen.training import checkpoint
from mmgen.training.scorer import Scorer
from mmgen.training.run_folder import RunFolder
from mmgen.methods import IMM
from mmgen.methods.run import train

needs_locks = pytest.mark.skipif(lock.fcntl is None, reason="this system has no flock")


@contextlib.contextmanager
def files_of_at_most(size: int):
    """The system itself refuses to write more than this to a file."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def everything(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def fails(*_, number=errno.ENOSPC, **__):
    raise OSError(number, os.strerror(number))


# ---- full disks


@pytest.mark.parametrize("write", [
    lambda path: save_tensors({"a": torch.zeros(50_000)}, path),
    lambda path: save_torch({"a": torch.zeros(50_000)}, path),
    lambda path: np.save(path, np.zeros(50_000)),
    lambda path: save_array(path, np.zeros((100, 126))),
    lambda path: path.write_text("x" * 200_000),
])  # fmt: skip
def test_whatever_writes_leaves_the_old_file(write, tmp_path):
    (tmp_path / "a.npy").write_text("old")
    with files_of_at_most(100_000), pytest.raises(MmgenError, match=r"cannot write .*a\.npy: ") as error:
        with replacing(tmp_path / "a.npy") as temporary:
            write(temporary)
    assert "\n" not in str(error.value)
    assert everything(tmp_path) == {"a.npy": b"old"}


@pytest.mark.parametrize("number, words", [
    (errno.ENOSPC, "make room"), (errno.EROFS, "can be written"), (errno.EACCES, "can be written"),
])  # fmt: skip
@pytest.mark.parametrize("call", ["mkstemp", "mkdtemp"])
def test_the_sentence_says_what_to_do(number, words, call, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, call, lambda **_: fails(number=number))
    writer = replacing if call == "mkstemp" else replacing_folder
    with pytest.raises(MmgenError, match=rf"cannot write .*/it: .*{words}"), writer(tmp_path / "it"):
        pass


def test_samples_on_a_full_disk(tmp_path):
    path = make_model(tmp_path / "model.safetensors", channels=1)
    model, origin, settings = mmgen.load(path), Origin.of(path), SampleSettings(steps=1, batch_size=50)
    with files_of_at_most(3000), pytest.raises(MmgenError, match=r"cannot write .*\.npy"):
        write_npz(model, tmp_path / "s.npz", 200, settings, origin)
    assert not (tmp_path / "s.npz").exists() and not list(tmp_path.rglob(".tmp-*"))
    assert write_npz(model, tmp_path / "s.npz", 200, settings, origin).drawn == 200
    with files_of_at_most(3), pytest.raises(MmgenError, match=r"cannot write .*samples\.json"):
        write_png(model, tmp_path / "s", 2, settings, origin)
    assert everything(tmp_path / "s") == {}
    with files_of_at_most(50), pytest.raises(MmgenError, match=r"cannot write .*000000\.png"):
        save_png(tmp_path / "s" / "000000.png", np.zeros((1, 64, 64), np.uint8))
    assert everything(tmp_path / "s") == {}


@pytest.mark.parametrize("to, name", [("mmgen", "out.safetensors"), ("pt", "out.pt")])
def test_a_conversion_on_a_full_disk(to, name, tmp_path):
    import original_files
    from golden import state

    from mmgen.formats.family import ConvertOptions
    from mmgen.formats.convert import convert_file

    path = original_files.write_pt(tmp_path / "in.pt", state("dit_learn_sigma"), wrap="ema", namespace={"num_heads": 4})
    before = everything(tmp_path)
    with files_of_at_most(20_000), pytest.raises(MmgenError, match=f"cannot write .*{name}: File too large"):
        convert_file(path, tmp_path / name, ConvertOptions(type="dit"), to=to)
    after = everything(tmp_path)
    assert after.keys() - before.keys() <= {"out.md"}  # the card, which is whole
    convert_file(path, tmp_path / name, ConvertOptions(type="dit"), to=to)


def test_latents_on_a_full_disk(tmp_path, own_cache):
    pytest.importorskip("diffusers")
    from tiny_vae import write_images, write_vae

    from mmgen.data.encoding import EncodingSettings, encode_source
    from mmgen.data.resolve import resolve
    from mmgen.encoders.vae import load_vae

    source = resolve(str(write_images(tmp_path / "images", per_class=30)))
    vae, out = load_vae(write_vae(tmp_path / "vae"), "cpu"), tmp_path / "latents"
    with files_of_at_most(30_000), pytest.raises(MmgenError, match=r"cannot write .*000000\.npy"):
        encode_source(source, vae, out, EncodingSettings(), name="images")
    assert set(everything(out)) == {"latents-unfinished.json", "shards/000000.sha256"}
    assert encode_source(source, vae, out, EncodingSettings(), name="images")["number"] == 90


def test_a_full_disk_while_training_leaves_the_last_checkpoint(tmp_path, monkeypatch):
    original, calls = checkpoint.save_tensors, []

    def runs_full(tensors, path, metadata=None):
        calls.append(path)
        if len(calls) > 5:  # four files a checkpoint: in the middle of the second
            Path(path).write_bytes(b"half")
            fails()
        original(tensors, path, metadata)

    monkeypatch.setattr(checkpoint, "save_tensors", runs_full)
    with pytest.raises(MmgenError, match=r"cannot write .*000000000064: No space left on device: make room there, then run the same "
                       r"command again \(stopped at 64 images: it goes on from .*000000000032\)$"):
        train(IMM, tiny(), tmp_path / "run", Quiet(), device="cpu")
    monkeypatch.undo()
    assert [p.name for p in (tmp_path / "run/checkpoints").iterdir()] == [f"{32:012d}"]
    AcceleratorState._reset_state(reset_partial_state=True)
    reporter = Quiet()
    assert train(IMM, tiny(**{"train.max_images": 64}), tmp_path / "run", reporter, device="cpu").finished
    assert any("resuming" in note and f"{32:012d}" in note for note in reporter.notes)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["model-best.safetensors", "results.json", "curves.png", "samples.png", "previews", "log.jsonl", "snapshots"])
def test_what_nothing_is_resumed_from_ends_no_training(name, tmp_path, monkeypatch):
    """Said once, however often it cannot be written."""
    plain = tempfile.mkstemp

    def full(prefix="", dir=None, **more):
        return fails() if prefix == f".tmp-{name}-" or Path(dir).name == name else plain(prefix=prefix, dir=dir, **more)

    monkeypatch.setattr(tempfile, "mkstemp", full)
    if name == "log.jsonl":
        monkeypatch.setattr(RunFolder, "log", fails)
        monkeypatch.setattr(tempfile, "mkstemp", plain)
    config = tiny(**{"train.max_images": 128, "run.eval_num": 16, "run.eval_every": 32, "run.preview_every": 32,
                     "train.ema_lengths": [0.05, 0.1], "run.snapshot_every": 32})  # fmt: skip
    reporter = Quiet()
    outcome = train(IMM, config, tmp_path / "run", reporter, device="cpu")
    assert outcome.finished and outcome.results["values"]
    (note,) = [note for note in reporter.notes if "cannot be written" in note]
    assert note == f"{name} cannot be written (No space left on device): training goes on without"
    there = everything(tmp_path / "run")
    assert f"checkpoints/{128:012d}/state.json" in there and "model.safetensors" in there and not any(name in file for file in there if name != "log.jsonl")


def test_the_next_best_model_is_kept_where_the_best_was_lost(tmp_path, monkeypatch):
    """A figure whose model could not be written is none to beat."""
    values, plain, calls = iter([0.3, 0.1, 0.2, 0.25]), tempfile.mkstemp, []

    def full(prefix="", dir=None, **more):
        calls.append(prefix)
        return fails() if calls.count(".tmp-model-best.safetensors-") == 2 and "best" in prefix else plain(prefix=prefix, dir=dir, **more)

    monkeypatch.setattr(tempfile, "mkstemp", full)
    monkeypatch.setattr(Scorer, "measure", lambda self, model, steps, *_: dict.fromkeys(steps, next(values)))
    config = tiny(**{"train.max_images": 128, "run.eval_num": 16, "run.eval_every": 32})
    assert train(IMM, config, tmp_path / "run", Quiet(), device="cpu").finished
    figures = read_config(tmp_path / "run/model-best.safetensors").training["figures"]
    assert calls.count(".tmp-model-best.safetensors-") == 3 and set(next(iter(figures.values())).values()) == {0.2}


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_the_log_on_a_full_disk(tmp_path):
    (tmp_path / "log.jsonl").symlink_to("/dev/full")
    with pytest.raises(MmgenError, match=r"cannot write .*log\.jsonl: No space left on device: make room"):
        RunFolder(tmp_path).log({"images": 16})


def test_arrays_are_those_of_numpy(tmp_path):
    """Of sizes about that of a buffer, of which numpy.save may lose the rest without a word."""
    for array in (np.arange(12.0).reshape(3, 4).T, np.zeros((0, 3), np.int64), np.ones((5, 1, 8, 8), np.float16)[::2]):
        np.save(tmp_path / "theirs.npy", np.ascontiguousarray(array))
        save_array(tmp_path / "ours.npy", array)
        assert (tmp_path / "theirs.npy").read_bytes() == (tmp_path / "ours.npy").read_bytes()
    with files_of_at_most(3000), pytest.raises(OSError, match="File too large"):
        save_array(tmp_path / "ours.npy", np.zeros(3200, np.uint8))


# ---- one run in a folder


def test_a_read_only_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(Path, "touch", lambda self: fails(number=errno.EROFS))
    with pytest.raises(MmgenError, match="cannot write .*run: Read-only file system: choose a place that can be written"):
        train(IMM, tiny(), tmp_path / "run", Quiet(), device="cpu")


@needs_locks
def test_two_runs_in_one_folder(tmp_path):
    notes = []
    with only_run_in(tmp_path / "run", notes.append):
        with pytest.raises(TrainingError, match=rf"another run is at work in .*run \(process {os.getpid()} on .*another --out"):
            train(IMM, tiny(), tmp_path / "run", Quiet(), device="cpu")
    assert train(IMM, tiny(**{"train.max_images": 16}), tmp_path / "run", Quiet(), device="cpu").finished  # free again
    assert notes == []


@needs_locks
def test_a_kill_frees_the_folder(tmp_path):
    script = (
        "import sys, time, pathlib; from mmgen.system.lock import only_run_in\n"
        "with only_run_in(pathlib.Path(sys.argv[1]), print):\n    print('locked', flush=True)\n    time.sleep(60)"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    process = subprocess.Popen([sys.executable, "-c", script, tmp_path], env=environment, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "locked\n"
    with pytest.raises(TrainingError, match=f"process {process.pid} on"), only_run_in(tmp_path, print):
        pass
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    with only_run_in(tmp_path, print):
        pass


@pytest.mark.parametrize("without", ["flock", "fcntl"])
def test_without_locks_it_goes_on_and_says_so(without, tmp_path, monkeypatch):
    if without == "fcntl":
        monkeypatch.setattr(lock, "fcntl", None)
    else:
        monkeypatch.setattr(lock.fcntl, "flock", lambda *_: fails(number=errno.ENOLCK))
    notes = []
    with only_run_in(tmp_path, notes.append):
        pass
    assert len(notes) == 1 and "no locks" in notes[0]


def test_a_folder_in_which_a_run_was_killed_at_its_first_file_is_free(tmp_path):
    (tmp_path / ".lock").touch()
    (tmp_path / ".tmp-config.json-x.json").write_text("{")
    RunFolder(tmp_path).open("train-imm", {}, _Data("a", "digits"))
    assert sorted(p.name for p in tmp_path.iterdir()) == [".lock", "config.json"]


@needs_locks
def test_what_others_write_to_is_no_leftover(tmp_path):
    (tmp_path / ".tmp-a.txt-dead.txt").write_text("half")
    (tmp_path / ".tmp-b.txt-dead.txt").write_text("half")
    (tmp_path / ".tmp-folder-dead").mkdir()
    with replacing(tmp_path / "a.txt") as file, replacing_folder(tmp_path / "folder") as folder:
        remove_leftovers(tmp_path, "a.txt")
        assert not (tmp_path / ".tmp-a.txt-dead.txt").exists() and (tmp_path / ".tmp-b.txt-dead.txt").exists()
        remove_leftovers(tmp_path)
        assert set(tmp_path.iterdir()) == {file, folder}
        file.write_text("a")
    assert {p.name for p in tmp_path.iterdir()} == {"a.txt", "folder"}


# ---- what changes between runs


def test_clocks_that_stand_still_or_go_back(tmp_path, monkeypatch):
    """The time of day may do what it likes; no rate is divided by nothing."""
    day = iter(range(10**9, 0, -1000))
    monkeypatch.setattr(time, "time", lambda: next(day))
    monkeypatch.setattr(time, "monotonic", lambda: 5.0)
    assert train(IMM, tiny(**{"train.max_images": 64}), tmp_path / "run", Quiet(), device="cpu").finished
    lines = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert all(line["seconds"] >= 0 and line.get("images_per_second", 1) > 0 for line in lines)
    assert sorted(p.name for p in (tmp_path / "run/checkpoints").iterdir()) == [f"{32:012d}", f"{64:012d}"]


class _Data:
    def __init__(self, fingerprint, description):
        self.fingerprint, self.description, self.path = fingerprint, description, "folder"


@pytest.mark.parametrize("now, words", [
    (_Data("b", "folder: 90 images"), "they were folder: 100 images, and are folder: 90 images"),
    (_Data("b", "folder: 100 images"), "as many images, other pixels or labels"),
])  # fmt: skip
def test_data_that_changed(now, words, tmp_path):
    run = RunFolder(tmp_path / "run")
    run.open("train-imm", {}, _Data("a", "folder: 100 images"))
    run.open("train-imm", {}, _Data("a", "folder: 100 images"))
    with pytest.raises(TrainingError, match=f"the data have changed since .*{words}.*another --out"):
        run.open("train-imm", {}, now)


def test_a_config_that_is_damaged_is_named(tmp_path):
    (tmp_path / "config.json").write_text('{"command": "tra')
    with pytest.raises(TrainingError, match="config.json is damaged"):
        RunFolder(tmp_path).open("train-imm", {}, _Data("a", "digits"))


@pytest.mark.parametrize("end", [b'{"images": 48, "lo', b"\0\0\0\0", b"\xff\xfe", b"[1]\n", b'{"loss": 1}\n', b""])
def test_a_log_that_a_kill_cut_short(end, tmp_path):
    lines = [b'{"images": 16, "loss": 1.5}\n', b'{"images": 32, "loss": 1.0}\n']
    (tmp_path / "log.jsonl").write_bytes(b"".join(lines) + end)
    run = RunFolder(tmp_path)
    assert run.rewind_log(32) == [{"images": 16, "loss": 1.5}, {"images": 32, "loss": 1.0}]
    run.log({"images": 48})
    assert [line["images"] for line in run.read_log()] == [16, 32, 48]
    assert run.rewind_log(16) == [{"images": 16, "loss": 1.5}]


@pytest.mark.parametrize("content", [None, '{"images": 1', "[]", '{"images": 16}'])
def test_results_that_are_damaged_or_of_another_number_are_made_again(content, tmp_path):
    if content is not None:
        (tmp_path / "results.json").write_text(content)
    assert RunFolder(tmp_path).read_results(32) is None
