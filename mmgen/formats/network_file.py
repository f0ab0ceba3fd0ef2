"""What a file that should hold a network holds: told by its content, without running or unpickling anything of it."""

from __future__ import annotations

import os
import re
import zipfile
from pathlib import Path

from ..errors import ModelError

TORCHSCRIPT = "a TorchScript"
EXPORTED = "an exported program"
STATE_DICT = "weights without a network"

_OLD_EXPORT = "serialized_exported_program.json"  # torch up to 2.6
_OLD_SAVE = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # torch.save up to 1.5; torch reads it with weights_only=True too
_FILE_ACCESS = re.compile(rb"\b(?:torch|ops\.aten)\.(?:save|from_file)\(")  # the only operators of TorchScript that do it


def content(path: Path) -> str:
    """TORCHSCRIPT, EXPORTED or STATE_DICT, or else words that say what the file is, to end a message with.

    Raises ModelError where it cannot be read.
    """
    try:
        size = os.path.getsize(path)
        with open(path, "rb") as file:
            head = file.read(512)
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror or error}") from error
    if not size:
        return "empty"
    if head.startswith(b"version https://git-lfs"):
        return "a pointer of Git LFS (fetch the file itself with 'git lfs pull')"
    if head.lstrip()[:1] == b"<":
        return "a web page, perhaps the error page of a download"
    if head.startswith(b"PK\x03\x04"):
        return _zip_content(path)
    if head.startswith(_OLD_SAVE):
        return STATE_DICT
    if head[:1] == b"\x80":
        return "a pickle, which could run code and is never read"
    return "of no known format"


def check_torchscript(path: Path) -> None:
    """Raises ModelError where a TorchScript would read or write files, which a network has no need to.

    TorchScript runs in torch's own interpreter and cannot reach Python, but it has operators for files, and loading
    already runs a part of it.
    """
    with zipfile.ZipFile(path) as archive:
        for name in archive.namelist():
            if name.endswith(".py") and _FILE_ACCESS.search(archive.read(name)):
                raise ModelError(f"{path} holds a program that reads or writes files ({name}): it is not run")


def _zip_content(path: Path) -> str:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError):
        return "cut short or damaged (fetch it again)"
    inner = {name.partition("/")[2] for name in names}  # torch's archives hold one folder
    if any(name.startswith("code/") for name in inner) and "constants.pkl" in inner:
        return TORCHSCRIPT
    if _OLD_EXPORT in names or any(name.startswith("models/") and name.endswith(".json") for name in inner):
        return EXPORTED
    if "data.pkl" in inner:
        return STATE_DICT
    return "a zip archive, and holds no network of torch"
