"""
What frozen features know: a k-NN vote, the linear probes of three papers, a sweep of learning rates over features that
are kept in memory; or the features themselves, as files.

k-NN:      python probe.py out/mae/encoder.pt                       (or any public layout, as mae_pretrain_vit_base.pth)
Linear:    torchrun --standalone --nproc_per_node=8 probe.py out/mae/encoder.pt --protocol mae
One GPU:   python probe.py moco.pth.tar --protocol moco --accum 2
Quickly:   python probe.py out/mae/encoder.pt --protocol sweep                      (20 linear heads at once)
Files:     python probe.py out/mae/encoder.pt --protocol features --split val --tokens cls patches
To try it: python mae.py --demo && python probe.py --demo
Preempted: type the same command again
Expected:  not run yet at full size; the demo's last lines are in the README
"""
import math
import os
import re
import shutil
import sys
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F

from images.augment import normalize, random_flip, statistics
from images.datasets import describe, same_classes, train_and_val
from images.device import CROPS
from nets.heads import LARS, accuracies, knn_counts, make_head, sweep, tally
from nets.hiera import Hiera
from runtime.folder import FileOfRun, Log
from runtime.options import Options, check, fail, fill, opt, read_command_line, value_errors_exit
from runtime.probes import encoded, extract
from runtime.run import Run, launch, print_rank0, warmup_cosine
from vit import Block, Pyramid
from weights import load_encoder, read


@dataclass
class Config(Options):
    init: str | None = opt(None, "file of the encoder, in any layout, FILE:KEY if it holds several; or FILE in front")
    protocol: str = opt("knn", "k-NN; the linear probe of MAE, MoCo v3 or DINO; a sweep; or features as files",
                        choices=("knn", "features", "sweep", "mae", "moco", "dino"))
    img_size: tuple[int, ...] | None = opt(None, "one number, or height and width (default: the encoder's)", least=1)
    in_chans: int | None = opt(None, "image channels; they must be the encoder's, which its file tells")
    mean: tuple[float, ...] | None = opt(None, "channel means in 0..1 (default: the file's, else ImageNet's or 0.5)")
    std: tuple[float, ...] | None = opt(None, "channel deviations in 0..1 (default: the file's, else ImageNet's; 0.25)")
    pool: str | None = opt(None, "tokens that are read; avg: mean patch token (default: by the method that made the "
                           "file; dino from a width of 768: both)", choices=("cls", "avg", "both"), old="readout")
    blocks: int | None = opt(None, "last blocks that are read (default: 1; dino below a width of 768: 4)", least=1)
    k: tuple[int, ...] | None = opt(None, "neighbours that vote (default: 10, 20, 100 and 200)", least=1)
    lrs: tuple[float, ...] | None = opt(None, "learning rates of the sweep (default: 20 from 0.0001 to 10)", least=0)
    split: str | None = opt(None, "images whose features are written (default: val)", choices=("train", "val"))
    tokens: tuple[str, ...] | None = opt(None, "what is written; patches are large (default: cls and mean; of "
                                         "others than ViT, mean)", choices=("cls", "mean", "patches"))
    eval_every: int = opt(1, "epochs between evaluations of a linear probe, besides that at the end; 0: none", least=0)


# The recipes in MAE's, MoCo v3's and DINO's own code; the sweep is ours. MAE's code runs all under autocast, here only
# the encoder does. Evaluation crops are resized bicubically for all, where MoCo v3 resizes them bilinearly.
SWEPT = tuple(round(10 ** (-4 + i * 5 / 19), 6) for i in range(20))
PROTOCOLS = {
    "knn": dict(dtype="fp32", k=(10, 20, 100, 200)),
    "features": dict(dtype="fp32", split="val"),
    "sweep": dict(dtype="fp32", batch_size=128, epochs=100, lrs=SWEPT),
    "mae": dict(batch_size=16384, epochs=90, warmup_epochs=10, blr=0.1),
    "moco": dict(dtype="fp32", batch_size=1024, epochs=90, warmup_epochs=0, blr=3.0),
    "dino": dict(dtype="fp32", batch_size=1024, epochs=100, warmup_epochs=0, blr=0.001),
}
LINEAR = "mae", "moco", "dino"                                  # those with a head that is trained on random crops
DEMO = dict(data="shapes", init="out/mae-demo/encoder.pt", workers=1)

