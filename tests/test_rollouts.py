"""States of the student's own: which images get them, and that they are those of its sampler."""

import pytest
import torch

from mmgen.errors import ConfigError
from mmgen.diffusion.schedules import ScheduleSettings, make_schedule
from mmgen.methods.distill.alternating import turn
from mmgen.methods.distill.rollouts import Rollouts
from mmgen.networks.conditions import Labels


class Student:
    """x_hat of normal data with standard deviation 0.5: linear in z, and known exactly."""

    is_random = False

    def __init__(self, schedule):
        self.schedule, self.evaluated = schedule, 0

    def x_hat(self, z, t, schedule, condition=None, noise=None):
        self.evaluated += len(z)
        alpha, sigma = (values.reshape(-1, 1, 1, 1) for values in (schedule.alpha(t), schedule.sigma(t)))
        return z * alpha * 0.25 / (alpha**2 * 0.25 + sigma**2)


def rollouts(share=0.5, after=0, steps=4):
    return Rollouts(share, after, steps, stochasticity=1.0, seed=3)


def chosen(plan, first, count):
    """(row, j) of the images that begin at states of the student's own."""
    return [(row, level) for row, level in enumerate(plan.levels(torch.arange(first, first + count)).tolist()) if level]


def test_the_share_is_kept_and_every_level_comes_equally_often():
    for share in (0.25, 0.5, 1 / 3, 1.0):
        found = chosen(rollouts(share), 0, 4800)
        assert abs(len(found) - 4800 * share) <= 2
        counts = [sum(level == j for _, level in found) for j in (1, 2, 3, 4)]
        assert max(counts) - min(counts) <= 2
        assert abs(sum(row % 2 for row, _ in found) - len(found) / 2) <= 1  # both minibatches of the instant method


def test_how_a_batch_is_cut_changes_nothing():
    whole = chosen(rollouts(0.3), 64, 32)
    cut = [(row + start, level) for start in (0, 8, 16, 24) for row, level in chosen(rollouts(0.3), 64 + start, 8)]
    assert whole == cut


def test_none_before_the_time_for_it():
    assert {row for row, _ in chosen(rollouts(1.0, after=10), 0, 20)} == set(range(10, 20))


@pytest.mark.parametrize("name", ["vp_cosine", "fm", "discrete"])
def test_states_have_the_variance_that_exact_steps_give(name):
    """Each step of the posterior with x_hat in the place of x: the variance of z by the recursion of the linear student."""
    schedule = make_schedule(ScheduleSettings(name=name))
    student, plan = Student(schedule), rollouts(1.0)
    index, levels = torch.arange(8000), sorted([1, 2, 3, 4] * 2000)
    z = plan.states(student, schedule, torch.Size((1, 2, 2)), None, index, levels)
    variance = 1.0
    from mmgen.diffusion.process import posterior

    for level in (4, 3, 2, 1):
        found = z[[i for i, j in enumerate(levels) if j == level]].var().item()
        assert found == pytest.approx(variance, rel=0.06)
        t, s = (torch.tensor([v / 4], dtype=torch.float64) for v in (level, level - 1))
        on_z, on_x, std = (value.item() for value in posterior(schedule, s, t))
        alpha, sigma = schedule.alpha(t).item(), schedule.sigma(t).item()
        variance = variance * (on_z + on_x * alpha * 0.25 / (alpha**2 * 0.25 + sigma**2)) ** 2 + std**2
    assert student.evaluated == 2000 * (3 + 2 + 1)  # k - j for an image at level j


def test_an_image_has_the_same_state_in_any_batch():
    schedule = make_schedule(ScheduleSettings(name="vp_cosine"))
    index = torch.arange(8)
    states = lambda rows: rollouts().states(Student(schedule), schedule, torch.Size((1, 2, 2)), None, index[rows], [1 + i % 4 for i in rows])
    whole = [0, 4, 1, 5, 2, 6, 3, 7]  # by level
    assert torch.equal(states([5, 2]), states(whole)[[3, 4]])


def test_labels_and_times_go_with_the_images():
    from mmgen.methods.distill.matching import Noised

    schedule = make_schedule(ScheduleSettings(name="vp_cosine"))
    n = 16
    old = Noised(torch.zeros(n, 1, 2, 2, dtype=torch.float64), torch.full((n,), 2.0, dtype=torch.float64),
                 torch.full((n,), 2.0, dtype=torch.float64), Labels(torch.arange(n) % 10, 10), torch.arange(n))  # fmt: skip
    seen = []

    class Watching(Student):
        def x_hat(self, z, t, schedule, condition=None, noise=None):
            seen.append((condition.classes.tolist(), t.tolist()))
            return super().x_hat(z, t, schedule)

    plan = rollouts(0.5)
    new, levels = plan.put(old, Watching(schedule), schedule, range(n)), dict(chosen(plan, 0, n))
    for row in range(n):
        if row not in levels:
            assert new.t[row] == 2 and new.s[row] == 2 and not new.z_t[row].any()
            continue
        assert new.t[row] == levels[row] / 4
        assert levels[row] - 1 < 4 * new.s[row] < levels[row]
        assert new.z_t[row].any()
    first = [row % 10 for row, level in sorted(levels.items(), key=lambda both: both[1]) if level < 4]
    assert seen[0] == (first, [1.0] * len(first))


def test_the_auxiliary_learns_so_many_times_before_the_student_does():
    assert [turn(step, 3) for step in range(8)] == (["auxiliary"] * 3 + ["student"]) * 2
    assert [turn(step) for step in range(4)] == ["auxiliary", "student"] * 2


def test_students_on_another_grid_have_none():
    from dataclasses import replace

    from mmgen.config.distill import DistillConfig
    from mmgen.methods.distill.method import _rollouts
    from mmgen.models.config import SamplingSettings

    class Model:
        sampling = SamplingSettings(grid="flow")

    config = DistillConfig()
    assert _rollouts(config, Model) is None
    with pytest.raises(ConfigError, match="student.rollouts is not for students of flow pipelines"):
        _rollouts(replace(config, student=replace(config.student, rollouts=0.5)), Model)


def test_a_step_costs_the_students_own_steps_too():
    """Counted: the sampler's evaluations of the images of one step."""
    from mmgen.config.distill import resolve
    from mmgen.methods.distill.method import TRAINING

    for method in ("alternating", "instant"):
        plain, half = (
            TRAINING.work(resolve({"student": {"steps": 4, "rollouts": share}, "loss": {"method": method}}))[0].forward for share in (0.0, 0.5)
        )
        counted = sum(4 - level for _, level in chosen(rollouts(0.5), 0, 4000)) / 4000
        assert half - plain == pytest.approx(counted, rel=1e-3)
