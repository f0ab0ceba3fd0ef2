"""One pass of IMM training over a part of the batch (arXiv:2503.07565, algorithm 1)."""

from __future__ import annotations

import contextlib
from dataclasses import replace

import torch
from torch import Tensor, nn

from ...data import DataShape
from ...diffusion.preconditioning import preconditioning
from ...diffusion.process import diffuse, per_image
from ...errors import ConfigError
from ...diffusion.flow_map import input_scale, network_times
from ...config.imm import ImmConfig, resolve
from ...losses.imm import draw_times, earlier_time, imm_loss, jump_difference
from ...models.build import check_weights
from ...models.config import ModelConfig
from ...models.flow_model import FlowModel
from ...models.latents import LatentSettings
from ...networks.conditions import Condition, Text
from ...system.random import keys, normal, torch_seed
from ...training.batches import Batch
from ...training.cost import IMM as WORK
from ...training.cost import Work
from ...training.initial import read_initial
from ...training.task import TrainedNetwork, Task
from ..fresh import fresh_model_config
from ..distill.teachers import Teacher
from ..method import Training
from ..texts import find_sizes, find_text, null_of, set_null, text_of
from .flow_objective import NOISE, TIME, FlowObjective
from .mean_flow import MeanFlowObjective
from .teacher import TeacherPath, as_teacher, check_teacher, find_teacher, teacher_path


def imm_model_config(config: ImmConfig, shape: DataShape, teacher: Teacher | None = None) -> ModelConfig:
    """What a model trained with this config on such data, and by such a teacher, is. Raises ConfigError where they do not go together."""
    # The noise has the standard deviation sigma_data, and so have latents; those of given weights are as these know them
    std = config.flow.sigma_data if config.flow.given is None else preconditioning(config.flow.given).data_std
    fresh = fresh_model_config(config, shape, std, flow=config.flow, text=text_of(config), captions=shape.captions)
    return fresh if teacher is None else as_teacher(config, teacher, fresh)


def imm_task(config: ImmConfig, model_config: ModelConfig, null: Text | None = None, teacher: TeacherPath | None = None) -> Task:
    """A freshly initialised network with IMM's objective. null: what the text encoder, if any, makes of ""."""
    check_weights(model_config)
    network = FlowModel(model_config).network
    set_null(network, model_config, null)
    if config.loss.objective == "mean_flow":
        objective, advice = MeanFlowObjective(network, config, model_config.latents), "a smaller mean_flow.share, "
    else:
        objective, advice = ImmObjective(network, config, model_config.latents, teacher), "loss.group_size of 4 or more, "
    return Task(
        {"model": TrainedNetwork(network, objective)}, model_config, group_size=_group_size(config), advice=advice,
        levels=objective.levels, frozen=() if teacher is None else (teacher.model.network,),
    )  # fmt: skip


