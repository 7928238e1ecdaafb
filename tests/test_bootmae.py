"""BootMAE: recorded runs of the official code, invariants, the textbook form, and real runs."""
import json
import math
import os
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from golden import FOLDER, Golden, close, close_grads
from PIL import Image
from test_runs import TINY, finish, rows, same_state, start_and_kill, steps
from textbook import TextbookBootMAE

import finetune
import probe
from more import bootmae
from more.bootmae import BootMAE, lr_at, momentum_at, parameter_groups, ramp_at
from nets.blocks import block_mask, order_of, random_orders
from nets.naming import build
from runtime.run import finite_step
from vit import MODELS, ViT, gather_tokens, patchify
from weights import load_classifier, load_encoder, read
from weights.export import export

# Recordings of masked image modelling are in a folder of their own, unless $GOLDEN names one that has them.
MIM = next((folder for folder in (FOLDER, FOLDER.parent / "golden_mim") if list(folder.glob("bootmae_*.npz"))), FOLDER)


def recording(name):
    g = Golden.__new__(Golden)
    g.arrays = np.load(MIM / f"{name}.npz", allow_pickle=False)
    g.config = json.loads(str(g.arrays["config"]))
    return g


def each_recording(pattern):
    """Decorator: the test runs once for each recording that is there and matches."""
    names = sorted(path.stem for path in MIM.glob(f"{pattern}.npz"))
    return lambda test: pytest.mark.golden(pytest.mark.parametrize("name", names)(test))


def small(**options):
    """A BootMAE of 16 patches, 4 of them visible, without zeros that could hide a mistake."""
    defaults = dict(decoder_dim=20, img_size=32, patch_size=8, dim=24, depth=3, heads=3, mlp_ratio=2.0)
    model = BootMAE(**{**defaults, **options})
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model


# ----------------------------------------------------------------------------------------------------------------
# Recordings


def recorded(g):
    """The network of a recording, with its weights, and those of its moving average if it has some."""
    c, state = g.config, g.under("state")
    model = BootMAE(c["decode_dim"], c["decoder_depth"], weight_mask=c["weight_mask"],
                    taps=(c["fea_list"][0] + 1, c["fea_list"][-1] + 1), img_size=c["img_size"],
                    patch_size=c["patch_size"], dim=c["embed_dim"], depth=c["depth"], heads=c["num_heads"],
                    mlp_ratio=c["mlp_ratio"], eps=c["norm_eps"])
    model.visible = model.patches - c["mask_num"]
    for table in ("pos_embed", "de_pos_embed"):                 # fixed, so ours are these already
        close(model.state_dict()[table], state[table], 2e-6)
    slow = g.under("state_ema") or state
    names = model.momentum_encoder.state_dict()
    model.load_state_dict(state | {f"momentum_encoder.{k}": v for k, v in slow.items() if k in names})
    counted = [p for name, p in model.named_parameters() if not name.startswith("momentum_encoder.")]
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad and "momentum" not in name}
    assert sum(p.numel() for p in counted) == c["n_params"] and frozen == set(c["frozen"])
    return model


def recorded_order(g, step):
    masks, noise = g("input/masks")[step].flatten(1).bool(), g("rand/uniform")[step].flatten(1)
    return order_of(masks, noise, int(g("rand/roll")[step]))


def losses_at(g, model, step, epoch):
    """Total, pixels' and features' loss of a recorded step."""
    c = g.config
    pixels, features = model(g("input/imgs")[step], recorded_order(g, step))
    return pixels + c["feature_weight"] * ramp_at(epoch, c["epochs"]) * features, pixels, features


def ema_at(c, epoch):
    return momentum_at(epoch, c["model_ema_decay"], 0.99999 if c["model_ema_dynamic"] else 0.9999)


