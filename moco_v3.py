"""
Momentum contrast: two views of an image find each other among those of all other images, through a slow copy of the
network. https://arxiv.org/abs/2104.02057, for lightweight networks https://arxiv.org/abs/2205.14443

One node:   torchrun --standalone --nproc_per_node=8 moco_v3.py --data imagenet --out out/moco
One GPU:    python moco_v3.py --data imagenet --out out/moco --accum 4
To try it:  python moco_v3.py --demo
Preempted:  type the same command again
Expected:   not run yet at full size; the demo's last lines are in the README
"""
import copy
import math
import os
from dataclasses import dataclass, replace
from functools import partial
from types import SimpleNamespace

import torch
import torch.distributed as dist
import torch.nn.functional as F
from einops import rearrange
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.utils.checkpoint import checkpoint

import training
from augment import Colours, draw_colours, random_flip, recolour, statistics
from data import CROPS, stream
from probe import probe
from sources import describe, parts, same_classes
from training import Plumbing, opt
from vit import MODELS, ViT, pair
from weights import load_into, read


@dataclass
class Config(Plumbing):
    data: str = opt("imagenet", "folder or tar (imagenet: ./imagenet or $IMAGENET), torchvision set by name, or shapes")
    fraction: float = opt(1.0, "share of the training images used, the same of each class, chosen by the seed")
    model: str = opt("vit_tiny", "encoder: vit_mini, vit_midi, vit_tiny, vit_small, vit_base")
    heads: int | None = opt(None, "attention heads of the encoder, if not the model's own", 1)
    img_size: tuple[int, ...] = opt((224,), "pixels: one number, or height and width", 1)
    patch_size: int | None = opt(None, "pixels on a patch's side, if not the model's own", 1)
    in_chans: int = opt(3, "image channels: 1 grey, 3 colour, 4 colour and alpha")
    mean: tuple[float, ...] | None = opt(None, "channel means in 0..1 (default: ImageNet's; 0.5 if not 3 channels)")
    std: tuple[float, ...] | None = opt(None, "channel deviations in 0..1 (default: ImageNet's, or 0.25)")
    freeze_patch_embed: bool | None = opt(None, "leave the patch projection at its random start (default: the recipe)")
    head_dim: int = opt(256, "width of the vectors that are compared", 1)
    head_hidden: int | None = opt(None, "width inside projector and predictor (default: the recipe)", 1)
    temperature: float = opt(0.2, "similarities are divided by it")
    momentum: float = opt(0.99, "how much the slow copy keeps of itself at each step, at first; at the end 1", 0)
    min_crop: float = opt(0.08, "smallest area of a random crop, fraction of the image", 0)
    interpolation: str = opt("bilinear", "resizing: bicubic, bilinear, or random: one of both")
    batch_size: int | None = opt(None, "images per optimizer step, over all processes (default: the recipe)", 2)
    accum: int = opt(1, "parts in which the backbone sees a batch; the numbers stay the same", 1)
    epochs: float | None = opt(None, "passes over the training set (default: the recipe)", 0)
    warmup_epochs: float | None = opt(None, "epochs of linear warm-up (default: the recipe, at most epochs / 10)", 0)
    warmup_lr: float | None = opt(None, "learning rate that the warm-up starts from (default: the recipe)", 0)
    blr: float = opt(1.5e-4, "peak learning rate per 256 images of the batch", 0)
    lr: float | None = opt(None, "peak learning rate itself, instead of blr", 0)
    weight_decay: float = opt(0.1, "AdamW's weight decay, on everything that is trained", 0)
    clip_grad: float | None = opt(None, "largest gradient norm (default: no clipping)", 0)
    init: str | None = opt(None, "checkpoint whose weights a new run starts from, in both encoders")
    probe_every: int = opt(0, "epochs between k-NN and linear probes, where the data has labels and val/; 0: none", 0)


# MAE-Lite's recipe for Tiny, the official one for Small and Base. vit_mini and vit_midi are ours, for 32 to 64 pixels.
LITE = dict(epochs=400, warmup_epochs=40, warmup_lr=1e-6, batch_size=1024, head_hidden=4096, freeze_patch_embed=False)
OFFICIAL = dict(epochs=300, warmup_epochs=40, warmup_lr=0.0, batch_size=4096, head_hidden=4096, freeze_patch_embed=True)
OURS = dict(LITE, epochs=200, warmup_epochs=20, batch_size=512, head_hidden=1024)
RECIPES = dict(vit_mini=OURS, vit_midi=OURS, vit_tiny=LITE, vit_small=OFFICIAL, vit_base=OFFICIAL)
# Grey, because the colours of shapes tell images apart, but nothing of what is drawn: the demo would learn those.
DEMO = dict(data="shapes", model="vit_mini", img_size=(48,), patch_size=8, in_chans=1, min_crop=0.3, batch_size=128,
            epochs=4, warmup_epochs=0.4, blr=4e-3, momentum=0.98, head_hidden=512, workers=1, log_every=39,
            save_every=156)


