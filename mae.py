"""
Masked autoencoder pre-training: hide 75% of the patches, encode the rest, predict the hidden pixels.
https://arxiv.org/abs/2111.06377, for lightweight networks https://arxiv.org/abs/2205.14443

One node:   torchrun --standalone --nproc_per_node=8 mae.py --data imagenet --out out/mae
One GPU:    python mae.py --data imagenet --out out/mae --accum 8
A minute:   python mae.py --demo
A teacher:  torchrun ... mae.py --distill-teacher mae_pretrain_vit_base.pth (D-MAE; --distill decoupled: D2-MAE)
Preempted:  type the same command again
Expected:   not run yet at full size; the demo's last lines are in the README
"""
import os
import runpy
import sys
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from data import CenterCrops
from distill import DistilledMAE, Teacher
from images.augment import denormalize, normalize, random_flip
from images.pictures import save_sheet
from runtime.options import ProbeOptions, TrainingOptions, fail, opt, parse, value_errors_exit, vit_config
from runtime.run import Run, decay_groups, launch, print_rank0, warmup_cosine
from vit import MODELS, Block, ViT, gather_tokens, patchify, sincos_positions
from weights import load_into, read


@dataclass
class Config(TrainingOptions, ProbeOptions):
    mask_ratio: float = opt(0.75, "fraction of the patches hidden from the encoder", least=0, most=1)
    norm_pix: bool = opt(True, "predict standardised patches, each with mean 0 and deviation 1; else plain pixels")
    decoder_dim: int | None = opt(None, "width of the decoder", least=1)
    decoder_depth: int | None = opt(None, "blocks of the decoder", least=1)
    decoder_heads: int | None = opt(None, "attention heads of the decoder", least=1)
    repeat: int = opt(1, "crops of each decoded image in a batch, which then has batch / repeat images", least=1)
    distill_teacher: str | None = opt(None, "file of a ViT that the student also learns from (D-MAE); any layout")
    teacher_heads: int | None = opt(None, "attention heads of the teacher, where its file does not say", least=1,
                                    needs="distill_teacher")
    distill: str | None = opt(None, "what is learnt from the teacher (default: attention); decoupled: D2-MAE",
                              choices=("attention", "hidden", "decoupled"), needs="distill_teacher")
    distill_layers: tuple[str, ...] | None = opt(None, "STUDENT:TEACHER layers, as 12:24 (default: the last of both)",
                                                 needs="distill_teacher")
    distill_weight: float = opt(1.0, "weight of each distilled layer's error, beside the pixels' 1", least=0,
                                needs="distill_teacher")
    distill_tap: int | None = opt(None, "decoupled: blocks below the pixel decoder (default: two thirds, 8 of 12)",
                                  least=1, needs="distill_teacher")
    picture_every: int = opt(20, "epochs between drawings of recon.png, the last at the end; 0: no picture", least=0)


# MAE-Lite's recipe for Tiny and Small, the official one for the rest. vit_mini and vit_midi are ours, for 32 to 64
# pixels.
COMMON = dict(batch_size=4096, warmup_epochs=40, blr=1.5e-4, weight_decay=0.05)
LITE = dict(COMMON, epochs=400, min_crop=0.08, interpolation="random")
OFFICIAL = dict(COMMON, epochs=800, min_crop=0.2, interpolation="bicubic", decoder_dim=512, decoder_depth=8,
                decoder_heads=16)
OURS = dict(OFFICIAL, epochs=200, warmup_epochs=20, decoder_dim=64, decoder_depth=1, decoder_heads=4)
RECIPES = {
    "vit_mini": OURS, "vit_midi": OURS, "vit_tiny": dict(LITE, decoder_dim=96, decoder_depth=1, decoder_heads=3),
    "vit_small": dict(LITE, decoder_dim=192, decoder_depth=1, decoder_heads=6),
    "vit_base": OFFICIAL, "vit_large": OFFICIAL, "vit_huge": OFFICIAL,
}
DEMO = dict(data="shapes", model="vit_mini", img_size=(48,), patch_size=8, mask_ratio=0.6, min_crop=0.6, batch_size=128,
            epochs=6, warmup_epochs=0.6, blr=4e-3, workers=1, log_every=78, save_every=312)


# ----------------------------------------------------------------------------------------------------------------
# The method


