"""Where images are: folders, tars in place, tars of tars, torchvision's sets, and what damaged ones get."""
import inspect
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import write_images
from PIL import Image, features

from data import RandomCrops, decode, open_image, resize
from images import named, tars
from images.datasets import describe, open_dataset, same_classes, subset, train_and_val
from images.shapes import Shapes
from images.tars import SUFFIXES
from tools import pack as packing

ROOT = Path(__file__).parents[1]


# ----------------------------------------------------------------------------------------------------------------
# Sources


def test_folder_with_classes(classes):
    train, val = open_dataset(str(classes)), open_dataset(str(classes), "val")
    assert (len(train), len(val), train.classes) == (40, 8, ["a", "b"])
    assert train.labels.tolist() == [0] * 20 + [1] * 20
    assert train.name(0).endswith("train/a/000.png") and open_image(train.read(0)).size == (24, 24)
    assert describe(train).startswith("40 images in 2 classes under")


def test_folders_without_labels(tmp_path, classes):
    write_images(tmp_path / "flat", 3)
    flat = open_dataset(str(tmp_path / "flat"))
    assert len(flat) == 3 and flat.labels is None and open_dataset(str(tmp_path / "flat"), "val") is None
    nested = open_dataset(str(classes / "train"))   # below train/ itself, sub-folders may mean anything
    assert len(nested) == 40 and nested.labels is None
    write_images(tmp_path / "parted" / "train", 3)
    (tmp_path / "parted" / "train" / ".cache").mkdir()          # no class
    assert open_dataset(str(tmp_path / "parted")).labels is None        # train/ without sub-folders
    write_images(tmp_path / "parted" / "train" / "more", 2)
    mixed = open_dataset(str(tmp_path / "parted"))              # with images beside sub-folders: none is left out
    assert len(mixed) == 5 and mixed.labels is None


def test_test_folder_serves_as_val(tmp_path):
    for split in ("train", "test"):
        write_images(tmp_path / split / "x", 2)
    assert len(open_dataset(str(tmp_path), "val")) == 2


def test_links_in_a_circle_and_odd_names(tmp_path):
    write_images(tmp_path / "yellow lady's slipper é", 2, suffix=".PNG")
    os.symlink(tmp_path, tmp_path / "yellow lady's slipper é" / "loop")
    source = open_dataset(str(tmp_path))
    assert len(source) == 2 and open_image(source.read(1)).size == (24, 24)


@pytest.mark.parametrize("make, words", [
    (lambda p: p / "absent", "does not exist"),
    (lambda p: p, "no image found under"),
    (lambda p: (p / "x.txt").write_text("x") and p, "no image found under"),
    (lambda p: (p / "file").write_text("x") and p / "file", "is a file, but no tar")])
def test_mistaken_folders(tmp_path, make, words):
    with pytest.raises(SystemExit, match=words):
        open_dataset(str(make(tmp_path)))


