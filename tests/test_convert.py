"""`mmgen convert` and `mmgen inspect` from the command line: files in their original layouts, with a trap inside, become models
that draw what an independent sampler draws; and back, bit for bit."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import original_files
import pytest
import torch
import typer
from golden import state
from PIL import Image
from families import FILES, PRESET
from tiny_model import make_model
from typer.testing import CliRunner

import mmgen
from mmgen.networks.conditions import Labels
from mmgen.sampling import drawing as sampling
from mmgen.cli.convert import convert, inspect
from mmgen.cli.sample import sample
from mmgen.models.denoiser import Denoiser
from mmgen.errors import ConfigError, ModelError
from mmgen.system.random import keys, normal
from mmgen.sampling.drawing import _NOISE

DIT = {"dit": "dit_learn_sigma", "sit": "sit_learn_sigma"}


def run(command, *arguments) -> str:
    app = typer.Typer()
    app.command()(command)
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    if result.exception is not None:
        raise result.exception
    return result.output


def write(name: str, folder: Path) -> tuple[Path, list[str]]:
    """A file as its own code writes it, under a name that says nothing, and the options that it needs."""
    path, mark = folder / "file", folder / "mark"
    if name in DIT:
        namespace = {"num_heads": 4, "path_type": "Linear", "prediction": "velocity"} if name == "sit" else {"num_heads": 4}
        original_files.write_pt(path, state(DIT[name]), wrap="ema", namespace=namespace, prefix="module.")
        return path, ["--type", name]
    given = FILES[name]()
    if not given.arguments:
        original_files.write_pt(path, given.tensors)
        return path, ["--preset", PRESET[name]]
    inner = "unet" if "unet" in given.arguments["modules"] else "model"
    module = given.arguments["modules"][inner]
    network = original_files.persistent_network(
        given.tensors, given.arguments["class_name"], given.arguments["init_kwargs"], inner=inner,
        inner_class=module["class_name"], inner_kwargs=module["init_kwargs"], mark=mark,
    )  # fmt: skip
    original_files.write_pickle(path, {"ema": network})
    return path, []


# ---- there, drawn, and back


@pytest.mark.parametrize(
    "name", ["imm_ddpmpp_simple_edm_fm", "imm_dit_euler_fm_stride", "edm_adm_cond", "vp", "ve", "edm2", "adm", "sit"]
)
def test_there_and_back(name, tmp_path):
    path, options = write(name, tmp_path)
    original = mmgen_read(path)
    text = run(convert, path, tmp_path / "m.safetensors", *options)
    assert not (tmp_path / "mark").exists() and "tensors" in text and "mmgen sample" in text
    model = mmgen.load(tmp_path / "m.safetensors")
    converted = model.config.training["converted"]
    assert converted["file"] == "file" and len(converted["sha256"]) == 64 and converted["mmgen_version"] == mmgen.__version__
    card = (tmp_path / "m.md").read_text()
    assert converted["sha256"] in card and "mmgen sample" in card and "icence" in card
    run(convert, tmp_path / "m.safetensors", tmp_path / "back.pt", "--to", "pt")
    back = torch.load(tmp_path / "back.pt", weights_only=True)
    assert back.keys() | converted["left_out"].keys() >= original.keys()
    for key, value in back.items():
        assert value.dtype == original[key].dtype and torch.equal(value, original[key]), key
    if model.config.latents is None:  # the published autoencoder is not at hand
        run(sample, tmp_path / "m.safetensors", "--num", 4, "--steps", 2, "--out", tmp_path / "grid.png")
        assert Image.open(tmp_path / "grid.png").size[0] >= 2 * model.config.resolution
    assert not (tmp_path / "mark").exists()


def small_unet(diffusers):
    torch.manual_seed(0)
    return diffusers.UNet2DModel(
        sample_size=8, in_channels=3, out_channels=3, block_out_channels=(8, 16), norm_num_groups=4, layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    ).eval()  # fmt: skip


def mmgen_read(path: Path) -> dict[str, torch.Tensor]:
    from mmgen.formats.reading import read

    return read(path).tensors


# ---- trajectories against samplers written out here, in the coordinates that the papers write them in


def first_noise(model: Denoiser, count: int) -> torch.Tensor:
    return normal(keys(0, torch.arange(count), _NOISE), (model.config.channels, *[model.config.resolution] * 2), torch.float64)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["edm_ddpmpp_cond", "edm_ncsnpp_cond", "edm_adm_cond", "edm2"])
def test_heun_of_edm(name, tmp_path):
    """Karras et al. (2022), algorithm 1, on the sigmas of equation 5."""
    path, options = write(name, tmp_path)
    run(convert, path, tmp_path / "m.safetensors", *options)
    model, steps = mmgen.load(tmp_path / "m.safetensors"), 4
    low, high = (sigma ** (1 / 7) for sigma in (0.002, 80.0))
    sigmas = [(high + i / (steps - 1) * (low - high)) ** 7 for i in range(steps)] + [0.0]
    label = Labels(torch.tensor([1, 2]), model.config.num_classes) if model.config.num_classes else None

    def slope(x, sigma):
        return (x - model.denoise(x, torch.full((2,), sigma, dtype=torch.float64), label)) / sigma

    x = first_noise(model, 2) * sigmas[0]
    for now, then in zip(sigmas[:-1], sigmas[1:], strict=True):
        first = slope(x, now)
        end = x + (then - now) * first
        x = end if then == 0 else x + (then - now) * (first + slope(end, then)) / 2
    expected = (x * 127.5 + 128).clamp(0, 255).to(torch.uint8)
    options = {"classes": [1, 2]} if label is not None else {}
    found = model.sample(2, steps=steps, sampler="heun", **options).images
    assert (found.int() - expected.int()).abs().max() <= 1 and (found == expected).float().mean() > 0.99


def respaced(steps: int) -> list[int]:
    """guided-diffusion's and DiT's `timestep_respacing`: so many of 1000, with a constant stride, both ends included."""
    return [round(i * 999 / (steps - 1)) for i in reversed(range(steps))]


def test_ddim_of_adm(tmp_path):
    """Song et al. (2021), equation 12 with eta 0, in DDPM's own coordinates, at respaced timesteps of the linear betas."""
    path, options = write("adm", tmp_path)
    run(convert, path, tmp_path / "m.safetensors", *options)
    model, steps = mmgen.load(tmp_path / "m.safetensors"), 5
    bars = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
    timesteps = respaced(steps)
    label, z = Labels(torch.tensor([1, 2]), model.config.num_classes), first_noise(model, 2)
    for t, after in zip(timesteps, [*timesteps[1:], None], strict=True):
        a, s = math.sqrt(bars[t]), math.sqrt(1 - bars[t])
        with torch.no_grad():
            eps = model.network(z.float(), torch.full((2,), float(t), dtype=torch.float64), None, label)[:, :3].double()
        x = ((z - s * eps) / a).clamp(-1, 1)
        if after is None:
            break
        z = math.sqrt(bars[after]) * x + math.sqrt(1 - bars[after]) * (z - a * x) / s
    expected = (x * 127.5 + 128).clamp(0, 255).to(torch.uint8)
    found = model.sample(2, steps=steps, sampler="ddim", classes=[1, 2]).images
    assert (found.int() - expected.int()).abs().max() <= 1 and (found == expected).float().mean() > 0.98


