"""Every command of examples/text_to_image.md runs, in its order, on a tiny pipeline and tiny data; the student it exports draws in diffusers."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_documents import fenced
from tiny_encoder import make_encoder
from tiny_inception import write_inception
from tiny_open_clip import save_open_clip, save_towers
from tiny_pipelines import tiny_pipeline
from typer.testing import CliRunner

from mmgen.cli import app
from mmgen.metrics.inception import PUBLISHED, SCRIPT

for package in ("diffusers", "transformers", "open_clip", "peft"):
    pytest.importorskip(package)
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

TEXT = (Path(__file__).parents[1] / "examples/text_to_image.md").read_text()
COMMANDS = [line for block in fenced(TEXT, "bash") for line in block.splitlines()]
CAPTIONS = ["a bold three", "a thin seven", "an eight", "a nine", "two one", "four five"]
TINY_DIT = [f"network.{name}={value}" for name, value in (("hidden_size", 16), ("depth", 1), ("num_heads", 2))]
SHORT = ["--max-images", "8", "--batch-size", "4", "--eval-num", "0", "--set", "run.log_every=1", "--set", "run.preview_every=1000"]
MORE = {  # what makes a command short; --dry-run takes only what changes no cost
    "train-teacher": [*SHORT, "--set", "run.eval_steps=[1]"],
    "distill": [*SHORT, "--teacher-steps", "0", "--set", "optimizer.warmup_images=0"],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The folder in which a person types, with what the document says is there."""
    place = tmp_path_factory.mktemp("typed")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        patch.setenv("MMGEN_CACHE", str(place / "cache"))
        patch.setitem(PUBLISHED, SCRIPT, write_inception(place / SCRIPT))
        patch.setenv("MMGEN_INCEPTION", str(place / SCRIPT))
        patch.setenv("HF_HUB_OFFLINE", "1")
        tiny_pipeline("sd15", place / "sd15")
        make_encoder(place / "encoder")
        save_towers(place / "judge")
        save_open_clip(place / "vit-g-14")
        for name, count, size in (("captioned", 8, 16), ("emoji", 80, 32), ("val2014", 8, 40)):
            pictures(place / name, count, size)
        for name in ("prompts.txt", "captions.txt"):
            (place / name).write_text("\n".join(CAPTIONS) + "\n")
        yield place


def pictures(folder: Path, count: int, size: int) -> None:
    folder.mkdir()
    random = np.random.default_rng(0)
    for i in range(count):
        small = Image.fromarray((random.random((5, 5, 3)) * 255).astype(np.uint8))
        small.resize((size, size), Image.Resampling.BICUBIC).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(CAPTIONS[i % len(CAPTIONS)])


def typed(line: str) -> str:
    line = line.replace("--resolution 512", "--resolution 16").replace("--lora 64", "--lora 2")
    _, command, *arguments = shlex.split(line, comments=True)
    if "--dry-run" not in arguments:
        arguments += MORE.get(command, []) + (["--device", "cpu"] if command != "convert" else [])
        if "emoji32-teacher" in arguments:
            arguments += [word for setting in TINY_DIT for word in ("--set", setting)]
    result = CliRunner().invoke(app, [command, *arguments])
    assert result.exit_code == 0, f"{line}: {result.output[-2000:]}\n{result.exception!r}"
    return result.output


def test_every_command_runs(folder):
    """In one test, as each needs those before it."""
    assert len(COMMANDS) > 15 and all(line.startswith("mmgen ") for line in COMMANDS)
    shown = {line: typed(line) for line in COMMANDS}
    sweep = next(text for line, text in shown.items() if "--guidance 1,1.5,3" in line)
    assert "fid6" in sweep and "CLIP cosine" in sweep and (folder / "teacher.png").is_file()
    assert len(list((folder / "samples").glob("*.png"))) == 2 * len(CAPTIONS)
    assert "R@10" in shown[COMMANDS[-1]] and "FD-images" in shown[COMMANDS[-1]]
    from diffusers import DiffusionPipeline

    (call,) = re.findall(r"pipe\((.*)\)\.images", TEXT)
    pipe = DiffusionPipeline.from_pretrained(str(folder / "student"), local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    picture = eval(f"pipe({call}, height=16, width=16)", {"pipe": pipe}).images[0]  # as written in the document
    assert picture.size == (16, 16)
