"""run.batch_per_device = "auto": the largest size that fits, found without a trace, kept with the run."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from toy_task import Quiet, model_config, run_toy, toy_task

from mmgen.config import sections as configs
from mmgen.cli.training_options import shared_changes
from mmgen.config.sections import RunSettings
from mmgen.data import load
from mmgen.errors import ConfigError, TrainingError
from mmgen.system.schema import from_dict
from mmgen.system.processes import ProcessGroup
from mmgen.training import auto_batch
from mmgen.training.batches import fetch, part_sizes, split_batch
from mmgen.training.cost import PassCost
from mmgen.training.task import TrainedNetwork


class TooMuch:
    """Runs out of memory above a size, as torch says it on a GPU; counts the attempts."""

    def __init__(self, largest: int) -> None:
        self.largest, self.tried = largest, []

    def __call__(self, size: int) -> None:
        self.tried.append(size)
        if size > self.largest:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of ...")


@pytest.mark.parametrize("sizes", [part_sizes(4096, 4, 8), part_sizes(3600, 1, 3), [6]])
def test_the_largest_of_the_possible_sizes(sizes, monkeypatch):
    monkeypatch.setattr("accelerate.utils.memory.clear_device_cache", lambda **_: None)  # it takes a tenth of a second
    for largest in [0, *sizes, max(sizes) + 1]:
        attempt = TooMuch(largest)
        found = auto_batch.largest_that_fits(sizes, attempt)
        assert found == max([size for size in sizes if size <= largest], default=0)
        assert len(attempt.tried) <= len(sizes).bit_length()


def test_other_errors_are_no_lack_of_memory():
    def attempt(size):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="shapes"):
        auto_batch.largest_that_fits([4, 8], attempt)


@pytest.mark.parametrize("batch, group, processes", [(4096, 4, 8), (96, 4, 3), (36, 2, 2), (16, 1, 1), (12, 4, 2)])
def test_sizes_hold_whole_groups_that_no_process_shares(batch, group, processes):
    sizes = part_sizes(batch, group, processes)
    expected = [n for n in range(1, batch + 1) if batch % (n * processes) == 0 and n % group == 0]
    assert sizes == expected
    for size in sizes:
        parts = split_batch(batch, group, processes, size)
        assert parts.size == size
        owner = {}
        for process in range(processes):
            for round_ in range(parts.rounds):
                start = parts.start(round_, process)
                owner |= {image: (process, round_) for image in range(start, start + size)}
        assert sorted(owner) == list(range(batch))
        for first in range(0, batch, group):  # a group is in one pass of one process
            assert len({owner[image] for image in range(first, first + group)}) == 1


class Hungry(nn.Module):
    """An objective that runs out of memory above a number of images, in its backward pass."""

    def __init__(self, inner: nn.Module, largest: int, tried: list[int]) -> None:
        super().__init__()
        self.inner, self.largest, self.tried = inner, largest, tried

    def forward(self, batch):
        self.tried.append(len(batch.images))
        loss, numbers = self.inner(batch)
        torch.rand(3)  # random numbers that are not the seeded ones
        loss.register_hook(lambda gradient: TooMuch(self.largest)(len(batch.images)))
        return loss, numbers


def hungry_task(largest, tried, rehearsed=None):
    def make(accelerator):
        task = toy_task(accelerator)
        for name, part in task.trained.items():
            rehearse = None if rehearsed is None else lambda batch: rehearsed.append(len(batch.images))
            task.trained[name] = TrainedNetwork(part.network, Hungry(part.objective, largest, tried), part.prepare, rehearse)
        return replace(task, group_size=2)

    return make


def test_a_trial_leaves_no_trace():
    tried, rehearsed = [], []
    task = hungry_task(4, tried, rehearsed)(None)
    optimizers = {name: torch.optim.Adam(part.network.parameters()) for name, part in task.trained.items()}
    dataset = load("digits")
    batch_of = lambda size: fetch(dataset, 0, size, 0, torch.device("cpu"))  # noqa: E731
    before = {name: {k: v.clone() for k, v in part.network.state_dict().items()} for name, part in task.trained.items()}
    torch.manual_seed(5)
    state = torch.get_rng_state()
    attempt = auto_batch.one_pass(task.trained, optimizers, batch_of, torch.device("cpu"))
    assert auto_batch.largest_that_fits([2, 4, 8, 16], attempt) == 4
    assert set(tried) == {4, 8} or set(tried) == {4, 8, 16} and len(rehearsed) > 0
    assert torch.equal(torch.get_rng_state(), state)
    for name, part in task.trained.items():
        assert all(torch.equal(value, before[name][key]) for key, value in part.network.state_dict().items())
        assert all(parameter.grad is None for parameter in part.network.parameters())
        assert not optimizers[name].state


def tried_on_cpu(monkeypatch):
    """Sizes are tried as on a GPU."""
    real, real_pass = auto_batch.find_size, auto_batch.one_pass

    def as_on_gpu(sizes, **options):
        class Device:
            type = "cuda"

        attempt = real_pass(options["parts"], options["optimizers"], options["batch_of"], torch.device("cpu"))
        monkeypatch.setattr(auto_batch, "one_pass", lambda *_: attempt)
        return real(sizes, **{**options, "device": Device()})

    monkeypatch.setattr("mmgen.training.loop.find_size", as_on_gpu)


@pytest.mark.slow
def test_a_run_trains_as_with_the_number_and_keeps_it(tmp_path, own_cache, monkeypatch):
    tried_on_cpu(monkeypatch)
    auto, tried = {"run.batch_per_device": "auto"}, []
    reporter = Quiet()
    half = {"train.max_images": 96, "optimizer.decay": "none"}
    run_toy(tmp_path / "given", make=hungry_task(4, []), **{**half, "run.batch_per_device": 4})
    run_toy(tmp_path / "auto", reporter, make=hungry_task(4, tried), **half, **auto)
    assert any(note.startswith("batch_per_device auto: 4 images in a pass (the largest") for note in reporter.notes)
    assert json.loads((tmp_path / "auto/batch_per_device.json").read_text()) == {"size": 4}
    folder = "checkpoints/000000000096"
    for file in ("network", "auxiliary", "optimizer", "optimizer-auxiliary"):
        given, found = (load_file(tmp_path / name / folder / f"{file}.safetensors") for name in ("given", "auto"))
        assert all(torch.equal(value, found[key]) for key, value in given.items())

    # More would fit now: the run goes on as it began. Less: it finds what does.
    more = {**half, "train.max_images": 128}
    for largest, size in ((8, 4), (2, 2)):
        reporter = Quiet()
        run_toy(tmp_path / "auto", reporter, make=hungry_task(largest, tried := []), **more, **auto)
        (note,) = (note for note in reporter.notes if note.startswith("batch_per_device auto"))
        assert f": {size} images" in note and ("as found when the run began" in note) == (size == 4)
        assert json.loads((tmp_path / "auto/batch_per_device.json").read_text()) == {"size": size}
    assert set(tried) >= {2, 4}


def test_nothing_fits(tmp_path, own_cache, monkeypatch):
    tried_on_cpu(monkeypatch)
    with pytest.raises(TrainingError, match="not even 2 images .* shard"):
        run_toy(tmp_path / "run", make=hungry_task(1, []), **{"run.batch_per_device": "auto"})


def found(tmp_path, monkeypatch, free: int, process_group: ProcessGroup = ProcessGroup(), **changes):
    monkeypatch.setattr(auto_batch, "free_memory", lambda device: free)
    monkeypatch.setattr(auto_batch, "pass_cost", lambda *_: PassCost(1000, flops=4e7, bytes=1e6))
    network = nn.Linear(10, 99, bias=False)
    options = {
        "parts": {"model": TrainedNetwork(network, network)}, "optimizers": {"model": torch.optim.Adam(network.parameters())},
        "batch_of": None, "model_config": model_config(), "precision": "fp32", "checkpointing": False, "sharded": False,
        "device": torch.device("cpu"), "process_group": process_group, "folder": tmp_path, **changes,
    }  # fmt: skip
    return auto_batch.find_size([4, 8, 16, 32, 64, 128, 256, 512], **options)


def test_on_a_cpu_the_estimate_decides(tmp_path, monkeypatch):
    """A megabyte an image; 990 parameters with a gradient and two moments; half of what is free."""
    states = 3 * 4 * 990
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert auto_batch.estimated_size([4, 8], PassCost(0, 1e7, 1e6), 7 * 10**6, True) == 4
    fitting = found(tmp_path, monkeypatch, 2 * (16 * 10**6 + states))
    assert fitting.size == 16 and "1e+06" not in fitting.why and "0.954 MiB an image" in fitting.why
    (tmp_path / auto_batch.FILE).unlink()
    assert found(tmp_path, monkeypatch, 2 * (16 * 10**6 + states) - 2).size == 8
    (tmp_path / auto_batch.FILE).unlink()
    plenty = found(tmp_path, monkeypatch, 10**12).size  # 4e9 / 4e7 = 100 images are enough for a core
    assert plenty == 128
    with pytest.raises(TrainingError, match="not even 4 images"):
        (tmp_path / auto_batch.FILE).unlink()
        found(tmp_path, monkeypatch, 10**6)


def test_the_least_of_all_processes(tmp_path, monkeypatch):
    process_group = ProcessGroup(0, 2, gather=lambda own: [own, own if own is None else min(own, 8)])
    assert found(tmp_path, monkeypatch, 10**12, process_group).size == 8
    assert auto_batch.read_kept(tmp_path) == 8


def test_a_sharded_gpu_is_estimated(tmp_path, monkeypatch):
    """Memory alone limits it there; states are spread."""
    process_group = ProcessGroup(0, 2, gather=lambda own: [own, own])
    device = torch.device("cuda")
    assert found(tmp_path, monkeypatch, 10**12, process_group, device=device, sharded=True).size == 512


def test_the_memory_that_a_container_allows(tmp_path):
    assert auto_batch._allowed_memory(tmp_path) == float("inf")
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("5\n")
    assert auto_batch._allowed_memory(tmp_path) == float("inf")
    (tmp_path / "memory.max").write_text("12\n")
    assert auto_batch._allowed_memory(tmp_path) == 7
    assert 0 < auto_batch.free_memory(torch.device("cpu")) < 2**60


def test_settings(tmp_path):
    assert from_dict(RunSettings, {"batch_per_device": "auto"}).batch_per_device == "auto"
    assert from_dict(RunSettings, {"batch_per_device": 3.0}).batch_per_device == 3
    for wrong in ("most", True, 1.5):
        with pytest.raises(ConfigError, match="run.batch_per_device must be a whole number.* or 'auto'"):
            from_dict(RunSettings, {"batch_per_device": wrong}, "run")
    assert configs.parse_assignment("run.batch_per_device=auto") == ("run.batch_per_device", "auto")
    for word, value in (("auto", "auto"), ("64", 64), (None, None)):
        assert shared_changes({"batch_per_device": word}).get("run.batch_per_device") == value
    with pytest.raises(TrainingError, match="damaged"):
        (tmp_path / auto_batch.FILE).write_text("{")
        auto_batch.read_kept(tmp_path)
