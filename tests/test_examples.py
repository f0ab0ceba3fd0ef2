"""The examples run."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_ablations_make_their_table(tmp_path):
    """Every variant trains: all parametrisations, mappings, kernels, weightings and group sizes."""
    result = subprocess.run(
        [sys.executable, ROOT / "examples/imm_ablations.py", "--seeds", "1", "--images", "256", "--samples", "32", "--out", "table"],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    table = (tmp_path / "table/table.md").read_text().splitlines()
    assert len(table) == 2 + 14 and all(row.count("±") == 3 for row in table[2:])
    assert "nan" not in result.stdout
