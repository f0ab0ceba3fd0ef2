"""The networks of pipelines in training: gradients, checkpointing, forward mode, and both methods of distillation on random latents."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from fake_cuda import move_objective, moved, record
from test_pipelines_students import student_of
from tiny_pipelines import LENGTH, latent_side, tiny_pipeline
from toy_distill import One
from toy_task import Quiet

from mmgen.config.distill import DistillConfig, resolve, settled
from mmgen.config.sections import DataSettings, nest
from mmgen.config.teacher import TeacherConfig
from mmgen.encoders.vae import _constants
from mmgen.errors import ConfigError
from mmgen.losses.moment_matching import finite_derivative, forward_derivative, teacher_gradient
from mmgen.methods.distill.instant import TeacherFunction, choose_derivative
from mmgen.methods.distill.method import distill_task, student_model_config
from mmgen.methods.distill.teachers import load_teacher
from mmgen.methods.neon import tuning
from mmgen.methods.teacher.objective import teacher_task
from mmgen.networks import checkpoint_blocks
from mmgen.networks.conditions import Text
from mmgen.training.batches import Batch
from mmgen.training.cost import pass_cost

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

NETWORKS = ["sd15", "sdxl", "pixart_alpha", "sd3", "sana"]  # one of each network, and SDXL's sizes


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {kind: tiny_pipeline(kind, tmp_path_factory.mktemp(kind)) for kind in (*NETWORKS, "sd21_zero_snr")}


def text_for(config, count: int, seed: int = 0) -> Text:
    """Random features, some of them masked, and SDXL's sizes."""
    text, g = config.text, torch.Generator().manual_seed(seed)

    def rows(n):
        mask = torch.ones(n, text.length, dtype=torch.bool)
        if config.text.pipeline.startswith(("PixArt", "Sana")):
            mask[:, LENGTH:] = False
        pooled = torch.randn(n, text.pooled, generator=g) if text.pooled else None
        return Text(torch.randn(n, text.length, text.width, generator=g), mask, pooled)

    sizes = torch.tensor([[512.0, 640, 0, 64, 512, 512]]).expand(count, 6) if "XL" in text.pipeline else None
    return replace(rows(count), sizes=sizes, empty=rows(1))


def batch_for(kind: str, config, count: int = 4) -> Batch:
    channels = 8 if config.latents.kind == "kl" else 4  # mean and standard deviation, or the mean alone
    moments = torch.rand(count, channels, latent_side(kind), latent_side(kind), generator=torch.Generator().manual_seed(3)) * config.latents.std[0]
    return Batch(moments, text_for(config, count), torch.arange(count), 0)


def task_for(folder: str, **changes):
    config = resolve(nest({"teacher.name": "t", "data.name": "x", "student.steps": 4, "train.batch_size": 4, **changes}, DistillConfig))
    teacher = load_teacher(folder)
    config = settled(config, replace(teacher.model.config, data="x"), teacher.sha256, teacher.has_null_class)
    return distill_task(config, teacher, student_model_config(config, teacher), None, Quiet(), One()), teacher


@pytest.mark.parametrize("kind", NETWORKS)
def test_recomputed_blocks_give_the_same_gradients(folders, kind):
    model = load_teacher(folders[kind]).model
    network = model.network.double().requires_grad_(True)
    x = torch.randn(2, *model.image_shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    text, t = text_for(model.config, 2), torch.tensor([10.0, 900.0], dtype=torch.float64)
    found = []
    for _ in range(2):
        network.zero_grad()
        (network(x, t, None, text) ** 2).mean().backward()
        found.append({name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None})
        checkpoint_blocks(network)
    assert any(getattr(m, "gradient_checkpointing", False) for m in network.modules())
    assert found[0].keys() == found[1].keys() and len(found[0]) > 20
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", NETWORKS)
def test_recomputed_blocks_of_a_teacher_have_the_parameters_of_the_forward_pass(folders, kind):
    """The instant method differentiates by parameters that are put in the place of the network's own."""
    model = load_teacher(folders[kind]).model
    network, text = model.network.requires_grad_(False), text_for(model.config, 2)
    x, t = torch.randn(2, *model.image_shape, generator=torch.Generator().manual_seed(0)), torch.tensor([10.0, 900.0], dtype=torch.float64)
    moved, found = {name: value.detach() + 0.01 for name, value in network.named_parameters()}, []
    for _ in range(2):

        def function(values):
            return torch.func.functional_call(network, values, (x, t, None, text))

        found.append(teacher_gradient(function, moved, torch.zeros_like(function(moved)), torch.ones(2, dtype=torch.float64)))
        checkpoint_blocks(network)
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-4, atol=1e-6 * max(1.0, gradient.abs().max().item()))


