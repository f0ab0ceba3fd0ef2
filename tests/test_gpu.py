"""`python -m tests.gpu` in its small form on a CPU, so that it does not rot: it goes on where it stopped, and shows errors."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))
from tests.gpu import __main__ as gpu  # noqa: E402
from tests.gpu.report import markdown  # noqa: E402

pytestmark = pytest.mark.slow


def test_the_report_of_a_cpu(tmp_path, capsys):
    sections = ["golden", "numerics", "presets", "profile", "training"]
    only = [part for name in sections for part in ("--only", name)]
    assert gpu.main(["--minutes", "8", "--out", str(tmp_path), "--device", "cpu", *only]) == 0, capsys.readouterr().out
    report = json.loads((tmp_path / "report.json").read_text())
    assert set(report) == {"machine", *sections}
    assert report["golden"]["passed"] > 10
    assert len(report["numerics"]["cases"]) >= 12 and all("error" not in row["fp32"] for row in report["numerics"]["cases"].values())
    assert report["training"]["images"] == 128 and (tmp_path / "training-samples.png").is_file()
    assert "| imm, unet | 0 / 0 / 0 |" in (tmp_path / "report.md").read_text()
    capsys.readouterr()
    assert gpu.main(["--minutes", "8", "--out", str(tmp_path), "--device", "cpu", *only]) == 0
    assert capsys.readouterr().out.count("done before") == len(sections)


def test_an_error_is_shown_and_the_rest_goes_on(tmp_path, monkeypatch, capsys):
    def broken(device, small):
        raise RuntimeError("no such kernel")

    monkeypatch.setitem(gpu.SECTIONS, "golden", broken)
    assert gpu.main(["--out", str(tmp_path), "--device", "cpu", "--only", "golden"]) == 1
    assert "no such kernel" in (tmp_path / "report.md").read_text()
    assert "nothing" in markdown({"machine": {"device": "cpu", "torch": "2"}})
