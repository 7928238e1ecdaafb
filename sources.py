"""
Where images are: folders, tars read in place, tars of tars, torchvision's sets by name, drawn shapes.

A source has len(), name(i), read(i) -> the file's bytes or a PIL image, labels (an int64 array or None), classes (names
or None), where (text), skipped (files left out, by kind). All of it is arrays, which forked workers share.

imagenet/                          what --data may be: a folder with train/ and val/ (val, valid, validation or test),
imagenet/ILSVRC2012_img_train.tar  or with tars in their place, ImageNet's own included; such a tar itself; any other
photos/   photos.tar   cifar10     folder or tar, then without labels; the name of a torchvision set; shapes.
"""
import errno
import fcntl
import hashlib
import json
import os
import tarfile
from collections import Counter
from contextlib import contextmanager

import numpy as np
from PIL import Image

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
TRAIN_NAMES = ("train", "ILSVRC2012_img_train")
VAL_NAMES = ("val", "valid", "validation", "test", "ILSVRC2012_img_val")


def is_image(name):
    return name.lower().endswith(SUFFIXES) and not os.path.basename(name).startswith(".")


# ----------------------------------------------------------------------------------------------------------------
# Folders


def is_hidden(name):
    return name.startswith(".") or name == "__MACOSX"


def listing(folder):
    """What is in a folder, sorted by name; one that cannot be read ends in a sentence."""
    try:
        return sorted(os.scandir(folder), key=lambda e: e.name)
    except OSError as error:
        raise SystemExit(f"{folder} cannot be read: {error.strerror}") from None


def walk(folder, skipped, seen=()):
    """Paths of the image files below `folder`, sorted, following links but no circle of links. skipped: a Counter that
    gets the suffixes of all other files."""
    here = os.path.realpath(folder)
    if here in seen:
        return
    for entry in listing(folder):
        try:
            inner = entry.is_dir()
        except OSError:                                         # a link to itself
            skipped["dead links"] += 1
            continue
        if inner and not is_hidden(entry.name):
            yield from walk(entry.path, skipped, (*seen, here))
        elif inner:
            continue
        elif is_image(entry.name):
            yield entry.path
        elif not entry.name.startswith("."):
            skipped[os.path.splitext(entry.name)[1].lower() or "no suffix"] += 1


def slurp(path):
    with open(path, "rb") as f:
        return f.read()


class Folder:
    """Images below a folder. labelled: its sub-folders are classes, numbered in sorted order, as in ImageFolder."""

    def __init__(self, root, labelled):
        self.where, self.classes, self.labels, self.skipped = root, None, None, Counter()
        if labelled:
            self.classes = [e.name for e in listing(root) if not is_hidden(e.name) and os.path.isdir(e.path)]
            groups = [list(walk(os.path.join(root, name), self.skipped)) for name in self.classes]
            self.labels = number(root, self.classes, [len(group) for group in groups])
            paths = [path for group in groups for path in group]
        else:
            paths = list(walk(root, self.skipped))
        # One array of bytes, not a list of strings: workers share its pages, a million names are one object to them.
        self.paths = np.array([os.fsencode(os.path.relpath(path, root)) for path in paths], dtype=bytes)

    def __len__(self):
        return len(self.paths)

    def relative(self, i):
        return os.fsdecode(self.paths[i])

    def name(self, i):
        return os.path.join(self.where, self.relative(i))

    def read(self, i):
        return slurp(self.name(i))


def number(where, classes, counts):
    """The label of every image, given how many there are of each class, one class after the other."""
    empty = [name for name, count in zip(classes, counts) if not count]
    if empty:
        raise SystemExit(f"{len(empty)} class folders hold no image, first {os.path.join(where, empty[0])}: fill them "
                         "or remove them")
    return np.repeat(np.arange(len(counts)), counts)


# ----------------------------------------------------------------------------------------------------------------
# Tars


