"""The training loop, for every method: batches, gradient accumulation, EMA, checkpoints, logs, previews, resuming.

Random numbers and data order are functions of the seed and the number of images seen, so that a run that was killed and
resumed computes what an uninterrupted one would have computed: on a CPU, bit for bit.
"""

from __future__ import annotations

import contextlib
import copy
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..config.sections import OptimizerSettings, RunSettings, TrainSettings
from ..data import Dataset
from ..data.latents import LatentDataset
from ..errors import MmgenError, TrainingError
from ..metrics.frechet import halves_distance
from ..models.build import AnyModel
from ..models.compilation import compile_network
from ..networks import checkpoint_blocks
from ..system.process import keep_large_blocks
from ..system.processes import process_group_of
from . import collapse, evaluation
from .auto_batch import describe, find_size
from .batches import Batch, BatchSplit, crossed, fetch, part_sizes, share_batch
from .checkpoint import Progress, file_names, list_checkpoints, load_checkpoint, newest_whole, remove_old, save_checkpoint
from .compute import set_precision
from .ema import EMA, ema_decays
from .scorer import make_scorer
from .gradients import measure_and_clip
from .model_files import BEST_FILE, ModelFiles, snapshots_every
from .accumulator import MetricAccumulator
from .optim import build_optimizer, learning_rate
from .prefetch import Prefetch
from .run_folder import RunFolder
from .run_log import RunLog
from .sharding import is_sharded, shard, synchronise_gradients
from .speed import Speed
from .stopping import StopRequest
from .task import Outcome, TrainedNetwork, Reporter, Task
from .threads import choice
from .updates import Updates, with_its_gradient

__all__ = ["Outcome", "TrainedNetwork", "Reporter", "Task", "Trainer"]


