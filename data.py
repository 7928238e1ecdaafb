"""
Bytes -> uint8 batches. A source is a list of images somewhere; workers decode and crop; the order of everything is
arithmetic: epoch order is a permutation of (seed, epoch), batch t of rank r is a slice of it, an image's crop follows
from (seed, epoch, index). So any step can be made again, by any number of workers, and nothing about data needs to be
saved in a checkpoint.

python data.py FOLDER     says what is found there
"""
import io
import os
import signal
import sys

import numpy as np
import torch
from PIL import Image, ImageOps

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
VAL_NAMES = ("val", "valid", "validation", "test")


# ----------------------------------------------------------------------------------------------------------------
# Sources: len(), labels (int64 array or None), classes (names or None), where (text), name(i), image(i) -> PIL image


def walk(folder, seen=()):
    """Paths of the image files below `folder`, sorted, following links but no circle of links."""
    here = os.path.realpath(folder)
    if here in seen:
        return
    for entry in sorted(os.scandir(folder), key=lambda e: e.name):
        if entry.is_dir():
            yield from walk(entry.path, (*seen, here))
        elif entry.name.lower().endswith(SUFFIXES) and not entry.name.startswith("."):
            yield entry.path


class Folder:
    """Images below a folder. labelled: its sub-folders are classes, numbered in sorted order, as in ImageFolder."""

    def __init__(self, root, labelled):
        self.where, self.classes, self.labels = root, None, None
        if labelled:
            self.classes = sorted(e.name for e in os.scandir(root) if e.is_dir() and not e.name.startswith("."))
            groups = [list(walk(os.path.join(root, name))) for name in self.classes]
            empty = [name for name, group in zip(self.classes, groups) if not group]
            if empty:
                raise SystemExit(f"{len(empty)} class folders hold no image, first {os.path.join(root, empty[0])}: "
                                 "fill them or remove them")
            self.labels = np.repeat(np.arange(len(groups)), [len(group) for group in groups])
            paths = [path for group in groups for path in group]
        else:
            paths = list(walk(root))
        # One array of bytes, not a list of strings: workers share its pages, a million names are one object to them.
        self.paths = np.array([os.fsencode(os.path.relpath(path, root)) for path in paths], dtype=bytes)

    def __len__(self):
        return len(self.paths)

    def name(self, i):
        return os.path.join(self.where, os.fsdecode(self.paths[i]))

    def image(self, i):
        with open(self.name(i), "rb") as f:
            return decode(f.read())


