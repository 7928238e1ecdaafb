"""
Supervised training of a ViT or Swin from any checkpoint, or from scratch: what a pre-trained encoder is worth.
Recipes of https://arxiv.org/abs/2205.14443 (ViT-Tiny and -Small) and https://arxiv.org/abs/2111.06377 (Base to Huge).

One node:   torchrun --standalone --nproc_per_node=8 finetune.py --init out/mae/encoder.pt --out out/finetune
One GPU:    python finetune.py --init out/mae/encoder.pt --accum 4
Scratch:    python finetune.py --model vit_tiny
Transfer:   python finetune.py --init out/mae/encoder.pt --data cifar100 --recipe transfer
To try it:  python finetune.py --demo
Accuracy:   python finetune.py --eval out/finetune/best.pt --data imagenet
Preempted:  type the same command again
Expected:   not run yet at full size; small sets are in the README
"""
import hashlib
import math
import os
import time
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import training
from augment import erase, normalize, random_flip, random_mix, soft_targets, statistics
from data import CROPS, CenterCrops, keys, load, stream
from randaugment import AugmentedCrops
from sources import describe, find, parts, same_classes
from training import Plumbing, opt
from vit import MODELS, SWINS, Swin, TwoHeads, ViT, layer_of, pair
from weights import is_swin, load_into, read, shape_of, summary, swin_shape_of, whole


@dataclass
class Config(Plumbing):
    data: str = opt("imagenet", "folder or tar (imagenet: ./imagenet or $IMAGENET), torchvision set by name, or shapes")
    fraction: float = opt(1.0, "share of the training images used, the same of each class, chosen by the seed")
    init: str | None = opt(None, "checkpoint whose encoder a new run starts from, any layout (default: from scratch)")
    recipe: str | None = opt(None, "row of the table of recipes in this file (default: the model's)")
    model: str | None = opt(None, f"{', '.join([*MODELS, *SWINS])} (default: that of --init, else vit_tiny)")
    heads: int | None = opt(None, "attention heads of a ViT, if neither the file nor the model's own", 1)
    window: int | None = opt(None, "tokens on the side of a Swin's window (default: that of --init, else its own)", 2)
    img_size: tuple[int, ...] | None = opt(None, "pixels: one number, or height and width (default: that of --init)", 1)
    patch_size: int | None = opt(None, "pixels on a patch's side (default: that of --init, else the model's own)", 1)
    in_chans: int | None = opt(None, "image channels: 1 grey, 3 colour, 4 colour and alpha (default: of --init, or 3)")
    mean: tuple[float, ...] | None = opt(None, "channel means in 0..1 (default: ImageNet's; 0.5 if not 3 channels)")
    std: tuple[float, ...] | None = opt(None, "channel deviations in 0..1 (default: ImageNet's, or 0.25)")
    readout: str | None = opt(None, "avg: mean of a ViT's patch tokens, then a fresh fc_norm; cls: after the file's")
    relative: bool | None = opt(None, "learned relative positions in every block")
    layer_scale: float | None = opt(None, "start of a learned factor per channel on every branch; 0: none", 0)
    key_bias: bool | None = opt(None, "keys have a bias; without it q and v start with none and the file's is left out")
    head_std: float | None = opt(None, "deviation of the head's first weights", 0)
    epochs: float | None = opt(None, "passes over the training set", 0)
    warmup_epochs: float | None = opt(None, "epochs of linear warm-up, at most epochs / 10 of a shortened run", 0)
    batch_size: int | None = opt(None, "crops per optimizer step, over all processes and accumulation", 1)
    accum: int = opt(1, "forward-backward passes per optimizer step, each on a part of the batch", 1)
    optimizer: str | None = opt(None, "adamw, or sgd (momentum 0.9, Nesterov)")
    blr: float | None = opt(None, "peak learning rate of the head per 256 images of the batch", 0)
    lr: float | None = opt(None, "peak learning rate of the head itself, instead of blr", 0)
    min_lr: float = opt(1e-6, "learning rate at the end", 0)
    layer_decay: float | None = opt(None, "learning rate of a block, relative to that of the block above", 0)
    weight_decay: float | None = opt(None, "none on biases, 1-D parameters, cls token and positions", 0)
    clip_grad: float | None = opt(None, "largest gradient norm; 0: no clipping", 0)
    drop_path: float | None = opt(None, "rate of dropped branches at the last block, rising from 0 at the first", 0)
    min_crop: float | None = opt(None, "smallest area of a random crop, fraction of the image", 0)
    interpolation: str = opt("bicubic", "resizing: bicubic, bilinear, or random: one of both")
    repeat: int = opt(1, "crops of each decoded image in a batch, which then has batch / repeat different images", 1)
    rand_augment: float | None = opt(None, "magnitude of RandAugment, of 10; 0: none", 0)
    mixup: float | None = opt(None, "alpha of mixup's Beta distribution; 0: none", 0)
    cutmix: float | None = opt(None, "alpha of CutMix's Beta distribution; 0: none", 0)
    mix_chunk: int = opt(0, "images that share a mixing factor; 0: all of a pass on one process", 0)
    erase: float | None = opt(None, "share of images with a randomly erased box", 0)
    smoothing: float | None = opt(None, "label smoothing", 0)
    ema: float = opt(0, "decay of an average of the weights over steps, which is then judged and released", 0)
    distill_teacher: str | None = opt(None, "classifier to learn labels from too: FILE, or NAME:FILE of torchvision's")
    teacher_heads: int | None = opt(None, "attention heads of a teacher FILE that does not say", 1)
    distill: str = opt("hard", "hard (the teacher's first choice) or soft (its distribution)")
    distill_alpha: float = opt(0.5, "weight of the teacher's loss, beside 1 - alpha of the labels'", 0)
    distill_tau: float = opt(1.0, "soft: temperature of both distributions")
    eval_every: int = opt(10, "epochs between evaluations on val/, beside that at the end; 0: only at the end", 0)
    eval: str | None = opt(None, "evaluate this classifier on val/ and leave")


