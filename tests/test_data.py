import io
import os

import numpy as np
import pytest
import torch
from conftest import write_images
from golden import DATA
from PIL import Image
from torchvision.transforms import v2

from augment import denormalize, normalize, random_flip, statistics
from data import CenterCrops, RandomCrops, Shapes, crop_box, decode, describe, find, keys, load, to_channels

# ----------------------------------------------------------------------------------------------------------------
# Sources


def test_folder_with_classes(classes):
    train, val = find(str(classes)), find(str(classes), "val")
    assert (len(train), len(val), train.classes) == (40, 8, ["a", "b"])
    assert train.labels.tolist() == [0] * 20 + [1] * 20
    assert train.name(0).endswith("train/a/000.png") and train.image(0).size == (24, 24)
    assert describe(train).startswith("40 images in 2 classes under")


def test_folders_without_labels(tmp_path, classes):
    write_images(tmp_path / "flat", 3)
    flat = find(str(tmp_path / "flat"))
    assert len(flat) == 3 and flat.labels is None and find(str(tmp_path / "flat"), "val") is None
    nested = find(str(classes / "train"))   # below train/ itself, sub-folders may mean anything
    assert len(nested) == 40 and nested.labels is None
    write_images(tmp_path / "parted" / "train", 3)
    (tmp_path / "parted" / "train" / ".cache").mkdir()          # no class
    assert find(str(tmp_path / "parted")).labels is None        # train/ without sub-folders
    write_images(tmp_path / "parted" / "train" / "more", 2)
    mixed = find(str(tmp_path / "parted"))                      # with images beside sub-folders: none is left out
    assert len(mixed) == 5 and mixed.labels is None


def test_test_folder_serves_as_val(tmp_path):
    for split in ("train", "test"):
        write_images(tmp_path / split / "x", 2)
    assert len(find(str(tmp_path), "val")) == 2


def test_links_in_a_circle_and_odd_names(tmp_path):
    write_images(tmp_path / "yellow lady's slipper é", 2, suffix=".PNG")
    os.symlink(tmp_path, tmp_path / "yellow lady's slipper é" / "loop")
    source = find(str(tmp_path))
    assert len(source) == 2 and source.image(1).size == (24, 24)


@pytest.mark.parametrize("make, words", [
    (lambda p: p / "absent", "does not exist"),
    (lambda p: p, "no image found under"),
    (lambda p: (p / "x.txt").write_text("x") and p, "no image found under"),
    (lambda p: (p / "file").write_text("x") and p / "file", "is a file")])
def test_mistaken_folders(tmp_path, make, words):
    with pytest.raises(SystemExit, match=words):
        find(str(make(tmp_path)))


def test_missing_imagenet_says_where_it_looked(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("IMAGENET", raising=False)
    with pytest.raises(SystemExit, match=r"\./imagenet .*--demo"):
        find("imagenet")
    write_images(tmp_path / "elsewhere", 2)
    monkeypatch.setenv("IMAGENET", str(tmp_path / "elsewhere"))
    assert len(find("imagenet")) == 2


def test_empty_class(tmp_path):
    write_images(tmp_path / "train" / "a", 2)
    (tmp_path / "train" / "b").mkdir()
    with pytest.raises(SystemExit, match="1 class folders hold no image, first .*b: fill them or remove them"):
        find(str(tmp_path))


def test_shapes():
    train, val = Shapes(), Shapes("val")
    assert (len(train), len(val), len(train.classes)) == (10_000, 2_000, 10)
    pictures = {source.image(i).tobytes() for source in (train, val) for i in range(300)}
    assert len(pictures) == 600                                 # no two alike, and val is not train
    assert train.image(17).tobytes() == Shapes().image(17).tobytes()
    assert np.bincount(train.labels).tolist() == [1000] * 10


def test_mean_colour_tells_nothing_about_shapes():
    train = Shapes(length=2000)
    x = np.array([np.asarray(train.image(i)).mean((0, 1)) for i in range(2000)])
    near = np.linalg.norm(x[1000:, None] - x[None, :1000], axis=-1).argmin(1)
    assert (train.labels[:1000][near] == train.labels[1000:]).mean() < 0.2      # chance is 0.1


# ----------------------------------------------------------------------------------------------------------------
# Decoding and cropping


def encoded(img, **options):
    buffer = io.BytesIO()
    img.save(buffer, **options)
    return buffer.getvalue()


RGB = Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 12, 3), dtype=np.uint8))


@pytest.mark.parametrize("img, options", [
    (RGB, dict(format="PNG")), (RGB.convert("L"), dict(format="PNG")), (RGB.convert("P"), dict(format="GIF")),
    (RGB.convert("CMYK"), dict(format="JPEG")), (RGB.convert("RGBA"), dict(format="PNG")),
    (RGB.convert("1"), dict(format="PNG")), (RGB.convert("P"), dict(format="PNG", transparency=3))])
