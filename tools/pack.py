"""
Pack a set of images at training resolution into one plain tar, which is faster to read; or look at what is in a set.

python -m tools.pack SOURCE DEST.tar --short-side 256 --quality 90   then train on it with --data DEST.tar
python -m tools.pack inspect SOURCE                                  counts, sizes, classes, images that cannot be read
python -m tools.pack inspect SOURCE --stats                          also mean and deviation of each channel, to paste
python -m tools.pack words SOURCE WORDS.npy --tokenizer FILE.pt2     the visual words of whole images, for BEiT
SOURCE is what --data may be (see images/datasets.py)
"""
import argparse
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
from contextlib import suppress
from datetime import timedelta

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch.utils.data import ConcatDataset, Dataset

from data import JPEG, PLAIN, WholeImages, cores, decode, load, open_image, to_channels
from images.datasets import describe, digest_of_names, look_over, open_dataset
from images.deep import as_range, extremes, reason, remarks, upright_array
from nets.tokens import load_tokenizer, words_of
from runtime.options import value_errors_exit
from runtime.run import launch

NOTE_EVERY = 5                                                  # seconds between notes of how far a pack is good


class Worked(Dataset):
    """What work(source, i, *options) returns for every image of a source."""
    def __init__(self, work, source, *options):
        self.work, self.source, self.options = work, source, options
    def __len__(self):
        return len(self.source)
    def __getitem__(self, i):
        return self.work(self.source, i, *self.options)


class Entries(ConcatDataset):
    """The images of all parts of a set, one after the other."""
    def __getitems__(self, numbers):
        return [self[i] for i in numbers]


def with_progress(entries, workers, start=0):
    """Yield the items of a dataset from `start` on, in order, made by all cores; print a line now and then."""
    batches = [range(i, min(i + 16, len(entries))) for i in range(start, len(entries), 16)]
    began, printed, done = time.time(), time.time(), start
    for results in load(entries, batches, cores() if workers is None else workers):
        yield from results
        done += len(results)
        if time.time() - printed > 10:
            printed, rate = time.time(), (done - start) / (time.time() - began)
            eta = timedelta(seconds=round((len(entries) - done) / rate))
            print(f"{done:,} of {len(entries):,} images, {rate:.0f} per second, eta {eta}", flush=True)


def splits_of(a):
    """The sources of a set by name: train, and val if there is one."""
    sources = {split: open_dataset(a.source, split, a.download) for split in ("train", "val")}
    return {split: source for split, source in sources.items() if source is not None}


def look_at(source, i, stats=False):
    """Decode one image -> its kind, width, height, bytes, extremes, means of its channels and of their squares (with
    stats); or one string that says why it cannot be read."""
    try:
        data = source.read(i)
        img = open_image(data, source.value_range)
        size = len(data) if isinstance(data, bytes) else 0
        pixels = img if isinstance(img, np.ndarray) else upright_array(img)                     # (h, w, C)
        kind = f"{pixels.shape[2]} bands"
        if isinstance(img, Image.Image):
            with suppress(UnidentifiedImageError):              # some TIFFs that tifffile reads
                raw = Image.open(io.BytesIO(data)) if size else img
                kind = f"{raw.format or 'pixels'} {raw.mode}"
        plain = not size or PLAIN.match(data)
        found = (int(pixels.min()), int(pixels.max()), 255, False) if plain else extremes(data)
        share = pixels.reshape(-1, pixels.shape[2]) / 255 if stats else np.zeros((1, 1))
        return kind, *pixels.shape[1::-1], size, found, share.mean(0), (share ** 2).mean(0)
    except Exception as error:                                  # damaged files raise almost anything
        return f"{source.name(i)}: {reason(error)}"


def print_stats(good):
    """Print the options for mean and deviation of each channel, in which every image counts alike."""
    channels = Counter(len(row[5]) for row in good).most_common(1)[0][0]
    rows = [row[5:] for row in good if len(row[5]) == channels]
    mean, square = np.mean(rows, axis=0)
    mean, std = (" ".join(f"{x:.4f}" for x in values) for values in (mean, (square - mean ** 2).clip(1e-8) ** 0.5))
    print(f"  of {len(rows):,} images: --in-chans {channels} --mean {mean} --std {std}")


