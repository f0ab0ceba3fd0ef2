"""How long a training may take."""

from __future__ import annotations

from ..errors import ConfigError


def seconds_of(text: str) -> float:
    """90s, 30m, 2h or 1d in seconds. Raises ConfigError."""
    unit = {"s": 1, "m": 60, "h": 3600, "d": 86400}.get(str(text)[-1:])
    try:
        seconds = float(str(text)[:-1]) * unit if unit else -1.0
    except ValueError:
        seconds = -1.0
    if not 0 < seconds < float("inf"):
        raise ConfigError(f"--max-time {text!r} must be a number with a unit, such as 90s, 30m or 2h")
    return seconds
