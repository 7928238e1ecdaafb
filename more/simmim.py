"""
Masked image modelling on whole inputs: hidden patches become a mask token before the network, and a light head answers
for them. What is asked differs: pixels (SimMIM), oriented gradients (MaskFeat) or visual words (BEiT).
https://arxiv.org/abs/2111.09886, https://arxiv.org/abs/2112.09133, https://arxiv.org/abs/2106.08254

SimMIM:     torchrun --standalone --nproc_per_node=8 -m more.simmim --model swin_lite --data imagenet --out out/simmim
MaskFeat:   torchrun ... -m more.simmim --target hog
BEiT:       torchrun ... -m more.simmim --target tokens --tokenizer tokenizer.pt2     (or words.npy of tools.pack)
A teacher:  torchrun ... -m more.simmim --model swin_lite --distill-teacher simmim_swin_tiny.pth     (D2-SimMIM)
A minute:   python -m more.simmim --demo                                              (also with --target hog)
Preempted:  type the same command again
Expected:   not run yet at full size; docs/methods.md has the last lines of MaskFeat's demo
"""
import math
import os
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from einops import rearrange, reduce
from torch import nn

import weights
from data import CenterCrops, WholeImages
from images.augment import denormalize, normalize, random_flip
from images.datasets import digest_of_names
from images.pictures import save_sheet
from nets.beit import BeitViT
from nets.hog import BINS, hog, strokes
from nets.masked import checkpoint_of, exempt, mean_token, new_head, prepare, read_map, reconstruct, start_as_published
from nets.masks import Masks, to_patches
from nets.swin_distill import DistilledSimMIM, TeacherLogits, check_teacher
from nets.tokens import Words
from runtime.folder import FileOfRun
from runtime.options import ProbeOptions, TrainingOptions, fail, opt, parse, value_errors_exit, vit_config
from runtime.run import DTYPES, Run, decay_groups, launch, print_rank0, warmup_cosine
from vit import MODELS, SWINS, Swin, gather_tokens, patchify


@dataclass
class Config(TrainingOptions, ProbeOptions):
    target: str = opt("pixels", "what is asked of hidden patches", choices=("pixels", "hog", "tokens"))
    tokenizer: str | None = opt(None, "tokens: a program of torch.export, or words.npy as tools.pack makes it with one")
    vocab: int = opt(8192, "tokens: words that the head knows", least=2)
    mask: str | None = opt(None, "what is hidden: any units, or blocks of them", choices=("uniform", "blocks"))
    mask_ratio: float | None = opt(None, "share of the units that are hidden", least=0, most=1)
    mask_unit: int | None = opt(None, "pixels on the side of a unit, which is hidden whole (default: a patch)", least=1)
    min_block: int | None = opt(None, "units of the smallest block (default: a fifth of what is hidden)", least=1)
    head_block: int | None = opt(None, "width of a Swin block of 3 heads before the linear head; 0: none", least=0)
    window: int | None = opt(None, "patches on the side of a Swin's window, if not the model's own", least=1)
    positions: str = opt("learned", "positions of a ViT", choices=("learned", "sincos"))
    layer_scale: float = opt(0.0, "start of the factors on a ViT's branches; 0: none", least=0)
    key_bias: bool = opt(True, "keys of a ViT have a bias")
    drop_path: float = opt(0.0, "rate of stochastic depth at the last block", least=0, most=1)
    schedule: str | None = opt(None, "learning rate after the warm-up", choices=("cosine", "whole_cosine", "steps"))
    milestones: tuple[float, ...] = opt((), "steps: epochs after which the learning rate falls to a tenth", least=0)
    lag: bool = opt(False, "every learning rate comes one step late, as in Microsoft's code")
    warmup_lr: float = opt(0.0, "learning rate that the warm-up starts from", least=0)
    min_lr: float = opt(0.0, "learning rate at the end of a cosine", least=0)
    beta2: float | None = opt(None, "AdamW's second beta", least=0, most=1)
    no_decay: tuple[str, ...] = opt((), "parameters without weight decay, besides biases and those of norms")
    distill_teacher: str | None = opt(None, "file of a Swin that SimMIM has trained, with its mask token (D2-SimMIM)")
    distill: str | None = opt(None, "how (default: decoupled)", choices=("decoupled",), needs="distill_teacher")
    distill_weight: float = opt(1.0, "weight of the teacher, beside the pixels' 1", least=0, needs="distill_teacher")
    picture_every: int = opt(20, "epochs between drawings of recon.png, the last at the end; 0: no picture", least=0)