def inspect(a):
    """Say what is in a set; every image is decoded. The exit code is 1 if some cannot be."""
    bad = []
    for split, source in splits_of(a).items():
        print(f"{split}: {describe(source)}")
        source.value_range = as_range(a.bits, a.value_range)
        rows = list(with_progress(Entries([Worked(look_at, source, a.stats)]), a.workers))
        bad += [row for row in rows if isinstance(row, str)]
        good = [row for row in rows if not isinstance(row, str)]
        if good:
            sides = np.sort([sorted(row[1:3]) for row in good], axis=0)                         # (images, 2)
            least, median, most = sides[0], sides[len(good) // 2], sides[-1]
            print(f"  short side {least[0]} to {most[0]} pixels, median {median[0]}; long side {least[1]} to {most[1]} "
                  f"pixels, median {median[1]}; {sum(row[3] for row in good) / 2 ** 20:,.1f} MB")
            kinds = Counter(row[0] for row in good)
            print("  " + ", ".join(f"{count:,} {kind}" for kind, count in kinds.most_common()))
            for line in remarks([row[4] for row in good], source.value_range):
                print(f"  note: {line}")
            if a.stats:
                print_stats(good)
        if source.classes:
            counts = np.bincount(source.labels, minlength=len(source.classes))
            few, many = counts.argmin(), counts.argmax()
            print(f"  classes of {counts[few]:,} ({source.classes[few]}) to {counts[many]:,} ({source.classes[many]})")
    print(f"{len(bad)} images cannot be read", *bad[:20], sep="\n")
    if len(bad) > 20:
        print("...")
    return 1 if bad else 0


def packed_name(source, i, folder):
    name = folder + source.relative(i)
    return name if name.lower().endswith((".jpg", ".jpeg")) else name + ".jpg"


def smaller(source, i, folder, short_side, quality):
    """-> name in the packed tar, bytes of a JPEG; or name, why it is unreadable. A small JPEG goes over as it is."""
    name = packed_name(source, i, folder)
    try:
        data = source.read(i)
        img = open_image(data, source.value_range)
        raw = Image.open(io.BytesIO(data)) if isinstance(data, bytes) and data.startswith(JPEG) else None
        fits = isinstance(img, np.ndarray) or min(img.size) <= short_side
        if fits and raw and raw.mode in ("L", "RGB") and raw.getexif().get(0x0112, 1) == 1 and not source.value_range:
            decode(data)
            return name, data
        img = to_channels(img, 3 if isinstance(img, np.ndarray) or img.mode not in ("1", "L") else 1)
        if not fits:
            share = short_side / min(img.size)
            img = img.resize([max(short_side, round(side * share)) for side in img.size], Image.Resampling.BICUBIC)
        buffer = io.BytesIO()
        img.save(buffer, "JPEG", quality=quality)
        return name, buffer.getvalue()
    except Exception as error:                                  # damaged files raise almost anything
        return source.name(i), reason(error)


def pack(a):
    """Write a set at training resolution as a tar. It grows as DEST.part, with a note beside it of how far it is good,
    and gets its name when it is whole. After a stop the same command goes on to the same tar, byte for byte."""
    if not a.dest.endswith(".tar"):
        raise SystemExit(f"{a.dest}: the name of a packed set ends in .tar")
    if os.path.exists(a.dest):
        raise SystemExit(f"{a.dest} exists: move it away, or choose another name")
    if a.short_side < 1 or not 1 <= a.quality <= 100:
        raise SystemExit(f"--short-side is at least 1 and --quality 1 to 100, not {a.short_side} and {a.quality}")
    sources = splits_of(a)
    for source in sources.values():
        try:
            look_over(source, 3, a.bits, a.value_range)
        except SystemExit as stop:
            raise SystemExit(f"{stop}; a packed set is of JPEGs, which have 8 bits and are grey or RGB") from None
    parted = len(sources) > 1 or sources["train"].classes is not None
    parts = [(source, f"{split}/" if parted else "") for split, source in sources.items()]
    entries = Entries([Worked(smaller, source, folder, a.short_side, a.quality) for source, folder in parts])
    names = [packed_name(source, i, folder) for source, folder in parts for i in range(len(source))]
    name, count = Counter(names).most_common(1)[0]
    if count > 1:
        raise SystemExit(f"two images would both be {name} in {a.dest}: rename one of them and pack again")
    digest = hashlib.sha256("\n".join(names).encode("utf-8", "surrogateescape")).hexdigest()
    settings = dict(format=1, names=digest, images=len(names), short_side=a.short_side, quality=a.quality,
                    value_range=a.value_range or a.bits)
    for split, source in sources.items():
        print(f"{split}: {describe(source)}")
    left_out = write_part(a.dest, entries, settings, a.workers)
    print(f"packed {len(entries) - len(left_out):,} images into {a.dest}, {os.path.getsize(a.dest) / 2 ** 20:,.1f} MB")
    if left_out:
        print(f"{len(left_out)} cannot be read and were left out")
    for split, source in sources.items():
        if open_dataset(a.dest, split).classes != source.classes:
            print(f"note: {split} has other classes than {a.source}, where they are unsorted, or one is unreadable")
    print(f"train on it with --data {a.dest}")


def stop(number, frame):
    signal.signal(number, signal.SIG_DFL)                       # a second one ends the process at once
    raise KeyboardInterrupt


def write_part(dest, entries, settings, workers):
    """Write DEST.part, or go on with it, then give it its name -> names of the images that were left out."""
    part, note = dest + ".part", dest + ".part.json"
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:          # as nohup leaves SIGHUP
            signal.signal(number, stop)
    try:
        with open(part, "a+b") as f:
            try:                                                # lockf, not flock, which worker processes inherit
                fcntl.lockf(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise SystemExit(f"{part} is being written by another process: wait for it") from None
            state = read_note(note, part, settings)
            f.truncate(state["bytes"])
            if state["done"]:
                print(f"going on after {state['done']:,} of {len(entries):,} images")
            write_tar(f, note, state, entries, workers)
    except OSError as error:
        raise SystemExit(f"{part} cannot be written ({error}): mend that, and the same command goes on") from None
    except KeyboardInterrupt:
        raise SystemExit(f"stopped: the same command goes on from {part}") from None
    os.replace(part, dest)
    os.remove(note)
    return state["left_out"]


def read_note(note, part, settings):
    """How far an earlier start of the same command came -> dict(settings, done, bytes, left_out)."""
    fresh = dict(settings=settings, done=0, bytes=0, left_out=[])
    try:
        with open(note) as f:
            state = json.load(f)
        if state["settings"] == settings:
            return state if set(state) == set(fresh) and state["bytes"] <= os.path.getsize(part) else fresh
        differ = ", ".join(key for key in settings if state["settings"].get(key) != settings[key])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return fresh                                            # no note, or a damaged one
    raise SystemExit(f"{part} was begun with other settings or images ({differ}): give them again, or delete {part}*")


def write_note(f, note, state):
    """Bring the tar to the disk, then the note of how far it is good."""
    f.flush()
    os.fsync(f.fileno())
    with open(note + ".tmp", "w") as n:
        json.dump(state, n)
        n.flush()
        os.fsync(n.fileno())
    os.replace(note + ".tmp", note)


def write_tar(f, note, state, entries, workers):
    """Append the images that are not `done` to an open tar. state: of whole images only, at any moment, because a stop
    may fall in the middle of writing one."""
    f.seek(0, os.SEEK_END)
    synced = time.time()
    with tarfile.open(fileobj=f, mode="w:") as archive:
        try:
            for name, data in with_progress(entries, workers, state["done"]):
                left_out = state["left_out"]
                if isinstance(data, str):
                    left_out = [*left_out, name]
                    print(f"warning: {name} cannot be read and is left out ({data})", flush=True)
                else:
                    info = tarfile.TarInfo(name)                # no dates, no owners: the same images, the same bytes
                    info.size = len(data)
                    archive.addfile(info, io.BytesIO(data))
                    archive.members = []                        # it would keep a million of them
                state.update(done=state["done"] + 1, bytes=archive.offset, left_out=left_out)
                if time.time() - synced > NOTE_EVERY:
                    write_note(f, note, state)
                    synced = time.time()
        finally:
            write_note(f, note, state)
    write_note(f, note, state)                                  # syncs the end mark, which closing the archive wrote


def words(a):
    """Write the words of all training images, as a tokenizer sees them whole, as int32 (images, h, w); and beside them
    a note of which images these are."""
    source = open_dataset(a.source, "train", a.download)
    look_over(source, a.in_chans, a.bits, a.value_range)
    print(describe(source))
    grid, numbers, found = (a.img_size // a.patch_size,) * 2, range(len(source)), []
    keys = [[(0, i) for i in numbers[start:start + 64]] for start in range(0, len(source), 64)]
    crops = WholeImages(source, (a.img_size, a.img_size), a.in_chans)
    with value_errors_exit():
        tokenizer = load_tokenizer(a.tokenizer)
        for img, _, failed in load(crops, keys, cores() if a.workers is None else a.workers):
            found.append(words_of(tokenizer, img, grid))
            for name, _ in failed:
                print(f"warning: {name} cannot be read; the words of the next image stand for it")
    found = torch.cat(found).int().numpy()                                                      # (images, h, w)
    note = dict(images=len(source), names=digest_of_names(source), img_size=a.img_size, tokenizer=a.tokenizer)
    try:
        np.save(a.dest, found)
        with open(a.dest.removesuffix(".npy") + ".json", "w") as f:
            json.dump(note, f)
    except OSError as error:
        raise SystemExit(f"{a.dest} cannot be written: {error}") from None
    print(f"wrote {a.dest}: {grid[0]} x {grid[1]} words of {len(source):,} images, from {found.min()} to {found.max()}")


def command_line(argv=None):
    """Run what the command line asks for -> exit code. Without `inspect` or `words` as its first word it packs."""
    argv = sys.argv[1:] if argv is None else list(argv)
    looking, asking = argv[:1] == ["inspect"], argv[:1] == ["words"]
    parser = argparse.ArgumentParser(prog="python -m tools.pack", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="what --data may be")
    parser.add_argument("--bits", type=int, choices=range(1, 33), metavar="N", help="values are 0 to 2^N-1")
    parser.add_argument("--value-range", type=float, nargs=2, metavar=("LO", "HI"), help="what is black, what is white")
    if looking:
        parser.add_argument("--stats", action="store_true", help="measure mean and deviation of each channel")
    elif asking:
        parser.add_argument("dest", help="the .npy to write")
        parser.add_argument("--tokenizer", required=True, help="a program of torch.export.save, see nets/tokens.py")
        for name, default in (("img-size", 224), ("patch-size", 16), ("in-chans", 3)):
            parser.add_argument(f"--{name}", type=int, default=default, help=f"of the run to come [{default}]")
    else:
        parser.add_argument("dest", help="the tar to write")
        parser.add_argument("--short-side", type=int, default=256, help="pixels [256]; smaller images stay as they are")
        parser.add_argument("--quality", type=int, default=90, help="of JPEG, 1 to 100 [90]")
    parser.add_argument("--workers", type=int, choices=range(257), metavar="N", help="processes [one per core]")
    parser.add_argument("--download", action="store_true", help="fetch a set that torchvision knows by name")
    a = parser.parse_args(argv[1:] if argv[:1] in (["inspect"], ["pack"], ["words"]) else argv)
    if asking:
        return words(a)
    return inspect(a) if looking else pack(a)


if __name__ == "__main__":
    launch(lambda: sys.exit(command_line()))