class Tar:
    """Images of a tar, or of one folder `inside` it, read in place: nothing is unpacked. In the order that the folder
    would have. labelled: as for Folder."""

    def __init__(self, path, inside="", labelled=False):
        self.path, self.inside, self.fd = path, inside + "/" * bool(inside), None
        self.where, (facts, table) = os.path.join(path, inside) if inside else path, index(path)
        mine, first = Counter(), len(table)                     # images by sub-folder; where in the table they begin
        for top, sub, count, start in facts["folders"]:
            if not inside or top == inside:
                mine[sub if inside else top] += count
                first = min(first, start)
        self.table, self.skipped = table[first:first + sum(mine.values())], Counter(facts["skipped"])
        self.classes = sorted(name for name in mine if name) if labelled and not mine[""] else None
        self.labels = number(self.where, self.classes, [mine[name] for name in self.classes]) if self.classes else None

    def __len__(self):
        return len(self.table)

    def __getstate__(self):
        return {**self.__dict__, "fd": None}                    # an open file stays in its process

    def relative(self, i):
        return os.fsdecode(self.table["name"][i])[len(self.inside):]

    def name(self, i):
        return os.path.join(self.where, self.relative(i))

    def read(self, i):
        if self.fd is None:
            self.fd = os.open(self.path, os.O_RDONLY)
        _, start, size = self.table[i]
        data = os.pread(self.fd, size, start)                   # no shared file position: forked workers share the file
        if len(data) < size:
            raise OSError(f"{self.path} has become shorter")
        return data


def index(path):
    """The table of contents of a tar: (facts, array of name, start, size), sorted. Read from the tar once, then from a
    file beside it (or, where that cannot be written, in the user's cache), for as long as size and date are the same.
    """
    cache = os.path.join(os.environ.get("XDG_CACHE_HOME", os.path.expanduser("~/.cache")), "small-vit-ssl")
    digest = hashlib.sha256(os.path.abspath(path).encode("utf-8", "surrogateescape")).hexdigest()[:16]
    places = [path + ".index", os.path.join(cache, digest + ".index")]
    with alone(path):                                           # of several processes one reads the tar
        stat = os.stat(path)
        now = dict(format=1, bytes=stat.st_size, mtime_ns=stat.st_mtime_ns)
        for place in places:
            found = read_index(place, now)
            if found:
                return found
        facts, table = contents(path)
        for place in places:
            try:
                os.makedirs(os.path.dirname(place) or ".", exist_ok=True)
                with open(f"{place}.{os.getpid()}.tmp", "wb") as f:
                    f.write(json.dumps(dict(now, count=len(table), dtype=table.dtype.descr, **facts)).encode() + b"\n")
                    f.write(table.tobytes())
                    f.flush()
                    os.fsync(f.fileno())
                os.replace(f.name, place)
                return read_index(place, now) or (facts, table)
            except OSError as error:
                problem = error
                if os.path.exists(f"{place}.{os.getpid()}.tmp"):        # half of it, where the disk is full
                    os.remove(f"{place}.{os.getpid()}.tmp")
    print(f"warning: the index of {path} cannot be kept ({problem}): it is made anew at every start")
    return facts, table


def read_index(place, now):
    """What is in an index file, mapped and not read, if it is whole and is the one of a tar with the facts `now`."""
    try:
        with open(place, "rb") as f:
            facts = json.loads(f.readline())
            dtype = np.dtype([(name, kind) for name, kind in facts["dtype"]])
            whole = facts["count"] and os.fstat(f.fileno()).st_size == f.tell() + facts["count"] * dtype.itemsize
            if whole and all(facts[k] == v for k, v in now.items()):
                return facts, np.memmap(f, dtype, "r", f.tell(), facts["count"])
    except (OSError, ValueError, KeyError, TypeError):
        pass                                                    # none there, or a damaged one: the tar is read again


@contextmanager
def alone(path):
    """Hold a lock on a file or folder, where the file system has locks."""
    fd = os.open(path, os.O_RDONLY)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in (errno.ENOTSUP, errno.ENOLCK, errno.EBADF, errno.EINVAL, errno.ENOSYS):
                raise
        yield
    finally:
        os.close(fd)


