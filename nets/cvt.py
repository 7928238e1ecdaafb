"""
CvT, the convolutional vision transformer (https://arxiv.org/abs/2103.15808), as EsViT trains it: a network of four
stages in which tokens see their own window of the map alone. What joins the windows are convolutions: overlapping
patches at the start of each stage, and a depthwise convolution that queries, keys and values are made after.

Names are those of EsViT's files: stage0.0 is the embedding of the first stage, stage0.1.layers its blocks, each of an
attention (layers.0.0) and an MLP (layers.0.1). Shapes: B images, N tokens of a map (h, w), D width, H heads; a map
is cut into n windows of T = side^2 tokens.
"""
import torch
import torch.distributed as dist
import torch.nn.functional as F
from einops import rearrange
from torch import nn
from torch.distributed.nn.functional import all_reduce

from vit import Pyramid, drop_path, pair, relative_index, window_layout

CVTS = {
    "cvt_mini": dict(dims=(48, 96, 192), depths=(2, 2, 2), heads=(1, 2, 4), window=4),  # our own, for 32 to 64 pixels
    # EsViT's s1.yaml, 29.30 M parameters, and s3.yaml, 22.62 M.
    "cvt_tiny": dict(dims=(64, 192, 384, 768), depths=(2, 2, 6, 2), heads=(1, 3, 6, 12)),
    "cvt_deep": dict(dims=(64, 128, 256, 512), depths=(2, 2, 10, 4), heads=(2, 4, 8, 16)),
}


def cvt_options(state, config):
    """The options of CvT that tensors by name, and what is stored beside them, show. ValueError where nothing tells the
    heads."""
    stages = range(sum(name.endswith(".0.proj.weight") for name in state))
    dims = tuple(len(state[f"stage{i}.0.proj.weight"]) for i in stages)
    depths = tuple(sum(name.endswith(".fn.qkv.pw.weight") and name.startswith(f"stage{i}.") for name in state)
                   for i in stages)
    known = [m["heads"] for m in CVTS.values() if (m["dims"], m["depths"]) == (dims, depths)]
    heads = config.get("heads") or (known[0] if known else None)
    if not isinstance(heads, (list, tuple)):
        raise ValueError(f"a CvT {dims} wide and {depths} deep whose file does not say the heads of each stage")
    table = state.get("stage0.1.layers.0.0.fn.rel_pos_bias_table")
    fc1, first = state["stage0.1.layers.0.1.fn.net.0.weight"], state["stage0.0.proj.weight"]
    window = config.get("window") or 7
    if table is not None:
        window = (round(len(table) ** 0.5) + 1) // 2
    return dict(dims=dims, depths=depths, heads=tuple(heads), window=window, relative=table is not None,
                mlp_ratio=len(fc1) / dims[0], patch_size=(first.shape[-1] + 1) // 2, in_chans=first.shape[1],
                img_size=pair(config.get("img_size") or 224), eps=config.get("eps") or 1e-5)


class MapBatchNorm(nn.BatchNorm2d):
    """BatchNorm2d over the maps (B, D, h, w) of all processes, in fp32. nn.SyncBatchNorm has no CPU kernel."""

    def forward(self, x):
        if not self.training:
            return super().forward(x)
        with torch.no_grad():
            self.num_batches_tracked += 1
        mean, var = self.running_mean.clone(), self.running_var.clone()
        if dist.is_initialized() and dist.get_world_size() > 1:
            out = self.over_processes(x.float(), mean, var)
        else:
            out = F.batch_norm(x.float(), mean, var, self.weight, self.bias, True, self.momentum, self.eps)
        with torch.no_grad():
            # The step of a batch with a NaN in it is skipped, so it must leave no NaN here either.
            for kept, new in ((self.running_mean, mean), (self.running_var, var)):
                kept.copy_(torch.where(new.isfinite(), new, kept))
        return out

    def over_processes(self, x, running_mean, running_var):
        """The same of equally many maps in each process; the running statistics are moved in place."""
        world = dist.get_world_size()
        mean = all_reduce(x.mean((0, 2, 3))) / world                                            # (D,)
        x = x - mean.view(1, -1, 1, 1)
        var = all_reduce(x.square().mean((0, 2, 3))) / world                                    # (D,)
        with torch.no_grad():
            count = world * x.numel() / x.shape[1]
            running_mean.lerp_(mean, self.momentum)
            running_var.lerp_(var * count / (count - 1), self.momentum)
        scale = self.weight * (var + self.eps).rsqrt()                                          # (D,)
        return x * scale.view(1, -1, 1, 1) + self.bias.view(1, -1, 1, 1)


