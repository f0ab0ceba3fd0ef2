"""The inputs that students and auxiliaries have: no augmentation, and no parameter that a pass leaves without a gradient."""

import pytest
import torch
from tiny_model import make_denoiser
from toy_distill import COSINE, V, digits, task_for

from mmgen.networks.conditions import Labels
from mmgen.diffusion.schedules import make_schedule
from mmgen.networks import ADMSettings, DiTSettings, EDM2Settings, UNetSettings, UViTSettings
from mmgen.sampling.drawing import SampleSettings, plan

SMALL = {"model_channels": 16, "channel_mult": (1, 2), "num_blocks": 1, "attn_resolutions": (4,)}
NETWORKS = {
    "unet": UNetSettings(**SMALL),
    "adm": ADMSettings(**SMALL, channels_per_head=16),
    "edm2": EDM2Settings(**SMALL, channels_per_head=16),
    "dit": DiTSettings(hidden_size=32, depth=2, num_heads=2),
    "uvit": UViTSettings(
        model_channels=16, channel_mult=(1, 2), num_blocks=(1,), depth=2, channels_per_head=16, emb_channels=16
    ),
}
AUGMENTED = ("unet", "adm")


@pytest.fixture(autouse=True)
def no_inception(monkeypatch):
    monkeypatch.setenv("MMGEN_INCEPTION", "")


def teacher_of(kind, folder):
    more = {"augment_dim": 9} if kind in AUGMENTED else {}
    return make_denoiser(folder / "teacher.safetensors", V, channels=1, num_classes=10, network=NETWORKS[kind], **more)


@pytest.mark.parametrize("kind", AUGMENTED)
def test_augmentation_is_the_teachers_alone(tmp_path, kind):
    """Without its augmentation input a student is exactly its teacher, and so is an auxiliary."""
    task, teacher = task_for(teacher_of(kind, tmp_path))
    assert teacher.model.config.augment_dim == 9 and task.model_config.augment_dim == 0
    schedule, label = make_schedule(COSINE), Labels(torch.arange(4), 10)
    z, t = torch.randn(4, 1, 8, 8, dtype=torch.float64), torch.tensor([0.1, 0.5, 0.9, 1.0], dtype=torch.float64)
    expected = teacher.model.x_hat(z, t, schedule, label)
    denoisers = task.trained["student"].objective.student, task.trained["auxiliary"].objective.auxiliary
    for denoiser in denoisers:
        assert denoiser.config.augment_dim == 0 and not any("augment" in key for key in denoiser.network.state_dict())
        assert torch.equal(denoiser.x_hat(z, t, schedule, label), expected)
    assert "augment_embed.weight" in teacher.model.network.state_dict()


@pytest.mark.parametrize("method", ["alternating", "instant"])
@pytest.mark.parametrize("kind", NETWORKS)
def test_every_parameter_has_a_gradient(tmp_path, kind, method):
    """DistributedDataParallel refuses the second update of a network where one has none."""
    task, _ = task_for(teacher_of(kind, tmp_path), **{"loss.method": method, "loss.preconditioner": "identity"})
    for part in task.trained.values():
        if part.prepare is not None:
            part.prepare(lambda: iter([digits()]))
        part.objective(digits())[0].backward()
        assert [name for name, p in part.network.named_parameters() if p.grad is None] == []


def test_a_shift_and_a_stochasticity_are_of_training_and_of_sampling(tmp_path):
    """student.shift: a noise to signal so many times as large at every time. student.stochasticity is loss.stochasticity unless it is set."""
    place, t = teacher_of("unet", tmp_path), torch.linspace(0.1, 0.9, 5, dtype=torch.float64)
    matchings, plans = [], []
    for changes in ({}, {"student.shift": 2.0, "loss.stochasticity": 0.5}):
        task, _ = task_for(place, **{"student.steps": 4, **changes})
        matchings.append(task.trained["student"].objective.matching)
        plans.append(plan(task.model_config, SampleSettings()))
    plain, shifted = matchings
    torch.testing.assert_close(shifted.schedule.eta(t), 2 * plain.schedule.eta(t))
    assert plans[1].times[1:-1] == pytest.approx([2 * time for time in plans[0].times[1:-1]])
    assert [one.stochasticity for one in plans] == [1.0, 0.5]
    batch = digits(count=4)
    noised, noised_plain = shifted.noised(batch), plain.noised(batch)
    assert torch.equal(noised.t, noised_plain.t) and not torch.allclose(noised.z_t, noised_plain.z_t)
