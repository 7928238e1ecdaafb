"""
Masked autoencoder pre-training: hide 75% of the patches, encode the rest, predict the hidden pixels.
https://arxiv.org/abs/2111.06377, for lightweight networks https://arxiv.org/abs/2205.14443

One node:   torchrun --standalone --nproc_per_node=8 mae.py --data imagenet --out out/mae
One GPU:    python mae.py --data imagenet --out out/mae --accum 8
To try it:  python mae.py --demo
A teacher:  torchrun ... mae.py --distill-teacher mae_pretrain_vit_base.pth (D-MAE; --distill decoupled: D2-MAE)
Pictures:   python mae.py --visualize out/mae/last.pt --images some/folder
Preempted:  type the same command again
Expected:   not run yet at full size; the demo's last lines are in the README
"""
import os
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from PIL import Image, ImageDraw
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP

import training
from augment import denormalize, normalize, random_flip, statistics
from data import CROPS, CenterCrops, stream
from distill import TEACHER, Lesson, Teacher, before, decouple, features, guess, released, rows, start_from
from probe import probe
from sources import describe, find, parts, same_classes
from training import Plumbing, opt
from vit import MODELS, Block, ViT, cut, pair, pick, sincos_positions
from weights import load_into, read, shape_of


@dataclass
class Config(Plumbing):
    data: str = opt("imagenet", "folder or tar (imagenet: ./imagenet or $IMAGENET), torchvision set by name, or shapes")
    fraction: float = opt(1.0, "share of the training images used, the same of each class, chosen by the seed")
    model: str = opt("vit_tiny", f"encoder: {', '.join(MODELS)}")
    heads: int | None = opt(None, "attention heads of the encoder, if not the model's own", 1)
    img_size: tuple[int, ...] = opt((224,), "pixels: one number, or height and width", 1)
    patch_size: int | None = opt(None, "pixels on a patch's side, if not the model's own", 1)
    in_chans: int = opt(3, "image channels: 1 grey, 3 colour, 4 colour and alpha")
    mean: tuple[float, ...] | None = opt(None, "channel means in 0..1 (default: ImageNet's; 0.5 if not 3 channels)")
    std: tuple[float, ...] | None = opt(None, "channel deviations in 0..1 (default: ImageNet's, or 0.25)")
    mask_ratio: float = opt(0.75, "fraction of the patches hidden from the encoder", 0)
    norm_pix: bool = opt(True, "predict each patch's pixels less their mean, over their deviation; else plain pixels")
    decoder_dim: int | None = opt(None, "width of the decoder (default: the model's recipe)", 1)
    decoder_depth: int | None = opt(None, "blocks of the decoder (default: the model's recipe)", 1)
    decoder_heads: int | None = opt(None, "attention heads of the decoder (default: the model's recipe)", 1)
    min_crop: float | None = opt(None, "smallest area of a random crop, fraction of the image (default: the recipe)", 0)
    interpolation: str | None = opt(None, "resizing: bicubic, bilinear, or random: one of both (default: the recipe)")
    repeat: int = opt(1, "crops of each decoded image in a batch, which then has batch / repeat different images", 1)
    batch_size: int = opt(4096, "crops per optimizer step, over all processes and accumulation", 1)
    accum: int = opt(1, "forward-backward passes per optimizer step, each on a part of the batch", 1)
    epochs: float | None = opt(None, "passes over the training set (default: the recipe)", 0)
    warmup_epochs: float | None = opt(None, "epochs of linear warm-up (default: the recipe, at most epochs / 10)", 0)
    blr: float = opt(1.5e-4, "peak learning rate per 256 images of the batch", 0)
    lr: float | None = opt(None, "peak learning rate itself, instead of blr", 0)
    weight_decay: float = opt(0.05, "AdamW's weight decay; none on biases and 1-D parameters", 0)
    distill_teacher: str | None = opt(None, "file of a ViT that the student also learns from (D-MAE); any layout")
    teacher_heads: int | None = opt(None, "attention heads of the teacher, where its file does not say", 1)
    distill: str | None = opt(None, "attention, hidden (states) or decoupled (D2-MAE) (default: attention)")
    distill_layers: tuple[str, ...] | None = opt(None, "STUDENT:TEACHER layers, as 12:24 (default: the last of both)")
    distill_weight: float = opt(1.0, "weight of each distilled layer's error, beside the pixels' 1", 0)
    distill_tap: int | None = opt(None, "decoupled: blocks below the pixel decoder (default: two thirds, 8 of 12)", 1)
    clip_grad: float | None = opt(None, "largest gradient norm (default: no clipping)", 0)
    init: str | None = opt(None, "checkpoint whose weights a new run starts from")
    probe_every: int = opt(0, "epochs between k-NN and linear probes, where the data has labels and val/; 0: none", 0)
    picture_every: int = opt(20, "epochs between recon.png; one is always drawn at the end", 0)
    visualize: str | None = opt(None, "draw recon.png for this checkpoint (with a decoder) and leave")
    images: str | None = opt(None, "folder of images to draw, with --visualize")


