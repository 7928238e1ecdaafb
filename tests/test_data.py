import io
import json
import os
import struct
import subprocess
import zlib
from contextlib import nullcontext
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from conftest import write_images
from golden import DATA
from PIL import Image
from torchvision.transforms import v2

import data
from data import CenterCrops, RandomCrops, batch_keys, crop_box, decode, load, resize, uniforms
from images.augment import denormalize, draw_colours, normalize, random_flip, recolour, statistics
from images.datasets import Folder, open_dataset
from images.device import DeviceCrops, resize_each
from images.pictures import draw_curve, save_sheet

DECODERS = [pytest.param(data.decode_jpeg, id="torchcodec", marks=pytest.mark.skipif(
    data.decode_jpeg is None, reason="torchcodec is not installed")), pytest.param(None, id="Pillow")]

# ----------------------------------------------------------------------------------------------------------------
# Decoding and cropping


def encoded(img, **options):
    buffer = io.BytesIO()
    img.save(buffer, **options)
    return buffer.getvalue()


def one(crops, key):
    """The image of one key, which must be readable."""
    imgs, _, failed = crops.__getitems__([key])
    assert len(imgs) == 1 and not failed
    return imgs[0]


RGB = Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 12, 3), dtype=np.uint8))


@pytest.mark.parametrize("img, options", [
    (RGB, dict(format="PNG")), (RGB.convert("L"), dict(format="PNG")), (RGB.convert("P"), dict(format="GIF")),
    (RGB.convert("CMYK"), dict(format="JPEG")), (RGB.convert("RGBA"), dict(format="PNG")),
    (RGB.convert("1"), dict(format="PNG")), (RGB.convert("P"), dict(format="PNG", transparency=3))])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_every_mode_becomes_the_channels_asked_for(img, options, channels):
    out = decode(encoded(img, **options), channels)
    assert out.shape == (channels, 8, 12) and out.dtype == torch.uint8
    if options["format"] == "PNG" and img.mode == "RGB" and channels == 3:
        assert out.permute(1, 2, 0).numpy().tobytes() == RGB.tobytes()


def test_sixteen_bits_are_scaled_not_clipped():
    deep = np.linspace(0, 65535, 96).astype(np.uint16).reshape(8, 12)
    out = decode(encoded(Image.fromarray(deep), format="PNG"), 1)[0].numpy()
    assert np.abs(out - deep / 257).max() <= 1


def tiff(pixels, **options):
    tifffile, buffer = pytest.importorskip("tifffile"), io.BytesIO()
    tifffile.imwrite(buffer, pixels, **options)
    return buffer.getvalue()


def npy(pixels):
    buffer = io.BytesIO()
    np.save(buffer, pixels)
    return buffer.getvalue()


