"""DINO and EsViT: against the recorded reference runs, against the direct forms, and as their users run them. Sizes,
temperatures, rates and options of recordings come from the recordings."""
import json
import math
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from golden import FOLDER, Golden, close, close_grads, each_recording, needs_golden, read_json
from test_parity import check_shapes, rows_of
from test_runs import finish, rows, start, start_and_kill, steps, wait_for
from textbook import TextbookEsViT

import esvit
import runtime.run
from esvit import CrossEntropy, DINOHead, EsViT, Network, cosine, match, pair_weights, temperature_at
from images.datasets import open_dataset
from images.multicrop import MultiCrops, crop_groups
from nets.naming import PYRAMIDS
from runtime.options import parse
from runtime.run import decay_groups, finite_step
from vit import MODELS, SWINS, Swin, ViT, pair
from weights import Weights, build, encoder_options, load_encoder, load_into, read, vit_options

CPU = torch.device("cpu")


def quiet(_):
    pass


def backbone(c):
    """The backbone of a recording's config."""
    channels = c.get("in_chans", 3)
    if "window_size" in c:
        return Swin(c["img_size"], c["patch_size"], channels, c["embed_dim"], c["depths"], c["num_heads"],
                    c["window_size"], c["mlp_ratio"], eps=c["norm_eps"])
    return ViT(c["img_size"], c["patch_size"], channels, c["embed_dim"], c["depth"], c["num_heads"], c["mlp_ratio"],
               positions="learned", eps=c["norm_eps"], resize_offset=0.1)


def network(c):
    return Network(backbone(c), c["out_dim"], "window_size" in c, hidden=c["hidden_dim"],
                   bottleneck=c["bottleneck_dim"], unit=c["norm_last_layer"])


def ours(state):
    """EsViT's files have Swin's tensors bare, beside the heads."""
    return {k if k.startswith(("backbone.", "head")) else f"backbone.{k}": v for k, v in state.items()}


def recorded_crops(g, batch=None):
    """The crops of a recording, or of one of its batches: global ones, and local ones if it has any."""
    groups = [g(f"input/{kind}") for kind in ("global", "local") if f"input/{kind}" in g]
    return [x if batch is None else x[batch] for x in groups if x.numel()]


def small(kind=Swin, region_weight=0.5, prototypes=24, **options):
    """A student and a teacher of their own weights."""
    torch.manual_seed(0)
    make = dict(img_size=16, patch_size=2, dim=8, depths=(1, 2), heads=(1, 2), window=4) if kind is Swin else dict(
        img_size=16, patch_size=4, dim=8, depth=2, heads=2, positions="learned", resize_offset=0.1)
    nets = [Network(kind(**make), prototypes, region_weight > 0, hidden=12, bottleneck=6, **options) for _ in range(2)]
    model = EsViT(*nets, region_weight)
    for p in model.teacher.parameters():
        p.data += 0.1 * torch.randn_like(p)
    return model


def crops(*groups, batch=3, channels=3):
    """groups: (number, side)."""
    return [torch.randn(n, batch, channels, side, side) for n, side in groups]


# ----------------------------------------------------------------------------------------------------------------
# Recorded runs: heads, networks


@each_recording("dino_head_*")
def test_head(name):
    g = Golden(name)
    c = g.config
    if c.get("use_bn"):
        pytest.skip("BatchNorm in the head is not built here")
    head = DINOHead(c["in_dim"], c["out_dim"], c["hidden_dim"], c["bottleneck_dim"], c["norm_last_layer"])
    head.load_state_dict(g.under("state"))
    x = g("input/x").requires_grad_()
    y = head(x)
    close(y, g("out/y"), 1e-5)
    (y * g("input/grad_out")).sum().backward()
    close(x.grad, g("out/grad_x"), 5e-5)
    close_grads(head, g.under("grad"), 5e-5)


def logits(head, z):
    """(B, V, E) -> (V * B, K), the row order of the recordings."""
    return rearrange(F.linear(z, head.prototypes()), "b v k -> (v b) k")


@each_recording("dino_vit_multicrop*")
def test_multicrop_of_dino(name):
    g = Golden(name)
    net = network(g.config)
    net.load_state_dict(g.under("state"))
    groups = recorded_crops(g)
    outputs = net(groups, False)
    close(rearrange(outputs.views, "b v d -> (v b) d"), g("out/features"), 5e-5)
    y = logits(net.head, outputs.z)
    close(y, g("out/y"), 5e-5)
    close(logits(net.head, net(groups[:1], False).z), g("out/y_global_only"), 5e-5)
    (y * g("input/grad_out")).sum().backward()
    close_grads(net, g.under("grad"), 2e-4)
    vit, normed = net.backbone, []
    x = vit.embed(groups[0][0])
    for block in vit.blocks:
        attention = block.attn.logits(block.norm1(x)).softmax(-1)
        x = block(x)
        normed.append(vit.norm(x))
    close(attention, g("out/last_attention_global0"), 5e-5)
    last = g("out/last2_blocks_global0")
    close(torch.stack(normed[-len(last):]), last, 5e-5)


@each_recording("esvit_multicrop*")
def test_multicrop_of_esvit(name):
    g = Golden(name)
    net = network(g.config)
    net.load_state_dict(ours(g.under("state")))
    groups = recorded_crops(g)

    def published(outputs):
        """Logits of views and regions, features of regions, in the row order of the recording: crop, image, region."""
        regions, features, first = [], [], 0
        all_logits = F.linear(outputs.z_regions, net.head_dense.prototypes())
        for n, t in outputs.layout:
            part = slice(first, first + n * t)
            first += n * t
            for x, found in ((all_logits, regions), (outputs.regions, features)):
                found.append(rearrange(x[:, part], "b (n t) k -> (n b t) k", n=n))
        return logits(net.head, outputs.z), torch.cat(regions), torch.cat(features)

    outputs = net(groups, True)
    assert [t for _, t in outputs.layout] == g("out/npatch").tolist()
    cls, region, features = published(outputs)
    for found, key in ((cls, "cls"), (region, "region"), (features, "region_features")):
        close(found, g(f"out/{key}"), 5e-5)
    close(logits(net.head, net(groups, False).z), g("out/view_only_cls"), 5e-5)
    alone = net(groups[:1], True)
    assert [t for _, t in alone.layout] == g("out/global_only_npatch").tolist()
    close(published(alone)[0], g("out/global_only_cls"), 5e-5)
    close(published(alone)[1], g("out/global_only_region"), 5e-5)
    wave = [f(torch.arange(x.numel(), dtype=torch.float64)).float().view_as(x)
            for f, x in ((torch.cos, cls), (torch.sin, region))]
    ((cls * wave[0]).sum() + (region * wave[1]).sum()).backward()
    close_grads(net, ours(g.under("grad")), 2e-4)