# MAE-Lite's recipe for Tiny and Small, the official one for the rest. vit_mini and vit_midi are ours, for 32 to 64
# pixels.
LITE = dict(epochs=400, warmup_epochs=40, min_crop=0.08, interpolation="random")
OFFICIAL = dict(epochs=800, warmup_epochs=40, min_crop=0.2, interpolation="bicubic",
                decoder_dim=512, decoder_depth=8, decoder_heads=16)
RECIPES = {
    "vit_mini": dict(OFFICIAL, epochs=200, warmup_epochs=20, decoder_dim=64, decoder_depth=1, decoder_heads=4),
    "vit_midi": dict(OFFICIAL, epochs=200, warmup_epochs=20, decoder_dim=64, decoder_depth=1, decoder_heads=4),
    "vit_tiny": dict(LITE, decoder_dim=96, decoder_depth=1, decoder_heads=3),
    "vit_small": dict(LITE, decoder_dim=192, decoder_depth=1, decoder_heads=6),
    "vit_base": OFFICIAL, "vit_large": OFFICIAL, "vit_huge": OFFICIAL,
}
DEMO = dict(data="shapes", model="vit_mini", img_size=(48,), patch_size=8, mask_ratio=0.6, min_crop=0.6, batch_size=128,
            epochs=6, warmup_epochs=1, blr=4e-3, workers=1, log_every=78, save_every=312)


# ----------------------------------------------------------------------------------------------------------------
# The method


def patchify(img, p):
    """(B, C, h*p, w*p) -> (B, h*w, p*p*C): reading order; in a patch rows, columns, channels, as official files."""
    return rearrange(img, "b c (h p) (w q) -> b (h w) (p q c)", p=p, q=p)