@pytest.mark.parametrize("kind", ["sdxl", "pixart_alpha"])
def test_a_pipelines_student_is_trained_as_a_denoiser(folders, kind):
    """As `mmgen neon` does: with the pipeline's null, and without a variance that the network may have learned."""
    config = student_of(load_teacher(folders[kind]), 2).config
    null = text_for(config, 1).empty
    settings = TeacherConfig(network=config.network, denoiser=config.denoiser, text=config.text, data=DataSettings(text=True))
    part = teacher_task(settings, config, null).trained["model"]
    assert torch.equal(part.network.null().tokens, null.tokens) and (null.pooled is None or torch.equal(part.network.null().pooled, null.pooled))
    part.objective(batch_for(kind, config))[0].backward()
    gradients = [p.grad for p in part.network.parameters() if p.grad is not None]
    assert gradients and all(g.isfinite().all() for g in gradients) and any(g.any() for g in gradients)


def test_a_pipelines_student_has_no_dropout_nor_what_would_replace_it(folders):
    with pytest.raises(ConfigError, match="has none; leave it out"):
        task_for(folders["sd15"], **{"student.dropout": 0.1})


def test_a_pipelines_student_that_is_told_its_guidance_is_not_improved_by_neon(folders):
    config = student_of(load_teacher(folders["sd15"]), 2, **{"student.guidance_range": [1, 8]}).config
    config = replace(config, training={"distilled": {}, "config": {"student": {"steps": 2, "guidance_range": [1, 8]}}})
    with pytest.raises(ConfigError, match="told its guidance: neon does not improve those"):
        tuning(config, Path("model.safetensors"), Path("samples"), 16, 1e-3)


@pytest.mark.parametrize("kind", NETWORKS)
def test_forward_mode_agrees_with_differences(folders, kind):
    """Jacobian-vector products in the parameters, as the instant method takes them, with guidance."""
    task, _ = task_for(folders[kind], **{"loss.method": "instant", "teacher.guidance": 2.0})
    matching = task.trained["model"].objective.matching
    assert choose_derivative(matching) == (forward_derivative, None)
    matching.teacher.network.double()
    noised = matching.noised(batch_for(kind, matching.teacher.config, 2))
    function = TeacherFunction(matching)
    g = torch.Generator().manual_seed(1)
    direction = {name: 0.1 * torch.randn(p.shape, dtype=p.dtype, generator=g) for name, p in function.parameters.items()}
    value, along = forward_derivative(function.at(noised.z_t, noised), function.parameters, direction)
    # Sana's linear attention is in float32 whatever the weights are, so that its differences need a longer step
    step, tolerance = (3e-4, 3e-3) if kind == "sana" else (None, 1e-6)
    middle, difference = finite_derivative(function.at(noised.z_t, noised), function.parameters, direction, step)
    assert (value - middle).norm() <= tolerance * value.norm()
    assert (along - difference).norm() <= tolerance * along.norm() and along.norm() > 0


@pytest.mark.slow
@pytest.mark.parametrize("kind", [*NETWORKS, "sd21_zero_snr"])
def test_alternating_begins_with_no_gap_and_learns(folders, kind):
    """Student and auxiliary are the teacher at first. Unguided there is no gap; with guidance there is one, and a few steps of the
    auxiliary bring it towards what the student gives."""
    task, teacher = task_for(folders[kind])
    batch = batch_for(kind, teacher.model.config)
    gap = task.trained["auxiliary"].objective(batch)[1]["moment_gap"][0].item()
    assert gap < 1e-5  # two passes of one network in float32: 2e-7 measured

    task, teacher = task_for(folders[kind], **{"teacher.guidance": 3.0})
    kept = {k: v.clone() for k, v in teacher.model.network.state_dict().items()}
    for name in ("auxiliary", "student"):
        part = task.trained[name]
        part.network.requires_grad_(True)
        optimizer = torch.optim.Adam(part.network.parameters(), lr=1e-4)
        losses = []
        for _ in range(5):
            optimizer.zero_grad()
            loss, numbers = part.objective(batch)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert numbers["moment_gap"][0].item() > 1e-6 and all(torch.isfinite(torch.tensor(losses)))
        assert losses[-1] < losses[0]
        part.network.requires_grad_(False)
    assert all(torch.equal(kept[k], v) for k, v in teacher.model.network.state_dict().items())


