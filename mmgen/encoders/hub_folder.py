"""A part of a repository of the hub as a folder: from its cache where that is whole, else downloaded."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path

from ..errors import ModelError, shortened

_HUB_ID = re.compile(r"^\w[\w.-]*/\w[\w.-]*$")


def hub_folder(name: str, files: Sequence[str], whole: Callable[[Path], bool]) -> Path:
    """The folder with the `files` (patterns) of a repository. `whole`: whether a folder found in the cache has what is needed.

    Raises ModelError where the name is no repository, or the hub cannot be asked.
    """
    if not _HUB_ID.match(name.removeprefix("hf://")):
        raise ModelError(f"there is no folder {shortened(name)}: give one, or a repository of the hub as user/name")
    from huggingface_hub import snapshot_download

    repository, patterns = name.removeprefix("hf://"), {"allow_patterns": list(files), "ignore_patterns": ["*.fp16.*"]}
    try:
        found = Path(snapshot_download(repository, local_files_only=True, **patterns))
        if whole(found):
            return found
    except Exception:  # not in the cache, which is said in more than one way
        pass
    try:
        return Path(snapshot_download(repository, **patterns))
    except Exception as error:  # huggingface_hub's own, and those of requests or httpx, by version
        raise ModelError(
            f"there is no folder {name}, and the hub cannot be asked for it ({shortened(error, 200)}): run "
            f"`hf download {repository} --local-dir DIR` where the hub can be reached, and give DIR"
        ) from error
