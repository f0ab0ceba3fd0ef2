"""Training of a denoiser, diffusion or flow matching: the teacher that `mmgen distill` makes few-step students of."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ...data import DataShape
from ...models.denoiser import Denoiser
from ...diffusion.preconditioning import preconditioning
from ...diffusion.process import per_image
from ...networks.conditions import Text
from ...models.latents import LatentSettings
from ...losses.denoising import LEVELS, draw_sigma, level_edges, weight
from ...models.build import check_weights
from ...models.config import ModelConfig
from ...system.random import keys, normal, torch_seed, uniform
from ...config.teacher import TeacherConfig, resolve
from ...training.batches import Batch
from ...training.inputs import Inputs
from ...training.cost import DENOISING
from ...training.task import TrainedNetwork, Task
from ..fresh import fresh_model_config
from ..method import Training
from ..texts import find_sizes, find_text, null_of, set_null, text_of

_NOISE, _TIME = 120, 121  # purposes of random numbers, drawn with the seed and the number of the image


def teacher_model_config(config: TeacherConfig, shape: DataShape) -> ModelConfig:
    """What a model trained with this config on such data is. Raises ConfigError where the two do not go together."""
    latents_std = preconditioning(config.denoiser).data_std  # EDM's coefficients are for data of this one, those of a process for 1
    return fresh_model_config(config, shape, latents_std, flow=None, denoiser=config.denoiser, text=text_of(config), captions=shape.captions)


def teacher_task(config: TeacherConfig, model_config: ModelConfig, null: Text | None = None) -> Task:
    """A freshly initialised network with the loss of a denoiser. null: what the text encoder, if any, makes of ""."""
    check_weights(model_config)
    network = Denoiser(model_config).network
    set_null(network, model_config, null)
    parts = {"model": TrainedNetwork(network, DenoisingObjective(network, config, model_config.latents))}
    return Task(parts, model_config, levels=level_edges(config.loss, config.denoiser))


class DenoisingObjective(nn.Module):
    """`objective(batch)` is (loss, numbers): the mean over a part of the batch, a scalar float64 tensor, and for the log

        loss_by_noise  float64 [2, 8]: sums and counts of the loss by noise level, the eighths of the draws from the least
                       noise to the most (`losses.denoising.level_edges` has their bounds)

    It is a module so that DistributedDataParallel and autocast wrap the whole pass: under autocast the network alone is in
    half precision.
    """

    def __init__(self, network: nn.Module, config: TeacherConfig, latents: LatentSettings | None = None) -> None:
        super().__init__()
        self.network, self.config = network, config
        self.inputs = Inputs(config.data, config.train.seed, latents)
        self.has_dropout = getattr(config.network, "dropout", 0) > 0

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """With x_hat = c_skip y + c_out F and y = x + sigma e, the error of x_hat is c_out (F - target) with

            target = (1 - c_skip) / c_out x - c_skip sigma / c_out e,

        whose coefficients are float64: where x_hat is a small difference of large numbers, nothing is lost by it.
        """
        loss, denoiser, seed = self.config.loss, self.config.denoiser, self.config.train.seed
        full_precision = torch.autocast(batch.images.device.type, enabled=False)
        with full_precision:
            x, augment_label = self.inputs.images(batch)
            condition = self.inputs.condition(batch)
            noise = normal(keys(seed, batch.index, _NOISE), x.shape[1:])
            draw = uniform(keys(seed, batch.index, _TIME))
            sigma = draw_sigma(loss, denoiser, draw)
            c_skip, c_out, c_in, c_noise = preconditioning(denoiser)(sigma)
            scaled = per_image(c_in, x) * x + per_image(c_in * sigma, x) * noise
            target = per_image((1 - c_skip) / c_out, x) * x - per_image(c_skip * sigma / c_out, x) * noise
            of_output = weight(loss, denoiser, sigma) * c_out**2
        if self.has_dropout:  # a resumed run has the masks of an uninterrupted one
            torch.manual_seed(torch_seed(seed, batch.first))
        output = self.network(scaled, c_noise, None, condition, augment_label)
        with full_precision:
            output = output[:, : x.shape[1]]  # a learned variance, of other projects' networks, is not used
            each = of_output * (output.float() - target).square().flatten(1).mean(1)
            numbers = {"loss_by_noise": by_level(each.detach(), (LEVELS * draw).long())}
            return each.mean(), numbers


def by_level(value: Tensor, level: Tensor) -> Tensor:
    """Sums and counts of float64 values [N] by level, int64 [N]: float64 [2, 8]."""
    both = torch.stack([value, torch.ones_like(value)])
    return both.new_zeros(2, LEVELS).index_add_(1, level, both)


TRAINING = Training(
    config=TeacherConfig,
    resolve=resolve,
    model_config=lambda config, shape, source: teacher_model_config(config, shape),
    task=lambda start: teacher_task(start.config, start.model_config, null_of(start)),
    find=lambda config, device: (None, find_text(config)),
    dry_find=lambda config, device: (None, find_sizes(config)),
    work=lambda config: (DENOISING, 1),
)