@each_recording("bootmae_step*")
def test_step(name):
    """Predictions and targets of all patches, both losses and their sum, every gradient, and the moving average."""
    g = recording(name)
    c, model, img, order = g.config, recorded(g), g("input/imgs")[0], recorded_order(g, 0)
    assert torch.equal(order, g("out/idx_shuffle"))
    back = order.argsort(1)
    pixels, features = (gather_tokens(x, back) for x in model.predict(img, order, first=1))
    close(pixels, patchify(g("out/pred_pixel"), c["patch_size"]), 1e-5)
    width = features.shape[-1:]
    close(features, F.layer_norm(g("out/pred_feature"), width, eps=1e-6), 1e-5)
    target = gather_tokens(model.feature_target(img, order, first=1), back)
    close(target, F.layer_norm(g("out/ema_feature"), width, eps=1e-6), 1e-5)
    found = losses_at(g, model, 0, c["epoch"])
    for ours, key in zip(found, ("loss", "loss_pixel", "loss_feature")):
        close(ours, g(f"out/{key}")[0], 1e-5)
    found[0].backward()
    close_grads(model, g.under("grad"), 5e-5)

    momentum = ema_at(c, c["epoch"])
    close(torch.tensor(momentum), g("out/ema_decay")[0], 1e-6)
    whole = dict(model.named_parameters())
    slow = g.under("state_ema")
    model.update_ema(momentum)
    after = {k.removeprefix("ema."): v for k, v in g.under("after").items()}
    encoder = model.momentum_encoder.state_dict()
    assert encoder.keys() & after.keys()
    for key, value in after.items():                            # of the decoders nothing is kept: by the formula
        close(encoder.get(key, slow[key].lerp(whole[key], 1 - momentum)), value, 1e-5)


@each_recording("bootmae_traj")
def test_trajectory(name):
    """Schedules, groups, fused AdamW, the growing weight of features, the average: losses, and both networks after. In
    this recording all steps of an epoch have the features of its first batch as targets; the official code, and ours,
    compute them in every step."""
    g = recording(name)
    c, model = g.config, recorded(g)
    original = model.feature_target
    optimizer = torch.optim.AdamW(parameter_groups(model, c["weight_decay"]), betas=(0.9, 0.95), fused=True)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    slow = {name: p.detach().clone() for name, p in model.named_parameters()}       # of the decoders, too, here
    n = c["n_batches"]
    for step in range(c["steps"]):
        epoch, img = step // n, g("input/imgs")[step]
        if step % n == 0:
            stale = original(img, torch.arange(model.patches).expand(len(img), -1), first=1)    # in reading order
            model.feature_target = lambda img, order, first, x=stale: gather_tokens(x, order[:, first - 1:])
        for group in optimizer.param_groups:
            group["lr"] = lr_at(step, c["epochs"] * n, c["warmup_epochs"] * n, c["lr"], c["min_lr"])
        losses = losses_at(g, model, step, epoch)
        losses[0].backward()
        finite_step(optimizer, scaler)
        optimizer.zero_grad()
        momentum = ema_at(c, epoch)
        assert momentum == pytest.approx(g("out/ema_decay")[epoch].item(), rel=1e-6)
        model.update_ema(momentum)
        for name, p in model.named_parameters():
            slow[name].lerp_(p.detach(), 1 - momentum)
        for ours, key in zip(losses, ("loss", "loss_pixel", "loss_feature")):
            reference = g(f"out/{key}")[step].item()
            assert abs(ours.item() - reference) <= max(20 * g(f"dev64/out/{key}")[step].item(), 1e-5 * reference)
    for key, after in g.under("after").items():
        who, name = key.split(".", 1)
        ours = model.state_dict()[name] if who == "model" else slow[name]
        if who == "ema" and name in model.momentum_encoder.state_dict():
            ours = model.momentum_encoder.state_dict()[name]
        dev = g(f"dev64/after/{key}").max().item() if f"dev64/after/{key}" in g else 0.0
        assert (ours - after).abs().max().item() <= max(20 * dev, 1e-5 * after.abs().max().item()), key


@each_recording("bootmae_step*")
def test_parameter_groups(name):
    """cls is not decayed, mask tokens are, the tables of positions and the average are in no group."""
    g = recording(name)
    model = recorded(g)
    names = {p: n for n, p in model.named_parameters()}
    ours = {group["weight_decay"]: {names[p] for p in group["params"]}
            for group in parameter_groups(model, g.config["weight_decay"])}
    assert ours == {group["weight_decay"]: set(group["params"]) for group in g.config["param_groups"]}


@each_recording("bootmae_mask_to_index")
def test_orders(name):
    g = recording(name)
    masks, noise = g("input/masks").flatten(1).bool(), g("rand/uniform").flatten(1)
    for shift in range(4):
        assert torch.equal(order_of(masks, noise, shift), g(f"out/idx_shuffle_roll{shift}"))


