"""Hiera and its MAE: recorded runs of the official codes, invariants, the textbook form, and real runs."""
import json
import os
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from golden import FOLDER, Golden, close, close_grads, close_losses
from PIL import Image
from test_runs import finish, rows, same_state, start_and_kill, steps
from textbook import TextbookHieraMAE

import finetune
import probe
from more import hiera_mae
from more.hiera_distill import DistilledHieraMAE, HieraTeacher, run_blocks
from more.hiera_mae import HieraMAE
from nets.hiera import HIERAS, Hiera, max_pool, resize_unit_positions, unit_index
from runtime.run import decay_groups, finite_step, warmup_cosine
from tools import analyze
from vit import ViT
from weights import load_classifier, load_encoder, read
from weights.__main__ import main as describe
from weights.export import export

# Recordings of masked image modelling are in a folder of their own, unless $GOLDEN names one that has them.
MIM = next((folder for folder in (FOLDER, FOLDER.parent / "golden_mim") if list(folder.glob("hiera_*.npz"))), FOLDER)


def recording(name):
    g = Golden.__new__(Golden)
    g.arrays = np.load(MIM / f"{name}.npz", allow_pickle=False)
    g.config = json.loads(str(g.arrays["config"]))
    return g


def each_recording(pattern):
    """Decorator: the test runs once for each recording that is there and matches."""
    names = sorted(path.stem for path in MIM.glob(f"{pattern}.npz"))
    return lambda test: pytest.mark.golden(pytest.mark.parametrize("name", names)(test))


def network(c, kind=Hiera):
    """A Hiera with a recording's sizes."""
    names = dict(input_size="img_size", embed_dim="dim", num_heads="heads", norm_eps="eps")
    kept = ("stages", "num_classes", "q_pool", "mlp_ratio", "mask_unit_attn", *names)
    return kind(**{names.get(k, k): c[k] for k in kept if k in c})


def units_last(x):
    """Tokens (B, U, T, ...) -> (B, T * U, ...): the official order, in which units are the fastest axis."""
    return x.transpose(1, 2).flatten(1, 2)


def order_of(mask):
    """A recorded mask (B, U), True where a unit is kept -> an order of the units, those that are kept first."""
    return (~mask).int().argsort(dim=1, stable=True)


def map_of_unit(model, x, unit):
    """Tokens (B, U, T, D) -> the map of one unit, (B, side, side, D)."""
    x = model.reading_order(x[:, unit:unit + 1], (1, 1))
    return x.unflatten(1, (round(x.shape[1] ** 0.5), -1))


@each_recording("hiera_forward_*")
def test_forward_and_every_gradient_match_the_official_code(name):
    g = recording(name)
    model = network(g.config)
    model.load_state_dict(g.under("state"))
    stages = [x.unflatten(1, grid) for x, grid in zip(
        [model.block_outputs(g("input/imgs"))[end - 1] for end in model.stage_ends],
        model.maps(*g.config["input_size"]))]
    for stage, x in enumerate(stages):
        close(x, g(f"out/stage{stage}"), 5e-5)
    logits = model(g("input/imgs"))
    close(logits, g("out/logits"), 5e-5)
    close(logits.softmax(-1), g("out/probs_eval"), 5e-5)
    close(model.features(g("input/imgs")), g("out/features"), 5e-5)
    loss = F.cross_entropy(logits, g("input/soft_target"))
    close(loss, g("out/loss"), 2e-5)
    loss.backward()
    close_grads(model, g.under("grad"), 1e-4)


@each_recording("hiera_forward_*")
def test_units_and_blocks_are_the_official_ones(name):
    g = recording(name)
    model = network(g.config)
    h, w = model.maps(*g.config["input_size"])[0]
    index = unit_index(h, w, model.rounds, torch.device("cpu"))
    assert torch.equal(index.T.flatten(), g("out/unroll_index").long())
    side, table = 4 ** model.rounds, []
    for block in model.blocks:
        stride = 4 if block.attn.pool else 1
        side //= stride
        table.append([int(block.attn.within), side, stride, block.attn.heads, block.norm1.normalized_shape[0],
                      block.norm2.normalized_shape[0]])
    assert torch.equal(torch.tensor(table), g("out/block_table").long())


@each_recording("hiera_forward_*")
def test_hidden_units_are_dropped_as_in_the_official_code(name):
    g = recording(name)
    model = network(g.config)
    model.load_state_dict(g.under("state"))
    mask = g("input/mask").bool()
    x, ends = model.embed(g("input/imgs"), order_of(mask)[:, :mask[0].sum()]), []
    for number, block in enumerate(model.blocks, 1):
        x = block(x)
        if number in model.stage_ends:
            ends.append(x)
    close(units_last(x), g("out/masked_tokens"), 5e-5)
    for stage, x in enumerate(ends):
        close(torch.stack([map_of_unit(model, x, u) for u in range(x.shape[1])], 1),
              g(f"out/masked_stage{stage}"), 5e-5)