class MAE(ViT):
    """A ViT that sees a quarter of the patches, and a light decoder that predicts the rest (MAE, section 3).

    norm_pix: targets are standardised patch by patch. tap: the decoder reads the tokens after this many blocks (D2-MAE;
    default: all). vit: options of the ViT. Raises ValueError when the mask leaves nothing to see or to predict.
    """
    parts = {}                                                  # of the loss, for the log; a teacher adds some

    def __init__(self, decoder_dim=96, decoder_depth=1, decoder_heads=3, norm_pix=True, mask_ratio=0.75, tap=None,
                 **vit):
        super().__init__(**vit)
        self.norm_pix, self.tap = norm_pix, tap
        self.patches = self.grid[0] * self.grid[1]
        self.visible = int(self.patches * (1 - mask_ratio))     # cut off, as published: 196 at 0.9 leaves 19
        if tap is not None and not 0 < tap <= self.depth:
            raise ValueError(f"--distill-tap {tap} is none of the {self.depth} blocks")
        if not 0 < self.visible < self.patches:
            raise ValueError(f"--mask-ratio {mask_ratio} leaves {self.visible} of {self.patches} patches visible")

        # The decoder: narrow and shallow, with positions of its own, and only there during pre-training.
        self.mask_token = nn.Parameter(torch.empty(1, 1, decoder_dim))
        self.decoder_pos_embed = nn.Parameter(sincos_positions(decoder_dim, *self.grid), requires_grad=False)
        self.decoder_embed = nn.Linear(self.width, decoder_dim)
        self.decoder_blocks = nn.ModuleList([Block(decoder_dim, decoder_heads, self.config["mlp_ratio"])
                                             for _ in range(decoder_depth)])
        self.decoder_norm = nn.LayerNorm(decoder_dim, eps=1e-6)
        self.decoder_pred = nn.Linear(decoder_dim, self.patch_size ** 2 * self.config["in_chans"])

        # Xavier over the stacked qkv matrix, and over the patch projection as a matrix; its bias keeps torch's start.
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.patch_embed.proj.weight.data.flatten(1))
        nn.init.normal_(self.cls_token, std=0.02)
        nn.init.normal_(self.mask_token, std=0.02)

    def random_order(self, images, device):
        """Draw a random permutation of the patches for each image, (images, N): the first `visible` ones are seen."""
        # fp32 also under autocast: 196 draws of bf16 noise have ties, and ties bias the order.
        return torch.rand(images, self.patches, device=device).argsort(1)

    def forward(self, img, order):
        """Normalised images (B, C, h, w), order of their patches (B, N) -> mean squared error of hidden patches, ()."""
        latent = self.encode_visible(img, order)                                                # (B, 1 + V, D)
        return self.pixel_error(img, latent, order)             # decodes, and compares with the hidden pixels

    def encode_visible(self, img, order, visible=None):
        """Embed and encode the visible patches alone -> normed tokens (B, 1 + V, D), cls first."""
        if self.grid_of(*img.shape[-2:]) != self.grid:
            raise ValueError(f"an MAE of {self.grid} patches cannot take images of {tuple(img.shape[-2:])} pixels")
        x = self.embed(img, order[:, :visible or self.visible])                                 # (B, 1 + V, D)
        for block in self.blocks[:self.tap]:                    # all of them, unless D2-MAE's decoder taps them before
            x = block(x)                                                                        # (B, 1 + V, D)
        return self.norm(x)

    def decode(self, latent, order, all_patches=False):
        """latent (B, 1 + V, D) -> normed decoder tokens of the hidden patches, or of all, (B, N - V or N, E).
        The official decoder first puts tokens back in reading order. Attention does not care about order, only
        positions do. The same numbers, less work: hidden patches stay behind the visible ones, in the order of `order`,
        so that the last block asks for that slice alone."""
        x, tokens = self.decoder_embed(latent), latent.shape[1]                                 # (B, 1 + V, E), 1 + V
        # Every hidden patch becomes the mask token, and only its position tells which patch it is.
        x = torch.cat([x, self.mask_token.expand(len(x), 1 + self.patches - tokens, -1)], 1)    # (B, 1 + N, E)
        cls_pos, pos = self.decoder_pos_embed[:, :1], self.decoder_pos_embed[:, 1:]
        x = x + torch.cat([cls_pos.expand(len(x), -1, -1), gather_tokens(pos, order)], 1)       # (B, 1 + N, E)
        for block in self.decoder_blocks[:-1]:
            x = block(x)                                                                        # (B, 1 + N, E)
        return self.decoder_norm(self.decoder_blocks[-1](x, first=1 if all_patches else tokens))

    def pixel_error(self, img, latent, order):
        """The error of the hidden patches' pixels, in fp32 under autocast, from the encoder's tokens of the others."""
        visible = latent.shape[1] - 1
        x = self.decode(latent, order)                                                          # (B, N - V, E)
        target = self.target(patchify(img, self.patch_size, order[:, visible:]))                # (B, N - V, C*p*p)
        # Published weights predict rows, columns, channels. The error does not care about the order inside a patch, and
        # channels first is how images lie in memory: so the prediction's few weights are reordered, not the pixels.
        weight = rearrange(self.decoder_pred.weight, "(pq c) e -> (c pq) e", c=img.shape[1])
        bias = rearrange(self.decoder_pred.bias, "(pq c) -> (c pq)", c=img.shape[1])
        return F.mse_loss(F.linear(x, weight, bias), target)

    def target(self, patches):
        """Pixels (B, n, p*p*C), in any order within a patch -> what the decoder should predict."""
        if not self.norm_pix:
            return patches
        # (t - mean) / sqrt(var + 1e-6), unbiased variance over a patch's n values: a layer norm but for a constant.
        n = patches.shape[-1]
        shrink = (n - 1) / n
        return F.layer_norm(patches, (n,), eps=1e-6 * shrink) * shrink ** 0.5

    def metrics(self, img):
        """For the log: the loss of predicting 0 everywhere, the mean of the squared targets, of a few images."""
        return dict(chance=self.target(patchify(img[:64], self.patch_size)).square().mean())

    @torch.no_grad()
    def reconstruct(self, img, order, visible=None):
        """Everything by its published name, for all patches in reading order: dict of loss, latent (B, 1 + V, D), pred
        (B, N, p*p*C), mask (B, N; 1 = hidden) and ids_restore (B, N), the inverse of `order`."""
        latent, restore = self.encode_visible(img, order, visible), order.argsort(1)
        pred = self.decoder_pred(self.decode(latent, order, all_patches=True))                  # (B, N, p*p*C)
        pred = gather_tokens(pred, restore)                                                     # in reading order
        hidden = (restore >= latent.shape[1] - 1).to(img.dtype)                                 # (B, N)
        patches = rearrange(patchify(img, self.patch_size), "b n (c pq) -> b n (pq c)", c=img.shape[1])
        error = (pred - self.target(patches)).square().mean(-1)                                 # (B, N), of each patch
        return dict(loss=(error * hidden).sum() / hidden.sum(), latent=latent, pred=pred, mask=hidden,
                    ids_restore=restore)

    def features(self, img):
        """What probes look at: the mean patch token (B, D) of the network that encoder.pt holds."""
        x = self.embed(img)
        for block in self.blocks:
            x = block(x)
        x = self.norm(x) if self.tap is None else F.layer_norm(x, x.shape[-1:], eps=self.norm.eps)
        return x[:, 1:].mean(1)

    def encoder_checkpoint(self):
        """What downstream scripts read: the encoder under its published names, without decoder and mask token."""
        state = {k: v for k, v in self.state_dict().items() if not k.startswith(("decoder_", "mask_token"))}
        if self.tap is not None:
            return self.with_fresh_norm(state)
        return dict(model=state, config=self.config)

    def with_fresh_norm(self, state):
        """D2-MAE: the final norm has learnt the tokens after `tap` blocks; after all blocks a fresh one is in place."""
        state |= {"norm.weight": torch.ones(self.width), "norm.bias": torch.zeros(self.width)}
        return dict(model=state, config=dict(self.config, final_norm="fresh: weight 1, bias 0"))


