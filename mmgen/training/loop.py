"""The training loop, for every method: batches, gradient accumulation, EMA, checkpoints, logs, previews, resuming.

Random numbers and data order are functions of the seed and the number of images seen, so that a run that was killed and
resumed computes what an uninterrupted one would have computed: on a CPU, bit for bit.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..config import ImmConfig
from ..data import Dataset
from ..data.latents import LatentDataset
from ..errors import ConfigError, TrainingError
from ..images import save_png
from ..metrics.frechet import halves_distance
from ..models import MODEL_FILE, Model, ModelConfig, save_model
from ..team import team_of
from . import evaluation
from .batches import fetch, split_batch
from .checkpoint import Progress, list_checkpoints, load_checkpoint, remove_old, save_checkpoint
from .ema import EMA, ema_decays
from .figures import make_scorer
from .optim import build_optimizer, learning_rate
from .run_folder import RunFolder
from .stopping import StopRequest

BEST_FILE = "model-best.safetensors"  # the averaged weights with the least figure so far, at the first of run.eval_steps


@dataclass
class Task:
    """What a method gives the loop."""

    network: nn.Module  # what is trained, averaged and saved
    objective: nn.Module  # objective(batch) -> scalar loss; holds the network
    model_config: ModelConfig  # what the saved model says of itself


class Reporter(Protocol):
    """What the loop tells whoever watches. The command line shows a bar or JSON lines."""

    def note(self, text: str) -> None: ...
    def start(self, images: int, total: int) -> None: ...
    def advance(self, images: int) -> None: ...
    def log(self, line: dict[str, Any]) -> None: ...


@dataclass
class Outcome:
    """How an invocation ended."""

    images: int
    signal: int | None = None  # the signal that ended it
    finished: bool = False  # all images of the recipe were seen
    results: dict[str, Any] | None = None  # the figures at the end


class Trainer:
    """One run: `Trainer(...).run()`. Every process of `accelerate launch` has one; the main one writes files."""

    def __init__(
        self,
        make_task: Callable[[], Task],
        config: ImmConfig,
        dataset: Dataset | LatentDataset,
        folder: RunFolder,
        reporter: Reporter,
        accelerator: Any,
        max_seconds: float = math.inf,
    ) -> None:
        self.config, self.dataset, self.folder, self.reporter = config, dataset, folder, reporter
        self.accelerator, self.max_seconds = accelerator, max_seconds
        train, run = config.train, config.run
        parts = split_batch(train.batch_size, config.loss.group_size, accelerator.num_processes, run.batch_per_device)
        if parts is None:
            raise ConfigError(
                f"train.batch_size {train.batch_size} cannot be shared by {accelerator.num_processes} devices in groups of "
                f"{config.loss.group_size}: choose a multiple of {accelerator.num_processes * config.loss.group_size}"
            )
        self.parts = parts
        set_precision(train.precision)
        torch.manual_seed(train.seed)  # the initial weights
        self.task = make_task()
        self.network = self.task.network.to(accelerator.device)
        if run.compile:
            compile_network(self.network)
        self.optimizer = build_optimizer(config.optimizer, self.network.parameters())
        self.ema = EMA(self.network, ema_decays(train))
        self.ema_name = next(iter(self.ema.decays))
        self.objective, self.wrapped_optimizer = accelerator.prepare(self.task.objective, self.optimizer)
        self.progress = Progress()
        self.log_lines: list[dict[str, Any]] = []
        self._losses: list[Tensor] = []  # of the steps since the last log line, on the device
        self.team = team_of(accelerator)
        self.scorer = make_scorer(run, dataset, accelerator.device, self.team, reporter.note)
        self.shows = self.team.is_main and evaluation.can_show(self.task.model_config, accelerator.device, reporter.note)

    # ------------------------------------------------------------------ a run

    def run(self) -> Outcome:
        """Resumes where a checkpoint stands, trains, measures. Raises TrainingError for a loss that is not finite."""
        config, run = self.config, self.config.run
        self._resume()
        total = config.train.max_images
        self.reporter.start(self.progress.images, total)
        started, seconds_before, logged_at = (
            time.monotonic(),
            self.progress.seconds,
            (time.monotonic(), self.progress.images),
        )
        with StopRequest() as stop:
            while self.progress.images < total:
                before = self.progress.images
                self._step()
                self.progress.seconds = seconds_before + time.monotonic() - started
                images, done = self.progress.images, self.progress.images >= total
                step = images // config.train.batch_size
                if step % run.log_every == 0 or done:
                    now = time.monotonic()
                    rate = (images - logged_at[1]) / (now - logged_at[0])
                    self._log(self._flush_losses() | {"images_per_second": round(rate, 2)})
                    logged_at = (now, images)
                self.reporter.advance(images)
                ends = done or self._should_end(stop, time.monotonic() - started, step)
                if ends or crossed(before, images, run.checkpoint_every):
                    self._save()
                    self.accelerator.wait_for_everyone()
                if ends:
                    break
                if crossed(before, images, run.eval_every):
                    self._measure()
                    self.accelerator.wait_for_everyone()
                    logged_at = (time.monotonic(), images)
                if crossed(before, images, run.preview_every):
                    self._preview()
                    self.accelerator.wait_for_everyone()
                    logged_at = (time.monotonic(), images)
            finished = self.progress.images >= total
            if stop.signal is not None:
                return Outcome(self.progress.images, signal=stop.signal)
        results = self._finish()
        self.accelerator.wait_for_everyone()
        return Outcome(self.progress.images, finished=finished, results=results)

    def _step(self) -> None:
        """One update of the weights, over the whole global batch."""
        train, parts, accelerator = self.config.train, self.parts, self.accelerator
        first = self.progress.images
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.config.optimizer, first)
        total = 0.0
        for round_ in range(parts.rounds):
            start = first + parts.start(round_, accelerator.process_index)
            batch = fetch(self.dataset, start, parts.size, train.seed, accelerator.device)
            # Gradients travel between devices in the last round only
            last = round_ == parts.rounds - 1
            with contextlib.nullcontext() if last else accelerator.no_sync(self.objective):
                loss = self.objective(batch) / parts.rounds
                accelerator.backward(loss)
            total = total + loss.detach()
        if self.config.optimizer.grad_clip > 0:
            accelerator.clip_grad_norm_(self.network.parameters(), self.config.optimizer.grad_clip)
        self.wrapped_optimizer.step()
        self.wrapped_optimizer.zero_grad()
        self.ema.update()
        self._losses.append(total)
        self.progress.images = first + train.batch_size

    def _should_end(self, stop: StopRequest, seconds: float, step: int) -> bool:
        wanted = stop.signal is not None or seconds > self.max_seconds
        if self.accelerator.num_processes == 1:
            return wanted
        if step % self.config.run.log_every:  # agreeing costs a synchronisation: not at every step
            return False
        flag = torch.tensor([float(wanted)], device=self.accelerator.device)
        return bool(self.accelerator.reduce(flag, reduction="sum").item())

    # ------------------------------------------------------------------ numbers

    def _flush_losses(self) -> dict[str, Any]:
        """The mean loss since the last call; asks the device, once. Raises TrainingError where one is not finite."""
        if not self._losses:
            return {}
        losses = torch.stack(self._losses)
        if self.accelerator.num_processes > 1:
            losses = self.accelerator.reduce(losses, reduction="mean")
        values = losses.tolist()
        self._losses.clear()
        step = self.progress.images // self.config.train.batch_size
        for offset, value in enumerate(values):
            if not math.isfinite(value):
                good = list_checkpoints(self.folder.checkpoints)
                last = f"the last good checkpoint is {good[-1]}" if good else "there is no checkpoint before it"
                raise TrainingError(
                    f"the loss is {value} at step {step - len(values) + offset + 1} of {self.folder.path}; {last}. "
                    "Try a lower optimizer.lr, optimizer.grad_clip=1, or train.precision=tf32, in another --out"
                )
        return {"loss": sum(values) / len(values), "learning_rate": self.optimizer.param_groups[0]["lr"]}

    def _log(self, numbers: dict[str, Any]) -> None:
        line = {"images": self.progress.images, "step": self.progress.images // self.config.train.batch_size, **numbers}
        line["seconds"] = round(self.progress.seconds, 2)
        self.log_lines.append(line)
        if self.accelerator.is_main_process:
            self.folder.log(line)
            self.reporter.log(line)
        scalars = {k: v for k, v in numbers.items() if isinstance(v, int | float)}
        scalars |= {f"{numbers['figure']}/{count}": value for count, value in numbers.get("values", {}).items()}
        self.accelerator.log(scalars, step=self.progress.images)

    def _measure(self) -> None:
        """The figure for the configured numbers of steps, into the log; all processes share the work. The best is kept."""
        if self.scorer is None:
            return
        model, steps = self._averaged_model(), self.config.run.eval_steps
        values = {str(count): value for count, value in self.scorer.measure(model, steps, self.config.train.seed).items()}
        deciding, name = str(steps[0]), self.scorer.name
        before = [line["values"][deciding] for line in self._measured() if deciding in line["values"]]
        if self.accelerator.is_main_process and values[deciding] < min(before, default=math.inf):
            config = self._model_config(self.ema_name, figures={name: values})
            save_model(self.folder.path / BEST_FILE, config, self.ema.state_dict(self.ema_name))
        # After the model: were it logged before and the run killed between, no later figure would count as better
        self._log({"figure": name, "values": values, "num": self.config.run.eval_num})

    def _measured(self) -> list[dict[str, Any]]:
        """The lines of the log that hold this figure."""
        return [line for line in self.log_lines if line.get("figure") == self.scorer.name]

    # ------------------------------------------------------------------ files

    def _resume(self) -> None:
        found = list_checkpoints(self.folder.checkpoints)
        if found:
            self.progress = load_checkpoint(found[-1], self.network, self.ema, self.optimizer, self.accelerator.scaler)
            self.reporter.note(f"resuming from {found[-1]}: {self.progress.images:,} images seen")
        if self.accelerator.is_main_process:
            self.log_lines = self.folder.rewind_log(self.progress.images)
        self.accelerator.wait_for_everyone()

    def _save(self) -> None:
        """A checkpoint and the model files. Losses are looked at first: nothing that is not finite is saved as good."""
        numbers = self._flush_losses()
        if self.accelerator.is_main_process:
            if numbers:
                self._log(numbers)
            folder = self.folder.checkpoints
            save_checkpoint(folder, self.network, self.ema, self.optimizer, self.accelerator.scaler, self.progress)
            remove_old(folder, self.config.run.keep_checkpoints)
            for name in self.ema.decays:
                file = MODEL_FILE if name == self.ema_name else f"model-ema-{name}.safetensors"
                save_model(self.folder.path / file, self._model_config(name), self.ema.state_dict(name))
            save_png(self.folder.path / "curves.png", evaluation.curves(self.log_lines))

    def _preview(self) -> None:
        if self.shows:
            image = evaluation.picture(self._averaged_model(), self.dataset, self.config.run.eval_steps, self.config.train.seed)
            save_png(self.folder.previews / f"{self.progress.images:012d}.png", image)

    def _finish(self) -> dict[str, Any] | None:
        """The picture and the table at the end. They are made once for every number of images trained on."""
        images, main = self.progress.images, self.accelerator.is_main_process
        results = self.folder.read_results() if main else None
        done = results is not None and results["images"] == images
        measured = bool(self.log_lines) and "values" in self.log_lines[-1]
        if self.team.gather((done, measured))[0] == (False, False):  # the main process decides: only it has the log
            self._measure()
        if done or not main:
            return results
        run, model = self.config.run, self._averaged_model()
        if self.shows:
            image = evaluation.picture(model, self.dataset, run.eval_steps, self.config.train.seed)
            save_png(self.folder.path / "samples.png", image)
        halves = None
        if self.scorer is not None and self.scorer.extractor.metric == "fd-pixels" and len(self.dataset) >= 4:
            halves = halves_distance(self.dataset.images)
        save_png(self.folder.path / "curves.png", evaluation.curves(self.log_lines, halves))
        last = self.log_lines[-1] if self.log_lines and "values" in self.log_lines[-1] else {}
        results = {
            "images": images,
            "seconds": round(self.progress.seconds, 1),
            "figure": last.get("figure"),
            "values": last.get("values"),
            "num": last.get("num"),
            "reference": len(self.dataset),
            "between_halves": halves,
        }
        self.folder.write_results(results)
        return results

    def _model_config(self, name: str, **more: Any) -> ModelConfig:
        training = {"config": self.config.to_dict(), "images": self.progress.images, "ema": name, **more}
        return replace(self.task.model_config, training=training)

    def _averaged_model(self) -> Model:
        """The model with the (first) averaged weights, in evaluation mode."""
        model = Model(self.task.model_config).to(self.accelerator.device)
        model.network.load_state_dict(self.ema.state_dict(self.ema_name))
        return model.eval().requires_grad_(False)


def crossed(before: int, after: int, every: int) -> bool:
    """Whether a multiple of `every` lies in (before, after]."""
    return before // every != after // every


def set_precision(precision: str) -> None:
    """Whether float32 matrix products and convolutions on a GPU may use TF32. Half-precision sums are never reduced."""
    tf32 = precision != "fp32"
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = tf32
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False


def compile_network(network: nn.Module) -> None:
    """torch.compile in place: the state dict keeps its names.

    Compiled random numbers are drawn as in eager mode: the pass with gradient and the target's are compiled apart, and their
    dropout masks must be the same.
    """
    import torch._inductor.config as inductor

    inductor.fallback_random = True
    network.compile(dynamic=False)