# Which token has learnt something depends on the method: MAE's loss never asks cls, contrastive losses mostly ask it.
WITHOUT_CLS = Pyramid, Hiera
POOL_OF_METHOD = dict(mae="avg", distill="avg", bootmae="avg", simmim="avg", moco_v3="cls", dino="cls", esvit="cls")


# ----------------------------------------------------------------------------------------------------------------
# The encoder


def features(vit, img, pool="cls", blocks=1):
    """Read the last `blocks` blocks of a network: normalised images (B, C, h, w) -> (B, numbers), the oldest first.

    pool: "cls"; "avg", the mean of the patch tokens; "both", interleaved: cls 0, avg 0, cls 1, avg 1, ... (DINO). Each
    block's tokens go through the final norm. Networks of several stages have "avg" alone, and their earlier stages no
    norm, as in EsViT; of a Hiera the mean is normed, not each token.
    """
    found, first = [], vit.depth - blocks
    if isinstance(vit, WITHOUT_CLS):
        last_stage = (vit.config.get("depths") or vit.config["stages"])[-1]
        for i, x in enumerate(vit.block_outputs(img)[first:], first):       # (B, N, D of the stage)
            norm = vit.norm if i >= vit.depth - last_stage else torch.nn.Identity()
            found.append(norm(x.mean(1)) if isinstance(vit, Hiera) else vit.view(norm(x), i))   # (B, D)
        return torch.cat(found, 1)
    x = vit.embed(img)
    for i, block in enumerate(vit.blocks):
        x = block(x)                                                        # (B, 1 + N, D)
        if i >= first:
            tokens = vit.norm(x)                                            # of norm and fc_norm one is the identity
            cls, avg = tokens[:, 0], vit.fc_norm(tokens[:, 1:].mean(1))     # (B, D) each
            both = torch.stack([cls, avg], -1).flatten(1)                   # (B, 2 * D)
            found.append(dict(cls=cls, avg=avg, both=both)[pool])
    return torch.cat(found, 1)


def choose_pool(cfg, vit, method):
    """Which tokens are read, and why, in a few words. method: what the encoder's file says that it was made by."""
    if cfg.pool:
        return cfg.pool, "as asked for"
    if isinstance(vit, WITHOUT_CLS):
        return "avg", f"a {type(vit).__name__} has no cls token"
    if cfg.protocol == "dino" and vit.width >= 768:
        return "both", "as DINO reads wide networks"
    if method in POOL_OF_METHOD:
        return POOL_OF_METHOD[method], f"the file is of {method}"
    return vit.pool, "as the file's last norm has it"


class Encoder(FileOfRun):
    """The frozen network of --init and how it is read: normalised images -> features (B, width), fp32. It is no module,
    so no checkpoint holds its weights, only which file it was. It fills in run.cfg what the file decides."""

    def __init__(self, run):
        cfg, self.run = run.cfg, run
        weights = read(cfg.init)
        super().__init__(cfg.init)
        options = dict(pool="avg" if "fc_norm.weight" in weights.state else "cls")              # where the norm stands
        for name in ("img_size", "in_chans"):
            if getattr(cfg, name):
                options[name] = getattr(cfg, name)
        with value_errors_exit():
            vit = load_encoder(cfg.init, cfg.heads, print_rank0, **options)
            size, channels = vit.config["img_size"], vit.config["in_chans"]
            stored = [weights.config.get(name) for name in ("mean", "std")]
            if stored[0] and len(stored[0]) != channels:        # they are of the channels that the file was made for
                stored = [None, None]
            mean, std = statistics(channels, cfg.mean or stored[0], cfg.std or stored[1])
        pool, self.reason = choose_pool(cfg, vit, weights.config["method"])
        blocks = cfg.blocks or 1
        narrow = isinstance(vit, WITHOUT_CLS) or vit.width < 768
        if cfg.blocks is None and cfg.protocol == "dino" and narrow:
            blocks = min(4, vit.depth)                          # as DINO reads narrow networks
        if isinstance(vit, WITHOUT_CLS) and pool != "avg":
            fail(f"--pool {pool}: {cfg.init} is a {type(vit).__name__}, which has no cls token: give --pool avg")
        if blocks > vit.depth:
            fail(f"--blocks {blocks}: {cfg.init} has {vit.depth}")
        run.cfg = replace(cfg, img_size=size, in_chans=channels, mean=mean, std=std, pool=pool, blocks=blocks)
        self.vit = vit.requires_grad_(False).to(run.device)
        # How images are shown to it, for `encoded` and `extract`.
        self.inputs = dict(size=size, channels=channels, mean=mean, std=std, device=run.device, workers=cfg.workers,
                           max_unreadable=cfg.max_unreadable)
        self.width = self(torch.zeros(1, channels, *size, device=run.device)).shape[1]

    @torch.no_grad()
    def __call__(self, img):
        with self.run.autocast():
            return features(self.vit, img, self.run.cfg.pool, self.run.cfg.blocks).float()


