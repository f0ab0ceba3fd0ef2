"""Text to image with a narrow SD 1.5 of random weights: `cache-latents --pipeline` against a plain loop, a student's pass against
diffusers' own forward, 8 steps with decoding against the pipeline's own call, what the text costs of a step, and a distillation's step
by LoRA against one of all weights."""

from __future__ import annotations

import io
import itertools
import json
import os
import sys
from collections.abc import Iterator
from functools import lru_cache, partial
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from PIL import Image

import mmgen
from mmgen.config import sections as configs
from mmgen.config.distill import DistillConfig, resolve as resolve_distillation
from mmgen.data import encoding
from mmgen.data.encoding import EncodingSettings, encode_source
from mmgen.data.latents import load_latents
from mmgen.data.resolve import resolve
from mmgen.encoders.pipeline import pipeline_parts
from mmgen.encoders.text import open_encoder
from mmgen.encoders.vae import load_vae
from mmgen.methods.distill.method import distill_task, find_teacher, student_model_config
from mmgen.training.start import with_texts as with_captions
from mmgen.networks.conditions import Text
from mmgen.sampling.drawing import SampleSettings, draw
from mmgen.training.task import Reporter

from .measuring import Case, Row, Run, Size, compared, temporary_folder
from .runs import trainer

RANK = {"tiny": 2, "quick": 4, "full": 8}  # of adapters: to the network's width as 16 to that of SD 1.5 at most
NUM = {"tiny": 8, "quick": 2048, "full": 8192}
IMAGES, STEPS, BATCH = 4, 8, 8
WIDTHS = {"tiny": (8, 16), "quick": (32, 64), "full": (64, 128)}
PROMPTS = ("a red fox", "two dots", "snow", "a blue door")


def cases(size: Size, device: str) -> list[Case]:
    num, repetitions = NUM[size], 1 if size == "tiny" else 3
    return [
        Case(f"cache-latents --pipeline, {num} images", "images", num, partial(cached, size, device), partial(loop, size, device), repetitions),
        Case("a student's pass", "images", IMAGES, partial(passed, size, device), partial(forward, size, device), repetitions),
        Case(
            f"{STEPS} steps and decoding", "images", IMAGES, partial(sampled, size, device), partial(called, size, device), repetitions,
        ),
        Case(
            "a pass with its texts encoded", "images", IMAGES, partial(with_texts, size, device), partial(passed, size, device), repetitions,
            note=lambda rate: "plain: texts encoded before",
        ),
        Case(
            f"a step by LoRA of rank {RANK[size]}, alternating", "images", 2 * BATCH, partial(stepped, size, device, RANK[size]),
            partial(stepped, size, device, 0), repetitions, note=lambda rate: "plain: all weights",
        ),
    ]  # fmt: skip


def rows(size: Size, device: str) -> Iterator[Row]:
    for one in cases(size, device):
        yield compared("text", one, size, device)


@lru_cache
def folder(size: Size) -> Path:
    """pipeline/, and images/ of 64 x 48 with a caption each."""
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from tiny_pipelines import tiny_pipeline

    place, random = temporary_folder(), np.random.default_rng(0)
    tiny_pipeline("sd15", place / "pipeline", block_out_channels=WIDTHS[size])
    (place / "images").mkdir()
    lines = []
    for i in range(NUM[size]):
        Image.fromarray(random.integers(0, 255, (48, 64, 3), dtype=np.uint8)).save(place / "images" / f"{i:05d}.png")
        lines.append(json.dumps({"file_name": f"{i:05d}.png", "text": PROMPTS[i % 4]}))
    (place / "images/metadata.jsonl").write_text("\n".join(lines) + "\n")
    return place


def cached(size: Size, device: str) -> Run:
    place, number = folder(size), itertools.count()
    parts, vae, name = pipeline_parts(str(place / "pipeline"), 32), load_vae(str(place / "pipeline"), device), str(place / "images")

    def once() -> None:
        with mock.patch.object(encoding, "_PIXELS_TRIED", 16 * 32**2):  # the VAE is tried on 16 images, as at 256 pixels
            encode_source(resolve(name), vae, temporary_folder() / str(next(number)), EncodingSettings(32, text=True), name=name, pipeline=parts)

    return once