class Trainer:
    """One run: `Trainer(...).run()`. Every process of `accelerate launch` has one; the main one writes files."""

    def __init__(
        self,
        make_task: Callable[[Any], Task],
        dataset: Dataset | LatentDataset,
        folder: RunFolder,
        reporter: Reporter,
        accelerator: Any,
        *,
        train: TrainSettings,
        optimizer: OptimizerSettings,
        run: RunSettings,
        config: dict[str, Any],
        max_seconds: float = math.inf,
    ) -> None:
        """make_task(accelerator) makes the networks, whose initial weights it draws from torch's generator, seeded here.

        config: all settings, as the model file keeps them. Raises ConfigError for a batch that devices cannot share.
        """
        self.dataset, self.folder, self.reporter = dataset, folder, reporter
        self.accelerator, self.max_seconds = accelerator, max_seconds
        self.train, self.optimizer, self.run_settings, self.config = train, optimizer, run, config
        set_precision(train.precision)
        if accelerator.device.type == "cpu":
            keep_large_blocks()
        torch.manual_seed(train.seed)  # the initial weights
        self.task = make_task(accelerator)
        at_most = train.batch_size if run.batch_per_device == "auto" else run.batch_per_device
        self.split = share_batch(train.batch_size, self.task.group_size, accelerator.num_processes, at_most)
        self.sharded = is_sharded(accelerator)
        self.networks, self.optimizers, self.scalers, self._prepared = {}, {}, {}, {}
        for network in self.task.frozen:
            if run.compile:
                compile_network(network)
            if self.sharded:
                shard(network)
        for name, part in self.task.trained.items():
            self.networks[name] = part.network.to(accelerator.device)
            if run.gradient_checkpointing:
                checkpoint_blocks(part.network)
            if run.compile:
                compile_network(part.network)
            if self.sharded:
                shard(part.network)
            self.optimizers[name] = build_optimizer(optimizer, part.network.parameters())
            accelerator.scaler = self.scalers[name] = copy.deepcopy(accelerator.scaler)  # losses differ in size: a factor each
            both = part.objective, self.optimizers[name]
            self._prepared[name] = both if self.sharded else accelerator.prepare(*both)
        self.network = next(iter(self.networks.values()))
        self.ema = EMA(self.network, ema_decays(train))
        self.progress = Progress()
        self.history = RunLog(folder, reporter, accelerator)
        self.metrics = MetricAccumulator(accelerator, single=len(self.task.trained) == 1)
        self.updates = Updates(accelerator, reporter.note, self._remedy)
        self.process_group = process_group_of(accelerator)
        self.source = Prefetch(self._fetch, threaded=accelerator.device.type == "cuda")
        self.speed = Speed(self.task.model_config, self.task.work, accelerator.device, train.precision, accelerator.num_processes)
        about = {"config": config, "data": dataset.identity}
        self.files = ModelFiles(folder.path, self.task, self.ema, about, self.process_group, self.history)
        if run.batch_per_device == "auto":
            self.split = self._split_that_fits()
            run = replace(run, batch_per_device=self.split.size)
        self.scorer = make_scorer(run, dataset, accelerator.device, self.process_group, reporter.note, reporter.work)
        self.shows = self.process_group.is_main and evaluation.can_show(self.task.model_config, accelerator.device, reporter.note)

    def _split_that_fits(self) -> BatchSplit:
        train, processes, group_size = self.train, self.accelerator.num_processes, self.task.group_size
        found = find_size(
            part_sizes(train.batch_size, group_size, processes), parts=self.task.trained, optimizers=self.optimizers,
            batch_of=lambda size: fetch(self.dataset, 0, size, train.seed, self.accelerator.device),
            model_config=self.task.model_config, precision=train.precision,
            checkpointing=self.run_settings.gradient_checkpointing, sharded=self.sharded,
            device=self.accelerator.device, process_group=self.process_group, folder=self.folder.path,
        )  # fmt: skip
        self.reporter.note(describe(found))
        return share_batch(train.batch_size, group_size, processes, found.size)

    # ------------------------------------------------------------------ a run

    def run(self) -> Outcome:
        """Resumes where a checkpoint stands, trains, measures. Raises TrainingError where no loss is finite any more."""
        run = self.run_settings
        self._resume()
        first, total = self.progress.images, self.train.max_images
        self.reporter.start(self.progress.images, total)
        started, seconds_before, logged_at = time.monotonic(), self.progress.seconds, (time.monotonic(), first)
        threads = choice(run.threads, self.accelerator.num_processes) if self.accelerator.device.type == "cpu" else None
        with StopRequest() as stop:
            if 0 < self.progress.images < total:
                self._look(self.progress.images - self.train.batch_size, again=False)
            while self.progress.images < total:
                before, began = self.progress.images, time.monotonic()
                self._step()
                if threads is not None and (note := threads.step(time.monotonic() - began)) is not None:
                    self.reporter.note(note)
                self.progress.seconds = seconds_before + time.monotonic() - started
                images, done = self.progress.images, self.progress.images >= total
                step = images // self.train.batch_size
                if step % run.log_every == 0 or done:
                    now = time.monotonic()
                    rate = (images - logged_at[1]) / max(now - logged_at[0], 1e-9)  # a clock may be coarse
                    changes = {} if threads is None else threads.taken()
                    from_image = {str(first + k * self.train.batch_size): count for k, count in changes.items()}
                    speed = {"images_per_second": round(rate, 2), **self.speed.numbers(rate)}
                    self._log(self._flush() | speed | ({"threads": from_image} if changes else {}))
                    logged_at = (now, images)
                self.reporter.advance(images)
                if crossed(before, images, snapshots_every(self.train, run)) or done:
                    self.files.keep_snapshots(images, self.train.ema_lengths)
                ends = done or self._should_end(stop, time.monotonic() - started, step)
                if ends or crossed(before, images, run.checkpoint_every):
                    self._save()
                    self.process_group.wait()
                if ends:
                    break
                if self._look(before):
                    logged_at = (time.monotonic(), images)
            finished = self.progress.images >= total
            if stop.signal is not None:
                self.source.close()
                return Outcome(self.progress.images, signal=stop.signal)
        self.source.close()
        results = self._finish(anew=self.progress.images > first)
        self.process_group.wait()
        return Outcome(self.progress.images, finished=finished, results=results)

    def _look(self, before: int, again: bool = True) -> bool:
        """Measures and draws what is due after the step that began at `before` images; whether anything was.

        Not `again`: what the log and the previews have already is left. A run that was killed after it saved has not.
        """
        run, images = self.run_settings, self.progress.images
        due = crossed(before, images, run.eval_every), crossed(before, images, run.preview_every)
        if not any(due):
            return False
        there = False, False
        if not again:  # the main process has the log
            there = self.process_group.gather((bool(self.history.scores_at(self.progress.images)), self._preview_file().is_file()))[0]
        if due[0] and not there[0]:
            self._measure()
            self.process_group.wait()
        if due[1] and not there[1]:
            self._preview()
            self.process_group.wait()
        return True

    def _step(self) -> None:
        """One update of the weights of one part, over the whole global batch."""
        split, accelerator = self.split, self.accelerator
        first = self.progress.images
        name = self.task.turn(first // self.train.batch_size)
        part, (objective, optimizer) = self.task.trained[name], self._prepared[name]
        accelerator.scaler = self.scalers[name]
        for group in self.optimizers[name].param_groups:
            group["lr"] = learning_rate(self.optimizer, first, self.train.max_images)
        if part.prepare is not None:
            part.prepare(lambda: self._batches(first))
        total, found = 0.0, []
        for round_, batch in enumerate(self._batches(first)):
            # Gradients travel between devices in the last round only
            last = round_ == split.rounds - 1
            with self._gradients_travel(part, objective, last):
                with accelerator.autocast() if self.sharded else contextlib.nullcontext():  # else it is in the objective
                    loss, numbers = objective(batch)
                loss = loss / split.rounds
                accelerator.backward(with_its_gradient(loss))
            total = total + loss.detach()
            found.append(numbers)
        norm = measure_and_clip(part.network, optimizer, self.optimizer.grad_clip, accelerator)
        self.updates.make(name, self.optimizers[name], total, norm, first // self.train.batch_size + 1)
        optimizer.zero_grad()
        self.progress.images = first + self.train.batch_size
        self.ema.update(first)  # whatever part was updated, and whether it was: decays are per step
        for numbers in found:
            self.metrics.add(numbers, norm)
        self.metrics.add_step(name, total, norm)

    def _gradients_travel(self, part: TrainedNetwork, objective: nn.Module, wanted: bool) -> contextlib.AbstractContextManager:
        if self.sharded:
            synchronise_gradients(part.network, wanted)
        return contextlib.nullcontext() if wanted or self.sharded else self.accelerator.no_sync(objective)

    def _batches(self, first: int) -> Iterator[Batch]:
        """This process's share of the global batch that begins with image number `first`, a round at a time."""
        number = self.accelerator.process_index
        starts = [first + self.split.start(round_, number) for round_ in range(self.split.rounds)]
        return self.source.walk(starts, then=first + self.train.batch_size + self.split.start(0, number))

    def _fetch(self, start: int) -> Batch:
        return fetch(self.dataset, start, self.split.size, self.train.seed, self.accelerator.device)

    def _should_end(self, stop: StopRequest, seconds: float, step: int) -> bool:
        wanted = stop.signal is not None or seconds > self.max_seconds
        if self.accelerator.num_processes == 1:
            return wanted
        if step % self.run_settings.log_every:  # agreeing costs a synchronisation: not at every step
            return False
        flag = torch.tensor([float(wanted)], device=self.accelerator.device)
        return bool(self.accelerator.reduce(flag, reduction="sum").item())

    # ------------------------------------------------------------------ numbers

    def _remedy(self) -> str:
        return f"the same command with a lower optimizer.lr, optimizer.grad_clip=1 or train.precision=tf32 {self._goes_on()}"

    def _goes_on(self) -> str:
        good = list_checkpoints(self.folder.checkpoints)
        return f"goes on from {good[-1]}" if good else "begins anew, as there is no checkpoint yet"

    def _flush(self) -> dict[str, Any]:
        """Losses and numbers since the last call."""
        self.updates.read_all()
        if not (numbers := self.metrics.flush()):
            return {}
        before = self.progress.images - self.train.batch_size  # the step that was made last
        return numbers | {"learning_rate": learning_rate(self.optimizer, before, self.train.max_images)}

    def _log(self, numbers: dict[str, Any]) -> None:
        images = self.progress.images
        line = {"images": images, "step": images // self.train.batch_size, **numbers, "seconds": round(self.progress.seconds, 2)}
        self.history.add(line)

    def _measure(self) -> None:
        """The score for the configured numbers of steps, into the log; all processes share the work. The best is kept."""
        if self.scorer is None:
            return
        model, steps = self.files.averaged(self.accelerator.device), self.run_settings.eval_steps
        values = {str(count): value for count, value in self.scorer.measure(model, steps, self.train.seed).items()}
        deciding, name = str(steps[0]), self.scorer.name
        best = values[deciding] < min(self.history.values_of(name, deciding), default=math.inf)
        if self.process_group.gather(best)[0]:  # only the main process has the log
            self.files.save_best(self.progress.images, {name: values})
        # After the model: were it logged before and the run killed between, no later score would count as better
        lost = {"unwritten": BEST_FILE} if BEST_FILE in self.history.lost else {}
        self._log({"figure": name, "values": values, "num": self.run_settings.eval_num, **lost, **self._watched(self.scorer.variance)})

    def _watched(self, variance: dict[str, float]) -> dict[str, Any]:
        """What the log says of the samples' variance; a warning is shown, too."""
        found = collapse.report(self.history.lines, self.progress.images, variance, self.task.advice)
        if "warning" in found:
            self.reporter.note(found["warning"])
        return found

    # ------------------------------------------------------------------ files

    def _resume(self) -> None:
        folder, note = self.folder.checkpoints, self.reporter.note
        newest = newest_whole(folder, file_names(self.networks, self.ema), self.process_group, note)
        if newest is not None:
            self.progress = load_checkpoint(newest, self.networks, self.optimizers, self.ema, self.scalers)
            if self.progress.images >= self.train.max_images + self.train.batch_size:
                seen, wanted = f"{self.progress.images:,}", f"train.max_images={self.train.max_images:,}"
                raise TrainingError(f"{self.folder.path} has seen {seen} images, more than {wanted}: choose another --out")
            note(f"resuming from {newest}: {self.progress.images:,} images seen")
        self.history.rewind(self.progress.images)
        self.files.forget_snapshots(self.progress.images)
        if changed := self.folder.changed:
            note("changed since the run began: " + ", ".join(f"{key} = {now}, was {was}" for key, (was, now) in changed.items()))
            self._log({"changed": changed})
        self.process_group.wait()

    def _save(self) -> None:
        """The model files and a checkpoint. Raises MmgenError where they cannot be written, saying what there is to go on from."""
        numbers, main, folder = self._flush(), self.process_group.is_main, self.folder.checkpoints
        if numbers and main:
            self._log(numbers)
        try:
            # Before the checkpoint: were they after it and the run killed between, they would stay those of the one before
            self.files.save(self.progress.images)
            save_checkpoint(folder, self.networks, self.optimizers, self.ema, self.scalers, self.progress, self.process_group)
        except MmgenError as error:
            raise type(error)(f"{error} (stopped at {self.progress.images:,} images: it {self._goes_on()})") from error
        if main:
            remove_old(folder, self.run_settings.keep_checkpoints)
            self.history.keep(self.folder.path / "curves.png", evaluation.curves(self.history.lines, levels=self.task.levels))

    def _preview(self) -> None:
        if not (self.shows or self.sharded):
            return
        if variance := self._picture(self.files.averaged(self.accelerator.device), self._preview_file()):
            self._log(self._watched(variance))

    def _preview_file(self) -> Path:
        return self.folder.previews / f"{self.progress.images:012d}.png"

    def _picture(self, model: AnyModel, file: Path) -> dict[str, float]:
        """The method's picture of the model, or else a sample grid; by the main process. Returns the samples' variance."""
        if not self.shows:
            return {}
        variance: dict[str, float] = {}
        scores = evaluation.scores_of(self.history.scores_at(self.progress.images))
        if self.task.picture is not None:
            image = self.task.picture(model, self.train.seed, scores)
        else:
            image, variance = evaluation.picture(
                model, self.dataset, self.run_settings.eval_steps, self.train.seed, scores, self.reporter.work
            )
        if image is not None:
            self.history.keep(file, image)
        return variance

    def _finish(self, anew: bool) -> dict[str, Any] | None:
        """The picture and the table at the end: once for every number of images. `anew`: those that are there are outdated."""
        images, main = self.progress.images, self.accelerator.is_main_process
        results = self.folder.read_results(images) if main and not anew else None
        there = results is not None, bool(self.history.scores_at(images))
        done, measured = self.process_group.gather(there)[0]  # the main process decides: only it has the log
        if done:
            return results
        if not measured:
            self._measure()
        model = self.files.averaged(self.accelerator.device)
        more = None if self.task.finish is None else self.task.finish(model, self.folder.path, self.scorer)
        if not main:
            return None
        self._picture(model, self.folder.path / "samples.png")
        pixels = self.scorer is not None and isinstance(self.dataset, Dataset) and self.scorer.extractor.metric == "fd-pixels" and len(self.dataset) >= 4
        halves = halves_distance(self.dataset.images) if pixels else None
        self.history.keep(self.folder.path / "curves.png", evaluation.curves(self.history.lines, halves, self.task.levels))
        last = self.history.scores_at(images)
        results = {
            "images": images,
            "seconds": round(self.progress.seconds, 1),
            **{key: last.get(key) for key in ("figure", "values", "num")},
            "reference": len(self.dataset) if self.scorer is None else self.scorer.compared,
            "data": self.dataset.identity,
            "between_halves": halves,
            **(more or {}),
        }
        with self.history.going_on("results.json"):
            self.folder.write_results(results)
        return results
