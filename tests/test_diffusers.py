"""Folders of diffusers, there and back, against diffusers itself."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from golden import settings, state

from mmgen.formats import diffusers as ours
from mmgen.formats import dit
from mmgen.formats.diffusers_scheduler import DISCRETE, read_scheduler
from mmgen.formats.family import Converted, ConvertOptions
from mmgen.formats.reading import Found, read
from mmgen.formats.recognise import family_of
from mmgen.diffusion.preconditioning import DenoiserSettings, preconditioning
from mmgen.diffusion.schedules import ScheduleSettings
from mmgen.models.denoiser import Denoiser
from mmgen.errors import ConfigError, ModelError
from mmgen.diffusion.flow_map import FlowMapSettings
from mmgen.models.config import ModelConfig
from mmgen.models.files import load_model, save_model
from mmgen.networks import DiTSettings, UNetSettings
from mmgen.networks.conditions import Labels

diffusers = pytest.importorskip("diffusers")
PLAIN = ConvertOptions()
BLOCKS = {
    "block_out_channels": (16, 32), "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"), "norm_num_groups": 8, "layers_per_block": 1, "attention_head_dim": 8,
}  # fmt: skip
OLD = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def randomised(model):
    """Weights of an ordinary size everywhere; a DiT's embeddings are then made the same in all blocks, as they are in DiT."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in sorted(model.named_parameters()):
            p.copy_(torch.randn(p.shape, generator=generator) / max(p[0].numel(), 16) ** 0.5)
        for block in getattr(model, "transformer_blocks", []):
            block.norm1.emb.load_state_dict(model.transformer_blocks[0].norm1.emb.state_dict())
    return model.eval().requires_grad_(False)


def unet(**options):
    return randomised(diffusers.UNet2DModel(**{"sample_size": 8, **BLOCKS, **options}))


def transformer(**options):
    given = {"num_attention_heads": 4, "attention_head_dim": 12, "num_layers": 2, "sample_size": 8, "num_embeds_ada_norm": 10}
    return randomised(diffusers.DiTTransformer2DModel(**{**given, "out_channels": 8, **options}))


def denoiser(converted: Converted) -> Denoiser:
    model = Denoiser(converted.config)
    model.network.load_state_dict(converted.state)
    return model.eval().requires_grad_(False)


def inputs(channels: int, classes: int = 0):
    generator = torch.Generator().manual_seed(1)
    label = torch.tensor([0, 3, classes - 1]) if classes else None
    return torch.randn(3, channels, 8, 8, generator=generator), torch.tensor([0, 417, 999]), label


def error(a: torch.Tensor, b: torch.Tensor) -> float:
    """Root mean square of the difference, relative to b's. Measured: 0 for UNet2DModel, 3e-6 for DiT, whose angles diffusers has
    in float32; ten times that is allowed."""
    assert a.shape == b.shape
    return ((a - b).double().pow(2).mean() / b.double().pow(2).mean()).sqrt().item()


def agree(a: torch.Tensor, b: torch.Tensor, tolerance: float = 3e-5) -> None:
    assert error(a, b) < tolerance


def plain(config: dict) -> dict:
    return json.loads(json.dumps({key: value for key, value in config.items() if not key.startswith("_")}))


UNETS = {
    "plain": ({}, "pipeline"),
    "bin": ({"freq_shift": 1, "flip_sin_to_cos": False, "downsample_padding": 0}, "flat bin"),
    "classes": ({"num_class_embeds": 7, "resnet_time_scale_shift": "scale_shift"}, "flat"),
    "variance": ({"out_channels": 6}, "pipeline"),
    "fourier": ({"time_embedding_type": "fourier", "in_channels": 1, "out_channels": 1}, "flat"),
}


