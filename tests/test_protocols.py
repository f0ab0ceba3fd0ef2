"""`mmgen fid --protocol coco30k` and retrieval, against a plain second implementation of each."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from fid_tools import run, scores
from PIL import Image
from tiny_inception import write_inception
from tiny_model import awaken, make_denoiser
from tiny_open_clip import save_open_clip, save_towers
from torchvision.transforms.functional import center_crop
from toy_distill import V

from mmgen.cli.fid import fid
from mmgen.encoders.text import frozen_encoder
from mmgen.errors import ConfigError, DataError, ModelError
from mmgen.metrics import protocols
from mmgen.metrics.agreement import Agreement
from mmgen.metrics.choosing_towers import build_towers
from mmgen.metrics.inception import PUBLISHED, SCRIPT, build_inception
from mmgen.metrics.protocols import COCO30K, square
from mmgen.networks.text import TextSettings

pytestmark = [pytest.mark.filterwarnings("ignore:::torch"), pytest.mark.filterwarnings("ignore:::timm")]
CAPTIONS = ["a bold three", "a thin seven", "an eight", "a nine", "one two", "three four"]


@pytest.fixture(autouse=True)
def environment(tmp_path, monkeypatch):
    monkeypatch.setenv("MMGEN_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(PUBLISHED, SCRIPT, write_inception(tmp_path / SCRIPT))
    monkeypatch.setenv("MMGEN_INCEPTION", str(tmp_path / SCRIPT))


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    pytest.importorskip("open_clip")
    return save_open_clip(tmp_path_factory.mktemp("open_clip") / "tiny")


@pytest.fixture(scope="module")
def towers(tmp_path_factory):
    pytest.importorskip("transformers")
    return save_towers(tmp_path_factory.mktemp("towers"))


def pictures(folder, count, seed, sizes=((40, 40),)):
    """Smooth pictures of the sizes in turn, with captions beside them."""
    folder.mkdir()
    random = np.random.default_rng(seed)
    found = []
    for i in range(count):
        small = Image.fromarray((random.random((5, 5, 3)) * 255).astype(np.uint8))
        small.resize(sizes[i % len(sizes)], Image.Resampling.BICUBIC).save(folder / f"{i:03d}.png")
        found.append(Image.open(folder / f"{i:03d}.png"))
    rows = [json.dumps({"file_name": f"{i:03d}.png", "text": CAPTIONS[i % len(CAPTIONS)]}) for i in range(count)]
    (folder / "metadata.jsonl").write_text("\n".join(rows))
    return found


def as_published(picture):
    """As in DMD2's evaluation: torchvision's centre crop to the short side, then LANCZOS to 256."""
    return center_crop(picture, min(picture.size)).resize((256, 256), Image.LANCZOS)


def plain_fid(generated, real):
    """clean-fid's mode clean of PIL images, by numpy and scipy."""
    network = build_inception("clean", "cpu")

    def features(images):
        resized = [network.prepare(np.asarray(as_published(image))) for image in images]
        return np.concatenate([network.extract(torch.from_numpy(one.transpose(2, 0, 1)[None])).numpy() for one in resized]).astype(np.float64)

    a, b = features(generated), features(real)
    distance = ((a.mean(0) - b.mean(0)) ** 2).sum()
    a, b = ((x - x.mean(0)) / (len(x) - 1) ** 0.5 for x in (a, b))  # covariances a'a and b'b, whose product's root has the trace |ab'|_*
    return float(distance + (a**2).sum() + (b**2).sum() - 2 * np.linalg.svd(a @ b.T, compute_uv=False).sum())


def plain_cosines(folder, images, captions):
    """By open_clip's own functions, one image at a time."""
    import open_clip
    from safetensors.torch import load_file

    model, _, prepare = open_clip.create_model_and_transforms(f"local-dir:{folder}", load_weights=False)
    model.load_state_dict(load_file(folder / "open_clip_model.safetensors"))
    model.eval()
    tokenizer, found = open_clip.get_tokenizer(f"local-dir:{folder}"), []
    with torch.no_grad():
        for image, caption in zip(images, captions, strict=True):
            left = model.encode_image(prepare(as_published(image))[None])
            right = model.encode_text(tokenizer(["A photo depicts " + caption]))
            found.append(float(torch.cosine_similarity(left, right)))
    return found


@pytest.mark.parametrize("size", [(40, 40), (41, 30), (30, 47), (45, 64)])
def test_images_are_cropped_and_resized_as_published(size):
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))
    found = square(np.asarray(picture).transpose(2, 0, 1), 256)
    assert np.array_equal(found.transpose(1, 2, 0), np.asarray(as_published(picture)))