def unpatchify(patches, p, height, width):
    """The inverse of patchify: (B, h*w, p*p*C) -> (B, C, height, width)."""
    return rearrange(patches, "b (h w) (p q c) -> b c (h p) (w q)", p=p, q=p, h=height // p, w=width // p)


class MAE(ViT):
    """An encoder that sees a quarter of the patches and a light decoder that draws the rest (MAE, section 3).

    vit: a ViT with readout "cls"; it hands over its parts, under their own names, so that the state dict is the
    published one. norm_pix: targets are standardised patch by patch, with the unbiased variance + 1e-6 over all p*p*C
    values. tap: the decoder reads the tokens after this many blocks (default: all).
    """

    def __init__(self, vit, decoder_dim=96, decoder_depth=1, decoder_heads=3, norm_pix=True, mask_ratio=0.75, tap=None):
        nn.Module.__init__(self)                                # not ViT's: the encoder is already built
        for name, part in (*vit.named_parameters(recurse=False), *vit.named_children()):
            setattr(self, name, part)
        self.config, self.grid, self.patch_size = vit.config, vit.grid, vit.patch_size
        self.resize_offset, self.readout, self.norm_pix, self.tap = vit.resize_offset, vit.readout, norm_pix, tap
        self.patches = self.grid[0] * self.grid[1]
        self.visible = int(self.patches * (1 - mask_ratio))     # a float product cut off: 196 at 0.9 leaves 19
        if not 0 < self.visible < self.patches:
            raise ValueError(f"--mask-ratio {mask_ratio} leaves {self.visible} of {self.patches} patches visible")

        self.mask_token = nn.Parameter(torch.empty(1, 1, decoder_dim))
        self.decoder_pos_embed = nn.Parameter(sincos_positions(decoder_dim, *self.grid), requires_grad=False)
        self.decoder_embed = nn.Linear(vit.config["dim"], decoder_dim)
        self.decoder_blocks = nn.ModuleList([Block(decoder_dim, decoder_heads) for _ in range(decoder_depth)])
        self.decoder_norm = nn.LayerNorm(decoder_dim, eps=1e-6)
        self.decoder_pred = nn.Linear(decoder_dim, self.patch_size ** 2 * vit.config["in_chans"])

        # Xavier over the stacked qkv matrix and the patch projection as a matrix, whose bias keeps torch's own start.
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.patch_embed.proj.weight.data.flatten(1))
        nn.init.normal_(self.cls_token, std=0.02)
        nn.init.normal_(self.mask_token, std=0.02)

    def forward(self, img, noise=None, mask=None):
        """Normalised images (B, C, h, w) -> the mean squared error over hidden patches, fp32 under autocast."""
        order, visible = self.shuffle(img, noise, mask)
        latent, _ = self.run_blocks(self.embed(img, order[:, :visible]), tap=self.tap)          # (B, 1 + V, D)
        return self.pixel_error(img, latent, order)

    def pixel_error(self, img, latent, order):
        """What forward returns, from the encoder's output for the first patches of `order`."""
        visible = latent.shape[1] - 1
        x = self.decode(latent, order)                                                          # (B, N - V, E)
        # Published files predict rows, columns, channels. The error does not care about the order inside a patch, and
        # channels first is how an image lies in memory: there it is cut without being copied as a whole.
        weight, bias = (rearrange(t, "(n c) ... -> (c n) ...", c=img.shape[1])
                        for t in (self.decoder_pred.weight, self.decoder_pred.bias))
        target = self.target(cut(img, self.patch_size, order[:, visible:]))                     # (B, N - V, C*p*p)
        return F.mse_loss(F.linear(x, weight, bias), target)

    def shuffle(self, img, noise=None, mask=None):
        """A permutation of the patches per image, (B, N), visible ones first, and how many are visible.

        noise (B, N): visible are those with the smallest values, in that order; drawn here if not given. mask (B, N) or
        (B, h, w), true or 1 = hidden, the same number in every image (ValueError): both parts in reading order.
        """
        if self.grid_of(*img.shape[-2:]) != self.grid:
            raise ValueError(f"an MAE of {self.grid} patches cannot take images of {tuple(img.shape[-2:])} pixels")
        if mask is not None:
            mask = mask.flatten(1).to(img.device).bool()
            counts = (~mask).sum(1)
            if mask.shape[1] != self.patches or len(set(counts.tolist())) > 1 or counts[0] in (0, self.patches):
                raise ValueError(f"a mask needs {self.patches} patches per image and the same number hidden in each")
            return mask.byte().argsort(dim=1, stable=True), int(counts[0])
        if noise is None:
            # fp32 also under autocast: 196 draws of bf16 noise have ties, and ties bias argsort.
            noise = torch.rand(len(img), self.patches, device=img.device)
        return noise.argsort(1), self.visible

    def decode(self, latent, order, everything=False):
        """latent (B, 1 + V, D) -> normed decoder tokens of the hidden patches in the order of `order`, (B, N - V, E).

        The official decoder puts the tokens back in reading order first. Attention does not care about order, only
        positions do: leaving the hidden ones last makes them a slice, and the last block and the prediction run on that
        slice alone. everything: all N patches, in the order of `order`, as pictures want.
        """
        x, tokens = self.decoder_embed(latent), latent.shape[1]
        x = torch.cat([x, self.mask_token.expand(len(x), 1 + self.patches - tokens, -1)], 1)
        pos = self.decoder_pos_embed
        x = x + torch.cat([pos[:, :1].expand(len(x), -1, -1), pick(pos[:, 1:], order)], 1)      # (B, 1 + N, E)
        for block in self.decoder_blocks[:-1]:
            x = block(x)
        return self.decoder_norm(self.decoder_blocks[-1](x, first=1 if everything else tokens))

    def target(self, patches):
        """(B, n, p*p*C) pixels, in any order within a patch -> what the decoder should say."""
        if not self.norm_pix:
            return patches
        # (t - mean) / sqrt(var + 1e-6) with the unbiased variance is a layer norm up to a constant: one pass over the
        # pixels.
        n = patches.shape[-1]
        shrink = (n - 1) / n
        return F.layer_norm(patches, (n,), eps=1e-6 * shrink) * shrink ** 0.5

    @torch.no_grad()
    def reconstruct(self, img, noise=None, mask=None):
        """Everything by its published name, for all patches in reading order: dict of loss, latent (B, 1 + V, D), pred
        (B, N, p*p*C), mask (B, N; 1 = hidden) and ids_restore (B, N), the inverse of the shuffle."""
        order, visible = self.shuffle(img, noise, mask)
        latent, restore = self.run_blocks(self.embed(img, order[:, :visible]), tap=self.tap)[0], order.argsort(1)
        pred = self.decoder_pred(self.decode(latent, order, everything=True))
        pred, hidden = pick(pred, restore).to(img.dtype), (restore >= visible).to(img.dtype)
        error = (pred - self.target(patchify(img, self.patch_size))).square().mean(-1)
        loss = (error * hidden).sum() / hidden.sum()
        return dict(loss=loss, latent=latent, pred=pred, mask=hidden, ids_restore=restore)

    def encoder_state(self):
        """What downstream scripts read: the encoder under its published names, without decoder and mask token."""
        return {k: v for k, v in self.state_dict().items() if not k.startswith(("decoder_", "mask_token"))}


