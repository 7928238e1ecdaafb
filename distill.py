"""
Distillation before fine-tuning: a student learns from a frozen, larger ViT, without labels. What it learns is the
teacher's attention or hidden states, and mae.py --distill-teacher adds that to the pixels (D-MAE,
https://arxiv.org/abs/2205.14443; decoupled, D2-MAE, https://arxiv.org/abs/2404.12210); or the final tokens of a
foundation model of timm's, as in Proteus (https://github.com/BeSpontaneous/Proteus-pytorch) without its masked pass.

One node:   torchrun --standalone --nproc_per_node=8 distill.py --teacher mae_base.pth --out out/distill
DINOv2:     python distill.py --teacher timm:vit_small_patch14_reg4_dinov2 --teacher-file dinov2_vits14_reg4.pth
Minutes:    python distill.py --demo        (final tokens; make demo-distill has attention)
Preempted:  type the same command again
Expected:   not run yet at full size; the demos' last lines are in README.md and docs/findings.md
"""
import os
import re
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import nn

import weights
from images.augment import normalize, random_flip
from nets.timm_vit import FrozenViT, cached_file, load_timm_vit, save_random_timm_vit
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


def read_teacher(path, heads):
    """The weights in a file of any layout, and the options of the ViT that they make."""
    if path.startswith("timm:"):
        fail(f"{path}: only `distill.py --distill tokens` takes a teacher of timm's; here a ViT's file is expected")
    file = weights.read(path)
    stored = file.config.get("heads")
    if heads and stored and heads != stored:
        fail(f"--teacher-heads {heads}: {path} says that it has {stored}")
    return file, weights.vit_options(file, heads, "--teacher-heads")


def licence_of(file):
    """The licence of a teacher's own teacher, if its file names one: it may bind the student, too."""
    teacher = file.config.get("teacher")
    return str(teacher.get("licence")) if isinstance(teacher, dict) and teacher.get("licence") else None


class Teacher(FileOfRun):
    """A frozen ViT from a file of any layout; called, it gives what a student is compared with. No module, so that no
    checkpoint holds its weights. kind, layers: see layer_pairs; student: the student's ViT options; student_depth: its
    blocks, an extra one included; run: for mean, std, device and dtype."""

    def __init__(self, path, heads, kind, layers, student, student_depth, run):
        file, self.options = read_teacher(path, heads)
        super().__init__(path)
        self.facts = dict(name=os.path.basename(path), sha256=self.sha256, licence=licence_of(file))
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
    """The error of always predicting the mean of each channel (D) of the teacher's states, or of each head's logits,
    summed over pairs: the chance level."""
    channels = [1 if target.dim() == 4 else -1 for target in targets]           # (B, H, N, N) or (B, N, D)
    return sum(target.float().transpose(0, channel).flatten(1).var(1, unbiased=False).mean()
               for target, channel in zip(targets, channels))


class DistillStudent(nn.Module):
    """A ViT that learns from a teacher alone. decoupled: the teacher is compared with a LogitsBlock above the ViT.
    `model` and the adapters are trained; the teacher is no module, so it is not."""
    parts = {}                                                  # of the loss, for the log: it has only one

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
# Final tokens: learn what a foundation model makes of an image


def read_own_vit(path, heads, grid, mean, std):
    """The ViT in a file of any layout, for images of grid (h, w) patches -> FrozenViT. mean, std: where it has none."""
    file, options = read_teacher(path, heads)
    patch = options["patch_size"]
    pool = "cls" if "norm.weight" in file.state else "avg"      # classifiers of the mean token have no norm before it
    with value_errors_exit():
        vit = weights.build({**options, "positions": "learned", "img_size": [n * patch for n in grid], "pool": pool})
    weights.load_into(vit, file, print_rank0)
    mean, std = tuple(file.config.get("mean") or mean), tuple(file.config.get("std") or std)
    return FrozenViT(vit, vit.encode, 1, True, patch, vit.width, options["in_chans"], mean, std, licence_of(file))


