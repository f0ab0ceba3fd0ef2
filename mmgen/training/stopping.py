"""Stopping a run cleanly when it is asked to."""

from __future__ import annotations

import signal
import threading
import time

SIGNALS = [number for name in ("SIGTERM", "SIGINT", "SIGHUP") if (number := getattr(signal, name, None)) is not None]
_LAUNCHER = 1.0  # seconds: a launcher passes on to its processes what the terminal has sent them already


class StopRequest:
    """While entered, SIGTERM, Ctrl-C and a terminal that hangs up set `signal` instead of ending the process.

    A second one, a second later, ends it at once; but for hang-ups, of which a closed terminal sends several. Signals that are
    ignored, as by nohup, stay so.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self._since = 0.0
        self._before: dict[int, object] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():  # elsewhere Python does not allow handlers
            for number in SIGNALS:
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._receive)
        return self

    def _receive(self, number: int, frame: object) -> None:
        if self.signal is None:
            self.signal, self._since = number, time.monotonic()
        elif number != getattr(signal, "SIGHUP", None) and time.monotonic() - self._since > _LAUNCHER:
            raise KeyboardInterrupt

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
