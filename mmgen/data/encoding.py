"""A data set of images through a VAE, once: shards of moments that training maps.

Shards are written atomically, so a run that is killed at any moment loses at most the shards it was at, and the same command
continues with those that are missing. What a shard holds depends on its images alone, not on who
encodes it or when: with several processes, or after kills, the files are the same.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from .. import __version__
from ..errors import ConfigError, DataError, MmgenError, cannot_write, nearest
from ..system.files import TEMPORARY, read_json, remove_leftovers, replacing, write_json
from ..models.latents import LatentSettings
from ..system.processes import ProcessGroup
from ..system.tensor_files import save_array
from ..encoders.vae import IMM_MEAN, IMM_STD, IMM_TARGET_STD, Vae
from .cache import check_options
from .content import Watched, joined_hash
from .decoding import Plan, ahead, decode_chunks, settle
from .image_source import ImageSource
from .resolve import locate
from .latents import FORMAT, JOB, LABELS, RECORD, SHARDS, is_latents, load_latents, read_record, shard_file

MOST_SHARDS = 256  # each is an open file while training
LEAST_IN_SHARD = 64
NORMALISATIONS = ("auto", "imm", "measure")
DTYPES = ("float16", "float32")
_PIXELS_TRIED = 2**20  # of the first images, on which the VAE's error is measured: 16 of 256 x 256
_CHUNK_BYTES = 1 << 25  # of decoded images that wait for the VAE

Progress = Callable[[int, int], None]
Note = Callable[[str], None]


@dataclass(frozen=True)
class EncodingSettings:
    """What `mmgen cache-latents` is asked for."""

    resolution: int | None = None  # side of the images after ADM's resize and crop; unset: their own
    dtype: Literal["float16", "float32"] = "float16"  # of the moments on disk
    xflip: bool = False  # each image's mirror image is encoded after it, as an image of its own
    normalisation: Literal["auto", "imm", "measure"] = "auto"  # auto: IMM's constants for its VAE, else measured
    on_corrupt: str = "stop"
    batch_size: int = 32  # images that the VAE sees at a time

    def check(self) -> None:
        """Raises ConfigError where a setting is impossible."""
        check_options(self.resolution, None, self.on_corrupt)
        for name, value, valid in (("dtype", self.dtype, DTYPES), ("normalisation", self.normalisation, NORMALISATIONS)):
            if value not in valid:
                raise ConfigError(f"--{name} {value!r} is unknown: {nearest(value, valid)}")
        if self.batch_size < 1:
            raise ConfigError(f"--batch-size must be at least 1, not {self.batch_size}")


@dataclass(frozen=True)
class _Task:
    """What all parts of an encoding share."""

    source: ImageSource
    name: str  # the name of the source
    reading: dict[str, Any]  # the split and columns that were asked for
    watched: Watched  # the source, hashed as it is read
    vae: Vae
    out: Path
    settings: EncodingSettings
    plan: Plan  # how images are decoded
    normalisation: str  # imm or measure

    @property
    def rows_per_image(self) -> int:
        return 2 if self.settings.xflip else 1

    @property
    def row(self) -> tuple[int, int, int]:
        """Shape of the moments of one image."""
        side = self.plan.resolution // self.vae.factor
        return self.vae.channels * (2 if self.vae.kind == "kl" else 1), side, side

    def file(self, shard: int) -> Path:
        return shard_file(self.out, shard)

    def digests_file(self, shard: int) -> Path:
        """SHA-256 of each of the shard's encoded images."""
        return self.file(shard).with_suffix(".sha256")

    def skipped_file(self, shard: int) -> Path:
        """[[number in the source, name], ...] of the shard's images that cannot be read, if there are any."""
        return self.file(shard).with_suffix(".skipped.json")


