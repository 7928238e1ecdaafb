"""
What networks have learned, in pictures and numbers: which layers of two of them agree, how far their attention reaches
and what it falls on, which regions of two views find each other, which layers a fine-tuning needs; and what a file is.
https://arxiv.org/abs/2205.14443 (CKA, attention, layers), https://arxiv.org/abs/2106.09785 (regions),
https://arxiv.org/abs/2104.14294 (maps)

Agreement: python analyze.py cka A.pt B.pt --data imagenet
Attention: python analyze.py attention A.pt B.pt --names MAE MoCo            (mean distance and entropy of every head)
Maps:      python analyze.py maps A.pt --pictures dog.jpg photos --img-size 480
Regions:   python analyze.py correspond A.pt B.pt
Layers:    python analyze.py layers A.pt --fractions 1 0.1 -- --epochs 50            (after --: options of finetune.py)
A file:    python analyze.py summary A.pt B.pt
Files come first, of any layout, ViT or Swin, FILE:KEY where one holds several; COMMAND --help lists its options. Each
writes OUT/COMMAND.json and, where matplotlib is, OUT/COMMAND.png (maps: both for each file and picture; summary: no
picture). Layers: preempted, type the same command again.
Expected:  not run yet at full size; small encoders are in the README
"""
import hashlib
import itertools
import json
import math
import os
import re
import signal
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange

import training
import weights
from augment import Colours, denormalize, draw_colours, normalize, random_flip, recolour, statistics
from data import RandomCrops, decode, resize
from probe import encoded
from sources import describe, find, slurp, walk
from training import opt
from vit import Swin, ViT, cut, layer_of, pair, windows

# ----------------------------------------------------------------------------------------------------------------
# Numbers of one batch


class Layer(NamedTuple):
    """What a block sees. After the last one comes the network's normed output, with tokens alone."""
    tokens: torch.Tensor                            # (B, N, D) as its norm1 gives them, cls left out
    logits: torch.Tensor | None = None              # (B * n, H, T, T) in n windows of T tokens; a ViT has one window
    grid: tuple | None = None                       # (h, w) of a window, h * w = T
    scale: int = 1                                  # patches on a token's side: a Swin's tokens grow
    place: torch.Tensor | None = None               # (N,): which of a Swin's n * T are its tokens; others are padding


def layers_of(model, img, with_logits=False):
    """Yields every Layer of a network, one alive at a time; a ViT's logits among patches only, cls's row and column
    deleted."""
    if isinstance(model, Swin):
        x = model.patch_embed.norm(model.patch_embed(cut(img, model.patch_size)))
        for stage, (layer, grid) in enumerate(zip(model.layers, model.maps(*img.shape[-2:]))):
            for block in layer.blocks:
                tokens, side = block.norm1(x), block.attn.side
                x, logits = block(x, grid, with_logits)
                place = windows(*grid, side, block.attn.shift, x.device)[1]
                yield Layer(tokens, logits, (side, side), 2 ** stage, place)
            if "downsample" in layer:
                x = layer.downsample(x, grid)
        yield Layer(model.norm(x))
        return
    x, grid, logits = model.embed(img), model.grid_of(*img.shape[-2:]), None
    for block in model.blocks:
        tokens = block.norm1(x)[:, 1:]
        if with_logits:
            x, logits = block(x, with_logits=True)
            logits = logits[..., 1:, 1:]
        else:
            x = block(x)
        yield Layer(tokens, logits, grid)
    yield Layer(model.fc_norm(model.norm(x))[:, 1:])            # one of the two is the identity


def regions(model, img):
    """(B, C, height, width) -> normed tokens without cls, (B, N, D)."""
    return model.encode(img) if isinstance(model, Swin) else model.fc_norm(model.encode(img))[:, 1:]


def gram(x):
    """Features (n, ...) of n images -> their products (n, n), the diagonal zero; what all have in common may stay in
    them, for hsic does not see it."""
    x = x.flatten(1)
    return (x @ x.T).fill_diagonal_(0)


def hsic(K, L):
    """Gram matrices (k, n, n) and (l, n, n) without diagonals, n above 3 -> the unbiased HSIC of all pairs, (k, l)
    (Song et al. 2012): one product of flattened matrices stands for all the traces."""
    n, rows, others = K.shape[1], K.sum(2), L.sum(2)
    trace, ends = K.flatten(1) @ L.flatten(1).T, torch.outer(rows.sum(1), others.sum(1))
    return (trace + ends / ((n - 1) * (n - 2)) - 2 / (n - 2) * rows @ others.T) / (n * (n - 3))


