"""The command `mmgen`, and `python -m mmgen`."""

from __future__ import annotations

import os
import sys


def _spin_briefly() -> None:
    """Makes waiting OpenMP threads spin for microseconds, then sleep. Read when torch is loaded.

    Threads that spin for long, the default, slow small networks down several times where another process shares the cores;
    threads that never spin cost a third of the speed where none does.
    """
    if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys():
        os.environ["GOMP_SPINCOUNT"] = "1000"


def main() -> None:
    _spin_briefly()
    from .cli import app
    from .errors import MmgenError

    try:
        app()
    except MmgenError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_status)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
