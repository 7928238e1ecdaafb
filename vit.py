"""
The networks. A vision transformer cuts an image into patches, turns each into a token, adds where it was, and lets the
tokens look at each other a dozen times. https://arxiv.org/abs/2010.11929

Everything a method asks of its backbone is here and nothing else: no training, no data. Parameter names are the
published ones (timm, DeiT, MAE), so official weights load as they are; weights.py reads the files.

Letters at the ends of lines: B images, C channels, N tokens, D width, H heads, p patch side, h x w the patch grid.
"""
import re
from functools import cache, partial

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

# Tiny and Small have 12 heads, as in MAE-Lite: DeiT's 3 and DINO's 6 have tensors of the very same shapes, so a wrong
# head count loads without a murmur and only the accuracy tells.
MODELS = {
    "vit_mini": dict(dim=128, depth=4, heads=4, patch_size=4),              # ours, for images of 32 to 64 pixels
    "vit_midi": dict(dim=256, depth=4, heads=8, patch_size=4),              # ours, a teacher for vit_mini
    "vit_tiny": dict(dim=192, depth=12, heads=12, patch_size=16),
    "vit_small": dict(dim=384, depth=12, heads=12, patch_size=16),
    "vit_base": dict(dim=768, depth=12, heads=12, patch_size=16),
    "vit_large": dict(dim=1024, depth=24, heads=16, patch_size=16),
    "vit_huge": dict(dim=1280, depth=32, heads=16, patch_size=14),
}


def pair(size):
    """224 or (224,) -> (224, 224); (96, 160) stays: height and width."""
    size = tuple(size) if isinstance(size, (tuple, list)) else (size,)
    if len(size) > 2:
        raise ValueError(f"a size is one number or height and width, not {size}")
    return size if len(size) == 2 else size * 2


# ----------------------------------------------------------------------------------------------------------------
# Positions