def latents_of(model: Denoiser, steps: int, sampler: str = "ddim") -> torch.Tensor:
    """What is drawn before an autoencoder, which is not at hand, decodes it."""
    chosen = sampling.plan(model.config, sampling.SampleSettings(steps=steps, sampler=sampler, classes=[1, 2], guidance=1.5))
    with torch.no_grad():
        return sampling._draw_batch(model, chosen, torch.arange(2), Labels(torch.tensor([1, 2]), model.config.num_classes))


def guided(model: Denoiser, z: torch.Tensor, time: float) -> torch.Tensor:
    """The raw output, its first half, with guidance 1.5 against the null class on the first three channels: as the code published
    for DiT and SiT has it ("for exact reproducibility reasons")."""
    t, one = torch.full((2,), time, dtype=torch.float64), Labels(torch.tensor([1, 2]), model.config.num_classes)
    with torch.no_grad():
        with_label, without = (model.network(z.float(), t, None, label)[:, :4].double() for label in (one, one.null()))
    first = without[:, :3] + 1.5 * (with_label[:, :3] - without[:, :3])
    return torch.cat([first, with_label[:, 3:]], dim=1)


@pytest.mark.parametrize("steps", [3, 5])
def test_ddim_of_dit(steps, tmp_path):
    path, options = write("dit", tmp_path)
    text = run(convert, path, tmp_path / "m.safetensors", *options)
    assert "first 3 of 4 channels" in text and "--grid linspace" in text
    model, bars = mmgen.load(tmp_path / "m.safetensors"), np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
    z, timesteps = first_noise(model, 2), respaced(steps)
    for t, after in zip(timesteps, [*timesteps[1:], None], strict=True):
        a, s = math.sqrt(bars[t]), math.sqrt(1 - bars[t])
        eps = guided(model, z, t)
        x = (z - s * eps) / a
        z = x if after is None else math.sqrt(bars[after]) * x + math.sqrt(1 - bars[after]) * eps
    torch.testing.assert_close(latents_of(model, steps), z, rtol=1e-4, atol=1e-4)


