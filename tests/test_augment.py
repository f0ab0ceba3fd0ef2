"""The augmentation: what its geometry does to known images, and how often and how strongly it acts."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from mmgen.system import random
from mmgen.training.augment import AUGMENT_DIM, AugmentSettings, Transform, augment, draw, inverse_matrices, labels, warp
from mmgen.errors import ConfigError

EVERYTHING = AugmentSettings(probability=1.0)
NOTHING = AugmentSettings(probability=0.0, xflip=0)


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def smooth(size: int) -> torch.Tensor:
    """A lop-sided image [1, 1, size, size] that stays smooth when continued by reflection."""
    at = torch.arange(size) * (math.pi / (size - 1))
    return (at.cos()[:, None] + 0.5 * (2 * at).cos() + 0.3 * at.cos()[:, None] * (2 * at).cos())[None, None]


def one_transform(**changes) -> Transform:
    zero = torch.zeros(1)
    drawn = Transform(zero, zero, zero, zero, zero, zero, torch.zeros(1, 2))
    return drawn._replace(**{name: torch.tensor([value]) for name, value in changes.items()})


def apply(image: torch.Tensor, **changes) -> torch.Tensor:
    settings = AugmentSettings()
    return warp(image, inverse_matrices(one_transform(**changes), settings, *image.shape[2:]))


@pytest.mark.parametrize("shape", [(3, 3, 32, 32), (3, 1, 8, 8), (2, 3, 8, 12), (2, 1, 5, 7), (1, 1, 4, 4)])
def test_identity(shape):
    images = noise(*shape)
    torch.testing.assert_close(warp(images, torch.eye(3).expand(shape[0], 3, 3)), images, rtol=0, atol=1e-4)


@pytest.mark.parametrize("turns", [1, 2, 3])
def test_quarter_turns_are_exact(turns):
    image = smooth(32)
    turned = apply(image, rotate=turns * math.pi / 2)
    torch.testing.assert_close(turned, torch.rot90(image, turns, (2, 3)), rtol=0, atol=1e-3)


@pytest.mark.parametrize("size", [8, 32])
def test_whole_pixel_shifts_are_exact_inside(size):
    image = noise(1, 3, size, size)
    unit = 0.125 * size
    moved = apply(image, translate=[2 / unit, -1 / unit])  # two to the right, one up
    torch.testing.assert_close(moved[..., :-1, 2:], image[..., 1:, :-2], rtol=0, atol=1e-4)
    # What comes in is the reflection: column 1 is shown left of column 0.
    torch.testing.assert_close(moved[..., :-1, 1], image[..., 1:, 1], rtol=0, atol=1e-4)


def test_half_pixel_shift_interpolates_the_smooth_and_damps_the_finest():
    image = smooth(32)
    moved = apply(image, translate=[0.5 / 4, 0.0])
    between = (image[..., 1:] + image[..., :-1]) / 2
    torch.testing.assert_close(moved[..., 1:], between, rtol=0, atol=5e-3)
    stripes = torch.tensor([1.0, -1.0]).repeat(16).expand(1, 1, 32, 32).contiguous()
    assert apply(stripes, translate=[0.5 / 4, 0.0]).abs().max() < 0.5


def test_opposite_transforms_undo_each_other():
    image = smooth(32)
    for change in (dict(rotate=0.3), dict(scale=0.5), dict(translate=[0.3, 0.2]), dict(aniso=0.5, aniso_angle=0.7)):
        back = {name: [-v for v in value] if isinstance(value, list) else -value for name, value in change.items()}
        if "aniso_angle" in back:
            back["aniso_angle"] = change["aniso_angle"]
        restored = apply(apply(image, **change), **back)
        torch.testing.assert_close(restored[..., 10:22, 10:22], image[..., 10:22, 10:22], rtol=0, atol=5e-3)


def test_directions():
    """Positive numbers enlarge, stretch along x, move right and down, turn counter-clockwise."""
    at = torch.arange(33.0) - 16
    spot = torch.exp(-((at - 6) ** 2 + at[:, None] ** 2) / 4)[None, None]  # to the right of the centre by 6

    def centre(image: torch.Tensor) -> tuple[float, float]:
        mass = image.sum()
        return float((image * at).sum() / mass), float((image * at[:, None]).sum() / mass)

    unit = 0.125 * 33
    assert centre(apply(spot, scale=2.0)) == pytest.approx((6 * 2**0.4, 0), abs=0.1)
    assert centre(apply(spot, aniso=2.0)) == pytest.approx((6 * 2**0.4, 0), abs=0.1)
    assert centre(apply(spot, aniso=2.0, aniso_angle=math.pi / 2)) == pytest.approx((6 * 2**-0.4, 0), abs=0.1)
    assert centre(apply(spot, translate=[2.5 / unit, 3.25 / unit])) == pytest.approx((8.5, 3.25), abs=0.05)
    angle = math.pi / 6
    turned = centre(apply(spot, rotate=angle))
    assert turned == pytest.approx((6 * math.cos(angle), -6 * math.sin(angle)), abs=0.05)


def test_a_constant_stays_constant():
    drawn = draw(random.keys(0, range(200)), EVERYTHING)
    for size in (8, 32):
        images = torch.full((200, 1, size, size), 0.7)
        warped = warp(images, inverse_matrices(drawn, EVERYTHING, size, size))
        torch.testing.assert_close(warped, images, rtol=0, atol=2e-2)  # bilinear between two polyphase filters
        for w in (5.0, -5.0):  # twice as large and twice as small
            torch.testing.assert_close(apply(images[:1], scale=w), images[:1], rtol=0, atol=2e-2)


def test_matrices_are_composed_in_the_papers_order():
    settings = EVERYTHING
    drawn = draw(random.keys(3, [0]), settings)
    matrix = torch.eye(3)
    s, k = 2 ** float(drawn.scale * 0.2), 2 ** float(drawn.aniso * 0.2)
    tx, ty = (float(t) for t in drawn.translate[0] * 0.125)

    def turn(a: float) -> torch.Tensor:
        return torch.tensor([[math.cos(a), -math.sin(a), 0], [math.sin(a), math.cos(a), 0], [0, 0, 1]])

    matrix = matrix @ torch.diag(torch.tensor([1 / s, 1 / s, 1]))
    matrix = matrix @ turn(float(drawn.rotate))
    r = float(drawn.aniso_angle)
    matrix = matrix @ turn(-r) @ torch.diag(torch.tensor([1 / k, k, 1])) @ turn(r)
    matrix = matrix @ torch.tensor([[1, 0, -tx * 12], [0, 1, -ty * 8], [0, 0, 1]])
    torch.testing.assert_close(inverse_matrices(drawn, settings, 8, 12)[0], matrix, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(5, 3, 8, 8), (5, 1, 32, 32)])
def test_each_image_depends_on_its_own_key_only(shape):
    images, key = noise(*shape), random.keys(7, range(5))
    together, label = augment(images, key, EVERYTHING)
    for i in range(5):
        alone, its_label = augment(images[i : i + 1], key[i : i + 1], EVERYTHING)
        torch.testing.assert_close(alone[0], together[i], rtol=0, atol=1e-5)
        assert torch.equal(its_label[0], label[i])
    assert together.dtype == torch.float32 and label.dtype == torch.float32
    assert together.shape == images.shape and label.shape == (5, AUGMENT_DIM)


def test_untouched_images_have_the_zero_label_and_every_bit():
    images, key = noise(64, 3, 8, 8), random.keys(0, range(64))
    same, label = augment(images, key, NOTHING)
    assert torch.equal(same, images) and not label.any()

    result, label = augment(images, key)
    untouched, flipped = ~label.any(1), label[:, 0].bool() & ~label[:, 1:].any(1)
    assert 5 < untouched.sum() and 5 < flipped.sum()
    assert torch.equal(result[untouched], images[untouched])
    assert torch.equal(result[flipped], images[flipped].flip(3))
    moved = label[:, 2:].any(1)
    assert (result - images)[moved].abs().amax((1, 2, 3)).min() > 0.01


def test_label_says_what_was_drawn():
    drawn = one_transform(scale=1.5, rotate=0.5, aniso=-2.0, aniso_angle=0.25, translate=[0.1, 0.2])
    expected = [0, 0, 1.5, math.cos(0.5) - 1, math.sin(0.5), -2 * math.cos(0.25), -2 * math.sin(0.25), 0.1, 0.2]
    torch.testing.assert_close(labels(drawn), torch.tensor([expected]))


def test_frequencies_of_the_default():
    count = 40_000
    drawn = draw(random.keys(1, range(count)), AugmentSettings())

    def frequency(hit: torch.Tensor) -> float:
        return float(hit.double().mean())

    assert frequency(drawn.xflip == 1) == pytest.approx(0.5, abs=0.01)
    assert frequency(drawn.yflip == 1) == pytest.approx(0.06, abs=0.005)
    translated = drawn.translate[:, 0] != 0
    for hit in (drawn.scale != 0, drawn.rotate != 0, drawn.aniso != 0, translated):
        assert frequency(hit) == pytest.approx(0.12, abs=0.008)
    assert torch.equal(translated, drawn.translate[:, 1] != 0)
    assert frequency(drawn.aniso_angle != 0) == pytest.approx(0.5, abs=0.01)
    hits = torch.stack([drawn.yflip != 0, drawn.scale != 0, drawn.rotate != 0, drawn.aniso != 0, translated]).double()
    assert (torch.corrcoef(hits) - torch.eye(5)).abs().max() < 0.025  # one hit tells nothing of another


def test_sizes_of_what_is_drawn():
    drawn = draw(random.keys(2, range(20_000)), EVERYTHING)
    normals = torch.stack([drawn.scale, drawn.aniso, drawn.translate[:, 0], drawn.translate[:, 1]])
    assert normals.mean(1).abs().max() < 0.03
    torch.testing.assert_close(normals.std(1), torch.ones(4), rtol=0, atol=0.02)
    angles = torch.stack([drawn.rotate, drawn.aniso_angle[drawn.aniso_angle != 0][:9000].repeat(3)[:20_000]])
    assert angles.abs().max() <= math.pi
    torch.testing.assert_close(angles.std(1), torch.full((2,), math.pi / 3**0.5), rtol=0.02, atol=0)
    everything = torch.cat([normals, angles[:1], drawn.xflip[None], drawn.yflip[None]])
    assert (torch.corrcoef(everything) - torch.eye(7)).abs().max() < 0.03


def test_settings_scale_what_is_done():
    key = random.keys(0, range(100))
    drawn = draw(key, dataclasses.replace(EVERYTHING, rotate_max=0.25, aniso_rotate_probability=0, scale=0))
    assert 0.2 * math.pi < drawn.rotate.abs().max() <= 0.25 * math.pi
    assert not drawn.aniso_angle.any() and not drawn.scale.any()
    with pytest.raises(ConfigError, match="scale_std"):
        AugmentSettings(scale_std=-1)
    with pytest.raises(ConfigError, match="probability"):
        AugmentSettings(probability=float("nan"))


def test_nothing_is_read_back_from_the_device():
    # Tensors without storage: any .item(), mask indexing or branch on a value would raise.
    result, label = augment(torch.empty(6, 3, 8, 8, device="meta"), torch.empty(6, dtype=torch.int64, device="meta"))
    assert result.shape == (6, 3, 8, 8) and label.shape == (6, AUGMENT_DIM)


def test_works_under_autocast_and_after_inference_mode():
    images, key = noise(2, 1, 6, 6), random.keys(0, [0, 1])
    with torch.inference_mode():
        expected, _ = augment(images, key, EVERYTHING)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result, _ = augment(images, key, EVERYTHING)
    assert torch.equal(result, expected)
    images.requires_grad_()
    augment(images, key, EVERYTHING)[0].sum().backward()
    assert images.grad.isfinite().all()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gpu_agrees_and_never_waits():
    images, key = noise(16, 3, 32, 32), random.keys(0, range(16))
    expected, label = augment(images, key, EVERYTHING)
    images, key = images.cuda(), key.cuda()
    augment(images, key, EVERYTHING)  # builds the constant matrices
    torch.cuda.set_sync_debug_mode("error")
    try:
        result, its_label = augment(images, key, EVERYTHING)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(its_label.cpu(), label, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(result.cpu(), expected, rtol=0, atol=5e-3)


def test_too_small():
    with pytest.raises(ConfigError, match="4 x 4"):
        warp(torch.zeros(1, 1, 3, 8), torch.eye(3)[None])
