"""Number by number against recorded runs of the reference implementations. Skipped where the recordings are absent:
tests/test_mae.py holds closed-form numbers that a fresh clone can check alone."""
import json

import pytest
import torch
import torch.nn.functional as F
from golden import FOLDER, Golden, close, close_grads, needs_golden, read_json

from mae import MAE, RECIPES, patchify
from training import decay_groups, finite_step, set_lr, warmup_cosine
from vit import MODELS, ViT, drop_path, resize_positions, sincos_positions
from weights import build_vit, load_into, read, shape_of

pytestmark = needs_golden


def make_mae(c):
    vit = ViT(c["img_size"], c["patch_size"], 3, c["embed_dim"], c["depth"], c["num_heads"], c["mlp_ratio"])
    return MAE(vit, c["decoder_embed_dim"], c["decoder_depth"], c["decoder_num_heads"], c["norm_pix_loss"],
               c["mask_ratio"])


# ----------------------------------------------------------------------------------------------------------------
# Positions, drop path, schedules, groups, shapes


@pytest.mark.parametrize("name, order", [("mae", "xy"), ("moco", "yx")])
def test_positions(name, order):
    g = Golden(f"pos_embed_{name}")
    for case in g.config["cases"]:
        if name == "mae":
            dim, side, cls = case
            table = sincos_positions(dim, side, side, order)[0]
            close(table if cls else table[1:], g(f"out/dim{dim}_grid{side}_cls{cls}"), 2e-6)
        elif case[1] == case[2]:                                # its table for other grids does not fit its tokens
            close(sincos_positions(*case, order)[0], g("out/dim{}_h{}_w{}".format(*case)), 2e-6)


def test_resized_positions_by_size():
    g = Golden("pos_embed_interp_mae")
    for i, (old, new) in enumerate(g.config["cases"]):
        close(resize_positions(g(f"input/pos_embed_{i}"), (old, old), (new, new)), g(f"out/pos_embed_{i}"), 2e-5)


