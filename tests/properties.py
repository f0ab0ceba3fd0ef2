"""How many examples hypothesis tries: few in the tests, the same ones each time; more with MMGEN_HYPOTHESIS_EXAMPLES=1000."""

from __future__ import annotations

import os

from hypothesis import HealthCheck, Phase, settings

_ASKED = int(os.environ.get("MMGEN_HYPOTHESIS_EXAMPLES", "0"))


def examples(number: int, simplify: bool = True) -> settings:
    """`number` of them, or as many as are asked for, which are then others each time. simplify: what fails is then made smaller,
    which takes many times as long."""
    phases = (Phase.explicit, Phase.generate, *([Phase.shrink] if simplify else []))
    return settings(
        max_examples=_ASKED or number, derandomize=not _ASKED, deadline=None, database=None, phases=phases,
        suppress_health_check=list(HealthCheck), print_blob=True,
    )  # fmt: skip
