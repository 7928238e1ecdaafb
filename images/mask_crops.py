"""
Random crops of images with their masks, as mmsegmentation makes them: resize by a random ratio, crop so that no class
fills more than three quarters, flip, change the colours. Everything follows from (seed, epoch, index).

Images are uint8 (C, h, w), masks uint8 (h, w), in which IGNORED pixels do not count.
"""
import numpy as np
import torch
import torch.nn.functional as F

from data import RandomCrops, shared, uniforms
from images.mask_classes import IGNORED, MaskError
from images.masks import read_pair
from images.tars import note

LONG = 4                                                        # the longer side is at most this often the shorter one


def scaled_size(height, width, ratio, short=0):
    """The size of an image whose shorter side becomes ratio * short, unless the longer one would be more than four
    times that; without `short`, ratio times its own size."""
    factor = ratio
    if short:
        factor = min(int(LONG * short * ratio) / max(height, width), int(short * ratio) / min(height, width))
    return max(1, int(height * factor + 0.5)), max(1, int(width * factor + 0.5))


def resize_pair(img, mask, size):
    """Image bilinearly, without antialiasing, as OpenCV does it; the mask takes the nearest pixel. mask may be None."""
    if img.shape[1:] == torch.Size(size):
        return img, mask
    img = img.unsqueeze(0).contiguous(memory_format=torch.channels_last)
    img = F.interpolate(img, size, mode="bilinear", align_corners=False)[0]
    return img, None if mask is None else F.interpolate(mask[None, None], size, mode="nearest")[0, 0]


def choose_crop(mask, size, offsets, most=0.75):
    """Choose the upper left corner of a crop -> (row, column): the first of ten in which two classes or more are, and
    none fills `most` of the pixels that count; else the eleventh, untested. offsets: an iterable of eleven corners."""
    for tried, (row, column) in enumerate(offsets):
        if tried == 10:
            break
        crop = mask[row:row + size[0], column:column + size[1]]
        counts = torch.bincount(crop.flatten(), minlength=IGNORED + 1)[:IGNORED]            # (255,), without ignored
        if (counts > 0).sum() > 1 and counts.max() / counts.sum() < most:
            break
    return row, column


def pad_pair(img, mask, size, colour):
    """Pad right and below to a size: the image with `colour` (C,), the mask with IGNORED."""
    down, across = size[0] - img.shape[1], size[1] - img.shape[2]
    if down <= 0 and across <= 0:
        return img, mask
    wide = colour.view(-1, 1, 1).repeat(1, *size)
    wide[:, :img.shape[1], :img.shape[2]] = img
    return wide, F.pad(mask, (0, across, 0, down), value=IGNORED)


# ----------------------------------------------------------------------------------------------------------------
# Colours. Every step cuts values off to whole numbers, and hue and saturation are bytes, because OpenCV's are.


def to_hsv(img):
    """RGB uint8 (3, h, w) -> hue in 0..179, saturation and value in 0..255, int32 (3, h, w)."""
    r, g, b = img = img.astype(np.int32)
    value, low = img.max(0), img.min(0)
    spread = value - low
    safe = np.maximum(spread, 1)
    hue = np.where(value == r, (g - b) / safe, np.where(value == g, 2 + (b - r) / safe, 4 + (r - g) / safe))
    saturation = np.rint(255 * spread / np.maximum(value, 1)).astype(np.int32)
    return np.stack([np.rint(30 * hue).astype(np.int32) % 180 * (spread > 0), saturation, value])


def to_rgb(hsv):
    """The inverse of to_hsv -> uint8 (3, h, w)."""
    hue, saturation, value = hsv.astype(np.float32)
    # Each channel falls by saturation * (distance of its hue to the pixel's, in sixths of the circle, from 1 to 2).
    steps = (hue / 30 + np.float32([5, 3, 1])[:, None, None]) % 6
    away = np.minimum(steps, 4 - steps).clip(0, 1)
    return np.rint(value * (1 - saturation / 255 * away)).astype(np.uint8)


def cut_off(x):
    return x.clip(0, 255).astype(np.uint8)


def distort(img, brightness=None, contrast=None, saturation=None, hue=None, contrast_first=True):
    """Photometric distortion of RGB uint8 (3, h, w): brightness is added, contrast and saturation are factors, hue is a
    whole number of two degrees each; None: no change."""
    if brightness is not None:
        img = cut_off(img.astype(np.float32) + brightness)
    if contrast is not None and contrast_first:
        img = cut_off(img.astype(np.float32) * contrast)
    if saturation is not None:
        hsv = to_hsv(img)
        hsv[1] = cut_off(hsv[1] * np.float32(saturation))
        img = to_rgb(hsv)
    if hue is not None:
        hsv = to_hsv(img)
        hsv[0] = (hsv[0] + hue) % 180
        img = to_rgb(hsv)
    if contrast is not None and not contrast_first:
        img = cut_off(img.astype(np.float32) * contrast)
    return img


