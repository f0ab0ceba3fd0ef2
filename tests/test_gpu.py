"""`python -m tests.gpu` in its small form on a CPU, so that it does not rot: it goes on where it stopped, and shows errors."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))
from tests.gpu import __main__ as gpu  # noqa: E402
from tests.gpu import speed  # noqa: E402
from tests.gpu.report import markdown  # noqa: E402

pytestmark = pytest.mark.slow


def test_the_report_of_a_cpu(tmp_path, capsys):
    sections = ["golden", "numerics", "presets", "profile", "training"]
    only = [part for name in sections for part in ("--only", name)]
    assert gpu.main(["--minutes", "8", "--out", str(tmp_path), "--device", "cpu", *only]) == 0, capsys.readouterr().out
    report = json.loads((tmp_path / "report.json").read_text())
    assert set(report) == {"machine", *sections}
    assert report["golden"]["passed"] > 10
    assert len(report["numerics"]["cases"]) >= 5 and all("error" not in row["fp32"] for row in report["numerics"]["cases"].values())
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


def test_a_report_that_is_cut_off_loses_one_measurement(tmp_path, monkeypatch, capsys):
    """Of three presets the second one never ends: what was measured stays, it is not tried again, and the rest is measured."""
    done = []
    case = lambda name: (types.SimpleNamespace(name=name), None, 4)  # noqa: E731

    def measured(case, *rest):
        done.append(case.name)
        if case.name == "second":
            raise KeyboardInterrupt
        return {"rate": 10.0, "computed": 1.0}

    monkeypatch.setattr(speed, "preset_cases", lambda small: [case("first"), case("second"), case("third")])
    monkeypatch.setattr(speed, "measured", measured)
    command = ["--out", str(tmp_path), "--device", "cpu", "--only", "presets"]
    with pytest.raises(KeyboardInterrupt):
        gpu.main(command)
    assert list(json.loads((tmp_path / "report.json").read_text())["presets"]["presets"]["first"]["ways"]) == ["tf32"]
    assert gpu.main(command) == 1 and done == ["first", "second", "third"]
    report = json.loads((tmp_path / "report.json").read_text())["presets"]
    assert report["failed"] == ["second, tf32: it did not end"] and "begun" not in report
    assert [list(row["ways"]) for row in report["presets"].values()] == [["tf32"], [], ["tf32"]]
    assert "second, tf32: it did not end" in (tmp_path / "report.md").read_text()
