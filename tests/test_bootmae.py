"""BootMAE: recorded runs of the official code, invariants, the textbook form, and real runs."""
import json
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from golden import FOLDER, Golden, close, close_grads

from more.bootmae import BootMAE, lr_at, momentum_at, parameter_groups, ramp_at
from nets.blocks import block_mask, order_of, random_orders
from runtime.run import finite_step
from vit import gather_tokens, patchify

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
    slow = g.under("state_ema") or state
    load(model, state, slow)
    counted = [p for name, p in model.named_parameters() if not name.startswith("momentum_encoder.")]
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad and "momentum" not in name}
    assert sum(p.numel() for p in counted) == c["n_params"] and frozen == set(c["frozen"])
    return model


def load(model, state, slow):
    names = model.momentum_encoder.state_dict()
    model.load_state_dict(state | {f"momentum_encoder.{k}": v for k, v in slow.items() if k in names})


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
