"""
ViL, the vision Longformer (https://arxiv.org/abs/2103.15358), as EsViT trains it: a network of stages whose first maps
are too large for full attention (chunk_attention.py).

Names are those of EsViT's files: layer1.0 is the patch embedding of the first stage, then attention (layer1.1) and MLP
(layer1.2) take turns. Shapes: B images, N tokens of a map (h, w), G global tokens, which come first, D width.
"""
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from nets.chunk_attention import ChunkAttention, FullAttention
from vit import MLP, Pyramid, ViT, drop_path, pair

VILS = {
    "vil_mini": dict(dims=(48, 96), depths=(2, 4), heads=(2, 4), sparse=(True, False), global_tokens=(1, 0), window=3,
                     mode=1),                                   # our own, for images of 32 to 64 pixels
    # 27.57 M parameters, as the command in EsViT's README builds it.
    "vil_tiny": dict(dims=(96, 192, 384, 768), depths=(2, 2, 6, 2), heads=(3, 6, 12, 24), mode=1),
}


def vil_options(state, config):
    """The options of ViL that tensors by name, and what is stored beside them, show. ValueError where nothing tells the
    heads: with absolute positions they leave no trace in the tensors."""
    stages = [f"layer{i}." for i in range(1, 1 + sum(name.endswith(".0.proj.weight") for name in state))]
    first, fc1 = state["layer1.0.proj.weight"], state["layer1.2.mlp.fc1.weight"]
    tables = [state.get(f"{stage}1.attn.local_relative_position_bias_table") for stage in stages]
    clses = [state.get(f"{stage}0.cls_token") for stage in stages]
    depths = tuple(sum(name.startswith(stage) and name.endswith(".attn.proj.weight") for name in state)
                   for stage in stages)
    sparse = tuple(f"{stage}1.attn.query.weight" in state for stage in stages)
    relative, patch = tables[0] is not None, first.shape[-1]
    window, size, heads = config.get("window") or 7, config.get("img_size"), config.get("heads")
    if relative:
        heads = [table.shape[1] for table in tables]
    if not isinstance(heads, (list, tuple)):
        raise ValueError("a ViL with absolute positions whose file does not say the heads of each stage")
    if relative and sparse[0]:                                  # (4 * window - 1)^2 offsets
        window = (round(len(tables[0]) ** 0.5) + 1) // 4
    if not size and relative and not sparse[-1]:                # (2 * side - 1)^2 offsets on a map of that side
        size = (round(len(tables[-1]) ** 0.5) + 1) // 2 * patch << len(stages) - 1
    if not size and not relative:
        size = state["layer1.0.x_pos_embed"].shape[1] * patch
    own = state.get("layer1.1.attn.query_global.weight")        # files have shared weights twice, under both names
    share = own is None or torch.equal(own, state["layer1.1.attn.query.weight"])
    return dict(dims=tuple(len(state[f"{stage}0.proj.weight"]) for stage in stages), depths=depths, heads=tuple(heads),
                sparse=sparse, global_tokens=tuple(0 if cls is None else cls.shape[1] for cls in clses), window=window,
                relative=relative, mode=config.get("mode") or 0, exact=config.get("exact") or 0, share=share,
                avg_pool=bool(config.get("avg_pool")), mlp_ratio=len(fc1) / fc1.shape[1], patch_size=patch,
                in_chans=first.shape[1], img_size=pair(size or 224), eps=config.get("eps") or 1e-6)


class VilBranch(nn.Module):
    """x + part(norm(x)), where the part is attention or an MLP; stochastic depth leaves it out for some images."""

    def __init__(self, dim, name, part, rate, eps):
        super().__init__()
        self.norm, self.name, self.rate = nn.LayerNorm(dim, eps=eps), name, rate
        self.add_module(name, part)                             # "attn" or "mlp"

    def forward(self, x, *grid):
        branch = self.get_submodule(self.name)(self.norm(x), *grid)
        return x + (drop_path(branch, self.rate) if self.training and self.rate else branch)


