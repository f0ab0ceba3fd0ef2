"""Properties that hold for any numbers: of schedules, conversions, samplers, batches and data words."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from properties import examples

from mmgen.sampling import denoiser_samplers as diffusion_samplers, flow_map_samplers as samplers
from mmgen.data.resolve import find_latents, resolve
from mmgen.diffusion.preconditioning import DenoiserSettings, preconditioning
from mmgen.diffusion.process import ddim_coefficients, diffuse, posterior
from mmgen.errors import ConfigError, DataError
from mmgen.diffusion.flow_map import FlowMapSettings, coefficients
from mmgen.losses.imm import ImmSettings, documented_times, draw_times, earlier_time
from mmgen.sampling.sigma_grids import sigma_grid
from mmgen.system.random import keys, normal
from mmgen.diffusion.schedules import MAKERS, SCHEDULES, ScheduleSettings, make_schedule
from mmgen.training.batches import data_indices, split_batch

NAMES = ("fm", "vp_cosine", "ddpm_linear", "edm", "discrete")
times = st.floats(1e-6, 1 - 1e-6)
shifts = st.floats(math.log(1e-3), math.log(1e3)).map(math.exp)
schedules = st.builds(ScheduleSettings, st.sampled_from(NAMES), shifts)


def at(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


# Schedules


@examples(150)
@given(schedules, times)
def test_schedules(settings, t):
    """What the names promise; eta and log-SNR and their inverses; derivatives against differences."""
    schedule, time = make_schedule(settings), at(t)
    alpha, sigma = schedule.alpha(time), schedule.sigma(time)
    kept = {"fm": alpha + sigma, "edm": alpha}.get(settings.name, alpha**2 + sigma**2)
    assert torch.allclose(kept, at(1.0), rtol=1e-12)
    assert alpha > 0 and sigma > 0
    assert torch.allclose(schedule.eta(time), sigma / alpha) and torch.allclose(schedule.log_snr(time), 2 * (alpha / sigma).log())
    base = make_schedule(ScheduleSettings(settings.name))
    assert torch.allclose(schedule.eta(time), settings.shift * base.eta(time), rtol=1e-9)
    assert torch.allclose(schedule.eta_inverse(schedule.eta(time)), time, rtol=1e-7, atol=1e-9)
    assert torch.allclose(schedule.log_snr_inverse(schedule.log_snr(time)), time, rtol=1e-7, atol=1e-9)
    step = 1e-6 * min(t, 1 - t)
    for function, derivative in ((schedule.alpha, schedule.d_alpha), (schedule.sigma, schedule.d_sigma),
                                 (schedule.log_snr, schedule.d_log_snr)):  # fmt: skip
        low, high = function(at(t - step)), function(at(t + step))
        rounding = 1e-15 * (abs(low) + 1) / step
        assert torch.allclose(derivative(time), (high - low) / (2 * step), rtol=1e-4, atol=float(rounding) + 1e-9)
    assert schedule.d_log_snr(time) < 0


@examples(50)
@given(schedules, st.lists(times, min_size=2, max_size=20))
def test_noise_grows_with_time(settings, several):
    eta = make_schedule(settings).eta(at(*sorted(several)))
    assert (eta.diff() >= 0).all()


@examples(60)
@given(st.sampled_from(NAMES), st.one_of(st.floats(allow_nan=True, allow_infinity=True)), st.floats(), st.floats())
def test_schedules_of_any_numbers(name, shift, low, high):
    """They make a schedule whose ends are numbers, or a ConfigError."""
    try:
        schedule = make_schedule(ScheduleSettings(name, shift, low, high))
    except ConfigError:
        return
    assert torch.isfinite(schedule.alpha(at(0.0, 1.0))).all() and torch.isfinite(schedule.sigma(at(0.0, 1.0))).all()


# Conversions


@examples(100)
@given(schedules, times, times, st.floats(0, 1))
def test_posterior(settings, first, second, stochasticity):
    """z_s drawn from q(z_s | z_t, x) has q(z_s | x), whatever the stochasticity; 0 is DDIM, in as many steps as one likes."""
    s, t = at(min(first, second)), at(max(first, second))
    schedule = make_schedule(settings)
    on_z, on_x, std = posterior(schedule, s, t, stochasticity=stochasticity)
    assert torch.allclose(on_z * schedule.alpha(t) + on_x, schedule.alpha(s), rtol=1e-9)
    variance = (on_z * schedule.sigma(t)) ** 2 + std**2
    assert torch.allclose(variance, schedule.sigma(s) ** 2, rtol=1e-8)
    for ours, theirs in zip(posterior(schedule, s, t, stochasticity=0.0), (*ddim_coefficients(schedule, s, t), at(0.0))):
        assert torch.allclose(ours, theirs, rtol=1e-9, atol=1e-12)


@examples(60)
@given(schedules, st.tuples(times, times, times), st.integers(0, 99))
def test_ddim_by_way_of_another_time(settings, three, seed):
    s, r, t = (at(value) for value in sorted(three))
    schedule, x = make_schedule(settings), normal(keys(seed, torch.arange(1), 1), (4,), torch.float64)
    z = diffuse(schedule, x, normal(keys(seed, torch.arange(1), 2), (4,), torch.float64), t)

    def ddim(z, s, t):
        on_z, on_x = ddim_coefficients(schedule, s, t)
        return on_z * z + on_x * x

    assert torch.allclose(ddim(ddim(z, r, t), s, r), ddim(z, s, t), rtol=1e-8, atol=1e-8 * float(z.abs().max()))


@examples(100)
@given(schedules, times, st.sampled_from(["eps", "x", "v", "velocity"]), st.integers(0, 99))
def test_predictions(settings, t, prediction, seed):
    """From x and e to the output that a perfect network would have, and back to x."""
    schedule, time = make_schedule(settings), at(t)
    assume(1e-4 < float(schedule.eta(time)) < 1e4)
    x, e = (normal(keys(seed, torch.arange(1), i), (8,), torch.float64) for i in (1, 2))
    alpha, sigma = schedule.alpha(time), schedule.sigma(time)
    output = {"eps": e, "x": x, "v": alpha * e - sigma * x, "velocity": schedule.d_alpha(time) * x + schedule.d_sigma(time) * e}
    denoiser = DenoiserSettings(precondition="schedule", prediction=prediction, schedule=settings)
    eta = schedule.eta(time)
    c_skip, c_out, c_in, _ = preconditioning(denoiser)(eta)
    y = x + eta * e
    assert torch.allclose(c_in * y, alpha * x + sigma * e, rtol=1e-6, atol=1e-6)
    assert torch.allclose(c_skip * y + c_out * output[prediction], x, rtol=1e-5, atol=1e-5 * (1 + float(eta)))


OTHERS = [DenoiserSettings(kind) for kind in ("edm", "vp", "ve", "edm_cm", "cm", "discrete", "flow")]


@examples(80)
@given(st.sampled_from(OTHERS), st.floats(0.01, 0.99))
def test_network_times(settings, position):
    """sigma to the network's time and back; where there are timesteps, from those."""
    low, high = preconditioning(settings).range
    low, high = max(low, 1e-3), min(high, 1e3)
    sigma = at(math.exp(math.log(low) + position * math.log(high / low)))
    if settings.precondition == "discrete":
        sigma = preconditioning(settings).sigma(preconditioning(settings).time(sigma))
    assert torch.allclose(preconditioning(settings).sigma(preconditioning(settings).time(sigma)), sigma, rtol=1e-6)


