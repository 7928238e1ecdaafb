"""
Self-distillation without labels: of any crop of an image a student predicts what its teacher, a slow copy of itself,
says of two large crops; for whole views (DINO, https://arxiv.org/abs/2104.14294) and for regions (EsViT,
https://arxiv.org/abs/2106.09785).

One node:   torchrun --standalone --nproc_per_node=8 esvit.py --data imagenet --out out/esvit
One GPU:    python esvit.py --model swin_lite --out out/esvit
DINO:       torchrun --standalone --nproc_per_node=8 esvit.py --model vit_small --out out/dino
Minutes:    python esvit.py --demo
Preempted:  type the same command again
Expected:   not run yet at full size; the demo ends with loss 5.23 (chance 6.24), k-NN 11.8% and linear 19.4%
"""
import math
from collections import namedtuple
from dataclasses import dataclass, replace
from functools import cache, partial

import torch
import torch.distributed as dist
import torch.nn.functional as F
from einops import rearrange
from torch import nn
from torch.autograd.function import once_differentiable

from images.augment import Colours, draw_colours, random_flip, recolour
from images.multicrop import MultiCrops, crop_groups
from nets.naming import PYRAMIDS
from runtime.options import NetworkOptions, ProbeOptions, fail, opt, parse, value_errors_exit, vit_config
from runtime.run import Run, decay_groups, launch, print_rank0
from vit import Pyramid, ViT
from weights import init_mlp_ratio, load_into, read


@dataclass
class Config(NetworkOptions, ProbeOptions):
    model: str = opt("swin_tiny", "backbone: a Swin, ViL or CvT, or a ViT (DINO)")
    window: int | None = opt(None, "tokens on a window's side, not of a ViT: 7, 14 (default: the model's own)", least=2)
    drop_path: float | None = opt(None, "stochastic depth of the student, at its last block", least=0)
    decode: str = opt("workers", "where JPEGs are decoded: always in the workers here", choices=("workers",))
    local_crops: tuple[int, ...] = opt((8,), "local crops of an image, one number per --local-size; 0: none", least=0)
    local_size: tuple[str, ...] = opt(("96",), "pixels of local crops: side, or HEIGHTxWIDTH")
    local_scale: tuple[float, ...] = opt((0.05, 0.4), "least and largest area of a local crop", above=0, most=1)
    global_scale: tuple[float, ...] | None = opt(None, "area of a global crop (default: 0.4 1)", above=0, most=1)
    prototypes: int | None = opt(None, "number of prototypes of each head", least=2)
    head_hidden: int = opt(2048, "width inside the heads", least=1)
    bottleneck: int = opt(256, "width before the prototypes", least=1)
    norm_last_layer: bool | None = opt(None, "keep the length of prototypes at 1")
    freeze_last_layer: float = opt(1, "first epochs, in which prototypes stay; at most a tenth of all", 0, shrinks=True)
    region_weight: float | None = opt(None, "share of the region loss beside the views'; 0: DINO", least=0, most=1)
    region_from: int | None = opt(None, "epoch of the first region loss (default: 0; large models: later)", least=0)
    teacher_temp: float | None = opt(None, "temperature of the teacher's softmax", above=0)
    teacher_temp_start: float = opt(0.04, "temperature of the teacher in the first epoch", above=0)
    teacher_temp_epochs: float | None = opt(None, "epochs over which it rises", least=0, shrinks=True)
    momentum: float | None = opt(None, "momentum of the teacher at the start; it rises to 1", least=0, most=1)
    min_lr: float = opt(1e-6, "learning rate at the end", least=0)
    weight_decay: float = opt(0.04, "AdamW's weight decay at the start; none on biases and 1-D parameters", least=0)
    weight_decay_end: float = opt(0.4, "weight decay at the end", least=0)
    clip_grad: float = opt(3.0, "largest gradient norm of each tensor by itself; 0: no clipping", least=0)


# EsViT's recipes for Swin, DINO's for ViT-Small and -Base. The light ones are ours, for one GPU.
ESVIT = dict(epochs=300, warmup_epochs=10, batch_size=512, blr=5e-4, drop_path=0.1, prototypes=65536, region_weight=0.5,
             norm_last_layer=False, teacher_temp=0.07, teacher_temp_epochs=30, momentum=0.996)
