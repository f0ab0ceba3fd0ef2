"""Data sets of latents: what is written, against diffusers called directly; resuming, several processes, refusals."""

import hashlib
import json
import multiprocessing
import signal
import sys
import time
from pathlib import Path

import forks
import numpy as np
import pytest
import torch
from PIL import Image
from tiny_vae import write_images, write_vae

from mmgen import data
from mmgen.data import encoding
from mmgen.data.encoding import EncodingSettings, encode_source
from mmgen.data.image_source import ImageSource
from mmgen.data.latents import Rows, load_latents
from mmgen.data.resolve import find_latents, resolve
from mmgen.errors import ConfigError, DataError, MmgenError
from mmgen.encoders.vae import IMM_MEAN, IMM_STD, load_vae

ROOT = Path(__file__).parents[1]
RUN = "from typer import run; from mmgen.cli.cache_latents import cache_latents as f; run(f)"
COUNTED = """import atexit; from accelerate import PartialState
atexit.register(lambda: print(f"one of {PartialState._shared_state['num_processes']}", flush=True))
""" + RUN


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """images/ of three classes, vae/ and tiny/."""
    folder = tmp_path_factory.mktemp("latents")
    write_images(folder / "images")
    write_vae(folder / "vae")
    write_vae(folder / "tiny", "tiny")
    return folder


def encode(place, out, vae="vae", images="images", name=None, notes=None, **settings):
    source = resolve(str(place / images)) if isinstance(images, str) else images
    note = [].append if notes is None else notes.append
    return encode_source(
        source, load_vae(str(place / vae)), out, EncodingSettings(**settings), name=name or str(place / "images"), note=note
    )


def pixels_of(place):
    files = sorted((place / "images").rglob("*.png"))
    return torch.from_numpy(np.stack([np.asarray(Image.open(f)).transpose(2, 0, 1) for f in files]))


def digests(folder):
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.rglob("*.*"))}


def test_rows_are_the_arrays_one_after_the_other():
    random = np.random.default_rng(0)
    arrays = [random.normal(size=(n, 2, 3)).astype(np.float32) for n in (4, 0, 1, 7)]
    rows, whole = Rows(arrays), np.concatenate(arrays)
    assert len(rows) == 12 and rows.shape == (12, 2, 3) and rows.dtype == np.float32
    chosen = random.integers(0, 12, 40)
    assert np.array_equal(rows[chosen], whole[chosen])
    assert rows[np.array([], dtype=np.int64)].shape == (0, 2, 3)


def test_moments_are_those_of_diffusers(place, tmp_path):
    from diffusers import AutoencoderKL

    notes = []
    record = encode(place, tmp_path / "out", dtype="float32", batch_size=7, notes=notes)
    found = load_latents(tmp_path / "out", "word")
    images = pixels_of(place)
    with torch.no_grad():
        own = AutoencoderKL.from_pretrained(place / "vae").encode(images / 127.5 - 1).latent_dist
    moments = found.moments[np.arange(120)]
    assert moments.shape == (120, 8, 8, 8) and moments.dtype == np.float32
    torch.testing.assert_close(torch.from_numpy(moments), torch.cat([own.mean, own.std], dim=1), rtol=1e-4, atol=1e-5)
    assert found.labels.tolist() == [0] * 40 + [1] * 40 + [2] * 40
    assert (found.class_names, found.class_counts, found.resolution, found.channels) == (["a", "b", "c"], [40] * 3, 8, 4)
    assert found.name == "word" and found.latents.vae == str(place / "vae") and found.latents.resolution == 16
    # measured: mean and deviation of drawn latents, in closed form from all moments
    mean, std = own.mean.double(), own.std.double()
    expected = (mean.square() + std.square()).mean((0, 2, 3)) - mean.mean((0, 2, 3)).square()
    assert found.latents.mean == pytest.approx(mean.mean((0, 2, 3)).tolist(), rel=1e-4)
    assert found.latents.std == pytest.approx(expected.sqrt().tolist(), rel=1e-4)
    assert found.latents.target_std == 0.5 and record["normalisation"] == "measure"
    # and the error of going there and back
    with torch.no_grad():
        back = AutoencoderKL.from_pretrained(place / "vae").decode(own.mean).sample
    back = (back * 127.5 + 128).clamp(0, 255).floor()
    error = (back - images).double().square().mean().sqrt()
    assert record["reconstruction"]["images"] == 120
    assert record["reconstruction"]["rmse"] == pytest.approx(float(error), rel=1e-3)
    assert any("grey levels RMS" in note for note in notes)
    assert not (tmp_path / "out/latents-unfinished.json").exists()


