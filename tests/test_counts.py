"""Whole numbers with units, wherever a count is given: options, --set, TOML, lists."""

from __future__ import annotations

import dataclasses

import pytest

from mmgen.cli.options import numbers
from mmgen.config.imm import ImmConfig, resolve
from mmgen.config.sections import nest, parse_assignment
from mmgen.errors import ConfigError
from mmgen.system.schema import from_dict, parse_count


@pytest.mark.parametrize("text, number", [
    ("500", 500), ("64k", 64_000), ("64K", 64_000), ("1M", 10**6), ("1.5M", 1_500_000), ("2G", 2 * 10**9), ("64Ki", 65536),
    ("1Mi", 2**20), ("2Gi", 2**31), ("1_000", 1000), ("-3", -3), (" 7 ", 7), ("0.5Ki", 512),
])  # fmt: skip
def test_counts(text, number):
    assert parse_count(text) == number


@pytest.mark.parametrize(
    "text", ["", "k", "1m", "1e6", "0.5", "1.2345k", "64 k", "64ki", "1Ti", "0x10", "nan", "9" * 40, "1" * 19 + "G", "一"]
)
def test_what_is_no_count(text):
    assert parse_count(text) is None


def test_settings_understand_counts():
    table = nest(dict(map(parse_assignment, ("train.max_images=64k", "run.checkpoint_every=1.5M", "run.batch_per_device=4k"))), ImmConfig)
    config = resolve(table, {"train": {"ema_half_lives": ["50k", 7]}})
    assert (config.train.max_images, config.run.checkpoint_every, config.run.batch_per_device) == (64_000, 1_500_000, 4000)
    assert config.train.ema_half_lives == (50_000, 7)
    for wrong in ("64kk", "12", "1.2345k", ""):
        with pytest.raises(ConfigError, match="train.max_images must be a whole number"):
            resolve({"train": {"max_images": wrong}})


def test_words_stay_words():
    @dataclasses.dataclass(frozen=True)
    class Named:
        name: str = ""

    assert from_dict(Named, {"name": "64k"}).name == "64k"


def test_lists_of_counts():
    assert numbers("1,2,1k", int, "--steps", "1,2") == [1, 2, 1000]
    with pytest.raises(ConfigError, match="--steps must be whole numbers"):
        numbers("1,two", int, "--steps", "1,2")