# What sources state: MAE-Lite's SimMIM for the Swin of 48 channels, Microsoft's for wider ones; MaskFeat and BEiT for
# ViT-Base. Ours: ViT-Tiny has these in MAE-Lite's 400 epochs; all of vit_mini, vit_midi and swin_mini; SimMIM on a ViT;
# a batch of 2048, and BEiT's crops. Its 0.383 of 196 patches are 75.
COMMON = dict(batch_size=2048, interpolation="bicubic", weight_decay=0.05, beta2=0.999, head_block=0)
SIMMIM = dict(COMMON, mask="uniform", mask_ratio=0.6, mask_unit=32, warmup_epochs=10, blr=5e-5, clip_grad=5.0,
              schedule="steps", milestones=(700,), min_crop=0.67)
LITE = dict(SIMMIM, epochs=400, warmup_lr=2e-6, beta2=0.99, head_block=96)
MICROSOFT = dict(SIMMIM, epochs=800, lag=True, no_decay=("mask_token",))
MASKFEAT = dict(COMMON, mask="blocks", mask_ratio=0.4, epochs=300, warmup_epochs=30, blr=2e-4, clip_grad=0.02,
                warmup_lr=1e-6, min_lr=1e-6, schedule="cosine", min_crop=0.5)
BEIT = dict(COMMON, mask="blocks", mask_ratio=0.383, min_block=16, epochs=800, warmup_epochs=10, blr=1.875e-4,
            clip_grad=3.0, min_lr=1e-5, schedule="cosine", min_crop=0.08, drop_path=0.1, layer_scale=0.1,
            key_bias=False, no_decay=("pos_embed", "cls_token"))


def recipes(published, **small):
    """The recipe of each model. small: what is other for images of 32 to 64 pixels."""
    ours = dict(published, epochs=200, schedule="cosine", milestones=(), lag=False, positions="sincos", **small)
    own = dict(vit_tiny=dict(published, epochs=400), vit_mini=ours, vit_midi=ours, swin_mini=dict(ours, mask_unit=16))
    return dict.fromkeys(MODELS, published) | dict.fromkeys(SWINS, dict(published, mask_unit=32)) | own


RECIPES = dict(pixels=recipes(MICROSOFT, mask_unit=8) | dict(swin_lite=LITE), hog=recipes(MASKFEAT),
               tokens=recipes(BEIT, min_block=None))
DEMO = dict(data="shapes", model="vit_mini", img_size=(48,), patch_size=8, mask="uniform", mask_unit=8, min_crop=0.6,
            batch_size=128, epochs=4, warmup_epochs=0.4, blr=4e-3, workers=1, log_every=78, save_every=312)


# ----------------------------------------------------------------------------------------------------------------
# The method


