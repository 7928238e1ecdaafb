"""RandAugment (https://arxiv.org/abs/1909.13719) on Pillow images in the workers, by timm's rule rand-mM-mstd0.5-inc1.
It follows from given numbers in 0..1: what happens to an image is a function of (seed, epoch, index), as its crop."""
from statistics import NormalDist

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageOps

from data import RandomCrops

AFFINE = Image.Transform.AFFINE                                 # (x, y) takes from (a x + b y + c, d x + e y + f)
# x is the level / 10 with a random sign, -1..1; abs(x) where the sign has no meaning. how: resampling, and the colour
# outside the image. Posterize clears the lowest 4 to 8 bits (Pillow's own not 8). SolarizeAdd brightens what is dark.
OPERATIONS = {
    "AutoContrast": lambda img, x, how: ImageOps.autocontrast(img),
    "Equalize": lambda img, x, how: ImageOps.equalize(img),
    "Invert": lambda img, x, how: ImageOps.invert(img),
    "Rotate": lambda img, x, how: img.rotate(30 * x, **how),                                    # degrees
    "Posterize": lambda img, x, how: img.point(lambda v: v >> 4 + int(4 * abs(x)) << 4 + int(4 * abs(x))),
    "Solarize": lambda img, x, how: ImageOps.solarize(img, 256 - int(256 * abs(x))),
    "SolarizeAdd": lambda img, x, how: img.point(lambda v: min(255, v + int(110 * abs(x))) if v < 128 else v),
    "Color": lambda img, x, how: ImageEnhance.Color(img).enhance(1 + 0.9 * x),
    "Contrast": lambda img, x, how: ImageEnhance.Contrast(img).enhance(1 + 0.9 * x),
    "Brightness": lambda img, x, how: ImageEnhance.Brightness(img).enhance(1 + 0.9 * x),
    "Sharpness": lambda img, x, how: ImageEnhance.Sharpness(img).enhance(1 + 0.9 * x),
    "ShearX": lambda img, x, how: img.transform(img.size, AFFINE, (1, 0.3 * x, 0, 0, 1, 0), **how),
    "ShearY": lambda img, x, how: img.transform(img.size, AFFINE, (1, 0, 0, 0.3 * x, 1, 0), **how),
    "TranslateX": lambda img, x, how: img.transform(img.size, AFFINE, (1, 0, 0.45 * x * img.width, 0, 1, 0), **how),
    "TranslateY": lambda img, x, how: img.transform(img.size, AFFINE, (1, 0, 0, 0, 1, 0.45 * x * img.height), **how),
}
NAMES, DRAWS = tuple(OPERATIONS), 8                             # DRAWS: how many random numbers an image needs


def choose(u, magnitude):
    """Choose what to do to an image, in order: DRAWS numbers in 0..1 -> [(name, x)]. Each of two operations is drawn
    from all 15 and applied with probability 1/2. Its level is N(magnitude, 0.5) cut to 0..10: at magnitude 10 half the
    levels are 10 exactly, where Posterize gives black and Solarize the negative."""
    chosen = []
    for which, apply, deviate, sign in (u[:4], u[4:]):
        if apply < 0.5:
            level = min(max(NormalDist(magnitude, 0.5).inv_cdf(max(deviate, 2 ** -54)), 0), 10)
            chosen.append((NAMES[int(which * len(NAMES))], level / 10 if sign < 0.5 else -level / 10))
    return chosen


def rand_augment(img, u, magnitude, fill=(124, 116, 104), resample=Image.Resampling.BICUBIC):
    """Augment a Pillow image, L or RGB; the size stays. u: DRAWS numbers in 0..1; fill: 255 * mean per channel."""
    for name, x in choose(u, magnitude):
        img = OPERATIONS[name](img, x, dict(resample=resample, fillcolor=fill))
    return img


class AugmentedCrops(RandomCrops):
    """RandomCrops, then RandAugment of each crop, which resamples as the crop did. The official flip comes before, ours
    after, on the device: with random signs that is the same, except for ShearY, which does not move the left edge."""
    draws = RandomCrops.draws + DRAWS

    def __init__(self, source, size, channels, seed, scale, interpolation, magnitude, fill, repeat=1):
        if channels not in (1, 3):
            raise SystemExit(f"RandAugment is for 1 or 3 channels, not {channels}: leave it out, or give --in-chans 3")
        super().__init__(source, size, channels, seed, scale, interpolation, repeat)
        self.magnitude, self.fill = magnitude, tuple(fill)

    def crop(self, img, u):
        crop, how = super().crop(img, u), self.plan(img.shape[2], img.shape[1], u)[1]
        if not choose(u[-DRAWS:], self.magnitude):              # nothing to do for a quarter of the images
            return crop
        pixels = Image.fromarray(crop.permute(1, 2, 0).squeeze(2).numpy())                      # (h, w), or (h, w, 3)
        pixels = rand_augment(pixels, u[-DRAWS:], self.magnitude, self.fill, Image.Resampling[how.upper()])
        return torch.from_numpy(np.array(pixels).reshape(*self.size, self.channels)).permute(2, 0, 1)
