"""
Features of the images of a set, over all processes; and the quick probe that a run makes of them.
"""
import time
from datetime import timedelta

import torch
import torch.distributed as dist

from data import CenterCrops, load
from images.augment import normalize
from nets.heads import knn, linear


@torch.no_grad()
def encoded(encode, source, indices, size, channels, mean, std, device, batch=256, workers=0, max_unreadable=1.0):
    """Yield (slice of `indices`, what encode makes of these normalised evaluation crops, labels). Each process takes
    every world-th image, none twice. Ends in a sentence if more than a share `max_unreadable` cannot be read."""
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    mine, bad = range(rank, len(indices), world), 0
    places = [mine[i:i + batch] for i in range(0, len(mine), batch)]
    keys = [[indices[i] for i in part] for part in places]
    began = told = time.time()
    for part, (img, labels, failed) in zip(places, load(CenterCrops(source, size, channels), keys, workers,
                                                        device.type == "cuda")):
        for name, reason in failed:
            print(f"warning: {name} cannot be read; another image takes its place ({reason})")
        bad += len(failed)
        features = encode(normalize(img.to(device, non_blocking=True), mean, std))
        yield slice(part.start, part.stop, world), features, labels
        if rank == 0 and time.time() - told > 10:
            told, done = time.time(), part[-1] + 1
            left = timedelta(seconds=round((len(indices) - done) / done * (told - began)))
            print(f"{done:,} of {len(indices):,} images, {done / (told - began):.0f} a second, eta {left}")
    if len(mine) >= 200 and bad > max_unreadable * len(mine):
        raise SystemExit(f"{bad} of {len(mine)} images under {source.where} could not be read, more than "
                         f"--max-unreadable {max_unreadable:g} allows")


def extract(encode, source, indices, size, channels, mean, std, device, **options):
    """Features of the evaluation crops of source[indices] -> ((n, D) fp32, labels (n,)) on the CPU, in the order of
    `indices`; of each process's share all get the whole. encode: normalised images -> (B, D); see `encoded`."""
    found, n = [], len(indices)
    for where, x, labels in encoded(encode, source, indices, size, channels, mean, std, device, **options):
        found = found or [torch.zeros(n, *x.shape[1:]), torch.zeros(n, dtype=torch.int64)]
        found[0][where], found[1][where] = x.float(), labels
    if dist.is_initialized():
        shapes = [None] * dist.get_world_size()
        dist.all_gather_object(shapes, found and found[0].shape)            # nothing, where ranks outnumber images
        found = found or [torch.zeros(next(filter(None, shapes))), torch.zeros(n, dtype=torch.int64)]
        for part in (part for tensor in found for part in tensor.split(2 ** 16)):
            share = part.to(device)
            dist.all_reduce(share)                                          # what is another's is zero here
            part.copy_(share)
    return found


def probe(encode, train, val, size, channels, mean, std, device, workers, limit=(5_000, 2_000)):
    """k-NN and linear accuracy of an encoder on two labelled sources, in percent. Of large sources `limit` random
    images are used, always the same: numbers to watch during a run, not to publish."""
    sets = []
    for source, most in zip((train, val), limit):
        indices = torch.randperm(len(source), generator=torch.Generator().manual_seed(0))[:most].tolist()
        sets += extract(encode, source, indices, size, channels, mean, std, device, workers=workers)
    return dict(knn=round(knn(*sets), 2), linear=round(linear(*sets), 2))