# ----------------------------------------------------------------------------------------------------------------
# The method


class Gather(torch.autograd.Function):
    """(...) -> (W, ...): everybody's, in the order of ranks. What others make of ours flows back to us."""

    @staticmethod
    def forward(ctx, x):
        everybody = x.new_empty(dist.get_world_size(), *x.shape)
        dist.all_gather(list(everybody), x.contiguous())        # the form that every backend takes
        return everybody

    @staticmethod
    def backward(ctx, grad):
        grad = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad)
        return grad[dist.get_rank()]


def gather(x):
    return Gather.apply(x) if dist.is_initialized() else x.unsqueeze(0)


class BatchNorm(nn.BatchNorm1d):
    """BatchNorm1d over the rows of all processes, (B, D) in each, with its names and numbers, in fp32.

    nn.SyncBatchNorm has no CPU kernel; this needs a gather and its reverse, which every backend has. sync False: each
    process for itself. Two passes over the rows, not E[x^2] - E[x]^2, which cancels where means are large.
    """

    def __init__(self, width, affine=True, sync=True):
        super().__init__(width, affine=affine)
        self.sync = sync

    def forward(self, x):
        x = x.to(self.running_mean.dtype)
        if not self.training:
            return super().forward(x)
        moments = torch.stack(torch.var_mean(x, 0, correction=0))                               # (2, D)
        moments = gather(moments) if self.sync else moments.unsqueeze(0)                        # (W, 2, D)
        rows, mean = len(moments) * len(x), moments[:, 1].mean(0)
        var = moments[:, 0].mean(0) + moments[:, 1].var(0, correction=0)
        with torch.no_grad():
            self.num_batches_tracked += 1
            for kept, new in ((self.running_mean, mean), (self.running_var, var * rows / (rows - 1))):
                # The step of a batch with a NaN in it is skipped; it leaves none here either.
                kept.lerp_(torch.where(new.isfinite(), new, kept), self.momentum)
        scale = (var + self.eps).rsqrt()
        return (x - mean) * scale if self.weight is None else torch.addcmul(self.bias, x - mean, scale * self.weight)


def head(*widths, sync=True):
    """Linear layers without bias, each with a BatchNorm, ReLUs in between; the last norm has no weight and bias."""
    layers = []
    for i, (wide, out) in enumerate(zip(widths, widths[1:]), 2):
        last = i == len(widths)
        layers += [nn.Linear(wide, out, bias=False), BatchNorm(out, not last, sync), nn.ReLU(inplace=True)][:3 - last]
    return nn.Sequential(*layers)


def cls_of(vit, img):
    """Images (B, C, h, w) -> the normed cls tokens (B, D). In the last block cls alone asks the others, because nobody
    reads what they would say: a fourteenth less work. It stands last there, which attention does not notice."""
    x = vit.embed(img)
    for block in vit.blocks[:-1]:
        x = block(x)
    return vit.norm(vit.blocks[-1](x.roll(-1, 1), first=x.shape[1] - 1))[:, 0]


