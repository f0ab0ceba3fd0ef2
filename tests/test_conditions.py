"""What a network is conditioned on: one type, which networks and samplers pass on without asking what it is."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from mmgen.errors import ConfigError
from mmgen.models.guidance import guided
from mmgen.networks import DiTSettings, EDM2Settings, build_network
from mmgen.networks.conditions import Condition, Labels, class_numbers, concatenate


@dataclass(frozen=True, eq=False)
class Words(Condition):
    """Another kind, of two tensors, whose null is a row of its own."""

    tokens: Tensor  # [N, L, D]
    pooled: Tensor  # [N, P]
    empty: tuple[Tensor, Tensor]

    def null(self) -> Words:
        tokens, pooled = (one.expand_as(all_) for one, all_ in zip(self.empty, (self.tokens, self.pooled), strict=True))
        return dataclasses.replace(self, tokens=tokens, pooled=pooled)


def words(count: int = 3) -> Words:
    torch.manual_seed(0)
    return Words(torch.randn(count, 4, 2), torch.randn(count, 5), (torch.ones(1, 4, 2), torch.zeros(1, 5)))


EXAMPLES = pytest.mark.parametrize("given", [Labels(torch.tensor([3, 0, 4]), 5), words()], ids=["labels", "words"])


def same(a: Condition, b: Condition) -> bool:
    return type(a) is type(b) and all(torch.equal(a.tensors()[name], b.tensors()[name]) for name in a.tensors())


@EXAMPLES
def test_it_behaves_as_a_tensor_of_images(given):
    assert len(given) == 3 and len(given[1:]) == 2 and len(given[torch.tensor([True, False, True])]) == 2
    assert same(given[[0, 0, 2]], concatenate([given[:1], given[:1], given[2:]]))
    assert len(given.null()) == 3 and same(given.null()[:1], given.null()[2:]) and not same(given, given.null())
    mixed = given.hidden(torch.tensor([True, False, False]))
    assert same(mixed, concatenate([given.null()[:1], given[1:]]))
    assert {value.device.type for value in given.to("meta").tensors().values()} == {"meta"}
    with pytest.raises(dataclasses.FrozenInstanceError):
        given.tokens = 0


class Network(nn.Module):
    """Its output is a function of whatever tensors the condition has."""

    def forward(self, x, t, s, condition):
        return x + sum(value.double().reshape(len(x), -1).sum(1) for value in condition.tensors().values())[:, None, None, None]


@EXAMPLES
def test_guidance_asks_for_no_kind(given):
    x, t = torch.zeros(3, 1, 1, 1, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    one, none, both = (guided(Network(), x, t, None, given, w) for w in (1.0, 0.0, 2.5))
    assert torch.equal(none, Network()(x, t, None, given.null())) and not torch.equal(one, none)
    torch.testing.assert_close(both, none + 2.5 * (one - none))


def test_a_network_of_classes_takes_labels_of_its_classes_only():
    network = build_network(DiTSettings(hidden_size=32, depth=1, num_heads=2), resolution=8, channels=3, num_classes=5)
    x, t = torch.zeros(3, 3, 8, 8), torch.zeros(3, dtype=torch.float64)
    assert class_numbers(None, 5, t).tolist() == [5, 5, 5]
    for wrong in (words(), Labels(torch.tensor([3, 0, 4]), 10), torch.tensor([3, 0, 4])):
        with pytest.raises(ConfigError, match=r"Labels\(classes, num_classes=5\), not on (Words|10 classes|Tensor)"):
            network(x, t, t, wrong)


def test_what_a_network_lacks_is_refused_and_what_it_supports_is_built():
    dit, edm2 = DiTSettings(hidden_size=32, depth=1, num_heads=2), EDM2Settings(model_channels=64, channel_mult=(1,), num_blocks=1)
    for settings, lacks in ((dit, {"augment_dim"}), (edm2, {"augment_dim", "second_time"})):
        for name in ("augment_dim", "second_time", "extra_channels"):
            options = {"resolution": 8, "channels": 3, "second_time": False, name: 2}
            if name in lacks:
                with pytest.raises(ConfigError, match=f"a network of kind '{settings.kind}' (takes no|has no)"):
                    build_network(settings, **options)
            else:
                assert name in build_network(settings, **options).supports