@pytest.mark.parametrize("channels, mode", [(1, "L"), (3, "RGB"), (4, "RGBA")])
def test_every_mode_becomes_the_channels_asked_for(img, options, channels, mode):
    out = to_channels(decode(encoded(img, **options)), channels)
    assert out.mode == mode and out.size == (12, 8)
    if options["format"] == "PNG" and img.mode == "RGB" and channels == 3:
        assert out.tobytes() == RGB.tobytes()


def test_sixteen_bits_are_scaled_not_clipped():
    deep = np.linspace(0, 65535, 96).astype(np.uint16).reshape(8, 12)
    out = np.asarray(to_channels(decode(encoded(Image.fromarray(deep), format="PNG")), 1))
    assert np.abs(out - deep / 257).max() <= 1


def test_exif_rotation_is_applied():
    exif = Image.Exif()
    exif[0x0112] = 6                                            # the camera was turned: show it turned back
    assert decode(encoded(RGB, format="PNG", exif=exif)).size == (8, 12)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.95])
def test_truncated_files_raise(share):
    data = encoded(RGB.resize((200, 200)), format="JPEG")
    with pytest.raises(OSError):
        decode(data[:int(len(data) * share)])


def test_crop_law_is_torchvisions():
    """Area, aspect ratio and place of 4,000 crops against as many of torchvision's: the same distributions."""
    torch.manual_seed(0)
    width, height, scale, ratio = 300, 200, (0.08, 1.0), (3 / 4, 4 / 3)
    rng = np.random.default_rng(0)
    ours = np.array([crop_box(width, height, scale, ratio, rng) for _ in range(4000)], dtype=float)
    reference = v2.RandomResizedCrop(10, scale, ratio)
    draws = [reference.make_params([torch.empty(3, height, width)]) for _ in range(4000)]
    theirs = np.array([(d["left"], d["top"], d["width"], d["height"]) for d in draws], dtype=float)
    for quantity in (lambda b: b[:, 2] * b[:, 3], lambda b: b[:, 2] / b[:, 3], lambda b: b[:, 0], lambda b: b[:, 1]):
        a, b = np.sort(quantity(ours)), np.sort(quantity(theirs))
        both = np.concatenate([a, b])
        distance = np.abs(np.searchsorted(a, both, "right") - np.searchsorted(b, both, "right")).max() / 4000
        assert distance < 1.95 * (2 / 4000) ** 0.5              # Kolmogorov-Smirnov at the 0.1% level
    assert crop_box(1000, 10, (0.9, 1), ratio, rng)[2:] == (13, 10)     # no box fits: the largest centred one
    assert crop_box(10, 1000, (0.9, 1), ratio, rng) == (0, 493, 10, 13)


def test_crop_pixels_are_torchvisions(classes):
    source, rng = find(str(classes)), np.random.default_rng((5, 2, 7))
    crops = RandomCrops(source, (16, 16), 3, 5, (0.2, 1.0), "bicubic")
    left, top, w, h = (int(v) for v in crop_box(24, 24, (0.2, 1.0), (3 / 4, 4 / 3), rng))
    expected = v2.functional.resized_crop(source.image(7), top, left, h, w, [16, 16], v2.InterpolationMode.BICUBIC)
    img, label, failed = crops[2, 7]
    assert torch.equal(img, v2.functional.pil_to_tensor(expected)) and (label, failed) == (0, None)


@pytest.mark.parametrize("w, h, size", [(300, 200, 224), (200, 301, 224), (64, 64, 224), (500, 375, 384)])
def test_evaluation_crop_is_torchvisions(tmp_path, w, h, size):
    RGB.resize((w, h)).save(tmp_path / "x.png")
    short = int(size / 0.875) if size <= 224 else size
    reference = v2.Compose([v2.Resize(short, v2.InterpolationMode.BICUBIC), v2.CenterCrop(size), v2.PILToTensor()])
    img = CenterCrops(find(str(tmp_path)), (size, size), 3)[0][0]
    assert torch.equal(img, reference(RGB.resize((w, h))))


def test_evaluation_crop_of_other_shapes(tmp_path):
    RGB.resize((160, 96)).save(tmp_path / "x.png")
    source = find(str(tmp_path))
    assert CenterCrops(source, (96, 160), 3)[0][0].numpy().transpose(1, 2, 0).tobytes() == source.image(0).tobytes()
    assert CenterCrops(source, (32, 80), 1)[0][0].shape == (1, 32, 80)


def test_random_interpolation_uses_both(classes):
    source = find(str(classes))
    both = {how: [RandomCrops(source, (16, 16), 3, 0, (0.2, 1.0), how)[e, 3][0] for e in range(20)]
            for how in ("random", "bilinear", "bicubic")}
    which = [torch.equal(r, b) for r, b in zip(both["random"], both["bilinear"])]
    assert 3 < sum(which) < 17
    assert all(w or torch.equal(r, c) for w, r, c in zip(which, both["random"], both["bicubic"]))


# ----------------------------------------------------------------------------------------------------------------
# Order


