"""Image operations on whole batches, on the device, with random numbers for each image: torchvision's transforms would
draw once and flip a whole batch. Letters: B images, C channels, h and w height and width."""
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def statistics(channels, mean=None, std=None):
    """The mean and standard deviation of each channel on the scale 0..1: the given ones, else ImageNet's for 3 channels
    and 0.5 and 0.25 otherwise. Raises ValueError if the given ones do not fit the channels."""
    mean = mean or (IMAGENET_MEAN if channels == 3 else (0.5,) * channels)
    std = std or (IMAGENET_STD if channels == 3 else (0.25,) * channels)
    if len(mean) != channels or len(std) != channels:
        raise ValueError(f"--mean and --std need {channels} numbers, one per channel, not {len(mean)} and {len(std)}")
    if not all(0 <= m <= 1 for m in mean) or not all(0 < s <= 1 for s in std):
        raise ValueError(f"--mean and --std are on the scale of 0 to 1, deviations above 0, not {mean} and {std}")
    return tuple(mean), tuple(std)


@lru_cache
def constants(values, device):
    """255 * values as a (C, 1, 1) tensor, made once: copying even three numbers to a GPU makes the host wait for it."""
    return 255 * torch.tensor(values, device=device).view(-1, 1, 1)


def normalize(img, mean, std):
    """uint8 (B, C, h, w) -> float32, (img / 255 - mean) / std for each channel."""
    mean, std = constants(mean, img.device), constants(std, img.device)
    if img.device.type != "cpu":
        return img.contiguous().float().sub_(mean).div_(std)
    out = torch.empty(img.shape)
    for part, into in zip(img.split(4), out.split(4)):          # four at a time stay in the cache: twice as fast
        into.copy_(part).sub_(mean).div_(std)
    return out


def denormalize(img, mean, std):
    """The inverse of normalize, clipped to 0..255: float (B, C, h, w) -> uint8."""
    img = img.float() * constants(std, img.device) + constants(mean, img.device)
    return img.round().clamp(0, 255).to(torch.uint8)


def random_flip(img, p=0.5):
    """Mirror each image left to right with probability p. img: (B, C, h, w) of any dtype, on a CPU changed in place."""
    flip = torch.rand(len(img), 1, 1, 1, device=img.device) < p
    if img.device.type != "cpu":
        return torch.where(flip, img.flip(-1), img)
    for i in flip.flatten().nonzero()[:, 0].tolist():           # one at a time stays in the cache: ten times as fast
        img[i] = img[i].flip(-1)
    return img


class Colours(NamedTuple):
    """What contrastive methods do to the colours of B views, floats in 0..255 (Pillow rounds after each change)."""
    order: torch.Tensor         # (B, 4) numbers of CHANGES in the order in which they are made, or -1
    factors: torch.Tensor       # (B, 4) of brightness, contrast, saturation (1: no change), and turn of the hue (0)
    grey: torch.Tensor          # (B,) bool
    radius: torch.Tensor        # (B,) of the blur in pixels, 0 for none
    solarize: torch.Tensor      # (B,) bool


def draw_colours(count, jitter=(0.4, 0.4, 0.2, 0.1), p_jitter=0.8, p_grey=0.2, p_blur=0.0, p_solarize=0.0):
    """Draw Colours for `count` images. jitter: how far factors may be from 1, and the turn of the hue from 0, as in
    torchvision's ColorJitter, which makes its four changes in a random order as well."""
    u, order = torch.rand(9, count), torch.rand(count, 4).argsort(1)
    factors = torch.tensor([1.0, 1.0, 1.0, 0.0]) + torch.tensor(jitter) * (2 * u[:4].T - 1)
    radius = (0.1 + (2.0 - 0.1) * u[4]) * (u[5] < p_blur)
    return Colours(order.where(u[6, :, None] < p_jitter, -1), factors, u[7] < p_grey, radius, u[8] < p_solarize)


def only(x, chosen, change, *numbers):
    """Change the images in the mask `chosen` (B,), each by its own of `numbers` (B, ...), in place or not. The mask and
    the numbers are on the host, which would wait for a GPU to count them."""
    which = chosen.nonzero()[:, 0]
    if not len(which):
        return x
    given = which, *(n[which].reshape(len(which), -1, 1, 1) for n in numbers)
    which, *numbers = ((t.pin_memory() if x.is_cuda else t).to(x.device, non_blocking=True) for t in given)
    return change(x, *numbers) if len(which) == len(x) else x.index_copy_(0, which, change(x[which], *numbers))


