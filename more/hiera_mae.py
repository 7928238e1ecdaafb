"""
Masked autoencoder pre-training of a Hiera: hide units of 32 x 32 pixels, encode the rest on ever coarser maps, predict
the hidden pixels. https://arxiv.org/abs/2306.00989, lightweight and distilled https://arxiv.org/abs/2404.12210

One node:   torchrun --standalone --nproc_per_node=8 -m more.hiera_mae --data imagenet --out out/hiera_mae
One GPU:    python -m more.hiera_mae --data imagenet --out out/hiera_mae --accum 8
A teacher:  torchrun ... -m more.hiera_mae --distill-teacher mae_hiera_base_224.pth
Minutes:    python -m more.hiera_mae --demo
Preempted:  type the same command again
Expected:   not run yet at full size; the demo's last lines are in docs/methods.md
"""
import os
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

import weights
from data import CenterCrops
from images.augment import denormalize, normalize, random_flip
from images.pictures import save_sheet
from more.hiera_distill import add_teacher, run_blocks
from nets.hiera import HIERAS, Hiera, unit_index
from runtime.options import ProbeOptions, TrainingOptions, opt, parse, value_errors_exit
from runtime.run import Run, decay_groups, launch, print_rank0, warmup_cosine
from vit import Block, gather_tokens, patchify


@dataclass
class Config(TrainingOptions, ProbeOptions):
    model: str = opt("hiera_lite", "the network")
    mask_ratio: float | None = opt(None, "fraction of the mask units hidden from the encoder", least=0, most=1)
    decoder_dim: int | None = opt(None, "width of the decoder", least=1)
    decoder_depth: int | None = opt(None, "blocks of the decoder", least=1)
    decoder_heads: int | None = opt(None, "attention heads of the decoder", least=1)
    repeat: int = opt(1, "crops of each decoded image in a batch, which then has batch / repeat images", least=1)
    distill_teacher: str | None = opt(None, "file of a Hiera whose attention the student also learns, any layout")
    teacher_heads: int | None = opt(None, "heads of the teacher's first stage, where its file does not say", 1,
                                    needs="distill_teacher")
    distill: str = opt("attention", "what is learnt from the teacher", choices=("attention", "hidden"),
                       needs="distill_teacher")
    distill_layers: tuple[str, ...] | None = opt(None, "STUDENT:TEACHER layers, as 12:24 (default: the last of both)",
                                                 needs="distill_teacher")
    distill_weight: float = opt(1.0, "weight of each distilled layer's error, beside the pixels' 1", least=0,
                                needs="distill_teacher")
    picture_every: int = opt(20, "epochs between drawings of recon.png, the last at the end; 0: no picture", least=0)


# hiera_lite is MAE-Lite's. Of the official networks only the mask and the decoder are in the official code, which has
# no training: the rest is MAE's recipe. hiera_mini is ours, for 32 to 64 pixels.
COMMON = dict(batch_size=4096, warmup_epochs=40, blr=1.5e-4, weight_decay=0.05)
OFFICIAL = dict(COMMON, epochs=400, min_crop=0.2, interpolation="bicubic", mask_ratio=0.6, decoder_dim=512,
                decoder_depth=8, decoder_heads=16)
LITE = dict(COMMON, epochs=400, min_crop=0.08, interpolation="random", mask_ratio=0.4, decoder_dim=96, decoder_depth=1,
            decoder_heads=3)
OURS = dict(OFFICIAL, epochs=200, warmup_epochs=20, decoder_dim=64, decoder_depth=1, decoder_heads=4)
RECIPES = dict.fromkeys(HIERAS, OFFICIAL) | {"hiera_mini": OURS, "hiera_lite": LITE}
DEMO = dict(data="shapes", model="hiera_mini", img_size=(64,), patch_size=4, min_crop=0.6, batch_size=128, epochs=3,
            warmup_epochs=0.3, blr=4e-3, workers=1, log_every=78, save_every=312)


