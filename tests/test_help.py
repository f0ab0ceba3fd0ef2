"""Help that fits a terminal of 80 columns, and wrong usage in one sentence."""

from __future__ import annotations

import re

import pytest
from test_cli import COMMANDS, mmgen

LONGEST = {"train-imm": 72, "train-teacher": 71, "distill": 94, "sample": 80, "fid": 98, "convert": 34, "inspect": 24,
           "cache-latents": 48, "ema": 24, "neon": 26, "push": 24, "compare": 36}  # fmt: skip
BOXES = re.compile("[\u2500-\u257f]|\x1b")


@pytest.mark.parametrize("command", COMMANDS)
def test_help_fits_80_columns(command, tmp_path):
    text = mmgen(command, "--help", cwd=tmp_path, COLUMNS="80").stdout
    lines = text.splitlines()
    assert max(map(len, lines)) <= 80 and len(lines) <= LONGEST[command]
    assert not BOXES.search(text) and "VALUE" not in text.replace("KEY=VALUE", "")
    assert lines[0].startswith("Usage: ") and f"Example: mmgen {command}" in text
    text = mmgen(command, "--help", cwd=tmp_path, COLUMNS="60").stdout
    own = [line for line in text.splitlines() if not line.lstrip().startswith(("Example", "mmgen"))]
    assert max(map(len, own)) <= 60


@pytest.mark.parametrize("command", ["train-imm", "train-teacher", "distill"])
def test_options_come_in_groups(command, tmp_path):
    text = mmgen(command, "--help", cwd=tmp_path, COLUMNS="80").stdout
    headings = [line for line in text.splitlines() if re.fullmatch(r"[A-Z].*:", line)]
    assert [h.split(" (")[0].rstrip(":") for h in headings][-5:] == ["Images", "Training", "Saving and scoring", "Running", "Options"]
    options = text.split("\nOptions:\n")[1].strip().splitlines()
    assert len(options) == 1  # --help alone: every other option has a group


def test_the_list_of_commands(tmp_path):
    for arguments in ([], ["--help"], ["-h"]):
        result = mmgen(*arguments, cwd=tmp_path, COLUMNS="80")
        lines = result.stdout.splitlines()
        assert result.returncode == 0 and not result.stderr and len(lines) <= 32 and max(map(len, lines)) <= 80
        assert all(any(line.startswith(f"  {command} ") for line in lines) for command in COMMANDS)


WRONG = {
    ("sample",): "missing argument 'MODEL'",
    ("smaple", "x"): "no such command 'smaple'. Did you mean 'sample'?",
    ("sample", "x", "--nmu", "3"): "no such option: --nmu .*--num",
    ("sample", "x", "--num", "many"): "--num: must be a whole number, such as 500, 64k, 1M or 64Ki, not 'many'",
    ("sample", "x", "--num"): "option '--num' requires an argument",
    ("sample", "x", "y"): "got unexpected extra argument",
    ("train-imm", "--lr", "fast"): "--lr: must be a number, such as 0.5 or 2e-4, not 'fast'",
    ("train-imm", "--lr", "nan"): "--lr: must be a number",
    ("train-imm", "--max-images", "64kk"): "--max-images: must be a whole number",
    ("train-imm", "--max-images", "0.5"): "--max-images: must be a whole number",
    ("train-imm", "--batch-per-device", "few"): "run.batch_per_device must be a whole number",
    ("train-imm", "--device", "gpu"): "unknown device 'gpu'",
    ("cache-latents",): "missing (option|parameter).*--data",
    ("sample", "x", "--num", "\x1b[31m\n"): r"--num: must be a whole number, .* not '\\x1b\[31m\\n'",
}  # fmt: skip


@pytest.mark.parametrize("arguments", WRONG, ids=" ".join)
def test_wrong_usage_is_one_sentence(arguments, tmp_path):
    result = mmgen(*arguments, cwd=tmp_path, COLUMNS="80")
    assert result.returncode == 2 and not result.stdout
    (line,) = result.stderr.splitlines()
    assert re.match(f"error: {WRONG[arguments]}", line), line
