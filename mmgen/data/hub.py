"""A data set of the Hugging Face hub -> a folder on this machine: from the hub's cache, else by download.

`datasets.load_dataset(id)` offline knows only its own prepared copies; `snapshot_download` finds the files themselves, which
are then read as any other folder's: the one copy on the disk. No code of a repository is ever run.
"""

from __future__ import annotations

import contextlib
import re
from pathlib import Path

from ..errors import DataError
from .decode import image_suffixes
from .image_source import Reading
from .images import EDM_LABELS, METADATA
from .splits import parts_missing, select_split
from .subsets import Configs, choose, configs_of
from .walk import walk

_TABLES = (".parquet", ".arrow")


def fetch(repo: str, reading: Reading, looked: list[str]) -> tuple[Path, list[str]]:
    """The folder that holds `repo` ("user/name"), complete at least for one split, and notes.

    A copy in the cache that is known to be complete is taken as it is, without asking the hub for a newer one: a run that is
    resumed must see the same data. `looked` are the places searched before, for the message. Raises DataError.
    """
    from huggingface_hub import constants, snapshot_download

    folder = None
    with contextlib.suppress(Exception):  # not in the cache, which is said in more than one way
        folder = Path(snapshot_download(repo, repo_type="dataset", revision=reading.revision, local_files_only=True))
    complete = folder is not None and _complete(folder, reading)
    if complete:
        return folder, []
    looked = [*looked, f"the hub's cache {constants.HF_HUB_CACHE}"]
    try:
        return _download(repo, reading), []
    except DataError:
        raise
    except Exception as error:  # huggingface_hub's own, and those of requests or httpx, by version
        reason = _reason(repo, error)
        if complete is None:
            return folder, [f"not known whether all of its files are there: {reason}"]
        found = "looked in" if folder is None else "found only a part of it in"
        raise DataError(f"cannot get {repo}: {found} {', '.join(looked)}, and {reason}") from error


def _complete(folder: Path, reading: Reading) -> bool | None:
    """Whether the split is there as a whole; None where there are files whose names do not tell."""
    listing = walk(folder)
    try:
        names = files_needed(listing.names, reading.split, str(folder), reading.subset, configs_of(folder / "README.md"))
    except DataError:  # what is asked for may be on the hub
        return False
    return None if not names[0].lower().endswith(_TABLES) else parts_missing(names) == 0


def _download(repo: str, reading: Reading) -> Path:
    from huggingface_hub import HfApi, hf_hub_download, snapshot_download

    info = HfApi().dataset_info(repo, revision=reading.revision)
    names, configs = [f.rfilename for f in info.siblings or []], {}
    if "README.md" in names:
        with contextlib.suppress(Exception):  # then the names of the files alone say what they are
            configs = configs_of(Path(hf_hub_download(repo, "README.md", repo_type="dataset", revision=info.sha)))
    wanted = files_needed(names, reading.split, repo, reading.subset, configs)
    escaped = [re.sub(r"([*?[])", r"[\1]", name) for name in wanted]
    return Path(snapshot_download(repo, repo_type="dataset", revision=info.sha, allow_patterns=escaped))


def files_needed(names: list[str], split: str, repo: str, subset: str | None = None, configs: Configs = {}) -> list[str]:
    """The files of a repository to download: the split's parquet files, or tars, or else all images.

    Raises DataError, before anything is downloaded, where the split or subset is missing or the layout is one that mmgen does
    not read.
    """
    names, chosen = choose(names, split, subset, configs, repo)
    for endings in (_TABLES, (".tar",)):
        found = [n for n in names if n.lower().endswith(endings) and n.rpartition("/")[2] not in METADATA]
        if found:
            return found if chosen else select_split(found, split, repo)
    images = [n for n in names if n.lower().endswith(image_suffixes()) and "/" in n]  # at the top: pictures of its README
    if images:
        return images + [n for n in names if n.rpartition("/")[2] in (EDM_LABELS, *METADATA)]
    raise DataError(
        f"{repo} on the hub holds neither parquet files nor folders of images: download it with `hf download {repo} "
        "--repo-type dataset --local-dir DIR`, unpack it, and give DIR"
    )


def _reason(repo: str, error: Exception) -> str:
    from huggingface_hub import errors

    page = f"https://huggingface.co/datasets/{repo}"
    if isinstance(error, errors.GatedRepoError):
        return f"the hub asks for a token: accept the terms at {page}, then run `hf auth login`"
    if isinstance(error, errors.RepositoryNotFoundError):
        return "the hub knows no data set of that name (one that is private needs `hf auth login`)"
    download = f"hf download {repo} --repo-type dataset --local-dir DIR"
    elsewhere = f"run `{download}` where the hub can be reached and give DIR"
    if isinstance(error, errors.OfflineModeIsEnabled):
        return f"may not ask the hub (HF_HUB_OFFLINE is set): {elsewhere}"
    if getattr(error, "errno", None) is not None and not isinstance(error, ConnectionError):  # a full disk
        return f"the download failed: {error}"
    detail = (str(error).strip() or type(error).__name__).split("\n")[0]
    return f"the hub cannot be reached ({detail}): {elsewhere}"
