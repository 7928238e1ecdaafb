"""
The networks: a plain vision transformer in the first half, Swin in the second. No training, no data.

A vision transformer cuts an image into patches, turns each patch into a token, adds its position, and lets the tokens
look at each other a dozen times. https://arxiv.org/abs/2010.11929
Parameter names are the public ones (timm, DeiT, MAE, Swin), so official weights load as they are.
Shapes at the ends of lines: B images, C channels, N tokens, D width, H heads, p patch side, (h, w) the grid of patches.
"""
from functools import cache, partial

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

# Tiny and Small have 12 heads, as in MAE-Lite. DeiT's have 3 and 6, and tensors of the very same shapes: weights loaded
# with the wrong number of heads fit, and only the accuracy shows it.
MODELS = {
    "vit_mini": dict(dim=128, depth=4, heads=4, patch_size=4),          # our own, for images of 32 to 64 pixels
    "vit_midi": dict(dim=256, depth=4, heads=8, patch_size=4),          # our own, a teacher for vit_mini
    "vit_tiny": dict(dim=192, depth=12, heads=12, patch_size=16),
    "vit_small": dict(dim=384, depth=12, heads=12, patch_size=16),
    "vit_base": dict(dim=768, depth=12, heads=12, patch_size=16),
    "vit_large": dict(dim=1024, depth=24, heads=16, patch_size=16),
    "vit_huge": dict(dim=1280, depth=32, heads=16, patch_size=14),
}


def pair(size):
    """Turn an image size into (height, width): 224 and (224,) become (224, 224), (96, 160) stays. Or ValueError."""
    size = tuple(size) if isinstance(size, (tuple, list)) else (size,)
    if len(size) > 2:
        raise ValueError(f"an image size is one number, or height and width, not {size}")
    return size if len(size) == 2 else (size[0], size[0])


# ----------------------------------------------------------------------------------------------------------------
# Patches and positions

def patchify(img, p, index=None):
    """Cut images (B, C, h*p, w*p) into patches (B, N, C*p*p) in reading order, or only those numbered index (B, K).
    Inside a patch, pixels come in the order of a convolution's weight: channels, rows, columns."""
    grid = rearrange(img, "b c (h p) (w q) -> b h w c p q", p=p, q=p)   # a view: nothing is copied yet
    if index is None:
        return rearrange(grid, "b h w c p q -> b (h w) (c p q)")
    # Only the chosen patches are copied, the rest of the image never is.
    image, w = torch.arange(len(img), device=img.device), grid.shape[2]
    return grid[image.unsqueeze(1), index // w, index % w].flatten(2)   # (B, K, C*p*p)


def gather_tokens(tokens, index):
    """Choose tokens by number: tokens (B, N, D), or one table for all images (1, N, D); index (B, K) -> (B, K, D)."""
    if len(tokens) > 1:                                                 # number the tokens through the whole batch
        index = index + tokens.shape[1] * torch.arange(len(tokens), device=index.device).unsqueeze(1)
    return F.embedding(index, tokens.flatten(0, 1))                     # whole rows; gather copies number by number


def sincos_positions(dim, height, width, order="xy"):
    """Build the fixed 2-D sine-cosine table of positions (1, 1 + height * width, dim); the row of cls is zero.
    order: "xy" starts with the column (MAE), "yx" with the row (MoCo v3); with the other one's table, weights see a
    transposed image. Raises ValueError when dim is not a multiple of 4."""
    if dim % 4:
        raise ValueError(f"sine-cosine positions need a width that is a multiple of 4, not {dim}")
    omega = 10000.0 ** (-torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))              # (dim / 4,)
    y, x = torch.meshgrid(torch.arange(height).double(), torch.arange(width).double(), indexing="ij")
    angles = [axis.flatten().unsqueeze(1) * omega for axis in ((x, y) if order == "xy" else (y, x))]   # (N, dim / 4)
    table = torch.cat([wave(angle) for angle in angles for wave in (torch.sin, torch.cos)], 1).float()  # (N, dim)
    return torch.cat([torch.zeros(1, dim), table]).unsqueeze(0)


