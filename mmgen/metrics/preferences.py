"""Win rates and agreement from people's answers to a blind comparison (`report.study`)."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

from ..report.study import Answers, Study

Z = 1.959963984540054  # of a 95 % interval


@dataclass(frozen=True)
class Preference:
    """How often `first` was preferred to `second`: a tie counts one half.

    `low` and `high`: a 95 % confidence interval by Wilson's score (1927). The images are its sample, whatever the number of
    people who judged each, since answers to one question are not independent.
    """

    first: str
    second: str
    rate: float
    low: float
    high: float
    images: int
    answers: int
    ties: int


@dataclass(frozen=True)
class Agreement:
    """Between people: the share of equal answers, and Cohen's kappa (1960), averaged over pairs weighted by their questions."""

    raters: int
    questions: int  # that two people answered, summed over the pairs of people
    equal: float
    kappa: float


def wilson(rate: float, count: float, z: float = Z) -> tuple[float, float]:
    """Wilson's score interval of a proportion `rate` seen in `count` draws.

    >>> [round(x, 3) for x in wilson(0.5, 100)]
    [0.404, 0.596]
    """
    centre = (rate + z**2 / (2 * count)) / (1 + z**2 / count)
    half = z / (1 + z**2 / count) * math.sqrt(rate * (1 - rate) / count + z**2 / (4 * count**2))
    return centre - half, centre + half


def preferences(study: Study, answers: Sequence[Answers]) -> list[Preference]:
    """One row for each pair of systems that somebody judged."""
    scores: dict[tuple[int, int], dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for one in answers:
        for number, choice in one.choices.items():
            question = study.questions[number]
            first, second = sorted((question.left, question.right))
            wanted = {"left": question.left, "right": question.right, "tie": None}[choice]
            score = 0.5 if wanted is None else float(wanted == first)
            scores[first, second][question.image].append(score)
    rows = []
    for (first, second), by_image in sorted(scores.items()):
        means = [sum(values) / len(values) for values in by_image.values()]
        every = [value for values in by_image.values() for value in values]
        rate = sum(means) / len(means)
        low, high = wilson(rate, len(means))
        rows.append(
            Preference(study.systems[first], study.systems[second], rate, low, high, len(means), len(every), every.count(0.5))
        )
    return rows


def agreement(answers: Sequence[Answers]) -> Agreement | None:
    """Between every two people over the questions that both answered; None where no two answered the same one."""
    total, equal, weighted = 0, 0.0, 0.0
    for one, other in combinations(answers, 2):
        both = sorted(one.choices.keys() & other.choices.keys())
        if not both:
            continue
        same = sum(one.choices[number] == other.choices[number] for number in both) / len(both)
        total += len(both)
        equal += len(both) * same
        weighted += len(both) * cohen_kappa(one.choices, other.choices, both)
    return Agreement(len(answers), total, equal / total, weighted / total) if total else None


def cohen_kappa(one: Mapping[int, str], other: Mapping[int, str], questions: Sequence[int]) -> float:
    """(p_o - p_e) / (1 - p_e): agreement beyond what the frequencies of each person's answers give by chance."""
    count = len(questions)
    observed = sum(one[n] == other[n] for n in questions) / count
    shares = [[sum(who[n] == choice for n in questions) / count for choice in ("left", "right", "tie")] for who in (one, other)]
    expected = sum(a * b for a, b in zip(*shares))
    return 1.0 if expected == 1 else (observed - expected) / (1 - expected)