def has_head(state):
    """Is this a head, or a network with heads? BatchNorm in the head is not built here."""
    return any("last_layer" in name for name in state) and not any("running_mean" in name for name in state)


@needs_golden
@pytest.mark.parametrize("file, row", rows_of("shapes_*", has_head))
def test_shapes(file, row):
    """Published heads, and networks with heads: built from their shapes, they have the same names and parameters."""
    want = read_json(file)[row]
    alone = not any("patch_embed" in name for name, *_ in want["state"])
    if not alone:
        want["state"] = [(next(iter(ours({name: 0}))), *rest) for name, *rest in want["state"]]
    state = {name: torch.empty(shape, device="meta") for name, shape, *_ in want["state"]}
    head = "" if alone else "head."
    (hidden, dim), (bottleneck, _) = state[f"{head}mlp.0.weight"].shape, state[f"{head}mlp.4.weight"].shape
    prototypes = len(state[f"{head}last_layer.weight_v"])
    trained = {name for name, _, _, grad in want["state"] if grad}
    options = dict(hidden=hidden, bottleneck=bottleneck, unit=f"{head}last_layer.weight_g" not in trained)
    with torch.device("meta"):
        if alone:
            check_shapes(DINOHead(dim, prototypes, **options), want)
            return
        bare = {k.removeprefix("backbone."): v for k, v in state.items() if k.startswith("backbone.")}
        inside = encoder_options(Weights(bare, {}, "", row), heads=1)
        if "depths" not in inside:
            inside["positions"] = "learned"
        dense = any(name.startswith("head_dense.") for name in state)
        check_shapes(Network(build(inside), prototypes, dense, **options), want)
    for name, published in (SWINS | MODELS).items():
        if name in row:                                         # our tables have the published sizes
            assert all(inside[k] == published[k] for k in ("dim", "depth", "depths") if k in published)


@needs_golden
@pytest.mark.parametrize("file, row", [(file, row) for file in ("paramgroups_dino", "paramgroups_esvit")
                                       for row in (read_json(file) if (FOLDER / f"{file}.json").exists() else ())])
def test_groups(file, row):
    """Which parameters the published optimizer decays, and which it does not have; the names tell the network."""
    want = read_json(file)[row]
    groups, left = ours(want["groups"]), set(ours(dict.fromkeys(want["not_in_optimizer"])))
    names = set(groups) | left

    def count(pattern):
        return len({found[0] for found in (re.match(pattern, name) for name in names) if found})
    if count(r"backbone\.layers\.\d+"):
        depths = [count(rf"backbone\.layers\.{s}\.blocks\.\d+") for s in range(count(r"backbone\.layers\.\d+"))]
        inside = Swin(2 ** (2 + len(depths)), 2, dim=4, depths=depths, heads=(1,) * len(depths), window=2)
    else:
        inside = ViT(8, 4, dim=4, depth=count(r"backbone\.blocks\.\d+"), heads=1, positions="learned")
    dense = any(name.startswith("head_dense.") for name in names)
    net = Network(inside, 8, dense, hidden=4, bottleneck=4, unit="head.last_layer.weight_g" in left)
    names = {p: name for name, p in net.named_parameters()}
    plain, decayed = ({names[p] for p in group["params"]} for group in decay_groups(net, 0.04))
    scheduled = {k: v["weight_decay_scheduled"] for k, v in groups.items()}
    assert decayed == {k for k, v in scheduled.items() if v} and plain == {k for k, v in scheduled.items() if not v}
    assert left == {k for k, p in net.named_parameters() if not p.requires_grad}


# ----------------------------------------------------------------------------------------------------------------
# Recorded runs: losses, schedules, steps


def temperatures(c):
    return c["warmup_teacher_temp"], c["teacher_temp"], c["warmup_teacher_temp_epochs"]


def cross_entropy(student, teacher, center, temperature, weights, student_temp):
    """The chunked loss of given logits: prototypes are the axes."""
    eye = torch.eye(student.shape[-1])
    return CrossEntropy.apply(student, eye, teacher, eye, center, (student_temp, temperature), weights / len(student))


def moved_center(center, teacher, keep):
    """A step of one centre, from the teacher's logits."""
    model = small(region_weight=0)
    model.dino_loss.center = center.clone()
    model.update_center(teacher.flatten(0, -2).mean(0, keepdim=True).unsqueeze(0), torch.zeros(()), keep)
    return model.dino_loss.center


@each_recording("dino_loss*")
def test_loss_of_dino(name):
    g = Golden(name)
    c = g.config
    center, V = torch.zeros(1, c["out_dim"]), 2 + c["n_local"]
    pairs = pair_weights(((2, 1), (c["n_local"], 1)), CPU)[0].expand(c["batch"], -1, -1)
    for i, epoch in enumerate(c["epochs"]):
        student = rearrange(g("input/student")[i], "(v b) k -> b v k", v=V).requires_grad_()
        teacher = rearrange(g("input/teacher")[i], "(v b) k -> b v k", v=2)
        loss = cross_entropy(student, teacher, center, temperature_at(epoch, *temperatures(c)), pairs,
                             c["student_temp"])
        close(loss, g("out/loss")[i], 1e-5)
        loss.backward()
        close(rearrange(student.grad, "b v k -> (v b) k"), g("out/grad_student")[i], 1e-5)
        center = moved_center(center, teacher, c["center_momentum"])
        close(center, g("out/center_after")[i], 1e-5)
    temps = [temperature_at(e, *temperatures(c)) for e in range(c["nepochs"])]
    assert temps == pytest.approx(g("out/teacher_temp_schedule").tolist(), rel=1e-12)


