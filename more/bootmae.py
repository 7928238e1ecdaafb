"""
Bootstrapped masked autoencoder: predict the pixels of hidden patches, and what a slow copy of the network sees in them.
https://arxiv.org/abs/2207.07116, for lightweight networks https://arxiv.org/abs/2205.14443

One node:   torchrun --standalone --nproc_per_node=8 -m more.bootmae --data imagenet --out out/bootmae
One GPU:    python -m more.bootmae --data imagenet --out out/bootmae --accum 8
Minutes:    python -m more.bootmae --demo
Preempted:  type the same command again
Expected:   not run yet at full size; the demo ends with loss 1.5 (chance 2.5), linear 31% (from 27), k-NN 12% (from 14)
"""
import os
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from data import CenterCrops
from images.augment import denormalize, normalize, random_flip
from images.pictures import save_sheet
from nets.beit import BeitViT
from nets.blocks import random_orders
from nets.cross import DecoderBlock
from runtime.options import ProbeOptions, TrainingOptions, fail, opt, parse, value_errors_exit, vit_config
from runtime.run import Run, decay_groups, launch, print_rank0, warmup_cosine
from vit import gather_tokens, patchify, sincos_positions
from weights import load_into, read


@dataclass
class Config(TrainingOptions, ProbeOptions):
    mask_ratio: float = opt(0.75, "fraction of the patches hidden from the encoder", least=0, most=1)
    block_share: float = opt(120 / 147, "share of the hidden patches that lie in blocks", least=0, most=1)
    weight_mask: bool = opt(True, "hidden patches count more the more of their neighbours are hidden, up to twice")
    taps: tuple[int, ...] | None = opt(None, "two blocks that the decoders look at (default: the first, the last)", 1)
    decoder_dim: int | None = opt(None, "width of the decoder of pixels; that of features is the encoder's", least=1)
    decoder_depth: int = opt(2, "blocks of each decoder", least=1)
    feature_weight: float = opt(1.0, "weight of features beside pixels; it grows for a quarter of the epochs", least=0)
    momentum: float = opt(0.999, "momentum of the moving average at the start; it rises to 0.9999 in 100 epochs", 0, 1)
    momentum_end: float = opt(0.99999, "momentum from epoch 400 on", least=0, most=1)
    min_lr: float | None = opt(None, "learning rate at the end, whatever the batch", least=0)
    repeat: int = opt(1, "crops of each decoded image in a batch, which then has batch / repeat images", least=1)
    picture_every: int = opt(20, "epochs between drawings of recon.png, the last at the end; 0: no picture", least=0)


# Base is official; its README names two batches, 2048 and 4096, and 801 epochs for the weights after 800. Of MAE-Lite's
# Tiny only the 400 epochs are known. The rest is ours, as Small is: Base's values, and a decoder that is two thirds as
# wide as the encoder, as Base's is. So are vit_mini and vit_midi, for 32 to 64 pixels.
OFFICIAL = dict(batch_size=2048, epochs=801, warmup_epochs=40, blr=1.5e-4, min_lr=1e-4, weight_decay=0.05, min_crop=0.2,
                interpolation="bicubic", decoder_dim=512)
OURS = dict(OFFICIAL, epochs=200, warmup_epochs=20, min_lr=0.0, decoder_dim=64)
RECIPES = {"vit_mini": OURS, "vit_midi": OURS, "vit_tiny": dict(OFFICIAL, epochs=400, decoder_dim=128),
           "vit_small": dict(OFFICIAL, epochs=400, decoder_dim=256), "vit_base": OFFICIAL}
DEMO = dict(data="shapes", model="vit_mini", img_size=(48,), patch_size=8, mask_ratio=0.6, min_crop=0.6, batch_size=128,
            epochs=4, warmup_epochs=0.4, blr=4e-3, decoder_depth=1, workers=1, log_every=78, save_every=312)


# ----------------------------------------------------------------------------------------------------------------
# The method


