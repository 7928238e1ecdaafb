"""
Where images with masks are, for segmentation. --data may be

ADEChallengeData2016/   images/training, annotations/training and the same of validation; also as the name ade20k
camvid/                 train/ and trainannot/, val/ and valannot/, test/ and testannot/
any/    any.tar         images/ and annotations/ with files of equal names, each with train/ and val/ in it or in
                        folders train/ and val/; and classes.txt, a line for each class: its name, and R G B for masks
                        in colours
voc   cityscapes        sets of torchvision, under $DATASETS or ./data
shapes                  drawn shapes

A line of classes.txt called "ignore" stands for pixels that do not count. In index masks (grey or palette PNG) number n
means line n, from 0; 255 does not count either. Masks come out as uint8 (h, w) with classes from 0 without gaps.
"""
import os
import tarfile
from collections import Counter
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch

from data import decode
from images.datasets import Folder, Tar, left_out, look_over, subset
from images.mask_classes import IGNORED, Classes, MaskError, read_lines
from images.shapes import Scenes
from images.tars import locked, note

SPLITS = dict(train=("training", "train"), val=("validation", "val", "valid"), test=("testing", "test"))
CAMVID = "Sky Building Pole Road Pavement Tree SignSymbol Fence Car Pedestrian Bicyclist ignore".split()
VOC = ("background aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse motorbike person "
       "pottedplant sheep sofa train tvmonitor").split()
NAMED = "ade20k", "voc", "cityscapes", "shapes"


class NoMasks(SystemExit):
    """A folder or tar without masks. The message says where they were looked for."""


# ----------------------------------------------------------------------------------------------------------------
# Sources


class Listed(Folder):
    """Files of a folder that a list names."""

    def __init__(self, root, paths):
        self.root = self.where = root
        self.images = np.array([os.fsencode(os.path.relpath(path, root)) for path in paths], dtype=bytes)
        self.skipped = Counter()


class Pairs:
    """Images with masks: a source as in images/datasets.py, and mask(i). files: a Folder or Tar; rows: (name of the
    image, name of the mask, their numbers among the files), or "" and -1 for pictures without masks."""
    labels, value_range = None, None

    def __init__(self, files, rows, lines, where):
        self.files, self.where, self.skipped, self.meaning = files, where, Counter(), Classes(lines)
        self.classes, self.colours = self.meaning.names, self.meaning.colours
        longest = max(len(os.fsencode(name)) for row in rows for name in row[:2])
        kind = [("name", f"S{longest}"), ("mask", f"S{longest}"), ("at", "<i8"), ("mask_at", "<i8")]
        self.images = np.array([(os.fsencode(img), os.fsencode(mask), *at) for img, mask, *at in rows], kind)

    def __len__(self):
        return len(self.images)
    def relative(self, i):
        return os.fsdecode(self.images["name"][i])
    def name(self, i):
        return self.files.name(self.images["at"][i])
    def read(self, i):
        return self.files.read(self.images["at"][i])

    def mask(self, i):
        """The classes of an image's pixels, uint8 (h, w), or None where there is no mask."""
        at = self.images["mask_at"][i]
        return None if at < 0 else self.meaning.read(self.files.read(at), self.files.name(at))


def read_pair(source, i, channels=3):
    """Decode number i -> image uint8 (C, h, w), mask uint8 (h, w) or None. MaskError where their sizes differ."""
    img, mask = decode(source.read(i), channels, source.value_range), source.mask(i)
    if mask is not None and mask.shape != img.shape[1:]:
        raise MaskError(f"{source.name(i)} has {img.shape[2]}x{img.shape[1]} pixels and its mask "
                        f"{mask.shape[1]}x{mask.shape[0]}: masks must have the size of their images")
    return img, None if mask is None else torch.from_numpy(mask)


# ----------------------------------------------------------------------------------------------------------------
# Opening


