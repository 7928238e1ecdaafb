"""
Supervised training of any network here from any checkpoint, or from scratch: what a pre-trained encoder is worth.
Recipes of https://arxiv.org/abs/2205.14443 (ViT-Tiny and -Small) and https://arxiv.org/abs/2111.06377 (Base to Huge).

One node:   torchrun --standalone --nproc_per_node=8 finetune.py --init out/mae/encoder.pt --out out/finetune
One GPU:    python finetune.py --init out/mae/encoder.pt --accum 4
Scratch:    python finetune.py --model vit_tiny
Transfer:   python finetune.py --init out/mae/encoder.pt --data cifar100 --recipe transfer
To try it:  python finetune.py --demo
Accuracy:   python finetune.py --eval out/finetune/best.pt --data imagenet
Preempted:  type the same command again
Expected:   not run yet at full size; small sets are in docs/findings.md
"""
import math
import time
from dataclasses import dataclass, replace
from types import SimpleNamespace

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from images.augment import normalize, random_flip, statistics
from images.datasets import find_classes, look_over, open_to_evaluate, same_classes
from images.mixing import erase, random_mix, soft_targets
from images.randaugment import AugmentedCrops
from nets.beit import BeitViT, TwoHeads
from nets.hiera import HIERAS, Hiera
from nets.naming import PYRAMIDS, models_with
from runtime import options
from runtime.folder import FileOfRun
from runtime.options import TrainingOptions, fail, opt, value_errors_exit
from runtime.probes import encoded
from runtime.run import DTYPES, Run, launch, print_rank0, setup, warmup_cosine
from vit import MODELS, Pyramid, pair
from weights import encoder_options, init_mlp_ratio, layer_of, load_classifier, load_into, read, summary

# Published values, but for "small", which is ours (results/finetune-cifar10). Every row stands on the one it names.
IMPROVED = dict(epochs=300, warmup_epochs=5, batch_size=1024, optimizer="adamw", blr=1e-3, weight_decay=0.05,
                layer_decay=0.85, clip_grad=0, rand_augment=10, mixup=0.2, pool="avg", head_std=0.02, min_crop=0.08,
                interpolation="bicubic", img_size=(224, 224), in_chans=3, out="out/finetune")
DEFAULT = dict(IMPROVED, epochs=100, drop_path=0.1, rand_augment=9, mixup=0.8, cutmix=1.0, erase=0.25, smoothing=0.1)
RPE = dict(IMPROVED, epochs=1000, relative=True, head_std=2e-5)
RECIPES = {
    "improved": IMPROVED,                                           # MAE-Lite, ViT-Tiny: 78.0 (MAE), 78.4 (D-MAE)
    "default": DEFAULT,                                             # MAE-Lite, ViT-Tiny
    "distill": dict(DEFAULT, epochs=300),                           # with --distill-teacher: 76.9
    "moco": dict(IMPROVED, layer_decay=0.75),                       # MAE-Lite, MoCo-v3's ViT-Tiny: 76.8
    "improved_small": dict(IMPROVED, layer_decay=0.75),             # MAE-Lite, ViT-Small: 82.1
    "hiera": dict(IMPROVED, head_std=2e-5),                         # MAE-Lite, hiera_lite: 78.5 (MAE), 78.9 (distilled)
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
                 swin_lite="improved", swin_tiny="improved", swin_small="default", swin_base="default",
                 vil_mini="small", vil_tiny="improved", cvt_mini="small", cvt_tiny="improved", cvt_deep="default",
                 **dict.fromkeys(HIERAS, "hiera") | dict(hiera_mini="small"))
DEMO = dict(data="shapes", model="vit_mini", img_size=(48, 48), patch_size=8, fraction=0.1, epochs=8, batch_size=64,
            lr=1e-3, min_crop=0.6, eval_every=4, workers=1, log_every=60, out="out/finetune-demo")
