"""--dry-run of the training commands: what a step costs in arithmetic and memory."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING, Any

from ..methods.method import Method
from .progress import progress_bar
from .tables import show, table_of
from .training_report import announced

if TYPE_CHECKING:
    from ..training.cost import Cost, PassCost

UNITS = {2**30: "GiB", 2**20: "MiB"}


def show_cost(method: Method, config: Any, device: str = "auto", announce: Callable[[], None] = lambda: None) -> None:
    """The table of a dry run: the data, what a step costs, the memory of a device, the time on this one; where a method can train in several ways, all."""
    from rich.table import Column, Table

    from ..errors import DataError
    from ..methods.timing import time_of_run
    from ..training.batches import share_batch
    from ..training.cost import estimate, pass_cost
    from ..training.initial import check_initial, read_initial
    from ..training.optim import moments
    from ..training.sharding import asks_for_shards
    from ..training.start import expected_shape, load_data

    training, asked = method.training(), config
    source, config = (training.dry_find or training.find)(config, "cpu")
    work, group_size = training.work(config)
    initial = read_initial(config.train.init) if config.train.init else None
    try:
        with announced(progress_bar("decoding", 1), announce) as progress:
            dataset = load_data(config.data, progress)
        shape, description = dataset.shape, dataset.description
    except DataError as error:
        dataset, shape, description = None, expected_shape(config.data), f"not here ({error})"
        if shape is None:
            raise
    processes, train = int(os.environ.get("WORLD_SIZE", "1")), config.train
    auto, checkpointing = config.run.batch_per_device == "auto", config.run.gradient_checkpointing
    # auto is found on the devices when the run begins; here it is shown for one group in a pass, which is the least
    parts = share_batch(train.batch_size, group_size, processes, group_size if auto else config.run.batch_per_device)
    model_config = training.model_config(config, shape, source)
    if initial is not None:
        check_initial(initial, model_config)
    sharded = processes > 1 and asks_for_shards()

    @cache
    def pass_of(adapters: Any, checkpointing: bool) -> PassCost:
        return pass_cost(model_config, train.precision, checkpointing, adapters)

    @cache
    def cost_of(adapters: Any, checkpointing: bool) -> Cost:
        kept, one = moments(config.optimizer.beta1), pass_of(adapters and replace(adapters, half=False), checkpointing)
        return estimate(train, model_config, parts, work, sharded, checkpointing, one, moments=kept, adapters=adapters)

    (chosen, adapters), *others = training.trains(config)
    cost = cost_of(adapters, checkpointing)
    unit = next((unit for unit in UNITS if cost.total >= unit), 2**20)
    size, networks = shape.resolution, work.trained + work.frozen + work.whole
    sets = f"{work.trained} trained, {work.frozen + work.whole} frozen" if adapters is None else f"1 frozen, shared; {cost.trained:,} trained"
    used = "captions" if model_config.text is not None else f"{model_config.num_classes or 'no'} classes"
    announce()
    table = Table("dry run", Column(overflow="fold"), title_justify="left")
    for name, value in (
        ("data", description),
        ("images", f"{size} x {size} x {shape.channels}, {used} used"),
        ("parameters", f"{cost.parameters:,}"),
        *([("sets of parameters", sets)] if networks > 1 else []),
        ("one pass of the network", f"{cost.macs_per_image / 1e9:.3f} G multiply-adds per image"),
        ("one step", f"{cost.flops_per_step / 1e12:,.3f} TFLOP: {work}, {train.batch_size} images"),
        ("the whole run", f"{train.max_images // train.batch_size:,} steps, {train.max_images:,} images, "
                          f"{cost.flops_per_step * train.max_images / train.batch_size:.3g} FLOP"),
        ("passes per step", f"{parts} images" + ", the least: auto finds more when the run begins" * auto),
        ("memory per device" + ", sharded" * sharded,
                              f"about {cost.total / unit:.2f} {UNITS[unit]}: weights and gradients {cost.weights / unit:.2f}, "
                              f"optimiser {cost.optimizer / unit:.2f}, averages {cost.averages / unit:.2f}, "
                              + f"half-precision copies {cost.copies / unit:.2f}, " * (cost.copies > 0)
                              + f"activations {cost.activations / unit:.2f}"),
    ):  # fmt: skip
        table.add_row(name, value)
    images = parts.size * parts.processes
    table.add_row("time of the run", time_of_run(method, asked, cost, images, device) if dataset else "not timed: the data are not here")
    show(table)
    if others:
        show(_ways([(chosen, adapters), *others], cost_of, parts.size, unit))


def _ways(ways: list[tuple[str, Any]], cost_of: Any, images: int, unit: int) -> Any:
    """Memory of each way to train, with and without gradient checkpointing; a way that the network has not is left out."""
    from ..errors import ConfigError

    table = table_of(
        "what is trained", "parameters trained", "weights, gradients", "optimiser, averages", "an image", f"{images} images in a pass",
        title=f"memory per device in {UNITS[unit]}, computed",
    )  # fmt: skip
    for name, adapters in ways:
        for checkpointing in (False, True):
            try:
                cost = cost_of(adapters, checkpointing)
            except ConfigError:
                continue
            table.add_row(
                name + ", gradient checkpointing" * checkpointing, f"{cost.trained / 1e6:,.1f}M",
                f"{(cost.weights + cost.copies) / unit:.2f}", f"{(cost.optimizer + cost.averages) / unit:.2f}",
                f"{cost.activations / images / unit:.3f}", f"{cost.total / unit:.2f}",
            )  # fmt: skip
    return table