# ----------------------------------------------------------------------------------------------------------------
# Features that are kept in memory


def report(log, text, counts, **row):
    """Print the accuracies that counts (3, C) stand for, and log them after the values of `row`."""
    found = accuracies(counts)
    if log.rank == 0:
        log.note(**row, **found)
    print_rank0("{}: top-1 {:.3f}%  top-5 {:.3f}%  mean per class {:.3f}%".format(text, *found.values()))


def evaluate_kept(run, encoder, train, val):
    """k-NN or a sweep, on features of the evaluation crops that are kept in memory."""
    cfg, classes = run.cfg, len(train.classes)
    log = Log(cfg, run.rank, run.device, 0, 0, 1, images=len(train), world=run.world, sha256=encoder.sha256)
    x, y = extract(encoder, train, range(len(train)), **encoder.inputs)
    val_x, val_y = extract(encoder, val, range(len(val)), **encoder.inputs)
    x, y, val_x, val_y = (tensor.to(run.device) for tensor in (x, y, val_x, val_y))
    if cfg.protocol == "sweep":
        if len(train) < 5:
            fail(f"{train.where} has {len(train)} images: a sweep needs five to hold one out")
        held_out, best, counts = sweep(x, y, val_x, val_y, cfg.lrs, classes, cfg.epochs, cfg.batch_size, cfg.seed)
        for lr, accuracy in zip(cfg.lrs, held_out):
            print_rank0(f"lr {lr:g}: {accuracy:.3f}% of the held-out fifth")
        if best in (min(cfg.lrs), max(cfg.lrs)) and len(cfg.lrs) > 1:
            print_rank0("note: the best rate is at an end of --lrs: a better one may lie beyond")
        if run.rank == 0:
            log.note(lrs=cfg.lrs, held_out=held_out)
        return report(log, f"best lr {best:g}, all training images", counts, lr=best)
    if max(cfg.k) > len(train):
        print_rank0(f"note: there are {len(train)} training images, so --k is at most that")
    ks = {min(k, len(train)) for k in cfg.k}
    mine = slice(run.rank, None, run.world)
    found = knn_counts(x, y, val_x[mine], val_y[mine], ks, classes)
    for k, counts in sorted(found.items()):
        if run.world > 1:
            dist.all_reduce(counts)
        report(log, f"k-NN, k {k}", counts, k=k)


# ----------------------------------------------------------------------------------------------------------------
# Linear heads that are trained on random crops, as MAE, MoCo v3 and DINO do it


def one_draw(scale, width, height, u):
    """The box of a random crop in MAE's linear probe: one draw of area and shape, cut off at the image's edges, where
    torchvision would draw again; so larger crops are more frequent. u: uniform numbers."""
    area, aspect = width * height * (scale[0] + (scale[1] - scale[0]) * u[0]), 0.75 * (16 / 9) ** u[10]
    w, h = min(width, round((area * aspect) ** 0.5)), min(height, round((area / aspect) ** 0.5))
    return (int(u[20] * (width - w + 1)), int(u[21] * (height - h + 1)), w, h), "bicubic"


def random_crops(run):
    """The random crops that the paper of --protocol trains its linear probe on."""
    cfg = run.cfg
    crops = CROPS[cfg.decode](run.train, run.size, cfg.in_chans, cfg.seed, (0.08, 1.0), "bilinear")
    if cfg.protocol == "mae":
        crops.plan = partial(one_draw, crops.scale)
    return crops


@torch.no_grad()
def evaluate(run, encoder, model, val, step):
    """Accuracies on val, exact over processes; with the BatchNorm statistics of the first one, as in MAE's code."""
    if run.world > 1:
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)
    model.eval()
    with run.interruptible():
        scores, labels = extract(lambda img: model(encoder(img)), val, range(len(val)), **encoder.inputs)
    model.train()
    report(run.log, f"epoch {step / run.per_epoch:g}", tally(scores, labels), step=step)


