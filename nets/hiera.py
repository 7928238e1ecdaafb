"""
Hiera: a hierarchical vision transformer of nothing but plain blocks and max-pooling. https://arxiv.org/abs/2306.00989

As in a Swin, maps get coarser and wider. But windows never move: each is a mask unit, the 32 x 32 pixels that an MAE
hides or shows as one. So hidden units can be left out before the first block.

How tokens are ordered ("unroll" in the official code). Once, after the embedding, the tokens of each unit are put into
an order in which pooling needs no map. A unit of 4 x 4 tokens, numbered row by row:

     0  1 |  2  3       First the top left of each 2 x 2 square, then all top rights, bottom lefts and bottom rights:
     4  5 |  6  7
    ------+------           0 2 8 10 | 1 3 9 11 | 4 6 12 14 | 5 7 13 15
     8  9 | 10 11
    12 13 | 14 15       The square 0 1 4 5 is made of the first of each of these quarters, 2 3 6 7 of the second, ...

To pool is to take the maximum over the four quarters. What is left are the squares in reading order; in a larger unit
they are in an order of the same kind, so that 8 x 8 tokens can be pooled three times: 64, 16, 4, 1. Tokens are (B, U,
T, D): attention within units has (B, U) as its batch, global attention is over (U T), and hidden units are rows left
out. (Officially units are the fastest axis. No weight depends on it, and here a unit's tokens lie side by side.)
Shapes at the ends of lines: see vit.py; U mask units, T tokens of a unit.
"""
from collections import OrderedDict

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from vit import Attention, Block, gather_tokens, pair

# dim, heads: of the first stage; both double from stage to stage. hiera_lite is the 6.7 million of D2-MAE's paper,
# hiera_mini is our own, for images of 32 to 64 pixels.
HIERAS = {
    "hiera_mini": dict(dim=32, stages=(1, 1, 4), heads=1, patch_size=2),
    "hiera_lite": dict(dim=46, stages=(1, 2, 7, 2), heads=1, patch_size=4),
    "hiera_tiny": dict(dim=96, stages=(1, 2, 7, 2), heads=1, patch_size=4),
    "hiera_small": dict(dim=96, stages=(1, 2, 11, 2), heads=1, patch_size=4),
    "hiera_base": dict(dim=96, stages=(2, 3, 16, 3), heads=1, patch_size=4),
    "hiera_base_plus": dict(dim=112, stages=(2, 3, 16, 3), heads=2, patch_size=4),
}


def unit_index(height, width, rounds, device):
    """The numbers, in reading order, of the tokens of each unit of a map, in the drawing's order, (U, 4 ** rounds).
    A unit has 2 ** rounds tokens on a side."""
    index = torch.arange(height * width, device=device).view(height, width)
    index = rearrange(index, "(h y) (w x) -> (h w) 1 y x", y=2 ** rounds, x=2 ** rounds)        # (U, 1, side, side)
    for _ in range(rounds):                                     # of each 2 x 2 square all top lefts come first, ...
        index = rearrange(index, "u t (y a) (x b) -> u (t a b) y x", a=2, b=2)
    return index.flatten(1)                                                                     # (U, T)


