"""Masked image modelling number by number against recorded runs of the official codes: SimMIM, MaskFeat, BEiT, and the
distillation of small Swins. Sizes, heads and options come from the recordings; skipped where they are absent."""
import json
import math
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from golden import FOLDER, Golden, close, close_grads, needs_golden

from more.simmim import RECIPES, SimMIM, rate_at
from nets.beit import BeitViT
from nets.hog import hog
from nets.masked import exempt, read_map, reconstruct, stage_outputs
from nets.masks import Masks, block_masks, to_patches, uniform_masks
from nets.swin_distill import DistilledSimMIM, TeacherLogits
from runtime.run import decay_groups, finite_step
from vit import SWINS, Swin, patchify

pytestmark = needs_golden

# Recordings of masked image modelling are in a folder of their own, unless $GOLDEN names one that has them.
MIM = next((folder for folder in (FOLDER, FOLDER.parent / "golden_mim") if list(folder.glob("simmim_*.npz"))), FOLDER)


class Recording(Golden):
    def __init__(self, name):
        self.arrays = np.load(MIM / f"{name}.npz", allow_pickle=False)
        self.config = json.loads(str(self.arrays["config"]))


def recordings(*patterns, wanted=lambda c: True):
    """The names of the recordings that are there, match, and whose config is wanted."""
    names = {path.stem for pattern in patterns for path in MIM.glob(f"{pattern}.npz")}
    return sorted(name for name in names if wanted(Recording(name).config))


def read_json(name):
    path = MIM / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else None


def not_ruled_out(c):
    """Relative positions that all blocks share, and absolute ones in a Swin, are not built here."""
    return not (c.get("shared_rel") or c.get("use_shared_rpb") or c.get("ape"))


def swin(c, **options):
    return Swin(c["img_size"], c["patch_size"], 3, c["embed_dim"], c["depths"], c["num_heads"], c["window_size"],
                c["mlp_ratio"], eps=c["norm_eps"], **options)


def without_masks(state):
    """A Swin's masks follow from its maps, and are no part of our files."""
    return {name: tensor for name, tensor in state.items() if not name.endswith("attn_mask")}


def tolerances(name):
    """(out, grad) of the recordings' README, the loosest of a kind, so that they fit other sizes and seeds."""
    kinds = {"simmim_vit": (1e-5, 5e-5), "simmim": (5e-5, 2e-4), "maskfeat": (2e-5, 5e-5), "beit": (1e-5, 5e-5)}
    return next(values for kind, values in kinds.items() if name.startswith(kind))


# ----------------------------------------------------------------------------------------------------------------
# SimMIM


@pytest.mark.parametrize("name", recordings("simmim_swin_*", wanted=not_ruled_out))
def test_simmim_of_a_swin(name):
    """The plain head, and MAE-Lite's with a block, after the last stage and after earlier ones."""
    g, (out, grad) = Recording(name), tolerances(name)
    c = g.config
    tap = c.get("decoder_idx")
    last = len(c["depths"]) - 1
    model = SimMIM(swin(c), block=c.get("decoder_embed_dim", 0), tap=None if tap in (None, last) else tap)
    model.load_state_dict(without_masks(g.under("state")))
    img, mask = g("input/imgs"), g("input/mask").bool()
    x = model.embed(img, mask)
    if "out/masked_patch_tokens" in g:
        close(x, g("out/masked_patch_tokens"), out)
    for stage, tokens in enumerate(stage_outputs(model.encoder, x, *img.shape[-2:])):
        close(tokens, g(f"out/stage{stage}"), out)
    tokens = read_map(model.encoder, x, img.shape[-2:], model.tap)
    encoded = g("out/encoded")
    close(tokens, encoded if encoded.dim() == 3 else rearrange(encoded, "b c h w -> b (h w) c"), out)
    close(reconstruct(model, img, mask), g("out/rec"), out)
    loss = model(img, mask, model.ask(None, img))
    close(loss, g("out/loss"), out)
    loss.backward()
    used = {name: tensor for name, tensor in g.under("grad").items()}
    unused = {name for name, p in model.named_parameters() if p.grad is None}
    assert unused == {name for name, _ in model.named_parameters()} - set(used)
    close_grads(model, used, grad)


