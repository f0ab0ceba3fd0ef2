"""Other people's files as teachers, from the command line: an EDM pickle and a folder of diffusers, by both methods."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from original_files import write_edm_pickle
from typer.testing import CliRunner

from mmgen.formats import edm
from mmgen.cli import app
from mmgen.models.denoiser import Denoiser, DenoiserSettings
from mmgen.models.config import ModelConfig
from mmgen.networks import UNetSettings

SHORT = ["--data", "digits", "--preset", "digits-distill", "--device", "cpu", "--batch-size", "8", "--max-images", "64",
         "--lr", "1e-3", "--eval-num", "0",
         "--set", "optimizer.warmup_images=8", "--set", "run.log_every=1", "--out", "run"]  # fmt: skip


def edm_pickle(folder: Path, mark: Path) -> Path:
    network = UNetSettings(model_channels=16, channel_mult=(1, 2), num_blocks=1, attn_resolutions=(4,), dropout=0.1)
    config = ModelConfig(network, None, resolution=8, channels=1, num_classes=10, denoiser=DenoiserSettings("edm"))
    torch.manual_seed(0)
    tensors = edm.original_state(replace(config, data="digits"), Denoiser(config).network.state_dict())
    given = {"img_resolution": 8, "img_channels": 1, "label_dim": 10, "model_type": "SongUNet", "model_channels": 16,
             "channel_mult": [1, 2], "num_blocks": 1, "attn_resolutions": [4], "dropout": 0.1}  # fmt: skip
    return write_edm_pickle(folder / "teacher.pkl", tensors, init_kwargs=given, mark=mark)


def diffusers_folder(folder: Path, mark: Path) -> Path:
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    network = diffusers.UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, layers_per_block=1, block_out_channels=(16, 32), norm_num_groups=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"), attention_head_dim=8,
    )  # fmt: skip
    scheduler = diffusers.DDPMScheduler(num_train_timesteps=1000, beta_schedule="linear")
    diffusers.DDPMPipeline(network, scheduler).save_pretrained(folder / "teacher")
    return folder / "teacher"


@pytest.mark.slow
@pytest.mark.parametrize("method", ["alternating", "instant"])
@pytest.mark.parametrize("make", [edm_pickle, diffusers_folder])
def test_is_distilled_and_sampled(own_cache, tmp_path, make, method):
    place = make(tmp_path, tmp_path / "mark")
    result = CliRunner().invoke(app, ["distill", "--teacher", str(place), "--steps", "2", "--method", method, *SHORT])
    assert result.exit_code == 0, result.output
    lines = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    watched = "moment_gap" if method == "alternating" else "loss"  # what tells a person whether it works
    values = [line[watched] for line in lines if line.get(watched) is not None]
    assert len(values) == 8 and all(math.isfinite(value) for value in values) and any(values)
    assert not (tmp_path / "mark").exists()  # nothing in the file was run
    result = CliRunner().invoke(app, ["sample", "run", "--num", "3", "--out", "samples", "--device", "cpu"])
    assert result.exit_code == 0, result.output
    assert len(list((tmp_path / "samples").glob("0*.png"))) == 3