ONLY_VIT = {"pool", "relative", "layer_scale", "key_bias", "distill_teacher"}       # options of no other network
PER_CLASS = {"aircraft", "caltech101", "flowers102", "pets"}        # their papers report the mean over classes
RESULT = "top-1 {test_acc1:.3f}%, top-5 {test_acc5:.3f}%, mean of classes {test_class_acc:.3f}%, loss {test_loss:.4f}"


@dataclass
class Config(TrainingOptions):
    recipe: str | None = opt(None, "row of the table of recipes in this file (default: the model's)", choices=RECIPES)
    model: str | None = opt(None, "the network (default: that of --init, else vit_tiny)", choices=(*MODELS, *PYRAMIDS))
    img_size: tuple[int, ...] | None = opt(None, "pixels: a side, or height and width (default: as --init)", least=1)
    in_chans: int | None = opt(None, "image channels (default: as --init, else 3)", least=1)
    window: int | None = opt(None, "tokens on a window's side, not of a ViT (default: as --init, else own)", least=2)
    pool: str | None = opt(None, "a ViT's cls token, or the mean of its patches", choices=("cls", "avg"), old="readout")
    relative: bool = opt(False, "learned relative positions in every block")
    layer_scale: float = opt(0, "initial value of layer scale; 0: no layer scale", least=0)
    key_bias: bool = opt(True, "keys have a bias; without it q and v start with none and the file's is left out")
    head_std: float | None = opt(None, "deviation of the head's first weights", least=0)
    optimizer: str | None = opt(None, "sgd has momentum 0.9 (Nesterov)", choices=("adamw", "sgd"))
    min_lr: float = opt(1e-6, "learning rate at the end", least=0)
    layer_decay: float | None = opt(None, "learning rate of a block, relative to the block above", least=0, most=1)
    drop_path: float = opt(0, "rate of dropped branches at the last block, from 0 at the first", 0, 0.999)
    repeat: int = opt(1, "crops of each decoded image in a batch, which then has batch / repeat images", least=1)
    rand_augment: float | None = opt(None, "magnitude of RandAugment; 0: none", least=0, most=10)
    mixup: float | None = opt(None, "alpha of mixup's Beta distribution; 0: none", least=0)
    cutmix: float = opt(0, "alpha of CutMix's Beta distribution; 0: none", least=0)
    mix_chunk: int = opt(0, "images that share a mixing factor; 0: all of a pass on one process", least=0)
    erase: float = opt(0, "share of images with a randomly erased box", least=0, most=1)
    smoothing: float = opt(0, "label smoothing", least=0, most=0.999)
    ema: float = opt(0, "decay of an average of the weights, which is then evaluated and saved; 0: none", 0, 0.999999)
    distill_teacher: str | None = opt(None, "classifier to learn labels from too: FILE, or NAME:FILE of torchvision's")
    teacher_heads: int | None = opt(None, "heads of a teacher FILE that does not say", 1, needs="distill_teacher")
    distill: str = opt("hard", "learn top class or distribution", choices=("hard", "soft"), needs="distill_teacher")
    distill_alpha: float = opt(0.5, "share of the teacher's loss, beside the labels'", 0, 1, needs="distill_teacher")
    distill_tau: float = opt(1.0, "soft: temperature of both distributions", above=0, needs="distill_teacher")
    eval_every: int = opt(10, "epochs between evaluations on val/, beside that at the end; 0: only at the end", least=0)
    eval: str | None = opt(None, "only evaluate this classifier on val/, which may have a part of its classes")
    class_names: str | None = opt(None, "text file of class names, a line each, where --eval stores none", needs="eval")


# ----------------------------------------------------------------------------------------------------------------
# The network, its optimizer and its loss

