"""
Images to batches: the bytes of image files go in, uint8 crops come out.

The order of everything is arithmetic: an epoch is a permutation of (seed, epoch), the batch of step t on rank r is a
slice of it, a crop follows from (seed, epoch, index). So any step can be made again, by any number of workers, and a
checkpoint stores nothing about the data. A source is anything with len(), read(i), name(i) and labels: see images/.
"""
import copy
import io
import os
import re

import numpy as np
import torch
from PIL import Image, ImageOps

from images.workers import load_in_workers

try:                                                            # optional: the same pixels, a fifth faster than Pillow
    from torchcodec.decoders import decode_jpeg
except (ImportError, OSError, RuntimeError):                    # not installed, or built for another torch
    decode_jpeg = None
# How files of 8 bits begin: JPEG, PNG, GIF, BMP, WebP. Others may hold more.
JPEG, PLAIN = b"\xff\xd8\xff", re.compile(rb"\xff\xd8\xff|\x89PNG.{20}[\1-\x08]|GIF8|BM|RIFF", re.DOTALL)


# Damaged files raise errors of nearly any class. The decoders agree, but grey from a colour JPEG may differ by 3.
def decode(data, channels=3, value_range=None):
    """Decode the bytes of an image file, or a PIL image -> uint8 (C, h, w), upright, each pixel's values together."""
    if decode_jpeg and channels in (1, 3) and not value_range and isinstance(data, bytes) and data.startswith(JPEG):
        if len(data) > 2 ** 18:
            Image.open(io.BytesIO(data))                        # raises if it has too many pixels, as for Pillow
        return decode_jpeg(data, mode="GRAY" if channels == 1 else "RGB")
    pixels = np.array(to_channels(open_image(data, value_range), channels))                     # (h, w) or (h, w, C)
    return torch.from_numpy(pixels.reshape(*pixels.shape[:2], channels)).permute(2, 0, 1)


def open_image(data, value_range=None):
    """Open bytes, or take a PIL image -> a PIL image, upright, of 8 bits; or an array (h, w, N) of bands that are no
    colours. value_range: the values that become 0 and 255, if not the range of the file: see images/deep.py."""
    if isinstance(data, bytes) and PLAIN.match(data) and not value_range:
        img = Image.open(io.BytesIO(data))
    else:
        from images.deep import open_deep
        img = open_deep(data, value_range)
    return img if isinstance(img, np.ndarray) else ImageOps.exif_transpose(img)


def to_channels(img, channels):
    """Convert a PIL image to 1 (grey), 3 (RGB) or 4 (RGBA) channels. Bands, and other channels, must be that many."""
    if isinstance(img, np.ndarray) or channels not in (1, 3, 4):
        from images.deep import to_bands
        return to_bands(img, channels)
    mode = {1: "L", 3: "RGB", 4: "RGBA"}[channels]
    if img.mode == "P" and "transparency" in img.info:          # else the transparent entry would become a colour
        img = img.convert("RGBA")
    return img if img.mode == mode else img.convert(mode)


def resize(img, size, how):
    """Resize uint8 (C, h, w) to (C, *size) with antialiasing. how: "bicubic" or "bilinear"."""
    if img.shape[1:] == size:
        return img
    img = img.unsqueeze(0).contiguous(memory_format=torch.channels_last)       # torch's uint8 kernels: 4 times Pillow's
    return torch.nn.functional.interpolate(img, size, mode=how, antialias=True)[0]


# ----------------------------------------------------------------------------------------------------------------
# Crops


# By splitmix64, because a generator object for every image would cost as much as the arithmetic of its crop.
def uniforms(seed, keys, count):
    """Random numbers in 0..1, float64 (len(keys), count): a pure function of seed, key = (epoch, index) and column."""
    def mix(x):
        x = x + np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ x >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ x >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
        return x ^ x >> np.uint64(31)
    epoch, index = np.array(keys, dtype=np.uint64).reshape(-1, 2).T
    x = mix(mix(mix(np.full(len(keys), seed, dtype=np.uint64)) ^ epoch) ^ index)                # (len(keys),)
    x = mix(x[:, None] ^ mix(np.arange(count, dtype=np.uint64)))                                # (len(keys), count)
    return (x >> np.uint64(11)) * 2.0 ** -53


def crop_box(width, height, scale, ratio, u):
    """Torchvision's random resized crop -> left, top, width, height: ten tries at an area (scale: its range, as a part
    of the image) and a log-uniform width / height (ratio), else the largest centred box. u: 22 numbers in 0..1."""
    for k in range(10):
        area = width * height * (scale[0] + (scale[1] - scale[0]) * u[k])
        aspect = ratio[0] * (ratio[1] / ratio[0]) ** u[10 + k]
        w, h = round((area * aspect) ** 0.5), round((area / aspect) ** 0.5)
        if 0 < w <= width and 0 < h <= height:
            return int(u[20] * (width - w + 1)), int(u[21] * (height - h + 1)), w, h
    w, h = min(width, round(height * ratio[1])), min(height, round(width / ratio[0]))
    return (width - w) // 2, (height - h) // 2, w, h


