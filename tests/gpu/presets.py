"""The presets that are measured, each with the work of a step and the images that go through in one pass."""

from __future__ import annotations

from mmgen.training.cost import ALTERNATING, DENOISING, IMM, INSTANT, Work

from .cases import Case, distill_case, imm_case, teacher_case

SMALL = {"network.model_channels": 8, "network.num_blocks": 1}


def preset_cases(small: bool) -> list[tuple[Case, Work, int]]:
    """(case, its work, images in a pass) of the presets of each kind, a few of which are enough on a CPU."""
    if small:
        return [(imm_case("cifar10-imm", **SMALL), IMM, 4), (teacher_case("cifar10-teacher", **SMALL), DENOISING, 4)]
    noise = {"data.name": "noise", "data.resolution": 64, "data.channels": 3, "data.num_classes": 1000}
    return [
        (imm_case("digits-imm", **{"data.name": "noise", "data.resolution": 8, "data.channels": 1, "data.num_classes": 10}), IMM, 128),
        (imm_case("cifar10-imm"), IMM, 256),
        *((imm_case(f"imagenet256-imm-{size}"), IMM, batch) for size, batch in (("s", 256), ("b", 128), ("l", 64), ("xl", 64))),
        (teacher_case("cifar10-teacher"), DENOISING, 256),
        (teacher_case("imagenet64-teacher", **noise), DENOISING, 64),
        (distill_case("cifar10-distill", "cifar10-teacher"), ALTERNATING, 128),
        (distill_case("cifar10-distill", "cifar10-teacher", "instant"), INSTANT, 128),
        (distill_case("imagenet64-distill", "imagenet64-teacher", teacher=noise), ALTERNATING, 32),
    ]  # fmt: skip
