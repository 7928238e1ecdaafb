"""
Image operations on whole batches, on the device, one random draw per image. Workers send uint8 crops; what follows is
here.

torchvision's own transforms draw once per call, so a batch would be flipped all together: that is why these exist.
"""
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def statistics(channels, mean=None, std=None):
    """Channel means and deviations on the 0..1 scale; ImageNet's for colour images, 0.5 and 0.25 for other channel
    counts. Raises ValueError when given ones do not fit the channels."""
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
    """uint8 (B, C, h, w) -> float32, (img / 255 - mean) / std per channel."""
    mean, std = constants(mean, img.device), constants(std, img.device)
    if img.device.type != "cpu":
        return img.contiguous().float().sub_(mean).div_(std)
    out = torch.empty(img.shape)
    for part, into in zip(img.split(4), out.split(4)):          # a few at a time stay in the cache: twice as fast
        into.copy_(part).sub_(mean).div_(std)
    return out


def denormalize(img, mean, std):
    """The inverse of normalize, clipped to what a picture can hold: float (B, C, h, w) -> uint8."""
    img = img.float() * constants(std, img.device) + constants(mean, img.device)
    return img.round().clamp(0, 255).to(torch.uint8)


def random_flip(img, p=0.5):
    """Mirror each image left to right with probability p; (B, C, h, w) of any dtype. On a CPU in place."""
    flip = torch.rand(len(img), 1, 1, 1, device=img.device) < p
    if img.device.type != "cpu":
        return torch.where(flip, img.flip(-1), img)
    for i in flip.flatten().nonzero()[:, 0].tolist():           # one at a time stays in the cache: ten times as fast
        img[i] = img[i].flip(-1)
    return img


# ----------------------------------------------------------------------------------------------------------------
# Resizing images of many sizes at once


def resize_weights(lengths, out, cubic, longest):
    """(B, out, longest): row j of sample b makes pixel j of `out` from its first lengths[b] pixels; antialiased, as
    Pillow and torch do it: the filter is stretched by lengths / out when that shrinks, and sums to 1.

    cubic: (B,) bool, Keys' cubic with a = -1/2, else the triangle.
    """
    device, lengths = lengths.device, lengths.view(-1, 1, 1)
    scale = lengths / out
    centre = (torch.arange(out, device=device).view(1, -1, 1) + 0.5) * scale
    at = torch.arange(longest, device=device).view(1, 1, -1)
    x = ((at + 0.5 - centre) / scale.clamp(min=1)).abs()                                        # (B, out, longest)
    keys = torch.where(x < 1, (1.5 * x - 2.5) * x * x + 1, ((2.5 - 0.5 * x) * x - 4) * x + 2) * (x < 2)
    weights = torch.where(cubic.view(-1, 1, 1), keys, (1 - x).clamp(min=0)) * (at < lengths)
    return weights / weights.sum(-1, keepdim=True)


def resize_each(imgs, size, cubic):
    """uint8 (C, h, w) of any sizes -> uint8 (B, C, *size), each resized on its own, as two batched matrix products.
    cubic: (B,) bool, bicubic or else bilinear. Exact sums, rounded once; 16 million pixels at a time."""
    done, first = [], 0
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")               # TF32 would be off by one here and there
    while first < len(imgs):
        last, height, width = first, 0, 0
        while last < len(imgs):
            height, width = max(height, imgs[last].shape[1]), max(width, imgs[last].shape[2])
            if last > first and (last + 1 - first) * height * width > 2 ** 24:
                break
            last += 1
        part, which, first = imgs[first:last], cubic[first:last], last
        heights, widths = (torch.tensor([img.shape[d] for img in part]) for d in (1, 2))
        padded = part[0].new_zeros(len(part), part[0].shape[0], heights.max(), widths.max())
        for img, into in zip(part, padded):
            into[:, :img.shape[1], :img.shape[2]] = img
        device = padded.device
        down, across = (resize_weights(n.to(device), out, which.to(device), k) for n, out, k in (
            (heights, size[0], padded.shape[2]), (widths, size[1], padded.shape[3])))
        with torch.autocast(device.type, enabled=False):
            x = padded.float() @ across.transpose(1, 2).unsqueeze(1)                            # (b, C, h, W)
            done.append((down.unsqueeze(1) @ x).round().clamp(0, 255).to(torch.uint8))          # (b, C, H, W)
    torch.set_float32_matmul_precision(precision)
    return torch.cat(done)


