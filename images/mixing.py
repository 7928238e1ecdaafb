"""Mixup, cutmix, soft targets and random erasing by timm's rules, as published fine-tuning recipes use them."""
import torch
import torch.nn.functional as F


def soft_targets(labels, classes, smoothing=0.0):
    """Labels (B,) -> (B, classes): smoothing / classes for each class, and what is left of 1 for the label."""
    return F.one_hot(labels, classes) * (1 - smoothing) + smoothing / classes


def mix_box(lam, y, x, height, width):
    """Cutmix's box around pixel (y, x), 1 - lam of the image unless clipped -> top, bottom, left, right."""
    h, w = (int(side * (1 - lam) ** 0.5) // 2 for side in (height, width))  # an odd pixel is lost; not so in newer timm
    return max(y - h, 0), min(y + h, height), max(x - w, 0), min(x + w, width)


def draw_mix(mixup, cutmix, height, width, switch=0.5, prob=1.0):
    """Draw lam from Beta(alpha, alpha), and cutmix's box or None. mixup, cutmix: their alphas, 0 for never; if both are
    given, it is cutmix with probability `switch`. On the host, so that nothing waits for a GPU."""
    apply, which, y, x = torch.rand(4).tolist()
    if apply >= prob or not (mixup or cutmix):
        return 1.0, None
    cut = not mixup or (cutmix and which < switch)
    alpha = cutmix if cut else mixup
    lam = torch.distributions.Beta(alpha, alpha).sample().item()
    return lam, mix_box(lam, int(y * height), int(x * width), height, width) if cut else None


def mix(img, targets, lam, box=None):
    """Mix, in place, each of img (B, C, h, w) with its mirror in the batch, 1 - lam of every pixel or those in the box,
    and its targets (B, classes) accordingly. The middle image of an odd batch, officially refused, does not change."""
    if box:
        inside = img[:, :, box[0]:box[1], box[2]:box[3]]
        inside.copy_(inside.flip(0))
        lam = 1 - inside[0, 0].numel() / img[0, 0].numel()
    elif lam < 1:
        img.lerp_(img.flip(0), 1 - lam)
    return img, targets.lerp_(targets.flip(0), 1 - lam)


def random_mix(img, targets, mixup, cutmix, chunk=0, switch=0.5, prob=1.0):
    """`mix`, drawn anew for every `chunk` images (0: once for all). Published runs mix the 128 images of one GPU."""
    for part, soft in zip(img.split(chunk or len(img)), targets.split(chunk or len(img))):
        mix(part, soft, *draw_mix(mixup, cutmix, *img.shape[-2:], switch, prob))
    return img, targets


def erase_mask(count, p, height, width, device):
    """(count, 1, height, width), true in a rectangle of an image with probability p: of ten tries the first that fits;
    1/50 to 1/3 of the image; height / width log-uniform in 0.3 to 1 / 0.3 (torchvision: 0.33 to 3.3, one per batch)."""
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
    """Random erasing (https://arxiv.org/abs/1708.04896): with probability p, a rectangle of each normalized image
    becomes noise, N(0, 1) for each pixel and channel. Floats (B, C, h, w); on a CPU in place."""
    if not p:
        return img
    inside = erase_mask(len(img), p, *img.shape[-2:], img.device)
    if img.device.type != "cpu":
        return torch.where(inside, torch.randn_like(img), img)
    return img.masked_scatter_(inside, torch.randn(int(inside.sum()) * img.shape[1]))