flows = st.builds(
    FlowMapSettings, schedule=st.sampled_from(["fm", "vp_cosine"]), parametrization=st.sampled_from(["identity", "simple_edm"]),
    sigma_data=st.floats(0.05, 5), t_min=st.just(0.006), t_max=st.just(0.994),
)  # fmt: skip


@examples(80)
@given(flows, st.tuples(times, times))
def test_flow_maps_stay_where_they_are(flow, two):
    s, t = sorted(two)
    c_skip, c_out = coefficients(flow, at(t), at(t))
    assert torch.allclose(c_skip, at(1.0)) and c_out.abs() < 1e-12
    assert all(torch.isfinite(one).all() for one in coefficients(flow, at(s), at(t)))


@examples(80)
@given(st.sampled_from(sorted(SCHEDULES)), st.sampled_from(["eta", "t", "log_snr", "inverse_eta"]),
       st.sampled_from(["uniform", "lognormal"]), st.floats(1, 40), st.floats(0, 0.5), st.integers(0, 10**9))  # fmt: skip
def test_times_of_imm(schedule, mapping, distribution, k, gap, seed):
    """t_min <= s <= r <= t <= t_max for any rule, step, gap and draw."""
    low, high = documented_times(mapping, SCHEDULES[schedule].t_max)
    if distribution == "lognormal":
        low, high = max(low, 1e-3), min(high, 0.999)
    flow = FlowMapSettings(schedule=schedule, t_min=low, t_max=high)
    loss = ImmSettings(mapping=mapping, k=k, min_gap=gap, time_distribution=distribution)
    s, t = draw_times(loss, flow, keys(seed, torch.arange(64), 1))
    r = earlier_time(loss, flow, s, t)
    assert (low <= s).all() and (s <= r).all() and (r <= t).all() and (t <= high).all()


