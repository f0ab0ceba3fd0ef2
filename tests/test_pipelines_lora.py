"""Students of pipelines by LoRA: diffusers' own pipeline with the weights that mmgen writes draws what mmgen draws."""

from __future__ import annotations

import pytest
import torch
from pipeline_calls import called, drawn_by_mmgen, open_pipeline, relative
from test_cli import mmgen as typed
from tiny_pipelines import tiny_pipeline
from toy_distill import One

import mmgen
from mmgen.config.distill import DistillConfig, StudentSettings, resolve
from mmgen.config.sections import nest
from mmgen.errors import ConfigError, ModelError
from mmgen.methods.distill.lora import LoraNetworks
from mmgen.methods.distill.method import student_model_config
from mmgen.methods.distill.teachers import load_teacher
from mmgen.models.files import load_model
from mmgen.networks import checkpoint_blocks
from mmgen.networks.conditions import Text
from mmgen.networks.diffusers_text import DiffusersText

diffusers = pytest.importorskip("diffusers")
pytest.importorskip("transformers")

PROMPTS = ["a red fox", "two!"]
KINDS = ["sd15", "sd21_zero_snr", "sdxl", "sd3", "sana"]


def trained(kind, folder, steps=4):
    """The files of a run whose student has learned something, and its networks."""
    teacher = load_teacher(tiny_pipeline(kind, folder / "teacher"))
    config = resolve(nest({"teacher.name": "t", "data.name": "x", "student.steps": steps, "student.lora": 4}, DistillConfig))
    model_config, networks = student_model_config(config, teacher), LoraNetworks(teacher.model.network, config.student, One())
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in networks.student.parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    (folder / "run").mkdir()
    networks.save(folder / "run/model.safetensors", model_config, networks.student.state_dict())
    return folder / "run", networks


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_diffusers_loads_the_weights_and_draws_what_mmgen_draws(tmp_path, kind):
    run, networks = trained(kind, tmp_path)
    done = mmgen.convert(run, tmp_path / "student", to="diffusers", lora_only=True)
    assert done.used == 2 * len(networks.base.names)
    student = load_model(run / "model.safetensors")
    ours = drawn_by_mmgen(student, PROMPTS)
    pipe = open_pipeline(tmp_path / "teacher")
    scheduler = "DPMSolverMultistepScheduler" if kind in ("sd3", "sana") else "DDPMScheduler"
    pipe.scheduler = getattr(diffusers, scheduler).from_pretrained(tmp_path / "student", subfolder="scheduler")
    plain, _ = called(pipe, kind, student, PROMPTS, 4, guidance_scale=1)
    pipe.load_lora_weights(tmp_path / "student")
    loaded, _ = called(pipe, kind, student, PROMPTS, 4, guidance_scale=1)
    pipe.fuse_lora()
    fused, _ = called(pipe, kind, student, PROMPTS, 4, guidance_scale=1)
    assert relative(ours, loaded) < 1e-5 and relative(ours, fused) < 1e-5
    assert relative(plain, loaded) > 1e-3
    card = (tmp_path / "student/README.md").read_text()
    assert f"pipe.scheduler = {scheduler}.from_pretrained" in card and "num_inference_steps=4, guidance_scale=1" in card


@pytest.mark.parametrize("kind", ["sd15", "pixart_alpha", "sd3"])
def test_checkpointed_passes_of_a_pipeline_have_their_adapter(tmp_path, kind):
    """diffusers recomputes its own blocks; in between, the auxiliary and the teacher have been called."""
    found = []
    for checkpointing in (False, True):
        teacher = load_teacher(tiny_pipeline(kind, tmp_path / str(checkpointing)))
        torch.manual_seed(0)
        networks = LoraNetworks(teacher.model.network, StudentSettings(lora=2), One())
        for parameter in [*networks.student.parameters(), *networks.auxiliary.parameters()]:
            torch.nn.init.normal_(parameter, std=0.2)
        network = networks.base.network
        assert isinstance(network, DiffusersText)
        if checkpointing:
            checkpoint_blocks(networks.student)
        null: Text = network.null()[torch.zeros(2, dtype=torch.int64)]
        x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(2))
        t = torch.tensor([10.0, 700.0], dtype=torch.float64)
        loss = networks.student(x, t, None, null).square().mean()
        with torch.no_grad():
            networks.auxiliary(x, t, None, null), networks.base.itself()(x, t, None, null)
        loss.backward()
        assert all(p.grad is not None for p in networks.student.parameters())
        found.append(torch.cat([p.grad.flatten() for p in networks.student.parameters()]))
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-7)


def test_refusals(tmp_path):
    run, _ = trained("pixart_alpha", tmp_path)
    with pytest.raises(ConfigError, match="diffusers loads no LoRA weights into a PixArtAlphaPipeline"):
        mmgen.convert(run, tmp_path / "student", to="diffusers", lora_only=True)
    with pytest.raises(ConfigError, match=r"\(--lora-only\) is for to \(--to\) diffusers"):
        mmgen.convert(run, tmp_path / "student.safetensors", lora_only=True)
    (run / "lora.safetensors").write_bytes(b"nothing")
    with pytest.raises(ModelError, match="cannot be read as a file of adapters"):
        mmgen.convert(run, tmp_path / "student", to="diffusers", lora_only=True)
    (run / "lora.safetensors").unlink()
    shown = typed("convert", str(run), "student/", "--to", "diffusers", "--lora-only", cwd=tmp_path)
    assert "only the averages that a distillation with --lora writes have one" in shown.stderr and not (tmp_path / "student").exists()