def sincos_positions(dim, height, width, order="xy"):
    """Fixed 2-D sine-cosine table, (1, 1 + height * width, dim); the cls row is zero (MAE and MoCo-v3).

    A quarter of the channels each: sin and cos of one axis, sin and cos of the other, at frequencies
    10000^(-k / (dim / 4)). order: "xy" puts the column first (MAE), "yx" the row first (MoCo-v3). Weights of one read
    with the table of the other see a transposed image. Raises ValueError when dim is not a multiple of 4.
    """
    if dim % 4:
        raise ValueError(f"sine-cosine positions need a width that is a multiple of 4, not {dim}")
    omega = 10000.0 ** (-torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    y, x = torch.meshgrid(torch.arange(height).double(), torch.arange(width).double(), indexing="ij")
    axes = {"xy": (x, y), "yx": (y, x)}[order]
    table = torch.cat([f(axis.flatten()[:, None] * omega) for axis in axes for f in (torch.sin, torch.cos)], 1)
    return torch.cat([torch.zeros(1, dim), table.float()])[None]        # float64 up to here, as published


def resize_positions(pos, old, new, offset=0.0):
    """Bicubic resize of a position table (1, 1 + h * w, D) from the patch grid `old` to `new`; the cls row stays.

    offset: 0 resizes to the target size (MAE). DINO passes scale factors (target + 0.1) / source instead, which shifts
    the sampling points a little: 0.1 here reproduces its features. The same grid returns the same tensor.
    """
    if tuple(old) == tuple(new):
        return pos
    grid = rearrange(pos[:, 1:].float(), "1 (h w) d -> 1 d h w", h=old[0], w=old[1])
    size = dict(scale_factor=tuple((n + offset) / o for n, o in zip(new, old))) if offset else dict(size=tuple(new))
    grid = F.interpolate(grid, mode="bicubic", align_corners=False, **size)
    return torch.cat([pos[:, :1], rearrange(grid, "1 d h w -> 1 (h w) d").to(pos.dtype)], 1)


def relative_index(height, width):
    """Which row of a table of relative positions a pair of tokens has, (1 + N, 1 + N), query by key (BEiT).

    Patches: by their offset, query minus key, down and then across: (2h - 1)(2w - 1) rows. The last three rows are cls
    to patch, patch to cls, and cls to itself.
    """
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    down, across = (t.flatten()[:, None] - t.flatten() for t in (y, x))
    rows = (2 * height - 1) * (2 * width - 1)
    index = F.pad((down + height - 1) * (2 * width - 1) + across + width - 1, (1, 0, 1, 0), value=rows)
    index[1:, 0], index[0, 0] = rows + 1, rows + 2
    return index


def resize_relative(table, old, new):
    """Bicubic resize of a table of relative positions (rows, H) from the grid `old` to `new`; cls's three rows stay."""
    if tuple(old) == tuple(new):
        return table
    (h, w), size = ([2 * n - 1 for n in grid] for grid in (old, new))
    offsets = rearrange(table[:-3].float(), "(h w) d -> 1 d h w", h=h, w=w)
    offsets = F.interpolate(offsets, size, mode="bicubic", align_corners=False)
    return torch.cat([rearrange(offsets, "1 d h w -> (h w) d").to(table.dtype), table[-3:]])


# ----------------------------------------------------------------------------------------------------------------
# Layers


def cut(img, p, index=None):
    """(B, C, h*p, w*p) -> its patches in reading order, (B, h*w, C*p*p), or only those numbered index (B, K): (B, K,
    C*p*p).

    Pixels come in the order of a convolution's weight: channels, rows, columns.
    """
    grid = rearrange(img, "b c (h p) (w q) -> b h w c p q", p=p, q=p)   # a view: nothing is copied yet
    if index is None:
        return rearrange(grid, "b h w c p q -> b (h w) (c p q)")
    image, w = torch.arange(len(img), device=img.device).unsqueeze(1), grid.shape[2]
    return grid[image, index // w, index % w].flatten(2)                # so that the rest of the image never is


def pick(tokens, index):
    """tokens (B, N, D), or one table for all (1, N, D); index (B, K) of token numbers -> (B, K, D)."""
    if len(tokens) > 1:
        index = index + tokens.shape[1] * torch.arange(len(tokens), device=index.device).unsqueeze(1)
    return F.embedding(index, tokens.flatten(0, 1))                     # copies whole rows; gather goes by element


class PatchEmbed(nn.Module):
    """Linear projection of each patch: a convolution by name and shape of its weight, applied as the product it is."""

    def __init__(self, patch_size, in_chans, dim):
        super().__init__()
        self.proj = nn.Conv2d(in_chans, dim, patch_size, patch_size)

    def forward(self, patches):
        """patches (B, N, C*p*p) as cut gives them, all or any of them -> (B, N, D)."""
        return F.linear(patches, self.proj.weight.flatten(1), self.proj.bias)


class Attention(nn.Module):
    """Multi-head self-attention ("Attention is all you need", 3.2.2); one linear layer makes q, k and v, in that
    order.

    grid: (h, w) adds a learned number per head and relative position to the logits (see relative_index), for images of
    this grid alone. key_bias False: q and v have biases of their own, k has none (BEiT).
    """

    def __init__(self, dim, heads, grid=None, key_bias=True):
        super().__init__()
        if dim % heads:
            raise ValueError(f"{heads} heads do not divide the width {dim}")
        self.heads, self.relative = heads, grid is not None
        self.qkv = nn.Linear(dim, 3 * dim, bias=key_bias)
        if not key_bias:
            self.q_bias, self.v_bias = nn.Parameter(torch.zeros(dim)), nn.Parameter(torch.zeros(dim))
        if self.relative:
            index = relative_index(*grid)
            self.relative_position_bias_table = nn.Parameter(torch.zeros(int(index.max()) + 1, heads))
            self.register_buffer("relative_position_index", index)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x, first=0, with_logits=False):
        """x (B, N, D) -> (B, N - first, D): only tokens from number `first` on ask; all are asked.

        with_logits: also return q k^T / sqrt(D / H), plus the relative positions' share, before the softmax, (B, H, N -
        first, N). The fused kernel keeps no logits, so they are formed by hand then; the output is the same to
        rounding. Raises ValueError when relative positions meet another grid.
        """
        weight, bias, D = self.qkv.weight, self.bias(), x.shape[-1]
        if first:
            q = F.linear(x[:, first:], weight[:D], bias[:D])
            k, v = F.linear(x, weight[D:], bias[D:]).chunk(2, -1)
        else:
            q, k, v = F.linear(x, weight, bias).chunk(3, -1)
        q, k, v = (rearrange(t, "b n (h d) -> b h n d", h=self.heads) for t in (q, k, v))
        if not with_logits:
            where = self.where(x.shape[1], first, q.dtype) if self.relative else None
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=where)
            return self.proj(rearrange(out, "b h n d -> b n (h d)"))
        logits = self.scaled_logits(q, k, first)
        out = logits.softmax(-1) @ v
        return self.proj(rearrange(out, "b h n d -> b n (h d)")), logits

    def bias(self):
        if self.qkv.bias is not None:
            return self.qkv.bias
        return torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])

    def where(self, tokens, first, dtype):
        """What relative positions add to the logits, (1, H, N - first, N)."""
        if tokens != len(self.relative_position_index):
            raise ValueError(f"relative positions of {len(self.relative_position_index)} tokens cannot take {tokens}: "
                             "such a network sees whole images of its own size")
        share = F.embedding(self.relative_position_index[first:], self.relative_position_bias_table)
        return rearrange(share, "q k h -> 1 h q k").to(dtype)

    def scaled_logits(self, q, k, first=0):
        # q is scaled before the product, not after: in fp16 an unscaled sum of 64 products overflows.
        logits = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
        return logits + self.where(k.shape[2], first, logits.dtype) if self.relative else logits

    def logits(self, x):
        """Just the scaled logits, (B, H, N, N): where a frozen teacher can stop; its values are never formed."""
        q, k = F.linear(x, *(t[:2 * x.shape[-1]] for t in (self.qkv.weight, self.bias()))).chunk(2, -1)
        return self.scaled_logits(*(rearrange(t, "b n (h d) -> b h n d", h=self.heads) for t in (q, k)))


