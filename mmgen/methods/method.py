"""What a training method is: one record, from which its command, its Python function and its runs are made.

A record loads neither torch nor the method's code, so that help appears at once; `Method.training()` does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..config.sections import DataSettings
    from ..data import Dataset, DataShape
    from ..data.latents import LatentDataset
    from ..models.config import ModelConfig
    from ..training.cost import Adapters, Work
    from ..training.task import Reporter, Task

# The options that all training commands share and that are a setting each
SHARED_SETTINGS = {
    "data": "data.name", "resolution": "data.resolution", "channels": "data.channels", "split": "data.split",
    "on_corrupt": "data.on_corrupt", "conditional": "data.conditional", "image_column": "data.image_column",
    "label_column": "data.label_column", "text": "data.text", "caption_column": "data.caption_column",
    "captions": "data.captions", "subset": "data.subset", "revision": "data.revision",
    "follow_links": "data.follow_links", "batch_size": "train.batch_size", "batch_per_device": "run.batch_per_device",
    "init": "train.init", "lr": "optimizer.lr", "max_images": "train.max_images", "seed": "train.seed", "precision": "train.precision",
    "compile": "run.compile", "checkpoint_every": "run.checkpoint_every", "preview_every": "run.preview_every",
    "eval_every": "run.eval_every", "eval_num": "run.eval_num",
}  # fmt: skip



@dataclass(frozen=True)
class Option:
    """An option of a method's command, beside those that all methods share, and the setting that it is."""

    name: str  # of the argument in Python; on the command line --name. One that all share is replaced by it
    setting: str  # dotted, such as student.steps
    kind: type  # str, int or float
    help: str
    metavar: str = "NAME"
    choices: tuple[str, ...] = ()  # the valid words, where the command is to know them before torch is loaded
    is_path: bool = False
    group: str = ""  # heading in the help; empty: `Method.heading`


@dataclass(frozen=True)
class Method:
    name: str  # of the command, and of the presets' `command`
    help: str  # of the command; its first sentence is shown in the list of commands
    training: Callable[[], Training]  # loads the rest
    next_commands: tuple[str, ...]  # what to type when training is done; {folder} is the run's
    options: tuple[Option, ...] = ()
    heading: str = ""  # above these options
    without: tuple[str, ...] = ()  # names of shared options that the method has no use for


@dataclass(frozen=True)
class Training:
    """How a method trains. `source` is what `find` found: a student's teacher; None for methods that start from nothing."""

    config: type  # a data class of sections, with data, optimizer, train and run, and to_dict()
    resolve: Callable[..., Any]  # resolve(*tables) -> a checked config
    model_config: Callable[[Any, DataShape, Any], ModelConfig]  # of (config, shape of the data, source)
    task: Callable[[Start], Task]  # networks with fresh weights, and objectives
    work: Callable[[Any], tuple[Work, int]]  # config -> what a step costs, and how many images stay together in a pass
    # config -> what can be trained, by name, the chosen first: all weights (None) or adapters
    trains: Callable[[Any], Sequence[tuple[str, Adapters | None]]] = lambda config: [("all weights", None)]
    find: Callable[[Any, Any], tuple[Any, Any]] = lambda config, device: (None, config)  # the source, and the config settled by it
    dry_find: Callable[[Any, Any], tuple[Any, Any]] | None = None  # `find` for a dry run, where it needs less; None: the same
    data: Callable[[Any], DataSettings] = lambda config: config.data  # how the data are loaded
    check: Callable[[Start], None] = lambda start: None  # whether data and source go together; raises ConfigError
    notes: Callable[[Any], Sequence[str]] = lambda config: ()  # what to know of a config; raises ConfigError for an unfinished one
    data_name: Callable[[dict[str, Any]], tuple[str, int | None]] | None = None  # see `choosing.choose`
    watch: Callable[[Any], str] = lambda config: "loss"  # config -> the logged number that a progress bar shows


@dataclass(frozen=True)
class Start:
    """What a method's networks are made from."""

    asked: Any  # the config as given
    config: Any  # settled
    source: Any
    dataset: Dataset | LatentDataset
    model_config: ModelConfig | None  # None while `check` looks at it
    reporter: Reporter
    accelerator: Any
