"""
From the tokens of a ViT or Swin to maps of several scales, and from these to a class for each pixel.

Shapes: B images, N tokens, D width, K classes, (h, w) the size of a map. A map of stride s has a cell for s x s pixels.
Names of parameters are those of mmsegmentation's EncoderDecoder, so `neck` and `decode_head` exchange weights with it.
Semantic-FPN is https://arxiv.org/abs/1901.02446, section 4.1; the neck of a ViT is MAE-Lite's.
"""
import torch
import torch.distributed as dist
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from vit import Swin


class MeanOverRanks(torch.autograd.Function):
    """Tensors (...) of W processes -> their mean, on each; gradients flow back to all."""

    @staticmethod
    def forward(ctx, x):
        x = x / dist.get_world_size()
        dist.all_reduce(x)
        return x

    backward = staticmethod(lambda ctx, grad: MeanOverRanks.forward(ctx, grad))     # what all processes make of ours


class BatchNorm(nn.BatchNorm2d):
    """BatchNorm2d over the pixels of all processes, with its names and numbers, in fp32. nn.SyncBatchNorm has no CPU
    kernel; this needs only sums, which every backend has. Statistics that are not finite are not kept."""

    def forward(self, x):                                       # (B, D, h, w)
        x = x.float()                                           # also under autocast
        if not self.training:
            return super().forward(x)
        if dist.is_initialized() and dist.get_world_size() > 1:
            out, mean, var = self.normalize_over_ranks(x)
        else:
            # With a momentum of 1 the kernel hands out the statistics of this batch instead of mixing them in.
            mean, var = torch.zeros_like(self.running_mean), torch.ones_like(self.running_var)
            out = F.batch_norm(x, mean, var, self.weight, self.bias, True, 1.0, self.eps)
        with torch.no_grad():
            self.num_batches_tracked += 1
            for kept, new in ((self.running_mean, mean), (self.running_var, var)):
                # The step of a batch with a NaN in it is skipped, so it must leave no NaN here either.
                kept.lerp_(torch.where(new.isfinite(), new, kept), self.momentum)
        return out

    def normalize_over_ranks(self, x):
        """x (B, D, h, w) of each process -> the same shape, normalised; mean and unbiased variance over all, (D,)."""
        mean = MeanOverRanks.apply(x.mean((0, 2, 3)))                                           # (D,)
        x = x - mean.view(-1, 1, 1)
        var = MeanOverRanks.apply(x.square().mean((0, 2, 3)))                                   # (D,)
        scale, pixels = self.weight * (var + self.eps).rsqrt(), dist.get_world_size() * x.numel() / x.shape[1]
        out = torch.addcmul(self.bias.view(-1, 1, 1), x, scale.view(-1, 1, 1))
        return out, mean.detach(), var.detach() * pixels / (pixels - 1)


# ----------------------------------------------------------------------------------------------------------------
# Maps of a network, and the neck that gives those of a ViT different strides


def default_taps(depth):
    """The blocks, counted from 1, after which a ViT's tokens are tapped: 4, 6, 8 and 12 of 12, as published."""
    return tuple(max(1, round(depth * part)) for part in (1 / 3, 1 / 2, 2 / 3, 1))


def tapped_maps(backbone, img, taps):
    """Images (B, C, H, W) -> a ViT's patch tokens after each block of `taps`, all of stride p, or the last map of each
    stage of a Swin, each half as large as the one before: a list of (B, D, h, w). No final norm, as published."""
    if isinstance(backbone, Swin):
        outputs, last = backbone.block_outputs(img), -1
        maps = []
        for depth, grid in zip(backbone.config["depths"], backbone.maps(*img.shape[-2:])):
            last += depth
            maps.append(rearrange(outputs[last], "b (h w) d -> b d h w", h=grid[0]))
        return maps
    x, after = backbone.embed(img), {}                                                          # (B, 1 + N, D)
    for number, block in enumerate(backbone.blocks[:max(taps)], 1):
        x = after[number] = block(x)                            # cls stays among the tokens, and is dropped from maps
    height = backbone.grid_of(*img.shape[-2:])[0]
    return [rearrange(after[tap][:, 1:], "b (h w) d -> b d h w", h=height) for tap in taps]


