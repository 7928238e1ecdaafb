"""
What a teacher teaches before fine-tuning: the attention of a frozen, larger ViT. mae.py --distill-teacher adds it to
the pixels (D-MAE, https://arxiv.org/abs/2205.14443; decoupled, D2-MAE, https://arxiv.org/abs/2404.12210); as a script
this file trains a student on it alone.

One node:   torchrun --standalone --nproc_per_node=8 distill.py --teacher mae_base.pth --out out/distill
One GPU:    python distill.py --teacher mae_base.pth --accum 8
To try it:  python distill.py --demo
Preempted:  type the same command again
Expected:   not run yet at full size; the demo's last lines are in the README
"""
import hashlib
import json
import os
import subprocess
import sys
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP

import training
from augment import normalize, random_flip, statistics
from data import CROPS, stream
from probe import probe
from sources import describe, parts, same_classes
from training import Plumbing, opt
from vit import MODELS, ViT, pair
from weights import load_into, read, shape_of

# ----------------------------------------------------------------------------------------------------------------
# The teacher. Its signals, from ViT.run_blocks: attention logits q k^T / sqrt(d), before the softmax and with cls; or
# hidden states


def decouple(vit):
    """Reduce the last block to q k^T, in place: something to compare with a teacher, and all below learns from it."""
    block = vit.blocks[-1]
    del block.mlp, block.norm2, block.attn.proj


def start_from(vit, path, say):
    """--init: weights of a file for a student; a reduced block, which no file needs to have, may stay fresh."""
    file, last = read(path), f"blocks.{len(vit.blocks) - 1}."
    own = {k: v for k, v in vit.state_dict().items() if k.startswith(last) and not hasattr(vit.blocks[-1], "mlp")}
    load_into(vit, file._replace(state={**own, **file.state}), say)


def released(state, config):
    """State dict and config of an encoder as others read it. A decoupled one's: its whole blocks, and a fresh final
    norm, because the one in it, if it was trained at all, belongs to another depth."""
    last = config["depth"] - 1
    if f"blocks.{last}.mlp.fc1.weight" in state:
        return state, config
    state = {k: v for k, v in state.items() if not k.startswith(f"blocks.{last}.")}
    fresh = {"norm.weight": torch.ones_like(state["norm.weight"]), "norm.bias": torch.zeros_like(state["norm.bias"])}
    return state | fresh, dict(config, depth=last, final_norm="fresh: weight 1, bias 0")


def features(vit, img):
    """The mean patch token (B, D) of what `released` stores: images -> features of its whole blocks."""
    if hasattr(vit.blocks[-1], "mlp"):
        return vit.encode(img)[:, 1:].mean(1)
    x = vit.embed(img)
    for block in vit.blocks[:-1]:
        x = block(x)
    return F.layer_norm(x, x.shape[-1:], eps=vit.norm.eps)[:, 1:].mean(1)


def guess(signals):
    """The error of always saying the teacher's mean, summed over signals: the chance level of a lesson."""
    return sum(t.float().var(unbiased=False) for t in signals)