class CKA:
    """Minibatch CKA (Nguyen et al. 2021): the three HSICs are averaged over batches, each for itself. In float64: fp32
    sums are off by 0.01 where images look much alike."""

    def __init__(self):
        self.sums, self.first = 0.0, 0

    def add(self, first, second):
        """Gram matrices of one batch: (L1, n, n) of one network, (L2, n, n) of the other."""
        both = torch.cat([first, second]).double()
        self.sums, self.first = self.sums + hsic(both, both), len(first)

    def value(self):
        """(L1, L2), at most 1; NaN for a layer that tells no image from another."""
        scale = self.sums.diagonal().sqrt()
        return (self.sums / torch.outer(scale, scale))[:self.first, self.first:]


def distances(height, width):
    """Between the patches of a grid, in patches, (N, N)."""
    y, x = torch.meshgrid(torch.arange(height).double(), torch.arange(width).double(), indexing="ij")
    at = torch.stack([y, x], -1).flatten(0, 1)
    return torch.cdist(at, at, compute_mode="donot_use_mm_for_euclid_dist")


def spread(logits, distance):
    """Logits (..., N, N) -> entropy in nats and mean distance of every query's attention, (2, ..., N)."""
    a = logits.softmax(-1)
    return torch.stack([-(a * (a + 1e-6).log()).sum(-1), (a * distance).sum(-1)])


def reach(model, img, pixels=None, even=False):
    """Normalised images -> for each block the entropy in nats and the distance in pixels of each head, means over
    queries and sums over images, [(2, H)]. pixels: those of a patch's side (default: its own); even: of attention that
    is the same everywhere."""
    found = []
    for layer in layers_of(model, img, True):
        if layer.logits is not None:
            distance = distances(*layer.grid) * layer.scale * (pixels or model.patch_size)
            logits = layer.logits.clamp(max=-50) if even else layer.logits      # a Swin's mask, -100, stays
            x = spread(logits, distance.to(logits))
            if layer.place is not None:
                x = rearrange(x, "s (b n) h t -> s b h (n t)", b=len(img))[..., layer.place]
            found.append(x.mean(-1).sum(1))
    return found


def mass_mask(a, mass=0.6):
    """Attention (..., N) -> bool: the tokens that hold this share of it, as in DINO: smallest first, those kept lie
    where the running sum is above 1 - mass."""
    share, places = (a / a.sum(-1, keepdim=True)).sort(-1)
    return torch.zeros_like(a, dtype=torch.bool).scatter(-1, places, share.cumsum(-1) > 1 - mass)


def last_attention(model, img, query=None):
    """One image (1, C, height, width) -> what each head of the last block gives to the patches, (H, h, w). query: the
    cell that asks; default: cls, of a Swin the middle. Raises ValueError beyond the map, or where a Swin's last map is
    several windows."""
    grid, swin = model.grid_of(*img.shape[-2:]), isinstance(model, Swin)
    if query is not None and query >= grid[0] * grid[1]:
        raise ValueError(f"--query {query}: the map has {grid[0]} x {grid[1]} cells, numbered from 0")
    if swin and grid != (model.layers[-1]["blocks"][-1].attn.side,) * 2:
        raise ValueError(f"a Swin's maps want a last map that is one window, not {grid[0]} x {grid[1]}: give it "
                         "another --img-size")
    if swin and query is None:
        query = grid[0] // 2 * grid[1] + grid[1] // 2
    a = model.encode(img, logits_of=(model.depth,))[1][0][0].softmax(-1)                              # (H, T, T)
    a = a[:, query] if swin else a[:, 0 if query is None else 1 + query, 1:]
    return a.unflatten(1, grid)


def matches(first, second, most=10):
    """Regions (B, N, D) of two views -> of those of the first whose nearest region of the second, by cosine, is the
    most alike, the `most` best: their numbers, those of the nearest, the cosines, each (B, at most N), best first."""
    best, nearest = (F.normalize(first, dim=-1) @ F.normalize(second, dim=-1).mT).max(-1)
    cosine, asked = best.topk(min(most, best.shape[1]), 1)
    return asked, nearest.gather(1, asked), cosine


def mirrored(cells, width):
    """Numbers of cells, in reading order, after the image was flipped left to right."""
    return cells + width - 1 - 2 * (cells % width)


# ----------------------------------------------------------------------------------------------------------------
# Files in, images in, pictures out


@dataclass
class Config:
    out: str = opt("out/analyze", "folder for the numbers and the picture")
    heads: tuple[int, ...] | None = opt(None, "attention heads of files that do not say: one for all, or one each", 1)


@dataclass
class Seeing(Config):
    names: tuple[str, ...] | None = opt(None, "what the files are called in pictures (default: by folder or file)")
    img_size: tuple[int, ...] | None = opt(None, "pixels: one number, or height and width (default: the files')", 1)
    mean: tuple[float, ...] | None = opt(None, "channel means in 0..1 (default: each file's, else ImageNet's or 0.5)")
    std: tuple[float, ...] | None = opt(None, "channel deviations in 0..1 (default: each file's, else ImageNet's)")
    device: str = opt("auto", "auto, cpu, cuda or mps")


