"""
RandAugment in the workers, on Pillow images (https://arxiv.org/abs/1909.13719), by the law that recipes of fine-tuning
call `rand-mM-mstd0.5-inc1` (timm's): two of 15 operations are drawn, each is applied or not, as strongly as M says.

It is a function of numbers in 0..1 that are handed in, so what is done to an image follows from (seed, epoch, index),
as its crop does.
"""
from statistics import NormalDist

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageOps

from data import RandomCrops

# ----------------------------------------------------------------------------------------------------------------
# The operations


def posterize(img, bits):
    """Keep the highest bits of each value; 0 make a black image, which Pillow's own posterize refuses to."""
    return img.point(lambda value: value >> 8 - bits << 8 - bits)


def solarize_add(img, add):
    """Brighten what is darker than 128."""
    return img.point(lambda value: min(255, value + add) if value < 128 else value)


def affine(img, how, *matrix):
    """Pixel (x, y) becomes what is at (a x + b y + c, d x + e y + f) of img."""
    return img.transform(img.size, Image.Transform.AFFINE, matrix, **how)


# x is the level / 10 with a fair sign, -1..1; `how` the resampling and the colour of what comes from outside the image.
# abs(x) where the sign has no meaning. Color leaves grey images as they are.
OPERATIONS = {
    "AutoContrast": lambda img, x, how: ImageOps.autocontrast(img),
    "Equalize": lambda img, x, how: ImageOps.equalize(img),
    "Invert": lambda img, x, how: ImageOps.invert(img),
    "Rotate": lambda img, x, how: img.rotate(30 * x, **how),                                    # degrees
    "Posterize": lambda img, x, how: posterize(img, 4 - int(4 * abs(x))),
    "Solarize": lambda img, x, how: ImageOps.solarize(img, 256 - int(256 * abs(x))),
    "SolarizeAdd": lambda img, x, how: solarize_add(img, int(110 * abs(x))),
    "Color": lambda img, x, how: ImageEnhance.Color(img).enhance(1 + 0.9 * x),
    "Contrast": lambda img, x, how: ImageEnhance.Contrast(img).enhance(1 + 0.9 * x),
    "Brightness": lambda img, x, how: ImageEnhance.Brightness(img).enhance(1 + 0.9 * x),
    "Sharpness": lambda img, x, how: ImageEnhance.Sharpness(img).enhance(1 + 0.9 * x),
    "ShearX": lambda img, x, how: affine(img, how, 1, 0.3 * x, 0, 0, 1, 0),
    "ShearY": lambda img, x, how: affine(img, how, 1, 0, 0, 0.3 * x, 1, 0),
    "TranslateX": lambda img, x, how: affine(img, how, 1, 0, 0.45 * x * img.width, 0, 1, 0),
    "TranslateY": lambda img, x, how: affine(img, how, 1, 0, 0, 0, 1, 0.45 * x * img.height),
}
NAMES, DRAWS = tuple(OPERATIONS), 8                             # numbers in 0..1 for an image


def choose(u, magnitude):
    """DRAWS numbers in 0..1 -> [(name, x)] of what is applied, in this order.

    Each of two is drawn from all 15, so they may be the same, and applied with probability 1/2. Its level is
    N(magnitude, 0.5) cut to 0..10: at magnitude 10 half the levels are 10 exactly, where a posterized image is black
    and a solarized one inverted.
    """
    chosen = []
    for which, apply, deviate, sign in (u[:4], u[4:]):
        if apply < 0.5:
            level = min(max(NormalDist(magnitude, 0.5).inv_cdf(max(deviate, 2 ** -54)), 0), 10)
            chosen.append((NAMES[int(which * len(NAMES))], level / 10 if sign < 0.5 else -level / 10))
    return chosen


def rand_augment(img, u, magnitude, fill=(124, 116, 104), resample=Image.Resampling.BICUBIC):
    """Pillow image, L or RGB -> one of the same size. u: DRAWS numbers in 0..1; fill: 255 * mean per channel."""
    for name, x in choose(u, magnitude):
        img = OPERATIONS[name](img, x, dict(resample=resample, fillcolor=fill))
    return img


# ----------------------------------------------------------------------------------------------------------------
# Batches


class AugmentedCrops(RandomCrops):
    """RandomCrops, then RandAugment of each crop, which resamples as the crop did.

    The official order is crop, flip, RandAugment; here the flip comes last, on the device. Signs are fair, so that is
    the same law, but for ShearY, which leaves the left edge in place: of mirrored images, then, the right one.
    """
    draws = RandomCrops.draws + DRAWS

    def __init__(self, source, size, channels, seed, scale, interpolation, magnitude, fill, repeat=1):
        if channels == 4:
            raise SystemExit("RandAugment is for 1 or 3 channels, not 4: leave it out, or give --in-chans 3")
        super().__init__(source, size, channels, seed, scale, interpolation, repeat)
        self.magnitude, self.fill = magnitude, tuple(fill)

    def crop(self, img, u):
        crop, u, how = super().crop(img, u), u[-DRAWS:], self.plan(img.shape[2], img.shape[1], u)[1]
        if not choose(u, self.magnitude):                       # a quarter of the images
            return crop
        pixels = Image.fromarray(crop.permute(1, 2, 0).squeeze(2).numpy())                      # (h, w), or (h, w, 3)
        pixels = rand_augment(pixels, u, self.magnitude, self.fill, Image.Resampling[how.upper()])
        return torch.from_numpy(np.array(pixels).reshape(*self.size, self.channels)).permute(2, 0, 1)
