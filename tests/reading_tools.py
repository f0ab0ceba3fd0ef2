"""Files of other projects, for tests."""

from __future__ import annotations

import pytest
import torch

from mmgen.errors import ModelError
from mmgen.formats.reading import read

STATE = {"a.weight": torch.arange(6.0).reshape(2, 3), "a.bias": torch.ones(2), "b.weight": torch.full((2,), 0.5).half()}
OTHER = {key: value + 1 for key, value in STATE.items()}


def same(found: dict, expected: dict) -> None:
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert found[key].dtype == value.dtype and torch.equal(found[key], value), key


def refusal(path, **options) -> str:
    with pytest.raises(ModelError) as error:
        read(path, **options)
    message = str(error.value)
    assert "\n" not in message and str(path) in message and len(message) < 500
    return message
