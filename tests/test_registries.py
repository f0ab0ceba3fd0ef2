"""A further schedule, preconditioning, network, metric, extractor of features, weight of a loss or format of checkpoints is a
function or class and one line elsewhere; each is tried here, and no other list names the kinds."""

from __future__ import annotations

import typing
from dataclasses import dataclass, replace
from types import ModuleType

import pytest
import torch
from fid_tools import run, scores, write_images

from mmgen.cli.fid import fid
from mmgen.errors import ConfigError
from mmgen.formats.family import ConvertOptions
from mmgen.formats.reading import read
from mmgen.formats.recognise import FAMILIES, Family, convert, family_of
from mmgen import networks
from mmgen.diffusion import preconditioning, schedules
from mmgen.diffusion.flow_map import FlowMapSettings
from mmgen.losses import denoising, imm, mmd
from mmgen.metrics.comparisons import COMPARISONS, Comparison
from mmgen.metrics.evaluate import known_metrics
from mmgen.metrics.features import EXTRACTORS, Extractor
from mmgen.networks import limits
from mmgen.networks.text import TextSettings


def words_of(option: str) -> str:
    return typing.get_type_hints(fid, include_extras=True)[option].__metadata__[0].help


def test_help_names_all():
    for option, names in (("metrics", known_metrics()), ("features", EXTRACTORS)):
        assert all(name in words_of(option) for name in names), f"the help of --{option} is to name {list(names)}"


def test_a_further_metric_and_extractor(own_cache, monkeypatch, tmp_path):
    def gap(pair):
        return {"mean gap": ((pair.real.mean() - pair.fake.mean()).abs().item(), None)}

    def brightness(wanted):
        by = lambda images: images.double().mean((2, 3))  # noqa: E731
        return Extractor("fd-mean", "FD-mean", {"features": "brightness"}, True, True, None, by, None)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(COMPARISONS, "gap", Comparison("the gap", gap))
    monkeypatch.setitem(EXTRACTORS, "brightness", brightness)
    write_images(tmp_path / "a", 9), write_images(tmp_path / "b", 7)
    run(fid, "a", "--ref", "b", "--metrics", "gap", "--features", "brightness", "--out", "scores.json")
    (found,) = scores(tmp_path / "scores.json")
    assert list(found["figures"]) == ["mean gap"] and found["figures"]["mean gap"] > 0 and found["protocol"] == {"features": "brightness"}


def test_a_further_schedule_and_preconditioning(monkeypatch):
    """A path of alpha = 1 - t^2; a model whose output is x itself."""
    square = replace(schedules.FLOW, name="square", alpha=lambda t: 1 - t**2, d_alpha=lambda t: -2 * t)

    class Direct(preconditioning.EDM):
        def coefficients(self, sigma):
            return torch.zeros_like(sigma), torch.ones_like(sigma), torch.ones_like(sigma)

    monkeypatch.setitem(schedules.MAKERS, "square", lambda settings: square)
    monkeypatch.setitem(preconditioning.KINDS, "direct", Direct)
    half = torch.tensor(0.5, dtype=torch.float64)
    assert schedules.make_schedule(schedules.ScheduleSettings("square")).alpha(half) == 0.75
    settings = preconditioning.DenoiserSettings(precondition="direct")
    preconditioning.check_settings(settings)
    assert [float(c) for c in preconditioning.preconditioning(settings)(half)[:3]] == [0, 1, 1]


def test_the_registries_are_the_only_lists():
    """What settings may say is what the tables hold, so that a line in the table is all."""
    assert typing.get_type_hints(schedules.ScheduleSettings)["name"] == typing.Literal[tuple(schedules.MAKERS)]
    assert typing.get_type_hints(preconditioning.DenoiserSettings)["precondition"] == typing.Literal[tuple(preconditioning.KINDS)]
    assert set(typing.get_args(networks.NetworkSettings)) == set(networks.NETWORKS)


def test_a_further_network(monkeypatch):
    @dataclass(frozen=True)
    class Settings:
        kind: typing.Literal["line"] = "line"
        width: int = 8
        limits: typing.ClassVar = {"width": limits.WIDTH}
        null_class: typing.ClassVar = True

        def check(self, resolution):
            pass

    class Line(torch.nn.Linear):
        supports = frozenset({"second_time"})

        def __init__(self, settings, resolution, channels, num_classes, second_time):
            super().__init__(settings.width, settings.width)

    monkeypatch.setitem(networks.NETWORKS, Settings, Line)
    assert isinstance(networks.build_network(Settings(), resolution=8, channels=1), Line)
    assert "line" in networks.kinds_with("second_time") and "line" not in networks.kinds_with("text")
    with pytest.raises(ConfigError, match="network of kind 'line' takes no text: unet"):
        networks.build_network(Settings(), resolution=8, channels=1, text=TextSettings())
    with pytest.raises(ConfigError, match="network.width = 0 is impossible"):
        networks.build_network(Settings(width=0), resolution=8, channels=1)


def test_a_further_weight(monkeypatch):
    monkeypatch.setitem(denoising.WEIGHTS, "cube", lambda settings, denoiser, sigma: sigma**3)
    settings = denoising.DenoisingSettings(weighting="cube")
    assert denoising.weight(settings, denoising.DenoiserSettings(), torch.tensor([2.0], dtype=torch.float64)).tolist() == [8.0]


def test_a_further_mapping_weighting_and_kernel_of_imm(monkeypatch):
    """t squared as the quantity in which r is a step back from t; a constant weight; a kernel of no distance, whose loss is 0."""
    monkeypatch.setitem(imm.MAPPINGS, "square", imm.Mapping(lambda path, t: t**2, lambda path, value: value.sqrt(), 0.0, 1.0))
    monkeypatch.setitem(imm.WEIGHTS, "two", lambda loss, path, t: torch.full_like(t, 2.0))
    monkeypatch.setitem(mmd.KERNELS, "one", (lambda p, *_: torch.zeros_like(p), lambda length, *_: torch.ones_like(length)))
    loss, flow = imm.ImmSettings(mapping="square", weighting="two", kernel="one", k=1.0, group_size=2), FlowMapSettings(t_min=0.0, t_max=1.0)
    s, t = torch.tensor([[0.1], [0.8]], dtype=torch.float64)
    assert imm.documented_times("square", 0.5) == (0.0, 1.0)
    r = imm.earlier_time(loss, flow, s, t)
    torch.testing.assert_close(r**2, t**2 - 0.5)
    assert imm.imm_loss(loss, flow, s, r, t, torch.zeros(2, 3), torch.zeros(2, 3)).tolist() == [2.0 * 2 / 2**2]


def test_a_further_family_of_checkpoints(monkeypatch, tmp_path):
    theirs = ModuleType("theirs")
    theirs.family = lambda found: "theirs" if "their.weight" in found.tensors else None
    theirs.convert = lambda found, options: (found.path.name, options.heads)
    monkeypatch.setitem(FAMILIES, "theirs", Family("Theirs", theirs, ("heads", "classes")))
    torch.save({"their.weight": torch.ones(2)}, tmp_path / "a.pt")
    found = read(tmp_path / "a.pt")
    assert family_of(found) == "theirs" and convert(found, ConvertOptions(heads=4)) == ("a.pt", 4)
    with pytest.raises(ConfigError, match="--guide-all is for"):
        convert(found, ConvertOptions(guide_all=True))
