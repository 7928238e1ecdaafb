"""
Decoder blocks whose tokens look at another network's tokens as well: BootMAE's.
https://arxiv.org/abs/2207.07116

Shapes: B images; n tokens of width E that ask, m tokens of width D that are asked; H heads.
"""
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from vit import MLP


class DecoderAttention(nn.Module):
    """Multi-head attention of tokens to themselves, or to those of a source.

    dim     their width, which the heads need not divide: the rest is left out, so that 12 heads of 512 channels have 42
            each and 504 together, as published
    source  width of the source's tokens; None: attention to themselves. Queries and values have biases, keys have none
    """

    def __init__(self, dim, heads, source=None):
        super().__init__()
        self.heads, self.inner, self.cross = heads, dim // heads * heads, source is not None
        if not self.inner:
            raise ValueError(f"{heads} heads are more than the {dim} channels of a decoder")
        if self.cross:
            self.q = nn.Linear(dim, self.inner, bias=False)
            self.kv = nn.Linear(source, 2 * self.inner, bias=False)
        else:
            self.qkv = nn.Linear(dim, 3 * self.inner, bias=False)
        self.q_bias, self.v_bias = (nn.Parameter(torch.zeros(self.inner)) for _ in range(2))
        self.proj = nn.Linear(self.inner, dim)

    def forward(self, x, source):
        """Tokens x (B, n, E) ask the tokens source (B, m, D), or (B, m, E) of their own kind -> (B, n, E)."""
        if self.cross:
            q_weight, kv_weight = self.q.weight, self.kv.weight
        else:
            q_weight, kv_weight = self.qkv.weight.split([self.inner, 2 * self.inner])
        q = F.linear(x, q_weight, self.q_bias)                                                  # (B, n, inner)
        # A bias of keys would add the same to all logits of a query, and cancel in the softmax.
        kv_bias = torch.cat([torch.zeros_like(self.v_bias), self.v_bias])
        k, v = F.linear(source, kv_weight, kv_bias).chunk(2, -1)                                # (B, m, inner) each
        q, k, v = (rearrange(t, "b n (h d) -> b h n d", h=self.heads) for t in (q, k, v))
        x = F.scaled_dot_product_attention(q, k, v)             # softmax(q k^T / sqrt(inner / H)) v
        return self.proj(rearrange(x, "b h n d -> b n (h d)"))


class DecoderBlock(nn.Module):
    """Attention to each other, then to the source, then an MLP, each added after a norm. Norms are numbered as
    published: 1 before the first attention, 3 and 4 before the second (its queries, its source), 2 before the MLP."""

    def __init__(self, dim, heads, source, mlp_ratio=4.0, eps=1e-6):
        super().__init__()
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(dim, eps=eps) for _ in range(3))
        self.norm4 = nn.LayerNorm(source, eps=eps)
        self.attn, self.c_attn = DecoderAttention(dim, heads), DecoderAttention(dim, heads, source)
        self.mlp = MLP(dim, mlp_ratio)

    def forward(self, x, source, first=0):
        """Tokens x (B, n, E) and the source's (B, m, D) -> (B, n - first, E): those from number `first` on."""
        normed = self.norm1(x)                                                                  # (B, n, E)
        x = x[:, first:] + self.attn(normed[:, first:], normed)         # all are asked, only these ask
        x = x + self.c_attn(self.norm3(x), self.norm4(source))          # what the encoder knows
        return x + self.mlp(self.norm2(x))