# ----------------------------------------------------------------------------------------------------------------
# The method


class HieraMAE(Hiera):
    """A Hiera that sees some of the mask units, and a light decoder that predicts the rest (Hiera, section 3.2 and
    appendix). Its last stage does not pool, so that a unit ends as 2 x 2 tokens and a cell of 16 x 16 pixels is
    predicted from each place. hiera: options of the Hiera. Raises ValueError when the mask leaves nothing to see or to
    predict."""
    parts = {}                                                  # of the loss, for the log; a teacher adds some

    def __init__(self, decoder_dim=96, decoder_depth=1, decoder_heads=3, mask_ratio=0.4, **hiera):
        stages = hiera.get("stages", (1, 2, 7, 2))
        super().__init__(**{"q_pool": len(stages) - 2, **hiera})
        del self.norm, self.head                                # nothing reads the mean token here
        (h, w), q_pool = self.config["img_size"], self.config["q_pool"]
        self.unit_grid = h // self.unit, w // self.unit
        self.units = self.unit_grid[0] * self.unit_grid[1]      # U
        self.visible = int(self.units * (1 - mask_ratio))       # cut off, as published: 49 at 0.4 leaves 29
        if not 0 < self.visible < self.units:
            raise ValueError(f"--mask-ratio {mask_ratio} leaves {self.visible} of {self.units} mask units visible")
        self.cell = self.patch_size << q_pool                   # pixels on a side of what is predicted as one
        self.cell_rounds = self.rounds - q_pool                 # a unit is 4 ** cell_rounds cells, c of them

        self.mask_token = nn.Parameter(torch.empty(1, 1, decoder_dim))
        self.decoder_pos_embed = nn.Parameter(torch.empty(1, self.grid[0] * self.grid[1], decoder_dim))
        # Fine maps are brought to the last one's size and width: a convolution for each stage that is pooled after.
        self.encoder_norm = nn.LayerNorm(self.width, eps=1e-6)
        self.multi_scale_fusion_heads = nn.ModuleList()
        for stage in range(q_pool):
            side = 2 ** (q_pool - stage)
            self.multi_scale_fusion_heads.append(nn.Conv2d(self.config["dim"] << stage, self.width, side, side))
        self.decoder_embed = nn.Linear(self.width, decoder_dim)
        self.decoder_blocks = nn.ModuleList([Block(decoder_dim, decoder_heads, self.config["mlp_ratio"])
                                             for _ in range(decoder_depth)])
        self.decoder_norm = nn.LayerNorm(decoder_dim, eps=1e-6)
        self.decoder_pred = nn.Linear(decoder_dim, self.config["in_chans"] * self.cell ** 2)
        self.init_as_mae()

    def init_as_mae(self):
        """Xavier's start, also for the first convolution as a matrix; the fusing convolutions keep torch's own."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
            if isinstance(module, (nn.Linear, nn.LayerNorm)):
                nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.patch_embed.proj.weight.data.flatten(1))
        for p in (self.mask_token, self.decoder_pos_embed):
            nn.init.trunc_normal_(p, std=0.02)

    def random_order(self, images, device):
        """Draw a random permutation of the units for each image, (images, U): the first `visible` ones are seen."""
        return torch.rand(images, self.units, device=device).argsort(1)         # fp32: noise of bf16 would have ties

    def forward(self, img, order):
        """Normalised images (B, C, h, w), order of their units (B, U) -> mean squared error of hidden pixels, ()."""
        ends, _ = run_blocks(self, self.embed_visible(img, order))              # of each stage (B, K, T, D)
        return self.pixel_error(img, self.fuse(ends), order)    # decodes, and compares with the hidden pixels

    def embed_visible(self, img, order):
        """Images (B, C, h, w) -> the tokens of the K visible units, (B, K, T, D)."""
        if img.shape[-2:] != self.config["img_size"]:
            raise ValueError(f"this MAE takes images of {self.config['img_size']} pixels, not {tuple(img.shape[-2:])}")
        return self.embed(img, order[:, :self.visible])

    def fuse(self, ends):
        """The tokens at the end of each stage, (B, K, T, D) -> their normed sum on the last map, (B, K, c, D'). A stage
        that the last one follows without pooling is left out, as published."""
        x = ends[-1]                                                                            # (B, K, c, D')
        for conv, end in zip(self.multi_scale_fusion_heads, ends):
            # A convolution without overlap is a matrix product. Its pixels are in the front of T, in the units' order.
            side = conv.kernel_size[0]                                                          # 4, then 2
            index = unit_index(side, side, side.bit_length() - 1, end.device)[0]                # (side * side,)
            weight = rearrange(conv.weight.flatten(2)[:, :, index], "o d p -> o (p d)")
            end = rearrange(end, "b k (p c) d -> b k c (p d)", p=side ** 2)                     # (B, K, c, p * D)
            x = x + F.linear(end, weight, conv.bias)
        return self.encoder_norm(x)

    def decode(self, latent, order):
        """latent (B, K, c, D) -> predicted pixels of the hidden units' cells, (B, (U - K) * c, C*p*p). As in mae.py,
        hidden cells stay behind the visible ones, so that the last block asks for them alone."""
        x = self.decoder_embed(latent).flatten(1, 2)                                            # (B, K * c, E)
        seen, cells = x.shape[1], self.decoder_pos_embed.shape[1]                               # K * c, U * c
        x = torch.cat([x, self.mask_token.expand(len(x), cells - seen, -1)], 1)                 # (B, U * c, E)
        x = x + gather_tokens(self.decoder_pos_embed, self.cells_of(order))
        for block in self.decoder_blocks[:-1]:
            x = block(x)                                                                        # (B, U * c, E)
        x = self.decoder_blocks[-1](x, first=seen)                                              # (B, (U - K) * c, E)
        return self.decoder_pred(self.decoder_norm(x))

    def cells_of(self, units):
        """Numbers of units (B, n) -> the numbers, in reading order, of their cells, (B, n * c)."""
        return unit_index(*self.grid, self.cell_rounds, units.device)[units].flatten(1)

    def pixel_error(self, img, latent, order):
        """The error of the hidden cells, in fp32 under autocast, from the encoder's tokens of the visible units."""
        return F.mse_loss(self.decode(latent, order), self.target(img, order[:, latent.shape[1]:]))

    def target(self, img, units):
        """Images, numbers of units (B, n) -> the pixels of their cells, standardised cell by cell, (B, n * c, C*p*p):
        channels, rows, columns, as in the official Hiera; MAE's ViT has channels last."""
        x = patchify(img, self.cell, self.cells_of(units))                                      # (B, n * c, C*p*p)
        # (x - mean) / sqrt(var + 1e-6), unbiased variance of a cell's n values: a layer norm but for a constant.
        shrink = (x.shape[-1] - 1) / x.shape[-1]
        return F.layer_norm(x, x.shape[-1:], eps=1e-6 * shrink) * shrink ** 0.5

    def metrics(self, img, order):
        """For the log: the loss of predicting 0 everywhere, the mean of the squared targets, of a few images."""
        return dict(chance=self.target(img[:64], order[:64]).square().mean())

    def features(self, img):
        """What probes look at: the mean token (B, D) of the network that encoder.pt holds, normed."""
        ends, _ = run_blocks(self, self.embed(img))
        return F.layer_norm(ends[-1].mean((1, 2)), (self.width,), eps=1e-6)

    def encoder_checkpoint(self):
        """What downstream scripts read: the encoder under its published names, and a fresh norm, as no loss reads the
        mean token. It says that the last stage was trained without pooling."""
        names = ("decoder_", "mask_token", "encoder_norm", "multi_scale")
        state = {k: v for k, v in self.state_dict().items() if not k.startswith(names)}
        state |= {"norm.weight": torch.ones(self.width), "norm.bias": torch.zeros(self.width)}
        return dict(model=state, config=dict(self.config, final_norm="fresh: weight 1, bias 0"))


# ----------------------------------------------------------------------------------------------------------------
# The run


@torch.no_grad()
def draw(model, source, mean, std, path, count=8):
    """Save a sheet with a row for each of `count` images, always the same: image, what the encoder sees, completed. The
    mean and deviation of a hidden cell are not predicted, so the true ones are used."""
    crops = CenterCrops(source, model.config["img_size"], model.config["in_chans"])
    torch.manual_seed(0)                                        # always the same; every step seeds torch anew
    chosen = torch.randperm(len(source))[:count]
    img = normalize(crops.__getitems__(chosen.tolist())[0].to(model.pos_embed.device), mean, std)
    order = model.random_order(len(img), img.device)
    pred = model.decode(model.fuse(run_blocks(model, model.embed_visible(img, order))[0]), order)
    cells = model.cells_of(order[:, model.visible:]).unsqueeze(2).expand_as(pred)               # (B, n, C*p*p)
    patches = patchify(img, model.cell)                                                         # (B, N, C*p*p)
    var, mu = torch.var_mean(patches.gather(1, cells), -1, keepdim=True)
    pred = pred * (var + 1e-6).sqrt() + mu
    columns = {"image": patches, "visible": patches.scatter(1, cells, 0.0),         # a normalised 0 is the mean colour
               "completed": patches.scatter(1, cells, pred)}
    for title, x in columns.items():                            # cells back to images
        x = rearrange(x, "b (h w) (c p q) -> b c (h p) (w q)", h=model.grid[0], p=model.cell, q=model.cell)
        columns[title] = denormalize(x, mean, std).cpu()
    return save_sheet(columns, "hidden cells are drawn with their true mean and deviation", path)


def main(argv=None):
    cfg = parse(Config, "hiera_mae", __doc__, RECIPES, DEMO, argv)
    run = Run(cfg, "hiera_mae")
    train, val = run.datasets()
    with value_errors_exit():
        shape = dict(heads=cfg.heads, patch_size=cfg.patch_size, img_size=cfg.img_size, in_chans=cfg.in_chans,
                     mlp_ratio=weights.init_mlp_ratio(cfg) if cfg.init else 4.0)
        model = HieraMAE(cfg.decoder_dim, cfg.decoder_depth, cfg.decoder_heads, cfg.mask_ratio,
                         **HIERAS[cfg.model] | shape)
    if run.init:                                                # a new run, and --init was given
        weights.load_into(model, weights.read(run.init), print_rank0)
    trained, teacher = model, None
    if cfg.distill_teacher:
        trained, teacher = add_teacher(cfg, model, run)
    trained = trained.to(run.device)
    optimizer = torch.optim.AdamW(decay_groups(trained, cfg.weight_decay), betas=(0.9, 0.95), fused=True)
    net = run.start(trained, optimizer, model.encoder_checkpoint(), model.features, teacher=teacher)
    picture = partial(draw, model, val or train, run.mean, run.std, os.path.join(cfg.out, "recon.png"))

    for step, passes in run.steps(run.random_crops()):
        run.set_lr(warmup_cosine(step, run.total, run.warmup, run.peak))
        for img, _ in passes:                                   # uint8 crops on the device
            img = normalize(random_flip(img), run.mean, run.std)                                # (B, C, h, w)
            order = model.random_order(len(img), run.device)                                    # (B, U), visible first
            with run.autocast():
                loss = net(img, order)                                                          # ()
            run.backward(loss, **trained.parts)
        run.update(metrics=partial(trained.metrics, img, order))
        if run.rank == 0 and run.due(cfg.picture_every, step + 1) and step + 1 < run.total:
            picture()
    if run.rank == 0 and cfg.picture_every:
        picture()
    run.finish(", recon.png" if cfg.picture_every else "")


if __name__ == "__main__":
    launch(main)
