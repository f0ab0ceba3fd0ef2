"""Blind comparisons: the page in a real browser, the key, win rates against closed forms, refusals."""

from __future__ import annotations

import json
import random
import re
import shutil
import socket
import subprocess
import time
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_cli import mmgen

from mmgen.errors import ConfigError, DataError
from mmgen.metrics.preferences import agreement, cohen_kappa, preferences, wilson
from mmgen.report.images import png_bytes
from mmgen.report.study import Answers, Question, Study, draw_questions, read_answers, read_study, write_study

GREYS = {"black": 0, "white": 255}


def pictures(level: int, count: int = 4) -> list[bytes]:
    return [png_bytes(np.full((3, 8, 8), max(min(level + number, 255), 0), np.uint8)) for number in range(count)]


def samples(folder: Path, level: int, count: int = 4) -> Path:
    folder.mkdir()
    for number in range(count):
        Image.new("RGB", (8, 8), (level, number, 0)).save(folder / f"{number:06d}.png")
        (folder / f"{number:06d}.txt").write_text(f"prompt {number} </script><b>")
    return folder


def test_questions_are_fair_and_follow_the_seed():
    questions = draw_questions(3, 10, seed=1)
    assert len(questions) == 30 and len({(q.image, *sorted((q.left, q.right))) for q in questions}) == 30
    assert questions == draw_questions(3, 10, seed=1) != draw_questions(3, 10, seed=2)
    for first, second in ((0, 1), (0, 2), (1, 2)):  # nobody who always answers left prefers anything
        assert sum((q.left, q.right) == (first, second) for q in questions) == 5
    few = draw_questions(3, 10, seed=1, most=7)
    pairs = [tuple(sorted((q.left, q.right))) for q in few]
    assert len(few) == 7 and all(pairs.count(pair) in (2, 3) for pair in ((0, 1), (0, 2), (1, 2)))


def test_the_page_is_blind_and_needs_nothing_else(tmp_path):
    study = write_study(tmp_path, {"secret-a": pictures(0), "secret-b": pictures(200)}, ["</script><script>alert(1)"] * 4)
    page = (tmp_path / "study.html").read_text()
    assert "secret" not in page and not re.search(r"https?://", page) and page.count("</script>") == 1
    assert "default-src 'none'" in page and page.count("data:image/png") == 8
    assert read_study(tmp_path) == study
    other = write_study(tmp_path / "other", {"secret-a": pictures(0), "secret-b": pictures(201)}, None)
    assert other.id != study.id  # other images: other answers


def test_wilson_and_win_rates():
    # Wilson (1927), as tabulated by Newcombe (1998), table I: 81 of 263, 15 of 148, 0 of 20, 1 of 29
    for hits, count, low, high in ((81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0, 0.1611), (1, 29, 0.0061, 0.1718)):
        assert wilson(hits / count, count) == pytest.approx((low, high), abs=1e-4)
    study = Study(["a", "b"], [Question(0, 0, 1), Question(1, 1, 0), Question(2, 0, 1), Question(3, 1, 0)], "x")
    one = Answers("one", {0: "left", 1: "right", 2: "right", 3: "tie"})  # a, a, b, tie
    two = Answers("two", {0: "left", 1: "left"})  # a, b
    (row,) = preferences(study, [one, two])
    assert (row.first, row.second, row.images, row.answers, row.ties) == ("a", "b", 4, 6, 1)
    assert row.rate == pytest.approx((1 + 0.5 + 0 + 0.5) / 4) and (row.low, row.high) == pytest.approx(wilson(0.5, 4))
    found = agreement([one, two])
    assert found.equal == 0.5 and found.questions == 2 and agreement([one]) is None