@each_recording("bootmae_schedules")
def test_schedules(name):
    g = recording(name)
    for i, (start, dynamic, epochs) in enumerate(g.config["ema_cases"]):
        ours = [momentum_at(epoch, start, 0.99999 if dynamic else 0.9999) for epoch in range(epochs)]
        close(torch.tensor(ours, dtype=torch.float64), g(f"out/ema_{i}"), 1e-12)
    for i, (peak, floor, epochs, iterations, warmup_epochs, warmup_steps) in enumerate(g.config["lr_cases"]):
        total, warmup = epochs * iterations, warmup_epochs * iterations
        warmup = warmup_steps if warmup_steps > 0 else warmup
        ours = [lr_at(step, total, warmup, peak, floor) for step in range(total)]
        close(torch.tensor(ours, dtype=torch.float64), g(f"out/lr_{i}"), 1e-12)
    for i, (weight, epochs) in enumerate(g.config["feature_weight_cases"]):
        ours = [weight * ramp_at(epoch, epochs) for epoch in range(epochs)]
        close(torch.tensor(ours, dtype=torch.float64), g(f"out/feature_weight_{i}"), 1e-12)


def edges(masks):
    """The mean number of borders between a hidden and a visible neighbour, and its standard error."""
    masks = np.stack(masks)
    count = (masks[:, 1:] != masks[:, :-1]).sum((1, 2)) + (masks[:, :, 1:] != masks[:, :, :-1]).sum((1, 2))
    return count.mean(), count.std() / len(masks) ** 0.5


@each_recording("mim_mask_generators")
def test_block_masks(name):
    """The official masks of a seed, one by one; and over many draws as often hidden, place by place."""
    g = recording(name)
    cases = [(i, case) for i, case in enumerate(g.config["cases"]) if case[0] == "bootmae"]
    assert cases
    for i, (_, side, count, least, most) in cases:
        for seed in g("input/seeds").tolist():
            rng = random.Random(seed)
            for mask in g(f"out/mask_{i}_seed{seed}").numpy():
                assert np.array_equal(block_mask(side, side, count, least, most, rng), mask)
        rng = random.Random(1)
        masks = [block_mask(side, side, count, least, most, rng) for _ in range(4000)]
        counts = g(f"out/count_histogram_{i}").nonzero().flatten().tolist()
        assert {mask.sum() for mask in masks} == set(counts) == {count}
        share = g(f"out/cell_frequency_{i}").numpy()
        error = (share * (1 - share) * (1 / 4000 + 1 / g.config["draws"])) ** 0.5
        assert (np.abs(np.mean(masks, 0) - share) < 5 * error).all()
        mean, error = edges(masks)
        assert abs(mean - g(f"out/mean_boundary_edges_{i}").item()) < 5 * error


# ----------------------------------------------------------------------------------------------------------------
# The objective


def test_same_as_textbook():
    """Twenty steps beside the textbook form, which computes everything for all patches and averages the whole network:
    losses, weights, and the averaged encoder."""
    torch.manual_seed(0)
    ours = small()
    state = {k: v for k, v in ours.state_dict().items() if not k.startswith("momentum_encoder.")}
    plain = TextbookBootMAE(32, 8, 24, 3, 3, 20, 2, ours.visible, 2.0)
    plain.load_state_dict(state)
    plain.start_average()
    ours.update_ema(0.0)
    optimizers = [torch.optim.AdamW(parameter_groups(m, 0.05), 1e-3, betas=(0.9, 0.95)) for m in (ours, plain)]
    for step in range(20):
        img, order, weight = torch.randn(4, 3, 32, 32), ours.random_order(4, "cpu"), step / 20
        pixels, features = ours(img, order)
        losses = pixels + weight * features, plain(img, order, weight)
        torch.testing.assert_close(*losses, rtol=1e-4, atol=0)
        for loss, optimizer in zip(losses, optimizers):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        ours.update_ema(0.9)
        plain.update_average(0.9)
    torch.testing.assert_close(ours.lm_head_1.weight, plain.lm_head_1.weight, rtol=0, atol=2e-4)
    averaged = plain.average[0].state_dict()
    for name, value in ours.momentum_encoder.state_dict().items():
        torch.testing.assert_close(value, averaged[name], rtol=0, atol=2e-4)