@each_recording("esvit_ddino_loss*")
def test_loss_of_esvit(name):
    g = Golden(name)
    c = g.config
    V, B, local, tokens = 2 + c["n_local"], c["batch"], c["n_local"], (c["npatch_global"], c["npatch_local"])
    pairs, per_region = pair_weights(((2, tokens[0]), (local, tokens[1])), CPU)
    centers = [torch.zeros(1, c["out_dim"]) for _ in range(2)]

    def by_image(x):
        """(crop, image, region) rows -> (B, R, ...)"""
        split = x.split([2 * B * tokens[0], local * B * tokens[1]])
        return torch.cat([rearrange(part, "(n b t) d -> b (n t) d", b=B, t=t) for part, t in zip(split, tokens)], 1)

    for i, epoch in enumerate(c["epochs"]):
        temperature = temperature_at(epoch, *temperatures(c))
        views, regions = (g(f"input/student_{k}")[i].requires_grad_() for k in ("cls", "region"))
        t_views = rearrange(g("input/teacher_cls")[i], "(v b) k -> b v k", v=2)
        t_regions, t_features = (rearrange(g(f"input/teacher_{k}")[i], "(v b t) d -> b v t d", v=2, b=B)
                                 for k in ("region", "fea"))
        which = match(by_image(g("input/student_fea")[i]), t_features)                          # (B, R, 2)
        starts = [0, tokens[0], *(2 * tokens[0] + k * tokens[1] for k in range(local + 1))]
        for view in range(2):
            for crop in set(range(V)) - {view}:
                want = g(f"out/match_step{i}_teacher{view}_student{crop}")
                assert torch.equal(which[:, starts[crop]:starts[crop + 1], view], want)
        weights = torch.einsum("ri,brij->brij", per_region, F.one_hot(which, tokens[0]).float()).flatten(2)
        loss = 0.5 * cross_entropy(rearrange(views, "(v b) k -> b v k", v=V), t_views, centers[0], temperature,
                                   pairs.expand(B, -1, -1), c["student_temp"])
        loss = loss + 0.5 * cross_entropy(by_image(regions), t_regions.flatten(1, 2), centers[1], temperature, weights,
                                          c["student_temp"])
        close(loss, g("out/loss")[i], 1e-5)
        loss.backward()
        close(views.grad, g("out/grad_student_cls")[i], 1e-5)
        close(regions.grad, g("out/grad_student_region")[i], 1e-5)
        for k, (teacher, key) in enumerate(((t_views, "center"), (t_regions, "center_grid"))):
            centers[k] = moved_center(centers[k], teacher, c["center_momentum"])
            close(centers[k], g(f"out/{key}_after")[i], 1e-5)
    temps = [temperature_at(e, *temperatures(c)) for e in range(c["nepochs"])]
    assert temps == pytest.approx(g("out/teacher_temp_schedule").tolist(), rel=1e-12)


@each_recording("schedule_dino*", "schedule_esvit*")
def test_schedules(name):
    g = Golden(name)
    for i, c in enumerate(g.config["cases"]):
        total, warmup = c["epochs"] * c["niter_per_ep"], c["warmup_epochs"] * c["niter_per_ep"]
        found = [cosine(step, total, c["base_value"], c["final_value"], warmup) for step in range(total)]
        np.testing.assert_allclose(found, g.arrays[f"out/cosine_{i}"], rtol=1e-12)
    for i, c in enumerate(g.config.get("temps", [])):
        found = [temperature_at(e, *temperatures(c)) for e in range(c["nepochs"])]
        np.testing.assert_allclose(found, g.arrays[f"out/teacher_temp_{i}"], rtol=1e-12)


def freeze(net):
    """What the loop does in the first epochs."""
    torch.nn.ModuleList([m for name, m in net.named_modules() if name.endswith("last_layer")]).zero_grad()


@each_recording("dino_clip_freeze*")
def test_clipping_and_freezing(name):
    """Every tensor by itself. Prototypes lose their gradients before, not after: the others do not notice."""
    g = Golden(name)
    c = g.config
    net = network(c)
    names = dict(net.named_parameters())
    for key, grad in g.under("input/grads").items():
        names[key].grad = grad.clone()
    norms = {key: p.grad.norm().item() for key, p in names.items() if p.grad is not None}
    assert list(norms.values()) == pytest.approx(g("out/norms_in_named_parameters_order").tolist(), rel=1e-5)
    if c["epoch"] < c["freeze_last_layer"]:
        freeze(net)
    none = {key for key, p in names.items() if p.grad is None}
    assert none & set(norms) == set(json.loads(str(g.arrays["out/none_grads"])))
    optimizer = torch.optim.AdamW(net.parameters(), 0.0, fused=True)
    norm, skipped = finite_step(optimizer, torch.amp.GradScaler("cpu", enabled=False), c["clip"], per_tensor=True)
    rest = [value for key, value in norms.items() if key not in none]
    assert not skipped and norm.item() == pytest.approx(math.hypot(*rest), rel=1e-5)
    close_grads(net, g.under("grad"), 5e-5)


@each_recording("traj_dino*", "traj_esvit*")
def test_trajectory(name):
    """Many steps: crops, losses, clipping, freezing, three schedules, the teacher, centres."""
    g = Golden(name)
    c = g.config
    dense = "window_size" in c
    student, teacher = network(c), network(c)
    student.load_state_dict(ours(g.under("state")))
    model = EsViT(student, teacher, 0.5, c["student_temp"])
    optimizer = torch.optim.AdamW(decay_groups(model, c["weight_decay"]), c["lr"], fused=True)
    scaler, total = torch.amp.GradScaler("cpu", enabled=False), c["epochs"] * c["n_batches"]
    for step in range(total):
        epoch, batch = divmod(step, c["n_batches"])
        lr = cosine(step, total, c["lr"], c["min_lr"], c["warmup_epochs"] * c["n_batches"])
        wd = cosine(step, total, c["weight_decay"], c["weight_decay_end"])
        momentum = cosine(step, total, c["momentum_teacher"], 1.0)
        for found, key in ((lr, "lr"), (wd, "wd"), (momentum, "momentum")):
            assert found == pytest.approx(g(f"out/{key}")[step].item(), rel=1e-12)
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.param_groups[1]["weight_decay"] = wd
        loss, found = model(recorded_crops(g, batch), temperature_at(epoch, *temperatures(c)), dense)
        loss.backward()
        norms = torch.stack([p.grad.norm() for p in student.parameters() if p.grad is not None])
        want = g("out/grad_norms_before_clip")[step]
        assert (norms - want).abs().max() <= 2e-3 * want.max()
        if epoch < c["freeze_last_layer"]:
            freeze(student)
        _, skipped = finite_step(optimizer, scaler, c["clip_grad"], per_tensor=True)
        model.update_ema(momentum)
        model.update_center(found["means"], skipped, c["center_momentum"])
        optimizer.zero_grad()
        reference = g("out/loss")[step].item()
        assert abs(loss.item() - reference) <= max(20 * g("dev64/out/loss")[step].item(), 1e-5 * reference), step
        for key, center in model.dino_loss.named_buffers():
            if f"out/{key}" in g:
                close(center, g(f"out/{key}")[step], 1e-3)
    for who, net in (("student", student), ("teacher", teacher)):
        state, dev = net.state_dict(), ours(g.under(f"dev64/after/{who}"))
        for key, after in ours(g.under(f"after/{who}")).items():
            allowed = max(20 * dev[key].max().item(), 1e-5 * after.abs().max().item())
            assert (state[key] - after).abs().max().item() <= allowed, (who, key)