class TokenTeacher(FileOfRun):
    """A frozen ViT; called with a student's images, it gives its own final tokens of the same patches, standardised.

    name: timm:NAME, with its official weights in `file` or in timm's cache; or the file of a ViT in any layout. grid:
    (h, w), the patches of the student's images; run: for their mean and std, device, dtype. No module, see Teacher.
    """

    def __init__(self, name, file, heads, grid, run):
        if name.startswith("timm:"):
            with value_errors_exit():
                path = file or cached_file(name[5:])
                self.vit = load_timm_vit(name[5:], path, grid)
        else:
            path, self.vit = name, read_own_vit(name, heads, grid, run.mean, run.std)
        super().__init__(path)
        if self.vit.in_chans != len(run.mean):
            fail(f"the teacher {name} sees images of {self.vit.in_chans} channels, the student of {len(run.mean)}: "
                 f"--in-chans {self.vit.in_chans} is expected")
        self.facts = dict(name=os.path.basename(name), sha256=self.sha256, licence=self.vit.licence)
        print_rank0(f"teacher {name}: {self.vit.width} wide, patches of {self.vit.patch_size}, sha256 "
                    f"{self.sha256[:12]}, licence {self.vit.licence or 'not known'}, which may bind the student, too")
        self.dtype = DTYPES[run.cfg.dtype]
        self.vit.network.requires_grad_(False).eval().to(run.device, self.dtype)
        # Both see the same patches, so the teacher's image has another size where its patches have.
        self.size = [n * self.vit.patch_size for n in grid]
        # From the student's normalisation to the teacher's: (x * std + mean - teacher's mean) / teacher's std.
        mean, std, its_mean, its_std = (torch.tensor(values, device=run.device).view(-1, 1, 1)
                                        for values in (run.mean, run.std, self.vit.mean, self.vit.std))
        self.scale, self.shift = std / its_std, (mean - its_mean) / its_std
        self.same_colours = (tuple(run.mean), tuple(run.std)) == (self.vit.mean, self.vit.std)

    def state_dict(self):
        return dict(self.facts)

    def load_state_dict(self, state):
        super().load_state_dict(state)
        if state["name"] != self.facts["name"] and state["name"].startswith("timm:"):       # files may be renamed
            fail(f"this run began with --teacher {state['name']}, not {self.facts['name']}: give that or another --out")

    @torch.no_grad()
    def __call__(self, img):
        """The student's normalised images (B, C, h, w) -> tokens of cls (B, D), or None without one, and of the patches
        (B, N, D), in fp32."""
        if not self.same_colours:
            img = img * self.scale + self.shift
        if list(img.shape[-2:]) != self.size:
            img = F.interpolate(img.float(), self.size, mode="bicubic", antialias=True)
        with torch.autocast(img.device.type, enabled=False):    # its weights have the precision themselves
            tokens = self.vit.tokens(img.to(self.dtype))                                        # (B, prefix + N, D)
        # Standardised over the channels of each token (ours): teachers differ in scale, and some have huge channels.
        tokens = F.layer_norm(tokens.float(), tokens.shape[-1:])
        cls = tokens[:, 0] if self.vit.has_cls else None                                        # (B, D)
        return cls, tokens[:, self.vit.prefix:]                 # registers are left out


def relation_logits(tokens, temperature=0.07):
    """Patches (B, N, D) -> how alike any two of an image are: their cosines by temperature, (B, N, N)."""
    tokens = F.normalize(tokens.float(), dim=-1)
    return tokens @ tokens.transpose(1, 2) / temperature


def relation_error(tokens, targets):
    """KL divergence of the softmax over a patch's relations, teacher's from student's, mean over patches, (). In its
    own width each, so no head is needed."""
    with torch.autocast(tokens.device.type, enabled=False):     # cosines of 8 bits, by 0.07, would be far too coarse
        ours, theirs = relation_logits(tokens).log_softmax(-1), relation_logits(targets).log_softmax(-1)    # (B, N, N)
    return F.kl_div(ours, theirs, reduction="none", log_target=True).sum(-1).mean()