# Samplers


class Point:
    """A perfect denoiser, and a perfect flow map, of data that are a single point."""

    def __init__(self, point: torch.Tensor, flow: FlowMapSettings, settings: DenoiserSettings) -> None:
        self.point, self.config, self.settings = point, SimpleNamespace(flow=flow), settings

    def denoise(self, y, sigma, condition=None, guidance=1.0):
        return self.point.expand_as(y)

    def f(self, x, s, t, condition=None, guidance=1.0):
        on_z, on_x = ddim_coefficients(self.config.flow.get_schedule(), s, t)
        return on_z[:, None] * x + on_x[:, None] * self.point


@examples(100)
@given(st.sampled_from(OTHERS), st.integers(1, 40), st.sampled_from(["ddim", "ancestral", "heun"]), st.sampled_from(["default", "uniform", "edm"]),
       st.integers(0, 99))  # fmt: skip
def test_denoiser_samplers_give_the_point(settings, steps, sampler, grid, seed):
    """In any number of steps, on any grid: each of the samplers that a model has."""
    known = diffusion_samplers.samplers_of(settings)
    name = sampler if sampler in known else next(iter(known))
    try:
        sigmas = sigma_grid(settings, steps, grid, (), name)
    except ConfigError:  # a grid that this sampler cannot walk
        assert name == "heun" or grid == "edm"
        return
    assert len(sigmas) == steps + 1 and all(a > b for a, b in zip(sigmas[:-1], sigmas[1:]))

    def noise(step):
        return normal(keys(seed, torch.arange(2), step), (3,), torch.float64)

    point = at(0.3, -0.7, 0.1)
    found = known[name](Point(point, FlowMapSettings(), settings), sigmas[0] * noise(0), sigmas, None, 1.0, noise)
    assert torch.allclose(found, point.expand_as(found), atol=1e-5)


