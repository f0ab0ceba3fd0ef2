"""A blind comparison of two or more sets of images by people: one HTML page that needs no server and no network.

The page shows two images of the same number (and prompt) side by side, from different systems, in an order and on sides that
the seed decides. It does not say which system made which: that is in key.json beside it, which the raters do not get.
"""

from __future__ import annotations

import base64
import hashlib
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from itertools import combinations
from pathlib import Path
from typing import Any

from ..errors import ConfigError, DataError
from ..system.files import read_json, replacing, write_json

KEY_FILE, PAGE = "key.json", "study.html"
FORMAT = 1
CHOICES = ("left", "right", "tie")


@dataclass(frozen=True)
class Question:
    """Image number `image` of two systems, by their number in `Study.systems`."""

    image: int
    left: int
    right: int


@dataclass(frozen=True)
class Study:
    systems: list[str]
    questions: list[Question]
    id: str  # a digest of everything above and of the images: answers to another study are refused


def write_study(
    out: Path, images: Mapping[str, Sequence[bytes]], prompts: Sequence[str] | None, *, seed: int = 0,
    most: int | None = None,
) -> Study:  # fmt: skip
    """Writes `study.html` and `key.json` into the folder `out`.

    Args:
        images: system -> its images as the bytes of PNG files, as many of each; image i of one is compared with image i of another.
        prompts: one for each image; None: no prompts are shown.
        seed: of the order of the questions and of the sides.
        most: at most so many questions, drawn evenly from the pairs of systems; None: every image of every pair.

    Raises ConfigError for fewer than two systems, no images, or numbers that differ.
    """
    systems, counts = list(images), {len(one) for one in images.values()}
    if len(systems) < 2:
        raise ConfigError("a comparison needs two sets of images or more: give two folders, npz files or models")
    if len(counts) != 1 or counts == {0}:
        found = ", ".join(f"{name} has {len(one):,}" for name, one in images.items())
        raise ConfigError(f"image i of one set is compared with image i of another, and {found} images: set --num")
    questions = draw_questions(len(systems), counts.pop(), seed, most)
    digest = hashlib.sha256(json.dumps([systems, [vars(q) for q in questions], list(prompts or [])]).encode())
    urls: dict[tuple[int, int], int] = {}
    data: list[str] = []
    shown: list[dict[str, Any]] = []
    for question in questions:
        sides = {}
        for side, system in (("left", question.left), ("right", question.right)):
            key = (system, question.image)
            if key not in urls:
                content = images[systems[system]][question.image]
                digest.update(content)
                urls[key] = len(data)
                data.append("data:image/png;base64," + base64.b64encode(content).decode())
            sides[side] = urls[key]
        shown.append({**sides, "prompt": prompts[question.image] if prompts else ""})
    study = Study(systems, questions, digest.hexdigest()[:16])
    # "</" would end the script; JSON may write it otherwise
    content = json.dumps({"id": study.id, "images": data, "questions": shown}).replace("</", "<\\/")
    page = resources.files(__package__).joinpath(PAGE).read_text("utf-8").replace("/*STUDY*/null", content)
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / KEY_FILE, {"format": FORMAT, "seed": seed, "id": study.id, "systems": systems,
                                "questions": [vars(question) for question in questions]})  # fmt: skip
    with replacing(out / PAGE) as temporary:
        temporary.write_text(page, "utf-8")
    return study


def draw_questions(systems: int, count: int, seed: int, most: int | None = None) -> list[Question]:
    """Every image of every pair of systems, shuffled, the sides by a fair coin; with `most`, as many of each pair as of another."""
    chance = random.Random(seed)
    by_pair = []
    for a, b in combinations(range(systems), 2):
        sides = [(a, b), (b, a)] * ((count + 1) // 2)  # each system is on the left as often as on the right
        chance.shuffle(sides)
        questions = [Question(image, *sides[image]) for image in range(count)]
        chance.shuffle(questions)
        by_pair.append(questions)
    chosen = [question for turn in zip(*by_pair) for question in turn][:most]
    chance.shuffle(chosen)
    return chosen


def read_study(folder: Path) -> Study:
    """What `write_study` wrote. Raises DataError."""
    file = folder / KEY_FILE
    if not file.is_file():
        raise DataError(f"{folder} holds no study: there is no {KEY_FILE}; make one with `mmgen compare A B --out {folder}`")
    try:
        key = read_json(file)
        if key["format"] != FORMAT:
            raise ValueError(f"its format is {key['format']}, this version of mmgen reads {FORMAT}")
        systems = [str(name) for name in key["systems"]]
        questions = [Question(int(q["image"]), int(q["left"]), int(q["right"])) for q in key["questions"]]
        if not all(0 <= side < len(systems) for q in questions for side in (q.left, q.right)):
            raise ValueError("a question is about a system that it does not name")
        return Study(systems, questions, str(key["id"]))
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{file} is damaged: {error}") from error


@dataclass(frozen=True)
class Answers:
    rater: str
    choices: dict[int, str]  # question -> one of CHOICES


def read_answers(file: Path, study: Study) -> Answers:
    """A file that the page saved. Raises DataError where it is not one, or of another study."""
    try:
        found = read_json(file)
        if found["study"] != study.id:
            raise DataError(f"{file} has the answers to another study: give those that were saved from this one's {PAGE}")
        choices = {int(number): one["choice"] for number, one in found["answers"].items()}
        for number, choice in choices.items():
            if choice not in CHOICES or not 0 <= number < len(study.questions):
                raise ValueError(f"answer {number} is {choice!r}")
        return Answers(str(found.get("rater") or file.stem)[:60], choices)
    except OSError as error:
        raise DataError(f"cannot read {file}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{file} holds no answers of a study: {error}") from error
