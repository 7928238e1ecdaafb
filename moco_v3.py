"""
Momentum contrast: two views of an image find each other among those of all other images, through a slow copy of the
network. https://arxiv.org/abs/2104.02057, for lightweight networks https://arxiv.org/abs/2205.14443

One node:   torchrun --standalone --nproc_per_node=8 moco_v3.py --data imagenet --out out/moco
One GPU:    python moco_v3.py --data imagenet --out out/moco --accum 4
To try it:  python moco_v3.py --demo
Preempted:  type the same command again
Expected:   not run yet at full size; the demo ends with loss 2.6 (chance 3.9), k-NN 25% (from 19), linear 38% (from 27)
"""
import copy
import math
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
import torch.nn.functional as F
from einops import rearrange
from torch import nn
from torch.utils.checkpoint import checkpoint

from images.augment import Colours, draw_colours, random_flip, recolour
from runtime.options import ProbeOptions, TrainingOptions, opt, parse, value_errors_exit, vit_config
from runtime.run import Run, launch, print_rank0, warmup_cosine
from vit import ViT
from weights import load_into, read


@dataclass
class Config(TrainingOptions, ProbeOptions):
    freeze_patch_embed: bool | None = opt(None, "leave the patch projection at its random start")
    head_dim: int = opt(256, "width of the vectors that are compared", least=1)
    head_hidden: int | None = opt(None, "width inside projector and predictor", least=1)
    temperature: float = opt(0.2, "temperature of the softmax over keys", above=0)
    momentum: float = opt(0.99, "momentum of the moving average at the start; it rises to 1", least=0, most=1)
    batch_size: int | None = opt(None, "images per optimizer step, over all processes; two views of each", least=2)
    accum: int = opt(1, "parts in which the backbone sees a batch; the numbers stay the same", least=1)
    warmup_lr: float | None = opt(None, "learning rate that the warm-up starts from", least=0)


# MAE-Lite's recipe for Tiny, the official one for Small and Base. vit_mini and vit_midi are ours, for 32 to 64 pixels.
COMMON = dict(warmup_epochs=40, blr=1.5e-4, weight_decay=0.1, min_crop=0.08, interpolation="bilinear", head_hidden=4096)
LITE = dict(COMMON, batch_size=1024, epochs=400, warmup_lr=1e-6, freeze_patch_embed=False)
OFFICIAL = dict(COMMON, batch_size=4096, epochs=300, warmup_lr=0.0, freeze_patch_embed=True)
OURS = dict(LITE, batch_size=512, epochs=200, warmup_epochs=20, head_hidden=1024)
RECIPES = {"vit_mini": OURS, "vit_midi": OURS, "vit_tiny": LITE, "vit_small": OFFICIAL, "vit_base": OFFICIAL}
# Grey, because the colours of shapes tell images apart, but nothing of what is drawn: the demo would learn those.
DEMO = dict(data="shapes", model="vit_mini", img_size=(48,), patch_size=8, in_chans=1, min_crop=0.3, batch_size=128,
            epochs=4, warmup_epochs=0.4, blr=4e-3, momentum=0.98, head_hidden=512, workers=1, log_every=39,
            save_every=156)


# ----------------------------------------------------------------------------------------------------------------
# The method


class Gather(torch.autograd.Function):
    """Tensors (...) of W processes -> (W, ...), in the order of ranks; gradients flow back to where each came from."""

    @staticmethod
    def forward(ctx, x):
        gathered = x.new_empty(dist.get_world_size(), *x.shape)
        dist.all_gather(list(gathered), x.contiguous())         # the form that every backend takes
        return gathered

    @staticmethod
    def backward(ctx, grad):
        grad = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad)                                   # what all processes make of ours
        return grad[dist.get_rank()]


def gather(x):
    return Gather.apply(x) if dist.is_initialized() else x.unsqueeze(0)