def test_guidance_on_all_channels(tmp_path):
    """--guide-all: as diffusers' pipeline has it."""
    path, options = write("dit", tmp_path)
    text = run(convert, path, tmp_path / "m.safetensors", *options, "--guide-all")
    model, bars = mmgen.load(tmp_path / "m.safetensors"), np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
    assert "channels, as the published code" not in text
    z = first_noise(model, 2)
    with torch.no_grad():
        t = torch.full((2,), 999.0, dtype=torch.float64)
        given, null = (model.network(z.float(), t, None, Labels(torch.tensor(c), 10))[:, :4].double() for c in ([1, 2], [10, 10]))
    eps = null + 1.5 * (given - null)
    expected = (z - math.sqrt(1 - bars[999]) * eps) / math.sqrt(bars[999])
    torch.testing.assert_close(latents_of(model, 1), expected, rtol=1e-4, atol=1e-4)


def test_euler_of_sit(tmp_path):
    """dz/dt = u from noise at t = 0 to data at t = 1: for the linear path a step of DDIM is a step of Euler."""
    path, options = write("sit", tmp_path)
    run(convert, path, tmp_path / "m.safetensors", *options)
    model = mmgen.load(tmp_path / "m.safetensors")
    z = first_noise(model, 2)
    for i in range(4):
        z = z + guided(model, z, i / 4) / 4
    torch.testing.assert_close(latents_of(model, 4), z, rtol=1e-4, atol=1e-4)


def test_multistep_of_a_consistency_model(tmp_path):
    """Song et al. (2023), algorithm 1: the noise of the second step is fresh."""
    path, options = write("consistency", tmp_path)
    run(convert, path, tmp_path / "m.safetensors", *options)
    model = mmgen.load(tmp_path / "m.safetensors")
    chosen = sampling.plan(model.config, sampling.SampleSettings(steps=2, classes=[1, 2]))
    label = Labels(torch.tensor([1, 2]), model.config.num_classes)
    fresh = normal(keys(0, torch.arange(2), _NOISE + 1), model.image_shape, torch.float64)
    sigmas = [torch.full((2,), sigma, dtype=torch.float64) for sigma in chosen.times[:2]]
    with torch.no_grad():
        first = model.denoise(sigmas[0][0] * first_noise(model, 2), sigmas[0], label)
        x = model.denoise(first + (sigmas[1][0] ** 2 - 0.002**2).sqrt() * fresh, sigmas[1], label)
    expected = (x * 127.5 + 128).clamp(0, 255).to(torch.uint8)
    assert chosen.times[0] == pytest.approx(80) and (model.sample(2, steps=2, classes=[1, 2]).images == expected).float().mean() > 0.99


