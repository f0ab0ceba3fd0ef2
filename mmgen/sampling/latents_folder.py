"""Samples of a latent model as a folder of latents (see `data.latents`), which training reads; no VAE decodes them."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .. import __version__
from ..data.captions import captions_of, write_texts
from ..data.latent_texts import FOLDER as TEXTS
from ..data.latents import FORMAT, LABELS, SHARDS, load_latents, shard_file
from ..data.latents import RECORD as LATENTS
from ..encoders.vae import denormalise
from ..errors import ConfigError, MmgenError, disk_errors
from ..models.build import AnyModel
from ..models.config import ModelConfig
from ..system.files import remove_leftovers, replacing, write_json
from ..system.processes import ProcessGroup, find_process_group
from ..system.tensor_files import save_array
from .drawing import Plan, SampleSettings, Tell, draw, plan
from .folder import RECORD, all_labels, all_texts, finish
from .missing import Progress
from .record import Origin, make_record, may_continue, read_record, training_data

_LEAST_IN_SHARD, _MOST_SHARDS = 256, 256  # each is an open file while training


def write_latents(
    model: AnyModel, folder: Path, num: int, settings: SampleSettings, origin: Origin, *, progress: Progress | None = None,
    process_group: ProcessGroup | None = None,
) -> None:  # fmt: skip
    """Draws latents 0 to num - 1 with their labels and texts, those that are not there yet; `samples.json` says how they were made.

    Raises ConfigError for a folder of other samples or of something else, MmgenError where the memory or the disk is too small.
    """
    process_group = process_group or find_process_group(model.device.type == "cpu")
    chosen = plan(model.config, settings)
    record = make_record(model, origin, chosen, num)
    if process_group.is_main:
        with disk_errors(folder):
            _prepare(folder, record)
    process_group.wait()  # nobody may look before the main process has cleared up ...
    size = max(_LEAST_IN_SHARD, -(-num // _MOST_SHARDS))
    shards = [range(start, min(start + size, num)) for start in range(0, num, size)]
    missing = [number for number in range(len(shards)) if not shard_file(folder, number).is_file()]
    process_group.wait()  # ... nor write before all have looked
    report = progress if progress and process_group.is_main else lambda done, total: None
    done = num - sum(len(shards[number]) for number in missing)
    for number in missing[process_group.index :: process_group.size]:
        rows, before = shards[number], done
        _write_shard(model, chosen, shard_file(folder, number), rows, lambda part: report(min(num, before + part * process_group.size), num))
        done += len(rows) * process_group.size
    process_group.wait()
    if process_group.is_main and (missing or not (folder / LATENTS).is_file()):
        _write_record(model.config, chosen, folder, [len(rows) for rows in shards], origin.model)
        finish(folder / RECORD, record, bool(missing))
    process_group.wait()  # whoever goes on may read them


def _prepare(folder: Path, record: dict[str, Any]) -> None:
    old = read_record(folder / RECORD)
    if old is None and folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{folder} holds something else than samples: choose another --out")
    may_continue(folder, old, record, False)
    if old is None or old["num"] != record["num"]:  # shards of another size
        for file in (folder / LATENTS, *(folder / SHARDS).glob("*.npy")):
            file.unlink(missing_ok=True)
        write_json(folder / RECORD, record)
    remove_leftovers(folder)
    remove_leftovers(folder / SHARDS)


def _write_shard(model: AnyModel, chosen: Plan, file: Path, rows: range, tell: Tell) -> None:
    try:
        latents, _ = draw(model, chosen, rows, tell, decode=False)
    except torch.OutOfMemoryError as error:
        raise MmgenError(f"the GPU's memory is too small for {chosen.batch_size} latents at a time: use a device with more memory") from error
    moments = denormalise(latents, model.config.latents)
    if model.config.latents.kind == "kl":  # a sample has no spread of its own
        moments = torch.cat([moments, torch.zeros_like(moments)], dim=1)
    with replacing(file) as temporary:
        save_array(temporary, moments.numpy())


def _write_record(config: ModelConfig, chosen: Plan, folder: Path, shards: list[int], name: str) -> None:
    """The labels, the texts and, last, latents.json. The images are called those that the model's own latents came from."""
    num, known, text = sum(shards), training_data(config), {}
    fingerprint = hashlib.sha256(json.dumps([FORMAT, {**asdict(config.latents), "vae": ""}]).encode())
    for number in range(len(shards)):
        fingerprint.update(np.load(shard_file(folder, number), mmap_mode="r", allow_pickle=False))
    if (labels := all_labels(config, chosen, num)) is not None:
        with replacing(folder / LABELS) as temporary:
            save_array(temporary, np.array(labels, np.int64))
        fingerprint.update(np.array(labels, "<i8"))
    if (texts := all_texts(config, chosen, num)) is not None:
        with replacing(folder / TEXTS / "captions.arrow") as temporary:
            write_texts(temporary, captions_of(texts))
        fingerprint.update(json.dumps(texts).encode())
        text["text"] = {"settings": None, "features": False, "captions": num, "cut": 0}
    side, channels = config.resolution, config.channels
    write_json(folder / LATENTS, {
        "format": FORMAT, "mmgen_version": __version__, "description": f"{num:,} latents {channels}x{side}x{side} drawn by {name}",
        "latents": asdict(config.latents), "channels": channels, "size": side, "resolution": config.latents.resolution, "number": num,
        "labelled": labels is not None, "class_names": config.class_names or [str(i) for i in range(config.num_classes)] or None,
        "dtype": "float32", "xflip": False, "shards": shards, "fingerprint": fingerprint.hexdigest(), "content": known["data_content"],
        "source": {"word": known["data"], "place": known["data_place"], "reading": known["data_options"]}, "job": {"on_corrupt": "stop"},
        **text,
    })  # fmt: skip
    load_latents(folder)  # reads back