def train_head(run, encoder, train, val):
    """A linear probe by the recipe of --protocol: random crops through the frozen encoder, the head alone learns."""
    cfg, vit = run.cfg, encoder.vit
    mae = cfg.protocol == "mae"
    if mae and cfg.batch_size < 2 * run.world * cfg.accum:
        fail(f"--batch-size {cfg.batch_size} leaves one image to a pass: MAE's BatchNorm needs two")
    model = make_head(cfg.protocol, encoder.width, len(train.classes)).to(run.device)
    optimizer = LARS(model.parameters(), run.peak, trust=0.001 if mae else None)
    # A head under the classifier's name would be taken for one: only where a classifier would read the same.
    name = "head" if (cfg.pool, cfg.blocks) == (vit.pool, 1) else "probe"
    whole = vit.state_dict() | {f"{name}.{key}": value for key, value in model.state_dict().items()}
    net = run.start(model, optimizer, dict(model=whole, config=vit.config), frozen=encoder)
    run.scaler = torch.amp.GradScaler(run.device.type, enabled=False)       # --dtype is the encoder's: the head is fp32
    if cfg.compile or cfg.compile is None and run.device.type == "cuda":
        for part in vit.modules():
            if isinstance(part, Block):
                part.compile(dynamic=False)
    if run.rank == 0:
        run.log.note(sha256=encoder.sha256)

    for step, passes in run.steps(random_crops(run)):
        if run.due(cfg.eval_every, step):
            evaluate(run, encoder, model, val, step)
        at = step if mae else step - step % run.per_epoch       # MoCo v3's and DINO's rate moves once an epoch
        run.set_lr(warmup_cosine(at, run.total, run.warmup, run.peak))
        for img, labels in passes:
            img = normalize(random_flip(img), run.mean, run.std)                                # (B, C, h, w)
            loss = F.cross_entropy(net(encoder(img)), labels)                                   # ()
            run.backward(loss)
        run.update(chance=math.log(len(train.classes)))
    evaluate(run, encoder, model, val, run.total)
    if run.rank == 0:
        with open(run.log.path) as f:
            tests = re.findall(r'"step": \d+, "test_acc1": ([\d.]+)', f.read())
        best = max(map(float, tests), default=0)
        print_rank0(f"best epoch: top-1 {best:.3f}% (that of the last epoch is on the line above)")
    run.finish("; encoder.pt holds the head as well")


# ----------------------------------------------------------------------------------------------------------------
# Features as files; the run


def on_one_line(name):
    """A file name with line ends, tabs, other control characters and backslashes as Python writes them: \\n, \\t."""
    return re.sub(r"[\\\x00-\x1f\x7f-\x9f\u2028\u2029]", lambda m: m[0].encode("unicode_escape").decode(), name)