def contents(path):
    """Go through a tar, and the tars in it -> facts, table in the order of a walk through folders."""
    entries, links, others, inner, skipped = {}, [], set(), [], Counter()
    with open(path, "rb") as f:
        for name, start, size, target in members(f, path, inner):
            if any(is_hidden(part) for part in name.split("/")):
                continue
            others.add(name[:name.rfind("/") + 1])
            if not is_image(name) or target is size is None:
                skipped[os.path.splitext(name)[1].lower() or "no suffix"] += not name.endswith("/")
            elif target:
                links.append((name, target))
            else:
                entries[name] = start, size                     # of two with the same name the later, as in unpacking
                if len(entries) % 100_000 == 0:
                    print(f"reading the headers of {path}: {len(entries):,} images so far", flush=True)
    for name, target in links:
        if target in entries:
            entries[name] = entries[target]
        else:
            skipped["dead links"] += 1
    root = next(iter(entries), "").split("/")[0] + "/"          # one folder around train/ is as good as none
    if all(name.startswith(root) for name in entries) and any(name.startswith(root + "train/") for name in entries):
        entries, others = {k[len(root):]: v for k, v in entries.items()}, {name[len(root):] for name in others}
    names = sorted(entries, key=lambda name: name.split("/"))   # part by part: "a/x" comes before "a-b/x"
    folders = {}                                                # its first two levels -> number and place of its images
    for i, name in (*((0, name) for name in others), *enumerate(names)):
        found = folders.setdefault(tuple((name.split("/")[:-1] + ["", ""])[:2]), [0, len(names)])
        found[:] = found[0] + (name in entries), min(found[1], i) if name in entries else found[1]
    encoded = np.array([os.fsencode(name) for name in names], dtype=bytes if names else "S1")
    table = np.empty(len(names), [("name", encoded.dtype.str), ("start", "<i8"), ("size", "<i8")])
    table["name"] = encoded
    table["start"], table["size"] = np.array([entries[name] for name in names], "<i8").reshape(-1, 2).T
    return dict(folders=[[*key, *found] for key, found in folders.items()], nested=len(inner), skipped=skipped), table


def members(f, path, inner, outer="", base=0):
    """Yields (name, start, size, None) for the files of an open tar, (name, None, None, target) for links, and (name/,
    None, None, None) for folders. A tar inside is gone through as if it were a folder of its name, and added to
    `inner`. What is not whole ends in a sentence."""
    what = f"{outer}.tar in {path}" if outer else path
    try:
        archive = tarfile.open(fileobj=f, mode="r:", errorlevel=2)
        while (m := archive.next()) is not None:
            archive.members = []                                # it would keep a million of them
            name = os.path.normpath(os.path.join(outer, m.name.lstrip("/")))
            if m.isdir():
                yield name + "/" if name != "." else "", None, None, None
            elif m.issym() or m.islnk():
                target = os.path.join(os.path.dirname(m.name), m.linkname) if m.issym() else m.linkname
                yield name, None, None, os.path.normpath(os.path.join(outer, target.lstrip("/")))
            elif name.lower().endswith(".tar") and not outer:
                inner.append(name)
                yield name[:-4] + "/", None, None, None
                yield from members(archive.extractfile(m), path, inner, name[:-4], m.offset_data)
            elif m.isreg() and not m.issparse():
                yield name, base + m.offset_data, m.size, None
            else:
                yield name, None, None, None
    except tarfile.TarError as error:
        raise SystemExit(f"{what} is damaged or cut short ({error}): get it again") from None
    # tarfile takes a damaged header for the end. A whole archive ends in zeros, and nothing but zeros follows.
    f.seek(archive.offset)
    end = f.read(512)
    if len(end) < 512 or end.strip(b"\0"):
        problem = "ends without an end mark: it was cut short" if not end else "has a damaged header"
        raise SystemExit(f"{what} {problem}, at byte {base + archive.offset:,}: get it again")
    if f.read(2 ** 20).strip(b"\0"):
        raise SystemExit(f"{what} goes on after its end mark, at byte {base + archive.offset:,}, perhaps with another "
                         "tar: make one tar of them")


