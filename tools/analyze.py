"""
What networks have learned, in numbers and pictures. https://arxiv.org/abs/2205.14443 (CKA, attention, layers),
https://arxiv.org/abs/2106.09785 (regions), https://arxiv.org/abs/2104.14294 (maps)

Agreement: python -m tools.analyze cka A.pt B.pt --data imagenet
Attention: python -m tools.analyze attention A.pt B.pt --names MAE MoCo      (mean distance and entropy of every head)
Maps:      python -m tools.analyze maps A.pt --pictures dog.jpg photos --img-size 480
Regions:   python -m tools.analyze correspond A.pt B.pt
Layers:    python -m tools.analyze layers A.pt --fractions 1 0.1 -- --epochs 50    (after --: options of finetune.py)
A file:    python -m tools.analyze summary A.pt B.pt
Files come first, of any layout and network, FILE:KEY where one holds several; COMMAND --help lists the options. Each
writes OUT/COMMAND.json and, with matplotlib, .png. When `layers` is preempted, type the same command again.
Expected:  not run yet at full size; small encoders are in docs/findings.md
"""
import itertools
import json
import math
import os
import re
import signal
import subprocess
import sys
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, fields, make_dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange

import weights
from data import decode, resize
from images.augment import Colours, denormalize, draw_colours, normalize, recolour, statistics
from images.datasets import describe, kind_left_out, look_over, open_dataset, walk
from images.deep import as_range, reason
from nets.chunk_attention import ChunkAttention, FullAttention
from nets.cvt import CvtAttention
from nets.hiera import Hiera, HieraAttention, unit_index
from runtime.folder import write_atomic
from runtime.options import check, fail, opt, read_command_line, value_errors_exit
from runtime.probes import encoded
from runtime.run import launch, seed_for, setup
from tools import analysis_plots as plots
from vit import Attention, Pyramid, WindowAttention, pair, window_layout

# ----------------------------------------------------------------------------------------------------------------
# Numbers of one batch. B images, N tokens, D width, H heads.


