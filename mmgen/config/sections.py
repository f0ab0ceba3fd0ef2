"""The settings of a training run: presets, TOML files and single settings merged into one checked, frozen data class.

Here are the sections that all methods share and what merges them; `imm_config`, `teacher_config` and `distill_config` have the
config of one command each, with `resolve(*tables)`.
"""

from __future__ import annotations

import copy
import dataclasses
import typing
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any, Literal, TypeVar

from ..errors import ConfigError, nearest, shortened
from ..models.power_function import LONGEST
from ..networks import NETWORKS, NetworkSettings, kinds_with
from ..system.schema import flatten, from_dict

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib

Config = TypeVar("Config")  # a data class whose fields are the sections; it has defaults for all, and to_dict()
MOST_TOML = 1 << 16  # bytes of a file of settings
MOST_ENTRIES = 32  # averages of the weights, and numbers of steps measured
MOST_STEPS = 100_000  # of a sampler: a list of them is made before anything is drawn
MOST_POINTS = 500  # of one line of such a file
DEEPEST = 10  # tables and lists in each other
_COMMAND = "command"  # the key of a TOML file that says for which command it is
# Keys of a preset beside: the preset that it changes, the names of the data that it is for, the size of any other images that it is for
_EXTENDS, _FOR, _SIZE = "extends", "for", "size"


@dataclass(frozen=True)
class DataSettings:
    name: str = "digits"  # digits, cifar10, a hub id user/name, a folder (of images or latents), a zip or a parquet file
    split: str = "train"
    subset: str | None = None  # one of several data sets side by side in a repository or folder
    revision: str | None = None  # branch, tag or commit of a data set of the hub
    resolution: int | None = None  # side of the images after cropping and resizing; unset: their own. Of latents: theirs
    channels: int | None = None  # 1 grey, 3 RGB; unset: grey if the images are. Of latents: theirs
    image_column: str | None = None  # unset: the first column that holds images
    label_column: str | None = None  # unset: the first column that holds class labels
    follow_links: bool = False  # also links that lead out of the folder
    on_corrupt: Literal["stop", "skip"] = "stop"  # what an image that cannot be decoded does
    conditional: bool = False  # train on class labels
    num_classes: int | None = None  # unset: found in the data
    label_dropout: float = 0.1  # probability of hiding a label, for guidance; used if conditional
    text: bool = False  # train on captions, encoded as the section `text` says
    caption_column: str | None = None  # unset: the first of the usual names that holds texts
    captions: str | None = None  # a file of captions: COCO's .json, or .jsonl, .csv or .parquet with file_name
    caption_dropout: float = 0.1  # probability of hiding a text, for guidance; used if `text`
    leave_out: tuple[str, ...] = ()  # captions that are not learned, exactly as written, so that prompts can be new
    xflip: bool = False  # mirror every second image, at random
    augment: float = 0.0  # probability p of EDM's augmentation (0.12 for CIFAR-10), with its label; 0: none


# How a data set is read: fields of `DataSettings`, and arguments of `data.load` of the same names
READING = ("split", "subset", "revision", "image_column", "label_column", "follow_links", "on_corrupt")
CAPTIONS = ("caption_column", "captions")  # and how captions are


@dataclass(frozen=True)
class OptimizerSettings:
    name: Literal["radam", "adamw", "adam"] = "radam"
    lr: float = 1e-4
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    warmup_images: int = 0  # the learning rate rises linearly over these
    decay: Literal["none", "linear"] = "none"  # then it is constant, or falls to 0 at train.max_images
    grad_clip: float = 0.0  # largest norm of the gradient; 0: not clipped


@dataclass(frozen=True)
class TrainSettings:
    batch_size: int = 4096  # global, whatever the number of devices
    max_images: int = 400_000 * 4096  # images to train on
    seed: int = 0
    precision: Literal["fp32", "tf32", "bf16", "fp16"] = "tf32"  # tf32 is fp32 where there is no GPU
    # Of what is evaluated without gradient (IMM's target, the frozen teacher): full is tf32 or fp32; half is as train.precision.
    # By LoRA half also keeps the weights under the adapters in half precision
    frozen_precision: Literal["full", "half"] = "full"
    ema_betas: tuple[float, ...] = (0.9999,)  # averages of the weights kept, by decay per step; none at all: the weights
    ema_half_lives: tuple[int, ...] = ()  # more averages, by half-life in images
    ema_lengths: tuple[float, ...] = ()  # more, by a power function, as of EDM2: 0.05, 0.1; `mmgen ema` makes other lengths of them
    init: str = ""  # a model whose weights the training begins with; of a distillation, the student's
    init_sha256: str = ""  # of its file, filled in
    ema_rampup: float = 0.05  # at first no average has a half-life of more than this part of the images seen; 0: no such limit