def make_classifier(cfg, classes):
    """A classifier as fine-tuning starts it, before any file is read."""
    shape = dict(img_size=cfg.img_size, patch_size=cfg.patch_size, in_chans=cfg.in_chans, num_classes=classes,
                 drop_path=cfg.drop_path, mlp_ratio=init_mlp_ratio(cfg) if cfg.init else 4.0)
    with value_errors_exit():
        if cfg.model in PYRAMIDS:
            kind, own = PYRAMIDS[cfg.model]
            if kind is Hiera:                                   # its last stage pools, also where an MAE's did not
                shape["heads"] = cfg.heads
            else:
                shape["window"] = cfg.window
                if cfg.init:                                    # official supervised files of Swin: 1e-5
                    shape["eps"] = encoder_options(read(cfg.init))["eps"]
            model = kind(**own | shape)
        else:
            kind = TwoHeads if cfg.distill_teacher else BeitViT
            model = kind(**{**MODELS[cfg.model], **shape, "heads": cfg.heads}, positions="learned", pool=cfg.pool,
                         relative=cfg.relative, layer_scale=cfg.layer_scale, key_bias=cfg.key_bias)
    if cfg.relative and cfg.model in MODELS:                    # BEiT's start: deeper blocks say less at first
        torch.nn.init.trunc_normal_(model.patch_embed.proj.weight, std=0.02)
        torch.nn.init.zeros_(model.patch_embed.proj.bias)
        for depth, block in enumerate(model.blocks, 1):
            for linear in (block.attn.proj, block.mlp.fc2):
                linear.weight.data /= math.sqrt(2 * depth)
    torch.nn.init.trunc_normal_(getattr(model.head, "projection", model.head).weight, std=cfg.head_std)
    return model


def start_from(model, path):
    """Copy a file's encoder into a classifier; a head in it is another task's, or a projector, and is left out."""
    file, heads = read(path), ("head.", "head_dist.", "dist_norm.")
    kept = {name: tensor for name, tensor in file.state.items() if not name.startswith(heads)}
    if not model.config.get("key_bias", True):                  # as published, though the file has learned it
        kept = {name: tensor for name, tensor in kept.items() if not name.endswith("attn.qkv.bias")}
    if len(kept) < len(file.state):
        print_rank0(f"{path}: left out as the recipe wants: {summary(k for k in file.state if k not in kept)}")
    load_into(model, file._replace(state=kept), print_rank0)


def make_optimizer(cfg, model, peak):
    """AdamW or SGD with a learning rate for each layer (BEiT; MAE, appendix A.2): group["lr_scale"] is --layer-decay to
    the power of the layers above. No weight decay on biases, 1-D parameters, cls token and positions."""
    groups = {}
    for name, p in model.named_parameters():
        layer = layer_of(model, name)
        plain = p.dim() <= 1 or name.endswith(".bias") or name in ("cls_token", "pos_embed")
        if isinstance(model, Pyramid):                          # as published: relative positions are not decayed here
            plain = plain or name.endswith("relative_position_bias_table")
        group = dict(params=[], weight_decay=0 if plain else cfg.weight_decay,
                     lr_scale=cfg.layer_decay ** (model.depth + 1 - layer))
        groups.setdefault((layer, plain), group)["params"].append(p)
    if cfg.optimizer == "sgd":
        return torch.optim.SGD(list(groups.values()), peak, momentum=0.9, nesterov=True, fused=True)
    return torch.optim.AdamW(list(groups.values()), peak, fused=True)


def objective(cfg, out, targets, teacher_logits):
    """Logits (B, K), with a teacher of two heads; targets (B, K); the teacher's logits (B, K) or None -> loss ()."""
    if teacher_logits is None:
        return F.cross_entropy(out.float(), targets)
    ours, theirs = out[1].float(), teacher_logits.float()
    if cfg.distill == "hard":
        teacher_loss = F.cross_entropy(ours, theirs.argmax(1))
    else:                                                       # a mean also over classes, as published; DeiT sums them
        ours, theirs = F.log_softmax(ours / cfg.distill_tau, 1), F.log_softmax(theirs / cfg.distill_tau, 1)
        teacher_loss = F.kl_div(ours, theirs, reduction="sum", log_target=True) * cfg.distill_tau ** 2 / ours.numel()
    return (1 - cfg.distill_alpha) * F.cross_entropy(out[0].float(), targets) + cfg.distill_alpha * teacher_loss