# ----------------------------------------------------------------------------------------------------------------
# Losses against their direct forms


@pytest.mark.parametrize("few", [1, 2 ** 24])
def test_chunked_loss_is_the_direct_one(monkeypatch, few):
    """Value and every gradient, in one piece and image by image."""
    torch.manual_seed(0)
    B, R, M, E, K = 3, 5, 4, 6, 40
    z, w = torch.randn(B, R, E, dtype=torch.float64), torch.randn(K, E, dtype=torch.float64)
    z_t, w_t, center = torch.randn(B, M, E).double(), torch.randn(K, E).double(), torch.randn(1, K).double()
    weights = torch.rand(B, R, M).double() * (torch.rand(B, R, M) < 0.4)
    p = ((z_t @ w_t.T - center) / 0.05).softmax(-1)
    with torch.enable_grad():
        z1, w1 = z.clone().requires_grad_(), w.clone().requires_grad_()
        direct = (weights * -torch.einsum("bmk,brk->brm", p, (z1 @ w1.T / 0.1).log_softmax(-1))).sum()
        (2.5 * direct).backward()
    monkeypatch.setattr(esvit, "AT_ONCE", dict(cpu=few, cuda=few))
    z2, w2 = z.clone().requires_grad_(), w.clone().requires_grad_()
    ours = CrossEntropy.apply(z2, w2, z_t, w_t, center, (0.1, 0.05), weights)
    (2.5 * ours).backward()
    for a, b in ((ours, direct), (z2.grad, z1.grad), (w2.grad, w1.grad)):
        torch.testing.assert_close(a, b)
    with pytest.raises(RuntimeError):                           # gradients are handed over once
        ours.backward()


OLD_NAMES = {"parametrizations.weight.original0": "weight_g", "parametrizations.weight.original1": "weight_v"}


def renamed(state):
    """A state dict in the old spelling of weight_norm's names, which public files have, and ours."""
    for new, usual in OLD_NAMES.items():
        state = {k.replace(new, usual): v for k, v in state.items()}
    return state


def book(model):
    """The textbook's form of a model with its weights, under weight_norm's new names."""
    config = model.student.backbone.config
    head = model.student.head
    ref = TextbookEsViT(len(head.last_layer.weight_g), head.mlp[0].out_features, head.mlp[4].out_features,
                        **{k: config[k] for k in ("patch_size", "dim", "depths", "heads", "window")},
                        img_size=config["img_size"][0])
    for net, theirs in ((model.student, ref.student), (model.teacher, ref.teacher)):
        state = net.state_dict()
        names = theirs.state_dict()
        theirs.load_state_dict({new: state[usual] for new, usual in zip(names, renamed(names))})
    return ref


def test_whole_step_is_the_textbook_one():
    """Two steps of EsViT, with centres that have moved, against all logits, gathered for every pair of crops."""
    model = small(unit=False)
    ref, images = book(model), [crops((2, 16), (3, 8)) for _ in range(2)]
    for groups in images:
        loss, found = model(groups, 0.05, True)
        want = ref([x.flatten(0, 1) for x in groups], (2, 3), 0.05)
        torch.testing.assert_close(loss, want)
        model.zero_grad(), ref.zero_grad()
        loss.backward(), want.backward()
        theirs = renamed({k: p.grad for k, p in ref.student.named_parameters()})
        close_grads(model.student, theirs, 5e-5)
        model.update_center(found["means"], torch.zeros(()))
        torch.testing.assert_close(model.dino_loss.center, ref.center)
        torch.testing.assert_close(model.dino_loss.center_grid, ref.center_grid)


def test_parts_of_a_batch_are_the_batch():
    """--accum: gradients and centres of two halves are those of the whole."""
    model, whole = small(), crops((2, 16), (2, 8), batch=4)
    model(whole, 0.05, True)[0].backward()
    want = {n: p.grad.clone() for n, p in model.student.named_parameters() if p.grad is not None}
    means = model(whole, 0.05, True)[1]["means"]
    model.zero_grad()
    halves = 0.0
    for half in range(2):
        loss, found = model([x[:, 2 * half:2 * half + 2] for x in whole], 0.05, True)
        (loss / 2).backward()
        halves = halves + found["means"] / 2
    torch.testing.assert_close(halves, means)
    for name, grad in want.items():
        torch.testing.assert_close(dict(model.student.named_parameters())[name].grad, grad, msg=name)


@pytest.mark.parametrize("kind, region_weight, groups", [
    (Swin, 0.5, [(2, 16)]), (Swin, 0.5, [(2, 16), (2, 8), (1, 12)]), (Swin, 0.0, [(2, 16), (1, 8)]),
    (ViT, 0.0, [(2, 16), (2, 8)]), (ViT, 0.5, [(2, 16), (2, 8), (2, 12)]), (ViT, 1.0, [(2, 16)])])
