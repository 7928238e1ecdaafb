"""
What --data may be:
imagenet/                          a folder with train/ and val/ (or valid, validation, test), one sub-folder per class,
                                   names in any case of letters
imagenet/ILSVRC2012_img_train.tar  tars in the place of these folders, ImageNet's own files among them, or one of them
photos/   photos.tar               any other folder or tar of images, then without labels
cifar10   dtd   shapes             a set that torchvision knows by name (images/named.py), or shapes, which are drawn

A source has images (an array, a row for each), labels (an array or None), classes (their names or None), read(i), the
bytes or a PIL image, name(i) for messages, relative(i), the path inside it, where, skipped (other files by suffix), and
value_range (None, or the values that become black and white, see images/deep.py).
"""
import bisect
import copy
import hashlib
import os
import stat
from collections import Counter
from contextlib import suppress
from pathlib import Path

import numpy as np

from data import PLAIN
from images.shapes import Shapes
from images.tars import HIDDEN, SUFFIXES, index, kind_of_suffix, note, top_folders

TRAIN_NAMES = ("train", "ilsvrc2012_img_train")                 # in any case of letters
VAL_NAMES = ("val", "valid", "validation", "test", "ilsvrc2012_img_val")
KINDS = {stat.S_IFIFO: "fifo", stat.S_IFSOCK: "socket", stat.S_IFCHR: "device", stat.S_IFBLK: "device",
         stat.S_IFDIR: "folder"}


def entries_of(folder):
    """The entries of a folder, sorted by name, without the hidden ones."""
    try:
        return sorted((e for e in os.scandir(folder) if not e.name.startswith(HIDDEN)), key=lambda entry: entry.name)
    except OSError as error:
        raise SystemExit(f"{folder} cannot be read: {error.strerror}") from None


def kind_left_out(path):
    """What an entry of a folder that is no image is called: its kind, or of a file its suffix."""
    return KINDS.get(stat.S_IFMT(os.stat(path).st_mode)) or kind_of_suffix(path)


def walk(folder, skipped, seen=()):
    """Yield the paths of all images below a folder, sorted. It follows links, but no circle of links. The Counter
    `skipped` gets the suffixes of other files, and the kinds of what is no file."""
    here = os.path.realpath(folder)
    if here in seen:
        return
    for entry in entries_of(folder):
        named_so = entry.name.lower().endswith(SUFFIXES)
        if entry.is_symlink() and not os.path.exists(entry.path):
            skipped["dead links"] += 1
        elif named_so and entry.is_file():
            yield entry.path
        elif entry.is_dir() and not named_so:
            yield from walk(entry.path, skipped, (*seen, here))
        else:
            skipped[kind_left_out(entry.path)] += 1


class Folder:
    """The images below a folder. counts: how many each of its sub-folders holds; of "": how many lie beside them.
    images: one array of bytes and not a list of strings, because forked workers share its memory."""
    value_range, prefix, nested = None, "", 0

    def __init__(self, root):
        self.root, self.where, self.labels, self.classes, self.skipped = root, root, None, None, Counter()
        paths = [os.path.relpath(path, root) for path in walk(root, self.skipped)]
        self.images = np.array([os.fsencode(path) for path in paths], dtype=bytes)
        self.counts = Counter(path.split("/")[0] if "/" in path else "" for path in paths)
        self.counts.update({e.name: 0 for e in entries_of(root)
                            if not e.name.lower().endswith(SUFFIXES) and (os.path.isdir(e) or not os.path.exists(e))})

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
    """The first of `names`, in any case of letters, that is a folder in `folder`, or a tar with .tar after its name."""
    there = {entry.name.lower(): os.path.join(folder, entry.name) for entry in entries_of(folder or ".")}
    paths = [there[name + end] for name in names for end in ("", ".tar") if name + end in there]
    return next((p for p in paths if os.path.isdir(p) or p.lower().endswith(".tar") or refuse_dead(p)), None)


def open_tar(place, split):
    """Open a tar of images, or the folder in it that is the split."""
    tops = {name.lower(): name for name in sorted(top_folders(place))}
    parted = "train" in tops or len(tops) == 1
    names = TRAIN_NAMES if split == "train" else VAL_NAMES
    return Tar(place, next((tops[name] for name in names if parted and name in tops), ""))