# Published values, but for "small", which is ours (results/finetune-cifar10). Every row stands on the one it names.
IMPROVED = dict(epochs=300, warmup_epochs=5, batch_size=1024, optimizer="adamw", blr=1e-3, weight_decay=0.05,
                layer_decay=0.85, clip_grad=0, drop_path=0, rand_augment=10, mixup=0.2, cutmix=0, erase=0, smoothing=0,
                readout="avg", head_std=0.02, relative=False, layer_scale=0, key_bias=True, min_crop=0.08)
DEFAULT = dict(IMPROVED, epochs=100, drop_path=0.1, rand_augment=9, mixup=0.8, cutmix=1.0, erase=0.25, smoothing=0.1)
RPE = dict(IMPROVED, epochs=1000, relative=True, head_std=2e-5)
RECIPES = {
    "improved": IMPROVED,                                           # MAE-Lite, ViT-Tiny: 78.0 (MAE), 78.4 (D-MAE)
    "default": DEFAULT,                                             # MAE-Lite, ViT-Tiny
    "distill": dict(DEFAULT, epochs=300),                           # with --distill-teacher: 76.9
    "moco": dict(IMPROVED, layer_decay=0.75),                       # MAE-Lite, MoCo-v3's ViT-Tiny: 76.8
    "improved_small": dict(IMPROVED, layer_decay=0.75),             # MAE-Lite, ViT-Small: 82.1
    "rpe": dict(RPE, layer_scale=0.1, key_bias=False),              # MAE-Lite, ViT-Tiny: 79.0
    "rpe_d2": RPE,                                                  # D2-MAE, ViT-Tiny: 79.4
    "mae_base": dict(DEFAULT, blr=5e-4, layer_decay=0.65, head_std=2e-5),                               # 83.6
    "mae_large": dict(DEFAULT, epochs=50, layer_decay=0.75, drop_path=0.2, head_std=2e-5),              # 85.9
    "mae_huge": dict(DEFAULT, epochs=50, layer_decay=0.75, drop_path=0.3, head_std=2e-5),               # 86.9
    "transfer": dict(IMPROVED, epochs=50, warmup_epochs=10, batch_size=512, optimizer="sgd", lr=0.1, weight_decay=0,
                     layer_decay=0.75, clip_grad=1.0, rand_augment=0, mixup=0),                         # CIFAR-100
    "small": dict(IMPROVED, epochs=20, warmup_epochs=2, batch_size=256, layer_decay=0.75, rand_augment=0, mixup=0,
                  min_crop=0.35),
}
RECIPE_OF = dict(vit_mini="small", vit_midi="small", vit_tiny="improved", vit_small="improved_small",
                 vit_base="mae_base", vit_large="mae_large", vit_huge="mae_huge", swin_mini="small",
                 swin_lite="improved", swin_tiny="improved", swin_small="default", swin_base="default")