@pytest.mark.parametrize("name", UNETS)
def test_unet_there_and_back(tmp_path, name):
    """Saved by diffusers, read, stored, written again and loaded by diffusers: the same tensors and the same outputs."""
    options, layout = UNETS[name]
    theirs, scheduler = unet(**options), diffusers.DDPMScheduler(beta_schedule="scaled_linear", prediction_type="v_prediction")
    classes = options.get("num_class_embeds", 0)
    if layout == "pipeline":
        diffusers.DDPMPipeline(theirs, scheduler).save_pretrained(tmp_path / "in")
    else:
        theirs.save_pretrained(tmp_path / "in", safe_serialization=layout == "flat")
        scheduler.save_config(tmp_path / "in")
    x, t, label = inputs(theirs.config.in_channels, classes)
    t = t + 0.5 if name == "fourier" else t
    expected = theirs(x, t, class_labels=label).sample

    given = read(tmp_path / "in")
    assert ours.family(given) and not dit.family(given)
    converted = ours.convert(given, PLAIN)
    assert converted.family == family_of(given) == "diffusers-unet2d" and converted.left_out == {}
    save_model(tmp_path / "m.safetensors", converted.config, converted.state)
    model = load_model(tmp_path / "m.safetensors")
    assert model.config == converted.config and model.config.num_classes == classes
    agree(model.network(x, t.double(), condition=Labels(label, classes) if classes else None), expected)
    back = ours.original_state(model.config, model.network.state_dict())
    assert back.keys() == given.tensors.keys() and all(torch.equal(back[key], given.tensors[key]) for key in back)

    ours.write_diffusers(model.config, model.network.state_dict(), tmp_path / "out")
    again = diffusers.UNet2DModel.from_pretrained(tmp_path / "out", subfolder="unet")
    assert plain(again.config) == plain(theirs.config)
    agree(again(x, t, class_labels=label).sample, expected, 1e-12)
    pipeline = diffusers.DDPMPipeline.from_pretrained(tmp_path / "out")
    assert pipeline.scheduler.config.prediction_type == "v_prediction"
    assert torch.equal(pipeline.scheduler.betas, scheduler.betas)
    if not classes:
        noise = torch.Generator().manual_seed(0)
        assert pipeline(generator=noise, num_inference_steps=2, output_type="np").images.shape[:3] == (1, 8, 8)


def test_old_attention_names(tmp_path):
    """Names from before diffusers 0.17, as in google/ddpm-cifar10-32: read like the new ones, and given back as they were."""
    theirs = unet()
    diffusers.DDPMPipeline(theirs, diffusers.DDPMScheduler()).save_pretrained(tmp_path / "in")
    given = read(tmp_path / "in")
    new = dict(given.tensors)
    for key in new:
        for now, before in OLD.items():
            if f".{now}." in key:
                given.tensors[key.replace(f".{now}.", f".{before}.")] = given.tensors.pop(key)
    assert sum("proj_attn" in key for key in given.tensors) == 8
    converted = ours.convert(given, PLAIN)
    x, t, _ = inputs(3)
    agree(denoiser(converted).network(x, t.double()), theirs(x, t).sample)
    back = ours.original_state(converted.config, converted.state)
    assert back.keys() == given.tensors.keys() and all(torch.equal(back[key], given.tensors[key]) for key in back)
    ours.write_diffusers(converted.config, converted.state, tmp_path / "out")
    assert read(tmp_path / "out").tensors.keys() == new.keys()


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("schedule", ["linear", "scaled_linear", "squaredcos_cap_v2"])
@torch.no_grad()
def test_schedulers(tmp_path, prediction, schedule):
    """x_hat is what diffusers' own scheduler takes it to be, clipped where it clips; DDPM and DDIM."""
    theirs = unet()
    given = {"beta_schedule": schedule, "prediction_type": prediction, "clip_sample": schedule == "linear"}
    for kind in (diffusers.DDPMScheduler, diffusers.DDIMScheduler):
        scheduler = kind(**given)
        diffusers.DDPMPipeline(theirs, scheduler).save_pretrained(tmp_path / kind.__name__)
        model = denoiser(ours.convert(read(tmp_path / kind.__name__), PLAIN))
        table = preconditioning(model.settings).table(torch.device("cpu"))
        scheduler.set_timesteps(1000)
        for t in (3, 500, 900):
            z = inputs(3)[0].double()
            output = theirs(z.float(), t).sample
            expected = scheduler.step(output.double(), t, z).pred_original_sample
            y = z * (table[t] ** 2 + 1).sqrt()
            agree(model.denoise(y, table[t].expand(3)), expected, 1e-4)