# ----------------------------------------------------------------------------------------------------------------
# The MAE


def mae_of(c):
    """A HieraMAE with a recording's sizes, 1 - visible / units of which is hidden."""
    decoder = (c["decoder_embed_dim"], c["decoder_depth"], c["decoder_num_heads"])
    model = network(c, kind=partial(HieraMAE, *decoder, c.get("mask_ratio", 0.5)))
    model.visible = c.get("keep", model.visible)
    return model


@each_recording("hiera_mae_*")
def test_mae_and_every_gradient_match_the_official_code(name):
    g = recording(name)
    model = mae_of(g.config)
    model.load_state_dict(g.under("state"))
    assert sum(p.numel() for p in model.parameters()) == g.config["n_params"]
    mask, img = g("input/mask").bool(), g("input/imgs")
    order = order_of(mask)
    ends, _ = run_blocks(model, model.embed_visible(img, order))
    latent = model.fuse(ends)
    maps = [map_of_unit(model, latent, u) for u in range(latent.shape[1])]
    close(torch.stack(maps, 1), g("out/latent"), 5e-5)
    # Ours are unit by unit, the recorded ones in reading order: as a map, with the visible cells left out.
    hidden = ~g("out/visible_at_pred").bool()
    cells = unit_index(*model.grid, model.cell_rounds, img.device)[order[:, model.visible:]].flatten(1)
    by_reading = cells.argsort(1).unsqueeze(2)
    assert torch.equal(cells.sort(1).values, hidden.nonzero()[:, 1].view_as(cells))
    for ours, key in ((model.decode(latent, order), "pred"), (model.target(img, order[:, model.visible:]), "label")):
        close(ours.gather(1, by_reading.expand_as(ours)).flatten(0, 1), g(f"out/{key}_masked"), 5e-5)
    loss = model(img, order)
    close(loss, g("out/loss"), 5e-5)
    loss.backward()
    close_grads(model, g.under("grad"), 5e-4 if name.endswith("nonsquare") else 2e-4)


@each_recording("hiera_traj")
def test_trajectory(name):
    g = recording(name)
    c, model = g.config, mae_of(g.config)
    model.load_state_dict(g.under("state"))
    optimizer = torch.optim.AdamW(decay_groups(model, c["weight_decay"]), betas=c["betas"], fused=True)
    assert [len(group["params"]) for group in optimizer.param_groups] == [row["n_params"] for row in c["groups"]]
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    per_epoch = c["steps"] // c["epochs"]
    for step in range(c["steps"]):
        lr = warmup_cosine(step, c["steps"], c["warmup_epochs"] * per_epoch, c["lr"], c["min_lr"], c["warmup_lr"])
        assert lr == pytest.approx(g("out/lr")[step, 0].item(), rel=1e-6)
        for group in optimizer.param_groups:
            group["lr"] = lr
        loss = model(g("input/imgs")[step % c["n_batches"]], g("rand/noise")[step].argsort(1))
        loss.backward()
        norm, _ = finite_step(optimizer, scaler)
        close_losses(g, step, loss.detach(), norm, 1e-4)
        optimizer.zero_grad()
    state = model.state_dict()
    for key, value in g.under("after").items():
        noise = g(f"dev64/after/{key}").max().item()
        assert (state[key] - value).abs().max().item() <= max(20 * noise, 1e-5 * value.abs().max().item()), key


@each_recording("hiera_mask_rule")
def test_mask_rule(name):
    g = recording(name)
    for i, ratio in enumerate(g.config["ratios"]):
        for j, (h, w) in enumerate(g.config["grids"]):
            visible = g("out/visible_units")[i, j].item()
            options = dict(mask_ratio=ratio, img_size=(4 * h, 4 * w), dim=4, stages=(1, 1), patch_size=2)
            if not 0 < visible < h * w:
                with pytest.raises(ValueError, match="mask units visible"):
                    HieraMAE(**options)
                continue
            model = HieraMAE(**options)
            assert model.visible == visible
            if (h, w) == (7, 7):
                order = g("input/noise").argsort(1)
                kept = torch.zeros(order.shape, dtype=torch.bool).scatter(1, order[:, :model.visible], True)
                assert torch.equal(kept, g(f"out/keep_{ratio}").bool())