class TokenStudent(nn.Module):
    """A whole ViT that learns a teacher's final tokens: of cls, and of the patches ("features"), or how alike these are
    ("relations"), or "both". The heads are thrown away in the end; the ViT's own final norm is trained."""

    def __init__(self, vit, teacher, patch_loss="features"):
        super().__init__()
        self.model, self.teacher, self.relations = vit, teacher, patch_loss != "features"

        def head():
            head = nn.Sequential(nn.LayerNorm(vit.width, eps=1e-6), nn.Linear(vit.width, teacher.vit.width))
            return head.apply(ViT.init_weights)

        self.cls_head = head() if teacher.vit.has_cls else None         # some teachers have no cls token
        self.patch_head = head() if patch_loss != "relations" else None

    def forward(self, img, keep=None):
        """Images (B, C, h, w) -> loss (). keep: not used, both see all patches."""
        cls, patches = self.teacher(img)                                                        # (B, D'), (B, N, D')
        tokens = self.model.encode(img)                                                         # (B, 1 + N, D)
        pairs, losses = {}, {}
        if self.cls_head is not None:
            pairs["cls"] = self.cls_head(tokens[:, 0]), cls                                     # (B, D') each
        if self.patch_head is not None:
            pairs["patch"] = self.patch_head(tokens[:, 1:]), patches                            # (B, N, D') each
        for name, (ours, theirs) in pairs.items():
            losses[name] = F.mse_loss(ours.float(), theirs)
        if self.relations:
            losses["relation"] = relation_error(tokens[:, 1:], patches)
        # For the log:
        self.parts = {name: loss.detach() for name, loss in losses.items()}
        self.pairs = {name: (ours.detach().float(), theirs) for name, (ours, theirs) in pairs.items()}
        self.patches = tokens[:, 1:].detach(), patches
        return sum(losses.values())                                                             # ()

    @torch.no_grad()
    def metrics(self):
        """For the log, per term: chance, the error of the best constant; cos, the mean cosine of prediction and target;
        cos_chance, that of the mean target. spread: of the student's mean patches, 0 when all images have the same."""
        chances, cosines, usual = {}, {}, {}
        for name, (ours, theirs) in self.pairs.items():
            ours, theirs = ours.flatten(0, -2), theirs.flatten(0, -2)                           # (B or B * N, D')
            chances[f"{name}_chance"] = theirs.var(0, unbiased=False).mean()
            cosines[f"{name}_cos"] = F.cosine_similarity(ours, theirs, -1).mean()
            usual[f"{name}_cos_chance"] = F.cosine_similarity(theirs.mean(0, True), theirs, -1).mean()
        ours, theirs = self.patches                                                             # (B, N, D), (B, N, D')
        if self.relations:                                      # the best constant is the mean over the images
            theirs = relation_logits(theirs).softmax(-1)                                        # (B, N, N)
            entropies = torch.special.entr(theirs.mean(0)) - torch.special.entr(theirs).mean(0)
            chances["relation_chance"] = entropies.sum(-1).mean()
        features = F.normalize(ours.mean(1).float(), dim=-1)                                    # (B, D)
        spread = features.std(0).mean() * features.shape[-1] ** 0.5
        return dict(chance=sum(chances.values()), **cosines, spread=spread, **chances, **usual)


# ----------------------------------------------------------------------------------------------------------------
# The run: the teacher alone


@dataclass
class Config(TrainingOptions, ProbeOptions):
    teacher: str | None = opt(None, "file of the teacher, a ViT in any layout; or timm:NAME, a ViT of timm's")
    teacher_file: str | None = opt(None, "official weights of timm:NAME (default: in timm's cache)", needs="teacher")
    teacher_heads: int | None = opt(None, "attention heads of the teacher, where its file does not say", least=1)
    distill: str | None = opt(None, "what is learnt; attention is compared in one more block, as in D2-MAE; tokens are "
                              "the final ones (default for timm:NAME and --demo, else attention)",
                              choices=("attention", "hidden", "tokens"))
    distill_layers: tuple[str, ...] | None = opt(None, "STUDENT:TEACHER layers, as 12:24 (default: the last of both)")
    patch_loss: str | None = opt(None, "tokens: of patches, learn their features, or how alike they are, or both "
                                 "[features]", choices=("features", "relations", "both"))
    mask_ratio: float | None = opt(None, "share of patches that neither of the two sees; 0: none", least=0, most=1)
    repeat: int = opt(1, "crops of each decoded image in a batch, which then has batch / repeat images", least=1)


RECIPES = dict.fromkeys(MODELS, dict(batch_size=4096, epochs=400, warmup_epochs=40, blr=1.5e-4, weight_decay=0.05,
                                     min_crop=0.08, interpolation="random", mask_ratio=0.75))
DEMO = dict(data="shapes", model="vit_mini", img_size=(48,), patch_size=8, mask_ratio=0.6, min_crop=0.6, batch_size=128,
            interpolation="bicubic", epochs=6, warmup_epochs=0.6, blr=4e-3, workers=1, log_every=78, save_every=390)
# Final tokens: batch, epochs, weight decay of Proteus, and its rate of 5e-4 per 512 images; clipping and crops of
# lightly-train. Both see the whole image.
TOKENS = dict.fromkeys(MODELS, dict(batch_size=512, epochs=300, warmup_epochs=5, blr=2.5e-4, weight_decay=0.05,
                                    clip_grad=1.0, min_crop=0.14, interpolation="bicubic", mask_ratio=0.0,
                                    patch_loss="features"))
TOKENS_DEMO = dict(DEMO, epochs=2, warmup_epochs=0.2, log_every=39, mask_ratio=0.0)
DEMO_TEACHER = "vit_tiny_patch16_dinov3_qkvb"                   # small, with registers, rotary positions, layer scale


