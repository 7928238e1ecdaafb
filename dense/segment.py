"""
Semantic segmentation with any checkpoint: a class for each pixel, by Semantic-FPN or by a linear layer.
Recipe of https://arxiv.org/abs/2205.14443 (ViT-Tiny, ADE20K); https://arxiv.org/abs/1901.02446, section 4.1 (the head)

One node:   torchrun --standalone --nproc_per_node=8 -m dense.segment --init out/mae/encoder.pt --data ade20k
One GPU:    python -m dense.segment --init out/mae/encoder.pt --data ade20k --accum 4
Small set:  python -m dense.segment --init out/mae/encoder.pt --data camvid --img-size 128
Frozen:     python -m dense.segment --init out/mae/encoder.pt --data camvid --frozen
To try it:  python -m dense.segment --demo
Accuracy:   python -m dense.segment --eval out/segment/best.pt --data camvid --split test
Pictures:   python -m dense.segment --eval out/segment/best.pt --data my/photos --predict out/photos
Preempted:  type the same command again
Expected:   not run yet on ADE20K; published there are 38.0 to 42.8 mIoU
"""
import math
import time
from dataclasses import dataclass, replace
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import nn

from images.augment import normalize
from images.datasets import look_over
from images.mask_classes import IGNORED
from images.mask_crops import MaskCrops
from images.masks import open_to_predict, train_and_val_pairs
from nets.fpn import FPNHead, LinearHead, Neck, StageNorms, default_taps, last_map, tapped_maps
from nets.heads import pixel_scores
from nets.naming import build, layer_of
from runtime import options
from runtime.options import NetworkOptions, fail, opt, value_errors_exit
from runtime.run import Run, launch, print_rank0, setup
from runtime.windows import Windows, count_pixels, draw_segmentations, make_windows, print_scores, score_line
from vit import MODELS, SWINS, Swin, pair
from weights import encoder_options, read
from weights.backbones import build_backbone, load_backbone
from weights.reading import load_file

# Published, and two of ours. Published networks have relative positions and layer scale, which start at 0 and 1, so at
# first they compute what they did in pre-training. 160k steps give 39.0 mIoU (D2-MAE), 42.8 (fine-tuned before).
ADE20K = dict(steps=160_000, warmup_steps=1_500, batch_size=16, lr=1e-4, weight_decay=0.05, layer_decay=0.8,
              drop_path=0.1, relative=True, layer_scale=1.0, head="fpn", dropout=0.1, img_size=(512, 512),
              short_side=512)
SMALL = dict(ADE20K, steps=2_000, warmup_steps=100, lr=5e-4, relative=False, layer_scale=0, img_size=(128, 128),
             short_side=0)
FROZEN = dict(SMALL, steps=1_000, lr=1e-3, weight_decay=1e-4, layer_decay=1, drop_path=0, head="linear")
RECIPES = dict(ade20k=ADE20K, small=SMALL, frozen=FROZEN)
DEMO = dict(data="shapes", model="vit_mini", patch_size=8, img_size=(64, 64), steps=400, batch_size=16, lr=3e-3,
            layer_decay=1, drop_path=0, channels=32, ratios=(0.9, 1.2), photometric=False, workers=1, eval_every=200,
            log_every=50, out="out/segment-demo")


@dataclass
class Config(NetworkOptions):
    data: str = opt("ade20k", "folder or tar of images and masks, or ade20k, voc, cityscapes, shapes (images/masks.py)")
    recipe: str | None = opt(None, "row of the table in this file (default: ade20k for that set, else small)",
                             choices=RECIPES)
    model: str | None = opt(None, "the network (default: that of --init, else vit_tiny)", choices=(*MODELS, *SWINS))
    img_size: tuple[int, ...] | None = opt(None, "pixels of a crop, and of a window in evaluation", least=1)
    in_chans: int | None = opt(None, "image channels (default: as --init, else 3)", least=1)
    steps: int | None = opt(None, "optimizer steps, if --epochs is not given", least=1)
    warmup_steps: int | None = opt(None, "steps of linear warm-up, in shorter runs at most a tenth", least=0)
    layer_decay: float | None = opt(None, "learning rate of a block, relative to the block above", least=0, most=1)
    drop_path: float | None = opt(None, "rate of dropped branches at the last block, from 0 at the first", 0, 0.999)
    relative: bool | None = opt(None, "learned relative positions in every block of a ViT")
    layer_scale: float | None = opt(None, "a ViT's layer scale at the start, if the file has none; 0: none", least=0)
    frozen: bool = opt(False, "train the head alone, by default a linear one, with the recipe of that name")
    head: str | None = opt(None, "fpn: four maps; linear: the last one", choices=("fpn", "linear"))
    taps: tuple[int, ...] | None = opt(None, "four blocks of a ViT for --head fpn (default: 4 6 8 12 of 12)", least=1)
    channels: int = opt(128, "width of the FPN head", least=1)
    dropout: float | None = opt(None, "share of the FPN head's channels that are dropped", least=0, most=0.999)
    short_side: int | None = opt(None, "pixels of the shorter side before crops and windows; 0: as it is", least=0)
    ratios: tuple[float, ...] = opt((0.5, 2.0), "least and greatest random ratio of resizing", above=0)
    photometric: bool = opt(True, "random brightness, contrast, saturation and hue")
    stride: int | None = opt(None, "pixels between windows (default: two thirds of a window, 341 of 512)", least=1)
    eval_every: int = opt(5_000, "steps between evaluations on val/, beside that at the end; 0: only then", 0)
    eval: str | None = opt(None, "only evaluate this best.pt")
    split: str = opt("val", "part of --data to evaluate on", choices=("train", "val", "test"), needs="eval")
    predict: str | None = opt(None, "folder that gets masks, overlays and a legend", needs="eval")


