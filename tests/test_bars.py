"""Every long work has a bar, which fits a terminal of 80 columns and begins without a number that is not known yet."""

from __future__ import annotations

import functools
import re
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from forks import ROOT
from PIL import Image
from terminal import bars, on_terminal
from tiny_encoder import make_encoder
from tiny_model import make_denoiser
from tiny_vae import write_vae

from mmgen.models.files import load_model
from mmgen.sampling.drawing import SampleSettings, draw

TINY = ["--set", "network.model_channels=8", "--set", "network.channel_mult=[1]", "--device", "cpu", "--batch-size", "32",
        "--set", "run.log_every=2", "--max-images", "256", "--preview-every", "128", "--eval-every", "128", "--eval-num", "48"]  # fmt: skip


def check(lines: list[str], *names: str) -> None:
    """All bars are there, in lines of at most 80 columns, and each comes to its end."""
    for name in names:
        found = bars(lines, name)
        assert found, f"no bar {name!r} in:\n" + "\n".join(dict.fromkeys(lines))
        assert max(map(len, found)) <= 80
        assert " nan" not in "".join(found) and "None" not in "".join(found)
        counts = [re.search(r"([\d,.]+[MG]?)/([\d,.]+[MG]?)( |$)", line) for line in found]
        assert all(counts), found
        assert any(count[1] == count[2] for count in counts), found[-3:]


@pytest.mark.slow
def test_training_scores_and_pictures(own_cache):
    status, lines = on_terminal("train-imm", *TINY, "--set", "run.eval_steps=[1, 2]", "--out", "run", cwd=Path.cwd())
    assert status == 0, lines
    check(lines, "training", "reference", "scoring, 1 step", "scoring, 2 steps", "picture, 2 steps")
    training = bars(lines, "training")
    assert re.search(r"0/256 .*loss -\s*$", training[0]) and re.search(r"loss \d", training[-1])
    assert any(re.search("^scoring", line) and "0/48" in line for line in lines)


@pytest.mark.slow
def test_distillation_shows_the_teacher(own_cache):
    make_denoiser(Path("teacher.safetensors"), channels=1, num_classes=10)
    status, lines = on_terminal(
        "distill", "--teacher", "teacher.safetensors", *TINY[4:], "--steps", "2", "--teacher-steps", "20", "--out", "run",
        cwd=Path.cwd(),
    )  # fmt: skip
    assert status == 0, lines
    check(lines, "training", "teacher, 20 ancestral steps", "teacher, 10 heun steps", "student, 2 ancestral steps", "picture: teacher")
    assert re.search(r"moment gap -\s*$", bars(lines, "training")[0])
    fractions = [line for line in bars(lines, "teacher, 20 ancestral") if re.search(r" ([1-9]|[1-3]\d)/48 ", line)]
    assert fractions  # within a batch: after each of the teacher's steps


