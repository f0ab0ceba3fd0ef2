"""Losses and samplers are functions that can be imported, and their docstrings, or their module's, say which shapes they take."""

import inspect

import pytest

from mmgen.losses import denoising, imm, mmd, moment_matching
from mmgen.sampling import denoiser_samplers, flow_map_samplers

SAMPLERS = (denoiser_samplers, flow_map_samplers)


def functions(module):
    own = inspect.getmembers(module, inspect.isfunction)
    return [function for name, function in own if not name.startswith("_") and function.__module__ == module.__name__]


@pytest.mark.parametrize("module", [denoising, imm, mmd, moment_matching, *SAMPLERS], ids=lambda module: module.__name__)
def test_shapes_are_said(module):
    for function in functions(module):
        gives = "Tensor" in str(inspect.get_annotations(function).get("return"))
        gives = gives and "dict" not in str(inspect.get_annotations(function)["return"])  # by name: as the parameters
        text = (function.__doc__ or "") + (module.__doc__ if module in SAMPLERS else "")
        assert not gives or any(word in text for word in ("[", "any shape", "scalar")), function.__name__