class MLP(nn.Module):
    def __init__(self, dim, ratio):
        super().__init__()
        self.fc1 = nn.Linear(dim, int(dim * ratio))
        self.fc2 = nn.Linear(int(dim * ratio), dim)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))                     # the exact erf GELU; the tanh form differs by 1e-3


def drop_path(x, rate, noise=None):
    """Stochastic depth: drop a sample's whole branch with probability `rate`, scale the survivors (arXiv:1603.09382).

    x (B, ...). noise (B, 1, ...), uniform in [0, 1), decides if given: the sample survives where noise >= rate.
    """
    if noise is None:
        noise = torch.rand(x.shape[0], *[1] * (x.dim() - 1), device=x.device)
    return x * (noise >= rate).to(x.dtype) / (1 - rate)


class Block(nn.Module):
    """Pre-norm transformer block: x + attention(norm(x)), then + mlp(norm(.)). layer_scale: the start of a learned
    factor per channel on both branches (CaiT), 0 for none; grid, key_bias: see Attention."""

    def __init__(self, dim, heads, mlp_ratio=4.0, drop_path=0.0, eps=1e-6, layer_scale=0.0, grid=None, key_bias=True):
        super().__init__()
        self.drop_path = drop_path
        self.norm1 = nn.LayerNorm(dim, eps=eps)
        self.attn = Attention(dim, heads, grid, key_bias)
        self.norm2 = nn.LayerNorm(dim, eps=eps)
        self.mlp = MLP(dim, mlp_ratio)
        self.gamma_1, self.gamma_2 = (nn.Parameter(torch.full((dim,), float(layer_scale))) if layer_scale else None
                                      for _ in range(2))

    def forward(self, x, first=0, with_logits=False):
        """x (B, N, D) -> (B, N - first, D); with_logits also returns the attention's (B, H, N - first, N)."""
        out = self.attn(self.norm1(x), first, with_logits)
        out, logits = out if with_logits else (out, None)
        x = self.add(x[:, first:] if first else x, out, self.gamma_1)
        x = self.add(x, self.mlp(self.norm2(x)), self.gamma_2)
        return (x, logits) if with_logits else x

    def add(self, x, branch, gamma):
        if gamma is not None:
            branch = branch * gamma
        return x + (drop_path(branch, self.drop_path) if self.training and self.drop_path else branch)


