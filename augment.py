"""
Image operations on whole batches, on the device, one random draw per image. Workers send uint8 crops; what follows is
here.

torchvision's own transforms draw once per call, so a batch would be flipped all together: that is why these exist.
"""
from functools import lru_cache

import torch

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