@each_recording("hiera_distill_*")
def test_distillation_and_every_gradient_match_mae_lite(name, tmp_path):
    g = recording(name)
    c, state, file = g.config, g.under("state"), tmp_path / "teacher.pth"
    torch.save({}, file)
    size = dict(norm_eps=c["norm_eps"], **c["common"])
    model = mae_of(dict(size, mask_ratio=c["mask_ratio"], **c["student"]))
    hiera = network(dict(size, **c["teacher"]))
    fit = hiera.load_state_dict({k[10:]: v for k, v in state.items() if k.startswith("tch_model.")}, strict=False)
    assert set(fit.missing_keys) == {"norm.weight", "norm.bias"}
    assert all(key.startswith(("encoder_norm", "multi_scale_fusion_heads")) for key in fit.unexpected_keys)
    pairs = {kind: list(zip(c[f"distill_{short}_idx"], c[f"tch_distill_{short}_idx"]))
             for kind, short in (("attention", "attn"), ("hidden", "hidden"))}
    student = DistilledHieraMAE(model, HieraTeacher(str(file), hiera, pairs))
    names = [f"attn_adapter.adapter{ours - 1}.weight" for ours, _ in pairs["attention"]]
    names += [f"hidden_adapter.adapter{ours}.weight" for ours, _ in pairs["hidden"]]
    rename = {f"adapters.{i}.weight": theirs for i, theirs in enumerate(names)}
    student.load_state_dict({k: state[rename.get(k, k)] for k in student.state_dict()})

    img, keep = g("input/imgs"), g("rand/noise").argsort(1)[:, :model.visible].sort(1).values
    kept = torch.zeros(g("rand/noise").shape, dtype=torch.bool).scatter(1, keep, True)
    assert torch.equal(kept, g("out/mask_keep").bool())
    order = order_of(kept)
    x = model.embed_visible(img, order)
    outputs = run_blocks(model, x, student.attention, student.hidden)[1]
    targets = student.teacher(img, keep)
    layers = [(kind, *pair) for kind in pairs for pair in pairs[kind]]
    for i, (kind, ours, theirs) in enumerate(layers):
        for x, key in ((outputs[i], f"student_{{}}{ours}"), (targets[i], f"teacher_{{}}{theirs}")):
            to = (torch.arange(x.shape[2 if kind == "attention" else 1]).view(model.visible, -1).T).flatten()
            if kind == "attention":                             # the official order of tokens, units fastest
                close(x[:, :, to][:, :, :, to].unsqueeze(2), g(f"out/{key.format('attn')}"), 5e-5)
            else:
                close(x[:, to], g(f"out/{key.format('hidden')}"), 5e-5)
    ends, errors = student.compare(img, order)
    pixels, attn = model.pixel_error(img, model.fuse(ends), order), errors[:len(pairs["attention"])].sum()
    hidden = errors[len(pairs["attention"]):].sum()
    loss = pixels + c["distill_attn_alpha"] * attn + c["distill_hidden_alpha"] * hidden
    close(pixels, g("out/loss_rec"), 5e-5)
    close(attn, g("out/loss_attn"), 5e-5)
    close(loss, g("out/loss"), 5e-5)
    if pairs["hidden"]:
        close(hidden, g("out/loss_hidden"), 5e-5)
    elif c["distill_attn_alpha"] == 1:
        close(student(img, order), g("out/loss"), 5e-5)
    loss.backward()
    grads = {new: g("grad/" + old) for new, old in rename.items()}
    grads |= {k: v for k, v in g.under("grad").items() if "adapter" not in k}
    close_grads(student, grads, 5e-4)


@pytest.mark.golden
def test_counts_names_and_groups_are_the_official_ones():
    """shapes_mim and paramgroups_mim: parameters, their names and shapes, and the groups of both optimizers."""
    rows, groups = (json.loads((MIM / f"{name}.json").read_text()) for name in ("shapes_mim", "paramgroups_mim"))
    lite = dict(HIERAS["hiera_lite"])
    tests = {"maelite/hiera_tiny_224": Hiera(**lite, num_classes=1000), "maelite/mae_hiera_tiny_224": HieraMAE(**lite)}
    for name in ("tiny", "small", "base"):
        tests[f"official/hiera_{name}_224"] = Hiera(**HIERAS[f"hiera_{name}"], num_classes=1000)
    for name in ("tiny", "base"):
        tests[f"official/mae_hiera_{name}_224"] = HieraMAE(512, 8, 16, 0.6, **HIERAS[f"hiera_{name}"])
    for name, model in tests.items():
        assert sum(p.numel() for p in model.parameters()) == rows["counts"][name]["n_params"], name
        if name in rows["shapes"]:
            shapes = {key: list(p.shape) for key, p in model.named_parameters()}
            assert shapes == rows["shapes"][name]["params"]
    classifier, mae = tests["maelite/hiera_tiny_224"], tests["maelite/mae_hiera_tiny_224"]
    own = set(classifier.state_dict()) - set(mae.state_dict())
    assert own == set(rows["hiera46_classifier_keys_not_in_mae_checkpoint"])

    names = {id(p): f"model.{key}" for key, p in mae.named_parameters()}
    ours = [[names[id(p)] for p in group["params"]] for group in decay_groups(mae, 0.05)]
    assert ours == [group["params"] for group in groups["groups"]["maelite/mae_hiera_tiny_224 pretrain"]]
    cfg = SimpleNamespace(weight_decay=0.05, layer_decay=0.85, optimizer="adamw")
    names, found = {id(p): key for key, p in classifier.named_parameters()}, {}
    for group in finetune.make_optimizer(cfg, classifier, 1e-3).param_groups:
        for p in group["params"]:
            found[names[id(p)]] = (group["weight_decay"], pytest.approx(group["lr_scale"]))
    theirs = groups["groups"]["maelite/hiera_tiny_224 finetune layer_decay 0.85"]
    assert found == {name: (group["weight_decay"], group["lr_scale"]) for group in theirs for name in group["params"]}


