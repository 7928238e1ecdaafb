"""
Bytes -> uint8 batches. Workers read, decode and crop; the order of everything is arithmetic: epoch order is a
permutation of (seed, epoch), batch t of rank r is a slice of it, an image's crop follows from (seed, epoch, index). So
any step can be made again, by any number of workers, and nothing about data needs to be saved in a checkpoint.

python data.py inspect SOURCE                                       what is there: counts, sizes, classes, bad files
python data.py pack SOURCE DEST.tar --short-side 256 --quality 90   the same at training resolution, faster to read
SOURCE is what --data may be (see sources.py)
"""
import argparse
import ctypes
import datetime
import fcntl
import hashlib
import io
import json
import os
import signal
import sys
import tarfile
import time
from collections import Counter

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps

from augment import resize_each
from sources import describe, find

try:                                                            # an extra: the same pixels, a fifth faster than Pillow
    from torchcodec.decoders import decode_jpeg
except (ImportError, OSError, RuntimeError):                    # not here, or made for another torch
    decode_jpeg = None

# ----------------------------------------------------------------------------------------------------------------
# One image


def decoder():
    """The name and version of what decodes JPEGs here."""
    if decode_jpeg is None:
        return f"Pillow {Image.__version__}"
    from importlib.metadata import version
    return f"torchcodec {version('torchcodec')}"


def decode(data, channels=3):
    """Bytes of any common format, or a PIL image -> uint8 (C, h, w), upright (EXIF); pixels lie together in memory.
    Raises nearly anything when they are damaged.

    torchcodec and Pillow give the same pixels; only grey ones of a colour JPEG may differ by 3.
    """
    if decode_jpeg and channels in (1, 3) and isinstance(data, bytes) and data.startswith(b"\xff\xd8\xff"):
        return decode_jpeg(data, mode="GRAY" if channels == 1 else "RGB")
    array = np.asarray(to_channels(open_image(data), channels))
    return torch.from_numpy(array.copy().reshape(*array.shape[:2], channels)).permute(2, 0, 1)