def open_pairs(data, split="train", download=False):
    """Open one split of what --data names (see the head of this file), or None if it has none. A source is checked on
    16 of its pairs; mistakes end in a sentence."""
    if data == "shapes":
        source = Scenes(split)
    elif data in ("voc", "cityscapes"):
        source = open_named(data, split, download)
    else:
        root = os.environ.get("ADE20K", "ADEChallengeData2016") if data == "ade20k" else data
        if not os.path.exists(root):
            raise SystemExit(f"no data: {root} does not exist; give --data a folder or tar with images/ and "
                             f"annotations/, or one of {', '.join(NAMED)}; or try --demo")
        source = find_pairs(root, split)
    if source is not None:
        check_some(source)
    return source


def places(split):
    """Yield (folder of the images, folder of the masks) of a split, in all the ways in which sets are laid out."""
    for name in SPLITS[split]:
        yield from ((f"images/{name}", f"annotations/{name}"), (f"{name}/images", f"{name}/annotations"),
                    (name, f"{name}annot"))
    if split == "train":
        yield "images", "annotations"


def find_pairs(root, split):
    """The Pairs of a split in a folder or tar, or None if it has other splits. NoMasks if it has none."""
    files = Folder(root) if os.path.isdir(root) else Tar(root)
    names = [files.relative(i) for i in range(len(files))]
    folders = {os.path.dirname(name) for name in names}
    outer = os.path.commonpath(folders or [""])                 # folders around the set, which a tar may have
    while os.path.basename(outer) in {name for names in SPLITS.values() for name in names}:
        outer = os.path.dirname(outer)
    outer = f"{outer}/" if outer else ""
    present = {"/".join(parts[:n]) for parts in (f.removeprefix(outer).split("/") for f in folders) for n in (1, 2)}
    where = next((pair for pair in places(split) if set(pair) <= present), None)
    if where is None:
        if any(set(pair) <= present for other in SPLITS for pair in places(other)):
            return None
        raise NoMasks(f"{root} has no masks: looked for images/ and annotations/, with or without train/ in them, and "
                      f"for train/ and trainannot/; it has {', '.join(sorted(present - {''})[:6]) or 'no folders'}")
    pictures, masks = ({} for _ in where)
    for i, name in enumerate(names):
        for found, folder in zip((pictures, masks), where):
            if name.startswith(f"{outer}{folder}/"):
                found[os.path.splitext(name.removeprefix(f"{outer}{folder}/"))[0]] = name, i
    lost = sorted(set(pictures) - set(masks))
    if lost:
        raise SystemExit(f"{len(lost)} of {len(pictures)} images under {root} have no mask, first "
                         f"{pictures[lost[0]][0]}: {outer}{where[1]}/{lost[0]}.png was expected")
    alone = sorted(set(masks) - set(pictures))
    if alone:
        note(f"{len(alone)} masks under {root}/{outer}{where[1]} belong to no image and are left out, first {alone[0]}")
    rows = [(pictures[stem][0], masks[stem][0], pictures[stem][1], masks[stem][1]) for stem in sorted(pictures)]
    return Pairs(files, rows, lines_of(root, outer, where), f"{root}/{outer}{where[0]}")


def lines_of(root, outer, where):
    """What the masks under a root mean: its classes.txt, or what is known of ADE20K and CamVid."""
    text = read_text(root, f"{outer}classes.txt")
    if text is not None:
        return read_lines(text, f"{root}/{outer}classes.txt")
    if where[0] in ("images/training", "images/validation"):
        rows = (read_text(root, f"{outer}objectInfo150.txt") or "").splitlines()[1:]
        names = [row.split("\t")[-1].split(",")[0].strip() for row in rows]
        names = [name if name not in names[:k] else f"{name} {k + 1}" for k, name in enumerate(names)]
        return [("ignore", None), *((name, None) for name in (names if len(names) == 150 else map(str, range(1, 151))))]
    if where[1].endswith("annot"):
        return [(name, None) for name in CAMVID]
    raise SystemExit(f"{root} has no classes.txt: write the name of a class on each line, in the order of the masks' "
                     "numbers, or with R G B after each name if masks are coloured")


