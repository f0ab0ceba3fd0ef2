"""`mmgen fid` against clean-fid's `compute_fid`, and the Fréchet distance against SciPy's `sqrtm`, side by side.

    python -m tests.benchmarks.fid            # a network of milliseconds: what is around it counts
    python -m tests.benchmarks.fid --full     # a full-size Inception as well (20 minutes on two cores)

Both programs run as whole processes on the same images, with the same random weights in the published TorchScript's
interface, each with its own defaults. Their order alternates; the least time of the rounds counts, and the largest memory.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from tests.tiny_inception import write_inception

from .measuring import Row, Size, process, show

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


def measure(command: list[str], environment: dict[str, str]) -> tuple[float, float]:
    """(seconds, peak MiB of the process itself) of a command."""
    return process(command, environment)[:2]


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


def end_to_end(place: Path, counts: tuple[int, int], rounds: int, name_: str) -> Row:
    """Seconds and peak memory at counts[0] images a side, and how that grows to counts[1]."""
    for count in counts:
        for name, seed in (("a", 1), ("b", 2)):
            if not (place / f"{name}{count}").exists():
                write_images(place / f"{name}{count}", count, seed)
    results: dict[str, dict[int, list[tuple[float, float]]]] = {"clean-fid": {}, "mmgen": {}}
    for round_ in range(rounds):
        for count in counts if round_ == 0 else counts[:1]:
            for name, (command, environment) in programs(place, count).items():
                with tempfile.TemporaryDirectory() as cache:
                    filled = {key: value.format(cache=cache) for key, value in environment.items()}
                    results[name].setdefault(count, []).append(measure(command, filled))
    least = {name: min(run[0] for run in found[counts[0]]) for name, found in results.items()}
    peak = {name: [max(run[1] for run in found[count]) for count in counts] for name, found in results.items()}
    (theirs, their_growth), (ours, our_growth) = ((least[name], peak[name][1] - peak[name][0]) for name in ("clean-fid", "mmgen"))
    note = f"memory grows by {our_growth:.0f} and {their_growth:.0f} MiB to {counts[1]:,} images"
    what = f"fid, {counts[0]:,} images a side, {name_}"
    return Row(what, "s", ours, theirs, theirs / ours, peak["mmgen"][0], peak["clean-fid"][0], note)


def distance(dim: int, rounds: int = 3) -> Row:
    """Seconds of the Fréchet distance of `dim` features."""
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
    ratio = least["SciPy sqrtm"] / least["mmgen"]
    note = f"relative difference {abs(ours / theirs - 1):.1e}, scipy {scipy.__version__}"
    return Row(f"Fréchet distance of {dim} features", "s", least["mmgen"], least["SciPy sqrtm"], ratio, note=note)


def rows(size: Size, device: str = "cpu", images: int = 2000, dim: int = 2048, rounds: int = 3) -> Iterator[Row]:
    """`device` has no say: both run on the CPU. Needs clean-fid and SciPy."""
    yield distance(dim, rounds)
    for tiny in (True, False) if size == "full" else (True,):
        with tempfile.TemporaryDirectory() as place:
            write_inception(Path(place) / "inception-2015-12-05.pt", tiny=tiny)
            counts = (images, 8 * images) if tiny else (images // 4, images)
            name = "a tiny network" if tiny else "a full-size Inception"
            yield end_to_end(Path(place), counts, rounds if tiny else 1, name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="also with a full-size Inception")
    parser.add_argument("--images", type=int, default=2000, help="images a side; memory is measured up to 8 times as many")
    parser.add_argument("--dim", type=int, default=2048, help="features of the distance")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    size = "full" if options.full else "quick"
    show(rows(size, images=options.images, dim=options.dim, rounds=options.rounds))


if __name__ == "__main__":
    main()
