"""A progress bar for Python and notebooks, with what huggingface_hub brings along: tqdm."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def bar(what: str, total: int, unit: str = " images") -> Iterator[Callable[[float], None]]:
    """Yields update(done)."""
    from tqdm.auto import tqdm

    with tqdm(total=total, desc=what, unit=unit) as shown:

        def update(done: float) -> None:
            shown.update(int(done) - shown.n)

        yield update