def encode_source(
    source: ImageSource,
    vae: Vae,
    out: Path,
    settings: EncodingSettings,
    *,
    name: str,
    reading: dict[str, Any] | None = None,
    process_group: ProcessGroup = ProcessGroup(),
    progress: Progress | None = None,
    note: Note = lambda text: None,
) -> dict[str, Any]:
    """Encodes what is not yet there into the folder `out`, and returns the content of its latents.json.

    `word`: what the user called the images, and `reading` the split and columns chosen of them. `progress` is called by the main process with (images encoded, images in all), and
    assumes that the others are as fast. Raises ConfigError for impossible settings, DataError naming an image that cannot
    be read, or a folder of something else, and MmgenError where the disk or the GPU's memory is too small.
    """
    settings.check()
    plan = settle(source, settings.resolution, 3, settings.on_corrupt)
    if plan.resolution % vae.factor:
        raise ConfigError(f"--resolution {plan.resolution} must be a multiple of {vae.factor}, by which {vae.source} divides sides")
    watched = Watched(source)
    task = _Task(
        watched.source, name, reading or {}, watched, vae, out, settings, plan, _normalisation(vae, settings.normalisation)
    )
    job, shards = _job(task), _shards(source.length)
    if _is_whole(out, job):
        return read_record(out)
    missing = [number for number in range(len(shards)) if not task.file(number).is_file()]
    missing = process_group.gather(missing)[0]  # nobody writes before all have looked
    images_left = sum(len(shards[number]) for number in missing)
    tried = None
    if process_group.is_main:
        _begin(task, job, images_left)
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
    parts = process_group.gather([_summary(task, number) for number in range(process_group.index, len(shards), process_group.size)])
    if process_group.is_main:
        summaries = [parts[number % process_group.size][number // process_group.size] for number in range(len(shards))]
        _finish(task, job, summaries, tried, note)
    process_group.wait()
    return read_record(out)


def _normalisation(vae: Vae, name: str) -> str:
    """imm or measure. Raises ConfigError where IMM's constants cannot be this VAE's."""
    if name == "imm" and (vae.kind != "kl" or vae.channels != len(IMM_MEAN)):
        raise ConfigError(f"--normalisation imm is for Stable Diffusion's VAE of 4 channels, not {vae.source}: use measure")
    return name if name != "auto" else "imm" if vae.is_imm else "measure"


def _job(task: _Task) -> dict[str, Any]:
    """What must be the same for a folder to be continued."""
    source, settings = task.source, task.settings
    return {
        "format": FORMAT,
        "source": {"word": task.name, "place": locate(task.name), "reading": task.reading,
                   "fingerprint": source.fingerprint, "description": source.description},
        "images": source.length,
        "resolution": task.plan.resolution,
        "on_corrupt": settings.on_corrupt,
        "vae": task.vae.place,
        "vae_sha256": task.vae.sha256,
        "normalisation": task.normalisation,
        "dtype": settings.dtype,
        "xflip": settings.xflip,
    }


def _is_whole(out: Path, job: dict[str, Any]) -> bool:
    """Whether all is done already. Raises DataError where the folder holds something else."""
    if not is_latents(out):
        if out.exists() and (not out.is_dir() or any(not p.name.startswith(TEMPORARY) for p in out.iterdir())):
            raise DataError(f"{out} holds something else than latents: give another --out")
        return False
    whole = (out / RECORD).is_file()
    try:
        found = read_record(out)["job"] if whole else read_json(out / JOB)
        old, new = ({**one, "source": one["source"]["fingerprint"], "vae": ""} for one in (found, job))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{out} holds a damaged {JOB} ({error!r}): delete the folder, or give another --out") from error
    for key in new:
        if old.get(key) != new[key]:
            shown = ("other images", "these") if key == "source" else (old.get(key), new[key])
            raise DataError(f"{out} holds latents with {key} = {shown[0]}, not {shown[1]}: give another --out")
    return whole


def _begin(task: _Task, job: dict[str, Any], images: int) -> None:
    """Writes what was asked for. Raises DataError where the disk has no room for `images` more."""
    out = task.out
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise cannot_write(out, error) from error
    remove_leftovers(out)
    remove_leftovers(out / SHARDS)
    size = images * task.rows_per_image * math.prod(task.row) * np.dtype(task.settings.dtype).itemsize
    free = shutil.disk_usage(out).free
    if free < size:
        raise DataError(
            f"{out} needs {size / 1e9:,.1f} GB more, and {free / 1e9:,.1f} GB are free: give an --out with room"
            + (", or --dtype float16" if task.settings.dtype == "float32" else "")
        )
    write_json(out / JOB, job)


def _shards(length: int) -> list[range]:
    """Which images go into which shard: a function of their number alone."""
    size = LEAST_IN_SHARD * math.ceil(length / (LEAST_IN_SHARD * MOST_SHARDS))
    return [range(start, min(start + size, length)) for start in range(0, length, size)]


def _try(task: _Task, note: Note) -> dict[str, Any]:
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


def _write_shard(task: _Task, number: int, images: range) -> Iterator[int]:
    """Encodes one shard and yields how many images of the source are done, batch by batch."""
    batch_size = task.settings.batch_size
    size = batch_size * max(1, _CHUNK_BYTES // (batch_size * 3 * task.plan.resolution**2))
    parts = [np.empty((0, *task.row), task.settings.dtype)]
    skipped: list[list[Any]] = []
    for chunk in ahead(decode_chunks(task.source, task.plan, images, size)):
        lost = sorted(set(chunk.numbers) - set(chunk.kept))
        skipped += [list(pair) for pair in zip(lost, chunk.skipped, strict=True)]
        for start in range(0, len(chunk.kept), batch_size):
            pixels = chunk.pixels[start : start + batch_size]
            parts.append(_encode(task, pixels, task.source.names(chunk.kept[start])))
            yield len(pixels)
        yield len(lost)
    if skipped:  # before the shard itself, which says that all of it is there
        write_json(task.skipped_file(number), skipped)
    task.watched.keep(task.digests_file(number), images)
    with replacing(task.file(number)) as temporary:
        save_array(temporary, np.concatenate(parts))


def _encode(task: _Task, pixels: np.ndarray, name: str) -> np.ndarray:
    """uint8 [n, 3, R, R] -> the rows of a shard. `name`: of the first image, for messages."""
    if task.settings.xflip:  # an image, then its mirror image
        pixels = np.stack([pixels, pixels[..., ::-1]], axis=1).reshape(-1, *pixels.shape[1:])
    mean, std = _moments(task, torch.from_numpy(pixels), name)
    moments = torch.cat([mean, std], dim=1) if task.vae.kind == "kl" else mean
    return moments.numpy().astype(task.settings.dtype)


def _moments(task: _Task, images: torch.Tensor, name: str) -> tuple[torch.Tensor, torch.Tensor]:
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


def _summary(task: _Task, number: int) -> tuple[int, str, np.ndarray]:
    """A shard's number of rows, its SHA-256, and the sums [2, C] of latents and of their squares, in float64."""
    file, channels = task.file(number), task.vae.channels
    try:
        moments = np.load(file, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"{file} is damaged ({error}): delete it, and the same command encodes it again") from error
    digest, sums = hashlib.sha256(), np.zeros((2, channels))
    for start in range(0, len(moments), 64):
        block = np.array(moments[start : start + 64])
        digest.update(block)
        values = block.astype(np.float64)
        mean, std = values[:, :channels], values[:, channels:]
        sums[0] += mean.sum(axis=(0, 2, 3))
        sums[1] += (mean**2).sum(axis=(0, 2, 3)) + ((std**2).sum(axis=(0, 2, 3)) if task.vae.kind == "kl" else 0)
    return len(moments), digest.hexdigest(), sums


def _finish(
    task: _Task, job: dict[str, Any], summaries: list[tuple[int, str, np.ndarray]], tried: dict[str, Any], note: Note
) -> None:
    """Writes labels.npy and, last, latents.json."""
    source, out = task.source, task.out
    rows, digests = [n for n, _, _ in summaries], [digest for _, digest, _ in summaries]
    number, positions = sum(rows), sum(rows) * task.row[1] * task.row[2]
    files = [file for i in range(len(rows)) if (file := task.skipped_file(i)).is_file()]
    skipped = list(itertools.chain.from_iterable(read_json(file) for file in files))
    if number != task.rows_per_image * (source.length - len(skipped)):
        raise DataError(f"the shards in {out} hold {number:,} rows, not those of {source.length:,} images: give another --out")
    latents = _latents(task, sum(sums for _, _, sums in summaries) / positions, note)
    labels = None
    if source.labels is not None:
        kept = np.delete(np.arange(source.length), [i for i, _ in skipped])
        labels = source.labels[kept].repeat(task.rows_per_image).astype(np.int64)
        with replacing(out / LABELS) as temporary:
            save_array(temporary, labels)
    fingerprint = hashlib.sha256(json.dumps([FORMAT, {**asdict(latents), "vae": ""}, digests]).encode())
    fingerprint.update(b"" if labels is None else labels.astype("<i8").tobytes())
    record = {
        "format": FORMAT,
        "mmgen_version": __version__,
        "description": _describe(task, len(skipped)),
        "latents": asdict(latents),
        "normalisation": task.normalisation,
        "channels": task.vae.channels,
        "size": task.row[1],
        "resolution": task.plan.resolution,
        "number": number,
        "labelled": labels is not None,
        "class_names": source.class_names,
        "dtype": task.settings.dtype,
        "xflip": task.settings.xflip,
        "reconstruction": tried,
        "source": job["source"],
        "content": joined_hash([task.digests_file(i) for i in range(len(rows))], source.length),
        "skipped": [name for _, name in skipped],
        "fingerprint": fingerprint.hexdigest(),
        "shards": rows,
        "job": job,
    }
    write_json(out / RECORD, record)
    load_latents(out)  # reads back
    (out / JOB).unlink(missing_ok=True)  # another process may have finished the same


def _latents(task: _Task, moments: np.ndarray, note: Note) -> LatentSettings:
    """The normalisation. `moments`: the averages [2, C] of the latents and of their squares over the whole data set."""
    vae, imm = task.vae, task.normalisation == "imm"
    mean, std = moments[0], np.sqrt(np.maximum(moments[1] - moments[0] ** 2, 0))
    if not imm and min(std) <= 1e-6 * max(std):
        raise DataError(f"a channel of the latents of {vae.source} is the same for all images: the VAE cannot be used")
    if imm:
        after = std / np.array(IMM_STD) * IMM_TARGET_STD
        if max(after) > 2 * IMM_TARGET_STD or min(after) < IMM_TARGET_STD / 2:
            shown = ", ".join(f"{value:.2f}" for value in after)
            note(f"IMM's normalisation gives these latents standard deviations of {shown}, not 0.5: --normalisation measure fits")
    return LatentSettings(
        vae=vae.place,
        vae_sha256=vae.sha256,
        kind=vae.kind,
        mean=IMM_MEAN if imm else tuple(mean.tolist()),
        std=IMM_STD if imm else tuple(std.tolist()),
        target_std=IMM_TARGET_STD,
        resolution=task.plan.resolution,
    )


def _describe(task: _Task, skipped: int) -> str:
    side, pixels, vae = task.row[1], task.plan.resolution, task.vae
    normalisation = "IMM's" if task.normalisation == "imm" else "measured"
    text = f"latents {vae.channels}x{side}x{side} by {vae.source}, {normalisation} normalisation, of {task.source.description}, "
    text += f"3x{pixels}x{pixels}" + (", each also mirrored" if task.settings.xflip else "")
    return text + (f", {skipped:,} that cannot be read left out" if skipped else "")