def test_half_precision_rounds_by_what_it_says(place, tmp_path):
    encode(place, tmp_path / "exact", dtype="float32")
    record = encode(place, tmp_path / "half")
    rows = np.arange(120)
    exact, half = (load_latents(tmp_path / name).moments[rows][:, :4] for name in ("exact", "half"))
    assert half.dtype == np.float16 and np.array_equal(half, exact.astype(np.float16))
    spread = np.sqrt(exact.var(axis=(0, 2, 3), dtype=np.float64).mean())
    error = np.sqrt(((half - exact.astype(np.float64)) ** 2).mean()) / spread
    assert record["reconstruction"]["rounding"] == pytest.approx(error, rel=1e-4) and 0 < error < 1e-3


def test_a_tiny_vae_has_means_alone(place, tmp_path):
    encode(place, tmp_path / "out", vae="tiny", dtype="float32")
    found = load_latents(tmp_path / "out")
    assert found.moments.shape == (120, 4, 8, 8) and found.latents.kind == "tiny"
    mean = load_vae(str(place / "tiny")).encode(pixels_of(place))[0]
    torch.testing.assert_close(torch.from_numpy(found.moments[np.arange(120)]), mean, rtol=1e-4, atol=1e-5)
    assert found.latents.std == pytest.approx(mean.std((0, 2, 3), correction=0).tolist(), rel=1e-4)


def test_mirror_images_follow_their_images(place, tmp_path):
    encode(place, tmp_path / "out", xflip=True, dtype="float32", batch_size=9)
    found = load_latents(tmp_path / "out")
    images = pixels_of(place)
    vae = load_vae(str(place / "vae"))
    for step, pixels in ((0, images), (1, images.flip(3))):
        mean = vae.encode(pixels)[0].numpy()
        assert np.allclose(found.moments[np.arange(step, 240, 2)][:, :4], mean, rtol=1e-4, atol=1e-5)
    assert found.labels.tolist() == np.repeat([0, 1, 2], 80).tolist()


def test_imms_constants_are_for_its_vae_by_name_or_on_demand(place, tmp_path):
    notes = []
    record = encode(place, tmp_path / "a", normalisation="imm", notes=notes)
    assert tuple(record["latents"]["mean"]) == IMM_MEAN and tuple(record["latents"]["std"]) == IMM_STD
    assert any("measure fits" in note for note in notes)  # a random VAE's latents are far from standard deviation 0.5
    (tmp_path / "sd-vae-ft-ema").symlink_to(place / "vae")
    assert load_vae(str(tmp_path / "sd-vae-ft-ema")).is_imm and not load_vae(str(place / "vae")).is_imm
    with pytest.raises(ConfigError, match="use measure"):
        encode(place, tmp_path / "b", vae="tiny", normalisation="imm")


def test_images_are_cropped_as_adm_does(place, tmp_path):
    record = encode(place, tmp_path / "out", resolution=8, dtype="float32")
    from mmgen.data.decode import centre_crop

    first = np.asarray(centre_crop(Image.open(place / "images/a/000.png"), 8)).transpose(2, 0, 1)
    mean, _ = load_vae(str(place / "vae")).encode(torch.from_numpy(first[None].copy()))
    torch.testing.assert_close(
        torch.from_numpy(load_latents(tmp_path / "out").moments[np.array([0])][:, :4]), mean, rtol=1e-4, atol=1e-5
    )
    assert (record["size"], record["resolution"]) == (4, 8)
    with pytest.raises(ConfigError, match="multiple of 2"):
        encode(place, tmp_path / "odd", resolution=15)


def test_corrupt_images_are_named_or_left_out_with_their_labels(place, tmp_path):
    write_images(tmp_path / "images", per_class=70)
    (tmp_path / "images/a/003.png").write_bytes(b"no image")
    (tmp_path / "images/c/069.png").write_bytes(b"")
    source = resolve(str(tmp_path / "images"))
    with pytest.raises(DataError, match=r"a/003.png cannot be read.*--on-corrupt skip"):
        encode(place, tmp_path / "stop", images=source)
    record = encode(place, tmp_path / "skip", images=source, on_corrupt="skip")
    assert [Path(name).name for name in record["skipped"]] == ["003.png", "069.png"]
    found = load_latents(tmp_path / "skip")
    assert found.class_counts == [69, 70, 69] and len(found) == 208
    assert record["shards"] == [63, 64, 64, 17]
    assert "2 that cannot be read left out" in found.description
    whole = encode(place, tmp_path / "whole", images=resolve(str(write_images(tmp_path / "good", per_class=70))))
    rows = np.delete(np.arange(210), [3, 209])
    assert np.allclose(found.moments[np.arange(208)], load_latents(tmp_path / "whole").moments[rows], atol=1e-3)
    assert whole["number"] == 210


