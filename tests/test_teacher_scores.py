"""A teacher's many steps are drawn and scored once for all its students: by its hash, settings, seed and reference."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from toy_task import Quiet

from mmgen.config.distill import resolve as resolve_distill
from mmgen.config.sections import read_preset
from mmgen.config.teacher import resolve as resolve_teacher
from mmgen.methods import DISTILLATION
from mmgen.methods import TEACHER
from mmgen.methods.run import train
from mmgen.models.files import load_model, save_model
from mmgen.system.files import read_json

pytestmark = pytest.mark.usefixtures("own_cache")
NETWORK = {"model_channels": 8, "channel_mult": [1], "num_blocks": 1, "attn_resolutions": []}


@pytest.fixture
def teacher(own_cache) -> Path:
    settings = {"run": {"eval_num": 0}, "train": {"batch_size": 4, "max_images": 4}, "network": NETWORK}
    train(TEACHER, resolve_teacher(read_preset("digits-teacher", "train-teacher"), settings), Path("t"), Quiet(), device="cpu")
    return Path("t/model.safetensors")


@pytest.fixture
def drawn(monkeypatch) -> list[tuple[str, int, int]]:
    """What scoring draws: (sampler, steps, images)."""
    from mmgen.metrics import image_sets

    seen, original = [], image_sets.drawn_images

    def noting(model, chosen, num, **options):
        seen.append((chosen.sampler, chosen.steps, num))
        return original(model, chosen, num, **options)

    monkeypatch.setattr("mmgen.training.scorer.drawn_images", noting)
    return seen


def distilled(teacher: Path, out: str, **changes) -> list[dict]:
    run = {"eval_num": 16, "teacher_steps": 4, "eval_steps": [2], "eval_every": 10**6}
    settings = {"teacher": {"name": str(teacher)}, "run": run, "student": {"steps": 2}}
    settings["train"] = {"batch_size": 4, "max_images": 8, **changes}
    train(DISTILLATION, resolve_distill(read_preset("digits-distill", "distill"), settings), Path(out), Quiet(), device="cpu")
    return read_json(Path(out) / "results.json")["comparison"]["rows"]


def test_the_second_student_finds_its_teachers_scores(teacher, drawn):
    first = distilled(teacher, "a")
    assert ("ancestral", 4, 16) in drawn
    drawn.clear()
    second = distilled(teacher, "b", max_images=16)
    assert ("ancestral", 4, 16) not in drawn and {steps for _, steps, _ in drawn} == {2}  # the student's, alone
    assert [row for row in second if row["who"] == "teacher"] == [row for row in first if row["who"] == "teacher"]


@pytest.mark.slow
def test_another_teacher_or_seed_is_scored_anew(teacher, drawn, tmp_path):
    distilled(teacher, "a")
    drawn.clear()
    distilled(teacher, "b", seed=1)
    assert ("ancestral", 4, 16) in drawn
    drawn.clear()
    model = load_model(teacher)
    next(model.network.parameters()).mul_(1.5)
    save_model(tmp_path / "other.safetensors", replace(model.config, data="digits"), model.network.state_dict())
    distilled(tmp_path / "other.safetensors", "c")
    assert ("ancestral", 4, 16) in drawn


@pytest.mark.slow
def test_a_damaged_memory_is_written_anew(teacher, drawn, tmp_path):
    first = distilled(teacher, "a")
    for file in (tmp_path / "cache/scores").iterdir():
        file.write_text("{")
    drawn.clear()
    assert distilled(teacher, "b", max_images=16)[:2] == first[:2] and ("ancestral", 4, 16) in drawn