def test_resized_positions_of_dino():
    g = Golden("dino_pos_interp")
    patch, pos = g.config["patch_size"], g("input/pos_embed")
    side = g.config["img_size"] // patch
    for h, w in g.config["sizes"]:
        ours = resize_positions(pos, (side, side), (h // patch, w // patch), offset=0.1)
        close(ours, g(f"out/pos_w{h}_h{w}"), 2e-5)


def test_drop_path():
    g = Golden("drop_path")
    # The reference keeps a sample where keep + u >= 1, so u >= 1 - keep = rate, up to the last bit of the sum.
    close(drop_path(g("input/x"), g.config["drop_prob"], g("rand/uniform")), g("out/y_train"), 1e-5)
    rate, depth = g.config["rates"]
    rates = [block.drop_path for block in ViT(16, 8, dim=8, depth=depth, heads=2, drop_path=rate).blocks]
    close(torch.tensor(rates), g("out/rates_per_block"), 1e-5)


def test_schedule():
    g = Golden("schedule_mae")
    for i, c in enumerate(g.config["cases"]):
        per_epoch, accum = c["iters_per_epoch"], c["accum_iter"]
        counts = [(n, c["epochs"] * per_epoch / accum, c["warmup_epochs"] * per_epoch / accum)
                  for n in range(c["epochs"] * per_epoch // accum)]
        ours = torch.tensor([warmup_cosine(n, total, warm, c["lr"], c["min_lr"]) for n, total, warm in counts],
                            dtype=torch.float64).repeat_interleave(accum)
        close(ours, g(f"out/lr_{i}"), 1e-12)
        close(0.3 * ours, g(f"out/lr_scaled0.3_{i}"), 1e-12)


def test_schedule_of_mae_lite():
    g = Golden("schedule_maelite")
    optimizer = torch.optim.SGD([dict(params=[torch.zeros(1)], lr_scale=s) for s in g.config["lr_scales"]], 1.0)
    for i, c in enumerate(g.config["cases"]):
        start = c["warmup_lr_start"] if c["warmup_steps"] else 0.0
        ours = []
        for n in range(c["total_steps"] + 1):
            set_lr(optimizer, warmup_cosine(n, c["total_steps"], c["warmup_steps"], c["lr"], c["end_lr"], start))
            ours.append([group["lr"] for group in optimizer.param_groups])
        ours = torch.tensor(ours, dtype=torch.float64)
        close(ours if c["sched"] == "warmcos_scale" else ours[:, :1].expand_as(ours), g(f"out/lr_{i}"), 1e-12)


@pytest.mark.parametrize("file, row, name", [
    ("mae", "pretrain/mae_vit_base_patch16/weight_decay=0.05", "vit_base"),
    ("maelite", "mae_lite_exp(pretrain)/mae_vit_tiny_patch16/weight_decay=0.05", "vit_tiny")])
def test_parameter_groups(file, row, name):
    expected = read_json(f"paramgroups_{file}")[row]
    model = full_size(name)
    names = {p: n for n, p in model.named_parameters()}
    ours = {names[p]: (i, group["weight_decay"]) for i, group in enumerate(decay_groups(model, 0.05))
            for p in group["params"]}
    assert ours == {n: (v["group"], v["weight_decay"]) for n, v in expected.items()}


def full_size(name):
    with torch.device("meta"):
        r = RECIPES[name]
        return MAE(ViT(**MODELS[name]), r["decoder_dim"], r["decoder_depth"], r["decoder_heads"])


@pytest.mark.parametrize("file, row, name", [
    ("mae", "mae_vit_base_patch16", "vit_base"), ("mae", "mae_vit_large_patch16", "vit_large"),
    ("mae", "mae_vit_huge_patch14", "vit_huge"), ("maelite", "mae_vit_tiny_patch16", "vit_tiny"),
    ("maelite", "mae_vit_small_patch16", "vit_small")])
def test_shapes_of_mae(file, row, name):
    check_shapes(full_size(name), read_json(f"shapes_{file}")[row])


@pytest.mark.parametrize("file, row, name, readout", [
    ("mae", "vit_base_patch16_finetune_gap_1000", "vit_base", "avg"),
    ("mae", "vit_base_patch16_finetune_cls_1000", "vit_base", "cls"),
    ("maelite", "vit_tiny_patch16_finetune_gap_1000", "vit_tiny", "avg")])
def test_shapes_of_classifiers(file, row, name, readout):
    with torch.device("meta"):
        model = ViT(**MODELS[name], num_classes=1000, readout=readout, positions="learned")
    check_shapes(model, read_json(f"shapes_{file}")[row])


def check_shapes(model, expected):
    assert sum(p.numel() for p in model.parameters()) == expected["n_params"]
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == expected["n_params_trainable"]
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    ours = {(k, tuple(v.shape), k in trained) for k, v in model.state_dict().items()}
    assert ours == {(k, tuple(shape), grad) for k, shape, _, grad in expected["state"]}


# ----------------------------------------------------------------------------------------------------------------
# Forward and backward


@pytest.mark.parametrize("name, tolerance", [("mae_forward_pix", 1e-5), ("mae_forward_normpix", 5e-5)])
def test_mae(name, tolerance):
    g = Golden(name)
    model = make_mae(g.config)
    model.load_state_dict(g.under("state"))
    img, noise = g("input/imgs"), g("rand/noise")
    loss = model(img, noise)
    close(loss, g("out/loss"), tolerance)
    loss.backward()
    close_grads(model, g.under("grad"), 5e-5)
    found = model.reconstruct(img, noise)
    for key in ("loss", "pred", "latent"):
        close(found[key], g(f"out/{key}"), tolerance)
    assert torch.equal(found["mask"], g("out/mask")) and torch.equal(found["ids_restore"], g("out/ids_restore"))
    close(patchify(img, model.patch_size), g("out/patchify"), 0)


@pytest.mark.parametrize("name, tolerance", [
    ("mae_vit_ft_gap", 1e-5), ("mae_vit_ft_cls", 1e-5), ("maelite_vit_ft_gap", 1e-5), ("maelite_vit_ft_cls", 2e-5)])
def test_classifier(name, tolerance):
    g = Golden(name)
    c = g.config
    model = ViT(c["img_size"], c["patch_size"], 3, c["embed_dim"], c["depth"], c["num_heads"], c["mlp_ratio"],
                c["num_classes"], positions="learned", readout="avg" if "gap" in name else "cls")
    model.load_state_dict(g.under("state"))
    close(model.features(g("input/imgs")), g("out/features"), tolerance)
    logits = model(g("input/imgs"))
    close(logits, g("out/logits"), tolerance)
    loss = F.cross_entropy(logits, g("input/soft_target"))
    close(loss, g("out/loss"), tolerance)
    loss.backward()
    close_grads(model, g.under("grad"), 5e-5)


def test_trajectory():
    """Thirty optimizer steps: schedule, groups, clipping-free norm, fused AdamW, loss before each, weights after."""
    g = Golden("traj_mae")
    c = g.config
    model = make_mae(c)
    model.load_state_dict(g.under("state"))
    optimizer = torch.optim.AdamW(decay_groups(model, c["weight_decay"]), c["lr"], betas=c["betas"], fused=True)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    steps = c["epochs"] * c["n_batches"]
    for step in range(steps):
        lr = warmup_cosine(step, steps, c["warmup_epochs"] * c["n_batches"], c["lr"], c["min_lr"])
        for i, group in enumerate(optimizer.param_groups):
            group["lr"] = lr
            assert lr == pytest.approx(g("out/lr")[step, i].item(), rel=1e-12)
        loss = model(g("input/imgs")[step % c["n_batches"]], g("rand/noise")[step])
        loss.backward()
        norm, skipped = finite_step(optimizer, scaler)
        optimizer.zero_grad()
        assert not skipped
        reference = g("out/loss")[step].item()
        assert abs(loss.item() - reference) <= max(20 * g("dev64/out/loss")[step].item(), 1e-5 * reference)
        assert norm.item() == pytest.approx(g("out/grad_norm")[step].item(), rel=2e-4)   # fp32 noise of 30 steps
    state = model.state_dict()
    for key, after in g.under("after").items():
        allowed = max(20 * g(f"dev64/after/{key}").max().item(), 1e-5 * after.abs().max().item())
        assert (state[key] - after).abs().max().item() <= allowed, key


# ----------------------------------------------------------------------------------------------------------------
# Files


def quiet(_):
    pass


@pytest.mark.parametrize("npz, file, heads, out, options", [
    ("ckpt_mae_pretrain_release", "ckpt_mae_pretrain_release.pth", 3, "features_cls", {}),
    ("ckpt_mae_pretrain_release", "ckpt_mae_pretrain_release.pth", 3, "features_gap", dict(readout="avg")),
    ("ckpt_mae_pretrain_release", "ckpt_mae_pretrain_release.pth", 3, "features_gap_resized",
     dict(readout="avg", img_size=42)),
    ("ckpt_maelite_last_epoch", "ckpt_maelite_last_epoch_ckpt.pth", 4, "features_cls", {}),
    ("ckpt_maelite_last_epoch", "ckpt_maelite_last_epoch_ckpt.pth", 4, "features_gap", dict(readout="avg")),
    ("ckpt_moco", "ckpt_moco.pth", 4, "features", {}),
    ("ckpt_moco", "ckpt_moco_converted_deit_format.pth", 4, "features", {}),
    ("ckpt_dino", "ckpt_dino_full.pth", 2, "features_teacher", {}),
    ("ckpt_dino", "ckpt_dino_full.pth:student", 2, "features_student", {}),
    ("ckpt_deit", "ckpt_deit.pth", 3, "logits", dict(num_classes=7))])
def test_public_files(npz, file, heads, out, options):
    g = Golden(npz)
    model = build_vit(str(FOLDER / file), heads, quiet, **options)
    img = g("input/imgs_resized" if "resized" in out else "input/imgs")
    close(model(img), g(f"out/{out}"), 1e-5)


def test_visualisation_file():
    g = Golden("ckpt_mae_visualize_release")
    model = make_mae(g.config)
    assert load_into(model, read(str(FOLDER / g.config["checkpoint"])), quiet) == []
    found = model.reconstruct(g("input/imgs"), g("rand/noise"))
    close(found["loss"], g("out/loss"), 2e-5)
    close(found["pred"], g("out/pred"), 2e-5)
    assert torch.equal(found["mask"], g("out/mask"))


def test_training_file_starts_a_new_run():
    """An official training file (with an argparse.Namespace inside) is read as --init: the first loss must agree."""
    g = Golden("ckpt_mae_training")
    file = read(str(FOLDER / g.config["checkpoint"]))
    model = make_mae(g.config)
    load_into(model, file, quiet)
    close(model(g("input/imgs")[0], g("rand/noise")[0]), g("out/loss_next_epoch")[0], 1e-5)
    assert file.config["norm_pix_loss"] is True


def test_heads_must_be_known():
    with pytest.raises(SystemExit, match="--heads"):
        shape_of(read(str(FOLDER / "ckpt_deit.pth")))


def test_distillation_token_is_refused():
    with pytest.raises(SystemExit, match="distillation token"):
        read(str(FOLDER / "ckpt_deit_distilled.pth"))


def test_missing_keys_are_those_of_the_reference():
    """What the official loader leaves fresh for a pooled classifier: the readout's norm and the head, nothing else."""
    g = Golden("ckpt_maelite_last_epoch")
    file = read(str(FOLDER / g.config["checkpoint"]))
    model = ViT(**{**shape_of(file, 4), "readout": "avg", "num_classes": g.config["num_classes"]})
    expected = {k.removeprefix("model.") for k in json.loads(str(g.arrays["out/missing_keys_gap"]))}
    assert set(load_into(model, file, quiet)) == expected