def test_a_folder_of_samples_against_a_second_implementation(clip, tmp_path):
    generated = pictures(tmp_path / "a", 12, 0, [(40, 40), (50, 37)])
    real = pictures(tmp_path / "val2014", 14, 1, [(64, 48), (37, 60)])
    text = run(fid, "a", "--protocol", "coco30k", "--ref", "val2014", "--clip", clip, "--device", "cpu", "--batch-size", 5)
    (entry,) = scores(tmp_path / "a" / "scores.json")
    expected = plain_cosines(clip, generated, [CAPTIONS[i % len(CAPTIONS)] for i in range(12)])
    assert entry["figures"]["fid12"] == pytest.approx(plain_fid(generated, real), rel=1e-3, abs=1e-6)
    assert entry["figures"]["CLIP cosine"] == pytest.approx(np.mean(expected), abs=1e-5) and np.std(expected) > 1e-3
    assert list(entry["figures"]) == ["fid12", "CLIP cosine"]
    for choice in ("protocol: coco30k", "mode clean", "LANCZOS to 256", "'A photo depicts ' before each", "mean cosine, 0 to 1", "val2014"):
        assert choice in text, choice
    assert "take ViT-g-14 laion2b_s12b_b42k, and --clip is tiny: do not compare" in text


@pytest.mark.slow
def test_statistics_of_the_reference_serve_again_and_of_another_crop_do_not(clip, tmp_path):
    pictures(tmp_path / "a", 12, 0)
    pictures(tmp_path / "val2014", 14, 1, [(64, 48), (37, 60)])
    run(fid, "val2014", "--protocol", "coco30k", "--save-stats", "coco.npz", "--device", "cpu")
    common = ["a", "--clip", clip, "--device", "cpu"]
    run(fid, *common, "--protocol", "coco30k", "--ref", "val2014")
    run(fid, *common, "--protocol", "coco30k", "--ref", "coco.npz")
    first, second = scores(tmp_path / "a" / "scores.json")
    assert first["figures"] == pytest.approx(second["figures"], rel=1e-6)
    run(fid, "val2014", "--mode", "clean", "--save-stats", "whole.npz", "--device", "cpu")
    with pytest.raises(DataError, match="images not stated.*give both the same --protocol"):
        run(fid, *common, "--protocol", "coco30k", "--ref", "whole.npz")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    trained = {"config": {"data": {"caption_dropout": 0.1, "text": True}}}
    text = TextSettings(length=12, width=8, depth=1, heads=2)
    place = make_denoiser(tmp_path_factory.mktemp("model") / "m.safetensors", V, channels=3, text=text, captions=CAPTIONS, training=trained)
    return awaken(place)


@pytest.mark.slow
def test_a_model_over_a_sweep_of_guidance(model, clip, tmp_path, monkeypatch):
    """One image a caption, each drawn once; a row and a point for each weight; the samples of the first row by `mmgen sample`."""
    from mmgen.cli.sample import sample
    from mmgen.sampling import drawing

    pictures(tmp_path / "val2014", 14, 1)
    (tmp_path / "captions.txt").write_text("\n".join(CAPTIONS) + "\n")
    drawn = []
    monkeypatch.setattr(drawing, "draw", lambda *given, own=drawing.draw: drawn.extend(given[2]) or own(*given))
    common = ["--steps", 2, "--device", "cpu", "--seed", 3]
    text = run(
        fid, model, "--protocol", "coco30k", "--captions", "captions.txt", "--ref", "val2014", "--clip", clip, "--guidance", "1,3",
        "--out", "s.json", "--batch-size", 4, *common,
    )  # fmt: skip
    first, second = scores(tmp_path / "s.json")
    assert [one["samples"]["guidance"] for one in (first, second)] == [1, 3] and first["figures"] != second["figures"]
    assert [drawn.count(i) for i in range(1, 6)] == [2] * 5  # not drawn again for CLIP; image 0 also shows their shape
    assert first["samples"]["num"] == first["samples"]["prompts"] == 6 and "6 prompts (SHA-256" in text
    assert Image.open(tmp_path / "s.png").size == (640, 480) and "chart: s.png" in text
    run(sample, model, "--prompts", "captions.txt", "--out", "drawn", *common)
    run(fid, "drawn", "--protocol", "coco30k", "--ref", "val2014", "--clip", clip, "--device", "cpu")
    (beside,) = scores(tmp_path / "drawn" / "scores.json")
    assert beside["figures"] == pytest.approx(first["figures"], rel=1e-4)


@pytest.mark.slow
def test_fewer_images_are_named_and_more_than_captions_refused(model, clip, tmp_path, monkeypatch):
    pictures(tmp_path / "val2014", 8, 1)
    (tmp_path / "captions.txt").write_text("\n".join(CAPTIONS) + "\n")
    common = [model, "--protocol", "coco30k", "--captions", "captions.txt", "--ref", "val2014", "--clip", clip, "--device", "cpu", "--out", "s.json"]
    run(fid, *common, "--num", 4, "--steps", 1)
    assert list(scores(tmp_path / "s.json")[0]["figures"]) == ["fid4", "CLIP cosine"]
    with pytest.raises(ConfigError, match="there are 6 captions, and coco30k draws one image for each"):
        run(fid, *common, "--num", 7)
    monkeypatch.setitem(protocols.PROTOCOLS, "coco30k", protocols.replace(COCO30K, num=5))
    run(fid, *common, "--steps", 1)
    assert scores(tmp_path / "s.json")[1]["samples"]["num"] == 5  # the first of the captions


