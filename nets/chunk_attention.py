"""
Attention for maps that are too large to be seen whole (vision Longformer, https://arxiv.org/abs/2103.15358). A map is
cut into chunks; each token sees the global tokens, the chunk that it lies in, and the eight around it. Global tokens
see everything, and so do all tokens of the small maps at the end of the network.

Shapes: B images, N tokens of a map (h, w), G global tokens, which come first, D width, H heads, d = D / H; a map has n
chunks of T = side^2 tokens, and a token looks into m of them.
"""
from functools import cache

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from vit import Attention, relative_index, window_layout

OWN = 4                                                         # the place of a chunk among its 3 x 3 neighbours


@cache
def cached_chunk_layout(height, width, side, exact, device):
    """The chunks around each chunk of a map, in reading order: which they are, (9, n), and which of their tokens each
    token may look at, (n, T or 1, 9, T). exact: see ViL."""
    with torch.inference_mode(False):                           # kept for later calls, which may need gradients
        down, across = -(-height // side), -(-width // side)    # chunks, the last of them with padding
        number, offset = torch.arange(down * across, device=device), torch.arange(9, device=device).unsqueeze(1)
        y, x = number // across + offset // 3 - 1, number % across + offset % 3 - 1             # (9, n) each
        far_y, far_x = (y < 0) | (y >= down), (x < 0) | (x >= across)                           # beyond an edge
        y, x = y % down, x % across                             # there lies the other edge of the map
        cell = torch.arange(side ** 2, device=device)
        rows, columns = y.unsqueeze(2) * side + cell // side, x.unsqueeze(2) * side + cell % side       # (9, n, T)
        far_y, far_x = far_y.unsqueeze(2), far_x.unsqueeze(2)
        if exact == -1:
            seen = (far_y | (rows < height)) & (far_x | (columns < width))
        else:
            seen = ~far_y & ~far_x & (rows < height) & (columns < width)                        # padding is not seen
        seen = rearrange(seen, "m n t -> n 1 m t")
        if exact == 1:                                          # within a window around each token, not each chunk
            away = chunk_offsets(side, device)                                                  # (2, T, 9, T)
            seen = seen & (away.abs() <= side).all(0)
        return y * across + x, seen


@torch.compiler.assume_constant_result                          # else the compiler would trace through the cache
def chunk_layout(*arguments):
    return cached_chunk_layout(*arguments)


def chunk_offsets(side, device=None):
    """From each token of the 3 x 3 chunks to each token of the middle one: rows and columns, (2, T, 9, T)."""
    cell, chunk = torch.arange(side ** 2, device=device), torch.arange(9, device=device).unsqueeze(1)
    query, key = torch.stack([cell // side, cell % side]), torch.stack([chunk // 3 - 1, chunk % 3 - 1])
    key = key * side + query.unsqueeze(1)                                                       # (2, 9, T)
    return query.view(2, -1, 1, 1) - key.unsqueeze(1)


def attend(q, k, v, bias):
    """softmax(q k^T / sqrt(d) + bias) v. A CPU has no fused kernel for a bias that learns, and this is faster there."""
    if q.is_cuda or not bias.requires_grad:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    logits = (q * q.shape[-1] ** -0.5) @ k.mT
    logits += bias
    return logits.softmax(-1) @ v


def draw_neighbour(device):
    """One of the eight chunks around a chunk, by its place among all nine."""
    drawn = torch.randint(8, (1,), device=device)
    return drawn + (drawn >= OWN)


def add_relative_positions(attn, rows, heads, tokens):
    """Learned numbers for each head that are added to logits: of two local tokens by their offset (`rows` offsets), of
    a global and a local one (first the global token asks, then the local one), of two global ones."""
    attn.local_relative_position_bias_table = nn.Parameter(torch.empty(rows, heads))
    learned = [attn.local_relative_position_bias_table]
    if tokens:
        attn.g2l_relative_position_bias = nn.Parameter(torch.empty(2, heads, tokens))
        attn.g2g_relative_position_bias = nn.Parameter(torch.empty(heads, tokens, tokens))
        learned += [attn.g2l_relative_position_bias, attn.g2g_relative_position_bias]
    for table in learned:
        nn.init.trunc_normal_(table, std=0.02)


def global_bias(attn, count):
    """What is added where global tokens ask: all global tokens, then `count` local ones, (H, G, G + count)."""
    to_local = attn.g2l_relative_position_bias[0].unsqueeze(2).expand(-1, -1, count)
    return torch.cat([attn.g2g_relative_position_bias, to_local], 2)


class FullAttention(Attention):
    """Attention of all tokens, G global ones first. grid: the map (h, w) that relative positions are for; None: none"""

    def __init__(self, dim, heads, tokens, grid=None):
        super().__init__(dim, heads)
        self.tokens, self.relative = tokens, grid is not None
        if self.relative:
            add_relative_positions(self, (2 * grid[0] - 1) * (2 * grid[1] - 1), heads, tokens)
            self.register_buffer("offsets", relative_index(*grid), persistent=False)            # (N, N)

    def bias(self, count):
        """What is added to the logits of G global and `count` local tokens, (1, H, G + count, G + count)."""
        bias = F.embedding(self.offsets, self.local_relative_position_bias_table)
        bias = rearrange(bias, "q k h -> 1 h q k")
        if count != len(self.offsets):                          # as published: resized as if it were an image
            bias = F.interpolate(bias.float(), (count, count), mode="bicubic", align_corners=False)
        if not self.tokens:
            return bias
        to_global = rearrange(self.g2l_relative_position_bias[1], "h g -> 1 h 1 g").expand(-1, -1, count, -1)
        local = torch.cat([to_global, bias], 3)
        return torch.cat([global_bias(self, count).unsqueeze(0), local], 2)

    def forward(self, x, grid):
        q, k, v = rearrange(self.qkv(x), "b n (k h d) -> k b h n d", k=3, h=self.heads)
        bias = self.bias(x.shape[1] - self.tokens).to(q.dtype) if self.relative else None
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)                             # (B, H, G + N, d)
        return self.proj(rearrange(x, "b h n d -> b n (h d)"))

    def logits(self, x):
        """The attention before its softmax, (B, H, G + N, G + N)."""
        logits = super().logits(x)
        return logits + self.bias(x.shape[1] - self.tokens) if self.relative else logits


class ChunkAttention(nn.Module):
    """Attention to the global tokens and the 3 x 3 chunks around a token's own. Options: see ViL."""

    def __init__(self, dim, heads, tokens, side, relative, mode, exact, share):
        super().__init__()
        if dim % heads:
            raise ValueError(f"{heads} heads do not divide the width {dim}")
        self.heads, self.tokens, self.side, self.relative, self.mode = heads, tokens, side, relative, mode
        self.exact, self.share = exact, share
        self.query, self.kv, self.proj = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim), nn.Linear(dim, dim)
        if not share and tokens:                                # global tokens ask with weights of their own
            self.query_global, self.kv_global = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim)
            self.proj_global = nn.Linear(dim, dim)
        if relative:
            add_relative_positions(self, (4 * side - 1) ** 2, heads, tokens)
            down, across = chunk_offsets(side) + 2 * side - 1                                   # least is 0
            self.register_buffer("offsets", down * (4 * side - 1) + across, persistent=False)   # (T, 9, T)

    def chunks(self, device):
        """Which of the nine chunks are looked into. Mode 1 trains with two of them, the own one and one at random."""
        if self.mode == -1:
            return torch.tensor([OWN], device=device)
        if self.mode == 1 and self.training:
            return torch.cat([torch.tensor([OWN], device=device), draw_neighbour(device)])
        return torch.arange(9, device=device)

    def mask(self, seen, chunks, dtype):
        """What is added to the logits of local tokens, (1, H * n, T, G + m * T); the least number where nothing may be
        seen. seen (n, T or 1, 9, T); chunks (m,): see `chunks`."""
        seen = seen.index_select(2, chunks).flatten(2).unsqueeze(0)                             # (1, n, T or 1, m * T)
        bias = torch.zeros(self.heads, 1, self.side ** 2, seen.shape[-1], device=seen.device)
        to_global = torch.zeros(self.heads, 1, 1, self.tokens, device=seen.device)
        if self.relative:
            bias = F.embedding(self.offsets.index_select(1, chunks).flatten(1), self.local_relative_position_bias_table)
            bias = rearrange(bias, "q k h -> h 1 q k")
            if self.tokens:
                to_global = self.g2l_relative_position_bias[1].view(self.heads, 1, 1, -1)
        bias = torch.where(seen, bias.to(dtype), torch.finfo(dtype).min)                        # (H, n, T, m * T)
        return torch.cat([to_global.to(dtype).expand(*bias.shape[:3], -1), bias], 3).flatten(0, 1).unsqueeze(0)

    def forward(self, x, grid):
        """Tokens x (B, G + h * w, D) on the grid (h, w) -> the same shape."""
        weight = torch.cat([self.query.weight, self.kv.weight])
        qkv = F.linear(x, weight, torch.cat([self.query.bias, self.kv.bias]))                   # (B, G + N, 3 * D)
        local = self.attend_locally(qkv, grid)                                                  # (B, N, D)
        if not self.tokens:
            return self.proj(local)
        if self.share:
            return self.proj(torch.cat([self.attend_globally(qkv[:, :self.tokens], qkv), local], 1))
        first = torch.cat([self.query_global(x), self.kv_global(x)], 2)
        first = self.proj_global(self.attend_globally(first[:, :self.tokens], first))           # (B, G, D)
        return torch.cat([first, self.proj(local)], 1)

    def attend_locally(self, qkv, grid):
        """Local tokens ask the global ones and those of the chunks: qkv (B, G + N, 3 * D) -> (B, N, D)."""
        side, size = self.side, self.side ** 2
        order, place, _ = window_layout(*grid, side, 0, qkv.device)
        neighbours, seen = chunk_layout(*grid, side, self.exact, qkv.device)
        chunks = self.chunks(qkv.device)                                                        # (m,)
        around = neighbours.index_select(0, chunks).T.flatten()                                 # (n * m,)
        local = rearrange(qkv[:, self.tokens:], "b (h w) d -> b h w d", h=grid[0])
        if grid[0] % side or grid[1] % side:
            local = F.pad(local, (0, 0, 0, -grid[1] % side, 0, -grid[0] % side))
        local = local.flatten(1, 2).index_select(1, order)                                      # (B, n * T, 3 * D)
        q, *kv = rearrange(local, "b (n t) (k h d) -> k b h n (t d)", t=size, k=3, h=self.heads)
        q = rearrange(q, "b h n (t d) -> b (h n) t d", t=size)
        # Keys and values are copied to every chunk that looks at them, so that one product serves all chunks.
        k, v = (rearrange(x.index_select(2, around), "b h (n m) (t d) -> b (h n) (m t) d", m=len(chunks), t=size)
                for x in kv)                                                                    # (B, H * n, m * T, d)
        if self.tokens:                                         # every chunk sees the global tokens as well
            first = rearrange(qkv[:, :self.tokens], "b g (k h d) -> k b h 1 g d", k=3, h=self.heads)
            first = first.expand(-1, -1, -1, q.shape[1] // self.heads, -1, -1).flatten(2, 3)
            k, v = torch.cat([first[1], k], 2), torch.cat([first[2], v], 2)                     # (.., G + m * T, d)
        x = attend(q, k, v, self.mask(seen, chunks, q.dtype))
        return rearrange(x, "b (h n) t d -> b (n t) (h d)", h=self.heads).index_select(1, place)

    def attend_globally(self, asking, qkv):
        """The global tokens, asking (B, G, 3 * D), ask all tokens, qkv (B, G + N, 3 * D) -> (B, G, D)."""
        q, _, _ = rearrange(asking, "b g (k h d) -> k b h g d", k=3, h=self.heads)
        _, k, v = rearrange(qkv, "b n (k h d) -> k b h n d", k=3, h=self.heads)
        bias = global_bias(self, qkv.shape[1] - self.tokens).to(q.dtype) if self.relative else None
        return rearrange(F.scaled_dot_product_attention(q, k, v, attn_mask=bias), "b h g d -> b g (h d)")