# ----------------------------------------------------------------------------------------------------------------
# ViT


class ViT(nn.Module):
    """Vision transformer: image -> tokens -> one feature vector -> logits.

    img_size      one number or (height, width) in pixels; patch_size must divide both (ValueError)
    positions     "sincos": fixed, MAE's axis order; "sincos_yx": fixed, MoCo-v3's; "learned": trained
    readout       "cls": the cls token after `norm`; "avg": the mean of the patch tokens, cls left out, after `fc_norm`
    num_classes   0: forward gives the (B, D) feature; else (B, num_classes) logits
    drop_path     rate at the last block; rises linearly from 0 at the first
    resize_offset how a table grows to another image size: 0 as MAE, 0.1 as DINO (see resize_positions)
    relative      learned relative positions in every block, beside the absolute ones; layer_scale, key_bias: see Block
    Weights start as timm's do (normal 0.02, zero biases); a method that starts otherwise says so in its own file.
    """

    def __init__(self, img_size=224, patch_size=16, in_chans=3, dim=192, depth=12, heads=12, mlp_ratio=4.0,
                 num_classes=0, positions="sincos", readout="cls", drop_path=0.0, eps=1e-6, resize_offset=0.0,
                 relative=False, layer_scale=0.0, key_bias=True):
        super().__init__()
        self.config = {k: v for k, v in locals().items() if k not in ("self", "__class__")}     # encoder.pt has it
        self.config["img_size"] = pair(img_size)
        self.patch_size, self.resize_offset, self.readout = patch_size, resize_offset, readout
        self.width, self.depth = dim, depth
        self.grid = self.grid_of(*pair(img_size))                                               # (h, w)
        h, w = self.grid

        self.cls_token = nn.Parameter(torch.empty(1, 1, dim))
        if positions == "learned":
            self.pos_embed = nn.Parameter(torch.empty(1, 1 + h * w, dim))
        else:
            table = sincos_positions(dim, h, w, {"sincos": "xy", "sincos_yx": "yx"}[positions])
            self.pos_embed = nn.Parameter(table, requires_grad=False)
        self.patch_embed = PatchEmbed(patch_size, in_chans, dim)
        rates = [drop_path * i / max(depth - 1, 1) for i in range(depth)]
        self.blocks = nn.ModuleList([Block(dim, heads, mlp_ratio, rate, eps, layer_scale,
                                           self.grid if relative else None, key_bias) for rate in rates])
        norm = nn.LayerNorm(dim, eps=eps)
        self.norm, self.fc_norm = (norm, nn.Identity()) if readout == "cls" else (nn.Identity(), norm)
        self.head = nn.Linear(dim, num_classes) if num_classes else nn.Identity()
        self.apply(self.init_weights)
        for token in (self.cls_token, *([self.pos_embed] if positions == "learned" else [])):
            nn.init.trunc_normal_(token, std=0.02)

    @staticmethod
    def init_weights(module):
        if isinstance(module, nn.Linear):                       # the patch convolution keeps torch's start, as in timm
            nn.init.trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)

    def grid_of(self, height, width):
        """Patches down and across. Raises ValueError when they do not tile the image."""
        if height % self.patch_size or width % self.patch_size:
            raise ValueError(f"patches of {self.patch_size} do not tile a {height}x{width} image")
        return height // self.patch_size, width // self.patch_size

    def embed(self, img, keep=None):
        """img (B, C, height, width) -> its patches as tokens, or those numbered keep (B, K), behind cls: (B, 1 + N,
        D)."""
        pos = resize_positions(self.pos_embed, self.grid, self.grid_of(*img.shape[-2:]), self.resize_offset)
        x = self.patch_embed(cut(img, self.patch_size, keep))
        x = x + (pos[:, 1:] if keep is None else pick(pos[:, 1:], keep))
        return torch.cat([(self.cls_token + pos[:, :1]).expand(x.shape[0], -1, -1), x], 1)

    def encode(self, img, keep=None, logits_of=()):
        """img (B, C, height, width) of any size that the patch tiles -> normed tokens, (B, 1 + N, D).

        keep: (B, K) patch numbers; only these are embedded and encoded, in the order given -> (B, 1 + K, D).
        logits_of: block numbers from 1; also returns their scaled pre-softmax attention logits, each (B, H, N, N).
        """
        x, logits = self.run_blocks(self.embed(img, keep), logits_of)
        return (x, logits) if logits_of else x

    def run_blocks(self, x, logits_of=(), states_of=(), tap=None):
        """Embedded tokens (B, N, D) -> normed tokens (B, N, D) after `tap` blocks (default: all), and a list of
        signals: the logits (B, H, N, N) of layers `logits_of`, counted from 1, then the states (B, N, D) numbered
        `states_of`: the output of norm1 of block i, counted from 0, or, at number depth, that of the final norm.

        A last block without an MLP gives its logits and nothing else (see distill.py).
        """
        logits, states, out, depth = {}, {}, None, len(self.blocks)
        for i, block in enumerate(self.blocks):
            if i == tap:
                out = self.norm(x)
            if i in states_of:
                states[i] = block.norm1(x)
            if not hasattr(block, "mlp"):
                logits[i + 1] = block.attn.logits(block.norm1(x))
            elif i + 1 in logits_of:
                x, logits[i + 1] = block(x, with_logits=True)
            else:
                x = block(x)
        if out is None or depth in states_of:
            states[depth] = self.norm(x)
        return states[depth] if out is None else out, [logits[k] for k in logits_of] + [states[k] for k in states_of]

    def features(self, img):
        """(B, C, height, width) -> (B, D), by the readout."""
        x = self.encode(img)
        return x[:, 0] if self.readout == "cls" else self.fc_norm(x[:, 1:].mean(1))

    def forward(self, img):
        return self.head(self.features(img))


