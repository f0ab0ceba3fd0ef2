"""What latents.json says of an encoding: how many rows there are, their normalisation, their hash."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Iterable
from dataclasses import asdict, replace
from typing import Any

import numpy as np

from .. import __version__
from ..encoders.vae import IMM_MEAN, IMM_STD, IMM_TARGET_STD
from ..errors import DataError
from ..models.latents import LatentSettings
from ..system.files import read_json, replacing, write_json
from ..system.tensor_files import save_array
from .content import joined_hash
from .encoding_task import Task
from .latents import FORMAT, JOB, LABELS, RECORD, load_latents

Note = Callable[[str], None]


def summary(task: Task, number: int) -> tuple[int, str, np.ndarray]:
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


def skipped_in(task: Task, shards: Iterable[int]) -> list[list[Any]]:
    """[[number in the source, name], ...] of the images of these shards that cannot be read."""
    files = [file for number in shards if (file := task.skipped_file(number)).is_file()]
    return list(itertools.chain.from_iterable(read_json(file) for file in files))


def cut_in(task: Task, shards: dict[int, range]) -> int:
    """How many captions of the images of these shards are longer than the pipeline's encoders take."""
    if task.texts is None:
        return 0
    images = np.fromiter(itertools.chain(*shards.values()), np.int64)
    return task.texts.count_cut(np.setdiff1d(images, [i for i, _ in skipped_in(task, shards)]))


def finish(
    task: Task, job: dict[str, Any], summaries: list[tuple[int, str, np.ndarray]], cut: int, tried: dict[str, Any], note: Note
) -> None:
    """Writes labels.npy and, last, latents.json. cut: captions of the images encoded that are cut off."""
    source, out = task.source, task.out
    rows, digests = [n for n, _, _ in summaries], [digest for _, digest, _ in summaries]
    number, positions = sum(rows), sum(rows) * task.row[1] * task.row[2]
    skipped = skipped_in(task, range(len(rows)))
    if number != task.rows_per_image * (source.length - len(skipped)):
        raise DataError(f"the shards in {out} hold {number:,} rows, not those of {source.length:,} images: give another --out")
    latents = _latents(task, sum(sums for _, _, sums in summaries) / positions, note)
    labels, kept = None, np.delete(np.arange(source.length), [i for i, _ in skipped])
    if source.labels is not None:
        labels = source.labels[kept].repeat(task.rows_per_image).astype(np.int64)
        with replacing(out / LABELS) as temporary:
            save_array(temporary, labels)
    fingerprint = hashlib.sha256(json.dumps([FORMAT, {**asdict(latents), "vae": ""}, digests]).encode())
    fingerprint.update(b"" if labels is None else labels.astype("<i8").tobytes())
    text = {}
    if task.texts is not None:
        text["text"], digest = task.texts.finish(len(rows), kept, cut)
        fingerprint.update(digest.encode())
        if cut:
            note(f"{cut:,} of {text['text']['captions']:,} captions are longer than the encoders of the pipeline take: their ends are cut off")
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
        **text,
        "job": job,
    }
    write_json(out / RECORD, record)
    load_latents(out)  # reads back
    if task.texts is not None:
        task.texts.clear(len(rows))
    (out / JOB).unlink(missing_ok=True)  # another process may have finished the same


def _latents(task: Task, moments: np.ndarray, note: Note) -> LatentSettings:
    """The normalisation. `moments`: the averages [2, C] of the latents and of their squares over the whole data set."""
    if task.pipeline is not None:
        return replace(task.pipeline.latents, resolution=task.plan.resolution)
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
        vae=vae.path,
        vae_sha256=vae.sha256,
        kind=vae.kind,
        mean=IMM_MEAN if imm else tuple(mean.tolist()),
        std=IMM_STD if imm else tuple(std.tolist()),
        target_std=IMM_TARGET_STD,
        resolution=task.plan.resolution,
    )


def _describe(task: Task, skipped: int) -> str:
    side, pixels, vae = task.row[1], task.plan.resolution, task.vae
    normalisation = {"imm": "IMM's", "measure": "measured", "pipeline": "the pipeline's"}[task.normalisation]
    text = f"latents {vae.channels}x{side}x{side} by {vae.source}, {normalisation} normalisation, of {task.source.description}, "
    text += f"3x{pixels}x{pixels}" + (", each also mirrored" if task.settings.xflip else "")
    text += "" if task.texts is None else ", with captions"
    return text + (f", {skipped:,} that cannot be read left out" if skipped else "")