def draw_distortion(u):
    """Nine numbers in 0..1 -> the options of distort, each step with a coin of its own."""
    return dict(brightness=64 * u[1] - 32 if u[0] < 0.5 else None, contrast=0.5 + u[3] if u[2] < 0.5 else None,
                saturation=0.5 + u[5] if u[4] < 0.5 else None, hue=int(36 * u[7]) - 18 if u[6] < 0.5 else None,
                contrast_first=u[8] < 0.5)


# ----------------------------------------------------------------------------------------------------------------
# Batches


class MaskCrops(RandomCrops):
    """Random crops of images with masks, in the place of RandomCrops: labels are uint8 (B, h, w).

    short: pixels of the shorter side at ratio 1, or 0: the image's own; ratios: the least and the greatest.
    photometric: whether colours change (of three channels). colour (C,): uint8, of what lies outside a small image.
    """
    draws = 1 + 22 + 1 + 9                                      # ratio, eleven corners, flip, colours

    def __init__(self, source, size, channels, seed, short, ratios, photometric, colour):
        super().__init__(source, size, channels, seed, None, "bilinear")
        self.short, self.ratios, self.photometric, self.colour = short, ratios, photometric and channels == 3, colour
        height, width = scaled_size(*source.least, 1.0, short)
        if height < self.size[0] or width < self.size[1]:
            note(f"images of {height}x{width} pixels are smaller than a crop of {self.size[0]}x{self.size[1]}, even at "
                 "ratio 1: they are padded, and what is padded does not count")

    def pair(self, index):
        """Read one pair, or the next that can be read -> image, mask, its index, and (name, reason) or None."""
        problem = None
        for other in [i % len(self.source) for i in range(index, index + 100)]:
            try:
                img, mask = read_pair(self.source, other, self.channels)
                if (mask != IGNORED).any():
                    return img, mask, other, problem
                reason = "all pixels of its mask are ignored"
            except MaskError:
                raise
            except Exception as error:                          # damaged files raise almost anything
                reason = str(error).split(" <_io")[0].split("\n")[0]
            problem = problem or (self.source.name(index), reason)
        raise MaskError(f"a hundred images in a row, from {self.source.name(index)} on, cannot be used: {reason}")

    def crop_pair(self, img, mask, u):
        """Cut one crop out of an image and its mask -> (C, h, w), (h, w). u: `draws` numbers in 0..1."""
        ratio = self.ratios[0] + (self.ratios[1] - self.ratios[0]) * u[0]
        img, mask = resize_pair(img, mask, scaled_size(*mask.shape, ratio, self.short))
        down, across = (max(0, have - want) + 1 for have, want in zip(mask.shape, self.size))
        corners = [(int(u[1 + 2 * k] * down), int(u[2 + 2 * k] * across)) for k in range(11)]
        row, column = choose_crop(mask, self.size, corners)
        box = slice(row, row + self.size[0]), slice(column, column + self.size[1])
        img, mask = img[:, *box], mask[box]
        if u[23] < 0.5:
            img, mask = img.flip(-1), mask.flip(-1)
        if self.photometric:
            img = torch.from_numpy(distort(img.numpy(), **draw_distortion(u[24:])))
        return pad_pair(img, mask, self.size, self.colour)      # after the colours, so that padding stays what it is

    def __getitems__(self, keys):
        table, failed, problem = uniforms(self.seed, keys, self.draws).tolist(), [], None
        crops, labels = shared(len(keys), self.channels, *self.size), shared(len(keys), *self.size)
        for k, (epoch, index) in enumerate(keys):
            try:
                img, mask, used, unreadable = self.pair(index)
            except MaskError as error:
                return crops, labels, failed, str(error)
            u = table[k] if used == index else uniforms(self.seed, [(epoch, used)], self.draws)[0].tolist()
            crops[k], labels[k] = self.crop_pair(img, mask, u)
            failed.append(unreadable)
        return crops, labels, list(filter(None, failed)), problem

    def finish(self, batches, device):
        """Pass batches on; a mask that cannot mean what was said about it ends the run, in the training process."""
        for crops, labels, failed, problem in batches:
            if problem:
                raise SystemExit(problem)
            yield crops, labels, failed


class WholePairs(torch.utils.data.Dataset):
    """Whole images for evaluation. A list of one index gives (index, image resized to `short` (0: not), mask at the
    image's own size or None, that size (h, w), None); or (index, None, None, None, error) if it cannot be used."""

    def __init__(self, source, channels, short):
        self.source, self.channels, self.short = source, channels, short

    def __getitems__(self, indices):
        index, = indices
        try:
            img, mask = read_pair(self.source, index, self.channels)
        except MaskError as error:
            return index, None, None, None, error
        except Exception as error:                              # damaged files raise almost anything
            reason = str(error).split(" <_io")[0].split("\n")[0]
            return index, None, None, None, OSError(f"{self.source.name(index)} cannot be read ({reason})")
        size = tuple(img.shape[1:])
        return index, resize_pair(img, None, scaled_size(*size, 1.0, self.short))[0], mask, size, None