# ----------------------------------------------------------------------------------------------------------------
# Invariants


def small(kind=HieraMAE, **options):
    """A network of 6 units with 16 tokens each, without zeros that could hide a mistake."""
    defaults = dict(img_size=(32, 48), patch_size=4, dim=8, stages=(1, 1, 2), heads=2, mlp_ratio=2.0)
    if kind is HieraMAE:
        defaults |= dict(decoder_dim=12, decoder_depth=2, mask_ratio=0.5)
    torch.manual_seed(0)
    model = kind(**{**defaults, **options})
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model


def test_same_as_textbook():
    """Loss and every gradient against timm's Hiera and timm's blocks, decoding all cells in reading order."""
    pytest.importorskip("timm")
    torch.manual_seed(0)
    sizes = dict(img_size=64, dim=8, stages=(1, 2, 2, 1), heads=1, decoder_dim=12, decoder_depth=2, mask_ratio=0.5)
    model, plain = small(**sizes), TextbookHieraMAE(**sizes)
    model = HieraMAE(**sizes)
    plain.load_ours(model)
    img, noise = torch.randn(3, 3, 64, 64), torch.rand(3, 4)
    losses = model(img, noise.argsort(1)), plain(img, noise)
    torch.testing.assert_close(*losses)
    for loss in losses:
        loss.backward()
    theirs = {name.removeprefix("encoder."): p.grad for name, p in plain.named_parameters()}
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, theirs[name], rtol=1e-4, atol=1e-6)


def test_the_drawing():
    """The order in the docstring of nets/hiera.py, and what pooling makes of it."""
    index = unit_index(4, 4, 2, torch.device("cpu"))
    assert index.tolist() == [[0, 2, 8, 10, 1, 3, 9, 11, 4, 6, 12, 14, 5, 7, 13, 15]]
    x = torch.randn(2, 5, 16, 16)                                                               # (B, D, h, w)
    units = x.flatten(2).mT[:, unit_index(16, 16, 3, torch.device("cpu"))]                      # (B, 4, 64, D)
    for _ in range(3):
        x, units = F.max_pool2d(x, 2), max_pool(units)
        rounds = units.shape[2].bit_length() // 2
        assert torch.equal(units, x.flatten(2).mT[:, unit_index(*x.shape[-2:], rounds, x.device)])


def test_hidden_pixels_change_nothing_that_is_seen():
    model, img = small(), torch.randn(2, 3, 32, 48)
    order = model.random_order(2, "cpu")
    hidden = torch.zeros(2, 6).scatter(1, order[:, model.visible:], 1.0).view(2, 1, 2, 3)
    other = img + F.interpolate(hidden, scale_factor=16) * torch.randn_like(img)
    seen = [run_blocks(model, model.embed_visible(x, order))[0] for x in (img, other)]
    assert all(torch.equal(a, b) for a, b in zip(*seen))
    assert not torch.equal(model(img, order), model(other, order))
    shown = img + F.interpolate(1 - hidden, scale_factor=16) * 0.1
    assert not torch.equal(model.embed_visible(img, order), model.embed_visible(shown, order))


def test_attention_stays_within_units_in_the_first_stages():
    """What is added to one unit's tokens reaches the others only in blocks with global attention."""
    model = small(Hiera)
    x = model.embed(torch.randn(1, 3, 32, 48))
    other = x.clone()
    other[:, 2] += 1
    for block in model.blocks:
        x, other = block(x), block(other)
        changed = [not torch.equal(x[:, u], other[:, u]) for u in range(6)]
        assert changed == ([u == 2 for u in range(6)] if block.attn.within else [True] * 6)
    assert [block.attn.within for block in model.blocks] == [True, True, True, False]


