"""Batches that are read while the device works on those before."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from .batches import Batch


class Prefetch:
    """The next batch is fetched by a thread while this one is in use: the same batches in the same order, which depend on the number
    of their first image alone. One that was fetched and is not asked for next is dropped.
    """

    def __init__(self, fetch: Callable[[int], Batch], threaded: bool) -> None:
        """threaded: on a GPU. On a CPU the thread would take time from the training itself."""
        self.fetch, self.worker = fetch, ThreadPoolExecutor(1, "batches") if threaded else None
        self._next: tuple[int, Future[Batch]] | None = None

    def walk(self, starts: Sequence[int], then: int) -> Iterator[Batch]:
        """The batches that begin at `starts`; `then` is where the one that follows them will probably begin."""
        if self.worker is None:
            yield from map(self.fetch, starts)
            return
        for start, following in zip(starts, [*starts[1:], then], strict=True):
            if self._next is None or self._next[0] != start:
                self._next = start, self.worker.submit(self.fetch, start)
            batch = self._next[1].result()
            self._next = following, self.worker.submit(self.fetch, following)
            yield batch

    def close(self) -> None:
        self._next = None
        if self.worker is not None:
            self.worker.shutdown(wait=True, cancel_futures=True)
