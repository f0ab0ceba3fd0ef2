"""mmgen: few-step image generators by moment matching.

>>> import mmgen
>>> model = mmgen.load("runs/digits-imm")
>>> images = model.sample(64, steps=2, seed=0)  # uint8 [64, 1, 8, 8]
"""

from __future__ import annotations

__version__ = "0.1.0"
__all__ = ["__version__", "load"]


def __getattr__(name: str):
    """`mmgen.load`, without importing torch before it is needed."""
    if name == "load":
        from .sampling.loading import load

        return load
    raise AttributeError(f"module 'mmgen' has no attribute {name!r}")