def test_every_parameter_learns():
    model = small()
    model(torch.randn(2, 3, 32, 48), model.random_order(2, "cpu")).backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    classifier = small(Hiera, num_classes=3)
    F.cross_entropy(classifier(torch.randn(4, 3, 32, 48)), torch.tensor([0, 1, 2, 0])).backward()
    assert not [name for name, p in classifier.named_parameters() if p.grad is None or not p.grad.any()]


@torch.no_grad()
def test_start():
    """The published starts: biases of 0.02 and a head that says little; of an MAE Xavier, and torch's own fusion."""
    torch.manual_seed(0)
    model = Hiera(**HIERAS["hiera_lite"], num_classes=10)
    assert model.head.projection.weight.std() == pytest.approx(2e-5, rel=0.1)
    torch.testing.assert_close(model.head.projection.bias, torch.full((10,), 0.02 * 0.001))
    for name in ("blocks.3.norm1", "blocks.3.attn.qkv", "blocks.3.proj", "norm"):
        assert (model.get_submodule(name).bias == 0.02).all()
    assert model.blocks[5].mlp.fc1.weight.std() == pytest.approx(0.02, rel=0.02)
    mae = HieraMAE(**HIERAS["hiera_lite"])
    for name in ("blocks.3.norm1", "blocks.3.attn.qkv", "decoder_pred", "encoder_norm"):
        assert not mae.get_submodule(name).bias.any()
    for weight in (mae.blocks[5].mlp.fc1.weight, mae.decoder_pred.weight, mae.patch_embed.proj.weight.flatten(1)):
        limit = (6 / sum(weight.shape)) ** 0.5
        assert 0.95 * limit < weight.abs().max() <= limit
    conv = mae.multi_scale_fusion_heads[0]                      # torch's start is uniform to 1 / sqrt(inputs)
    limit = (46 * 16) ** -0.5
    assert 0.95 * limit < conv.weight.abs().max() <= limit and conv.bias.any()
    for name in ("pos_embed", "decoder_pos_embed"):
        assert mae.get_parameter(name).std() == pytest.approx(0.02, rel=0.05)


def test_resized_positions():
    """A table that repeats itself from unit to unit is repeated; of what is smooth over the map, the rest is stretched;
    the same size is the same table; and bicubic interpolation of the rest, by torch."""
    unit = torch.randn(1, 5, 4, 4)
    table = unit.repeat(1, 1, 2, 3).flatten(2).mT                                               # (1, 8 * 12, 5)
    resized = resize_unit_positions(table, (8, 12), (16, 8), 4)
    torch.testing.assert_close(resized, unit.repeat(1, 1, 4, 2).flatten(2).mT)
    table = torch.randn(1, 96, 5)
    assert resize_unit_positions(table, (8, 12), (8, 12), 4) is table
    grid = table.mT.unflatten(2, (8, 12))
    mean = sum(grid[:, :, y:y + 4, x:x + 4] for y in (0, 4) for x in (0, 4, 8)) / 6
    rest = F.interpolate(grid - mean.repeat(1, 1, 2, 3), (12, 12), mode="bicubic", align_corners=False)
    by_hand = (rest + mean.repeat(1, 1, 3, 3)).flatten(2).mT
    torch.testing.assert_close(resize_unit_positions(table, (8, 12), (12, 12), 4), by_hand)


def test_images_of_other_sizes():
    """One network sees another size as a network of that size does that has the resized table."""
    model = small(Hiera)
    big = small(Hiera, img_size=(64, 32))
    state = model.state_dict()
    state["pos_embed"] = resize_unit_positions(model.pos_embed.data, (8, 12), (16, 8), 4)
    big.load_state_dict(state)
    img = torch.randn(2, 3, 64, 32)
    torch.testing.assert_close(model(img), big(img))
    assert model.encode(img).shape == (2, 4 * 2, 32)
    with pytest.raises(ValueError, match="mask units of 16 pixels do not tile a 40x32 image: its sides must be mult"):
        model(torch.randn(1, 3, 40, 32))
    with pytest.raises(ValueError, match="pools 0 to 2 times, not 3"):
        small(Hiera, q_pool=3)


def test_chance():
    """The loss of always predicting zero, of standardised cells about 1 by hand."""
    model, img = small(), torch.randn(2, 3, 32, 48)
    order = model.random_order(2, "cpu")
    cells = rearrange(img, "b c (h p) (w q) -> b (h w) (c p q)", p=model.cell, q=model.cell)
    cells = (cells - cells.mean(-1, keepdim=True)) / (cells.var(-1, keepdim=True) + 1e-6).sqrt()
    torch.testing.assert_close(model.metrics(img, order)["chance"], cells.square().mean())