# ----------------------------------------------------------------------------------------------------------------
# Pictures


def draw(model, source, mean, std, path, count=8):
    """Save a sheet with a row for each of `count` images, always the same: image, what the encoder sees, completed.

    Standardised predictions are drawn with the mean and deviation of the true patch, which borrows both from what was
    hidden: the sheet says so.
    """
    crops = CenterCrops(source, model.config["img_size"], model.config["in_chans"])
    chosen = torch.randperm(len(source), generator=torch.Generator().manual_seed(0))[:count]
    img = normalize(crops.__getitems__(chosen.tolist())[0].to(model.cls_token.device), mean, std)
    order = torch.rand(len(img), model.patches, generator=torch.Generator().manual_seed(0)).argsort(1)
    found = model.reconstruct(img, order.to(img.device))
    pred, hidden = found["pred"], found["mask"].unsqueeze(-1)                           # (B, N, p*p*C), (B, N, 1)
    p, (h, w) = model.patch_size, model.grid
    patches = rearrange(img, "b c (h p) (w q) -> b (h w) (p q c)", p=p, q=p)
    if model.norm_pix:                                          # undo the standardisation, patch by patch
        var, mu = torch.var_mean(patches, -1, keepdim=True)
        pred = pred * (var + 1e-6).sqrt() + mu
    columns = {"image": patches, "visible": patches * (1 - hidden),         # a normalised 0 is the mean colour
               "completed": patches * (1 - hidden) + pred * hidden}
    for title, x in columns.items():                            # patches back to images
        x = rearrange(x, "b (h w) (p q c) -> b c (h p) (w q)", p=p, q=p, h=h, w=w)
        columns[title] = denormalize(x, mean, std).cpu()
    note = "hidden patches are drawn with their true mean and deviation" if model.norm_pix else ""
    return save_sheet(columns, note, path)


