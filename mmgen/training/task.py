"""What a method gives the training loop, and what the loop tells whoever watches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor, nn

from ..models.build import AnyModel
from ..models.config import ModelConfig
from ..models.files import save_model
from .batches import Batch
from .cost import Work as StepCost


@dataclass
class TrainedNetwork:
    """A network that is trained, with its objective. The loop gives it an optimiser of its own.

    Attributes:
        network: what is trained; it holds only its own parameters.
        objective: objective(batch) -> (loss, numbers): a scalar tensor, the mean over the batch, and for the log
            name -> float [2, K], sums and counts of K means (K = 1: one number; more: one per noise level), without
            gradient. A module whose parameters are those of the network and no others: DistributedDataParallel wraps it.
        prepare: called before the passes of a step with a function whose every call walks anew over all batches of the step
            on this process. What it computes from them it reduces over the processes itself.
        rehearse: of a part that prepares, its work on one batch without the other processes: it tells what fits into memory.
    """

    network: nn.Module
    objective: nn.Module
    prepare: Callable[[Callable[[], Iterator[Batch]]], None] | None = None
    rehearse: Callable[[Batch], None] | None = None


def always_first(step: int) -> str:
    """The turn of a method with one part."""
    return "model"


@dataclass
class Task:
    """What a method gives the loop.

    Attributes:
        trained: by name; the first is averaged (EMA) and saved as the model. A method of one part calls it "model".
        turn: the name of the part that step number 0, 1, ... updates.
        model_config: what the saved model says of itself; the entries of its `training` are kept beside the loop's.
        frozen: networks that are evaluated and not trained; where networks are sharded, these are too.
        group_size: images that must stay together in one pass: the parts of a batch are multiples of it.
        picture: picture(model, seed, scores) takes the place of the sample grid, in previews and at the end; called by the main
            process. `scores`: number of steps -> its score as a text. None: no picture, now.
        finish: finish(model, folder, scorer) at the end of a run, in all processes: more entries for results.json, of which
            those of the main process count. `scorer` is a `scorer.Scorer`, or None where
            nothing is measured.
        levels: the edges of the noise levels that numbers are logged for, in sigma, ascending.
        work: what a step costs in passes of the network, for the log; None: unknown.
        save: save(file, model_config, state) writes a model file; state: of the first part's network.
        averaged: averaged(state) is a model with such a state, on the device of the training, for samples; None: one is built.
        advice: what to try where training collapses, besides what helps every method; ends with a comma and a blank.
    """

    trained: dict[str, TrainedNetwork]
    model_config: ModelConfig
    turn: Callable[[int], str] = always_first
    frozen: Sequence[nn.Module] = ()
    group_size: int = 1
    picture: Callable[[AnyModel, int, dict[str, str]], Image.Image | None] | None = None
    finish: Callable[[AnyModel, Path, Any], dict[str, Any] | None] | None = None
    levels: Sequence[float] = ()
    work: StepCost | None = None
    save: Callable[[Path, ModelConfig, dict[str, Tensor]], None] = save_model
    averaged: Callable[[dict[str, Tensor]], AnyModel] | None = None
    advice: str = ""


class Reporter:
    """What the loop tells whoever watches. This one shows nothing; that of the command line shows bars or JSON lines."""

    def note(self, text: str) -> None: ...
    def start(self, images: int, total: int) -> None: ...
    def advance(self, images: int) -> None: ...
    def log(self, line: dict[str, Any]) -> None: ...

    def work(self, what: str, total: int, unit: str = "images") -> AbstractContextManager[Callable[..., None]]:
        """Entered for long work beside training, such as a score; yields update(done, of=None)."""
        return nullcontext(lambda *told: None)


Work = Callable[..., AbstractContextManager[Callable[..., None]]]  # `Reporter.work`


@dataclass
class Outcome:
    """How an invocation ended."""

    images: int
    signal: int | None = None  # the signal that ended it
    finished: bool = False  # all images of the recipe were seen
    results: dict[str, Any] | None = None  # the scores at the end
