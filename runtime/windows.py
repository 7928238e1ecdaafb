"""
Dense prediction for images of any size by a network for one size: sliding windows, scores over all processes, pictures.

A model has `logits`: normalised images (B, C, *size) -> (B, K, *size). Shapes: B images, C channels, K classes, (H, W)
the size of an image as it lies on disk, (h, w) that at which the network sees it.
"""
import math
import os
import time
from collections import namedtuple
from contextlib import contextmanager

import torch
import torch.distributed as dist
import torch.nn.functional as F

from data import load
from images.augment import normalize
from images.mask_classes import IGNORED, MaskError
from images.mask_crops import WholePairs
from images.pictures import palette, save_legend, save_mask, save_overlay, save_sheet
from images.tars import note
from nets.heads import pixel_areas, pixel_scores
from runtime.options import fail
from runtime.run import print_rank0

# size, stride: (h, w) of windows; short: pixels of an image's shorter side before that, 0: its own; channels, mean, std
Windows = namedtuple("Windows", "size stride short mean std")


def make_windows(size, stride, short, mean, std):
    """Windows with the same stride down and across; by default two thirds of the size, 341 of 512."""
    if stride and stride > min(size):
        fail(f"--stride {stride} leaves gaps between windows of {size[0]}x{size[1]} pixels: give a smaller one")
    return Windows(size, [stride or max(1, side * 2 // 3) for side in size], short, mean, std)


def window_starts(length, window, stride):
    """Where windows begin along a side: every `stride` pixels, the last one pulled back to end at the border."""
    count = math.ceil(max(length - window, 0) / stride) + 1
    return [max(0, min(i * stride, length - window)) for i in range(count)]


def slide(logits_of, img, window, stride, batch=8):
    """Logits of one image (1, C, H, W) by windows, averaged where these overlap -> (1, K, H, W), in fp32.

    logits_of: images (b, C, *window) -> (b, K, *window). An image smaller than a window is padded with zeros on the
    right and below. Windows go through the network `batch` at a time, because one alone does not fill it.
    """
    height, width = img.shape[-2:]
    img = F.pad(img, (0, max(0, window[1] - width), 0, max(0, window[0] - height)))
    places = [(y, x) for y in window_starts(img.shape[2], window[0], stride[0])
              for x in window_starts(img.shape[3], window[1], stride[1])]
    total, count = 0, img.new_zeros(img.shape[-2:])                                             # (H, W)
    for first in range(0, len(places), batch):
        part = places[first:first + batch]
        found = logits_of(torch.cat([img[..., y:y + window[0], x:x + window[1]] for y, x in part])).float()
        if first == 0:
            total = found.new_zeros(1, found.shape[1], *img.shape[-2:])                         # (1, K, H, W)
        for logits, (y, x) in zip(found, part):
            total[0, :, y:y + window[0], x:x + window[1]] += logits
            count[y:y + window[0], x:x + window[1]] += 1
    return (total / count)[..., :height, :width]


@contextmanager
def evaluating(model):
    """Within it a model is in eval mode and keeps no graph."""
    was_training = model.training
    model.eval()
    with torch.no_grad():
        yield
    model.train(was_training)


def predictions(model, source, windows, device, workers=0, numbers=None):
    """Yield (number, image uint8 (C, h, w), predicted classes uint8 (H, W), and true ones or None) of the images with
    these numbers; default: each process every world-th of all."""
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    mine, small = range(rank, len(source), world) if numbers is None else numbers, False
    whole, began, told = WholePairs(source, len(windows.mean), windows.short), time.time(), time.time()
    for count, (i, img, truth, own, error) in enumerate(load(whole, [[i] for i in mine], workers), 1):
        if isinstance(error, MaskError):                        # others are likely to be alike
            raise SystemExit(str(error))
        if error:                                               # one damaged file ends no run
            print(f"warning: {error}: it does not count")
            continue
        if not small and any(have < want for have, want in zip(img.shape[1:], windows.size)):
            small = True
            size = "x".join(map(str, windows.size))
            note(f"{source.name(i)} is smaller than a window of {size} pixels: it is padded, as are others of its kind")
        x = normalize(img.unsqueeze(0).to(device), windows.mean, windows.std)                   # (1, C, h, w)
        logits = slide(model.logits, x, windows.size, windows.stride)                           # (1, K, h, w)
        logits = F.interpolate(logits, own, mode="bilinear", align_corners=False)               # (1, K, H, W)
        yield i, img, logits.argmax(1)[0].to(torch.uint8), truth
        if rank == 0 and time.time() - told > 10:
            told = time.time()
            print(f"{count} of {len(mine)} images, eta {(len(mine) - count) * (told - began) / count:.0f} s")


def count_pixels(model, source, windows, device, workers=0, folder=None):
    """Counts of pixels (3, K) over a whole source, as pixel_areas makes them, exact over processes: each image once.
    folder: where masks, overlays and a legend are saved."""
    areas = torch.zeros(3, len(source.classes), dtype=torch.int64, device=device)
    table = palette(source.colours)
    with evaluating(model):
        for i, img, pred, truth in predictions(model, source, windows, device, workers):
            if truth is not None:
                areas += pixel_areas(pred, truth.to(device), len(source.classes))
            if folder:
                save_prediction(source, i, img, pred.cpu(), table, folder)
    if folder and (not dist.is_initialized() or dist.get_rank() == 0):
        save_legend(source.classes, table, os.path.join(folder, "legend.png"))
    if dist.is_initialized():
        dist.all_reduce(areas)
    return areas


def save_prediction(source, i, img, pred, table, folder):
    """Save masks/NAME.png, whose numbers are classes, and overlays/NAME.jpg at the image's own size."""
    stem = os.path.splitext(source.relative(i))[0]
    paths = [os.path.join(folder, kind, stem + end) for kind, end in (("masks", ".png"), ("overlays", ".jpg"))]
    for path in paths:
        os.makedirs(os.path.dirname(path), exist_ok=True)
    img = F.interpolate(img.unsqueeze(0), pred.shape, mode="bilinear", align_corners=False)[0]
    save_mask(pred, table, paths[0])
    save_overlay(img, pred, table, paths[1])


def print_scores(areas, names):
    """Print a line for each class and one for all -> dict of mIoU, aAcc and mAcc."""
    iou, acc, found = pixel_scores(areas)
    shares = 100 * areas[2].double() / areas[2].sum()
    for name, i, a, share in zip(names, iou.tolist(), acc.tolist(), shares.tolist()):
        print_rank0(f"{name:24.24}  IoU {i:6.2f}  accuracy {a:6.2f}  {share:5.1f}% of the pixels")
    print_rank0(score_line(found))
    return found


def score_line(found):
    return "mIoU {mIoU:.2f}, aAcc {aAcc:.2f}, mAcc {mAcc:.2f}".format(**found)


def draw_segmentations(model, source, windows, device, path, count=6):
    """Save a sheet with a row for each of `count` images, always the same: image, truth, prediction, errors."""
    columns, table = {"image": [], "truth": [], "prediction": [], "errors": []}, palette(source.colours)
    numbers, size = torch.linspace(0, len(source) - 1, min(count, len(source))).long().tolist(), None
    with evaluating(model):
        for _, img, pred, truth in predictions(model, source, windows, device, numbers=numbers):
            pred, wrong = pred.cpu(), torch.tensor([200, 30, 30], dtype=torch.uint8)
            errors = torch.where((pred != truth).unsqueeze(-1), wrong, torch.full((3,), 60, dtype=torch.uint8))
            errors[truth == IGNORED] = 255
            if size is None:                                    # all rows as large as the first, at most 240 pixels
                scale = min(1, 240 / max(pred.shape))
                size = [round(side * scale) for side in pred.shape]
            colours = table[truth.long()], table[pred.long()], errors                           # (H, W, 3) each
            for column, picture in zip(columns.values(), (img, *(c.permute(2, 0, 1) for c in colours))):
                column.append(F.interpolate(picture[None, :3], size, mode="nearest"))
    if size:
        columns = {title: torch.cat(pictures) for title, pictures in columns.items()}
        save_sheet(columns, "white: ignored pixels; red: errors", path)