def watch(model, img):
    """Run a network on normalised images -> what its attention sees, [(attention, tokens after norm1, grid)], one for
    each block (tokens (B, N, D), of a ViT with cls (B, 1 + N, D), of a Hiera in mask units (B, U, T, D)); and its
    output, normed tokens without cls."""
    seen, pyramid, kinds = [], isinstance(model, Pyramid), (Attention, ChunkAttention, CvtAttention)
    size = img.shape[-2:]

    def look(attn, arguments):                                  # a Pyramid's attention is given (tokens, grid)
        if isinstance(model, Hiera):
            side = round(arguments[0].shape[2] ** 0.5)          # of a unit, in tokens
            seen.append((attn, arguments[0], tuple(n // model.unit * side for n in size)))
        else:
            seen.append((attn, arguments[0], arguments[1] if pyramid else model.grid_of(*size)))

    hooks = [m.register_forward_pre_hook(look) for m in model.modules() if isinstance(m, kinds)]
    output = model.encode(img)
    for hook in hooks:
        hook.remove()
    plain = not isinstance(model, (Pyramid, Hiera))
    return seen, model.fc_norm(output)[:, 1:] if plain else output          # fc_norm norms what `norm` does not


def tokens_of(model, img):
    """The tokens of every layer without cls, [(B, N, D)]: after norm1 of each block, then the network's output."""
    seen, output = watch(model, img)
    if isinstance(model, Hiera):                                # in mask units, an order that CKA does not see
        return [x.flatten(1, 2) for _, x, _ in seen] + [output]
    return [x if isinstance(model, Pyramid) else x[:, 1:] for _, x, _ in seen] + [output]


def logits_of(attn, x, grid):
    """What `watch` saw -> logits among patches in n windows of T tokens, (B * n, H, T, T), relative positions and masks
    included; the grid of a window; where the map's tokens are among n * T, for a Swin pads it. A ViT has one window,
    and the row and the column of cls, or of global tokens, are deleted. A Hiera's windows are in its own order, with
    fewer queries in the blocks that pool. ValueError: a ViL's chunks are no windows."""
    if isinstance(attn, HieraAttention):
        side = round(x.shape[2] ** 0.5)
        return attn.logits(x), (side, side) if attn.within else grid, slice(None)
    if isinstance(attn, ChunkAttention):
        raise ValueError("attention to the chunks around a token has no windows to be measured in")
    if isinstance(attn, CvtAttention):
        return attn.logits(x, grid)
    if isinstance(attn, FullAttention):
        return attn.logits(x)[..., attn.tokens:, attn.tokens:], grid, slice(None)
    if not isinstance(attn, WindowAttention):
        return attn.logits(x)[..., 1:, 1:], grid, slice(None)
    order, place, mask = window_layout(*grid, attn.side, attn.shift, x.device)
    qkv = attn.padded_qkv(x, grid).index_select(1, order)                                       # (B, n * T, 3 * D)
    q, k, _ = rearrange(qkv, "b (n t) (k h d) -> k (b n) h t d", t=attn.side ** 2, k=3, h=attn.heads)
    bias = F.embedding(attn.relative_position_index, attn.relative_position_bias_table)         # (T, T, H)
    logits = (q * q.shape[-1] ** -0.5) @ k.mT + rearrange(bias, "s t h -> h s t")
    if mask is not None:
        logits = logits + mask.repeat(len(x), 1, 1).unsqueeze(1)                                # (B * n, 1, T, T)
    return logits, (attn.side, attn.side), place


def gram(x):
    """Features (n, ...) of n images -> their inner products (n, n) with a zero diagonal."""
    x = x.flatten(1)                                            # not centred: HSIC does not see what all have in common
    return (x @ x.T).fill_diagonal_(0)


def hsic(K, L):
    """Gram matrices (k, n, n) and (l, n, n) without diagonals, n > 3 -> the unbiased HSIC of all pairs, (k, l) (Song et
    al. 2012). One product of flattened matrices stands for all the traces."""
    n, k_rows, l_rows = K.shape[1], K.sum(2), L.sum(2)                                          # (k, n), (l, n)
    trace, totals = K.flatten(1) @ L.flatten(1).T, torch.outer(k_rows.sum(1), l_rows.sum(1))    # (k, l) each
    return (trace + totals / ((n - 1) * (n - 2)) - 2 / (n - 2) * k_rows @ l_rows.T) / (n * (n - 3))


def cka_of(sums, first):
    """Minibatch CKA (Nguyen et al. 2021): the sum over batches of hsic(both, both), where `both` are the layers of two
    networks, `first` of them the one's -> (L1, L2), at most 1; NaN for a layer that tells no image from another."""
    scale = sums.diagonal().sqrt()
    return (sums / torch.outer(scale, scale))[:first, first:]


def distances(height, width):
    """Distances between the cells of a grid, in cells, (N, N)."""
    at = torch.cartesian_prod(torch.arange(height).double(), torch.arange(width).double())      # (N, 2)
    return torch.cdist(at, at, compute_mode="donot_use_mm_for_euclid_dist")


def hiera_distances(attn, tokens, window):
    """Distances between the queries and the keys of a Hiera's window, in tokens before pooling, (T or T / 4, T)."""
    rounds = tokens.shape[2].bit_length() // 2                  # a unit has 4 ** rounds tokens
    index = unit_index(*window, rounds, torch.device("cpu"))                                    # (units, 4 ** rounds)
    at = torch.stack([index // window[1], index % window[1]], -1).double()                      # (units, ..., 2)
    asking = at.unflatten(1, (4, -1)).mean(1) if attn.pool else at          # in the middle of the four that are pooled
    return torch.cdist(asking.flatten(0, 1), at.flatten(0, 1), compute_mode="donot_use_mm_for_euclid_dist")


def spread(logits, distance):
    """Logits (..., N, N) -> the entropy in nats and the mean distance of each query's attention, (2, ..., N)."""
    a = logits.softmax(-1)
    return torch.stack([-(a * (a + 1e-6).log()).sum(-1), (a * distance).sum(-1)])


def reach(model, img, pixels=None, even=False):
    """Entropy in nats and distance in pixels of each head's attention, means over queries, sums over images -> [(2, H)]
    of each block. pixels: a patch's side (default: its own); even: of attention that is the same everywhere. NaN where
    attention has no windows (ViL's first stages)."""
    found, seen = [], watch(model, img)[0]
    widths = sorted({tokens.shape[-1] for _, tokens, _ in seen})            # they grow by stage, tokens' sides double
    for attn, tokens, grid in seen:
        if isinstance(attn, ChunkAttention):
            found.append(torch.full((2, attn.heads), math.nan))
            continue
        logits, window, place = logits_of(attn, tokens, grid)
        if even:                                                # only a Swin's mask, -100, still makes a difference
            logits = logits.clamp(max=-50)
        if isinstance(model, Hiera):
            distance, scale = hiera_distances(attn, tokens, window), img.shape[-2] // model.patch_size // grid[0]
        else:
            distance, scale = distances(*window), 2 ** widths.index(tokens.shape[-1])           # patches on a side
        distance = distance * scale * (pixels or model.patch_size)                              # (T, T)
        x = spread(logits, distance.to(logits))                                                 # (2, B * n, H, T)
        x = rearrange(x, "s (b n) h t -> s b h (n t)", b=len(img))[..., place]                  # (2, B, H, N)
        found.append(x.mean(-1).sum(1))
    return found


def mass_mask(a, mass=0.6):
    """Attention (..., N) -> bool: the fewest tokens that hold this share of it. As in DINO, tokens are sorted from the
    smallest, and those are kept where the running sum is above 1 - mass."""
    share, places = (a / a.sum(-1, keepdim=True)).sort(-1)
    return torch.zeros_like(a, dtype=torch.bool).scatter(-1, places, share.cumsum(-1) > 1 - mass)


def last_attention(model, img, query=None):
    """Attention of the last block to the patches of one image (1, C, height, width) -> (H, h, w). query: the cell that
    asks (default: cls; without one the middle). ValueError: no such cell, the last map is several windows, or a Hiera's
    last block pools or attends within units."""
    attn, tokens, (h, w) = watch(model, img)[0][-1]
    if query is not None and query >= h * w:
        raise ValueError(f"--query {query}: the map has {h} x {w} cells, numbered from 0")
    if isinstance(model, Hiera):
        if attn.pool or attn.within:
            raise ValueError("maps of a Hiera need a last block that sees all tokens and does not pool")
        order = unit_index(h, w, tokens.shape[2].bit_length() // 2, img.device).flatten()       # (N,)
        asked = order.argsort()[h // 2 * w + w // 2 if query is None else query]
        return attn.logits(tokens)[0, :, asked].softmax(-1)[:, order.argsort()].unflatten(1, (h, w))
    if not isinstance(model, Pyramid):
        a = attn.logits(tokens)[0].softmax(-1)                                                  # (H, 1 + N, 1 + N)
        return a[:, 0 if query is None else 1 + query, 1:].unflatten(1, (h, w))
    logits, window, _ = logits_of(attn, tokens, (h, w))
    if window != (h, w):
        raise ValueError(f"maps of a {type(model).__name__} need a last map that is one window, not {h} x {w}: "
                         "give another --img-size")
    query = h // 2 * w + w // 2 if query is None else query
    return logits[0].softmax(-1)[:, query].unflatten(1, (h, w))


def matches(first, second, most=10):
    """Match each region of a first view with the nearest of a second by cosine, and keep the `most` best matches.
    Regions (B, N, D) -> numbers of the first's, numbers of the second's, cosines, each (B, at most N), best first."""
    best, nearest = (F.normalize(first, dim=-1) @ F.normalize(second, dim=-1).mT).max(-1)       # (B, N) each
    cosine, asked = best.topk(min(most, best.shape[1]), 1)
    return asked, nearest.gather(1, asked), cosine


def mirrored(cells, width):
    """The numbers of cells, in reading order, after the image was flipped left to right."""
    return cells + width - 1 - 2 * (cells % width)


# ----------------------------------------------------------------------------------------------------------------
# Options, networks, images, results


@dataclass
class Config:
    """The options of all commands: COMMANDS, at the end, says which takes what."""
    out: str = opt("out/analyze", "folder for the numbers and the picture")
    heads: tuple[int, ...] | None = opt(None, "attention heads of files that do not say: one for all, or one each", 1)
    names: tuple[str, ...] | None = opt(None, "names of the files in pictures (default: by folder or file)")
    img_size: tuple[int, ...] | None = opt(None, "pixels: one number, or height and width (default: the files')", 1)
    mean: tuple[float, ...] | None = opt(None, "channel means in 0..1 (default: each file's, else ImageNet's or 0.5)")
    std: tuple[float, ...] | None = opt(None, "channel deviations in 0..1 (default: each file's, else ImageNet's)")
    device: str = opt("auto", "auto, cpu, cuda or mps")
    data: str = opt("imagenet", "folder or tar, torchvision set by name, or shapes; of val/ where there is one")
    images: int | None = opt(None, "images used, in the set's order (default: 1,152; of correspond all)", 1)
    batch_size: int = opt(128, "images at a time; CKA leaves an incomplete last batch out", 1)
    workers: int | None = opt(None, "processes that decode images (default: one per core)", 0)
    download: bool = opt(False, "fetch --data if it is a torchvision set that is not there yet")
    bits: int | None = opt(None, "values are 0 to 2^N-1 in files of more than 8 bits (default: their range)", 1, 32)
    value_range: tuple[float, ...] | None = opt(None, "values that become black and white (default: the file's range)")
    patch_pixels: float | None = opt(None, "pixels of a patch's side, for distances (default: its own; paper: 14)", 0)
    pictures: tuple[str, ...] | None = opt(None, "image files, or folders of them; resized to --img-size (DINO: 480)")
    mass: float = opt(0.6, "share of a head's attention that its mask keeps", 0, 1)
    query: int | None = opt(None, "cell that asks, from 0 in reading order (default: cls; else the middle)", 0)
    show: int = opt(4, "heads drawn, evenly from the widest attention to the narrowest", 1)
    top: int = opt(10, "matches of an image that count, the best ones", 1)
    draw: int = opt(4, "images whose matches are drawn", 1)
    keep: tuple[int, ...] | None = opt(None, "numbers of pre-trained blocks to keep (default: five, from 0 to all)", 0)
    fractions: tuple[float, ...] = opt((1.0,), "shares of the training images; each is a curve", 0, 1)
    script: str = opt("finetune", "what measures accuracy; probe: of frozen features", choices=("finetune", "probe"))
    seed: int = opt(0, "what is random follows from it: views, fresh blocks, runs", 0)


def per_file(name, given, files):
    """An option's value for each file: one for all, or one each."""
    given = given or (None,)
    if len(given) not in (1, len(files)):
        fail(f"--{name} has {len(given)} values for {len(files)} files")
    return given * len(files) if len(given) == 1 else given


def label_of(path):
    """out/mae/encoder.pt -> mae; mae_tiny.pth -> mae_tiny; all.pth:student -> all:student"""
    file, key = weights.file_and_key(os.path.abspath(path))
    label = Path(file).stem
    if label in ("encoder", "best", "last", "checkpoint", "model"):
        label = Path(file).parent.name
    return f"{label}:{key}" if key else label


class Net:
    """A file's encoder in eval mode, and how it wants to see images. heads: used if the file does not store them;
    size, mean, std: win over the file's; say: prints what matched."""

    def __init__(self, path, heads=None, size=None, mean=None, std=None, say=lambda text: None):
        self.path, self.file = path, weights.read(path)
        stored, options = self.file.config.get, dict(img_size=size) if size else {}
        options["pool"] = "avg" if "fc_norm.weight" in self.file.state else "cls"
        self.heads = None if stored("heads") else heads
        with value_errors_exit():
            self.model = weights.load_encoder(path, self.heads, say, **options)
            self.channels = self.model.config["in_chans"]
            self.mean, self.std = statistics(self.channels, mean or stored("mean"), std or stored("std"))
        self.normalize = partial(normalize, mean=self.mean, std=self.std)


def load(cfg, files):
    """Load the files' networks -> [Net] on the device, and the device."""
    _, world, device = setup(cfg.device)
    if world > 1:
        fail("tools.analyze is one process: start it with python, not torchrun")
    torch.set_float32_matmul_precision("highest")               # products are exact: TF32's error would be seen
    nets = []
    for path, label, heads in zip(files, per_file("names", cfg.names, files), per_file("heads", cfg.heads, files)):
        net = Net(path, heads, cfg.img_size, cfg.mean, cfg.std, print)
        net.model.requires_grad_(False).to(device)
        net.label = label or label_of(path)
        net.file_name = re.sub("[^A-Za-z0-9._]+", "-", net.label)
        while net.file_name in [other.file_name for other in nets]:
            net.label, net.file_name = net.label + "_2", net.file_name + "_2"
        nets.append(net)
    return nets, device


def image_shape(nets):
    """Height, width and channels of the images that all networks see."""
    shapes = {(*pair(net.model.config["img_size"]), net.channels) for net in nets}
    if len(shapes) > 1:
        fail(f"the networks see images of different shapes {sorted(shapes)}: --img-size makes sizes alike")
    return shapes.pop()


def open_images(cfg, files, most):
    """Load the files' networks, and open val/ of --data, or else all of it -> [Net], the source, the number of images
    used (`most`, or all for None), their evaluation crops in batches: (numbers, uint8 (B, C, h, w) on the device)."""
    nets, device = load(cfg, files)
    *size, channels = image_shape(nets)
    source = open_dataset(cfg.data, "val", cfg.download) or open_dataset(cfg.data, "train", cfg.download)
    look_over(source, channels, cfg.bits, cfg.value_range)
    print(describe(source))
    count = min(len(source), most or len(source))
    # With this mean and std the crops stay as they are: each network normalises them in its own way.
    crops = encoded(lambda img: img.round().to(torch.uint8), source, range(count), tuple(size), channels,
                    (0.0,) * channels, (1 / 255,) * channels, device, cfg.batch_size, cfg.workers)
    return nets, source, count, ((range(count)[where], img) for where, img, _ in crops)


def as_numbers(tensor):
    """A tensor for JSON: numbers of six digits, None for NaN."""
    if tensor.dim():
        return [as_numbers(row) for row in tensor]
    return None if tensor.isnan() else float(f"{tensor.item():.6g}")


def facts(nets, source, count):
    return dict(files=[net.path for net in nets], names=[net.label for net in nets], data=source.where, images=count,
                img_size=image_shape(nets)[:2], mean=[net.mean for net in nets], std=[net.std for net in nets])


def save(cfg, name, numbers, draw=None):
    """Write OUT/name.json and, with matplotlib, the figure that draw() makes as OUT/name.png: never half of one."""
    path = os.path.join(cfg.out, name)
    Path(f"{path}.tmp").write_text(json.dumps(numbers, indent=1, default=as_numbers))
    os.replace(f"{path}.tmp", f"{path}.json")
    if draw and plots.INSTALLED:
        draw().savefig(f"{path}.tmp", format="png")
        os.replace(f"{path}.tmp", f"{path}.png")
        print(f"wrote {path}.json and {path}.png", flush=True)
    else:
        print(f"wrote {path}.json", flush=True)


# ----------------------------------------------------------------------------------------------------------------
# The commands


def cka(cfg, files):
    """CKA of every layer of A with every layer of B: norm1 of each block, then the normed output, without cls."""
    most = cfg.images or cfg.batch_size * (1024 // cfg.batch_size + 1)                          # as published
    nets, source, count, crops = open_images(cfg, files, most)
    batch = min(count, cfg.batch_size)
    if batch < 4:
        fail(f"CKA needs batches of 4 images or more, not {batch}")
    used = count - count % batch
    sums = 0.0
    for _, img in itertools.islice(crops, used // batch):       # an incomplete batch is left out
        grams = [torch.stack([gram(x) for x in tokens_of(net.model, net.normalize(img))]) for net in nets]
        both = torch.cat(grams).cpu().double()                  # fp32 sums are off by 0.01 where images are much alike
        sums = sums + hsic(both, both)                                                          # (L1 + L2, L1 + L2)
    value = cka_of(sums, len(grams[0]))
    left_out = f"; {count - used} more that make no whole batch were left out" if used < count else ""
    print(f"{used:,} images in batches of {batch}{left_out}")
    for i, row in enumerate(value.nan_to_num(-1)):
        print(f"layer {i} of {nets[0].label} is most like layer {row.argmax()} of {nets[1].label}: {row.max():.3f}")
    numbers = dict(facts(nets, source, used), batch_size=batch, cka=value)
    save(cfg, "cka", numbers, partial(plots.draw_cka, value, [net.label for net in nets]))


def attention(cfg, files):
    """Mean distance and entropy of every head's attention among patches; cls is deleted before the softmax."""
    nets, source, count, crops = open_images(cfg, files, cfg.images or 1152)
    sums, rows = [itertools.repeat(0.0)] * len(nets), []        # sums: for each network, (2, H) of each block
    for _, img in crops:
        for i, net in enumerate(nets):
            for part in img.split(32):                          # logits are large
                found = reach(net.model, net.normalize(part), cfg.patch_pixels)
                sums[i] = [x + y.cpu().double() for x, y in zip(sums[i], found)]
    for net, total in zip(nets, sums):
        even = [as_numbers(x[:, 0]) for x in reach(net.model, net.normalize(img[:1]), cfg.patch_pixels, even=True)]
        rows.append(dict(name=net.label, entropy=[x[0] / count for x in total], distance=[x[1] / count for x in total],
                         uniform_entropy=[x[0] for x in even], uniform_distance=[x[1] for x in even]))
        print(f"{net.label}, block: mean distance in pixels, entropy in nats of its heads (least to most)")
        for number, (far, wide) in enumerate(zip(rows[-1]["distance"], rows[-1]["entropy"]), 1):
            print(f"  {number:2}: {far.mean():6.1f} ({far.min():.1f} to {far.max():.1f})  {wide.mean():.2f} "
                  f"({wide.min():.2f} to {wide.max():.2f})")
    save(cfg, "attention", dict(facts(nets, source, count), patch_pixels=cfg.patch_pixels, networks=rows),
         partial(plots.draw_attention, rows))


def spaced(count, most):
    """`most` numbers, or all, evenly from the first of `count` to the last."""
    return torch.linspace(0, count - 1, min(most, count)).round().long().tolist()


def maps(cfg, files):
    """What each head of the last block looks at in given images, and where --mass of it lies; widest heads first."""
    paths = []
    for given in cfg.pictures or ():
        if os.path.exists(given) and not os.path.isdir(given) and not os.path.isfile(given):    # it would never end
            fail(f"{given} is a {kind_left_out(given)}: files of images, or folders of them, were expected")
        paths += walk(given, Counter()) if os.path.isdir(given) else [given]
    if not paths:
        fail("--pictures is required: give image files, or folders that hold some")
    nets, device = load(cfg, files)
    value_range = as_range(cfg.bits, cfg.value_range)
    stems = [Path(path).stem for path in paths]
    stems = [f"{stem}-{i}" if stems.count(stem) > 1 else stem for i, stem in enumerate(stems, 1)]
    for net, (path, stem) in itertools.product(nets, zip(paths, stems)):
        try:
            img = decode(Path(path).read_bytes(), net.channels, value_range)
            img = resize(img, pair(net.model.config["img_size"]), "bicubic")
        except Exception as error:                              # damaged files raise nearly anything
            fail(f"{path} cannot be read as an image: {reason(error)}")
        with value_errors_exit():
            a = last_attention(net.model, net.normalize(img.unsqueeze(0).to(device)), cfg.query).cpu()  # (H, h, w)
        share = a / a.sum((1, 2), keepdim=True)
        bits = -(share * share.clamp(min=1e-12).log2()).sum((1, 2))                             # (H,)
        mask = mass_mask(a.flatten(1), cfg.mass).view_as(a)                                     # (H, h, w)
        heads = [dict(head=k + 1, bits=bits[k], attention=a[k], mask=mask[k].int())
                 for k in bits.argsort(descending=True).tolist()]
        print(f"{net.label}, {path}: heads have {bits.min():.2f} to {bits.max():.2f} of {math.log2(a[0].numel()):.2f} "
              f"bits, and {cfg.mass:.0%} of their mass on {mask.float().mean():.0%} of the cells")
        numbers = dict(file=net.path, picture=path, img_size=img.shape[1:], mean=net.mean, std=net.std, query=cfg.query,
                       mass=cfg.mass, heads=heads)
        drawn = [heads[i] for i in spaced(len(heads), cfg.show)]
        save(cfg, f"maps-{net.file_name}-{stem}", numbers, partial(plots.draw_maps, img, drawn))


def correspond(cfg, files):
    """How often a region's match in the flipped, recoloured, grey image is its mirror image; some matches are drawn."""
    nets, source, count, crops = open_images(cfg, files, cfg.images)
    height, width, _ = image_shape(nets)
    grids = [net.model.grid_of(height, width) for net in nets]
    sums = torch.zeros(len(nets), 2, dtype=torch.float64)       # share of right matches, error in pixels
    chosen = spaced(count, cfg.draw)
    rows, drawn, views = [], [], []
    for numbers, img in crops:
        colours = []
        for number in numbers:                                  # one by one: views do not depend on --batch-size
            seed_for(cfg.seed, number, 0)
            colours.append(draw_colours(1, p_grey=1.0))
        colours = Colours(*map(torch.cat, zip(*colours)))
        for net, (h, w), total in zip(nets, grids, sums):
            mirror = recolour(img.flip(-1), colours, net.mean, net.std)
            regions = [watch(net.model, view)[1] for view in (net.normalize(img), mirror)]      # (B, N, D) each
            asked, match, cosine = matches(*regions, cfg.top)                                   # (B, top) each
            true = mirrored(asked, w)
            error = torch.hypot((match // w - true // w) * (height / h), (match % w - true % w) * (width / w))
            total += torch.stack([(match == true).float().mean(1).sum(), error.mean(1).sum()]).cpu()
            for i in [i for i, number in enumerate(numbers) if number in chosen]:
                best = list(zip(asked[i].tolist(), match[i].tolist(), cosine[i].tolist()))
                drawn.append(dict(name=net.label, image=source.name(numbers[i]), grid=(h, w), matches=best))
                views.append([img[i].cpu(), denormalize(mirror[i:i + 1], net.mean, net.std)[0].cpu()])
    for net, (h, w), (right, error) in zip(nets, grids, (sums / count).tolist()):
        rows.append(dict(name=net.label, grid=(h, w), top=min(cfg.top, h * w), accuracy=100 * right,
                         chance=100 / (h * w), error_pixels=error))
        print(f"{net.label}: {100 * right:.2f}% of the best {rows[-1]['top']} of {h * w} regions find their mirror "
              f"image, by chance {100 / (h * w):.2f}%; mean error {error:.1f} pixels")
    save(cfg, "correspond", dict(facts(nets, source, count), seed=cfg.seed, networks=rows, drawn=drawn),
         partial(plots.draw_matches, drawn, views, [net.label for net in nets]))


def keep_only(net, k, seed, out):
    """Write an encoder with its embeddings and first k blocks; the other blocks are fresh, and then the last norm."""
    torch.manual_seed(seed)
    state, fresh = net.model.state_dict(), weights.build(net.model.config).state_dict()
    if k < net.model.depth:
        state |= {name: fresh[name] for name in state if weights.layer_of(net.model, name) > k}
    stored = {name: net.file.config[name] for name in ("mean", "std") if net.file.config.get(name)}
    write_atomic(dict(method=net.file.config["method"], config=net.model.config | stored, model=state), out)


def run_script(command):
    """Run a script of the folder above in a process of its own; signals are passed on -> its exit code."""
    child = subprocess.Popen([sys.executable, Path(__file__).resolve().parents[1] / command[0], *command[1:]])
    old = {n: signal.signal(n, lambda n, _: child.send_signal(n)) for n in (signal.SIGTERM, signal.SIGUSR1)}
    old[signal.SIGINT] = signal.signal(signal.SIGINT, lambda *_: None)      # a terminal's Ctrl-C reaches both
    code = child.wait()
    for number, handler in old.items():
        signal.signal(number, handler)
    return code


def accuracies_in(folder):
    """The top-1 accuracies in a run's log, in their order; none if the run has not reached its end."""
    rows = []
    for line in Path(folder, "log.jsonl").read_text().splitlines():
        with suppress(ValueError):                              # a kill may have cut a line short
            rows.append(json.loads(line))
    steps = [row["steps"] for row in rows if "steps" in row][-1]
    found = [row for row in rows if "test_acc1" in row]
    at_end = found and found[-1].get("step", steps) == steps
    return [row["test_acc1"] for row in found] if at_end else []


def options_of_runs(cfg, extra):
    """The options after --, for every run of `layers`. Those that it sets itself are refused."""
    taken = [word for word in extra if re.match("--(init|data|out|fraction|seed)", word)]
    if taken:
        fail(f"{taken[0]} may not follow --: every run has its own, or the one given before")
    if cfg.script == "probe" and {"knn", "features"} & {*extra}:
        fail("--script probe goes with --protocol sweep, mae, moco or dino, which end in one accuracy")
    return ["--protocol", "sweep", *extra] if cfg.script == "probe" and "--protocol" not in extra else extra


def runs_so_far(cfg, owner):
    """The runs in OUT/layers.json, by (share of the images, blocks kept). If it has another owner, it is refused."""
    try:
        known = json.loads(Path(cfg.out, "layers.json").read_text())
    except (OSError, ValueError):                               # not there yet
        return {}
    if any(known.get(name) != owner[name] for name in ("sha256", "key", "heads", "seed")):
        fail(f"{cfg.out}/layers.json belongs to {known.get('file')}, which may have changed, and --seed "
             f"{known.get('seed')}, --heads {known.get('heads')}: give another --out")
    return {(run["fraction"], run["keep"]): run for run in known["runs"]}


def layers(cfg, files, extra):
    """Accuracy against the number of pre-trained blocks that a fine-tuning starts from; the others start fresh."""
    net = Net(files[0], per_file("heads", cfg.heads, files)[0])
    depth = net.model.depth
    extra = options_of_runs(cfg, extra)
    kept = cfg.keep or sorted({round(depth * i / 4) for i in range(5)})
    if max(kept) > depth:
        fail(f"--keep {max(kept)}: {net.path} has {depth} blocks")
    owner = dict(file=net.path, sha256=weights.digest(net.path), seed=cfg.seed, depth=depth,
                 key=net.path.removeprefix(net.file.path), heads=net.heads)
    runs = runs_so_far(cfg, owner)
    save(cfg, "layers", dict(owner, runs=list(runs.values())))
    for fraction, k in itertools.product(cfg.fractions, kept):
        init, out = f"{cfg.out}/keep-{k}.pt", f"{cfg.out}/keep-{k}-{fraction:g}"
        command = [f"{cfg.script}.py", "--init", init, "--data", cfg.data, "--out", out, "--fraction", f"{fraction:g}",
                   "--seed", str(cfg.seed), *extra]
        if runs.get((fraction, k), {}).get("command") == command:
            continue
        keep_only(net, k, cfg.seed, init)
        print(f"the first {k} of {depth} blocks, {fraction:g} of the images: {' '.join(command)}", flush=True)
        if run_script(command):
            fail(f"{cfg.script}.py failed with the first {k} blocks: its own message is above")
        found = accuracies_in(out)
        if not found:
            print("stopped: the same command goes on from there")
            return
        runs[fraction, k] = dict(fraction=fraction, keep=k, last=found[-1], best=max(found), command=command)
        runs = dict(sorted(runs.items()))
        save(cfg, "layers", dict(owner, runs=list(runs.values())), partial(plots.draw_layers, runs))
    for (fraction, k), run in runs.items():
        print(f"{fraction:g} of the images, {k} of {depth} blocks: top-1 {run['last']:.2f}%, best {run['best']:.2f}%")


def summary(cfg, files):
    """What files are: layout, method, network, heads, parameters, and what would be missing if they were loaded."""
    rows = []
    for path, heads in zip(files, per_file("heads", cfg.heads, files)):
        file, messages = weights.read(path), []
        pool = "avg" if "fc_norm.weight" in file.state else "cls"
        try:
            options = weights.encoder_options(file, None if file.config.get("heads") else heads)
            heads = options["heads"]
        except SystemExit as stop:                              # nothing tells its heads, but the rest can be said
            options, heads = weights.encoder_options(file, heads=1), None
            messages.append(str(stop))
        with value_errors_exit():
            plain = weights.kind_of(file) == "ViT"
            model = weights.build(dict(options, positions="learned", pool=pool) if plain else options)
        try:
            weights.load_into(model, file, messages.append)
        except SystemExit as stop:
            messages.append(str(stop))
        count = sum(file.state[name].numel() for name, _ in model.named_parameters() if name in file.state)
        others = [name for name in file.state if name not in model.state_dict() and not name.endswith("attn_mask")]
        beside = sum(file.state[name].numel() for name in others)
        row = dict(file=path, layout=file.layout, method=file.config["method"], network=type(model).__name__,
                   **(options | {"heads": heads}),
                   heads_stored=weights.is_pyramid(file) or bool(file.config.get("heads")),
                   mean=file.config.get("mean"), std=file.config.get("std"), parameters=count, other_parameters=beside)
        for name, value in dict(row, others=weights.summary(others), loading="; ".join(messages)).items():
            print(f"  {name} {'not stored' if value is None else value}")
        rows.append(dict(row, others=others, loading=messages))
    save(cfg, "summary", rows)


# Command: what it does, its options, the least and the most files.
NETWORKS = "out heads names img_size mean std device bits value_range"
SET = f"{NETWORKS} data images batch_size workers download"
COMMANDS = dict(cka=(cka, SET, 2, 2), attention=(attention, f"{SET} patch_pixels", 1, 99),
                maps=(maps, f"{NETWORKS} pictures mass query show", 1, 99),
                correspond=(correspond, f"{SET} top draw seed", 1, 99), summary=(summary, "out heads", 1, 99),
                layers=(layers, "out heads data keep fractions script seed", 1, 1))


def main(argv=None):
    name, *argv = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if name in ("-h", "--help"):
        print(__doc__.strip())
        return
    if name not in COMMANDS:
        fail(f"{name} is not one of {', '.join(COMMANDS)}")
    run, takes, least, most = COMMANDS[name]
    end = argv.index("--") if name == "layers" and "--" in argv else len(argv)
    argv, extra = argv[:end], argv[end + 1:]
    files = list(itertools.takewhile(lambda word: not word.startswith("-"), argv))
    if not least <= len(files) <= most and not {"-h", "--help"} & {*argv}:
        wanted = {1: "one file", 2: "two files"}.get(most, "files")
        fail(f"tools.analyze {name} takes {wanted}, before any option, not {len(files)}")
    options = make_dataclass("Options", [(f.name, f.type, f) for f in fields(Config) if f.name in takes.split()])
    doc = f"python -m tools.analyze {name} FILE ...: {run.__doc__}"
    cfg = check(*read_command_line(options, doc, argv[len(files):]))
    if run is not summary and not plots.INSTALLED:              # said before the work begins: nobody has waited yet
        print("note: matplotlib is not installed (pip install '.[plot]'): numbers are written, pictures are not")
    try:
        os.makedirs(cfg.out, exist_ok=True)
        run(cfg, files, *([extra] if run is layers else []))
    except OSError as error:
        fail(f"a file cannot be read or written: {error}")


if __name__ == "__main__":
    launch(main)