@torch.no_grad()
def test_consistency_model(tmp_path):
    theirs, scheduler = unet(), diffusers.CMStochasticIterativeScheduler(clip_denoised=False)
    diffusers.ConsistencyModelPipeline(theirs, scheduler).save_pretrained(tmp_path / "in")
    converted = ours.convert(read(tmp_path / "in"), PLAIN)
    assert converted.config.denoiser.precondition == "cm"
    scheduler.set_timesteps(5)
    sigma, t = scheduler.sigmas[2].double(), scheduler.timesteps[2]
    y = inputs(3)[0].double() * sigma
    output = theirs((y / (sigma**2 + 0.25).sqrt()).float(), t).sample
    c_skip, c_out = scheduler.get_scalings_for_boundary_condition(sigma)
    agree(denoiser(converted).denoise(y, sigma.expand(3)), c_out * output + c_skip * y)
    ours.write_diffusers(converted.config, converted.state, tmp_path / "out")
    again = diffusers.ConsistencyModelPipeline.from_pretrained(tmp_path / "out")
    assert again.scheduler.config.sigma_max == 80 and not again.scheduler.config.clip_denoised


def test_scheduler_defaults_are_those_of_diffusers():
    """A config that says nothing but its class, as old ones do."""
    for kind in DISCRETE:
        settings = read_scheduler({"_class_name": kind}, "x")
        betas = getattr(diffusers, kind)().betas.double()
        table = preconditioning(settings).table(torch.device("cpu"))
        torch.testing.assert_close((1 + table**2).reciprocal(), torch.cumprod(1 - betas, 0), rtol=1e-4, atol=0)
        assert settings.clip == getattr(diffusers, kind)().config.get("clip_sample", False)
    assert read_scheduler({"_class_name": "DDPMScheduler", "predict_epsilon": False}, "x").prediction == "x"
    edm = read_scheduler({"_class_name": "EDMEulerScheduler", "sigma_max": 60.0}, "x")
    assert edm == DenoiserSettings("edm", sigma_max=60.0)


@pytest.mark.parametrize(
    "config, message",
    [
        (None, "holds no scheduler_config.json.*DDPMScheduler"),
        ({"_class_name": "ScoreSdeVeScheduler"}, "the scheduler ScoreSdeVeScheduler, which"),
        (
            {"_class_name": "EDMEulerScheduler", "prediction_type": "v_prediction"},
            "EDMEulerScheduler with prediction_type 'v_p",
        ),
        ({"_class_name": "DDPMScheduler", "beta_schedule": "sigmoid"}, "beta_schedule = 'sigmoid'"),
        ({"_class_name": "DPMSolverMultistepScheduler", "prediction_type": "flow_prediction"}, "'flow_prediction'"),
        ({"_class_name": "DDPMScheduler", "trained_betas": [0.1, 0.2]}, "trained_betas"),
        ({"_class_name": "DDIMScheduler", "rescale_betas_zero_snr": True}, "the noise says nothing of the image"),
        ({"_class_name": "DDIMScheduler", "thresholding": True}, "thresholding"),
        ({"_class_name": "DDIMScheduler", "clip_sample_range": 2.0}, "clip_sample_range"),
    ],
)
def test_schedulers_refused(config, message):
    with pytest.raises(ModelError, match="a-folder .*" + message):
        read_scheduler(config, "a-folder")


# DiT