# ----------------------------------------------------------------------------------------------------------------
# torchvision's sets


def sets():
    """name -> (torchvision's class, its parts to train on, its parts to evaluate on, a part's labels, a part's files).
    Without files, pictures are in memory."""
    from torchvision import datasets as d
    train, val, test, trainval = (dict(split=name) for name in ("train", "val", "test", "trainval"))
    plain = [dict(train=True)], [dict(train=False)], lambda s: s.targets, None
    marked, sampled = lambda s: s._labels, lambda s: [label for _, label in s._samples]
    images, samples = lambda s: s._image_files, lambda s: [path for path, _ in s._samples]
    grown = lambda s: [label for label, _ in s.index], lambda s: [                              # noqa: E731
        os.path.join(s.root, s.all_categories[label], name) for label, name in s.index]
    return {
        "cifar10": (d.CIFAR10, *plain), "cifar100": (d.CIFAR100, *plain),
        "mnist": (d.MNIST, *plain), "fashion-mnist": (d.FashionMNIST, *plain),
        "svhn": (d.SVHN, [train], [test], lambda s: s.labels, None),
        "stl10": (d.STL10, [train], [test], lambda s: s.labels, None),
        "stl10-unlabeled": (d.STL10, [dict(split="unlabeled")], [], None, None),
        "flowers102": (d.Flowers102, [train, val], [test], marked, images),
        "pets": (d.OxfordIIITPet, [trainval], [test], marked, lambda s: s._images),
        "dtd": (d.DTD, [train, val], [test], marked, images),
        "aircraft": (d.FGVCAircraft, [trainval], [test], marked, images),
        "food101": (d.Food101, [train], [test], marked, images),
        "cars": (d.StanfordCars, [train], [test], sampled, samples),
        "imagenette": (d.Imagenette, [train], [val], sampled, samples),
        "inaturalist": (d.INaturalist, [dict(version="2021_train")], [dict(version="2021_valid")], *grown),
        "inaturalist-mini": (d.INaturalist, [dict(version="2021_train_mini")], [dict(version="2021_valid")], *grown),
        # No official parts: 30 images of each class to train on, the rest to evaluate on, as is usual; seed 0.
        "caltech101": (d.Caltech101, [{}], [{}], lambda s: s.y, lambda s: [
            os.path.join(s.root, "101_ObjectCategories", s.categories[k], f"image_{i:04}.jpg")
            for k, i in zip(s.y, s.index)]),
    }


class Named:
    """One of torchvision's sets by its name, with its official parts, under $DATASETS or ./data."""

    def __init__(self, name, split, download):
        make, train, val, labels_of, files_of = sets()[name]
        root = os.environ.get("DATASETS", "data")
        try:
            os.makedirs(root, exist_ok=True) if download else None
            with alone(root):                                   # of several processes one downloads
                parts = [make(root, download=download, **part) for part in (train if split == "train" else val)]
        except ImportError as error:                            # torchvision reads some lists with scipy
            raise SystemExit(f"{name} needs a package that is not here: {error}") from None
        except (RuntimeError, OSError, ValueError) as error:    # torchvision's "not found or corrupted"
            hint = "it could not be fetched" if download else "give --download, or set DATASETS to where it is"
            raise SystemExit(f"{name} is not whole under {root} ({str(error).splitlines()[0]}): {hint}") from None
        self.where, self.skipped, self.paths, self.pictures = f"{root} ({name}, {split})", Counter(), None, None
        if files_of:
            self.paths = np.array([os.fsencode(path) for part in parts for path in files_of(part)], dtype=bytes)
        else:
            self.pictures, = parts
        self.labels, self.classes = None, None
        if labels_of:
            self.labels = np.concatenate([np.asarray(labels_of(part), dtype=np.int64) for part in parts])
            names = getattr(parts[0], "classes", None) or getattr(parts[0], "categories", None)
            self.classes = [str(k) for k in names or range(self.labels.max() + 1)]
        if name == "caltech101":
            order, thirty = np.random.default_rng(0).permutation(len(self.labels)), np.zeros(len(self.labels), bool)
            for k in range(len(self.classes)):
                thirty[order[self.labels[order] == k][:30]] = True
            mine = thirty if split == "train" else ~thirty
            self.paths, self.labels = self.paths[mine], self.labels[mine]

    def __len__(self):
        return len(self.pictures if self.paths is None else self.paths)

    def relative(self, i):
        return f"{self.classes[self.labels[i]].replace('/', '-')}/{i:07}" if self.classes else f"{i:07}"

    def name(self, i):
        return f"{self.where} number {i}" if self.paths is None else os.fsdecode(self.paths[i])

    def read(self, i):
        return self.pictures[i][0] if self.paths is None else slurp(self.paths[i])