def test_guidance_range(folders):
    """w for each image: the teacher follows it exactly, student and auxiliary are told it through an input that begins at 0."""
    task, teacher = task_for(folders["sdxl"], **{"student.guidance_range": [1, 8]})
    matching = task.trained["student"].objective.matching
    batch = batch_for("sdxl", teacher.model.config, 8)
    noised = matching.noised(batch)
    w = noised.condition.guidance
    assert w.min() >= 1 and w.max() <= 8 and len(w.unique()) == 8
    together = matching.teacher_x(noised.z_t, noised)
    for i in range(8):
        one = matching.teacher.x_hat(noised.z_t[[i]], noised.s[[i]], matching.schedule, noised.condition[[i]], w[i].item())
        torch.testing.assert_close(together[[i]], one, rtol=1e-4, atol=1e-4)
    plain = matching.teacher.x_hat(noised.z_t, noised.t, matching.schedule, batch.condition)
    torch.testing.assert_close(matching.student_x(noised), plain, rtol=1e-4, atol=1e-5)  # the student begins as the unguided teacher
    for name in ("student", "auxiliary"):
        network = task.trained[name].network.requires_grad_(True)
        task.trained[name].objective(batch)[0].backward()
        told = network.model.time_embedding.cond_proj.weight
        assert not told.any() and told.grad.abs().max() > 0
        network.requires_grad_(False)


@pytest.mark.parametrize(
    "kind, changes, sentence",
    [
        ("sd3", {"student.guidance_range": [1, 8]}, "SD3Transformer2DModel has no input for guidance"),
        ("sd15", {"student.guidance_range": [8, 1]}, "the least and the largest w"),
        ("sd15", {"student.guidance_range": [1, 8], "teacher.guidance": 3.0}, "set that to 1"),
        ("sd15", {"student.noise_channels": 1}, "takes no channels beside those of the image"),
    ],
)
def test_what_cannot_be_is_refused(folders, kind, changes, sentence):
    with pytest.raises(ConfigError, match=sentence):
        task_for(folders[kind], **changes)


def test_a_student_of_a_flow_has_the_times_of_its_scheduler(folders):
    student = student_of(load_teacher(folders["sd3"]), 4)
    assert student.config.sampling.grid == "flow" and student.config.sampling.schedule.shift == 3.0
    assert student.settings.round_time and not load_teacher(folders["sd3"]).model.settings.round_time


@pytest.mark.parametrize("kind", NETWORKS)
def test_what_a_pass_costs_is_known_beforehand(folders, kind):
    """As `--dry-run` says it, by the same network without weights; recomputed blocks keep less."""
    config = load_teacher(folders[kind]).model.config
    plain, recomputed = pass_cost(config, "fp32"), pass_cost(config, "fp32", checkpointing=True)
    assert plain.parameters == sum(p.numel() for p in load_teacher(folders[kind]).model.network.parameters())
    assert plain.flops == recomputed.flops > 1e5
    assert 0 < recomputed.bytes < plain.bytes


@pytest.mark.slow
@pytest.mark.parametrize("kind", NETWORKS)
def test_a_pass_copies_nothing_and_waits_for_nothing(folders, kind):
    """On CUDA tensors that are not there: see fake_cuda.py. Of the second pass, when constants are on the device."""
    task, teacher = task_for(folders[kind], **{"teacher.guidance": 3.0})
    batch = batch_for(kind, teacher.model.config)
    batch = moved(replace(batch, condition=replace(batch.condition, sizes=None)))  # SDXL's are those of the whole image then
    for part in task.trained.values():
        move_objective(part.objective)
        found = [record(lambda: part.objective(batch)) for _ in range(2)][1]  # noqa: B023
        assert found.faults == [] and found.kernels > 500
        assert found.attention and all(tensor.stride(-1) == 1 for three in found.attention for tensor in three)
    _constants.cache_clear()