def test_any_crops_and_backbone(kind, region_weight, groups):
    """The parts weigh as they should, everything that takes part learns, and the teacher gets no gradient."""
    model = small(kind, region_weight)
    dense = region_weight > 0
    loss, found = model(crops(*groups), 0.05, dense)
    parts = found["parts"]
    want = (1 - region_weight) * parts["view"] + region_weight * parts["region"] if dense else parts["view"]
    torch.testing.assert_close(loss.detach(), want)
    loss.backward()
    assert all(p.grad is None and not p.requires_grad for p in model.teacher.parameters())
    idle = [n for n, p in model.student.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    assert not idle or region_weight == 1 and all(n.startswith("head.") for n in idle)
    assert len(found["means"]) == 1 + dense


def test_pair_weights():
    """18 pairs of 2 + 8 crops, none with itself; a region's share is its crop's, divided."""
    views, regions = pair_weights(((2, 49), (8, 9)), CPU)
    assert (views > 0).sum() == 18 and views[0, 0] == views[1, 1] == 0 and views.sum() == pytest.approx(1)
    assert regions.shape == (170, 2) and regions.sum() == pytest.approx(1)
    assert torch.equal(regions[:49], views[:1].expand(49, -1) / 49) and torch.equal(regions[-1], views[-1] / 9)


def test_match_is_by_cosine_within_the_image():
    torch.manual_seed(0)
    teacher = torch.randn(3, 2, 5, 8)
    which = torch.randint(5, (3, 7))
    ours = torch.stack([teacher[b, 1, which[b]] for b in range(3)]) * (0.1 + torch.rand(3, 7, 1))
    assert torch.equal(match(ours, teacher)[..., 1], which)


def test_numbers_at_the_start():
    """Published head: logits' deviation 1/16; the first loss is near ln K. DINO-S: 22,352,128 in the head."""
    torch.manual_seed(0)
    head = DINOHead(384, 65536)
    assert sum(p.numel() for p in head.parameters()) == 22_352_128
    logits = head(torch.randn(16, 384)).detach()
    assert logits.std().item() == pytest.approx(1 / 16, rel=0.1) and len(logits) == 16
    prototypes = head.prototypes()
    assert torch.allclose(prototypes.norm(dim=1), torch.ones(1))
    z, others = (F.normalize(torch.randn(8, 2, 256), dim=-1) for _ in range(2))
    pairs = torch.tensor([[0.0, 0.5], [0.5, 0.0]]).expand(8, -1, -1) / 8
    for student, teacher in ((z, others), (z, z)):
        loss = CrossEntropy.apply(student, prototypes, teacher, prototypes.detach(), torch.zeros(1, 65536), (0.1, 0.04),
                                  pairs)
        assert 10.2 < loss < 11.4


def test_published_rates():
    assert [cosine(i, 50, 1e-3, 1e-6, 10) for i in (0, 1, 9, 10)] == pytest.approx([0, 1.111e-4, 1e-3, 1e-3], rel=1e-3)
    assert cosine(49, 50, 1e-3, 1e-6, 10) == pytest.approx(2.54e-6, rel=1e-2)


def test_a_skipped_step_moves_no_center():
    model = small()
    bad = torch.full((2, 1, 24), float("nan"))
    model.update_center(bad, torch.ones(()))
    assert not model.dino_loss.center.any() and not model.dino_loss.center_grid.any()
    model.update_center(torch.ones(2, 1, 24), torch.zeros(()))
    assert torch.allclose(model.dino_loss.center_grid, torch.tensor(0.1))


def test_a_bad_gradient_skips_the_step():
    model = small()
    optimizer = torch.optim.AdamW(decay_groups(model, 0.04), 0.1, fused=True)
    before = [p.clone() for p in model.student.parameters()]
    for value, want in ((float("inf"), 1), (1.0, 0)):
        for p in model.student.parameters():
            p.grad = torch.ones_like(p) if p.requires_grad else None
        model.student.backbone.norm.weight.grad[0] = value
        _, skipped = finite_step(optimizer, torch.amp.GradScaler("cpu", enabled=False), 3.0, per_tensor=True)
        assert skipped == want
        assert all(torch.equal(a, b) for a, b in zip(before, model.student.parameters())) == bool(want)


def test_collapse_is_named():
    """One feature for all images: rank 1. A teacher that says the same of all: entropy ln K, or 0."""
    model = small(region_weight=0)
    z = F.normalize(torch.randn(3, 2, 6), dim=-1)
    found = dict(views=torch.randn(32, 4, 8), z=z, parts=dict(view=torch.tensor(2.0)))
    healthy = model.metrics(found, 0.05)
    assert healthy["rank"] > 5 and 0 < healthy["entropy"] < healthy["chance"] == math.log(24)
    assert healthy["kl"] == found["parts"]["view"] - healthy["entropy"]
    assert model.metrics(dict(found, views=torch.ones(32, 4, 8)), 0.05)["rank"] == pytest.approx(1, abs=1e-3)
    assert model.metrics(found, 1e3)["entropy"] == pytest.approx(math.log(24), abs=1e-3)
    assert model.metrics(found, 1e-4)["entropy"] == pytest.approx(0, abs=1e-2)
    model.dino_loss.center[:] = 3.0
    assert model.metrics(found, 0.05)["centre"] == pytest.approx(3 * 24 ** 0.5)


# ----------------------------------------------------------------------------------------------------------------
# Crops


def test_crops_of_one_decoded_image(classes):
    """Each image is decoded once; crops follow from (seed, epoch, index) alone, whatever else is in the batch."""
    source = open_dataset(str(classes))
    reads, read = [], source.read
    source.read = lambda i: reads.append(i) or read(i)
    groups = crop_groups((16, 16), (0.4, 1.0), (3, 0, 1), ("8x12", "6", "4"), (0.05, 0.4))
    assert groups == [(2, (16, 16), (0.4, 1.0)), (3, (8, 12), (0.05, 0.4)), (1, (4, 4), (0.05, 0.4))]
    crops = MultiCrops(source, groups, 3, seed=1)
    (big, small_, tiny), labels, failed = crops.__getitems__([(0, 3), (0, 5)])
    assert reads == [3, 5] and not failed and labels.tolist() == [0, 0]
    assert (big.shape, small_.shape, tiny.shape) == ((2, 2, 3, 16, 16), (3, 2, 3, 8, 12), (1, 2, 3, 4, 4))
    again = crops.__getitems__([(0, 5)])[0]
    assert torch.equal(again[0][:, 0], big[:, 1]) and torch.equal(again[1][:, 0], small_[:, 1])
    assert not torch.equal(crops.__getitems__([(1, 5)])[0][0], again[0])
    everything = [x for group in (big, small_) for x in group[:, 0]]
    assert not any(torch.equal(a, b) for i, a in enumerate(everything) for b in everything[:i] if a.shape == b.shape)


def test_views_of_each_kind(monkeypatch):
    """The first is always blurred, the second rarely, but solarised at times, local ones every other time; each crop
    gets what was drawn for it."""
    torch.manual_seed(0)
    drawn, plain = [], esvit.recolour
    monkeypatch.setattr(esvit, "recolour", lambda img, c, *a: drawn.append((img.clone(), c)) or plain(img, c, *a))
    crops = [torch.randint(256, (2, 500, 3, 12, 12), dtype=torch.uint8), torch.zeros(3, 500, 3, 8, 8).byte()]
    big, local = esvit.recolour_crops([c.clone() for c in crops], (0.0,) * 3, (1.0,) * 3)
    assert big.shape == crops[0].shape and local.shape == crops[1].shape and 0 <= big.min() and big.max() <= 1
    (img, of_big), (_, of_local) = drawn
    blurred, solarised = ((x.view(2, 500) > 0).float().mean(1).tolist() for x in (of_big.radius, of_big.solarize))
    assert blurred[0] == 1 and 0.05 < blurred[1] < 0.15 and solarised[0] == 0 and 0.14 < solarised[1] < 0.26
    assert 0.45 < (of_local.radius > 0).float().mean() < 0.55 and not of_local.solarize.any()
    assert torch.equal(big[1, 7], plain(img[507:508], type(of_big)(*(t[507:508] for t in of_big)), (0.0,) * 3,
                                        (1.0,) * 3)[0])
    mirrored = (img.view(2, 500, 3, 12, 12) != crops[0]).flatten(2).any(2)
    assert 0.4 < mirrored.float().mean() < 0.6 and torch.equal(img[mirrored.flatten()].flip(-1), crops[0][mirrored])


# ----------------------------------------------------------------------------------------------------------------
# Files


@each_recording("ckpt_esvit*")
def test_file_of_esvit(name):
    g = Golden(name)
    c, path = g.config, str(FOLDER / g.config["checkpoint"])
    shape = dict(img_size=pair(c["img_size"]), window=c["window_size"])
    for who in ("teacher", "student"):
        model = load_encoder(f"{path}:{who}", say=quiet, **shape)
        close(model.features(g("input/imgs")), g(f"out/cls_{who}"), 2e-5)
        close(model.encode(g("input/imgs")), g(f"out/region_{who}"), 2e-5)
        assert model.config["eps"] == c["norm_eps"]             # known without being stored
    # Nor is the image's size: it is taken to be the one at which the last stage is one window, as in published files.
    side = c["window_size"] * c["patch_size"] * 2 ** (len(c["depths"]) - 1)
    if c["img_size"] == side:
        assert load_encoder(path, say=quiet).config["img_size"] == (side, side)


@each_recording("ckpt_dino*", "ckpt_esvit*")
def test_official_files_start_a_run(name, capsys, tmp_path):
    """--init: backbone and heads of the file, in student and teacher; then the features are the recorded ones. Newer
    names of weight_norm are read as well."""
    g = Golden(name)
    path = str(FOLDER / g.config["checkpoint"])
    stored = ours(torch.load(path, weights_only=False)["teacher"])
    newer = {k.replace(usual, new): v for k, v in stored.items() for new, usual in OLD_NAMES.items() if usual in k}
    torch.save(dict(teacher={k: v for k, v in stored.items() if "last_layer" not in k} | newer), tmp_path / "new.pth")
    for file in (path, str(tmp_path / "new.pth")):
        model = EsViT(network(g.config), network(g.config))
        esvit.load_init(model, file)
        count = sum(k.startswith("head") for k in stored)
        assert f"of the heads, {count} tensors as well" in capsys.readouterr().out
        key = "cls" if "out/cls_teacher" in g else "features"
        close(model.student.backbone.features(g("input/imgs")), g(f"out/{key}_teacher"), 2e-5)
        for net in (model.student, model.teacher):
            assert all(torch.equal(v, stored[k]) for k, v in net.state_dict().items())


def test_heads_of_another_size_stay_fresh(tmp_path):
    """--init takes of the heads what fits."""
    old, new = small(prototypes=24), small(prototypes=16)
    torch.save(dict(teacher=old.student.state_dict()), tmp_path / "last.pt")
    fresh = new.student.head.last_layer.weight_v.clone()
    esvit.load_init(new, str(tmp_path / "last.pt"))
    assert torch.equal(new.teacher.head.mlp[0].weight, old.student.head.mlp[0].weight)
    assert torch.equal(new.teacher.head.last_layer.weight_v, fresh)


def test_windows_of_another_size(tmp_path, capsys):
    """Tables are resized on load, as the official code does it; masks and indices of the file are left out."""
    old = Swin(img_size=32, patch_size=2, dim=16, depths=(1, 1), heads=(2, 4), window=4)
    masks = {"layers.0.blocks.0.attn_mask": torch.zeros(1)}
    torch.save(dict(model=old.state_dict() | masks), tmp_path / "swin.pth")
    file = read(str(tmp_path / "swin.pth"))
    new = Swin(img_size=32, patch_size=2, dim=16, depths=(1, 1), heads=(2, 4), window=8)
    load_into(new, file)
    assert "resized from windows of 4 to 8" in capsys.readouterr().out
    table, other = (m.layers[1].blocks[0].attn.relative_position_bias_table for m in (old, new))
    want = F.interpolate(table.T.view(1, 4, 7, 7), (15, 15), mode="bicubic", align_corners=False)
    torch.testing.assert_close(other, want.view(4, -1).T)
    same = load_encoder(str(tmp_path / "swin.pth"), say=quiet)
    assert same.config["eps"] == 1e-5 and same.config["window"] == 4 and same.config["img_size"] == (16, 16)
    with pytest.raises(SystemExit, match="is a Swin, and here a plain"):
        vit_options(file)
    with pytest.raises(SystemExit, match="does not fit"):
        load_into(ViT(img_size=32, patch_size=4, dim=16, depth=2, heads=2), file, quiet)


# ----------------------------------------------------------------------------------------------------------------
# Runs


TINY = ("--model swin_mini --img-size 16 --patch-size 4 --window 2 --local-crops 2 --local-size 8 --prototypes 16 "
        "--head-hidden 8 --bottleneck 4 --batch-size 8 --workers 0 --log-every 1 --save-every 5 --lr 1e-3").split()


@pytest.fixture
def brief(monkeypatch):
    """Runs in this process are of even smaller networks, and draw no curve."""
    monkeypatch.setitem(PYRAMIDS, "swin_mini", (Swin, dict(dim=8, depths=(1, 2), heads=(1, 2), window=2)))
    monkeypatch.setitem(MODELS, "vit_mini", dict(dim=16, depth=2, heads=2, patch_size=4))
    monkeypatch.setattr(runtime.run, "draw_curve", lambda folder: None)


def train(out, *args):
    esvit.main([*TINY, "--out", str(out), *map(str, args)])
    return [row for row in rows(out) if "loss" in row]


def same_run(a, b):
    a, b = (torch.load(out / "last.pt", weights_only=True) for out in (a, b))
    assert a["step"] == b["step"]
    for part in ("student", "teacher", "dino_loss"):
        assert all(torch.equal(v, b[part][k]) for k, v in a[part].items()), part
    for i, moments in a["optimizer"]["state"].items():
        assert all(torch.equal(v, b["optimizer"]["state"][i][k]) for k, v in moments.items())


def test_stopped_and_resumed_is_bitwise_the_same(classes, tmp_path, monkeypatch, brief):
    """With regions that begin on the way, before and after the stops. What is saved reads as DINO's own files do."""
    args = ["--data", classes, "--epochs", 4, "--region-from", 2, "--teacher-temp-epochs", 3]
    whole = train(tmp_path / "whole", *args)
    check = runtime.run.StopCheck.__call__
    for last in (4, 13):
        count = iter(range(10 ** 6))

        def stop_at(self, *arguments, count=count, last=last):
            reason, log_now = check(self, *arguments)
            return "signal" if next(count) == last else reason, log_now
        monkeypatch.setattr(runtime.run.StopCheck, "__call__", stop_at)
        with pytest.raises(SystemExit) as stop:
            train(tmp_path / "broken", *args)
        assert stop.value.code == 0
    monkeypatch.setattr(runtime.run.StopCheck, "__call__", check)
    broken = train(tmp_path / "broken", *args)
    assert [r["step"] for r in broken] == [r["step"] for r in whole] == list(range(1, 21))
    assert [r["loss"] for r in broken] == [r["loss"] for r in whole]
    same_run(tmp_path / "whole", tmp_path / "broken")
    assert [r["step"] for r in whole if "region" in r] == list(range(11, 21))
    teacher, student = (load_encoder(f"{tmp_path}/whole/last.pt:{who}", say=quiet, img_size=16, window=2)
                        for who in ("teacher", "student"))
    encoder = load_encoder(str(tmp_path / "whole" / "encoder.pt"), say=quiet)
    img = torch.randn(2, 3, 16, 16)
    assert torch.equal(encoder(img), teacher(img)) and not torch.equal(encoder(img), student(img))
    assert encoder.config["window"] == 2 and encoder.config["img_size"] == (16, 16)


def test_regions_from_an_epoch_on(classes, tmp_path, monkeypatch, brief):
    """Until then nothing touches their heads and centre, and both heads are the same; then AdamW starts afresh."""
    seen, step = [], runtime.run.finite_step

    def watched(optimizer, *arguments):
        names = {id(p): n for n, p in model[0].student.named_parameters()}
        counts = [s["step"].item() for p, s in optimizer.state.items() if names[id(p)].startswith("backbone")]
        dense = model[0].student.head_dense.state_dict()
        follows = all(torch.equal(v, dense[k]) for k, v in model[0].teacher.head_dense.state_dict().items())
        seen.append((max(counts, default=0), model[0].dino_loss.center_grid.any().item(), follows))
        return step(optimizer, *arguments)
    model, make = [], esvit.make_model
    monkeypatch.setattr(esvit, "make_model", lambda *a: model.append(make(*a)) or model[0])
    monkeypatch.setattr(runtime.run, "finite_step", watched)
    found = train(tmp_path, "--data", classes, "--epochs", 2, "--region-from", 1, "--freeze-last-layer", 0)
    assert [s[0] for s in seen] == [0, 1, 2, 3, 4, 0, 1, 2, 3, 4]
    assert [s[1] for s in seen] == [False] * 6 + [True] * 4 and all(s[2] for s in seen[:6]) and not seen[-1][2]
    assert [("region" in row) for row in found] == [False] * 5 + [True] * 5


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2])
def test_killed_and_resumed_is_bitwise_the_same(classes, tmp_path, world):
    args = ["--data", classes, *TINY, "--epochs", 8, "--region-from", 3]                        # 40 steps
    run = dict(world=world, script="esvit.py")
    finish(*args, "--out", tmp_path / "whole", **run)
    start_and_kill(*args, out=tmp_path / "broken", step=8, **run)
    process = start(*args, "--out", tmp_path / "broken", "--workers", 1, **run)
    wait_for(process, tmp_path / "broken", max(steps(tmp_path / "broken")) + 8)
    process.terminate()
    assert "stopped by a signal" in process.communicate(timeout=60)[0]
    finish(*args, "--out", tmp_path / "broken", **run)
    got = steps(tmp_path / "broken")
    assert any(b <= a for a, b in zip(got, got[1:])), "no step was repeated: nothing was resumed"
    whole, broken = ({r["step"]: r["loss"] for r in rows(tmp_path / f) if "loss" in r} for f in ("whole", "broken"))
    assert whole == broken and len(whole) == 40
    same_run(tmp_path / "whole", tmp_path / "broken")