def test_the_interval_covers_the_truth_also_where_many_judge_the_same_images():
    """Of 200 studies with 60 images and 3 raters who agree for the most part: at least 90 % of the intervals hold the truth."""
    chance, held = random.Random(0), 0
    for _ in range(200):
        questions = [Question(number, 0, 1) for number in range(60)]
        better = [chance.random() < 0.65 for _ in questions]
        raters = [
            Answers(str(r), {n: "left" if better[n] ^ (chance.random() < 0.1) else "right" for n in range(60)}) for r in range(3)
        ]
        (row,) = preferences(Study(["a", "b"], questions, "x"), raters)
        held += row.low <= 0.65 * 0.9 + 0.35 * 0.1 <= row.high
    assert held >= 180


def test_kappa():
    """Cohen's definition, with the two-by-two table 20 5 / 10 15: p_o 0.7, p_e 0.5."""
    pairs = [("left", "left")] * 20 + [("left", "right")] * 5 + [("right", "left")] * 10 + [("right", "right")] * 15
    one, other = ({n: pair[side] for n, pair in enumerate(pairs)} for side in (0, 1))
    assert cohen_kappa(one, other, range(50)) == pytest.approx((0.7 - 0.5) / 0.5)
    constant = dict.fromkeys(range(50), "tie")
    assert cohen_kappa(constant, constant, range(50)) == 1


def test_what_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="two sets"):
        write_study(tmp_path, {"a": pictures(0)}, None)
    with pytest.raises(ConfigError, match="a has 4, b has 3"):
        write_study(tmp_path, {"a": pictures(0), "b": pictures(9, 3)}, None)
    study = write_study(tmp_path, {"a": pictures(0), "b": pictures(99)}, None)
    for content, said in (("{", "no answers"), ('{"study": "other", "answers": {}}', "another study"), ("[]", "no answers"),
                          (json.dumps({"study": study.id, "answers": {"99": {"choice": "left"}}}), "answer 99"),
                          (json.dumps({"study": study.id, "answers": {"0": {"choice": "both"}}}), "'both'")):  # fmt: skip
        file = tmp_path / "answers.json"
        file.write_text(content)
        with pytest.raises(DataError, match=said):
            read_answers(file, study)
    with pytest.raises(DataError, match="no study"):
        read_study(tmp_path / "nothing")


@pytest.mark.slow
def test_the_command(tmp_path):
    for name, level in GREYS.items():
        samples(tmp_path / name, level)
    made = mmgen("compare", "black", "white/", "--num", "4", "--out", "study", cwd=tmp_path)
    assert made.returncode == 0, made.stderr
    assert "4 questions" in made.stdout and "mmgen compare study --answers" in made.stdout
    key = json.loads((tmp_path / "study/key.json").read_text())
    assert "prompt 3 <\\/script>" in (tmp_path / "study/study.html").read_text()
    for rater, wanted in (("ann", "white"), ("bob", "white")):
        side = {n: "left" if key["systems"][q["left"]] == wanted else "right" for n, q in enumerate(key["questions"])}
        text = json.dumps({"study": key["id"], "rater": rater, "answers": {n: {"choice": s} for n, s in side.items()}})
        (tmp_path / f"answers-{rater}.json").write_text(text)
    read = mmgen("compare", "study/", "--answers", "answers-ann.json", "answers-bob.json", cwd=tmp_path)
    assert read.returncode == 0 and "100.0%" in read.stdout and "kappa 1.00" in read.stdout, read.stdout + read.stderr
    low = 1 / (1 + 1.959963984540054**2 / 4)  # Wilson's lower end where all were won
    assert f"{low:.1%}" in read.stdout
    prompts = tmp_path / "prompts.txt"
    for content, said in (("", "no prompts"), (b"\xff\xfe\x00", "UTF-8")):
        prompts.write_bytes(content if isinstance(content, bytes) else content.encode())
        bad = mmgen("compare", "black", "white", "--num", "4", "--prompts", "prompts.txt", "--out", "other", cwd=tmp_path)
        assert bad.returncode == 2 and said in bad.stderr and bad.stderr.count("\n") == 1
    (tmp_path / "white/000002.txt").write_text("another prompt")
    bad = mmgen("compare", "black", "white", "--num", "4", "--out", "other", cwd=tmp_path)
    assert bad.returncode == 2 and "image 2 of black" in bad.stderr
    twice = mmgen("compare", "black", "black/", cwd=tmp_path)
    assert twice.returncode == 2 and "given twice" in twice.stderr


