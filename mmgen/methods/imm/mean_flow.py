"""One pass of MeanFlow over a part of the batch (arXiv:2505.13447, algorithm 1): a baseline of IMM's, by the same flow map."""

from __future__ import annotations

import torch
from torch import Tensor

from ...diffusion.flow_map import input_scale, network_times
from ...diffusion.process import diffuse, per_image
from ...losses.mean_flow import draw_times, mean_flow_loss, velocity_and_target
from ...system.random import keys, normal, torch_seed
from ...training.batches import Batch
from .flow_objective import NOISE, TIME, FlowObjective


class MeanFlowObjective(FlowObjective):
    """`objective(batch)` is the mean loss over a part of the batch, a scalar float64 tensor, and for the log by the noise at t

        error   the root mean square of u - its target, a pixel
    """

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        loss, flow, seed = self.config.mean_flow, self.config.flow, self.config.train.seed
        full_precision = torch.autocast(batch.images.device.type, enabled=False)
        with full_precision:
            x, augment_label = self.inputs.images(batch)
            condition = self.inputs.condition(batch)
            noise = flow.sigma_data * normal(keys(seed, batch.index, NOISE), x.shape[1:])
            s, t = draw_times(loss, keys(seed, batch.index, TIME))
            z = diffuse(flow.get_schedule(), x, noise, t)

        def mean_velocity(z: Tensor, t: Tensor) -> Tensor:
            """f_{s,t}(z) = z - (t - s) sigma_data G: `diffusion.flow_map`, euler_fm."""
            time, second = network_times(flow, s, t)
            return flow.sigma_data * self.network(per_image(input_scale(flow, t), z) * z, time, second, condition, augment_label).float()

        if self.has_dropout:
            torch.manual_seed(torch_seed(seed, batch.first))
        u, target = velocity_and_target(mean_velocity, z, noise - x, s, t)
        with full_precision:
            each = mean_flow_loss(loss, u, target)
            error = (u.detach() - target).double().square().mean((1, 2, 3)).sqrt()
            return each.mean(), {"error": self.by_level(error, t)}