@torch.no_grad()
def test_dit_there_and_back(tmp_path):
    theirs, scheduler = transformer(), diffusers.DDIMScheduler(clip_sample=False)
    theirs.save_pretrained(tmp_path / "in" / "transformer")
    scheduler.save_pretrained(tmp_path / "in" / "scheduler")
    x, t, label = inputs(4, 11)
    expected = theirs(x, t, class_labels=label).sample
    index = {"_class_name": "DiTPipeline", "id2label": {str(i): f"name {i}" for i in range(10)}}
    (tmp_path / "in" / "model_index.json").write_text(json.dumps(index))
    given = read(tmp_path / "in")
    assert ours.family(given) and not dit.family(given)
    converted = ours.convert(given, PLAIN)
    assert converted.family == family_of(given) == "diffusers-dit" and converted.config.class_names[3] == "name 3"
    assert len(converted.left_out) == 5  # the embeddings of the second block
    assert converted.config.latents.resolution == 64
    model, label = denoiser(converted), Labels(label, 10)
    agree(model.network(x, t.double(), condition=label), expected)
    original = denoiser(ours.convert(given, ConvertOptions(type="dit")))  # with DiT's own frequencies: another network
    assert error(original.network(x[1:], t[1:].double(), condition=label[1:]), expected[1:]) > 0.1
    table = preconditioning(model.settings).table(torch.device("cpu"))[t[1:]]
    scheduler.set_timesteps(1000)
    for i in (1, 2):
        right = scheduler.step(expected[i : i + 1, :4].double(), int(t[i]), x[i : i + 1].double()).pred_original_sample
        y = x[i : i + 1].double() * (table[i - 1] ** 2 + 1).sqrt()
        agree(model.denoise(y, table[i - 1].expand(1), label[i : i + 1]), right, 1e-4)
    back = ours.original_state(converted.config, converted.state)
    assert back.keys() == given.tensors.keys() and all(torch.equal(back[key], given.tensors[key]) for key in back)

    ours.write_diffusers(converted.config, converted.state, tmp_path / "out")
    again = diffusers.DiTTransformer2DModel.from_pretrained(tmp_path / "out", subfolder="transformer")
    agree(again(x, t, class_labels=label.classes).sample, expected, 1e-12)
    vae = diffusers.AutoencoderKL(latent_channels=4, block_out_channels=(8,), norm_num_groups=4)
    pipeline = diffusers.DiTPipeline.from_pretrained(tmp_path / "out", vae=vae)
    assert pipeline.get_label_ids(["name 3"]) == [3] and not pipeline.scheduler.config.clip_sample


@torch.no_grad()
def test_dit_of_the_original(tmp_path):
    """`--type dit`: DiT's own weights in a folder of diffusers, computed as DiT computes them."""
    tensors, name = state("dit_learn_sigma"), "dit_learn_sigma"
    args = {"num_heads": settings(name)["num_heads"]}
    original = dit.convert(Found(Path("x.pt"), "", tensors, {"args": args}, {}, ""), ConvertOptions(type="dit"))
    theirs = transformer()
    theirs.load_state_dict(ours.original_state(original.config, original.state))
    theirs.save_pretrained(tmp_path)
    diffusers.DDIMScheduler().save_config(tmp_path)
    again = ours.convert(read(tmp_path), ConvertOptions(type="dit"))
    assert again.config.network == original.config.network
    torch.testing.assert_close(again.state["position"], original.state["position"], rtol=0, atol=1e-5)
    assert all(torch.equal(again.state[key], value) for key, value in original.state.items() if key != "position")


DITS_REFUSED = [
    ({"norm_type": "ada_norm_single"}, {}, "norm_type = 'ada_norm_single'"),
    ({"activation_fn": "geglu"}, {}, "activation_fn = 'geglu'"),
    ({"out_channels": 5}, {}, "4 channels in and 5 out"),
    ({"sample_size": 16}, {}, None),
    ({"sample_size": 10**6}, {}, "no DiT is so large"),
    ({"num_layers": 10**9}, {}, "no DiT is so large"),
    ({"num_layers": 3}, {}, "lacks transformer_blocks.2"),
    ({"num_embeds_ada_norm": 9}, {}, r"label_embed.weight here has the shape \[11, 48\], by config.json \[10, 48\]"),
    ({}, {"transformer_blocks.1.norm1.emb.class_embedder.embedding_table.weight": torch.zeros(11, 48)}, "differs from the first"),
    ({}, {"transformer_blocks.1.attn1.to_k.bias": None}, "lacks transformer_blocks.1.attn1.to_k.bias"),
    ({}, {"transformer_blocks.1.attn2.to_k.bias": torch.zeros(1)}, "has transformer_blocks.1.attn2.to_k.bias, which is no part"),
]


@pytest.mark.parametrize("config, tensors, message", DITS_REFUSED)
def test_dits_refused(tmp_path, config, tensors, message):
    transformer().save_pretrained(tmp_path)
    diffusers.DDIMScheduler().save_config(tmp_path)
    given = read(tmp_path)
    given.arguments["config"].update(config)
    given.tensors.update(tensors)
    changed = Found(given.path, "", {k: v for k, v in given.tensors.items() if v is not None}, given.arguments, {}, "")
    if message is None:  # the position is computed, for whatever size
        assert ours.convert(changed, PLAIN).state["position"].shape == (1, 64, 48)
        return
    with pytest.raises(ModelError, match=message):
        ours.convert(changed, PLAIN)


