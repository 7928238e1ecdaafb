"""Hiera and its MAE: recorded runs of the official codes, invariants, the textbook form, and real runs."""
import json
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from golden import FOLDER, Golden, close, close_grads, close_losses

from more.hiera_distill import DistilledHieraMAE, HieraTeacher, run_blocks
from more.hiera_mae import HieraMAE
from nets.hiera import HIERAS, Hiera, resize_unit_positions, unit_index
from runtime.run import decay_groups, finite_step, warmup_cosine

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
    close_grads(model, g.under("grad"), 2e-4)


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
    for i, (kind, ours, theirs) in enumerate((kind, *pair) for kind in pairs for pair in pairs[kind]):
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