@dataclass
class Walking(Seeing):
    data: str = opt("imagenet", "folder or tar (imagenet: ./imagenet or $IMAGENET), torchvision set by name, or "
                                "shapes; val/ is looked at if it has one")
    images: int | None = opt(None, "images looked at, in the set's order (default: 1,152; of correspond all)", 1)
    batch_size: int = opt(128, "images at a time; within them CKA is computed, and an odd rest it leaves out", 1)
    workers: int | None = opt(None, "processes that decode images (default: one per core)", 0)
    download: bool = opt(False, "fetch --data if it is a torchvision set that is not there yet")


@dataclass
class OfAttention(Walking):
    patch_pixels: float | None = opt(None, "what a patch's side counts in distances (default: its pixels; the paper's "
                                           "figures count 14 for 16)", 0)


@dataclass
class OfMaps(Seeing):
    pictures: tuple[str, ...] | None = opt(None, "image files, or folders of them; resized to --img-size (DINO: 480)")
    mass: float = opt(0.6, "share of a head's attention that its mask keeps", 0)
    query: int | None = opt(None, "cell that asks, from 0 in reading order (default: cls; of a Swin the middle)", 0)
    show: int = opt(4, "heads drawn, evenly from the widest attention to the narrowest", 1)


@dataclass
class OfRegions(Walking):
    top: int = opt(10, "matches of an image that count, the best ones", 1)
    draw: int = opt(4, "images whose matches are drawn", 1)
    seed: int = opt(0, "views follow from it and from the image's number", 0)


@dataclass
class OfLayers(Config):
    data: str = opt("imagenet", "set to train on and be judged by, as everywhere")
    keep: tuple[int, ...] | None = opt(None, "numbers of pre-trained blocks to keep (default: five, from 0 to all)", 0)
    fractions: tuple[float, ...] = opt((1.0,), "shares of the training images; each is a curve", 0)
    script: str = opt("finetune", "finetune, or probe: then accuracy is that of frozen features")
    seed: int = opt(0, "fresh blocks and all runs follow from it", 0)


class Net(NamedTuple):
    """A network, and how it wants to see images."""
    path: str
    label: str
    model: torch.nn.Module
    mean: tuple
    std: tuple

    def see(self, img):
        return normalize(img, self.mean, self.std)


def readout_of(file):
    return "avg" if "fc_norm.weight" in file.state else "cls"


def per_file(name, given, files):
    """An option's value for each file: one for all, or one each."""
    given = given or (None,)
    if len(given) not in (1, len(files)):
        training.die(f"--{name} has {len(given)} values for {len(files)} files")
    return given * len(files) if len(given) == 1 else given


def label_of(path):
    """out/mae/encoder.pt -> mae; mae_tiny.pth -> mae_tiny; all.pth:student -> all:student"""
    folder, name = os.path.split(os.path.abspath(path))
    name, _, key = name.partition(":")
    stem = os.path.splitext(name)[0]
    label = os.path.basename(folder) if stem in ("encoder", "best", "last", "checkpoint", "model") else stem
    return f"{label}:{key}" if key else label


def named(label):
    """What a file of a picture is called by."""
    return re.sub("[^A-Za-z0-9._]+", "-", label)


def load(cfg, files):
    """The files' networks, in eval mode on the device -> them, and the device."""
    _, world, device = training.setup(cfg.device)
    if world > 1:
        training.die("analyze.py is one process: start it with python, not torchrun")
    torch.set_float32_matmul_precision("highest")               # products are exact: TF32's would show
    nets = []
    for path, label, heads in zip(files, per_file("names", cfg.names, files), per_file("heads", cfg.heads, files)):
        file = weights.read(path)
        with training.in_words():
            size = dict(img_size=pair(cfg.img_size)) if cfg.img_size else {}
            model = weights.build_vit(path, None if file.config.get("heads") else heads, print,
                                      readout=readout_of(file), **size)
            channels = model.config["in_chans"]
            mean, std = statistics(channels, *(tuple(getattr(cfg, k) or file.config.get(k) or ()) or None
                                               for k in ("mean", "std")))
        if channels not in (1, 3, 4):
            training.die(f"{path} sees {channels} channels: images have 1, 3 or 4")
        label = label or label_of(path)
        while named(label) in [named(net.label) for net in nets]:
            label += "_2"
        nets.append(Net(path, label, model.requires_grad_(False).to(device), mean, std))
    return nets, device


def sight_of(nets):
    """Height, width and channels of the images that all networks see."""
    seen = {(*pair(net.model.config["img_size"]), net.model.config["in_chans"]) for net in nets}
    if len(seen) > 1:
        training.die(f"the networks see different images (height, width, channels: {sorted(seen)}): --img-size makes "
                     "sizes alike, nothing channels")
    return seen.pop()


def open_set(cfg, most):
    """The images of --data, and how many of them are looked at: `most`, or all for None."""
    source = find(cfg.data, "val", cfg.download)
    source = find(cfg.data, "train", cfg.download) if source is None else source
    print(describe(source))
    return source, min(len(source), most or len(source))