class Distilled(nn.Module):
    """A student that draws the hidden patches and attends to the visible ones as its teacher does (D-MAE, D2-MAE)."""

    def __init__(self, model, lesson):
        super().__init__()
        self.model, self.lesson = model, lesson

    def forward(self, img, order, taught):
        """Images (B, C, h, w), their patches' order (B, N) as shuffle gives it, the teacher's signals of the first, the
        visible ones -> (1 + P,) fp32: the pixels' error, then that of each pair of layers."""
        model, lesson = self.model, self.lesson
        x = model.embed(img, order[:, :model.visible])
        latent, ours = model.run_blocks(x, lesson.attention, lesson.hidden, model.tap)
        return torch.cat([model.pixel_error(img, latent, order).view(1), lesson(ours, taught)])


# ----------------------------------------------------------------------------------------------------------------
# Pictures


def draw(model, img, mean, std, folder):
    """Save recon.png, a row per image: original, masked, prediction, and prediction pasted among the visible patches.

    Standardised predictions are drawn with the mean and deviation of the true patch, which borrows both from what was
    hidden: the sheet says so. Visible patches carry no loss, so their predictions may look worse than the hidden ones'.
    """
    noise = torch.rand(len(img), model.patches, generator=torch.Generator().manual_seed(0)).to(img.device)
    found, patches = model.reconstruct(img, noise), patchify(img, model.patch_size)
    pred, hidden = found["pred"], found["mask"].unsqueeze(-1)
    if model.norm_pix:
        var, mu = torch.var_mean(patches, -1, keepdim=True)
        pred = pred * (var + 1e-6).sqrt() + mu
    masked = patches * (1 - hidden)                             # a normalised 0 is the mean colour
    zoom = max(1, round(112 / max(img.shape[-2:])))
    columns = []
    for tokens in (patches, masked, pred, masked + pred * hidden):
        column = denormalize(unpatchify(tokens, model.patch_size, *img.shape[-2:]), mean, std).cpu()
        column = column[:, :3] if column.shape[1] > 2 else column[:, :1].expand(-1, 3, -1, -1)
        columns.append(F.pad(repeat(column, "b c h w -> b c (h y) (w x)", y=zoom, x=zoom), (4, 4, 4, 4), value=255))
    sheet = Image.fromarray(rearrange(columns, "k b c h w -> (b h) (k w) c").numpy())
    page = Image.new("RGB", (sheet.width, sheet.height + 36), "white")
    page.paste(sheet, (0, 18))
    pen = ImageDraw.Draw(page)
    for k, title in enumerate(("original", "masked", "prediction", "pasted")):
        pen.text((k * sheet.width // 4 + 6, 3), title, fill="black")
    note = "predictions borrow the hidden patches' mean and deviation" if model.norm_pix else "predictions are pixels"
    pen.text((6, page.height - 15), note, fill="black")
    path = os.path.join(folder, "recon.png")
    try:
        page.save(path + ".tmp", format="PNG")
        os.replace(path + ".tmp", path)
    except OSError as error:
        print(f"warning: {path} could not be drawn: {error}", flush=True)
    return path


def sample(source, cfg, count=8):
    """Evaluation crops of `count` random images of a source, always the same ones, uint8 (count, C, h, w)."""
    crops = CenterCrops(source, pair(cfg.img_size), cfg.in_chans)
    chosen = torch.randperm(len(source), generator=torch.Generator().manual_seed(0))[:count]
    imgs, _, failed = crops.__getitems__(chosen.tolist())
    for name in failed:
        print(f"warning: {name} cannot be read; another image is drawn in its place", flush=True)
    return imgs


def visualize(cfg, given):
    """--visualize CHECKPOINT --images DIR: the sheet for any MAE checkpoint with a decoder, official ones included."""
    file = read(cfg.visualize)
    if "decoder_pred.weight" not in file.state:
        training.die(f"{cfg.visualize} has no decoder to draw with: use last.pt, or an official mae_visualize file")
    width, shape = len(file.state["decoder_embed.weight"]), shape_of(file, cfg.heads if "heads" in given else None)
    told = {**file.config, **{k: getattr(cfg, k) for k in given}}       # the command line wins over what is stored
    norm_pix = told.get("norm_pix", told.get("norm_pix_loss"))
    heads = told.get("decoder_heads") or {96: 3, 192: 6, 512: 16}.get(width)
    if not heads:
        training.die(f"{cfg.visualize} does not say how many heads its decoder has: give --decoder-heads")
    if norm_pix is None:
        print("what it predicts is not stored: drawn as standardised patches (mae_visualize files want --no-norm-pix)")
    cfg = replace(cfg, img_size=told["img_size"] if "img_size" in given else shape["img_size"], decoder_dim=width,
                  in_chans=shape["in_chans"], norm_pix=norm_pix is not False, decoder_heads=heads,
                  decoder_depth=len({k.split(".")[1] for k in file.state if k.startswith("decoder_blocks.")}),
                  mask_ratio=told.get("mask_ratio", cfg.mask_ratio), out=cfg.out if "out" in given else "out/visualize")
    if f"blocks.{shape['depth'] - 1}.mlp.fc1.weight" not in file.state:         # D2-MAE's reduced block
        shape, cfg = {**shape, "depth": shape["depth"] - 1}, replace(cfg, distill="decoupled",
                                                                     distill_tap=told.get("distill_tap", 8))
    model, (mean, std) = build(cfg, shape), stats(cfg, told.get("mean"), told.get("std"))
    load_into(model, file)
    os.makedirs(cfg.out, exist_ok=True)
    source = cfg.images or told.get("data") or cfg.data
    images = find(source, "val") or find(source)
    print(f"drew {draw(model, normalize(sample(images, cfg), mean, std), mean, std, cfg.out)}")


# ----------------------------------------------------------------------------------------------------------------
# The run


def resolve(cfg, given):
    """Fill what the command line left open: from the demo, if it is one, then from the model's recipe."""
    demo = DEMO if cfg.demo else {}
    cfg = training.fill(cfg, given, demo)
    if cfg.model not in MODELS:
        training.die(f"--model {cfg.model} is not one of {', '.join(MODELS)}")
    recipe = {**{k: MODELS[cfg.model][k] for k in ("heads", "patch_size")}, **RECIPES[cfg.model],
              "out": "out/mae-demo" if cfg.demo else "out/mae"}
    cfg = training.fill(cfg, given | set(demo), recipe)
    if "warmup_epochs" not in given:                            # a run shorter than its recipe warms up for less
        cfg = replace(cfg, warmup_epochs=min(cfg.warmup_epochs, cfg.epochs / 10))
    if cfg.in_chans not in (1, 3, 4):
        training.die(f"--in-chans is 1, 3 or 4, not {cfg.in_chans}")
    if cfg.interpolation not in ("bicubic", "bilinear", "random"):
        training.die(f"--interpolation is bicubic, bilinear or random, not {cfg.interpolation}")
    if cfg.decode not in CROPS:
        training.die(f"--decode is {' or '.join(CROPS)}, not {cfg.decode}")
    if cfg.min_crop > 1 or cfg.mask_ratio >= 1:
        training.die(f"--min-crop and --mask-ratio are fractions, not {cfg.min_crop:g} and {cfg.mask_ratio:g}")
    if cfg.distill_teacher and not cfg.distill:
        cfg = replace(cfg, distill="attention")
    if cfg.distill not in (None, "attention", "hidden", "decoupled"):
        training.die(f"--distill is attention, hidden or decoupled, not {cfg.distill}")
    alone = [k for k in ("distill", "distill_layers", "distill_weight", "distill_tap", "teacher_heads") if k in given]
    if alone and not cfg.distill_teacher and not cfg.demo:
        training.die(f"--{alone[0].replace('_', '-')} needs a teacher: give --distill-teacher FILE")
    if cfg.distill_tap and cfg.distill != "decoupled" or (cfg.distill_tap or 0) > MODELS[cfg.model]["depth"]:
        training.die(f"--distill-tap goes with --distill decoupled and is at most {MODELS[cfg.model]['depth']} here")
    if cfg.distill == "decoupled" and not cfg.distill_tap:      # 8 of 12, as published
        cfg = replace(cfg, distill_tap=round(MODELS[cfg.model]["depth"] * 2 / 3))
    if cfg.images and not cfg.visualize:
        training.die("--images goes with --visualize; the folder to train on is --data")
    return replace(cfg, data=os.path.normpath(cfg.data))       # a slash at its end makes no other data of it


def build(cfg, shape):
    """The MAE of a config and the encoder's shape; a decoupled student has one reduced block more."""
    more = int(cfg.distill == "decoupled")
    with training.in_words():
        vit = ViT(**{**shape, "depth": shape["depth"] + more, "img_size": pair(cfg.img_size), "in_chans": cfg.in_chans})
        model = MAE(vit, cfg.decoder_dim, cfg.decoder_depth, cfg.decoder_heads, cfg.norm_pix, cfg.mask_ratio,
                    cfg.distill_tap)
    if more:
        decouple(model)
    return model


def with_teacher(cfg, model, mean, std, device, say):
    """-> what is trained, the teacher or None, and the weights of the errors that the former returns."""
    if not cfg.distill_teacher:
        return model, None, torch.ones((), device=device)
    kind = "hidden" if cfg.distill == "hidden" else "attention"
    teacher = Teacher(cfg.distill_teacher, cfg.teacher_heads, kind, cfg.distill_layers, model.config, mean, std, device,
                      training.DTYPES[cfg.dtype], say)
    lesson = Lesson(model.config, teacher.shape, teacher.pairs).to(device)
    weights = [1.0] + [cfg.distill_weight] * len(lesson.adapters)
    return Distilled(model, lesson), teacher, torch.tensor(weights, device=device)


def told(model, errors, weights, img, taught=()):
    """What the log says of a step's errors: the loss, what it would be for a guess (0 for pixels, their mean for the
    teacher's signals), and with a teacher its parts."""
    chance = model.target(cut(img[:64], model.patch_size)).square().mean()
    if not taught:
        return dict(loss=errors, chance=chance)
    pixels, taught_chance = errors[0], guess(taught)
    return dict(loss=(errors * weights).sum(), chance=chance + weights[1] * taught_chance, pixels=pixels,
                taught=errors[1:].sum(), taught_chance=taught_chance)


def stats(cfg, mean, std):
    with training.in_words():
        return statistics(cfg.in_chans, mean, std)


def banner(cfg, model, steps, peak, start, world, device):
    """What is about to happen, with every value that a recipe filled in."""
    size, share = sum(p.numel() for p in model.parameters()) / 1e6, cfg.batch_size // world // cfg.accum
    return (f"{cfg.model}: {size:.2f} M parameters, {cfg.heads} heads, decoder {cfg.decoder_dim} wide, "
            f"{cfg.decoder_depth} deep, {cfg.decoder_heads} heads; {model.visible} of {model.patches} patches visible\n"
            f"crops from {cfg.min_crop:g} of an image, {cfg.interpolation}; batch {cfg.batch_size} = {world} processes "
            f"x {cfg.accum} passes x {share} images; {cfg.dtype} on {device}\n"
            f"{cfg.epochs:g} epochs of {steps.per_epoch} steps, {start} of {steps.total} done, {steps.warmup} of them "
            f"warm-up, peak learning rate {peak:.3g}" +
            "\nexpected of the demo: loss 0.39 (chance 0.99), k-NN from 13 to 22%, linear from 29 to 42%" *
            (cfg.demo and all(getattr(cfg, k) == v for k, v in DEMO.items())))


def pretrain(cfg):
    rank, world, device = training.setup(cfg.device)
    cfg, say = replace(cfg, dtype=training.precision(cfg.dtype, device)), print if rank == 0 else str
    train, val = parts(cfg.data, cfg.fraction, cfg.seed, cfg.download)
    probing = cfg.probe_every or cfg.demo and cfg.data == "shapes"
    if probing and not same_classes(train, val):
        training.die("--probe-every needs the same classes in train/ and in val/")
    steps, peak = training.plan(cfg, len(train), world, cfg.repeat)

    torch.manual_seed(cfg.seed)                                 # on every rank: all start from the same weights
    student = build(cfg, {**MODELS[cfg.model], "patch_size": cfg.patch_size, "heads": cfg.heads}).to(device)
    size, (mean, std) = pair(cfg.img_size), stats(cfg, cfg.mean, cfg.std)
    model, teacher, weights = with_teacher(cfg, student, mean, std, device, say)
    optimizer = torch.optim.AdamW(training.decay_groups(model, cfg.weight_decay), peak, betas=(0.9, 0.95), fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=cfg.dtype == "fp16")
    learned = dict(model=model, optimizer=optimizer, scaler=scaler)
    run = training.Run(cfg, "mae", rank, world, len(train), **({"teacher": teacher} if teacher else {}), **learned)
    if cfg.init and not run.step:
        start_from(student, cfg.init, say)
    training.compile_if(cfg, device, model, *([teacher] if teacher else []))
    net = DDP(model, device_ids=[device.index] if device.type == "cuda" else None) if world > 1 else model
    log = training.Log(cfg, rank, device, run.step, steps, images=len(train), world=world)
    health = training.Health(cfg, device, world, log)
    say(f"{describe(train)}\n{banner(cfg, student, steps, peak, run.step, world, device)}")
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
            noise = torch.rand(len(img), student.patches, device=device)                        # (b, N)
            order, visible = student.shuffle(img, noise)
            signals = [teacher(img, order[:, :visible])] if teacher else []
            with training.sync_if(micro + 1 == cfg.accum, net), training.autocast(device, cfg.dtype):
                errors = net(img, order if teacher else noise, *signals) / cfg.accum            # (), or (1 + P,)
                loss = (errors * weights).sum()
            scaler.scale(loss).backward()
            total, unreadable = total + errors.detach(), unreadable + failed
        grad_norm, skipped = training.finite_step(optimizer, scaler, cfg.clip_grad)
        done = step + 1
        why = health(skipped, unreadable, cfg.batch_size // world)

        if done % cfg.log_every == 0 or done == steps.total or why:
            log(done, **told(student, training.mean_over_ranks(total), weights, img, *signals), lr=lr,
                grad_norm=grad_norm, skipped=health.skipped)
        keep, must = steps.due(done, cfg.keep_every), why or done == steps.total
        if why != "non-finite" and (must or keep or done % cfg.save_every == 0):
            state, config = released(student.encoder_state(), dict(student.config, mean=mean, std=std))
            run.save(done, dict(method="mae", config=config, model=state), keep, must)
        if why:
            health.leave(why, run, done, model, total.sum(), img)
        optimizer.zero_grad()
        if rank == 0 and steps.due(done, cfg.picture_every) and done < steps.total:
            draw(student, normalize(sample(val or train, cfg).to(device), mean, std), mean, std, cfg.out)
        if steps.due(done, cfg.probe_every) and done < steps.total:
            measure(done)
    if probing:
        measure(steps.total)
    if rank == 0:
        draw(student, normalize(sample(val or train, cfg).to(device), mean, std), mean, std, cfg.out)
        training.draw_curve(cfg.out)
        print(f"done: {cfg.out} has encoder.pt for downstream use, last.pt, log.jsonl, recon.png")


def main(argv=None):
    cfg, given = training.parse(Config, __doc__, argv)
    cfg = resolve(cfg, given)
    if cfg.visualize:
        return visualize(cfg, given)
    story = cfg.demo and cfg.distill and not cfg.distill_teacher
    if story:
        if given - {"demo", "distill", "out"}:
            training.die("--demo with --distill is one fixed story of three runs: it takes --out and no other option")
        cfg = replace(cfg, out="out/mae-distill-demo") if "out" not in given else cfg
        cfg = replace(cfg, epochs=6.0, warmup_epochs=0.6)
        teacher, plain = (os.path.join(cfg.out, name) for name in ("teacher", "plain"))
        cfg = replace(cfg, distill_teacher=before(__file__, teacher, *TEACHER))
        before(__file__, plain, "--epochs", cfg.epochs)
        print(f"--- then: the same student, distilled ({cfg.distill})", flush=True)
    pretrain(cfg)
    if story:
        ends = {name: rows(folder) for name, folder in (("teacher", teacher), ("plain", plain), ("distilled", cfg.out))}
        for name, row in ends.items():
            print(f"{name:10} k-NN {row['knn']:.1f}%  linear {row['linear']:.1f}%  pixels' error "
                  f"{row.get('pixels', row['loss']):.4f}")
        print(f"{cfg.distill}: error {row['taught']:.4f}, {row['taught_chance']:.4f} by chance")


if __name__ == "__main__":
    training.launch(main)
