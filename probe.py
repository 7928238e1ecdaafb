"""
What frozen features know: a k-NN vote, linear probes by the official laws, a sweep of learning rates over features that
are kept; or the features themselves, as files.

k-NN:      python probe.py --init out/mae/encoder.pt                             (any layout, mae_pretrain_vit_base.pth)
Linear:    torchrun --standalone --nproc_per_node=8 probe.py --protocol mae --init out/mae/encoder.pt
One GPU:   python probe.py --protocol moco --init moco.pth.tar --accum 2         (mae, moco and dino are the laws)
Quickly:   python probe.py --protocol sweep --init out/mae/encoder.pt            (20 linear heads at once)
Files:     python probe.py --protocol features --init out/mae/encoder.pt --split val --tokens cls patches
To try it: python mae.py --demo && python probe.py --demo
Preempted: type the same command again
Expected:  not run yet at full size; the demo's lines are in the README

The methods call `probe` between epochs (--probe-every) and at the end of their demos.
"""
import hashlib
import math
import os
import re
import shutil
import time
from dataclasses import dataclass, replace
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP

import training
from augment import normalize, random_flip, statistics
from data import CROPS, CenterCrops, DeviceCrops, RandomCrops, keys, load
from sources import describe, parts, same_classes
from training import Plumbing, opt
from vit import Block, Swin, pair
from weights import build_vit, read

# ----------------------------------------------------------------------------------------------------------------
# Features


def features(vit, img, readout="cls", blocks=1):
    """Normalised images (B, C, h, w) -> what is read of the last `blocks` blocks, each through the final norm, the
    oldest first: (B, blocks * D), or twice that for "both".

    readout: "cls"; "avg", the mean of the patch tokens; "both", interleaved: cls 0, avg 0, cls 1, avg 1, ... (DINO)
    A Swin has "avg" alone, and of earlier stages less than D numbers, without the norm (EsViT).
    """
    if isinstance(vit, Swin):
        return vit.last_features(img, blocks)
    x, found, depth = vit.embed(img), [], len(vit.blocks)
    for i, block in enumerate(vit.blocks):
        x = block(x)
        if i >= depth - blocks:
            tokens = vit.norm(x)                                # of norm and fc_norm one is the identity
            cls, avg = tokens[:, 0], vit.fc_norm(tokens[:, 1:].mean(1))
            found.append(dict(cls=cls, avg=avg, both=torch.stack([cls, avg], -1).flatten(1))[readout])
    return torch.cat(found, 1)


def total(x):
    """The sum over processes, in place."""
    if dist.is_initialized():
        dist.all_reduce(x)
    return x


@torch.no_grad()
def encoded(encode, source, indices, size, channels, mean, std, device, batch=256, workers=0, max_unreadable=1.0):
    """Yields (slice of `indices`, what encode makes of these evaluation crops, labels). Each process takes every
    world-th image, none twice. Ends in a sentence if more than a share `max_unreadable` cannot be read."""
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    mine, bad = range(rank, len(indices), world), 0
    places = [mine[i:i + batch] for i in range(0, len(mine), batch)]
    loader = load(CenterCrops(source, size, channels), [[indices[i] for i in part] for part in places], workers,
                  device.type == "cuda")
    began = said = time.time()
    for part, (img, labels, failed) in zip(places, loader):
        for name in failed:
            print(f"warning: {name} cannot be read; another image takes its place", flush=True)
        bad += len(failed)
        yield (slice(part.start, part.stop, world), encode(normalize(img.to(device, non_blocking=True), mean, std)),
               labels)
        if rank == 0 and time.time() - said > 10:
            said, done = time.time(), part[-1] + 1
            left = timedelta(seconds=round((len(indices) - done) / done * (said - began)))
            print(f"{done:,} of {len(indices):,} images, {done / (said - began):.0f} a second, eta {left}", flush=True)
    if len(mine) >= 200 and bad > max_unreadable * len(mine):
        raise SystemExit(f"{bad} of {len(mine)} images under {source.where} could not be read, more than "
                         f"--max-unreadable {max_unreadable:g} allows")