class LabelTeacher(FileOfRun):
    """A frozen classifier: --distill-teacher FILE of any layout, or NAME:FILE, a network of torchvision's and its
    weights. It is no module, so no checkpoint holds its weights, only which file it was."""

    def __init__(self, cfg, classes, run):
        from torchvision.models import get_model, list_models  # here, because it takes a while to import
        name, _, path = cfg.distill_teacher.partition(":")
        self.numbers = slice(None)                              # of its logits, in the order of our classes
        named = path and name in list_models()
        super().__init__(path if named else cfg.distill_teacher)
        if named:
            model = get_model(name, weights=None, num_classes=classes)
            try:
                state = torch.load(self.path, map_location="cpu", weights_only=True)
                model.load_state_dict(state.get("model", state))
            except (OSError, RuntimeError, AttributeError) as error:
                fail(f"{self.path} is no state dict of {name} for {classes} classes: {str(error).splitlines()[0]}")
        else:
            model, file = open_classifier(self.path, cfg.teacher_heads, None, "--teacher-heads")
            stored = [tuple(file.config.get(option) or getattr(run, option)) for option in ("mean", "std")]
            if [model.config["num_classes"], *stored] != [classes, run.mean, run.std]:
                fail(f"{self.path} knows {model.config['num_classes']} classes, with mean and std {stored}; the data "
                     f"has {classes}, with {[run.mean, run.std]}: both networks see the same, so these must agree")
            self.numbers = find_classes(run.train, self.path, classes, file.config.get("classes"))
        self.model = model.requires_grad_(False).eval().to(run.device, DTYPES[cfg.dtype])

    @torch.no_grad()
    def __call__(self, img):                                    # normalised images -> logits (B, K)
        return self.model(img.to(next(self.model.parameters()).dtype))[:, self.numbers]


# ----------------------------------------------------------------------------------------------------------------
# Evaluation, and the run

@torch.no_grad()
def evaluate(model, source, size, mean, std, device, workers=0, batch=250, numbers=slice(None)):
    """Accuracy on the evaluation crops of a labelled source, exact over ranks: every image once -> dict of test_acc1,
    test_acc5, test_class_acc (the mean of the classes'), in percent, and test_loss. numbers: of the logits that stand
    for the source's classes, in their order (default: all)."""
    classes, was_training = len(source.classes), model.training
    sums = torch.zeros(4, classes, device=device)               # images, first right, five right, loss
    model.eval()
    for _, logits, labels in encoded(model, source, range(len(source)), size, len(mean), mean, std, device,
                                     batch=batch, workers=workers):
        logits, labels = logits[:, numbers].float(), labels.to(device, non_blocking=True)
        right = logits.topk(min(5, classes), 1).indices == labels.unsqueeze(1)                  # (B, 5)
        loss = F.cross_entropy(logits, labels, reduction="none")
        sums.index_add_(1, labels, torch.stack([torch.ones_like(loss), right[:, 0], right.any(1), loss]))
    model.train(was_training)
    if dist.is_initialized():
        dist.all_reduce(sums)
    images, first, five, loss = sums.double().cpu()
    total, present = images.sum(), images > 0
    return dict(test_acc1=100 * (first.sum() / total).item(), test_acc5=100 * (five.sum() / total).item(),
                test_class_acc=100 * (first / images)[present].mean().item(), test_loss=(loss.sum() / total).item())


def evaluate_and_keep_best(run, model, best):
    """Evaluate between two steps, log it, write best.pt -> the accuracy that counts for this set. A signal ends the run
    here: last.pt is of this very step, so going on begins with the evaluation."""
    began, step = time.perf_counter(), run.done
    with run.interruptible():
        found = evaluate(model, run.val, run.size, run.mean, run.std, run.device, run.cfg.workers)
    value = found["test_class_acc" if run.cfg.data in PER_CLASS else "test_acc1"]
    if run.rank == 0:
        if value > best["value"] and run.folder.write("best.pt", run.encoder):
            best.update(value=value, step=step)
        run.log.note(step=step, epoch=round(step / run.per_epoch, 4), **{k: round(v, 4) for k, v in found.items()})
    print_rank0(f"epoch {step / run.per_epoch:g}: {RESULT.format(**found)}; best {best['value']:.3f}%")
    run.log.since = run.log.since and run.log.since + time.perf_counter() - began   # it is no part of a training step
    return value