# ----------------------------------------------------------------------------------------------------------------
# The run


def with_distillation(cfg):
    """The config with the defaults of a run that has a teacher."""
    cfg = replace(cfg, distill=cfg.distill or "attention")
    if cfg.distill == "decoupled" and not cfg.distill_tap:
        return replace(cfg, distill_tap=round(MODELS[cfg.model]["depth"] * 2 / 3))
    if cfg.distill_tap and cfg.distill != "decoupled":
        fail("--distill-tap has no effect without --distill decoupled: give that as well")
    return cfg


def add_teacher(cfg, model, run):
    """The model with --distill-teacher beside it, and that teacher."""
    decoupled = cfg.distill == "decoupled"                      # D2-MAE: its upper blocks learn from the teacher alone
    teacher = Teacher(cfg.distill_teacher, cfg.teacher_heads, cfg.distill, cfg.distill_layers, model.config,
                      model.depth + decoupled, run)
    model.config["teacher"] = teacher.facts                     # for encoder.pt
    return DistilledMAE(model, teacher, cfg.distill_weight, decoupled), teacher


def main(argv=None):
    cfg = parse(Config, "mae", __doc__, RECIPES, DEMO, argv)
    if cfg.distill_teacher:
        cfg = with_distillation(cfg)
    run = Run(cfg, "mae")
    train, val = run.datasets()
    with value_errors_exit():
        model = MAE(cfg.decoder_dim, cfg.decoder_depth, cfg.decoder_heads, cfg.norm_pix, cfg.mask_ratio,
                    cfg.distill_tap, **vit_config(cfg))
    if run.init:                                                # a new run, and --init was given
        load_into(model, read(run.init), print_rank0)
    trained, teacher = model, None
    if cfg.distill_teacher:                                     # D-MAE: the student attends as a teacher does, too
        trained, teacher = add_teacher(cfg, model, run)
    trained = trained.to(run.device)
    optimizer = torch.optim.AdamW(decay_groups(trained, cfg.weight_decay), betas=(0.9, 0.95), fused=True)
    net = run.start(trained, optimizer, model.encoder_checkpoint(), model.features, teacher=teacher)
    picture = partial(draw, model, val or train, run.mean, run.std, os.path.join(cfg.out, "recon.png"))

    for step, passes in run.steps(run.random_crops()):
        run.set_lr(warmup_cosine(step, run.total, run.warmup, run.peak))
        for img, _ in passes:                                   # uint8 crops on the device
            img = normalize(random_flip(img), run.mean, run.std)                                # (B, C, h, w)
            order = model.random_order(len(img), run.device)                                    # (B, N), visible first
            with run.autocast():
                loss = net(img, order)                                                          # ()
            run.backward(loss, **trained.parts)
        run.update(metrics=partial(trained.metrics, img))
        if run.rank == 0 and run.due(cfg.picture_every, step + 1) and step + 1 < run.total:
            picture()
    if run.rank == 0 and cfg.picture_every:
        picture()
    run.finish(", recon.png" if cfg.picture_every else "")


if __name__ == "__main__":
    if "--visualize" in sys.argv:                               # an old spelling of `python -m tools.pictures FILE`
        runpy.run_module("tools.pictures", run_name="__main__")
    else:
        launch(main)
