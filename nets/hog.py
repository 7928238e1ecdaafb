"""
Histograms of oriented gradients, what MaskFeat asks for: how strong edges are in each of nine directions, for each cell
of 8 x 8 pixels. https://arxiv.org/abs/2112.09133, after Dalal and Triggs 2005

Shapes: B images, C channels, (h, w) the grid of cells.
"""
import math

import torch
import torch.nn.functional as F

BINS = 9                                                        # of 20 degrees each: an edge has no front


def hog(img, cell=8):
    """Images (B, C, h * cell, w * cell), floats -> (B, C, 9, h, w): unit vectors over the bins, zeros in flat cells.

    8-bit values as they are make every sum here exact. Of normalised values a bin may be the one beside it, where an
    edge is exactly horizontal and gx is but rounding.
    """
    # On a CPU one image at a time stays in the cache: eight times as fast.
    parts = img.split(1 if img.device.type == "cpu" else len(img))
    found = torch.cat([edge_strengths(part, cell) for part in parts])                           # (B, C, h, w, 9)
    return F.normalize(found, dim=-1, eps=1e-12).permute(0, 1, 4, 2, 3)


def edge_strengths(img, cell):
    """Images (B, C, H, W) -> the strength of the edges in each bin, summed over each cell, (B, C, h, w, 9)."""
    B, C, H, W = img.shape
    h, w = H // cell, W // cell
    x = F.pad(img, (1, 1, 1, 1), mode="reflect")
    # Sobel's gradients: first the difference, so that a flat cell has exactly none, then the weights 1, 2, 1.
    across, down = x[..., :-2] - x[..., 2:], x[..., :-2, :] - x[..., 2:, :]
    gx = across[..., :-2, :] + 2 * across[..., 1:-1, :] + across[..., 2:, :]                    # (B, C, H, W)
    gy = down[..., :-2] + 2 * down[..., 1:-1] + down[..., 2:]                                   # (B, C, H, W)
    # The angle is counted from the y axis, as published. Bins are not interpolated: each pixel has one.
    bins = (torch.atan2(gx, gy) / math.pi * BINS).floor().remainder(BINS).long()                # (B, C, H, W)
    strength = (gx.square() + gy.square()).sqrt()                                               # (B, C, H, W)
    # Each pixel adds its strength to one of the B * C * h * w * 9 sums.
    rows, columns = torch.arange(H, device=img.device) // cell, torch.arange(W, device=img.device) // cell
    channel = torch.arange(B * C, device=img.device).view(B, C, 1, 1)
    place = ((channel * h + rows.unsqueeze(1)) * w + columns) * BINS + bins                     # (B, C, H, W)
    sums = strength.new_zeros(B * C * h * w * BINS).scatter_add_(0, place.flatten(), strength.flatten())
    return sums.view(B, C, h, w, BINS)


def strokes(histograms, cell):
    """Draw histograms (B, C, 9, h, w) -> uint8 (B, 1, h * cell, w * cell): in each cell a stroke along each edge, as
    bright as its share of a cell's energy, the channels averaged."""
    at = torch.arange(cell) - (cell - 1) / 2
    angle = (torch.arange(BINS) + 0.5) * math.pi / BINS                                         # of a bin's middle
    # How far a pixel is from the line through the cell's middle, across which the gradient points.
    away = at.unsqueeze(1) * angle.cos().view(-1, 1, 1) + at * angle.sin().view(-1, 1, 1)       # (9, cell, cell)
    stroke = (1 - away.abs()).clamp(min=0).to(histograms.device)
    strength = histograms.clamp(0, 1).square().mean(1)                                          # (B, 9, h, w)
    picture = torch.einsum("bnhw,npq->bhpwq", strength, stroke).flatten(3, 4).flatten(1, 2)     # (B, H, W)
    return (255 * picture.clamp(max=1)).byte().unsqueeze(1)
