"""MAE and its distillation number by number against recorded runs of the reference implementations. Sizes, heads and
options come from the recordings. Skipped where they are absent: tests/test_mae.py and tests/test_distill.py hold
numbers that a fresh clone can check alone."""
import math
import re
from types import SimpleNamespace

import pytest
import torch
from einops import rearrange
from golden import FOLDER, Golden, close, close_grads, close_losses, needs_golden, read_json
from test_parity import check_shapes, recordings, rows_of, vit_config
from torch import nn

from distill import DistilledMAE, DistillLoss, Teacher, run_blocks
from mae import MAE, RECIPES
from runtime.run import Run, decay_groups, finite_step, warmup_cosine
from vit import MODELS, patchify
from weights import load_into, read

pytestmark = needs_golden


def make_mae(c, state=None, **vit):
    """The MAE of a recording's config; vit: the encoder's options, if the config has several networks."""
    vit = vit or vit_config(c)
    model = MAE(c["decoder_embed_dim"], c["decoder_depth"], c["decoder_num_heads"], c["norm_pix_loss"],
                c["mask_ratio"], **vit)
    set_eps(model, c)
    if state:
        model.load_state_dict(state)
    return model


def set_eps(model, c):
    """All norms of a recording have one eps."""
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = c.get("norm_eps", module.eps)


def count(names, kind):
    """How many blocks.N there are among the names of tensors, or how many decoder_blocks.N."""
    return len({name.split(".")[1] for name in names if name.startswith(f"{kind}.")})


# ----------------------------------------------------------------------------------------------------------------
# Schedules, groups, shapes


def test_schedule():
    g = Golden("schedule_mae")
    for i, c in enumerate(g.config["cases"]):
        per_epoch, accum = c["iters_per_epoch"], c["accum_iter"]
        total, warmup = (c[name] * per_epoch / accum for name in ("epochs", "warmup_epochs"))
        ours = []
        for n in range(c["epochs"] * per_epoch):                # passes; the rate changes where a step's first begins
            step = (n - n % per_epoch % accum) / accum
            ours.append(warmup_cosine(step, total, warmup, c["lr"], c["min_lr"]))
        ours = torch.tensor(ours, dtype=torch.float64)
        close(ours, g(f"out/lr_{i}"), 1e-12)
        scaled = [re.fullmatch(rf"out/lr_scaled([\d.]+)_{i}", key) for key in g.arrays.files]
        assert any(scaled)
        for found in filter(None, scaled):
            close(float(found[1]) * ours, g(found[0]), 1e-12)


def test_schedule_of_mae_lite():
    g = Golden("schedule_maelite")
    for i, c in enumerate(g.config["cases"]):
        scales = g.config["lr_scales"]
        groups = [dict(params=[torch.zeros(1)], lr_scale=scale) for scale in scales]
        if c["sched"] == "warmcos":                             # its groups all have the same rate
            groups = [dict(params=[torch.zeros(1)]) for _ in scales]
        run = SimpleNamespace(optimizer=torch.optim.SGD(groups, 1.0))
        ours = []
        for n in range(c["total_steps"] + 1):
            lr = warmup_cosine(n, c["total_steps"], c["warmup_steps"], c["lr"], c["end_lr"], c["warmup_lr_start"])
            Run.set_lr(run, lr)
            ours.append([group["lr"] for group in run.optimizer.param_groups])
        close(torch.tensor(ours, dtype=torch.float64), g(f"out/lr_{i}"), 1e-12)


def pretraining_groups():
    """(file, row) of the recorded parameter groups that are an MAE's."""
    return [(path.stem, row) for path in sorted(FOLDER.glob("paramgroups_*.json"))
            for row, content in read_json(path.stem).items() if "mask_token" in content]


@pytest.mark.parametrize("file, row", pretraining_groups())
def test_parameter_groups(file, row):
    expected = read_json(file)[row]
    model = MAE(4, count(expected, "decoder_blocks"), 1, img_size=8, patch_size=4, dim=4,
                depth=count(expected, "blocks"), heads=1)
    names = {p: n for n, p in model.named_parameters()}
    weight_decay = max(v["weight_decay"] for v in expected.values())
    ours = {names[p]: (i, group["weight_decay"]) for i, group in enumerate(decay_groups(model, weight_decay))
            for p in group["params"]}
    assert ours == {n: (v["group"], v["weight_decay"]) for n, v in expected.items()}


def options_of(state):
    """The options of an MAE that the shapes {name: shape} of its tensors show; its heads they do not show."""
    dim, in_chans, patch, _ = state["patch_embed.proj.weight"]
    side = round((state["pos_embed"][1] - 1) ** 0.5)
    return dict(decoder_dim=state["decoder_embed.bias"][0], decoder_depth=count(state, "decoder_blocks"), dim=dim,
                depth=count(state, "blocks"), patch_size=patch, in_chans=in_chans, img_size=side * patch,
                mlp_ratio=state["blocks.0.mlp.fc1.bias"][0] / dim)


