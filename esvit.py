"""
Self-distillation without labels: of any crop of an image a student should say what its teacher, a slow copy of itself,
says of two large ones; of whole views (DINO, https://arxiv.org/abs/2104.14294) and of regions (EsViT,
https://arxiv.org/abs/2106.09785).

One node:   torchrun --standalone --nproc_per_node=8 esvit.py --data imagenet --out out/esvit
One GPU:    python esvit.py --model swin_lite --out out/esvit
DINO:       torchrun --standalone --nproc_per_node=8 esvit.py --model vit_small --out out/dino
To try it:  python esvit.py --demo
Preempted:  type the same command again
Expected:   not run yet at full size; the demo's last lines are in the README
"""
import math
import os
import re
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn.parallel import DistributedDataParallel as DDP

import training
from augment import Colours, draw_colours, random_flip, recolour, statistics
from data import RandomCrops, keys, load, shared, uniforms
from probe import probe
from sources import describe, parts, same_classes
from training import Plumbing, opt
from vit import MODELS, SWINS, Swin, ViT, pair
from weights import load_into, read


@dataclass
class Config(Plumbing):
    data: str = opt("imagenet", "folder or tar (imagenet: ./imagenet or $IMAGENET), torchvision set by name, or shapes")
    fraction: float = opt(1.0, "share of the training images used, the same of each class, chosen by the seed")
    model: str = opt("swin_tiny", f"backbone: {', '.join(SWINS)}, vit_mini, vit_midi, vit_tiny, vit_small, vit_base")
    heads: int | None = opt(None, "attention heads of a ViT (default: the recipe)", 1)
    window: int | None = opt(None, "tokens on the side of a Swin's window: 7, 14 (default: the model's own)", 2)
    img_size: tuple[int, ...] = opt((224,), "pixels of the two global crops: one number, or height and width", 1)
    patch_size: int | None = opt(None, "pixels on a patch's side, if not the model's own", 1)
    in_chans: int = opt(3, "image channels: 1 grey, 3 colour, 4 colour and alpha")
    mean: tuple[float, ...] | None = opt(None, "channel means in 0..1 (default: ImageNet's; 0.5 if not 3 channels)")
    std: tuple[float, ...] | None = opt(None, "channel deviations in 0..1 (default: ImageNet's, or 0.25)")
    drop_path: float | None = opt(None, "the student's, at its last block (default: the recipe)", 0)
    local_crops: tuple[int, ...] = opt((8,), "local crops of an image, a number for each of --local-size; 0: none", 0)
    local_size: tuple[str, ...] = opt(("96",), "pixels of local crops: side, or HEIGHTxWIDTH")
    global_scale: tuple[float, ...] | None = opt(None, "least and largest share of an image in a global crop (default: "
                                                 "0.4 1, or without local crops 0.14 1)")
    local_scale: tuple[float, ...] = opt((0.05, 0.4), "least and largest share of an image in a local crop")
    prototypes: int | None = opt(None, "what views and regions are sorted into (default: the recipe)", 2)
    head_hidden: int = opt(2048, "width inside the heads", 1)
    bottleneck: int = opt(256, "width before the prototypes", 1)
    norm_last_layer: bool | None = opt(None, "prototypes keep length 1 (default: the recipe)")
    freeze_last_layer: int = opt(1, "epochs at the start in which prototypes stay as they are", 0)
    region_weight: float | None = opt(None, "share of the region loss, else the views'; 0: DINO (default: recipe)", 0)
    region_from: int | None = opt(None, "epoch in which the region loss begins (default: the recipe)", 0)
    teacher_temp: float | None = opt(None, "the teacher's logits are divided by it (default: the recipe)")
    teacher_temp_start: float = opt(0.04, "the same in the first epoch")
    teacher_temp_epochs: float | None = opt(None, "epochs between the two (default: the recipe, at most a tenth)", 0)
    momentum: float | None = opt(None, "what the teacher keeps of itself at first; at the end 1 (default: recipe)", 0)
    batch_size: int | None = opt(None, "images per optimizer step, over all processes and passes (default: recipe)", 1)
    accum: int = opt(1, "forward-backward passes per optimizer step, each on a part of the batch; the same numbers", 1)
    epochs: float | None = opt(None, "passes over the training set (default: the recipe)", 0)
    warmup_epochs: float = opt(10.0, "epochs of linear warm-up, at most a tenth of all", 0)
    blr: float = opt(5e-4, "peak learning rate per 256 images of the batch", 0)
    lr: float | None = opt(None, "peak learning rate itself, instead of blr", 0)
    min_lr: float = opt(1e-6, "learning rate at the end", 0)
    weight_decay: float = opt(0.04, "AdamW's weight decay at the start; none on biases and 1-D parameters", 0)
    weight_decay_end: float = opt(0.4, "the same at the end", 0)
    clip_grad: float = opt(3.0, "largest gradient norm of each tensor by itself; 0: no clipping", 0)
    init: str | None = opt(None, "checkpoint whose weights a new run starts from")
    probe_every: int = opt(0, "epochs between k-NN and linear probes, where the data has labels and val/; 0: none", 0)