DEMO = dict(data="shapes", model="vit_mini", img_size=(48,), patch_size=8, fraction=0.1, epochs=8, batch_size=64,
            lr=1e-3, min_crop=0.6, eval_every=4, workers=1, log_every=60)

# What a Swin has no place for.
OF_VIT = {"heads", "readout", "relative", "layer_scale", "key_bias", "distill_teacher"}
# Sets whose papers report the mean of the classes' accuracies; everywhere else an image is an image.
PER_CLASS = {"aircraft", "caltech101", "flowers102", "pets"}


# ----------------------------------------------------------------------------------------------------------------
# The network and its optimizer


def build(cfg, classes):
    """A classifier as a fine-tuning starts it, before any file is read."""
    if cfg.model in SWINS:
        shape = SWINS[cfg.model] | {k: getattr(cfg, k) for k in ("img_size", "patch_size", "in_chans", "window",
                                                                 "drop_path")}
        eps = swin_shape_of(read(cfg.init))["eps"] if cfg.init else 1e-6        # official supervised files: 1e-5
        with training.in_words():
            model = Swin(num_classes=classes, eps=eps, **shape)
        nn.init.trunc_normal_(model.head.weight, std=cfg.head_std)
        return model
    shape = dict(MODELS[cfg.model], patch_size=cfg.patch_size, heads=cfg.heads)
    with training.in_words():
        model = (TwoHeads if cfg.distill_teacher else ViT)(
            cfg.img_size, in_chans=cfg.in_chans, num_classes=classes, positions="learned", readout=cfg.readout,
            drop_path=cfg.drop_path, relative=cfg.relative, layer_scale=cfg.layer_scale, key_bias=cfg.key_bias, **shape)
    if cfg.relative:                                            # BEiT's start: deeper blocks say less at first
        nn.init.trunc_normal_(model.patch_embed.proj.weight, std=0.02)
        nn.init.zeros_(model.patch_embed.proj.bias)
        for depth, block in enumerate(model.blocks, 1):
            for linear in (block.attn.proj, block.mlp.fc2):
                linear.weight.data /= math.sqrt(2 * depth)
    nn.init.trunc_normal_(model.head.weight, std=cfg.head_std)
    return model


def start_from(model, path, say=print):
    """Copy a file's encoder into a classifier; a head in it is another task's, or a projector, and is left out."""
    file = read(path)
    left_out = [k for k in file.state if k.startswith(("head.", "head_dist.", "dist_norm."))]
    if not model.config.get("key_bias", True):                  # as published, though the file has learned it
        left_out += [k for k in file.state if k.endswith("attn.qkv.bias")]
    if left_out:
        say(f"{path}: left out as the recipe wants: {', '.join(left_out[:3])}" + ", ..." * (len(left_out) > 3))
    load_into(model, file._replace(state={k: v for k, v in file.state.items() if k not in left_out}), say)


def layer_groups(model, weight_decay, layer_decay):
    """Optimizer groups with layer-wise learning rates (BEiT; MAE, appendix A.2): group["lr_scale"] is layer_decay to
    the power of the layers above. No weight decay on 1-D parameters, biases, cls token and positions; tables of
    relative positions are decayed."""
    groups = {}
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        layer = layer_of(model, name)
        plain = p.dim() <= 1 or name.endswith(".bias") or name in ("cls_token", "pos_embed")
        scale = layer_decay ** (model.depth + 1 - layer)
        group = dict(params=[], weight_decay=0 if plain else weight_decay, lr_scale=scale)
        groups.setdefault((layer, plain), group)["params"].append(p)
    return list(groups.values())