def test_logits_are_those_of_the_attention():
    for block in small(Hiera).blocks:
        x = torch.randn(2, 6, 4 if not block.attn.within else 16, block.norm1.normalized_shape[0])
        attn, D = block.attn, block.attn.proj.in_features
        v = F.linear(x, attn.qkv.weight[2 * D:], attn.qkv.bias[2 * D:])
        v = rearrange(v, f"b u t (h d) -> {attn.by_heads}", h=attn.heads)
        out = rearrange(attn.logits(x).softmax(-1) @ v, f"{attn.by_heads} -> b u t (h d)", u=6)
        torch.testing.assert_close(attn.proj(out), attn(x))


# ----------------------------------------------------------------------------------------------------------------
# Files


def test_timm_reads_ours_and_ours_reads_timms(tmp_path):
    timm = pytest.importorskip("timm")
    pytest.importorskip("safetensors")
    torch.manual_seed(0)
    theirs = timm.create_model("hiera_tiny_224", num_classes=7).eval()
    with torch.no_grad():                                       # its head starts with nearly nothing
        for p in theirs.parameters():
            p.add_(0.05 * torch.randn_like(p))
    torch.save(theirs.state_dict(), tmp_path / "timm.pth")
    img = torch.randn(1, 3, 224, 224)
    model, left = load_classifier(read(str(tmp_path / "timm.pth")))
    assert not left and model.config["stages"] == (1, 2, 7, 2) and model.config["heads"] == 1
    close(model(img), theirs(img), 1e-5)
    back = timm.create_model(f"local-dir:{export(str(tmp_path / 'timm.pth'), 'timm')}", pretrained=True).eval()
    close(back(img), theirs(img), 1e-5)
    one_file = load_classifier(read(export(str(tmp_path / "timm.pth"), "safetensors")))[0]
    assert torch.equal(one_file(img), model(img))

    odd = small(Hiera, q_pool=1, eps=1e-5)                      # another eps, no head, a rectangle, fewer poolings
    torch.save(dict(model=odd.state_dict(), config=odd.config), tmp_path / "odd.pt")
    folder = export(str(tmp_path / "odd.pt"), "timm", heads=2)
    img = torch.randn(2, 3, 32, 48)
    close(timm.create_model(f"local-dir:{folder}", pretrained=True).eval()(img), odd(img), 1e-5)
    close(load_encoder(folder, say=str)(img), odd(img), 1e-5)
    with pytest.raises(SystemExit, match="is a Hiera, which is not written for transformers here: use --to timm"):
        export(str(tmp_path / "odd.pt"), "hf")


def test_onnx(tmp_path):
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    model, img = small(Hiera, num_classes=3), torch.randn(3, 3, 32, 48)
    torch.save(dict(model=model.state_dict(), config=model.config), tmp_path / "a.pt")
    session = runtime.InferenceSession(export(str(tmp_path / "a.pt"), "onnx"), providers=["CPUExecutionProvider"])
    close(torch.from_numpy(session.run(None, dict(image=img.numpy()))[0]), model(img).detach(), 1e-4)


def test_official_files(tmp_path, capsys):
    """An mae_in1k file has no final norm and no config: its network pools as often as it has fusing convolutions."""
    model = small(**HIERAS["hiera_lite"] | dict(img_size=64, heads=1, mlp_ratio=4.0))
    torch.save(dict(model_state=model.state_dict()), tmp_path / "mae_hiera.pth")
    path, lines = str(tmp_path / "mae_hiera.pth"), []
    encoder, img = load_encoder(path, say=lines.append), torch.randn(2, 3, 64, 64)
    assert encoder.config["q_pool"] == 2 and encoder.config["img_size"] == (64, 64)
    assert "it has no final norm, as an MAE never reads the mean token: a fresh one" in lines[0]
    torch.testing.assert_close(encoder(img), model.features(img))
    wide = torch.randn(2, 3, 64, 96)                            # the table is resized at loading, or as images come
    assert torch.equal(load_encoder(path, say=str, img_size=(64, 96))(wide), encoder(wide))
    assert describe([path]) is None
    said = capsys.readouterr().out
    assert "network      Hiera" in said and "stages       (1, 2, 7, 2)" in said and "heads        not stored" in said
    state = model.state_dict()
    for change, words in (
            (dict(pos_embed=torch.zeros(1, 250, 46)), "has positions for 250 tokens, which is no square"),
            ({"blocks.4.mlp.fc1.weight": torch.zeros(4, 5)}, "has no blocks.4.mlp.fc1.weight of width 184")):
        torch.save(state | change, tmp_path / "odd.pth")
        with pytest.raises(SystemExit, match=words):
            load_encoder(str(tmp_path / "odd.pth"), say=str)
    narrow = small(Hiera, img_size=32)
    torch.save(narrow.state_dict(), tmp_path / "narrow.pth")
    with pytest.raises(SystemExit, match="does not say how many heads its first stage has: give --heads"):
        load_encoder(str(tmp_path / "narrow.pth"), say=str)
    assert load_encoder(str(tmp_path / "narrow.pth"), heads=2, say=str).config["heads"] == 2


