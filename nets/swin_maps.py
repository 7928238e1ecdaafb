"""
Swin from the inside, for masked image modelling: the maps after its stages from given patch tokens, and the attention of
windows before its softmax.

Shapes: B images, N tokens of a map of (h, w), D width, n windows of T tokens each, H heads.
"""
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from vit import window_layout


def stage_outputs(swin, x, height, width):
    """Patch tokens x (B, h * w, D) of images of these sizes -> the tokens after each stage, its merging included."""
    outputs = []
    for layer, grid in zip(swin.layers, swin.maps(height, width)):
        for block in layer["blocks"]:
            x = block(x, grid)                                                                  # (B, h * w, D)
        if "downsample" in layer:
            x = layer["downsample"](x, grid)                    # (B, h / 2 * w / 2, 2 * D)
        outputs.append(x)
    return outputs


class WindowLogits(nn.Module):
    """A SwinBlock that stops at its logits, q k^T / sqrt(d) plus the bias of relative positions: tokens (B, h * w, D) on
    the grid (h, w) -> (B * n, H, T, T). The mask of moved windows is not in it, as published."""

    def __init__(self, block):
        super().__init__()
        self.norm1, self.attn = block.norm1, block.attn
        del self.attn.proj                                      # it would come after the softmax

    def forward(self, x, grid):
        attn, x = self.attn, self.norm1(x)
        order = window_layout(*grid, attn.side, attn.shift, x.device)[0]
        # Values are computed and not read: as published they get zero gradients, so that weight decay alone moves them.
        qkv = attn.padded_qkv(x, grid).index_select(1, order)                                   # (B, n * T, 3 * D)
        q, k, _ = rearrange(qkv, "b (n t) (k h d) -> k (b n) h t d", t=attn.side ** 2, k=3, h=attn.heads)
        bias = F.embedding(attn.relative_position_index, attn.relative_position_bias_table)     # (T, T, H)
        return (q * q.shape[-1] ** -0.5) @ k.mT + rearrange(bias, "s t h -> h s t").to(q.dtype)
