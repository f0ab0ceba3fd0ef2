"""Hostile arguments: places that cannot be written, odd numbers, classes, captions and hub ids; and secrets, which stay secret."""

from __future__ import annotations

import io
import json
import os
import re
import sys
import tokenize
from pathlib import Path

import forks
import pytest
from hostile import command, refused, tried
from hostile_images import BAD, encoded, picture, zip_of

import mmgen

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("own_cache")]
HUB = ("../..", "a/b/c", "user/..", "user/na me", "user/na\nme", "user/-", "hf://", "hf://../../etc", "user/" + "x" * 500, "user/é",
       "https://x/y", "\x1b[31m/x", "~nobody/x", "/", "", ".", "x" * 5000)  # fmt: skip


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


@pytest.fixture
def places(tmp_path) -> list:
    """A file where a folder should be, below a file, a name that is too long, and what is no place."""
    (tmp_path / "file").write_text("")
    return [tmp_path / "file" / "below", tmp_path / ("x" * 300), "/proc/nowhere/x", "/dev/null/x"]


def test_out(places, digits_model, tmp_path):
    (tmp_path / "image.png").write_bytes(encoded(picture()))
    for place in places:
        refused("sample", digits_model, "--num", 1, "--out", place)
        refused("sample", digits_model, "--num", 1, "--out", f"{place}.npz")
        refused("sample", digits_model, "--num", 1, "--out", f"{place}.png")
        refused("train-imm", "--max-images", 128, "--eval-num", 0, "--out", place)
        refused("fid", "digits", "--features", "pixels", "--save-stats", f"{place}.npz")
        refused("fid", "digits", "--num", 8, "--features", "pixels", "--ref", "digits", "--out", f"{place}.json")
        refused("convert", digits_model, f"{place}.safetensors")
    refused("sample", digits_model, "--num", 1, "--out", tmp_path / "file")
    refused("train-imm", "--max-images", 128, "--eval-num", 0, "--out", tmp_path / "file")


@pytest.mark.skipif(hasattr(os, "geteuid") and os.geteuid() == 0, reason="root writes everywhere")
def test_out_in_a_folder_that_is_read_only(digits_model, tmp_path):
    folder = tmp_path / "shut"
    folder.mkdir(mode=0o500)
    refused("sample", digits_model, "--num", 1, "--out", folder / "s", status=1)
    refused("train-imm", "--max-images", 128, "--eval-num", 0, "--out", folder / "r", status=1)


@pytest.mark.parametrize("word", HUB)
def test_hub_ids(word, tmp_path):
    refused("train-imm", f"--data={word}", "--preset", "digits-imm", "--out", tmp_path / "run", status=(1, 3))
    refused("sample", word, status=(1, 4))
    refused("inspect", word, status=(1, 4))
    refused("convert", word, tmp_path / "o.safetensors", status=(1, 4))
    refused("distill", f"--teacher={word}", "--data", "digits", "--out", tmp_path / "run", status=(1, 2, 4))
    refused("fid", word, "--features", "pixels", "--save-stats", "s.npz", status=(1, 3, 4))
    refused("push", word, "user/name", status=(1, 4))


OPTIONS = {
    "--classes": ("", ",", "x", "-1", "10", "1e9", "9" * 5000, "٣٣", "²", "three;", "0,1,", "\0", "a" * 10_000, "random,balanced"),
    "--steps": ("", ",", "0", "-1", "1.5", "nan", "1e3", "9" * 5000, str(10**12), "1,,2", "1;2"),
    "--eta": ("", "nan", "inf", "-1", "1e999", "1.4,nan", "0", ",", "x"),
    "--guidance": ("nan", "inf", "-inf", "1e999"), "--num": ("0", "-1"), "--batch-size": ("0", "-5"),
    "--sampler": ("", "x", "heun", "\0"), "--grid": ("", "x", "schedule"), "--format": ("", "x"), "--device": ("", "tpu"),
    "--ema": ("../../x", "x", "/etc/passwd", "a\0b", "x" * 500), "--churn": ("1", "nan", "-1"), "--stochasticity": ("2", "nan"),
}  # fmt: skip


@pytest.mark.parametrize("option", OPTIONS)
def test_options_of_sample(option, digits_model, tmp_path):
    for value in OPTIONS[option]:
        refused(
            "sample", digits_model, *([] if option == "--num" else ["--num", 1]), f"{option}={value}", "--out", tmp_path / "s"
        )
    assert not (tmp_path / "s").exists()


def test_options_of_training(tmp_path):
    for option in ("--max-time=nan", "--max-time=infs", "--max-time=-1s", "--max-time=", "--max-time=9" + "9" * 400 + "s", "--lr=nan",
                   "--lr=inf", "--lr=-1", "--lr=0", "--batch-size=0", "--batch-size=-4", "--batch-size=1" + "0" * 30, "--max-images=-1",
                   "--seed=1" + "0" * 30, "--resolution=0", "--resolution=-8", "--resolution=1000000000", "--channels=2",
                   "--channels=1000000000", "--precision=fp8", "--log-with=", "--log-with=x,y", "--split=x", "--split=\0", "--eval-num=-1",
                   "--image-column=x", "--preset=../digits-imm", "--preset=", "--config=/nowhere", "--config=/", "--on-corrupt=x"):  # fmt: skip
        refused("train-imm", option, "--out", tmp_path / "run")