def test_missing_imagenet_says_where_it_looked(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("IMAGENET", raising=False)
    with pytest.raises(SystemExit, match=r"\./imagenet .*--demo"):
        open_dataset("imagenet")
    write_images(tmp_path / "elsewhere", 2)
    monkeypatch.setenv("IMAGENET", str(tmp_path / "elsewhere"))
    assert len(open_dataset("imagenet")) == 2


def test_empty_class(tmp_path):
    write_images(tmp_path / "train" / "a", 2)
    (tmp_path / "train" / "b").mkdir()
    with pytest.raises(SystemExit, match="1 class folders hold no image, first .*b: fill them or remove them, in val/"):
        open_dataset(str(tmp_path))


@pytest.mark.parametrize("inside, words", [
    (lambda b: b.mkdir(), "in val/ as well: b$"),
    (lambda b: [b.mkdir(), (b / "x.cr2").touch(), (b / "y.cr2").touch()], "as well: b; other files left out: 2 .cr2"),
    (lambda b: [b.mkdir(), os.symlink("gone.jpg", b / "x.jpg")], "as well: b; other files left out: 1 dead links"),
    (lambda b: os.symlink("gone", b), "as well: b; other files left out: 1 dead links"),
    (lambda b: [b.mkdir(), (b.parent / "c").mkdir()], "2 class folders .* in val/ as well: b, c$")])
def test_what_an_empty_class_holds_is_said(tmp_path, inside, words):
    write_images(tmp_path / "train" / "a", 2)
    write_images(tmp_path / "val" / "a", 2)
    inside(tmp_path / "train" / "b")
    with pytest.raises(SystemExit, match=words):
        train_and_val(str(tmp_path))
    for name in "bc":                                           # what the sentence says makes it run
        folder = tmp_path / "train" / name
        folder.unlink() if folder.is_symlink() else shutil.rmtree(folder, ignore_errors=True)
    assert [source.classes for source in train_and_val(str(tmp_path))] == [["a"], ["a"]]


@pytest.mark.parametrize("as_tar", [False, True])
@pytest.mark.parametrize("how", ["gone", "empty"])
def test_val_may_lack_classes(tmp_path, how, as_tar, capsys):
    for k, name in enumerate("abcd"):
        write_images(tmp_path / "train" / name, 2 + k)
    for name in "bd":
        write_images(tmp_path / "val" / name, 3)
    if how == "empty":
        (tmp_path / "val" / "a").mkdir()
        (tmp_path / "val" / "nowhere else").mkdir()
    if as_tar:
        tar(tmp_path / "set.tar", tmp_path)
    train, val = train_and_val(str(tmp_path / "set.tar" if as_tar else tmp_path))
    assert val.classes == train.classes == list("abcd") and val.labels.tolist() == [1] * 3 + [3] * 3
    assert val.relative(0).startswith("b/") and same_classes(train, val)
    assert capsys.readouterr().out.count("note: 2 of 4 classes have no image under ") == 1
    (tmp_path / "train" / os.fsdecode(b"\xff")).mkdir()         # a class whose name no terminal can print
    write_images(tmp_path / "train" / os.fsdecode(b"\xff"), 1)
    train_and_val(str(tmp_path))
    assert "note: 3 of 5 classes have no image" in capsys.readouterr().out
    write_images(tmp_path / "val" / "e", 1)                     # to train without labels on it remains possible
    train, val = train_and_val(str(tmp_path))
    assert val.classes == ["b", "d", "e"] and not capsys.readouterr().out
    with pytest.raises(SystemExit, match="val has 1 classes that .*train lacks, first e"):
        same_classes(train, val)


def test_folders_in_any_case_of_letters(tmp_path):
    for k, (train, val) in enumerate([("Train", "Val"), ("TRAIN", "Test"), ("train", "Validation")]):
        root = tmp_path / str(k)
        write_images(root / train / "a", 2)
        write_images(root / val / "a", 3)
        tar(tmp_path / f"{k}.tar", root)
        for data in (root, tmp_path / f"{k}.tar"):
            assert [len(source) for source in train_and_val(str(data))] == [2, 3]
    write_images(tmp_path / "0" / "train" / "a", 4)             # the usual spelling goes first
    assert len(open_dataset(str(tmp_path / "0"))) == 4


def test_what_is_no_file_is_left_out_by_its_kind(tmp_path):
    root = tmp_path / "set"
    write_images(root, 2, suffix=".jpg")
    os.mkfifo(root / "a.jpg")
    os.mkfifo(root / "pipe")
    (root / "b.jpg").mkdir()
    (root / "@eaDir" / "x.jpg").mkdir(parents=True)
    write_images(root / "@eaDir", 1)
    (root / "Thumbs.db").touch()
    (root / "c.PDF").touch()
    os.symlink("/dev/null", root / "d.jpg")
    os.symlink("gone.jpg", root / "e.jpg")
    listener = socket.socket(socket.AF_UNIX)
    here = os.getcwd()
    os.chdir(root)                                              # the path of a socket is short
    listener.bind("f.jpg")
    os.chdir(here)
    source = open_dataset(str(root))
    kinds = {".pdf": 1, "dead links": 1, "device": 1, "fifo": 2, "folder": 1, "socket": 1}
    assert len(source) == 2 and source.skipped == kinds and "1 socket" in describe(source)
    for pipe in (root / "a.jpg", root / "e.jpg"):
        with pytest.raises(SystemExit, match="is no folder and no plain file|is a dead link"):
            open_dataset(str(pipe))
    with tarfile.open(tmp_path / "set.tar", "w") as archive:
        for name, kind in (("x.jpg", tarfile.FIFOTYPE), ("y.jpg", tarfile.CHRTYPE), ("z.jpg", tarfile.DIRTYPE)):
            member = tarfile.TarInfo(name)
            member.type = kind
            archive.addfile(member)
        archive.add(root / "000.jpg", "000.jpg")
    source = open_dataset(str(tmp_path / "set.tar"))
    assert len(source) == 1 and source.skipped == {"fifo": 1, "device": 1, "folder": 1} and source.labels is None


def test_a_dead_link_in_place_of_train(tmp_path):
    write_images(tmp_path / "val" / "a", 2)
    os.symlink("gone", tmp_path / "train")
    with pytest.raises(SystemExit, match="train is a dead link"):
        open_dataset(str(tmp_path))


@pytest.mark.parametrize("suffix, package", [(".avif", "avif"), (".jfif", None), (".jpe", None), (".jp2", "jpg_2000"),
                                             (".heic", "pillow_heif")])
def test_suffixes(tmp_path, suffix, package):
    if package == "pillow_heif":
        pytest.importorskip(package).register_heif_opener()
    elif package and not features.check(package):
        pytest.skip(f"this Pillow has no {package}")
    img = Image.new("RGB", (40, 40), (200, 30, 9))
    (tmp_path / "train" / "a").mkdir(parents=True)
    img.save(tmp_path / "train" / "a" / f"0{suffix.upper()}")
    tar(tmp_path / "x.tar", tmp_path)
    for data in (tmp_path, tmp_path / "x.tar"):
        pixels = decode(open_dataset(str(data)).read(0))
        assert (pixels.float().mean((1, 2)) - torch.tensor([200, 30, 9])).abs().max() < 8


def test_without_its_package_heic_is_left_out_with_its_name(tmp_path, monkeypatch):
    write_images(tmp_path, 1)
    (tmp_path / "a.HEIC").touch()
    monkeypatch.setattr("images.datasets.SUFFIXES", tuple(s for s in SUFFIXES if not s.startswith(".hei")))
    assert describe(open_dataset(str(tmp_path))).endswith("left out: 1 .heic (pip install pillow-heif reads it)")


def test_an_index_of_other_suffixes_is_made_again(tmp_path, monkeypatch):
    write_images(tmp_path / "set", 2)
    write_images(tmp_path / "set", 1, suffix=".gif")
    tar(tmp_path / "x.tar", tmp_path / "set")
    with monkeypatch.context() as before:
        before.setattr(tars, "SUFFIXES", (".png",))
        assert len(open_dataset(str(tmp_path / "x.tar"))) == 2
    assert len(open_dataset(str(tmp_path / "x.tar"))) == 3


def deep_set(root, value, count=20, bands=0, kind=np.uint16):
    """Files of `bands` (0: grey PNGs) below root, whose brightest value is `value`."""
    root.mkdir(parents=True)
    for i in range(count):
        pixels = np.random.default_rng(i).integers(0, value, (8, 8, bands or 1)).astype(kind)
        pixels[0, 0] = value
        if bands:
            np.save(root / f"{i:02}.npy", pixels)
        else:
            Image.fromarray(pixels[..., 0]).save(root / f"{i:02}.png")


def test_a_set_that_uses_little_of_its_range_is_named(tmp_path, capsys):
    deep_set(tmp_path / "bit12", 4095)
    deep_set(tmp_path / "bit16", 65535)
    train_and_val(str(tmp_path / "bit12"), channels=1)
    assert "bit12: the brightest of 16 images is 4095 of 65535: --bits 12 would use" in capsys.readouterr().out
    train_and_val(str(tmp_path / "bit16"), channels=1)
    assert not capsys.readouterr().out
    train, _ = train_and_val(str(tmp_path / "bit12"), channels=1, bits=12)
    assert not capsys.readouterr().out and train.value_range == (0, 4095)
    crops = RandomCrops(train, (8, 8), 1, 0, (1.0, 1.0), "bicubic").__getitems__([(0, 0)])[0]
    assert crops.max() == 255                                   # the options reach the workers
    train_and_val(str(tmp_path / "bit12"), channels=1, bits=10)
    assert "to 4095, cut off where not in (0, 1023)" in capsys.readouterr().out


@pytest.mark.parametrize("bands, kind, options, words", [
    (5, np.uint8, dict(channels=3), "00.npy cannot be read: its number of bands is 5, and --in-chans is 3"),
    (1, np.float32, dict(channels=1), "00.npy cannot be read: its values are 32-bit floats of unknown range"),
    (1, np.uint8, dict(bits=8, value_range=(0, 9)), "--bits and --value-range both"),
    (1, np.uint8, dict(value_range=(9, 0)), "--value-range needs two numbers, the smaller first, not 9 0"),
    (1, np.uint8, dict(value_range=(1,)), "--value-range needs two numbers")])
def test_a_set_that_these_options_do_not_read_ends_the_run_at_once(tmp_path, bands, kind, options, words):
    deep_set(tmp_path / "set", 200, 3, bands, kind)
    with pytest.raises(SystemExit, match=re.escape(words)) as stop:
        train_and_val(str(tmp_path / "set"), **options)
    assert "\n" not in str(stop.value)


def test_shapes():
    train, val = Shapes(), Shapes("val")
    assert (len(train), len(val), len(train.classes)) == (10_000, 2_000, 10)
    pictures = {source.read(i).tobytes() for source in (train, val) for i in range(300)}
    assert len(pictures) == 600                                 # no two alike, and val is not train
    assert train.read(17).tobytes() == Shapes().read(17).tobytes()
    assert np.bincount(train.labels).tolist() == [1000] * 10


def test_mean_colour_tells_nothing_about_shapes():
    train = Shapes(length=2000)
    x = np.array([np.asarray(train.read(i)).mean((0, 1)) for i in range(2000)])
    near = np.linalg.norm(x[1000:, None] - x[None, :1000], axis=-1).argmin(1)
    assert (train.labels[:1000][near] == train.labels[1000:]).mean() < 0.2      # chance is 0.1


# ----------------------------------------------------------------------------------------------------------------
# Tars


def tar(path, folder, name=".", format=tarfile.PAX_FORMAT):
    with tarfile.open(path, "w", format=format) as archive:
        archive.add(folder, name)
    return str(path)


def same(a, b):
    assert (len(a), a.classes) == (len(b), b.classes)
    assert a.labels is b.labels is None or np.array_equal(a.labels, b.labels)
    assert [a.relative(i) for i in range(len(a))] == [b.relative(i) for i in range(len(b))]
    assert all(a.read(i) == b.read(i) for i in range(len(a)))


@pytest.fixture
def odd_set(tmp_path):
    """Names that sort, quote or encode in unexpected ways."""
    root = tmp_path / "set"
    for name in ("a", "a-b", "yellow lady's slipper", "é", "long" * 30):
        write_images(root / "train" / name, 3, side=8)
        write_images(root / "val" / name, 1, side=8)
    write_images(root / "train" / "a" / "deeper", 2, side=8)
    (root / "train" / "a" / "._000.png").write_bytes(b"left by macOS")
    (root / "train" / "a" / "notes.txt").write_text("no image")
    return root


@pytest.mark.parametrize("inside", [".", "set", "./set", "/set"])
@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_a_tar_is_the_folder(odd_set, tmp_path, inside, format):
    if format == tarfile.USTAR_FORMAT:
        os.rename(odd_set / "train" / "é", odd_set / "train" / "e")     # its names are ASCII
        os.rename(odd_set / "val" / "é", odd_set / "val" / "e")
    path = tar(tmp_path / "x.tar", odd_set, inside, format)
    for split in ("train", "val"):
        same(open_dataset(path, split), open_dataset(str(odd_set), split))
    assert "1 .txt" in describe(open_dataset(path)) and "1 .txt" in describe(open_dataset(str(odd_set)))
    same(open_dataset(path), open_dataset(path))                                # the second time from the index


def test_a_tar_of_all_three_parts_and_of_other_things(odd_set, tmp_path):
    """val/ is evaluated on, not test/; what else there is is not trained on: as for the folder."""
    write_images(odd_set / "test" / "a", 2, side=8, seed=3)
    write_images(odd_set / "docs", 2, side=8, seed=4)
    path = tar(tmp_path / "x.tar", odd_set)
    for split in ("train", "val"):
        same(open_dataset(path, split), open_dataset(str(odd_set), split))
    assert len(open_dataset(path, "val")) == 5 and open_dataset(path).classes


def test_hidden_things_are_no_images(tmp_path):
    for name in ("a", ".thumbs", "__MACOSX", "a/.cache"):
        write_images(tmp_path / "set" / "train" / name, 2, side=8)
    os.symlink("loop.png", tmp_path / "set" / "train" / "a" / "loop.png")
    folder = open_dataset(str(tmp_path / "set"))
    assert (len(folder), folder.classes) == (2, ["a"]) and "1 dead links" in describe(folder)
    same(open_dataset(tar(tmp_path / "x.tar", tmp_path / "set")), folder)


def test_tars_in_place_of_folders(odd_set, tmp_path):
    home = tmp_path / "home"
    home.mkdir()
    tar(home / "train.tar", odd_set / "train")
    tar(home / "val.tar", odd_set / "val", "val")
    for given in (home, home / "train.tar"):
        for split in ("train", "val"):
            same(open_dataset(str(given), split), open_dataset(str(odd_set), split))
    assert open_dataset(tar(tmp_path / "any.tar", odd_set / "train")).classes is None       # as for any other folder
    assert open_dataset(str(tmp_path / "any.tar"), "val") is None
    write_images(tmp_path / "flat", 3)
    same(open_dataset(tar(tmp_path / "flat.tar", tmp_path / "flat")), open_dataset(str(tmp_path / "flat")))


def imagenet(odd_set, home):
    """ImageNet's own files: a tar of one tar per class, a flat val tar, torchvision's list of labels."""
    home.mkdir()
    names = sorted(os.listdir(odd_set / "train"))
    with tarfile.open(home / "ILSVRC2012_img_train.tar", "w") as outer:
        for name in names:
            outer.add(tar(odd_set.parent / f"{name[:50]}.tar", odd_set / "train" / name), f"{name}.tar")
    val = [names[k] for k in (3, 1, 4, 1, 0)]
    with tarfile.open(home / "ILSVRC2012_img_val.tar", "w") as archive:
        for k, name in enumerate(val):
            archive.add(odd_set / "val" / name / "000.png", f"ILSVRC2012_val_{k + 1:08}.png")
    torch.save(({name: (name,) for name in names}, val), home / "meta.bin")
    return val


def test_imagenets_own_tars(odd_set, tmp_path):
    home = tmp_path / "home"
    val = imagenet(odd_set, home)
    same(open_dataset(str(home)), open_dataset(str(odd_set)))
    same(open_dataset(str(home / "ILSVRC2012_img_train.tar")), open_dataset(str(odd_set)))
    source = open_dataset(str(home), "val")
    assert source.classes == open_dataset(str(home)).classes and [source.classes[k] for k in source.labels] == val
    (home / "meta.bin").unlink()
    assert open_dataset(str(home), "val").labels is None


def test_broken_inner_header(odd_set, tmp_path):
    imagenet(odd_set, tmp_path / "home")
    path = tmp_path / "home" / "ILSVRC2012_img_train.tar"
    with tarfile.open(path) as outer:
        member = outer.getmembers()[1]
        with tarfile.open(fileobj=outer.extractfile(member)) as inner:
            at = member.offset_data + inner.getmembers()[-1].offset
    file = bytearray(path.read_bytes())
    file[at + 150] ^= 1                                         # in the checksum
    path.write_bytes(file)
    with pytest.raises(SystemExit, match=rf"a-b.tar in .* has a damaged header, at byte {at:,}: get it again"):
        open_dataset(str(path))


def test_links_in_a_tar(tmp_path):
    write_images(tmp_path / "set" / "train" / "a", 2)
    path = tar(tmp_path / "x.tar", tmp_path / "set")
    with tarfile.open(path, "a") as archive:
        for name, kind, target in (("train/a/soft.png", tarfile.SYMTYPE, "../a/000.png"),
                                   ("train/b/hard.png", tarfile.LNKTYPE, "train/a/001.png"),
                                   ("train/b/loop.png", tarfile.SYMTYPE, "loop.png")):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, target
            archive.addfile(info)
    source = open_dataset(path)
    assert [source.relative(i) for i in range(4)] == ["a/000.png", "a/001.png", "a/soft.png", "b/hard.png"]
    assert source.read(2) == source.read(0) and source.read(3) == source.read(1)
    assert "1 dead links" in describe(source)


@pytest.mark.parametrize("mode, tool", [("w:gz", "gunzip"), ("w:bz2", "bunzip2"), ("w:xz", "unxz")])
def test_compressed_tars_are_refused(classes, tmp_path, mode, tool):
    with tarfile.open(tmp_path / "x.tar", mode) as archive:     # whatever it is called
        archive.add(classes, ".")
    with pytest.raises(SystemExit, match=f"is compressed, .* with {tool} and give the plain tar"):
        open_dataset(str(tmp_path / "x.tar"))


def test_a_tar_cut_short_anywhere_is_refused(tmp_path):
    """No cut goes unnoticed, so no image is missing in silence; beyond the end mark there is nothing to miss."""
    write_images(tmp_path / "set", 3, side=8)
    whole = Path(tar(tmp_path / "x.tar", tmp_path / "set")).read_bytes()
    end = len(whole.rstrip(b"\0"))
    end += -end % 512
    for cut in [*range(0, end, 100), *range(512, end + 512, 512), end - 1, end, end + 511]:
        (tmp_path / "x.tar").write_bytes(whole[:cut])
        with pytest.raises(SystemExit, match="cut short|damaged header|no tar|no image"):
            open_dataset(str(tmp_path / "x.tar"))
    (tmp_path / "x.tar").write_bytes(whole[:end + 512])
    assert len(open_dataset(str(tmp_path / "x.tar"))) == 3
    (tmp_path / "x.tar").write_bytes(whole + whole)
    with pytest.raises(SystemExit, match="goes on after its end mark"):
        open_dataset(str(tmp_path / "x.tar"))


def test_class_folders_without_images_in_a_tar(tmp_path):
    write_images(tmp_path / "set" / "train" / "a", 2)
    (tmp_path / "set" / "train" / "b").mkdir()
    (tmp_path / "set" / "train" / "b" / "readme.txt").write_text("x")
    with pytest.raises(SystemExit, match="1 class folders hold no image, first .*train/b"):
        open_dataset(tar(tmp_path / "x.tar", tmp_path / "set"))
    with tarfile.open(tmp_path / "y.tar", "w") as archive:      # without entries for folders
        for path in sorted((tmp_path / "set").rglob("*.*")):
            archive.add(path, path.relative_to(tmp_path / "set"))
    with pytest.raises(SystemExit, match="1 class folders hold no image, first .*train/b"):
        open_dataset(str(tmp_path / "y.tar"))


def test_damaged_members_are_replaced_and_named(tmp_path):
    write_images(tmp_path / "set", 4)
    (tmp_path / "set" / "001.png").write_bytes(b"not an image")
    crops = RandomCrops(open_dataset(tar(tmp_path / "x.tar", tmp_path / "set")), (8, 8), 3, 0, (0.2, 1.0), "bicubic")
    imgs, _, failed = crops.__getitems__([(0, 1), (0, 2)])
    assert torch.equal(imgs[0], imgs[1]) and len(failed) == 1 and failed[0][0].endswith("x.tar/001.png")


# ----------------------------------------------------------------------------------------------------------------
# The index of a tar


def reads(monkeypatch):
    """Counts how often a tar is gone through."""
    calls, contents = [], tars.contents
    monkeypatch.setattr(tars, "contents", lambda path: calls.append(path) or contents(path))
    return calls


def test_index_is_made_once_and_checked(tmp_path, monkeypatch):
    write_images(tmp_path / "set", 3)
    path, calls = tar(tmp_path / "x.tar", tmp_path / "set"), reads(monkeypatch)
    first = open_dataset(path)
    same(open_dataset(path), first)
    assert len(calls) == 1 and isinstance(open_dataset(path).images, np.memmap)     # mapped: no process holds a copy
    write_images(tmp_path / "set", 4, seed=5)
    time.sleep(0.01)
    tar(path, tmp_path / "set")                                 # another tar of this name
    assert len(open_dataset(path)) == 4 and len(calls) == 2
    same(open_dataset(path), open_dataset(str(tmp_path / "set")))
    os.utime(path, ns=(1, 1))                                   # the same size, another date
    assert len(open_dataset(path)) == 4 and len(calls) == 3


def test_damaged_index_is_made_again(tmp_path):
    write_images(tmp_path / "set", 3)
    path = tar(tmp_path / "x.tar", tmp_path / "set")
    open_dataset(path)
    index = tmp_path / "x.tar.index"
    whole = index.read_bytes()
    for cut in range(0, len(whole), 7):
        index.write_bytes(whole[:cut])
        same(open_dataset(path), open_dataset(str(tmp_path / "set")))
        assert index.read_bytes() == whole
    index.write_bytes(b"\xff" * 100)
    same(open_dataset(path), open_dataset(str(tmp_path / "set")))


def test_index_goes_elsewhere_where_it_must(tmp_path, monkeypatch, capsys):
    write_images(tmp_path / "set", 3)
    path, calls = tar(tmp_path / "x.tar", tmp_path / "set"), reads(monkeypatch)
    (tmp_path / "x.tar.index").mkdir()                          # nothing can be written there, not even by root
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert len(open_dataset(path)) == len(open_dataset(path)) == 3 and len(calls) == 1
    assert len(list((tmp_path / "cache").rglob("*.index"))) == 1
    (tmp_path / "file").write_text("x")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert len(open_dataset(path)) == 3 and "cannot be saved" in capsys.readouterr().out


def test_a_tar_that_shrinks_under_a_run(tmp_path):
    write_images(tmp_path / "set", 3)
    path = tar(tmp_path / "x.tar", tmp_path / "set")
    source = open_dataset(path)
    os.truncate(path, 1000)
    with pytest.raises(OSError, match="has become shorter"):
        source.read(2)


# ----------------------------------------------------------------------------------------------------------------
# torchvision's sets, parts of sets


def test_every_named_set_is_known_to_torchvision(tmp_path, monkeypatch):
    monkeypatch.setenv("DATASETS", str(tmp_path / "nothing"))
    for name, (make, train, val, *_) in named.SETS.items():
        for part in train + val:
            inspect.signature(make).bind("root", download=False, **part)
        # Some lists need scipy, which is not asked for by anything else.
        with pytest.raises(SystemExit, match=f"{name} is not whole under .*: give --download, or set DATASETS|scipy"):
            open_dataset(name)


def test_official_parts_of_a_named_set(tmp_path, monkeypatch):
    """DTD as it lies on disk: train and val to train on, test to evaluate on."""
    base = tmp_path / "dtd" / "dtd"
    (base / "labels").mkdir(parents=True)
    for name in ("banded", "zigzagged"):
        write_images(base / "images" / name, 4, suffix=".jpg", seed=len(name))
    for split, which in (("train", (0, 1)), ("val", (2,)), ("test", (3,))):
        lines = [f"{name}/{i:03}.jpg" for name in ("banded", "zigzagged") for i in which]
        (base / "labels" / f"{split}1.txt").write_text("\n".join(lines))
    monkeypatch.setenv("DATASETS", str(tmp_path))
    train, val = open_dataset("dtd"), open_dataset("dtd", "val")
    assert train.labels.tolist() == [0, 0, 1, 1, 0, 1] and val.labels.tolist() == [0, 1]
    assert train.classes == val.classes == ["banded", "zigzagged"]
    assert train.read(4) == (base / "images" / "banded" / "002.jpg").read_bytes()
    assert RandomCrops(train, (8, 8), 3, 0, (0.2, 1.0), "bicubic").__getitems__([(0, 5)])[2] == []
    monkeypatch.chdir(tmp_path)
    assert open_dataset("dtd/dtd/images").labels is None                # a path is a path
    assert open_dataset("./dtd").labels is None


def test_caltech101_gets_thirty_per_class(tmp_path, monkeypatch):
    for k, name in enumerate(("Faces", "accordion")):
        write_images(tmp_path / "caltech101" / "101_ObjectCategories" / name, 33, side=8, suffix=".jpg", seed=k)
        for i in range(33):                                     # torchvision counts from 1
            folder = tmp_path / "caltech101" / "101_ObjectCategories" / name
            os.rename(folder / f"{i:03}.jpg", folder / f"image_{i + 1:04}.jpg")
    (tmp_path / "caltech101" / "101_ObjectCategories" / "BACKGROUND_Google").mkdir()
    (tmp_path / "caltech101" / "Annotations").mkdir()
    monkeypatch.setenv("DATASETS", str(tmp_path))
    monkeypatch.chdir(ROOT)
    train, val = open_dataset("caltech101"), open_dataset("caltech101", "val")
    assert np.bincount(train.labels).tolist() == [30, 30] and np.bincount(val.labels).tolist() == [3, 3]
    assert not set(train.images) & set(val.images) and open_image(val.read(0)).size == (8, 8)


def test_fractions_are_balanced_and_repeatable():
    whole = Shapes(length=1000)
    tenth = subset(whole, 0.1, seed=3)
    assert np.bincount(tenth.labels).tolist() == [10] * 10 and len(set(tenth.images)) == 100
    assert all(tenth.read(i).tobytes() == whole.read(k).tobytes() for i, k in enumerate(tenth.images[:5]))
    assert np.array_equal(tenth.images, subset(whole, 0.1, seed=3).images)
    assert not np.array_equal(tenth.images, subset(whole, 0.1, seed=4).images)
    assert np.bincount(subset(whole, 0.001, 0).labels).tolist() == [1] * 10           # every class stays
    assert subset(whole, 1.0, 0) is whole
    for wrong in (0.0, 1.5, -1.0, float("nan")):
        with pytest.raises(SystemExit, match="--fraction is above 0 and at most 1"):
            subset(whole, wrong, 0)


def test_fraction_without_labels(tmp_path):
    write_images(tmp_path, 10, side=8)
    assert len(subset(open_dataset(str(tmp_path)), 0.3, 0)) == 3


# ----------------------------------------------------------------------------------------------------------------
# python -m tools.pack, python -m tools.pack inspect


def pack(*args, expect=None):
    if expect:
        with pytest.raises(SystemExit, match=expect):
            packing.command_line(["pack", *map(str, args), "--workers", "0"])
    else:
        packing.command_line(["pack", *map(str, args), "--workers", "0"])


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    root = tmp_path_factory.mktemp("large")
    for split, count in (("train", 8), ("val", 2)):
        write_images(root / split / "a", count, side=60, suffix=".jpg")
        write_images(root / split / "b's é", count, side=20, suffix=".png", seed=2)
    (root / "train" / "a" / "003.jpg").write_bytes(b"damaged")
    return root


def test_packed_is_the_same_set_only_smaller(large, tmp_path, capsys):
    pack(large, tmp_path / "p.tar", "--short-side", 32, "--quality", 95)
    out = capsys.readouterr().out
    assert "packed 19 images" in out and "1 cannot be read and were left out" in out and "003.jpg" in out
    before, after = open_dataset(str(large)), open_dataset(str(tmp_path / "p.tar"))
    assert after.classes == before.classes and np.bincount(after.labels).tolist() == [7, 8]
    names = [n for n in map(before.relative, range(16)) if n != "a/003.jpg"]
    assert [after.relative(i) for i in range(15)] == [n if n.endswith("jpg") else n + ".jpg" for n in names]
    assert {open_image(after.read(i)).size for i in range(7)} == {(32, 32)}
    assert {open_image(after.read(i)).size for i in range(7, 15)} == {(20, 20)}     # never made larger
    assert len(open_dataset(str(tmp_path / "p.tar"), "val")) == 4
    small, true = decode(after.read(0)), resize(decode(before.read(0)), (32, 32), "bicubic")
    assert (small.int() - true.int()).abs().float().mean() < 3
    assert sorted(os.listdir(tmp_path)) == ["p.tar", "p.tar.index"]


def test_what_fits_goes_over_byte_for_byte(large, tmp_path):
    pack(large, tmp_path / "p.tar", "--short-side", 60)
    assert open_dataset(str(tmp_path / "p.tar")).read(0) == open_dataset(str(large)).read(0)
    write_images(tmp_path / "flat", 3, suffix=".jpg")
    pack(tmp_path / "flat", tmp_path / "flat.tar")
    same(open_dataset(str(tmp_path / "flat.tar")), open_dataset(str(tmp_path / "flat")))


def test_pack_interrupted_at_any_byte_goes_on_to_the_same_tar(large, tmp_path, monkeypatch):
    """Stopped after each image in turn, with what was written since the last note cut anywhere, or rubbish after it."""
    pack(large, tmp_path / "whole.tar", "--short-side", 32)
    whole, smaller, rng = (tmp_path / "whole.tar").read_bytes(), packing.smaller, np.random.default_rng(0)
    dest, part, note = (tmp_path / name for name in ("p.tar", "p.tar.part", "p.tar.part.json"))
    for stop in range(0, 20):
        def stopping(source, i, folder, *settings, stop=stop):
            if (folder == "val/") * 16 + i == stop:
                raise KeyboardInterrupt
            return smaller(source, i, folder, *settings)
        monkeypatch.setattr(packing, "smaller", stopping)
        pack(large, dest, "--short-side", 32, expect="stopped: the same command goes on")
        monkeypatch.setattr(packing, "smaller", smaller)
        assert not dest.exists()
        told = json.loads(note.read_text())
        assert told["bytes"] == part.stat().st_size and whole.startswith(part.read_bytes())
        if stop % 2:                                            # as a kill would leave it: more than the note knows
            extra = int(rng.integers(1, 2000))
            part.write_bytes(part.read_bytes() + whole[told["bytes"]:told["bytes"] + extra])
        elif stop % 3:
            part.write_bytes(part.read_bytes() + rng.bytes(700))
        pack(large, dest, "--short-side", 32)
        assert dest.read_bytes() == whole
        assert not part.exists() and not note.exists()
        dest.unlink()


def test_pack_interrupted_amid_an_image_goes_on_to_the_same_tar(large, tmp_path, monkeypatch):
    """Between the header of an image and its end, wherever the tar's own writer happens to be."""
    pack(large, tmp_path / "whole.tar", "--short-side", 32)
    copy, dest = tarfile.copyfileobj, tmp_path / "p.tar"
    for stop in (0, 3, 9, 18):
        for half in (False, True):
            calls = []

            def stopping(source, target, length, *args, calls=calls, stop=stop, half=half, **options):
                calls.append(length)
                if len(calls) == stop + 1:
                    copy(source, target, length // 2, *args, **options) if half else None
                    raise KeyboardInterrupt
                copy(source, target, length, *args, **options)
            monkeypatch.setattr(tarfile, "copyfileobj", stopping)
            pack(large, dest, "--short-side", 32, expect="stopped: the same command goes on")
            monkeypatch.setattr(tarfile, "copyfileobj", copy)
            pack(large, dest, "--short-side", 32)
            assert dest.read_bytes() == (tmp_path / "whole.tar").read_bytes()
            dest.unlink()


def test_two_of_one_name_are_not_lost_in_silence(tmp_path):
    write_images(tmp_path / "set", 1)
    write_images(tmp_path / "other", 1, suffix=".jpg")
    os.rename(tmp_path / "other" / "000.jpg", tmp_path / "set" / "000.png.jpg")
    pack(tmp_path / "set", tmp_path / "p.tar", expect="two images would both be 000.png.jpg")
    assert sorted(os.listdir(tmp_path)) == ["other", "set"]      # nothing was begun


def test_damaged_notes_of_a_pack_start_it_anew(large, tmp_path):
    pack(large, tmp_path / "whole.tar", "--short-side", 32)
    whole = (tmp_path / "whole.tar").read_bytes()
    for part, note in ((whole[:5000], ""), (whole[:5000], "{}"), (whole[:100], None), (b"", "[]")):
        (tmp_path / "p.tar.part").write_bytes(part)
        if note is not None:
            (tmp_path / "p.tar.part.json").write_text(note)
        pack(large, tmp_path / "p.tar", "--short-side", 32)
        assert (tmp_path / "p.tar").read_bytes() == whole
        (tmp_path / "p.tar").unlink()


def ps(*args):
    return subprocess.run(["ps", "-o", *map(str, args)], capture_output=True, text=True).stdout


def test_killed_pack_goes_on(large, tmp_path, capsys):
    """A real process, kill -9 at several moments."""
    pack(large, tmp_path / "whole.tar", "--short-side", 32)
    code = ("import time; from tools import pack; quick = pack.smaller\n"
            "def slow(*a):\n    time.sleep(0.2); return quick(*a)\n"
            "pack.smaller, pack.NOTE_EVERY = slow, 0.05; pack.command_line()")
    command = [sys.executable, "-c", code, "pack", large, tmp_path / "p.tar", "--short-side", "32", "--workers", "1"]
    note, begun = tmp_path / "p.tar.part.json", 0
    for _ in range(2):
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
        while not (note.exists() and json.loads(note.read_text())["done"] > begun):
            time.sleep(0.01)
            assert process.poll() is None
        workers = ps("pid=", "--ppid", process.pid).split()
        process.kill()
        process.communicate()
        while any(ps("stat=", "-p", pid).strip() not in ("", "Z") for pid in workers):      # none outlives its parent
            time.sleep(0.01)
        begun = json.loads(note.read_text())["done"]
        assert not (tmp_path / "p.tar").exists() and 0 < begun < 20
    pack(large, tmp_path / "p.tar", "--short-side", 32)
    assert f"going on after {begun} of 20 images" in capsys.readouterr().out
    assert (tmp_path / "p.tar").read_bytes() == (tmp_path / "whole.tar").read_bytes()


def test_mistaken_packs(large, tmp_path):
    pack(large, tmp_path / "p.zip", expect="ends in .tar")
    pack(large, tmp_path / "nowhere" / "p.tar", expect="cannot be written")
    pack(large, tmp_path / "p.tar", "--quality", 0, expect="--quality 1 to 100")
    pack(tmp_path / "nothing", tmp_path / "p.tar", expect="does not exist")
    (tmp_path / "p.tar").write_bytes(b"precious")
    pack(large, tmp_path / "p.tar", expect="p.tar exists: move it away")
    assert (tmp_path / "p.tar").read_bytes() == b"precious"
    dest = tmp_path / "q.tar"
    (tmp_path / "q.tar.part").write_bytes(b"")
    note = dict(settings=dict(format=1, short_side=99), done=0, bytes=0, left_out=[])
    (tmp_path / "q.tar.part.json").write_text(json.dumps(note))
    pack(large, dest, "--short-side", 32, expect="begun with other settings or images .*short_side")


def test_inspect(large, tmp_path, capsys):
    assert packing.command_line(["inspect", str(large), "--workers", "0"]) == 1
    out = capsys.readouterr().out
    for words in ("train: 16 images in 2 classes", "val: 4 images", "short side 20 to 60 pixels", "7 JPEG RGB",
                  "8 PNG RGB", "classes of 8 (a) to 8 (a)", "1 images cannot be read", "003.jpg: "):
        assert words in out, out
    write_images(tmp_path / "good", 2)
    assert packing.command_line(["inspect", str(tmp_path / "good"), "--workers", "0"]) == 0


def test_commands_as_typed(large, tmp_path, capsys):
    """With and without `pack` as the first word, options first or last; what to do with the tar is said."""
    for k, words in enumerate((["pack", large, "A"], [large, "A"], ["--short-side", "32", large, "A"])):
        dest = str(tmp_path / f"{k}.tar")
        argv = [dest if word == "A" else str(word) for word in words]
        assert not packing.command_line([*argv, "--workers", "0"])
        assert f"train on it with --data {dest}" in capsys.readouterr().out and len(open_dataset(dest)) == 15
    command = [sys.executable, "-m", "tools.pack", "inspect", str(large)]
    out = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert out.returncode == 1 and "1 images cannot be read" in out.stdout
    for argv in (["inspect", "x", "--quality", "3"], ["x"], []):
        with pytest.raises(SystemExit) as stop:
            packing.command_line(argv)
        assert stop.value.code == 2


def test_inspect_measures_and_names(tmp_path, capsys):
    """--stats prints options that statistics() takes, of what the network will see; a few black images count alike."""
    rng = np.random.default_rng(0)
    (tmp_path / "set").mkdir()
    for k in range(8):
        pixels = rng.integers(0, 4096, (6, 4 + k, 5)).astype(np.uint16)
        pixels[0, 0, 0] = 4095
        np.save(tmp_path / "set" / f"{k}.npy", pixels * (k > 0))
    argv = ["inspect", str(tmp_path / "set"), "--workers", "0", "--stats"]
    assert not packing.command_line(argv)
    out = capsys.readouterr().out
    assert "8 5 bands" in out and "note: the brightest of 8 images is 4095 of 65535: --bits 12 would" in out
    assert not packing.command_line([*argv, "--bits", "12"])
    out = capsys.readouterr().out
    found = re.search(r"of 8 images: --in-chans 5 --mean (.*) --std (.*)\n", out)
    source = open_dataset(str(tmp_path / "set"))
    images = [decode(source.read(i), 5, (0, 4095)).double().flatten(1) / 255 for i in range(8)]
    mean = torch.stack([img.mean(1) for img in images]).mean(0)
    square = torch.stack([(img ** 2).mean(1) for img in images]).mean(0)
    for text, expected in zip(found.groups(), (mean, (square - mean ** 2) ** 0.5)):
        torch.testing.assert_close(torch.tensor([float(x) for x in text.split()]).double(), expected, atol=1e-4, rtol=0)
    assert "note" not in out


def test_bands_are_not_packed_and_deep_grey_is_packed_by_its_range(tmp_path, capsys):
    deep_set(tmp_path / "bands", 200, 3, bands=4, kind=np.uint8)
    with pytest.raises(SystemExit, match="number of bands is 4.*; a packed set is of JPEGs, which have 8 bits and are"):
        packing.command_line([str(tmp_path / "bands"), str(tmp_path / "x.tar"), "--workers", "0"])
    deep_set(tmp_path / "deep", 4095)
    for name, options, brightest in (("plain", [], 16), ("bits", ["--bits", "12"], 255)):
        packing.command_line([str(tmp_path / "deep"), str(tmp_path / f"{name}.tar"), "--workers", "0", *options])
        source = open_dataset(str(tmp_path / f"{name}.tar"))
        assert abs(max(decode(source.read(i), 1).max().item() for i in range(20)) - brightest) < 9
    assert "--bits 12 would use the whole range" in capsys.readouterr().out