class Teacher:
    """A frozen ViT from a file of any layout. Not a module, so that no checkpoint stores it: only which file it was.

    kind, layers: see pairs_of; student: its ViT options; mean, std: what its images are normalised with. Blocks that no
    signal needs are thrown away, and where the last signal is logits, only q and k of that block are computed. dtype:
    of its weights and products.
    """

    def __init__(self, path, heads, kind, layers, student, mean, std, device, dtype, say=print):
        file = read(path)
        stored = file.config.get("heads")
        if heads and stored and heads != stored:
            training.die(f"--teacher-heads {heads}: {path} says that it has {stored}")
        self.path, self.shape = path, shape_of(file, heads, "--teacher-heads")
        told = {**self.shape, **{k: tuple(file.config.get(k) or v) for k, v in (("mean", mean), ("std", std))}}
        for name, ours in dict({k: student[k] for k in ("patch_size", "in_chans")}, mean=mean, std=std).items():
            if told[name] != ours:
                training.die(f"{path} was made with --{name.replace('_', '-')} {told[name]}, the student has {ours}: "
                             "both see the same patches, so these must agree")
        self.pairs = pairs_of(layers, kind, student["depth"], self.shape["depth"])
        self.text = f"{kind} " + " ".join(f"{s}:{t}" for s, t in self.pairs["attention"] + self.pairs["hidden"])
        self.attention, self.hidden = (tuple(theirs for _, theirs in self.pairs[k]) for k in ("attention", "hidden"))
        with training.in_words():
            vit = ViT(**{**self.shape, "positions": "learned", "img_size": student["img_size"]})
        if self.shape["depth"] not in self.hidden:
            vit.norm = nn.Identity()                            # not asked for, and absent in some files
        load_into(vit, file, say)
        if self.shape["depth"] not in self.hidden:
            vit.blocks = vit.blocks[:max([*self.attention, *(k + 1 for k in self.hidden)])]
            if self.attention and len(vit.blocks) == max(self.attention):
                decouple(vit)
        self.vit = vit.requires_grad_(False).eval().to(device, dtype)
        name, _, key = (path, "", "") if os.path.exists(path) else path.rpartition(":")     # FILE or FILE:KEY
        with open(name, "rb") as f:
            self.sha256 = hashlib.file_digest(f, "sha256").hexdigest() + key

    @torch.no_grad()
    def __call__(self, img, keep=None):
        """Normalised images (B, C, h, w), the patches to see (B, K) or None for all -> a list of
        signals."""
        with torch.autocast(img.device.type, enabled=False):
            return self.signals(img.to(self.vit.cls_token.dtype), keep)

    def signals(self, img, keep):
        return self.vit.run_blocks(self.vit.embed(img, keep), self.attention, self.hidden)[1]

    def compile(self, **options):
        self.signals = torch.compile(self.signals, **options)

    def state_dict(self):
        return dict(sha256=self.sha256)

    def load_state_dict(self, state):
        if state["sha256"] != self.sha256:
            raise SystemExit(f"{self.path} is not the teacher that this run began with: give that file, or another "
                             "--out")


# ----------------------------------------------------------------------------------------------------------------
# Losses


def pairs_of(layers, kind, depth, teacher_depth):
    """--distill-layers -> dict of pairs (student's number, teacher's) for attention and for hidden states. "9:12" is
    the student's 9 and the teacher's 12; default: the last of both. Attention counts from 1, hidden states from 0."""
    least, found = int(kind != "hidden"), []
    for text in layers or (f"{depth}:{teacher_depth}",):
        numbers = text.split(":")
        if len(numbers) != 2 or not all(n.isdecimal() for n in numbers):
            training.die(f"--distill-layers {text} is not STUDENT:TEACHER, two numbers such as {depth}:{teacher_depth}")
        for n, most, who in zip(map(int, numbers), (depth, teacher_depth), ("student", "teacher")):
            if not least <= n <= most:
                training.die(f"--distill-layers {text}: the {who} has layers {least} to {most}, none is number {n}")
        found.append(tuple(map(int, numbers)))
    if len({s for s, _ in found}) < len(found):
        training.die(f"--distill-layers {' '.join(layers)} names a layer of the student twice")
    return dict(attention=() if kind == "hidden" else tuple(found), hidden=tuple(found) if kind == "hidden" else ())


class Lesson(nn.Module):
    """How far a student's signals are from a teacher's, and the adapters that translate between their sizes.

    student, teacher: dicts with heads and dim; pairs: see pairs_of. For attention an adapter is a 1x1 convolution over
    the heads, for hidden states a linear layer, without bias and with torch's own start, as in MAE-Lite; nobody keeps
    them. adapter False: none where the sizes agree.
    """

    def __init__(self, student, teacher, pairs, adapter=True):
        super().__init__()
        self.attention, self.hidden = (tuple(ours for ours, _ in pairs[k]) for k in ("attention", "hidden"))
        heads, dims = (student["heads"], teacher["heads"]), (student["dim"], teacher["dim"])
        self.adapters = nn.ModuleList([
            *(nn.Conv2d(*heads, 1, bias=False) if adapter or heads[0] != heads[1] else nn.Identity()
              for _ in self.attention),
            *(nn.Linear(*dims, bias=False) if adapter or dims[0] != dims[1] else nn.Identity() for _ in self.hidden)])

    def forward(self, ours, taught):
        """Two lists of signals -> the mean squared error of each pair, (P,) fp32."""
        said = [adapter(x).float() for adapter, x in zip(self.adapters, ours)]
        return torch.stack([F.mse_loss(x, t.float()) for x, t in zip(said, taught)])


