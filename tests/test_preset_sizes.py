"""The sizes that presets state are those of their networks."""

from __future__ import annotations

import re
from importlib import resources

import pytest
import torch

from mmgen.config.sections import preset_names, read_preset
from mmgen.data import DataShape
from mmgen.methods import IMM, TEACHER
from mmgen.models.build import build_model
from mmgen.networks.empty import without_weights

PRESETS = [(method, name) for method in (IMM, TEACHER) for name in preset_names(method.name)]
DIGITS = DataShape(8, 1, 10)


@pytest.mark.parametrize("method, name", PRESETS, ids=[name for _, name in PRESETS])
def test_the_number_of_parameters(method, name):
    text = resources.files("mmgen.presets").joinpath(f"{name}.toml").read_text("utf-8")
    stated = re.findall(r"(about )?([\d.]+)(k|M| billion) parameters", text)
    assert stated or "[network]" not in text
    training = method.training()
    config = training.resolve(read_preset(name, method.name))
    data = config.data
    shape = DataShape(data.resolution, data.channels or 3, data.num_classes or 10 * data.conditional) if data.resolution else DIGITS
    with torch.device("meta"), without_weights():
        network = build_model(training.model_config(config, shape, None)).network
    count = sum(parameter.numel() for parameter in network.parameters())
    for about, number, unit in stated:
        size = {"k": 1e3, "M": 1e6, " billion": 1e9}[unit]
        least = 10.0 ** -len(number.partition(".")[2]) * size  # a unit of the last digit
        assert abs(float(number) * size - count) <= (0.02 * count if about else 0.5 * least), (number, count)