# ----------------------------------------------------------------------------------------------------------------
# Real runs

TINY = ("--model hiera_mini --img-size 16 --batch-size 8 --mask-ratio 0.5 --decoder-dim 16 --workers 0 --log-every 1 "
        "--save-every 5").split()


def train(out, *args):
    hiera_mae.main(list(map(str, [*TINY, "--out", out, *args])))
    return rows(out)


@pytest.fixture
def teacher_file(tmp_path):
    """A teacher with more blocks than the student, of another width and with other heads."""
    model = small(Hiera, img_size=16, patch_size=2, dim=12, stages=(1, 1, 6))
    torch.save(dict(model=model.state_dict(), config=model.config), tmp_path / "teacher.pt")
    return tmp_path / "teacher.pt"


@pytest.mark.parametrize("world", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_killed_and_resumed_is_bitwise_the_same(classes, tmp_path, teacher_file, world):
    args = ["--data", classes, *TINY, "--epochs", 4, "--accum", 3 - world, "--distill-teacher", teacher_file]

    script = dict(world=world, script="more/hiera_mae.py")
    if world == 1:
        hiera_mae.main(list(map(str, [*args, "--out", tmp_path / "whole"])))
    else:
        finish(*args, "--out", tmp_path / "whole", **script)
    out = tmp_path / "broken"
    start_and_kill(*args, out=out, step=6, **script)
    if world == 1:
        hiera_mae.main(list(map(str, [*args, "--out", out, "--workers", 1])))
    else:
        finish(*args, "--out", out, "--workers", 1, **script)
    got = steps(out)
    assert any(b <= a for a, b in zip(got, got[1:])), "no step was repeated: nothing was resumed"
    whole, broken = ({r["step"]: r["loss"] for r in rows(f) if "loss" in r} for f in (tmp_path / "whole", out))
    assert whole == broken and len(whole) == 20
    same_state(tmp_path / "whole", out)


def test_outputs(classes, tmp_path, teacher_file):
    """What a distilled run leaves, what its log says, and the network in encoder.pt."""
    out = tmp_path / "run"
    found = train(out, "--data", classes, "--epochs", 2, "--distill-teacher", teacher_file, "--distill-weight", 0.5,
                  "--probe-every", 1)
    assert {"last.pt", "encoder.pt", "recon.png", "log.jsonl"} <= set(os.listdir(out))
    losses = [row for row in found if "loss" in row]
    for row in losses:
        assert row["loss"] == pytest.approx(row["pixels"] + 0.5 * row["distill"], rel=1e-5)
        assert row["chance"] - 0.5 * row["distill_chance"] == pytest.approx(1, abs=0.1)     # standardised pixels
    assert [row["step"] for row in found if "knn" in row] == [0, 5, 10]
    assert Image.open(out / "recon.png").width == 3 * (16 * 7 + 8)
    stored, encoder = torch.load(out / "last.pt")["model"], load_encoder(str(out / "encoder.pt"), say=str)
    assert encoder.config["q_pool"] == 1 and encoder.config["heads"] == 1
    for name, value in encoder.state_dict().items():
        if not name.startswith("norm."):
            assert torch.equal(value, stored[f"model.{name}"])
    assert (encoder.norm.weight == 1).all() and not encoder.norm.bias.any()
    assert stored["adapters.0.weight"].shape == (8, 4, 1, 1)    # 2 heads, doubled twice, from 1


def test_what_others_make_of_the_encoder(classes, tmp_path):
    """--init, fine-tuning, probes and features, analyses, at other sizes, too."""
    train(tmp_path / "a", "--data", classes, "--epochs", 1)
    train(tmp_path / "b", "--data", classes, "--epochs", 1, "--init", tmp_path / "a" / "last.pt", "--lr", 0)
    a, b = (torch.load(tmp_path / name / "last.pt")["model"] for name in "ab")
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)

    path, data = str(tmp_path / "a" / "encoder.pt"), ["--data", str(classes), "--workers", "0"]
    for size in ([], ["--img-size", "24", "16"]):
        out = str(tmp_path / f"f{len(size)}")
        finetune.main(["--init", path, *data, *size, "--epochs", "1", "--batch-size", "8", "--out", out])
        tuned = load_classifier(read(f"{out}/best.pt"))[0]
        assert tuned.config["num_classes"] == 2 and tuned.config["q_pool"] == 2
        assert tuned.config["img_size"] == ((24, 16) if size else (16, 16))
    with pytest.raises(SystemExit, match="--pool is no option of hiera_mini: leave it out, or give another --model"):
        finetune.main(["--init", path, *data, "--pool", "cls"])
    for more in ([], ["--protocol", "sweep", "--epochs", "1", "--blocks", "3"]):
        probe.main([path, *data, *more, "--out", str(tmp_path / "p")])
    assert 0 <= [row for row in rows(tmp_path / "p") if "test_acc1" in row][-1]["test_acc1"] <= 100
    probe.main([path, *data, "--protocol", "features", "--tokens", "mean", "patches", "--out", str(tmp_path / "x")])
    assert np.load(tmp_path / "x" / "patches.npy").shape == (8, 16, 128)
    with pytest.raises(SystemExit, match="--pool cls: .* is a Hiera, which has no cls token: give --pool avg"):
        probe.main([path, *data, "--pool", "cls", "--out", str(tmp_path / "y")])
    for name, files in (("attention", [path]), ("cka", [path, path]), ("summary", [path])):
        more = ["--data", str(classes), "--workers", "0", "--batch-size", "8"] if name != "summary" else []
        analyze.main([name, *files, *more, "--out", str(tmp_path / "z")])
    cka = json.loads((tmp_path / "z" / "cka.json").read_text())["cka"]
    assert len(cka) == 7 and all(cka[i][i] == pytest.approx(1, abs=1e-4) for i in range(7))


