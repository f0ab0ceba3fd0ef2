"""Memory and time of every training preset on 1, 8 and 64 GPUs, and of students of pipelines on one card, as tables in Markdown.
Computed, not measured.

    python -m tests.benchmarks.scale_table                       # H200 at 35 % of their peak rate
    python -m tests.benchmarks.scale_table --gpu a100 --utilisation 0.3 --gradient-checkpointing

Memory is `mmgen.training.cost.estimate`'s, which `--dry-run` shows: weights, gradients, optimiser, averages and the activations
that autograd keeps, for the preset's run.batch_per_device. What kernels need for themselves, and a sharded block while it is put
together, come on top. Time is arithmetic over the vendor's peak (dense, of the preset's precision) times an assumed utilisation,
the same for all networks: no communication, no input and no evaluation are counted, so that more GPUs are as many times as fast.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace

from mmgen.config import distill as distill_config, imm as imm_config, teacher as teacher_config
from mmgen.config.sections import preset_names, read_preset
from mmgen.data import DataShape
from mmgen.models.denoiser import DenoiserSettings
from mmgen.models.config import ModelConfig
from mmgen.networks import ADMSettings
from mmgen.training.batches import split_batch
from mmgen.training.optim import moments
from mmgen.training.cost import DENOISING, IMM, Adapters, Cost, PassCost, Work, estimate, pass_cost
from mmgen.methods.imm.objective import imm_model_config
from mmgen.methods.distill.method import TRAINING as DISTILLATION
from mmgen.training.start import expected_shape
from tests.real_pipelines import NAMES, real_model
from mmgen.methods.teacher.objective import teacher_model_config

# Peak rates of dense products in FLOP/s, from NVIDIA's data sheets, which print twice as much "with sparsity"; memory in bytes
GPUS = {
    "h200": {"fp16": 989e12, "bf16": 989e12, "tf32": 494e12, "fp32": 67e12, "memory": 141e9},
    "a100": {"fp16": 312e12, "bf16": 312e12, "tf32": 156e12, "fp32": 19.5e12, "memory": 80e9},
}
COUNTS = (1, 8, 64)
GIB, DAY = 2**30, 86400
SHAPES = {"digits": DataShape(8, 1, 10), "cifar10": DataShape(32, 3, 10)}  # of data whose presets do not say it
# What the presets without a teacher of their own are computed with
STAND_INS = {
    "digits-distill": "digits-teacher", "digits-text-distill": "digits-text", "emoji32-distill": "emoji32-teacher",
    "t2i512-distill": "t2i512-teacher", "cifar10-distill": "cifar10-teacher", "imagenet128-distill": "imagenet128-teacher",
    "imagenet64-distill": "EDM's ADM", "sd15-distill": "sd15", "sd15-distill-lora": "sd15", "sdxl-distill-lora": "sdxl",
    "pixart512-distill": "pixart", "sd3-distill-lora": "sd3",
}  # fmt: skip


CARDS = (24, 48, 80)  # GiB
FREE, ASIDE = 0.93, 2  # the part of a card that a training may take, less GiB for text encoders, autoencoder and kernels


@dataclass(frozen=True)
class Recipe:
    config: object  # all settings
    model: ModelConfig
    work: Work
    group_size: int
    adapters: Adapters | None = None  # trained in place of all weights


def recipe(name: str) -> Recipe:
    """What a preset trains."""
    if name in preset_names("train-imm"):
        config = imm_config.resolve(read_preset(name))
        return Recipe(config, imm_model_config(config, shape_of(config)), IMM, config.loss.group_size)
    if name in preset_names("train-teacher"):
        config = teacher_config.resolve(read_preset(name))
        return Recipe(config, teacher_model_config(config, shape_of(config)), DENOISING, 1)
    config = distill_config.resolve(read_preset(name))
    teacher = STAND_INS[name]
    if teacher in preset_names("train-teacher"):
        model = recipe(teacher).model
    elif teacher in NAMES:
        model = real_model(teacher)
    else:
        model = ModelConfig(
            network=ADMSettings(), flow=None, denoiser=DenoiserSettings(), resolution=64, channels=3, num_classes=1000
        )
    return Recipe(config, model, *DISTILLATION.work(config), DISTILLATION.trains(config)[0][1])


def shape_of(config) -> DataShape:
    data = config.data
    if data.resolution is None:
        return SHAPES[data.name]
    return expected_shape(data) or DataShape(data.resolution, data.channels or 3, 10)  # own images: in colour, of ten classes


def costs(chosen: Recipe, gpus: int, sharded: bool, checkpointing: bool, one: PassCost) -> Cost | None:
    """None where so many GPUs cannot share the batch."""
    train, run = chosen.config.train, chosen.config.run
    at_most = chosen.group_size if run.batch_per_device == "auto" else run.batch_per_device
    parts = split_batch(train.batch_size, chosen.group_size, gpus, at_most)
    return None if parts is None else estimate(train, chosen.model, parts, chosen.work, sharded, checkpointing, one,
                                             moments=moments(chosen.config.optimizer.beta1), adapters=chosen.adapters)  # fmt: skip


def step_seconds(chosen: Recipe, cost: Cost, gpu: dict[str, float], utilisation: float, gpus: int) -> float:
    """Under autocast the network that is trained works in half precision, and what it is compared with in TF32."""
    precision, work = chosen.config.train.precision, chosen.work
    evaluations = cost.flops_per_step / (
        2.0 * cost.macs_per_image * chosen.config.train.batch_size
    )  # of one image, in forward passes
    beside = work.forward - 1 if precision in ("fp16", "bf16") else 0
    share = beside / evaluations
    seconds = cost.flops_per_step * (share / gpu["tf32"] + (1 - share) / gpu[precision])
    return seconds / utilisation / gpus


def card_rows(name: str, gpu: dict[str, float], utilisation: float) -> list[str]:
    """A student of a pipeline, with gradient checkpointing: how many images fit into a pass on each card, and how fast it trains."""
    chosen, rows = recipe(name), []
    train = chosen.config.train
    one = pass_cost(chosen.model, train.precision, True, chosen.adapters)
    parts = split_batch(train.batch_size, chosen.group_size, 1, chosen.group_size)
    for adapters in [chosen.adapters] if chosen.adapters is None else [chosen.adapters, replace(chosen.adapters, half=True)]:
        cost = estimate(train, chosen.model, parts, chosen.work, False, True, one, moments=moments(chosen.config.optimizer.beta1), adapters=adapters)
        beside = (cost.total - cost.activations) / GIB
        images = [max(int((FREE * card - ASIDE - beside) / (one.bytes / GIB)), 0) for card in CARDS]
        rate = train.batch_size / step_seconds(chosen, cost, gpu, utilisation, 1)
        label = f"`{name}`" + ", base in bf16" * (adapters is not None and adapters.half)
        rows.append(row(
            label, f"{cost.parameters / 1e6:,.1f}M", f"{cost.trained / 1e6:,.1f}M", f"{beside:.1f}", f"{one.bytes / GIB:.2f}",
            *(str(count) if count else "–" for count in images), f"{cost.flops_per_step / train.batch_size / 1e12:.1f}", number(rate),
        ))  # fmt: skip
    return rows


def number(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:.0f}" if value >= 100 else f"{value:.2g}" if value >= 0.001 else "< 0.001"


def row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpu", choices=GPUS, default="h200")
    parser.add_argument("--utilisation", type=float, default=0.35, help="of the peak rate, assumed. Default: 0.35")
    parser.add_argument("--gradient-checkpointing", action="store_true", help="as run.gradient_checkpointing=true")
    parser.add_argument("--presets", nargs="*", default=preset_names(), help="default: all")
    options = parser.parse_args()
    gpu, checkpointing = GPUS[options.gpu], options.gradient_checkpointing

    memory, time = [], []
    for name in options.presets:
        chosen = recipe(name)
        train, run = chosen.config.train, chosen.config.run
        a_pass = pass_cost(chosen.model, train.precision, checkpointing, chosen.adapters)
        found = {n: [costs(chosen, n, sharded, checkpointing, a_pass) for sharded in (False, True)] for n in COUNTS}
        one = found[1][0]
        label = f"`{name}`" + (f" of {STAND_INS[name]}" if name in STAND_INS else "")
        whole = [found[n][0] and found[n][0].total / GIB for n in COUNTS]
        spread = [found[n][1] and found[n][1].total / GIB for n in COUNTS[1:]]
        fits = "yes" if one.total < gpu["memory"] else "no"
        memory.append(row(label, f"{one.parameters / 1e6:.1f}M", str(run.batch_per_device), *map(number, whole + spread), fits))
        steps = [cost and step_seconds(chosen, cost, gpu, options.utilisation, n) for n, (cost, _) in found.items()]
        total = train.max_images / train.batch_size
        days = [seconds and seconds * total / DAY for seconds in steps]
        arithmetic = f"{one.flops_per_step / 1e12:,.3g}"
        time.append(row(label, train.precision, f"{train.batch_size:,}", arithmetic, *map(number, steps + days)))

    print(f"Memory of a GPU in GiB, computed{', with gradient checkpointing' * checkpointing}:\n")
    heads = [f"{n} GPU{'s' * (n > 1)}" for n in COUNTS]
    print(
        row(
            "preset",
            "parameters",
            "images in a pass",
            *heads,
            *(f"{h}, sharded" for h in heads[1:]),
            f"fits one {options.gpu.upper()}",
        )
    )
    print(row("---", *["---:"] * 8))
    print("\n".join(memory))
    print(f"\nTime, computed at {options.utilisation:.0%} of the peak of {options.gpu.upper()}s:\n")
    print(
        row(
            "preset",
            "precision",
            "batch",
            "TFLOP a step",
            *(f"s a step, {h}" for h in heads),
            *(f"days in all, {h}" for h in heads),
        )
    )
    print(row("---", "---", *["---:"] * 8))
    print("\n".join(time))
    pipelines = [name for name in options.presets if STAND_INS.get(name) in NAMES]
    if not pipelines:
        return
    print(f"\nStudents of pipelines on one card, with gradient checkpointing, images/s at {options.utilisation:.0%} of an H100's or H200's peak:\n")
    cards = [f"images in a pass, {CARDS[0]} GB", *(f"{card} GB" for card in CARDS[1:])]
    print(row("preset", "parameters", "trained", "GiB beside activations", "GiB an image", *cards, "TFLOP an image", "images/s"))
    print(row("---", *["---:"] * 9))
    for name in pipelines:
        print("\n".join(card_rows(name, GPUS["h200"], options.utilisation)))


if __name__ == "__main__":
    main()