class MoCo(nn.Module):
    """Two views of each of N images; the query of one should find the key of the other among N (MoCo v3, section 3).

    vit: a ViT with readout "cls" and positions "sincos_yx"; it becomes the online encoder. Names are the published
    ones: base_encoder and momentum_encoder, each with the projector as `head`, and predictor. dim, hidden: widths of
    the heads. freeze_patch_embed: the patch projection keeps its random start (section 4.2; ViT-S and ViT-B).
    """

    def __init__(self, vit, dim=256, hidden=4096, temperature=0.2, freeze_patch_embed=False, sync_bn=True):
        super().__init__()
        width, self.temperature, self.features = vit.config["dim"], temperature, cls_of
        for name, module in vit.named_modules():
            if isinstance(module, nn.Linear):                   # q, k and v are three square matrices, not one stack
                bound = (6 / (sum(module.weight.shape) if not name.endswith("qkv") else 2 * width)) ** 0.5
                nn.init.uniform_(module.weight, -bound, bound)
                nn.init.zeros_(module.bias)
        bound = (6 / (vit.patch_embed.proj.weight[0].numel() + width)) ** 0.5
        nn.init.uniform_(vit.patch_embed.proj.weight, -bound, bound)
        nn.init.zeros_(vit.patch_embed.proj.bias)
        nn.init.normal_(vit.cls_token, std=1e-6)
        vit.patch_embed.requires_grad_(not freeze_patch_embed)  # no gradient, so AdamW does not decay it either

        vit.head = head(width, hidden, hidden, dim, sync=sync_bn)           # heads keep torch's own start
        self.base_encoder = vit
        self.momentum_encoder = copy.deepcopy(vit).requires_grad_(False)
        self.predictor = head(dim, hidden, dim, sync=sync_bn)

    def forward(self, views, momentum, accum=1):
        """views (2B, C, h, w), normalised, the two of an image next to each other -> loss, fp32, and what to look at,
        detached: dict of (2, B, ...), by view: features, projections, queries, keys.

        Keys come first, so that their memory is free again. As the momentum encoder takes in the weights from before
        this step, that is no other result; if the last step was skipped, it takes in the same weights again.
        """
        with torch.no_grad():
            self.follow(momentum)
            _, keys = self.project(self.momentum_encoder, views, accum)                         # (2, B, E)
        features, projections = self.project(self.base_encoder, views, accum)
        queries = torch.stack([self.predictor(z) for z in projections])
        with torch.autocast(views.device.type, enabled=False):
            loss = self.contrast(queries, keys)
        seen = dict(features=features, projections=projections, queries=queries, keys=keys)
        return loss, {name: x.detach() for name, x in seen.items()}

    def follow(self, momentum):
        """p' <- m p' + (1 - m) p for every parameter; the momentum encoder's BatchNorm statistics are its own."""
        slow, fast = (list(net.parameters()) for net in (self.momentum_encoder, self.base_encoder))
        torch._foreach_lerp_(slow, fast, 1 - momentum)

    def project(self, encoder, views, accum):
        """-> features (2, B, D), by view, the normed cls tokens, and their projections (2, B, E).

        The backbone sees both views at once, as it treats every image by itself. The heads do not: their statistics
        are of one view. accum: the backbone takes that many parts one after the other and keeps their features alone;
        what is in between is made again when the gradient comes back.
        """
        if accum == 1:
            features = self.features(encoder, views)
        else:
            features = []
            for part in views.chunk(accum):
                torch.clear_autocast_cache()                    # else weights' gradients would be summed in 16 bits
                features.append(checkpoint(self.features, encoder, part, use_reentrant=False, preserve_rng_state=False))
            features = torch.cat(features)
        features = rearrange(features, "(b v) d -> v b d", v=2)
        return features, torch.stack([encoder.head(x) for x in features])

    def contrast(self, queries, keys):
        """Cross-entropy of each query's similarities to all N keys of the other view, whose own is the right one,
        times twice the temperature; both directions are added. By chance 2 * 2 * temperature * ln N."""
        q, k = F.normalize(queries, dim=-1), F.normalize(keys, dim=-1)
        k = rearrange(gather(k), "w v b e -> v (w b) e")                # (2, N, E)
        mine = torch.arange(q.shape[1], device=q.device)
        if dist.is_initialized():
            mine = mine + q.shape[1] * dist.get_rank()
        return sum(2 * self.temperature * F.cross_entropy(one @ other.T / self.temperature, mine)
                   for one, other in zip(q, k.flip(0)))

    def compile(self, **options):
        """The backbones alone: the rest is a few large products, and collectives, which stay eager."""
        self.features = torch.compile(self.features, **options)

    def encoder_state(self):
        """What downstream scripts read: the online encoder, as published, under its own names and without head."""
        return {k: v for k, v in self.base_encoder.state_dict().items() if not k.startswith("head.")}


# ----------------------------------------------------------------------------------------------------------------
# Views, momentum, what the log says