class Browser:
    """Headless Chromium through its driver, by the WebDriver protocol."""

    def __init__(self, folder: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.driver = subprocess.Popen(["chromedriver", f"--port={self.port}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        options = {"args": ["--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
                            "--disable-component-update", "--disable-sync", "--window-size=1200,900",
                            f"--user-data-dir={folder / 'profile'}"],
                   "prefs": {"download.default_directory": str(folder / "downloads")}}  # fmt: skip
        wanted = {"capabilities": {"alwaysMatch": {"goog:chromeOptions": options}}}
        for _ in range(100):
            try:
                self.session = self._ask("POST", "/session", wanted)["sessionId"]
                break
            except OSError:
                time.sleep(0.1)

    def _ask(self, method: str, path: str, content: dict | None = None) -> dict:
        data = None if content is None else json.dumps(content).encode()
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", data, method=method)
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)["value"]

    def open(self, page: Path) -> None:
        self._ask("POST", f"/session/{self.session}/url", {"url": page.resolve().as_uri()})

    def run(self, script: str) -> object:
        return self._ask("POST", f"/session/{self.session}/execute/sync", {"script": script, "args": []})

    def press(self, key: str) -> None:
        code = {"left": "\ue012", "right": "\ue014", "down": "\ue015", "back": "\ue003"}[key]
        strokes = [{"type": "keyDown", "value": code}, {"type": "keyUp", "value": code}]
        self._ask("POST", f"/session/{self.session}/actions", {"actions": [{"type": "key", "id": "keys", "actions": strokes}]})

    def close(self) -> None:
        try:
            self._ask("DELETE", f"/session/{self.session}")
        finally:
            self.driver.terminate()
            self.driver.wait(20)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("chromedriver") is None, reason="needs Chromium and its driver (Debian: chromium-driver)")
def test_a_person_answers_in_a_browser(tmp_path):
    systems = {name: pictures(level) for name, level in GREYS.items()}
    study = write_study(tmp_path, systems, [f"prompt {number}" for number in range(4)])
    browser = Browser(tmp_path)
    try:
        browser.open(tmp_path / "study.html")
        for number, question in enumerate(study.questions):
            assert browser.run("return document.getElementById('prompt').textContent") == f"prompt {question.image}"
            # The side of the brighter image, by the pixels that are on the screen
            side = browser.run(
                "const c = document.createElement('canvas').getContext('2d');"
                "const light = (id) => { c.drawImage(document.querySelector('#' + id + ' img'), 0, 0);"
                " return c.getImageData(0, 0, 1, 1).data[0]; };"
                "return light('left') > light('right') ? 'left' : 'right';"
            )
            if number == 1:  # a mistake, taken back
                browser.press("down")
                browser.press("back")
            browser.press(side)
        assert browser.run("return !document.getElementById('end').hidden")
        browser.run("document.getElementById('rater').value = 'Eve'; document.getElementById('finish').click()")
        file = tmp_path / "downloads" / "answers-Eve.json"
        for _ in range(100):
            if file.is_file() and file.stat().st_size:
                break
            time.sleep(0.1)
        answers = read_answers(file, study)
        browser.open(tmp_path / "study.html")  # what was answered is still there
        assert browser.run("return !document.getElementById('end').hidden")
    finally:
        browser.close()
    (row,) = preferences(study, [answers])
    assert answers.rater == "Eve" and row.ties == 0
    assert (row.rate if row.first == "white" else 1 - row.rate) == 1
