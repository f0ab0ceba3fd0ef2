"""The whole step of IMM, images in and averaged weights out: mmgen's Trainer against the textbook's step.

Both get their batch from mmgen's data set and augmentation. On a GPU also compiled in bfloat16 against the textbook in TF32.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import torch

from mmgen.config.imm import ImmConfig
from mmgen.training.cost import IMM, estimate
from mmgen.training.loop import Trainer

from .measuring import Case, Row, Run, Size, compared, synchronise
from .plain_dit import dit
from .plain_imm import Step
from .plain_unet import unet
from .runs import imm_config, imm_trainer

TINY = {"digits-imm": {"network.model_channels": 8, "train.batch_size": 8},
        "cifar10-imm": {"network.model_channels": 8, "network.num_blocks": 1, "train.batch_size": 4},
        "imagenet256-imm-s": {"network.hidden_size": 32, "network.num_heads": 2, "network.depth": 1,
                              "data.num_classes": 10, "train.batch_size": 4}}  # fmt: skip
QUICK = {"digits-imm": {}, "cifar10-imm": {"network.model_channels": 32, "train.batch_size": 16},
         "imagenet256-imm-s": {"network.depth": 3, "data.num_classes": 10, "train.batch_size": 8}}  # fmt: skip
FULL = {"digits-imm": {}, "cifar10-imm": {"train.batch_size": 8}, "imagenet256-imm-s": {"train.batch_size": 8}}
GPU = {"digits-imm": {}, "cifar10-imm": {"train.batch_size": 128}, "imagenet256-imm-s": {"train.batch_size": 64}}


def changes_for(preset: str, size: Size, device: str) -> dict:
    if device == "cuda" and size != "tiny":
        return GPU[preset]
    return {"tiny": TINY, "quick": QUICK, "full": FULL}[size][preset]


def cases(size: Size, device: str) -> list[Case]:
    return [case(preset, changes_for(preset, size, device), size, device) for preset in TINY]


def case(preset: str, changes: dict, size: Size, device: str) -> Case:
    config = imm_config(preset, **changes)
    batch, steps = config.train.batch_size, 5 if preset == "digits-imm" and size != "tiny" else 1
    slow = preset == "cifar10-imm" and size == "full" and device == "cpu"
    name = f"IMM step, {preset}, batch {batch}" + ("" if size == "full" else f", {size}")
    return Case(
        name, "images", steps * batch, lambda: ours(config, device, steps), lambda: plain(config, device, steps),
        {"tiny": 1, "quick": 7, "full": 2 if slow else 5}[size],
    )  # fmt: skip


def ours(config: ImmConfig, device: str, steps: int) -> Run:
    return _repeated(imm_trainer(config, device)._step, steps)


def plain(config: ImmConfig, device: str, steps: int) -> Run:
    """The same data, the same initial weights."""
    return plain_steps(imm_trainer(config, device), config, steps)


def plain_steps(trainer: Trainer, config: ImmConfig, steps: int) -> Run:
    """The textbook's steps on the batches of a trainer."""
    step, inputs = plain_step(trainer, config), trainer.task.trained["model"].objective.inputs

    def once() -> None:
        batch = next(iter(trainer._batches(0)))
        x, augment = inputs.images(batch)
        condition = inputs.condition(batch)
        step(x, None if condition is None else condition.classes, augment, 0)

    return _repeated(once, steps)


def plain_step(trainer: Trainer, config: ImmConfig) -> Step:
    network = trainer.network
    names = {name for name, _ in network.named_parameters()}
    return Step(config, network.state_dict(), names, dit if config.network.kind == "dit" else unet)


def _repeated(run: Callable[[], None], count: int) -> Run:
    def runs() -> None:
        for _ in range(count):
            run()

    return runs


def rows(size: Size, device: str) -> Iterator[Row]:
    for one in cases(size, device):
        yield compared("imm", one, size, device)
    if device == "cuda":
        yield from compiled(size)


def compiled(size: Size) -> Iterator[Row]:
    """Compiled in bfloat16 against the textbook in TF32, and the share of the rate of the card's large matrix products."""
    peak = matrix_rate()
    for preset in TINY:
        changes = changes_for(preset, size, "cuda")
        fast = imm_config(preset, **{**changes, "train.precision": "bf16", "run.compile": True})
        eager = imm_config(preset, **changes)
        trainer = imm_trainer(fast, "cuda")
        flops = estimate(fast.train, trainer.task.model_config, trainer.split, IMM).flops_per_step / fast.train.batch_size
        del trainer
        one = Case(
            f"IMM step, {preset}, compiled bf16", "images", fast.train.batch_size,
            lambda fast=fast: ours(fast, "cuda", 1), lambda eager=eager: plain(eager, "cuda", 1), 10,
            lambda rate, flops=flops: f"{rate * flops / peak:.1%} of {peak / 1e12:.0f} TFLOP/s",
        )  # fmt: skip
        yield compared("imm", one, "tiny", "cuda")  # memory is that of the row above


def matrix_rate(side: int = 8192) -> float:
    """FLOP/s of bfloat16 matrix products on the GPU."""
    a = torch.randn(side, side, device="cuda", dtype=torch.bfloat16)
    best = float("inf")
    for _ in range(10):
        synchronise()
        start = time.perf_counter()
        a @ a
        synchronise()
        best = min(best, time.perf_counter() - start)
    return 2 * side**3 / best