@pytest.mark.parametrize(
    "more, message",
    [
        (["--protocol", "coco5k", "--ref", "x"], "unknown protocol 'coco5k': .*coco30k"),
        (["--protocol", "coco30k", "--clip", "x"], "give --ref val2014/"),
        (["--protocol", "coco30k", "--ref", "x"], "gives FID and CLIP as a pair: give --clip PLACE"),
        (["--protocol", "coco30k", "--ref", "x", "--clip", "x", "--mode", "tf"], "--mode tf is not of the protocol coco30k"),
        (["--protocol", "coco30k", "--ref", "x", "--clip", "x", "--resolution", "64"], "--resolution 64 is not of the protocol"),
        (["--protocol", "coco30k", "--ref", "x", "--clip", "x", "--features", "pixels"], "--features pixels is not of the protocol"),
        (["--metrics", "retrieval"], "need both --metrics clip or retrieval and --clip PLACE"),
        (["--guidance", "1,x"], "--guidance must be numbers separated by commas"),
    ],
)
def test_what_a_protocol_refuses(more, message, tmp_path):
    pictures(tmp_path / "a", 2, 0)
    with pytest.raises(ConfigError, match=message):
        run(fid, "a", *more)


def test_a_model_without_captions_is_refused(model, clip, tmp_path):
    pictures(tmp_path / "val2014", 4, 1)
    with pytest.raises(ConfigError, match="draws an image for each caption: give --captions FILE.txt"):
        run(fid, model, "--protocol", "coco30k", "--ref", "val2014", "--clip", clip, "--device", "cpu")


def test_retrieval_by_towers_of_ones_own(towers, tmp_path):
    images = pictures(tmp_path / "a", 14, 0, [(20, 20), (24, 17)])
    text = run(fid, "a", "--metrics", "retrieval", "--clip", towers, "--device", "cpu", "--batch-size", 3)
    (entry,) = scores(tmp_path / "a" / "scores.json")
    encoder = frozen_encoder(str(towers / "encoder"), 6)
    vectors = [encoder([caption])[2][0, :3].numpy().astype(float) for caption in CAPTIONS]
    ranks, cosines = [], []
    for i, image in enumerate(images):
        colour = np.asarray(image).reshape(-1, 3).mean(0) / 255 - 0.5
        similar = [colour @ vector / np.linalg.norm(colour) / np.linalg.norm(vector) for vector in vectors]
        own = similar[i % len(CAPTIONS)]
        ranks.append(sorted(similar, reverse=True).index(own))
        cosines.append(own)
    expected = {f"R@{k}": np.mean([rank < k for rank in ranks]) for k in (1, 5, 10)}
    assert 0 < expected["R@1"] < 1 and len(set(ranks)) > 3
    assert entry["figures"] == pytest.approx({**expected, "cosine": np.mean(cosines)}, abs=1e-5)
    assert "among 6 different captions, where chance is k / 6" in text and "CLIP" not in text
    with pytest.raises(ConfigError, match="towers of one's own and no CLIP: take --metrics retrieval"):
        run(fid, "a", "--metrics", "clip", "--clip", towers, "--device", "cpu")


def test_equal_captions_do_not_help_a_network_that_sees_nothing():
    blind = Agreement(torch.ones(4, 2) / 2**0.5, torch.ones(6, 2) / 2**0.5, torch.arange(4))
    assert blind.ranks().tolist() == [5] * 4 and blind.retrieval()["R@5"] == 0


def test_processes_share_images_and_captions():
    random = np.random.default_rng(0)
    images, texts = torch.from_numpy(random.normal(size=(5, 3))), torch.from_numpy(random.normal(size=(4, 3))).float()
    captions = ["c", "a", "c", "d", "b"]
    found = Agreement.of([(np.array([3, 4]), images[3:]), (np.array([0, 1, 2]), images[:3])], [texts[::2], texts[1::2]], captions)
    assert torch.equal(found.images, images) and torch.equal(found.captions, texts) and found.own.tolist() == [0, 1, 0, 2, 3]


def test_towers_that_are_not_whole(towers, tmp_path):
    copy = save_towers(tmp_path / "t")
    (copy / "towers.json").write_text("[]")
    with pytest.raises(ModelError, match="towers.json is not"):
        build_towers(str(copy))
    (copy / "towers.json").write_text((towers / "towers.json").read_text())
    torch.jit.script(torch.nn.Identity()).save(str(copy / "images.pt"))
    with pytest.raises(ModelError, match="images.pt returns uint8 .* embeddings are floats"):
        build_towers(str(copy)).images(torch.zeros(2, 3, 8, 8, dtype=torch.uint8))
    (copy / "texts.pt").unlink()
    with pytest.raises(ModelError, match="texts.pt is missing"):
        build_towers(str(copy))
    pytest.importorskip("open_clip")
    with pytest.raises(ModelError, match="holds no open_clip_model.safetensors"):
        build_towers(str(save_open_clip(tmp_path / "empty", weights=False)))