class VilEmbedding(nn.Module):
    """Merge p x p neighbours of a map into a token, and put G new global tokens before them."""

    def __init__(self, in_chans, dim, p, tokens, eps, grid=None):
        super().__init__()
        self.tokens, self.grid = tokens, grid
        self.proj, self.norm_embed = nn.Conv2d(in_chans, dim, p, p), nn.LayerNorm(dim, eps=eps)
        if tokens:
            self.cls_token = nn.Parameter(torch.empty(1, tokens, dim))
            nn.init.trunc_normal_(self.cls_token, std=0.02)
        if grid:                                                # learned positions: rows and columns apart
            self.x_pos_embed = nn.Parameter(torch.empty(1, grid[0], dim // 2))
            self.y_pos_embed = nn.Parameter(torch.empty(1, grid[1], dim // 2))
            self.cls_pos_embed = nn.Parameter(torch.empty(1, tokens, dim))
            for table in (self.x_pos_embed, self.y_pos_embed, self.cls_pos_embed):
                nn.init.trunc_normal_(table, std=0.02)

    def positions(self, h, w):
        """The positions of G global and h * w local tokens, (1, G + h * w, D). As published they are resized by the
        root of the ratio of tokens, global ones counted on one side only: so even to the size that they have."""
        rows = rearrange(self.x_pos_embed, "1 h d -> 1 d h 1").expand(-1, -1, -1, self.grid[1])
        columns = rearrange(self.y_pos_embed, "1 w d -> 1 d 1 w").expand(-1, -1, self.grid[0], -1)
        table, count = torch.cat([rows, columns], 1), self.grid[0] * self.grid[1]               # (1, D, h, w)
        if h * w + self.tokens != count:
            if h != w or self.grid[0] != self.grid[1]:
                raise ValueError(f"absolute positions of ViL need square maps, not {h} x {w}: give relative=True")
            scale = ((h * w + self.tokens) / count) ** 0.5
            table = F.interpolate(table.float(), scale_factor=scale, mode="bicubic", align_corners=False)
        return torch.cat([self.cls_pos_embed, rearrange(table, "1 d h w -> 1 (h w) d")], 1)

    def forward(self, x):                                       # a map (B, C, h, w) -> tokens (B, G + N, D), their grid
        x = self.proj(x)
        grid = x.shape[-2:]
        x = self.norm_embed(rearrange(x, "b d h w -> b (h w) d"))
        if self.tokens:
            x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1)
        return x + self.positions(*grid) if self.grid else x, grid


class ViL(Pyramid):
    """ViL: image -> maps of tokens, halved from stage to stage -> one feature vector -> logits.

    img_size       decides how many relative positions stages with full attention have; others are resized
    dims, depths, heads, sparse, global_tokens    of each stage. A stage is sparse or has full attention
    window         the side of a chunk, in tokens
    relative       relative positions in all attention, and no absolute ones; else absolute ones before each stage
    mode           sparse attention sees all nine chunks (0), its own alone (-1), or while it trains its own and one
                   other, drawn anew for each layer and call (1)
    exact          0: all of nine chunks; 1: a token sees `window` tokens to each side of itself; -1: maps are rings
    share          global tokens ask with the weights of the others
    avg_pool       the feature is the mean of all tokens; else the last stage's first global token, if it has any
    """

    def __init__(self, img_size=224, patch_size=4, in_chans=3, dims=(96, 192, 384, 768), depths=(2, 2, 6, 2),
                 heads=(3, 6, 12, 24), sparse=(True, True, False, False), global_tokens=(1, 1, 1, 0), window=7,
                 relative=True, mode=0, exact=0, share=True, avg_pool=False, mlp_ratio=4.0, num_classes=0,
                 drop_path=0.0, eps=1e-6):
        super().__init__()
        if mode not in (-1, 0, 1) or exact not in (-1, 0, 1):
            raise ValueError(f"mode and exact of a ViL are -1, 0 or 1, not {mode} and {exact}")
        self.config = dict(img_size=pair(img_size), patch_size=patch_size, in_chans=in_chans, dims=dims, depths=depths,
                           heads=heads, sparse=sparse, global_tokens=global_tokens, window=window, relative=relative,
                           mode=mode, exact=exact, share=share, avg_pool=avg_pool, mlp_ratio=mlp_ratio,
                           num_classes=num_classes, drop_path=drop_path, eps=eps)
        self.patch_size, self.stages, self.depth, self.width = patch_size, len(depths), sum(depths), dims[-1]
        maps = self.maps(*pair(img_size))
        self.grid = maps[-1]
        if global_tokens[-1] and not avg_pool:
            self.pool = "cls"
        rates = iter([drop_path * i / max(self.depth - 1, 1) for i in range(self.depth)])
        stages = zip(maps, dims, depths, heads, sparse, global_tokens, strict=True)
        for number, (grid, dim, depth, h, chunked, tokens) in enumerate(stages, 1):
            p, channels = (2, dims[number - 2]) if number > 1 else (patch_size, in_chans)
            stage = [VilEmbedding(channels, dim, p, tokens, eps, None if relative else grid)]
            for _ in range(depth):
                if chunked:
                    attn = ChunkAttention(dim, h, tokens, window, relative, mode, exact, share)
                else:
                    attn = FullAttention(dim, h, tokens, grid if relative else None)
                rate = next(rates)
                stage.append(VilBranch(dim, "attn", attn, rate, eps))
                stage.append(VilBranch(dim, "mlp", MLP(dim, mlp_ratio), rate, eps))
            self.add_module(f"layer{number}", nn.ModuleList(stage))
        self.norm = nn.LayerNorm(self.width, eps=eps)
        self.head = nn.Linear(self.width, num_classes) if num_classes else nn.Identity()
        self.apply(ViT.init_weights)

    def maps(self, height, width):
        """The grids (h, w) of all stages; an odd row or column is left out. ValueError when nothing is left, or when
        patches do not tile the image."""
        maps = [ViT.grid_of(self, height, width)]
        while len(maps) < self.stages:
            maps.append((maps[-1][0] // 2, maps[-1][1] // 2))
        if 0 in maps[-1]:
            raise ValueError(f"a {height}x{width} image is too small for {self.stages} stages of a ViL with patches of "
                             f"{self.patch_size} pixels: {self.patch_size << self.stages - 1} on a side are the least")
        return maps

    def block_outputs(self, img):
        """Images (B, C, height, width) of any size that patches tile -> the tokens after each block, (B, G + N, D)."""
        x, grid, outputs = img, None, []
        self.maps(*img.shape[-2:])                              # refuses what does not fit
        for number in range(1, self.stages + 1):
            embed, *branches = self.get_submodule(f"layer{number}")
            if number > 1:                                      # the global tokens of a stage end with it
                x = rearrange(x[:, -grid[0] * grid[1]:], "b (h w) d -> b d h w", h=grid[0])
            x, grid = embed(x)
            for attn, mlp in zip(branches[::2], branches[1::2]):
                x = mlp(attn(x, grid))
                outputs.append(x)
        return outputs

    def view(self, x, block):
        """Tokens (B, G + N, D) after the block of this number -> (B, D): a global token, or without any the mean."""
        first, stage = self.config["depths"][0], 0
        while block >= first:
            stage += 1
            first += self.config["depths"][stage]
        if self.config["global_tokens"][stage] and not self.config["avg_pool"]:
            return x[:, 0]
        return x.mean(1)

    def view_and_regions(self, img):
        view, x = super().view_and_regions(img)
        return view, x[:, 1:] if self.pool == "cls" else x