def is_mae(state):
    return "mask_token" in state and "decoder_pred.bias" in state


def check_recipe(row, options):
    """Our tables have the published sizes, where a row bears the name of one of our models."""
    for name in RECIPES:
        if name in row:
            ours = {**MODELS[name], **RECIPES[name]}
            for key in ("dim", "depth", "patch_size", "decoder_dim", "decoder_depth"):
                assert options[key] == ours[key], f"{name}: {key}"


@pytest.mark.parametrize("file, row", rows_of("shapes_*", is_mae))
def test_shapes_of_mae(file, row):
    want = read_json(file)[row]
    options = options_of({name: shape for name, shape, *_ in want["state"]})
    check_recipe(row, options)
    with torch.device("meta"):
        model = MAE(**options, decoder_heads=1, heads=1)
    check_shapes(model, want)


@pytest.mark.parametrize("file, row", rows_of("shapes_*", lambda state: "tch_model.cls_token" in state))
def test_shapes_of_distillation(file, row):
    """The wrapper's student, its teacher and its adapters; ours keeps the teacher outside."""
    want = {name: tuple(shape) for name, shape, *_ in read_json(file)[row]["state"]}
    student = {name.removeprefix("model."): shape for name, shape in want.items() if name.startswith("model.")}
    options = options_of(student)
    adapters = [shape for name, shape in want.items() if re.match(r"(attn|hidden)_adapter\.", name)]
    pairs = dict(attention=[(1, 1) for shape in adapters if len(shape) == 4],
                 hidden=[(1, 1) for shape in adapters if len(shape) == 2])
    heads, widths = ([shape for shape in adapters if len(shape) == n] or [(1, 1)] for n in (4, 2))
    with torch.device("meta"):
        model = MAE(**options, decoder_heads=1, heads=1)
        loss = DistillLoss(dict(heads=heads[0][1], dim=widths[0][1]), dict(heads=heads[0][0], dim=widths[0][0]), pairs)
    assert {k: tuple(v.shape) for k, v in model.state_dict().items()} == student
    assert [tuple(p.shape) for p in loss.parameters()] == adapters
    trained = sum(p.numel() for net in (model, loss) for p in net.parameters() if p.requires_grad)
    recorded = [math.prod(shape) for name, shape, _, grad in read_json(file)[row]["state"] if grad]
    assert trained == sum(recorded)


# ----------------------------------------------------------------------------------------------------------------
# Forward and backward


@pytest.mark.parametrize("name", recordings("mae_forward_*"))
def test_mae(name):
    g = Golden(name)
    tolerance = 5e-5 if g.config["norm_pix_loss"] else 1e-5
    model = make_mae(g.config, g.under("state"))
    img, order = g("input/imgs"), g("rand/noise").argsort(1)
    loss = model(img, order)
    close(loss, g("out/loss"), tolerance)
    loss.backward()
    close_grads(model, g.under("grad"), 5e-5)
    found = model.reconstruct(img, order)
    for key in ("loss", "pred", "latent"):
        close(found[key], g(f"out/{key}"), tolerance)
    assert torch.equal(found["mask"], g("out/mask")) and torch.equal(found["ids_restore"], g("out/ids_restore"))
    rows_first = rearrange(patchify(img, model.patch_size), "b n (c pq) -> b n (pq c)", c=img.shape[1])
    close(rows_first, g("out/patchify"), 0)


@pytest.mark.parametrize("name", recordings("traj_mae"))
def test_trajectory(name):
    """Each recorded step: schedule, groups, norm without clipping, fused AdamW, loss before it; weights after all."""
    g = Golden(name)
    c = g.config
    model = make_mae(c, g.under("state"))
    optimizer = torch.optim.AdamW(decay_groups(model, c["weight_decay"]), c["lr"], betas=c["betas"], fused=True)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    steps = c["epochs"] * c["n_batches"]
    assert steps == len(g("out/loss"))
    for step in range(steps):
        lr = warmup_cosine(step, steps, c["warmup_epochs"] * c["n_batches"], c["lr"], c["min_lr"])
        for i, group in enumerate(optimizer.param_groups):
            group["lr"] = lr
            assert lr == pytest.approx(g("out/lr")[step, i].item(), rel=1e-12)
        loss = model(g("input/imgs")[step % c["n_batches"]], g("rand/noise")[step].argsort(1))
        loss.backward()
        norm, skipped = finite_step(optimizer, scaler)
        optimizer.zero_grad()
        assert not skipped
        close_losses(g, step, loss, norm, noise=2e-4)                   # of fp32 over all steps
    state = model.state_dict()
    for key, after in g.under("after").items():
        allowed = max(20 * g(f"dev64/after/{key}").max().item(), 1e-5 * after.abs().max().item())
        assert (state[key] - after).abs().max().item() <= allowed, key