def make_optimizer(cfg, model, peak):
    groups = layer_groups(model, cfg.weight_decay, cfg.layer_decay)
    if cfg.optimizer == "sgd":
        return torch.optim.SGD(groups, peak, momentum=0.9, nesterov=True, fused=True)
    return torch.optim.AdamW(groups, peak, fused=True)


# ----------------------------------------------------------------------------------------------------------------
# The teacher of labels


class LabelTeacher:
    """A frozen classifier: --distill-teacher FILE of a ViT in any layout, or NAME:FILE, a network of torchvision's and
    its weights. Not a module, so that no checkpoint stores it: only which file it was."""

    def __init__(self, spec, heads, classes, mean, std, device, dtype, say=print):
        import torchvision
        name, _, path = spec.partition(":")
        named = path and name in torchvision.models.list_models()
        self.path = path if named else spec
        if named:
            try:
                model = torchvision.models.get_model(name, weights=None, num_classes=classes)
                state = torch.load(path, map_location="cpu", weights_only=True)
                model.load_state_dict(state.get("model", state))
            except (OSError, RuntimeError, AttributeError) as error:
                training.die(f"--distill-teacher {spec}: {str(error).splitlines()[0]} ({name} of torchvision, "
                             f"{classes} classes, and a plain state dict of it were expected)")
        else:
            model, file = classifier(spec, heads, None, say, "--teacher-heads")
            if any(tuple(file.config.get(k) or v) != v for k, v in (("mean", mean), ("std", std))):
                training.die(f"--distill-teacher {spec} was made with other --mean or --std: both see the same images")
            if model.config["num_classes"] != classes:
                training.die(f"--distill-teacher {spec} knows {model.config['num_classes']} classes, the data has "
                             f"{classes}: both must name the same ones")
        self.model = model.requires_grad_(False).eval().to(device, dtype)
        with open(self.path, "rb") as f:
            self.sha256 = hashlib.file_digest(f, "sha256").hexdigest()

    @torch.no_grad()
    def __call__(self, img):
        """Normalised images -> logits, (B, K)."""
        with torch.autocast(img.device.type, enabled=False):
            return self.model(img.to(next(self.model.parameters()).dtype))

    def state_dict(self):
        return dict(sha256=self.sha256)

    def load_state_dict(self, state):
        if state["sha256"] != self.sha256:
            raise SystemExit(f"{self.path} is not the teacher that this run began with: give that file, or another "
                             "--out")


def taught_loss(logits, teacher, kind, tau):
    """The teacher's share of the loss. hard: cross-entropy with its first choice. soft: KL(teacher || student) at
    temperature tau, times tau^2, a mean over images and classes, as published (DeiT's own code sums over classes)."""
    logits, teacher = logits.float(), teacher.float()
    if kind == "hard":
        return F.cross_entropy(logits, teacher.argmax(1))
    mine, theirs = (F.log_softmax(x / tau, 1) for x in (logits, teacher))
    return F.kl_div(mine, theirs, reduction="sum", log_target=True) * tau ** 2 / mine.numel()


def objective(cfg, out, targets, teacher):
    """out: logits (B, K), or with a teacher both heads'; targets (B, K); the teacher's logits or None -> ()."""
    if teacher is None:
        return F.cross_entropy(out.float(), targets)
    told, taught = out
    return ((1 - cfg.distill_alpha) * F.cross_entropy(told.float(), targets) +
            cfg.distill_alpha * taught_loss(taught, teacher, cfg.distill, cfg.distill_tau))


# ----------------------------------------------------------------------------------------------------------------
# Evaluation


