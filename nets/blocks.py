"""
What BootMAE hides: blocks of neighbours, which cannot be filled in from in between, and some single patches.
https://arxiv.org/abs/2207.07116
"""
import math
import random

import numpy as np
import torch


def block_mask(height, width, count, least, most, rng):
    """Hide exactly `count` patches of a grid in rectangles of about `least` to `most` patches. One that does not fit is
    drawn again, as often as it takes, where BEiT's code gives up after ten.

    rng: a random.Random. Returns a bool array (height, width). Raises ValueError if no rectangle can ever fit.
    """
    longest = math.log(1 / 0.3)                                 # of the sides' ratio, whose logarithm is uniform
    flat, long = round(math.sqrt(least * 0.3)), round(math.sqrt(least / 0.3))
    if min(height, width) <= max(1, flat) or max(height, width) <= long:
        raise ValueError(f"blocks of {least} patches do not fit into a grid of {height}x{width}")
    hidden, left = np.zeros((height, width), bool), count
    while left:
        area = rng.uniform(least, min(left, most))              # near the end from `left` to `least`
        aspect = math.exp(rng.uniform(-longest, longest))
        h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if h >= height or w >= width:                           # never across the whole image
            continue
        top, side = rng.randint(0, height - h), rng.randint(0, width - w)
        block = hidden[top:top + h, side:side + w]              # a view: to write to it hides these patches
        new = h * w - block.sum()
        if 0 < new <= left:                                     # rectangles may overlap
            block[:] = True
            left -= new
    return hidden


def order_of(masks, noise, shift):
    """Masks (B, N), True in blocks, and uniform noise (B, N) -> orders (B, N) of the patches: those outside the blocks
    first, at random, then those inside. All move on by `shift` places, so that as many from inside come first."""
    return (masks.to(noise.dtype) - noise).argsort(1).roll(shift, 1)


def random_orders(images, grid, count, device):
    """Draw orders (images, N) of a grid's patches, from torch's generator: `count` patches of each are in blocks of 16
    to 60, on 14 x 14 patches; on another grid of as large a share of it. Raises ValueError as block_mask."""
    height, width = grid
    least, most = (max(1, round(height * width * size / 196)) for size in (16, 60))
    rng = random.Random(torch.randint(2 ** 62, ()).item())      # one image after the other: faster than all at once
    masks = np.stack([block_mask(height, width, count, least, most, rng) for _ in range(images)])
    masks = torch.from_numpy(masks).flatten(1).to(device)                                       # (images, N)
    return order_of(masks, torch.rand(images, height * width, device=device), rng.randrange(4))