# Refusals


def test_folders_refused(tmp_path):
    diffusers.DDPMPipeline(unet(), diffusers.DDPMScheduler()).save_pretrained(tmp_path)
    given = read(tmp_path)

    def refused(message: str, kind=ModelError, tensors=None, options=PLAIN, **config):
        arguments = {**given.arguments, "config": {**given.arguments["config"], **config}}
        with pytest.raises(kind, match=message):
            ours.convert(Found(given.path, "", tensors or given.tensors, arguments, {}, ""), options)

    refused("UNet2DConditionModel of diffusers; mmgen reads UNet2DModel", _class_name="UNet2DConditionModel")
    refused("without config.json", _class_name=None)
    refused("3 channels in and 4 out", out_channels=4)
    refused("class_embed_type = 'timestep'", class_embed_type="timestep")
    refused("sample_size = None", sample_size=None)
    refused(r"sample_size = \[8, 16\]", sample_size=[8, 16])
    refused("diffusers cannot build the UNet2DModel", ConfigError, down_block_types=["NoBlock", "DownBlock2D"])
    refused("layers_per_block = 1000000000", layers_per_block=10**9)
    refused("conv_in.weight is", block_out_channels=[8, 32])
    refused("lacks conv_out.bias", tensors={k: v for k, v in given.tensors.items() if k != "conv_out.bias"})
    refused("unknown extra.bias", tensors={**given.tensors, "extra.bias": torch.zeros(1)})
    refused("--type", ConfigError, options=ConvertOptions(type="dit"))


def test_a_network_with_classes_needs_them():
    settings = {"sample_size": 8, "num_class_embeds": 7, **{k: list(v) if isinstance(v, tuple) else v for k, v in BLOCKS.items()}}
    config = ModelConfig(
        ours.DiffusersUNetSettings(config=json.dumps(settings)), None, 8, 3, 7, denoiser=DenoiserSettings("discrete")
    )
    with pytest.raises(ConfigError, match="no null class"):
        Denoiser(config).denoise(torch.zeros(1, 3, 8, 8), torch.ones(1, dtype=torch.float64))


DISCRETE_DIT = DiTSettings(hidden_size=48, depth=2, num_heads=4, time_endpoint=True, mlp_epsilon=1e-5)
NOT_WRITTEN = [
    (UNetSettings(), {"denoiser": DenoiserSettings("edm")}, r"sqrt\(1/2\)"),
    (DISCRETE_DIT, {"flow": FlowMapSettings()}, "second time"),
    (DISCRETE_DIT, {"denoiser": DenoiserSettings("flow")}, "SiT's path"),
    (DISCRETE_DIT, {"denoiser": DenoiserSettings("schedule", schedule=ScheduleSettings("vp_cosine"))}, "no timesteps"),
    (DISCRETE_DIT, {"denoiser": DenoiserSettings("discrete"), "num_classes": 0}, "unconditional"),
    (DiTSettings(hidden_size=48), {"denoiser": DenoiserSettings("discrete")}, r"10000\^\(1/127\)"),
    (DISCRETE_DIT, {"denoiser": DenoiserSettings("discrete")}, "position embedding"),
]


@pytest.mark.parametrize("network, options, message", NOT_WRITTEN)
def test_what_diffusers_has_no_class_for(tmp_path, network, options, message):
    """Refused with the reason and the alternative, before anything is written: original names only where the model has any."""
    flow, training = options.get("flow"), {"distilled": {"converted": {"family": "dit"}}}
    config = ModelConfig(network, **{"flow": None, "resolution": 8, "channels": 4, "num_classes": 10, **options})
    for one, alternative in ((config, "--to pt" if flow else "sample from it"), (replace(config, training=training), "--to pt")):
        with pytest.raises(ConfigError, match=f"{message}.*; (use )?{alternative}"):
            ours.write_diffusers(one, {"position": torch.zeros(1, 16, 48)}, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