class Pupil(nn.Module):
    """A student that hears the teacher alone: no pixels, no decoder."""

    def __init__(self, model, lesson):
        super().__init__()
        self.model, self.lesson = model, lesson

    def forward(self, img, keep, taught):
        """Images (B, C, h, w), the patches to see (B, K) or None for all, the teacher's signals -> errors (P,)."""
        x = self.model.embed(img, keep)
        return self.lesson(self.model.run_blocks(x, self.lesson.attention, self.lesson.hidden)[1], taught)


# ----------------------------------------------------------------------------------------------------------------
# The run: the teacher's signal alone


@dataclass
class Config(Plumbing):
    data: str = opt("imagenet", "folder or tar (imagenet: ./imagenet or $IMAGENET), torchvision set by name, or shapes")
    fraction: float = opt(1.0, "share of the training images used, the same of each class, chosen by the seed")
    teacher: str | None = opt(None, "file of the teacher, a ViT in any layout")
    teacher_heads: int | None = opt(None, "attention heads of the teacher, where its file does not say", 1)
    distill: str = opt("attention", "attention (with one reduced block more, as D2-MAE), or hidden (states)")
    distill_layers: tuple[str, ...] | None = opt(None, "STUDENT:TEACHER layers, as 12:24 (default: the last of both)")
    model: str = opt("vit_tiny", f"student: {', '.join(MODELS)}")
    heads: int | None = opt(None, "attention heads of the student, if not the model's own", 1)
    img_size: tuple[int, ...] = opt((224,), "pixels: one number, or height and width", 1)
    patch_size: int | None = opt(None, "pixels on a patch's side, if not the model's own; the teacher's as well", 1)
    in_chans: int = opt(3, "image channels: 1 grey, 3 colour, 4 colour and alpha")
    mean: tuple[float, ...] | None = opt(None, "channel means in 0..1 (default: ImageNet's; 0.5 if not 3 channels)")
    std: tuple[float, ...] | None = opt(None, "channel deviations in 0..1 (default: ImageNet's, or 0.25)")
    mask_ratio: float = opt(0.75, "fraction of the patches that neither of the two sees; 0: both see all", 0)
    min_crop: float = opt(0.08, "smallest area of a random crop, fraction of the image", 0)
    interpolation: str = opt("random", "resizing: bicubic, bilinear, or random: one of both")
    repeat: int = opt(1, "crops of each decoded image in a batch, which then has batch / repeat different images", 1)
    batch_size: int = opt(4096, "crops per optimizer step, over all processes and accumulation", 1)
    accum: int = opt(1, "forward-backward passes per optimizer step, each on a part of the batch", 1)
    epochs: float = opt(400, "passes over the training set", 0)
    warmup_epochs: float = opt(40, "epochs of linear warm-up, at most a tenth of all", 0)
    blr: float = opt(1.5e-4, "peak learning rate per 256 images of the batch", 0)
    lr: float | None = opt(None, "peak learning rate itself, instead of blr", 0)
    weight_decay: float = opt(0.05, "AdamW's weight decay; none on biases and 1-D parameters", 0)
    clip_grad: float | None = opt(None, "largest gradient norm (default: no clipping)", 0)
    init: str | None = opt(None, "checkpoint whose weights a new run starts from")
    probe_every: int = opt(0, "epochs between k-NN and linear probes, where the data has labels and val/; 0: none", 0)


DEMO = dict(data="shapes", model="vit_mini", img_size=(48,), patch_size=8, mask_ratio=0.6, min_crop=0.6, batch_size=128,
            interpolation="bicubic", epochs=6, blr=4e-3, workers=1, log_every=78, save_every=390)


# Of the demos: a wider net, pre-trained for a moment.
TEACHER = ("--model", "vit_midi", "--epochs", 8, "--warmup-epochs", 1, "--blr", 2e-3)