class BootMAE(BeitViT):
    """A ViT that sees a quarter of the patches, and two decoders of the others: one predicts their pixels, one what a
    moving average of this ViT, which sees the whole image, makes of them (BootMAE, section 3).

    Every block of a decoder also looks at the encoder's tokens, after one of its blocks (`taps`). Why: what only pixels
    need can be read after the first block, so that the later blocks need not carry it along.
    See Config for the options; vit: options of the ViT. Raises ValueError for masks and taps that do not fit.
    """

    def __init__(self, decoder_dim=128, decoder_depth=2, mask_ratio=0.75, block_share=120 / 147, weight_mask=True,
                 taps=None, **vit):
        super().__init__(positions="sincos_yx", key_bias=False, **vit)
        self.weight_mask, self.taps = weight_mask, tuple(taps or (1, self.depth))
        self.patches = self.grid[0] * self.grid[1]
        self.visible = int(self.patches * (1 - mask_ratio))     # cut off: 49 of 196
        self.in_blocks = round(block_share * (self.patches - self.visible))                     # 120 of 147
        if not 0 < self.visible < self.patches:
            raise ValueError(f"--mask-ratio {mask_ratio} leaves {self.visible} of {self.patches} patches visible")
        if len(self.taps) != 2 or max(self.taps) > self.depth:
            raise ValueError(f"--taps wants two of the {self.depth} blocks, not {' '.join(map(str, self.taps))}")
        self.random_order(1, "cpu")                             # or a ValueError

        # The decoder of pixels and, published with a _1 in its names, that of features; only there in pre-training.
        dim, heads, ratio, p = self.width, self.config["heads"], self.config["mlp_ratio"], self.patch_size
        self.down, self.down_1 = nn.Linear(dim, decoder_dim), nn.Linear(dim, dim)
        self.mask_token = nn.Parameter(torch.empty(1, 1, decoder_dim))
        self.mask_token_1 = nn.Parameter(torch.empty(1, 1, dim))
        self.de_pos_embed = nn.Parameter(sincos_positions(decoder_dim, *self.grid, "yx"), requires_grad=False)
        self.decode_blocks, self.decode_blocks_1 = (
            nn.ModuleList([DecoderBlock(width, heads, dim, ratio) for _ in range(decoder_depth)])
            for width in (decoder_dim, dim))
        self.decode_norm, self.decode_norm_1 = nn.LayerNorm(decoder_dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.lm_head = nn.ModuleDict(dict(proj=nn.ConvTranspose2d(decoder_dim, self.config["in_chans"], p, p)))
        self.lm_head_1 = nn.Linear(dim, dim)
        self.init_linear_layers()
        self.momentum_encoder = BeitViT(**self.config).requires_grad_(False)
        self.update_ema(0.0)                                    # a copy

    def init_linear_layers(self):
        """Xavier's start for all linear layers and the patch projection, and nearly no cls token."""
        layers = {name: module for name, module in self.named_modules() if isinstance(module, nn.Linear)}
        layers["patch_embed.proj"] = self.patch_embed.proj      # while lm_head.proj keeps torch's start
        for name, layer in layers.items():
            outputs, inputs = layer.weight.flatten(1).shape
            if name.endswith("qkv"):                            # three matrices, not one stack; kv is one, as published
                outputs //= 3
            nn.init.uniform_(layer.weight, -(6 / (inputs + outputs)) ** 0.5, (6 / (inputs + outputs)) ** 0.5)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
        nn.init.normal_(self.cls_token, std=1e-6)
        for token in (self.mask_token, self.mask_token_1):
            nn.init.trunc_normal_(token, std=0.02, a=-0.02, b=0.02)         # cut off at one deviation, as published

    def random_order(self, images, device):
        """Draw an order of the patches for each image, (images, N): the first `visible` ones are seen."""
        return random_orders(images, self.grid, self.in_blocks, device)

    def forward(self, img, order):
        """Normalised images (B, C, h, w), order of their patches (B, N) -> errors of the hidden patches' pixels and
        features, () each."""
        first = 1 + self.visible                                # the hidden tokens, behind cls and the visible ones
        target = self.feature_target(img, order, first)         # before the predictions' graph takes its memory
        pixels, features = self.predict(img, order, first)                          # (B, N - V, C*p*p), (B, N - V, D)
        pixels = (pixels - self.pixel_target(img, order)).square().mean(-1)                     # (B, N - V)
        features = (features - target).square().mean(-1)                                        # (B, N - V)
        weight = self.patch_weights(order)                                                      # (B, N - V)
        return (weight * pixels).mean(), (weight * features).mean()     # over patches, not over weights, as published

    def predict(self, img, order, first):
        """Predict pixels (B, n, C*p*p) and normed features (B, n, D), in fp32, for the tokens from number `first` on:
        tokens are cls, and then the patches in the order of `order`."""
        x, after = self.embed(img, order[:, :self.visible]), {}                                 # (B, 1 + V, D)
        for number, block in enumerate(self.blocks, 1):
            x = after[number] = block(x)                        # decoders look at tokens before the norm
        latent = self.norm(x)                                                                   # (B, 1 + V, D)
        decoder = self.mask_token, self.de_pos_embed, self.decode_blocks
        x = self.decode(self.down(latent), after[self.taps[0]], order, first, *decoder)         # (B, n, E)
        # A transposed convolution from patches to pixels, applied as the matrix product that it is.
        weight, bias = self.lm_head["proj"].weight.flatten(1).T, self.lm_head["proj"].bias      # (C*p*p, E), (C,)
        pixels = F.linear(self.decode_norm(x), weight, bias.repeat_interleave(self.patch_size ** 2))    # (B, n, C*p*p)
        decoder = self.mask_token_1, self.pos_embed, self.decode_blocks_1
        x = self.decode(self.down_1(latent), after[self.taps[1]], order, first, *decoder)       # (B, n, D)
        features = self.lm_head_1(self.decode_norm_1(x)).float()                                # (B, n, D)
        return pixels.float(), F.layer_norm(features, features.shape[-1:], eps=1e-6)

    @staticmethod
    def decode(x, source, order, first, mask_token, positions, blocks):
        """Visible tokens x (B, 1 + V, E) -> (B, 1 + N - first, E), having looked at source (B, 1 + V, D).
        Official code puts the tokens back in reading order. Attention does not care, so here hidden patches stay behind
        the visible ones, and the last block computes only those that are asked for: the same numbers, less work."""
        hidden = order[:, x.shape[1] - 1:]                                                      # (B, N - V)
        # Hidden patches are told apart by their positions. Visible ones do not get theirs a second time, as published.
        x = torch.cat([x, mask_token + gather_tokens(positions[:, 1:], hidden)], 1)             # (B, 1 + N, E)
        for block in blocks[:-1]:
            x = block(x, source)                                                                # (B, 1 + N, E)
        return blocks[-1](x, source, first)

    def pixel_target(self, img, order):
        """Pixels of the hidden patches, standardised in each patch and channel, (B, N - V, C*p*p)."""
        patches = patchify(img, self.patch_size, order[:, self.visible:])                       # (B, N - V, C*p*p)
        patches = rearrange(patches, "b n (c pq) -> b n c pq", c=img.shape[1])
        return F.layer_norm(patches, patches.shape[-1:], eps=1e-5).flatten(2)

    @torch.no_grad()
    def feature_target(self, img, order, first):
        """Normed tokens of the moving average from number `first` on, (B, 1 + N - first, D). It sees all patches, and
        its final norm is left out. Only what is asked for goes through its last block: the same numbers, less work."""
        x = self.momentum_encoder.embed(img, order)                                             # (B, 1 + N, D)
        for block in self.momentum_encoder.blocks[:-1]:
            x = block(x)                                                                        # (B, 1 + N, D)
        x = self.momentum_encoder.blocks[-1](x, first)
        return F.layer_norm(x.float(), x.shape[-1:], eps=1e-6)

    def patch_weights(self, order):
        """Weights of the hidden patches (B, N - V): 1, and the share of hidden ones among the nine around each."""
        hidden = torch.ones(order.shape, device=order.device).scatter(1, order[:, :self.visible], 0.0)      # (B, N)
        around = F.avg_pool2d(hidden.unflatten(1, self.grid), 3, stride=1, padding=1).flatten(1)
        return 1 + self.weight_mask * around.gather(1, order[:, self.visible:])     # beyond the edge nothing is hidden

    @torch.no_grad()
    def update_ema(self, momentum):
        """p' <- m p' + (1 - m) p for the encoder. Official code also averages the decoders, which nobody reads."""
        online, slow = dict(self.named_parameters()), dict(self.momentum_encoder.named_parameters())
        torch._foreach_lerp_(list(slow.values()), [online[name] for name in slow], 1 - momentum)

    @torch.no_grad()
    def metrics(self, img, order, feature_weight):
        """For the log, of a few images: the loss by chance, of always predicting zero pixels and the mean feature; and
        spread, the variance of the features over patches: 1 where they have nothing in common, 0 if all collapse."""
        img, order = img[:64], order[:64]
        weight, pixels = self.patch_weights(order), self.pixel_target(img, order)
        features = self.feature_target(img, order, 1 + self.visible)                            # (B, N - V, D)
        guess = F.layer_norm(features.mean((0, 1)), features.shape[-1:], eps=1e-6)      # (D,), normed as predictions
        errors = [(weight * x.square().mean(-1)).mean() for x in (pixels, features - guess)]
        return dict(chance=errors[0] + feature_weight * errors[1], spread=features.var((0, 1)).mean())

    def features(self, img):
        """What probes look at: the mean patch token (B, D) of the network that encoder.pt holds."""
        return self.encode(img)[:, 1:].mean(1)

    def encoder_checkpoint(self):
        """What downstream scripts read: the online encoder, not the average. The official code fine-tunes it, too."""
        names = self.momentum_encoder.state_dict()
        return dict(model={k: v for k, v in self.state_dict().items() if k in names}, config=self.config)


# ----------------------------------------------------------------------------------------------------------------
# The run


@torch.no_grad()
def draw(model, source, mean, std, path, count=8):
    """Save a sheet with a row for each of `count` images, always the same: image, what the encoder sees, completed. The
    mean and deviation of a hidden patch and channel are not predicted, so the true ones are used."""
    crops = CenterCrops(source, model.config["img_size"], model.config["in_chans"])
    torch.manual_seed(0)                                        # always the same; every step seeds torch anew
    chosen = torch.randperm(len(source))[:count]
    img = normalize(crops.__getitems__(chosen.tolist())[0].to(model.cls_token.device), mean, std)
    order = model.random_order(len(img), img.device)
    p, (h, w), hidden = model.patch_size, model.grid, order[:, model.visible:]                  # (B, N - V)
    patches = patchify(img, p)                                                                  # (B, N, C*p*p)
    pred = model.predict(img, order, 1 + model.visible)[0].unflatten(2, (img.shape[1], p * p))
    var, mu = torch.var_mean(gather_tokens(patches, hidden).view_as(pred), -1, correction=0, keepdim=True)
    pred = (pred * (var + 1e-5).sqrt() + mu).flatten(2)                                         # (B, N - V, C*p*p)
    hidden = hidden.unsqueeze(2).expand_as(pred)
    columns = {"image": patches, "visible": patches.scatter(1, hidden, 0.0),        # a normalised 0 is the mean colour
               "completed": patches.scatter(1, hidden, pred)}
    for title, x in columns.items():                            # patches back to images
        x = rearrange(x, "b (h w) (c p q) -> b c (h p) (w q)", p=p, q=p, h=h, w=w)
        columns[title] = denormalize(x, mean, std).cpu()
    return save_sheet(columns, "hidden patches are drawn with their true mean and deviation", path)


def lr_at(step, steps, warmup, peak, floor):
    """A warm-up that includes both 0 and the peak, as published, then half a cosine from the peak to `floor`."""
    return peak * step / max(1, warmup - 1) if step < warmup else warmup_cosine(step, steps, warmup, peak, floor)


def momentum_at(epoch, start, end):
    """From `start` to 0.9999 in 100 epochs, then to `end` in epoch 400, each linearly."""
    if epoch < 100:
        return start + (0.9999 - start) * epoch / 100
    return 0.9999 + (end - 0.9999) * min(1, (epoch - 100) / 300)


def ramp_at(epoch, epochs):
    """The share of --feature-weight: all of it after a quarter of the epochs."""
    return min(1.0, 4 * (epoch + 1) / epochs)


def parameter_groups(model, weight_decay):
    """decay_groups, but cls has no weight decay either; mask tokens have."""
    plain, decayed = decay_groups(model, weight_decay)
    plain["params"].append(model.cls_token)
    decayed["params"] = [p for p in decayed["params"] if p is not model.cls_token]
    return [plain, decayed]


def main(argv=None):
    cfg = parse(Config, "bootmae", __doc__, RECIPES, DEMO, argv)
    run = Run(cfg, "bootmae")
    train, val = run.datasets()
    if run.peak < cfg.min_lr:
        fail(f"--min-lr {cfg.min_lr:g} is above the peak learning rate, {run.peak:.3g}: give a lower --min-lr")
    with value_errors_exit():
        model = BootMAE(cfg.decoder_dim, cfg.decoder_depth, cfg.mask_ratio, cfg.block_share, cfg.weight_mask, cfg.taps,
                        **vit_config(cfg)).to(run.device)
    if run.init:                                                # a new run, and --init was given: decoders stay fresh
        load_into(model.momentum_encoder, read(run.init), print_rank0)
        model.load_state_dict(model.momentum_encoder.state_dict(), strict=False)
    optimizer = torch.optim.AdamW(parameter_groups(model, cfg.weight_decay), betas=(0.9, 0.95), fused=True)
    net = run.start(model, optimizer, model.encoder_checkpoint(), model.features)
    picture = partial(draw, model, val or train, run.mean, run.std, os.path.join(cfg.out, "recon.png"))

    for step, passes in run.steps(run.random_crops()):
        epoch = step // run.per_epoch
        run.set_lr(lr_at(step, run.total, run.warmup, run.peak, cfg.min_lr))
        momentum = momentum_at(epoch, cfg.momentum, cfg.momentum_end)
        feature_weight = cfg.feature_weight * ramp_at(epoch, cfg.epochs)
        for img, _ in passes:                                   # uint8 crops on the device
            img = normalize(random_flip(img), run.mean, run.std)                                # (B, C, h, w)
            order = model.random_order(len(img), run.device)                                    # (B, N), visible first
            with run.autocast():
                pixels, features = net(img, order)                                              # (), ()
            run.backward(pixels + feature_weight * features, pixels=pixels, features=features)
        run.update(metrics=partial(model.metrics, img, order, feature_weight), momentum=momentum)
        model.update_ema(momentum)
        if run.rank == 0 and run.due(cfg.picture_every, step + 1) and step + 1 < run.total:
            picture()
    if run.rank == 0 and cfg.picture_every:
        picture()
    run.finish(", recon.png" if cfg.picture_every else "")


if __name__ == "__main__":
    launch(main)