class TwoHeads(ViT):
    """A classifier whose patches answer the labels and whose cls token answers a teacher (MAE-Lite's label
    distillation, after DeiT's). Training: both logits, (B, num_classes) twice; evaluation: their mean."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        dim, classes, eps = (self.config[k] for k in ("dim", "num_classes", "eps"))
        self.dist_norm, self.head_dist = nn.LayerNorm(dim, eps=eps), nn.Linear(dim, classes)
        self.init_weights(self.head_dist)

    def forward(self, img):
        x = self.encode(img)                                                                    # (B, 1 + N, D)
        told, taught = self.head(self.fc_norm(x[:, 1:].mean(1))), self.head_dist(self.dist_norm(x[:, 0]))
        return (told, taught) if self.training else (told + taught) / 2


# ----------------------------------------------------------------------------------------------------------------
# Swin: attention within windows, every other time across their borders, and a map that is halved from stage to stage.
# https://arxiv.org/abs/2103.14030; what happens to odd sizes is EsViT's law, https://arxiv.org/abs/2106.09785

SWINS = {
    "swin_mini": dict(dim=48, depths=(2, 2, 2), heads=(2, 4, 8), window=4),     # ours, for images of 32 to 64 pixels
    "swin_lite": dict(dim=48, depths=(2, 2, 6, 2), heads=(3, 6, 12, 24)),
    "swin_tiny": dict(dim=96, depths=(2, 2, 6, 2), heads=(3, 6, 12, 24)),
    "swin_small": dict(dim=96, depths=(2, 2, 18, 2), heads=(3, 6, 12, 24)),
    "swin_base": dict(dim=128, depths=(2, 2, 18, 2), heads=(4, 8, 16, 32)),
}


@cache
def layout(height, width, side, shift, device):
    """How a map's tokens, padded right and below to whole windows and rolled up and left by `shift`, lie in n windows
    of side x side.

    -> numbers of the padded map's tokens, window by window, (n * side^2,); where each token of the map itself is among
    them, (height * width,); what the logits get, (n, side^2, side^2): -100 between tokens that only the roll made
    neighbours, else 0. Without a shift None.
    """
    with torch.inference_mode(False):                           # kept for later calls, which may need gradients
        h, w = (n + -n % side for n in (height, width))
        tile = partial(rearrange, pattern="(a y) (b x) -> (a b) (y x)", y=side, x=side)
        order = tile(torch.arange(h * w, device=device).view(h, w).roll((-shift, -shift), (0, 1))).flatten()
        place = order.argsort().view(h, w)[:height, :width].flatten()
        if not shift:
            return order, place, None
        rows, columns = (sum((torch.arange(n, device=device) >= n - back).long() for back in (side, shift))
                         for n in (h, w))
        band = tile(3 * rows.unsqueeze(1) + columns)
        return order, place, torch.where(band.unsqueeze(2) == band.unsqueeze(1), 0.0, -100.0)


@torch.compiler.assume_constant_result                          # through a cache it would trace, and compute all anew
def windows(*where):
    """A layout, made once."""
    return layout(*where)


class WindowAttention(Attention):
    """Attention among the tokens of a window of side x side, with a learned number per head and offset in the logits.
    shift: how far the windows are moved, in tokens, 0 for not at all."""

    def __init__(self, dim, heads, side, shift=0):
        super().__init__(dim, heads)
        self.side, self.shift = side, shift
        self.relative_position_bias_table = nn.Parameter(torch.empty((2 * side - 1) ** 2, heads))
        self.register_buffer("relative_position_index", relative_index(side, side)[1:, 1:].contiguous())
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)

    def forward(self, x, grid, with_logits=False):
        """x (B, h * w, D), grid (h, w) -> the same shape, and the logits (B * n, H, side^2, side^2), or None.

        Padding is zeros, and as published it is attended like any token. A zero is projected to the bias alone: so it
        is the projection that is padded, and products are formed of real tokens only.
        """
        order, place, mask = windows(*grid, self.side, self.shift, x.device)
        down, across = (-n % self.side for n in grid)
        if down or across:
            x = rearrange(F.linear(x, self.qkv.weight), "b (h w) d -> b h w d", h=grid[0])
            x = F.pad(x, (0, 0, 0, across, 0, down)).flatten(1, 2)
            x = x + self.qkv.bias.to(x.dtype)
        else:
            x = self.qkv(x)
        x, logits = self.attend(x.index_select(1, order), mask, with_logits)
        return self.proj(x.index_select(1, place)), logits

    def attend(self, qkv, mask=None, with_logits=False):
        """qkv (B, n * T, 3 * D), window by window, mask (n, T, T) or None -> (B, n * T, D), logits or None."""
        where, groups = self.where(self.side ** 2, 0, qkv.dtype), 1                             # (1, H, T, T)
        if mask is not None:            # which differs by window: windows become heads, so that images can share it
            groups = len(mask)
            where = (where + mask.unsqueeze(1).to(qkv.dtype)).flatten(0, 1).unsqueeze(0)        # (1, n * H, T, T)
        q, k, v = rearrange(qkv, "b (m n t) (k h d) -> k (b m) (n h) t d", n=groups, t=self.side ** 2, k=3,
                            h=self.heads)
        if with_logits:
            logits = self.scaled_logits(q, k) + where
            out, logits = logits.softmax(-1) @ v, rearrange(logits, "b (n h) s t -> (b n) h s t", h=self.heads)
        else:
            out, logits = F.scaled_dot_product_attention(q, k, v, attn_mask=where), None
        return rearrange(out, "(b m) (n h) t d -> b (m n t) (h d)", b=len(qkv), h=self.heads), logits


class SwinBlock(Block):
    """A Block whose attention sees windows of its map."""

    def __init__(self, dim, heads, side, shift, mlp_ratio, drop_path, eps):
        super().__init__(dim, heads, mlp_ratio, drop_path, eps)
        self.attn = WindowAttention(dim, heads, side, shift)

    def forward(self, x, grid, with_logits=False):
        """x (B, h * w, D), grid (h, w) -> the same shape, and the attention's logits, or None."""
        out, logits = self.attn(self.norm1(x), grid, with_logits)
        x = self.add(x, out, None)
        return self.add(x, self.mlp(self.norm2(x)), None), logits