# EsViT's recipes for Swin, DINO's for ViT-Small and -Base. The light ones are ours, for one GPU.
ESVIT = dict(epochs=300, batch_size=512, drop_path=0.1, prototypes=65536, norm_last_layer=False, region_weight=0.5,
             region_from=0, teacher_temp=0.07, teacher_temp_epochs=30, momentum=0.996)
DINO = dict(ESVIT, epochs=100, norm_last_layer=True, region_weight=0.0, teacher_temp=0.04, teacher_temp_epochs=0)
LIGHT = dict(epochs=100, batch_size=256, prototypes=16384, momentum=0.998)
SMALL = dict(LIGHT, prototypes=4096, drop_path=0.0)
RECIPES = {
    "swin_mini": dict(ESVIT, **SMALL), "swin_lite": dict(ESVIT, **LIGHT), "swin_tiny": ESVIT,
    "swin_small": dict(ESVIT, drop_path=0.2), "swin_base": dict(ESVIT, drop_path=0.2, region_from=200),
    "vit_mini": dict(DINO, **SMALL), "vit_midi": dict(DINO, **SMALL), "vit_tiny": dict(DINO, **LIGHT, heads=3),
    "vit_small": dict(DINO, heads=6), "vit_base": DINO,
}
W14 = dict(region_from=200)                                     # all of --window 14
DEMO = dict(data="shapes", fraction=0.3, model="swin_mini", img_size=(40,), local_crops=(4,), local_size=("20",),
            local_scale=(0.15, 0.5), batch_size=64, prototypes=512, head_hidden=512, bottleneck=128, epochs=3, blr=4e-3,
            momentum=0.99, teacher_temp=0.04, workers=1, log_every=46, save_every=138)


# ----------------------------------------------------------------------------------------------------------------
# Heads and backbones


class Prototypes(nn.Module):
    """K directions: z (..., E) -> logits (..., K), z's products with rows g v / |v|. Names are weight_norm's old ones,
    which public files have; its new ones are read as well."""

    def __init__(self, dim, count, unit=True):
        super().__init__()
        self.weight_g = nn.Parameter(torch.ones(count, 1), requires_grad=not unit)
        self.weight_v = nn.Parameter(torch.empty(count, dim).uniform_(-dim ** -0.5, dim ** -0.5))
        self.register_load_state_dict_pre_hook(self.rename)

    @staticmethod
    def rename(module, state, prefix, *_):
        for new, old in (("original0", "weight_g"), ("original1", "weight_v")):
            if f"{prefix}parametrizations.weight.{new}" in state:
                state[prefix + old] = state.pop(f"{prefix}parametrizations.weight.{new}")

    def weight(self):
        return self.weight_v * (self.weight_g / self.weight_v.norm(dim=1, keepdim=True))

    def forward(self, z):
        return F.linear(z, self.weight())


class DINOHead(nn.Module):
    """Features (..., D) -> logits (..., K) over prototypes, by way of unit vectors z (..., E) (DINO, section 3.1).

    hidden, bottleneck: widths inside, and of z. unit: prototypes have length 1 for good (norm_last_layer).
    """

    def __init__(self, dim, prototypes, hidden=2048, bottleneck=256, unit=True):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, hidden), nn.GELU(),
                                 nn.Linear(hidden, bottleneck))
        self.mlp.apply(ViT.init_weights)
        self.last_layer = Prototypes(bottleneck, prototypes, unit)

    def bottleneck(self, x):
        return F.normalize(self.mlp(x), dim=-1)

    def forward(self, x):
        return self.last_layer(self.bottleneck(x))