@pytest.mark.parametrize("args", [
    ["--model", "vit_mini"], ["--model", "vit_mini", "--region-weight", "0.5"],
    ["--region-weight", "0", "--local-crops", "0"], ["--local-crops", "1", "2", "--local-size", "8", "12x8"],
    ["--img-size", "16", "24", "--in-chans", "1", "--norm-last-layer", "--clip-grad", "0"],
    ["--accum", "2", "--dtype", "bf16", "--drop-path", "0.2"]], ids=" ".join)
def test_other_settings(classes, tmp_path, brief, args):
    base = [a for i, a in enumerate(TINY) if "vit_mini" not in args or "--window" not in TINY[max(0, i - 1):i + 1]]
    esvit.main([*base, "--out", str(tmp_path), "--data", str(classes), "--epochs", "1", "--probe-every", "1", *args])
    found = rows(tmp_path)
    assert all(isinstance(row["loss"], float) and row["chance"] == pytest.approx(math.log(16)) for row in found
               if "loss" in row)
    assert [row["step"] for row in found if "knn" in row] == [0, 5]
    method = torch.load(tmp_path / "encoder.pt")["method"]
    regions = any("region" in row for row in found)
    assert method == ("esvit" if regions else "dino") and regions == (
        "--region-weight" in args and "0.5" in args or "vit_mini" not in args and "--region-weight" not in args)