def resize_positions(pos, old, new, offset=0.0):
    """Resize a table of positions (1, 1 + h*w, D) from grid `old` to grid `new`, bicubically; the row of cls stays.
    offset: 0 as MAE. DINO resizes by the factors (new + 0.1) / old, which shifts the sampling points a little."""
    if tuple(old) == tuple(new):
        return pos
    grid = rearrange(pos[:, 1:].float(), "1 (h w) d -> 1 d h w", h=old[0], w=old[1])
    target = dict(size=tuple(new))
    if offset:
        target = dict(scale_factor=((new[0] + offset) / old[0], (new[1] + offset) / old[1]))
    grid = F.interpolate(grid, mode="bicubic", align_corners=False, **target)
    return torch.cat([pos[:, :1], rearrange(grid, "1 d h w -> 1 (h w) d").to(pos.dtype)], 1)


# ----------------------------------------------------------------------------------------------------------------
# Layers, and the network

class PatchEmbed(nn.Module):
    """Linear projection of each patch. Named and shaped as a convolution, applied as the matrix product that it is."""

    def __init__(self, patch_size, in_chans, dim):
        super().__init__()
        self.proj = nn.Conv2d(in_chans, dim, patch_size, patch_size)

    def forward(self, patches):                                         # (B, N, C*p*p), all of an image or any of them
        return F.linear(patches, self.proj.weight.flatten(1), self.proj.bias)                   # (B, N, D)


class Attention(nn.Module):
    """Multi-head self-attention ("Attention is all you need", section 3.2.2). ValueError if heads do not divide dim."""

    def __init__(self, dim, heads):
        super().__init__()
        if dim % heads:
            raise ValueError(f"{heads} heads do not divide the width {dim}")
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)                              # queries, keys, values, in this order
        self.proj = nn.Linear(dim, dim)

    def forward(self, x, first=0):
        """Tokens x (B, N, D) -> (B, N - first, D): only the tokens from number `first` on ask, all are asked."""
        if first:                                                       # the same numbers, less work
            D, weight, bias = x.shape[-1], self.qkv.weight, self.qkv.bias
            q = F.linear(x[:, first:], weight[:D], bias[:D])                                    # (B, N - first, D)
            k, v = F.linear(x, weight[D:], bias[D:]).chunk(2, -1)                               # (B, N, D) each
        else:
            q, k, v = self.qkv(x).chunk(3, -1)                                                  # (B, N, D) each
        q, k, v = (rearrange(t, "b n (h d) -> b h n d", h=self.heads) for t in (q, k, v))
        x = F.scaled_dot_product_attention(q, k, v)                     # softmax(q k^T / sqrt(D / H)) v
        return self.proj(rearrange(x, "b h n d -> b n (h d)"))

    def logits(self, x):
        """Tokens x (B, N, D) -> the attention before its softmax, q k^T / sqrt(D / H), (B, H, N, N)."""
        D = x.shape[-1]                                                 # values are not needed, so not computed
        q, k = F.linear(x, self.qkv.weight[:2 * D], self.qkv.bias[:2 * D]).chunk(2, -1)
        q, k = (rearrange(t, "b n (h d) -> b h n d", h=self.heads) for t in (q, k))
        return (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)          # q is scaled first: fp16 sums would overflow


class MLP(nn.Module):
    """Two linear layers with a GELU between them: the exact one (erf); its tanh form differs by 1e-3."""

    def __init__(self, dim, ratio):
        super().__init__()
        self.fc1 = nn.Linear(dim, int(dim * ratio))
        self.fc2 = nn.Linear(int(dim * ratio), dim)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


def drop_path(x, rate, noise=None):
    """Stochastic depth: drop a sample's branch x (B, ...) with probability `rate`, scale the others (arXiv:1603.09382).
    noise: (B, 1, ...), uniform in [0, 1), drawn here if not given; a sample survives where noise >= rate."""
    noise = torch.rand(x.shape[0], *[1] * (x.dim() - 1), device=x.device) if noise is None else noise
    return x * (noise >= rate).to(x.dtype) / (1 - rate)