def batches(cfg, nets, source, count, device):
    """Yields (numbers, uint8 (B, C, h, w) on the device): the evaluation crops of the first `count` images, with lines
    of progress. Networks normalise them, each in its own way."""
    *size, channels = sight_of(nets)
    crops = encoded(lambda img: img.round().to(torch.uint8), source, range(count), tuple(size), channels,
                    (0.0,) * channels, (1 / 255,) * channels, device, cfg.batch_size, cfg.workers)
    for where, img, _ in crops:
        yield range(count)[where], img


def painter():
    """matplotlib, or None, said before the work begins: whoever wants the picture has not waited yet, and whoever is on
    a machine without it still gets the numbers."""
    try:
        import matplotlib.figure
    except ImportError:
        print("note: matplotlib is not here (pip install '.[plot]'): the numbers are written, no picture", flush=True)
        return None
    colours = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]     # Okabe and Ito's
    matplotlib.rcParams.update({"font.size": 10, "savefig.dpi": 150, "figure.constrained_layout.use": True,
                                "axes.prop_cycle": matplotlib.cycler(color=colours)})
    return matplotlib


def plain(x):
    """Tensors, also in lists, as numbers of six digits that JSON knows."""
    if isinstance(x, list) or x.dim():
        return [plain(row) for row in x]
    return None if x.isnan() else float(f"{x.item():.6g}")


def save(cfg, name, numbers, figure=None):
    """Write OUT/name.json, and OUT/name.png: the old file or the new one, never half of one."""
    path = os.path.join(cfg.out, name)
    try:
        with open(f"{path}.json.tmp", "w") as f:
            json.dump(numbers, f, indent=1)
        os.replace(f"{path}.json.tmp", f"{path}.json")
        if figure:
            figure.savefig(f"{path}.png.tmp", format="png")
            os.replace(f"{path}.png.tmp", f"{path}.png")
    except OSError as error:
        training.die(f"--out {cfg.out} cannot be written: {error}")


def facts(nets, source, count):
    return dict(files=[net.path for net in nets], names=[net.label for net in nets], data=source.where, images=count,
                img_size=sight_of(nets)[:2], mean=[net.mean for net in nets], std=[net.std for net in nets])


# ----------------------------------------------------------------------------------------------------------------
# The commands