def test_pushforward_of_imm(tmp_path):
    """Zhou et al. (2025), algorithm 4, by the flow map of OT-FM and Simple-EDM written out (table 5)."""
    path, options = write("imm_ddpmpp_simple_edm_fm", tmp_path)
    run(convert, path, tmp_path / "m.safetensors", *options)
    model, scale = mmgen.load(tmp_path / "m.safetensors"), 0.5
    x, times = scale * first_noise(model, 2), [0.994, 1.4 / 2.4, model.config.flow.t_min]
    for t, s in zip(times[:-1], times[1:], strict=True):
        power = (1 - t) ** 2 + t**2
        time, second = (torch.full((2,), 1000 * v, dtype=torch.float64) for v in (t, s))
        with torch.no_grad():
            output = model.network((x / (scale * math.sqrt(power))).float(), time, second, None).double()
        c_skip, c_out = ((1 - s) * (1 - t) + s * t) / power, -scale * ((1 - s) * t - s * (1 - t)) / math.sqrt(power)
        x = c_skip * x + c_out * output
    expected = (x * 127.5 + 128).clamp(0, 255).to(torch.uint8)
    found = model.sample(2, steps=2).images
    assert (found.int() - expected.int()).abs().max() <= 1 and (found == expected).float().mean() > 0.99


@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_ddim_of_diffusers_is_that_of_diffusers(spacing, prediction, tmp_path):
    """By default: x_hat is clipped and the noise is not computed from it again; timesteps are spaced as the scheduler says."""
    diffusers = pytest.importorskip("diffusers")
    unet = small_unet(diffusers)
    scheduler = diffusers.DDIMScheduler(prediction_type=prediction, timestep_spacing=spacing, clip_sample=True)
    diffusers.DDPMPipeline(unet, scheduler).save_pretrained(tmp_path / "theirs")
    text = run(convert, tmp_path / "theirs", tmp_path / "m.safetensors")
    assert f"timesteps are spaced {spacing}" in text and "keeps the network's noise" in text
    assert f"timesteps are spaced {spacing}" in (tmp_path / "m.md").read_text()
    model = mmgen.load(tmp_path / "m.safetensors")
    z = first_noise(model, 2).float()
    scheduler.set_timesteps(4)
    for t in scheduler.timesteps:
        with torch.no_grad():
            z = scheduler.step(unet(z, t).sample, t, z).prev_sample
    expected = (z * 127.5 + 128).clamp(0, 255).to(torch.uint8)
    found = model.sample(2, steps=4, sampler="ddim").images
    assert (found.int() - expected.int()).abs().max() <= 1 and (found == expected).float().mean() > 0.98


# ---- what is said, and what is refused


def test_inspect(tmp_path):
    path, _ = write("edm_ddpmpp_cond", tmp_path)
    text = run(inspect, path)
    assert "EDM (NVlabs/edm)" in text and "EDM pickle" in text and "SongUNet" in text and "mmgen convert, mmgen sample" in text
    path, _ = write("dit", tmp_path)
    text = run(inspect, path)
    assert "DiT or SiT" in text and "--type dit or --type sit" in text
    assert not (tmp_path / "mark").exists()


def test_inspect_of_our_own(tmp_path):
    path, options = write("ve", tmp_path)
    run(convert, path, tmp_path / "m.safetensors")
    text = run(inspect, tmp_path / "m.safetensors")
    assert "mmgen's own" in text and "mmgen sample" in text


