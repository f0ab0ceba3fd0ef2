"""run.batch_per_device = "auto": how many images go through in one pass.

On a GPU sizes are tried, without leaving a trace in weights, optimisers, averages or random numbers. On a CPU, where too much is
not refused but swapped or killed, and where networks are sharded, so that processes cannot try by themselves, the size follows
from the free memory and an estimate. What is found is kept in the run's folder: sums of another order round differently, so that
a run is the same bit for bit only with the same size.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ..errors import TrainingError
from ..system.files import write_json
from ..models.config import ModelConfig
from ..system.processes import ProcessGroup
from .batches import Batch
from .cost import PassCost, pass_cost
from .optim import moments
from .task import TrainedNetwork

FILE = "batch_per_device.json"  # in the run's folder
# A forward pass of so much arithmetic on each core is about as fast per image as a larger one: the digits' network, 9.4 MFLOP an
# image, gives 870 to 1,020 images a CPU second in passes of 128, 1,070 in 256, 1,290 in 512
ENOUGH_FLOPS = 4e9
OF_MEMORY = 0.5  # the share of the free memory that an estimate may fill: it knows no temporary results
SPARE = 0.05  # the share of a GPU's memory left free when sizes are tried, for what does not fit into holes


@dataclass(frozen=True)
class Found:
    size: int
    why: str  # for the log


def find_size(
    sizes: Sequence[int], *, parts: Mapping[str, TrainedNetwork], optimizers: Mapping[str, torch.optim.Optimizer],
    batch_of: Callable[[int], Batch], model_config: ModelConfig, precision: str, checkpointing: bool, sharded: bool,
    device: torch.device, process_group: ProcessGroup, folder: Path,
) -> Found:  # fmt: skip
    """The largest of `sizes` (ascending, not empty) with which all processes can train; to be called in all of them.

    parts, optimizers: on the device, as they will be trained. batch_of(size): a batch to try.

    Raises TrainingError where not even the least fits.
    """
    kept = process_group.gather(read_kept(folder))[0]
    kept = kept if kept in sizes else None
    if device.type == "cuda" and not sharded:
        attempt = one_pass(parts, optimizers, batch_of, device)
        own = kept if kept is not None and fits(attempt, kept) else 0
        how = "the largest that was tried and fits"
        search = lambda: largest_that_fits(sizes, attempt)  # noqa: E731
    else:
        cost = pass_cost(model_config, precision, checkpointing)
        states = states_to_come(parts, optimizers) // (process_group.size if sharded else 1)
        room = int(OF_MEMORY * free_memory(device)) - states - cost.fixed
        own = kept if kept is not None and kept * cost.bytes <= room else 0
        search = lambda: estimated_size(sizes, cost, room, on_cpu=device.type == "cpu")  # noqa: E731
        how = f"estimated: {cost.bytes / 2**20:.3g} MiB an image, and {max(room, 0) / 2**30:.3g} GiB to fill"
        if device.type == "cpu":
            how += "; no larger than gains speed on a CPU"
    size = min(process_group.gather(own))
    if size:
        how = "as found when the run began"
    else:
        size = min(process_group.gather(search()))
        how += f"; {kept}, found when the run began, no longer fits" if kept is not None else ""
    if not size:
        raise TrainingError(
            f"not even {sizes[0]} image{'s' * (sizes[0] > 1)} in a pass fit into the memory of {device} ({how}): free some, set "
            "run.gradient_checkpointing=true, take more devices or shard (accelerate launch --use_fsdp --fsdp_version 2); "
            "--batch-per-device with a number tries nevertheless"
        )
    if process_group.is_main and size != kept:
        write_json(folder / FILE, {"size": size})
    return Found(size, how)


def read_kept(folder: Path) -> int | None:
    """The size found for this run before; None where there is none."""
    file = folder / FILE
    if not file.is_file():
        return None
    try:
        return int(json.loads(file.read_text())["size"])
    except (ValueError, KeyError, TypeError) as error:
        raise TrainingError(f"{file} is damaged ({error}): delete it, and a size is found anew") from error


# ---------------------------------------------------------------------- by trial


def largest_that_fits(sizes: Sequence[int], attempt: Callable[[int], None]) -> int:
    """The largest of ascending `sizes` for which attempt(size) does not run out of memory; 0 where none. By bisection."""
    low, high = 0, len(sizes)  # all before `low` fit, none from `high` on
    while low < high:
        middle = (low + high) // 2
        low, high = (middle + 1, high) if fits(attempt, sizes[middle]) else (low, middle)
    return sizes[low - 1] if low else 0


def fits(attempt: Callable[[int], None], size: int) -> bool:
    """Whether attempt(size) ends without running out of memory. All memory is free again afterwards; other errors are raised."""
    from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size

    try:
        attempt(size)
        return True
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and not should_reduce_batch_size(error):
            raise
        return False
    finally:
        clear_device_cache(garbage_collection=True)


def one_pass(
    parts: Mapping[str, TrainedNetwork], optimizers: Mapping[str, torch.optim.Optimizer], batch_of: Callable[[int], Batch],
    device: torch.device,
) -> Callable[[int], None]:  # fmt: skip
    """attempt(size): the passes of a step of every part over `size` images, with all that a step holds in memory beside them.

    Nothing is updated, no process waits for another, and random numbers are those of before. Compiled networks run uncompiled,
    which takes no less memory.
    """

    def attempt(size: int) -> None:
        generators = [device] if device.type == "cuda" else []
        try:
            with torch.random.fork_rng(devices=generators), torch.compiler.set_stance("force_eager"):
                held = _optimizer_states(parts, optimizers)
                if device.type == "cuda":
                    total = torch.cuda.get_device_properties(device).total_memory
                    held.append(torch.empty(int(SPARE * total), dtype=torch.uint8, device=device))
                batch = batch_of(size)
                for part in parts.values():
                    if part.rehearse is not None:
                        part.rehearse(batch)
                    for _ in range(2):  # the second time there are gradients already, as in all rounds but the first
                        part.objective(batch)[0].backward()
                    part.network.zero_grad(set_to_none=True)
        finally:
            for part in parts.values():
                part.network.zero_grad(set_to_none=True)

    return attempt


def _optimizer_states(parts: Mapping[str, TrainedNetwork], optimizers: Mapping[str, torch.optim.Optimizer]) -> list[torch.Tensor]:
    """Room for the moments of each parameter of the optimisers that have made no step yet."""
    new = [(part.network, _moments(optimizers[name])) for name, part in parts.items() if not optimizers[name].state]
    return [torch.empty_like(parameter) for network, kept in new for parameter in network.parameters() for _ in range(kept)]


def _moments(optimizer: torch.optim.Optimizer) -> int:
    return moments(optimizer.param_groups[0]["betas"][0])


# ---------------------------------------------------------------------- by estimate


def estimated_size(sizes: Sequence[int], cost: PassCost, room: int, on_cpu: bool, threads: int | None = None) -> int:
    """The largest of ascending `sizes` whose activations fit into `room` bytes; 0 where none.

    on_cpu: but no larger than the least that is as fast per image as larger ones, on `threads` cores (unset: torch's).
    """
    fitting = [size for size in sizes if size * cost.bytes <= room]
    if on_cpu:
        wanted = ENOUGH_FLOPS * (threads or torch.get_num_threads()) / cost.flops
        fitting = [size for i, size in enumerate(fitting) if i == 0 or fitting[i - 1] < wanted]
    return fitting[-1] if fitting else 0


def states_to_come(parts: Mapping[str, TrainedNetwork], optimizers: Mapping[str, torch.optim.Optimizer]) -> int:
    """Bytes of the gradients, and of the moments of optimisers that have made no step yet."""
    counts = {name: sum(parameter.numel() for parameter in part.network.parameters()) for name, part in parts.items()}
    return sum(4 * count * (1 if optimizers[name].state else 1 + _moments(optimizers[name])) for name, count in counts.items())


def free_memory(device: torch.device) -> int:
    """Bytes for this process: free on its GPU; or its share of what is free on the machine and, in a container, allowed."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    import psutil

    free = min(psutil.virtual_memory().available, _allowed_memory(Path("/sys/fs/cgroup")))
    return free // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def _allowed_memory(groups: Path) -> float:
    """What the control group's limit leaves, of version 2 or 1; infinite where there is none."""
    for limit, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        if (groups / limit).is_file() and (groups / used).is_file():
            word = (groups / limit).read_text().strip()
            return float("inf") if word == "max" else max(0, int(word) - int((groups / used).read_text()))
    return float("inf")


def describe(found: Found) -> str:
    return f"batch_per_device auto: {found.size} image{'s' * (found.size > 1)} in a pass ({found.why})"