def open_part(place, split, labelled):
    """Open the folder or tar that is one split of a set, or the tar that holds the split as a folder."""
    source = Folder(place) if os.path.isdir(place) else open_tar(place, split)
    labelled = labelled or source.prefix or source.nested       # of a tar of tars, each inner one is a class
    classes = sorted(name for name in source.counts if name)
    if labelled and classes and not source.counts[""]:          # sub-folders with images beside them are no classes
        if split == "train" and not all(source.counts[name] for name in classes):
            refuse_empty(source, [name for name in classes if not source.counts[name]])
        source.classes = [name for name in classes if source.counts[name]]      # val/ may lack some
        source.labels = np.repeat(np.arange(len(source.classes)), [source.counts[name] for name in source.classes])
    return source if len(source) and source.classes else without_classes(source, place, split)


def without_classes(source, place, split):
    """A source without folders of classes. The flat one of ImageNet gets labels; one without images ends the run."""
    if not len(source):
        raise SystemExit(f"no image found under {source.where}: looked for files ending in {' '.join(SUFFIXES)}"
                         f"{left_out(source.skipped)}")
    if split == "val" and "ILSVRC2012_val_" in source.relative(0):
        from images.named import label_imagenet
        label_imagenet(source, os.path.dirname(os.path.abspath(place)))
    return source


def refuse_dead(path):
    """End in a sentence if the path is a link to nothing; a file of that name is only no set -> False."""
    if not os.path.exists(path):
        raise SystemExit(f"{path} is a dead link: mend it, or remove it")
    return False


def refuse_empty(source, empty):
    """End in a sentence about class folders of train/ that hold no image; it says what the first holds instead."""
    first, skipped = os.path.join(source.root, empty[0]), Counter()
    if isinstance(source, Tar):                                 # it knows what it left out only as a whole
        skipped = source.skipped
    elif os.path.exists(first):
        list(walk(first, skipped))
    else:
        skipped["dead links"] = 1
    raise SystemExit(f"{len(empty)} class folders hold no image, first {first}: fill them or remove them, in val/ as "
                     f"well: {', '.join(empty[:9])}{left_out(skipped)}")


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
    return open_tar_set(root, split) if os.path.lexists(root) else open_named_set(data, root, split, download)


def open_tar_set(root, split):
    tops, stem = {name.lower() for name in top_folders(root)}, os.path.splitext(os.path.basename(root))[0].lower()
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


def train_and_val(data, fraction=1.0, seed=0, download=False, channels=3, bits=None, value_range=None):
    """Open --data -> the source to train on, a `fraction` of it, and the one to evaluate on, or None; see look_over."""
    train, val = open_dataset(data, "train", download), open_dataset(data, "val", download)
    for source in filter(None, (train, val)):
        look_over(source, channels, bits, value_range)
    if val and val.classes != train.classes:
        match_classes(train, val)
    return train if fraction == 1 else subset(train, fraction, seed), val


def look_over(source, channels, bits=None, value_range=None):
    """Set source.value_range, and let images.deep.examine look at 16 images, unless all is as usual."""
    sample = np.linspace(0, len(source) - 1, min(16, len(source)), dtype=int).tolist()
    usual = channels in (1, 3, 4) and not bits and not value_range
    with suppress(OSError, TypeError):                          # TypeError: pictures in memory, which have 8 bits
        usual = usual and all(PLAIN.match(source.read(i)) for i in sample)
    if not usual:
        from images.deep import examine
        examine(source, sample, channels, bits, value_range)


def match_classes(train, val):
    """Number val's labels as train's classes, by name, and say how many of these val lacks. With other classes, too, it
    stays as it is: same_classes refuses that where labels are needed."""
    if not train.classes or not set(val.classes or ["?"]) <= set(train.classes):
        return
    number = {name: k for k, name in enumerate(train.classes)}
    absent = [name for name in train.classes if name not in val.classes]
    val.labels, val.classes = np.array([number[name] for name in val.classes])[val.labels], train.classes
    if absent:
        note(f"{len(absent)} of {len(number)} classes have no image under {val.where}, first {absent[0]}: they do not "
             "count")


