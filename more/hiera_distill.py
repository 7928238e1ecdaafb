"""
A teacher for a Hiera's MAE: the student also learns how a frozen, larger Hiera attends to the units that both see.
https://arxiv.org/abs/2404.12210. What distill.py is for mae.py; more/hiera_mae.py --distill-teacher starts it.
"""
import torch
import torch.nn.functional as F
from torch import nn

import weights
from distill import LogitsBlock, chance_error, layer_pairs
from runtime.folder import FileOfRun
from runtime.options import fail, value_errors_exit
from runtime.run import DTYPES, print_rank0


def run_blocks(hiera, x, attention=(), hidden=(), extra=None):
    """Tokens x (B, K, T, D) through the blocks -> those at the end of each stage, and what is compared.

    attention: blocks whose logits (B, H, N, N) are compared, counted from 1; `extra` stands for the one above the last.
    hidden: states (B, N, D) that are compared, counted from 0: what block 1, 2, ... reads after its norm1.
    """
    ends, logits, states = [], {}, {}
    for number, block in enumerate(hiera.blocks, 1):
        if number - 1 in hidden:
            states[number - 1] = block.norm1(x).flatten(1, 2)                                   # (B, N, D)
        if number in attention:                                 # before the softmax
            logits[number] = block.attn.logits(block.norm1(x))                                  # (B, H, N, N)
        x = block(x)                                                                            # (B, K, T, D)
        if number in hiera.stage_ends:
            ends.append(x)
    if extra is not None:
        logits[len(hiera.blocks) + 1] = extra(x)                                                # (B, H, N, N)
    return ends, [logits[number] for number in attention] + [states[number] for number in hidden]


def compared(hiera, kind, number):
    """What is compared at a layer: its channels, which are heads ("attention") or the width ("hidden"), and how often
    queries and keys were pooled before. ValueError for attention within mask units, which is not over all tokens."""
    block, before = hiera.blocks[number - (kind == "attention")], sum(b.attn.pool for b in hiera.blocks[:number])
    if kind == "hidden":
        return block.norm1.normalized_shape[0], before, before
    if block.attn.within:
        raise ValueError(f"--distill-layers: block {number} of {hiera.depth} sees its unit alone: name later ones")
    return block.attn.heads, before, before - block.attn.pool


class HieraTeacher(FileOfRun):
    """A frozen Hiera; called, it gives what a student is compared with. No module, so that no checkpoint holds its
    weights. path: its file, which checkpoints remember; pairs: see distill.layer_pairs. ValueError as `compared`."""

    def __init__(self, path, hiera, pairs):
        super().__init__(path)
        self.hiera, self.pairs = hiera.requires_grad_(False).eval(), pairs
        self.attention, self.hidden = ([theirs for _, theirs in pairs[kind]] for kind in ("attention", "hidden"))
        self.layers = [compared(hiera, kind, theirs) for kind in pairs for _, theirs in pairs[kind]]
        last, self.extra = max(self.attention + [number + 1 for number in self.hidden]), None
        if last in self.attention:                              # the same targets, less work: it ends at these logits
            self.extra, hiera.blocks = LogitsBlock(hiera.blocks[last - 1]), hiera.blocks[:last - 1]

    @torch.no_grad()
    def __call__(self, img, keep):
        """Normalised images (B, C, h, w), units to see (B, K) -> the teacher's targets, a list."""
        with torch.autocast(img.device.type, enabled=False):    # its weights have the precision themselves
            x = self.hiera.embed(img.to(self.hiera.pos_embed.dtype), keep)                      # (B, K, T, D)
            return run_blocks(self.hiera, x, self.attention, self.hidden, self.extra)[1]


class DistilledHieraMAE(nn.Module):
    """A HieraMAE that predicts the hidden units, and attends to the visible ones as its teacher does. weight: of each
    pair of layers, beside the pixels' 1."""

    def __init__(self, model, teacher, weight=1.0):
        super().__init__()
        self.model, self.teacher, self.weight, self.adapters = model, teacher, weight, nn.ModuleList()
        self.attention, self.hidden = ([ours for ours, _ in teacher.pairs[kind]] for kind in ("attention", "hidden"))
        numbers = [(kind, ours) for kind in teacher.pairs for ours, _ in teacher.pairs[kind]]
        for (kind, number), theirs in zip(numbers, teacher.layers):
            ours = compared(model, kind, number)
            if ours[1:] != theirs[1:]:
                raise ValueError(f"--distill-layers: the student's {number} is on another map than the teacher's layer")
            # As in MAE-Lite: over the heads, or over the width; without bias, and thrown away in the end.
            adapter = nn.Conv2d(ours[0], theirs[0], 1, bias=False) if kind == "attention" else None
            self.adapters.append(adapter or nn.Linear(ours[0], theirs[0], bias=False))

    def compare(self, img, order):
        """Both see the same units -> the student's tokens at the end of each stage, the error of each pair (P,)."""
        self.targets = self.teacher(img, order[:, :self.model.visible])         # also kept for the log
        ends, outputs = run_blocks(self.model, self.model.embed_visible(img, order), self.attention, self.hidden)
        pairs = zip(self.adapters, outputs, self.targets)
        return ends, torch.stack([F.mse_loss(adapter(x).float(), target.float()) for adapter, x, target in pairs])

    def forward(self, img, order):
        """Images (B, C, h, w), order of their units (B, U), visible ones first -> loss ()."""
        ends, errors = self.compare(img, order)
        pixels, distill = self.model.pixel_error(img, self.model.fuse(ends), order), errors.sum()           # (), ()
        self.parts = dict(pixels=pixels.detach(), distill=distill.detach())     # for the log
        return pixels + self.weight * distill

    def metrics(self, img, order):
        """For the log: the loss by chance, and the share of the teacher's targets in it."""
        distill_chance = chance_error(self.targets)
        chance = self.model.metrics(img, order)["chance"] + self.weight * distill_chance
        return dict(chance=chance, distill_chance=distill_chance)


def add_teacher(cfg, model, run):
    """The model with --distill-teacher beside it, and that teacher."""
    path, student = cfg.distill_teacher, dict(model.config, unit=model.unit, mean=run.mean, std=run.std)
    file = weights.read(path)
    options = weights.hiera_options(file, cfg.teacher_heads, "--teacher-heads")
    theirs = dict(options, unit=options["patch_size"] << len(options["stages"]) - 1)
    theirs |= {name: tuple(file.config.get(name) or student[name]) for name in ("mean", "std")}
    for name in ("patch_size", "unit", "in_chans", "mean", "std"):
        if theirs[name] != student[name]:
            fail(f"{path} has {name} {theirs[name]}, the student {student[name]}: both see the same mask units, so "
                 "these must agree")
    first = int(cfg.distill == "hidden")                        # states are counted from 0
    pairs = layer_pairs(cfg.distill_layers, cfg.distill, model.depth - first, sum(options["stages"]) - first)
    with value_errors_exit():                                   # no weight depends on how often it pools
        hiera = weights.build(options | {name: student[name] for name in ("q_pool", "img_size")})
        weights.load_into(hiera, file, print_rank0)
        teacher = HieraTeacher(path, hiera.to(run.device, DTYPES[run.cfg.dtype]), pairs)
        return DistilledHieraMAE(model, teacher, cfg.distill_weight), teacher
