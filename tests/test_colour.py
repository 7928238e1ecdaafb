"""Colours of views: each change against torchvision's or Pillow's on the same numbers, in units of 0..255."""
import itertools

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as tv
from PIL import Image, ImageFilter, ImageOps

from images.augment import CHANGES, Colours, blur, blur_kernels, denormalize, draw_colours, grey, hue, recolour

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
NONE = dict(jitter=(0, 0, 0, 0), p_jitter=0, p_grey=0)


def picture(height=64, width=80, seed=0):
    """Smooth colours, edges, some noise, and every corner of the colour cube."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8))
    array = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)).copy()
    array[height // 2:, width // 2:] = rng.integers(0, 256, 3)
    array[:8, :8] = rng.integers(0, 256, (8, 8, 3))
    array[-1, -8:] = [[255 * (k >> c & 1) for c in range(3)] for k in range(8)]
    return Image.fromarray(array)


def tensor(*pictures):
    return torch.stack([torch.from_numpy(np.array(p)).permute(2, 0, 1) for p in pictures])


def number(value):
    return torch.full((1, 1, 1, 1), float(value))


def far(ours, theirs):
    return (ours - torch.as_tensor(theirs)).abs()


@pytest.mark.parametrize("k, change, factors", [
    (0, tv.adjust_brightness, (0.6, 0.83, 1, 1.4)), (1, tv.adjust_contrast, (0.6, 0.95, 1, 1.4)),
    (2, tv.adjust_saturation, (0, 0.8, 1, 1.2))])
def test_factors_are_pillows(k, change, factors):
    """Pillow cuts the result off to whole numbers, and the grey it mixes in is rounded: less than 1 and a half."""
    for factor in factors:
        p = picture()
        ours = CHANGES[k](tensor(p).float(), number(factor))
        assert far(ours, tensor(change(p, factor))).max() <= 1.3
        assert ours.min() >= 0 and ours.max() <= 255


@pytest.mark.parametrize("turn", [-1 / 6, -0.1, -0.03, 0, 1e-3, 0.08, 0.1, 1 / 6])
def test_hue_is_torchvisions(turn):
    """Against the conversion to HSV and back: in floats the same to rounding; in bytes Pillow rounds hue and saturation
    and is off by 1.5 on average, 14 at most."""
    p = picture(seed=1)
    cube = torch.tensor(list(itertools.product((0, 1, 100, 101, 254, 255), repeat=3))).T.reshape(1, 3, 1, -1).float()
    for x in (tensor(p).float(), cube):
        assert far(hue(x.clone(), number(turn)), 255 * tv.adjust_hue(x / 255, turn)).max() < 1e-3
    difference = far(hue(tensor(p).float(), number(turn)), tensor(tv.adjust_hue(p, turn)))
    assert difference.mean() < 1.6 and difference.max() <= 14


def test_grey_is_pillows():
    p = picture()
    assert far(grey(tensor(p).float())[0, 0], np.asarray(p.convert("L")).astype(np.float32)).max() <= 0.51


@pytest.mark.parametrize("radius", [0.1, 0.35, 0.8, 1.0, 1.4, 1.5, 1.75, 2.0])
def test_blur_is_pillows(radius):
    """Pillow rounds after each of six boxes: 3. Above 1.4 the outermost six pixels are others, at a hard edge by 20."""
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (70, 96, 3), np.uint8))
    for p in (picture(), picture(48, 33), noise):
        x = tensor(p).float()
        ours = blur(x, blur_kernels(torch.tensor([radius])).view(1, 13, 1, 1))
        difference = far(ours, tensor(p.filter(ImageFilter.GaussianBlur(radius))))
        assert ours.shape == x.shape and difference[..., 6:-6, 6:-6].max() <= 3 and difference.mean() < 1.2
        assert difference.max() <= (3 if radius <= 1.4 else 20)


def test_blur_has_the_deviation_it_is_asked_for():
    """Three boxes are close to a Gaussian: the variance is exact, so is the sum, and edges keep a constant image."""
    radius = torch.tensor([0.1, 0.5, 1.0, 1.3, 1.5, 2.0], dtype=torch.float64)
    kernels, place = blur_kernels(radius), torch.arange(-6, 7)
    torch.testing.assert_close(kernels.sum(1), torch.ones(6).double())
    torch.testing.assert_close((kernels * place ** 2).sum(1), radius ** 2)
    torch.testing.assert_close(kernels, kernels.flip(1))
    flat = torch.full((6, 3, 20, 50), 77.0).double()
    torch.testing.assert_close(blur(flat, kernels.view(6, 13, 1, 1)), flat)


def test_blur_against_a_plain_convolution():
    x, kernels = torch.rand(3, 2, 40, 70).double(), blur_kernels(torch.tensor([0.4, 1.2, 2.0]).double())
    ours = blur(x, kernels.view(3, 13, 1, 1))
    mirrored = np.pad(x.numpy(), ((0, 0), (0, 0), (6, 6), (6, 6)), mode="symmetric")
    for one, padded, kernel in zip(ours, mirrored, kernels):
        square = (kernel[:, None] * kernel).view(1, 1, 13, 13)
        plain = torch.nn.functional.conv2d(torch.from_numpy(padded).unsqueeze(1), square)[:, 0]
        torch.testing.assert_close(one, plain)


def test_solarize_is_pillows():
    ramp = Image.fromarray(np.arange(768, dtype=np.uint8).reshape(16, 16, 3))
    colours = draw_colours(1, **NONE, p_solarize=1.0)
    ours = denormalize(recolour(tensor(ramp), colours, MEAN, STD), MEAN, STD)
    assert torch.equal(ours, tensor(ImageOps.solarize(ramp)))


def pillow(p, colours, i, lite):
    """The published pipelines: MoCo-v3's order, or MAE-Lite's, which blurs before it makes grey."""
    for k in colours.order[i].tolist():
        if k >= 0:
            change = (tv.adjust_brightness, tv.adjust_contrast, tv.adjust_saturation, tv.adjust_hue)[k]
            p = change(p, colours.factors[i, k].item())
    for what in ("blur", "grey") if lite else ("grey", "blur"):
        if what == "grey" and colours.grey[i]:
            p = tv.to_grayscale(p, 3)
        if what == "blur" and colours.radius[i] > 0:
            p = p.filter(ImageFilter.GaussianBlur(colours.radius[i].item()))
    return ImageOps.solarize(p) if colours.solarize[i] else p


@pytest.mark.parametrize("lite", [False, True])
def test_whole_views_are_pillows(lite):
    """All changes as drawn, in both published orders: Pillow's roundings add up to 1.3 of 255 on average."""
    torch.manual_seed(0)
    pictures = [picture(seed=i) for i in range(40)]
    colours = draw_colours(40, p_grey=0.3, p_blur=0.5, p_solarize=0.3)
    out = recolour(tensor(*pictures), colours, MEAN, STD)
    ours = (out * torch.tensor(STD).view(3, 1, 1) + torch.tensor(MEAN).view(3, 1, 1)) * 255
    difference = far(ours, tensor(*(pillow(p, colours, i, lite) for i, p in enumerate(pictures))))
    assert difference.mean() < 1.5 and difference.mean((1, 2, 3)).max() < 3.5 and difference.max() < 20
    assert min(colours.grey.sum(), (colours.radius > 0).sum(), colours.solarize.sum()) > 5


