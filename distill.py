"""
Distillation before fine-tuning: a student learns the attention (or the hidden states) of a frozen, larger ViT.
mae.py --distill-teacher adds it to the pixels (D-MAE, https://arxiv.org/abs/2205.14443; decoupled, D2-MAE,
https://arxiv.org/abs/2404.12210). As a script, this file trains a student on it alone.

One node:   torchrun --standalone --nproc_per_node=8 distill.py --teacher mae_base.pth --out out/distill
One GPU:    python distill.py --teacher mae_base.pth --accum 8
A minute:   make demo-distill
Preempted:  type the same command again
Expected:   not run yet at full size; the demo's last lines are in the README
"""
import re
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

import weights
from images.augment import normalize, random_flip
from runtime.folder import FileOfRun
from runtime.options import ProbeOptions, TrainingOptions, fail, flag, opt, parse, value_errors_exit, vit_config
from runtime.run import DTYPES, Run, decay_groups, launch, print_rank0, warmup_cosine
from vit import MODELS, Block, ViT


class LogitsBlock(nn.Module):
    """A transformer block that stops at its attention logits, q k^T / sqrt(d): tokens (B, N, D) -> (B, H, N, N). It is
    the last block that a teacher needs, and what D2-MAE puts above a student, so that all its own blocks learn."""

    def __init__(self, block):
        super().__init__()
        self.norm1, self.attn = block.norm1, block.attn
        del self.attn.proj                                      # it would come after the softmax

    def forward(self, x):
        return self.attn.logits(self.norm1(x))


def run_blocks(vit, x, attention=(), hidden=(), tap=None, extra=None):
    """Tokens x (B, N, D) through the blocks -> normed tokens after `tap` blocks (default: all), and what is compared.

    attention: layers whose logits (B, H, N, N) are compared, counted from 1; `extra` is the one above the last block.
    hidden: layers whose states (B, N, D) are compared, counted from 0: what block 1, 2, ... reads after its norm1, and
    at the end the final norm's output. Both counts are the published ones.
    """
    logits, states, tapped = {}, {}, x
    for number, block in enumerate(vit.blocks, 1):
        if number - 1 in hidden:
            states[number - 1] = block.norm1(x)                                                 # (B, N, D)
        if number in attention:                                 # before the softmax, with cls
            logits[number] = block.attn.logits(block.norm1(x))                                  # (B, H, N, N)
        x = block(x)                                                                            # (B, N, D)
        if tap is None or number == tap:
            tapped = x                                          # what a decoder reads
    if len(vit.blocks) in hidden:
        states[len(vit.blocks)] = vit.norm(x)                                                   # (B, N, D)
    if extra is not None:
        logits[len(vit.blocks) + 1] = extra(x)                                                  # (B, H, N, N)
    return vit.norm(tapped), [logits[number] for number in attention] + [states[number] for number in hidden]


def layer_pairs(layers, kind, depth, teacher_depth):
    """Read --distill-layers: "9:12" compares the student's layer 9 with the teacher's 12 (default: the last of both) ->
    dict of (student's, teacher's) numbers, for attention and for hidden states."""
    pairs, least = [], 0 if kind == "hidden" else 1
    for text in layers or (f"{depth}:{teacher_depth}",):
        if not re.fullmatch(r"\d+:\d+", text):
            fail(f"--distill-layers {text} is not STUDENT:TEACHER, two numbers such as {depth}:{teacher_depth}")
        pair = tuple(map(int, text.split(":")))                 # the student's layer, the teacher's
        if not least <= pair[0] <= depth or not least <= pair[1] <= teacher_depth:
            fail(f"--distill-layers {text}: layers are {least} to {depth} (student) and {least} to {teacher_depth} "
                 "(teacher)")
        pairs.append(pair)
    if len({student for student, _ in pairs}) < len(pairs):
        fail(f"--distill-layers {' '.join(layers)} names a layer of the student twice")
    return dict(attention=[], hidden=pairs) if kind == "hidden" else dict(attention=pairs, hidden=[])