class RandomCrops(torch.utils.data.Dataset):
    """Random resized crops. A list of keys (epoch, index) gives one batch: crops, uint8 (B, C, h, w); labels (B,), -1
    where there are none; and (name, reason) of images that could not be read. B = repeat * len(keys).
    interpolation: "bicubic", "bilinear" or "random" (one of the two for each crop, timm's default).
    repeat: crops of each decoded image, next to each other in the batch (https://arxiv.org/abs/1901.09335)."""
    draws = 23                                                  # random numbers for one crop

    def __init__(self, source, size, channels, seed, scale, interpolation, repeat=1):
        self.source, self.size, self.channels, self.seed = source, tuple(size), channels, seed
        self.scale, self.interpolation, self.repeat = scale, interpolation, repeat
        self.value_range = getattr(source, "value_range", None)

    def plan(self, width, height, u):
        """Choose the box (left, top, width, height) and the interpolation of one crop."""
        box = crop_box(width, height, self.scale, (3 / 4, 4 / 3), u)
        if self.interpolation != "random":
            return box, self.interpolation
        return box, "bilinear" if u[22] < 0.5 else "bicubic"

    def crop(self, img, u):
        """Cut one crop out of uint8 (C, H, W) -> (C, h, w). u: `draws` numbers in 0..1."""
        (left, top, w, h), how = self.plan(img.shape[2], img.shape[1], u)
        return resize(img[:, top:top + h, left:left + w], self.size, how)

    def readable(self, index):
        """Decode one -> image, index, None; else the next readable image, its index, and (name, reason) of this one."""
        problem = None
        for other in [i % len(self.source) for i in range(index, index + 100)]:
            try:
                return decode(self.source.read(other), self.channels, self.value_range), other, problem
            except Exception as error:                          # damaged files raise almost anything
                problem = problem or (self.source.name(index), str(error).split(" <_io")[0].split("\n")[0])
        return torch.zeros(self.channels, *self.size, dtype=torch.uint8), index, problem

    def __getitems__(self, keys):
        count = self.draws * self.repeat
        table = uniforms(self.seed, keys, count).tolist()
        crops = shared(len(keys) * self.repeat, *self.size, self.channels)                      # (B, h, w, C)
        labels, failed = [], []
        for k, (epoch, index) in enumerate(keys):
            img, used, problem = self.readable(index)
            u = table[k] if used == index else uniforms(self.seed, [(epoch, used)], count)[0].tolist()
            for r in range(self.repeat):
                crops[k * self.repeat + r] = self.crop(img, u[r * self.draws:][:self.draws]).permute(1, 2, 0)
                labels.append(-1 if self.source.labels is None else int(self.source.labels[used]))
            failed.append(problem)
        return crops.permute(0, 3, 1, 2), torch.tensor(labels), list(filter(None, failed))

    def finish(self, batches, device):
        """What is left to do to the batches of a loader: nothing here (DeviceCrops decodes)."""
        return batches


class CenterCrops(RandomCrops):
    """Evaluation crops; keys are indices. The shorter side is resized (bicubic) to size / 0.875 up to 224 pixels and to
    size above, then the middle is cut out. An image that already has the size asked for is left as it is."""
    draws = 0

    def __init__(self, source, size, channels):
        super().__init__(source, size, channels, 0, None, "bicubic")

    def crop(self, img, u):
        height, width = self.size
        if img.shape[1:] == self.size:
            return img
        fraction = 0.875 if max(self.size) <= 224 else 1.0
        h, w = int(height / fraction), int(width / fraction)
        if img.shape[1] * w <= img.shape[2] * h:                # the height is the shorter side, relative to the crop
            w = int(h * img.shape[2] / img.shape[1])
        else:
            h = int(w * img.shape[1] / img.shape[2])
        img = resize(img, (h, w), "bicubic")
        left, top = round((w - width) / 2), round((h - height) / 2)
        return img[:, top:top + height, left:left + width]

    def __getitems__(self, indices):
        return super().__getitems__([(0, index) for index in indices])


class WholeImages(CenterCrops):
    """Evaluation crops to train on; keys are (epoch, index), as a training run has them. The labels are the numbers of
    the images, for which something may be known already."""

    def __init__(self, source, size, channels):
        super().__init__(copy.copy(source), size, channels)
        self.source.labels = range(len(source))

    def __getitems__(self, keys):
        return super().__getitems__([index for _, index in keys])


# ----------------------------------------------------------------------------------------------------------------
# Batches


def batch_keys(images, images_per_step, accum, world, rank, seed, start, steps):
    """Yield this rank's keys, [(epoch, index)], for each of the `accum` passes of optimizer steps start..steps-1.
    images: how many the source has; images_per_step: how many a step decodes, over all ranks and passes."""
    part = images_per_step // (accum * world)                   # images of one pass on one rank
    for step in range(start, steps):
        epoch, at = divmod(step, images // images_per_step)     # an epoch's steps are whole
        if at == 0 or step == start:
            order = torch.randperm(images, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))
        for micro in range(accum):
            first = at * images_per_step + (micro * world + rank) * part
            yield [(epoch, i) for i in order[first:first + part].tolist()]


def shared(*shape):
    """An empty uint8 tensor; in a worker its memory is shared, so that the training process sees it without a copy."""
    if torch.utils.data.get_worker_info() is None:
        return torch.empty(shape, dtype=torch.uint8)
    storage = torch.UntypedStorage._new_shared(torch.Size(shape).numel())
    return torch.empty(0, dtype=torch.uint8).set_(storage, 0, shape)


def cores():
    """How many CPU cores this training process can use: those of the machine, shared by its local processes."""
    here = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, here // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def load(dataset, keys, workers, pin=False):
    """An iterator over the batches of a dataset for lists of keys. workers: processes that decode (0: this one; None:
    one per core, at most 16)."""
    workers = min(16, cores()) if workers is None else workers
    if workers:                                                 # where one is killed, another one takes over
        return load_in_workers(dataset, iter(keys), workers, pin)
    return (dataset.__getitems__(key) for key in keys)