class SimMIM(nn.Module):
    """A network that sees a whole image, hidden patches as mask tokens, and a light head that answers for these.
    encoder: a ViT, BeitViT or Swin. target: "pixels", "hog" or "tokens", of `vocab` words. block: width of a Swin block
    in the head; 0: none. tap: the head reads a Swin's map after this stage (see nets/masked.py; default: the last map).
    most: cells of that map that are hidden in an image at most (default: all). Raises ValueError as `prepare` does."""
    parts, words = {}, None                                     # of the loss, for the log; of BEiT, see nets/tokens.py

    def __init__(self, encoder, target="pixels", vocab=8192, block=0, tap=None, most=None):
        super().__init__()
        self.encoder, self.target, self.tap, c = encoder, target, tap, encoder.config
        self.patches, self.grid, width = prepare(encoder, tap)                                  # (H, W), (h, w)
        self.side = self.patches[0] // self.grid[0]             # patches on the side of a cell, 1 in a ViT
        self.cell, self.most = self.side * encoder.patch_size, most or math.prod(self.grid)     # pixels, K
        # MaskFeat's histograms are of 8 x 8 pixels; where that does not divide a cell, of the largest that does.
        self.hog_cell = max(side for side in range(1, 9) if self.cell % side == 0)
        answers = dict(pixels=c["in_chans"] * self.cell ** 2, tokens=vocab,                     # A, of each cell
                       hog=c["in_chans"] * BINS * (self.cell // self.hog_cell) ** 2)[target]
        self.decoder, self.decoder_pred = new_head(target, width, answers, block, self.grid, c)

    def forward(self, img, mask, asked):
        """Normalised images (B, C, height, width), hidden patches (B, H, W), what `ask` gives -> loss ()."""
        x = self.embed(img, mask)                               # mask tokens in the place of hidden patches
        tokens = read_map(self.encoder, x, img.shape[-2:], self.tap)                            # (B, N, D)
        return self.error(tokens, mask, asked)                  # answers for the hidden patches alone

    def embed(self, img, mask):
        """-> the tokens that the first block sees, (B, N, D), or with cls (B, 1 + N, D)."""
        net, swin = self.encoder, isinstance(self.encoder, Swin)
        x = net.patch_embed(patchify(img, net.patch_size))                                      # (B, N, D)
        x = net.patch_embed.norm(x) if swin else x
        # The token comes after the norm and before the positions: only these tell which patch is hidden.
        x = torch.where(mask.flatten(1).unsqueeze(2), net.mask_token.to(x.dtype), x)            # (B, N, D)
        if swin:                                                # its windows know where a token is
            return x
        cls, pos = net.cls_token + net.pos_embed[:, :1], net.pos_embed[:, 1:]
        return torch.cat([cls.expand(len(x), -1, -1), x + pos], 1)                              # (B, 1 + N, D)

    def ask(self, crops, img, numbers=None):
        """What the head should answer, as a map, from uint8 crops, the same normalised, their numbers in the set."""
        if self.target == "pixels":
            return img                                                                          # (B, C, height, width)
        if self.target == "hog":                                # of 8-bit values, for which every sum is exact
            return hog(crops.float(), self.hog_cell).flatten(1, 2)                              # (B, C * 9, ...)
        return self.words(crops, numbers)                                                       # (B, 1, h, w)

    def answer(self, tokens, cells):
        """Tokens (B, N, D), numbers of cells (B, K) -> the head's answers for these, (B, K, A)."""
        last = self.decoder[0]
        if self.decoder_pred is not None:
            tokens, last = self.decoder[1](self.decoder[0](tokens), self.grid), self.decoder_pred[0]
        return F.linear(gather_tokens(tokens, cells), last.weight.flatten(1), last.bias)        # a 1x1 convolution

    def error(self, tokens, mask, asked):
        """The error of the answers for hidden cells, in fp32 under autocast."""
        hidden = rearrange(mask.float(), "b (h r) (w q) -> b (h w) (r q)", r=self.side, q=self.side)
        # Blocks hide a few cells less in some images. One shape for all: there, visible cells have the weight 0.
        cells = hidden.amax(2).argsort(dim=1, descending=True, stable=True)[:, :self.most]          # (B, K)
        weight = gather_tokens(hidden, cells)                                                   # (B, K, r * r)
        answer = self.answer(tokens, cells).float()                                             # (B, K, A)
        asked = patchify(asked, asked.shape[-1] // self.grid[1], cells)                         # (B, K, A), of words 1
        if self.target == "pixels":                             # SimMIM: |error| of the pixels of hidden patches
            p, C = self.encoder.patch_size, self.encoder.config["in_chans"]
            error = reduce((answer - asked).abs(), "b k (c r p q o) -> b k (r q)", "sum", c=C, r=self.side, p=p, o=p)
            return (error * weight).sum() / (weight.sum() * p * p + 1e-5) / C
        if self.target == "hog":                                # MaskFeat: squared error
            error = (answer - asked).square().mean(2)                                           # (B, K)
        else:                                                   # BEiT: which of the words is it?
            error = F.cross_entropy(answer.flatten(0, 1), asked.flatten(), reduction="none").view(cells.shape)
        weight = weight.amax(2)                                                                 # (B, K)
        return (error * weight).sum() / weight.sum()

    def metrics(self, asked):
        """For the log: the loss of one answer for all: the mean colour, each bin's mean, any word."""
        if self.target == "tokens":
            with value_errors_exit():                           # not at each step, for which a GPU would have to wait
                self.words.check()
            return dict(chance=math.log(self.words.vocab))
        return dict(chance=asked.abs().mean() if self.target == "pixels" else asked.var((0, 2, 3)).mean())


def draw(model, masks, source, mean, std, path, count=8):
    """Save a sheet with a row for each of `count` images, always the same: image, what is seen of it, the answers."""
    c, device = model.encoder.config, model.encoder.mask_token.device
    chosen = torch.randperm(len(source), generator=torch.Generator().manual_seed(0))[:count]
    crops = CenterCrops(source, c["img_size"], c["in_chans"]).__getitems__(chosen.tolist())[0].to(device)
    img, mask = normalize(crops, mean, std), masks.draw(len(crops), torch.Generator().manual_seed(0)).to(device)
    hidden = to_patches(mask, c["patch_size"]).unsqueeze(1)                                     # (B, 1, height, width)
    columns = {"image": img, "visible": img * ~hidden}          # a normalised 0 is the mean colour
    if model.target == "pixels":
        columns["completed"] = torch.where(hidden, reconstruct(model, img, mask), img)
    columns = {title: denormalize(x, mean, std) for title, x in columns.items()}
    if model.target == "hog":                                   # words cannot be drawn
        for title, x in (("asked", model.ask(crops, img)), ("answered", reconstruct(model, img, mask))):
            columns[title] = strokes(x.unflatten(1, (-1, BINS)), model.hog_cell)
    return save_sheet(columns, "", path)


# ----------------------------------------------------------------------------------------------------------------
# The run


def rate_at(schedule, step, steps, warmup, peak, floor=0.0, start=0.0, milestones=(), lag=False):
    """Learning rate of a step: see the options of these names; milestones are steps."""
    step = max(step - lag, 0)
    if schedule == "steps" and step >= warmup:
        return peak * 0.1 ** sum(step >= milestone for milestone in milestones)
    whole = schedule == "whole_cosine" and step >= warmup
    return warmup_cosine(step, steps, 0 if whole else warmup, peak, floor, start)


def resolve(argv=None):
    """Read the command line: what is asked decides which recipes there are."""
    target = parse(Config, "simmim", __doc__, RECIPES["pixels"], DEMO, argv).target
    cfg = parse(Config, "simmim", __doc__, RECIPES[target], DEMO, argv)
    if (target == "tokens") != bool(cfg.tokenizer):
        fail("--target tokens and --tokenizer FILE go together: the file has the words, or is what makes them")
    if cfg.heads and cfg.model in SWINS or cfg.window and cfg.model in MODELS:
        fail(f"--heads is an option of a ViT and --window of a Swin, and --model is {cfg.model}: leave it out")
    if cfg.distill_teacher and (cfg.model not in SWINS or target != "pixels"):
        fail("--distill-teacher is for a Swin and --target pixels (D2-SimMIM); mae.py distils ViTs")
    return replace(cfg, mask_unit=cfg.mask_unit or cfg.patch_size)


def make_encoder(cfg):
    """The network of a config, or ValueError for sizes that do not fit."""
    if cfg.model in MODELS:
        return start_as_published(BeitViT(**vit_config(cfg), positions=cfg.positions, layer_scale=cfg.layer_scale,
                                          key_bias=cfg.key_bias, drop_path=cfg.drop_path), cfg.target)
    return Swin(**dict(SWINS[cfg.model], window=cfg.window, img_size=cfg.img_size, patch_size=cfg.patch_size,
                       in_chans=cfg.in_chans, drop_path=cfg.drop_path,
                       mlp_ratio=weights.init_mlp_ratio(cfg) if cfg.init else 4.0))


def add_teacher(cfg, model, run):
    """The model with --distill-teacher beside it (D2-SimMIM)."""
    file, student = weights.read(cfg.distill_teacher), dict(model.encoder.config, mean=run.mean, std=run.std)
    if not weights.is_swin(file) or "mask_token" not in file.state:
        fail(f"{file.path} is no Swin with a mask token: give the last.pt or the official file of a SimMIM")
    options = weights.swin_options(file)
    with value_errors_exit():
        check_teacher(file.path, {**file.config, **options}, student)
        teacher = SimMIM(Swin(**{**options, "img_size": student["img_size"]}))
    weights.load_into(teacher.encoder, file, print_rank0)
    return DistilledSimMIM(model, TeacherLogits(teacher, run.device, DTYPES[run.cfg.dtype]), cfg.distill_weight)


def open_words(cfg, model, train, run):
    """Give the model its tokenizer -> what it is asked of: random crops, or whole images whose words are known."""
    whole = WholeImages(train, run.size, cfg.in_chans)
    with value_errors_exit():
        model.words = Words(cfg.tokenizer, model.grid, cfg.vocab, len(train), digest_of_names(train), run.device)
        img, numbers, _ = whole.__getitems__([(0, i) for i in range(min(8, len(train)))])
        model.words(img.to(run.device), numbers.to(run.device))
        model.words.check()
    return run.random_crops() if model.words.program else whole


def main(argv=None):
    cfg = resolve(argv)
    run = Run(cfg, "simmim")
    train, val = run.datasets()
    with value_errors_exit():
        encoder = make_encoder(cfg)
        if run.init:                                            # a new run, and --init was given
            weights.load_into(encoder, weights.read(run.init), print_rank0)
        model = SimMIM(encoder, cfg.target, cfg.vocab, cfg.head_block, tap=1 if cfg.distill_teacher else None)
        masks = Masks(cfg.mask, model.patches, cfg.patch_size, cfg.mask_unit, cfg.mask_ratio, cfg.min_block, model.cell)
    model.most = masks.cells
    crops = open_words(cfg, model, train, run) if cfg.tokenizer else run.random_crops()
    trained = (add_teacher(cfg, model, run) if cfg.distill_teacher else model).to(run.device)
    groups = exempt(decay_groups(trained, cfg.weight_decay), trained, cfg.no_decay)
    optimizer = torch.optim.AdamW(groups, betas=(0.9, cfg.beta2), fused=True)
    files = dict(teacher=cfg.distill_teacher, tokenizer=cfg.tokenizer)
    net = run.start(trained, optimizer, checkpoint_of(encoder, model.tap), partial(mean_token, encoder, tap=model.tap),
                    **{name: FileOfRun(path) for name, path in files.items() if path})
    picture = partial(draw, model, masks, val or train, run.mean, run.std, os.path.join(cfg.out, "recon.png"))
    milestones = [epoch * run.per_epoch for epoch in cfg.milestones]

    for step, passes in run.steps(crops):
        run.set_lr(rate_at(cfg.schedule, step, run.total, run.warmup, run.peak, cfg.min_lr, cfg.warmup_lr, milestones,
                           cfg.lag))
        for crop, numbers in passes:                            # uint8 crops on the device
            crop = random_flip(crop, 0.5 if crops.draws else 0.0)           # a file's words are of images as they are
            img = normalize(crop, run.mean, run.std)                                            # (B, C, height, width)
            asked = model.ask(crop, img, numbers)                                               # a map of (h, w) cells
            mask = masks.draw(len(img)).to(run.device, non_blocking=True)                       # (B, H, W)
            with run.autocast():
                loss = net(img, mask, asked)                                                    # ()
            run.backward(loss, **trained.parts)
        run.update(metrics=partial(trained.metrics, asked))
        if run.rank == 0 and run.due(cfg.picture_every, step + 1) and step + 1 < run.total:
            picture()
    if run.rank == 0 and cfg.picture_every:
        picture()
    run.finish(", recon.png" if cfg.picture_every else "")


if __name__ == "__main__":
    launch(main)