class Pointwise(nn.Conv2d):
    """A 1 x 1 convolution by name and shape, applied to tokens (..., D) as the linear layer that it is."""

    def __init__(self, dim, out):
        super().__init__(dim, out, 1)

    def forward(self, x):
        return F.linear(x, self.weight.flatten(1), self.bias)


class CvtAttention(nn.Module):
    """Attention within windows of side x side tokens; the side is at most that of the map. relative: learned numbers
    for each head and offset of two tokens are added; maps must then be as large as a window (else ValueError)."""

    def __init__(self, dim, heads, side, relative):
        super().__init__()
        if dim % heads:
            raise ValueError(f"{heads} heads do not divide the width {dim}")
        self.heads, self.side, self.relative = heads, side, relative
        dw = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, bias=False)
        self.qkv = nn.ModuleDict(dict(dw=dw, bn=MapBatchNorm(dim), pw=Pointwise(dim, 3 * dim)))
        self.proj_out = Pointwise(dim, dim)
        if relative:
            self.rel_pos_bias_table = nn.Parameter(torch.empty((2 * side - 1) ** 2, heads))
            self.register_buffer("offsets", relative_index(side, side), persistent=False)       # (T, T)
            nn.init.trunc_normal_(self.rel_pos_bias_table, std=0.02)

    def windows(self, x, grid):
        """Tokens x (B, N, D) on the grid (h, w) -> queries, keys and values of all windows (B * n, H, T, d), the side
        of a window, and the places of the map's tokens among n * T."""
        side = min(self.side, *grid)
        order, place, _ = window_layout(*grid, side, 0, x.device)
        x = rearrange(x, "b (h w) d -> b d h w", h=grid[0])
        if grid[0] % side or grid[1] % side:                    # tokens beyond the map are zeros, and seen like others
            x = F.pad(x, (0, -grid[1] % side, 0, -grid[0] % side))
        x = self.qkv["bn"](self.qkv["dw"](x))                   # (B, D, h, w), of the whole map: windows see neighbours
        qkv = self.qkv["pw"](x.flatten(2).mT).index_select(1, order)                            # (B, n * T, 3 * D)
        qkv = rearrange(qkv, "b (n t) (k h d) -> k (b n) h t d", t=side ** 2, k=3, h=self.heads)
        return qkv, side, place

    def bias(self, side):
        """What relative positions add to the logits, (1, H, T, T), or None."""
        if not self.relative:
            return None
        if side < self.side:
            raise ValueError(f"relative positions of windows of {self.side} tokens need maps that large: a map here "
                             f"has {side} on a side")
        return rearrange(F.embedding(self.offsets, self.rel_pos_bias_table), "s t h -> 1 h s t")

    def logits(self, x, grid):
        """The attention before its softmax, (B * n, H, T, T), a window's grid, and the places of the map's tokens."""
        (q, k, _), side, place = self.windows(x, grid)
        logits, bias = (q * x.shape[-1] ** -0.5) @ k.mT, self.bias(side)
        return logits if bias is None else logits + bias, (side, side), place

    def forward(self, x, grid):
        """Tokens x (B, N, D) on the grid (h, w) -> the same shape."""
        (q, k, v), side, place = self.windows(x, grid)
        bias, dim = self.bias(side), x.shape[-1]
        # As published, the scale is that of the whole width, not that of a head.
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias if bias is None else bias.to(q.dtype),
                                             scale=dim ** -0.5)                                 # (B * n, H, T, d)
        out = rearrange(out, "(b n) h t d -> b (n t) (h d)", b=len(x))
        return self.proj_out(out.index_select(1, place))


class QuickGELU(nn.Module):
    """x sigmoid(1.702 x), which is near to GELU."""

    def forward(self, x):
        return x * torch.sigmoid(1.702 * x)


class CvtMLP(nn.Module):
    """Two linear layers with a QuickGELU between them."""

    def __init__(self, dim, ratio):
        super().__init__()
        self.net = nn.Sequential(Pointwise(dim, int(dim * ratio)), QuickGELU(), Pointwise(int(dim * ratio), dim))

    def forward(self, x, grid):
        return self.net(x)


