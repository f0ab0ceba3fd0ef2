"""Noise levels and weights of a denoiser's loss, against closed forms."""

import math

import pytest
import torch

from mmgen.models.denoiser import DenoiserSettings
from mmgen.losses.denoising import DenoisingSettings, draw_sigma, level_edges, weight
from mmgen.diffusion.schedules import ScheduleSettings

# alpha and sigma of each process written anew, and the range of sigma that is trained
RANGES = {"fm": (1e-3, 1e3), "vp_cosine": (1e-3, 1e3), "ddpm_linear": (0.01, 150.0), "edm": (0.002, 80.0)}


def edm_sigma(t):
    return ((1 - t) * 0.002 ** (1 / 7) + t * 80 ** (1 / 7)) ** 7


def process(name, t, shift=1.0):
    """alpha_t and sigma_t; a shift multiplies sigma / alpha and keeps what alpha and sigma have in common."""
    if name == "edm":
        return 1 + 0 * t, shift * edm_sigma(t)
    if name == "fm":
        eta = shift * t / (1 - t)
        return 1 / (1 + eta), eta / (1 + eta)
    if name == "vp_cosine":
        eta = shift * torch.tan(math.pi / 2 * t)
    else:
        eta = shift * torch.expm1(19.9 / 2 * t**2 + 0.1 * t).sqrt()
    return (1 + eta**2) ** -0.5, eta * (1 + eta**2) ** -0.5


def model(name, prediction="v", shift=1.0):
    low, high = RANGES[name]
    return DenoiserSettings(
        precondition="schedule", prediction=prediction, schedule=ScheduleSettings(name, shift=shift), sigma_min=shift * low,
        sigma_max=shift * high,
    )  # fmt: skip


def errors(name, shift=1.0):
    """Errors of all predictions of one x_hat, from their definitions: prediction -> mean squares [N], and sigma / alpha [N]."""
    generator = torch.Generator().manual_seed(0)
    t = torch.linspace(0.02, 0.98, 40, dtype=torch.float64)
    t.requires_grad_()
    a, s = process(name, t, shift)
    da, ds = (torch.autograd.grad(value.sum(), t, retain_graph=True)[0][:, None] for value in (a, s))
    a, s = a.detach()[:, None], s.detach()[:, None]
    x, e, off = (torch.randn(40, 12, dtype=torch.float64, generator=generator) for _ in range(3))
    x_hat = x + 0.1 * off
    e_hat = (a * x + s * e - a * x_hat) / s
    both = {
        "x": (x, x_hat),
        "eps": (e, e_hat),
        "v": (a * e - s * x, a * e_hat - s * x_hat),
        "velocity": (da * x + ds * e, da * x_hat + ds * e_hat),
    }
    return {key: ((true - found) ** 2).mean(1) for key, (true, found) in both.items()}, (s / a)[:, 0]


@pytest.mark.parametrize("shift", [1.0, 2.0])
@pytest.mark.parametrize("name", RANGES)
def test_weights_make_the_error_of_x_the_error_of_the_prediction(name, shift):
    found, sigma = errors(name, shift)
    for weighting, prediction in (("eps", "eps"), ("uniform", "x")):
        w = weight(DenoisingSettings(weighting), model(name, "x", shift), sigma)
        torch.testing.assert_close(w * found["x"], found[prediction], rtol=1e-9, atol=0)
    for prediction in ("x", "eps", "v", "velocity"):
        w = weight(DenoisingSettings("output"), model(name, prediction, shift), sigma)
        torch.testing.assert_close(w * found["x"], found[prediction], rtol=1e-7, atol=0)
    if name in ("vp_cosine", "ddpm_linear"):  # the weight v is that of a variance-preserving process
        w = weight(DenoisingSettings("v"), model(name, "x", shift), sigma)
        torch.testing.assert_close(w * found["x"], found["v"], rtol=1e-9, atol=0)


def test_flow_matchings_loss_is_that_of_the_velocity():
    found, sigma = errors("fm")
    t = sigma / (1 + sigma)
    torch.testing.assert_close(weight(DenoisingSettings("output"), model("fm", "velocity"), sigma), t**-2, rtol=1e-9, atol=0)


def test_edms_weight_makes_the_loss_that_of_the_raw_output():
    sigma = torch.logspace(-2.5, 1.9, 30, dtype=torch.float64)
    denoiser = DenoiserSettings(precondition="edm", sigma_data=0.3)
    c_out = sigma * 0.3 / (sigma**2 + 0.3**2).sqrt()
    for settings in (DenoisingSettings("edm", sigma_data=0.3), DenoisingSettings("output")):
        torch.testing.assert_close(weight(settings, denoiser, sigma), c_out**-2, rtol=1e-12, atol=0)


def test_min_snr_is_the_papers_on_eps_and_on_v():
    sigma = torch.logspace(-2, 2, 30, dtype=torch.float64)
    snr = sigma**-2
    w = weight(DenoisingSettings("min_snr", min_snr_gamma=5.0), model("vp_cosine"), sigma)
    torch.testing.assert_close(w / snr, torch.minimum(torch.ones_like(snr), 5 / snr))  # of eps
    torch.testing.assert_close(w / (snr + 1), torch.minimum(snr, torch.full_like(snr, 5.0)) / (snr + 1))  # of v