DINO = dict(ESVIT, epochs=100, region_weight=0.0, norm_last_layer=True, teacher_temp=0.04, teacher_temp_epochs=0)
LIGHT = dict(epochs=100, batch_size=256, prototypes=16384, momentum=0.998)
SMALL = dict(LIGHT, prototypes=4096, drop_path=0.0)
RECIPES = {
    "swin_mini": dict(ESVIT, **SMALL, teacher_temp_epochs=10), "swin_tiny": ESVIT,
    "swin_lite": dict(ESVIT, **LIGHT, teacher_temp_epochs=10), "swin_small": dict(ESVIT, drop_path=0.2),
    "swin_base": dict(ESVIT, drop_path=0.2), "vit_mini": dict(DINO, **SMALL), "vit_midi": dict(DINO, **SMALL),
    "vil_mini": dict(ESVIT, **SMALL, teacher_temp_epochs=10), "vil_tiny": dict(ESVIT, batch_size=1024),
    "cvt_mini": dict(ESVIT, **SMALL, teacher_temp_epochs=10), "cvt_tiny": dict(ESVIT, batch_size=1024),
    "vit_tiny": dict(DINO, **LIGHT, heads=3), "vit_small": dict(DINO, heads=6), "vit_base": DINO,
}
DEMO = dict(data="shapes", fraction=0.3, model="swin_mini", img_size=(40,), local_crops=(4,), local_size=("20",),
            local_scale=(0.15, 0.5), batch_size=64, prototypes=512, head_hidden=512, bottleneck=128, epochs=3, blr=4e-3,
            warmup_epochs=0.3, momentum=0.99, teacher_temp=0.04, teacher_temp_epochs=0.3, workers=1, log_every=46,
            save_every=138)


# ----------------------------------------------------------------------------------------------------------------
# The method. B images, V crops of each, T regions of a crop, R of all crops of an image, E bottleneck, K prototypes

# Features and bottlenecks: of crops, views (B, V, D) and z (B, V, E); of regions, (B, R, D) and (B, R, E) or None.
Outputs = namedtuple("Outputs", "views z regions z_regions layout")     # layout: number of crops, and T, for each size
AT_ONCE = dict(cpu=2 ** 22, cuda=2 ** 28)                       # logits in memory, but at least those of one image


class DINOHead(nn.Module):
    """Features (..., D) -> logits (..., K) over prototypes, by way of unit vectors z (..., E) (DINO, section 3.1).
    hidden, bottleneck: widths inside, and of z. unit: prototypes have length 1 for good (norm_last_layer)."""

    def __init__(self, dim, prototypes, hidden=2048, bottleneck=256, unit=True):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, hidden), nn.GELU(),
                                 nn.Linear(hidden, bottleneck))
        self.mlp.apply(ViT.init_weights)
        self.last_layer = nn.Module()                           # rows of length g, direction v; names of weight_norm
        self.last_layer.weight_g = nn.Parameter(torch.ones(prototypes, 1), requires_grad=not unit)
        self.last_layer.weight_v = nn.Parameter(torch.empty(prototypes, bottleneck))
        nn.init.uniform_(self.last_layer.weight_v, -bottleneck ** -0.5, bottleneck ** -0.5)     # a linear layer's start

    def bottleneck(self, x):
        return F.normalize(self.mlp(x), dim=-1)                                                 # z, (..., E)

    def prototypes(self):
        # v g / |v|, in the kernel that torch's weight_norm calls: autograd would pass through (K, E) eight times.
        return torch._weight_norm(self.last_layer.weight_v, self.last_layer.weight_g, 0)        # (K, E)

    def forward(self, x):
        return F.linear(self.bottleneck(x), self.prototypes())                                  # (..., K)


