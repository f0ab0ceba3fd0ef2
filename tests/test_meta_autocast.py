"""What a pass under autocast keeps, computed on the meta device, against torch's own autocast on CUDA tensors that are not there."""

import sys
from pathlib import Path

import pytest
import torch
from fake_cuda import autocast, move, on_device, record
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parents[1]))
from tests.gpu.cases import TINY, scramble, teacher_parts, tiny_settings  # noqa: E402

from mmgen.models.build import build_model  # noqa: E402
from mmgen.networks.conditions import Labels  # noqa: E402
from mmgen.training.cost import pass_cost  # noqa: E402
from mmgen.training.meta_autocast import FusedAttention  # noqa: E402


def kept_by_torch(config, count: int) -> int:
    """Bytes that autograd keeps of a pass in bfloat16 for the backward pass, weights aside."""
    network, kept, out = build_model(config).network.train(), {}, []
    scramble(network)
    move(network)
    weights = set(network.parameters())

    def keep(tensor):
        base = tensor._base if tensor._base is not None else tensor
        if base not in weights:
            kept[base.untyped_storage()._cdata] = base
        return tensor

    x, t = torch.randn(count, config.channels, config.resolution, config.resolution), torch.rand(count, dtype=torch.float64)
    given = on_device(x), on_device(t), None, Labels(on_device(torch.zeros(count, dtype=torch.int64)), config.num_classes)

    def run():
        with autocast(torch.bfloat16), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            out.append(network(*given))

    record(run)
    return sum(tensor.numel() * tensor.element_size() for tensor in kept.values())


@pytest.mark.parametrize("kind", TINY)
def test_what_a_pass_keeps_in_half_precision(kind, monkeypatch):
    """By how much it grows with an image: copies of weights, which torch counts here too, do not grow."""
    _, _, config = teacher_parts("cifar10-teacher", "bf16", None, tiny_settings(kind))
    cost = pass_cost(config, "bf16")
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda q, k, v: FusedAttention.apply(q.bfloat16(), k.bfloat16(), v.bfloat16()))
    one, two = (kept_by_torch(config, count) for count in (1, 2))
    assert two > one and cost.bytes == two - one


def test_normalised_weights_are_kept_once():
    """Not once an image, as EDM2's were counted."""
    settings = tiny_settings("edm2") | {"network.attn_resolutions": []}
    small, large = (pass_cost(teacher_parts("cifar10-teacher", "fp32", None, settings | {"data.resolution": side})[2], "fp32") for side in (8, 16))
    assert small.fixed == large.fixed > 4 * small.parameters
    assert large.bytes > 3 * small.bytes
