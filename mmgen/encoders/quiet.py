"""diffusers and transformers without their warnings and bars, where mmgen says what matters itself."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def quiet_libraries() -> Iterator[None]:
    """Errors are still logged. Libraries that are not loaded yet are left alone."""
    with contextlib.ExitStack() as stack:
        for name in ("diffusers", "transformers"):
            logging = sys.modules.get(f"{name}.utils.logging")
            if logging is None:
                continue
            stack.callback(logging.set_verbosity, logging.get_verbosity())
            logging.set_verbosity_error()
            if getattr(logging, "is_progress_bar_enabled", lambda: False)():
                stack.callback(logging.enable_progress_bar)
                logging.disable_progress_bar()
        yield