def test_a_run_folder_means_its_model(tmp_path, monkeypatch):
    run_folder = tmp_path / "run"
    run_folder.mkdir()
    make_model(run_folder / "model.safetensors", channels=1)
    (run_folder / "log.jsonl").touch()
    (run_folder / "config.json").write_text("{}")
    assert "mmgen's own" in run(inspect, run_folder) and "diffusers folder" not in run(inspect, run_folder)
    run(convert, run_folder, tmp_path / "m.pt", "--to", "pt")
    assert any(key.startswith("model.enc.") for key in torch.load(tmp_path / "m.pt", weights_only=True))


def test_precision_is_kept_or_as_told(tmp_path):
    path, _ = write("edm2", tmp_path)
    run(convert, path, tmp_path / "kept.safetensors")
    run(convert, path, tmp_path / "wide.safetensors", "--precision", "fp32")
    kept, wide = mmgen_read(tmp_path / "kept.safetensors"), mmgen_read(tmp_path / "wide.safetensors")
    assert all(value.dtype == torch.float16 for value in kept.values() if value.is_floating_point())
    assert all(torch.equal(wide[key], value.float()) for key, value in kept.items())
    assert (tmp_path / "kept.safetensors").stat().st_size < 0.6 * (tmp_path / "wide.safetensors").stat().st_size


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        (["file", "m.pt"], ConfigError, "m.pt must end in .safetensors for --to mmgen"),
        (["file", "there.safetensors"], ConfigError, "there.safetensors exists: choose another name, or .*--overwrite"),
        (["file", "m.safetensors", "--to", "onnx"], ConfigError, "unknown target 'onnx'"),
        (["file", "folder", "--to", "diffusers"], ConfigError, "diffusers"),
        (["file", "m.safetensors", "--precision", "fp8"], ConfigError, "fp8"),
        (["file", "m.safetensors", "--weights", "best"], ConfigError, "unknown weights 'best'"),
        (["nothing.pkl", "m.safetensors"], ModelError, "nothing.pkl"),
        (["page.pkl", "m.safetensors"], ModelError, "page.pkl.*web page"),
        (["cut", "m.safetensors"], ModelError, "cut"),
        (["own.safetensors", "m.safetensors"], ConfigError, "is a model of mmgen's already"),
    ],
)
def test_refusals(tmp_path, monkeypatch, arguments, error, message):
    monkeypatch.chdir(tmp_path)
    path, _ = write("ve", tmp_path)
    (tmp_path / "cut").write_bytes(path.read_bytes()[:3000])
    (tmp_path / "page.pkl").write_text("<!DOCTYPE html><html><body>Access denied</body></html>")
    (tmp_path / "there.safetensors").write_bytes(b"")
    run(convert, "file", "own.safetensors")
    with pytest.raises(error, match=message):
        run(convert, *arguments)
    assert not (tmp_path / "m.safetensors").exists() and not (tmp_path / "mark").exists()


def test_diffusers_there_and_back(tmp_path):
    diffusers = pytest.importorskip("diffusers")
    unet = small_unet(diffusers)
    diffusers.DDPMPipeline(unet, diffusers.DDPMScheduler(prediction_type="epsilon")).save_pretrained(tmp_path / "theirs")
    run(convert, tmp_path / "theirs", tmp_path / "m.safetensors")
    run(convert, tmp_path / "m.safetensors", tmp_path / "ours", "--to", "diffusers")
    pipeline = diffusers.DDPMPipeline.from_pretrained(tmp_path / "ours")
    theirs, ours = unet.state_dict(), pipeline.unet.state_dict()
    assert theirs.keys() == ours.keys() and all(torch.equal(theirs[key], ours[key]) for key in theirs)
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([5, 700])
    with torch.no_grad():
        torch.testing.assert_close(pipeline.unet.eval()(x, t).sample, unet(x, t).sample, rtol=1e-5, atol=1e-5)
    assert json.loads((tmp_path / "ours/scheduler/scheduler_config.json").read_text())["prediction_type"] == "epsilon"
