"""
Image files that hold more than a photo of 8 bits: grey and colours of more bits, and bands that are no colours.

Values: the range of a file is what it can hold, 0..65535 with 16 bits, 0..maxval in a PGM. --bits N (0 to 2^N-1) or
--value-range LO HI says otherwise, but not of 8 bits unless HI is below 256, nor of JPEG 2000. LO becomes 0 and HI 255,
what lies outside is cut off, NaN becomes LO. Signed integers, floats and 32 bits have no range of their own and are
refused without these options. What an image happens to hold never changes its scale.
Bands: grey and colours, with alpha or without, become each other. Of other bands a file has as many as --in-chans says,
or is refused. The first page of a TIFF is read: pages are not bands.
"""
import io
import os
import re

import numpy as np
import torch
from PIL import Image, ImageOps, TiffImagePlugin

from images.tars import note

TIFF, JPEG2000 = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"), (b"\0\0\0\x0cjP  ", b"\xff\x4f\xff\x51")
PNM = re.compile(rb"P([2356])" + 3 * rb"(?:\s|#[^\n]*\n)+(\d+)" + rb"\s")


class Refused(ValueError):
    """A whole file that these options do not read, with the sentence that says why."""


def open_deep(data, value_range=None):
    """Bytes or a PIL image -> with 8 bits per value: a PIL image of grey or colours, or an array (h, w, N) of bands.
    A plain image of 8 bits is only opened. Raises Refused; damaged files raise nearly anything."""
    pixels, most, colours, inverted = read_values(data)
    if most == 255 and value_range and value_range[1] > 255 or isinstance(data, bytes) and data.startswith(JPEG2000):
        value_range = None
    if isinstance(pixels, Image.Image):
        if not value_range:
            return pixels
        pixels = upright_array(pixels)
    low, high = value_range or (0, most)
    if high is None:
        kind = {"f": "floats", "i": "signed integers"}.get(pixels.dtype.kind, "integers")
        raise Refused(f"its values are {8 * pixels.itemsize}-bit {kind} of unknown range: give --value-range LO HI, "
                      "what is black and what is white, or --bits N for 0 to 2^N-1")
    share = np.nan_to_num((pixels - float(low)) / (high - low)).clip(0, 1)      # float64: exact for 32 bits
    pixels = ((1 - share if inverted else share) * 255 + 0.5).astype(np.uint8)
    return Image.fromarray(pixels.squeeze(2) if pixels.shape[2] == 1 else pixels) if colours else pixels


def read_values(data):
    """-> pixels (h, w, N) of any type, upright; the most that a value can be, from 0, or None; whether they are colours
    and no bands; whether 0 is white. Instead of the pixels of a plain image of 8 bits, the opened image."""
    found, img = None, data
    if isinstance(data, bytes):
        if data.startswith(b"\x93NUMPY"):
            return read_npy(data)
        if data.startswith(TIFF):
            found = read_tiff(data)
        elif data.startswith(b"\x89PNG") and data[24] == 16 and data[25]:       # 16 bits, and no grey
            found = read_png(data)
        elif PNM.match(data):
            found = read_pnm(data)
        elif data[4:8] == b"ftyp" and data[8:10] != b"av":
            import pillow_heif
            pillow_heif.register_heif_opener()
        img = found or Image.open(io.BytesIO(data))
    if found or img.mode[0] not in "IF":
        return found or (img, 255, True, False)
    return upright_array(img), 65535 if "I;16" in img.mode else None, True, False


def upright_array(img):
    """A PIL image -> array (h, w, N), upright."""
    img = ImageOps.exif_transpose(img)
    img = img if img.mode in ("L", "LA", "RGB", "RGBA") or img.mode[0] in "IF" else img.convert("RGB")
    return np.atleast_3d(np.asarray(img))


def to_bands(img, channels):
    """A PIL image or an array of bands -> array (h, w, channels); it must have as many."""
    count = img.shape[2] if isinstance(img, np.ndarray) else len(img.getbands())
    if count != channels:
        raise Refused(f"its number of bands is {count}, and --in-chans is {channels}: none is dropped or made up")
    return np.asarray(img)


def read_npy(data):
    pixels = np.load(io.BytesIO(data), allow_pickle=False)
    if pixels.ndim not in (2, 3) or pixels.dtype.kind not in "buif":
        raise Refused(f"its array has shape {pixels.shape} and type {pixels.dtype}: expected were numbers (height, "
                      "width) or (height, width, bands)")
    return np.atleast_3d(pixels), dict(bool=1, uint8=255, uint16=65535).get(pixels.dtype.name), False, False


def read_png(data):
    from torchvision.io import decode_png
    turn = Image.open(io.BytesIO(data)).getexif().get(0x0112, 1)                # this also looks at the size
    pixels = decode_png(torch.frombuffer(bytearray(data), dtype=torch.uint8)).permute(1, 2, 0)
    return upright(pixels.numpy(), turn), 65535, True, False


def read_pnm(data):
    head = PNM.match(data)
    kind, width, height, most = map(int, head.groups())         # 2, 3: numbers as text; 3, 6: colours
    Image.open(io.BytesIO(data))                                # this looks at the size
    shape = height, width, 3 if kind in (3, 6) else 1
    if kind < 4:
        pixels = np.array(re.sub(rb"#[^\n]*", b"", data[head.end():]).split(), dtype=int)
    else:
        pixels = np.frombuffer(data, ">u2" if most > 255 else "u1", int(np.prod(shape)), head.end())
    return pixels.reshape(shape), most, True, False


def tiff_tags(data, at=None):
    """The tags of a TIFF's first page, or of that at byte `at`; tags.next: where the next page's are, or 0."""
    tags, file = TiffImagePlugin.ImageFileDirectory_v2(data[:16 if 43 in data[2:4] else 8]), io.BytesIO(data)
    file.seek(at or tags.next)
    tags.load(file)
    return tags