class ImmObjective(FlowObjective):
    """`objective(batch)` is the mean loss over a part of the batch, a scalar float64 tensor, and for the log by the noise at t

        loss_by_t    the loss of a group
        r_is_s       the share of groups whose target is the trivial one, r = s
        distance     the root mean square of y_t - y_r

    It is a module so that DistributedDataParallel and autocast wrap the whole pass. Under autocast the student's pass is in
    half precision, and the target's and the teacher's with train.frozen_precision half; the loss is float32, times and coefficients
    float64.
    """

    def __init__(
        self, network: nn.Module, config: ImmConfig, latents: LatentSettings | None = None, teacher: TeacherPath | None = None
    ) -> None:
        """teacher: leads from x_t to x_r, in place of the image and noise of x_t."""
        super().__init__(network, config, latents)
        self.teacher = teacher

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        loss, flow, seed = self.config.loss, self.config.flow, self.config.train.seed
        full_precision = torch.autocast(batch.images.device.type, enabled=False)
        with full_precision:
            x, augment_label = self.inputs.images(batch)
            condition, target_condition = self._conditions(batch)
            noise = flow.sigma_data * normal(keys(seed, batch.index, NOISE), x.shape[1:])
            s, t = draw_times(loss, flow, keys(seed, batch.index[:: loss.group_size], TIME))  # one draw a group
            r = earlier_time(loss, flow, s, t)
            each_s, each_r, each_t = (time.repeat_interleave(loss.group_size) for time in (s, r, t))

        out_t = self._output(batch, x, noise, each_s, each_t, condition, augment_label)
        target_precision = contextlib.nullcontext() if self.config.train.frozen_precision == "half" else full_precision
        if self.teacher is not None:
            with target_precision:
                x_t = diffuse(flow.get_schedule(), x.double(), noise.double(), each_t)
                x, noise = (part.float() for part in self.teacher(x_t, each_t, each_r, condition))
        with target_precision, torch.no_grad():  # the target: the current weights without gradient, no EMA
            out_r = self._output(batch, x, noise, each_s, each_r, target_condition, augment_label)
        with full_precision:
            difference, y_r = jump_difference(flow, each_s, each_r, each_t, x, noise, out_t, out_r)
            each = imm_loss(loss, flow, s, r, t, difference, y_r)
            distance = difference.detach().double().square().mean((1, 2, 3)).reshape(-1, loss.group_size).mean(1).sqrt()
            numbers = {"loss_by_t": each.detach(), "r_is_s": (r == s).double(), "distance": distance}
            return each.mean(), {name: self.by_level(value, t) for name, value in numbers.items()}

    def _conditions(self, batch: Batch) -> tuple[Condition | None, Condition | None]:
        """For the student and for the target."""
        condition = self.inputs.condition(batch)
        undropped = condition is not None and self.config.loss.target_labels == "undropped"
        return condition, batch.condition if undropped else condition

    def _output(
        self,
        batch: Batch,
        x: Tensor,
        noise: Tensor,
        s: Tensor,
        t: Tensor,
        condition: Condition | None,
        augment_label: Tensor | None,
    ) -> Tensor:
        """The network's raw output for x diffused to time t, to jump to s; float32 like x."""
        flow = self.config.flow
        if self.has_dropout:  # the same seed before both passes: the same dropout masks, on CPU and on GPU
            torch.manual_seed(torch_seed(self.config.train.seed, batch.first))
        scaled = per_image(input_scale(flow, t), x) * diffuse(flow.get_schedule(), x, noise, t)
        time, second = network_times(flow, s, t)
        return self.network(scaled, time, second, condition, augment_label).float()


def _group_size(config: ImmConfig) -> int:
    """How many images stay together in a pass."""
    return 1 if config.loss.objective == "mean_flow" else config.loss.group_size


def _given(config: ImmConfig) -> ImmConfig:
    """The parametrization `given` is that of the denoiser that the training begins with. Raises ConfigError where it is none."""
    if config.flow.parametrization != "given":
        return config
    found = read_initial(config.train.init).config
    given = found.denoiser if found.flow is None else found.flow.given
    if given is None:
        raise ConfigError(f"--init {config.train.init} is a flow map already: leave out flow.parametrization=given")
    if given.noise_channels or given.noise_dropout or given.told_guidance or getattr(found.network, "learn_sigma", False):
        raise ConfigError(f"--init {config.train.init} has noise of its own, an input for guidance or a learned variance, which a flow map has not: give another teacher")
    return replace(config, flow=replace(config.flow, given=given))


def _notes(config: ImmConfig) -> list[str]:
    if config.loss.objective == "imm" and config.train.precision == "fp16" and (config.loss.min_gap < 1e-4 or config.flow.second_time != "t-s"):
        return ["the paper trains fp16 with loss.min_gap=1e-4, flow.second_time=t-s and loss.a=2 (appendix I.6)"]
    return []


def _work(config: ImmConfig) -> tuple[Work, int]:
    """Of MeanFlow too: its derivative takes about one more pass. A teacher is taken to be as large as the network."""
    passes = {"heun": 2, "ddim": 1}[config.teacher.solver] if config.teacher.name else 0
    return replace(WORK, forward=WORK.forward + passes, frozen=min(passes, 1)), _group_size(config)


TRAINING = Training(
    config=ImmConfig,
    resolve=resolve,
    model_config=imm_model_config,
    find=lambda config, device: find_teacher(find_text(_given(config)), device),
    dry_find=lambda config, device: find_teacher(find_sizes(_given(config)), device),
    task=lambda start: imm_task(start.config, start.model_config, null_of(start), teacher_path(start)),
    work=_work,
    check=check_teacher,
    notes=_notes,
)