@torch.no_grad()
def evaluate(model, source, size, mean, std, device, workers=0, batch=250, health=None):
    """Accuracy on the evaluation crops of a labelled source, exact over ranks: every image once. -> dict of test_acc1,
    test_acc5, test_class_acc (the mean of the classes'), in percent, and test_loss; None if a signal came meanwhile."""
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    mine, classes, was_training = range(rank, len(source), world), len(source.classes), model.training
    model.eval()
    found = torch.zeros(4, classes + 1, device=device)          # images, first right, five right, loss; [-1]: signals
    batches = [mine[i:i + batch] for i in range(0, len(mine), batch)]
    for img, labels, failed in load(CenterCrops(source, size, len(mean)), batches, workers, device.type == "cuda"):
        for name in failed:
            print(f"warning: {name} cannot be read; another image is judged in its place", flush=True)
        img, labels = img.to(device, non_blocking=True), labels.to(device, non_blocking=True)
        logits = model(normalize(img, mean, std)).float()
        ranked = logits.topk(min(5, classes), 1).indices == labels.unsqueeze(1)                 # (B, 5)
        loss = F.cross_entropy(logits, labels, reduction="none")
        found.index_add_(1, labels, torch.stack([torch.ones_like(loss), ranked[:, 0], ranked.any(1), loss]))
        if health and health.signal:
            found[0, -1] = 1
            break
    if world > 1:
        dist.all_reduce(found)
    model.train(was_training)
    if found[0, -1]:
        return None
    count, first, five, loss = found[:, :-1].double().cpu()
    present, total = count > 0, count.sum()
    return dict(test_acc1=100 * (first.sum() / total).item(), test_acc5=100 * (five.sum() / total).item(),
                test_class_acc=100 * (first / count)[present].mean().item(), test_loss=(loss.sum() / total).item())


def classifier(path, heads, img_size, say=print, flag="--heads"):
    """A file's classifier, whole, in eval mode -> (model, the file). Ends in a sentence when it has no head."""
    file = read(path)
    model, left = whole(file, heads, flag, **(dict(img_size=img_size) if img_size else {}))
    if not model.config["num_classes"]:
        training.die(f"{path} has no head that fits: " + ("it is an encoder, and --init trains one" if flag == "--heads"
                                                          else "it has no labels to teach"))
    say(f"{path}: {len(file.state) - len(left)} tensors matched; not expected: {summary(left)}")
    return model, file


class Best:
    """The best evaluation so far, as a part of the run."""

    def __init__(self):
        self.value, self.step = -1.0, 0

    def state_dict(self):
        return dict(value=self.value, step=self.step)

    def load_state_dict(self, state):
        self.value, self.step = state["value"], state["step"]


# ----------------------------------------------------------------------------------------------------------------
# The run


def resolve(cfg, given):
    """Fill what the command line left open: from the demo, if it is one, and from the file to start from, then from
    the recipe and the model."""
    if cfg.eval:
        return cfg
    known = dict(DEMO) if cfg.demo else {}
    if cfg.init:
        file = read(cfg.init)
        kinds, found, deep = (SWINS, swin_shape_of(file), "depths") if is_swin(file) else \
            (MODELS, shape_of(file, cfg.heads), "depth")
        names = [name for name, m in kinds.items() if (m["dim"], m[deep]) == (found["dim"], found[deep])]
        if not names:
            training.die(f"{cfg.init} is {found['dim']} wide and {found[deep]} deep, none of {', '.join(kinds)} is")
        known |= {k: found[k] for k in ("patch_size", "in_chans", "window" if is_swin(file) else "heads")}
        known |= dict(model=names[0], img_size=tuple(found["img_size"]))
        known |= {k: tuple(file.config[k]) for k in ("mean", "std") if file.config.get(k)}
    model = cfg.model or known.get("model", "vit_tiny")
    if model not in MODELS | SWINS:
        training.die(f"--model {model} is not one of {', '.join(MODELS | SWINS)}")
    swin = model in SWINS
    shape = dict(window=7, patch_size=4) | SWINS[model] if swin else MODELS[model]
    if wrong := given & (OF_VIT if swin else {"window"}):
        training.die(f"--{min(wrong).replace('_', '-')} is an option of {'a ViT' if swin else 'a Swin'}, and the model "
                     f"is {model}")
    name = cfg.recipe or RECIPE_OF[model]
    if name not in RECIPES:
        training.die(f"--recipe {name} is not one of {', '.join(RECIPES)}")
    cfg = training.fill(cfg, given, {
        **{k: shape[k] for k in ("window" if swin else "heads", "patch_size")}, "img_size": (224,), "in_chans": 3,
        "model": model,
        "out": "out/finetune-demo" if cfg.demo else "out/finetune", "recipe": name, **RECIPES[name], **known})
    if "blr" in given and "lr" not in given:
        cfg = replace(cfg, lr=None)
    if "warmup_epochs" not in given and cfg.epochs < RECIPES[name]["epochs"]:
        cfg = replace(cfg, warmup_epochs=min(cfg.warmup_epochs, cfg.epochs / 10))
    check(cfg, given)
    return replace(cfg, data=os.path.normpath(cfg.data), img_size=pair(cfg.img_size))


