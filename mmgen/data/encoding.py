"""A data set of images through a VAE, once: shards of moments that training maps.

Shards are written atomically, so a run that is killed at any moment loses at most the shards it was at, and the same command
continues with those that are missing. What a shard holds depends on its images alone, not on who
encodes it or when: with several processes, or after kills, the files are the same.
"""

from __future__ import annotations

import contextlib
import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..encoders.pipeline import PipelineParts
from ..encoders.vae import Vae
from ..errors import ConfigError, DataError, MmgenError, disk_errors
from ..system.files import remove_leftovers, replacing, write_json
from ..system.processes import ProcessGroup
from ..system.tensor_files import save_array
from .captions import with_captions
from .content import Watched
from .decoding import ahead, decode_chunks, settle
from .encoding_record import cut_in, finish, summary
from .encoding_task import EncodingSettings, Task, choose_normalisation, is_whole, job_of
from .image_source import ImageSource
from .latent_texts import FOLDER, TextTask
from .latents import JOB, SHARDS, read_record

MOST_SHARDS = 256  # each is an open file while training
LEAST_IN_SHARD = 64
_PIXELS_TRIED = 2**20  # of the first images, on which the VAE's error is measured: 16 of 256 x 256
_CHUNK_BYTES = 1 << 25  # of decoded images that wait for the VAE

Progress = Callable[[int, int], None]
Note = Callable[[str], None]


