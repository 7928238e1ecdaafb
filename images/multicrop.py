"""
Random crops of several sizes from each image, which is decoded once: what multi-crop methods (DINO, EsViT) look at.
"""
import torch

from data import RandomCrops, shared, uniforms


def crop_groups(size, scale, local_counts, local_sizes, local_scale):
    """The groups of MultiCrops: two global crops of size (height, width), and of each of local_sizes, "96" or "64x128",
    as many local ones as local_counts says. Scales: least and largest share of the image. Raises ValueError in the
    words of --global-scale, --local-crops, --local-size and --local-scale."""
    if len(local_counts) != len(local_sizes):
        raise ValueError(f"--local-crops {local_counts} and --local-size {local_sizes} need the same number of values")
    for name, shares in (("global", scale), ("local", local_scale)):
        if len(shares) != 2 or shares[0] > shares[1]:
            raise ValueError(f"--{name}-scale must be a least and a largest share of the image, not {shares}")
    groups = [(2, size, scale)]
    for count, text in zip(local_counts, local_sizes):
        sides = text.split("x")
        if len(sides) > 2 or not all(side.isdecimal() for side in sides):
            raise ValueError(f"--local-size {text} must be a number or HEIGHTxWIDTH")
        if count:
            groups.append((count, (int(sides[0]), int(sides[-1])), local_scale))                # one side: a square
    return groups


class MultiCrops(RandomCrops):
    """Random resized crops in groups of one size each. A list of keys (epoch, index) gives one batch: for every group
    uint8 (n, B, C, h, w); labels (B,), -1 where there are none; and (name, reason) of images that could not be read.
    groups: of each group n, the number of crops of an image; their (height, width); least and largest share of it."""

    def __init__(self, source, groups, channels, seed):
        super().__init__(source, groups[0][1], channels, seed, None, "bicubic")
        self.groups = groups

    def __getitems__(self, keys):
        count = self.draws * sum(n for n, _, _ in self.groups)
        crops = [shared(n, len(keys), *size, self.channels) for n, size, _ in self.groups]
        labels, failed = [], []
        for k, (epoch, index) in enumerate(keys):
            img, used, problem = self.readable(index)
            u = uniforms(self.seed, [(epoch, used)], count)[0].tolist()
            for group, (_, size, scale) in zip(crops, self.groups):
                self.size, self.scale = size, scale
                for crop in group:                                                              # (B, h, w, C)
                    crop[k], u = self.crop(img, u[:self.draws]).permute(1, 2, 0), u[self.draws:]
            labels.append(-1 if self.source.labels is None else int(self.source.labels[used]))
            if problem:
                failed.append(problem)
        return [group.permute(0, 1, 4, 2, 3) for group in crops], torch.tensor(labels), failed
