"""
What --data may be:
imagenet/                          a folder with train/ and val/ (or valid, validation, test), one sub-folder per class
imagenet/ILSVRC2012_img_train.tar  tars in the place of these folders, ImageNet's own files among them, or one of them
photos/   photos.tar               any other folder or tar of images, then without labels
cifar10   dtd   shapes             a set that torchvision knows by name (images/named.py), or shapes, which are drawn

A source has images (an array, a row for each), labels (an array or None), classes (their names or None), read(i), the
bytes or a PIL image, name(i) for messages, relative(i), the path inside it, where, skipped (other files by suffix).
"""
import bisect
import copy
import hashlib
import os
from collections import Counter
from pathlib import Path

import numpy as np

from images.shapes import Shapes
from images.tars import HIDDEN, SUFFIXES, index, top_folders

TRAIN_NAMES = ("train", "ILSVRC2012_img_train")
VAL_NAMES = ("val", "valid", "validation", "test", "ILSVRC2012_img_val")


def walk(folder, skipped, seen=()):
    """Yield the paths of all images below a folder, sorted. It follows links, but no circle of links. The Counter
    `skipped` gets the suffixes of all other files."""
    here = os.path.realpath(folder)
    if here in seen:
        return
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError as error:
        raise SystemExit(f"{folder} cannot be read: {error.strerror}") from None
    for entry in entries:
        if entry.name.startswith(HIDDEN):
            continue
        if entry.is_symlink() and not os.path.exists(entry.path):
            skipped["dead links"] += 1
        elif entry.is_dir():
            yield from walk(entry.path, skipped, (*seen, here))
        elif entry.name.lower().endswith(SUFFIXES):
            yield entry.path
        else:
            skipped[os.path.splitext(entry.name)[1].lower() or "no suffix"] += 1


class Folder:
    """The images below a folder. counts: how many each of its sub-folders holds; of "": how many lie beside them."""

    def __init__(self, root):
        self.root, self.where, self.labels, self.classes, self.skipped = root, root, None, None, Counter()
        paths = [os.path.relpath(path, root) for path in walk(root, self.skipped)]
        # One array of bytes and not a list of strings: forked workers share its memory.
        self.images = np.array([os.fsencode(path) for path in paths], dtype=bytes)
        self.counts = Counter(path.split("/")[0] if "/" in path else "" for path in paths)
        self.counts.update({e.name: 0 for e in os.scandir(root) if os.path.isdir(e) and not e.name.startswith(HIDDEN)})

    def __len__(self):
        return len(self.images)
    def relative(self, i):
        return os.fsdecode(self.images[i])
    def name(self, i):
        return os.path.join(self.root, self.relative(i))
    def read(self, i):
        return Path(self.name(i)).read_bytes()


class Tar(Folder):
    """The images of a tar, or of one of its first folders (`inside`), as if it were unpacked. Nothing is unpacked."""

    def __init__(self, path, inside=""):
        facts, table = index(path)
        self.path, self.prefix, self.fd, self.pid = path, inside + "/" if inside else "", None, None
        self.root = self.where = os.path.join(path, inside) if inside else path
        self.labels, self.classes, self.skipped, self.counts = None, None, Counter(facts["skipped"]), Counter()
        self.nested = facts["nested"]
        for top, sub, count in facts["folders"]:
            if not inside or top == inside:
                self.counts[sub if inside else top] += count
        first = bisect.bisect_left(table, [inside], key=lambda row: os.fsdecode(row["name"]).split("/"))
        self.images = table[first:first + self.counts.total()]

    def relative(self, i):
        return os.fsdecode(self.images["name"][i])[len(self.prefix):]

    def read(self, i):
        _, start, size = self.images[i]
        if self.pid != os.getpid():                             # each process opens the tar for itself, once
            self.fd, self.pid = os.open(self.path, os.O_RDONLY), os.getpid()
        data = os.pread(self.fd, size, start)
        if len(data) < size:
            raise OSError(f"{self.path} has become shorter")
        return data


def beside(folder, names):
    """The first of `names` that is a folder in `folder`, or a tar with .tar after its name; or None."""
    paths = [os.path.join(folder, name + end) for name in names for end in ("", ".tar")]
    return next((p for p in paths if os.path.isdir(p) or (p.endswith(".tar") and os.path.isfile(p))), None)


def open_tar(place, split):
    """Open a tar of images, or the folder in it that is the split."""
    tops, names = top_folders(place), TRAIN_NAMES if split == "train" else VAL_NAMES
    parted = "train" in tops or len(tops) == 1
    return Tar(place, next((name for name in names if parted and name in tops), ""))