def extract(encode, source, indices, size, channels, mean, std, device, **options):
    """Features of the evaluation crops of source[indices] -> ((n, D) fp32, labels (n,)) on the CPU, in the order of
    `indices`; of each process's share all get the whole. encode: normalised images -> (B, D); see `encoded`."""
    found, n = [], len(indices)
    for where, x, labels in encoded(encode, source, indices, size, channels, mean, std, device, **options):
        found = found or [torch.zeros(n, *x.shape[1:]), torch.zeros(n, dtype=torch.int64)]
        found[0][where], found[1][where] = x.float(), labels
    if dist.is_initialized():
        shapes = [None] * dist.get_world_size()
        dist.all_gather_object(shapes, found and found[0].shape)            # nothing, where ranks outnumber images
        found = found or [torch.zeros(next(filter(None, shapes))), torch.zeros(n, dtype=torch.int64)]
        for part in (part for whole in found for part in whole.split(2 ** 16)):
            part.copy_(total(part.to(device)))                              # what is another's is zero here
    return found


# ----------------------------------------------------------------------------------------------------------------
# Accuracy, k-NN, closed-form linear


def tally(scores, labels):
    """Scores (n, C), labels (n,) -> (3, C): images of each class, those right, those with the label among the best
    five. Of equal scores the first class wins, a NaN beats all. Such counts add up, over batches and processes."""
    own, number = scores.gather(1, labels[:, None]), torch.arange(scores.shape[1], device=labels.device)
    ahead = (~(scores <= own) | (scores == own) & (number < labels[:, None])).sum(1)        # its rank, without a sort
    rows = torch.stack([ahead >= 0, ahead < 1, ahead < 5]).float()
    return torch.zeros(3, scores.shape[1], device=labels.device).index_add_(1, labels, rows)


def accuracies(counts):
    """Counts (3, C) -> top-1, top-5 and mean-per-class top-1 in percent; classes without images do not count."""
    images, right, five = counts.cpu().double()
    share = dict(test_acc1=right.sum() / images.sum(), test_acc5=five.sum() / images.sum(),
                 test_class_acc=(right / images)[images > 0].mean())
    return {k: round(100 * v.item(), 4) for k, v in share.items()}


