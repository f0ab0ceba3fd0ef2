"""mmgen: few-step image generators by moment matching.

>>> import mmgen
>>> model = mmgen.load("runs/digits-imm")
>>> images = model.sample(64, steps=2, seed=0)  # uint8 [64, 1, 8, 8]
"""

from __future__ import annotations

__version__ = "0.1.0"
__all__ = ["__version__", "load", "pipeline"]


def __getattr__(name: str):
    """`mmgen.load` and `mmgen.pipeline`, without importing torch before they are needed."""
    if name == "load":
        from .sampling.loading import load

        return load
    if name == "pipeline":
        from .sampling.pipeline import pipeline

        return pipeline
    raise AttributeError(f"module 'mmgen' has no attribute {name!r}")