def two_views(img, mean, std):
    """uint8 crops (2B, C, h, w), the two of an image next to each other -> normalised floats. Strengths are the same;
    first views are always blurred, second ones rarely, but solarised at times."""
    first = draw_colours(len(img) // 2, p_blur=1.0)
    second = draw_colours(len(img) // 2, p_blur=0.1, p_solarize=0.2)
    colours = Colours(*(torch.stack(both, 1).flatten(0, 1) for both in zip(first, second)))
    return recolour(random_flip(img), colours, mean, std)


def momentum_at(step, steps, start):
    """Half a cosine from `start` to 1, at every step."""
    return 1 - (1 - start) * 0.5 * (1 + math.cos(math.pi * step / steps))


def told(model, seen, batch):
    """Of this process's part of a batch: the loss by chance, and what names a collapse.

    spread: of features, 1 when they point everywhere, 0 when all are one. rank: how many directions the projections
    use, exp of the entropy of their singular values (Roy & Vetterli 2007). positive, negative: mean similarity of
    queries and keys of the same image, and of different ones.
    """
    features, z, q, k = (x.float().cpu().nan_to_num() for x in seen.values())
    q, k, B = F.normalize(q, dim=-1), F.normalize(k, dim=-1).flip(0), q.shape[1]
    spread = F.normalize(features[0], dim=1).std(0).mean() * features.shape[-1] ** 0.5
    share = torch.linalg.svdvals(z[0])
    share = share / share.sum().clamp(min=1e-12)
    positive, every = (q * k).sum(-1).mean(), (q.sum(1) * k.sum(1)).sum(-1).mean() / B
    return dict(chance=4 * model.temperature * math.log(batch), spread=spread,
                rank=torch.special.entr(share).sum().exp(), positive=positive,
                negative=(every - positive) / max(B - 1, 1))


# ----------------------------------------------------------------------------------------------------------------
# The run


def resolve(cfg, given):
    """Fill what the command line left open: from the demo, if it is one, then from the model's recipe."""
    demo = DEMO if cfg.demo else {}
    cfg = training.fill(cfg, given, demo)
    if cfg.model not in RECIPES:
        training.die(f"--model {cfg.model} is not one of {', '.join(RECIPES)}")
    recipe = {**{k: MODELS[cfg.model][k] for k in ("heads", "patch_size")}, **RECIPES[cfg.model],
              "out": "out/moco-demo" if cfg.demo else "out/moco"}
    cfg = training.fill(cfg, given | set(demo), recipe)
    if "warmup_epochs" not in given:                            # a run shorter than its recipe warms up for less
        share = recipe["warmup_epochs"] / recipe["epochs"]
        cfg = replace(cfg, warmup_epochs=min(cfg.warmup_epochs, cfg.epochs * share))
    for name, known in (("in_chans", (1, 3, 4)), ("decode", tuple(CROPS)),
                        ("interpolation", ("bicubic", "bilinear", "random"))):
        if getattr(cfg, name) not in known:
            training.die(f"--{name.replace('_', '-')} is one of {', '.join(map(str, known))}, not {getattr(cfg, name)}")
    if cfg.min_crop > 1 or cfg.momentum > 1:
        training.die(f"--min-crop and --momentum are at most 1, not {cfg.min_crop:g} and {cfg.momentum:g}")
    if not cfg.temperature > 0:
        training.die(f"--temperature must be above 0, not {cfg.temperature:g}")
    return replace(cfg, data=os.path.normpath(cfg.data))       # a slash at its end makes no other data of it


def build(cfg):
    shape = {**MODELS[cfg.model], "heads": cfg.heads, "patch_size": cfg.patch_size}
    with training.in_words():
        vit = ViT(**shape, img_size=pair(cfg.img_size), in_chans=cfg.in_chans, positions="sincos_yx")
    return MoCo(vit, cfg.head_dim, cfg.head_hidden, cfg.temperature, cfg.freeze_patch_embed)


def start_from(model, path, say):
    """--init: weights of any file for both encoders, and, if it is a MoCo's, for the projectors."""
    load_into(model.base_encoder, read(path), say)
    model.follow(0.0)


def banner(cfg, model, steps, peak, start, world, device):
    """What is about to happen, with every value that a recipe filled in."""
    counts = [sum(p.numel() for p in net.parameters()) / 1e6
              for net in (model.base_encoder, model.base_encoder.head, model.predictor)]
    share = cfg.batch_size // world
    return (f"{cfg.model}: {counts[0] - counts[1]:.2f} M parameters, {cfg.heads} heads, patch projection "
            f"{'frozen' if cfg.freeze_patch_embed else 'trained'}; projector {counts[1]:.2f} M, predictor "
            f"{counts[2]:.2f} M, {cfg.head_hidden} wide, to {cfg.head_dim}\n"
            f"crops from {cfg.min_crop:g} of an image, {cfg.interpolation}; batch {cfg.batch_size} = {world} processes "
            f"x {share} images, 2 views of each, the backbone in {cfg.accum} parts; {cfg.dtype} on {device}\n"
            f"{cfg.epochs:g} epochs of {steps.per_epoch} steps, {start} of {steps.total} done, {steps.warmup} of them "
            f"warm-up, peak learning rate {peak:.3g}" +
            "\nexpected of the demo: loss 2.6 (chance 3.9), k-NN from 19 to 25%, linear from 27 to 38%" *
            (cfg.demo and all(getattr(cfg, k) == v for k, v in DEMO.items())))


def pretrain(cfg):
    rank, world, device = training.setup(cfg.device)
    cfg, say = replace(cfg, dtype=training.precision(cfg.dtype, device)), print if rank == 0 else str
    train, val = parts(cfg.data, cfg.fraction, cfg.seed, cfg.download)
    probing = cfg.probe_every or cfg.demo and cfg.data == "shapes"
    if probing and not same_classes(train, val):
        training.die("--probe-every needs the same classes in train/ and in val/")
    steps, peak = training.plan(cfg, len(train), world)
    with training.in_words():
        size, (mean, std) = pair(cfg.img_size), statistics(cfg.in_chans, cfg.mean, cfg.std)

    torch.manual_seed(cfg.seed)                                 # on every rank: all start from the same weights
    model = build(cfg).to(device)
    trained = [p for p in model.parameters() if p.requires_grad]        # one group: as published, norms decay, too
    optimizer = torch.optim.AdamW(trained, peak, betas=(0.9, 0.999), weight_decay=cfg.weight_decay, fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=cfg.dtype == "fp16")
    run = training.Run(cfg, "moco_v3", rank, world, len(train), model=model, optimizer=optimizer, scaler=scaler)
    if cfg.init and not run.step:
        start_from(model, cfg.init, say)
    training.compile_if(cfg, device, model)
    net = DDP(model, device_ids=[device.index] if device.type == "cuda" else None, broadcast_buffers=False) \
        if world > 1 else model                                 # every rank has the same statistics
    log = training.Log(cfg, rank, device, run.step, steps, images=len(train), world=world)
    health = training.Health(cfg, device, world, log)
    say(f"{describe(train)}\n{banner(cfg, model, steps, peak, run.step, world, device)}")
    measure = partial(probe, partial(cls_of, model.base_encoder), train, val, size, cfg.in_chans, mean, std, device,
                      cfg.workers, log)
    if probing and not run.step:
        measure(0)
    # Two crops of each decoded image, and all parts of a batch at once: the loss needs them together.
    pairs = SimpleNamespace(**vars(cfg) | dict(batch_size=2 * cfg.batch_size, repeat=2, accum=1))
    batches = log.waiting(stream(pairs, train, size, world, rank, run.step, steps.total, device))
    for step in range(run.step, steps.total):
        training.seed_for(cfg.seed, step, rank)
        lr = training.warmup_cosine(step, steps.total, steps.warmup, peak, start=cfg.warmup_lr)
        training.set_lr(optimizer, lr)
        momentum = momentum_at(step, steps.total, cfg.momentum)
        img, _, failed = next(batches)
        views = two_views(img.to(device, non_blocking=True), mean, std)                         # (2b, C, h, w)
        with training.autocast(device, cfg.dtype):
            loss, seen = net(views, momentum, cfg.accum)
        scaler.scale(loss).backward()
        grad_norm, skipped = training.finite_step(optimizer, scaler, cfg.clip_grad)
        done = step + 1
        why = health(skipped, failed, cfg.batch_size // world)

        if done % cfg.log_every == 0 or done == steps.total or why:
            log(done, loss=training.mean_over_ranks(loss.detach()), **told(model, seen, cfg.batch_size), lr=lr,
                momentum=momentum, grad_norm=grad_norm, skipped=health.skipped)
        keep, must = steps.due(done, cfg.keep_every), why or done == steps.total
        if why != "non-finite" and (must or keep or done % cfg.save_every == 0):
            config = dict(model.base_encoder.config, mean=mean, std=std)
            run.save(done, dict(method="moco_v3", config=config, model=model.encoder_state()), keep, must)
        if why:
            health.leave(why, run, done, model, loss.detach(), views)
        optimizer.zero_grad()
        if steps.due(done, cfg.probe_every) and done < steps.total:
            measure(done)
    if probing:
        measure(steps.total)
    if rank == 0:
        training.draw_curve(cfg.out)
        print(f"done: {cfg.out} has encoder.pt for downstream use, last.pt, log.jsonl")


def main(argv=None):
    pretrain(resolve(*training.parse(Config, __doc__, argv)))


if __name__ == "__main__":
    training.launch(main)