@pytest.mark.parametrize("name", recordings("simmim_vit_*", wanted=not_ruled_out))
def test_simmim_of_a_vit(name):
    g, (out, grad) = Recording(name), tolerances(name)
    c = g.config
    state = g.under("state")
    ratio = state["encoder.blocks.0.mlp.fc1.bias"].numel() / c["embed_dim"]
    net = BeitViT(c["img_size"], c["patch_size"], 3, c["embed_dim"], c["depth"], c["num_heads"], ratio,
                  positions="learned", eps=c["norm_eps"], relative=c["use_rpb"], layer_scale=c["init_values"],
                  key_bias=False)
    model = SimMIM(net)
    model.load_state_dict(state)
    img, mask = g("input/imgs"), g("input/mask").bool()
    tokens = read_map(net, model.embed(img, mask), img.shape[-2:])
    close(tokens, rearrange(g("out/encoded"), "b c h w -> b (h w) c"), out)
    close(reconstruct(model, img, mask), g("out/rec"), out)
    loss = model(img, mask, img)
    close(loss, g("out/loss"), out)
    loss.backward()
    close_grads(model, g.under("grad"), grad)


@pytest.mark.parametrize("name", recordings("simmim_traj"))
def test_trajectory(name):
    """Each recorded step: schedule, groups, norm before clipping, fused AdamW, loss; weights after all."""
    g = Recording(name)
    c = g.config
    model = SimMIM(swin(c), block=c["decoder_embed_dim"])
    model.load_state_dict(without_masks(g.under("state")))
    groups = decay_groups(model, c["weight_decay"])
    assert [len(group["params"]) for group in groups] == [group["n_params"] for group in c["groups"]]
    optimizer = torch.optim.AdamW(groups, c["lr"], betas=c["betas"], fused=True)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    steps, per_epoch = c["steps"], c["steps"] // c["epochs"]
    milestones = [epoch * per_epoch for epoch in c["multi_steps"]]
    for step in range(steps):
        lr = rate_at("steps", step, steps, c["warmup_epochs"] * per_epoch, c["lr"], start=c["warmup_lr"],
                     milestones=milestones)
        for i, group in enumerate(optimizer.param_groups):
            group["lr"] = lr
            assert lr == pytest.approx(g("out/lr")[step, i].item(), rel=1e-9)
        img = g("input/imgs")[step % c["n_batches"]]
        loss = model(img, g("input/mask")[step].bool(), img)
        loss.backward()
        norm, skipped = finite_step(optimizer, scaler, clip=c["clip_grad"])
        optimizer.zero_grad()
        assert not skipped
        for ours, key in ((loss, "out/loss"), (norm, "out/grad_norm_before_clip")):
            reference = g(key)[step].item()
            assert abs(ours.item() - reference) <= max(20 * g(f"dev64/{key}")[step].item(), 1e-5 * reference), step
    state = model.state_dict()
    for key, after in without_masks(g.under("after")).items():
        if after.is_floating_point():
            allowed = max(20 * g(f"dev64/after/{key}").max().item(), 1e-5 * after.abs().max().item())
            assert (state[key] - after).abs().max().item() <= allowed, key


