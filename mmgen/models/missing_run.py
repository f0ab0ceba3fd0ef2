"""What a name means where nothing is there: a run of this machine, or a repository of the hub."""

from __future__ import annotations

import difflib
from pathlib import Path

RUNS = "runs"  # the folder that training writes to unless told otherwise


def missing_run(name: str) -> str | None:
    """One sentence for a path below runs/, or in another folder with runs, at which there is nothing; None for what may be a
    repository of the hub."""
    if "/" not in name.rstrip("/") or name.startswith("hf://") or len(name) > 1000:
        return None
    parent = Path(name.rstrip("/")).parent
    names = sorted(path.name for path in parent.iterdir() if (path / "log.jsonl").is_file()) if parent.is_dir() else []
    if not names and parent.parts[:1] != (RUNS,):
        return None
    close = difflib.get_close_matches(Path(name).name, names, n=1, cutoff=0.0)
    nearest = f"the nearest run is {parent / close[0]}" if close else f"there are no runs in {parent}"
    return f"there is nothing at {name}: {nearest}"