class Network(nn.Module):
    """Backbone, a head for views, and, if regions are ever compared, one for regions; names as in DINO's files.
    backbone: a Pyramid, whose view is its mean region, or a ViT, whose view is cls. options: of both heads."""

    def __init__(self, backbone, prototypes, dense=True, **options):
        super().__init__()
        self.backbone = backbone
        self.head = DINOHead(backbone.width, prototypes, **options)
        self.head_dense = DINOHead(backbone.width, prototypes, **options) if dense else None

    def features(self, img):
        """Images (B, C, h, w) -> features of views (B, D) and of regions (B, T, D), all after the norm."""
        if isinstance(self.backbone, Pyramid):
            return self.backbone.view_and_regions(img)
        x = self.backbone.encode(img)
        return x[:, 0], x[:, 1:]

    def forward(self, crops, dense):
        """crops: for every size (n, B, C, h, w), n of each image. dense: regions go through their head -> Outputs."""
        views, regions, layout = [], [], []
        for same in crops:                                      # all crops of a size go through the backbone together
            view, tokens = self.features(same.flatten(0, 1))                                    # (nB, D), (nB, T, D)
            views.append(rearrange(view, "(n b) d -> b n d", n=len(same)))
            regions.append(rearrange(tokens, "(n b) t d -> b (n t) d", n=len(same)))
            layout.append((len(same), tokens.shape[1]))
        views, regions = torch.cat(views, 1), torch.cat(regions, 1)                             # (B, V, D), (B, R, D)
        z_regions = self.head_dense.bottleneck(regions) if dense else None
        return Outputs(views, self.head.bottleneck(views), regions, z_regions, tuple(layout))


@cache
def pair_weights(layout, device):
    """The weight in the loss of each crop with each teacher view, (V, 2), and of each region with each view, (R, 2).
    No crop is compared with itself, all pairs of crops weigh the same, and so do all regions of a crop."""
    counts, tokens = torch.tensor(layout).T
    tokens = tokens.repeat_interleave(counts)                   # regions in each crop, (V,)
    pairs = (1 - torch.eye(len(tokens), 2)) / (2 * (len(tokens) - 1))                           # (V, 2)
    return pairs.to(device), (pairs / tokens.unsqueeze(1)).repeat_interleave(tokens, 0).to(device)


@torch.no_grad()
def match(regions, teacher):
    """Region features of the student (B, R, D) and of the teacher (B, 2, T, D) -> the most similar region, by cosine,
    in each of the teacher's views of the same image, (B, R, 2)."""
    ours, theirs = (F.normalize(x.float(), dim=-1) for x in (regions, teacher))
    return torch.einsum("brd,bitd->brit", ours, theirs).argmax(-1)