class Shapes:
    """Ten classes of drawn pictures, made on the fly: the k-th is always the same picture, and no two are alike.

    Colour, place, size, turn, background and noise are random and tell nothing. Classes 0-5 are disc, square or
    triangle (shape) filled with stripes or dots (texture); 6-9 are a plain disc and a plain square: disc above, below,
    beside, inside (layout).
    """
    classes = ["striped disc", "dotted disc", "striped square", "dotted square", "striped triangle", "dotted triangle",
               "disc above square", "disc below square", "disc beside square", "disc inside square"]

    def __init__(self, split="train", length=None, side=64):
        self.where, self.side = f"shapes ({split})", side
        self.first, length = (0, length or 10_000) if split == "train" else (1_000_000, length or 2_000)
        self.labels = np.arange(self.first, self.first + length) % 10

    def __len__(self):
        return len(self.labels)

    def name(self, i):
        return f"{self.where} number {i}"

    def image(self, i):
        rng = np.random.default_rng((7, self.first + int(i)))
        side, label = self.side, int(self.labels[i])
        y, x = np.mgrid[:side, :side] / (side - 1) * 2 - 1                                      # both in -1..1
        slope, bump = rng.normal(size=(3, 2)), rng.normal(size=3)
        picture = 0.5 + 0.12 * (slope[:, 0, None, None] * x + slope[:, 1, None, None] * y + bump[:, None, None])

        def outline(kind, cx, cy, r, turn):
            """Signed distance to the edge, positive inside."""
            u, v = (x - cx) * np.cos(turn) + (y - cy) * np.sin(turn), (y - cy) * np.cos(turn) - (x - cx) * np.sin(turn)
            if kind == "disc":
                return r - np.hypot(u, v)
            if kind == "square":
                return 0.85 * r - np.maximum(abs(u), abs(v))
            return 0.55 * r - np.maximum(v, 0.866 * abs(u) - 0.5 * v)

        def paint(distance, colour):
            cover = np.clip(distance * side / 2 + 0.5, 0, 1)                                    # one pixel of soft edge
            return picture * (1 - cover) + colour * cover

        turn, (cx, cy) = rng.uniform(0, 2 * np.pi), rng.uniform(-0.25, 0.25, 2)
        colour = rng.uniform(0, 1, (3, 1, 1))
        if label < 6:
            angle, pitch, phase = rng.uniform(0, np.pi), rng.uniform(0.16, 0.26), rng.uniform(0, 6.28, 2)
            u, v = x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)
            waves = np.sin(2 * np.pi * u / pitch + phase[0]), np.sin(2 * np.pi * v / pitch + phase[1])
            ink = waves[0] > 0 if label % 2 == 0 else waves[0] * waves[1] > 0.15
            edge = outline(("disc", "square", "triangle")[label // 2], cx, cy, rng.uniform(0.5, 0.7), turn)
            picture = paint(edge, np.where(ink, colour, (colour + rng.uniform(0.35, 0.65, (3, 1, 1))) % 1))
        else:
            gap, r = rng.uniform(0.32, 0.42), rng.uniform(0.24, 0.3)
            dx, dy = {6: (0, -gap), 7: (0, gap), 8: (gap * rng.choice([-1, 1]), 0), 9: (0, 0)}[label]
            big = 2 * r if label == 9 else r
            picture = paint(outline("square", cx - dx, cy - dy, big, turn), colour)
            picture = paint(outline("disc", cx + dx, cy + dy, r, 0), (colour + rng.uniform(0.3, 0.7, (3, 1, 1))) % 1)
        picture = picture + rng.normal(0, 0.01, picture.shape)
        return Image.fromarray((picture.clip(0, 1) * 255).astype(np.uint8).transpose(1, 2, 0))


def find(data, split="train"):
    """The source behind --data. split "train", or "val" (then None if there is none). Ends in a sentence when nothing
    is there.

    A folder with train/ holds classes if train/ has sub-folders; any other folder is unlabelled, flat or nested.
    """
    if data == "shapes":
        return Shapes(split)
    root = os.environ.get("IMAGENET", "imagenet") if data == "imagenet" else data
    if not os.path.exists(root):
        looked = "./imagenet (and $IMAGENET is not set)" if data == "imagenet" and root == "imagenet" else root
        raise SystemExit(f"no data: {looked} does not exist; give --data a folder of images (train/ and val/ inside "
                         "are used), set IMAGENET, or try --demo")
    if not os.path.isdir(root):
        raise SystemExit(f"--data {root} is a file: a folder of images was expected")
    parted = os.path.isdir(os.path.join(root, "train"))
    if split == "val":
        names = [name for name in VAL_NAMES if os.path.isdir(os.path.join(root, name))]
        if not parted or not names:
            return None
    folder = os.path.join(root, "train" if split == "train" else names[0]) if parted else root
    inside = [e for e in os.scandir(folder) if not e.name.startswith(".")]
    labelled = parted and any(e.is_dir() for e in inside) and not any(e.name.lower().endswith(SUFFIXES) for e in inside)
    source = Folder(folder, labelled)
    if not len(source):
        raise SystemExit(f"no image found under {folder}: looked for files ending in {' '.join(SUFFIXES)}")
    return source


def describe(source):
    classes = f" in {len(source.classes):,} classes" if source.classes else ", no labels"
    return f"{len(source):,} images{classes} under {source.where}, from {os.path.basename(source.name(0))} " \
           f"to {os.path.basename(source.name(len(source) - 1))}"


# ----------------------------------------------------------------------------------------------------------------
# One image


def decode(data):
    """Bytes of any common format -> PIL image, upright (EXIF) and 8 bits deep. Raises what Pillow raises when they are
    damaged."""
    img = Image.open(io.BytesIO(data))
    img.load()
    img = ImageOps.exif_transpose(img)
    if img.mode.startswith("I;16") or img.mode == "I" and img.getextrema()[1] > 255:    # Pillow would clip, not scale
        img = Image.fromarray((np.asarray(img, dtype=np.int32).clip(0, 65535) // 257).astype(np.uint8))
    return img


def to_channels(img, channels):
    """PIL image -> 1 grey, 3 RGB or 4 RGBA channels; a palette's transparency is dropped, not turned into a colour."""
    mode = {1: "L", 3: "RGB", 4: "RGBA"}[channels]
    if img.mode == "P" and "transparency" in img.info:
        img = img.convert("RGBA")
    return img if img.mode == mode else img.convert(mode)


def crop_box(width, height, scale, ratio, rng):
    """RandomResizedCrop's law, as torchvision's: ten tries at an area and a log-uniform aspect ratio, else the largest
    centred box within the ratios. Returns left, top, width, height."""
    for _ in range(10):
        area, aspect = width * height * rng.uniform(*scale), np.exp(rng.uniform(*np.log(ratio)))
        w, h = round(np.sqrt(area * aspect)), round(np.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return rng.integers(0, width - w + 1), rng.integers(0, height - h + 1), w, h
    w = min(width, round(height * ratio[1]))
    h = min(height, round(width / ratio[0]))
    return (width - w) // 2, (height - h) // 2, w, h


def to_tensor(img):
    array = np.array(img)
    return torch.from_numpy(array[None] if array.ndim == 2 else np.ascontiguousarray(array.transpose(2, 0, 1)))


class RandomCrops(torch.utils.data.Dataset):
    """Item (epoch, index) -> (uint8 (C, h, w) random resized crop, label or -1, None or the name of a file that could
    not be read).

    interpolation: "bicubic", "bilinear", or "random" (one of the two per image, as timm does unless told otherwise).
    """

    def __init__(self, source, size, channels, seed, scale, interpolation):
        self.source, self.size, self.channels, self.seed = source, size, channels, seed
        self.scale, self.interpolation = scale, interpolation

    def crop(self, img, epoch, index):
        rng = np.random.default_rng((self.seed, epoch, index))
        left, top, w, h = crop_box(*img.size, self.scale, (3 / 4, 4 / 3), rng)
        how = self.interpolation if self.interpolation != "random" else ("bilinear", "bicubic")[rng.integers(2)]
        # The crop is cut out first: Pillow's box= would let the antialiasing filter look beyond its edge, torchvision's
        # does not.
        img = img.crop((left, top, left + w, top + h)).resize(self.size[::-1], getattr(Image.Resampling, how.upper()))
        return to_tensor(img)

    def __getitem__(self, key):
        epoch, index = key
        failed = None
        for other in range(index, index + 100):                 # the next readable one: the same whenever it is asked
            other %= len(self.source)
            try:
                img = to_channels(self.source.image(other), self.channels)
            except Exception:                                   # damaged files raise nearly anything
                failed = failed or self.source.name(index)
                continue
            return self.crop(img, epoch, other), self.label(other), failed
        return torch.zeros(self.channels, *self.size, dtype=torch.uint8), self.label(index), failed

    def label(self, index):
        return -1 if self.source.labels is None else int(self.source.labels[index])


class CenterCrops(RandomCrops):
    """Item index -> the evaluation crop: the shorter side to size / fraction (bicubic), then the middle. fraction 0.875
    up to 224 pixels and 1 above; an image that already has the size asked for is left as it is."""

    def __init__(self, source, size, channels):
        super().__init__(source, size, channels, 0, None, "bicubic")

    def crop(self, img, epoch, index):
        height, width = self.size
        if img.size != (width, height):
            fraction = 0.875 if max(self.size) <= 224 else 1.0
            h, w = int(height / fraction), int(width / fraction)
            by_height = img.height * w <= img.width * h # which side is the shorter, against what is asked
            h, w = (h, int(h * img.width / img.height)) if by_height else (int(w * img.height / img.width), w)
            img = img.resize((w, h), Image.Resampling.BICUBIC)
            left, top = round((w - width) / 2), round((h - height) / 2)
            img = img.crop((left, top, left + width, top + height))
        return to_tensor(img)

    def __getitem__(self, index):
        return super().__getitem__((0, index))


# ----------------------------------------------------------------------------------------------------------------
# Batches


def keys(images, batch, accum, world, rank, seed, start, steps):
    """Yields, for optimizer steps start..steps-1 and their `accum` parts, this rank's list of (epoch, index).

    An epoch is a permutation of (seed, epoch) and whole batches only; batch is the global one. Pure arithmetic, so a
    restart begins at its step and not at the beginning of the epoch.
    """
    per_epoch, part = images // batch, batch // (accum * world)
    order_of = None
    for step in range(start, steps):
        epoch, at = divmod(step, per_epoch)
        if epoch != order_of:
            generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
            order, order_of = torch.randperm(images, generator=generator), epoch
        for micro in range(accum):
            first = at * batch + (micro * world + rank) * part
            yield [(epoch, i) for i in order[first:first + part].tolist()]


def collate(items):
    """-> uint8 (B, C, h, w), int64 (B,), names of unreadable images."""
    imgs, labels, failed = zip(*items)
    return torch.stack(imgs), torch.tensor(labels), [name for name in failed if name]


def quiet_worker(_):
    # Signals are the training process's to act on: a worker killed by the same Ctrl-C would take the unsaved run with
    # it.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    torch.set_num_threads(1)


def load(dataset, batches, workers, pin):
    """Batches of a dataset by lists of keys, decoded in `workers` processes (0: in this one; None: one per core that
    this training process can have, at most 16)."""
    if workers is None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        workers = max(1, min(16, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))
    # A generator of its own: otherwise the loader's start draws from the one that the step's flips and masks come from.
    return torch.utils.data.DataLoader(dataset, batch_sampler=batches, num_workers=workers, pin_memory=pin,
                                       collate_fn=collate, worker_init_fn=quiet_worker if workers else None,
                                       generator=torch.Generator())


if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        raise SystemExit(__doc__.strip().splitlines()[-1])
    for part in filter(None, (find(sys.argv[1], "train"), find(sys.argv[1], "val"))):
        print(describe(part))