def read_text(root, name):
    """A text file in a folder or tar, or None."""
    if os.path.isdir(root):
        path = Path(root, name)
        return path.read_text() if path.is_file() else None
    with tarfile.open(root) as archive, suppress(KeyError):
        member = next((m for m in archive if m.isreg() and os.path.normpath(m.name).endswith(name)), None)
        return archive.extractfile(member).read().decode() if member else None


def open_named(data, split, download):
    """Pascal VOC 2012 or Cityscapes by torchvision's lists."""
    from torchvision import datasets as d  # here, because it takes a while to import
    root = os.environ.get("DATASETS", "data")
    try:
        if download:
            os.makedirs(root, exist_ok=True)
        if data == "voc":
            with locked(root):                                  # one of several processes downloads
                found = d.VOCSegmentation(root, image_set=split, download=download)
            images, masks, lines = found.images, found.masks, [(name, None) for name in VOC]
        else:
            found = d.Cityscapes(os.path.join(root, "cityscapes"), split, target_type="semantic")
            images, masks = found.images, [target[0] for target in found.targets]
            lines = [("ignore" if c.ignore_in_eval else c.name, None) for c in found.classes if c.id >= 0]
    except (RuntimeError, OSError, ValueError) as error:
        raise SystemExit(f"{data} is not whole under {root} ({str(error).splitlines()[0]}): set DATASETS to where it is"
                         f"{', or give --download' if data == 'voc' else ''}") from None
    files = Listed(root, [*images, *masks])
    names, n = [files.relative(i) for i in range(2 * len(images))], len(images)
    return Pairs(files, [(names[i], names[n + i], i, n + i) for i in range(n)], lines, f"{root} ({data}, {split})")


def open_to_predict(data, split, download, names, colours):
    """A split of what --data names, with the classes of a file; of a folder or tar without masks all images."""
    try:
        source = open_pairs(data, split, download)
        if source is None:
            raise SystemExit(f"{data} has no images of {split}: --split train, val or test names a part that it has")
        if source.classes != names:
            theirs = f"{', '.join(source.classes)[:60]} ({len(source.classes)})"
            raise SystemExit(f"{source.where} has the classes {theirs}, and the network tells apart "
                             f"{', '.join(names)[:60]} ({len(names)})")
        return source
    except NoMasks:
        pass
    files = Folder(data) if os.path.isdir(data) else Tar(data)
    if not len(files):
        raise SystemExit(f"no image found under {files.where}{left_out(files.skipped)}")
    rows = [(files.relative(i), "", i, -1) for i in range(len(files))]
    return Pairs(files, rows, list(zip(names, colours)), files.where)


def check_some(source, most=16):
    """Read a few pairs of a source: mistakes that all masks share end in a sentence before training begins. The source
    gets the least height and width among them, source.least."""
    labelled, sizes = 0, []
    for i in np.linspace(0, len(source) - 1, min(most, len(source)), dtype=int):
        try:
            mask = read_pair(source, int(i))[1]
            labelled += int((mask != IGNORED).sum())
            sizes.append(mask.shape)
        except MaskError as error:
            raise SystemExit(str(error)) from None
        except Exception:                                       # a damaged file: counted and named when it is its turn
            continue
    if not labelled:
        raise SystemExit(f"all pixels of the masks under {source.where} are ignored: their numbers are not those of "
                         f"the classes {', '.join(source.classes[:4])}, ...")
    source.least = tuple(map(min, zip(*sizes)))


def train_and_val_pairs(data, fraction=1.0, seed=0, download=False, channels=3, bits=None, value_range=None):
    """Open --data -> the pairs to train on, a `fraction` of them, and those to evaluate on, or None; see look_over."""
    train, val = open_pairs(data, "train", download), open_pairs(data, "val", download)
    if train is None:
        raise SystemExit(f"{data} has no images to train on: images/train and annotations/train were looked for")
    if val is not None and val.classes != train.classes:
        raise SystemExit(f"{val.where} has other classes than {train.where}: one classes.txt is meant for both")
    for source in filter(None, (train, val)):
        look_over(source, channels, bits, value_range)
    return train if fraction == 1 else subset(train, fraction, seed), val