@examples(60)
@given(
    flows,
    st.integers(1, 40),
    st.sampled_from(["pushforward", "restart"]),
    st.sampled_from(["default", "uniform", "edm"]),
    st.integers(0, 99),
)
def test_flow_map_samplers_give_the_point(flow, steps, sampler, grid, seed):
    """Down to the noise that is left at the least time; and images do not depend on those drawn with them."""
    times_ = samplers.time_grid(flow, steps, grid)
    assert len(times_) == steps + 1 and all(a > b for a, b in zip(times_[:-1], times_[1:]))
    point, index = at(0.3, -0.7, 0.1), torch.arange(5)

    def drawn(index):
        def noise(step):
            return normal(keys(seed, index, step), (3,), torch.float64)

        return samplers.SAMPLERS[sampler](Point(point, flow, OTHERS[0]), flow.sigma_data * noise(0), times_, None, 1.0, noise)

    found, left = drawn(index), float(flow.get_schedule().sigma(at(flow.t_min)))
    assert ((found - point * float(flow.get_schedule().alpha(at(flow.t_min)))).abs() <= 8 * flow.sigma_data * left + 1e-9).all()
    assert torch.equal(torch.cat([drawn(index[:2]), drawn(index[2:])]), found)


# Batches


@examples(150)
@given(
    st.integers(1, 64),
    st.integers(1, 16),
    st.integers(1, 16),
    st.integers(1, 200),
    st.integers(0, 5),
    st.integers(1, 70),
    st.integers(0, 9),
)
def test_batches(groups, group_size, processes, at_most, step, length, seed):
    """Every image of a step is in exactly one pass, groups are whole, and an epoch has each row of the data once."""
    batch_size = groups * group_size
    assume(at_most >= group_size)
    parts = split_batch(batch_size, group_size, processes, at_most)
    if parts is None:
        assert batch_size % (processes * group_size)
        return
    assert parts.size <= at_most and parts.size % group_size == 0 and parts.processes == processes
    starts = [parts.start(round_, process) for round_ in range(parts.rounds) for process in range(processes)]
    covered = sorted(i for start in starts for i in range(start, start + parts.size))
    assert covered == list(range(batch_size)) and all(start % group_size == 0 for start in starts)
    first = step * batch_size
    together = data_indices(length, first, batch_size, seed)
    apart = {start: data_indices(length, first + start, parts.size, seed) for start in starts}
    assert [row for start in sorted(starts) for row in apart[start]] == together.tolist()
    assert sorted(data_indices(length, 3 * length, length, seed)) == list(range(length))


# Data words

words = st.one_of(
    st.text(max_size=40), st.text(st.characters(max_codepoint=127), max_size=300),
    st.from_regex(r"\A[\w.-]{0,60}/[\w.-]{0,60}\Z"), st.from_regex(r"\A(hf://|https?://|~|\.\./|/|[A-Z]:\\)[\w./\\:@?#-]{0,60}\Z"),
    st.sampled_from(["~nobody", "~", ".", "..", "/", "//", "a" * 300, "a/" * 3000, "\0", "a\0b", "\ud800", "user/name/", "user/..", "-", "--",
                     "con", "digits/", "./digits", "cifar10\n", "/dev/null", "/proc/self/mem", "\n/\n", "a/\n", "é/ü", "٣/٣"]),
)  # fmt: skip


@pytest.fixture
def offline(own_cache, monkeypatch, tmp_path):
    from huggingface_hub import constants

    monkeypatch.setenv("MMGEN_DATA_DIR", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))


@pytest.mark.slow
@examples(200)
@given(word=words)
def test_data_words(offline, word):
    """Any text is answered by data, or by a DataError or ConfigError of one line."""
    try:
        if find_latents(word) is None:
            assert resolve(word).length > 0
    except (DataError, ConfigError) as error:
        assert len(str(error).splitlines()) == 1 and len(str(error)) < 5000, str(error)


@examples(60)
@given(split=st.text(max_size=30), column=st.text(max_size=30))
def test_splits_and_columns(offline, split, column):
    for options in ({"split": split}, {"image_column": column}, {"label_column": column}):
        try:
            resolve("digits", **options)
        except (DataError, ConfigError) as error:
            assert len(str(error).splitlines()) == 1


def test_the_names_are_all():
    assert set(MAKERS) == set(NAMES)