# ----------------------------------------------------------------------------------------------------------------
# Drawn shapes


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
        self.labels, self.skipped = np.arange(self.first, self.first + length) % 10, Counter()

    def __len__(self):
        return len(self.labels)

    def name(self, i):
        return f"{self.where} number {i}"

    def relative(self, i):
        return f"{self.classes[self.labels[i]]}/{i:07}"

    def read(self, i):
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


# ----------------------------------------------------------------------------------------------------------------
# Which one


def beside(folder, names):
    """The first of `names` in a folder that is a folder, or is a tar with .tar after its name; or None."""
    paths = [os.path.join(folder, name + end) for name in names for end in ("", ".tar")]
    return next((p for p in paths if os.path.isdir(p) or p.endswith(".tar") and os.path.isfile(p)), None)


def tops_of(path):
    """The first folders in a tar. What is no plain tar ends in a sentence."""
    with open(path, "rb") as f:
        head = f.read(512)
    for magic, tool in ((b"\x1f\x8b", "gunzip"), (b"BZh", "bunzip2"), (b"\xfd7zXZ", "unxz"), (b"PK", "unzip"),
                        (b"\x28\xb5\x2f\xfd", "unzstd")):
        if head.startswith(magic):
            raise SystemExit(f"--data {path} is compressed, so images cannot be read from the middle of it: unpack it "
                             f"once with {tool} and give the plain tar, or the folder")
    if head[257:262] != b"ustar" and not path.lower().endswith(".tar"):
        raise SystemExit(f"--data {path} is a file, but no tar: a folder or a plain tar of images was expected")
    return {top for top, *_ in index(path)[0]["folders"] if top}


def open_part(place, split, labelled):
    """A folder or tar that is the part `split` of a set, or a tar that holds it under its name. labelled: folders in it
    are classes, unless images lie beside them."""
    if os.path.isdir(place):
        inside = [e for e in listing(place) if not is_hidden(e.name)]
        folders = [e for e in inside if os.path.isdir(e.path)]
        labelled = labelled and bool(folders) and not any(is_image(e.name) for e in inside if e not in folders)
        source = Folder(place, labelled)
    else:
        tops = tops_of(place)
        names = TRAIN_NAMES if split == "train" else VAL_NAMES
        inside = next((name for name in names if name in tops), "") if "train" in tops or len(tops) == 1 else ""
        source = Tar(place, inside, labelled or bool(inside) or index(place)[0]["nested"] > 0)
    if not len(source):
        raise SystemExit(f"no image found under {source.where}: looked for files ending in {' '.join(SUFFIXES)}")
    if split == "val" and source.labels is None and "ILSVRC2012_val_" in source.relative(0):
        label_imagenet(source, os.path.dirname(os.path.abspath(place)))
    return source


def label_imagenet(source, folder):
    """Give ImageNet's flat validation images the labels of the list that torchvision keeps (meta.bin), if it is there,
    or can be made from the development kit."""
    from torchvision.datasets.imagenet import load_meta_file, parse_devkit_archive
    kit = os.path.join(folder, "ILSVRC2012_devkit_t12.tar.gz")
    try:
        with alone(folder):                                     # of several processes one makes the list
            if os.path.exists(kit) and not os.path.exists(os.path.join(folder, "meta.bin")):
                parse_devkit_archive(folder)
            names, wnids = load_meta_file(folder)
    except Exception as error:                                  # none there, no scipy for the kit, a damaged list
        print(f"note: {source.where} stays without labels ({str(error).splitlines()[0]}): meta.bin or {kit} would give "
              "them", flush=True)
        return
    if len(wnids) != len(source):
        raise SystemExit(f"{folder}/meta.bin labels {len(wnids)} images, {source.where} has {len(source)}")
    source.classes = sorted(names)
    source.labels = np.searchsorted(source.classes, wnids)