def last_map(backbone, img):
    """Images (B, C, H, W) -> the normed patch tokens of the last block as one map (B, D, h, w)."""
    x = backbone.encode(img)
    if not isinstance(backbone, Swin):
        x = backbone.fc_norm(x[:, 1:])                          # of a ViT's two norms one does nothing
    return rearrange(x, "b (h w) d -> b d h w", h=backbone.grid_of(*img.shape[-2:])[0])


class Neck(nn.Module):
    """Four maps of a ViT (B, D, h, w) of stride p -> maps (B, D / 4, ...) of strides p/4, p/2, p and 2p."""

    def __init__(self, dim):
        super().__init__()
        out = dim // 4
        # Only the first branch has a norm, as published.
        self.upsample_4x = nn.Sequential(nn.ConvTranspose2d(dim, out, 2, 2), BatchNorm(out), nn.GELU(),
                                         nn.ConvTranspose2d(out, out, 2, 2))
        self.upsample_2x = nn.Sequential(nn.ConvTranspose2d(dim, out, 2, 2))
        self.identity = nn.Conv2d(dim, out, 1)
        self.downsample_2x = nn.Sequential(nn.Conv2d(dim, out, 1), nn.MaxPool2d(2, 2))

    def forward(self, maps):
        branches = self.upsample_4x, self.upsample_2x, self.identity, self.downsample_2x
        return [branch(x) for branch, x in zip(branches, maps, strict=True)]


class StageNorms(nn.Module):
    """The neck of a Swin, whose stages have different strides already: a norm for the channels of each map."""

    def __init__(self, widths, eps):
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(width, eps=eps) for width in widths])

    def forward(self, maps):
        return [norm(x.movedim(1, -1)).movedim(-1, 1) for norm, x in zip(self.norms, maps, strict=True)]


# ----------------------------------------------------------------------------------------------------------------
# Heads: maps -> logits (B, K, h, w)


class ConvBlock(nn.Module):
    """3 x 3 convolution without bias, BatchNorm, ReLU: (B, D, h, w) -> (B, E, h, w)."""

    def __init__(self, dim, out):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(dim, out, 3, padding=1, bias=False), BatchNorm(out)

    def forward(self, x):
        return F.relu(self.bn(self.conv(x)))


class FPNHead(nn.Module):
    """Semantic-FPN: convolutions and doublings bring each map to the stride of the first one, and all are added.

    widths: channels of the maps, each of which is half as large as the one before. dropout: of whole channels.
    """

    def __init__(self, widths, classes, channels=128, dropout=0.1):
        super().__init__()
        self.scale_heads = nn.ModuleList()
        for level, width in enumerate(widths):
            layers = []
            for i in range(max(1, level)):                      # 1, 1, 2, 3 convolutions
                layers.append(ConvBlock(channels if i else width, channels))
                if level:                                       # a doubling after each, but for the first map
                    layers.append(nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False))
            self.scale_heads.append(nn.Sequential(*layers))
        self.dropout, self.conv_seg = nn.Dropout2d(dropout), nn.Conv2d(channels, classes, 1)
        for layer in self.modules():                            # ReLUs follow: the start of He et al., as in mmcv
            if isinstance(layer, nn.Conv2d) and layer is not self.conv_seg:
                nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
        nn.init.normal_(self.conv_seg.weight, std=0.01)
        nn.init.zeros_(self.conv_seg.bias)

    def forward(self, maps):
        x = sum(head(x) for head, x in zip(self.scale_heads, maps, strict=True))                # (B, E, h, w)
        return self.conv_seg(self.dropout(x))


class LinearHead(nn.Module):
    """BatchNorm and a 1 x 1 convolution on one map: what frozen features know (DINOv2's evaluation)."""

    def __init__(self, width, classes):
        super().__init__()
        self.bn, self.conv_seg = BatchNorm(width), nn.Conv2d(width, classes, 1)
        nn.init.normal_(self.conv_seg.weight, std=0.01)
        nn.init.zeros_(self.conv_seg.bias)

    def forward(self, maps):
        return self.conv_seg(self.bn(maps[-1]))