@pytest.mark.parametrize("name", recordings("simmim_d2"))
def test_distillation(name):
    """D2-SimMIM: both networks' logits, each part of the loss, every gradient."""
    g, (out, grad) = Recording(name), tolerances(name)
    c, state = g.config, without_masks(g.under("state"))
    student, teacher = ({**c, **c["common"], **c[who]} for who in ("student", "teacher"))
    student["depths"] = [*student["depths"][:-1], student["depths"][-1] - 1]        # the third block stands above
    model = SimMIM(swin(student), block=c["common"]["decoder_embed_dim"], tap=c["decoder_idx"])
    theirs = SimMIM(swin(teacher))
    theirs.encoder.load_state_dict({k.removeprefix("tch_model.encoder."): v for k, v in state.items()
                                    if k.startswith("tch_model.encoder.")})
    both = DistilledSimMIM(model, TeacherLogits(theirs, "cpu"), c["distill_attn_alpha"])
    above = f"model.encoder.layers.{len(student['depths']) - 1}.blocks.{student['depths'][-1]}."

    def ours(name):
        name = name.replace(above, "extra.")
        return "adapter.weight" if name.startswith("attn_adapter.") else name

    both.load_state_dict({ours(k): v for k, v in state.items() if not k.startswith("tch_model.")})
    img, mask = g("input/imgs"), g("input/mask").bool()
    loss = both(img, mask, img)
    close(both.targets, g("out/teacher_attn"), out)
    size = img.shape[-2:]
    maps = stage_outputs(model.encoder, model.embed(img, mask), *size)
    close(both.extra(maps[-1], model.encoder.grid_of(*size)), g("out/student_attn"), out)
    close(both.parts["pixels"], g("out/loss_rec"), out)
    close(both.parts["distill"], g("out/loss_attn"), out)
    close(loss, g("out/loss"), out)
    loss.backward()
    close_grads(both, {ours(k): v for k, v in g.under("grad").items()}, grad)
    width = model.encoder.width
    assert both.extra.attn.qkv.weight.grad[2 * width:].abs().max() == 0     # values: zero, and not None


# ----------------------------------------------------------------------------------------------------------------
# MaskFeat