def test_hidden_pixels_reach_the_targets_alone():
    torch.manual_seed(0)
    model, img = small(), torch.randn(2, 3, 32, 32)
    order = model.random_order(2, "cpu")
    first = 1 + model.visible
    hidden = torch.zeros(2, 16, 1).scatter(1, order[:, model.visible:, None], 1.0)
    noise = rearrange(hidden * torch.randn(2, 16, 192), "b (h w) (c p q) -> b c (h p) (w q)", h=4, p=8, q=8)
    for a, b in zip(model.predict(img, order, first), model.predict(img + noise, order, first)):
        assert torch.equal(a, b)
    assert not torch.equal(model.pixel_target(img, order), model.pixel_target(img + noise, order))
    assert not torch.equal(model.feature_target(img, order, first), model.feature_target(img + noise, order, first))
    seen = rearrange((1 - hidden) * torch.randn(2, 16, 192), "b (h w) (c p q) -> b c (h p) (w q)", h=4, p=8, q=8)
    assert torch.equal(model.pixel_target(img, order), model.pixel_target(img + seen, order))
    assert not torch.equal(model.feature_target(img, order, first), model.feature_target(img + seen, order, first))


def test_each_decoder_looks_where_it_should():
    """Features are read after the last block alone; what the first block gave the pixels' decoder is not used there."""
    torch.manual_seed(0)
    model, img = small(), torch.randn(2, 3, 32, 32)
    order, first = model.random_order(2, "cpu"), 1 + model.visible
    pixels, features = model.predict(img, order, first)
    for block in model.decode_blocks:                           # norm4 norms what is looked at
        block.norm4.weight.data += 1
    changed = model.predict(img, order, first)
    assert not torch.equal(changed[0], pixels) and torch.equal(changed[1], features)
    model.taps = model.depth, model.depth
    assert not torch.equal(model.predict(img, order, first)[0], changed[0])


def test_weights_of_patches():
    """Three hidden patches in a corner of 4 x 4, one alone: the share of the nine around; beyond the edge none is."""
    model = small(mask_ratio=0.75)
    model.visible = 12
    hidden = [0, 1, 4, 15]
    order = torch.tensor([[n for n in range(16) if n not in hidden] + hidden])
    expected = 1 + torch.tensor([[3, 3, 3, 1]]) / 9
    torch.testing.assert_close(model.patch_weights(order), expected)
    model.weight_mask = False
    assert torch.equal(model.patch_weights(order), torch.ones(1, 4))


def test_every_parameter_learns_but_the_average():
    torch.manual_seed(0)
    model = small()
    sum(model(torch.randn(4, 3, 32, 32), model.random_order(4, "cpu"))).backward()
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert not [n for n, p in trained.items() if p.grad is None or not p.grad.any()]
    rest = {n for n, _ in model.named_parameters()} - set(trained)
    average = {f"momentum_encoder.{n}" for n in model.momentum_encoder.state_dict()}
    assert rest == {"pos_embed", "de_pos_embed"} | average


def test_start():
    """A copy as the average; Xavier for q, k and v each, for keys and values of the cross-attention as one stack."""
    torch.manual_seed(0)
    model = BootMAE(128, 1, img_size=64, patch_size=8, dim=192, depth=1, heads=12)
    for name, value in model.momentum_encoder.state_dict().items():
        assert torch.equal(value, model.state_dict()[name])
    block, patch = model.decode_blocks[0], model.patch_embed.proj
    for weight, fans in ((model.blocks[0].attn.qkv.weight, 2 * 192), (block.attn.qkv.weight, 128 + 120),
                         (patch.weight, 2 * 192), (block.c_attn.kv.weight, 192 + 240), (model.down.weight, 128 + 192)):
        bound = (6 / fans) ** 0.5
        assert 0.98 * bound < weight.abs().max() <= bound
        assert weight.std().item() == pytest.approx(bound / 3 ** 0.5, rel=0.05)
    assert not patch.bias.any() and not block.mlp.fc1.bias.any() and model.cls_token.abs().max() < 1e-5
    assert 0.018 < model.mask_token_1.abs().max() <= 0.02 and model.lm_head["proj"].bias.any()
    assert block.attn.inner == 120                              # 12 heads of 10; 128 is no multiple of 12