class Seen(NamedTuple):
    """What a network makes of B images, V crops of each, with R regions in all of these."""
    views: torch.Tensor                 # (B, V, D) features
    z: torch.Tensor                     # (B, V, E) before the prototypes
    regions: torch.Tensor               # (B, R, D)
    z_regions: torch.Tensor | None      # (B, R, E), where regions are asked for
    layout: tuple                       # (crops, regions of each) for every size


class Network(nn.Module):
    """Backbone, a head for views, and, if regions are ever compared, one for regions; names as DINO's files have them.

    backbone: a Swin, whose view is its mean region, or a ViT with readout "cls", whose regions are its patches.
    options: of both heads.
    """

    def __init__(self, backbone, prototypes, dense=True, **options):
        super().__init__()
        self.backbone, width = backbone, backbone.width
        self.head = DINOHead(width, prototypes, **options)
        self.head_dense = DINOHead(width, prototypes, **options) if dense else None

    def look(self, img):
        """Images (B, C, h, w) -> view features (B, D) and those of regions (B, T, D), all after the norm."""
        x = self.backbone.encode(img)
        return (x.mean(1), x) if isinstance(self.backbone, Swin) else (x[:, 0], x[:, 1:])

    def forward(self, crops, dense):
        """crops: for every size (n, B, C, h, w), n of each image; all of a size go through the backbone together."""
        views, regions, layout = [], [], []
        for same in crops:
            view, tokens = self.look(same.flatten(0, 1))
            views.append(rearrange(view, "(n b) d -> b n d", n=len(same)))
            regions.append(rearrange(tokens, "(n b) t d -> b (n t) d", n=len(same)))
            layout.append((len(same), tokens.shape[1]))
        views, regions = torch.cat(views, 1), torch.cat(regions, 1)
        z_regions = self.head_dense.bottleneck(regions) if dense else None
        return Seen(views, self.head.bottleneck(views), regions, z_regions, tuple(layout))


# ----------------------------------------------------------------------------------------------------------------
# Losses


@cache
def shares(layout, device):
    """Of every crop and each teacher view, their share in the loss, (V, 2), and of every region, (R, 2): no crop is
    compared with itself, all pairs of crops weigh the same, and so do all regions of a crop."""
    tokens = torch.tensor([t for n, t in layout for _ in range(n)])
    pairs = (1 - torch.eye(len(tokens), 2)) / (2 * (len(tokens) - 1))
    return pairs.to(device), (pairs / tokens.unsqueeze(1)).repeat_interleave(tokens, 0).to(device)


@torch.no_grad()
def match(regions, teacher):
    """Region features (B, R, D) of the student, (B, 2, T, D) of the teacher -> the most similar region, by cosine, in
    each of the teacher's views of the same image, (B, R, 2)."""
    ours, theirs = (F.normalize(x.float(), dim=-1) for x in (regions, teacher))
    return torch.einsum("brd,bitd->brit", ours, theirs).argmax(-1)


AT_ONCE = dict(cpu=2 ** 22, cuda=2 ** 28)                       # logits of a class, of at least one image


