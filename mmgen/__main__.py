"""The command `mmgen`, and `python -m mmgen`."""

from __future__ import annotations

import gc
import os
import sys


def main() -> None:
    from .system.process import tune
    from .system.streams import standard_streams

    with standard_streams() as out:
        tune()
        status = _run()
        out.flush()
        if out.loss is not None and status == 0:
            print(f"error: the standard output cannot be written: {out.loss}", file=sys.stderr)
            status = 1
    if "WORLD_SIZE" not in os.environ:  # several processes end as Python ends
        gc.freeze()  # else Python looks through all of torch's objects for cycles before it ends, which takes up to a second
    sys.exit(status)


def _run() -> int:
    """The exit status of the command that was typed."""
    from .cli import app
    from .errors import MmgenError, shortened

    try:
        app()
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except MmgenError as error:
        print(f"error: {_one_line(error)}", file=sys.stderr)
        return error.exit_status
    except (MemoryError, RuntimeError) as error:
        if _is_memory(error):
            print("error: the memory is too small: take a smaller network or batch, or smaller images", file=sys.stderr)
        elif type(error).__module__.startswith(("torch._inductor", "torch._dynamo")):  # no compiler, for example
            print(f"error: torch.compile does not work here, leave out --compile: {_one_line(shortened(error, 200))}", file=sys.stderr)
        else:
            raise
        return 1
    except OSError as error:
        if error.filename is None:
            raise
        print(f"error: {_one_line(f'{shortened(str(error.filename), 200)}: {error.strerror}')}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


def _one_line(error: Exception | str) -> str:
    """Without line breaks and what moves a terminal's cursor: names of files and columns can hold anything."""
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in str(error))


def _is_memory(error: Exception) -> bool:
    """Whether memory could not be had: torch says so in a RuntimeError of its own, or of none."""
    told = "allocate memory", "not enough memory", "out of memory"
    return isinstance(error, MemoryError) or any(text in str(error) for text in told)


if __name__ == "__main__":
    main()