def resolve(cfg, given):
    """Fill what the command line left open: from the demo, if it is one, then from the model."""
    demo = DEMO if cfg.demo else {}
    cfg = training.fill(cfg, given, demo)
    if cfg.model not in MODELS:
        training.die(f"--model {cfg.model} is not one of {', '.join(MODELS)}")
    shape = {k: MODELS[cfg.model][k] for k in ("heads", "patch_size")}
    cfg = training.fill(cfg, given | set(demo), {**shape, "out": "out/distill-demo" if cfg.demo else "out/distill"})
    if "warmup_epochs" not in given:
        cfg = replace(cfg, warmup_epochs=min(cfg.warmup_epochs, cfg.epochs / 10))
    if not cfg.teacher and not cfg.demo:
        training.die("whom to learn from? give --teacher FILE, or try --demo")
    for name, known in (("distill", ("attention", "hidden")), ("in_chans", (1, 3, 4)), ("decode", tuple(CROPS)),
                        ("interpolation", ("bicubic", "bilinear", "random"))):
        if getattr(cfg, name) not in known:
            training.die(f"--{name.replace('_', '-')} is one of {', '.join(map(str, known))}, not {getattr(cfg, name)}")
    if cfg.min_crop > 1 or cfg.mask_ratio >= 1:
        training.die(f"--min-crop and --mask-ratio are fractions, not {cfg.min_crop:g} and {cfg.mask_ratio:g}")
    return replace(cfg, data=os.path.normpath(cfg.data))


def build(cfg):
    """The student. One that hears attention alone has a reduced block more: above q k^T nothing would be trained."""
    shape, more = {**MODELS[cfg.model], "heads": cfg.heads, "patch_size": cfg.patch_size}, cfg.distill == "attention"
    with training.in_words():
        vit = ViT(**{**shape, "depth": shape["depth"] + more, "img_size": pair(cfg.img_size), "in_chans": cfg.in_chans})
    if more:
        decouple(vit)
        vit.norm.requires_grad_(False)                          # in no loss; `released` writes a fresh one
    return vit


def teacher_of(cfg, student, mean, std, device, say):
    teacher = Teacher(cfg.teacher, cfg.teacher_heads, cfg.distill, cfg.distill_layers, student.config, mean, std,
                      device, training.DTYPES[cfg.dtype], say)
    depth = student.config["depth"]
    if max(ours for ours, _ in teacher.pairs["attention"] + teacher.pairs["hidden"]) < depth:
        training.die(f"--distill-layers must name the student's last layer, {depth}: without pixels nothing would "
                     "train the blocks above")
    return teacher


def banner(cfg, teacher, visible, patches, steps, peak, start, world, device):
    share = cfg.batch_size // world // cfg.accum
    return (f"{cfg.model} learns from {cfg.teacher}: {teacher.text}; {visible} of {patches} patches visible\n"
            f"batch {cfg.batch_size} = {world} processes x {cfg.accum} passes x {share} images; {cfg.dtype} on "
            f"{device}\n"
            f"{cfg.epochs:g} epochs of {steps.per_epoch} steps, {start} of {steps.total} done, {steps.warmup} of them "
            f"warm-up, peak learning rate {peak:.3g}")