def check(cfg, given):
    for name, known in (("in_chans", (1, 3, 4)), ("readout", ("avg", "cls")), ("optimizer", ("adamw", "sgd")),
                        ("interpolation", ("bicubic", "bilinear", "random")), ("decode", tuple(CROPS)),
                        ("distill", ("hard", "soft"))):
        if getattr(cfg, name) not in known:
            training.die(f"--{name.replace('_', '-')} is one of {', '.join(map(str, known))}, not {getattr(cfg, name)}")
    for name, most in (("min_crop", 1), ("erase", 1), ("distill_alpha", 1), ("layer_decay", 1), ("rand_augment", 10),
                       ("smoothing", 0.999), ("drop_path", 0.999), ("ema", 0.999999)):
        if getattr(cfg, name) > most:
            training.die(f"--{name.replace('_', '-')} is at most {most:g}, not {getattr(cfg, name):g}")
    alone = [k for k in ("teacher_heads", "distill", "distill_alpha", "distill_tau") if k in given]
    if alone and not cfg.distill_teacher:
        training.die(f"--{alone[0].replace('_', '-')} needs a teacher: give --distill-teacher FILE")
    if cfg.distill_teacher and cfg.readout != "avg":
        training.die("--distill-teacher needs --readout avg: the cls token then answers the teacher")
    if cfg.rand_augment and (cfg.decode != "workers" or cfg.in_chans == 4):
        training.die("--rand-augment is done by the workers, on 1 or 3 channels: give --rand-augment 0")


def labelled(train, val):
    """The classes of a set that can be trained on and judged; what is missing ends in a sentence."""
    if not train.classes:
        training.die(f"{train.where} has no labels: fine-tuning needs one folder for each class, or a set by name")
    if val is None:
        training.die(f"{train.where} has no val/ beside it, so nothing could be judged")
    if not same_classes(train, val):
        differ = sorted(set(train.classes) ^ set(val.classes or ())) or train.classes
        training.die(f"{train.where} has {len(train.classes)} classes, {val.where} {len(val.classes or ())}; they must "
                     f"be the same: {', '.join(differ[:3])}{', ...' * (len(differ) > 3)} not in both")
    return train.classes


def crops_of(cfg, train, size, mean, world, rank, start, steps, device):
    """data.stream's batches, with RandAugment if it is asked for."""
    if not cfg.rand_augment:
        return stream(cfg, train, size, world, rank, start, steps, device)
    fill = tuple(round(255 * m) for m in mean)
    crops = AugmentedCrops(train, size, cfg.in_chans, cfg.seed, (cfg.min_crop, 1.0), cfg.interpolation,
                           cfg.rand_augment, fill, cfg.repeat)
    order = keys(len(train), cfg.batch_size, cfg.accum, world, rank, cfg.seed, start, steps, cfg.repeat)
    return load(crops, order, cfg.workers, pin=device.type == "cuda")