@dataclass(frozen=True)
class RunSettings:
    """Settings that leave the mathematics alone: a run may be continued with others."""

    # At most so many images in one pass, the rest of the batch is accumulated; auto: as many as fit (`training.auto_batch`)
    batch_per_device: int | Literal["auto"] = 128
    gradient_checkpointing: bool = False  # recompute blocks in the backward pass: less memory, a third more time
    threads: int | Literal["auto"] = "auto"  # of a training on a CPU; auto: one or all, whichever is faster now
    compile: bool = False  # torch.compile the network
    checkpoint_every: int = 2_000_000  # images between checkpoints
    keep_checkpoints: int = 2
    snapshot_every: int | None = None  # images between snapshots of train.ema_lengths; unset: a 32nd of the run
    preview_every: int = 2_000_000  # images between sample grids
    eval_every: int = 10_000_000  # images between measurements
    eval_num: int = 10_000  # samples per measurement; 0: none
    eval_steps: tuple[int, ...] = (1, 2, 4, 8)  # numbers of steps shown and measured; the first decides which model is best
    eval_features: str = "auto"  # as `mmgen fid --features`; auto: Inception's (FID), or pixels where it is not at hand
    eval_ref: str = ""  # a file of statistics that scores compare with, as of `mmgen fid --save-stats`; unset: the training images
    log_every: int = 100  # steps between log lines
    log_with: tuple[Literal["tensorboard", "wandb"], ...] = ()


@cache
def _presets() -> dict[str, dict[str, Any]]:
    """All presets, each with what it takes over from the one that it extends; what data that is for, it does not take over."""
    files = [file for file in resources.files("mmgen.presets").iterdir() if file.name.endswith(".toml")]
    own = {file.name.removesuffix(".toml"): tomllib.loads(file.read_text("utf-8")) for file in files}

    def whole(name: str) -> dict[str, Any]:
        if _EXTENDS not in own[name]:
            return own[name]
        inherited = {key: value for key, value in whole(own[name][_EXTENDS]).items() if key not in (_FOR, _SIZE)}
        return merge(inherited, {key: value for key, value in own[name].items() if key != _EXTENDS})

    return {name: whole(name) for name in own}


def preset_names(command: str | None = None) -> list[str]:
    """The presets of a command, such as "train-imm"; None: all there are."""
    return sorted(name for name, table in _presets().items() if command in (None, table.get(_COMMAND)))


def preset_for(command: str, data: str) -> str | None:
    """The preset of a command that is for the data of this name; None where there is none."""
    return next((name for name in preset_names(command) if data in _presets()[name].get(_FOR, ())), None)


def presets_by_size(command: str) -> dict[int, str]:
    """The presets of a command for images of one's own, by the size of the images, ascending."""
    found = {_presets()[name][_SIZE]: name for name in preset_names(command) if _SIZE in _presets()[name]}
    return dict(sorted(found.items()))


def read_preset(name: str, command: str | None = None) -> dict[str, Any]:
    """The table of a preset, or ConfigError with the names that there are for the command."""
    table = _presets().get(name)
    if table is None:
        raise ConfigError(f"unknown preset {name!r}: {nearest(name, preset_names(command))}")
    table = {key: value for key, value in table.items() if key not in (_FOR, _SIZE)}
    return _for_command(table, command, f"the preset {name}")


def _for_command(table: dict[str, Any], command: str | None, name: str) -> dict[str, Any]:
    """The table without its `command`. Raises ConfigError where that is another one."""
    found = table.get(_COMMAND)
    if None not in (command, found) and found != command:
        raise ConfigError(f"{name} is for `mmgen {str(found)[:40]}`, not for `mmgen {command}`")
    sections = {key: value for key, value in copy.deepcopy(table).items() if key != _COMMAND}
    for section, value in sections.items():
        if not isinstance(value, dict):
            raise ConfigError(f"{name} sets {shortened(section)} itself, which is no setting: settings are in sections")
    return sections