class Block(nn.Module):
    """Pre-norm transformer block: x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, dim, heads, mlp_ratio=4.0, drop_path=0.0, eps=1e-6):
        super().__init__()
        self.drop_path = drop_path
        self.norm1 = nn.LayerNorm(dim, eps=eps)
        self.attn = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim, eps=eps)
        self.mlp = MLP(dim, mlp_ratio)

    def forward(self, x, first=0):
        """Tokens x (B, N, D) -> (B, N - first, D): those from number `first` on."""
        x = self.add(x[:, first:], self.attn(self.norm1(x), first))
        return self.add(x, self.mlp(self.norm2(x)))

    def add(self, x, branch):
        if self.training and self.drop_path:                            # leave the branch out for some samples
            branch = drop_path(branch, self.drop_path)
        return x + branch


class ViT(nn.Module):
    """Vision transformer: image -> tokens -> one feature vector -> logits.

    img_size      one number or (height, width) in pixels; patch_size must divide both (ValueError)
    positions     "sincos": fixed, MAE's axis order; "sincos_yx": fixed, MoCo v3's; "learned": trained
    pool          "cls": the cls token after `norm`; "avg": the mean of the patch tokens, without cls, after `fc_norm`
    num_classes   0: forward gives the (B, D) feature; else (B, num_classes) logits
    drop_path     rate at the last block; it rises linearly from 0 at the first
    resize_offset how positions grow to another image size: 0 as in MAE, 0.1 as in DINO (see resize_positions)
    """

    def __init__(self, img_size=224, patch_size=16, in_chans=3, dim=192, depth=12, heads=12, mlp_ratio=4.0,
                 num_classes=0, positions="sincos", pool="cls", drop_path=0.0, eps=1e-6, resize_offset=0.0):
        super().__init__()
        # encoder.pt stores these options: the network can be built again from the file alone.
        self.config = dict(img_size=pair(img_size), patch_size=patch_size, in_chans=in_chans, dim=dim, depth=depth,
                           heads=heads, mlp_ratio=mlp_ratio, num_classes=num_classes, positions=positions, pool=pool,
                           drop_path=drop_path, eps=eps, resize_offset=resize_offset)
        self.patch_size, self.pool, self.width, self.depth = patch_size, pool, dim, depth
        self.grid = self.grid_of(*pair(img_size))                                               # (h, w)
        self.cls_token = nn.Parameter(torch.empty(1, 1, dim))
        if positions == "learned":
            self.pos_embed = nn.Parameter(torch.empty(1, 1 + self.grid[0] * self.grid[1], dim))
        else:
            order = "yx" if positions == "sincos_yx" else "xy"
            self.pos_embed = nn.Parameter(sincos_positions(dim, *self.grid, order), requires_grad=False)
        self.patch_embed = PatchEmbed(patch_size, in_chans, dim)
        rates = [drop_path * i / max(depth - 1, 1) for i in range(depth)]
        self.blocks = nn.ModuleList([Block(dim, heads, mlp_ratio, rate, eps) for rate in rates])
        # One of the two norms does nothing: cls is normed before it is read, the mean of the patches after it is taken.
        norms = nn.LayerNorm(dim, eps=eps), nn.Identity()
        self.norm, self.fc_norm = norms if pool == "cls" else reversed(norms)
        self.head = nn.Linear(dim, num_classes) if num_classes else nn.Identity()
        self.apply(self.init_weights)
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        if positions == "learned":
            nn.init.trunc_normal_(self.pos_embed, std=0.02)

    @staticmethod
    def init_weights(module):
        if isinstance(module, nn.Linear):                       # the patch convolution keeps torch's start, as in timm
            nn.init.trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)

    def grid_of(self, height, width):
        """Count patches down and across an image. Raises ValueError when they do not tile it."""
        if height % self.patch_size or width % self.patch_size:
            raise ValueError(f"patches of {self.patch_size} do not tile a {height}x{width} image")
        return height // self.patch_size, width // self.patch_size

    def embed(self, img, keep=None):
        """Images (B, C, height, width) -> cls and patches as tokens (B, 1 + N, D); with keep (B, K) those patches."""
        pos, grid = self.pos_embed, self.grid_of(*img.shape[-2:])
        if grid != self.grid:                                   # an image of another size than the network's own
            pos = resize_positions(pos, self.grid, grid, self.config["resize_offset"])
        x = self.patch_embed(patchify(img, self.patch_size, keep))                              # (B, N or K, D)
        x = x + (pos[:, 1:] if keep is None else gather_tokens(pos[:, 1:], keep))
        return torch.cat([(self.cls_token + pos[:, :1]).expand(len(x), -1, -1), x], 1)          # cls comes first

    def encode(self, img, keep=None):
        """Images (B, C, height, width) of any size that patches tile -> normed tokens (B, 1 + N, D); with keep (B, K),
        numbers of patches, only these are embedded and encoded, in the order given -> (B, 1 + K, D)."""
        x = self.embed(img, keep)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def features(self, img):
        """Images (B, C, height, width) -> one vector each, (B, D), as `pool` says."""
        x = self.encode(img)
        return x[:, 0] if self.pool == "cls" else self.fc_norm(x[:, 1:].mean(1))

    def forward(self, img):
        return self.head(self.features(img))


# ----------------------------------------------------------------------------------------------------------------
# Second half: Swin, https://arxiv.org/abs/2103.14030. Attention within windows, every other time across their borders.

SWINS = {
    "swin_mini": dict(dim=48, depths=(2, 2, 2), heads=(2, 4, 8), window=4),     # our own, for images of 32 to 64 pixels
    "swin_lite": dict(dim=48, depths=(2, 2, 6, 2), heads=(3, 6, 12, 24)),
    "swin_tiny": dict(dim=96, depths=(2, 2, 6, 2), heads=(3, 6, 12, 24)),
    "swin_small": dict(dim=96, depths=(2, 2, 18, 2), heads=(3, 6, 12, 24)),
    "swin_base": dict(dim=128, depths=(2, 2, 18, 2), heads=(4, 8, 16, 32)),
}


def relative_index(height, width):
    """Number each pair of tokens of a grid by its offset, query minus key, down and then across -> (N, N)."""
    number = torch.arange(height * width)
    y, x = number // width, number % width                                                      # (N,) each
    down, across = y.unsqueeze(1) - y + height - 1, x.unsqueeze(1) - x + width - 1              # (N, N), least is 0
    return down * (2 * width - 1) + across


@cache
def cached_window_layout(height, width, side, shift, device):
    """How tokens lie in n windows of T = side^2 once their map is padded right and below to whole windows and rolled up
    and left by `shift`. Returns order (n * T,): the padded map's tokens, window by window; place (height * width,):
    where the map's own are; mask (n, T, T), added to logits: -100 between neighbours by the roll alone, else 0."""
    with torch.inference_mode(False):                           # kept for later calls, which may need gradients
        split = partial(rearrange, pattern="(a y) (b x) -> (a b) (y x)", y=side, x=side)
        h, w = height + -height % side, width + -width % side   # rounded up to whole windows
        y, x = torch.arange(h, device=device), torch.arange(w, device=device)
        order = split((y.roll(-shift) * w).unsqueeze(1) + x.roll(-shift)).flatten()             # (n * T,)
        place = order.argsort().view(h, w)[:height, :width].flatten()                           # (height * width,)
        # The roll leaves three bands each way: old neighbours, the rest of their last window, the other end of the map.
        rows = (y >= h - side).long() + (y >= h - shift).long()
        columns = (x >= w - side).long() + (x >= w - shift).long()
        band = split(3 * rows.unsqueeze(1) + columns)                                           # (n, T)
        return order, place, torch.where(band.unsqueeze(2) == band.unsqueeze(1), 0.0, -100.0) if shift else None


