import random
from collections import Counter
from math import cos, pi, radians, sin, sqrt

import numpy as np
import pytest
import torch
from conftest import write_images
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

import data
from data import RandomCrops, load, uniforms
from images.datasets import open_dataset
from images.randaugment import DRAWS, NAMES, OPERATIONS, AugmentedCrops, choose, rand_augment

FILL, BICUBIC = (124, 116, 104), Image.Resampling.BICUBIC
NOISE = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
SMOOTH = Image.fromarray(NOISE).resize((48, 36), BICUBIC)
DULL = SMOOTH.point(lambda v: 60 + v // 3)                      # something to do for AutoContrast and Equalize
LEVELS = 0.0, 0.4, 2.5, 5.0, 7.6, 9.0, 9.99, 10.0


def apply(name, img, level, sign, resample=BICUBIC):
    fill = FILL if img.mode == "RGB" else FILL[:1]
    return OPERATIONS[name](img, sign * level / 10, dict(resample=resample, fillcolor=fill))


def equal(a, b):
    assert a.mode == b.mode and a.size == b.size
    np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


# ----------------------------------------------------------------------------------------------------------------
# Each operation


def blend(dull, img, factor):
    """Pillow's ImageEnhance as arithmetic: on the line from a dull image to the image, cut off to whole numbers."""
    a, b, factor = np.float32(np.asarray(dull)), np.float32(np.asarray(img)), np.float32(factor)
    return Image.fromarray((a + factor * (b - a)).clip(0, 255).astype(np.uint8))


def sheet(img, name, level, sign):
    """The operation as the fact sheet has it, in other words than ours: numpy, or a hand-made matrix."""
    a, x, (w, h) = np.asarray(img).astype(int), sign * level / 10, img.size
    if name in ("AutoContrast", "Equalize", "Invert"):
        return dict(AutoContrast=ImageOps.autocontrast, Equalize=ImageOps.equalize,
                    Invert=lambda i: Image.fromarray((255 - a).astype(np.uint8)))[name](img)
    if name == "Posterize":
        bits = 4 - int(4 * level / 10)
        return Image.fromarray((a // 2 ** (8 - bits) * 2 ** (8 - bits)).astype(np.uint8))
    if name == "Solarize":
        return Image.fromarray(np.where(a < 256 - int(256 * level / 10), a, 255 - a).astype(np.uint8))
    if name == "SolarizeAdd":
        return Image.fromarray(np.where(a < 128, np.minimum(a + int(110 * level / 10), 255), a).astype(np.uint8))
    if name in ("Color", "Contrast", "Brightness", "Sharpness"):
        grey = img.convert("L")
        mean = int(np.asarray(grey).mean() + 0.5)
        dull = dict(Color=grey.convert(img.mode), Contrast=Image.new("L", (w, h), mean).convert(img.mode),
                    Brightness=Image.new(img.mode, (w, h)), Sharpness=img.filter(ImageFilter.SMOOTH))[name]
        return blend(dull, img, 1 + 0.9 * x)
    turn = radians(30 * x)
    c, s = cos(turn), sin(turn)
    matrix = dict(ShearX=(1, 0.3 * x, 0, 0, 1, 0), ShearY=(1, 0, 0, 0.3 * x, 1, 0),
                  TranslateX=(1, 0, 0.45 * x * w, 0, 1, 0), TranslateY=(1, 0, 0, 0, 1, 0.45 * x * h),
                  Rotate=(c, -s, w / 2 - c * w / 2 + s * h / 2, s, c, h / 2 - s * w / 2 - c * h / 2))[name]
    return img.transform((w, h), Image.Transform.AFFINE, matrix, BICUBIC,
                         fillcolor=FILL if img.mode == "RGB" else FILL[0])


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("name", NAMES)
def test_operations_are_the_fact_sheets(name, mode):
    for img in (SMOOTH, DULL):
        for level in LEVELS:
            for sign in (1, -1):
                ours = np.asarray(apply(name, img.convert(mode), level, sign)).astype(int)
                error = np.abs(ours - np.asarray(sheet(img.convert(mode), name, level, sign)))
                # The blends differ in how float32 is cut off, the rotation in the last bits of its matrix.
                allowed = 1 if name in ("Color", "Contrast", "Brightness", "Sharpness", "Rotate") else 0
                assert error.max() <= allowed and (error > 0).mean() < 0.01, (level, sign)


@pytest.mark.parametrize("name", NAMES)
def test_operations_are_timms(name, monkeypatch):
    auto_augment = pytest.importorskip("timm.data.auto_augment")
    theirs = [n for n in auto_augment._RAND_INCREASING_TRANSFORMS if n in (name, name + "Increasing", name + "Rel")]
    assert len(theirs) == 1 and len(auto_augment._RAND_INCREASING_TRANSFORMS) == len(NAMES) == 15
    for resample in (BICUBIC, Image.Resampling.BILINEAR):
        for level in LEVELS:
            if name == "Posterize" and level == 10:             # no bits: newer Pillows refuse what timm asks for
                continue
            for sign in (1, -1):
                monkeypatch.setattr(random, "random", lambda sign=sign: 0.5 - 0.2 * sign)
                reference = auto_augment.AugmentOp(theirs[0], 1.0, level, dict(img_mean=FILL, interpolation=resample))
                equal(apply(name, SMOOTH, level, sign, resample), reference(SMOOTH))


def test_no_bits_are_black_and_no_threshold_is_the_negative():
    assert not np.asarray(apply("Posterize", SMOOTH, 10, 1)).any()
    equal(apply("Solarize", SMOOTH, 10, 1), ImageOps.invert(SMOOTH))


def test_geometry_moves_whole_pixels_as_told():
    """Translation by 4 pixels and a shear of 1 pixel in 10 rows, on an image of numbers."""
    grid = Image.fromarray(np.arange(200, dtype=np.uint8).reshape(10, 20))
    nearest = Image.Resampling.NEAREST
    right = np.asarray(apply("TranslateX", grid, 10 * 4 / 20 / 0.45, -1, nearest))
    np.testing.assert_array_equal(right[:, 4:], np.asarray(grid)[:, :-4])
    assert (right[:, :4] == FILL[0]).all()
    up = np.asarray(apply("TranslateY", grid, 10 * 4 / 10 / 0.45, 1, nearest))
    np.testing.assert_array_equal(up[:-4], np.asarray(grid)[4:])
    sheared = np.asarray(apply("ShearX", grid, 10 * 0.1 / 0.3, 1, nearest))
    for y in range(10):                                         # a half pixel more: rows are looked at in their middle
        shift = int(0.1 * (y + 0.5) + 0.5)
        np.testing.assert_array_equal(sheared[y, :20 - shift], np.asarray(grid)[y, shift:])


@pytest.mark.parametrize("name", NAMES)
def test_what_the_flip_may_come_after(name):
    """Mirrored after the operation, or before it with the other sign: the same image, but for ShearY."""
    for x in (0.7, -0.7):
        how = dict(resample=BICUBIC, fillcolor=FILL)
        after = ImageOps.mirror(OPERATIONS[name](SMOOTH, x, how))
        same = name in ("Color", "Contrast", "Brightness", "Sharpness", "TranslateY")   # whose sign does not mirror
        before = OPERATIONS[name](ImageOps.mirror(SMOOTH), x if same else -x, how)
        error = np.abs(np.asarray(after).astype(int) - np.asarray(before)).mean()
        assert error > 1 if name == "ShearY" else error < 0.01


# ----------------------------------------------------------------------------------------------------------------
# Which operations, how strongly

TABLE = uniforms(5, [(0, i) for i in range(20_000)], 31)[:, 23:]


def within(count, n, p, sigmas=4.5):
    assert abs(count - n * p) < sigmas * sqrt(n * p * (1 - p)), (count, n * p)


def test_how_many_are_applied_and_which():
    plans = [choose(u, 9) for u in TABLE.tolist()]
    lengths = Counter(map(len, plans))
    for k, p in enumerate((0.25, 0.5, 0.25)):
        within(lengths[k], len(plans), p)
    found = Counter(name for plan in plans for name, _ in plan)
    for name in NAMES:
        within(found[name], found.total(), 1 / 15)
    twice = [a == b for plan in plans if len(plan) == 2 for a, b in [[name for name, _ in plan]]]
    within(sum(twice), len(twice), 1 / 15)                      # drawn with replacement, of each other independent


@pytest.mark.parametrize("magnitude", [5, 9, 10])
def test_levels_and_signs(magnitude):
    found = [(name, x) for u in TABLE.tolist() for name, x in choose(u, magnitude)]
    levels, n = np.array([abs(x) * 10 for _, x in found]), len(found)
    assert levels.min() >= 0 and levels.max() <= 10
    within(sum(x > 0 for _, x in found), n, 0.5)
    for name in NAMES:
        own = [x > 0 for other, x in found if other == name]
        within(sum(own), len(own), 0.5)
    within((levels > magnitude - 0.5).sum(), n, 0.8413447)      # one deviation below the mean: half a level
    if magnitude == 10:
        within((levels == 10).sum(), n, 0.5)
        assert abs(levels[levels < 10].mean() - (10 - 0.5 * sqrt(2 / pi))) < 0.01       # of half a normal
    if magnitude == 5:
        assert abs(levels.mean() - 5) < 4.5 * 0.5 / sqrt(n) and abs(levels.std() / 0.5 - 1) < 4.5 / sqrt(2 * n)


def test_the_ends_of_the_draws_are_in_range():
    last = 1 - 2.0 ** -53
    assert choose([0.0] * DRAWS, 9)[0][0] == NAMES[0] and choose([0.0] * DRAWS, 9)[0][1] > 0
    assert choose([last, 0.0, last, last] * 2, 9) == [(NAMES[-1], -1.0)] * 2
    assert choose([0.0, 0.0, 0.0, 0.0] * 2, 1)[0][1] == 0


def test_operations_are_applied_one_after_the_other():
    """Drawn by hand at level 9, the middle of the deviates: Brightness up, then Invert; ShearY, negative."""
    u = [(NAMES.index("Brightness") + 0.5) / 15, 0.2, 0.5, 0.1, (NAMES.index("Invert") + 0.5) / 15, 0.4, 0.5, 0.9]
    brighter = ImageEnhance.Brightness(SMOOTH).enhance(1 + 0.81)
    equal(rand_augment(SMOOTH, u, 9), ImageOps.invert(brighter))
    equal(rand_augment(SMOOTH, u[:5] + [0.6] + u[6:], 9), brighter)
    equal(rand_augment(SMOOTH, u[:1] + [0.6] + u[2:5] + [0.6] + u[6:], 9), SMOOTH)
    u[:4] = (NAMES.index("ShearY") + 0.5) / 15, 0.2, 0.5, 0.9
    sheared = SMOOTH.transform(SMOOTH.size, Image.Transform.AFFINE, (1, 0, 0, -0.27, 1, 0), Image.Resampling.BILINEAR,
                               fillcolor=(9, 8, 7))
    equal(rand_augment(SMOOTH, u[:5] + [0.6] + u[6:], 9, (9, 8, 7), Image.Resampling.BILINEAR), sheared)


# ----------------------------------------------------------------------------------------------------------------
# Batches


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    root = tmp_path_factory.mktemp("images")
    write_images(root, 24, side=40, suffix=".jpg")
    return open_dataset(str(root))


def crops_of(source, channels=3, interpolation="bicubic", repeat=1, magnitude=9):
    return AugmentedCrops(source, (24, 20), channels, 7, (0.3, 1.0), interpolation, magnitude,
                          FILL if channels == 3 else FILL[:1], repeat)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear", "random"])
def test_crops_are_augmented_as_their_key_says(source, channels, interpolation):
    """RandomCrops' crop, then rand_augment with the draws behind its own; geometry as the crop was resized."""
    crops, keys = crops_of(source, channels, interpolation), [(e, i) for e in range(2) for i in range(24)]
    assert crops.draws == RandomCrops.draws + DRAWS
    plain = RandomCrops(source, (24, 20), channels, 7, (0.3, 1.0), interpolation)
    ours, theirs = crops.__getitems__(keys)[0], plain.__getitems__(keys)[0]
    assert ours.shape == theirs.shape == (48, channels, 24, 20) and ours.dtype == torch.uint8
    changed = 0
    for u, crop, base in zip(uniforms(7, keys, crops.draws), ours, theirs):
        how = {"bicubic": BICUBIC, "bilinear": Image.Resampling.BILINEAR}[
            interpolation if interpolation != "random" else "bilinear" if u[22] < 0.5 else "bicubic"]
        pixels = base[0] if channels == 1 else base.permute(1, 2, 0)
        expected = np.asarray(rand_augment(Image.fromarray(pixels.contiguous().numpy()), u[23:].tolist(), 9,
                                           FILL[:channels], how)).reshape(24, 20, channels)
        np.testing.assert_array_equal(crop.permute(1, 2, 0).numpy(), expected)
        changed += not torch.equal(crop, base)
    assert changed > 24


def test_same_key_same_image_whatever_the_batch_and_the_workers(source):
    crops, keys = crops_of(source), [(3, i) for i in range(24)]
    whole = crops.__getitems__(keys)[0].clone()
    for k in (0, 7, 23):
        assert torch.equal(crops.__getitems__([keys[k]])[0][0], whole[k])
    batches = [keys[4:20][::-1], keys[:4]]
    for workers in (0, 1):
        parts = [img.clone() for img, _, _ in load(crops, batches, workers)]
        assert torch.equal(torch.cat(parts), torch.cat([whole[4:20].flip(0), whole[:4]]))
    assert not torch.equal(crops.__getitems__([(4, i) for i in range(24)])[0], whole)


def test_repeats_are_drawn_apart(source):
    crops = crops_of(source, repeat=2)
    keys = [(0, i) for i in range(24)]
    img = crops.__getitems__(keys)[0]
    assert torch.equal(img[::2], crops_of(source).__getitems__(keys)[0])
    assert all(not torch.equal(a, b) for a, b in zip(img[::2], img[1::2]))


def test_a_crop_cut_out_of_its_image_and_an_unreadable_file(tmp_path, monkeypatch):
    write_images(tmp_path, 3, side=40, suffix=".png")
    (tmp_path / "001.png").write_bytes(b"no image")
    monkeypatch.setattr(data, "crop_box", lambda *_: (3, 5, 24, 24))        # of that size already: a view of the image
    crops, keys = AugmentedCrops(open_dataset(str(tmp_path)), (24, 24), 3, 1, (1.0, 1.0), "bicubic", 10, FILL), range(8)
    img, _, failed = crops.__getitems__([(e, 1) for e in keys])
    assert len(failed) == 8 and "001.png" in failed[0][0]
    assert torch.equal(img, crops.__getitems__([(e, 2) for e in keys])[0])
    base = Image.open(tmp_path / "002.png").crop((3, 5, 27, 29))
    for u, crop in zip(uniforms(1, [(e, 2) for e in keys], crops.draws)[:, 23:], img):
        equal(Image.fromarray(crop.permute(1, 2, 0).numpy()), rand_augment(base, u.tolist(), 10))


def test_alpha_is_refused_in_a_sentence(source):
    with pytest.raises(SystemExit, match="--in-chans 3"):
        crops_of(source, channels=4)