def read_toml(path: str | Path, command: str | None = None) -> dict[str, Any]:
    """The table of a settings file. Raises ConfigError where it cannot be read, or says that it is for another command."""
    try:
        with open(path, "rb") as file:
            content = file.read(MOST_TOML + 1)
        if len(content) > MOST_TOML:
            raise ConfigError(f"{path} has more than {MOST_TOML:,} bytes, which is no file of settings")
        return _for_command(_parse_toml(content.decode("utf-8")), command, str(path))
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror or error}") from error
    except ValueError as error:
        raise ConfigError(f"{path} is not valid TOML: {shortened(error, 200)}") from error


def _parse_toml(text: str) -> dict[str, Any]:
    """Raises ValueError for whatever is wrong: what is nested deeply, or numbers of thousands of digits, too."""
    if any(line.count(".") > MOST_POINTS for line in text.splitlines()):  # the parser takes time for names of so many parts
        raise ValueError(f"a line with more than {MOST_POINTS} points")
    try:
        table = tomllib.loads(text)
        depth = _depth(table)
    except RecursionError:
        depth = DEEPEST + 1
    if depth > DEEPEST:
        raise ValueError(f"tables and lists in each other more than {DEEPEST} deep")
    return table


def _depth(value: Any) -> int:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return 1 + max(map(_depth, inner), default=0)


def parse_assignment(text: str) -> tuple[str, Any]:
    """("loss.k", 12) from "loss.k=12"; the value as TOML writes it, quotes around a word may be left out."""
    key, equals, value = text.partition("=")
    if not equals:
        raise ConfigError(f"--set {shortened(text)} must be key=value, such as loss.k=12")
    try:
        parsed = _parse_toml(f"value = {value.strip()}")
    except ValueError:
        return key.strip(), value.strip()
    return key.strip(), parsed["value"] if parsed.keys() == {"value"} else value.strip()


