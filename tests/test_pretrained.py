"""DINOv2 and CLIP by transformers, with small random weights that transformers itself saves."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_clip import save_clip

from mmgen.errors import ConfigError, ModelError
from mmgen.system.files import sha256_of
from mmgen.metrics import pretrained
from mmgen.metrics.features import build_extractor
from mmgen.metrics.agreement import Agreement, embedded_images, embedded_texts
from mmgen.metrics.pretrained import build_dinov2, clip_towers

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore:::transformers")

DINO = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, patch_size=14, mlp_ratio=2)


def images(count: int, height: int = 20, width: int = 20) -> torch.Tensor:
    """Smooth coloured blobs uint8 [count, 3, height, width]."""
    coarse = torch.rand(count, 3, 4, 4, generator=torch.Generator().manual_seed(count))
    smooth = torch.nn.functional.interpolate(coarse, size=(height, width), mode="bicubic").clamp(0, 1)
    return (smooth * 255).round().to(torch.uint8)


def save_dinov2(folder: Path, image_size: int, seed: int = 0, **changes) -> Path:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = transformers.Dinov2Model(transformers.Dinov2Config(**{**DINO, **changes}, image_size=image_size))
        for parameter in model.parameters():
            parameter.data.add_(0.1 * torch.randn_like(parameter))  # transformers' own start gives features near zero
    model.save_pretrained(folder)
    return folder


def resized_by_pillow(image: torch.Tensor) -> torch.Tensor:
    """Bicubic with antialias to 224 x 224, per channel in float, float32 [3, 224, 224]."""
    channels = [Image.fromarray(c.numpy().astype(np.float32)).resize((224, 224), Image.BICUBIC) for c in image]
    return torch.from_numpy(np.stack([np.asarray(c) for c in channels]))


@pytest.mark.parametrize("size", [(20, 20), (31, 50), (300, 260)])
def test_dinov2_is_the_class_token_of_images_as_pillow_resizes_them(size, tmp_path):
    """Torch's bicubic with antialias, which EDM2 takes, is Pillow's, with -0.5 for the kernel's parameter."""
    folder = save_dinov2(tmp_path / "small", 224)  # 16 x 16 patches: no position is interpolated
    batch = images(3, *size)
    pixels = torch.stack([resized_by_pillow(image) for image in batch]) / 255
    mean, std = (torch.tensor(x).view(1, 3, 1, 1) for x in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    model = transformers.Dinov2Model.from_pretrained(folder).eval()
    with torch.no_grad():
        expected = model((pixels - mean) / std).last_hidden_state[:, 0]
    found = build_extractor(str(folder)).extract(batch)
    assert found.shape == (3, 32) and (expected - expected.mean(0)).norm() > 0.01 * expected.norm()
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def cubic(distance: np.ndarray) -> np.ndarray:
    """The cubic convolution kernel with the parameter -0.75, which is torch's without antialias."""
    a, x = -0.75, np.abs(distance)
    near = (a + 2) * x**3 - (a + 3) * x**2 + 1
    return np.where(x <= 1, near, np.where(x < 2, a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a, 0))


def test_positions_are_interpolated_as_dinov2_does(tmp_path):
    """Patch i of 16 lies at (i + 0.5) m / 16.1 - 0.5 of the m that were trained: 16.1 and not 16."""
    folder = save_dinov2(tmp_path / "small", 5 * 14)
    model = transformers.Dinov2Model.from_pretrained(folder)
    table = model.embeddings.position_embeddings.detach().double().numpy()[0]
    at = (np.arange(16) + 0.5) * 5 / 16.1 - 0.5
    weights = np.zeros((16, 5))
    for tap in range(-1, 3):
        index = np.floor(at).astype(int) + tap
        np.add.at(weights, (np.arange(16), index.clip(0, 4)), cubic(at - index))
    expected = np.einsum("ia,jb,abd->ijd", weights, weights, table[1:].reshape(5, 5, -1)).reshape(256, -1)
    pretrained._fix_positions(model, 16)
    found = model.embeddings.position_embeddings.detach().numpy()[0]
    np.testing.assert_allclose(found[1:], expected, atol=1e-5)
    np.testing.assert_array_equal(found[0], table[0].astype(np.float32))
    assert build_dinov2(str(folder)).extract(images(2)).shape == (2, 32)


def test_dinov2_names(tmp_path):
    folder = save_dinov2(tmp_path / "mine", 28)
    extractor = build_extractor(str(folder))
    assert (extractor.metric, extractor.title) == ("fd-mine", "FD-mine")
    digest = sha256_of(folder / "model.safetensors")
    assert extractor.protocol == {"features": "dinov2", "network": "mine", "sha256": digest}
    assert extractor.same_size and extractor.colour and extractor.prepare is None and extractor.probabilities is None


def test_vit_l_14_is_called_dinov2(tmp_path, monkeypatch):
    large = dict(hidden_size=1024, num_hidden_layers=24, num_attention_heads=1)
    config = transformers.Dinov2Config(**{**DINO, **large}, image_size=28)

    class FlowModel(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.config = config

    monkeypatch.setattr(pretrained, "_load", lambda *_, **__: (FlowModel(), "0" * 64))
    monkeypatch.setattr(pretrained, "_folder", lambda *_: tmp_path)
    monkeypatch.setattr(pretrained, "_fix_positions", lambda *_: None)
    extractor = build_extractor("dinov2")
    assert (extractor.metric, extractor.title) == ("fd-dinov2", "FD-DINOv2")
    assert extractor.protocol["network"] == "dinov2-large"


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> Path:
    return save_clip(tmp_path_factory.mktemp("clip") / "tiny-clip")


def own_processor(clip: Path, batch: torch.Tensor) -> torch.Tensor:
    """What transformers' preprocessor makes of images as Pillow gives them."""
    processor = transformers.CLIPImageProcessor.from_pretrained(clip)
    pictures = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in batch]
    return torch.as_tensor(np.asarray(processor(pictures, return_tensors="pt")["pixel_values"]))


@pytest.mark.parametrize("size", [(32, 32), (20, 20), (100, 61), (45, 200)])
def test_clip_sees_images_as_its_own_preprocessor_shows_them(size, clip):
    batch = images(4, *size)
    settings, _ = transformers.CLIPImageProcessor.get_image_processor_dict(clip)
    found = pretrained._preprocessor(settings, str(clip), "cpu")(batch)
    expected = own_processor(clip, batch)
    assert found.shape == expected.shape == (4, 3, 32, 32)
    level = 1 / 255 / 0.26  # of 8 bits; Pillow and torchvision round to one also between rows and columns
    assert (found - expected).abs().max() < 2.1 * level and (found - expected).abs().mean() < 0.25 * level


def test_clip_score(clip):
    batch, captions = images(6, 45, 60), ["a red square", "blue dot", "a", "dot", "red red red", "a blue square"]
    towers = clip_towers(str(clip))
    embedded = embedded_images(towers, list(batch.numpy()))
    found = Agreement(embedded, embedded_texts(towers, captions), torch.arange(6))
    model = transformers.CLIPModel.from_pretrained(clip).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(clip)
    expected = []
    for image, caption in zip(own_processor(clip, batch), captions, strict=True):  # one by one: no padding
        tokens = tokenizer([caption], truncation=True, max_length=10, return_tensors="pt")
        with torch.no_grad():
            output = model(pixel_values=image[None], **tokens)
        expected.append(float(output.image_embeds[0] @ output.text_embeds[0]))  # of length one
    np.testing.assert_allclose(found.cosines(), expected, atol=0.003)
    assert found.clip_score() == pytest.approx(100 * np.mean(np.maximum(expected, 0)), abs=0.3) and np.std(expected) > 0.01


def test_long_captions_are_cut(clip):
    towers = clip_towers(str(clip))
    torch.testing.assert_close(towers.texts(["red " * 50]), towers.texts(["red " * 60]))
    assert towers.texts(["red"]).shape == (1, towers.width)


def test_clip_names(clip):
    score = clip_towers(str(clip))
    assert (score.name, score.sha256) == ("tiny-clip", sha256_of(clip / "model.safetensors"))


def test_models_of_another_kind(clip, tmp_path):
    with pytest.raises(ModelError, match="is a model of the type 'clip', not 'dinov2'"):
        build_extractor(str(clip))
    with pytest.raises(ModelError, match="is a model of the type 'dinov2', not 'clip'"):
        clip_towers(str(save_dinov2(tmp_path / "small", 28)))


def test_folders_that_lack_something(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match="empty holds no config.json"):
        build_extractor(str(tmp_path / "empty"))
    folder = save_dinov2(tmp_path / "small", 28)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match="small holds no model.safetensors"):
        build_extractor(str(folder))


def test_weights_that_do_not_fit(tmp_path):
    from safetensors.torch import load_file, save_file

    folder = save_dinov2(tmp_path / "small", 28)
    weights = load_file(folder / "model.safetensors")
    del weights["layernorm.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match="does not fit its config.json: layernorm.weight missing"):
        build_extractor(str(folder))
    (folder / "model.safetensors").write_bytes(b"\x10" * 100)
    with pytest.raises(ModelError, match="cannot load .*small"):
        build_extractor(str(folder))


def test_without_a_network(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise OSError("Name or service not known")

    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
    with pytest.raises(ModelError, match=r"cannot be asked for it \(Name or service not known\): run `hf download nobody/no"):
        build_extractor("nobody/nothing")


def test_without_transformers(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ConfigError, match=r"pip install 'mmgen\[clip\]'"):
        clip_towers("openai/clip-vit-base-patch16")