@pytest.mark.parametrize("name", recordings("maskfeat_hog*", wanted=lambda c: "pool" in c))
def test_hog(name):
    g = Recording(name)
    cell = g.config["pool"]
    if "input/uint8" in g:                                      # of normalised photographs, flat cells are rounding
        close(hog(g("input/uint8").float(), cell), g("out/hog_exact_uint8"), 1e-5)
        return
    found = hog(g("input/imgs"), cell)
    close(found, g("out/hog"), 1e-5)
    close(patchify(found.flatten(1, 2), g.config["patch_size"] // cell), g("out/target"), 1e-5)


def renamed(state):
    """MaskFeat's and BEiT's names -> ours: the head is a 1x1 convolution, and its norm the network's last one."""
    new = {}
    for name, tensor in state.items():
        name = name.replace("pred_head.transforms.0.0.", "encoder.norm.").replace("pred_head.projections.0.", "decoder.0.")
        name = name.replace("lm_head.", "decoder.0.")
        if name == "decoder.0.weight":
            tensor = tensor[..., None, None]
        if not name.startswith("hogs."):                        # constants of the official layer
            new[name if name.startswith(("encoder.", "decoder.")) else f"encoder.{name}"] = tensor
    return new


@pytest.mark.parametrize("name", recordings("maskfeat_vit*"))
def test_maskfeat(name):
    g, (out, grad) = Recording(name), tolerances(name)
    c = g.config
    net = BeitViT(c["img_size"], c["patch_size"], 3, c["embed_dim"], c["depth"], c["num_heads"], c["mlp_ratio"],
                  positions="learned", eps=c["norm_eps"])
    img, mask = g("input/imgs"), g("input/mask").bool()
    model = SimMIM(net, "hog")
    model.most = int(mask.flatten(1).sum(1).max())
    model.load_state_dict(renamed(g.under("state")))
    x = model.embed(img, mask)
    for block in net.blocks:
        x = block(x)
    close(x, g("out/last_block"), out)
    asked = model.ask(img, None)
    answers = patchify(reconstruct(model, img, mask), model.cell // model.hog_cell)
    close(answers[mask.flatten(1)], g("out/pred_masked"), out)
    close(patchify(asked, model.cell // model.hog_cell)[mask.flatten(1)], g("out/target_masked"), out)
    loss = model(img, mask, asked)
    close(loss, g("out/loss"), out)
    loss.backward()
    close_grads(model, renamed(g.under("grad")), grad)
    check_groups(model, c["param_groups"], RECIPES["hog"]["vit_base"].get("no_decay", ()))


def check_groups(model, recorded, no_decay):
    """The parameters with and without weight decay, by name."""
    ours = exempt(decay_groups(model, 0.05), model, no_decay)
    names = {id(p): name for name, p in model.named_parameters()}
    want = {decay: set() for decay in (0.0, 0.05)}
    for group in recorded:
        want[group["weight_decay"]] |= set(renamed(dict.fromkeys(group["params"], torch.zeros(1, 1))))
    assert {group["weight_decay"]: {names[id(p)] for p in group["params"]} for group in ours} == want


# ----------------------------------------------------------------------------------------------------------------
# BEiT


def beit(c, **options):
    """BEiT's network; where a recording has no absolute positions, ours are zeros that do not learn."""
    net = BeitViT(c["img_size"], c["patch_size"], 3, c["embed_dim"], c["depth"], c["num_heads"], c["mlp_ratio"],
                  positions="learned", eps=c["norm_eps"], relative=c["rel"], layer_scale=c["init_values"], key_bias=False,
                  **options)
    if not c["abs"]:
        net.pos_embed.requires_grad_(False).zero_()
    return net


def load(model, state, c, prefix=""):
    missing = model.load_state_dict(state, strict=False)
    assert missing.missing_keys == ([] if c["abs"] else [f"{prefix}pos_embed"]) and not missing.unexpected_keys


@pytest.mark.parametrize("name", recordings("beit_*", wanted=lambda c: not_ruled_out(c) and "num_classes" not in c))
def test_beit(name):
    g, (out, grad) = Recording(name), tolerances(name)
    c = g.config
    model = SimMIM(beit(c), "tokens", vocab=c["vocab_size"])
    load(model, renamed(g.under("state")), c, "encoder.")
    img, mask = g("input/imgs"), g("input/mask").bool().view(-1, *model.patches)
    model.most = int(mask.flatten(1).sum(1).max())
    words = g("input/token_ids").long().view(-1, 1, *model.patches)
    tokens = read_map(model.encoder, model.embed(img, mask), img.shape[-2:])
    close(tokens, g("out/tokens_normed")[:, 1:], out)
    every = torch.arange(tokens.shape[1]).expand(len(img), -1)
    logits = model.answer(tokens, every)
    close(logits, g("out/logits_all"), out)
    close(logits[mask.flatten(1)], g("out/logits_masked"), out)
    assert torch.equal(words.flatten(1)[mask.flatten(1)], g("out/labels_masked").long())
    loss = model(img, mask, words)
    close(loss, g("out/loss"), out)
    loss.backward()
    close_grads(model, renamed(g.under("grad")), grad)
    check_groups(model, c["param_groups"], RECIPES["tokens"]["vit_base"]["no_decay"])


@pytest.mark.parametrize("name", recordings("beit_*", wanted=lambda c: not_ruled_out(c) and "num_classes" in c))
def test_fine_tuning_of_beit(name):
    g, (out, grad) = Recording(name), tolerances(name)
    c = g.config
    model = beit(c, num_classes=c["num_classes"], pool="avg" if c["mean_pool"] else "cls")
    load(model, g.under("state"), c)
    img = g("input/imgs")
    close(model.features(img), g("out/features"), out)
    logits = model(img)
    close(logits, g("out/logits"), out)
    loss = F.cross_entropy(logits, g("input/soft_target"))
    close(loss, g("out/loss"), out)
    loss.backward()
    close_grads(model, g.under("grad"), grad)
