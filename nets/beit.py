"""
What fine-tuning adds to a plain ViT: relative positions, layer scale and keys without a bias (BEiT, and MAE-Lite's best
recipe), and a classifier with two heads. Pre-training needs none of these.
https://arxiv.org/abs/2106.08254 (BEiT), https://arxiv.org/abs/2103.17239 (layer scale)

Shapes: B images, N tokens with cls, D width, H heads, (h, w) the grid of patches.
"""
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from vit import Attention, Block, ViT, relative_index


def relative_index_with_cls(height, width):
    """Number each pair of tokens, query by key, cls first -> (1 + N, 1 + N): the pair's row in a table of relative
    positions. Patches have (2h - 1)(2w - 1) rows, by offset. The last three: cls to patch, patch to cls, cls to cls."""
    rows = (2 * height - 1) * (2 * width - 1)
    index = F.pad(relative_index(height, width), (1, 0, 1, 0), value=rows)
    index[1:, 0] = rows + 1
    index[0, 0] = rows + 2
    return index


def resize_relative(table, old, new):
    """Resize a table of relative positions (rows, H) from the grid `old` to `new`, bicubically. The three rows of cls
    stay; Swin's tables have none. The same grid returns the same tensor."""
    if tuple(old) == tuple(new):
        return table
    h, w = 2 * old[0] - 1, 2 * old[1] - 1
    offsets = rearrange(table[:h * w].float(), "(h w) d -> 1 d h w", h=h)
    size = 2 * new[0] - 1, 2 * new[1] - 1
    offsets = F.interpolate(offsets, size, mode="bicubic", align_corners=False)
    return torch.cat([rearrange(offsets, "1 d h w -> (h w) d").to(table.dtype), table[h * w:]])


def geometric_places(source, target):
    """Where the offsets of a table lie when it grows or shrinks -> places of its own offsets (source,), and of the new
    ones (target,). Both counts are odd. Neighbouring offsets are 1, q, q^2, ... apart from the middle outwards, so that
    near offsets keep their biases and only far ones spread out (BEiT). q, between 1.01 and 1.5, is the one whose steps
    add up to the new reach; it is found by halving, and stays at the bound that it runs into, as published."""
    low, high, half = 1.01, 1.5, source // 2
    while high - low > 1e-6:
        q = (low + high) / 2
        if sum(q ** k for k in range(half)) > target // 2:
            high = q
        else:
            low = q
    reach = torch.cumsum(torch.tensor([q ** k for k in range(half)], dtype=torch.float64), 0)
    return (torch.cat([-reach.flip(0), torch.zeros(1, dtype=torch.float64), reach]),
            torch.arange(target, dtype=torch.float64) - target // 2)


def spline_basis(x, knots, degree):
    """The B-splines of a degree at places x (n,) -> (n, len(knots) - degree - 1); recursion of Cox and de Boor."""
    last = torch.searchsorted(knots, knots[-1]) - 1             # the last interval that is not empty: x may be its end
    interval = (torch.searchsorted(knots, x, right=True) - 1).clamp(degree, last)
    basis = F.one_hot(interval, len(knots) - 1).double()                                        # (n, intervals)
    for d in range(1, degree + 1):
        left = (x.unsqueeze(1) - knots[:-d - 1]) / (knots[d:-1] - knots[:-d - 1])
        right = (knots[d + 1:] - x.unsqueeze(1)) / (knots[d + 1:] - knots[1:-d])
        # Where knots coincide there is no interval, and its spline is 0.
        basis = left.nan_to_num(0, 0, 0) * basis[:, :-1] + right.nan_to_num(0, 0, 0) * basis[:, 1:]
    return basis


def spline_weights(source, target):
    """The interpolating cubic spline as a matrix (target, source): values at the old places -> at the new ones. Beyond
    the outermost old places the value there counts."""
    if source == 1:
        return torch.ones(target, 1, dtype=torch.float64)
    places, wanted = geometric_places(source, target)
    degree, ends = min(3, source - 1), torch.ones(min(3, source - 1) + 1, dtype=torch.float64)
    # "Not a knot": the second place and the last but one are none.
    knots = torch.cat([places[0] * ends, places[2:-2], places[-1] * ends])
    wanted = wanted.clamp(places[0], places[-1])
    return torch.linalg.solve(spline_basis(places, knots, degree), spline_basis(wanted, knots, degree), left=False)


def resize_relative_geometric(table, old, new):
    """resize_relative as BEiT's dense tasks do it, for grids that grow a lot: a spline on a stretched axis.
    table (rows, H) of the grid `old` -> of the grid `new`; the three rows of cls stay. One axis after the other."""
    h, w = 2 * old[0] - 1, 2 * old[1] - 1
    offsets = rearrange(table[:h * w].double(), "(h w) d -> d h w", h=h)
    down, across = (spline_weights(2 * a - 1, 2 * b - 1) if a != b else torch.eye(2 * a - 1).double()
                    for a, b in zip(old, new))
    offsets = rearrange(down @ offsets @ across.T, "d h w -> (h w) d")
    return torch.cat([offsets.to(table.dtype), table[h * w:]])


class BeitAttention(Attention):
    """Attention that knows how far apart two tokens are.

    grid      (h, w): a learned number for each head and relative position is added to the logits, so that only images
              of this grid can be seen (else ValueError); None: nothing is added
    key_bias  False: queries and values have biases of their own, keys have none
    """

    def __init__(self, dim, heads, grid=None, key_bias=True):
        super().__init__(dim, heads)
        self.relative = grid is not None
        if not key_bias:
            self.qkv.bias = None
            self.q_bias = nn.Parameter(torch.zeros(dim))
            self.v_bias = nn.Parameter(torch.zeros(dim))
        if self.relative:
            rows = (2 * grid[0] - 1) * (2 * grid[1] - 1) + 3
            self.relative_position_bias_table = nn.Parameter(torch.zeros(rows, heads))
            self.register_buffer("relative_position_index", relative_index_with_cls(*grid))

    def project(self, x, count):
        """Tokens x (B, N, D) -> queries, keys and, if count is 3, values, (B, H, N, D / H) each."""
        bias, rows = self.qkv.bias, count * x.shape[-1]
        if bias is None:
            bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])         # (3 * D,)
        x = F.linear(x, self.qkv.weight[:rows], bias[:rows])
        return rearrange(x, "b n (k h d) -> k b h n d", k=count, h=self.heads)

    def relative_bias(self, tokens, first, dtype):
        """What relative positions add to the logits, (1, H, N - first, N)."""
        if tokens != len(self.relative_position_index):
            raise ValueError(f"relative positions of {len(self.relative_position_index)} tokens cannot take {tokens}: "
                             "such a network sees whole images of its own size")
        bias = F.embedding(self.relative_position_index[first:], self.relative_position_bias_table)
        return rearrange(bias, "q k h -> 1 h q k").to(dtype)

    def forward(self, x, first=0):
        """Tokens x (B, N, D) -> (B, N - first, D): only the tokens from number `first` on ask, all are asked."""
        q, k, v = self.project(x, 3)
        relative = self.relative_bias(x.shape[1], first, q.dtype) if self.relative else None
        x = F.scaled_dot_product_attention(q[:, :, first:], k, v, attn_mask=relative)
        return self.proj(rearrange(x, "b h n d -> b n (h d)"))

    def logits(self, x):
        """Tokens x (B, N, D) -> the attention before its softmax, relative positions included, (B, H, N, N)."""
        q, k = self.project(x, 2)
        logits = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
        return logits + self.relative_bias(x.shape[1], 0, logits.dtype) if self.relative else logits