def cka(cfg, files, plt):
    """CKA of every layer of A with every layer of B: norm1 of each block, then the normed output, without cls."""
    nets, device = load(cfg, files)
    source, count = open_set(cfg, cfg.images or cfg.batch_size * (1024 // cfg.batch_size + 1))      # as published
    whole = count - count % cfg.batch_size or count
    if min(whole, cfg.batch_size) < 4:
        training.die(f"CKA needs batches of 4 images or more, not {min(whole, cfg.batch_size)}")
    found = CKA()
    for _, img in batches(cfg, nets, source, whole, device):
        found.add(*(torch.stack([gram(layer.tokens) for layer in layers_of(net.model, net.see(img))]).cpu()
                    for net in nets))
    value, (one, two) = found.value(), (net.label for net in nets)
    figure = None
    if plt:
        figure = plt.figure.Figure((4.2, 3.7))
        axis = figure.subplots()
        picture = axis.imshow(value.numpy(), cmap="magma", vmin=0, vmax=1, origin="lower")
        ticks = [range(0, n, max(1, (n - 1) // 4)) for n in value.shape]
        axis.set(xlabel=f"layer of {two}", ylabel=f"layer of {one}", xticks=ticks[1], yticks=ticks[0])
        figure.colorbar(picture, label="CKA")
    save(cfg, "cka", dict(facts(nets, source, whole), batch_size=min(whole, cfg.batch_size), cka=plain(value)), figure)
    print(f"{whole:,} images in batches of {min(whole, cfg.batch_size)}" + f"; {count - whole} more are no whole batch "
          "and were left out" * (count > whole))
    for i, (best, j) in enumerate(zip(*value.nan_to_num(-1).max(1))):
        print(f"layer {i} of {one} is most like layer {j} of {two}: {best:.3f}")


def attention(cfg, files, plt):
    """Mean distance and entropy of every head's attention among patches, cls deleted before the softmax."""
    nets, device = load(cfg, files)
    source, count = open_set(cfg, cfg.images or 1152)
    sums = [itertools.repeat(0)] * len(nets)
    for _, img in batches(cfg, nets, source, count, device):
        for (i, net), part in itertools.product(enumerate(nets), img.split(32)):                # logits are large
            found = reach(net.model, net.see(part), cfg.patch_pixels)
            sums[i] = [x + y.cpu().double() for x, y in zip(sums[i], found)]
    rows = []
    for net, found in zip(nets, sums):
        found, even = [x / count for x in found], reach(net.model, net.see(img[:1]), cfg.patch_pixels, even=True)
        rows.append(dict(name=net.label, entropy=plain([x[0] for x in found]), distance=plain([x[1] for x in found]),
                         uniform_entropy=plain([x[0, 0] for x in even]),
                         uniform_distance=plain([x[1, 0] for x in even])))
        print(f"{net.label}, block: mean distance in pixels, entropy in nats of its heads (least to most)")
        for number, (entropy, distance) in enumerate(found, 1):
            print(f"  {number:2}: {distance.mean():6.1f} ({distance.min():.1f} to {distance.max():.1f})  "
                  f"{entropy.mean():.2f} ({entropy.min():.2f} to {entropy.max():.2f})")
    save(cfg, "attention", dict(facts(nets, source, count), patch_pixels=cfg.patch_pixels, networks=rows),
         plt and draw_attention(plt, rows))


def draw_attention(plt, rows):
    figure = plt.figure.Figure((4.2 * len(rows), 5.2))
    axes = figure.subplots(2, len(rows), sharex="col", sharey="row", squeeze=False)
    for column, row in enumerate(rows):
        for axis, what in zip(axes[:, column], ("distance", "entropy")):
            blocks = range(1, len(row[what]) + 1)
            axis.plot(blocks, row[f"uniform_{what}"], "--", color="gray", label="uniform attention")
            axis.plot([b for b, heads in zip(blocks, row[what]) for _ in heads], sum(row[what], []), "o", alpha=0.5,
                      markersize=4, label="a head")
            axis.plot(blocks, [sum(heads) / len(heads) for heads in row[what]], label="mean")
            axis.set_xticks(range(1, len(blocks) + 1, 1 + len(blocks) // 13))
        axes[0, column].set_title(row["name"])
        axes[1, column].set_xlabel("block")
    for axis, label in zip(axes[:, 0], ("mean distance, pixels", "entropy, nats")):
        axis.set_ylabel(label)
        axis.set_ylim(0)                                        # now that all columns have widened it
    axes[1, 0].legend(fontsize=9)
    return figure


def maps(cfg, files, plt):
    """What each head of the last block looks at in given images, and where --mass of it lies; widest heads first."""
    paths = [path for given in cfg.pictures or () for path in
             (walk(given, Counter()) if os.path.isdir(given) else [given])]
    if not paths:
        training.die("which images? give --pictures FILE ..., or a folder with some")
    if cfg.mass > 1:
        training.die(f"--mass is at most 1, not {cfg.mass:g}")
    nets, device = load(cfg, files)
    stems = [os.path.splitext(os.path.basename(path))[0] for path in paths]
    stems = [f"{stem}-{i}" if stems.count(stem) > 1 else stem for i, stem in enumerate(stems, 1)]
    for net, (path, stem) in itertools.product(nets, zip(paths, stems)):
        config, name = net.model.config, f"maps-{named(net.label)}-{stem}"
        try:
            img = resize(decode(slurp(path), config["in_chans"]), pair(config["img_size"]), "bicubic").unsqueeze(0)
        except Exception as error:                              # damaged files raise nearly anything
            training.die(f"{path} cannot be read as an image: {(str(error).splitlines() or ['it is empty'])[0][:80]}")
        with training.in_words():
            a = last_attention(net.model, net.see(img.to(device)), cfg.query).cpu()             # (H, h, w)
        share = a / a.sum((1, 2), keepdim=True)
        bits, mask = -(share * share.clamp(min=1e-12).log2()).sum((1, 2)), mass_mask(a.flatten(1), cfg.mass).view_as(a)
        order = bits.argsort(descending=True)
        heads = [dict(head=k + 1, bits=plain(bits[k]), attention=plain(a[k]), mask=mask[k].int().tolist())
                 for k in order.tolist()]
        save(cfg, name, dict(file=net.path, picture=path, img_size=img.shape[2:], mean=net.mean, std=net.std,
                             query=cfg.query, mass=cfg.mass, heads=heads),
             plt and draw_maps(plt, img[0], a, mask, bits, order[spaced(len(order), cfg.show)].tolist()))
        print(f"{cfg.out}/{name}: heads have {bits.min():.2f} to {bits.max():.2f} of {math.log2(a[0].numel()):.2f} bits"
              f" of entropy, and {cfg.mass:.0%} of their mass on {mask.float().mean():.0%} of the cells")


def spaced(count, most):
    """`most` numbers, or all, evenly from the first of `count` to the last."""
    return torch.linspace(0, count - 1, min(most, count)).round().long().tolist()


def draw_maps(plt, img, a, mask, bits, heads):
    (h, w), grey = img.shape[1:], img[:3].float().mean(0).numpy()
    figure = plt.figure.Figure((0.95 * (1 + len(heads)), 0.45 + 1.9 * h / w))
    axes = figure.subplots(2, 1 + len(heads))
    axes[0, 0].imshow(img.permute(1, 2, 0)[..., :3].numpy(), cmap="gray", vmin=0, vmax=255)
    axes[0, 0].set_title("image", fontsize=9)
    for (top, below), k in zip(axes.T[1:], heads):
        top.imshow(a[k].numpy(), cmap="magma", extent=(0, w, h, 0))
        top.set_title(f"head {k + 1}\n{bits[k]:.1f} bit", fontsize=9)
        below.imshow(grey, cmap="gray", vmin=0, vmax=255)
        below.imshow(mask[k].float().numpy(), cmap="viridis", alpha=0.6, extent=(0, w, h, 0), vmin=-0.2, vmax=1)
    for axis in axes.flat:
        axis.axis("off")
    return figure


def correspond(cfg, files, plt):
    """How often a region's match in the flipped, recoloured, grey image is its mirror image; matches between crops."""
    nets, device = load(cfg, files)
    source, count = open_set(cfg, cfg.images)
    size = sight_of(nets)[:2]
    grids = [net.model.grid_of(*size) for net in nets]
    right, error = torch.zeros(2, len(nets), dtype=torch.float64)
    for numbers, img in batches(cfg, nets, source, count, device):
        drawn = []
        for number in numbers:                                  # so that views do not depend on --batch-size
            training.seed_for(cfg.seed, number, 0)
            drawn.append(draw_colours(1, p_grey=1.0))
        colours = Colours(*map(torch.cat, zip(*drawn)))
        for i, (net, (h, w)) in enumerate(zip(nets, grids)):
            mirror = recolour(img.flip(-1), colours, net.mean, net.std)
            asked, found, _ = matches(*(regions(net.model, view) for view in (net.see(img), mirror)), cfg.top)
            true = mirrored(asked, w)
            far = torch.hypot((found // w - true // w) * (size[0] / h), (found % w - true % w) * (size[1] / w))
            right[i] += (found == true).float().mean(1).sum().cpu()
            error[i] += far.mean(1).sum().cpu()
    rows = [dict(name=net.label, grid=grid, top=min(cfg.top, math.prod(grid)), accuracy=100 * r.item() / count,
                 chance=100 / math.prod(grid), error_pixels=e.item() / count)
            for net, grid, r, e in zip(nets, grids, right, error)]
    figure, drawn = draw_matches(plt, cfg, nets, grids, source, spaced(count, cfg.draw)) if plt else (None, [])
    save(cfg, "correspond", dict(facts(nets, source, count), seed=cfg.seed, networks=rows, drawn=drawn), figure)
    for row in rows:
        print(f"{row['name']}: {row['accuracy']:.2f}% of the {row['top']} best of {math.prod(row['grid'])} regions "
              f"find their mirror image (by chance {row['chance']:.2f}%), mean error {row['error_pixels']:.1f} pixels")


def draw_matches(plt, cfg, nets, grids, source, numbers):
    """Of each image the whole beside a random crop of about half of it, flipped and recoloured as chance has it, and
    the best matches of their regions -> figure, and what is in it."""
    *size, channels = sight_of(nets)
    whole, part = (RandomCrops(source, size, channels, cfg.seed, scale, "bicubic") for scale in ((1, 1), (0.4, 0.6)))
    gap, device, drawn = size[1] // 16, next(nets[0].model.parameters()).device, []
    figure = plt.figure.Figure((4.2 * len(nets), 0.3 + 2 * len(numbers) * size[0] / size[1]))
    axes = figure.subplots(len(numbers), len(nets), squeeze=False)
    for row, number in zip(axes, numbers):
        training.seed_for(cfg.seed, number, 1)
        one, two = whole.__getitems__([(0, number)])[0], random_flip(part.__getitems__([(1, number)])[0])
        colours = draw_colours(1)
        for axis, net, (h, w) in zip(row, nets, grids):
            other = recolour(two, colours, net.mean, net.std)
            found = matches(*(regions(net.model, view.to(device)) for view in (net.see(one), other)), cfg.top)
            found = list(zip(*(x[0].tolist() for x in found)))
            drawn.append(dict(name=net.label, image=source.name(number), matches=found))
            white = torch.full((channels, size[0], gap), 255, dtype=torch.uint8)
            both = torch.cat([one[0], white, denormalize(other, net.mean, net.std)[0]], 2)
            axis.imshow(both.permute(1, 2, 0)[..., :3].numpy(), cmap="gray", vmin=0, vmax=255)
            for rank, (asked, match, _) in reversed([*enumerate(found)]):                       # the best on top
                colour = plt.colormaps["viridis"](rank / max(1, len(found) - 1))
                at = [((cell % w + 0.5) * size[1] / w + left, (cell // w + 0.5) * size[0] / h)
                      for cell, left in ((asked, 0), (match, size[1] + gap))]
                axis.plot(*zip(*at), color=colour)
                for x, y in at:
                    axis.text(x, y, rank + 1, fontsize=9, ha="center", va="center", color="wk"[2 * rank > len(found)],
                              bbox=dict(boxstyle="circle,pad=0.15", color=colour))
    for axis in axes.flat:
        axis.axis("off")
    for axis, net in zip(axes[0], nets):
        axis.set_title(net.label)
    return figure, drawn


def keep_only(path, heads, k, seed, out):
    """Write a file's encoder with its embeddings and first k blocks; the other blocks, and then the final norm, are
    fresh."""
    file = weights.read(path)
    model = weights.build_vit(path, heads, lambda text: None, readout=readout_of(file))
    torch.manual_seed(seed)
    state, fresh = model.state_dict(), type(model)(**model.config).state_dict()
    if k < model.depth:
        state |= {name: fresh[name] for name in state if layer_of(model, name) > k}
    config = model.config | {x: file.config[x] for x in ("mean", "std") if file.config.get(x)}
    training.write(dict(method=file.config["method"], config=config, model=state), out)


def run_script(command):
    """A script of this folder in a process of its own; signals are passed on -> its exit code."""
    command = [sys.executable, os.path.join(os.path.dirname(os.path.abspath(__file__)), command[0]), *command[1:]]
    child = subprocess.Popen(command)
    old = {number: signal.signal(number, lambda number, _: child.send_signal(number))
           for number in (signal.SIGTERM, signal.SIGUSR1)}
    old[signal.SIGINT] = signal.signal(signal.SIGINT, lambda *_: None)      # a terminal's Ctrl-C reaches both
    code = child.wait()
    for number, handler in old.items():
        signal.signal(number, handler)
    return code


def accuracies_in(folder):
    """Top-1 accuracies in a run's log, in their order; none if the run is not at its end."""
    with open(os.path.join(folder, "log.jsonl")) as f:
        text = f.read()
    steps = int(re.findall(r'"steps": (\d+)', text)[-1])
    found = re.findall(r'(?:"step": (\d+), .*)?"test_acc1": ([\d.]+)', text)
    return [float(x) for _, x in found] if found and int(found[-1][0] or steps) == steps else []


def layers(cfg, files, plt, extra):
    """Accuracy against the number of pre-trained blocks that a fine-tuning starts from; the others start fresh."""
    path, = files
    file = weights.read(path)
    heads = None if file.config.get("heads") or not cfg.heads else cfg.heads[0]
    depth = weights.build_vit(path, heads, lambda text: None, readout=readout_of(file)).depth
    ks = cfg.keep or sorted({round(depth * i / 4) for i in range(5)})
    if max(ks) > depth:
        training.die(f"--keep {max(ks)}: {path} has {depth} blocks")
    if cfg.script not in ("finetune", "probe"):
        training.die(f"--script is finetune or probe, not {cfg.script}")
    if cfg.script == "probe":
        if {"knn", "features"} & {*extra}:
            training.die("--script probe goes with --protocol sweep, mae, moco or dino, which end in one accuracy")
        extra = extra if "--protocol" in extra else ["--protocol", "sweep", *extra]
    if taken := [word for word in extra if re.match("--(init|data|out|fraction|seed)", word)]:
        training.die(f"{taken[0]} may not follow --: every run has its own, or the one given before")
    with open(file.path, "rb") as f:
        whose = dict(file=path, sha256=hashlib.file_digest(f, "sha256").hexdigest(), seed=cfg.seed, depth=depth,
                     key=path.removeprefix(file.path), heads=heads)
    try:
        with open(os.path.join(cfg.out, "layers.json")) as f:
            known = json.load(f)
    except (OSError, ValueError):
        known = dict(whose, runs=[])
    if any(known.get(k) != whose[k] for k in ("sha256", "key", "heads", "seed")):
        training.die(f"{cfg.out}/layers.json belongs to {known.get('file')}, which may have changed, and --seed "
                     f"{known.get('seed')}, --heads {known.get('heads')}: give another --out")
    runs = {(run["fraction"], run["keep"]): run for run in known["runs"]}
    save(cfg, "layers", known)
    for fraction, k in itertools.product(cfg.fractions, ks):
        init, out = (os.path.join(cfg.out, name) for name in (f"keep-{k}.pt", f"keep-{k}-{fraction:g}"))
        command = [f"{cfg.script}.py", "--init", init, "--data", cfg.data, "--out", out, "--fraction", f"{fraction:g}",
                   "--seed", str(cfg.seed), *extra]
        if runs.get((fraction, k), {}).get("command") == command:
            continue
        keep_only(path, heads, k, cfg.seed, init)
        print(f"the first {k} of {depth} blocks, {fraction:g} of the images: {' '.join(command)}", flush=True)
        if run_script(command):
            training.die(f"{cfg.script}.py failed with the first {k} blocks: its own words are above")
        found = accuracies_in(out)
        if not found:
            print("stopped: the same command goes on from there")
            return
        runs[fraction, k] = dict(fraction=fraction, keep=k, last=found[-1], best=max(found), command=command)
        save(cfg, "layers", dict(whose, runs=[runs[key] for key in sorted(runs)]), plt and draw_layers(plt, runs))
    for (fraction, k), run in sorted(runs.items()):
        print(f"{fraction:g} of the images, the first {k} of {depth} blocks: top-1 {run['last']:.2f}% at the end, "
              f"{run['best']:.2f}% at best")


def draw_layers(plt, runs):
    figure = plt.figure.Figure((4.2, 3.2))
    axis = figure.subplots()
    for fraction, marker in zip(sorted({fraction for fraction, _ in runs}, reverse=True), itertools.cycle("osD^v")):
        ks = sorted(k for f, k in runs if f == fraction)
        axis.plot(ks, [runs[fraction, k]["last"] for k in ks], f"-{marker}", label=f"{100 * fraction:g}% of the images")
    axis.set(xlabel="pre-trained blocks kept", ylabel="top-1 accuracy, %", xticks=sorted({k for _, k in runs}))
    axis.legend(fontsize=9)
    return figure


def summary(cfg, files):
    """What files are: layout, method, architecture, heads, parameters, and what would be missing if loaded here."""
    rows = []
    for path, heads in zip(files, per_file("heads", cfg.heads, files)):
        file, said, unknown = weights.read(path), [], ""
        swin, stored = weights.is_swin(file), bool(file.config.get("heads"))
        try:
            shape = weights.swin_shape_of(file) if swin else weights.shape_of(file, None if stored else heads)
        except SystemExit as stop:                              # nobody knows its heads, which is worth telling
            shape, unknown = weights.shape_of(file, 1), str(stop)
        with training.in_words():
            model = Swin(**shape) if swin else ViT(**shape, readout=readout_of(file), positions="learned")
        try:
            weights.load_into(model, file, said.append)
        except SystemExit as stop:
            said.append(str(stop))
        ours, state = dict(model.named_parameters()), model.state_dict()
        other = [k for k in file.state if k not in state and not k.endswith("attn_mask")]
        shape |= dict(heads=None) if unknown else {}
        rows.append(dict(file=path, layout=file.layout, method=file.config["method"], network="Swin" if swin else "ViT",
                         **shape, heads_stored=stored or swin, note=unknown, loading=said, others=other,
                         parameters=sum(t.numel() for k, t in file.state.items() if k in ours),
                         other_parameters=sum(file.state[k].numel() for k in other),
                         **{k: file.config.get(k) for k in ("mean", "std")}))
        r, size = rows[-1], ", ".join(f"{k} {v}" for k, v in shape.items() if v is not None)
        print(f"{path}: {file.layout}; method {r['method'] or 'not stored'}\n  {r['network']}: {size}"
              f"{'' if r['heads_stored'] else '; heads not stored'}; mean {r['mean'] or 'not stored'}, std "
              f"{r['std'] or 'not stored'}\n  {r['parameters'] / 1e6:.3f} M parameters in the encoder, "
              f"{r['other_parameters'] / 1e6:.3f} M beside it: {weights.summary(other)}")
        print("".join(f"  {line}\n" for line in (*said, unknown) if line), end="", flush=True)
    save(cfg, "summary", rows)


# ----------------------------------------------------------------------------------------------------------------

# Command: what it does, its options, the least and the most files.
COMMANDS = dict(cka=(cka, Walking, 2, 2), attention=(attention, OfAttention, 1, 99), maps=(maps, OfMaps, 1, 99),
                correspond=(correspond, OfRegions, 1, 99), layers=(layers, OfLayers, 1, 1),
                summary=(summary, Config, 1, 99))


def main(argv=None):
    name, *argv = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if name in ("-h", "--help"):
        print(__doc__.strip())
        return
    if name not in COMMANDS:
        training.die(f"analyze.py: {name} is not one of {', '.join(COMMANDS)} (--help tells about them)")
    run, options, least, most = COMMANDS[name]
    end = argv.index("--") if name == "layers" and "--" in argv else len(argv)
    argv, extra = argv[:end], argv[end + 1:]
    first = next((i for i, word in enumerate(argv) if word.startswith("-")), len(argv))
    files, help = argv[:first], {"-h", "--help"} & {*argv}
    if not help and not least <= len(files) <= most:
        training.die(f"analyze.py {name} takes {('one file', 'two files')[most - 1] if most < 3 else 'files'}, before "
                     f"any option, not {len(files)}")
    cfg, _ = training.parse(options, f"python analyze.py {name} FILE ...: {run.__doc__}", argv[first:])
    try:
        os.makedirs(cfg.out, exist_ok=True)
    except OSError as error:
        training.die(f"--out {cfg.out} cannot be written: {error}")
    more = ([] if run is summary else [painter()]) + ([extra] if run is layers else [])
    run(cfg, files, *more)


if __name__ == "__main__":
    training.launch(main)