def test_captions(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    (folder / "0.png").write_bytes(encoded(picture()))
    for name, content in (("a.txt", b""), ("a.txt", b"\xff\xfe"), ("a.txt", b"a\nb\n"), ("a.jsonl", b"[" * 100_000), ("a.jsonl", b"5\n"),
                          ("a.jsonl", b'{"file_name": 5, "text": "a"}'), ("a.jsonl", b'{"file_name": "1.png", "text": "a"}'),
                          ("a.jsonl", b'{"file_name": "0.png"}'), ("a.csv", b'"' * 300_000), ("a.csv", b"file_name,text\n0.png"),
                          ("a.csv", b"\0" * 100), ("a.csv", b"file_name,text\n0.png," + b"x" * 200_000), ("a.doc", b"")):  # fmt: skip
        (tmp_path / name).write_bytes(content)
        refused("fid", folder, "--metrics", "clip", "--clip", tmp_path / "no-clip", "--captions", tmp_path / name)


# Whole processes, in a gibibyte and a half of addresses beyond those that torch and its libraries take

LIMITED = """
import resource, sys
from pathlib import Path
from mmgen.__main__ import main
import accelerate, datasets, mmgen.metrics.evaluate, mmgen.training.start
taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (taken + 3 * 2**29,) * 2)
sys.argv[0] = "mmgen"
main()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the limit is Linux's")
@pytest.mark.parametrize("name", ["a bomb", "a zip of a bomb", "settings", "a header"])
def test_processes(name, digits_model, tmp_path):
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "0.png").write_bytes(BAD["a PNG of 60,000 x 60,000"])
    (tmp_path / "z.zip").write_bytes(zip_of([("0.png", bytes(300_000_000))]))
    (tmp_path / "h.safetensors").write_bytes((2**62).to_bytes(8, "little") + b"{" * 1000)
    arguments = {
        "a bomb": ["train-imm", "--data", "d", "--preset", "digits-imm"], "a zip of a bomb": ["train-imm", "--data", "z.zip", "--preset", "digits-imm"],
        "settings": ["train-imm", "--set", "network.model_channels=131072"], "a header": ["sample", "h.safetensors"],
    }[name]  # fmt: skip
    tried.append(name)
    done = forks.run("-c", LIMITED, *arguments, cwd=tmp_path)
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode in (1, 2, 3, 4, 5) and last.startswith("error: ") and "Traceback" not in done.stderr, done.stderr[
        -1000:
    ]


# Secrets

SECRETS = {"HF_TOKEN": "hf_secretsecretsecretsecretsecret", "WANDB_API_KEY": "0123456789abcdef0123456789abcdef01234567",
           "HUGGING_FACE_HUB_TOKEN": "hf_othersecretothersecretother"}  # fmt: skip


def test_secrets_are_not_told(tmp_path, monkeypatch):
    """Of the environment, in anything that commands print or write."""
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    out = tmp_path / "run"
    tell = []
    for arguments in (["train-imm", "--max-images", "256", "--eval-num", "0", "--out", out, "--log-with", "tensorboard"],
                      ["train-imm", "--dry-run"], ["sample", out, "--num", "2", "--out", tmp_path / "s"], ["inspect", out / "model.safetensors"],
                      ["fid", tmp_path / "s", "--features", "pixels", "--ref", "digits"], ["sample", "user/name"], ["push", out, "user/name"],
                      ["train-imm", "--data", "user/name", "--preset", "digits-imm"]):  # fmt: skip
        tried.append(f"secrets {arguments[:2]}")
        tell += [text.encode() for text in command(*arguments)[1:]]
    assert (out / "model.safetensors").is_file() and (tmp_path / "s" / "scores.json").is_file()
    tell += [file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()]
    for value in SECRETS.values():
        assert not any(value.encode() in text for text in tell)
    assert json.loads((out / "config.json").read_text())["command"] == "train-imm"


def test_remote_code_is_never_trusted():
    """The program names it only to say False: unsaid, transformers would ask at the terminal."""
    found = 0
    for file in Path(mmgen.__file__).parent.rglob("*.py"):
        tokens = list(tokenize.tokenize(io.BytesIO(file.read_bytes()).readline))
        for number, token in enumerate(tokens):
            found += token.type == tokenize.NAME
            if token.type == tokenize.NAME and token.string == "trust_remote_code":
                assert [after.string for after in tokens[number + 1 : number + 3]] == ["=", "False"], file
            assert token.type != tokenize.STRING or not re.search(r"trust_remote_code\W+True", token.string), file
    assert found > 10_000
