"""--decode device: workers only read files; the device decodes JPEGs and resizes images of many sizes at once."""
import io

import torch
from PIL import Image

from data import RandomCrops, decode_jpeg, uniforms


def resize_weights(lengths, out, cubic, longest):
    """(B, out, longest): row j of image b makes pixel j of `out` from its first lengths[b] pixels, antialiased as in
    Pillow and torch: to shrink, the filter is stretched. cubic: (B,) bool, Keys' filter (a = -1/2) or the triangle."""
    device, lengths = lengths.device, lengths.view(-1, 1, 1)
    scale = lengths / out
    centre = (torch.arange(out, device=device).view(1, -1, 1) + 0.5) * scale
    at = torch.arange(longest, device=device).view(1, 1, -1)
    x = ((at + 0.5 - centre) / scale.clamp(min=1)).abs()                                        # (B, out, longest)
    keys = torch.where(x < 1, (1.5 * x - 2.5) * x * x + 1, ((2.5 - 0.5 * x) * x - 4) * x + 2) * (x < 2)
    weights = torch.where(cubic.view(-1, 1, 1), keys, (1 - x).clamp(min=0)) * (at < lengths)
    return weights / weights.sum(-1, keepdim=True)


def resize_padded(imgs, size, cubic):
    """resize_each for a few images, padded to the largest, as two batched matrix products."""
    heights, widths = (torch.tensor([img.shape[d] for img in imgs]) for d in (1, 2))
    padded = imgs[0].new_zeros(len(imgs), imgs[0].shape[0], heights.max(), widths.max())        # (b, C, H, W)
    for img, into in zip(imgs, padded):
        into[:, :img.shape[1], :img.shape[2]] = img
    device, cubic = padded.device, cubic.to(padded.device)
    down = resize_weights(heights.to(device), size[0], cubic, padded.shape[2]).unsqueeze(1)     # (b, 1, h, H)
    across = resize_weights(widths.to(device), size[1], cubic, padded.shape[3]).unsqueeze(1)    # (b, 1, w, W)
    return (down @ (padded.float() @ across.mT)).round().clamp(0, 255).to(torch.uint8)          # (b, C, h, w)


def resize_each(imgs, size, cubic):
    """uint8 (C, h, w) of any sizes -> uint8 (B, C, *size), each resized on its own; exact sums, rounded once.
    cubic: (B,) bool, bicubic or else bilinear. It takes 16 million padded pixels at a time."""
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")               # TF32 would be off by one here and there
    done, first, height, width = [], 0, 0, 0
    for k, img in enumerate(imgs):
        height, width = max(height, img.shape[1]), max(width, img.shape[2])
        if k > first and (k + 1 - first) * height * width > 2 ** 24:
            done.append(resize_padded(imgs[first:k], size, cubic[first:k]))
            first, height, width = k, img.shape[1], img.shape[2]
    done.append(resize_padded(imgs[first:], size, cubic[first:]))
    torch.set_float32_matmul_precision(precision)
    return torch.cat(done)


class DeviceCrops(RandomCrops):
    """The same crops as RandomCrops, but resizing rounds once and not twice, so pixels may differ by a rounding; on a
    GPU also by what its JPEG decoder does differently."""

    def __getitems__(self, keys):
        """-> keys, items, labels, (name, reason) of unreadable files. An item is the bytes of a JPEG and the plans of
        its crops; of anything else a finished crop, and the plan to leave it as it is."""
        items, labels, failed = [], [], []
        for key, u in zip(keys, uniforms(self.seed, keys, self.draws * self.repeat).tolist()):
            try:
                data = self.source.read(key[1])
                img = Image.open(io.BytesIO(data))              # reads only the header
                plain = img.format == "JPEG" and img.mode in ("L", "RGB") and data.endswith(b"\xff\xd9")
                plain = plain and img.getexif().get(0x0112, 1) == 1 and not self.value_range    # upright
            except Exception:
                plain = False
            if plain:
                items.append((data, [self.plan(*img.size, u[i:i + self.draws]) for i in range(0, len(u), self.draws)]))
                labels += [-1 if self.source.labels is None else int(self.source.labels[key[1]])] * self.repeat
            else:
                crops, marks, problems = super().__getitems__([key])
                items += [(crop, [((0, 0, self.size[1], self.size[0]), "bicubic")]) for crop in crops]
                labels, failed = labels + marks.tolist(), failed + problems
        return keys, items, torch.tensor(labels), failed

    def finish(self, batches, device):
        """Decode and resize the batches of a loader on the device -> batches like RandomCrops'."""
        if decode_jpeg is None or self.channels not in (1, 3):
            raise SystemExit("--decode device needs torchcodec (pip install torchcodec) and 1 or 3 channels")
        mode, tiny = "GRAY" if self.channels == 1 else "RGB", io.BytesIO()
        Image.new("RGB", (16, 16)).save(tiny, "JPEG")
        try:
            decode_jpeg([tiny.getvalue()], mode=mode, device=device)
        except (RuntimeError, ValueError) as error:
            raise SystemExit(f"--decode device: torchcodec cannot decode on {device} here "
                             f"({str(error).splitlines()[0][:80]})") from None
        for keys, items, labels, failed in batches:
            files = [data for data, _ in items if isinstance(data, bytes)]
            try:
                imgs = iter(decode_jpeg(files, mode=mode, device=device) if files else [])
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:                       # a file is damaged: RandomCrops finds out which
                print(f"note: a batch is decoded on the CPU because of {str(error).splitlines()[0][:80]}")
                crops, labels, failed = super().__getitems__(keys)
                yield crops.to(device), labels, failed
                continue
            crops, cubic = [], []
            for data, plans in items:
                img = next(imgs) if isinstance(data, bytes) else data.to(device)
                for (left, top, w, h), how in plans:
                    crops.append(img[:, top:top + h, left:left + w])
                    cubic.append(how == "bicubic")
            yield resize_each(crops, self.size, torch.tensor(cubic)), labels, failed


CROPS = dict(workers=RandomCrops, device=DeviceCrops)           # --decode