def banner(cfg, model, steps, peak, start, world, device):
    size = sum(p.numel() for p in model.parameters()) / 1e6
    kind = f"window {cfg.window}" if cfg.model in SWINS else f"{cfg.heads} heads"
    return (f"{cfg.model}: {size:.2f} M parameters, {kind}, images of {cfg.img_size[0]}x{cfg.img_size[1]}; "
            f"{'from ' + cfg.init if cfg.init else 'from scratch'}; recipe {cfg.recipe}\n"
            f"{cfg.optimizer}, weight decay {cfg.weight_decay:g}, layer decay {cfg.layer_decay:g}, drop path "
            f"{cfg.drop_path:g}; RandAugment {cfg.rand_augment:g}, mixup {cfg.mixup:g}, CutMix {cfg.cutmix:g}, erasing "
            f"{cfg.erase:g}, smoothing {cfg.smoothing:g}\n"
            f"batch {cfg.batch_size} = {world} processes x {cfg.accum} passes x "
            f"{cfg.batch_size // world // cfg.accum} images; {cfg.dtype} on {device}; {cfg.epochs:g} epochs of "
            f"{steps.per_epoch} steps, {start} of {steps.total} done, {steps.warmup} of them warm-up, peak learning "
            f"rate {peak:.3g}")


def judge(steps, model, config, val, best, run, log, health, step):
    """Evaluate at a step boundary, log it, keep the best -> the accuracy that counts for this set."""
    began, cfg = time.perf_counter(), run.cfg
    found = evaluate(model, val, cfg.img_size, config["mean"], config["std"], health.device, cfg.workers, health=health)
    if found is None:                                           # last.pt is of this very step, so nothing is lost
        health.leave("signal", run, step, None, None, None)
    log.note(step=step, epoch=round(step / steps.per_epoch, 4), **{k: round(v, 4) for k, v in found.items()})
    value = found["test_class_acc" if cfg.data in PER_CLASS else "test_acc1"]
    if value > best.value:
        best.value, best.step = value, step
        if run.rank == 0:
            training.write(released(model, config), os.path.join(cfg.out, "best.pt"))
    if run.rank == 0:
        print(f"epoch {step / steps.per_epoch:g}: top-1 {found['test_acc1']:.3f}%, top-5 {found['test_acc5']:.3f}%, "
              f"mean of the classes {found['test_class_acc']:.3f}%, loss {found['test_loss']:.4f}; best so far "
              f"{best.value:.3f}% after epoch {best.step / steps.per_epoch:g}", flush=True)
    log.since = log.since and log.since + time.perf_counter() - began       # not a part of any training step
    return value


def released(model, config):
    return dict(method="finetune", config=config, model=model.state_dict())


