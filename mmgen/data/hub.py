"""A data set of the Hugging Face hub -> a folder on this machine: from the hub's cache, else by download.

`datasets.load_dataset(id)` offline knows only its own prepared copies; `snapshot_download` finds the files themselves.
No code of a repository is ever run.
"""

from __future__ import annotations

import re
from pathlib import Path

from ..errors import DataError
from .folders import EDM_LABELS, IMAGE_SUFFIXES
from .splits import parts_missing, select_split
from .walk import walk

_TABLES = (".parquet", ".arrow")


def fetch(repo: str, split: str, looked: list[str]) -> Path:
    """The folder that holds `repo` ("user/name"), complete at least for one split.

    A complete copy in the cache is taken as it is, without asking the hub for a newer one: a run that is resumed must
    see the same data. `looked` are the places searched before, for the message. Raises DataError.
    """
    from huggingface_hub import constants, snapshot_download

    try:
        folder = Path(snapshot_download(repo, repo_type="dataset", local_files_only=True))
        if _complete(folder, split):
            return folder
    except Exception as error:  # not in the cache, which is said in more than one way
        absent: Exception | None = error
    else:
        absent = None
    looked = [*looked, f"the hub's cache {constants.HF_HUB_CACHE}"]
    try:
        return _download(repo, split)
    except DataError:
        raise
    except Exception as error:  # huggingface_hub's own, and those of requests or httpx, by version
        found = "found only a part of it in" if absent is None else "looked in"
        raise DataError(f"cannot get {repo}: {found} {', '.join(looked)}, and {_reason(repo, error)}") from error


def _complete(folder: Path, split: str) -> bool:
    listing = walk(folder)
    tables = [f.name for f in listing.ending(*_TABLES)]
    if not tables:
        return bool(listing.ending(*IMAGE_SUFFIXES))
    try:
        return parts_missing(select_split(tables, split, str(folder))) == 0
    except DataError:  # the split may be on the hub
        return False


def _download(repo: str, split: str) -> Path:
    from huggingface_hub import HfApi, snapshot_download

    info = HfApi().dataset_info(repo)
    patterns = files_needed([f.rfilename for f in info.siblings or []], split, repo)
    escaped = [re.sub(r"([*?[])", r"[\1]", name) for name in patterns]
    return Path(snapshot_download(repo, repo_type="dataset", revision=info.sha, allow_patterns=escaped))


def files_needed(names: list[str], split: str, repo: str) -> list[str]:
    """Of a repository's files, those to download: the split's parquet files, or else all images.

    Raises DataError, before anything is downloaded, where the split is missing or the layout is one that mmgen does not
    read.
    """
    tables = [n for n in names if n.lower().endswith(_TABLES)]
    if tables:
        return select_split(tables, split, repo)
    images = [n for n in names if n.lower().endswith(IMAGE_SUFFIXES) and "/" in n]  # at the top: pictures of its README
    if images:
        return images + [n for n in names if n == EDM_LABELS]
    raise DataError(
        f"{repo} on the hub holds neither parquet files nor folders of images: download it with `hf download {repo} "
        "--repo-type dataset --local-dir DIR`, unpack it, and give --data DIR"
    )


def _reason(repo: str, error: Exception) -> str:
    from huggingface_hub import errors

    page = f"https://huggingface.co/datasets/{repo}"
    if isinstance(error, errors.GatedRepoError):
        return f"the hub asks for a token: accept the terms at {page}, then run `hf auth login`"
    if isinstance(error, errors.RepositoryNotFoundError):
        return "the hub knows no data set of that name (one that is private needs `hf auth login`)"
    download = f"hf download {repo} --repo-type dataset --local-dir DIR"
    elsewhere = f"run `{download}` where the hub can be reached and give --data DIR"
    if isinstance(error, errors.OfflineModeIsEnabled):
        return f"may not ask the hub (HF_HUB_OFFLINE is set): {elsewhere}"
    if getattr(error, "errno", None) is not None and not isinstance(error, ConnectionError):  # a full disk
        return f"the download failed: {error}"
    detail = (str(error).strip() or type(error).__name__).split("\n")[0]
    return f"the hub cannot be reached ({detail}): {elsewhere}"
