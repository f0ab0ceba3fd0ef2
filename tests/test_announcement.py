"""What a training command says first: what it will train, in words that --set takes; or, where it cannot, one sentence and no more."""

from __future__ import annotations

import pytest
from test_cli import mmgen

from mmgen.cli.training import _plain
from mmgen.config.sections import parse_assignment

WRONG = {
    "distill": ["--teacher", "runs/none"],
    "distill one of the hub": ["--teacher", "hf://no/such/model.pt"],
    "train-imm": ["--data", "nowhere", "--preset", "digits-imm"],
}


@pytest.mark.slow
@pytest.mark.parametrize("more", [[], ["--dry-run"]])
@pytest.mark.parametrize("what", WRONG)
def test_an_error_stands_alone(what, more, tmp_path):
    result = mmgen(what.split()[0], *WRONG[what], *more, cwd=tmp_path, HF_HUB_OFFLINE="1")
    assert result.returncode in (3, 4) and not result.stdout
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: "), result.stderr


@pytest.mark.parametrize("value, text", [
    ((1,), "[1]"), ((1, 2), "[1, 2]"), (True, "true"), ("fm", "fm"), ("", '""'), (("a", "b"), '["a", "b"]'), (2e-06, "2e-06"),
    ({"name": "fm", "shift": 1.0, "none": None}, '{name = "fm", shift = 1.0}'),
])  # fmt: skip
def test_what_is_shown_can_be_set(value, text):
    assert _plain(value) == text
    expected = {k: v for k, v in value.items() if v is not None} if isinstance(value, dict) else value
    found = parse_assignment(f"key={text}")[1]
    assert (tuple(found) if isinstance(found, list) else found) == expected


@pytest.mark.slow
def test_what_is_changed(tmp_path):
    tiny = ["--set", "network.channel_mult=[1]", "--set", "network.model_channels=8", "--set", "run.eval_steps=[1]"]
    result = mmgen("train-imm", *tiny, "--max-images", "128", "--eval-num", "0", "--device", "cpu", cwd=tmp_path)
    lines = result.stderr.splitlines()
    assert result.returncode == 0 and lines[0].startswith("digits-imm: digits with class labels, saved in runs/digits-imm-")
    assert lines[2].startswith("changed: network.model_channels=8 network.channel_mult=[1] train.max_images=128 ")
    assert sum("saved in" in line for line in lines) == 1