def open_classifier(path, heads, img_size, heads_flag="--heads"):
    """A file's classifier, whole, in eval mode -> (model, the file). Ends in a sentence when it has no head."""
    file = read(path)
    model, left = load_classifier(file, heads, heads_flag, **(dict(img_size=img_size) if img_size else {}))
    if not model.config["num_classes"]:
        fail(f"{path} has no head that fits: it is an encoder, and a classifier was expected (--init trains one)")
    print_rank0(f"{path}: {len(file.state) - len(left)} tensors matched; not expected: {summary(left)}")
    return model, file


def evaluate_file(cfg):
    """--eval: a classifier on the evaluation part of a set, at its own image size or --img-size. Of a set with a part
    of the classes (ImageNet-A, -R) predictions are made among these alone, as is usual."""
    device = setup(cfg.device)[2]
    model, file = open_classifier(cfg.eval, cfg.heads, cfg.img_size)
    val = open_to_evaluate(cfg.data, cfg.download)
    look_over(val, model.config["in_chans"], cfg.bits, cfg.value_range)
    count, folders = model.config["num_classes"], val.classes or ()
    numbers = find_classes(val, cfg.eval, count, file.config.get("classes"), cfg.class_names)
    mean, std = (tuple(getattr(cfg, name) or file.config.get(name) or ()) for name in ("mean", "std"))
    with value_errors_exit():
        size, (mean, std) = pair(model.config["img_size"]), statistics(model.config["in_chans"], mean, std)
    found = evaluate(model.to(device), val, size, mean, std, device, cfg.workers, numbers=numbers)
    part = f", {len(folders)} of the {count} classes" if len(folders) < count else ""
    print_rank0(f"{len(val):,} images of {cfg.data}{part}, {size[0]}x{size[1]} pixels: {RESULT.format(**found)}")


def options_of_init(path, heads):
    """What the file to start from decides: the model, its patches, channels and image size, mean and std."""
    file = read(path)
    found = encoder_options(file, heads)
    names, pyramid = models_with(found), "depth" not in found
    if not names:
        width = found.get("dim") or found["dims"]
        depth = found.get("depth") or found.get("depths") or found["stages"]
        fail(f"{path} is {width} wide and {depth} deep, and none of {', '.join(PYRAMIDS if pyramid else MODELS)} is")
    stored = {name: tuple(file.config[name]) for name in ("mean", "std") if file.config.get(name)}
    kept = "window" if "depths" in found else "heads"
    of_file = kept, "patch_size", "in_chans", "img_size", "relative", "layer_scale", "key_bias"
    return {name: found[name] for name in of_file if name in found} | stored | dict(model=names[0])