def neighbours(train, test, k, most=2 ** 26):
    """The k of train (n, D) with the largest products with each of test (b, D) -> products (b, k), falling, and their
    places in train. Exact; never more than `most` products at a time, however many images there are."""
    best, places = test.new_empty(len(test), 0), torch.empty(len(test), 0, dtype=torch.int64, device=test.device)
    rows, precision = max(k, most // max(1, len(test))), torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")               # TF32 would swap near neighbours
    for first in range(0, len(train), rows):
        new, at = (test @ train[first:first + rows].T).topk(min(k, rows, len(train) - first), 1)
        best, places = torch.cat([best, new], 1), torch.cat([places, at + first], 1)
        best, order = best.topk(min(k, best.shape[1]), 1)
        places = places.gather(1, order)
    torch.set_float32_matmul_precision(precision)
    return best, places


def votes(train, train_labels, test, ks, classes, temperature=0.07):
    """Class votes for every k of `ks` from one search -> {k: (b, C)} (Wu et al. 2018, as in DINO): each of the k
    nearest votes exp(cosine / temperature). train (n, D) and test (b, D) are normalised."""
    similarity, places = neighbours(train, test, max(ks))
    weight, labels, found, first = (similarity / temperature).exp(), train_labels[places], {}, 0
    sums = torch.zeros(len(test), classes, device=test.device)
    for k in sorted(ks):                                        # the k nearest are a prefix of the next k's
        sums = sums.scatter_add(1, labels[:, first:k], weight[:, first:k])
        found[k], first = sums, k
    return found


def knn_counts(train, train_labels, test, test_labels, ks, classes, temperature=0.07):
    """Features (n, D) and (m, D) with labels -> {k: counts as `tally` gives them}."""
    train, counts = F.normalize(train, dim=1), dict.fromkeys(ks, 0)
    for part, labels in zip(test.split(1024), test_labels.split(1024)):
        for k, scores in votes(train, train_labels, F.normalize(part, dim=1), ks, classes, temperature).items():
            counts[k] = counts[k] + tally(scores, labels)
    return counts


def knn(train, train_labels, test, test_labels, k=20, temperature=0.07):
    """Weighted k-NN accuracy in percent."""
    classes = int(max(train_labels.max(), test_labels.max())) + 1
    return accuracies(knn_counts(train, train_labels, test, test_labels, (k,), classes, temperature)[k])["test_acc1"]


def linear(train, train_labels, test, test_labels):
    """Accuracy in percent of ridge regression to one-hot labels, in closed form; the penalty is the one of nine that
    does best on the fifth of the training features it was not fitted on."""
    mean, std = train.mean(0), train.std(0) + 1e-6
    train, test = ((x - mean).div(std).double() for x in (train, test))
    target = F.one_hot(train_labels).double() - 1 / (train_labels.max() + 1)
    held_out = torch.arange(len(train)) % 5 == 0

    def fit(x, y):
        values, vectors = torch.linalg.eigh(x.T @ x)                        # one decomposition serves every penalty
        projected = vectors.T @ (x.T @ y)
        return lambda penalty: vectors @ (projected / (values + penalty * len(x))[:, None])

    tried, penalties = fit(train[~held_out], target[~held_out]), [10.0 ** e for e in range(-5, 4)]
    best = max(penalties, key=lambda p: ((train[held_out] @ tried(p)).argmax(1) == train_labels[held_out]).sum().item())
    return 100 * ((test @ fit(train, target)(best)).argmax(1) == test_labels).double().mean().item()


def probe(encode, train, val, size, channels, mean, std, device, workers, log, step, limit=(5_000, 2_000)):
    """k-NN and linear accuracy of an encoder on two labelled sources, in percent, into the log and on the screen.

    Of large sources `limit` random images are used, always the same: a number to watch during a run, not to publish.
    """
    sets = []
    for source, most in zip((train, val), limit):
        indices = torch.randperm(len(source), generator=torch.Generator().manual_seed(0))[:most].tolist()
        sets += extract(encode, source, indices, size, channels, mean, std, device, workers=workers)
    if log.rank == 0:
        found = dict(knn=round(knn(*sets), 2), linear=round(linear(*sets), 2))
        log.note(step=step, **found)
        print(f"frozen features after step {step}: k-NN {found['knn']:.1f}%, linear {found['linear']:.1f}%", flush=True)


# ----------------------------------------------------------------------------------------------------------------
# Heads that are trained


class LARS(torch.optim.Optimizer):
    """SGD with momentum whose matrices move by a `trust` of their own norm (You et al. 2017), as MAE and MoCo-v3 have
    it: biases and other vectors neither scaled nor decayed. trust None: plain SGD with momentum.

    With finite_step a skipped step leaves everything as it was, without asking the device.
    """

    def __init__(self, params, lr, momentum=0.9, weight_decay=0.0, trust=0.001):
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay, trust=trust))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in (p for p in group["params"] if p.grad is not None):
                g, state = p.grad, self.state[p]
                if p.dim() > 1 and group["trust"] is not None:
                    g = g + group["weight_decay"] * p
                    ours, theirs = p.norm(), g.norm()
                    g = g * torch.where((ours > 0) & (theirs > 0), group["trust"] * ours / theirs, 1.0)
                old = state["momentum_buffer"] if state else torch.zeros_like(p)
                new, skipped = group["momentum"] * old + g, getattr(self, "found_inf", p.new_zeros(())) > 0
                state["momentum_buffer"] = torch.where(skipped, old, new)
                p.sub_(torch.where(skipped, 0.0, group["lr"] * new))


def make_head(protocol, width, classes):
    """Features (B, width) -> logits (B, classes). MAE's is a BatchNorm without parameters, then the linear layer."""
    layer = nn.Linear(width, classes)
    (nn.init.trunc_normal_ if protocol == "mae" else nn.init.normal_)(layer.weight, std=0.01)
    nn.init.zeros_(layer.bias)
    return nn.Sequential(nn.BatchNorm1d(width, affine=False, eps=1e-6), layer) if protocol == "mae" else layer


def fit_heads(x, labels, classes, rates, epochs, batch, seed=0):
    """Linear heads for features x (n, D), one for each learning rate, trained side by side: SGD with momentum, cosine
    to 0, from zeros -> weights (H, C, D). Batches are the same for all heads, so that one product serves them."""
    weight = torch.zeros(len(rates) * classes, x.shape[1], device=x.device)
    speed, one_hot, batch = torch.zeros_like(weight), torch.eye(classes, device=x.device), min(batch, len(x))
    rate = torch.tensor(rates, device=x.device).repeat_interleave(classes).unsqueeze(1)
    per_epoch = len(x) // batch
    steps = max(1, round(epochs * per_epoch))
    for step in range(steps):
        epoch, at = divmod(step, per_epoch)
        if at == 0:
            generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
            order = torch.randperm(len(x), generator=generator).to(x.device)
        mine = order[at * batch:(at + 1) * batch]
        part = x[mine]                                                                          # (B, D)
        # The classes lie before the batch, because a softmax along few last elements is slow on a CPU.
        error = (weight @ part.T).view(len(rates), classes, batch).softmax(1)                   # (H, C, B)
        error -= one_hot[:, labels[mine]]               # the gradient of cross entropy, so that no graph is needed
        speed.mul_(0.9).add_(error.flatten(0, 1) @ part, alpha=1 / batch)
        weight.addcmul_(speed, rate, value=-0.5 * (1 + math.cos(math.pi * step / steps)))
    return weight.view(len(rates), classes, -1)