def encode_source(
    source: ImageSource,
    vae: Vae,
    out: Path,
    settings: EncodingSettings,
    *,
    name: str,
    reading: dict[str, Any] | None = None,
    pipeline: PipelineParts | None = None,
    device: str = "cpu",
    process_group: ProcessGroup = ProcessGroup(),
    progress: Progress | None = None,
    note: Note = lambda text: None,
) -> dict[str, Any]:
    """Encodes what is not yet there into the folder `out`, and returns the content of its latents.json.

    `name`: what the user called the images, and `reading` the split and columns chosen of them. `pipeline`: that latents and captions
    are for; its encoders run on `device`. `progress` is called by the main process with (images encoded, images in all), and
    assumes that the others are as fast. Raises ConfigError for impossible settings, DataError naming an image that cannot
    be read, or a folder of something else, and MmgenError where the disk or the GPU's memory is too small.
    """
    settings.check()
    plan = settle(source, settings.resolution, 3, settings.on_corrupt)
    if plan.resolution % vae.factor:
        raise ConfigError(f"--resolution {plan.resolution} must be a multiple of {vae.factor}, by which {vae.source} divides sides")
    watched = Watched(source)
    source, texts = watched.source, None
    if settings.text or pipeline is not None:
        source, captions = with_captions(source, settings.on_corrupt)
        texts = TextTask(captions, None if pipeline is None else pipeline.text, out, plan.resolution, device)
    normalisation = choose_normalisation(vae, settings.normalisation, pipeline)
    task = Task(source, name, reading or {}, watched, vae, out, settings, plan, normalisation, pipeline, texts)
    job, shards = job_of(task), _shards(source.length)
    if is_whole(out, job):
        return read_record(out)
    missing = [number for number in range(len(shards)) if not task.file(number).is_file()]
    missing = process_group.gather(missing)[0]  # nobody writes before all have looked
    left = [shards[number] for number in missing]
    images_left = sum(map(len, left))
    tried = None
    if process_group.is_main:
        _begin(task, job, left, note)
        tried = _try(task, note)
    process_group.wait()
    done = source.length - images_left
    report = progress if progress and process_group.is_main else lambda done, total: None
    report(done, source.length)
    for number in missing[process_group.index :: process_group.size]:
        for count in _write_shard(task, number, shards[number]):
            done += count * process_group.size
            report(min(done, source.length), source.length)
    process_group.wait()
    own = range(process_group.index, len(shards), process_group.size)
    parts = process_group.gather([summary(task, number) for number in own])
    cut = sum(process_group.gather(cut_in(task, {number: shards[number] for number in own})))
    if process_group.is_main:
        summaries = [parts[number % process_group.size][number // process_group.size] for number in range(len(shards))]
        finish(task, job, summaries, cut, tried, note)
    process_group.wait()
    return read_record(out)


def _begin(task: Task, job: dict[str, Any], left: list[range], note: Note) -> None:
    """Writes what was asked for. Raises DataError where the disk has no room for the images that are left."""
    out = task.out
    with disk_errors(out):
        out.mkdir(parents=True, exist_ok=True)
    remove_leftovers(out)
    remove_leftovers(out / SHARDS)
    remove_leftovers(out / FOLDER)
    size = sum(map(len, left)) * task.rows_per_image * math.prod(task.row) * np.dtype(task.settings.dtype).itemsize
    if task.texts is not None and left:
        texts = task.texts.bytes_for(left)
        note(f"{_size(size + texts)} of disk will be needed: {_size(size)} for latents, about {_size(texts)} for texts")
        size += texts
    free = shutil.disk_usage(out).free
    if free < size:
        raise DataError(
            f"{out} needs {size / 1e9:,.1f} GB more, and {free / 1e9:,.1f} GB are free: give an --out with room"
            + (", or --dtype float16" if task.settings.dtype == "float32" else "")
        )
    write_json(out / JOB, job)


def _size(count: int) -> str:
    return f"{count / 1e9:,.1f} GB" if count >= 1e8 else f"{count / 1e6:,.1f} MB"


def _shards(length: int) -> list[range]:
    """Which images go into which shard: a function of their number alone."""
    size = LEAST_IN_SHARD * math.ceil(length / (LEAST_IN_SHARD * MOST_SHARDS))
    return [range(start, min(start + size, length)) for start in range(0, length, size)]


def _try(task: Task, note: Note) -> dict[str, Any]:
    """The error of going through the VAE and back, and of the numbers' rounding, on the first images."""
    source, vae, settings = task.source, task.vae, task.settings
    wanted = min(256, max(16, _PIXELS_TRIED // task.plan.resolution**2))
    found: list[np.ndarray] = []
    for chunk in decode_chunks(source, task.plan, range(source.length), wanted):
        found.append(chunk.pixels)
        if sum(map(len, found)) >= wanted:
            break
    images = torch.from_numpy(np.concatenate(found)[:wanted])
    if not len(images):
        raise DataError(f"none of the {source.length:,} images can be read")
    squares, rounding, means = 0.0, 0.0, []
    for part in images.split(settings.batch_size):
        mean, _ = _moments(task, part, source.names(0))
        stored = mean.to(getattr(torch, settings.dtype)).float()
        squares += float((vae.decode(stored).double() - part.double()).square().sum())
        rounding += float((stored - mean).double().square().sum())
        means.append(mean)
    error = math.sqrt(squares / images.numel())
    every = torch.cat(means).double()
    spread = float(every.std(dim=(0, 2, 3), correction=0).square().mean().sqrt())
    psnr = round(20 * math.log10(255 / error), 2) if error else None
    words = "exactly" if psnr is None else f"with an error of {error:.1f} grey levels RMS (PSNR {psnr:.1f} dB)"
    note(f"the VAE gives the first {len(images)} images back {words}")
    return {
        "images": len(images),
        "rmse": round(error, 4),  # grey levels of 0..255
        "psnr": psnr,
        "rounding": math.sqrt(rounding / every.numel()) / spread if spread else None,  # in standard deviations
    }


def _write_shard(task: Task, number: int, images: range) -> Iterator[int]:
    """Encodes one shard and yields how many images of the source are done, batch by batch."""
    batch_size = task.settings.batch_size
    size = batch_size * max(1, _CHUNK_BYTES // (batch_size * 3 * task.plan.resolution**2))
    parts = [np.empty((0, *task.row), task.settings.dtype)]
    skipped: list[list[Any]] = []
    with contextlib.nullcontext() if task.texts is None else task.texts.shard(number) as write_texts:
        for chunk in ahead(decode_chunks(task.source, task.plan, images, size)):
            lost = sorted(set(chunk.numbers) - set(chunk.kept))
            skipped += [list(pair) for pair in zip(lost, chunk.skipped, strict=True)]
            for start in range(0, len(chunk.kept), batch_size):
                batch = slice(start, start + batch_size)
                parts.append(_encode(task, chunk.pixels[batch], task.source.names(chunk.kept[start])))
                if write_texts is not None:
                    write_texts(chunk.kept[batch], chunk.sizes[batch])
                yield len(chunk.kept[batch])
            yield len(lost)
    if skipped:  # before the shard itself, which says that all of it is there
        write_json(task.skipped_file(number), skipped)
    task.watched.keep(task.digests_file(number), images)
    with replacing(task.file(number)) as temporary:
        save_array(temporary, np.concatenate(parts))


def _encode(task: Task, pixels: np.ndarray, name: str) -> np.ndarray:
    """uint8 [n, 3, R, R] -> the rows of a shard. `name`: of the first image, for messages."""
    if task.settings.xflip:  # an image, then its mirror image
        pixels = np.stack([pixels, pixels[..., ::-1]], axis=1).reshape(-1, *pixels.shape[1:])
    mean, std = _moments(task, torch.from_numpy(pixels), name)
    moments = torch.cat([mean, std], dim=1) if task.vae.kind == "kl" else mean
    return moments.numpy().astype(task.settings.dtype)


def _moments(task: Task, images: torch.Tensor, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation, float32 on the CPU. Raises MmgenError and DataError."""
    dtype = task.settings.dtype
    try:
        mean, std = (part.cpu() for part in task.vae.encode(images))
    except torch.OutOfMemoryError as error:
        raise MmgenError(f"the GPU's memory is too small for {len(images)} images at a time: lower --batch-size") from error
    largest = torch.finfo(getattr(torch, dtype)).max
    if not (mean.abs().amax() <= largest and std.amax() <= largest):  # false for what is not a number, too
        raise DataError(
            f"the VAE gives values that are not finite, or beyond {dtype}, for {name} or one of the {len(images) - 1} "
            "images after it: is the VAE's file damaged, or --dtype float32 needed?"
        )
    return mean, std