@pytest.mark.parametrize("grid, ratio, count", [((14, 14), 120 / 147, 120), ((6, 6), 0.8, 18), ((4, 10), 0, 0)])
def test_random_orders(grid, ratio, count):
    """Permutations, in which all but a few of the patches in blocks are hidden; equal after the same seed."""
    patches = grid[0] * grid[1]
    torch.manual_seed(3)
    orders = random_orders(300, grid, count, "cpu")
    assert torch.equal(orders.sort(1)[0], torch.arange(patches).expand(300, -1))
    torch.manual_seed(3)
    assert torch.equal(orders, random_orders(300, grid, count, "cpu"))
    seen = orders[:, :patches // 4]
    share = torch.bincount(seen.flatten(), minlength=patches).view(grid) / 300
    assert share.min() > 0
    if count:                                                   # blocks reach a corner more rarely than the middle
        assert share[0, 0] > 1.3 * share[grid[0] // 2, grid[1] // 2]
    shifts = set()
    for seed in range(40):                                      # one shift for a batch: it shows 0 to 3 of the blocks'
        torch.manual_seed(seed)
        rng = random.Random(torch.randint(2 ** 62, ()).item())
        least, most = (max(1, round(patches * size / 196)) for size in (16, 60))
        masks = [block_mask(*grid, count, least, most, rng).flatten() for _ in range(2)]
        torch.manual_seed(seed)
        order = random_orders(2, grid, count, "cpu")[:, :patches - count]
        shifts |= {int(mask[row].sum()) for mask, row in zip(masks, order.numpy())}
    assert shifts == ({0, 1, 2, 3} if count else {0})


def test_a_block_never_crosses_the_image():
    """Drawn are 4 rows x 2 columns, which is the whole height, and then 2 x 4, which is taken."""
    drawn = iter([8, math.log(2), 8, -math.log(2)])
    rng = SimpleNamespace(uniform=lambda low, high: next(drawn), randint=lambda low, high: low)
    mask = block_mask(4, 20, 8, 8, 8, rng)
    assert mask[:2, :4].all() and mask.sum() == 8


@pytest.mark.parametrize("size, chans", [((96, 160), 1), ((64, 64), 6)])
def test_any_shape(size, chans):
    torch.manual_seed(0)
    model = small(img_size=size, in_chans=chans, patch_size=16)
    img = torch.randn(2, chans, *size)
    order = model.random_order(2, "cpu")
    pixels, features = model.predict(img, order, first=1)
    assert pixels.shape == (2, size[0] * size[1] // 256, 256 * chans) and features.shape[2] == 24
    sum(model(img, order)).backward()


@pytest.mark.parametrize("options, words", [
    (dict(mask_ratio=1.0), "--mask-ratio 1.0 leaves 0 of 16"), (dict(mask_ratio=0.0), "leaves 16 of 16"),
    (dict(taps=(1, 4)), "--taps wants two of the 3 blocks, not 1 4"), (dict(taps=(1,)), "not 1$"),
    (dict(img_size=(8, 160)), "blocks of 2 patches do not fit into a grid of 1x20"),
    (dict(img_size=(16, 784)), "blocks of 16 patches do not fit into a grid of 2x98"),
    (dict(decoder_dim=10), "multiple of 4"), (dict(heads=5), "5 heads do not divide"),
    (dict(decoder_dim=8, dim=36, heads=9), "9 heads are more than the 8 channels")])
def test_what_cannot_be(options, words):
    with pytest.raises(ValueError, match=words):
        small(**options)


def test_chance_and_spread():
    """The loss by chance is that of zero pixels, and of the mean feature; spread tells a collapse."""
    torch.manual_seed(0)
    model, img = small(), torch.randn(8, 3, 32, 32)
    order = model.random_order(8, "cpu")
    found = model.metrics(img, order, 0.7)
    target = model.feature_target(img, order, 1 + model.visible)
    mean = target.mean((0, 1))
    constant = (mean - mean.mean()) / (mean.var(correction=0) + 1e-6).sqrt()
    weight = model.patch_weights(order)
    by_hand = (weight * model.pixel_target(img, order).square().mean(-1)).mean()
    by_hand = by_hand + 0.7 * (weight * (target - constant).square().mean(-1)).mean()
    torch.testing.assert_close(found["chance"], by_hand)
    assert 0.3 < found["spread"] < 1.1
    with torch.no_grad():                                       # an average for which all patches are alike
        for p in model.momentum_encoder.parameters():
            p.zero_()
        model.momentum_encoder.blocks[-1].mlp.fc2.bias.copy_(torch.randn(24))
    found = model.metrics(img, order, 1.0)
    assert found["spread"] < 1e-6 and found["chance"] < 2


def test_encoder_file_and_features():
    torch.manual_seed(0)
    model, img = small(), torch.randn(2, 3, 32, 32)
    found = model.encoder_checkpoint()
    vit = build(found["config"])
    vit.load_state_dict(found["model"])
    torch.testing.assert_close(model.features(img), vit.encode(img)[:, 1:].mean(1))
    assert not torch.equal(model.features(img), model.momentum_encoder.encode(img)[:, 1:].mean(1))
    model.cls_token.data.add_(1)                                # the tensors are the network's own: always up to date
    assert torch.equal(found["model"]["cls_token"], model.cls_token)


# ----------------------------------------------------------------------------------------------------------------
# Real runs

TINY = [*TINY, "--decoder-dim", "16", "--decoder-depth", "1"]


def train(out, *args):
    bootmae.main(list(map(str, [*TINY, "--out", out, *args])))
    return rows(out)


@pytest.mark.parametrize("world", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_killed_and_resumed_is_bitwise_the_same(classes, tmp_path, world):
    """The average among the rest, over an epoch's end, where momentum and the weight of features change."""
    args = ["--data", classes, *TINY, "--epochs", 4, "--accum", 3 - world]                      # 20 steps

    def run(*more):
        command = [*args, *more]
        if world == 1:
            return bootmae.main(list(map(str, command)))
        return finish(*command, world=world, script="more/bootmae.py")

    run("--out", tmp_path / "whole")
    out = tmp_path / "broken"
    start_and_kill(*args, out=out, step=6, world=world, script="more/bootmae.py")
    run("--out", out, "--workers", 1)
    got = steps(out)
    assert any(b <= a for a, b in zip(got, got[1:])), "no step was repeated: nothing was resumed"
    whole, broken = ({r["step"]: r["loss"] for r in rows(f) if "loss" in r} for f in (tmp_path / "whole", out))
    assert whole == broken and len(whole) == 20
    same_state(tmp_path / "whole", out)
    state = torch.load(out / "last.pt")["model"]
    assert not torch.equal(state["momentum_encoder.norm.weight"], state["norm.weight"])


def test_outputs(classes, tmp_path):
    """What a run leaves; its schedules, row by row; and the average after a step by its formula, from kept files."""
    found = train(tmp_path, "--data", classes, "--epochs", 8, "--probe-every", 4, "--keep-every", 1, "--batch-size", 40,
                  "--momentum", 0.5, "--lr", 1e-3, "--min-lr", 1e-4)                            # 8 steps, one an epoch
    assert {"last.pt", "encoder.pt", "recon.png", "log.jsonl"} <= set(os.listdir(tmp_path))
    losses = [row for row in found if "loss" in row]
    assert {"chance", "spread", "momentum", "lr", "grad_norm"} <= set(losses[0])
    for step, row in enumerate(losses):
        assert row["loss"] == pytest.approx(row["pixels"] + min(1, (step + 1) / 2) * row["features"], rel=1e-5)
        assert row["momentum"] == pytest.approx(0.5 + 0.4999 * step / 100)
        assert row["lr"] == pytest.approx(0 if step == 0 else lr_at(step, 8, 1, 1e-3, 1e-4))
    assert [row["step"] for row in found if "knn" in row] == [0, 4, 8]
    one, two = (torch.load(tmp_path / f"epoch000{n}.pt")["model"] for n in (7, 8))
    for name in ("norm.bias", "blocks.3.mlp.fc1.weight"):
        average = torch.lerp(one[f"momentum_encoder.{name}"], two[name], 1 - losses[-1]["momentum"])
        torch.testing.assert_close(two[f"momentum_encoder.{name}"], average, rtol=0, atol=1e-7)
        assert (one[name] - two[name]).abs().max() > 1e-5
    assert Image.open(tmp_path / "recon.png").width == 3 * (16 * 7 + 8)
    encoder = load_encoder(str(tmp_path / "encoder.pt"), say=str)
    assert encoder.config["heads"] == 4 and encoder.config["key_bias"] is False
    for name, value in encoder.state_dict().items():
        assert torch.equal(value, two[name])


def test_what_others_make_of_the_encoder(classes, tmp_path):
    """--init, fine-tuning, a probe, an export; last.pt and its average by name; an official file."""
    train(tmp_path / "a", "--data", classes, "--epochs", 1)
    train(tmp_path / "b", "--data", classes, "--epochs", 1, "--init", tmp_path / "a" / "encoder.pt", "--lr", 0)
    a, b = (torch.load(tmp_path / name / "last.pt")["model"] for name in "ab")
    for name in load_encoder(str(tmp_path / "a" / "encoder.pt"), say=str).state_dict():
        assert torch.equal(a[name], b[name]) and torch.equal(a[name], b[f"momentum_encoder.{name}"])

    path = str(tmp_path / "a" / "encoder.pt")
    finetune.main(["--init", path, "--data", str(classes), "--epochs", "1", "--batch-size", "8", "--workers", "0",
                   "--out", str(tmp_path / "f")])
    tuned = load_classifier(read(str(tmp_path / "f" / "best.pt")))[0]
    assert tuned.config["num_classes"] == 2 and "blocks.0.attn.q_bias" in tuned.state_dict()
    probe.main([path, "--data", str(classes), "--workers", "0", "--out", str(tmp_path / "p")])
    row = [row for row in rows(tmp_path / "p") if "test_acc1" in row][-1]
    assert 0 <= row["test_acc1"] <= 100

    average = load_encoder(str(tmp_path / "a" / "last.pt") + ":momentum_encoder", say=str)
    assert torch.equal(average.norm.bias, a["momentum_encoder.norm.bias"])
    official = {k: v for k, v in a.items() if not k.startswith("momentum_encoder.")}
    torch.save(dict(model=official), tmp_path / "official.pth")
    vit = load_encoder(str(tmp_path / "official.pth"), heads=4, say=str)
    img = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(vit(img), load_encoder(path, say=str)(img))


def test_timm_takes_the_encoder(classes, tmp_path):
    timm = pytest.importorskip("timm")
    pytest.importorskip("safetensors")
    train(tmp_path, "--data", classes, "--epochs", 1)
    path = str(tmp_path / "encoder.pt")
    theirs = timm.create_model(f"local-dir:{export(path, 'timm')}", pretrained=True).eval()
    img = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(theirs(img), load_encoder(path, say=str)(img), rtol=0, atol=1e-5)


@pytest.mark.parametrize("args", [
    ["--img-size", "16", "24", "--in-chans", "1"], ["--no-weight-mask", "--in-chans", "4", "--taps", "2", "3"],
    ["--dtype", "bf16", "--clip-grad", "1", "--accum", "2"], ["--feature-weight", "0", "--block-share", "0"]])
def test_other_settings(classes, tmp_path, args):
    found = train(tmp_path, "--data", classes, "--epochs", 1, *args)
    assert all(isinstance(row["loss"], float) for row in found if "loss" in row)


@pytest.mark.parametrize("args, words", [
    (["--model", "swin_lite"], "must be one of vit_mini, .*, not swin_lite"),
    (["--mask-ratio", "0.99"], "leaves 0 of 16"), (["--block-share", "2"], "--block-share must be at most 1"),
    (["--taps", "1"], "--taps wants two of the 4 blocks, not 1"), (["--taps", "0", "4"], "--taps must be at least 1"),
    (["--taps", "1", "5"], "--taps wants two of the 4 blocks, not 1 5"),
    (["--momentum", "1.5"], "--momentum must be at most 1"), (["--decoder-dim", "6"], "multiple of 4, not 6"),
    (["--min-lr", "1"], "--min-lr 1 is above the peak learning rate, 4.69e-06: give a lower --min-lr"),
    (["--img-size", "4", "80"], "do not fit into a grid of 1x20"),
    (["--decoder-depth", "0"], "--decoder-depth must be at least 1")])
def test_bad_options(classes, tmp_path, args, words):
    with pytest.raises(SystemExit, match=words):
        train(tmp_path, "--data", classes, "--epochs", 2, *args)


def test_init_from_another_network_is_refused(classes, tmp_path):
    """A plain ViT has biases of keys, which BootMAE's encoder has no place for."""
    torch.save(dict(model=ViT(16, 4, **{k: MODELS["vit_mini"][k] for k in ("dim", "depth", "heads")}).state_dict()),
               tmp_path / "plain.pt")
    with pytest.raises(SystemExit, match="attn.qkv.bias, which the network here has no place for"):
        train(tmp_path / "out", "--data", classes, "--epochs", 1, "--init", tmp_path / "plain.pt")