@pytest.mark.parametrize("args", [
    ["--img-size", "16", "24", "--in-chans", "1"], ["--patch-size", "4", "--img-size", "32", "--in-chans", "4"],
    ["--dtype", "bf16", "--clip-grad", "1", "--accum", "2"], ["--heads", "2", "--repeat", "2"],
    ["--distill", "hidden", "--distill-teacher", "teacher.pt"],
    ["--distill-layers", "4:5", "6:8", "--distill-teacher", "teacher.pt"]])
def test_other_settings(classes, tmp_path, args, teacher_file):
    args = [teacher_file if arg == "teacher.pt" else arg for arg in args]
    found = train(tmp_path / "run", "--data", classes, "--epochs", 1, *args)
    assert all(isinstance(row["loss"], float) for row in found if "loss" in row)


@pytest.mark.parametrize("args, words", [
    (["--model", "vit_tiny"], "must be one of hiera_mini, .*, not vit_tiny"),
    (["--mask-ratio", "0.99"], "leaves 0 of 4 mask units visible"), (["--heads", "5"], "5 heads do not divide"),
    (["--img-size", "20"], "mask units of 8 pixels do not tile a 20x20 image: its sides must be multiples of 8"),
    (["--distill-layers", "1:2"], "no effect without --distill-teacher"),
    (["--distill-layers", "2:8", "--distill-teacher", "teacher.pt"], "block 2 of 6 sees its unit alone: name later"),
    (["--distill-layers", "3:8", "--distill-teacher", "teacher.pt"], "block 3 of 6 sees its unit alone: name later"),
    (["--distill-layers", "6:9", "--distill-teacher", "teacher.pt"], r"layers are 1 to 6 \(student\) and 1 to 8"),
    (["--distill", "hidden", "--distill-layers", "1:3", "--distill-teacher", "teacher.pt"],
     "the student's 1 is on another map than the teacher's layer"),
    (["--patch-size", "4", "--img-size", "32", "--distill-teacher", "teacher.pt"], "has patch_size 2, the student 4: "),
    (["--teacher-heads", "5", "--distill-teacher", "teacher.pt"], "5 heads do not divide the width 12")])
def test_bad_options(classes, tmp_path, args, words, teacher_file):
    args = [teacher_file if arg == "teacher.pt" else arg for arg in args]
    with pytest.raises(SystemExit, match=words):
        train(tmp_path / "run", "--data", classes, "--epochs", 2, *args)


def test_a_vit_is_refused(classes, tmp_path):
    vit = ViT(img_size=16, patch_size=4, dim=24, depth=2, heads=3)
    torch.save(dict(model=vit.state_dict(), config=vit.config), tmp_path / "vit.pt")
    with pytest.raises(SystemExit, match="vit.pt is a ViT, and here a Hiera is expected"):
        train(tmp_path / "run", "--data", classes, "--epochs", 2, "--distill-teacher", tmp_path / "vit.pt")