def open_image(data):
    """Bytes, or a PIL image -> PIL image, loaded, upright, 8 bits deep."""
    img = Image.open(io.BytesIO(data)) if isinstance(data, bytes) else data
    img.load()
    img = ImageOps.exif_transpose(img)
    if img.mode == "F":
        raise ValueError("pixels are 32-bit floats, whose range nobody knows: save them with 8 or 16 bits")
    if img.mode.startswith("I;16") or img.mode == "I" and img.getextrema()[1] > 255:    # Pillow would clip, not scale
        img = Image.fromarray((np.asarray(img, dtype=np.int32).clip(0, 65535) // 257).astype(np.uint8))
    return img


def to_channels(img, channels):
    """PIL image -> 1 grey, 3 RGB or 4 RGBA channels; a palette's transparency is dropped, not turned into a colour."""
    mode = {1: "L", 3: "RGB", 4: "RGBA"}[channels]
    if img.mode == "P" and "transparency" in img.info:
        img = img.convert("RGBA")
    return img if img.mode == mode else img.convert(mode)


def resize(img, size, how):
    """uint8 (C, h, w) -> (C, *size), antialiased; native uint8 kernels, four times as fast as Pillow's."""
    if img.shape[1:] == size:
        return img
    img = img.unsqueeze(0).contiguous(memory_format=torch.channels_last)
    return F.interpolate(img, size, mode=how, antialias=True)[0]


# ----------------------------------------------------------------------------------------------------------------
# Crops


def uniforms(seed, keys, count):
    """(len(keys), count) numbers in 0..1, a function of seed, key = (epoch, index) and column alone: splitmix64, for a
    generator object per image would cost as much as its crop's arithmetic."""
    def mix(x):
        x = x + np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ x >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ x >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
        return x ^ x >> np.uint64(31)

    epoch, index = np.array(keys, dtype=np.uint64).reshape(-1, 2).T
    x = mix(mix(mix(np.full(len(keys), seed, dtype=np.uint64)) ^ epoch) ^ index)
    return (mix(x[:, None] ^ mix(np.arange(count, dtype=np.uint64))) >> np.uint64(11)) * 2.0 ** -53


def crop_box(width, height, scale, ratio, u):
    """RandomResizedCrop's law, as torchvision's: ten tries at an area and a log-uniform aspect ratio, else the largest
    centred box within the ratios. u: 22 numbers in 0..1. Returns left, top, width, height."""
    for k in range(10):
        area = width * height * (scale[0] + (scale[1] - scale[0]) * u[k])
        aspect = ratio[0] * (ratio[1] / ratio[0]) ** u[10 + k]
        w, h = round((area * aspect) ** 0.5), round((area / aspect) ** 0.5)
        if 0 < w <= width and 0 < h <= height:
            return int(u[20] * (width - w + 1)), int(u[21] * (height - h + 1)), w, h
    w = min(width, round(height * ratio[1]))
    h = min(height, round(width / ratio[0]))
    return (width - w) // 2, (height - h) // 2, w, h


class RandomCrops(torch.utils.data.Dataset):
    """Keys (epoch, index) -> a batch of random resized crops: uint8 (B, C, h, w), labels or -1 (B,), names of files
    that could not be read; B = repeat x keys.

    interpolation: "bicubic", "bilinear", or "random" (one of the two per crop, as timm does unless told otherwise).
    repeat: crops of each decoded image, next to each other in the batch (Hoffer et al. 2020).
    """
    draws = 23

    def __init__(self, source, size, channels, seed, scale, interpolation, repeat=1):
        self.source, self.size, self.channels, self.seed = source, tuple(size), channels, seed
        self.scale, self.interpolation, self.repeat = scale, interpolation, repeat

    def plan(self, width, height, u):
        """-> box (left, top, width, height) and interpolation of one crop."""
        how = self.interpolation if self.interpolation != "random" else "bilinear" if u[22] < 0.5 else "bicubic"
        return crop_box(width, height, self.scale, (3 / 4, 4 / 3), u), how

    def crop(self, img, u):
        (left, top, w, h), how = self.plan(img.shape[2], img.shape[1], u)
        return resize(img[:, top:top + h, left:left + w], self.size, how)

    def readable(self, index):
        """-> the image, its index, and the name of the one asked for if that cannot be read: then the next readable one
        takes its place, the same whenever it is asked."""
        for other in range(index, index + 100):
            try:
                other %= len(self.source)
                return (decode(self.source.read(other), self.channels), other,
                        None if other == index else self.source.name(index))
            except Exception:                                   # damaged files raise nearly anything
                continue
        return torch.zeros(self.channels, *self.size, dtype=torch.uint8), index, self.source.name(index)

    def __getitems__(self, keys):
        count = self.draws * self.repeat
        table, labels, failed = uniforms(self.seed, keys, count).tolist(), [], []
        out = shared(len(keys) * self.repeat, *self.size, self.channels)    # pixels together, as decoders give them
        for k, ((epoch, index), u) in enumerate(zip(keys, table)):
            img, used, name = self.readable(index)
            if used != index:
                u = uniforms(self.seed, [(epoch, used)], count)[0].tolist()
            for r in range(self.repeat):
                crop = self.crop(img, u[r * self.draws:(r + 1) * self.draws])
                out[k * self.repeat + r] = crop.permute(1, 2, 0)
                labels.append(-1 if self.source.labels is None else int(self.source.labels[used]))
            failed += [name] if name else []
        return out.permute(0, 3, 1, 2), torch.tensor(labels), failed

    def finish(self, batches, device):
        """The batches of a loader of this dataset -> (crops, labels, names), where there is something left to do."""
        return batches

    def __getitem__(self, key):
        imgs, labels, failed = self.__getitems__([key])
        return imgs[0], int(labels[0]), failed[0] if failed else None


class CenterCrops(RandomCrops):
    """Keys index -> the evaluation crops: the shorter side to size / fraction (bicubic), then the middle. fraction
    0.875 up to 224 pixels and 1 above; an image that already has the size asked for is left as it is."""
    draws = 0

    def __init__(self, source, size, channels):
        super().__init__(source, size, channels, 0, None, "bicubic")

    def crop(self, img, u):
        height, width = self.size
        if img.shape[1:] == self.size:
            return img
        fraction = 0.875 if max(self.size) <= 224 else 1.0
        h, w = int(height / fraction), int(width / fraction)
        by_height = img.shape[1] * w <= img.shape[2] * h        # which side is the shorter, against what is asked
        h, w = (h, int(h * img.shape[2] / img.shape[1])) if by_height else (int(w * img.shape[1] / img.shape[2]), w)
        img = resize(img, (h, w), "bicubic")
        left, top = round((w - width) / 2), round((h - height) / 2)
        return img[:, top:top + height, left:left + width]

    def __getitems__(self, indices):
        return super().__getitems__([(0, index) for index in indices])


class DeviceCrops(RandomCrops):
    """The same crops, but workers only read files: JPEGs are decoded and resized where the network is, batch by batch.
    Resizing is rounded once and not twice, so pixels differ by a rounding from RandomCrops', on a GPU also by what its
    JPEG decoder does otherwise."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        if decode_jpeg is None or self.channels == 4:
            raise SystemExit("--decode device needs torchcodec (pip install torchcodec) and 1 or 3 channels")

    def __getitems__(self, keys):
        """-> keys, and for each the JPEG's bytes and its crops' plans, or, of what is no plain JPEG, the crops."""
        items, labels, failed = [], [], []
        for key, u in zip(keys, uniforms(self.seed, keys, self.draws * self.repeat).tolist()):
            try:
                data = self.source.read(key[1])
                img = Image.open(io.BytesIO(data))              # reads the header alone
                plain = img.format == "JPEG" and img.mode in ("L", "RGB") and data.endswith(b"\xff\xd9")
                plain = plain and img.getexif().get(0x0112, 1) == 1
            except Exception:
                plain = False
            if plain:
                items.append((data, [self.plan(*img.size, u[i:i + self.draws]) for i in range(0, len(u), self.draws)]))
                labels += [-1 if self.source.labels is None else int(self.source.labels[key[1]])] * self.repeat
            else:
                crops, marks, names = super().__getitems__([key])
                items, labels, failed = items + [crops], labels + marks.tolist(), failed + names
        return keys, items, torch.tensor(labels), failed

    def finish(self, batches, device):
        mode, buffer = "GRAY" if self.channels == 1 else "RGB", io.BytesIO()
        Image.new("RGB", (16, 16)).save(buffer, "JPEG")
        try:
            decode_jpeg([buffer.getvalue()], mode=mode, device=device)
        except (RuntimeError, ValueError) as error:
            raise SystemExit(f"--decode device: torchcodec cannot decode on {device} here "
                             f"({str(error).splitlines()[0][:80]})") from None
        for keys, items, labels, failed in batches:
            files = [item[0] for item in items if not isinstance(item, torch.Tensor)]
            try:
                imgs = iter(decode_jpeg(files, mode=mode, device=device) if files else [])
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:                       # one is damaged: the careful way finds out which
                print(f"note: a batch is decoded with care, for {str(error).splitlines()[0][:80]}", flush=True)
                crops, labels, failed = super().__getitems__(keys)
                yield crops.to(device), labels, failed
                continue
            crops, cubic = [], []
            for item in items:
                if isinstance(item, torch.Tensor):              # of the right size, which resizing leaves as it is
                    crops, cubic = crops + list(item.to(device)), cubic + [True] * len(item)
                else:
                    img = next(imgs)
                    crops += [img[:, top:top + h, left:left + w] for (left, top, w, h), _ in item[1]]
                    cubic += [how == "bicubic" for _, how in item[1]]
            yield resize_each(crops, self.size, torch.tensor(cubic)), labels, failed


CROPS = dict(workers=RandomCrops, device=DeviceCrops)           # --decode


# ----------------------------------------------------------------------------------------------------------------
# Batches


def keys(images, batch, accum, world, rank, seed, start, steps, repeat=1):
    """Yields, for optimizer steps start..steps-1 and their `accum` parts, this rank's list of (epoch, index).

    An epoch is a permutation of (seed, epoch) and whole batches only; batch is the global one. Pure arithmetic, so a
    restart begins at its step and not at the beginning of the epoch. repeat: crops of each image in a batch, which then
    has batch / repeat images; a step has as many crops as without, and a pass over the images takes `repeat` epochs.
    """
    batch //= repeat
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


def shared(*shape):
    """An empty uint8 tensor; in a worker, in memory that the training process sees without a copy."""
    if torch.utils.data.get_worker_info() is None:
        return torch.empty(shape, dtype=torch.uint8)
    count = torch.Size(shape).numel()
    return torch.empty(0, dtype=torch.uint8).set_(torch.UntypedStorage._new_shared(count), 0, shape)


def cores():
    """Those that this training process can have."""
    here = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, here // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def as_they_are(batch):
    return batch


def quiet_worker(_):
    # Signals are the training process's to act on: a worker killed by the same Ctrl-C would take the unsaved run with
    # it. But when that process is killed, a worker that is writing to it would wait for ever: so it dies with it.
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)              # PR_SET_PDEATHSIG
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    torch.set_num_threads(1)


def load(dataset, batches, workers, pin=False):
    """Batches of a dataset by lists of keys, made in `workers` processes (0: in this one; None: one per core that this
    training process can have, at most 16)."""
    workers = min(16, cores()) if workers is None else workers
    # Forked, so that workers share the source's arrays. A generator of its own: otherwise the loader's start draws from
    # the one that the step's flips and masks come from.
    return torch.utils.data.DataLoader(dataset, batch_sampler=batches, num_workers=workers, pin_memory=pin,
                                       collate_fn=as_they_are, worker_init_fn=quiet_worker if workers else None,
                                       multiprocessing_context="fork" if workers and sys.platform == "linux" else None,
                                       generator=torch.Generator())


def stream(cfg, source, size, world, rank, start, steps, device):
    """The random crops of optimizer steps start..steps-1 and their accumulation parts, for this rank: uint8 images on
    their way to the device, labels, names of unreadable files. Every script that trains on crops has these options."""
    crops = CROPS[cfg.decode](source, size, cfg.in_chans, cfg.seed, (cfg.min_crop, 1.0), cfg.interpolation, cfg.repeat)
    order = keys(len(source), cfg.batch_size, cfg.accum, world, rank, cfg.seed, start, steps, cfg.repeat)
    return crops.finish(load(crops, order, cfg.workers, pin=device.type == "cuda"), device)


# ----------------------------------------------------------------------------------------------------------------
# python data.py inspect, python data.py pack


NOTE_EVERY = 5                                                  # seconds between notes of how far a pack is good


class Listed(torch.utils.data.Dataset):
    """Keys are places in a list of (source, index, ...); a batch is the list of what `look` says of each of them."""

    def __init__(self, items, look):
        self.items, self.look = items, look

    def __getitems__(self, places):
        return [self.look(*self.items[place]) for place in places]


def watched(items, look, workers, start=0):
    """Yields look(*item) of items[start:], in order, from all cores, with a line of progress now and then."""
    batches = [range(i, min(i + 16, len(items))) for i in range(start, len(items), 16)]
    began, said, done = time.time(), time.time(), start
    for results in load(Listed(items, look), batches, cores() if workers is None else workers):
        yield from results
        done += len(results)
        if time.time() - said > 10:
            said, rate = time.time(), (done - start) / (time.time() - began)
            eta = str(datetime.timedelta(seconds=round((len(items) - done) / rate)))
            print(f"{done:,} of {len(items):,} images, {rate:.0f} a second, eta {eta}", flush=True)


def look_at(source, i):
    """-> format, mode, width, height, bytes, and None or why it cannot be read."""
    try:
        data = source.read(i)
        img = Image.open(io.BytesIO(data)) if isinstance(data, bytes) else data
        found = str(img.format or "pixels"), img.mode, *img.size, len(data) if isinstance(data, bytes) else 0
        decode(data)
        return *found, None
    except Exception as error:
        why = (str(error).splitlines() or [type(error).__name__])[0].split(" <_io")[0]
        return "unreadable", "", 0, 0, 0, f"{source.name(i)}: {why}"


def inspect(a):
    """What is in a source; every image is decoded. Says so with exit code 1 if one cannot be."""
    bad = []
    for split in ("train", "val"):
        source = find(a.source, split, a.download)
        if source is None:
            continue
        print(f"{split}: {describe(source)}")
        rows = list(watched(ArrayOfPairs([(source, len(source))]), look_at, a.workers))
        good = [row for row in rows if row[5] is None]
        bad += [row[5] for row in rows if row[5]]
        if good:
            sides = np.sort(np.array([sorted(row[2:4]) for row in good]), axis=0)
            middle = len(good) // 2
            print(f"  short side {sides[0, 0]} to {sides[-1, 0]} pixels, in the middle {sides[middle, 0]}; long side "
                  f"{sides[0, 1]} to {sides[-1, 1]}, in the middle {sides[middle, 1]}; "
                  f"{sum(row[4] for row in good) / 2 ** 20:,.1f} MB")
            kinds = Counter(f"{row[0]} {row[1]}" for row in good)
            print("  " + ", ".join(f"{count:,} {kind}" for kind, count in kinds.most_common()))
        if source.classes:
            counts = np.bincount(source.labels, minlength=len(source.classes))
            few, many = counts.argmin(), counts.argmax()
            print(f"  classes of {counts[few]:,} ({source.classes[few]}) to {counts[many]:,} ({source.classes[many]})")
    print("\n".join([f"{len(bad)} images cannot be read", *bad[:20], *["..."] * (len(bad) > 20)]))
    return 1 if bad else 0


class ArrayOfPairs:
    """The (source, index) of every image of several sources, made when asked for: a list would hold millions."""

    def __init__(self, parts):
        self.parts = parts

    def __len__(self):
        return sum(part[1] for part in self.parts)

    def __getitem__(self, place):
        for source, count, *more in self.parts:
            if place < count:
                return source, place, *more
            place -= count


def packed_name(source, i, folder, *_):
    name = folder + source.relative(i)
    return name + ("" if name.lower().endswith((".jpg", ".jpeg")) else ".jpg")


def smaller(source, i, folder, short_side, quality):
    """-> name in the packed tar, JPEG bytes (None: unreadable). A JPEG that is small enough goes over as it is."""
    name = packed_name(source, i, folder)
    try:
        data = source.read(i)
        img = Image.open(io.BytesIO(data)) if isinstance(data, bytes) else data
        fits = min(img.size) <= short_side
        if fits and img.format == "JPEG" and img.mode in ("L", "RGB") and img.getexif().get(0x0112, 1) == 1:
            decode(data)
            return name, data
        img = to_channels(open_image(img), 1 if img.mode in ("1", "L") else 3)
        if not fits:
            share = short_side / min(img.size)
            img = img.resize([max(short_side, round(side * share)) for side in img.size], Image.Resampling.BICUBIC)
        buffer = io.BytesIO()
        img.save(buffer, "JPEG", quality=quality)
        return name, buffer.getvalue()
    except Exception:
        return source.name(i), None


def pack(a):
    """Write a source at training resolution as a plain tar that `find` takes.

    It grows as DEST.part, is synced every few seconds, with a note beside it of how far it is good, and gets its name
    when it is whole. The same command goes on from the note; then the tar is the same byte for byte.
    """
    if os.path.exists(a.dest) or not a.dest.endswith(".tar"):
        raise SystemExit(f"{a.dest} exists: move it away, or choose another name" if os.path.exists(a.dest) else
                         f"{a.dest}: the name of a packed set ends in .tar")
    if a.short_side < 1 or not 1 <= a.quality <= 100:
        raise SystemExit(f"--short-side is at least 1 and --quality 1 to 100, not {a.short_side} and {a.quality}")
    sources = {split: find(a.source, split, a.download) for split in ("train", "val")}
    sources = {split: source for split, source in sources.items() if source is not None}
    parted = len(sources) > 1 or sources["train"].classes is not None
    items = ArrayOfPairs([(s, len(s), f"{k}/" * parted, a.short_side, a.quality) for k, s in sources.items()])
    names = [packed_name(*items[i]) for i in range(len(items))]
    if len(set(names)) < len(names):
        twice = next(name for name, count in Counter(names).items() if count > 1)
        raise SystemExit(f"two images would both be {twice} in {a.dest}: rename one of them and pack again")
    digest = hashlib.sha256("\n".join(names).encode("utf-8", "surrogateescape")).hexdigest()
    settings = dict(format=1, names=digest, images=len(names), short_side=a.short_side, quality=a.quality)
    for split, source in sources.items():
        print(f"{split}: {describe(source)}")
    part, note = a.dest + ".part", a.dest + ".part.json"
    try:
        opened = open(part, "a+b")
    except OSError as error:
        raise SystemExit(f"{part} cannot be written: {error}") from None
    with opened as f:
        try:                                                    # lockf, not flock, which worker processes inherit
            fcntl.lockf(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise SystemExit(f"{part} is being written by another process: wait for it") from None
        done, good, left_out = progress(note, part, settings)
        f.truncate(good)
        if done:
            print(f"going on after {done:,} of {len(items):,} images")
        try:
            done, left_out = write_tar(f, note, settings, items, done, left_out, a.workers)
        except OSError as error:
            raise SystemExit(f"{part} cannot be written ({error}): make room, and the same command goes on") from None
        except KeyboardInterrupt:
            raise SystemExit(f"\nstopped: the same command goes on from {part}") from None
    os.replace(part, a.dest)
    os.remove(note)
    print(f"packed {len(items) - len(left_out):,} images into {a.dest}, {os.path.getsize(a.dest) / 2 ** 20:,.1f} MB" +
          f"; {len(left_out)} cannot be read and were left out" * bool(left_out))
    for split, source in sources.items():
        if find(a.dest, split).classes != source.classes:
            print(f"note: the classes of {split} are not those of {a.source}: there they are not in the order of their "
                  "names, or one has no image that can be read")


def progress(note, part, settings):
    """-> images written, bytes that are good, names left out, from an earlier start of the same command, or zeros."""
    try:
        with open(note) as f:
            told = json.load(f)
        if told["settings"] == settings and told["bytes"] <= os.path.getsize(part):
            return told["done"], told["bytes"], told["left_out"]
    except (OSError, ValueError, KeyError, TypeError):
        told = None
    if told and told["settings"] != settings:
        differ = ", ".join(k for k in settings if told["settings"].get(k) != settings[k])
        raise SystemExit(f"{part} was begun with other settings or images ({differ}): give the same, or delete it and "
                         f"{note}")
    return 0, 0, []


def write_tar(f, note, settings, items, done, left_out, workers):
    synced = time.time()

    def sync():
        f.flush()
        os.fsync(f.fileno())
        count, size, bad = good                                 # of whole images: a stop may fall amid writing one
        with open(note + ".tmp", "w") as n:
            json.dump(dict(settings=settings, done=count, bytes=size, left_out=left_out[:bad]), n)
            n.flush()
            os.fsync(n.fileno())
        os.replace(note + ".tmp", note)

    f.seek(0, os.SEEK_END)
    with tarfile.open(fileobj=f, mode="w:") as archive:
        good = done, archive.offset, len(left_out)
        try:
            for name, data in watched(items, smaller, workers, done):
                if data is None:
                    left_out.append(name)
                    print(f"warning: {name} cannot be read and is left out", flush=True)
                else:
                    info = tarfile.TarInfo(name)                # no dates, no owners: the same images, the same bytes
                    info.size = len(data)
                    archive.addfile(info, io.BytesIO(data))
                    archive.members = []                        # it would keep a million of them
                done += 1
                good = done, archive.offset, len(left_out)
                if time.time() - synced > NOTE_EVERY:
                    sync()
                    synced = time.time()
        finally:
            sync()
    f.flush()
    os.fsync(f.fileno())
    return done, left_out


def command_line(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, run in (("inspect", inspect), ("pack", pack)):
        sub = commands.add_parser(name, help=run.__doc__.splitlines()[0])
        sub.set_defaults(run=run)
        sub.add_argument("source", help="what --data may be")
        if run is pack:
            sub.add_argument("dest", help="the tar to write")
            sub.add_argument("--short-side", type=int, default=256, help="pixels; smaller images stay as they are")
            sub.add_argument("--quality", type=int, default=90, help="of JPEG, 1 to 100")
        sub.add_argument("--workers", type=int, choices=range(257), metavar="N", help="processes [one per core]")
        sub.add_argument("--download", action="store_true", help="fetch a set that torchvision knows by name")
    a = parser.parse_args(argv)
    return a.run(a)


if __name__ == "__main__":
    sys.exit(command_line())