def pretrain(cfg):
    rank, world, device = training.setup(cfg.device)
    cfg, say = replace(cfg, dtype=training.precision(cfg.dtype, device)), print if rank == 0 else str
    train, val = parts(cfg.data, cfg.fraction, cfg.seed, cfg.download)
    probing = cfg.probe_every or cfg.demo and cfg.data == "shapes"
    if probing and not same_classes(train, val):
        training.die("--probe-every needs the same classes in train/ and in val/")
    steps, peak = training.plan(cfg, len(train), world, cfg.repeat)
    with training.in_words():
        size, (mean, std) = pair(cfg.img_size), statistics(cfg.in_chans, cfg.mean, cfg.std)

    torch.manual_seed(cfg.seed)                                 # on every rank: all start from the same weights
    student = build(cfg).to(device)
    teacher = teacher_of(cfg, student, mean, std, device, say)
    model = Pupil(student, Lesson(student.config, teacher.shape, teacher.pairs)).to(device)
    patches = student.grid[0] * student.grid[1]
    visible = int(patches * (1 - cfg.mask_ratio)) or training.die(f"--mask-ratio {cfg.mask_ratio:g} leaves no patch")
    optimizer = torch.optim.AdamW(training.decay_groups(model, cfg.weight_decay), peak, betas=(0.9, 0.95), fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=cfg.dtype == "fp16")
    run = training.Run(cfg, "distill", rank, world, len(train), teacher=teacher, model=model, optimizer=optimizer,
                       scaler=scaler)
    if cfg.init and not run.step:
        start_from(student, cfg.init, say)
    training.compile_if(cfg, device, model, teacher)
    net = DDP(model, device_ids=[device.index] if device.type == "cuda" else None) if world > 1 else model
    log = training.Log(cfg, rank, device, run.step, steps, images=len(train), world=world)
    health = training.Health(cfg, device, world, log)
    say(f"{describe(train)}\n{banner(cfg, teacher, visible, patches, steps, peak, run.step, world, device)}")
    measure = partial(probe, partial(features, student), train, val, size, cfg.in_chans, mean, std, device, cfg.workers,
                      log)
    if probing and not run.step:
        measure(0)
    batches = log.waiting(stream(cfg, train, size, world, rank, run.step, steps.total, device))
    for step in range(run.step, steps.total):
        training.seed_for(cfg.seed, step, rank)
        lr = training.warmup_cosine(step, steps.total, steps.warmup, peak)
        training.set_lr(optimizer, lr)
        total, unreadable = 0.0, []
        for micro in range(cfg.accum):
            img, _, failed = next(batches)
            img = normalize(random_flip(img.to(device, non_blocking=True)), mean, std)          # (b, C, h, w)
            seen = torch.rand(len(img), patches, device=device).argsort(1)[:, :visible]      # (b, V)
            seen = seen if visible < patches else None
            taught = teacher(img, seen)
            with training.sync_if(micro + 1 == cfg.accum, net), training.autocast(device, cfg.dtype):
                loss = net(img, seen, taught).sum() / cfg.accum
            scaler.scale(loss).backward()
            total, unreadable = total + loss.detach(), unreadable + failed
        grad_norm, skipped = training.finite_step(optimizer, scaler, cfg.clip_grad)
        done = step + 1
        why = health(skipped, unreadable, cfg.batch_size // world)

        if done % cfg.log_every == 0 or done == steps.total or why:
            log(done, loss=training.mean_over_ranks(total), chance=guess(taught), lr=lr, grad_norm=grad_norm,
                skipped=health.skipped)
        keep, must = steps.due(done, cfg.keep_every), why or done == steps.total
        if why != "non-finite" and (must or keep or done % cfg.save_every == 0):
            state, config = released(student.state_dict(), dict(student.config, mean=mean, std=std))
            run.save(done, dict(method="distill", config=config, model=state), keep, must)
        if why:
            health.leave(why, run, done, model, total, img)
        optimizer.zero_grad()
        if steps.due(done, cfg.probe_every) and done < steps.total:
            measure(done)
    if probing:
        measure(steps.total)
    if rank == 0:
        training.draw_curve(cfg.out)
        print(f"done: {cfg.out} has encoder.pt for downstream use, last.pt, log.jsonl")


def before(script, out, *options):
    """Another demo run of mae.py, in its own process, before this one. Returns the path of its encoder."""
    if not os.path.exists(script):
        raise SystemExit(f"the demo's teacher is made by mae.py, and {script} does not exist: give --teacher FILE")
    print(f"--- first: mae.py --demo {' '.join(map(str, options))}", flush=True)
    done = subprocess.run([sys.executable, script, "--demo", "--out", out, *map(str, options)])
    if done.returncode:
        raise SystemExit(done.returncode)
    return os.path.join(out, "encoder.pt")


def rows(folder):
    """The last row of a finished run's log with each of its values."""
    with open(os.path.join(folder, "log.jsonl")) as f:
        return {k: v for line in f for k, v in json.loads(line).items()}


def main(argv=None):
    cfg, given = training.parse(Config, __doc__, argv)
    cfg = resolve(cfg, given)
    if cfg.demo and not cfg.teacher:
        mae = os.path.join(os.path.dirname(os.path.abspath(__file__)), "mae.py")
        cfg = replace(cfg, teacher=before(mae, os.path.join(cfg.out, "teacher"), *TEACHER))
        print("--- then: distill.py, from the teacher's attention alone", flush=True)
    pretrain(cfg)


if __name__ == "__main__":
    training.launch(main)
