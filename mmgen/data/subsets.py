"""Which files belong to which subset of a repository: by its README, as the hub lays it down, or by their folder."""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath
from typing import Any

from ..errors import DataError, nearest
from .splits import canonical, no_split

Configs = dict[str, dict["str | None", list[str]]]  # subset -> split -> patterns; None: the files' names say the split


def configs_of(readme: Path) -> Configs:
    """What a README says about subsets; nothing where it is absent or says nothing. The default one, if any, comes first."""
    from huggingface_hub import metadata_load

    try:
        found = (metadata_load(readme) or {}).get("configs") if readme.is_file() else None
        listed = [(bool(one.get("default")), str(one["config_name"]), _patterns(one)) for one in found or []]
    except Exception:  # yaml has many errors, and this is a file of text for people
        return {}
    listed.sort(key=lambda one: not (one[0] or one[1] == "default"))
    return {name: patterns for _, name, patterns in listed}


def _patterns(config: dict[str, Any]) -> dict[str | None, list[str]]:
    folder = str(config.get("data_dir") or ".").rstrip("/")
    files = config.get("data_files")
    if files is None:
        return {None: [f"{folder}/**"]}
    if isinstance(files, dict):
        files = [{"split": split, "path": path} for split, path in files.items()]
    patterns: dict[str | None, list[str]] = {}
    for one in [files] if isinstance(files, (str, dict)) else files:
        split, paths = (one.get("split", "train"), one["path"]) if isinstance(one, dict) else (None, one)
        patterns.setdefault(split, []).extend(f"{folder}/{path}" for path in ([paths] if isinstance(paths, str) else paths))
    return patterns


def choose(names: list[str], split: str, subset: str | None, configs: Configs, path: str) -> tuple[list[str], bool]:
    """The files of a subset, and whether they are already those of the split. Raises DataError where there is none such."""
    defaults = [name for name in configs if name == "default" or len(configs) == 1]
    wanted = subset if subset is not None else next(iter(defaults), None)
    if wanted in configs:
        by_split = {name and canonical(name): _matching(names, patterns) for name, patterns in configs[wanted].items()}
        if not any(by_split.values()):
            if subset is None:
                return names, False  # a README of other files: those that are there are meant
            raise DataError(f"{path} has no files of the subset {subset!r}")
        if None in by_split:
            return by_split[None], False
        if not by_split.get(canonical(split)):
            raise no_split(path, split, [name for name, found in by_split.items() if found])
        return by_split[canonical(split)], True
    if subset is None:
        return names, False
    inside = [name for name in names if subset in PurePosixPath(name).parts[:-1]]
    if not inside:
        folders = sorted({part for name in names for part in PurePosixPath(name).parts[:-1]})
        raise DataError(f"{path} has no subset {subset!r}: {nearest(subset, [*configs, *folders][:50])}")
    return inside, False


def _matching(names: list[str], patterns: list[str]) -> list[str]:
    """The names that match one of the patterns: * within a folder, ** through folders."""
    parts = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    written = [re.sub(r"\*\*/|\*\*|\*|\?|[^*?]+", lambda m: parts.get(m[0]) or re.escape(m[0]), _plain(p)) for p in patterns]
    return [name for name in names if any(re.fullmatch(pattern, name) for pattern in written)]


def _plain(pattern: str) -> str:
    return re.sub(r"^(\./)+", "", pattern)