# ----------------------------------------------------------------------------------------------------------------
# Mixing and erasing: the laws, timm's, under which fine-tuning recipes were published


def soft_targets(labels, classes, smoothing=0.0):
    """Labels (B,) -> (B, classes): smoothing / classes for each class, and what is left of 1 for the label."""
    return torch.nn.functional.one_hot(labels, classes) * (1 - smoothing) + smoothing / classes


def mix_box(lam, y, x, height, width):
    """Cutmix's box about pixel (y, x), 1 - lambda of the image but for clipping -> top, bottom, left, right."""
    h, w = (int(side * (1 - lam) ** 0.5) // 2 for side in (height, width))  # an odd pixel is lost; not so in newer timm
    return max(y - h, 0), min(y + h, height), max(x - w, 0), min(x + w, width)


def draw_mix(mixup, cutmix, height, width, switch=0.5, prob=1.0):
    """One draw for `mix`: lambda from Beta(alpha, alpha), and cutmix's box or None. mixup, cutmix: their alphas, 0 for
    never; of both, cutmix with probability `switch`. From torch's CPU generator, so nothing waits for a GPU."""
    apply, which, y, x = torch.rand(4).tolist()
    if apply >= prob or not (mixup or cutmix):
        return 1.0, None
    cut = not mixup or cutmix and which < switch
    alpha = cutmix if cut else mixup
    lam = torch.distributions.Beta(alpha, alpha).sample().item()
    return lam, mix_box(lam, int(y * height), int(x * width), height, width) if cut else None


def mix(img, targets, lam, box=None):
    """Each image takes 1 - lam of every pixel, or the pixels in the box, which are then counted for lam, from the image
    at the mirrored place of the batch: floats (B, C, h, w), in place, and so its targets (B, classes). The middle image
    of an odd batch, which the official code refuses, is its own partner: it stays as it is."""
    if box:
        inside = img[:, :, box[0]:box[1], box[2]:box[3]]
        inside.copy_(inside.flip(0))
        lam = 1 - inside[0, 0].numel() / img[0, 0].numel()
    elif lam < 1:
        img.lerp_(img.flip(0), 1 - lam)
    return img, targets.lerp_(targets.flip(0), 1 - lam)


def random_mix(img, targets, mixup, cutmix, chunk=0, switch=0.5, prob=1.0):
    """`mix`, drawn anew for every `chunk` images (0: once for all). Published runs mix the batch of one GPU, 128."""
    for part, soft in zip(img.split(chunk or len(img)), targets.split(chunk or len(img))):
        mix(part, soft, *draw_mix(mixup, cutmix, *img.shape[-2:], switch, prob))
    return img, targets


def erase_mask(count, p, height, width, device):
    """(count, 1, height, width), with probability p true in a rectangle: of ten the first that fits, 1/50 to 1/3 of the
    image, height / width log-uniform in 0.3 to 1 / 0.3. torchvision's has 0.33 and 3.3, and one for a whole batch."""
    u, v = torch.rand(2, count, 10, device=device), torch.rand(3, count, 1, device=device)
    area, aspect = (0.02 + (1 / 3 - 0.02) * u[0]) * (height * width), 0.3 ** (1 - 2 * u[1])
    h, w = (area * aspect).sqrt().round(), (area / aspect).sqrt().round()                       # (count, 10)
    fits = (h < height) & (w < width)
    h, w = (side.gather(1, fits.int().argmax(1, keepdim=True)) for side in (h, w))              # (count, 1)
    top, left = (v[0] * (height - h + 1)).floor(), (v[1] * (width - w + 1)).floor()
    y, x = torch.arange(height, device=device), torch.arange(width, device=device)
    rows = (y >= top) & (y < top + h) & fits.any(1, keepdim=True) & (v[2] < p)                  # (count, height)
    return rows[:, None, :, None] & ((x >= left) & (x < left + w))[:, None, None]


def erase(img, p):
    """Random erasing (https://arxiv.org/abs/1708.04896): a rectangle of each normalised image, with probability p,
    becomes noise, N(0, 1) per pixel and channel. Floats (B, C, h, w); on a CPU in place."""
    if not p:
        return img
    inside = erase_mask(len(img), p, *img.shape[-2:], img.device)
    if img.device.type != "cpu":
        return torch.where(inside, torch.randn_like(img), img)
    return img.masked_scatter_(inside, torch.randn(int(inside.sum()) * img.shape[1]))


# ----------------------------------------------------------------------------------------------------------------
# Colour: what contrastive methods do to their views, on float pixels of 0..255. Draws are made on the host, and every
# change is made of the images it was drawn for and no others. Nothing is rounded in between; Pillow rounds each time.


class Colours(NamedTuple):
    """What to do to each of B images."""
    order: torch.Tensor         # (B, 4): numbers of CHANGES in the order of their turn, or -1
    factors: torch.Tensor       # (B, 4): of brightness, contrast, saturation (1 changes nothing); turn of the hue (0)
    grey: torch.Tensor          # (B,) bool
    radius: torch.Tensor        # (B,) of the blur, in pixels; 0 for none
    solarize: torch.Tensor      # (B,) bool


def draw_colours(count, jitter=(0.4, 0.4, 0.2, 0.1), p_jitter=0.8, p_grey=0.2, p_blur=0.0, p_solarize=0.0,
                 radii=(0.1, 2.0)):
    """Colours for `count` images. jitter: how far the factors reach from 1, and the hue from 0, up and down, as in
    torchvision's ColorJitter, whose four changes come in an order that is drawn, too."""
    u, order = torch.rand(9, count), torch.rand(count, 4).argsort(1)
    factors = torch.tensor([1.0, 1.0, 1.0, 0.0]) + torch.tensor(jitter) * (2 * u[:4].T - 1)
    radius = (radii[0] + (radii[1] - radii[0]) * u[4]) * (u[5] < p_blur)
    return Colours(order.where(u[6, :, None] < p_jitter, -1), factors, u[7] < p_grey, radius, u[8] < p_solarize)


def only(x, chosen, change, *numbers):
    """x (B, C, h, w) with `change` made, in place or not, of the images in the mask `chosen` (B,), each with its own of
    `numbers` (B, ...). Masks and numbers are on the host: nobody has to wait for a GPU to count."""
    which = chosen.nonzero()[:, 0]
    if not len(which):
        return x
    given = which, *(n[which].reshape(len(which), -1, 1, 1) for n in numbers)
    which, *numbers = ((t.pin_memory() if x.is_cuda else t).to(x.device, non_blocking=True) for t in given)
    return change(x, *numbers) if len(which) == len(x) else x.index_copy_(0, which, change(x[which], *numbers))


def grey(x):
    """(B, C, h, w) -> (B, 1, h, w), the luma of ITU-R 601 as Pillow's; one channel is grey already."""
    if x.shape[1] == 1:
        return x
    return (x[:, :1] * 0.299).add_(x[:, 1:2], alpha=0.587).add_(x[:, 2:], alpha=0.114)


def hue(x, turn):
    """Colours turned by `turn` of HSV's circle, at most a sixth either way. So near, each new channel is a line in the
    three old ones, cut off at the pixel's least and greatest, which stay: no hue is ever computed."""
    if x.shape[1] == 1:
        return x
    sixths, low, high = 6 * turn.abs(), x.amin(1, keepdim=True), x.amax(1, keepdim=True)
    after, before = (torch.where(way > 0, -1.0, 2 * sixths - 1) for way in (turn, -turn))
    new = torch.addcmul(x, x.roll(-1, 1), after).addcmul_(x.roll(1, 1), before)
    return new.add_((low + high) * (1 - sixths)).clamp_(low, high)


def blend(x, other, factor):
    rest = other * (1 - factor)                                 # before x changes, which `other` may be
    return x.mul_(factor).add_(rest).clamp_(0, 255)


CHANGES = (lambda x, factor: x.mul_(factor).clamp_(0, 255),                                     # brightness
           lambda x, factor: blend(x, grey(x).mean((1, 2, 3), keepdim=True), factor),           # contrast
           lambda x, factor: blend(x, grey(x), factor),                                         # saturation
           hue)


def blur_kernels(radius):
    """(B,) -> (B, 13): Gaussian blurs with deviations of at most 2 pixels, by Pillow's law: three boxes one after the
    other, whose outermost pixels count in part."""
    spread = radius.unsqueeze(1) ** 2 / 3                       # of one box
    whole = ((12 * spread + 1).sqrt() / 2 - 0.5).floor()
    part = (2 * whole + 1) * (whole * (whole + 1) - 3 * spread) / (6 * (spread - (whole + 1) ** 2))
    box = (1 + whole + part - torch.arange(-2, 3).abs()).clamp(0, 1)                            # (B, 5)
    kernel = box = box / box.sum(1, keepdim=True)
    for _ in range(2):
        kernel = sum(F.pad(kernel, (i, 4 - i)) * box[:, i:i + 1] for i in range(5))             # (B, 9), (B, 13)
    return kernel


def blur(x, kernel):
    """Each image with its own of the symmetric kernels (B, 13, 1, 1), down and across; edges are mirrored, as Pillow's
    are in effect up to radius 1.4. One banded product for every 32 rows: on a CPU faster than a convolution."""
    for _ in range(2):
        side = x.shape[2]
        tile = min(32, side)
        wide = torch.cat([x[:, :, :6].flip(2), x, x[:, :, -6:].flip(2), x[:, :, :-side % tile]], 2)
        band = F.pad(kernel.flatten(1), (0, tile)).repeat(1, tile)[:, :tile * (tile + 12)]
        band = band.view(-1, 1, 1, tile, tile + 12)             # a row is the one above, moved by one
        x = (band @ wide.unfold(2, tile + 12, tile).mT).flatten(2, 3)[:, :, :side].mT           # (B, C, w, h)
    return x


def recolour(img, colours, mean, std):
    """uint8 (B, C, h, w) -> float32, changed as drawn, then normalised. A fourth channel, alpha, stays as it is.

    The published orders, grey before blur (MoCo-v3) and after (MAE-Lite), are one function: both are linear.
    """
    out, cpu = torch.empty(img.shape, device=img.device), img.device.type == "cpu"
    few = 1 + 2 ** (17 if cpu else 25) // img[0].numel()        # at a time: on a CPU they stay in the cache
    everything = out, img, blur_kernels(colours.radius), *colours
    for into, part, kernel, *some in zip(*(t.split(few) for t in everything)):
        some, whole = Colours(*some), part.to(torch.float32, memory_format=torch.contiguous_format)
        x = whole[:, :3]
        for turn in some.order.T:
            for k in set(turn.tolist()) - {-1}:
                x = only(x, turn == k, CHANGES[k], some.factors[:, k])
        x = only(x, some.grey, lambda x: x.copy_(grey(x)))
        x = only(x, some.radius > 0, blur, kernel)
        x = only(x, some.solarize, lambda x: torch.minimum(x, 255 - x))                         # 128 and more inverted
        x = x if x.shape == whole.shape else torch.cat([x, whole[:, 3:]], 1)
        torch.sub(x, constants(mean, img.device), out=into).div_(constants(std, img.device))
    return out
