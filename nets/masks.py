"""
Which patches masked image modelling hides: any units of an image (SimMIM), or blocks of neighbours (BEiT, MaskFeat).
https://arxiv.org/abs/2111.09886 (SimMIM), https://arxiv.org/abs/2106.08254 (BEiT)

Shapes: B images, (h, w) a grid of units that are hidden whole, (H, W) the grid of patches.
"""
import math

import torch

TRIES = 10                                                      # at a block, before BEiT gives up a mask


def uniform_masks(images, grid, ratio, generator=None):
    """Hide ceil(ratio * units) units of each image, any of them alike -> (B, h, w), True where hidden."""
    units = grid[0] * grid[1]
    hidden = math.ceil(units * ratio)                           # rounded up, as published: 30 of 49, 22 of 36
    rank = torch.rand(images, units, generator=generator).argsort(1).argsort(1)                 # (B, h * w)
    return (rank < hidden).view(images, *grid)


def block_masks(images, grid, count, least, most=None, generator=None):
    """Hide blocks of neighbours until `count` units are hidden, or no block is found -> (B, h, w), True where hidden.

    A block has an area from `least` to what is left to hide (at most `most`), and sides in a ratio of 0.3 to 1 / 0.3.
    It has to lie within the grid, smaller than it both ways, and to hide something new, but not more than is left.
    After ten tries without one the mask ends early, as published: only two masks in three have all of BEiT's 75 units
    of 14 x 14. All images are treated at once; each of them follows this law by itself.
    """
    h, w = grid
    y, x = torch.arange(h), torch.arange(w)
    mask, growing = torch.zeros(images, h, w), torch.ones(images, dtype=torch.bool)
    while growing.any():
        u = torch.rand(images, TRIES, 4, generator=generator, dtype=torch.float64)              # (B, T, 4)
        left = count - mask.sum((1, 2)).unsqueeze(1)                                            # (B, 1)
        left = left.clamp(max=most or count)
        area = least + u[..., 0] * (left - least)               # also where less than `least` is left, as published
        aspect = (math.log(0.3) * (1 - 2 * u[..., 1])).exp()    # height / width; its logarithm is uniform
        rows, columns = (area * aspect).sqrt().round(), (area / aspect).sqrt().round()          # (B, T) each
        top = (u[..., 2] * (h - rows + 1)).floor()
        first = (u[..., 3] * (w - columns + 1)).floor()
        # Blocks as their rows and their columns: how much of each is hidden already are then two matrix products.
        down = ((y >= top.unsqueeze(2)) & (y < (top + rows).unsqueeze(2))).float()              # (B, T, h)
        across = ((x >= first.unsqueeze(2)) & (x < (first + columns).unsqueeze(2))).float()     # (B, T, w)
        new = rows * columns - (down @ mask * across).sum(2)                                    # (B, T)
        fits = (rows < h) & (columns < w) & (new > 0) & (new <= left)
        chosen = fits.byte().argmax(1)                          # the first of the tries that fits
        growing &= fits.any(1) & (left > 0).squeeze(1)
        image = torch.arange(images)
        block = down[image, chosen].unsqueeze(2) * across[image, chosen].unsqueeze(1)           # (B, h, w)
        mask = torch.where(growing[:, None, None], torch.maximum(mask, block), mask)
        growing &= mask.sum((1, 2)) < count
    return mask.bool()


def to_patches(mask, times):
    """Masks of units (B, h, w) -> masks of patches (B, h * times, w * times)."""
    return mask.repeat_interleave(times, 1).repeat_interleave(times, 2)


class Masks:
    """The masks of a run, for images of `patches` (H, W) patches of `patch_size` pixels.

    law: "uniform" or "blocks"; unit: pixels on the side of what is hidden whole; ratio: the share hidden; least: the
    smallest block, in units; cell: pixels on the side of what the head answers for at once (default: a patch).
    count, cells: how many units, and how many cells, are hidden in each image, by blocks at most. ValueError where
    units do not fit, or nothing is hidden, or all is.
    """

    def __init__(self, law, patches, patch_size, unit, ratio, least=None, cell=None):
        height, width = patches[0] * patch_size, patches[1] * patch_size
        cell = cell or patch_size
        if unit % cell:
            raise ValueError(f"--mask-unit {unit} is no multiple of {cell}, the pixels on a side for which the head "
                             "gets one token: these are hidden whole or not at all")
        if height % unit or width % unit:
            raise ValueError(f"--mask-unit {unit} does not tile a {height}x{width} image: give one that does")
        self.law, self.times, self.grid, self.ratio = law, unit // patch_size, (height // unit, width // unit), ratio
        units = self.grid[0] * self.grid[1]
        self.count = math.ceil(units * ratio) if law == "uniform" else round(units * ratio)     # each as published
        self.least = least or max(1, self.count // 5)           # MaskFeat's; BEiT's is 16 of 75
        self.cells = self.count * (unit // cell) ** 2
        if not 0 < self.count < units:
            raise ValueError(f"--mask-ratio {ratio} hides {self.count} of {units} units: some have to be hidden, and "
                             "some to be seen")
        if law == "blocks" and min(self.grid) < 3:
            raise ValueError(f"--mask blocks needs 3 units or more both ways, and {height}x{width} pixels have "
                             f"{self.grid[0]}x{self.grid[1]} of {unit}: give smaller units or --mask uniform")

    def draw(self, images, generator=None):
        """-> (B, H, W), True where hidden, on the CPU: the same on all devices, and none has to be waited for."""
        if self.law == "uniform":
            mask = uniform_masks(images, self.grid, self.ratio, generator)
        else:
            mask = block_masks(images, self.grid, self.count, self.least, generator=generator)
        return to_patches(mask, self.times)
