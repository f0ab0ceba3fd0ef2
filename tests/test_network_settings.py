"""What networks declare: limits of their numbers, what they support, whether they have a null. A further one is a file and a line."""

from __future__ import annotations

import typing
from dataclasses import dataclass, fields, replace
from typing import ClassVar

import pytest
import torch
from torch import nn

from mmgen.errors import ConfigError
from mmgen.networks import NETWORKS, build_network, kinds_with
from mmgen.networks.diffusers_text import DiffusersTextSettings
from mmgen.networks.diffusers_unet import DiffusersUNetSettings
from mmgen.networks.limits import WIDTH, check_sizes
from mmgen.system.schema import from_dict

OWN = [settings for settings in NETWORKS if settings not in (DiffusersUNetSettings, DiffusersTextSettings)]


@pytest.mark.parametrize("settings", OWN, ids=lambda settings: settings.kind)
def test_every_number_has_limits_and_they_are_looked_at(settings):
    hints = typing.get_type_hints(settings)
    numbers = {f.name for f in fields(settings) if hints[f.name] is not bool and ("int" in str(f.type) or "float" in str(f.type))}
    assert numbers == set(settings.limits)
    for name, (_, most) in settings.limits.items():
        value = getattr(settings(), name)
        wrong = (most * 2 + 1,) * len(value) if isinstance(value, tuple) else most * 2 + 1
        with pytest.raises(ConfigError, match=f"network.{name} = .* is impossible"):
            check_sizes(replace(settings(), **{name: wrong}), resolution=32, channels=3)


def test_settings_that_do_not_fit_are_refused_before_a_network_is_built():
    for kind, values, message in (
        ("unet", {"channel_mult": [1, 2, 2]}, "divisible by 4"), ("adm", {"model_channels": 30, "channel_mult": [1, 2]}, "group norm"),
        ("edm2", {"channel_mult": []}, "at least one level"), ("dit", {"num_heads": 0}, "num_heads must be at least 1"),
        ("dit", {"patch_size": 4}, "does not divide"), ("uvit", {"channel_mult": [1]}, "num_blocks"),
    ):  # fmt: skip
        settings = from_dict(next(known for known in NETWORKS if known.kind == kind), values)
        with pytest.raises(ConfigError, match=message):
            check_sizes(settings, resolution=30, channels=3)
        with pytest.raises(ConfigError, match=message):
            build_network(settings, resolution=30, channels=3, second_time=False)


@dataclass(frozen=True)
class ToySettings:
    kind: typing.Literal["toy"] = "toy"
    width: int = 4

    limits: ClassVar = {"width": WIDTH}
    null_class: ClassVar = False

    def check(self, resolution: int) -> None:
        if resolution % 2:
            raise ConfigError("toys are even")


class Toy(nn.Module):
    supports = frozenset({"extra_channels"})

    def __init__(self, settings, resolution, channels, num_classes=0, *, extra_channels=0):
        super().__init__()
        self.out = nn.Conv2d(channels + extra_channels, channels, 1)


def test_a_further_network_is_its_file_and_one_line(monkeypatch):
    monkeypatch.setitem(NETWORKS, ToySettings, Toy)
    shape = {"resolution": 8, "channels": 3, "second_time": False}
    assert build_network(ToySettings(), **shape, extra_channels=2).out(torch.zeros(1, 5, 8, 8)).shape == (1, 3, 8, 8)
    for changed, message in (({"augment_dim": 9}, "'toy' takes no augmentation label: unet or adm can"),
                             ({"resolution": 7}, "toys are even"), ({"second_time": True}, "has no second time")):  # fmt: skip
        with pytest.raises(ConfigError, match=message):
            build_network(ToySettings(), **shape | changed)
    assert "toy" in kinds_with("extra_channels") and "toy" not in kinds_with("text")