# ----------------------------------------------------------------------------------------------------------------
# Distillation


def recorded_pair(g, tmp_path):
    """A recorded student, its teacher as a file that one would download, and the options of both."""
    c, state = g.config, g.under("state")
    options = {who: vit_config({**c, **c[who]}) for who in ("student", "teacher")}
    weights = {who: {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
               for who, prefix in (("student", "model."), ("teacher", "tch_model."))}
    options["student"]["in_chans"] = g("input/imgs").shape[1]
    path = str(tmp_path / "teacher.pth")
    torch.save(weights["teacher"], path)
    return make_mae(c, weights["student"], **options["student"]), path, options


@pytest.mark.parametrize("name", recordings("maelite_distill_*"))
def test_distillation(name, tmp_path):
    """What is compared, each error, their sum, and every gradient. A run compares attention or hidden states; where a
    recording has both, the two losses are added, less one of the two errors of pixels."""
    g = Golden(name)
    c, state = g.config, g.under("state")
    student, path, options = recorded_pair(g, tmp_path)
    run = SimpleNamespace(mean=(0.5,), std=(0.5,), device=torch.device("cpu"), cfg=SimpleNamespace(dtype="fp32"))
    img, order = g("input/imgs"), g("rand/noise").argsort(1)
    assert torch.equal(order, g("out/ids_shuffle"))
    visible = order[:, :student.visible]
    tolerance = 2e-5 if c["use_attn_adapter"] else 1e-5
    losses, trained = [], {f"model.{k}": p for k, p in student.named_parameters()}
    for kind, short in (("attention", "attn"), ("hidden", "hidden")):
        layers, adapter = c[f"distill_{short}_idx"], c[f"use_{short}_adapter"]
        if not layers:
            continue
        teacher = Teacher(path, options["teacher"]["heads"], kind, [f"{i}:{i}" for i in layers], options["student"],
                          student.depth, run)
        for part in filter(None, (teacher.vit, teacher.extra)):
            set_eps(part, c)
        model = DistilledMAE(student, teacher, c[f"distill_{short}_alpha"], adapter=adapter)
        first = 1 if kind == "attention" else 0                 # files count the adapters from 0
        for i, own in zip(layers, model.distill_loss.adapters):
            if adapter:
                own.weight.data = state[f"{short}_adapter.adapter{i - first}.weight"]
                trained[f"{short}_adapter.adapter{i - first}.weight"] = own.weight
        ours = run_blocks(student, student.embed(img, visible), **{kind: layers})[1]
        for outputs, who in ((ours, "student"), (teacher(img, visible), "teacher")):
            for x, i in zip(outputs, layers, strict=True):
                close(x, g(f"out/{who}_{short}{i}"), tolerance)
        losses.append(model(img, order))
        close(model.parts["pixels"], g("out/loss_rec"), tolerance)
        close(model.parts["distill"], g(f"out/loss_{short}"), tolerance)
    loss = sum(losses) - (len(losses) - 1) * student(img, order)
    close(loss, g("out/loss"), tolerance)
    loss.backward()
    everything = SimpleNamespace(named_parameters=trained.items)
    close_grads(everything, g.under("grad"), 5e-5)


# ----------------------------------------------------------------------------------------------------------------
# Files


def quiet(_):
    pass


@pytest.mark.parametrize("name", recordings("ckpt_mae_visualize_release"))
def test_visualisation_file(name):
    g = Golden(name)
    model = make_mae(g.config)
    assert load_into(model, read(str(FOLDER / g.config["checkpoint"])), quiet) == []
    found = model.reconstruct(g("input/imgs"), g("rand/noise").argsort(1))
    close(found["loss"], g("out/loss"), 2e-5)
    close(found["pred"], g("out/pred"), 2e-5)
    assert torch.equal(found["mask"], g("out/mask"))


@pytest.mark.parametrize("name", recordings("ckpt_mae_training"))
def test_training_file_starts_a_new_run(name):
    """An official training file (with an argparse.Namespace inside) is read as --init: the first loss must agree."""
    g = Golden(name)
    file = read(str(FOLDER / g.config["checkpoint"]))
    model = make_mae(g.config)
    load_into(model, file, quiet)
    close(model(g("input/imgs")[0], g("rand/noise")[0].argsort(1)), g("out/loss_next_epoch")[0], 1e-5)
    assert file.config["norm_pix_loss"] is g.config["norm_pix_loss"]