class BeitBlock(Block):
    """A Block with BeitAttention. layer_scale: the start of a learned factor per channel on both branches; 0: none."""

    def __init__(self, dim, heads, mlp_ratio=4.0, drop_path=0.0, eps=1e-6, layer_scale=0.0, grid=None, key_bias=True):
        super().__init__(dim, heads, mlp_ratio, drop_path, eps)
        self.attn = BeitAttention(dim, heads, grid, key_bias)
        self.layer_scale = layer_scale
        if layer_scale:
            self.gamma_1 = nn.Parameter(torch.full((dim,), float(layer_scale)))
            self.gamma_2 = nn.Parameter(torch.full((dim,), float(layer_scale)))

    def forward(self, x, first=0):
        """Tokens x (B, N, D) -> (B, N - first, D): those from number `first` on."""
        branch = self.attn(self.norm1(x), first)
        x = self.add(x[:, first:], branch * self.gamma_1 if self.layer_scale else branch)
        branch = self.mlp(self.norm2(x))
        return self.add(x, branch * self.gamma_2 if self.layer_scale else branch)


class BeitViT(ViT):
    """A ViT, with ViT's options and these; without any of them it is the plain one.

    relative     learned relative positions in every block, beside the absolute ones
    layer_scale  the start of a learned factor per channel on every branch; 0: none
    key_bias     False: queries and values have biases of their own, keys have none
    """

    def __init__(self, *args, relative=False, layer_scale=0.0, key_bias=True, **options):
        super().__init__(*args, **options)
        self.config.update(relative=relative, layer_scale=layer_scale, key_bias=key_bias)
        if not relative and not layer_scale and key_bias:
            return
        dim, heads, mlp_ratio, eps = (self.config[k] for k in ("dim", "heads", "mlp_ratio", "eps"))
        grid = self.grid if relative else None
        for i, plain in enumerate(self.blocks):
            with torch.random.fork_rng(devices=[]):             # what is drawn here is overwritten by the next line
                block = BeitBlock(dim, heads, mlp_ratio, plain.drop_path, eps, layer_scale, grid, key_bias)
            block.load_state_dict(plain.state_dict(), strict=False)     # layers of both start as a plain ViT's do
            self.blocks[i] = block


class TwoHeads(BeitViT):
    """A classifier whose patches answer the labels and whose cls token answers a teacher (MAE-Lite's distillation of
    labels, after DeiT's). Needs pool "avg". Training: both logits, (B, num_classes) twice; evaluation: their mean."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        dim, classes = self.config["dim"], self.config["num_classes"]
        self.dist_norm = nn.LayerNorm(dim, eps=self.config["eps"])
        self.head_dist = nn.Linear(dim, classes)
        self.init_weights(self.head_dist)

    def forward(self, img):
        x = self.encode(img)                                                                    # (B, 1 + N, D)
        labels = self.head(self.fc_norm(x[:, 1:].mean(1)))                                      # (B, num_classes)
        teacher = self.head_dist(self.dist_norm(x[:, 0]))                                       # (B, num_classes)
        return (labels, teacher) if self.training else (labels + teacher) / 2
