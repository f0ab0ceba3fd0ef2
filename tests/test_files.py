"""Files as they are left: modes by the umask, locks kept while they are written, the bytes of the libraries, on the disk."""

import os
import stat
import threading

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_training import Quiet, tiny
from tiny_model import make_model

from mmgen.metrics.frechet import GaussianStatistics
from mmgen.metrics.references import write_statistics
from mmgen.system import files, lock
from mmgen.system.files import remove_leftovers, replacing, replacing_folder
from mmgen.system.lock import is_held, one_at_a_time
from mmgen.system.tensor_files import save_tensors
from mmgen.methods import IMM
from mmgen.methods.run import train

needs_locks = pytest.mark.skipif(lock.fcntl is None, reason="this system has no flock")

TENSORS = {
    "b": torch.randn(3, 4), "a.weight": torch.randn(2, 2).half(), "c": torch.tensor(3), "ü": torch.zeros(0, 3),
    "d": torch.randn(5).bfloat16(), "flag": torch.tensor([True, False, True]), "e": torch.randn(3, 2).double(),
    "bytes": torch.arange(7, dtype=torch.uint8), "i": torch.arange(3, dtype=torch.int32), "s": torch.zeros(2, dtype=torch.int16),
    "f8": torch.ones(3).to(torch.float8_e4m3fn), "f": torch.ones(3).to(torch.float8_e5m2), "long": torch.arange(5),
    "i8": torch.arange(5, dtype=torch.int8),
}  # fmt: skip


def test_tensors_are_written_as_safetensors_writes_them(tmp_path):
    for name, tensors, metadata in (("all", TENSORS, {"k": "v ü"}), ("one", {"x": torch.randn(1)}, None), ("none", {}, {"a": "b"})):
        save_file(tensors, tmp_path / "theirs", metadata=metadata)
        save_tensors(tensors, tmp_path / name, metadata=metadata)
        assert (tmp_path / name).read_bytes() == (tmp_path / "theirs").read_bytes()
    save_tensors({"t": torch.arange(6).view(2, 3).T}, tmp_path / "turned")
    assert torch.equal(load_file(tmp_path / "turned")["t"], torch.arange(6).view(2, 3).T)


@pytest.fixture
def umask():
    before = os.umask(0o027)
    yield
    os.umask(before)


def test_every_file_has_the_mode_that_the_umask_gives(tmp_path, umask):
    """Checkpoints, models, statistics: readable by the group, where the umask says so."""
    train(IMM, tiny(**{"train.max_images": 32, "run.eval_every": 32}), tmp_path / "run", Quiet(), device="cpu")
    make_model(tmp_path / "model.safetensors", channels=1)
    statistics = GaussianStatistics()
    statistics.update(torch.randn(9, 4))
    write_statistics(tmp_path / "s.safetensors", statistics, {"features": "pixels"}, source="none", fingerprint=None)
    found = {p.relative_to(tmp_path): stat.S_IMODE(p.stat().st_mode) for p in tmp_path.rglob("*")}
    assert len([path for path in found if path.suffix == ".safetensors"]) >= 8
    wrong = {path: oct(mode) for path, mode in found.items() if mode != (0o750 if (tmp_path / path).is_dir() else 0o640)}
    assert not wrong


@needs_locks
def test_a_file_of_tensors_keeps_its_lock_while_it_is_written(tmp_path):
    """Another process that clears up meanwhile leaves it alone."""
    with replacing(tmp_path / "model.safetensors") as temporary:
        save_tensors(TENSORS, temporary)
        assert is_held(temporary, otherwise=False)
        remove_leftovers(tmp_path)
        remove_leftovers(tmp_path, "model.safetensors")
        assert temporary.exists()
    assert load_file(tmp_path / "model.safetensors").keys() == TENSORS.keys()


@needs_locks
def test_one_waits_for_the_other(tmp_path):
    file, order = tmp_path / "locks" / "a.lock", []
    entered, leave = threading.Event(), threading.Event()

    def first():
        with one_at_a_time(file):
            entered.set()
            leave.wait(10)
            order.append("first")

    def second():
        with one_at_a_time(file):
            order.append("second")

    threads = [threading.Thread(target=first), threading.Thread(target=second)]
    threads[0].start()
    entered.wait(10)
    threads[1].start()
    threads[1].join(0.2)
    assert threads[1].is_alive() and order == []
    leave.set()
    for thread in threads:
        thread.join(10)
    assert order == ["first", "second"] and not is_held(file, otherwise=True)


def test_files_and_their_folders_reach_the_disk(tmp_path, monkeypatch):
    """The content before the new name, the new name before the function returns."""
    seen, flush = [], files.flush_to_disk
    monkeypatch.setattr(files, "flush_to_disk", lambda path: (seen.append((str(path), sorted(os.listdir(tmp_path)))), flush(path)))
    with replacing(tmp_path / "a.txt") as file:
        file.write_text("a")
    with replacing_folder(tmp_path / "b") as folder:
        (folder / "inner").mkdir()
        (folder / "inner" / "c.txt").write_text("c")
    content, name, *inside, last = seen
    assert content[0] == str(file) and "a.txt" not in content[1] and name == (str(tmp_path), ["a.txt"])
    assert {path for path, _ in inside} == {str(folder), str(folder / "inner"), str(folder / "inner" / "c.txt")}
    assert all("b" not in names for _, names in inside) and last == (str(tmp_path), ["a.txt", "b"])
