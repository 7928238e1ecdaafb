"""Sets that torchvision knows by name, with official parts, under $DATASETS or ./data; ImageNet's list of labels."""
import os
from pathlib import Path

import numpy as np
from torchvision import datasets as d
from torchvision.datasets.imagenet import load_meta_file, parse_devkit_archive

from images.tars import locked

TRAIN, VAL, TEST, TRAINVAL = (dict(split=name) for name in ("train", "val", "test", "trainval"))
KEPT = lambda s: s._labels, lambda s: s._image_files        # how some keep labels and paths    # noqa: E731
PAIRS = lambda s: [k for _, k in s._samples], lambda s: [path for path, _ in s._samples]        # noqa: E731
INAT = lambda s: [k for k, _ in s.index], lambda s: [                                           # noqa: E731
    os.path.join(s.root, s.all_categories[k], name) for k, name in s.index]
CALTECH = lambda s: s.y, lambda s: [                                                            # noqa: E731
    os.path.join(s.root, "101_ObjectCategories", s.categories[k], f"image_{i:04}.jpg") for k, i in zip(s.y, s.index)]
# name -> torchvision's class, parts to train on, parts to evaluate on, a part's labels, its paths (None: in memory)
SETS = {
    "cifar10": (d.CIFAR10, [dict(train=True)], [dict(train=False)], lambda s: s.targets, None),
    "cifar100": (d.CIFAR100, [dict(train=True)], [dict(train=False)], lambda s: s.targets, None),
    "mnist": (d.MNIST, [dict(train=True)], [dict(train=False)], lambda s: s.targets, None),
    "fashion-mnist": (d.FashionMNIST, [dict(train=True)], [dict(train=False)], lambda s: s.targets, None),
    "svhn": (d.SVHN, [TRAIN], [TEST], lambda s: s.labels, None),
    "stl10": (d.STL10, [TRAIN], [TEST], lambda s: s.labels, None),
    "stl10-unlabeled": (d.STL10, [dict(split="unlabeled")], [], None, None),
    "flowers102": (d.Flowers102, [TRAIN, VAL], [TEST], *KEPT),
    "pets": (d.OxfordIIITPet, [TRAINVAL], [TEST], lambda s: s._labels, lambda s: s._images),
    "dtd": (d.DTD, [TRAIN, VAL], [TEST], *KEPT),
    "aircraft": (d.FGVCAircraft, [TRAINVAL], [TEST], *KEPT),
    "food101": (d.Food101, [TRAIN], [TEST], *KEPT),
    "cars": (d.StanfordCars, [TRAIN], [TEST], *PAIRS),
    "imagenette": (d.Imagenette, [TRAIN], [VAL], *PAIRS),
    "inaturalist": (d.INaturalist, [dict(version="2021_train")], [dict(version="2021_valid")], *INAT),
    "inaturalist-mini": (d.INaturalist, [dict(version="2021_train_mini")], [dict(version="2021_valid")], *INAT),
    "caltech101": (d.Caltech101, [{}], [{}], *CALTECH),         # it has no official parts: see below
}


class Named:
    """One of SETS. Its images are paths of files, or numbers of the pictures that torchvision holds in memory."""
    value_range = None

    def __init__(self, name, split, download):
        make, train, val, labels_of, paths_of = SETS[name]
        root, self.pictures, self.labels, self.classes = os.environ.get("DATASETS", "data"), None, None, None
        self.root, self.where, self.skipped = root, f"{root} ({name}, {split})", {}
        try:
            if download:
                os.makedirs(root, exist_ok=True)
            with locked(root):                                  # one of several processes downloads
                parts = [make(root, download=download, **part) for part in (train if split == "train" else val)]
        except ImportError as error:                            # torchvision reads some lists with scipy
            raise SystemExit(f"{name} needs a package that is not installed: {error}") from None
        except (RuntimeError, OSError, ValueError) as error:    # torchvision's "not found or corrupted"
            hint = "it could not be fetched" if download else "give --download, or set DATASETS to where it is"
            raise SystemExit(f"{name} is not whole under {root} ({str(error).splitlines()[0]}): {hint}") from None
        if paths_of:
            paths = [str(path).removeprefix(root + "/") for part in parts for path in paths_of(part)]
            self.images = np.array([os.fsencode(path) for path in paths], dtype=bytes)      # a set may move
        else:
            self.pictures, = parts
            self.images = np.arange(len(self.pictures))
        if labels_of:
            self.labels = np.concatenate([np.asarray(labels_of(part), dtype=np.int64) for part in parts])
            names = getattr(parts[0], "classes", None) or getattr(parts[0], "categories", None)
            self.classes = [str(k) for k in names or range(self.labels.max() + 1)]
        if name == "caltech101":                            # 30 random images of each class to train on, as is usual
            order, mine = np.random.default_rng(0).permutation(len(self.labels)), np.zeros(len(self.labels), bool)
            for k in range(len(self.classes)):
                mine[order[self.labels[order] == k][:30]] = True
            mine = mine if split == "train" else ~mine
            self.images, self.labels = self.images[mine], self.labels[mine]

    def __len__(self):
        return len(self.images)
    def relative(self, i):
        return f"{self.classes[self.labels[i]].replace('/', '-')}/{i:07}" if self.classes else f"{i:07}"
    def name(self, i):
        if self.pictures is None:
            return os.path.join(self.root, os.fsdecode(self.images[i]))
        return f"{self.where} number {self.images[i]}"
    def read(self, i):
        return Path(self.name(i)).read_bytes() if self.pictures is None else self.pictures[self.images[i]][0]


def label_imagenet(source, folder):
    """Label ImageNet's flat validation images by torchvision's list: meta.bin, or made from the development kit."""
    try:
        with locked(folder):                                    # one of several processes makes the list
            if not os.path.exists(os.path.join(folder, "meta.bin")):
                parse_devkit_archive(folder)
            names, wnids = load_meta_file(folder)
    except Exception as error:                                  # no kit, no scipy to read it, a damaged list
        print(f"note: {source.where} stays without labels ({str(error).splitlines()[0]}): meta.bin or "
              f"{folder}/ILSVRC2012_devkit_t12.tar.gz would give them", flush=True)
        return
    if len(wnids) != len(source):
        raise SystemExit(f"{folder}/meta.bin labels {len(wnids)} images, but {source.where} has {len(source)}")
    source.classes = sorted(names)
    source.labels = np.searchsorted(source.classes, wnids)
