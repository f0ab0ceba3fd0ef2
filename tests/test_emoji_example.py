"""examples/emoji_text.py: the split, the judge and the table, on a few small pictures."""

from __future__ import annotations

import io
from pathlib import Path

import forks
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from tiny_encoder import make_encoder
from tiny_model import make_denoiser
from toy_distill import V

from mmgen.networks.text import TextSettings

pytest.importorskip("transformers")
pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[1]


def run(*arguments, cwd: Path) -> str:
    result = forks.run(ROOT / "examples/emoji_text.py", *arguments, cwd=cwd, timeout=600, MMGEN_CACHE=str(cwd / "cache"))
    assert result.returncode == 0, result.stderr[-2000:]
    return result.stdout


def captioned(file: Path, count: int) -> None:
    random, rows = np.random.default_rng(0), []
    digits = "zero one two three four five six seven eight nine".split()
    for i in range(count):
        content = io.BytesIO()
        Image.fromarray((random.random((32, 32, 3)) * 255).astype(np.uint8)).save(content, format="PNG")
        rows.append({"image": {"bytes": content.getvalue(), "path": f"{i}.png"}, "caption": f"a {digits[i % 10]} {digits[i // 10]}"})
    pq.write_table(pa.Table.from_pylist(rows), file)


def test_split_judge_and_score(tmp_path):
    captioned(tmp_path / "all.parquet", 90)
    assert run("split", "all.parquet", "emoji", "--held-out", "6", cwd=tmp_path) == "train: 84 images\ntest: 6 images\n"
    prompts = (tmp_path / "emoji/held_out.txt").read_text().splitlines()
    train = pq.read_table(tmp_path / "emoji/train-00000-of-00001.parquet").column("caption").to_pylist()
    assert len(prompts) == 6 and not set(prompts) & set(train)
    make_encoder(tmp_path / "encoder")
    said = run("judge", "emoji", "judge", "--encoder", "encoder", "--steps", "2", cwd=tmp_path)
    assert "real emoji, held out: R@1 " in said and " of 6, cosine " in said
    text = TextSettings(length=12, width=8, depth=1, heads=2)
    trained = {"config": {"data": {"caption_dropout": 0.1, "text": True}}}
    make_denoiser(tmp_path / "m.safetensors", V, channels=3, resolution=32, text=text, captions=train, training=trained)
    table = run("score", "emoji", "judge", "m.safetensors:2:1.5", "--every", "2", "--per-prompt", "30", cwd=tmp_path)
    cells = [cell.strip() for cell in table.splitlines()[-1].strip("|").split("|")]
    folder = tmp_path / "samples" / "m.safetensors-2-w1.5-seed0"
    images = np.stack([np.asarray(Image.open(file)) for file in sorted(folder.glob("*.png"))]).astype(float) / 127.5
    assert cells[:4] == ["m.safetensors", "2", "1.5", "0"] and images.shape == (90, 32, 32, 3)
    assert float(cells[-3]) == pytest.approx(images.var(0).mean(), abs=1e-4)
    within = [images[i::3].var(0, ddof=1).mean() for i in range(3)]  # image i has prompt i mod 3
    assert float(cells[-2]) == pytest.approx(np.mean(within), abs=1e-4) and float(cells[4]) > 0
    assert (folder / "metadata.jsonl").read_text().count(prompts[2]) == 30