def resolve(argv=None):
    """Read the command line: what the user gave, else what --init says, else the demo, the recipe, the model."""
    cfg, given = options.read_command_line(Config, __doc__, argv, IMPROVED)
    if cfg.eval:                                                # the file says the rest
        return options.fill(cfg, given, dict(data=DEMO["data"])) if cfg.demo else cfg
    known = dict(DEMO) if cfg.demo else {}
    if cfg.init:
        known |= options_of_init(cfg.init, cfg.heads)
        if "in_chans" in given and cfg.in_chans != known["in_chans"]:
            known |= dict(mean=None, std=None)                  # they are of other channels
    model = cfg.model or known.get("model", "vit_tiny")
    kind, _ = PYRAMIDS.get(model, (None, None))
    others = {None: {"window"}, Hiera: ONLY_VIT | {"window"}}.get(kind, ONLY_VIT | {"heads"})
    for name in sorted(given & others):
        fail(f"{options.flag(name)} is no option of {model}: leave it out, or give another --model")
    recipe = cfg.recipe or RECIPE_OF[model]
    values = options.model_options(model) | RECIPES[recipe] | known | dict(model=model, recipe=recipe)
    values["lr"] = None if "blr" in given else values.get("lr")             # a given blr comes before a recipe's lr
    cfg = options.shorten(options.fill(cfg, given, values), given, RECIPES[recipe])
    if cfg.distill_teacher and cfg.pool != "avg":
        fail("--distill-teacher needs --pool avg: the cls token then answers the teacher")
    if cfg.rand_augment and (cfg.decode != "workers" or cfg.in_chans not in (1, 3)):
        fail("--rand-augment is done by the workers, on 1 or 3 channels: give --rand-augment 0")
    with value_errors_exit():
        return options.check(replace(cfg, img_size=pair(cfg.img_size)), given)


def teacher_of(path):
    """What the file to start from says about a teacher, whose licence may bind this network, too."""
    teacher = read(path).config.get("teacher") if path else None
    return dict(teacher=teacher) if teacher else {}


def main(argv=None):
    cfg = resolve(argv)
    if cfg.eval:
        return evaluate_file(cfg)
    run = Run(cfg, "finetune")
    train, val = run.datasets(shrink_batch=True)
    if not same_classes(train, val):
        ours, theirs = (set(source.classes or ()) if source else set() for source in (train, val))
        fail(f"{train.where} has {len(ours)} classes and its val/ has {len(theirs)}: fine-tuning needs a folder for "
             f"each class, the same in both; in one only: {', '.join(sorted(ours ^ theirs)[:3]) or 'none'}")
    cfg, classes = run.cfg, list(train.classes)
    model = make_classifier(cfg, len(classes)).to(run.device)
    if run.init:
        start_from(model, run.init)
    teacher = LabelTeacher(cfg, len(classes), run) if cfg.distill_teacher else None
    optimizer = make_optimizer(cfg, model, run.peak)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(cfg.ema)) if cfg.ema else None
    evaluated, best = average.module if average else model, dict(value=-1.0, step=0)
    encoder = dict(model=evaluated.state_dict(), config=dict(model.config, classes=classes, **teacher_of(cfg.init)))
    net = run.start(model, optimizer, encoder, teacher=teacher, average=average,
                    best=SimpleNamespace(state_dict=best.copy, load_state_dict=best.update))
    crops = run.random_crops()
    if cfg.rand_augment:
        colour = tuple(round(255 * m) for m in run.mean)        # of what comes from outside the image
        crops = AugmentedCrops(train, run.size, cfg.in_chans, cfg.seed, (cfg.min_crop, 1.0), cfg.interpolation,
                               cfg.rand_augment, colour, cfg.repeat)

    for step, passes in run.steps(crops):
        if run.due(cfg.eval_every, step):
            evaluate_and_keep_best(run, evaluated, best)
        run.set_lr(warmup_cosine(step, run.total, run.warmup, run.peak, cfg.min_lr))
        for img, labels in passes:
            img = erase(normalize(random_flip(img), run.mean, run.std), cfg.erase)              # (B, C, h, w)
            targets = soft_targets(labels, len(classes), cfg.smoothing)                         # (B, K)
            img, targets = random_mix(img, targets, cfg.mixup, cfg.cutmix, cfg.mix_chunk)
            teacher_logits = teacher(img) if teacher else None                                  # (B, K)
            with run.autocast():
                loss = objective(cfg, net(img), targets, teacher_logits)                        # ()
            run.backward(loss)
        run.update(chance=math.log(len(classes)))
        if average:
            average.update_parameters(model)
    value = evaluate_and_keep_best(run, evaluated, best)
    run.finish(f", best.pt ({best['value']:.3f}%, of step {best['step']}; the last weights have {value:.3f}%)")


if __name__ == "__main__":
    launch(main)