def resize_unit_positions(pos, old, new, side):
    """Resize a table of positions (1, h * w, D) from the map `old` to the map `new`, both of units of side x side.

    Ours; the official code refuses other sizes. A trained table largely repeats itself from unit to unit (see
    arXiv:2311.05613), so the mean unit is repeated, and only what is left is stretched, bicubically.
    """
    if tuple(old) == tuple(new):
        return pos
    table = rearrange(pos.float(), "1 (h w) d -> 1 d h w", h=old[0])
    unit = rearrange(table, "1 d (h y) (w x) -> 1 d (h w) y x", y=side, x=side).mean(2)         # (1, D, side, side)
    rest = table - unit.repeat(1, 1, old[0] // side, old[1] // side)
    rest = F.interpolate(rest, tuple(new), mode="bicubic", align_corners=False)
    table = unit.repeat(1, 1, new[0] // side, new[1] // side) + rest                            # (1, D, h', w')
    return rearrange(table, "1 d h w -> 1 (h w) d").to(pos.dtype)


def max_pool(x):
    """Tokens (B, U, T, D) -> the maximum of each 2 x 2 square, over the four quarters of T, (B, U, T / 4, D)."""
    return x.unflatten(2, (4, -1)).max(2).values


class HieraAttention(Attention):
    """Attention from `dim` to `dim_out` channels, of each unit by itself (within), or of all tokens. pool: queries are
    max-pooled, so that a quarter of the tokens comes out; keys and values are not."""

    def __init__(self, dim, dim_out, heads, within, pool):
        super().__init__(dim_out, heads)
        self.qkv = nn.Linear(dim, 3 * dim_out)
        self.within, self.pool = within, pool
        self.by_heads = "(b u) h t d" if within else "b h (u t) d"

    def queries_keys(self, *qk):
        """Queries and keys (and values), (B, U, T, D) each, the queries pooled if they are to be, by heads."""
        q, *others = qk
        q = max_pool(q) if self.pool else q
        return [rearrange(t, f"b u t (h d) -> {self.by_heads}", h=self.heads) for t in (q, *others)]

    def forward(self, x):
        """Tokens x (B, U, T, D) -> (B, U, T or T / 4, D')."""
        q, k, v = self.queries_keys(*self.qkv(x).chunk(3, -1))
        out = F.scaled_dot_product_attention(q, k, v)           # softmax(q k^T / sqrt(d)) v
        return self.proj(rearrange(out, f"{self.by_heads} -> b u t (h d)", u=x.shape[1]))

    def logits(self, x):
        """Tokens x (B, U, T, D) -> the attention before its softmax, (B, H, N, N) of all, (B * U, H, T, T) of units."""
        D = self.qkv.out_features // 3                          # values are not needed, so not computed
        q, k = self.queries_keys(*F.linear(x, self.qkv.weight[:2 * D], self.qkv.bias[:2 * D]).chunk(2, -1))
        return (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)  # q is scaled first: fp16 sums would overflow


class HieraBlock(Block):
    """A Block; the first of a stage is from `dim` to `dim_out` channels and, with pool, to a quarter of the tokens."""

    def __init__(self, dim, dim_out, heads, within, pool, mlp_ratio, drop_path, eps):
        super().__init__(dim_out, heads, mlp_ratio, drop_path, eps)
        self.norm1 = nn.LayerNorm(dim, eps=eps)
        self.attn = HieraAttention(dim, dim_out, heads, within, pool)
        if dim != dim_out:
            self.proj = nn.Linear(dim, dim_out)

    def forward(self, x):
        """Tokens x (B, U, T, D) -> (B, U, T or T / 4, D')."""
        normed = self.norm1(x)
        if hasattr(self, "proj"):                               # what the sum goes on from was normed, as published
            x = self.proj(normed)                                                               # (B, U, T, D')
            x = max_pool(x) if self.attn.pool else x
        x = self.add(x, self.attn(normed))
        return self.add(x, self.mlp(self.norm2(x)))


class Hiera(nn.Module):
    """Hiera: image -> tokens in mask units -> one feature vector -> logits.

    img_size        one number or (height, width) in pixels, multiples of a unit's 32 (ValueError)
    dim, heads      of the first stage. stages: blocks of each
    q_pool          stages that begin by pooling: all but the first (default), or fewer. No weight depends on it
    mask_unit_attn  for each stage, whether attention stays within units (default: in the first two). The first block of
                    a stage still does as the stage before, as published
    num_classes     0: forward gives the (B, D) feature; else logits, not probabilities as officially in eval mode
    """

    def __init__(self, img_size=224, patch_size=4, in_chans=3, dim=96, stages=(1, 2, 7, 2), heads=1, mlp_ratio=4.0,
                 num_classes=0, q_pool=None, mask_unit_attn=None, drop_path=0.0, eps=1e-6):
        super().__init__()
        self.rounds = len(stages) - 1                           # a unit is one token after so many poolings
        q_pool = self.rounds if q_pool is None else q_pool
        if not 0 <= q_pool <= self.rounds:
            raise ValueError(f"a Hiera of {len(stages)} stages pools 0 to {self.rounds} times, not {q_pool}")
        mask_unit_attn = mask_unit_attn or [stage < 2 for stage in range(len(stages))]
        self.config = dict(img_size=pair(img_size), patch_size=patch_size, in_chans=in_chans, dim=dim,
                           stages=tuple(stages), heads=heads, mlp_ratio=mlp_ratio, num_classes=num_classes,
                           q_pool=q_pool, mask_unit_attn=tuple(mask_unit_attn), drop_path=drop_path, eps=eps)
        self.patch_size, self.unit, self.depth, self.pool = patch_size, patch_size << self.rounds, sum(stages), "avg"
        self.stage_ends = [sum(stages[:stage + 1]) for stage in range(len(stages))]             # blocks up to there
        (h, w), *_, self.grid = self.maps(*pair(img_size))      # the first and the last map
        # Tokens are p pixels apart and see 2 p - 1 pixels each way. (A Sequential gives layers their published names.)
        conv = nn.Conv2d(in_chans, dim, 2 * patch_size - 1, patch_size, patch_size - 1)
        self.patch_embed = nn.Sequential(OrderedDict(proj=conv))
        self.pos_embed = nn.Parameter(torch.empty(1, h * w, dim))
        self.blocks, within = nn.ModuleList(), mask_unit_attn[0]
        for stage, depth in enumerate(stages):
            for i in range(depth):
                rate, first = drop_path * len(self.blocks) / max(self.depth - 1, 1), stage > 0 and i == 0
                self.blocks.append(HieraBlock(dim, dim << first, heads << stage, within, first and stage <= q_pool,
                                              mlp_ratio, rate, eps))
                dim, within = dim << first, mask_unit_attn[stage]
        head = [("projection", nn.Linear(dim, num_classes))] if num_classes else []
        self.width, self.norm, self.head = dim, nn.LayerNorm(dim, eps=eps), nn.Sequential(OrderedDict(head))

        # The published start: biases of linear layers and norms are 0.02, and a head says nearly nothing.
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                nn.init.trunc_normal_(module.weight, std=0.02)
            if isinstance(module, (nn.Linear, nn.LayerNorm)):
                nn.init.constant_(module.bias, 0.02)            # while the convolution's keeps torch's start
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        for p in self.head.parameters():
            p.data.mul_(0.001)

    def maps(self, height, width):
        """The maps (h, w) of all stages. Raises ValueError when units do not tile the image."""
        if height % self.unit or width % self.unit:
            raise ValueError(f"mask units of {self.unit} pixels do not tile a {height}x{width} image: its sides must "
                             f"be multiples of {self.unit}")
        sides = [self.patch_size << min(stage, self.config["q_pool"]) for stage in range(self.rounds + 1)]
        return [(height // side, width // side) for side in sides]

    def embed(self, img, keep=None):
        """Images (B, C, height, width) -> tokens unit by unit (B, U, T, D); with keep (B, K) those of these units,
        which see nothing of the others."""
        h, w = self.maps(*img.shape[-2:])[0]
        index = unit_index(h, w, self.rounds, img.device)                                       # (U, T)
        pos = resize_unit_positions(self.pos_embed, self.maps(*self.config["img_size"])[0], (h, w), 2 ** self.rounds)
        if keep is None:
            index = index.expand(len(img), -1, -1)                                              # (B, U, T)
        else:                                                   # the convolution looks beyond a unit's edges: blank all
            seen = torch.zeros(len(img), len(index), device=img.device, dtype=img.dtype).scatter(1, keep, 1.0)
            seen = rearrange(seen, "b (h w) -> b 1 h w", h=img.shape[-2] // self.unit)
            img = img * F.interpolate(seen, scale_factor=self.unit)                             # the mean colour
            index = index[keep]                                                                 # (B, K, T)
        x = rearrange(self.patch_embed(img), "b d h w -> b (h w) d") + pos                      # (B, h * w, D)
        return gather_tokens(x, index.flatten(1)).unflatten(1, index.shape[1:])                 # (B, U or K, T, D)

    def reading_order(self, x, units):
        """Tokens (B, U, T, D) of units (h, w) down and across -> in reading order (B, U * T, D)."""
        rounds = x.shape[2].bit_length() // 2                   # T is 4 ** rounds
        index = unit_index(units[0] << rounds, units[1] << rounds, rounds, x.device)            # (U, T)
        return x.flatten(1, 2)[:, index.flatten().argsort()]

    def block_outputs(self, img):
        """Images (B, C, height, width) -> the tokens after each block, in reading order, (B, N, D)."""
        x, outputs, units = self.embed(img), [], [side // self.unit for side in img.shape[-2:]]
        for block in self.blocks:
            x = block(x)
            outputs.append(self.reading_order(x, units))
        return outputs

    def encode(self, img):                                      # -> normed tokens of the last map, (B, N, D)
        return self.norm(self.block_outputs(img)[-1])

    def features(self, img):                                    # -> (B, D): first the mean, then the norm
        x = self.embed(img)
        for block in self.blocks:
            x = block(x)
        return self.norm(x.mean((1, 2)))

    def forward(self, img):
        return self.head(self.features(img))
