"""Teachers of distillation: every file that mmgen reads, in its own coordinates; what is no denoiser is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_convert import write
from tiny_model import make_denoiser, make_model

from mmgen.config import distill as distill_config
from mmgen.formats.family import ConvertOptions
from mmgen.formats.reading import read
from mmgen.formats.recognise import convert
from mmgen.config.sections import OptimizerSettings, nest
from mmgen.diffusion.preconditioning import DenoiserSettings, preconditioning
from mmgen.models.denoiser import Denoiser
from mmgen.errors import ConfigError, ModelError
from mmgen.networks.conditions import Labels
from mmgen.system.files import sha256_of
from mmgen.models.config import SamplingSettings
from mmgen.models.files import load_model
from mmgen.diffusion.schedules import ScheduleSettings, make_schedule
from mmgen.methods.distill.teachers import adam_second_moments, load_teacher, range_note
from mmgen.training.checkpoint import Progress, save_checkpoint
from mmgen.methods.distill.method import find_teacher, student_model_config
from mmgen.training.ema import EMA
from mmgen.training.optim import build_optimizer

COSINE = ScheduleSettings("vp_cosine")


def example(model: Denoiser) -> tuple[torch.Tensor, torch.Tensor, Labels | None]:
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(3, *model.image_shape, generator=generator, dtype=torch.float64)
    label = Labels(torch.tensor([0, 1, 2]), model.config.num_classes) if model.config.num_classes else None
    return z, torch.tensor([0.2, 0.7, 1.0], dtype=torch.float64), label


@pytest.mark.parametrize("name", ["edm_adm_cond", "vp", "ve", "edm2", "adm", "sit"])
def test_files_of_others(name, tmp_path):
    """The same x_hat as the model that `mmgen convert` makes of the file; nothing of what is in it is executed."""
    path, given = write(name, tmp_path)
    options = ConvertOptions(**{given[0].removeprefix("--"): given[1]} if given else {})
    teacher = load_teacher(path, options=options)
    assert not (tmp_path / "mark").exists() and teacher.sha256 == sha256_of(path) and teacher.run is None
    converted = convert(read(path), options)
    model = Denoiser(converted.config).eval()
    model.network.load_state_dict(converted.state)
    z, t, label = example(model)
    schedule = make_schedule(preconditioning(model.settings).process)
    with torch.no_grad():
        expected = model.x_hat(z, t, schedule, label)
    found = teacher.model.x_hat(z, t, schedule, label)
    assert torch.equal(found, expected) and torch.isfinite(found).all() and not found.requires_grad


def test_what_a_file_does_not_tell(tmp_path):
    path, _ = write("adm", tmp_path)
    with pytest.raises(ConfigError, match="preset"):
        load_teacher(path)


def test_folder_of_diffusers(tmp_path):
    diffusers = pytest.importorskip("diffusers")
    from test_convert import small_unet

    unet = small_unet(diffusers)
    diffusers.DDPMPipeline(unet, diffusers.DDPMScheduler()).save_pretrained(tmp_path / "pipeline")
    teacher = load_teacher(tmp_path / "pipeline")
    assert preconditioning(teacher.model.settings).process == ScheduleSettings("discrete") and not teacher.has_null_class
    z, _, _ = example(teacher.model)
    time = 400
    bar = diffusers.DDPMScheduler().alphas_cumprod[time].double()
    with torch.no_grad():
        eps = unet(z.float(), time).sample.double()
    y, sigma = z / bar.sqrt(), ((1 - bar) / bar).sqrt().expand(3)
    expected = ((z - (1 - bar).sqrt() * eps) / bar.sqrt()).clamp(-1, 1)
    assert (teacher.model.denoise(y, sigma) - expected).abs().max() < 1e-4


@pytest.mark.parametrize("kind", ["flow map", "IMM", "consistency", "student"])
def test_no_denoiser(kind, tmp_path):
    if kind == "IMM":
        path, _ = write("imm_ddpmpp_simple_edm_fm", tmp_path)
    elif kind == "flow map":
        path = make_model(tmp_path / "m.safetensors", channels=1)
    elif kind == "consistency":
        path = make_denoiser(tmp_path / "m.safetensors", DenoiserSettings("cm"), channels=1)
    else:
        sampling = SamplingSettings(schedule=COSINE, student_steps=2)
        path = make_denoiser(tmp_path / "m.safetensors", channels=1, sampling=sampling)
    with pytest.raises(ModelError, match="teacher must be a denoiser") as caught:
        load_teacher(path)
    assert str(path) in str(caught.value)


def test_options_are_for_the_files_of_others(tmp_path):
    path = make_denoiser(tmp_path / "m.safetensors", channels=1)
    with pytest.raises(ConfigError, match="says itself"):
        load_teacher(path, options=ConvertOptions(type="sit"))
    with pytest.raises(ConfigError, match="says itself"):
        load_teacher(path, weights="model")


def test_evaluation_mode(tmp_path):
    """The network of the tiny model has dropout; a teacher that was left in training mode would differ from call to call."""
    path = make_denoiser(tmp_path / "m.safetensors", channels=1, num_classes=10)
    teacher = load_teacher(path)
    z, t, label = example(teacher.model)
    schedule = make_schedule(COSINE)
    first, second = (teacher.model.x_hat(z, t, schedule, label) for _ in range(2))
    assert torch.equal(first, second)
    assert not any(module.training for module in teacher.model.modules())
    assert not any(parameter.requires_grad for parameter in teacher.model.parameters())
    teacher.model.train()
    assert not torch.equal(teacher.model.x_hat(z, t, schedule, label), first)  # the assertion above can fail


# ---- coordinates


def test_schedules_of_students():
    own = ScheduleSettings("fm", shift=3.0)
    expected = {
        DenoiserSettings("edm"): ScheduleSettings("edm"),
        DenoiserSettings("edm_cm", sigma_max=70.0): ScheduleSettings("edm", sigma_max=70.0),
        DenoiserSettings("ve", sigma_min=0.02, sigma_max=100.0): ScheduleSettings("edm", sigma_min=0.02, sigma_max=100.0),
        DenoiserSettings("vp"): ScheduleSettings("ddpm_linear"),
        DenoiserSettings("discrete"): ScheduleSettings("discrete"),
        DenoiserSettings("discrete", betas="scaled_linear", beta_end=0.012): ScheduleSettings(
            "discrete", betas="scaled_linear", beta_end=0.012
        ),
        DenoiserSettings("discrete", betas="cosine", num_timesteps=4000): ScheduleSettings(
            "discrete", betas="cosine", num_timesteps=4000
        ),
        DenoiserSettings("iddpm"): COSINE,
        DenoiserSettings("flow"): ScheduleSettings("fm"),
        DenoiserSettings("schedule", schedule=own): own,
    }
    assert {settings: preconditioning(settings).process for settings in expected} == expected


def test_range_note():
    edm = DenoiserSettings("edm")
    assert range_note(edm, preconditioning(edm).process) is None
    assert range_note(DenoiserSettings("flow"), ScheduleSettings("fm")) is None
    note = range_note(edm, COSINE)  # sigma 80 at t = 2/pi atan(80) = 0.99204, sigma 0.002 at 0.00127
    assert "below sigma 0.002, at t < 0.0013" in note and "above sigma 80, at t > 0.9920" in note
    note = range_note(DenoiserSettings("edm", sigma_min=1e-6), COSINE)
    assert "below" not in note and "above sigma 80" in note


# ---- Adam's second moments


def make_run(folder: Path, frozen: str | None = None) -> tuple[Path, dict[str, torch.Tensor]]:
    """A run folder with a checkpoint after two steps of Adam, and what its second moments are by definition."""
    folder.mkdir()
    model = load_model(make_denoiser(folder / "model.safetensors", channels=1)).requires_grad_(True)
    settings = OptimizerSettings("adam", beta2=0.9)
    optimizer = build_optimizer(settings, model.network.parameters())
    expected = {}
    generator = torch.Generator().manual_seed(1)
    for _ in range(2):
        for name, parameter in model.network.named_parameters():
            if name == frozen:
                expected[name] = torch.full_like(parameter, torch.inf)
                continue
            parameter.grad = torch.randn(parameter.shape, generator=generator)
            expected[name] = 0.9 * expected.get(name, 0.0) + 0.1 * parameter.grad**2
        optimizer.step()
    (folder / "log.jsonl").write_text("")
    ema = EMA(model.network, {})
    for images in (9, 10):  # the first is damaged: only the newest is to be read
        save_checkpoint(folder / "checkpoints", {"model": model.network}, {"model": optimizer}, ema, {}, Progress(images))
    (folder / "checkpoints" / f"{9:012d}" / "optimizer.safetensors").write_bytes(b"")
    return folder, expected


@pytest.mark.parametrize("file", ["", "model.safetensors"])
@pytest.mark.parametrize("frozen", [None, "out_conv.bias"])
def test_second_moments_of_a_run(file, frozen, tmp_path):
    folder, expected = make_run(tmp_path / "run", frozen)
    teacher = load_teacher(folder / file)
    found = adam_second_moments(teacher)
    assert teacher.run == folder and found.keys() == expected.keys() and (frozen is None or frozen in found)
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name])


def test_second_moments_of_a_lone_file(tmp_path):
    assert adam_second_moments(load_teacher(make_denoiser(tmp_path / "m.safetensors", channels=1))) is None


def test_second_moments_of_another_network(tmp_path):
    folder, _ = make_run(tmp_path / "run")
    make_denoiser(folder / "model.safetensors", channels=3)
    with pytest.raises(ModelError, match="differs in shape"):
        adam_second_moments(load_teacher(folder))


# ---- settings of `mmgen distill`


def resolved(**changes):
    dotted = {key.replace("__", "."): value for key, value in changes.items()}
    return distill_config.resolve(nest(dotted, distill_config.DistillConfig))


def test_defaults_are_the_papers():
    config = resolved()
    optimizer = config.optimizer
    assert (optimizer.name, optimizer.beta1, optimizer.beta2, optimizer.eps) == ("adam", 0.0, 0.99, 1e-12)
    assert (optimizer.warmup_images, optimizer.decay, optimizer.grad_clip) == (1000 * 2048, "linear", 1.0)
    assert (config.train.batch_size, config.train.max_images, config.train.ema_betas) == (2048, 200_000 * 2048, ())
    assert (config.loss.method, config.loss.posterior, config.loss.stochasticity) == ("alternating", "conditional", 1.0)
    assert config.run.eval_steps == (config.student.steps,) == (8,)
    assert resolved(student__steps=2).run.eval_steps == (2,)
    assert resolved(student__steps=2, run__eval_steps=[1, 2]).run.eval_steps == (1, 2)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"student.steps": 0}, "student.steps must be more than 0"),
        ({"loss.stochasticity": 0.0}, "loss.stochasticity"),  # a deterministic z_s
        ({"loss.stochasticity": 1.1}, "at most 1"),
        ({"loss.stochasticity": 0.5, "loss.posterior": "unconditional"}, "stochasticity"),
        ({"student.stochasticity": 1.5}, "from 0 to 1"),
        ({"loss.preconditioner": "adam"}, "instant"),
        ({"loss.jvp": "finite"}, "instant"),
        ({"loss.method": "instant", "train.batch_size": 2047}, "must be even"),
        ({"loss.method": "instant", "run.batch_per_device": 1}, "at least 2"),
        ({"loss.weighting": "emd"}, "did you mean 'edm'"),
        ({"student.noise_channels": -1}, "noise_channels"),
        ({"data.augment": 0.1}, "data.augment"),
        ({"student.step": 8}, "did you mean 'student.steps'"),
    ],
)
def test_refused(changes, words):
    with pytest.raises(ConfigError) as caught:
        resolved(**changes)
    assert words in str(caught.value)


def test_the_data_are_read_as_the_teacher_read_them(tmp_path):
    """Split, columns and mirror images too, unless the command names a data set or the setting."""
    teacher = load_model(make_denoiser(tmp_path / "teacher.safetensors", channels=1)).config
    read_so = {"name": "user/photos", "split": "validation", "image_column": "picture", "xflip": True, "augment": 0.1}
    teacher = replace(teacher, data="user/photos", training={"config": {"data": read_so}})
    settled = lambda **changes: distill_config.settled(resolved(**changes), teacher, "", False).data  # noqa: E731
    found = settled()
    assert (found.name, found.split, found.image_column, found.xflip) == ("user/photos", "validation", "picture", True)
    assert found.augment == 0 and found.label_dropout == 0
    assert settled(data__split="test").split == "test"
    assert settled(data__name="digits").split == "train"
    with pytest.raises(ConfigError, match="split"):
        distill_config.settled(resolved(), replace(teacher, training={"config": {"data": {"split": 3}}}), "", False)


def test_stochasticity_of_sampling_is_that_of_training_unless_it_is_set(tmp_path):
    place = make_denoiser(tmp_path / "teacher.safetensors", channels=1)
    for changes, wanted in (({}, 1.0), ({"loss.stochasticity": 0.7}, 0.7), ({"student.stochasticity": 0.0}, 0.0)):
        config = distill_config.resolve(
            nest({"teacher.name": str(place), "data.name": "digits", **changes}, distill_config.DistillConfig)
        )
        teacher, config = find_teacher(config, torch.device("cpu"))
        assert student_model_config(config, teacher).sampling.stochasticity == wanted