@pytest.mark.slow
def test_decoding_and_scoring_of_folders(own_cache):
    for name in ("a", "b"):
        Path(name).mkdir()
        for i in range(12):
            pixels = np.random.default_rng(i).integers(0, 256, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(Path(name, f"{i}.png"))
    status, lines = on_terminal("fid", "a", "--ref", "b", "--features", "pixels", cwd=Path.cwd())
    assert status == 0, lines
    check(lines, "reference b", "a ")
    status, lines = on_terminal("fid", "a", "--ref", "b", "--features", "pixels", "--resolution", "8", cwd=Path.cwd())
    assert status == 0, lines
    check(lines, "decoding")
    status, lines = on_terminal(
        "train-imm", "--data", "a", "--preset", "digits-imm", "--unconditional", *TINY, "--set", "run.eval_steps=[1]", "--out",
        "run", "--eval-num", "0", cwd=Path.cwd(),
    )  # fmt: skip
    assert status == 0, lines
    check(lines, "decoding", "training")


@pytest.mark.slow
def test_sampling_and_scoring_of_a_model(own_cache, digits_model):
    status, lines = on_terminal("sample", str(digits_model), "--num", "48", "--steps", "4", "--batch-size", "16", cwd=Path.cwd())
    assert status == 0, lines
    check(lines, "4 steps")
    seen: list[float] = []  # a bar is drawn ten times a second at most: what it is told, whatever the machine's speed
    draw(load_model(digits_model), SampleSettings(steps=4, batch_size=16), range(48), seen.append)
    assert seen[:4] == [4, 8, 12, 16] and seen[-1] == 48
    arguments = ("--num", "48", "--steps", "4", "--features", "pixels", "--ref", "digits")
    status, lines = on_terminal("fid", str(digits_model), *arguments, cwd=Path.cwd())
    assert status == 0, lines
    check(lines, "reference digits", str(digits_model)[:20])


@pytest.mark.slow
def test_latents(own_cache):
    write_vae(Path("vae"))
    status, lines = on_terminal("cache-latents", "--data", "digits", "--vae", "vae", "--out", "latents", cwd=Path.cwd())
    assert status == 0, lines
    check(lines, "encoding")


FETCHING = """
import sys
from mmgen.__main__ import main
from mmgen.metrics import inception
inception.PUBLISHED[inception.SCRIPT], inception.URLS[inception.SCRIPT] = sys.argv[1:3]
del sys.argv[1:3]
sys.exit(main())
"""


@pytest.fixture
def server(tiny_network):
    """The address where a server on this machine has the stand-in for Inception."""
    handler = functools.partial(SimpleHTTPRequestHandler, directory=tiny_network[0].parent)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/{tiny_network[0].name}"
        server.shutdown()


@pytest.mark.slow
def test_download_of_inception(own_cache, server, tiny_network):
    """As a user meets it, but for the file's address and hash: fetched from a server once, and read where it was put."""
    Path("images").mkdir()
    for i in range(10):
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(f"images/{i}.png")
    command = ["fid", "images", "--metrics", "is", "--device", "cpu"]
    program = ("-c", FETCHING, tiny_network[1], server)
    status, lines = on_terminal(*command, cwd=Path.cwd(), program=program, no_proxy="127.0.0.1")
    assert status == 0, lines[-5:]
    check(lines, "downloading Inception")
    assert Path("cache", tiny_network[0].name).read_bytes() == tiny_network[0].read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("columns", [60, 200])
def test_other_widths(columns, own_cache, digits_model):
    status, lines = on_terminal("sample", str(digits_model), "--num", "8", cwd=Path.cwd(), columns=columns)
    assert status == 0 and max(map(len, bars(lines, "1 step"))) <= min(columns, 100)


SMALL = ["--device", "cpu", "--batch-size", "16", "--max-images", "32", "--eval-num", "0"]
OTHERS = {  # bar -> the command that shows it
    "second moments": ["distill", "--teacher", "teacher.safetensors", "--method", "instant", *SMALL, "--teacher-steps", "0", "--steps", "2", "--set",
                       "loss.preconditioner=adam"],
    "encoding captions": ["train-teacher", "--preset", "digits-text", "--text-encoder", "encoder", *TINY[:4], *SMALL],
    "own samples": ["neon", "run", "--num", "32", "--steps", "1", "--images", "128", "--out", "neon"],
    "reading teacher": ["compare", "teacher.safetensors", "MODEL", "--num", "16", "--steps", "2", "--out", "study"],
    "decoding": ["train-imm", "--dry-run", "--preset", "digits-imm"],
}  # fmt: skip
NOT_HERE = {"sampling"}  # is Python's, of tqdm
ELSEWHERE = {"downloading Inception", "training", "reference ", "scoring, ", "picture, ", "picture: ", "encoding", "decoding the reference"}  # above


@pytest.mark.slow
@pytest.mark.parametrize("bar", OTHERS)
def test_other_long_work(bar, own_cache, digits_model):
    make_denoiser(Path("teacher.safetensors"), channels=1, num_classes=10)
    if "encoder" in OTHERS[bar]:
        make_encoder(Path("encoder"))
    if "run" in OTHERS[bar]:
        assert on_terminal("train-imm", *TINY[:4], *SMALL, "--out", "run", cwd=Path.cwd())[0] == 0
    status, lines = on_terminal(*(str(digits_model) if word == "MODEL" else word for word in OTHERS[bar]), cwd=Path.cwd(), timeout=300)
    assert bars(lines, bar), "\n".join(dict.fromkeys(lines))
    assert status == 0, lines[-5:]
    check(lines, bar)


def test_every_bar_of_the_package_is_looked_at():
    found = set()
    for file in (ROOT / "mmgen").rglob("*.py"):
        names = re.findall(r'(?:\bwork|\bbar|progress_bar|add_task)\(\s*(?:[\w.]+ or )?f?"([^"{]+)', file.read_text("utf-8"))
        found |= set(names)
    assert {"second moments", "scoring, ", "training", "encoding", "decoding", "downloading Inception"} <= found  # it sees them
    known = {*OTHERS, *NOT_HERE, *ELSEWHERE}
    assert not {name for name in found if not any(one.startswith(name) or name.startswith(one) for one in known)}, found
