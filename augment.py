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
    return img.float().sub_(constants(mean, img.device)).div_(constants(std, img.device))


def denormalize(img, mean, std):
    """The inverse of normalize, clipped to what a picture can hold: float (B, C, h, w) -> uint8."""
    img = img.float() * constants(std, img.device) + constants(mean, img.device)
    return img.round().clamp(0, 255).to(torch.uint8)


def random_flip(img, p=0.5):
    """Mirror each image left to right with probability p; (B, C, h, w) of any dtype."""
    flip = torch.rand(len(img), 1, 1, 1, device=img.device) < p
    return torch.where(flip, img.flip(-1), img)