class PatchMerging(nn.Module):
    """Four neighbours become one token, twice as wide; odd maps get a row or column of zeros."""

    def __init__(self, dim, eps):
        super().__init__()
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)
        self.norm = nn.LayerNorm(4 * dim, eps=eps)

    def forward(self, x, grid):
        """x (B, h * w, D), grid (h, w) -> (B, ceil(h / 2) * ceil(w / 2), 2 * D)."""
        x = rearrange(x, "b (h w) d -> b h w d", h=grid[0])
        if grid[0] % 2 or grid[1] % 2:
            x = F.pad(x, (0, 0, 0, grid[1] % 2, 0, grid[0] % 2))
        # (0, 0), (1, 0), (0, 1), (1, 1): down before across, as published.
        return self.reduction(self.norm(rearrange(x, "b (h y) (w x) d -> b (h w) (x y d)", y=2, x=2)))


class Swin(nn.Module):
    """Swin transformer: image -> map of tokens, halved and twice as wide at each stage -> one feature vector -> logits.

    img_size      pixels, one number or (height, width): decides windows and shifts for good, whatever is seen later. A
                  stage whose map is no larger than the window has one window of the map's size, and no shift
    dim           width of the first stage; depths and heads: blocks of each stage, and heads of these
    num_classes   0: forward gives the (B, D) feature, D = dim * 2^(stages - 1); else (B, num_classes) logits
    drop_path     rate at the last block; rises linearly from 0 at the first
    eps           of every norm: EsViT's 1e-6; official supervised weights want 1e-5
    Any image that the patch tiles can be seen, 96 pixels with a network for 224. grid is that of the last map.
    """

    def __init__(self, img_size=224, patch_size=4, in_chans=3, dim=96, depths=(2, 2, 6, 2), heads=(3, 6, 12, 24),
                 window=7, mlp_ratio=4.0, num_classes=0, drop_path=0.0, eps=1e-6):
        super().__init__()
        self.config = {k: v for k, v in locals().items() if k not in ("self", "__class__")}     # encoder.pt has it
        self.config["img_size"] = pair(img_size)
        self.patch_size, self.stages, self.depth, self.readout = patch_size, len(depths), sum(depths), "avg"
        if len(heads) != self.stages:
            raise ValueError(f"{self.stages} stages need as many numbers of heads, not {len(heads)}")
        *maps, self.grid = self.maps(*pair(img_size))

        self.patch_embed = PatchEmbed(patch_size, in_chans, dim)
        self.patch_embed.norm = nn.LayerNorm(dim, eps=eps)
        rates = iter(drop_path * i / max(self.depth - 1, 1) for i in range(self.depth))
        self.layers = nn.ModuleList()
        for s, (depth, grid) in enumerate(zip(depths, (*maps, self.grid))):
            side, shift = (window, window // 2) if min(grid) > window else (min(grid), 0)
            blocks = [SwinBlock(dim * 2 ** s, heads[s], side, shift * (i % 2), mlp_ratio, next(rates), eps)
                      for i in range(depth)]
            merging = {"downsample": PatchMerging(dim * 2 ** s, eps)} if s < self.stages - 1 else {}
            self.layers.append(nn.ModuleDict(dict(blocks=nn.ModuleList(blocks), **merging)))
        dim *= 2 ** (self.stages - 1)
        self.width, self.norm = dim, nn.LayerNorm(dim, eps=eps)
        self.head = nn.Linear(dim, num_classes) if num_classes else nn.Identity()
        self.apply(ViT.init_weights)

    def maps(self, height, width):
        """The maps (h, w) of all stages. Raises ValueError when patches do not tile the image."""
        maps = [ViT.grid_of(self, height, width)]
        while len(maps) < self.stages:
            maps.append(tuple((n + 1) // 2 for n in maps[-1]))
        return maps

    def grid_of(self, height, width):
        return self.maps(height, width)[-1]

    def run(self, img, logits_of=(), last=0):
        """img (B, C, height, width) -> normed tokens of the last map, (B, N, D); the logits, each (B * n, H, side^2,
        side^2), of blocks `logits_of`, counted from 1 over all stages; means (B, D of its stage) of the last `last`
        blocks' tokens: the last stage's through the final norm, others as they are, before the merging."""
        maps, number, logits, means = self.maps(*img.shape[-2:]), 0, {}, []
        x = self.patch_embed.norm(self.patch_embed(cut(img, self.patch_size)))                  # (B, h * w, dim)
        for stage, (layer, grid) in enumerate(zip(self.layers, maps), 1):
            for block in layer.blocks:
                number += 1
                x, logits[number] = block(x, grid, number in logits_of)
                if number > self.depth - last:
                    means.append((self.norm(x) if stage == self.stages else x).mean(1))
            if stage < self.stages:
                x = layer.downsample(x, grid)
        return self.norm(x), [logits[k] for k in logits_of], means

    def encode(self, img, logits_of=()):
        """img (B, C, height, width) -> normed tokens of the last map, (B, N, D): regions, in reading order; with
        logits_of also the list of logits that `run` describes."""
        x, logits, _ = self.run(img, logits_of)
        return (x, logits) if logits_of else x

    def last_features(self, img, blocks):
        """What EsViT's linear evaluation reads of the last `blocks` blocks, the oldest first, (B, the sum of D)."""
        return torch.cat(self.run(img, last=blocks)[2], 1)

    def features(self, img):
        """(B, C, height, width) -> (B, D): the mean of the normed tokens; there is no cls token."""
        return self.encode(img).mean(1)

    def forward(self, img):
        return self.head(self.features(img))


def layer_of(model, name):
    """Where a parameter of a ViT or Swin lies: 0 before the blocks, then the block's number, then one more. A Swin's
    blocks count through its stages, and a merging belongs to the block before it."""
    depths = model.config.get("depths") or (model.depth,)
    found = re.match(r"(?:layers\.(\d+)\.)?(?:blocks\.(\d+)|downsample)", name)
    if not found:
        return 0 if name in ("cls_token", "pos_embed") or name.startswith("patch_embed.") else model.depth + 1
    stage = int(found[1] or 0)
    return sum(depths[:stage]) + (int(found[2]) + 1 if found[2] else depths[stage])
