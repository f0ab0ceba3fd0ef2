"""Whether a checkpoint is as it was written: state.json lists the size and the SHA-256 of every file, and has a sum of itself.

A file system may lose the end of a file, a disk may turn a bit, a copy may leave a file out. Weights that are a little wrong
train on without a word, so everything is hashed before it is used; several files at once, for one core would be slow.
"""

from __future__ import annotations

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from ..errors import ModelError, TrainingError
from ..system.files import read_json, sha256_of

STATE = "state.json"
FORMAT = 2  # 1 had no sums
_SUM, _FILES = "sha256", "files"
_THREADS = 8


def write_state(folder: Path, content: dict[str, Any]) -> None:
    """Writes state.json into a folder whose other files are written: `content`, what they are, and its own sum."""
    listed = {
        path.name: {"bytes": path.stat().st_size, _SUM: digest}
        for path, digest in _digests(sorted(path for path in folder.iterdir() if path.name != STATE))
    }
    state = {"format": FORMAT, **content, _FILES: listed}
    (folder / STATE).write_text(json.dumps({**state, _SUM: _sum_of(state)}, indent=2))


def read_state(folder: Path) -> dict[str, Any]:
    """The content of state.json, with or without sums. Raises ValueError where it is damaged, OSError where it cannot be read."""
    state = read_json(folder / STATE)
    if not isinstance(state, dict):
        raise ValueError(f"{STATE} is no table")
    if state.get("format") == 1 and not {_SUM, _FILES} & state.keys():
        return state
    if state.get(_SUM) != _sum_of({key: value for key, value in state.items() if key != _SUM}):
        raise ValueError(f"{STATE} is not as it was written")
    return state


def damage(folder: Path, needed: set[str]) -> str | None:
    """What is damaged in a checkpoint, in words; None where it is whole. needed: the names of its files beside state.json.

    A checkpoint of an older mmgen has no sums: its files are opened, which shows whether they are complete. Raises TrainingError
    if a file may not be read or was written by a newer mmgen: it need not be damaged then.
    """
    try:
        state = read_state(folder)
    except PermissionError as error:
        raise TrainingError(f"cannot read {folder / STATE}: {error.strerror}") from error
    except FileNotFoundError:
        return f"{STATE} is missing"
    except (OSError, ValueError, TypeError) as error:
        return str(error) if str(error).startswith(STATE) else f"{STATE} cannot be read: {error}"
    if state["format"] > FORMAT:
        raise TrainingError(f"the checkpoint {folder} is of a newer mmgen: update this one to go on with the run")
    listed = state.get(_FILES)
    missing = sorted(name for name in needed | set(listed or ()) if not (folder / name).is_file())
    if missing:
        return f"{missing[0]} is missing"
    if listed is None:
        return next((found for name in sorted(needed) if (found := _incomplete(folder / name)) is not None), None)
    unlisted = sorted(needed - listed.keys())
    if unlisted:
        return f"{unlisted[0]} is not one of its files"
    try:
        for name, entry in listed.items():  # sizes first: they cost nothing
            size = (folder / name).stat().st_size
            if size != entry["bytes"]:
                return f"{name} has {size:,} bytes instead of {entry['bytes']:,}"
        for path, digest in _digests([folder / name for name in listed]):
            if digest != listed[path.name][_SUM]:
                return f"{path.name} is not as it was written"
    except OSError as error:
        return str(error)
    except ModelError as error:
        if isinstance(error.__cause__, PermissionError):
            raise TrainingError(str(error)) from error
        return str(error)
    return None


def _digests(files: list[Path]) -> list[tuple[Path, str]]:
    with ThreadPoolExecutor(_THREADS) as threads:
        return list(zip(files, threads.map(sha256_of, files), strict=True))


def _sum_of(state: dict[str, Any]) -> str:
    """The SHA-256 of the values, however the JSON is laid out."""
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


def _incomplete(file: Path) -> str | None:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "pt"):
            return None
    except PermissionError as error:
        raise TrainingError(f"cannot read {file}: {error.strerror}") from error
    except (OSError, SafetensorError) as error:
        return f"{file.name}: {error}"