def png16(pixels):
    """A PNG with 16 bits, which Pillow cannot write in colour. pixels: uint16 (h, w, C)."""
    def chunk(name, text):
        return struct.pack(">I", len(text)) + name + text + struct.pack(">I", zlib.crc32(name + text))
    height, width, channels = pixels.shape
    head = struct.pack(">IIBBBBB", width, height, 16, {1: 0, 2: 4, 3: 2, 4: 6}[channels], 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def pnm(pixels, most):
    height, width, channels = pixels.shape
    kind = 6 if channels == 3 else 5
    return b"P%d # by hand\n%d %d\n%d\n" % (kind, width, height, most) + pixels.astype(">u2").tobytes()


def shows(file, share, channels=1, value_range=None):
    """Whether a file is decoded to `share` (h, w, C) of the way from black to white, within one of 255."""
    out = decode(file, channels, value_range).permute(1, 2, 0).numpy()
    return out.shape == share.shape and np.abs(out - 255 * share).max() <= 1


DEEP = np.random.default_rng(3).integers(0, 4096, (8, 12, 1)).astype(np.uint16)                 # 12 bits in 16
DEEP_FILES = [lambda x: encoded(Image.fromarray(x[..., 0]), format="PNG"), lambda x: tiff(x[..., 0]),
              lambda x: encoded(Image.fromarray(x[..., 0]), format="TIFF", compression="tiff_lzw"),
              lambda x: tiff(x[..., 0], byteorder=">"), npy, lambda x: pnm(x, 65535)]


@pytest.mark.parametrize("write", DEEP_FILES, ids=["png", "tiff", "lzw", "big-endian", "npy", "pgm"])
def test_the_range_of_the_file_is_the_range(write):
    """What the brightest pixel of an image happens to be changes nothing; --bits says what the file does not."""
    assert shows(write(DEEP), DEEP / 65535) and shows(write(DEEP // 16), DEEP // 16 / 65535)
    assert shows(write(DEEP), DEEP / 4095, value_range=(0, 4095))
    assert shows(write(DEEP), (DEEP / 1000).clip(0, 1), value_range=(0, 1000))                  # what is outside


def test_white_may_be_zero():
    assert shows(tiff(DEEP[..., 0], photometric="miniswhite"), 1 - DEEP / 65535)
    assert shows(tiff(DEEP[..., 0], photometric="miniswhite"), 1 - DEEP / 4095, value_range=(0, 4095))


@pytest.mark.parametrize("most", [15, 100, 256, 1023, 4095, 65535])
def test_a_pgm_states_its_range(most):
    values = np.random.default_rng(most).integers(0, most // 2 + 1, (8, 12, 3))
    text = b"P2 12 8\n%d\n" % most + " ".join(map(str, values[..., 0].ravel())).encode()
    assert shows(text, values[..., :1] / most)
    if most > 255:
        assert shows(pnm(values[..., :1], most), values[..., :1] / most) and shows(pnm(values, most), values / most, 3)


@pytest.mark.parametrize("kind, words", [
    ("int8", "8-bit signed integers"), ("int16", "16-bit signed integers"), ("int32", "32-bit signed integers"),
    ("uint32", "32-bit integers"), ("float16", "16-bit floats"), ("float32", "32-bit floats")])
def test_what_has_no_range_is_refused_with_the_option_that_reads_it(kind, words):
    values = (DEEP % 100).astype(kind)
    for file in (tiff(values[..., 0]), npy(values)):
        with pytest.raises(ValueError, match=f"{words} of unknown range: give --value-range LO HI"):
            decode(file, 1)
        assert shows(file, values / 100, value_range=(0, 100))
    counts = DEEP.astype(np.int32) * 40                         # above 65535
    assert shows(tiff(counts[..., 0]), counts / (2 ** 18 - 1), value_range=(0, 2 ** 18 - 1))
    gaps = DEEP.astype(np.float32)
    gaps[0, 0] = np.nan
    assert decode(npy(gaps), 1, (0, 4095))[0, 0, 0] == 0


def test_eight_bits_keep_their_range_beside_deeper_files():
    grey = (DEEP % 16).astype(np.uint8)
    for file in (encoded(Image.fromarray(grey[..., 0]), format="PNG"), tiff(grey[..., 0])):
        assert shows(file, grey / 255) and shows(file, grey / 255, value_range=(0, 4095))
        assert shows(file, grey / 15, value_range=(0, 15))
    assert torch.equal(decode(encoded(RGB, format="PNG"), 3, (0, 4095)), decode(encoded(RGB, format="PNG"), 3))


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_deep_colours(channels):
    deep = np.random.default_rng(4).integers(0, 65536, (8, 12, channels)).astype(np.uint16)
    extra = dict(extrasamples=["unassalpha"]) if channels in (2, 4) else {}
    photometric = "minisblack" if channels < 3 else "rgb"
    for file in (png16(deep), tiff(deep, photometric=photometric, **extra)):
        assert shows(file, deep / 65535, channels)
        assert shows(file, (deep / 4095).clip(0, 1), channels, (0, 4095))
        assert decode(file, 3).shape == (3, 8, 12)              # grey and colours become each other


@pytest.mark.parametrize("kind", ["uint8", "uint16"])
@pytest.mark.parametrize("bands", [2, 3, 4, 5, 13])
def test_no_band_is_dropped_or_made_up(kind, bands):
    most = np.iinfo(kind).max
    values = np.random.default_rng(5).integers(0, most, (8, 12, bands), endpoint=True).astype(kind)
    planes = np.ascontiguousarray(values.transpose(2, 0, 1))
    files = [npy(values), tiff(values, photometric="minisblack", planarconfig="contig"),
             tiff(planes, photometric="minisblack", planarconfig="separate")]
    if bands > 3:
        extra = dict(photometric="rgb", extrasamples=["unspecified"] * (bands - 3))
        files += [tiff(values, planarconfig="contig", **extra),
                  tiff(values, planarconfig="contig", compression="zlib", tile=(16, 16), **extra),
                  tiff(planes, planarconfig="separate", **extra)]
    for file in files:
        assert shows(file, values / most, bands)
        for other in {1, 3, 4} - {bands}:
            with pytest.raises(ValueError, match=f"its number of bands is {bands}, and --in-chans is {other}"):
                decode(file, other)
    with pytest.raises(ValueError, match="its number of bands is 3, and --in-chans is 7"):
        decode(encoded(RGB, format="JPEG"), 7)


@pytest.mark.skipif(find_spec("imagecodecs") is not None, reason="imagecodecs is installed")
def test_compression_that_needs_a_package_names_it():
    file = bytearray(encoded(RGB.convert("RGBA"), format="TIFF", compression="tiff_lzw"))
    pytest.importorskip("tifffile")
    file[file.index(b"\x52\x01\x03\x00") + 8] = 0               # ExtraSamples: no alpha, but a fourth band
    with pytest.raises(ValueError, match="LZW.* requires the 'imagecodecs' package: pip install imagecodecs"):
        decode(bytes(file), 4)


def test_pages_are_no_bands_and_odd_arrays_are_refused():
    assert shows(tiff(np.stack([DEEP[..., 0]] * 5), photometric="minisblack"), DEEP / 65535)
    with pytest.raises(ValueError, match="its number of bands is 1, and --in-chans is 5"):
        decode(tiff(np.stack([DEEP[..., 0]] * 5), photometric="minisblack"), 5)
    for odd in (np.zeros((2, 3, 4, 5)), np.zeros((2, 3), complex)):
        with pytest.raises(ValueError, match="its array has shape"):
            decode(npy(odd), 1)
    with pytest.raises(ValueError, match="allow_pickle"):
        decode(npy(np.array([[None, 1]], dtype=object)), 1)


@pytest.mark.parametrize("turn", range(1, 9))
def test_bands_are_upright(turn):
    values = np.random.default_rng(6).integers(0, 256, (8, 12, 5), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = turn
    upright = [decode(encoded(Image.fromarray(values[..., k]), format="PNG", exif=exif), 1) for k in range(5)]
    file = tiff(values, photometric="minisblack", planarconfig="contig", extratags=[(0x0112, 3, 1, turn, True)])
    assert torch.equal(decode(file, 5), torch.cat(upright))


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_too_many_pixels_are_refused_by_every_decoder(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 200_000)     # twice as many is the limit
    for size, fits in ((632, True), (633, False)):
        noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (size, size, 3), dtype=np.uint8))
        for file in (encoded(noise, format="JPEG", quality=95), encoded(noise, format="PNG"),
                     tiff(np.zeros((size, size, 5), np.uint8), photometric="minisblack", planarconfig="contig")):
            channels = 5 if file[:2] == b"II" else 3
            with nullcontext() if fits else pytest.raises((Image.DecompressionBombError, ValueError), match="pixels"):
                assert decode(file, channels).shape == (channels, size, size)


def test_exif_rotation_is_applied():
    exif = Image.Exif()
    exif[0x0112] = 6                                            # the camera was turned: show it turned back
    assert decode(encoded(RGB, format="PNG", exif=exif)).shape == decode(encoded(RGB, format="JPEG", exif=exif)).shape \
        == (3, 12, 8)


@pytest.mark.parametrize("decode_jpeg", DECODERS)
@pytest.mark.parametrize("share", [0.1, 0.5, 0.95])
def test_truncated_files_raise(share, decode_jpeg, monkeypatch):
    monkeypatch.setattr(data, "decode_jpeg", decode_jpeg)
    whole = encoded(RGB.resize((200, 200)), format="JPEG")
    with pytest.raises((OSError, RuntimeError)):
        decode(whole[:int(len(whole) * share)])


@pytest.mark.skipif(data.decode_jpeg is None, reason="torchcodec is not installed")
@pytest.mark.parametrize("options", [dict(quality=70), dict(progressive=True), dict(subsampling=0), dict(exif=6)])
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_decoders_give_the_same_pixels(mode, options, monkeypatch):
    if "exif" in options:
        exif = Image.Exif()
        exif[0x0112] = options["exif"]
        options = dict(exif=exif)
    file = encoded(RGB.resize((301, 203)).convert(mode), format="JPEG", **options)
    fast, grey = decode(file), decode(file, 1)
    monkeypatch.setattr(data, "decode_jpeg", None)
    assert torch.equal(fast, decode(file))
    # A colour JPEG stores its grey; Pillow makes it anew from the rounded colours.
    assert (grey.int() - decode(file, 1).int()).abs().max() <= (0 if mode == "L" else 3)


@pytest.mark.parametrize("how", ["bilinear", "bicubic"])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_resizing_is_torchvisions_and_near_pillows(how, channels):
    img = Image.fromarray(np.random.default_rng(1).integers(0, 256, (9, 13, 3), dtype=np.uint8)).resize((130, 90))
    img = img.convert({1: "L", 3: "RGB", 4: "RGBA"}[channels])
    x = decode(img, channels)[:, 5:85, 3:120]
    out = resize(x, (64, 48), how)
    mode = v2.InterpolationMode(how)
    assert torch.equal(out, v2.functional.resize(x, [64, 48], mode))
    pil = v2.functional.resize(v2.functional.to_pil_image(x), [64, 48], mode)
    error = (out.int() - v2.functional.pil_to_tensor(pil).int()).abs().float()
    if channels < 4:                                            # Pillow weighs colours by alpha, torch does not
        assert error.mean() < 0.2 and error.max() <= (1 if how == "bilinear" else 4)    # of 255, two ways to round


@pytest.mark.parametrize("channels", [1, 3])
def test_resizing_each_is_the_exact_sum_rounded_once(channels):
    rng = np.random.default_rng(2)
    imgs = [torch.from_numpy(rng.integers(0, 256, (channels, h, w), dtype=np.uint8))
            for h, w in ((30, 40), (7, 90), (16, 24), (100, 5), (1, 1), (16, 24))]
    cubic = torch.tensor([True, False, True, True, False, False])
    out = resize_each(imgs, (16, 24), cubic)
    assert torch.equal(out[2], imgs[2])                         # of that size already: nothing changes
    for img, how, got in zip(imgs, cubic.tolist(), out):
        exact = torch.nn.functional.interpolate(img[None].double(), (16, 24), mode="bicubic" if how else "bilinear",
                                                antialias=True)[0].clamp(0, 255)
        assert (got - exact).abs().max() < 0.51


def test_crop_law_is_torchvisions():
    """Area, aspect ratio and place of 4,000 crops against as many of torchvision's: the same distributions."""
    torch.manual_seed(0)
    width, height, scale, ratio = 300, 200, (0.08, 1.0), (3 / 4, 4 / 3)
    table = uniforms(0, [(1, i) for i in range(4000)], 23)
    ours = np.array([crop_box(width, height, scale, ratio, u) for u in table], dtype=float)
    reference = v2.RandomResizedCrop(10, scale, ratio)
    draws = [reference.make_params([torch.empty(3, height, width)]) for _ in range(4000)]
    theirs = np.array([(d["left"], d["top"], d["width"], d["height"]) for d in draws], dtype=float)
    for quantity in (lambda b: b[:, 2] * b[:, 3], lambda b: b[:, 2] / b[:, 3], lambda b: b[:, 0], lambda b: b[:, 1]):
        a, b = np.sort(quantity(ours)), np.sort(quantity(theirs))
        both = np.concatenate([a, b])
        distance = np.abs(np.searchsorted(a, both, "right") - np.searchsorted(b, both, "right")).max() / 4000
        assert distance < 1.95 * (2 / 4000) ** 0.5              # Kolmogorov-Smirnov at the 0.1% level
    assert crop_box(1000, 10, (0.9, 1), ratio, table[0])[2:] == (13, 10)    # no box fits: the largest centred one
    assert crop_box(10, 1000, (0.9, 1), ratio, table[0]) == (0, 493, 10, 13)


def test_draws_are_uniform_independent_and_a_function_of_their_key():
    keys = [(e, i) for e in range(5) for i in range(2000)]
    table = uniforms(3, keys, 23)
    assert np.array_equal(uniforms(3, keys[777:779], 23), table[777:779])
    assert np.array_equal(uniforms(3, keys, 46)[:, :23], table)
    assert not (uniforms(4, keys, 23) == table).any()
    assert 0 <= table.min() and table.max() < 1 and len(np.unique(table)) == table.size
    steps = np.sort(table, axis=0) - (np.arange(10_000)[:, None] + 0.5) / 10_000
    assert np.abs(steps).max() < 2.3 / 100                      # Kolmogorov-Smirnov, 23 columns at 0.1% each
    for a, b in ((table[:-1], table[1:]), (table[:, :-1], table[:, 1:]), (table[:-2000], table[2000:])):
        r = np.corrcoef(a.ravel(), b.ravel())[0, 1]             # neighbours, columns, epochs of one image
        assert abs(r) < 4 / a.size ** 0.5


def test_crop_pixels_are_torchvisions(classes):
    source, u = open_dataset(str(classes)), uniforms(5, [(2, 7)], 23)[0]
    left, top, w, h = crop_box(24, 24, (0.2, 1.0), (3 / 4, 4 / 3), u)
    how = v2.InterpolationMode.BICUBIC
    expected = v2.functional.resized_crop(decode(source.read(7)), top, left, h, w, [16, 16], how)
    imgs, labels, failed = RandomCrops(source, (16, 16), 3, 5, (0.2, 1.0), "bicubic").__getitems__([(2, 7)])
    assert torch.equal(imgs[0], expected) and (labels.tolist(), failed) == ([0], [])


@pytest.mark.parametrize("w, h, size", [(300, 200, 224), (200, 301, 224), (64, 64, 224), (500, 375, 384)])
def test_evaluation_crop_is_torchvisions(tmp_path, w, h, size):
    RGB.resize((w, h)).save(tmp_path / "x.png")
    short = int(size / 0.875) if size <= 224 else size
    reference = v2.Compose([v2.PILToTensor(), v2.Resize(short, v2.InterpolationMode.BICUBIC), v2.CenterCrop(size)])
    img = one(CenterCrops(open_dataset(str(tmp_path)), (size, size), 3), 0)
    # Channels together or apart in memory round differently, by one.
    assert (img.int() - reference(RGB.resize((w, h))).int()).abs().max() <= 1


def test_evaluation_crop_of_other_shapes(tmp_path):
    RGB.resize((160, 96)).save(tmp_path / "x.png")
    source = open_dataset(str(tmp_path))
    assert torch.equal(one(CenterCrops(source, (96, 160), 3), 0), decode(source.read(0)))
    assert one(CenterCrops(source, (32, 80), 1), 0).shape == (1, 32, 80)


def test_random_interpolation_uses_both(classes):
    source = open_dataset(str(classes))
    both = {how: [one(RandomCrops(source, (16, 16), 3, 0, (0.2, 1.0), how), (e, 3)) for e in range(20)]
            for how in ("random", "bilinear", "bicubic")}
    which = [torch.equal(r, b) for r, b in zip(both["random"], both["bilinear"])]
    assert 3 < sum(which) < 17
    assert all(w or torch.equal(r, c) for w, r, c in zip(which, both["random"], both["bicubic"]))


def test_repeated_crops_share_an_image(classes):
    source = open_dataset(str(classes))
    once, thrice = (RandomCrops(source, (16, 16), 3, 0, (0.2, 1.0), "random", repeat=r) for r in (1, 3))
    imgs, labels, _ = thrice.__getitems__([(4, 2), (4, 30)])
    assert labels.tolist() == [0] * 3 + [1] * 3 and len(imgs) == 6
    assert torch.equal(imgs[0], one(once, (4, 2))) and torch.equal(imgs[3], one(once, (4, 30)))
    assert len({img.numpy().tobytes() for img in imgs}) == 6    # each crop is another one
    whole = RandomCrops(source, (24, 24), 3, 0, (1.0, 1.0), "bicubic", repeat=3)
    got = whole.__getitems__([(4, 2)])[0]
    assert torch.equal(got[0], got[1]) and torch.equal(got[0], decode(source.read(2)))


def test_repeat_keeps_the_steps_and_decodes_less():
    """Two epochs with --repeat 2, which is half the images a step, have the steps of two without, and see each image
    once, in two crops."""
    plain = [key for batch in batch_keys(40, 8, 1, 1, 0, 0, 0, 10) for key in batch]
    twice = [batch for batch in batch_keys(40, 8 // 2, 1, 1, 0, 0, 0, 10)]
    assert len(twice) == 10 and all(len(batch) == 4 for batch in twice)
    assert sorted(i for batch in twice for _, i in batch) == list(range(40)) and len(plain) == 80
    split = [list(batch_keys(40, 8 // 2, 1, 2, rank, 0, 3, 9)) for rank in range(2)]
    assert [a + b for a, b in zip(*split)] == twice[3:9]


@pytest.mark.skipif(data.decode_jpeg is None, reason="torchcodec is not installed")
@pytest.mark.parametrize("channels", [1, 3])
def test_crops_on_the_device_are_the_same(tmp_path, channels):
    """The same law, labels and names of bad files; pixels within a rounding: one product is rounded once, not twice."""
    for k, name in enumerate("ab"):
        write_images(tmp_path / "train" / name, 6, side=60, suffix=".jpg", seed=k)
    exif = Image.Exif()
    exif[0x0112] = 6
    RGB.resize((60, 90)).save(tmp_path / "train" / "a" / "turned.jpg", exif=exif)
    RGB.resize((60, 90)).save(tmp_path / "train" / "b" / "other.png")
    RGB.resize((60, 90)).convert("L").save(tmp_path / "train" / "b" / "grey.jpg")
    source = open_dataset(str(tmp_path))
    parts = [[(1, i) for i in range(k, k + 5)] for k in (0, 5, 10)]

    def both():
        made = [make(source, (32, 48), channels, 0, (0.2, 1.0), "random", 2) for make in (RandomCrops, DeviceCrops)]
        return zip(*(crops.finish(load(crops, parts, workers), torch.device("cpu"))
                     for crops, workers in zip(made, (0, 1))), strict=True)

    for (a, la, _), (b, lb, _) in both():
        error = (a.int() - b.int()).abs().float()
        assert torch.equal(la, lb) and error.mean() < 0.5 and error.max() <= 12     # overshoot is cut once, not twice
    crops = DeviceCrops(source, (32, 48), channels, 0, (0.2, 1.0), "random")
    (keys_, items, labels, failed), = load(crops, parts[:1], 0)
    as_lists = [item if isinstance(item, torch.Tensor) else list(item) for item in items]      # as pinning leaves it
    (a, *_), (b, *_) = (next(iter(crops.finish([(keys_, x, labels, failed)], torch.device("cpu"))))
                        for x in (items, as_lists))
    assert torch.equal(a, b)
    path = tmp_path / "train" / "a" / "003.jpg"
    path.write_bytes(path.read_bytes()[:-99])
    file = bytearray((tmp_path / "train" / "b" / "004.jpg").read_bytes())
    file[file.index(b"\xff\xda") - 20:] = b"\xff\xd9"           # looks whole from outside
    (tmp_path / "train" / "b" / "004.jpg").write_bytes(file)
    names = [(fa, fb) for (_, _, fa), (_, _, fb) in both()]
    assert all(fa == fb for fa, fb in names)
    assert [os.path.basename(n) for fa, _ in names for n, _ in fa] == ["003.jpg", "004.jpg"]


# ----------------------------------------------------------------------------------------------------------------
# Order


def test_an_epoch_is_every_image_once():
    got = [key for batch in batch_keys(23, 5, 1, 1, 0, seed=3, start=0, steps=8) for key in batch]
    first, second = got[:20], got[20:]
    assert {e for e, _ in first} == {0} and {e for e, _ in second} == {1}
    assert len({i for _, i in first}) == len({i for _, i in second}) == 20      # whole batches: 3 of 23 are left out
    assert [i for _, i in first] != [i for _, i in second]


def test_ranks_and_accumulation_share_a_step():
    """Whatever the number of processes and passes, a step sees the same images."""
    def images(world, accum):
        parts = [list(batch_keys(40, 8, accum, world, rank, 0, 0, 10)) for rank in range(world)]
        return [sorted(i for part in parts for micro in part[step * accum:(step + 1) * accum] for _, i in micro)
                for step in range(10)]
    assert images(1, 1) == images(2, 1) == images(1, 4) == images(2, 2)


def test_starting_later_is_the_same_order():
    everything = list(batch_keys(23, 5, 2, 1, 0, 0, 0, 12))
    assert list(batch_keys(23, 5, 2, 1, 0, 0, 7, 12)) == everything[14:]


def test_any_number_of_workers_gives_the_same_batches(classes):
    def batches(workers):
        crops = RandomCrops(open_dataset(str(classes)), (16, 16), 3, 0, (0.2, 1.0), "random")
        return list(load(crops, batch_keys(40, 8, 1, 1, 0, 0, 3, 9), workers, pin=False))
    for (a, la, _), (b, lb, _) in zip(batches(0), batches(2), strict=True):
        assert a.dtype == torch.uint8 and torch.equal(a, b) and torch.equal(la, lb)


def test_unreadable_images_are_replaced_and_named(tmp_path):
    write_images(tmp_path, 6)
    (tmp_path / "002.png").write_bytes(b"not an image")
    (tmp_path / "003.png").write_bytes((tmp_path / "000.png").read_bytes()[:60])
    crops = RandomCrops(open_dataset(str(tmp_path)), (8, 8), 3, 0, (0.2, 1.0), "bicubic")
    for index, stand_in in ((2, 4), (3, 4), (1, 1)):            # the stand-in has the crop that is its own
        imgs, _, failed = crops.__getitems__([(0, index)])
        assert torch.equal(imgs[0], one(crops, (0, stand_in)))
        assert [name.endswith(f"00{index}.png") for name, _ in failed] == [True] * (index != stand_in)
    for path in tmp_path.glob("*.png"):
        path.write_bytes(b"damaged")
    imgs, _, failed = crops.__getitems__([(0, 5)])              # none is left to stand in: an empty image, and its name
    assert not imgs.any() and len(failed) == 1 and failed[0][0].endswith("005.png")


def test_unreadable_images_are_collected(tmp_path):
    write_images(tmp_path, 6)
    for name in ("002.png", "003.png"):
        (tmp_path / name).write_bytes(b"damaged")
    crops = RandomCrops(open_dataset(str(tmp_path)), (8, 8), 3, 0, (0.2, 1.0), "bicubic")
    _, _, failed = next(iter(load(crops, [[(0, i) for i in range(6)]], 0, pin=False)))
    assert [os.path.basename(name) for name, _ in failed] == ["002.png", "003.png"]


# ----------------------------------------------------------------------------------------------------------------
# On the device


def test_normalize_is_torchvisions():
    img = torch.randint(0, 256, (2, 3, 5, 7), dtype=torch.uint8)
    mean, std = statistics(3)
    expected = v2.functional.normalize(v2.functional.to_dtype(img, torch.float32, scale=True), mean, std)
    torch.testing.assert_close(normalize(img, mean, std), expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(denormalize(expected, mean, std), img)
    last = img.contiguous(memory_format=torch.channels_last)    # as workers send them
    assert torch.equal(normalize(last, mean, std), normalize(img, mean, std))
    with pytest.raises(ValueError, match="need 1 numbers"):
        statistics(1, mean=(0.5, 0.5, 0.5))


@pytest.mark.parametrize("channels", [2, 5])
def test_colours_of_bands(channels):
    """Of five bands the first three change as three channels do, and two stay. Two have no hue and no grey."""
    img = torch.randint(0, 256, (6, channels, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    mean, std = statistics(channels)
    torch.manual_seed(0)
    drawn = draw_colours(6, p_jitter=1.0, p_grey=1.0, p_blur=1.0)
    out, plain = recolour(img, drawn, mean, std), normalize(img, mean, std)
    if channels == 5:
        assert torch.equal(out[:, :3], recolour(img[:, :3].contiguous(), drawn, mean[:3], std[:3]))
        assert torch.equal(out[:, 3:], plain[:, 3:])
    else:
        only_hue = drawn._replace(factors=torch.tensor([[1, 1, 0.3, 0.1]]).expand(6, -1), radius=torch.zeros(6))
        torch.testing.assert_close(recolour(img, only_hue, mean, std), plain)
        assert not torch.equal(out, plain) and out.isfinite().all()


def test_flip_draws_once_per_image():
    torch.manual_seed(0)
    img = torch.arange(2000 * 6, dtype=torch.int32).view(2000, 1, 2, 3)
    out = random_flip(img.clone())
    flipped = (out == img.flip(-1)).flatten(1).all(1)
    assert torch.equal(flipped, ~(out == img).flatten(1).all(1))
    assert abs(flipped.float().mean().item() - 0.5) < 5 * 0.5 / 2000 ** 0.5


@pytest.mark.skipif(not DATA.is_dir(), reason=f"sample images not found in {DATA}")
def test_real_images(tmp_path, monkeypatch):
    """500 ImageNet files as they are: grey, an EXIF rotation, an apostrophe, sides from 97 to 1836 pixels; straight
    from the tar, as from the folder, with either decoder."""
    os.symlink(DATA / "imagenet_sample" / "imagenet_sample_a.tar", tmp_path / "sample.tar")
    source = open_dataset(str(tmp_path / "sample.tar"))
    assert len(source) == 500 and len(source.classes) == 500
    odd = [i for i in range(500) if "slipper" in source.name(i)] + list(range(0, 500, 25))
    crops = RandomCrops(source, (64, 64), 3, 0, (0.08, 1.0), "random")
    imgs, _, failed = crops.__getitems__([(0, i) for i in odd])
    assert imgs.shape == (len(odd), 3, 64, 64) and not failed
    subprocess.run(["tar", "xf", tmp_path / "sample.tar", "-C", tmp_path], check=True)
    folder = Folder(str(tmp_path / "imagenet_sample_a" / "train"))
    crops = RandomCrops(folder, (64, 64), 3, 0, (0.08, 1.0), "random")
    assert torch.equal(crops.__getitems__([(0, i) for i in odd])[0], imgs)
    monkeypatch.setattr(data, "decode_jpeg", None)
    assert torch.equal(crops.__getitems__([(0, i) for i in odd])[0], imgs)


# ----------------------------------------------------------------------------------------------------------------
# Pictures of a run


@pytest.mark.parametrize("channels, size", [(3, (32, 48)), (1, (200, 150)), (4, (20, 20)), (2, (20, 20))])
def test_sheets_show_what_they_are_given(tmp_path, channels, size):
    columns = {name: torch.randint(0, 256, (3, channels, *size), dtype=torch.uint8) for name in ("first", "second")}
    save_sheet(columns, "a note", str(tmp_path / "x.png"))
    page = torch.from_numpy(np.asarray(Image.open(tmp_path / "x.png")).copy()).permute(2, 0, 1)
    zoom = max(1, round(112 / max(size)))
    high, wide = (zoom * side + 8 for side in size)             # a cell has a white edge of 4 pixels all around
    assert page.shape == (3, 3 * high + 36, 2 * wide) and os.listdir(tmp_path) == ["x.png"]
    for row in range(3):
        for k, imgs in enumerate(columns.values()):
            cell = page[:, 18 + row * high:18 + (row + 1) * high, k * wide:(k + 1) * wide]
            shown = imgs[row, :3] if channels > 2 else imgs[row, :1].expand(3, -1, -1)
            assert torch.equal(cell[:, 4:-4:zoom, 4:-4:zoom], shown)
    assert (page[:, :18] < 128).any() and (page[:, -18:] < 128).any()       # titles and note


def test_pictures_that_cannot_be_written_do_not_end_a_run(tmp_path, capsys):
    columns = dict(only=torch.zeros(1, 3, 8, 8, dtype=torch.uint8))
    save_sheet(columns, "", str(tmp_path / "nowhere" / "x.png"))
    assert "x.png could not be drawn" in capsys.readouterr().out
    pytest.importorskip("matplotlib")
    draw_curve(str(tmp_path / "nowhere"))
    assert "loss.png could not be drawn" in capsys.readouterr().out
    rows = [dict(step=s, epoch=s / 2, loss=float(s), chance=1.0) for s in range(4)] + [dict(step=9, epoch=4, loss=None)]
    (tmp_path / "log.jsonl").write_text("\n".join(map(json.dumps, [dict(config={}), *rows])) + '\n{"step": 7, "lo')
    draw_curve(str(tmp_path))
    assert Image.open(tmp_path / "loss.png").size == (900, 525)
    (tmp_path / "loss.png").unlink()
    (tmp_path / "loss.png").mkdir()
    draw_curve(str(tmp_path))
    assert "loss.png could not be drawn" in capsys.readouterr().out