class BatchNorm(nn.BatchNorm1d):
    """BatchNorm1d over the rows of all processes, (B, D) in each, with its names and numbers, in fp32; sync False: over
    each process's own rows. nn.SyncBatchNorm has no CPU kernel; this needs only a gather, which every backend has."""

    def __init__(self, width, affine=True, sync=True):
        super().__init__(width, affine=affine)
        self.sync = sync

    def forward(self, x):
        x = x.to(self.running_mean.dtype)                       # (B, D), fp32 also under autocast
        if not self.training:
            return super().forward(x)
        # Two passes over the rows, not E[x^2] - E[x]^2, which cancels where means are large.
        moments = torch.stack(torch.var_mean(x, 0, correction=0))                               # (2, D)
        moments = gather(moments) if self.sync else moments.unsqueeze(0)                        # (W, 2, D)
        rows = len(moments) * len(x)
        # The variance of all rows is the mean of the processes' variances, plus the variance of their means.
        mean = moments[:, 1].mean(0)                                                            # (D,)
        var = moments[:, 0].mean(0) + moments[:, 1].var(0, correction=0)                        # (D,)
        with torch.no_grad():
            self.num_batches_tracked += 1
            for kept, new in ((self.running_mean, mean), (self.running_var, var * rows / (rows - 1))):
                # The step of a batch with a NaN in it is skipped, so it must leave no NaN here either.
                kept.lerp_(torch.where(new.isfinite(), new, kept), self.momentum)
        scale = (var + self.eps).rsqrt()                                                        # (D,)
        if self.weight is None:
            return (x - mean) * scale
        return torch.addcmul(self.bias, x - mean, scale * self.weight)


def mlp_head(widths, sync):
    """Linear layers without bias, each with a BatchNorm, ReLUs in between; the last norm has no weight and bias."""
    layers = []
    for width, out in zip(widths[:-2], widths[1:-1]):
        layers += [nn.Linear(width, out, bias=False), BatchNorm(out, sync=sync), nn.ReLU(inplace=True)]
    last = nn.Linear(widths[-2], widths[-1], bias=False), BatchNorm(widths[-1], affine=False, sync=sync)
    return nn.Sequential(*layers, *last)


