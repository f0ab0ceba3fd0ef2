"""`mmgen fid` against clean-fid's `compute_fid`, and the Fréchet distance against SciPy's `sqrtm`, side by side.

    python -m tests.benchmarks.fid            # a network of milliseconds: what is around it counts
    python -m tests.benchmarks.fid --full     # a full-size Inception as well (20 minutes on two cores)

Both programs run as whole processes on the same images, with the same random weights in the published TorchScript's
interface, each with its own defaults. Their order alternates; the least time of the rounds counts, and the largest memory.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from tests.tiny_inception import write_inception

ROOT = Path(__file__).parents[2]
CLEAN_FID = """
import sys, torch
from cleanfid import fid
from cleanfid.inception_torchscript import InceptionV3W
a, b, weights = sys.argv[1:]
network = InceptionV3W(weights, download=False, resize_inside=True)
value = fid.compute_fid(a, b, mode="legacy_tensorflow", device=torch.device("cpu"), use_dataparallel=False,
                        custom_feat_extractor=network, verbose=False)
print("figure", value)
"""


def measure(command: list[str], environment: dict[str, str]) -> tuple[float, float, float]:
    """(seconds, peak MiB of the process itself, figure) of a command that prints "figure X" or mmgen's table."""
    start = time.perf_counter()
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(command, cwd=ROOT, env={**os.environ, **environment}, stdout=output, stderr=subprocess.DEVNULL)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        output.seek(0)
        text = output.read()
    if process.returncode:
        raise SystemExit(f"{' '.join(command[:4])} failed: {text}")
    figure = next((float(line.split()[1]) for line in text.splitlines() if line.startswith("figure ")), float("nan"))
    return seconds, usage.ru_maxrss / 1024, figure


def write_images(folder: Path, count: int, seed: int) -> None:
    folder.mkdir()
    random = np.random.default_rng(seed)
    for i in range(count):
        small = random.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(small).resize((32, 32), Image.Resampling.BICUBIC).save(folder / f"{i:05d}.png")


def programs(place: Path, count: int) -> dict[str, tuple[list[str], dict[str, str]]]:
    a, b, weights = place / f"a{count}", place / f"b{count}", place / "inception-2015-12-05.pt"
    ours = [sys.executable, "-m", "mmgen", "fid", str(a), "--ref", str(b), "--inception", str(weights), "--device", "cpu"]
    clean = [sys.executable, "-c", CLEAN_FID, str(a), str(b), str(place)]
    return {"clean-fid": (clean, {}), "mmgen": ([*ours, "--out", str(place / "scores.json")], {"MMGEN_CACHE": "{cache}"})}


def end_to_end(place: Path, counts: tuple[int, int], rounds: int) -> None:
    """Time at counts[0] images a side, and how peak memory grows to counts[1]."""
    for count in counts:
        for name, seed in (("a", 1), ("b", 2)):
            if not (place / f"{name}{count}").exists():
                write_images(place / f"{name}{count}", count, seed)
    results: dict[str, dict[int, list[tuple[float, float, float]]]] = {"clean-fid": {}, "mmgen": {}}
    for round_ in range(rounds):
        for count in counts if round_ == 0 else counts[:1]:
            for name, (command, environment) in programs(place, count).items():
                with tempfile.TemporaryDirectory() as cache:
                    filled = {key: value.format(cache=cache) for key, value in environment.items()}
                    results[name].setdefault(count, []).append(measure(command, filled))
    print(f"{'':12}{'seconds':>10}{'peak MiB':>10}{f'growth to {counts[1]:,}':>18}")
    rows = {}
    for name, found in results.items():
        seconds = min(run[0] for run in found[counts[0]])
        peak, larger = (max(run[1] for run in found[count]) for count in counts)
        rows[name] = seconds, larger - peak
        print(f"{name:12}{seconds:10.1f}{peak:10.0f}{larger - peak:14.0f} MiB")
    (theirs, their_growth), (ours, our_growth) = rows["clean-fid"], rows["mmgen"]
    print(f"ratio: {theirs / ours:.1f} times as fast, {max(our_growth, 0) / their_growth:.3f} of the growth\n")


def distance(dim: int, rounds: int = 3) -> None:
    import scipy.linalg

    from mmgen.metrics.frechet import Gaussian, frechet_distance

    random = torch.Generator().manual_seed(0)
    features = [torch.randn(2 * dim, dim, dtype=torch.float64, generator=random) for _ in range(2)]
    features[1] = features[1] @ torch.randn(dim, dim, dtype=torch.float64, generator=random) / dim**0.5
    a, b = (Gaussian(x.mean(0), torch.cov(x.T)) for x in features)
    times: dict[str, list[float]] = {"SciPy sqrtm": [], "mmgen": []}
    for _ in range(rounds):
        start = time.perf_counter()
        root = scipy.linalg.sqrtm((a.covariance @ b.covariance).numpy())
        theirs = float((a.mean - b.mean).square().sum() + a.covariance.trace() + b.covariance.trace() - 2 * root.real.trace())
        middle = time.perf_counter()
        ours = frechet_distance(a, b)
        times["SciPy sqrtm"].append(middle - start)
        times["mmgen"].append(time.perf_counter() - middle)
    least = {name: min(found) for name, found in times.items()}
    for name, seconds in least.items():
        print(f"{name:12}{seconds:10.2f} s")
    ratio, difference = least["SciPy sqrtm"] / least["mmgen"], abs(ours / theirs - 1)
    print(f"ratio: {ratio:.1f} times as fast, relative difference {difference:.1e} (scipy {scipy.__version__})\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="also with a full-size Inception")
    parser.add_argument("--images", type=int, default=2000, help="images a side; memory is measured up to 8 times as many")
    parser.add_argument("--dim", type=int, default=2048, help="features of the distance")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    print(f"the Fréchet distance of {options.dim} features")
    distance(options.dim)
    for tiny in (True, False) if options.full else (True,):
        print(f"{options.images:,} against {options.images:,} images, {'a tiny network' if tiny else 'a full-size Inception'}")
        with tempfile.TemporaryDirectory() as place:
            write_inception(Path(place) / "inception-2015-12-05.pt", tiny=tiny)
            counts = (options.images, 8 * options.images) if tiny else (options.images // 4, options.images)
            end_to_end(Path(place), counts, options.rounds if tiny else 1)


if __name__ == "__main__":
    main()