def read_tiff(data):
    tags = tiff_tags(data)
    samples, layout, planar, size = tags.get(277, 1), tags.get(262, 0), tags.get(284) == 2, tags[256] * tags[257]
    bits, kind = int(np.max(tags.get(258, 1))), int(np.max(tags.get(339, 1)))   # kind 1: unsigned, 2: signed, 3: float
    colours = {0: 1, 1: 1, 2: 3, 3: 1, 4: 1, 5: 4, 6: 3, 8: 3}.get(layout)      # 0: grey, white is 0; 2: RGB; 5: CMYK
    photo = colours == samples or colours == samples - 1 and tags.get(338, (0,))[0] in (1, 2)   # or with alpha
    if photo and kind == 1 and bits <= 8 and not (samples == 2 and planar):
        return None
    if photo and kind == 1 and bits in (12, 16) and samples == 1 and layout < 2:
        return upright_array(Image.open(io.BytesIO(data))), 2 ** bits - 1, True, layout == 0
    if size > 2 * Image.MAX_IMAGE_PIXELS:                       # Pillow's own limit
        raise Refused(f"it has {size:,} pixels, at most {2 * Image.MAX_IMAGE_PIXELS:,} are read: cut it into tiles")
    try:
        from tifffile import TiffFile
    except ImportError:
        raise Refused(f"it has {samples} bands of {bits} bits, read with pip install tifffile imagecodecs") from None
    try:
        pixels = TiffFile(io.BytesIO(data)).pages[0].asarray()
    except ValueError as error:                                 # most kinds of compression need another package
        raise (Refused(f"{error}: pip install imagecodecs") if "imagecodecs" in str(error) else error) from None
    pixels = np.moveaxis(pixels, 0, -1) if samples > 1 and planar else pixels
    pixels = upright(pixels.reshape(*pixels.shape[:2], samples), tags.get(274, 1))
    return pixels, 2 ** bits - 1 if kind == 1 and bits <= 16 else None, photo and layout < 3, layout == 0


def upright(pixels, turn):
    """Turn pixels (h, w, N) as the tag `turn`, 1 to 8, says."""
    pixels = pixels.swapaxes(0, 1) if turn > 4 else pixels
    pixels = pixels[:, ::-1] if turn in (2, 3, 6, 7) else pixels
    return pixels[::-1] if turn in (3, 4, 7, 8) else pixels


def as_range(bits, value_range):
    """--bits and --value-range -> (LO, HI), or None without either. Mistakes end in a sentence."""
    if bits and value_range:
        raise SystemExit("--bits and --value-range both say which values are black and white: give one of them")
    if value_range and not (len(value_range) == 2 and value_range[0] < value_range[1]):
        raise SystemExit(f"--value-range needs two numbers, the smaller first, not {' '.join(map(str, value_range))}")
    return (0, 2 ** bits - 1) if bits else value_range


def extremes(data):
    """The least and largest value in an image, the most that its file can hold, whether a TIFF has several pages."""
    pixels, most, *_ = read_values(data)
    pixels = upright_array(pixels) if isinstance(pixels, Image.Image) else pixels
    after = tiff_tags(data).next if isinstance(data, bytes) and data.startswith(TIFF) else 0
    pages = after > 0 and not tiff_tags(data, after).get(254, 0) & 5            # 1: a smaller copy, 4: a mask
    return float(np.nanmin(pixels)), float(np.nanmax(pixels)), most, pages


def remarks(found, value_range):
    """Sentences about images by their `extremes`: values that use little of their range, or exceed it; pages."""
    most, pages = max(row[2] or 0 for row in found), sum(row[3] for row in found)
    low, high = min(row[0] for row in found), max(row[1] for row in found if row[2] == most or value_range or not most)
    said = [f"{pages} of {len(found)} images have several pages: the first is read"] if pages else []
    if value_range and (low < value_range[0] or high > value_range[1]):
        said.append(f"the values of {len(found)} images are {low:g} to {high:g}, cut off where not in {value_range}")
    if not value_range and 2 * high <= most:
        said.append(f"the brightest of {len(found)} images is {high:g} of {most}: --bits {int(high).bit_length() or 1} "
                    "would use the whole range")
    return said


def examine(source, indices, channels, bits=None, value_range=None):
    """Set source.value_range. Then the first process reads some images as a run would: it prints remarks, or ends in a
    sentence if none is read with these options."""
    value_range = source.value_range = as_range(bits, value_range)
    found, refused, alpha = [], [], 0
    for i in indices if os.environ.get("RANK", "0") == "0" else ():
        try:
            img = open_deep(source.read(i), value_range)
            alpha += channels in (1, 3) and isinstance(img, Image.Image) and "A" in img.getbands()
            if isinstance(img, np.ndarray) or channels not in (1, 3, 4):
                to_bands(img, channels)
            found.append(extremes(source.read(i)))
        except Refused as error:
            refused.append(f"{source.name(i)} cannot be read: {error}")
        except Exception:                                       # damaged: the run will name it
            continue
    if refused and not found:
        raise SystemExit(f"{refused[0]} (nor can any of {len(indices)} sampled images)")
    if alpha:
        refused.append(f"{alpha} of {len(indices)} images have a last band that is declared as alpha and is not read: "
                       "--in-chans 4 reads it")
    for line in refused[:1] + (remarks(found, value_range) if found else []):
        note(f"{source.where}: {line}")


def reason(error):
    """Why an image cannot be read, in a line."""
    return (str(error).split(" <_io")[0].splitlines() or [type(error).__name__])[0][:240]