def open_part(place, split, labelled):
    """Open the folder or tar that is one split of a set, or the tar that holds the split as a folder."""
    if os.path.isdir(place):
        source = Folder(place)
    else:
        source = open_tar(place, split)
        labelled = labelled or source.prefix or source.nested   # of a tar of tars, each inner one is a class
    classes = sorted(name for name in source.counts if name)
    if labelled and classes and not source.counts[""]:          # sub-folders with images beside them are no classes
        empty = [os.path.join(source.root, name) for name in classes if not source.counts[name]]
        if empty:
            raise SystemExit(f"{len(empty)} class folders hold no image, first {empty[0]}: fill them or remove them")
        source.classes = classes
        source.labels = np.repeat(np.arange(len(classes)), [source.counts[name] for name in classes])
    if not len(source):
        raise SystemExit(f"no image found under {source.where}: looked for files ending in {' '.join(SUFFIXES)}")
    if split == "val" and source.labels is None and "ILSVRC2012_val_" in source.relative(0):
        from images.named import label_imagenet
        label_imagenet(source, os.path.dirname(os.path.abspath(place)))
    return source


def open_dataset(data, split="train", download=False):
    """Open what --data names (see the head of this file), or stop with a sentence. split: "train", or "val", and then
    None if there is none. download: fetch a named set that is not there."""
    if data == "shapes":
        return Shapes(split)
    root = os.environ.get("IMAGENET", "imagenet") if data == "imagenet" else data
    if os.path.isdir(root):
        train, val = beside(root, TRAIN_NAMES), beside(root, VAL_NAMES)
        if split == "train":
            return open_part(train or root, split, labelled=train is not None)
        return open_part(val, split, labelled=True) if train and val else None
    return open_tar_set(root, split) if os.path.exists(root) else open_named_set(data, root, split, download)


def open_tar_set(root, split):
    tops, stem = top_folders(root), os.path.splitext(os.path.basename(root))[0]
    if split == "train" or ("train" in tops and tops & set(VAL_NAMES)):
        return open_part(root, split, labelled=stem in TRAIN_NAMES + VAL_NAMES)
    val = beside(os.path.dirname(root), VAL_NAMES)
    return open_part(val, split, labelled=True) if val and stem in TRAIN_NAMES else None


def open_named_set(data, root, split, download):
    from images.named import SETS, Named  # here, because torchvision takes a while to import
    if data in SETS:
        return Named(data, split, download) if split == "train" or SETS[data][2] else None
    looked = "./imagenet (and $IMAGENET is not set)" if root == data == "imagenet" else root
    raise SystemExit(f"no data: {looked} does not exist; give --data a folder or tar of images (train/ and val/ inside "
                     f"are used) or one of {', '.join(SETS)}; or set IMAGENET, or try --demo")


def subset(source, fraction, seed):
    """A random `fraction` of every class, at least one image of each; always the same for the same seed."""
    if not 0 < fraction <= 1:
        raise SystemExit(f"--fraction is above 0 and at most 1, not {fraction:g}")
    if fraction == 1:
        return source
    rng, part = np.random.default_rng((seed, 1)), copy.copy(source)
    labels = np.zeros(len(source), int) if source.labels is None else source.labels
    by_class = np.argsort(labels, kind="stable")
    groups = np.split(by_class, np.flatnonzero(np.diff(labels[by_class])) + 1)
    chosen = np.sort(np.concatenate([rng.permutation(g)[:max(1, round(len(g) * fraction))] for g in groups]))
    part.images, part.labels = source.images[chosen], None if source.labels is None else labels[chosen]
    part.where = f"{source.where} ({fraction:g} of it)"
    return part


def train_and_val(data, fraction=1.0, seed=0, download=False):
    """Open --data -> the source to train on, a `fraction` of it, and the source to evaluate on or None."""
    train = open_dataset(data, "train", download)
    return train if fraction == 1 else subset(train, fraction, seed), open_dataset(data, "val", download)


def same_classes(train, val):
    """Whether both sources have labels, of the same classes."""
    return val is not None and bool(val.classes) and val.classes == train.classes


def digest_of_names(source):
    """A digest of the names and labels of a source, by which a run that goes on knows its images again."""
    names = source.images["name"] if source.images.dtype.names else source.images
    labels = b"" if source.labels is None else np.asarray(source.labels, dtype=np.int64).tobytes()
    return hashlib.sha256(names.tobytes() + labels).hexdigest()


def describe(source):
    """One line about a source: how many images and classes, where, the first and last file, what was left out."""
    classes = f" in {len(source.classes):,} classes" if source.classes else ", no labels"
    first, last = (os.path.basename(source.name(i)) for i in (0, len(source) - 1))
    text = f"{len(source):,} images{classes} under {source.where}, from {first} to {last}"
    skipped = ", ".join(f"{count:,} {kind}" for kind, count in sorted(source.skipped.items()) if count)
    return f"{text}; other files left out: {skipped}" if skipped else text