class Teacher(FileOfRun):
    """A frozen ViT from a file of any layout; called, it gives what a student is compared with. No module, so that no
    checkpoint holds its weights. kind, layers: see layer_pairs; student: the student's ViT options; student_depth: its
    blocks, an extra one included; run: for mean, std, device and dtype."""

    def __init__(self, path, heads, kind, layers, student, student_depth, run):
        file = weights.read(path)
        super().__init__(path)
        stored = file.config.get("heads")
        if heads and stored and heads != stored:
            fail(f"--teacher-heads {heads}: {path} says that it has {stored}")
        self.options = weights.vit_options(file, heads, "--teacher-heads")
        # Both see the same patches, so these must agree.
        ours = dict(student, mean=run.mean, std=run.std)
        theirs = dict(self.options, **{name: tuple(file.config.get(name) or ours[name]) for name in ("mean", "std")})
        for name in ("patch_size", "in_chans", "mean", "std"):
            if theirs[name] != ours[name]:
                fail(f"{path} was made with {flag(name)} {theirs[name]}, the student has {ours[name]}: both see the "
                     "same patches, so these must agree")
        self.pairs = layer_pairs(layers, kind, student_depth, self.options["depth"])
        self.attention = [theirs for _, theirs in self.pairs["attention"]]
        self.hidden = [theirs for _, theirs in self.pairs["hidden"]]
        with value_errors_exit():
            vit = weights.build({**self.options, "positions": "learned", "img_size": student["img_size"]})
        if self.options["depth"] not in self.hidden:
            vit.norm = nn.Identity()                            # nothing reads it, and some files have none
        weights.load_into(vit, file, print_rank0)
        self.vit, self.extra = vit.requires_grad_(False).eval().to(run.device, DTYPES[run.cfg.dtype]), None
        if self.attention:
            # The same targets, less work: of the last layer only its logits, and nothing after it.
            self.extra = LogitsBlock(vit.blocks[max(self.attention) - 1])
            vit.blocks = vit.blocks[:max(self.attention) - 1]
        elif self.options["depth"] not in self.hidden:
            vit.blocks = vit.blocks[:max(self.hidden) + 1]

    @torch.no_grad()
    def __call__(self, img, keep=None):
        """Normalised images (B, C, h, w), patches to see (B, K) or None for all -> the teacher's targets, a list."""
        with torch.autocast(img.device.type, enabled=False):    # its weights have the precision themselves
            x = self.vit.embed(img.to(self.vit.cls_token.dtype), keep)                          # (B, 1 + K, D)
            return run_blocks(self.vit, x, self.attention, self.hidden, extra=self.extra)[1]


class DistillLoss(nn.Module):
    """The mean squared error between a student's outputs and its teacher's, pair by pair. student, teacher: dicts with
    heads and dim; pairs: see layer_pairs. Adapters translate between their sizes, as in MAE-Lite, and are thrown away
    in the end. adapter False: none where the sizes agree."""

    def __init__(self, student, teacher, pairs, adapter=True):
        super().__init__()
        self.attention = [ours for ours, _ in pairs["attention"]]
        self.hidden = [ours for ours, _ in pairs["hidden"]]
        heads, dims = (student["heads"], teacher["heads"]), (student["dim"], teacher["dim"])
        # A 1x1 convolution over the heads, a linear layer over the width; without bias, with torch's own start.
        adapters = [nn.Conv2d(*heads, 1, bias=False) if adapter or heads[0] != heads[1] else nn.Identity()
                    for _ in self.attention]
        adapters += [nn.Linear(*dims, bias=False) if adapter or dims[0] != dims[1] else nn.Identity()
                     for _ in self.hidden]
        self.adapters = nn.ModuleList(adapters)

    def forward(self, outputs, targets):
        """Two lists of P tensors, the student's and the teacher's -> the error of each pair, (P,), in fp32."""
        return torch.stack([F.mse_loss(adapter(x).float(), target.float())
                            for adapter, x, target in zip(self.adapters, outputs, targets)])


def chance_error(targets):
    """The error of always predicting the mean of the teacher's targets, summed over pairs: the chance level."""
    return sum(target.float().var(unbiased=False) for target in targets)


class DistillStudent(nn.Module):
    """A ViT that learns from a teacher alone. decoupled: the teacher is compared with a LogitsBlock above the ViT.
    `model` and the adapters are trained; the teacher is no module, so it is not."""

    def __init__(self, vit, teacher, decoupled=False, adapter=True):
        super().__init__()
        self.model, self.teacher = vit, teacher
        # D2: the student's own attention stays free, and every one of its blocks learns from the block above.
        self.extra = LogitsBlock(Block(vit.width, vit.config["heads"]).apply(ViT.init_weights)) if decoupled else None
        self.distill_loss = DistillLoss(vit.config, teacher.options, teacher.pairs, adapter)

    def compare(self, img, keep, tap=None):
        """Both see the same patches keep (B, K) -> the student's normed tokens after `tap` blocks, and the error ()."""
        loss, self.targets = self.distill_loss, self.teacher(img, keep)     # targets are also kept for the log
        x = self.model.embed(img, keep)                                                         # (B, 1 + K, D)
        tokens, outputs = run_blocks(self.model, x, loss.attention, loss.hidden, tap, self.extra)
        return tokens, loss(outputs, self.targets).sum()                                        # (B, 1 + K, D), ()

    def forward(self, img, keep=None):
        """Images (B, C, h, w), the patches to see (B, K) or None for all -> loss ()."""
        return self.compare(img, keep)[1]

    def metrics(self):
        return dict(chance=chance_error(self.targets))