@pytest.mark.parametrize("args, words", [
    (["--model", "vit_giant"], "--model must be one of .*, not vit_giant"),
    (["--local-size", "7"], "patches of 4 do not tile a 7x7"),
    (["--local-size", "4"], "4x4 pixels are smaller than a window of 2 patches of 4"),
    (["--local-size", "8x"], "--local-size 8x must be a number"),
    (["--local-crops", "2", "2"], "need the same number of values"),
    (["--heads", "3"], "--heads is an option of a ViT"), (["--model", "vit_mini"], "--window is no option of a ViT"),
    (["--local-scale", "0.5", "0.1"], "--local-scale must be a least and a largest"),
    (["--global-scale", "0.5"], "--global-scale must be a least and a largest"),
    (["--region-from", "3"], "--region-from 3 is after the end"), (["--region-weight", "2"], "must be at most 1"),
    (["--freeze-last-layer", "2"], "--freeze-last-layer 2 of 2 epochs: prototypes would never learn"),
    (["--teacher-temp", "0"], "must be above 0"),
    (["--decode", "device"], "--decode.* 'device' .*workers"), (["--in-chans", "2"], "bands is 3, and --in-chans is 2"),
    (["--batch-size", "64"], "40 images, less than one"),
    (["--init", "absent.pth"], "absent.pth does not exist"), (["--prototypes", "1"], "must be at least 2")])