@pytest.mark.parametrize("shift", [1.0, 2.0])
@pytest.mark.parametrize("name", RANGES)
def test_sigmoid_at_uniform_times_has_the_slope_of_the_log_snr(name, shift):
    t, step = torch.linspace(0.02, 0.98, 30, dtype=torch.float64), 1e-6

    def log_snr(t):
        a, s = process(name, t, shift)
        return 2 * (a.log() - s.log())

    slope = (log_snr(t + step) - log_snr(t - step)) / (2 * step)
    a, s = process(name, t, shift)
    settings = DenoisingSettings("sigmoid", sigmoid_bias=1.5)
    of_eps = weight(settings, model(name, shift=shift), s / a) / (a / s) ** 2
    torch.testing.assert_close(of_eps, 0.5 * -slope / (1 + (log_snr(t) - 1.5).exp()), rtol=1e-6, atol=0)


TIMES = {
    "uniform": DenoisingSettings("sigmoid", sigmoid_bias=-1.0),
    "lognormal": DenoisingSettings("sigmoid", sigmoid_bias=-1.0, times="lognormal", time_mean=-0.4, time_std=1.5),
    "logit_normal": DenoisingSettings("sigmoid", sigmoid_bias=-1.0, times="logit_normal", time_mean=0.3, time_std=1.2),
}


@pytest.mark.parametrize("times", TIMES)
@pytest.mark.parametrize("name", [*RANGES, "precondition edm"])
def test_sigmoid_is_one_integral_whatever_the_times(name, times):
    """1/2 integral of sigmoid(b - lambda) g(lambda) d lambda, with g an error of eps that lives inside the trained range."""

    def error_of_eps(log_snr):
        return torch.exp(-((log_snr - 0.5) ** 2) / 2)

    log_snr = torch.linspace(-8, 8, 4001, dtype=torch.float64)
    expected = torch.trapezoid(0.5 * torch.sigmoid(-1.0 - log_snr) * error_of_eps(log_snr), log_snr)
    denoiser = DenoiserSettings(precondition="edm") if name == "precondition edm" else model(name)
    count = 20_000  # the mean over the draws, by the midpoint rule
    sigma = draw_sigma(TIMES[times], denoiser, (torch.arange(count, dtype=torch.float64) + 0.5) / count)
    of_x = error_of_eps(-2 * sigma.log()) * sigma**2
    # The density is that before the cut, which leaves out a share of these draws
    assert (weight(TIMES[times], denoiser, sigma) * of_x).mean().item() == pytest.approx(expected.item(), rel=0.03)


def kolmogorov(probabilities):
    """The largest distance between the empirical and the uniform distribution function, times sqrt(N)."""
    ordered, count = probabilities.sort().values, len(probabilities)
    steps = torch.arange(count, dtype=torch.float64) / count
    return max((ordered - steps).max(), (steps + 1 / count - ordered).max()).item() * math.sqrt(count)


def random(count=20_000):
    return torch.rand(count, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def test_log_normal_draws_are_edms():
    settings = DenoisingSettings("edm", times="lognormal")  # mean -1.2, standard deviation 1.2
    sigma = draw_sigma(settings, DenoiserSettings(precondition="edm"), random())
    assert kolmogorov(torch.special.ndtr((sigma.log() + 1.2) / 1.2)) < 1.63  # 1 %
    cut = DenoiserSettings(precondition="edm", sigma_min=0.1, sigma_max=0.5)
    sigma = draw_sigma(settings, cut, random())
    assert 0.1 <= sigma.min() and sigma.max() <= 0.5
    low, high = (torch.special.ndtr(torch.tensor((math.log(end) + 1.2) / 1.2, dtype=torch.float64)) for end in (0.1, 0.5))
    assert kolmogorov((torch.special.ndtr((sigma.log() + 1.2) / 1.2) - low) / (high - low)) < 1.63


def test_uniform_draws_are_uniform_in_the_time_of_the_schedule():
    settings = DenoisingSettings()
    for shift in (1.0, 2.0):
        t = torch.atan(draw_sigma(settings, model("vp_cosine", shift=shift), random()) / shift) * 2 / math.pi
        low, high = (math.atan(end) * 2 / math.pi for end in RANGES["vp_cosine"])
        assert kolmogorov((t - low) / (high - low)) < 1.63
    sigma = draw_sigma(settings, DenoiserSettings(precondition="edm"), random())  # EDM's grid, with rho = 7
    low, high = 0.002 ** (1 / 7), 80 ** (1 / 7)
    assert kolmogorov((sigma ** (1 / 7) - low) / (high - low)) < 1.63


def test_logit_normal_draws():
    settings = DenoisingSettings(times="logit_normal", time_mean=0.5, time_std=0.8)
    sigma = draw_sigma(settings, model("fm", "velocity"), random())  # sigma / (1 + sigma) = t, so that logit t = log sigma
    assert kolmogorov(torch.special.ndtr((sigma.log() - 0.5) / 0.8)) < 1.63


@pytest.mark.parametrize("times", TIMES)
def test_levels_are_equal_shares_of_the_draws(times):
    denoiser, uniform = model("vp_cosine"), random()
    sigma, edges = draw_sigma(TIMES[times], denoiser, uniform), level_edges(TIMES[times], denoiser)
    assert len(edges) == 9 and edges == sorted(edges) and (edges[0], edges[-1]) == RANGES["vp_cosine"]
    level = torch.bucketize(sigma, torch.tensor(edges[1:-1], dtype=torch.float64))
    assert torch.equal(level, (8 * uniform).long())


@pytest.mark.parametrize("weighting", ["edm", "sigmoid", "min_snr", "v", "eps", "uniform", "output"])
def test_weights_are_finite_at_the_ends(weighting):
    ends = torch.tensor([2.0**-53, 1 - 2.0**-53], dtype=torch.float64)
    for times in TIMES:
        for denoiser in (*map(model, RANGES), DenoiserSettings(precondition="edm")):
            settings = DenoisingSettings(weighting, times=times)
            w = weight(settings, denoiser, draw_sigma(settings, denoiser, ends))
            assert w.isfinite().all() and (w > 0).all()