@torch.compiler.assume_constant_result                          # else the compiler would trace through the cache
def window_layout(*arguments):
    return cached_window_layout(*arguments)


class WindowAttention(Attention):
    """Attention within windows of side x side tokens, with a learned bias for each head and offset of two tokens.
    shift: how far the windows are moved, in tokens; 0: not at all."""

    def __init__(self, dim, heads, side, shift=0):
        super().__init__(dim, heads)
        self.side, self.shift = side, shift
        self.relative_position_bias_table = nn.Parameter(torch.empty((2 * side - 1) ** 2, heads))
        self.register_buffer("relative_position_index", relative_index(side, side))
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)

    def forward(self, x, grid):
        """Tokens x (B, h * w, D) on the grid (h, w) -> the same shape."""
        order, place, mask = window_layout(*grid, self.side, self.shift, x.device)
        x = self.attend(self.padded_qkv(x, grid).index_select(1, order), mask)                  # (B, n * T, D)
        return self.proj(x.index_select(1, place))                                              # (B, h * w, D)

    def padded_qkv(self, x, grid):
        """Tokens (B, h * w, D) -> queries, keys, values of the map padded to whole windows, (B, N, 3 * D)."""
        down, across = -grid[0] % self.side, -grid[1] % self.side
        if not down and not across:
            return self.qkv(x)
        # Published code pads with zeros and then projects, zeros to the bias. Padding products: the same, less work.
        x = rearrange(F.linear(x, self.qkv.weight), "b (h w) d -> b h w d", h=grid[0])
        return F.pad(x, (0, 0, 0, across, 0, down)).flatten(1, 2) + self.qkv.bias.to(x.dtype)

    def attend(self, qkv, mask=None):
        """qkv (B, n * T, 3 * D), window by window, mask (n, T, T) or None -> (B, n * T, D)."""
        bias = F.embedding(self.relative_position_index, self.relative_position_bias_table)     # (T, T, H)
        bias = rearrange(bias, "s t h -> 1 h s t").to(qkv.dtype)
        if mask is not None:                    # it differs by window: windows count as heads, so images can share it
            bias = rearrange(bias + mask.unsqueeze(1).to(qkv.dtype), "n h s t -> 1 (n h) s t")
        shape = dict(n=bias.shape[1] // self.heads, t=self.side ** 2, k=3, h=self.heads)
        q, k, v = rearrange(qkv, "b (m n t) (k h d) -> k (b m) (n h) t d", **shape)
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)                             # (B * m, n * H, T, d)
        return rearrange(x, "(b m) (n h) t d -> b (m n t) (h d)", b=len(qkv), h=self.heads)