# ----------------------------------------------------------------------------------------------------------------
# The network, its loss, its optimizer


class Segmenter(nn.Module):
    """A ViT or Swin, a neck that makes maps of several scales of it, and a head: images -> logits for each pixel.

    frozen: the backbone keeps its weights. ValueError where a crop does not fit maps that are halved.
    """

    def __init__(self, backbone, classes, head="fpn", taps=None, channels=128, dropout=0.1, frozen=False):
        super().__init__()
        self.backbone, self.frozen, self.neck = backbone, frozen, None
        self.taps = tuple(taps or default_taps(backbone.depth)) if head == "fpn" else None
        # best.pt stores these options, and the backbone's: the network can be built again from the file alone.
        self.config = dict(classes=classes, head=head, taps=self.taps, channels=channels, dropout=dropout,
                           frozen=frozen)
        if head == "linear":
            self.decode_head = LinearHead(backbone.width, classes)
        elif isinstance(backbone, Swin):
            widths = [backbone.config["dim"] * 2 ** stage for stage in range(backbone.stages)]
            self.neck = StageNorms(widths, backbone.config["eps"])
            self.decode_head = FPNHead(widths, classes, channels, dropout)
        else:
            if len(self.taps) != 4 or max(self.taps) > backbone.depth:
                raise ValueError(f"--taps wants four of the {backbone.depth} blocks, not {' '.join(map(str, taps))}")
            self.neck = Neck(backbone.width)
            self.decode_head = FPNHead([backbone.width // 4] * 4, classes, channels, dropout)
        halved = backbone.patch_size * (2 ** (backbone.stages - 1) if isinstance(backbone, Swin) else 2)
        size = backbone.config["img_size"]
        if head == "fpn" and any(side % halved for side in size):
            raise ValueError(f"--img-size {size[0]} {size[1]} does not fit: --head fpn needs multiples of {halved}")
        for name, p in backbone.named_parameters():             # no map of the FPN head has been through the last norm
            p.requires_grad_(not frozen and (head == "linear" or not name.startswith(("norm.", "fc_norm."))))

    def train(self, mode=True):
        super().train(mode)
        self.backbone.train(mode and not self.frozen)
        return self

    def logits(self, img):
        """Normalised images (B, C, h, w) of the size of a crop -> logits (B, K, h, w)."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            maps = tapped_maps(self.backbone, img, self.taps) if self.taps else [last_map(self.backbone, img)]
        maps = self.neck(maps) if self.neck else maps           # of strides 4, 8, 16 and 32 for patches of 16
        x = self.decode_head(maps).float()                                                      # (B, K, h / 4, w / 4)
        return F.interpolate(x, img.shape[-2:], mode="bilinear", align_corners=False)

    def forward(self, img, labels):
        """Images (B, C, h, w), classes of their pixels uint8 (B, h, w) -> loss (), share of right pixels ()."""
        logits, labels = self.logits(img), labels.long()
        # As published, the sum over pixels that count is divided by the number of all pixels, ignored ones included.
        loss = F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum") / labels.numel()
        right = (logits.detach().argmax(1) == labels).sum() / (labels != IGNORED).sum().clamp(min=1)
        return loss, right


def parameter_groups(model, weight_decay, layer_decay):
    """AdamW's groups: group["lr_scale"] is the layer decay to the power of the layers above; neck and head have 1.
    Tensors of one dimension have no weight decay. Unlike in fine-tuning, cls and positions have, as published."""
    groups, depth = {}, model.backbone.depth
    for name, p in model.named_parameters():
        if p.requires_grad:
            inner = name.removeprefix("backbone.")
            layer = layer_of(model.backbone, inner) if inner != name else depth + 1
            group = dict(params=[], weight_decay=weight_decay if p.dim() > 1 else 0.0,
                         lr_scale=layer_decay ** (depth + 1 - layer))
            groups.setdefault((layer, p.dim() > 1), group)["params"].append(p)
    return list(groups.values())


def poly(step, steps, warmup, peak):
    """Learning rate of step `step` (from 0): from 1e-6 * peak up over `warmup` steps, then down to 0 in the last."""
    if step < warmup:
        return peak * (1e-6 + (1 - 1e-6) * step / max(warmup - 1, 1))
    return peak * (1 - (step - warmup) / max(steps - 1 - warmup, 1))


def make_backbone(cfg):
    """The ViT or Swin of --init, or of --model with random weights, for images of --img-size."""
    if cfg.init:
        return build_backbone(cfg.init, cfg.heads, cfg.img_size, cfg.drop_path, cfg.relative, cfg.layer_scale)
    shape = dict((SWINS | MODELS)[cfg.model], img_size=cfg.img_size, patch_size=cfg.patch_size, in_chans=cfg.in_chans,
                 drop_path=cfg.drop_path)
    if cfg.model in SWINS:
        return build(shape)
    return build(shape | dict(heads=cfg.heads, positions="learned", relative=cfg.relative, layer_scale=cfg.layer_scale))


# ----------------------------------------------------------------------------------------------------------------
# The run


def resolve(argv=None):
    """Read the command line: what the user gave, else what --init says, else the demo, the recipe, the model."""
    cfg, given = options.read_command_line(Config, __doc__, argv, SMALL)
    known = dict(DEMO) if cfg.demo else {}
    if cfg.eval:                                                # the file says the rest
        return options.check(options.fill(cfg, given, {k: v for k, v in known.items() if k == "data"}), given)
    if cfg.decode != "workers":
        fail("--decode device knows nothing of masks: leave it out")
    if len(cfg.ratios) != 2:
        fail(f"--ratios wants two numbers, the least and the greatest, not {len(cfg.ratios)}")
    if cfg.init:
        decided = given & {"model", "patch_size", "in_chans", "window"}
        if decided:
            fail(f"{options.flag(sorted(decided)[0])} is decided by the file of --init: leave it out")
        file = read(cfg.init)
        shape = encoder_options(file, cfg.heads)
        stored = {name: tuple(file.config[name]) for name in ("mean", "std") if file.config.get(name)}
        known |= dict(stored, model=None, patch_size=shape["patch_size"], in_chans=shape["in_chans"])
    else:
        model = cfg.model or known.get("model", "vit_tiny")
        known = options.model_options(model) | known | dict(model=model)
    if "window" in known or known.get("model") is None and "depths" in shape:
        for name in sorted(given & {"heads", "relative", "layer_scale", "taps"}):
            fail(f"{options.flag(name)} is an option of a ViT, and the network is a Swin: leave it out")
    usual = "ade20k" if options.fill(cfg, given, known).data == "ade20k" else "small"
    recipe = cfg.recipe or ("frozen" if cfg.frozen else usual)
    values = dict(in_chans=3, out="out/segment") | RECIPES[recipe] | known | dict(recipe=recipe)
    cfg = options.fill(cfg, given, values | dict(frozen=recipe == "frozen"))
    if "warmup_steps" not in given:
        cfg = replace(cfg, warmup_steps=min(cfg.warmup_steps, cfg.steps // 10))
    with value_errors_exit():
        return options.check(replace(cfg, img_size=pair(cfg.img_size)), given)


def in_epochs(cfg, images):
    """The config with its steps counted in epochs, which is how a run plans."""
    per_epoch = max(1, images // cfg.batch_size)
    epochs = cfg.steps / per_epoch if cfg.epochs is None else cfg.epochs
    usual = cfg.warmup_steps / per_epoch if cfg.epochs is None else epochs / 10
    if cfg.epochs is None and cfg.warmup_steps >= cfg.steps:
        fail(f"--steps {cfg.steps} must be more than --warmup-steps {cfg.warmup_steps}")
    return replace(cfg, epochs=epochs, warmup_epochs=usual if cfg.warmup_epochs is None else cfg.warmup_epochs)


def evaluate_and_keep_best(run, model, windows, whole, best):
    """Evaluate between two steps, log it, write best.pt, draw a sheet -> counts of pixels. A signal ends the run here:
    last.pt is of this very step, so going on begins with the evaluation. Without val/ there is the sheet alone."""
    cfg, began, found, areas = run.cfg, time.perf_counter(), dict(mIoU=0.0), None
    with run.interruptible():
        if run.val:
            areas = count_pixels(model, run.val, windows, run.device, cfg.workers)
            found = pixel_scores(areas)[2]
        if run.rank == 0:
            draw_segmentations(model, run.val or run.train, windows, run.device, f"{cfg.out}/segments.png")
    if run.rank == 0:
        if (found["mIoU"] > best["value"] or not run.val) and run.folder.write("best.pt", whole):
            best.update(value=found["mIoU"], step=run.done)
        run.log.note(step=run.done, epoch=round(run.done / run.per_epoch, 4), **found)
    if run.val:
        print_rank0(f"step {run.done}: {score_line(found)}; best {best['value']:.2f}")
    run.log.since = run.log.since and run.log.since + time.perf_counter() - began   # it is no part of a training step
    return areas


def evaluate_file(cfg):
    """--eval: scores of a best.pt on a part of a set, and with --predict pictures; without masks these alone."""
    device, file = setup(cfg.device)[2], load_file(cfg.eval)
    if not isinstance(file, dict) or "segment" not in file:
        fail(f"{cfg.eval} holds no segmentation network: a best.pt of dense.segment was expected (--init trains one)")
    facts, shape = file["segment"], {k: v for k, v in file["config"].items() if k not in ("mean", "std")}
    model = Segmenter(build(shape), **facts["network"])
    model.load_state_dict(file["model"])
    source = open_to_predict(cfg.data, cfg.split, cfg.download, facts["names"], facts["colours"])
    look_over(source, shape["in_chans"], cfg.bits, cfg.value_range)
    areas = count_pixels(model.to(device), source, Windows(**facts["windows"]), device, cfg.workers, cfg.predict)
    if areas[2].any():
        print_scores(areas, facts["names"])
    if cfg.predict:
        print_rank0(f"{len(source):,} images: masks/, overlays/ and legend.png are in {cfg.predict}")


def main(argv=None):
    cfg = resolve(argv)
    if cfg.eval:
        return evaluate_file(cfg)
    train, val = train_and_val_pairs(cfg.data, cfg.fraction, cfg.seed, cfg.download, cfg.in_chans, cfg.bits,
                                     cfg.value_range)
    run = Run(in_epochs(cfg, len(train)), "segment")
    run.datasets(opened=(train, val))
    cfg, classes = run.cfg, len(train.classes)
    with value_errors_exit():
        backbone = make_backbone(cfg)
        model = Segmenter(backbone, classes, cfg.head, cfg.taps, cfg.channels, cfg.dropout, cfg.frozen).to(run.device)
    if run.init:
        load_backbone(backbone, run.init, print_rank0)
    optimizer = torch.optim.AdamW(parameter_groups(model, cfg.weight_decay, cfg.layer_decay), fused=True)
    windows, best = make_windows(run.size, cfg.stride, cfg.short_side, run.mean, run.std), dict(value=-1.0, step=0)
    facts = dict(network=model.config, windows=windows._asdict(), names=train.classes, colours=train.colours)
    whole = dict(method="segment", model=model.state_dict(), segment=facts,
                 config=dict(backbone.config, mean=run.mean, std=run.std))
    net = run.start(model, optimizer, dict(model=backbone.state_dict(), config=backbone.config),
                    best=SimpleNamespace(state_dict=best.copy, load_state_dict=best.update))
    outside = torch.tensor([round(255 * m) for m in run.mean], dtype=torch.uint8)       # what is 0 once normalised
    crops = MaskCrops(train, run.size, cfg.in_chans, cfg.seed, cfg.short_side, cfg.ratios, cfg.photometric, outside)

    for step, passes in run.steps(crops):
        if cfg.eval_every and step and step % cfg.eval_every == 0:
            evaluate_and_keep_best(run, model, windows, whole, best)
        run.set_lr(poly(step, run.total, run.warmup, run.peak))
        for img, labels in passes:                              # uint8 crops and the classes of their pixels
            with run.autocast():
                loss, right = net(normalize(img, run.mean, run.std), labels)                    # (), ()
            run.backward(loss, pixel_acc=right)
        run.update(chance=math.log(classes))                    # of a crop without ignored pixels
    areas = evaluate_and_keep_best(run, model, windows, whole, best)
    if val:
        print_scores(areas, train.classes)
    run.finish(f", best.pt (mIoU {best['value']:.2f}, of step {best['step']}), segments.png")


if __name__ == "__main__":
    launch(main)