def grey(x):
    """(B, C, h, w) -> (B, 1, h, w), the luma of ITU-R 601, as in Pillow. Less than three channels stay."""
    if x.shape[1] < 3:
        return x
    return (x[:, :1] * 0.299).add_(x[:, 1:2], alpha=0.587).add_(x[:, 2:], alpha=0.114)


def hue(x, turn):
    """Turn the hue by `turn` of HSV's circle, at most a sixth either way. Within a sixth each new channel is linear in
    the three old ones, clipped to the pixel's least and greatest, which do not change: no hue is ever computed."""
    if x.shape[1] < 3:
        return x
    sixths, low, high = 6 * turn.abs(), x.amin(1, keepdim=True), x.amax(1, keepdim=True)
    after, before = (torch.where(way > 0, -1.0, 2 * sixths - 1) for way in (turn, -turn))
    new = torch.addcmul(x, x.roll(-1, 1), after).addcmul_(x.roll(1, 1), before)
    return new.add_((low + high) * (1 - sixths)).clamp_(low, high)


def blend(x, other, factor):
    rest = other * (1 - factor)                                 # first, because x, which `other` may be, changes
    return x.mul_(factor).add_(rest).clamp_(0, 255)


CHANGES = (lambda x, factor: x.mul_(factor).clamp_(0, 255),                                     # brightness
           lambda x, factor: blend(x, grey(x).mean((1, 2, 3), keepdim=True), factor),           # contrast
           lambda x, factor: blend(x, grey(x), factor),                                         # saturation
           hue)


def blur_kernels(radius):
    """(B,) -> (B, 13), kernels of Gaussian blurs with deviations of at most 2 pixels. As in Pillow each is three boxes
    one after the other, whose outermost pixels count in part."""
    spread = radius.unsqueeze(1) ** 2 / 3                       # the variance of one box
    whole = ((12 * spread + 1).sqrt() / 2 - 0.5).floor()
    part = (2 * whole + 1) * (whole * (whole + 1) - 3 * spread) / (6 * (spread - (whole + 1) ** 2))
    box = (1 + whole + part - torch.arange(-2, 3).abs()).clamp(0, 1)                            # (B, 5)
    kernel = box = box / box.sum(1, keepdim=True)
    for _ in range(2):
        kernel = sum(F.pad(kernel, (i, 4 - i)) * box[:, i:i + 1] for i in range(5))             # (B, 9), (B, 13)
    return kernel


def blur(x, kernel):
    """Blur each image with its own symmetric kernel (B, 13, 1, 1), down and across. Edges are mirrored, as Pillow's are
    in effect up to radius 1.4. One banded product for every 32 rows: faster on a CPU than a convolution."""
    for _ in range(2):
        side = x.shape[2]
        tile = min(32, side)
        wide = torch.cat([x[:, :, :6].flip(2), x, x[:, :, -6:].flip(2), x[:, :, :-side % tile]], 2)
        band = F.pad(kernel.flatten(1), (0, tile)).repeat(1, tile)[:, :tile * (tile + 12)]
        band = band.view(-1, 1, 1, tile, tile + 12)             # each row is the one above, moved by one
        x = (band @ wide.unfold(2, tile + 12, tile).mT).flatten(2, 3)[:, :, :side].mT           # (B, C, w, h)
    return x


def recolour(img, colours, mean, std):
    """Change images as drawn, then normalize: uint8 (B, C, h, w) -> float32. Of more channels the first three are
    taken for colours, and the others do not change. One or two have no hue and do not become grey.
    The published orders, grey before blur (MoCo-v3) and after (MAE-Lite), give the same, because both are linear."""
    out, cpu = torch.empty(img.shape, device=img.device), img.device.type == "cpu"
    few = 1 + 2 ** (17 if cpu else 25) // img[0].numel()        # at a time: on a CPU they stay in the cache
    everything = out, img, blur_kernels(colours.radius), *colours
    for into, part, kernel, *some in zip(*(t.split(few) for t in everything)):
        some, whole = Colours(*some), part.to(torch.float32, memory_format=torch.contiguous_format)
        x = whole[:, :3]
        for turn in some.order.T:                               # which change each image has now, (b,)
            for k in set(turn.tolist()) - {-1}:
                x = only(x, turn == k, CHANGES[k], some.factors[:, k])
        x = only(x, some.grey, lambda x: x.copy_(grey(x)))
        x = only(x, some.radius > 0, blur, kernel)
        x = only(x, some.solarize, lambda x: torch.minimum(x, 255 - x))                         # invert 128 and above
        x = x if x.shape == whole.shape else torch.cat([x, whole[:, 3:]], 1)
        torch.sub(x, constants(mean, img.device), out=into).div_(constants(std, img.device))
    return out
