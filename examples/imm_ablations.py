"""The paper's sanity checks of IMM, in small: what each part of the loss is worth, on digits, over several seeds.

    python examples/imm_ablations.py --out runs/ablations            # about twenty minutes on one core
    python examples/imm_ablations.py --seeds 1 --images 5000         # a first look

Each variant changes one setting of a small version of the preset digits-imm (arXiv:2503.07565, figures 5 and 11, tables 3 and
4). The table has FD-pixels after 1, 2 and 8 steps: the mean over seeds, and half the distance between the lowest and the highest.
Runs that are there are not repeated.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import mmgen

STEPS = (1, 2, 8)
SMALL = {
    "flow.parametrization": "simple_edm",
    "network.model_channels": 16, "network.channel_mult": [1, 1], "train.batch_size": 64, "train.ema_betas": [0.99],
    "loss.k": 10.0, "run.eval_steps": list(STEPS), "run.eval_every": 10**9, "run.preview_every": 10**9,
    "run.checkpoint_every": 10**9, "run.log_every": 100,
}  # fmt: skip
VARIANTS = {
    "baseline: M = 4, Simple-EDM, eta, full weight": {},
    "M = 1 (a consistency model)": {"loss.group_size": 1},
    "M = 2": {"loss.group_size": 2},
    "weight 1": {"loss.weighting": "none"},
    "weight ELBO": {"loss.weighting": "elbo"},
    "weight ELBO x alpha": {"loss.weighting": "elbo_alpha"},
    "identity parametrisation": {"flow.parametrization": "identity"},
    "Euler-FM parametrisation": {"flow.parametrization": "euler_fm"},
    "cosine schedule": {"flow.schedule": "vp_cosine"},
    "r constant in t": {"loss.mapping": "t"},
    "r constant in log-SNR": {"loss.mapping": "log_snr"},
    "r constant in 1/eta": {"loss.mapping": "inverse_eta"},
    "RBF kernel": {"loss.kernel": "rbf"},
    "target sees undropped labels": {"loss.target_labels": "undropped"},
}  # fmt: skip


def run(name: str, changes: dict, seed: int, images: int, samples: int, out: Path) -> dict[str, float]:
    """FD-pixels by number of steps. Trains the run in `out`, or finds it finished there."""
    settings = {**SMALL, **changes, "train.seed": seed, "train.max_images": images, "run.eval_num": samples}
    folder = out / f"{''.join(c if c.isalnum() else '-' for c in name)}-{seed}"
    done = mmgen.train_imm(preset="digits-imm", settings=settings, out=folder, progress=False, device="cpu")
    if done.signal is not None:  # it was told to stop: half a training is no result
        raise SystemExit(128 + done.signal)
    return done.results["values"]


def spread(values: list[float]) -> str:
    mean, half = sum(values) / len(values), (max(values) - min(values)) / 2
    return f"{mean:.2f} ± {half:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, default=3, help="runs per variant (default 3)")
    parser.add_argument("--images", type=int, default=19_200, help="images per run (default 19,200: 300 steps)")
    parser.add_argument("--samples", type=int, default=1797, help="samples per measurement (default 1,797)")
    parser.add_argument("--out", type=Path, default=Path("runs/ablations"), help="folder of the runs and table.md")
    options = parser.parse_args()
    rows = ["| variant | 1 step | 2 steps | 8 steps |", "|---|---|---|---|"]
    print("\n".join(rows), flush=True)
    for name, changes in VARIANTS.items():
        found = [run(name, changes, seed, options.images, options.samples, options.out) for seed in range(options.seeds)]
        rows.append(f"| {name} | " + " | ".join(spread([fd[str(count)] for fd in found]) for count in STEPS) + " |")
        print(rows[-1], flush=True)
    (options.out / "table.md").write_text("\n".join(rows) + "\n")


if __name__ == "__main__":
    main()