def sweep(train, train_labels, val, val_labels, rates, classes, epochs=100, batch=128, seed=0):
    """-> accuracy in percent of each learning rate on a fifth of the training features that its head has not seen, the
    best rate, and of a head trained with that on all of them the counts on val."""
    mean, std = train.mean(0), train.std(0) + 1e-6
    train, val = (F.pad((x - mean) / std, (0, 1), value=1.0) for x in (train, val))         # the ones are the bias
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed)).to(train.device)
    held, kept = order[:len(train) // 5], order[len(train) // 5:]
    heads = fit_heads(train[kept], train_labels[kept], classes, rates, epochs, batch, seed).flatten(0, 1)
    right = sum(((heads @ train[part].T).view(len(rates), classes, -1).argmax(1) == train_labels[part]).sum(1)
                for part in held.split(1024))
    best = rates[right.argmax().item()]
    head = fit_heads(train, train_labels, classes, (best,), epochs, batch, seed)[0]
    counts = sum(tally(x @ head.T, y) for x, y in zip(val.split(1024), val_labels.split(1024)))
    return (100 * right / len(held)).tolist(), best, counts

# ----------------------------------------------------------------------------------------------------------------
# The run


@dataclass
class Config(Plumbing):
    protocol: str = opt("knn", "knn; mae, moco or dino: the linear probe of that paper; sweep; or features")
    init: str | None = opt(None, "file of the encoder, in any layout; FILE:KEY where it holds several")
    heads: int | None = opt(None, "attention heads of the encoder, where its file does not say", 1)
    data: str = opt("imagenet", "folder or tar (imagenet: ./imagenet or $IMAGENET), torchvision set by name, or shapes")
    fraction: float = opt(1.0, "share of the training images used, the same of each class, chosen by the seed")
    img_size: tuple[int, ...] | None = opt(None, "pixels: one number, or height and width (default: the encoder's)", 1)
    mean: tuple[float, ...] | None = opt(None, "channel means in 0..1 (default: the file's, else ImageNet's or 0.5)")
    std: tuple[float, ...] | None = opt(None, "channel deviations in 0..1 (default: the file's, else ImageNet's; 0.25)")
    readout: str | None = opt(None, "cls, avg: mean patch token, or both (default: the encoder's; dino from 768: both)")
    blocks: int | None = opt(None, "last blocks that are read (default: 1; dino below a width of 768: 4)", 1)
    k: tuple[int, ...] = opt((10, 20, 100, 200), "neighbours that vote", 1)
    lrs: tuple[float, ...] = opt(tuple(round(10 ** (-4 + i * 5 / 19), 6) for i in range(20)), "rates of the sweep", 0)
    split: str = opt("val", "images whose features are written: train or val")
    tokens: tuple[str, ...] | None = opt(None, "features that are written: cls, mean, patches, which are large "
                                         "(default: cls and mean, of a Swin mean alone)")
    batch_size: int | None = opt(None, "images per step, over all processes and accumulation (default: the law's)", 1)
    accum: int = opt(1, "passes per step; MAE's BatchNorm takes its statistics of each", 1)
    epochs: float | None = opt(None, "passes over the training set (default: the law's)", 0)
    warmup_epochs: float | None = opt(None, "epochs of linear warm-up (default: the law's, at most epochs / 9)", 0)
    blr: float | None = opt(None, "peak learning rate per 256 images of the batch (default: the law's)", 0)
    lr: float | None = opt(None, "peak learning rate itself, instead of blr", 0)
    eval_every: int = opt(1, "epochs between evaluations of a linear probe, beside that at the end; 0: none", 0)


# The laws of MAE's, MoCo-v3's and DINO's own code; the sweep is ours. MAE's runs under autocast, here the encoder alone
# does. Evaluation crops are resized bicubically for all, where MoCo-v3 takes bilinear ones.
PROTOCOLS = {
    "knn": dict(dtype="fp32"), "features": dict(dtype="fp32"), "sweep": dict(dtype="fp32", epochs=100, batch_size=128),
    "mae": dict(batch_size=16384, epochs=90, warmup_epochs=10, blr=0.1),
    "moco": dict(dtype="fp32", batch_size=1024, epochs=90, warmup_epochs=0, blr=3.0),
    "dino": dict(dtype="fp32", batch_size=1024, epochs=100, warmup_epochs=0, blr=0.001),
}
LAWS = "mae", "moco", "dino"
DEMO = dict(data="shapes", init="out/mae-demo/encoder.pt", readout="avg", workers=1)


def resolve(cfg, given):
    """Fill what the command line left open: from the demo, if it is one, then from the protocol."""
    demo = DEMO if cfg.demo else {}
    cfg = training.fill(cfg, given, demo)
    for name, known in dict(protocol=tuple(PROTOCOLS), readout=("cls", "avg", "both"), split=("train", "val"),
                            tokens=("cls", "mean", "patches"), decode=tuple(CROPS)).items():
        value = getattr(cfg, name) or ()
        if not {*(value if isinstance(value, tuple) else [value])} <= {*known}:
            training.die(f"--{name} is one of {', '.join(known)}, not {' '.join(value) if name == 'tokens' else value}")
    cfg = training.fill(cfg, given | set(demo), {**PROTOCOLS[cfg.protocol], "out": f"out/probe-{cfg.protocol}"})
    if cfg.warmup_epochs and "warmup_epochs" not in given:      # MAE's 10 of 90, less of a shorter run
        cfg = replace(cfg, warmup_epochs=min(cfg.warmup_epochs, cfg.epochs / 9))
    if cfg.demo and cfg.protocol in LAWS:
        training.die("--demo goes with knn, sweep and features: the laws of linear probes want many steps")
    if not cfg.init:
        training.die("which encoder? give --init FILE, or try --demo after `python mae.py --demo`")
    return replace(cfg, data=os.path.normpath(cfg.data))


class Encoder:
    """A frozen ViT or Swin from a file, and how it is read: normalised images -> features (B, width). Not a module, so
    that no checkpoint stores it: only which file it was."""

    def __init__(self, cfg, device, say):
        file, size = read(cfg.init), dict(img_size=pair(cfg.img_size)) if cfg.img_size else {}
        with training.in_words():
            self.vit = build_vit(cfg.init, cfg.heads, say, readout="avg" if "fc_norm.weight" in file.state else "cls",
                                 **size).requires_grad_(False).to(device)
            shape = self.vit.config
            mean, std = statistics(shape["in_chans"], *(getattr(cfg, k) or file.config.get(k) for k in ("mean", "std")))
        if shape["in_chans"] not in (1, 3, 4):
            training.die(f"{cfg.init} sees {shape['in_chans']} channels: images have 1, 3 or 4")
        swin, depth = isinstance(self.vit, Swin), self.vit.depth
        wide = cfg.protocol == "dino" and not swin and self.vit.width >= 768                    # DINO's ViT-B
        self.readout = cfg.readout or ("both" if wide else self.vit.readout)
        if swin and self.readout != "avg":
            training.die(f"--readout {self.readout}: {cfg.init} is a Swin, which has no cls token: avg is all there is")
        self.blocks = cfg.blocks or (min(4, depth) if cfg.protocol == "dino" and not wide else 1)
        if self.blocks > depth:
            training.die(f"--blocks {self.blocks}: {cfg.init} has {depth}")
        self.path, self.device, self.dtype = cfg.init, device, cfg.dtype
        with torch.inference_mode():
            self.width = features(self.vit, torch.zeros(1, shape["in_chans"], *pair(shape["img_size"]), device=device),
                                  self.readout, self.blocks).shape[1]
        # How images are shown to it: what `encoded` and `extract` ask for.
        self.sight = dict(size=pair(shape["img_size"]), channels=shape["in_chans"], mean=mean, std=std, device=device,
                          workers=cfg.workers, max_unreadable=cfg.max_unreadable)
        with open(self.path if os.path.exists(self.path) else self.path.rpartition(":")[0], "rb") as f:
            self.sha256 = hashlib.file_digest(f, "sha256").hexdigest()

    @torch.no_grad()
    def __call__(self, img):
        with training.autocast(self.device, self.dtype):
            return features(self.vit, img, self.readout, self.blocks).float()

    def state_dict(self):
        return dict(sha256=self.sha256)

    def load_state_dict(self, state):
        if state["sha256"] != self.sha256:
            raise SystemExit(f"{self.path} has changed since this run began: give what it was, or another --out")


class OneDraw(RandomCrops):
    """Random crops of MAE's linear probe: one draw of area and shape, cut off at the image's edges, where torchvision's
    law would draw again: so larger ones are more frequent."""

    def plan(self, width, height, u):
        area, aspect = width * height * (self.scale[0] + (1 - self.scale[0]) * u[0]), 0.75 * (16 / 9) ** u[10]
        w, h = min(width, round((area * aspect) ** 0.5)), min(height, round((area / aspect) ** 0.5))
        return (int(u[20] * (width - w + 1)), int(u[21] * (height - h + 1)), w, h), self.interpolation


class OneDrawOnDevice(OneDraw, DeviceCrops):
    """The same for --decode device."""


def random_crops(cfg, source, encoder, world, rank, start, steps):
    """Random crops of steps start..steps-1 and their passes for this rank: uint8 images, labels, unreadable names."""
    kind = dict(workers=OneDraw, device=OneDrawOnDevice) if cfg.protocol == "mae" else CROPS
    crops = kind[cfg.decode](source, encoder.sight["size"], encoder.sight["channels"], cfg.seed, (0.08, 1.0),
                             "bicubic" if cfg.protocol == "mae" else "bilinear")
    order = keys(len(source), cfg.batch_size, cfg.accum, world, rank, cfg.seed, start, steps)
    return crops.finish(load(crops, order, cfg.workers, pin=encoder.device.type == "cuda"), encoder.device)


def report(log, text, counts, **row):
    """Accuracies, on the screen and in the log."""
    found = accuracies(counts)
    if log.rank == 0:
        log.note(**row, **found)
        print("{}: top-1 {:.3f}%  top-5 {:.3f}%  mean per class {:.3f}%".format(text, *found.values()), flush=True)


@torch.no_grad()
def evaluate(encoder, head, val, log, step, epoch):
    """Accuracies on val, exact over processes; with the BatchNorm statistics of the first one, as in MAE's code."""
    for buffer in head.buffers() if dist.is_initialized() else ():
        dist.broadcast(buffer, 0)
    counts = torch.zeros(3, len(val.classes), device=encoder.device)
    head.eval()
    for _, x, labels in encoded(encoder, val, range(len(val)), **encoder.sight):
        counts += tally(head(x), labels.to(x.device))
    head.train()
    report(log, f"epoch {epoch:g}", total(counts), step=step)


def train_head(cfg, encoder, train, val, rank, world, say):
    """A linear probe by the law of --protocol: random crops through the frozen encoder, the head alone learns."""
    steps, peak = training.plan(cfg, len(train), world)
    device, (mean, std) = encoder.device, (encoder.sight[k] for k in ("mean", "std"))
    if cfg.protocol == "mae" and cfg.batch_size < 2 * world * cfg.accum:
        training.die(f"--batch-size {cfg.batch_size} leaves one image to a pass: MAE's BatchNorm needs two")
    torch.manual_seed(cfg.seed)                                 # on every rank: all start from the same weights
    model = make_head(cfg.protocol, encoder.width, len(train.classes)).to(device)
    optimizer = LARS(model.parameters(), peak, trust=0.001 if cfg.protocol == "mae" else None)
    scaler = torch.amp.GradScaler(device.type, enabled=False)   # the head is fp32 whatever the encoder is
    run = training.Run(cfg, "probe", rank, world, len(train), encoder=encoder, model=model, optimizer=optimizer)
    training.compile_if(cfg, device, *(m for m in encoder.vit.modules() if isinstance(m, Block)))
    # In the official code every process has a BatchNorm of its own, and the buffers follow the first one: as DDP does.
    net = DDP(model, device_ids=[device.index] if device.type == "cuda" else None) if world > 1 else model
    log = training.Log(cfg, rank, device, run.step, steps, images=len(train), world=world, sha256=encoder.sha256)
    health = training.Health(cfg, device, world, log)
    say(f"batch {cfg.batch_size} = {world} processes x {cfg.accum} passes x {cfg.batch_size // world // cfg.accum} "
        f"images; encoder {cfg.dtype} on {device}\n"
        f"{cfg.epochs:g} epochs of {steps.per_epoch} steps, {run.step} of {steps.total} done, {steps.warmup} of them "
        f"warm-up, peak learning rate {peak:.3g}")
    batches = log.waiting(random_crops(cfg, train, encoder, world, rank, run.step, steps.total))
    for step in range(run.step, steps.total):
        training.seed_for(cfg.seed, step, rank)
        at = step if cfg.protocol == "mae" else step // steps.per_epoch * steps.per_epoch       # others: by the epoch
        lr = training.warmup_cosine(at, steps.total, steps.warmup, peak)
        training.set_lr(optimizer, lr)
        loss, unreadable = 0.0, []
        for micro in range(cfg.accum):
            img, labels, failed = next(batches)
            img = normalize(random_flip(img.to(device, non_blocking=True)), mean, std)          # (b, C, h, w)
            with training.sync_if(micro + 1 == cfg.accum, net):
                error = F.cross_entropy(net(encoder(img)), labels.to(device)) / cfg.accum
                error.backward()
            loss, unreadable = loss + error.detach(), unreadable + failed
        grad_norm, skipped = training.finite_step(optimizer, scaler)
        done = step + 1
        why = health(skipped, unreadable, cfg.batch_size // world)

        if done % cfg.log_every == 0 or done == steps.total or why:
            log(done, loss=training.mean_over_ranks(loss), chance=math.log(len(train.classes)), lr=lr,
                grad_norm=grad_norm, skipped=health.skipped)
        keep, must = steps.due(done, cfg.keep_every), why or done == steps.total
        if why != "non-finite" and (must or keep or done % cfg.save_every == 0):
            # A head under the classifier's name would be taken for one: only where the classifier reads the same.
            name = "head" if (encoder.readout, encoder.blocks) == (encoder.vit.readout, 1) else "probe"
            whole = encoder.vit.state_dict() | {f"{name}.{k}": v for k, v in model.state_dict().items()}
            run.save(done, dict(method="probe", config=dict(encoder.vit.config, mean=mean, std=std), model=whole), keep,
                     must)
        if why:
            health.leave(why, run, done, model, loss, img)
        optimizer.zero_grad()
        if steps.due(done, cfg.eval_every) and done < steps.total:
            evaluate(encoder, model, val, log, done, done / steps.per_epoch)
    evaluate(encoder, model, val, log, steps.total, steps.total / steps.per_epoch)
    if rank == 0:
        training.draw_curve(cfg.out)
        with open(log.path) as f:
            best = max(map(float, re.findall(r'"step": \d+, "test_acc1": ([\d.]+)', f.read())), default=0)
        print(f"done: top-1 of the best epoch {best:.3f}%, the last is above; {cfg.out} has encoder.pt with the head")


def on_kept(cfg, encoder, train, val, rank, world, say):
    """k-NN or a sweep, on features of the evaluation crops that are kept in memory."""
    device, classes = encoder.device, len(train.classes)
    log = training.Log(cfg, rank, device, 0, training.Steps(0, 0, 1), images=len(train), world=world,
                       sha256=encoder.sha256)
    sets = [x.to(device) for s in (train, val) for x in extract(encoder, s, range(len(s)), **encoder.sight)]
    if cfg.protocol == "sweep":
        if len(train) < 5:
            training.die(f"{train.where} has {len(train)} images: a sweep needs five to hold one out")
        held_out, best, counts = sweep(*sets, cfg.lrs, classes, cfg.epochs, cfg.batch_size, cfg.seed)
        for lr, accuracy in zip(cfg.lrs, held_out):
            say(f"lr {lr:g}: {accuracy:.3f}% of the held-out fifth")
        if best in (min(cfg.lrs), max(cfg.lrs)) and len(cfg.lrs) > 1:
            say("note: the best rate is at an end of --lrs: a better one may lie beyond")
        log.note(lrs=cfg.lrs, held_out=held_out) if rank == 0 else None
        return report(log, f"best lr {best:g}, all training images", counts, lr=best)
    if max(cfg.k) > len(train):
        say(f"note: there are {len(train)} training images, so --k is at most that")
    mine = slice(rank, None, world)
    counts = knn_counts(*sets[:2], sets[2][mine], sets[3][mine], {min(k, len(train)) for k in cfg.k}, classes)
    for k in sorted(counts):
        report(log, f"k-NN, k {k}", total(counts[k]), k=k)


def export(cfg, encoder, source, rank, world):
    """Write OUT/cls.npy and mean.npy (n, D), patches.npy (n, N, D), labels.npy (n,) and names.txt in the order of the
    source, as they come: nothing is kept in memory. Each process writes its rows."""
    vit, n, swin = encoder.vit, len(source), isinstance(encoder.vit, Swin)
    chosen = cfg.tokens or (("mean",) if swin else ("cls", "mean"))
    if swin and "cls" in chosen:
        training.die(f"--tokens cls: {cfg.init} is a Swin, which has none; mean and patches, its regions, are there")
    dim, patches = vit.width, vit.grid[0] * vit.grid[1]
    sizes = dict(cls=(n, dim), mean=(n, dim), patches=(n, patches, dim))
    kinds = {name: (np.float32, sizes[name]) for name in chosen} | dict(labels=(np.int64, (n,)))
    need, free = (x / 2 ** 30 for x in (sum(4 * math.prod(size) for _, size in kinds.values()),
                                        shutil.disk_usage(cfg.out).free))
    if need > free:                                             # a mapped file that meets a full disk kills the process
        training.die(f"--tokens {' '.join(chosen)} take {need:,.1f} GB, and {cfg.out} has {free:,.1f} GB of room")
    paths = {name: os.path.join(cfg.out, f"{name}.npy") for name in kinds}
    if rank == 0:
        for name, kind in kinds.items():
            np.lib.format.open_memmap(paths[name] + ".part", "w+", *kind)
    dist.barrier() if world > 1 else None
    files = {name: np.lib.format.open_memmap(path + ".part", "r+") for name, path in paths.items()}

    def tokens(img):
        with training.autocast(encoder.device, cfg.dtype):
            x = vit.encode(img)
        if swin:
            return dict(mean=x.mean(1), patches=x)
        return dict(cls=x[:, 0], mean=vit.fc_norm(x[:, 1:].mean(1)), patches=x[:, 1:])

    for where, found, labels in encoded(tokens, source, range(n), **encoder.sight):
        for name, file in files.items():
            file[where] = labels if name == "labels" else found[name].float().cpu()
    for file in files.values():
        file.flush()
    dist.barrier() if world > 1 else None
    if rank == 0:
        for path in paths.values():
            os.replace(path + ".part", path)
        with open(os.path.join(cfg.out, "names.txt"), "w", errors="surrogateescape") as f:
            f.writelines(f"{source.relative(i)}\n" for i in range(n))
        print(f"done: {cfg.out} has {', '.join(f'{k}.npy {v[1]}' for k, v in kinds.items())} and names.txt")


def main(argv=None):
    cfg = resolve(*training.parse(Config, __doc__, argv))
    rank, world, device = training.setup(cfg.device)
    cfg, say = replace(cfg, dtype=training.precision(cfg.dtype, device)), print if rank == 0 else str
    train, val = parts(cfg.data, cfg.fraction, cfg.seed, cfg.download)
    source = train if cfg.protocol == "features" and cfg.split == "train" else val
    if source is None:
        training.die(f"{cfg.data} has no images to evaluate on: val/ was looked for, or test/, or a tar of that name")
    if cfg.protocol != "features" and not same_classes(train, val):
        bare = next((s.where for s in (train, val) if not s.classes), None)
        odd = min({*(train.classes or [])} ^ {*(val.classes or [])}, default="their order")
        training.die(f"{bare} has no labels: folders of classes were expected" if bare else
                     f"{train.where} and {val.where} differ in their classes, first {odd}")
    try:
        os.makedirs(cfg.out, exist_ok=True)
    except OSError as error:
        training.die(f"--out {cfg.out} cannot be written: {error}")
    encoder = Encoder(cfg, device, say)
    say(describe(train if cfg.protocol != "features" else source))
    if cfg.protocol == "features":
        return export(cfg, encoder, source, rank, world)
    say(f"{cfg.protocol}: {encoder.readout} token of the last {encoder.blocks} blocks, {encoder.width} numbers")
    (train_head if cfg.protocol in LAWS else on_kept)(cfg, encoder, train, val, rank, world, say)


if __name__ == "__main__":
    training.launch(main)