def same_classes(train, val):
    """Whether both sources have labels, of the same classes. A class of val that train lacks ends in a sentence."""
    if val is None or not train.classes or not val.classes:
        return False
    strange = sorted(set(val.classes) - set(train.classes))
    if strange:
        raise SystemExit(f"{val.where} has {len(strange)} classes that {train.where} lacks, first {strange[0]}: they "
                         "are matched by name")
    return val.classes == train.classes


def class_numbers(names, count, folders):
    """Which of a classifier's `count` classes each class folder stands for -> [number, or None where it is none].

    names: the classifier's own. Without any its classes are the folders in their order, and that of integers is 0, 1,
    2, ..., 10; if there are fewer folders than classes, integers are the numbers themselves.
    """
    integers = all(name.isdecimal() for name in folders)
    if names is None and len(folders) == count:
        names = sorted(folders, key=int) if integers else folders
    if names is None:
        return [int(name) if integers and int(name) < count else None for name in folders]
    number = {name: i for i, name in enumerate(names)}
    return [number.get(name) for name in folders]


def find_classes(source, file, count, names, path=None):
    """Find the classes of a source among the `count` of the classifier in `file`, see class_numbers -> their numbers.
    names: those that the file stores, or None; path: of a text file with a name a line (--class-names), or None."""
    if path and names:
        raise SystemExit(f"{file} stores the names of its classes: leave --class-names out")
    try:
        names = Path(path).read_text().splitlines() if path else names
    except (OSError, ValueError) as error:
        raise SystemExit(f"{path} cannot be read as a text file with a name a line: {error}") from None
    folders = list(source.classes or ())
    numbers = class_numbers(names, count, folders)
    if not numbers or None in numbers or max(numbers) >= count:
        known = ", ".join(names or ["not named"])[:60]
        raise SystemExit(f"{file} tells {count} classes apart ({known}), and {source.where} has {len(folders)} "
                         f"({', '.join(folders)[:60]}): each has to be one of the classifier's, by name")
    if names is None:
        order = ", ".join(folders[numbers.index(i)] for i in sorted(numbers)[:12])
        note(f"{file} does not name its classes: they are taken to be, in this order, {order}"
             f"{', ...' if len(numbers) > 12 else ''}")
    return numbers


def open_to_evaluate(data, download=False):
    """Open the part of a set that a classifier is evaluated on; where there is no train/, as in ImageNet-A and -V2,
    val/ alone or all class folders of the set."""
    val, root = open_dataset(data, "val", download), os.environ.get("IMAGENET", "imagenet")
    if val is not None:
        return val
    root = root if data == "imagenet" else data
    if not os.path.isdir(root) or beside(root, TRAIN_NAMES):
        raise SystemExit(f"{data} has no images to evaluate on: val/ was looked for, or test/, or a tar of that name")
    return open_part(beside(root, VAL_NAMES) or root, "val", labelled=True)


def digest_of_names(source):
    """A digest of the names and labels of a source, by which a run that goes on knows its images again."""
    names = source.images["name"] if source.images.dtype.names else source.images.astype(bytes)
    labels = b"" if source.labels is None else np.asarray(source.labels, dtype=np.int64).tobytes()
    return hashlib.sha256(b"\0".join(names.tolist()) + labels).hexdigest()


def describe(source):
    """One line about a source: how many images and classes, where, the first and last file, what was left out."""
    classes = f" in {len(source.classes):,} classes" if source.classes else ", no labels"
    first, last = (os.path.basename(source.name(i)) for i in (0, len(source) - 1))
    rest = left_out(source.skipped) if source.skipped else ""
    return f"{len(source):,} images{classes} under {source.where}, from {first} to {last}{rest}"


def left_out(skipped):
    """The end of a sentence: what was left out, by kind, or nothing."""
    counts = ", ".join(f"{count:,} {kind}" for kind, count in sorted(skipped.items()) if count)
    return f"; other files left out: {counts}" if counts else ""