class CrossEntropy(torch.autograd.Function):
    """The sum, over images b and rows r and m, of share[b, r, m] times the cross-entropy of student row r against
    teacher row m, where nobody ever holds all logits: a few images at a time, and gradients formed in the same pass.

    z (B, R, E), weight (K, E): the student's logits are z weight^T / temperatures[0]; z_teacher (B, M, E),
    weight_teacher (K, E): the teacher's, less centre (1, K), over temperatures[1]. All in fp32. -> scalar; z and weight
    get the very gradients of -<p, log softmax(s)>.
    """

    @staticmethod
    def forward(ctx, z, weight, z_teacher, weight_teacher, centre, temperatures, share):
        few = max(1, AT_ONCE["cuda" if z.is_cuda else "cpu"] // (z.shape[1] * len(weight)))
        z, z_teacher, shift = z / temperatures[0], z_teacher / temperatures[1], centre[0] / -temperatures[1]
        dz, dweight, loss = torch.empty_like(z), torch.zeros_like(weight), z.new_zeros(())
        for x, y, part, into in zip(*(t.split(few) for t in (z, z_teacher, share, dz))):
            p = torch.addmm(shift, y.flatten(0, 1), weight_teacher.T).softmax(-1)               # (b * M, K)
            d = torch.bmm(-part, p.view(*y.shape[:2], -1)).flatten(0, 1)                        # (b * R, K)
            del p
            s = F.log_softmax(x.flatten(0, 1) @ weight.T, -1)                                   # (b * R, K)
            loss += torch.linalg.vecdot(d, s).sum()
            d.addcmul_(s.exp_(), part.sum(2).view(-1, 1))       # now the gradient of the logits
            torch.div((d @ weight).view_as(into), temperatures[0], out=into)
            dweight.addmm_(d.T, x.flatten(0, 1))
        ctx.save_for_backward(dz, dweight)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return *(t.mul_(grad) for t in ctx.saved_tensors), None, None, None, None, None


class EsViT(nn.Module):
    """Student and teacher, and the losses between them (EsViT, section 3; DINO, algorithm 1).

    student, teacher: Networks of one shape; the teacher begins as the student, and then follows it. region_weight: see
    losses. dino_loss holds the centres, center (1, K) of views and center_grid of regions, by their published names.
    """

    def __init__(self, student, teacher, region_weight=0.5, student_temp=0.1):
        super().__init__()
        self.student, self.teacher, self.dino_loss = student, teacher.requires_grad_(False), nn.Module()
        teacher.load_state_dict(student.state_dict())
        self.region_weight, self.student_temp = region_weight, student_temp
        for name in ("center", "center_grid")[:1 + (student.head_dense is not None)]:
            self.dino_loss.register_buffer(name, torch.zeros(1, len(student.head.last_layer.weight_g)))

    def forward(self, crops, temperature, dense):
        """crops: as for Network, the two global ones first; temperature: the teacher's; dense: compare regions as well
        -> loss, and what else is to be known, detached: see `losses`."""
        with torch.no_grad():
            teacher = self.teacher(crops[:1], dense)
        student = self.student(crops, dense)
        with torch.autocast(crops[0].device.type, enabled=False):
            return self.losses(student, teacher, temperature)

    def losses(self, student, teacher, temperature):
        """What both have Seen -> the loss, (1 - w) views + w regions with w = region_weight, or without regions the
        views' alone; dict of view, region, means (the teacher's mean logits), seen (by the student), z (the teacher's).
        """
        pairs, rows = shares(student.layout, student.z.device)
        loss, mean = self.compare("", student.z, teacher.z, pairs.expand(len(student.z), -1, -1), temperature)
        found = dict(view=loss.detach(), means=[mean], seen=student.views.detach(), z=teacher.z)
        if student.z_regions is not None:
            theirs = rearrange(teacher.regions, "b (i t) d -> b i t d", i=2)
            which = match(student.regions, theirs).unsqueeze(-1)                                # (B, R, 2, 1)
            share = rows.new_zeros(*which.shape[:3], theirs.shape[2])                           # (B, R, 2, T)
            share.scatter_(3, which, rows.expand(len(which), -1, -1).unsqueeze(-1))
            region, mean = self.compare("_dense", student.z_regions, teacher.z_regions, share.flatten(2), temperature)
            loss = (1 - self.region_weight) * loss + self.region_weight * region
            found.update(region=region.detach(), means=found["means"] + [mean])
        return loss, found

    def compare(self, which, z, z_teacher, share, temperature):
        """One head's loss, the mean over images, and the teacher's mean logits, which are the mean z's."""
        ours, theirs = (getattr(net, f"head{which}").last_layer.weight() for net in (self.student, self.teacher))
        centre = self.dino_loss.center_grid if which else self.dino_loss.center
        loss = CrossEntropy.apply(z.float(), ours, z_teacher.float(), theirs, centre, (self.student_temp, temperature),
                                  share / len(z))
        return loss, z_teacher.float().mean((0, 1)).unsqueeze(0) @ theirs.T

    @torch.no_grad()
    def follow(self, momentum):
        """theta' <- m theta' + (1 - m) theta for every parameter of the teacher."""
        torch._foreach_lerp_(list(self.teacher.parameters()), list(self.student.parameters()), 1 - momentum)

    @torch.no_grad()
    def recentre(self, means, skipped, keep=0.9):
        """Centres move to the mean logits of a whole step, `means`, over all processes, unless it was skipped."""
        for centre, mean in zip(self.dino_loss.buffers(), means):
            new = keep * centre + (1 - keep) * training.mean_over_ranks(mean)
            centre.copy_(torch.where(skipped > 0, centre, new))

    def compile(self, **options):
        """The backbones alone, for crops: probes have batches of other sizes, and losses few kernels to fuse."""
        for net in (self.student, self.teacher):
            net.look = torch.compile(net.look, **options)


# ----------------------------------------------------------------------------------------------------------------
# Crops, schedules, steps, what the log says


class MultiCrops(RandomCrops):
    """Keys (epoch, index) -> crops of each image, which is decoded once: for every size uint8 (n, B, C, h, w); labels
    or -1 (B,), names of files that could not be read. groups: (n, size, scale) of every size."""

    def __init__(self, source, groups, channels, seed):
        super().__init__(source, groups[0][1], channels, seed, None, "bicubic")
        self.groups = groups

    def __getitems__(self, keys):
        count, labels, failed = self.draws * sum(n for n, _, _ in self.groups), [], []
        table = uniforms(self.seed, keys, count).tolist()
        outs = [shared(n, len(keys), *size, self.channels) for n, size, _ in self.groups]
        for k, ((epoch, index), u) in enumerate(zip(keys, table)):
            img, used, name = self.readable(index)
            if used != index:
                u = uniforms(self.seed, [(epoch, used)], count)[0].tolist()
            for out, (_, size, scale) in zip(outs, self.groups):
                self.size, self.scale = size, scale
                for into in out:
                    into[k], u = self.crop(img, u[:self.draws]).permute(1, 2, 0), u[self.draws:]
            labels.append(-1 if self.source.labels is None else int(self.source.labels[used]))
            failed += [name] if name else []
        return [out.permute(0, 1, 4, 2, 3) for out in outs], torch.tensor(labels), failed


def groups_of(cfg):
    """Of every size of crops their number, (height, width) and (least, largest) area. Raises ValueError."""
    for size in cfg.local_size:
        if not re.fullmatch(r"\d+(x\d+)?", size):
            raise ValueError(f"--local-size {size} is no number and no HEIGHTxWIDTH")
    local = zip(cfg.local_crops, [pair(tuple(map(int, size.split("x")))) for size in cfg.local_size])
    return [(2, pair(cfg.img_size), cfg.global_scale), *((n, size, cfg.local_scale) for n, size in local if n)]


def recoloured(crops, mean, std):
    """uint8 (n, B, C, h, w) for every size, global ones first -> normalised floats. The first is always blurred, the
    second rarely, but solarised at times, local ones every other time (DINO, as BYOL)."""
    out, kinds = [], [dict(p_blur=1.0), dict(p_blur=0.1, p_solarize=0.2)]
    for img in crops:
        drawn = [draw_colours(img.shape[1], **kind) for kind in kinds or [dict(p_blur=0.5)] * len(img)]
        colours, kinds = Colours(*map(torch.cat, zip(*drawn))), None
        out.append(recolour(random_flip(img.flatten(0, 1)), colours, mean, std).view(img.shape))
    return out


def cosine(step, steps, start, end, warmup=0):
    """Half a cosine from `start` to `end`, after a warm-up from 0 whose last step already has `start`, as published."""
    if step < warmup:
        return start * step / max(1, warmup - 1)
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


def temperature_at(epoch, start, end, epochs):
    """The teacher's temperature: from `start` to `end` in `epochs` epochs, both included, then `end`."""
    return start + (end - start) * epoch / max(1, epochs - 1) if epoch < epochs else end


def clipped_step(optimizer, scaler, clip, still=()):
    """training.finite_step with every tensor clipped by itself, as published: large and small ones are not traded
    against each other. still: parameters that then lose their gradients, so that AdamW leaves them as they are."""
    scaler.unscale_(optimizer)
    grads = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    norms = torch.stack(torch._foreach_norm(grads))
    if clip:                                                    # what is not finite stays, to be looked at
        scales = torch.where(norms.isfinite(), (clip / (norms + 1e-6)).clamp(max=1.0), 1.0)
        torch._foreach_mul_(grads, list(scales))
    for p in still:
        p.grad = None
    norm = torch.linalg.vector_norm(norms)
    skipped = optimizer.found_inf = 1.0 - norm.isfinite().float()
    scaler.step(optimizer)
    scaler.update()
    return norm, skipped


@torch.no_grad()
def told(model, found, temperature):
    """Of this process's part of a batch: the loss by chance, and what names a collapse.

    entropy: of the teacher's mean choice for a view; ln K says that all prototypes are the same to it, 0 that it knows
    only one. kl: what the student lacks to it. centre: norm of the views' centre. rank: how many directions view
    features use, exp of the entropy of their singular values (Roy & Vetterli 2007).
    """
    logits = model.teacher.head.last_layer(found["z"].float()) - model.dino_loss.center
    entropy = torch.special.entr((logits / temperature).softmax(-1)).sum(-1).mean()
    share = torch.linalg.svdvals(found["seen"][:, 0].float().nan_to_num())
    share = share / share.sum().clamp(min=1e-12)
    parts = {name: training.mean_over_ranks(found[name]) for name in ("view", "region") if name in found}
    return dict(chance=math.log(logits.shape[-1]), **parts, entropy=entropy, kl=found["view"] - entropy,
                centre=model.dino_loss.center.norm(), rank=torch.special.entr(share).sum().exp())


# ----------------------------------------------------------------------------------------------------------------
# The run


def resolve(cfg, given):
    """Fill what the command line left open: from the demo, if it is one, then from the model's recipe."""
    demo = DEMO if cfg.demo else {}
    cfg = training.fill(cfg, given, demo)
    if cfg.model not in RECIPES:
        training.die(f"--model {cfg.model} is not one of {', '.join(RECIPES)}")
    swin = cfg.model in SWINS
    if wrong := given & ({"heads"} if swin else {"window"}):
        training.die(f"--{min(wrong)} is an option of {'a ViT' if swin else 'a Swin'}, and --model is {cfg.model}")
    shape = dict(window=7, patch_size=4) | SWINS[cfg.model] if swin else MODELS[cfg.model]
    recipe = {**{k: shape[k] for k in ("window" if swin else "heads", "patch_size")}, **RECIPES[cfg.model],
              **(W14 if cfg.window == 14 else {}), "out": "out/esvit-demo" if cfg.demo else "out/esvit",
              "global_scale": (0.4, 1.0) if any(cfg.local_crops) else (0.14, 1.0)}
    cfg = training.fill(cfg, given | set(demo), recipe)
    share = cfg.epochs / recipe["epochs"]                       # a run shorter than its recipe warms up for less
    cfg = training.fill(cfg, given, dict(warmup_epochs=min(cfg.warmup_epochs, cfg.epochs / 10),
                                         teacher_temp_epochs=min(cfg.teacher_temp_epochs, cfg.epochs / 10),
                                         region_from=int(cfg.region_from * min(1.0, share))))
    for name, known in (("in_chans", (1, 3, 4)), ("decode", ("workers",))):
        if getattr(cfg, name) not in known:
            training.die(f"--{name.replace('_', '-')} is {' or '.join(map(str, known))} here, not {getattr(cfg, name)}")
    if len(cfg.local_crops) != len(cfg.local_size):
        training.die(f"--local-crops {cfg.local_crops} and --local-size {cfg.local_size} need as many numbers each")
    for name in ("global_scale", "local_scale"):
        if len(scale := getattr(cfg, name)) != 2 or not 0 < scale[0] <= scale[1] <= 1:
            training.die(f"--{name.replace('_', '-')} is a least and a largest fraction of the image, not {scale}")
    if not 0 <= cfg.region_weight <= 1 or not cfg.momentum <= 1:
        training.die(f"--region-weight and --momentum are at most 1, not {cfg.region_weight:g} and {cfg.momentum:g}")
    if not min(cfg.teacher_temp, cfg.teacher_temp_start) > 0:
        training.die("--teacher-temp and --teacher-temp-start must be above 0")
    if cfg.region_weight and cfg.region_from >= cfg.epochs:
        training.die(f"--region-from {cfg.region_from} is after the end: give --region-weight 0 for views alone")
    return replace(cfg, data=os.path.normpath(cfg.data))       # a slash at its end makes no other data of it


def build(cfg):
    """Student and teacher; only the student drops paths."""
    options = dict(img_size=pair(cfg.img_size), in_chans=cfg.in_chans, patch_size=cfg.patch_size)
    nets = []
    with training.in_words():
        for drop_path in (cfg.drop_path, 0.0):
            if cfg.model in SWINS:
                backbone = Swin(**{**SWINS[cfg.model], **options, "window": cfg.window, "drop_path": drop_path})
            else:
                backbone = ViT(**{**MODELS[cfg.model], **options, "heads": cfg.heads, "drop_path": drop_path},
                               positions="learned", resize_offset=0.1)
            nets.append(Network(backbone, cfg.prototypes, cfg.region_weight > 0, hidden=cfg.head_hidden,
                                bottleneck=cfg.bottleneck, unit=cfg.norm_last_layer))
        for _, size, _ in groups_of(cfg):
            backbone.grid_of(*size)
            if min(size) < cfg.patch_size * (cfg.window or 1):
                raise ValueError(f"crops of {size[0]}x{size[1]} pixels are smaller than a window of {cfg.window} "
                                 f"patches of {cfg.patch_size}: they would attend to little but padding")
    return EsViT(*nets, cfg.region_weight)


def start_from(model, path, say):
    """--init: weights of a file for student and teacher, and of its heads what fits."""
    file, student = read(path), model.student
    load_into(student.backbone, file, say)
    for name in ("head", "head_dense"):
        state = {k.removeprefix(f"{name}."): v for k, v in file.state.items() if k.startswith(f"{name}.")}
        with suppress(RuntimeError, AttributeError):            # not there, or of other widths
            getattr(student, name).load_state_dict(state)
            say(f"{path}: {name} as well")
    model.teacher.load_state_dict(student.state_dict())


def banner(cfg, model, steps, peak, start, world, device):
    """What is about to happen, with every value that a recipe filled in."""
    backbone, heads = (sum(p.numel() for p in part.parameters()) / 1e6
                       for part in (model.student.backbone, model.student.head))
    crops = " + ".join(f"{n} of {h}x{w} from {a:g} to {b:g} of an image" for n, (h, w), (a, b) in groups_of(cfg))
    regions = f"views {1 - cfg.region_weight:g} and regions {cfg.region_weight:g}, from epoch {cfg.region_from}" \
        if cfg.region_weight else "views alone"
    kind = f"window {cfg.window}" if cfg.window else f"{cfg.heads} heads"
    return (f"{cfg.model}: {backbone:.2f} M parameters, {kind}; heads {heads:.2f} M each, {cfg.prototypes} prototypes; "
            f"{regions}\ncrops: {crops}; batch {cfg.batch_size} = {world} processes x {cfg.accum} passes x "
            f"{cfg.batch_size // world // cfg.accum} images; {cfg.dtype} on {device}\n"
            f"teacher: temperature {cfg.teacher_temp_start:g} to {cfg.teacher_temp:g} in {cfg.teacher_temp_epochs} "
            f"epochs, momentum from {cfg.momentum:g}\n"
            f"{cfg.epochs:g} epochs of {steps.per_epoch} steps, {start} of {steps.total} done, {steps.warmup} of them "
            f"warm-up, peak learning rate {peak:.3g}" +
            "\nwarning: teachers above a temperature of 0.07 collapse: in DINO's table k-NN fell from 69.6% at 0.04 to "
            f"0.1% at 0.08, and this is {cfg.teacher_temp:g}" * (cfg.teacher_temp > 0.07))


def wrap(model, dense, world, device):
    """Gradients of all processes. While regions wait, their head takes no part."""
    return model if world == 1 else DDP(
        model, device_ids=[device.index] if device.type == "cuda" else None, broadcast_buffers=False,
        find_unused_parameters=model.student.head_dense is not None and not dense)


def pretrain(cfg):
    rank, world, device = training.setup(cfg.device)
    cfg, say = replace(cfg, dtype=training.precision(cfg.dtype, device)), print if rank == 0 else str
    train, val = parts(cfg.data, cfg.fraction, cfg.seed, cfg.download)
    probing = cfg.probe_every or cfg.demo and cfg.data == "shapes"
    if probing and not same_classes(train, val):
        training.die("--probe-every needs the same classes in train/ and in val/")
    steps, peak = training.plan(cfg, len(train), world)
    with training.in_words():
        groups, (mean, std) = groups_of(cfg), statistics(cfg.in_chans, cfg.mean, cfg.std)

    torch.manual_seed(cfg.seed)                                 # on every rank: all start from the same weights
    model = build(cfg).to(device)
    optimizer = torch.optim.AdamW(training.decay_groups(model, cfg.weight_decay), peak, fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=cfg.dtype == "fp16")
    run = training.Run(cfg, "esvit", rank, world, len(train), student=model.student, teacher=model.teacher,
                       dino_loss=model.dino_loss, optimizer=optimizer, scaler=scaler)
    if cfg.init and not run.step:
        start_from(model, cfg.init, say)
    training.compile_if(cfg, device, model)
    regions_from = cfg.region_from * steps.per_epoch if cfg.region_weight else steps.total
    net = wrap(model, run.step >= regions_from, world, device)
    log = training.Log(cfg, rank, device, run.step, steps, images=len(train), world=world)
    health = training.Health(cfg, device, world, log)
    say(f"{describe(train)}\n{banner(cfg, model, steps, peak, run.step, world, device)}")
    measure = partial(probe, model.teacher.backbone.features, train, val, groups[0][1], cfg.in_chans, mean, std, device,
                      cfg.workers, log)
    if probing and not run.step:
        measure(0)
    order = keys(len(train), cfg.batch_size, cfg.accum, world, rank, cfg.seed, run.step, steps.total)
    batches = log.waiting(load(MultiCrops(train, groups, cfg.in_chans, cfg.seed), order, cfg.workers,
                               pin=device.type == "cuda"))
    still = [p for name, p in model.student.named_parameters() if ".last_layer." in name]
    for step in range(run.step, steps.total):
        training.seed_for(cfg.seed, step, rank)
        epoch, dense = step // steps.per_epoch, step >= regions_from
        lr = cosine(step, steps.total, peak, cfg.min_lr, steps.warmup)
        training.set_lr(optimizer, lr)
        wd = optimizer.param_groups[1]["weight_decay"] = cosine(step, steps.total, cfg.weight_decay,
                                                                cfg.weight_decay_end)
        momentum = cosine(step, steps.total, cfg.momentum, 1.0)
        temperature = temperature_at(epoch, cfg.teacher_temp_start, cfg.teacher_temp, cfg.teacher_temp_epochs)
        if step == regions_from and step:                       # as published, AdamW forgets, schedules go on
            optimizer.state.clear()
            net = wrap(model, dense, world, device)
        total, means, unreadable = 0.0, 0.0, []
        for micro in range(cfg.accum):
            crops, _, failed = next(batches)
            crops = recoloured([img.to(device, non_blocking=True) for img in crops], mean, std)
            with training.sync_if(micro + 1 == cfg.accum, net), training.autocast(device, cfg.dtype):
                loss, found = net(crops, temperature, dense)
                loss = loss / cfg.accum
            scaler.scale(loss).backward()
            total, unreadable = total + loss.detach(), unreadable + failed
            means = means + torch.stack(found["means"]) / cfg.accum
        grad_norm, skipped = clipped_step(optimizer, scaler, cfg.clip_grad,
                                          still if epoch < cfg.freeze_last_layer else ())
        done = step + 1
        why = health(skipped, unreadable, cfg.batch_size // world)

        if done % cfg.log_every == 0 or done == steps.total or why:
            log(done, loss=training.mean_over_ranks(total), **told(model, found, temperature), lr=lr, wd=wd,
                momentum=momentum, temperature=temperature, grad_norm=grad_norm, skipped=health.skipped)
        model.follow(momentum)
        model.recentre(means, skipped)
        keep, must = steps.due(done, cfg.keep_every), why or done == steps.total
        if why != "non-finite" and (must or keep or done % cfg.save_every == 0):
            backbone, method = model.teacher.backbone, "esvit" if cfg.region_weight else "dino"
            config = dict(backbone.config, mean=mean, std=std)
            run.save(done, dict(method=method, config=config, model=backbone.state_dict()), keep, must)
        if why:
            health.leave(why, run, done, model, total, crops[0])
        optimizer.zero_grad()
        if steps.due(done, cfg.probe_every) and done < steps.total:
            measure(done)
    if probing:
        measure(steps.total)
    if rank == 0:
        training.draw_curve(cfg.out)
        print(f"done: {cfg.out} has encoder.pt (the teacher) for downstream use, last.pt, log.jsonl")


def main(argv=None):
    pretrain(resolve(*training.parse(Config, __doc__, argv)))


if __name__ == "__main__":
    training.launch(main)