class MoCo(nn.Module):
    """Two views of each of N images; the query of one should find the key of the other among N (MoCo v3, section 3).

    vit: a ViT with pool "cls" and positions "sincos_yx"; it becomes base_encoder, with the projector as its `head`, as
    published. dim, hidden: widths of the heads. freeze_patch_embed: the patch projection stays random (section 4.2).
    """

    def __init__(self, vit, dim=256, hidden=4096, temperature=0.2, freeze_patch_embed=False, sync_bn=True):
        super().__init__()
        self.temperature = temperature
        self.init_weights(vit)
        vit.patch_embed.requires_grad_(not freeze_patch_embed)  # no gradient, so AdamW does not decay it either
        vit.head = mlp_head([vit.width, hidden, hidden, dim], sync_bn)      # heads keep torch's own start
        self.base_encoder = vit
        self.momentum_encoder = copy.deepcopy(vit).requires_grad_(False)
        # Why a predictor: only queries pass through it, so the online encoder need not give the very vectors of its
        # slow copy; negatives already prevent a collapse, but it adds a point of accuracy (ViT-B: 76.5 against 75.5).
        self.predictor = mlp_head([dim, hidden, dim], sync_bn)

    @staticmethod
    def init_weights(vit):
        """Xavier's start for the linear layers and the patch projection, a tiny cls token."""
        layers = {name: module for name, module in vit.named_modules() if isinstance(module, nn.Linear)}
        layers["patch_embed.proj"] = vit.patch_embed.proj
        for name, layer in layers.items():
            outputs, inputs = layer.weight.flatten(1).shape
            if name.endswith("qkv"):                            # three square matrices, not one stack
                outputs = inputs
            bound = (6 / (inputs + outputs)) ** 0.5
            nn.init.uniform_(layer.weight, -bound, bound)
            nn.init.zeros_(layer.bias)
        nn.init.normal_(vit.cls_token, std=1e-6)

    def forward(self, views, momentum, accum=1):
        """Normalised views (2B, C, h, w), the two of an image next to each other; accum: see project -> loss (), fp32,
        and a dict of features, projections, queries, keys, detached, each (2, B, ...), grouped by view."""
        # Keys come first, so that their memory is free again before the queries need it. It is the same result.
        with torch.no_grad():
            # Why in forward: this step's keys need this step's copy, and forward runs once a step. EsViT's forward
            # runs once a pass, and its copy is what is released: there the update comes after the optimizer's.
            self.update_ema(momentum)
            keys = self.project(self.momentum_encoder, views, accum)[1]                         # (2, B, E)
        features, projections = self.project(self.base_encoder, views, accum)                   # (2, B, D), (2, B, E)
        queries = torch.stack([self.predictor(z) for z in projections])                         # (2, B, E)
        with torch.autocast(views.device.type, enabled=False):
            loss = self.contrast(queries, keys)                                                 # ()
        outputs = dict(features=features, projections=projections, queries=queries, keys=keys)
        return loss, {name: x.detach() for name, x in outputs.items()}

    @torch.no_grad()
    def update_ema(self, momentum):
        """p' <- m p' + (1 - m) p for every parameter; the momentum encoder's BatchNorm statistics are its own."""
        slow, online = list(self.momentum_encoder.parameters()), list(self.base_encoder.parameters())
        torch._foreach_lerp_(slow, online, 1 - momentum)

    @staticmethod
    def encode(vit, img):
        """Images (B, C, h, w) -> the normed cls tokens (B, D). Nobody reads the patch tokens after the last block, so
        cls alone asks the others there: the same numbers, less work."""
        x = vit.embed(img)                                                                      # (B, 1 + N, D)
        for block in vit.blocks[:-1]:
            x = block(x)
        x = x.roll(-1, 1)                                       # cls comes last: a block can skip the first tokens
        return vit.norm(vit.blocks[-1](x, first=x.shape[1] - 1))[:, 0]

    def project(self, encoder, views, accum):
        """Views (2B, C, h, w) -> features (2, B, D), the normed cls tokens, and their projections (2, B, E), grouped
        by view. accum: the backbone takes that many parts one after the other: the same numbers, less memory."""
        if accum == 1:                                          # both views at once: each image is treated by itself
            features = self.encode(encoder, views)                                              # (2B, D)
        else:
            features = []
            for part in views.chunk(accum):
                torch.clear_autocast_cache()                    # else weights' gradients would be summed in 16 bits
                # Only the features are kept; what led to them is computed again when the gradient comes back.
                features.append(checkpoint(self.encode, encoder, part, use_reentrant=False, preserve_rng_state=False))
            features = torch.cat(features)                                                      # (2B, D)
        features = rearrange(features, "(b v) d -> v b d", v=2)                                 # (2, B, D)
        # The heads see one view at a time, because their batch statistics are of one view.
        return features, torch.stack([encoder.head(x) for x in features])

    def contrast(self, queries, keys):
        """queries, keys (2, B, E) -> cross-entropy of each query's similarities to all N keys of the other view, of
        which its own image's is the right one; both directions are added. By chance 2 * 2 * temperature * ln N."""
        q, k = F.normalize(queries, dim=-1), F.normalize(keys, dim=-1)                          # (2, B, E) each
        k = rearrange(gather(k), "w v b e -> v (w b) e")                                        # (2, N, E)
        own = torch.arange(q.shape[1], device=q.device)         # the column of each query's own key
        if dist.is_initialized():
            own = own + q.shape[1] * dist.get_rank()
        one = F.cross_entropy(q[0] @ k[1].T / self.temperature, own)    # view 1 looks for view 2 among N logits, (B, N)
        two = F.cross_entropy(q[1] @ k[0].T / self.temperature, own)
        # Why 2 tau: the gradient of q k^T / tau has a factor 1 / tau, which this takes out; 2 q k^T is BYOL's scale.
        scale = 2 * self.temperature
        return scale * one + scale * two

    def compile(self, **options):
        """Compile the backbones alone: the rest is a few large products, and collectives, which stay eager."""
        self.encode = torch.compile(self.encode, **options)

    def metrics(self, outputs, batch_size):
        """For the log, of this process's part of a batch: the loss by chance, and what names a collapse.

        spread: of features, 1 when they point everywhere, 0 when all are one. rank: how many directions the projections
        use, exp of the entropy of their singular values (Roy & Vetterli 2007). positive, negative: mean similarity of
        queries and keys of the same image, and of different ones.
        """
        outputs = {name: x.float().cpu().nan_to_num() for name, x in outputs.items()}
        features = F.normalize(outputs["features"][0], dim=1)                                   # (B, D)
        spread = features.std(0).mean() * features.shape[-1] ** 0.5
        share = torch.linalg.svdvals(outputs["projections"][0])
        share = share / share.sum().clamp(min=1e-12)
        q = F.normalize(outputs["queries"], dim=-1)                                             # (2, B, E)
        k = F.normalize(outputs["keys"], dim=-1).flip(0)        # each query's other view
        B = q.shape[1]
        positive = (q * k).sum(-1).mean()
        all_keys = (q.sum(1) * k.sum(1)).sum(-1).mean() / B     # B times the mean similarity to all B keys
        return dict(chance=4 * self.temperature * math.log(batch_size), spread=spread,
                    rank=torch.special.entr(share).sum().exp(), positive=positive,
                    negative=(all_keys - positive) / max(B - 1, 1))

    def encoder_checkpoint(self):
        """What downstream scripts read: the online encoder, as published, under its own names and without head."""
        state = {k: v for k, v in self.base_encoder.state_dict().items() if not k.startswith("head.")}
        return dict(model=state, config=self.base_encoder.config)