def find(data, split="train", download=False):
    """The source behind --data, as the head of this file tells. split "train", or "val" (then None if there is none).
    Ends in a sentence when nothing is there."""
    if data == "shapes":
        return Shapes(split)
    root = os.environ.get("IMAGENET", "imagenet") if data == "imagenet" else data
    if not os.path.exists(root):
        if data in sets():
            return Named(data, split, download) if sets()[data][1 + (split == "val")] else None
        looked = "./imagenet (and $IMAGENET is not set)" if data == "imagenet" and root == "imagenet" else root
        raise SystemExit(f"no data: {looked} does not exist; give --data a folder or tar of images (train/ and val/ "
                         f"inside are used) or one of {', '.join(sets())}; or set IMAGENET, or try --demo")
    folder = root if os.path.isdir(root) else os.path.dirname(root)
    train, val = beside(folder, TRAIN_NAMES), beside(folder, VAL_NAMES)
    if os.path.isdir(root):
        place, labelled = (train or root, train is not None) if split == "train" else (train and val, True)
    else:
        tops, name = tops_of(root), os.path.splitext(os.path.basename(root))[0]
        named = name in TRAIN_NAMES
        place, labelled = root, named or name in VAL_NAMES
        if split == "val" and not ("train" in tops and tops & set(VAL_NAMES)):
            place, labelled = val if named else None, True
    return open_part(place, split, labelled) if place else None


def thin(source, fraction, seed):
    """A random part of a source: `fraction` of every class (at least one image), always the same for a seed."""
    if not 0 < fraction <= 1:
        raise SystemExit(f"--fraction is above 0 and at most 1, not {fraction:g}")
    return source if fraction == 1 else Subset(source, fraction, seed)


class Subset:
    """See thin."""

    def __init__(self, source, fraction, seed):
        rng, labels = np.random.default_rng((seed, 1)), source.labels
        counts = [len(source)] if labels is None else np.bincount(labels)
        by_class = np.arange(len(source)) if labels is None else np.argsort(labels, kind="stable")
        groups = [group for group in np.split(by_class, np.cumsum(counts)[:-1]) if len(group)]
        self.chosen = np.sort(np.concatenate([rng.permutation(g)[:max(1, round(len(g) * fraction))] for g in groups]))
        self.source, self.classes, self.skipped = source, source.classes, source.skipped
        self.labels = None if labels is None else labels[self.chosen]
        self.where = f"{source.where} ({fraction:g} of it)"

    def __len__(self):
        return len(self.chosen)

    def relative(self, i):
        return self.source.relative(self.chosen[i])

    def name(self, i):
        return self.source.name(self.chosen[i])

    def read(self, i):
        return self.source.read(self.chosen[i])


def parts(data, fraction=1.0, seed=0, download=False):
    """What --data, --fraction, --seed and --download mean -> the source to train on, and the one to evaluate on or
    None."""
    return thin(find(data, "train", download), fraction, seed), find(data, "val", download)


def same_classes(train, val):
    """Whether both have labels, of the same classes."""
    return val is not None and bool(val.classes) and val.classes == train.classes


def describe(source):
    classes = f" in {len(source.classes):,} classes" if source.classes else ", no labels"
    others = ", ".join(f"{n:,} {kind}" for kind, n in sorted(source.skipped.items()) if n)
    first, last = (os.path.basename(source.name(i)) for i in (0, len(source) - 1))
    return (f"{len(source):,} images{classes} under {source.where}, from {first} to {last}" +
            f"; other files left out: {others}" * bool(others))