class DistilledMAE(DistillStudent):
    """An MAE that predicts the hidden patches, and attends to the visible ones as its teacher does (D-MAE). Decoupled
    (D2-MAE), the MAE's tap leaves its upper blocks to the teacher alone. weight: of each pair, beside the pixels' 1."""

    def __init__(self, model, teacher, weight=1.0, decoupled=False, adapter=True):
        super().__init__(model, teacher, decoupled, adapter)
        self.weight = weight
        if decoupled:
            nn.init.xavier_uniform_(self.extra.attn.qkv.weight)         # as all linear layers of an MAE

    def forward(self, img, order):
        """Images (B, C, h, w), order of their patches (B, N), visible ones first -> loss ()."""
        latent, distill = self.compare(img, order[:, :self.model.visible], self.model.tap)      # (B, 1 + V, D), ()
        pixels = self.model.pixel_error(img, latent, order)                                     # ()
        self.parts = dict(pixels=pixels.detach(), distill=distill.detach())                     # for the log
        return pixels + self.weight * distill

    def metrics(self, img):
        """For the log: the loss by chance, and the share of the teacher's targets in it."""
        distill_chance = chance_error(self.targets)                                             # ()
        chance = self.model.metrics(img)["chance"] + self.weight * distill_chance               # ()
        return dict(chance=chance, distill_chance=distill_chance)


# ----------------------------------------------------------------------------------------------------------------
# The run: the teacher alone


@dataclass
class Config(TrainingOptions, ProbeOptions):
    teacher: str | None = opt(None, "file of the teacher, a ViT in any layout")
    teacher_heads: int | None = opt(None, "attention heads of the teacher, where its file does not say", least=1)
    distill: str = opt("attention", "what is learnt; attention is compared in one additional block, as in D2-MAE",
                       choices=("attention", "hidden"))
    distill_layers: tuple[str, ...] | None = opt(None, "STUDENT:TEACHER layers, as 12:24 (default: the last of both)")
    mask_ratio: float = opt(0.75, "share of patches that neither of the two sees; 0: both see all", least=0, most=1)
    repeat: int = opt(1, "crops of each decoded image in a batch, which then has batch / repeat images", least=1)


RECIPES = dict.fromkeys(MODELS, dict(batch_size=4096, epochs=400, warmup_epochs=40, blr=1.5e-4, weight_decay=0.05,
                                     min_crop=0.08, interpolation="random"))
DEMO = dict(data="shapes", model="vit_mini", img_size=(48,), patch_size=8, mask_ratio=0.6, min_crop=0.6, batch_size=128,
            interpolation="bicubic", epochs=6, warmup_epochs=0.6, blr=4e-3, workers=1, log_every=78, save_every=390)


def main(argv=None):
    cfg = parse(Config, "distill", __doc__, RECIPES, DEMO, argv)
    cfg.teacher or fail("--teacher FILE is required: a ViT in any layout (make demo-distill makes one)")
    run = Run(cfg, "distill")
    train, val = run.datasets()
    with value_errors_exit():
        vit = ViT(**vit_config(cfg))
    if run.init:
        weights.load_into(vit, weights.read(run.init), print_rank0)
    decoupled = cfg.distill == "attention"                      # compared in one block more, so that all others learn
    if decoupled:
        vit.norm.requires_grad_(False).reset_parameters()       # no loss reads it, and that of --init read other blocks
    last = vit.depth + decoupled
    teacher = Teacher(cfg.teacher, cfg.teacher_heads, cfg.distill, cfg.distill_layers, vit.config, last, run)
    model = DistillStudent(vit, teacher, decoupled).to(run.device)      # with the adapters, and the block above
    if max(model.distill_loss.attention + model.distill_loss.hidden) < last:
        fail(f"--distill-layers must name the student's last layer, {last}: nothing would train the blocks above")
    patches = vit.grid[0] * vit.grid[1]                         # N
    visible = int(patches * (1 - cfg.mask_ratio)) or fail(f"--mask-ratio {cfg.mask_ratio:g} leaves no patch to see")
    optimizer = torch.optim.AdamW(decay_groups(model, cfg.weight_decay), betas=(0.9, 0.95), fused=True)
    # Adapters and the block above are left behind: encoder.pt gets the ViT, and probes look at its mean patch token.
    net = run.start(model, optimizer, encoder=dict(model=vit.state_dict(), config=vit.config),
                    features=lambda img: vit.encode(img)[:, 1:].mean(1), teacher=teacher)

    for step, passes in run.steps(run.random_crops()):
        run.set_lr(warmup_cosine(step, run.total, run.warmup, run.peak))
        for img, _ in passes:                                   # uint8 crops on the device
            img = normalize(random_flip(img), run.mean, run.std)                                # (B, C, h, w)
            order = torch.rand(len(img), patches, device=run.device).argsort(1)                 # (B, N)
            keep = order[:, :visible] if visible < patches else None    # student and teacher see the same patches
            with run.autocast():
                loss = net(img, keep)
            run.backward(loss)
        run.update(metrics=model.metrics)
    run.finish()


if __name__ == "__main__":
    launch(main)