def test_neighbours_in_a_batch_do_not_matter():
    """Every image has draws of its own, whether it is changed alone or among others; sizes need not be multiples of
    anything, and crops may come with their channels last."""
    torch.manual_seed(0)
    for height, width in ((16, 24), (37, 70)):
        img = tensor(*(picture(height, width, seed=i) for i in range(9)))
        colours = draw_colours(9, p_blur=0.5, p_solarize=0.5)
        together = recolour(img.contiguous(memory_format=torch.channels_last), colours, MEAN, STD)
        assert together.is_contiguous() and together.dtype == torch.float32
        for i in range(9):
            alone = recolour(img[i:i + 1], Colours(*(t[i:i + 1] for t in colours)), MEAN, STD)
            torch.testing.assert_close(together[i:i + 1], alone, rtol=1e-4, atol=1e-4)


def test_other_channels():
    """A grey image has no hue and no saturation; alpha stays."""
    torch.manual_seed(0)
    img, colours = tensor(*(picture(seed=i) for i in range(6))), draw_colours(6, p_jitter=1, p_blur=0.5)
    alpha = torch.randint(0, 256, (6, 1, 64, 80), dtype=torch.uint8)
    four = recolour(torch.cat([img, alpha], 1), colours, (*MEAN, 0), (*STD, 1))
    torch.testing.assert_close(four[:, :3], recolour(img, colours, MEAN, STD))
    torch.testing.assert_close(four[:, 3:], alpha / 255)
    only_light = colours._replace(factors=torch.cat([colours.factors[:, :2], torch.tensor([[1.0, 0.0]] * 6)], 1))
    equal = img[:, :1].expand(-1, 3, -1, -1)
    three = recolour(equal, only_light, (0, 0, 0), (1, 1, 1))
    torch.testing.assert_close(recolour(img[:, :1], colours, (0,), (1,)), three[:, :1], rtol=1e-4, atol=1e-4)


def test_draws():
    """Each of 24 orders equally often, factors uniform in their ranges, shares as asked for, all of them independent of
    each other; the same seed draws the same."""
    torch.manual_seed(0)
    n = 20_000
    colours = draw_colours(n, p_blur=0.1, p_solarize=0.2)
    jittered = colours.order[:, 0] >= 0
    orders = torch.unique(colours.order[jittered], dim=0, return_counts=True)[1]
    assert len(orders) == 24 and (orders / (0.8 * n / 24) - 1).abs().max() < 0.2
    for k, (middle, reach) in enumerate(((1, 0.4), (1, 0.4), (1, 0.2), (0, 0.1))):
        u = (colours.factors[:, k] - middle) / reach
        assert u.min() > -1 and u.max() < 1 and abs(u.mean()) < 0.02 and abs(u.var() - 1 / 3) < 0.01
    radius = colours.radius[colours.radius > 0]
    assert 0.1 <= radius.min() and radius.max() <= 2 and abs(radius.mean() - 1.05) < 0.06
    chosen = torch.stack([jittered, colours.grey, colours.radius > 0, colours.solarize]).double()
    assert (chosen.mean(1) - torch.tensor([0.8, 0.2, 0.1, 0.2]).double()).abs().max() < 0.012
    together = torch.corrcoef(torch.cat([chosen, colours.factors.T.double()]))
    assert (together - torch.eye(8)).abs().max() < 5 / n ** 0.5
    torch.manual_seed(0)
    again = draw_colours(n, p_blur=0.1, p_solarize=0.2)
    assert all(torch.equal(a, b) for a, b in zip(colours, again))


def test_nothing_drawn_is_nothing_done():
    img = tensor(picture())
    out = recolour(img, draw_colours(1, **NONE), MEAN, STD)
    assert torch.equal(denormalize(out, MEAN, STD), img)
