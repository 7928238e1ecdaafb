"""
D2-SimMIM: the lower stages of a small Swin learn from pixels, and all of them from the windows of a larger one.
https://arxiv.org/abs/2404.12210

Shapes: B images, (h, w) a map, D width, n windows of T tokens each, H heads.
"""
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from nets.masked import stage_outputs
from vit import SwinBlock, ViT, window_layout


class WindowLogits(nn.Module):
    """A SwinBlock that stops at its logits, q k^T / sqrt(d) plus the bias of relative positions: tokens (B, h * w, D)
    on the grid (h, w) -> (B * n, H, T, T). The mask of moved windows is not in it, as published."""

    def __init__(self, block):
        super().__init__()
        self.norm1, self.attn = block.norm1, block.attn
        del self.attn.proj                                      # it would come after the softmax

    def forward(self, x, grid):
        attn, x = self.attn, self.norm1(x)
        order = window_layout(*grid, attn.side, attn.shift, x.device)[0]
        # Values are not read, so their rows get zero gradients, as published: weight decay alone moves them.
        qkv = attn.padded_qkv(x, grid).index_select(1, order)                                   # (B, n * T, 3 * D)
        q, k, _ = rearrange(qkv, "b (n t) (k h d) -> k (b n) h t d", t=attn.side ** 2, k=3, h=attn.heads)
        bias = F.embedding(attn.relative_position_index, attn.relative_position_bias_table)     # (T, T, H)
        return (q * q.shape[-1] ** -0.5) @ k.mT + rearrange(bias, "s t h -> h s t").to(q.dtype)


def logits_of(model, last, img, mask):
    """Images, hidden patches -> the tokens after each stage of a SimMIM's Swin, and the logits of the block `last`."""
    size = img.shape[-2:]
    outputs = stage_outputs(model.encoder, model.embed(img, mask), *size)
    return outputs, last(outputs[-1], model.encoder.grid_of(*size))


def check_teacher(path, theirs, ours):
    """Raise ValueError where a teacher does not see what its student sees. theirs, ours: the options of both Swins,
    with the mean and std of their images, if they are known."""
    facts = dict(patch_size="patches of {} pixels", in_chans="{} channels", window="windows of {} patches",
                 mean="images of mean {}", std="images of deviation {}", stages="{} stages",
                 last_depth="{} blocks in its last stage", last_heads="{} heads in its last stage")
    theirs, ours = (dict(o, stages=len(o["depths"]), last_depth=o["depths"][-1], last_heads=o["heads"][-1])
                    for o in (theirs, ours))
    for name, text in facts.items():
        pair = [tuple(o[name]) if isinstance(o.get(name), list) else o.get(name) for o in (theirs, ours)]
        if None not in pair and pair[0] != pair[1]:
            raise ValueError(f"{path} has {text.format(pair[0])}, the student {text.format(pair[1])}: both look "
                             "through the same windows, so these must agree")


class TeacherLogits:
    """What a student's windows are compared with: the logits of the last block of a SimMIM's Swin, frozen, in `dtype`.
    It is no module, so that no checkpoint holds its weights."""

    def __init__(self, model, device, dtype=torch.float32):
        blocks = model.encoder.layers[-1]["blocks"]
        self.last = WindowLogits(blocks[-1])
        model.encoder.layers[-1]["blocks"] = blocks[:-1]
        self.model = model.requires_grad_(False).eval().to(device, dtype)
        self.last = self.last.requires_grad_(False).to(device, dtype)

    @torch.no_grad()
    def __call__(self, img, mask):
        """Normalised images (B, C, height, width), hidden patches -> logits (B * n, H, T, T)."""
        with torch.autocast(img.device.type, enabled=False):    # its weights have the precision themselves
            return logits_of(self.model, self.last, img.to(self.last.norm1.weight.dtype), mask)[1]


class DistilledSimMIM(nn.Module):
    """A SimMIM of a Swin whose head reads an early map (tap), and whose windows attend as a larger Swin's do, which
    sees the same patches. model: the student; teacher: TeacherLogits; weight: of the teacher, beside the pixels' 1."""

    def __init__(self, model, teacher, weight=1.0):
        super().__init__()
        self.model, self.teacher, self.weight, c = model, teacher, weight, model.encoder.config
        heads, theirs = c["heads"][-1], teacher.last.attn
        # A block above the student's own, so that all of these are free to serve it. Its windows are the teacher's.
        block = SwinBlock(model.encoder.width, heads, theirs.side, theirs.shift, c["mlp_ratio"], 0.0, c["eps"])
        self.extra = WindowLogits(block.apply(ViT.init_weights))
        self.adapter = nn.Conv2d(heads, theirs.heads, 1, bias=False)        # translates heads, and is thrown away

    def forward(self, img, mask, asked):
        """As SimMIM's: normalised images, hidden patches (B, H, W), what is asked -> loss ()."""
        model, self.targets = self.model, self.teacher(img, mask).float()
        outputs, logits = logits_of(model, self.extra, img, mask)
        pixels = model.error(model.encoder.norm(outputs[model.tap]), mask, asked)               # ()
        distill = F.mse_loss(self.adapter(logits).float(), self.targets)                        # ()
        self.parts = dict(pixels=pixels.detach(), distill=distill.detach())                     # for the log
        return pixels + self.weight * distill

    def metrics(self, asked):
        """For the log: the loss by chance, where the teacher's logits are guessed as their mean, and their share."""
        guess = self.targets.var(unbiased=False)                                                # ()
        return dict(chance=self.model.metrics(asked)["chance"] + self.weight * guess, distill_chance=guess)