def finetune(cfg):
    rank, world, device = training.setup(cfg.device)
    cfg, say = replace(cfg, dtype=training.precision(cfg.dtype, device)), print if rank == 0 else str
    train, val = parts(cfg.data, cfg.fraction, cfg.seed, cfg.download)
    classes = labelled(train, val)
    steps, peak = training.plan(cfg, len(train), world, cfg.repeat)
    with training.in_words():
        mean, std = statistics(cfg.in_chans, cfg.mean, cfg.std)

    torch.manual_seed(cfg.seed)                                 # on every rank: all start from the same weights
    model = build(cfg, len(classes)).to(device)
    teacher = cfg.distill_teacher and LabelTeacher(cfg.distill_teacher, cfg.teacher_heads, len(classes), mean, std,
                                                   device, training.DTYPES[cfg.dtype], say)
    optimizer, best = make_optimizer(cfg, model, peak), Best()
    scaler = torch.amp.GradScaler(device.type, enabled=cfg.dtype == "fp16")
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(cfg.ema)) if cfg.ema else None
    learned = dict(teacher=teacher, model=model, average=average, optimizer=optimizer, scaler=scaler, best=best)
    run = training.Run(cfg, "finetune", rank, world, len(train), **{k: part for k, part in learned.items() if part})
    if cfg.init and not run.step:
        start_from(model, cfg.init, say)
    training.compile_if(cfg, device, model)
    net = DDP(model, device_ids=[device.index] if device.type == "cuda" else None) if world > 1 else model
    log = training.Log(cfg, rank, device, run.step, steps, images=len(train), world=world)
    health = training.Health(cfg, device, world, log)
    say(f"{describe(train)}\n{banner(cfg, model, steps, peak, run.step, world, device)}")
    judged, config = average.module if average else model, dict(model.config, mean=mean, std=std, classes=list(classes))
    measure = partial(judge, steps, judged, config, val, best, run, log, health)
    batches = log.waiting(crops_of(cfg, train, cfg.img_size, mean, world, rank, run.step, steps.total, device))
    for step in range(run.step, steps.total):
        if steps.due(step, cfg.eval_every):                     # after this step's checkpoint was written: a run that
            measure(step)                                       # is stopped meanwhile measures again
        training.seed_for(cfg.seed, step, rank)
        training.set_lr(optimizer, training.warmup_cosine(step, steps.total, steps.warmup, peak, cfg.min_lr))
        total, unreadable = 0.0, []
        for micro in range(cfg.accum):
            img, labels, failed = next(batches)
            img, labels = (t.to(device, non_blocking=True) for t in (img, labels))
            img = erase(normalize(random_flip(img), mean, std), cfg.erase)                      # (b, C, h, w)
            targets = soft_targets(labels, len(classes), cfg.smoothing)                         # (b, K)
            img, targets = random_mix(img, targets, cfg.mixup, cfg.cutmix, cfg.mix_chunk)
            answers = teacher(img) if teacher else None
            with training.sync_if(micro + 1 == cfg.accum, net), training.autocast(device, cfg.dtype):
                loss = objective(cfg, net(img), targets, answers) / cfg.accum
            scaler.scale(loss).backward()
            total, unreadable = total + loss.detach(), unreadable + failed
        grad_norm, skipped = training.finite_step(optimizer, scaler, cfg.clip_grad)
        if average:
            average.update_parameters(model)
        done = step + 1
        why = health(skipped, unreadable, cfg.batch_size // world)

        if done % cfg.log_every == 0 or done == steps.total or why:
            log(done, loss=training.mean_over_ranks(total), chance=math.log(len(classes)),
                lr=optimizer.param_groups[-1]["lr"], grad_norm=grad_norm, skipped=health.skipped)
        keep, must = steps.due(done, cfg.keep_every), why or done == steps.total
        if why != "non-finite" and (must or keep or steps.due(done, cfg.eval_every) or done % cfg.save_every == 0):
            run.save(done, released(judged, config), keep, must)
        if why:
            health.leave(why, run, done, model, total, img)
        optimizer.zero_grad()
    value = measure(steps.total)
    if rank == 0:
        training.draw_curve(cfg.out)
        print(f"done: {cfg.out} has best.pt ({best.value:.3f}%, after epoch {best.step / steps.per_epoch:g}), "
              f"encoder.pt with the last weights ({value:.3f}%), last.pt to go on from, log.jsonl")


def evaluate_file(cfg):
    """--eval: a classifier on the evaluation part of a set."""
    rank, world, device = training.setup(cfg.device)
    say = print if rank == 0 else str
    model, file = classifier(cfg.eval, cfg.heads, cfg.img_size, say)
    val = find(cfg.data, "val", cfg.download)
    if val is None or not val.classes:
        training.die(f"{cfg.data} has no val/ with labels, so nothing can be judged")
    known = file.config.get("classes")
    if len(val.classes) != model.config["num_classes"] or known and list(known) != list(val.classes):
        training.die(f"{cfg.eval} tells {model.config['num_classes']} classes apart ({', '.join(known or ())[:60]}), "
                     f"{val.where} has {len(val.classes)} ({', '.join(val.classes)[:60]}): they must be the same")
    with training.in_words():
        mean, std = statistics(model.config["in_chans"], *(tuple(getattr(cfg, k) or file.config.get(k) or ()) or None
                                                           for k in ("mean", "std")))
    found = evaluate(model.to(device), val, pair(model.config["img_size"]), mean, std, device, cfg.workers)
    say(f"{len(val):,} images of {cfg.data}, {'x'.join(map(str, pair(model.config['img_size'])))} pixels: top-1 "
        f"{found['test_acc1']:.3f}%, top-5 {found['test_acc5']:.3f}%, mean of the classes "
        f"{found['test_class_acc']:.3f}%, loss {found['test_loss']:.4f}")


def main(argv=None):
    cfg, given = training.parse(Config, __doc__, argv)
    cfg = resolve(cfg, given)
    (evaluate_file if cfg.eval else finetune)(cfg)


if __name__ == "__main__":
    training.launch(main)