class SwinBlock(Block):
    """A Block whose attention sees windows of a map: tokens x (B, h * w, D) on the grid (h, w) -> the same shape."""

    def __init__(self, dim, heads, side, shift, mlp_ratio, drop_path, eps):
        super().__init__(dim, heads, mlp_ratio, drop_path, eps)
        self.attn = WindowAttention(dim, heads, side, shift)

    def forward(self, x, grid):
        x = self.add(x, self.attn(self.norm1(x), grid))
        return self.add(x, self.mlp(self.norm2(x)))


class PatchMerging(nn.Module):
    """Merge four neighbours into one token, twice as wide; odd maps get a row or column of zeros first, as in EsViT."""

    def __init__(self, dim, eps):
        super().__init__()
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)
        self.norm = nn.LayerNorm(4 * dim, eps=eps)

    def forward(self, x, grid):
        x = rearrange(x, "b (h w) d -> b h w d", h=grid[0])
        if grid[0] % 2 or grid[1] % 2:
            x = F.pad(x, (0, 0, 0, grid[1] % 2, 0, grid[0] % 2))
        x = rearrange(x, "b (h y) (w x) d -> b (h w) (x y d)", y=2, x=2)        # as published: down before across
        return self.reduction(self.norm(x))                                     # (B, ceil(h / 2) * ceil(w / 2), 2 * D)