def test_nothing_readable_is_an_error(place, tmp_path):
    (tmp_path / "images").mkdir()
    for i in range(3):
        (tmp_path / f"images/{i}.png").write_bytes(b"no image")
    with pytest.raises(DataError, match="none of the 3 images can be read"):
        encode(place, tmp_path / "out", images=resolve(str(tmp_path / "images")), on_corrupt="skip", resolution=16)


def test_the_same_command_again_does_nothing_and_another_is_refused(place, tmp_path):
    record = encode(place, tmp_path / "out")
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*.*")}
    assert encode(place, tmp_path / "out", name="elsewhere") == record
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*.*")} == before
    for changes, message in (
        ({"dtype": "float32"}, "dtype = float16, not float32"),
        ({"xflip": True}, "xflip = False, not True"),
        ({"vae": "tiny"}, "latents of another VAE"),
        ({"normalisation": "imm"}, "normalisation = measure, not imm"),
        ({"resolution": 8}, "resolution = 16, not 8"),
        ({"images": resolve(str(write_images(tmp_path / "others")))}, "source = other images"),
    ):
        with pytest.raises(DataError, match=message):
            encode(place, tmp_path / "out", **changes)
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis/main.tex").write_text("mine")
    with pytest.raises(DataError, match="something else than latents"):
        encode(place, tmp_path / "thesis")


def test_impossible_settings():
    for changes, message in (
        ({"dtype": "float8"}, "dtype"),
        ({"normalisation": "im"}, "did you mean 'imm'"),
        ({"batch_size": 0}, "at least 1"),
    ):
        with pytest.raises(ConfigError, match=message):
            EncodingSettings(**changes).check()


def test_full_disk_is_said_before_and_while_writing(place, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(encoding.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000}))
        with pytest.raises(DataError, match=r"needs 0.0 GB more, and 0.0 GB are free"):
            encode(place, tmp_path / "out")

    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(encoding, "save_array", full)
        with pytest.raises(MmgenError, match="cannot write .*000000.npy: No space left on device"):
            encode(place, tmp_path / "out")
    assert not list((tmp_path / "out").rglob(".tmp-*"))
    assert encode(place, tmp_path / "out")["number"] == 120  # and continues


def test_values_that_are_not_finite_or_too_large_stop(place, tmp_path, monkeypatch):
    vae = load_vae(str(place / "vae"))
    for factor, dtype in ((float("nan"), "float32"), (1e30, "float16")):
        broken = type(vae)(**{**vae.__dict__, "encode": lambda x, f=factor: tuple(f * part for part in vae.encode(x))})
        with pytest.raises(DataError, match=r"not finite, or beyond .*000.png"):
            encode_source(resolve(str(place / "images")), broken, tmp_path / f"{dtype}", EncodingSettings(dtype=dtype), name="x")


def test_shards_are_a_function_of_the_number_alone_and_never_too_many_open_files():
    for length in (1, 64, 65, 3781, 1_281_167):
        shards = encoding._shards(length)
        assert len(shards) <= 256 and [i for s in shards for i in (s.start, s.stop)][-1] == length
        assert sum(map(len, shards)) == length and shards[0].start == 0
        assert all(a.stop == b.start for a, b in zip(shards, shards[1:]))
    assert len(encoding._shards(1_281_167)[0]) == 5056


def test_few_images_are_in_memory_at_once(place, tmp_path, monkeypatch):
    """How far reading runs ahead of the VAE, however long the data set is."""
    monkeypatch.setattr(encoding, "_CHUNK_BYTES", 16 * 3 * 16 * 16)
    read, encoded, ahead = [0], [0], [0]
    picture = Image.open(place / "images/a/000.png").copy()

    def one(i):
        read[0] += 1
        return picture

    vae = load_vae(str(place / "vae"))

    def watching(images):
        ahead[0] = max(ahead[0], read[0] - encoded[0])
        encoded[0] += len(images)
        return vae.encode(images)

    source = ImageSource("3,000 images", str, 3000, one, None, None, "f")
    with monkeypatch.context() as patch:
        patch.setattr(encoding, "_try", lambda *arguments: {})
        watched = type(vae)(**{**vae.__dict__, "encode": watching})
        encode_source(source, watched, tmp_path / "out", EncodingSettings(batch_size=16), name="x")
    assert encoded[0] == 3000 and ahead[0] <= 3 * 16 + 16


def test_latents_are_found_and_images_refused(place, tmp_path, monkeypatch):
    encode(place, tmp_path / "set", name="imagenet/")
    monkeypatch.setenv("MMGEN_DATA_DIR", str(tmp_path))
    assert find_latents("set") == find_latents(str(tmp_path / "set")) == tmp_path / "set"
    assert find_latents("digits") is None and find_latents("cifar10") is None and find_latents(str(place / "images")) is None
    with pytest.raises(DataError, match="holds latents, not images: give the images that they came from, imagenet/ at 16 pixels"):
        data.load("set")