def test_an_epoch_is_every_image_once():
    got = [key for batch in keys(23, 5, 1, 1, 0, seed=3, start=0, steps=8) for key in batch]
    first, second = got[:20], got[20:]
    assert {e for e, _ in first} == {0} and {e for e, _ in second} == {1}
    assert len({i for _, i in first}) == len({i for _, i in second}) == 20      # whole batches: 3 of 23 are left out
    assert [i for _, i in first] != [i for _, i in second]


def test_ranks_and_accumulation_share_a_step():
    """Whatever the number of processes and passes, a step sees the same images."""
    def images(world, accum):
        parts = [list(keys(40, 8, accum, world, rank, 0, 0, 10)) for rank in range(world)]
        return [sorted(i for part in parts for micro in part[step * accum:(step + 1) * accum] for _, i in micro)
                for step in range(10)]
    assert images(1, 1) == images(2, 1) == images(1, 4) == images(2, 2)


def test_starting_later_is_the_same_order():
    everything = list(keys(23, 5, 2, 1, 0, 0, 0, 12))
    assert list(keys(23, 5, 2, 1, 0, 0, 7, 12)) == everything[14:]


def test_any_number_of_workers_gives_the_same_batches(classes):
    def batches(workers):
        crops = RandomCrops(find(str(classes)), (16, 16), 3, 0, (0.2, 1.0), "random")
        return list(load(crops, keys(40, 8, 1, 1, 0, 0, 3, 9), workers, pin=False))
    for (a, la, _), (b, lb, _) in zip(batches(0), batches(2), strict=True):
        assert a.dtype == torch.uint8 and torch.equal(a, b) and torch.equal(la, lb)


def test_unreadable_images_are_replaced_and_named(tmp_path):
    write_images(tmp_path, 6)
    (tmp_path / "002.png").write_bytes(b"not an image")
    (tmp_path / "003.png").write_bytes((tmp_path / "000.png").read_bytes()[:60])
    crops = RandomCrops(find(str(tmp_path)), (8, 8), 3, 0, (0.2, 1.0), "bicubic")
    for index, stand_in in ((2, 4), (3, 4), (1, 1)):
        img, _, failed = crops[0, index]
        assert torch.equal(img, crops[0, stand_in][0])
        assert (failed or "").endswith(f"00{index}.png") == (index != stand_in)
    for path in tmp_path.glob("*.png"):
        path.write_bytes(b"damaged")
    img, _, failed = crops[0, 5]                                # none is left to stand in: an empty image, and its name
    assert not img.any() and failed.endswith("005.png")


def test_unreadable_images_are_collected(tmp_path):
    write_images(tmp_path, 6)
    for name in ("002.png", "003.png"):
        (tmp_path / name).write_bytes(b"damaged")
    crops = RandomCrops(find(str(tmp_path)), (8, 8), 3, 0, (0.2, 1.0), "bicubic")
    _, _, failed = next(iter(load(crops, [[(0, i) for i in range(6)]], 0, pin=False)))
    assert [os.path.basename(name) for name in failed] == ["002.png", "003.png"]


# ----------------------------------------------------------------------------------------------------------------
# On the device


def test_normalize_is_torchvisions():
    img = torch.randint(0, 256, (2, 3, 5, 7), dtype=torch.uint8)
    mean, std = statistics(3)
    expected = v2.functional.normalize(v2.functional.to_dtype(img, torch.float32, scale=True), mean, std)
    torch.testing.assert_close(normalize(img, mean, std), expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(denormalize(expected, mean, std), img)
    with pytest.raises(ValueError, match="need 1 numbers"):
        statistics(1, mean=(0.5, 0.5, 0.5))


def test_flip_draws_once_per_image():
    torch.manual_seed(0)
    img = torch.arange(2000 * 6, dtype=torch.int32).view(2000, 1, 2, 3)
    out = random_flip(img)
    flipped = (out == img.flip(-1)).flatten(1).all(1)
    assert torch.equal(flipped, ~(out == img).flatten(1).all(1))
    assert abs(flipped.float().mean().item() - 0.5) < 5 * 0.5 / 2000 ** 0.5


@pytest.mark.skipif(not DATA.is_dir(), reason=f"sample images not found in {DATA}")
def test_real_images(tmp_path):
    """500 ImageNet files as they are: greyscale, an EXIF rotation, an apostrophe, sides from 97 to 1836 pixels."""
    import tarfile
    with tarfile.open(DATA / "imagenet_sample" / "imagenet_sample_a.tar") as tar:
        tar.extractall(tmp_path, filter="data")
    source = find(str(tmp_path / "imagenet_sample_a"))
    assert len(source) == 500 and len(source.classes) == 500
    odd = [i for i in range(500) if "slipper" in source.name(i)] + list(range(0, 500, 25))
    crops = RandomCrops(source, (64, 64), 3, 0, (0.08, 1.0), "random")
    assert all(crops[0, i][0].shape == (3, 64, 64) and crops[0, i][2] is None for i in odd)