def test_bad_options(classes, tmp_path, brief, args, words):
    with pytest.raises(SystemExit, match=words):
        train(tmp_path, "--data", classes, "--epochs", 2, *args)


def test_prototypes_learn_in_a_run_of_one_epoch(classes, tmp_path, brief):
    """They stay for a whole epoch of a long run, so for a tenth of a short one."""
    moved = {}
    for name, epochs in (("a tenth", 0.2), ("half", 0.6), ("all", 1)):      # of 5 steps: 1, 3, 5
        train(tmp_path / name, "--data", classes, "--epochs", epochs)
        moved[name] = torch.load(tmp_path / name / "last.pt")["student"]["head.last_layer.weight_v"]
    assert not torch.equal(moved["a tenth"], moved["half"]) and not torch.equal(moved["half"], moved["all"])
    assert resolved("--model", "swin_mini", "--epochs", "1").freeze_last_layer == 0.1
    assert resolved("--model", "swin_mini", "--epochs", "50").freeze_last_layer == 1


def test_a_hot_teacher_is_named(classes, tmp_path, capsys, brief):
    train(tmp_path / "hot", "--data", classes, "--epochs", 0.2, "--teacher-temp", 0.08)
    assert "teachers above a temperature of 0.07 collapse" in capsys.readouterr().out
    train(tmp_path / "usual", "--data", classes, "--epochs", 0.2)
    assert "collapse" not in capsys.readouterr().out


def resolved(*args):
    return esvit.complete(parse(esvit.Config, "esvit", "", esvit.RECIPES, esvit.DEMO, args))


def test_recipes():
    cfg = resolved()
    assert (cfg.model, cfg.epochs, cfg.batch_size, cfg.window, cfg.drop_path, cfg.region_weight, cfg.region_from) == (
        "swin_tiny", 300, 512, 7, 0.1, 0.5, 0)
    assert (cfg.teacher_temp, cfg.teacher_temp_epochs, cfg.warmup_epochs, cfg.norm_last_layer, cfg.global_scale) == (
        0.07, 30, 10, False, (0.4, 1.0))
    cfg = resolved("--model", "swin_base", "--window", "14")
    assert (cfg.region_from, cfg.drop_path) == (200, 0.2) and resolved("--model", "swin_small").region_from == 0
    cfg = resolved("--model", "vit_small", "--local-crops", "0")
    assert (cfg.heads, cfg.region_weight, cfg.teacher_temp, cfg.epochs, cfg.global_scale) == (
        6, 0, 0.04, 100, (0.14, 1.0))
    cfg = resolved("--model", "swin_base", "--epochs", "30")    # shortened: everything begins earlier
    assert (cfg.region_from, cfg.warmup_epochs, cfg.teacher_temp_epochs) == (20, 3, 3)
    cfg = resolved("--demo", "--epochs", "2")
    assert (cfg.data, cfg.model, cfg.epochs, cfg.out) == ("shapes", "swin_mini", 2, "out/esvit-demo")


def test_only_the_student_drops_paths():
    cfg = resolved("--model", "swin_mini", "--img-size", "32", "--drop-path", "0.3", "--prototypes", "8")
    model = esvit.make_model(cfg, [(2, (32, 32), (0.4, 1.0))])
    rates = [[b.drop_path for layer in net.backbone.layers for b in layer.blocks] for net in (model.student,
                                                                                              model.teacher)]
    assert rates[0][-1] == 0.3 and not any(rates[1])
    assert all(torch.equal(v, model.teacher.state_dict()[k]) for k, v in model.student.state_dict().items())
    model.student.head.mlp[0].weight.data += 1.0
    model.update_ema(0.9)
    moved = model.student.head.mlp[0].weight - model.teacher.head.mlp[0].weight
    torch.testing.assert_close(moved, torch.full_like(moved, 0.9))
