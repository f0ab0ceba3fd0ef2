"""`mmgen compare`: which of two or more systems people prefer, judged blind in a browser."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import ConfigError
from .options import COUNT, DEVICE
from ..system.devices import check_device, find_device
from .progress import progress_bar

if TYPE_CHECKING:
    from ..metrics.image_sets import ImageSet

_study = partial(typer.Option, rich_help_panel="Making a study")
_answers = partial(typer.Option, rich_help_panel="Reading answers")


def compare(
    paths: Annotated[
        list[str],
        typer.Argument(metavar="A B...", help="Folders of samples, npz files or models; or a study, with --answers."),
    ],
    prompts: Annotated[
        Path | None,
        _study(metavar="FILE", help="A text file, one prompt a line, shown above the images; image i has prompt i modulo their "
               "number. Default: captions found beside the images."),
    ] = None,
    num: Annotated[int, _study(**COUNT, help="Images of each to compare.")] = 50,
    questions: Annotated[int | None, _study(**COUNT, help="At most so many questions. Default: all.")] = None,
    steps: Annotated[int | None, _study(**COUNT, help="Steps of those that are models. Default: the model's.")] = None,
    seed: Annotated[int, _study(**COUNT, help="Seed of the order, of the sides, and of samples that are drawn.")] = 0,
    out: Annotated[Path, _study(metavar="DIR", help="Folder of the study.")] = Path("study"),
    device: Annotated[str, _study(**DEVICE)] = "auto",
    answers: Annotated[
        Path | None, _answers(metavar="FILES...", help="Answer files that the page saved: --answers *.json")
    ] = None,
) -> None:
    """Compare samples by people's judgement: a blind page for a browser, then win rates.

    The page works by keyboard and from the disk, without a server. Send study.html to the raters and keep key.json; each
    sends an answer file back.

    Example: mmgen compare run-a/samples run-b/samples --out study/

    Then: mmgen compare study/ --answers answers-*.json
    """  # fmt: skip
    if answers is not None:
        _results(Path(paths[0]), [answers, *map(Path, paths[1:])])
        return
    check_device(device)
    if num < 1 or (questions is not None and questions < 1):
        raise ConfigError("--num and --questions must be at least 1")
    names = [path.rstrip("/") for path in paths]
    if len(set(names)) < len(names):
        raise ConfigError(f"{next(n for n in names if names.count(n) > 1)} is given twice: compare different sets of images")
    texts = _prompts(prompts, num) if prompts is not None else None

    from ..report.images import png_bytes
    from ..report.study import PAGE, write_study

    sets = {name: _images(name, num, steps, seed, device, texts) for name in names}
    texts = texts or _captions(sets, num)
    images = {}
    for name, found in sets.items():
        with progress_bar(f"reading {name}", num) as update:
            images[name] = []
            for number in range(num):
                images[name].append(png_bytes(found.read(number, number + 1, False)[0]))
                update(number + 1, num)
    study = write_study(out, images, texts, seed=seed, most=questions)
    typer.echo(f"{len(study.questions):,} questions about {len(names)} sets of images: {out / PAGE}")
    typer.echo("Open it in a browser, or send it to others; key.json, which says what is what, stays here.")
    typer.echo(f"Then: mmgen compare {out} --answers answers-*.json")


def _images(name: str, num: int, steps: int | None, seed: int, device: str, texts: list[str] | None) -> ImageSet:
    from ..metrics.image_sets import drawn_images, image_set
    from ..metrics.subjects import is_model

    if not is_model(name):
        return image_set(name).first(num)
    from ..sampling.drawing import SampleSettings, plan
    from ..sampling.record import Origin

    model = Origin.of(name).load(find_device(device))
    settings = SampleSettings(steps=steps, seed=seed, prompts=tuple(texts or ()) if model.config.text is not None else ())
    return drawn_images(model, plan(model.config, settings), num, name=name)


def _prompts(file: Path, num: int) -> list[str]:
    from ..sampling.prompts import read_prompts

    lines = read_prompts(file)
    return [lines[number % len(lines)] for number in range(num)]


def _captions(sets: dict[str, ImageSet], num: int) -> list[str] | None:
    """Those beside the images, where all sets have the same ones. Raises ConfigError where they differ."""
    from ..errors import DataError
    from ..metrics.captions import read_captions

    found = {}
    for name, images in sets.items():
        try:
            found[name] = read_captions(images) if images.path is not None or images.captions is not None else None
        except DataError:
            found[name] = None
    texts = {name: one for name, one in found.items() if one is not None}
    if not texts:
        return None
    (first, expected), *others = texts.items()
    for name, one in others:
        if one != expected:
            number = next(i for i in range(num) if one[i] != expected[i])
            raise ConfigError(
                f"image {number} of {first} shows {expected[number]!r}, and that of {name} {one[number]!r}: compare samples of the "
                "same prompts"
            )
    return expected


def _results(folder: Path, files: list[Path]) -> None:
    from rich.console import Console
    from rich.table import Table

    from ..metrics.preferences import agreement, preferences
    from ..report.study import read_answers, read_study

    study = read_study(folder)
    answers = [read_answers(file, study) for file in files]
    rows = preferences(study, answers)
    if not rows:
        raise ConfigError("no question is answered in these files")
    table = Table()
    for column in ("preferred", "over", "win rate", "95 % interval", "images", "answers", "ties"):
        table.add_column(column, justify="left" if column in ("preferred", "over") else "right", overflow="fold")
    for row in rows:
        ahead = row.rate >= 0.5
        rate, low, high = (row.rate, row.low, row.high) if ahead else (1 - row.rate, 1 - row.high, 1 - row.low)
        names = (row.first, row.second) if ahead else (row.second, row.first)
        table.add_row(*names, f"{rate:.1%}", f"{low:.1%} to {high:.1%}", str(row.images), str(row.answers), str(row.ties))
    Console(width=None if typer.get_text_stream("stdout").isatty() else 200).print(table, highlight=False, markup=False)
    found = agreement(answers)
    if found is not None:
        typer.echo(f"{found.raters} people agree in {found.equal:.0%} of the questions that two of them answered "
                   f"(Cohen's kappa {found.kappa:.2f}).")  # fmt: skip
    if any(row.low <= 0.5 <= row.high for row in rows):
        typer.echo("Where the interval includes 50 %, these answers do not tell which is preferred.")