# ----------------------------------------------------------------------------------------------------------------
# The run: views, momentum, loop


def two_views(img, mean, std):
    """uint8 crops (2B, C, h, w), the two of an image next to each other -> normalised floats. Strengths are the same;
    first views are always blurred, second ones rarely, but solarised at times."""
    first = draw_colours(len(img) // 2, p_blur=1.0)
    second = draw_colours(len(img) // 2, p_blur=0.1, p_solarize=0.2)
    alternating = [torch.stack(both, 1).flatten(0, 1) for both in zip(first, second)]           # (2B, ...) each
    return recolour(random_flip(img), Colours(*alternating), mean, std)


def momentum_at(step, steps, start):
    """Half a cosine from `start` to 1, at every step."""
    return 1 - (1 - start) * 0.5 * (1 + math.cos(math.pi * step / steps))


def main(argv=None):
    cfg = parse(Config, "moco", __doc__, RECIPES, DEMO, argv)
    run = Run(cfg, "moco_v3")
    train, val = run.datasets()
    with value_errors_exit():
        vit = ViT(**vit_config(cfg), positions="sincos_yx")
    model = MoCo(vit, cfg.head_dim, cfg.head_hidden, cfg.temperature, cfg.freeze_patch_embed).to(run.device)
    if run.init:
        load_into(model.base_encoder, read(run.init), print_rank0)      # of a MoCo's file the projector, too
        model.update_ema(0.0)                                   # a copy
    trained = [p for p in model.parameters() if p.requires_grad]        # one group: as published, norms decay, too
    optimizer = torch.optim.AdamW(trained, betas=(0.9, 0.999), weight_decay=cfg.weight_decay, fused=True)
    net = run.start(model, optimizer, model.encoder_checkpoint(), partial(model.encode, vit))

    # Two crops of each decoded image, and --accum is inside the model: the loss needs all parts of a batch together.
    for step, passes in run.steps(run.random_crops(repeat=2), images=cfg.batch_size, accum=1):
        run.set_lr(warmup_cosine(step, run.total, run.warmup, run.peak, start=cfg.warmup_lr))
        momentum = momentum_at(step, run.total, cfg.momentum)
        for img, _ in passes:
            views = two_views(img, run.mean, run.std)                                           # (2B, C, h, w)
            with run.autocast():
                loss, outputs = net(views, momentum, cfg.accum)                                 # ()
            run.backward(loss)
        run.update(metrics=partial(model.metrics, outputs, cfg.batch_size), momentum=momentum)
    run.finish()


if __name__ == "__main__":
    launch(main)
