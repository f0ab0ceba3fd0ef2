"""The command `mmgen`, and `python -m mmgen`."""

from __future__ import annotations

import sys


def main() -> None:
    from .process import tune

    tune()
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