def read_config(argv):
    """The config: final tokens have a recipe of their own, and are what is learnt from timm:NAME and in a demo."""
    cfg = parse(Config, "distill", __doc__, RECIPES, DEMO, argv)
    from_timm = bool(cfg.teacher) and cfg.teacher.startswith("timm:")
    kind = cfg.distill or ("tokens" if from_timm or cfg.demo and not cfg.teacher else "attention")
    if from_timm and kind != "tokens":
        fail(f"--distill {kind} needs the file of a ViT as --teacher; of {cfg.teacher} the final tokens can be learnt: "
             "give --distill tokens")
    if cfg.teacher_file and not from_timm:
        fail("--teacher-file has no effect without --teacher timm:NAME: give that, or the file as --teacher")
    if cfg.patch_loss and kind != "tokens":
        fail("--patch-loss has no effect without --distill tokens: give that as well")
    if kind == "tokens":
        cfg = parse(Config, "distill", __doc__, TOKENS, TOKENS_DEMO, argv)
        if cfg.mask_ratio or cfg.distill_layers:
            fail("--mask-ratio and --distill-layers have no effect with --distill tokens, which compares all final "
                 "tokens: leave them out")
        if cfg.demo and not cfg.teacher:
            cfg = with_demo_teacher(cfg)
    cfg.teacher or fail("--teacher is required: the file of a ViT in any layout, or timm:NAME (--demo makes one)")
    return replace(cfg, distill=kind)


def with_demo_teacher(cfg):
    """The config of a demo, with a network of timm's as the teacher, whose random weights are saved beside the run."""
    file = os.path.join(os.path.dirname(cfg.out), "demo-teacher.pth")
    with value_errors_exit():
        save_random_timm_vit(DEMO_TEACHER, file)
    return replace(cfg, teacher=f"timm:{DEMO_TEACHER}", teacher_file=file)


def from_blocks(cfg, vit, run):
    """A student of a teacher's attention or hidden states."""
    decoupled = cfg.distill == "attention"                      # compared in one block more, so that all others learn
    if decoupled:
        vit.norm.requires_grad_(False).reset_parameters()       # no loss reads it, and that of --init read other blocks
    last = vit.depth + decoupled
    teacher = Teacher(cfg.teacher, cfg.teacher_heads, cfg.distill, cfg.distill_layers, vit.config, last, run)
    model = DistillStudent(vit, teacher, decoupled)
    if max(model.distill_loss.attention + model.distill_loss.hidden) < last:
        fail(f"--distill-layers must name the student's last layer, {last}: nothing would train the blocks above")
    return model, teacher


def from_tokens(cfg, vit, run):
    """A student of a teacher's final tokens."""
    teacher = TokenTeacher(cfg.teacher, cfg.teacher_file, cfg.teacher_heads, vit.grid, run)
    return TokenStudent(vit, teacher, cfg.patch_loss), teacher


def main(argv=None):
    cfg = read_config(argv)
    run = Run(cfg, "distill")
    train, val = run.datasets()
    with value_errors_exit():
        vit = ViT(**vit_config(cfg))
    if run.init:
        weights.load_into(vit, weights.read(run.init), print_rank0)
    model, teacher = (from_tokens if cfg.distill == "tokens" else from_blocks)(cfg, vit, run)
    model = model.to(run.device)                                # with heads or adapters, and the block above
    patches = vit.grid[0] * vit.grid[1]                         # N
    visible = int(patches * (1 - cfg.mask_ratio)) or fail(f"--mask-ratio {cfg.mask_ratio:g} leaves no patch to see")
    optimizer = torch.optim.AdamW(decay_groups(model, cfg.weight_decay), betas=(0.9, 0.95), fused=True)
    # Only the ViT goes into encoder.pt, and probes look at its mean patch token.
    net = run.start(model, optimizer, dict(model=vit.state_dict(), config=dict(vit.config, teacher=teacher.facts)),
                    features=lambda img: vit.encode(img)[:, 1:].mean(1), teacher=teacher)

    for step, passes in run.steps(run.random_crops()):
        run.set_lr(warmup_cosine(step, run.total, run.warmup, run.peak))
        for img, _ in passes:                                   # uint8 crops on the device
            img = normalize(random_flip(img), run.mean, run.std)                                # (B, C, h, w)
            order = torch.rand(len(img), patches, device=run.device).argsort(1)                 # (B, N)
            keep = order[:, :visible] if visible < patches else None    # student and teacher see the same patches
            with run.autocast():
                loss = net(img, keep)                                                           # ()
            run.backward(loss, **model.parts)
        run.update(metrics=model.metrics)
    run.finish()


if __name__ == "__main__":
    launch(main)