class CvtBranch(nn.Module):
    """x + fn(norm(x)), where fn is attention or an MLP; stochastic depth leaves it out for some images."""

    def __init__(self, dim, fn, rate, eps):
        super().__init__()
        self.norm, self.fn, self.rate = nn.LayerNorm(dim, eps=eps), fn, rate

    def forward(self, x, grid):
        branch = self.fn(self.norm(x), grid)
        return x + (drop_path(branch, self.rate) if self.training and self.rate else branch)


class ConvEmbedding(nn.Module):
    """Overlapping patches of p pixels or tokens, every `stride` of them: maps (B, C, H, W) -> tokens, their grid."""

    def __init__(self, in_chans, dim, p, stride, padding, eps):
        super().__init__()
        self.proj, self.norm = nn.Conv2d(in_chans, dim, p, stride, padding), nn.LayerNorm(dim, eps=eps)

    def forward(self, x):
        x = self.proj(x)                                                                        # (B, D, h, w)
        return self.norm(x.flatten(2).mT), x.shape[-2:]                                         # (B, h * w, D)


class CvT(Pyramid):
    """CvT: image -> maps of tokens, halved from stage to stage -> one feature vector -> logits.

    patch_size             distance of the first stage's patches, which are 7 / 4 as large as that and overlap
    dims, depths, heads    of each stage
    window                 the side of a window, in tokens
    relative               relative positions within windows; the published networks have none
    """

    def __init__(self, img_size=224, patch_size=4, in_chans=3, dims=(64, 192, 384, 768), depths=(2, 2, 6, 2),
                 heads=(1, 3, 6, 12), window=7, relative=False, mlp_ratio=4.0, num_classes=0, drop_path=0.0, eps=1e-5):
        super().__init__()
        self.config = dict(img_size=pair(img_size), patch_size=patch_size, in_chans=in_chans, dims=dims, depths=depths,
                           heads=heads, window=window, relative=relative, mlp_ratio=mlp_ratio, num_classes=num_classes,
                           drop_path=drop_path, eps=eps)
        self.patch_size, self.stages, self.depth, self.width = patch_size, len(depths), sum(depths), dims[-1]
        self.grid = self.grid_of(*pair(img_size))                                               # of the last map
        rates = iter([drop_path * i / max(self.depth - 1, 1) for i in range(self.depth)])
        for stage, (dim, depth, h) in enumerate(zip(dims, depths, heads, strict=True)):
            if stage == 0:
                embed = ConvEmbedding(in_chans, dim, 2 * patch_size - 1, patch_size, patch_size // 2, eps)
            else:
                embed = ConvEmbedding(dims[stage - 1], dim, 3, 2, 1, eps)
            blocks = nn.ModuleList()
            for _ in range(depth):
                rate = next(rates)
                attn = CvtBranch(dim, CvtAttention(dim, h, window, relative), rate, eps)
                blocks.append(nn.ModuleList([attn, CvtBranch(dim, CvtMLP(dim, mlp_ratio), rate, eps)]))
            self.add_module(f"stage{stage}", nn.ModuleList([embed, nn.ModuleDict(dict(layers=blocks))]))
        self.norm = nn.LayerNorm(self.width, eps=eps)
        self.head = nn.Linear(self.width, num_classes) if num_classes else nn.Identity()
        self.apply(self.init_weights)

    @staticmethod
    def init_weights(module):
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            nn.init.trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)

    def maps(self, height, width):
        """The grids (h, w) of all stages, rounded up. Raises ValueError when patches do not tile the image."""
        if height % self.patch_size or width % self.patch_size:
            raise ValueError(f"patches of {self.patch_size} do not tile a {height}x{width} image")
        maps = [(height // self.patch_size, width // self.patch_size)]
        while len(maps) < self.stages:
            maps.append(((maps[-1][0] + 1) // 2, (maps[-1][1] + 1) // 2))
        return maps

    def block_outputs(self, img):
        """Images (B, C, height, width) of any size that patches tile -> the tokens after each block, (B, N, D)."""
        self.maps(*img.shape[-2:])                              # refuses what does not fit
        x, outputs = img, []
        for stage in range(self.stages):
            embed, blocks = self.get_submodule(f"stage{stage}")
            x, grid = embed(x)
            for attn, mlp in blocks["layers"]:
                x = mlp(attn(x, grid), grid)
                outputs.append(x)
            x = rearrange(x, "b (h w) d -> b d h w", h=grid[0])                                 # a map, to be halved
        return outputs