def export(run, encoder, source):
    """Write OUT/cls.npy and mean.npy (n, D), patches.npy (n, N, D), labels.npy (n,) and names.txt (see on_one_line) in
    the order of the source, as they come: nothing is kept in memory. Each process writes its rows."""
    cfg, vit = run.cfg, encoder.vit
    n, no_cls = len(source), isinstance(vit, WITHOUT_CLS)
    chosen = cfg.tokens or (("mean",) if no_cls else ("cls", "mean"))
    if no_cls and "cls" in chosen:
        fail(f"--tokens cls: {cfg.init} is a {type(vit).__name__}, which has no cls token: give --tokens mean or "
             "patches")
    shapes = dict(cls=(n, vit.width), mean=(n, vit.width), patches=(n, vit.grid[0] * vit.grid[1], vit.width))
    shapes = {name: shapes[name] for name in chosen} | dict(labels=(n,))
    need, free = sum(4 * math.prod(shape) for shape in shapes.values()), shutil.disk_usage(cfg.out).free
    if need > free:                                             # a mapped file that meets a full disk kills the process
        fail(f"--tokens {' '.join(chosen)} take {need / 1e9:,.1f} GB, and {cfg.out} has {free / 1e9:,.1f} GB of room")
    paths = {name: os.path.join(cfg.out, f"{name}.npy") for name in shapes}
    if run.rank == 0:
        for name, shape in shapes.items():
            kind = np.int64 if name == "labels" else np.float32
            np.lib.format.open_memmap(paths[name] + ".part", "w+", kind, shape)
    if run.world > 1:
        dist.barrier()
    files = {name: np.lib.format.open_memmap(path + ".part", "r+") for name, path in paths.items()}

    def tokens(img):
        with run.autocast():
            if isinstance(vit, Hiera):                          # its features are the normed mean
                x = vit.block_outputs(img)[-1]                                                  # (B, N, D)
                return dict(mean=vit.norm(x.mean(1)), patches=vit.norm(x))
            x = vit.encode(img)
        if no_cls:
            return dict(mean=x.mean(1), patches=x)
        return dict(cls=x[:, 0], mean=vit.fc_norm(x[:, 1:].mean(1)), patches=x[:, 1:])

    for where, found, labels in encoded(tokens, source, range(n), **encoder.inputs):
        for name, file in files.items():
            file[where] = labels if name == "labels" else found[name].float().cpu()
    for file in files.values():
        file.flush()
    if run.world > 1:
        dist.barrier()
    if run.rank == 0:
        for path in paths.values():
            os.replace(path + ".part", path)
        with open(os.path.join(cfg.out, "names.txt"), "w", errors="surrogateescape") as f:
            f.writelines(f"{on_one_line(source.relative(i))}\n" for i in range(n))
        written = ", ".join(f"{name}.npy {shape}" for name, shape in shapes.items())
        print_rank0(f"done: {cfg.out} has {written} and names.txt")


def resolve(argv=None):
    """Read the command line -> the config: what the user gave, else the demo's values, else the protocol's."""
    argv = list(sys.argv[1:] if argv is None else argv)
    file = argv.pop(0) if argv and not argv[0].startswith("-") else None
    cfg, given = read_command_line(Config, __doc__, argv)
    if file and cfg.init:
        fail(f"two encoders are named, {file} and --init {cfg.init}: give one of them")
    if not (file or cfg.init or cfg.demo):
        fail("the file of an encoder is required: python probe.py FILE (or try --demo after `python mae.py --demo`)")
    if file:
        cfg, given = replace(cfg, init=file), given | {"init"}
    cfg = check(cfg, given)
    if cfg.demo and cfg.protocol in LINEAR:
        fail("--demo supports knn, sweep and features: the papers' linear probes need many steps")
    values = dict(PROTOCOLS[cfg.protocol], out=f"out/probe-{cfg.protocol}")
    if cfg.demo:
        values.update(DEMO)
    cfg = fill(cfg, given, values)
    if cfg.warmup_epochs and "warmup_epochs" not in given:      # MAE's 10 of 90, less of a shorter run
        cfg = replace(cfg, warmup_epochs=min(cfg.warmup_epochs, cfg.epochs / 9))
    return cfg


def main(argv=None):
    run = Run(resolve(argv), "probe")
    encoder = Encoder(run)
    cfg = run.cfg
    if cfg.protocol in LINEAR:
        train, val = run.datasets()
    else:
        train, val = train_and_val(cfg.data, cfg.fraction, cfg.seed, cfg.download, cfg.in_chans, cfg.bits,
                                   cfg.value_range)
        try:
            os.makedirs(cfg.out, exist_ok=True)
        except OSError as error:
            fail(f"--out {cfg.out} cannot be written: {error}")
    source = train if cfg.protocol == "features" and cfg.split == "train" else val
    if source is None:
        fail(f"{cfg.data} has no images to evaluate on: val/ was looked for, or test/, or a tar of that name")
    if cfg.protocol == "features":
        print_rank0(describe(source))
        try:
            return export(run, encoder, source)
        except OSError as error:
            fail(f"the features could not be written in {cfg.out}: {error}")
    if not same_classes(train, val):
        for source in (train, val):
            if not source.classes:
                fail(f"{source.where} has no labels: folders of classes were expected")
    print_rank0(f"{cfg.protocol}: pool {cfg.pool} ({encoder.reason}) of the last {cfg.blocks} blocks, {encoder.width} "
                "numbers")
    if cfg.protocol in LINEAR:
        return train_head(run, encoder, train, val)
    print_rank0(describe(train))
    evaluate_kept(run, encoder, train, val)


if __name__ == "__main__":
    launch(main)
