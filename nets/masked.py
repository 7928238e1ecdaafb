"""
A ViT or a Swin under masked image modelling: which map is read, what comes out of it, how it starts, what is kept.

Shapes: B images, C channels, N tokens, D width, (h, w) the grid of the map that is read, (H, W) the grid of patches.
"""
import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from vit import Swin, SwinBlock, ViT


def stage_outputs(swin, x, height, width):
    """Patch tokens x (B, H * W, D) of images of these sizes -> the tokens after each stage, its merging included."""
    outputs = []
    for layer, grid in zip(swin.layers, swin.maps(height, width)):
        for block in layer["blocks"]:
            x = block(x, grid)                                                                  # (B, h * w, D)
        if "downsample" in layer:
            x = layer["downsample"](x, grid)                    # (B, h / 2 * w / 2, 2 * D)
        outputs.append(x)
    return outputs


def prepare(net, tap=None):
    """Give a network a mask token and the norm of the map that is read -> the grid of patches, that of the map, and
    the map's width. tap: a Swin's stage, counted from 0, after whose merging it is read; None: the last map. ValueError
    when a Swin's maps are not halves of each other."""
    dim, size = net.patch_embed.proj.out_channels, net.config["img_size"]
    maps = net.maps(*size) if isinstance(net, Swin) else [net.grid]
    stage = len(maps) - 1 if tap is None else min(tap + 1, len(maps) - 1)       # merged, it lies on the next grid
    if maps[0] != tuple(side << len(maps) - 1 for side in maps[-1]):
        raise ValueError(f"the maps of this Swin, {maps}, are not halves of each other: give an --img-size that is a "
                         f"multiple of {net.patch_size << len(maps) - 1}")
    if tap is not None:
        net.norm = nn.LayerNorm(dim << stage, eps=net.config["eps"])
    net.mask_token = nn.Parameter(torch.empty(1, 1, dim))       # so it is called in SimMIM's and BEiT's files
    cut = 2.0 if isinstance(net, Swin) else 0.02                # of a ViT at one deviation
    nn.init.trunc_normal_(net.mask_token, std=0.02, a=-cut, b=cut)
    return maps[0], maps[stage], dim << stage


@torch.no_grad()
def start_as_published(net, target):
    """The start that a ViT has in MaskFeat ("hog"), or in BEiT and SimMIM -> the ViT. A Swin has its own already. With
    fixed positions, which those do not have, it is MAE's: our small ViTs learn sooner from it."""
    linear = [m for m in net.modules() if isinstance(m, nn.Linear)]
    if not net.pos_embed.requires_grad:
        for weight in (*(layer.weight for layer in linear), net.patch_embed.proj.weight.flatten(1)):
            nn.init.xavier_uniform_(weight)                     # flatten gives a view, so the projection itself
        return net
    if target == "hog":                                         # MaskFeat: biases of layers and norms start at 0.02
        for module in linear + [m for m in net.modules() if isinstance(m, nn.LayerNorm)]:
            if module.bias is not None:                         # BEiT's keys have none
                nn.init.constant_(module.bias, 0.02)
        return net
    for p in (*(layer.weight for layer in linear), net.cls_token, net.pos_embed):
        nn.init.trunc_normal_(p, std=0.02, a=-0.02, b=0.02)     # cut at one deviation
    for number, block in enumerate(net.blocks, 1):
        for layer in (block.attn.proj, block.mlp.fc2):
            layer.weight.div_(math.sqrt(2 * number))            # deeper blocks say less at first
    return net


def new_head(target, width, answers, block, grid, config):
    """The layers of a light head, (decoder, decoder_pred): a 1x1 convolution and None; or MAE-Lite's for small Swins, a
    linear layer to `block` channels and a Swin block whose window is not moved, and the convolution. config: of the
    network."""
    last = nn.Sequential(nn.Conv2d(block or width, answers, 1))
    if target != "pixels":                                      # for pixels torch's own start, as published
        nn.init.normal_(last[0].weight, std=0.02 if target == "tokens" else 0.0)
        nn.init.zeros_(last[0].bias)
    if not block:
        return last, None
    window = min(config.get("window", 7), *grid)
    layers = nn.Linear(width, block), SwinBlock(block, 3, window, 0, 4.0, 0.0, config["eps"])
    return nn.Sequential(*layers).apply(ViT.init_weights), last


def read_map(net, x, size, tap=None):
    """The tokens that the first block sees -> the normed tokens of the map that is read, without cls, (B, N, D)."""
    if isinstance(net, Swin):
        return net.norm(stage_outputs(net, x, *size)[-1 if tap is None else tap])
    for block in net.blocks:
        x = block(x)                                                                            # (B, 1 + N, D)
    return net.norm(x[:, 1:])


@torch.no_grad()
def reconstruct(model, img, mask):
    """The answers of a SimMIM for all cells, as the map that was asked for: (B, C, height, width), or of HOG
    (B, C * 9, ...)."""
    tokens = read_map(model.encoder, model.embed(img, mask), img.shape[-2:], model.tap)         # (B, N, D)
    every = torch.arange(tokens.shape[1], device=img.device).expand(len(img), -1)               # (B, N)
    p = model.cell // model.hog_cell if model.target == "hog" else model.cell
    answer = model.answer(tokens, every).float()                                                # (B, N, A)
    return rearrange(answer, "b (h w) (c p q) -> b c (h p) (w q)", h=model.grid[0], p=p, q=p)


def mean_token(net, img, tap=None):
    """What probes look at: the mean token (B, D) of whole images, of the network that encoder.pt holds."""
    if not isinstance(net, Swin):
        return net.encode(img)[:, 1:].mean(1)
    x = net.block_outputs(img)[-1]                                                              # (B, N, D)
    x = net.norm(x) if tap is None else F.layer_norm(x, x.shape[-1:], eps=net.norm.eps)
    return x.mean(1)


def checkpoint_of(net, tap=None):
    """What downstream scripts read: the network under its published names, without the mask token."""
    state, config = net.state_dict(), net.config
    del state["mask_token"]
    if tap is not None:                                         # its norm has learnt another map than the last one
        state |= {"norm.weight": torch.ones(net.width), "norm.bias": torch.zeros(net.width)}
        config = dict(config, final_norm="fresh: weight 1, bias 0")
    return dict(model=state, config=config)


def exempt(groups, model, names):
    """AdamW's groups, without and with weight decay, with the parameters of these last names in the former, too."""
    plain, decayed = groups
    free = {id(p) for name, p in model.named_parameters() if name.split(".")[-1] in names}
    plain["params"] += [p for p in decayed["params"] if id(p) in free]
    decayed["params"] = [p for p in decayed["params"] if id(p) not in free]
    return groups