def loop(size: Size, device: str) -> Run:
    """What a script does: PIL, resize, crop, the VAE, tried on the first 16 images, one file of moments and one of captions, flushed to the disk."""
    pipe, place = opened(size, device), folder(size)

    @torch.no_grad()
    def once() -> None:
        found, lines = [], (place / "images/metadata.jsonl").read_text().splitlines()
        for start in range(0, len(lines), 32):
            batch = []
            for line in lines[start : start + 32]:
                image = Image.open(io.BytesIO((place / "images" / json.loads(line)["file_name"]).read_bytes())).convert("RGB")
                scale = 32 / min(image.size)
                image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
                left, top = (image.width - 32) // 2, (image.height - 32) // 2
                batch.append(np.asarray(image.crop((left, top, left + 32, top + 32))).transpose(2, 0, 1))
            moments = pipe.vae.encode(torch.from_numpy(np.stack(batch)).to(device) / 127.5 - 1).latent_dist
            found.append(torch.cat([moments.mean, moments.std], 1).half().cpu())
            if start == 0:
                pipe.vae.decode(moments.mean[:16]).sample.clamp(-1, 1)
        out = temporary_folder()
        np.save(out / "moments.npy", torch.cat(found).numpy())
        (out / "captions.jsonl").write_text("\n".join(lines))
        for file in out.iterdir():
            with open(file) as written:
                os.fsync(written.fileno())

    return once


@lru_cache
def opened(size: Size, device: str):
    import diffusers

    pipe = diffusers.StableDiffusionPipeline.from_pretrained(folder(size) / "pipeline").to(device)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config, timestep_spacing="trailing")
    return pipe


@lru_cache
def ours(size: Size, device: str):
    return mmgen.load(folder(size) / "pipeline", device=device)


def texts(model, device: str) -> Text:
    return Text(*open_encoder(model.config.text)(list(PROMPTS), device))


def passed(size: Size, device: str) -> Run:
    model = ours(size, device)
    text, x, t = texts(model, device), torch.randn(IMAGES, 4, 8, 8, device=device), torch.full((IMAGES,), 500.0, device=device, dtype=torch.float64)
    return torch.no_grad()(lambda: model.network(x, t, None, text))


def forward(size: Size, device: str) -> Run:
    pipe, model = opened(size, device), ours(size, device)
    tokens, x, t = texts(model, device).tokens, torch.randn(IMAGES, 4, 8, 8, device=device), torch.full((IMAGES,), 500, device=device)
    return torch.no_grad()(lambda: pipe.unet(x, t, encoder_hidden_states=tokens, return_dict=False))


def with_texts(size: Size, device: str) -> Run:
    model = ours(size, device)
    x, t = torch.randn(IMAGES, 4, 8, 8, device=device), torch.full((IMAGES,), 500.0, device=device, dtype=torch.float64)
    return torch.no_grad()(lambda: model.network(x, t, None, texts(model, device)))


def stepped(size: Size, device: str, rank: int) -> Run:
    """A turn of the auxiliary and one of the student, in mmgen's own run."""
    place = folder(size)
    changes = {
        "teacher.name": str(place / "pipeline"), "teacher.guidance": 3.0, "data.name": str(cached_few(size)), "student.lora": rank, "train.batch_size": BATCH,
        "run.batch_per_device": BATCH, "run.eval_num": 0, "run.teacher_steps": 0, "train.precision": "tf32",
    }  # fmt: skip
    settings = configs.nest(changes, DistillConfig)
    teacher, config = find_teacher(resolve_distillation(configs.read_preset("sd15-distill", "distill"), settings), torch.device(device))
    latents = with_captions(load_latents(cached_few(size)), teacher.model.config.text, device, Reporter())
    model_config = student_model_config(config, teacher, latents)
    run = trainer(config, latents, lambda accelerator: distill_task(config, teacher, model_config, latents, Reporter(), accelerator), device)

    def both() -> None:
        run._step()
        run._step()

    return both


@lru_cache
def cached_few(size: Size) -> Path:
    """The latents of the images, with their captions."""
    place, out = folder(size), temporary_folder() / "latents"
    parts, vae, name = pipeline_parts(str(place / "pipeline"), 16), load_vae(str(place / "pipeline")), str(place / "images")
    encode_source(resolve(name), vae, out, EncodingSettings(16, text=True), name=name, pipeline=parts)
    return out


def sampled(size: Size, device: str) -> Run:
    model, settings = ours(size, device), SampleSettings(steps=STEPS, prompts=PROMPTS, guidance=1.0, sampler="ddim")
    return lambda: draw(model, settings, range(IMAGES))


def called(size: Size, device: str) -> Run:
    pipe = opened(size, device)
    return lambda: pipe(list(PROMPTS), num_inference_steps=STEPS, guidance_scale=1.0, height=16, width=16)