def test_an_unfinished_or_damaged_folder_is_refused(place, tmp_path):
    out = tmp_path / "out"
    record = encode(place, out)
    shard = out / "shards/000001.npy"
    content = shard.read_bytes()
    for change, message in (
        (lambda: shard.write_bytes(content[:-10]), "000001.npy is damaged"),
        (shard.unlink, "000001.npy is missing"),
        (lambda: np.save(shard, np.zeros((3, 8, 8, 8), np.float16)), r"holds float16 \[3, 8, 8, 8\]"),
        (lambda: (out / "latents.json").write_text("{"), "latents.json is damaged"),
        (lambda: (out / "latents.json").write_text(json.dumps({**record, "format": 99})), "install a newer mmgen"),
    ):
        change()
        with pytest.raises(DataError, match=message):
            load_latents(out)
        shard.write_bytes(content)
    (out / "latents.json").unlink()
    (out / "latents-unfinished.json").write_text("{}")
    assert find_latents(str(out)) == out
    with pytest.raises(DataError, match="not whole yet"):
        load_latents(out)


def test_the_fingerprint_is_that_of_the_content(place, tmp_path):
    first = encode(place, tmp_path / "a")["fingerprint"]
    assert encode(place, tmp_path / "b", name="elsewhere")["fingerprint"] == first
    assert encode(place, tmp_path / "c", normalisation="imm")["fingerprint"] != first
    assert encode(place, tmp_path / "d", dtype="float32")["fingerprint"] != first


def test_parquet(place, tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    files = sorted((place / "images").rglob("*.png"))
    column = pa.array([{"bytes": f.read_bytes(), "path": None} for f in files])
    (tmp_path / "set").mkdir()
    table = pa.table({"image": column, "label": ["abc".index(f.parent.name) for f in files]})
    pq.write_table(table, tmp_path / "set/train-00000-of-00001.parquet", row_group_size=50)
    encode(place, tmp_path / "out", images=resolve(str(tmp_path / "set")))
    encode(place, tmp_path / "folders")
    rows = np.arange(120)
    assert np.array_equal(load_latents(tmp_path / "out").moments[rows], load_latents(tmp_path / "folders").moments[rows])
    assert load_latents(tmp_path / "out").labels.tolist() == load_latents(tmp_path / "folders").labels.tolist()


# ------------------------------------------------------------ whole processes


def cache(place, out, *program):
    arguments = "--data", "images", "--vae", "vae", "--out", out, "--batch-size", "5", "--device", "cpu"
    done = forks.run(*program, *arguments, cwd=place)
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """Enough images for nine shards, and what one process makes of them."""
    folder = tmp_path_factory.mktemp("many")
    write_images(folder / "images", per_class=190)
    write_vae(folder / "vae")
    stdout, stderr = cache(folder, folder / "one", "-c", RUN)
    assert "PSNR" in stdout and "measured normalisation" in stdout and "grey levels" in stderr
    assert json.loads(stderr.splitlines()[-1])["images"] == 570
    return folder


def in_a_child(out):
    """The command's work in a forked process, which spares loading diffusers. One thread: a fork has no OpenMP pool."""

    def work():
        torch.set_num_threads(1)
        encode_source(resolve("images"), load_vae("vae"), out, EncodingSettings(batch_size=5), name="images", reading={"split": "train"})

    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    return process


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="forks")
def test_killed_at_any_moment_and_resumed_is_the_same_bit_for_bit(many, tmp_path, monkeypatch):
    monkeypatch.chdir(many)
    load_vae("vae")
    out = tmp_path / "out"
    for moment in range(6):
        process = in_a_child(out)
        while process.is_alive() and len(list(out.glob("shards/0*.npy"))) < moment and moment:
            time.sleep(0.001)
        time.sleep(0.004 * moment)
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
    assert 5 <= len(list(out.glob("shards/0*.npy"))) < 9
    last = in_a_child(out)
    last.join()
    assert last.exitcode == 0 and digests(out) == digests(many / "one")


@pytest.mark.slow
def test_two_processes_write_the_files_of_one(many, tmp_path):
    (tmp_path / "run.py").write_text(COUNTED)
    stdout, _ = cache(many, tmp_path / "two", *forks.TWO, tmp_path / "run.py")
    assert stdout.count("one of 2") == 2 and stdout.count("PSNR") == 1  # one process speaks
    assert digests(tmp_path / "two") == digests(many / "one")