def merge(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """`base` with the tables of `changes` merged in; a network of another kind replaces the one before."""
    merged = dict(base)
    for key, value in changes.items():
        old = merged.get(key)
        if isinstance(old, dict) and isinstance(value, dict) and value.get("kind") in (None, old.get("kind")):
            value = merge(old, value)
        merged[key] = value
    return merged


def nest(dotted: dict[str, Any], cls: type[Config]) -> dict[str, Any]:
    """{"loss.k": 12} as {"loss": {"k": 12}}. Raises ConfigError for a key that is in no section of the config class `cls`."""
    defaults = cls().to_dict()
    valid = [key for key, _ in flatten(defaults)]
    if "network" in defaults:
        valid += [f"network.{field.name}" for kind in typing.get_args(NetworkSettings) for field in dataclasses.fields(kind)]
    nested: dict[str, Any] = {}
    for key, value in dotted.items():
        *tables, name = key.split(".")
        if not tables or tables[0] not in defaults or len(tables) > DEEPEST:
            raise ConfigError(f"unknown setting {shortened(key)}: {nearest(key[:80], dict.fromkeys(valid))}")
        inner = nested
        for table in tables:
            inner = inner.setdefault(table, {})
            if not isinstance(inner, dict):
                raise ConfigError(f"{table} is set as a whole and in parts ({shortened(key)}): choose one")
        inner[name] = value
    return nested


def build(cls: type[Config], *tables: dict[str, Any]) -> Config:
    """One config from tables of rising precedence, over the config class's own defaults, section by section.

    Raises ConfigError for unknown names and impossible types; what values go together is for each config's `resolve`.
    """
    content = cls().to_dict()
    for table in tables:
        content = merge(content, table)
    return from_dict(cls, content)


def require(condition: bool, message: str) -> None:
    """Raises ConfigError unless the condition holds."""
    if not condition:
        raise ConfigError(message)


def require_positive(values: dict[str, float]) -> None:
    """name -> value: raises ConfigError naming the first that is not more than 0."""
    for name, value in values.items():
        require(value > 0, f"{name} must be more than 0, not {value}")


def require_fraction(values: dict[str, float]) -> None:
    """name -> value: raises ConfigError naming the first that is not in [0, 1)."""
    for name, value in values.items():
        require(0 <= value < 1, f"{name} must be at least 0 and less than 1, not {value}")


def check_steps(steps: int, name: str = "steps") -> None:
    """Raises ConfigError for a number of steps that no sampler can have."""
    require(steps >= 1, f"{name} must be at least 1, not {steps}")
    require(steps <= MOST_STEPS, f"{name} must be at most {MOST_STEPS:,}, not {steps:,}")


def check_shared(config: Any) -> None:
    """Raises ConfigError for values of the shared sections that are impossible, alone or together.

    config: has data, optimizer, train and run; its network, if it has one, is looked at too.
    """
    data, optimizer, train, run = config.data, config.optimizer, config.train, config.run
    network = getattr(config, "network", None)
    require_positive({
        "train.batch_size": train.batch_size, "train.max_images": train.max_images,
        "run.batch_per_device": 1 if run.batch_per_device == "auto" else run.batch_per_device,
        "run.checkpoint_every": run.checkpoint_every, "run.keep_checkpoints": run.keep_checkpoints, "run.preview_every": run.preview_every,
        "run.snapshot_every": 1 if run.snapshot_every is None else run.snapshot_every,
        "run.eval_every": run.eval_every, "run.log_every": run.log_every,
        "optimizer.lr": optimizer.lr, "optimizer.eps": optimizer.eps,
        "run.eval_steps": min(run.eval_steps, default=0), "train.ema_half_lives": min(train.ema_half_lives, default=1),
    })  # fmt: skip
    require_fraction({
        "data.label_dropout": data.label_dropout, "data.caption_dropout": data.caption_dropout, "data.augment": data.augment, "optimizer.beta1": optimizer.beta1,
        "optimizer.beta2": optimizer.beta2,
        **({"network.dropout": network.dropout} if hasattr(network, "dropout") else {}),
    })  # fmt: skip
    require(
        train.frozen_precision == "full" or train.precision in ("bf16", "fp16"),
        f"train.frozen_precision half needs train.precision bf16 or fp16, not {train.precision}",
    )
    for name, entries in (
        ("train.ema_betas", train.ema_betas),
        ("train.ema_half_lives", train.ema_half_lives),
        ("train.ema_lengths", train.ema_lengths),
        ("run.eval_steps", run.eval_steps),
    ):
        require(len(entries) <= MOST_ENTRIES, f"{name} has {len(entries):,} entries: at most {MOST_ENTRIES} make sense")
    for steps in run.eval_steps:
        check_steps(steps, "run.eval_steps")
    for beta in train.ema_betas:
        require(0 < beta < 1, f"train.ema_betas must lie between 0 and 1, not {beta}")
    for length in train.ema_lengths:
        require(0 < length < LONGEST, f"train.ema_lengths must lie between 0 and {LONGEST:.4f}, not {length}")
    require(len(set(train.ema_lengths)) == len(train.ema_lengths), "train.ema_lengths has one length twice")
    require(train.ema_rampup >= 0, f"train.ema_rampup must be 0, for no ramp-up, or more, not {train.ema_rampup}")
    require(run.threads == "auto" or 1 <= run.threads <= 1024, f"run.threads must be auto or 1 to 1024, not {run.threads}")
    require(run.eval_num >= 0, f"run.eval_num must be 0, for no scores, or a number of samples, not {run.eval_num}")
    for name in ("weight_decay", "grad_clip", "warmup_images"):
        require(getattr(optimizer, name) >= 0, f"optimizer.{name} cannot be negative")
    require(not (data.text and data.conditional), "data.text and data.conditional: train on captions (--unconditional) or on classes (--no-text)")
    taken_over = hasattr(config, "student")  # a student's: whether there are captions is for its teacher to say
    for name in () if data.text or taken_over else (*CAPTIONS, "leave_out"):
        require(not getattr(data, name), f"data.{name} is of captions: set data.text=true, or leave it out")
    require(
        data.augment == 0 or network is None or "augment_dim" in NETWORKS[type(network)].supports,
        f"data.augment needs network.kind {' or '.join(kinds_with('augment_dim'))}: the others take no augmentation label",
    )
