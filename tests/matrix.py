"""Every method with every kind of network, plain, sharded and by adapters: a few steps on as many processes as this is launched with.

`python matrix.py FOLDER` writes a checkpoint of each case in FOLDER. Loading torch takes longer than most cases, so one launch has all of them.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).parents[1]))
from tests.gpu.cases import DISTILLATIONS, TINY, Case, imm_case, tiny_case, tiny_settings  # noqa: E402

from mmgen.methods.distill import instant  # noqa: E402
from mmgen.training.checkpoint import save_checkpoint  # noqa: E402
from mmgen.training.loop import Trainer  # noqa: E402

BATCH, STEPS = 8, 2  # a step of each network of a method
# With an epsilon below the gradients, but above what is only rounding in them: of that a step of Adam would be as large
SETTINGS = {
    "train.batch_size": BATCH, "run.batch_per_device": BATCH // 2, "optimizer.warmup_images": 0, "optimizer.lr": 1e-3, "optimizer.name": "adam",
    "optimizer.eps": 1e-4,
}  # fmt: skip
SHARDED = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
KINDS = (*TINY, "text")
LORA = {"student.lora": 2}
MOMENT_BATCHES = 4


def cases() -> dict[str, Case]:
    """By name; sharded ones are named so."""
    plain = [("imm", kind) for kind in KINDS if kind != "edm2"] + [("teacher", kind) for kind in KINDS]
    plain += [(method, kind) for kind in KINDS for method in DISTILLATIONS if method != "instant, finite" or kind == "unet"]
    sharded = [("imm", "dit"), ("teacher", "ncsnpp"), ("alternating", "text"), ("instant, finite", "unet")]
    adapters = [("alternating", kind) for kind in KINDS if kind != "edm2"] + [("instant, forward", "unet")]
    changed = {
        "instant, forward, unet, preconditioned": tiny_case("instant, forward", "unet", **{"loss.preconditioner": "adam"}),
        "instant, forward, unet, with rollouts": tiny_case("instant, forward", "unet", **{"student.rollouts": 0.5, "student.rollouts_after": 0}),
        "imm, mean flow": imm_case("digits-meanflow", **tiny_settings("unet")),
        "imm, latents": imm_case("imagenet256-imm-s", **{f"network.{key}": value for key, value in TINY["dit"].items()}),
        "teacher, unet, augmented": tiny_case("teacher", "unet", **{"data.augment": 0.5}),
    }
    found = {case.name: case for case in (tiny_case(*one) for one in plain)} | changed
    found |= {f"{case.name}, lora": case for case in (tiny_case(*one, **LORA) for one in adapters)}
    return found | {f"{case.name}, sharded": case for case in (tiny_case(*one) for one in sharded)}


def make(case: Case) -> Trainer:
    """Two processes have a pass each in a step, and one has two."""
    with mock.patch.object(instant, "MOMENT_BATCHES", MOMENT_BATCHES):
        trainer = case.make("cpu", "fp32", None, **SETTINGS)
    assert trainer.split.rounds * trainer.accelerator.num_processes == 2
    return trainer


def steps(trainer: Trainer, count: int, folder: Path) -> None:
    """So many steps, then a checkpoint in `folder`."""
    for _ in range(count):
        trainer._step()
    save_checkpoint(
        folder, trainer.networks, trainer.optimizers, trainer.ema, trainer.scalers, trainer.progress, trainer.process_group
    )


def main(folder: Path) -> None:
    for name, case in cases().items():
        with mock.patch.dict(os.environ, SHARDED if name.endswith("sharded") else {}):
            trainer = make(case)
            assert trainer.accelerator.num_processes == 2 and trainer.sharded == name.endswith("sharded")
            steps(trainer, STEPS, folder / name)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