class Pyramid(nn.Module):
    """What networks of several stages have in common. There is no cls token: the tokens of the last map are the image's
    regions, and their mean is its feature. A subclass has norm, head, `maps` and `block_outputs`, as Swin has them."""

    pool = "avg"

    def grid_of(self, height, width):
        return self.maps(height, width)[-1]

    def view_and_regions(self, img):
        """Images (B, C, height, width) -> the feature (B, D) and the regions in reading order (B, N, D), normed."""
        x = self.norm(self.block_outputs(img)[-1])
        return self.view(x, self.depth - 1), x

    def view(self, x, block):
        """Tokens (B, N, D) after the block of this number -> one vector each, (B, D)."""
        return x.mean(1)

    def encode(self, img):
        return self.view_and_regions(img)[1]

    def features(self, img):
        return self.view_and_regions(img)[0]

    def forward(self, img):
        return self.head(self.features(img))


class Swin(Pyramid):
    """Swin transformer: image -> map of tokens, halved and twice as wide at each stage -> one feature vector -> logits.

    img_size      decides windows and shifts for good, whatever is seen later: a stage whose map is no larger than the
                  window has windows of the map's size, and no shift. Here maps are halved and rounded down
    dim           width of the first stage; it doubles from stage to stage. depths, heads: of each stage
    eps           of every norm: EsViT's 1e-6; official supervised weights want 1e-5
    """

    def __init__(self, img_size=224, patch_size=4, in_chans=3, dim=96, depths=(2, 2, 6, 2), heads=(3, 6, 12, 24),
                 window=7, mlp_ratio=4.0, num_classes=0, drop_path=0.0, eps=1e-6):
        super().__init__()
        self.config = dict(img_size=pair(img_size), patch_size=patch_size, in_chans=in_chans, dim=dim, depths=depths,
                           heads=heads, window=window, mlp_ratio=mlp_ratio, num_classes=num_classes,
                           drop_path=drop_path, eps=eps)
        self.patch_size, self.stages, self.depth = patch_size, len(depths), sum(depths)
        self.grid = self.grid_of(*pair(img_size))                                               # of the last map
        self.patch_embed = PatchEmbed(patch_size, in_chans, dim)
        self.patch_embed.norm = nn.LayerNorm(dim, eps=eps)
        rates = iter([drop_path * i / max(self.depth - 1, 1) for i in range(self.depth)])
        self.layers = nn.ModuleList()
        patches = min(self.maps(*pair(img_size))[0])
        for stage, (depth, h) in enumerate(zip(depths, heads, strict=True)):
            nominal = max(1, patches >> stage)                  # rounded down as published, though the maps are not
            side, shift = (nominal, 0) if nominal <= window else (window, window // 2)
            blocks = [SwinBlock(dim, h, side, shift * (i % 2), mlp_ratio, next(rates), eps)
                      for i in range(depth)]                    # every other block moves its windows
            self.layers.append(nn.ModuleDict(dict(blocks=nn.ModuleList(blocks))))
            if stage < self.stages - 1:
                self.layers[-1]["downsample"] = PatchMerging(dim, eps)
                dim *= 2
        self.width, self.norm = dim, nn.LayerNorm(dim, eps=eps)
        self.head = nn.Linear(dim, num_classes) if num_classes else nn.Identity()
        self.apply(ViT.init_weights)

    def maps(self, height, width):
        """The grids (h, w) of all stages, rounded up. Raises ValueError when patches do not tile the image."""
        maps = [ViT.grid_of(self, height, width)]
        while len(maps) < self.stages:
            maps.append(((maps[-1][0] + 1) // 2, (maps[-1][1] + 1) // 2))
        return maps

    def block_outputs(self, img):
        """Images (B, C, height, width) of any size that patches tile -> the tokens after each block, (B, N, D)."""
        maps, outputs = self.maps(*img.shape[-2:]), []
        x = self.patch_embed.norm(self.patch_embed(patchify(img, self.patch_size)))             # (B, h * w, dim)
        for layer, grid in zip(self.layers, maps):
            for block in layer["blocks"]:
                x = block(x, grid)
                outputs.append(x)
            if "downsample" in layer:
                x = layer["downsample"](x, grid)                # (B, h / 2 * w / 2, 2 * D)
        return outputs
