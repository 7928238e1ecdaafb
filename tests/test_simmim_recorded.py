"""Masked image modelling number by number against recorded runs of the official codes: SimMIM, MaskFeat, BEiT, and the
distillation of small Swins. Sizes, heads and options come from the recordings; skipped where they are absent."""
import json
import math
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from golden import FOLDER, Golden, close, close_grads, needs_golden

from finetune import make_optimizer
from more.simmim import RECIPES, SimMIM, rate_at
from nets.beit import BeitViT
from nets.hog import hog
from nets.masked import exempt, read_map, reconstruct, stage_outputs
from nets.masks import block_masks, to_patches, uniform_masks
from nets.naming import resize_geometric
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
            assert lr == pytest.approx(g("out/lr")[step, i].item(), rel=1e-6)       # it is stored in fp32
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
        for theirs, ours in (("pred_head.transforms.0.0.", "encoder.norm."), ("pred_head.projections.0.", "decoder.0."),
                             ("lm_head.", "decoder.0.")):
            name = name.replace(theirs, ours)
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
                  positions="learned", eps=c["norm_eps"], relative=c["rel"], layer_scale=c["init_values"],
                  key_bias=False, **options)
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


# ----------------------------------------------------------------------------------------------------------------
# Masks


@pytest.mark.parametrize("name", recordings("simmim_mask_generator"))
def test_masks_of_units(name):
    """How many units are hidden, which patches are theirs, and that any units are hidden alike, in pairs as well."""
    g = Recording(name)
    for i, (size, unit, patch, ratio) in enumerate(g.config["cases"]):
        _, hidden, side, times = g("out/count_table")[i].tolist()
        torch.manual_seed(i)
        masks = uniform_masks(20000, (side, side), ratio)
        assert masks.flatten(1).sum(1).unique().tolist() == [hidden] == g(f"out/distinct_counts_{i}").flatten().tolist()
        assert unit // patch == times and size // unit == side
        share = hidden / side ** 2
        noise = math.sqrt(share * (1 - share) * (1 / 20000 + 1 / g.config["draws"]))
        pairs = (masks[:, 0, 0] & masks[:, -1, -1]).float().mean()
        for ours, key in ((masks.float().mean(0), "unit"), (pairs, "pair")):
            assert (ours - g(f"out/{key}_frequency_{i}")).abs().max() < 5 * noise
        for seed in g("input/seeds").tolist():
            numbers = np.random.RandomState(seed)
            for recorded in g(f"out/mask_{i}_seed{seed}"):
                units = torch.zeros(1, side * side, dtype=torch.bool)
                units[0, numbers.permutation(side * side)[:hidden]] = True
                assert torch.equal(to_patches(units.view(1, side, side), times)[0].long(), recorded.long())


def blocks_one_by_one(side, count, least, most, draw):
    """BEiT's law in its plainest form, from a random.Random or its like -> mask (side, side)."""
    mask = np.zeros((side, side), dtype=int)
    while mask.sum() < count:
        left = min(count - mask.sum(), most or count)
        for _ in range(10):
            area = draw.uniform(least, left)
            aspect = math.exp(draw.uniform(math.log(0.3), math.log(1 / 0.3)))
            h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if h >= side or w >= side:
                continue
            top, first = draw.randint(0, side - h), draw.randint(0, side - w)
            part = mask[top:top + h, first:first + w]
            if 0 < h * w - part.sum() <= left:
                part[:] = 1
                break
        else:
            break                                               # ten tries without a block: the mask ends early
    return mask


BEIT_MASKS = [(name, i) for name in recordings("mim_mask_generators")
              for i, case in enumerate(Recording(name).config["cases"]) if case[0] == "beit"]


@pytest.mark.parametrize("name, i", BEIT_MASKS)
def test_masks_of_blocks(name, i):
    """The plain form draws the recorded masks; ours follow the same law: counts, places, borders."""
    g = Recording(name)
    _, side, count, least, most = g.config["cases"][i]
    for seed in g("input/seeds").tolist():
        draw = random.Random(seed)
        for recorded in g(f"out/mask_{i}_seed{seed}"):
            ours = blocks_one_by_one(side, count, least, most, draw)
            assert np.array_equal(ours, recorded.numpy())
    draws = 20000
    masks = block_masks(draws, (side, side), count, least, most, torch.Generator().manual_seed(i))
    both = 1 / draws + 1 / g.config["draws"]                    # the variance of a difference of two shares
    counts = torch.bincount(masks.flatten(1).sum(1), minlength=side * side + 1) / draws
    recorded = g(f"out/count_histogram_{i}") / g.config["draws"]
    assert ((counts - recorded).abs() <= 5 * (recorded * (1 - recorded) * both).sqrt() + 5e-4).all()
    assert counts[count + 1:].sum() == 0
    p = g(f"out/cell_frequency_{i}")
    assert ((masks.float().mean(0) - p).abs() <= 5 * (p * (1 - p) * both).sqrt()).all()
    edges = (masks[:, 1:] != masks[:, :-1]).sum((1, 2)) + (masks[:, :, 1:] != masks[:, :, :-1]).sum((1, 2))
    noise = (edges.float().var() * both).sqrt()
    assert (edges.float().mean() - g(f"out/mean_boundary_edges_{i}")).abs() < 5 * noise


# ----------------------------------------------------------------------------------------------------------------
# Schedules, groups, shapes, relative positions of other windows