class CrossEntropy(torch.autograd.Function):
    """The cross-entropy of student row r against teacher row m of image b, times weights[b, r, m], summed -> (). Same
    numbers, less memory: a few images' logits at a time, and the gradients of z and prototypes in the same pass.
    z (B, R, E), prototypes (K, E): the student's, with logits z prototypes^T / temperatures[0]; z_teacher (B, M, E),
    theirs (K, E): the teacher's, with logits less center (1, K), over temperatures[1]. All in fp32."""

    @staticmethod
    def forward(ctx, z, prototypes, z_teacher, theirs, center, temperatures, weights):
        few = max(1, AT_ONCE["cuda" if z.is_cuda else "cpu"] // (z.shape[1] * len(prototypes)))         # images
        z, z_teacher, shift = z / temperatures[0], z_teacher / temperatures[1], center[0] / -temperatures[1]
        dz, dprototypes, loss = torch.empty_like(z), torch.empty_like(prototypes), z.new_zeros(())
        kept = 0                                                # of dprototypes: nothing yet
        for x, y, w, into in zip(*(t.split(few) for t in (z, z_teacher, weights, dz))):
            # p: softmax of the teacher's logits, centred and sharpened; s: log-softmax of the student's.
            p = torch.addmm(shift, y.flatten(0, 1), theirs.T).softmax(-1)                       # (b * M, K)
            d = torch.bmm(-w, p.view(*y.shape[:2], -1)).flatten(0, 1)                           # (b * R, K)
            del p
            s = F.log_softmax(x.flatten(0, 1) @ prototypes.T, -1)                               # (b * R, K)
            loss += torch.linalg.vecdot(d, s).sum()             # - w <p, s>
            d.addcmul_(s.exp_(), w.sum(2).view(-1, 1))          # d is now the logits' gradient, w (exp(s) - p)
            torch.div((d @ prototypes).view_as(into), temperatures[0], out=into)                # (b, R, E)
            dprototypes.addmm_(d.T, x.flatten(0, 1), beta=kept)                                 # (K, E)
            kept = 1
        ctx.save_for_backward(dz, dprototypes)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return *(t.mul_(grad) for t in ctx.saved_tensors), None, None, None, None, None


class EsViT(nn.Module):
    """Student and teacher, and the losses between them (EsViT, section 3; DINO, algorithm 1). Both are Networks of one
    shape; the teacher begins as the student, and then follows it. region_weight: share of the region loss."""

    def __init__(self, student, teacher, region_weight=0.5, student_temp=0.1):
        super().__init__()
        self.student, self.teacher = student, teacher.requires_grad_(False)
        teacher.load_state_dict(student.state_dict())
        self.dino_loss = nn.Module()                            # the centres of both heads by their published names
        self.region_weight, self.student_temp = region_weight, student_temp
        for name in ["center"] if student.head_dense is None else ["center", "center_grid"]:
            self.dino_loss.register_buffer(name, torch.zeros(1, len(student.head.last_layer.weight_g)))       # (1, K)

    def forward(self, crops, temperature, dense):
        """crops: as for Network, global ones first; temperature: the teacher's; dense: with regions -> see `losses`."""
        with torch.no_grad():
            teacher = self.teacher(crops[:1], dense)            # sees the two global crops
        student = self.student(crops, dense)                    # sees all crops
        with torch.autocast(crops[0].device.type, enabled=False):
            return self.losses(student, teacher, temperature)

    def losses(self, student, teacher, temperature):
        """Outputs of both -> loss (); dict without gradients: parts (losses of view and region), means (mean logits of
        the teacher's head or heads), views (the student's features), z (the teacher's)."""
        # Views: what the student says of every crop, against what the teacher says of each global one but itself.
        pairs, per_region = pair_weights(student.layout, student.z.device)                      # (V, 2), (R, 2)
        weights = pairs.expand(len(student.z), -1, -1)                                          # (B, V, 2)
        loss, mean = self.compare(self.student.head, self.teacher.head, self.dino_loss.center, student.z, teacher.z,
                                  weights, temperature)                                         # (), (1, K)
        found = dict(parts=dict(view=loss.detach()), means=mean, views=student.views.detach(), z=teacher.z)
        if student.z_regions is not None:
            # Regions: each against the teacher's region that looks most like it, in each of the teacher's views.
            theirs = rearrange(teacher.regions, "b (i t) d -> b i t d", i=2)
            nearest = match(student.regions, theirs).unsqueeze(-1)                              # (B, R, 2, 1)
            weights = per_region.new_zeros(*nearest.shape[:3], theirs.shape[2])                 # (B, R, 2, T)
            weights.scatter_(3, nearest, per_region.expand(len(nearest), -1, -1).unsqueeze(-1))
            region, other = self.compare(self.student.head_dense, self.teacher.head_dense, self.dino_loss.center_grid,
                                         student.z_regions, teacher.z_regions, weights.flatten(2), temperature)
            loss = (1 - self.region_weight) * loss + self.region_weight * region
            found["parts"]["region"] = region.detach()
            found["means"] = torch.cat([mean, other])                                           # (2, K)
        return loss, found

    def compare(self, head, teacher_head, center, z, z_teacher, weights, temperature):
        """The loss of one head, the mean over images, and the teacher's mean logits (1, K), which are the mean z's."""
        theirs = teacher_head.prototypes()                                                      # (K, E)
        loss = CrossEntropy.apply(z.float(), head.prototypes(), z_teacher.float(), theirs, center,
                                  (self.student_temp, temperature), weights / len(z))           # ()
        return loss, z_teacher.float().mean((0, 1)).unsqueeze(0) @ theirs.T

    @torch.no_grad()
    def update_ema(self, momentum):
        """theta' <- m theta' + (1 - m) theta for every parameter of the teacher."""
        torch._foreach_lerp_(list(self.teacher.parameters()), list(self.student.parameters()), 1 - momentum)

    @torch.no_grad()
    def update_center(self, means, skipped, keep=0.9):
        """Centres follow the mean logits of a whole step, means (1 or 2, K), unless it was skipped. Sharpening alone
        would let one prototype take everything, centring alone would make all alike: together they prevent both."""
        if dist.is_initialized():
            means = means / dist.get_world_size()
            dist.all_reduce(means)
        for center, mean in zip(self.dino_loss.buffers(), means):
            center.copy_(torch.where(skipped > 0, center, keep * center + (1 - keep) * mean))

    @torch.no_grad()
    def metrics(self, found, temperature):
        """For the log, of this process's part of a batch: the loss by chance, ln K, and what tells a collapse. entropy:
        of the teacher's mean choice for a view: ln K if all prototypes are the same to it, 0 if it knows one. kl: what
        the student lacks to it. centre: the norm of the views' centre. rank: how many directions view features use."""
        logits = F.linear(found["z"].float(), self.teacher.head.prototypes()) - self.dino_loss.center   # (B, 2, K)
        entropy = torch.special.entr((logits / temperature).softmax(-1)).sum(-1).mean()                   # ()
        values = torch.linalg.svdvals(found["views"][:, 0].float().nan_to_num())    # Roy & Vetterli 2007
        values = values / values.sum().clamp(min=1e-12)
        return dict(chance=math.log(logits.shape[-1]), entropy=entropy, kl=found["parts"]["view"] - entropy,
                    centre=self.dino_loss.center.norm(), rank=torch.special.entr(values).sum().exp())

    def compile(self, **options):
        """The backbones alone, for crops: probes have batches of other sizes, and losses few kernels to fuse."""
        for net in (self.student, self.teacher):
            net.features = torch.compile(net.features, **options)


# ----------------------------------------------------------------------------------------------------------------
# The run: crops, schedules, options, loop


def recolour_crops(crops, mean, std):
    """Flip and recolour uint8 (n, B, C, h, w) of every size, global ones first -> normalised floats (as DINO, BYOL)."""
    out = []
    for img in crops:
        kinds = [dict(p_blur=0.5)] * len(img)                   # local crops are blurred every other time
        if not out:                                             # the first global crop always, the second rarely
            kinds = [dict(p_blur=1.0), dict(p_blur=0.1, p_solarize=0.2)]
        drawn = [draw_colours(img.shape[1], **kind) for kind in kinds]
        colours = Colours(*map(torch.cat, zip(*drawn)))         # of n * B images
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


def complete(cfg):
    """Fill the options that follow from several others, and refuse what does not fit together -> the config."""
    if cfg.model in PYRAMIDS and cfg.heads:
        fail(f"--heads is an option of a ViT, and --model is {cfg.model}: leave it out")
    if cfg.model not in PYRAMIDS and cfg.window:
        fail(f"--window is no option of a ViT, and --model is {cfg.model}: leave it out")
    if cfg.global_scale is None:                                # without local crops global ones are small, too
        cfg = replace(cfg, global_scale=(0.4, 1.0) if any(cfg.local_crops) else (0.14, 1.0))
    if cfg.region_from is None:                                 # of large models in epoch 200 of 300, as published
        late = cfg.model in ("swin_base", "vil_tiny", "cvt_tiny") or cfg.window == 14
        cfg = replace(cfg, region_from=int(200 * min(1.0, cfg.epochs / 300)) if late else 0)
    if cfg.region_weight and cfg.region_from >= cfg.epochs:
        fail(f"--region-from {cfg.region_from} is after the end: give --region-weight 0 for views alone")
    if cfg.freeze_last_layer >= cfg.epochs:
        fail(f"--freeze-last-layer {cfg.freeze_last_layer:g} of {cfg.epochs:g} epochs: prototypes would never learn")
    if cfg.teacher_temp > 0.07:                                 # in DINO's table k-NN falls to 0.1% at 0.08
        print_rank0(f"warning: teachers above a temperature of 0.07 collapse, and this one's is {cfg.teacher_temp:g}")
    return cfg


def make_model(cfg, groups):
    """Student and teacher. groups: see crop_groups. Raises ValueError, also for crops that the backbone cannot see."""
    size = dict(img_size=cfg.img_size, patch_size=cfg.patch_size, in_chans=cfg.in_chans)
    nets = []
    for drop_path in (cfg.drop_path, 0.0):                      # only the student drops paths
        if cfg.model in PYRAMIDS:
            kind, options = PYRAMIDS[cfg.model]
            own = dict(window=cfg.window, mlp_ratio=init_mlp_ratio(cfg) if cfg.init else 4.0, drop_path=drop_path)
            backbone = kind(**dict(options, **size) | own)
        else:
            backbone = ViT(**vit_config(cfg), positions="learned", resize_offset=0.1, drop_path=drop_path)
        nets.append(Network(backbone, cfg.prototypes, cfg.region_weight > 0, hidden=cfg.head_hidden,
                            bottleneck=cfg.bottleneck, unit=cfg.norm_last_layer))
    for _, (height, width), _ in groups:
        backbone.grid_of(height, width)                         # patches must tile crops of every size
        if min(height, width) < cfg.patch_size * (cfg.window or 1):
            raise ValueError(f"crops of {height}x{width} pixels are smaller than a window of {cfg.window} patches of "
                             f"{cfg.patch_size}: they would attend to little but padding")
    return EsViT(*nets, cfg.region_weight)


def load_init(model, path):
    """--init: the weights of a file for student and teacher, and of its heads what fits."""
    file = read(path)
    load_into(model.student.backbone, file, print_rank0)
    ours, heads = model.student.state_dict(), {}
    for name, tensor in file.state.items():
        name = name.replace("parametrizations.weight.original0", "weight_g")    # as torch's weight_norm now has it
        name = name.replace("parametrizations.weight.original1", "weight_v")
        if name.startswith(("head.", "head_dense.")) and name in ours and tensor.shape == ours[name].shape:
            heads[name] = tensor
    model.student.load_state_dict(heads, strict=False)
    print_rank0(f"{path}: of the heads, {len(heads)} tensors as well")
    model.teacher.load_state_dict(model.student.state_dict())


def main(argv=None):
    cfg = complete(parse(Config, "esvit", __doc__, RECIPES, DEMO, argv))
    run = Run(cfg, "esvit")
    train, val = run.datasets()
    with value_errors_exit():
        groups = crop_groups(run.size, cfg.global_scale, cfg.local_crops, cfg.local_size, cfg.local_scale)
        model = make_model(cfg, groups)
    if run.init:
        load_init(model, run.init)
    model = model.to(run.device)
    optimizer = torch.optim.AdamW(decay_groups(model, cfg.weight_decay), fused=True)
    last_layers = nn.ModuleList([m for name, m in model.student.named_modules() if name.endswith("last_layer")])
    regions_from = cfg.region_from * run.per_epoch if cfg.region_weight else run.total
    backbone = model.teacher.backbone                           # the teacher is what is kept in the end
    encoder = dict(method="esvit" if cfg.region_weight else "dino", model=backbone.state_dict(), config=backbone.config)
    net = run.start(model, optimizer, encoder, backbone.features, split=True,
                    ddp=dict(find_unused_parameters=0 < regions_from < run.total))      # the regions' head, until then

    for step, passes in run.steps(MultiCrops(train, groups, cfg.in_chans, cfg.seed)):
        epoch, dense = step // run.per_epoch, step >= regions_from
        run.set_lr(cosine(step, run.total, run.peak, cfg.min_lr, run.warmup))
        wd = optimizer.param_groups[1]["weight_decay"] = cosine(step, run.total, cfg.weight_decay, cfg.weight_decay_end)
        momentum = cosine(step, run.total, cfg.momentum, 1.0)
        temperature = temperature_at(epoch, cfg.teacher_temp_start, cfg.teacher_temp, cfg.teacher_temp_epochs)
        if step == regions_from and step:                       # as published, AdamW forgets, schedules go on
            optimizer.state.clear()
        means = 0.0
        for views, _ in passes:
            views = recolour_crops(views, run.mean, run.std)                                    # (n, B, C, h, w) each
            with run.autocast():
                loss, found = net(views, temperature, dense)                                    # ()
            run.backward(loss, **found["parts"])
            means = means + found["means"] / cfg.accum                                          # (1 or 2, K)
        if step < cfg.freeze_last_layer * run.per_epoch:
            last_layers.zero_grad()                             # AdamW leaves alone what has no gradient
        run.update(metrics=partial(model.metrics, found, temperature), per_tensor=True, wd=wd, momentum=momentum,
                   temperature=temperature)
        # The teacher follows the student's new weights, so it moves here; MoCo v3's momentum encoder moves before it
        # makes the keys of the same step, so inside forward.
        model.update_ema(momentum)
        model.update_center(means, run.skipped)
    run.finish()


if __name__ == "__main__":
    launch(main)
