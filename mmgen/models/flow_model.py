"""A flow map with its network: what IMM trains."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..diffusion.flow_map import FlowMapSettings, coefficients, input_scale, network_times
from ..diffusion.process import each_time, per_image
from ..networks.conditions import Condition, check_condition
from .guidance import guided
from .model import Model


class FlowModel(Model):
    """A flow map with its network: `model.f(x, s, t)` jumps from t to s."""

    def f(
        self, x: Tensor, s: Tensor | float, t: Tensor | float, condition: Condition | None = None, guidance: float = 1.0
    ) -> Tensor:
        """f_{s,t}(x): see `flow_map`. x [N, C, H, W]; s and t float64 [N], or one number for all images."""
        check_condition(condition)
        return flow_map(self.network, self.config.flow, x, each_time(s, x), each_time(t, x), condition, guidance)


def guided_output(
    network: nn.Module, flow: FlowMapSettings, x: Tensor, s: Tensor, t: Tensor, condition: Condition | None, guidance: float
) -> Tensor:
    """The network's raw output with guidance: see `guidance.guided`.

    x [N, C, H, W] float; s, t float64 [N]. Returns float32 [N, C, H, W].
    """
    own = next((parameter.dtype for parameter in network.parameters()), torch.float32)
    scaled = (per_image(input_scale(flow, t), x) * x).to(own)
    return guided(network, scaled, *network_times(flow, s, t), condition, guidance)


def flow_map(
    network: nn.Module,
    flow: FlowMapSettings,
    x: Tensor,
    s: Tensor,
    t: Tensor,
    condition: Condition | None = None,
    guidance: float = 1.0,
) -> Tensor:
    """f_{s,t}(x) in x's dtype; the network itself computes in its own precision. Shapes as in `guided_output`."""
    c_skip, c_out = coefficients(flow, s, t)
    output = guided_output(network, flow, x, s, t, condition, guidance)
    return per_image(c_skip, x) * x + per_image(c_out, x) * output.to(x.dtype)
