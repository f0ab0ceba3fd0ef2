"""The command `mmgen`, and `python -m mmgen`."""

from __future__ import annotations

import sys


def main() -> None:
    from .system.process import tune

    tune()
    from .cli import app
    from .errors import MmgenError, shortened

    try:
        app()
    except MmgenError as error:
        print(f"error: {_one_line(error)}", file=sys.stderr)
        sys.exit(error.exit_status)
    except (MemoryError, RuntimeError) as error:
        if not _is_memory(error):
            raise
        print("error: the memory is too small: take a smaller network or batch, or smaller images", file=sys.stderr)
        sys.exit(1)
    except OSError as error:
        if error.filename is None:
            raise
        print(f"error: {_one_line(f'{shortened(str(error.filename), 200)}: {error.strerror}')}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def _one_line(error: Exception) -> str:
    """Without line breaks and what moves a terminal's cursor: names of files and columns can hold anything."""
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in str(error))


def _is_memory(error: Exception) -> bool:
    """Whether memory could not be had: torch says so in a RuntimeError of its own, or of none."""
    told = "allocate memory", "not enough memory", "out of memory"
    return isinstance(error, MemoryError) or any(text in str(error) for text in told)


if __name__ == "__main__":
    main()