@pytest.mark.parametrize("name", recordings("schedule_mim"))
def test_schedules(name):
    """MAE-Lite's steps; Microsoft's steps and cosine, which come a step late."""
    g = Recording(name)
    for i, c in enumerate(g.config["maelite"]):
        close_rates("steps", g(f"out/maelite_lr_{i}"), c)
    for i, c in enumerate(g.config["simmim"]):
        kind = dict(multistep="steps", cosine="whole_cosine")[c["name"]]
        close_rates(kind, g(f"out/simmim_lr_{i}"), c, floor=c["min_lr"], lag=True)


def close_rates(kind, recorded, c, **options):
    steps, milestones = c["epochs"] * c["it"], [epoch * c["it"] for epoch in c["ms"]]
    assert c.get("gamma", 0.1) == 0.1
    options.update(start=c["warmup_lr"], milestones=milestones)
    ours = [rate_at(kind, step, steps, c["warm"] * c["it"], c["lr"], **options) for step in range(steps)]
    close(torch.tensor(ours, dtype=torch.float64), recorded, 1e-12)


RECORDED_GROUPS = (read_json("paramgroups_mim") or dict(groups={}))["groups"]


def swin_of(names, **options):
    """A narrow Swin with as many stages and blocks as the names of parameters show."""
    blocks = {tuple(name.split("layers.")[1].split(".")[:3:2]) for name in names if ".blocks." in f".{name}"
              and "layers." in name}
    stages = sorted({int(stage) for stage, _ in blocks})
    depths = [sum(int(stage) == s for stage, _ in blocks) for s in stages]
    return Swin(32, 2, 3, 6, depths, [1] * len(depths), 4, **options)


@pytest.mark.parametrize("row", [row for row in RECORDED_GROUPS if "simmim" in row and "pretrain" in row])
def test_groups_of_pretraining(row):
    want = {}
    for group in RECORDED_GROUPS[row]:
        want |= dict.fromkeys([name.removeprefix("model.") for name in group["params"]], group["weight_decay"])
    block = 6 if any(name.startswith("decoder.1.") for name in want) else 0
    model = SimMIM(swin_of(want), block=block)
    names = {id(p): name for name, p in model.named_parameters()}
    lite = row.startswith("maelite")
    recipe = RECIPES["pixels"]["swin_lite" if lite else "swin_base"]
    groups = exempt(decay_groups(model, recipe["weight_decay"]), model, recipe.get("no_decay", ()))
    assert {names[id(p)]: group["weight_decay"] for group in groups for p in group["params"]} == want


@pytest.mark.parametrize("row", [row for row in RECORDED_GROUPS if "swin" in row and "finetune" in row])
def test_groups_of_fine_tuning(row):
    """Layers and weight decay. MAE-Lite's code counts two layers less for norm and head, so that they learn with 0.7225
    of the rate, less than the last block; ours learn with the whole rate, as Microsoft's do."""
    want, decay = {}, float(row.split()[-1])
    for group in RECORDED_GROUPS[row]:
        for name in group["params"]:
            scale = 1.0 if name.startswith(("norm.", "head.")) else group["lr_scale"]
            assert name.startswith(("norm.", "head.")) <= (group["lr_scale"] in (1.0, pytest.approx(decay ** 2)))
            want[name] = group["weight_decay"], pytest.approx(scale)
    cfg = SimpleNamespace(weight_decay=0.05, layer_decay=decay, optimizer="adamw")
    model = swin_of(want, num_classes=5)
    names = {id(p): name for name, p in model.named_parameters()}
    ours = {names[id(p)]: (group["weight_decay"], group["lr_scale"])
            for group in make_optimizer(cfg, model, 1e-3).param_groups for p in group["params"]}
    assert ours == want


SHAPES = read_json("shapes_mim") or dict(shapes={}, counts={})


@pytest.mark.parametrize("row", [row for row in SHAPES["shapes"] if "simmim" in row])
def test_shapes(row):
    """MAE-Lite's student, that of D2 with a block more, and the teacher: names, shapes, counts."""
    want, distilled = SHAPES["shapes"][row], row.endswith("_d13")
    name = "swin_tiny" if row.endswith("small") else "swin_lite"
    block = 0 if row.endswith("small") else RECIPES["pixels"][name]["head_block"]
    with torch.device("meta"):
        model = SimMIM(Swin(**SWINS[name]), block=block, tap=1 if distilled else None)
        if distilled:
            model = DistilledSimMIM(model, TeacherLogits(SimMIM(Swin(**SWINS["swin_tiny"])), "meta"))
            trainable = SHAPES["counts"]["maelite/simmim_d2 trainable"]
            assert sum(p.numel() for p in model.parameters()) == trainable["n_params"]
            assert [list(p.shape) for p in model.adapter.parameters()] == list(trainable["adapter"].values())
            model.adapter = None
    ours = {name.removeprefix("model.").replace("extra.", "encoder.layers.3.blocks.2."): list(p.shape)
            for name, p in model.named_parameters()}
    assert sum(math.prod(shape) for shape in ours.values()) == want["n_params"]
    assert ours == want.get("params", ours)


@pytest.mark.parametrize("name", recordings("swin_bias_remap"))
def test_relative_positions_of_other_windows(name):
    g = Recording(name)
    for i, (old, new, _) in enumerate(g.config["cases"]):
        close(resize_geometric(g(f"input/table_{i}"), old, new), g(f"out/table_{i}"), 1e-5)
