"""DINO and EsViT: against the recorded reference runs, against the direct forms, and as their users run them."""
import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from golden import FOLDER, Golden, close, close_grads, needs_golden, read_json
from test_parity import check_shapes
from test_runs import finish, kill_9, rows, start, steps, wait_for
from textbook import TextbookEsViT

import esvit
from esvit import (
    CrossEntropy,
    DINOHead,
    EsViT,
    Network,
    clipped_step,
    cosine,
    match,
    shares,
    temperature_at,
    told,
)
from sources import find
from training import decay_groups, parse
from vit import MODELS, SWINS, Swin, ViT
from weights import build_vit, load_into, read, shape_of


def backbone(c):
    if "window_size" in c:
        return Swin(c["img_size"], c["patch_size"], 3, c["embed_dim"], c["depths"], c["num_heads"], c["window_size"],
                    c["mlp_ratio"], eps=c["norm_eps"])
    return ViT(c["img_size"], c["patch_size"], 3, c["embed_dim"], c["depth"], c["num_heads"], c["mlp_ratio"],
               positions="learned", eps=c["norm_eps"], resize_offset=0.1)


def network(c):
    return Network(backbone(c), c["out_dim"], "window_size" in c, hidden=c["hidden_dim"],
                   bottleneck=c["bottleneck_dim"], unit=c["norm_last_layer"])


def ours(state):
    """EsViT's files have Swin's tensors bare, beside the heads."""
    return {k if k.startswith(("backbone.", "head")) else f"backbone.{k}": v for k, v in state.items()}


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


@needs_golden
@pytest.mark.parametrize("name, unit", [("dino_head_frozen_g", True), ("dino_head_free_g", False)])
def test_head(name, unit):
    g = Golden(name)
    c = g.config
    head = DINOHead(c["in_dim"], c["out_dim"], c["hidden_dim"], c["bottleneck_dim"], unit)
    head.load_state_dict(g.under("state"))
    x = g("input/x").requires_grad_()
    y = head(x)
    close(y, g("out/y"), 1e-5)
    (y * g("input/grad_out")).sum().backward()
    close(x.grad, g("out/grad_x"), 5e-5)
    close_grads(head, g.under("grad"), 5e-5)


@needs_golden
def test_multicrop_of_dino():
    g = Golden("dino_vit_multicrop")
    net = network(g.config)
    net.load_state_dict(g.under("state"))
    groups = [g("input/global"), g("input/local")]
    seen = net(groups, False)
    close(rearrange(seen.views, "b v d -> (v b) d"), g("out/features"), 5e-5)
    y = rearrange(net.head.last_layer(seen.z), "b v k -> (v b) k")
    close(y, g("out/y"), 5e-5)
    alone = net.head.last_layer(net(groups[:1], False).z)
    close(rearrange(alone, "b v k -> (v b) k"), g("out/y_global_only"), 5e-5)
    (y * g("input/grad_out")).sum().backward()
    close_grads(net, g.under("grad"), 2e-4)
    vit, img = net.backbone, groups[0][0]
    depth = len(vit.blocks)
    close(vit.encode(img, logits_of=(depth,))[1][0].softmax(-1), g("out/last_attention_global0"), 5e-5)
    x, last = vit.embed(img), []
    for block in vit.blocks:
        x = block(x)
        last.append(vit.norm(x))
    close(torch.stack(last[-2:]), g("out/last2_blocks_global0"), 5e-5)


@needs_golden
def test_multicrop_of_esvit():
    g = Golden("esvit_multicrop")
    net = network(g.config)
    net.load_state_dict(ours(g.under("state")))
    groups = [g("input/global"), g("input/local")]

    def published(seen):
        """Row orders of the recording: crop, image, region."""
        regions, features, first = [], [], 0
        logits = net.head_dense.last_layer(seen.z_regions)
        for n, t in seen.layout:
            part = slice(first, first := first + n * t)
            for x, found in ((logits[:, part], regions), (seen.regions[:, part], features)):
                found.append(rearrange(x, "b (n t) k -> (n b t) k", n=n))
        return rearrange(net.head.last_layer(seen.z), "b v k -> (v b) k"), torch.cat(regions), torch.cat(features)

    seen = net(groups, True)
    assert [t for _, t in seen.layout] == g("out/npatch").tolist()
    cls, region, features = published(seen)
    for found, key in ((cls, "cls"), (region, "region"), (features, "region_features"), (cls, "view_only_cls")):
        close(found, g(f"out/{key}"), 5e-5)
    alone = published(net(groups[:1], True))
    close(alone[0], g("out/global_only_cls"), 5e-5)
    close(alone[1], g("out/global_only_region"), 5e-5)
    wave = [f(torch.arange(x.numel(), dtype=torch.float64)).float().view_as(x)
            for f, x in ((torch.cos, cls), (torch.sin, region))]
    ((cls * wave[0]).sum() + (region * wave[1]).sum()).backward()
    close_grads(net, {k: v for k, v in ours(g.under("grad")).items()}, 2e-4)


@needs_golden
@pytest.mark.parametrize("dim", [192, 384, 768])
def test_shapes_of_dino(dim):
    with torch.device("meta"):
        check_shapes(DINOHead(dim, 65536), read_json("shapes_dino")[f"DINOHead({dim},65536)"])
        name = {192: "tiny", 384: "small", 768: "base"}[dim]
        vit = ViT(**MODELS[f"vit_{name}"], positions="learned")
        check_shapes(vit, read_json("shapes_dino")[f"vit_{name}_patch16"])
        if dim == 384:
            check_shapes(Network(vit, 65536, False),
                         read_json("shapes_dino")["MultiCropWrapper(vit_small_patch16,DINOHead(384,65536))"])


@needs_golden
def test_shapes_and_groups_of_esvit():
    with torch.device("meta"):
        net = Network(Swin(**SWINS["swin_tiny"]), 65536)
    want = read_json("shapes_esvit")["swin_tiny_w7_with_view_and_region_heads(65536)"]
    want["state"] = [(next(iter(ours({row[0]: 0}))), *row[1:]) for row in want["state"]]
    check_shapes(net, want)
    check_groups(net, read_json("paramgroups_esvit")["swin_tiny/norm_last_layer=True"])


@needs_golden
@pytest.mark.parametrize("unit", [True, False])
def test_groups_of_dino(unit):
    with torch.device("meta"):
        net = Network(ViT(**MODELS["vit_small"], positions="learned"), 65536, False, unit=unit)
    check_groups(net, read_json("paramgroups_dino")[f"vit_small/norm_last_layer={unit}"])


def check_groups(net, want):
    names = {p: name for name, p in net.named_parameters()}
    plain, decayed = ({names[p] for p in group["params"]} for group in decay_groups(net, 0.04))
    scheduled = {k: v["weight_decay_scheduled"] for k, v in ours(want["groups"]).items()}
    assert decayed == {k for k, v in scheduled.items() if v} and plain == {k for k, v in scheduled.items() if not v}
    left = {k for k, p in net.named_parameters() if not p.requires_grad}
    assert left == set(ours(dict.fromkeys(want["not_in_optimizer"])))


# ----------------------------------------------------------------------------------------------------------------
# Recorded runs: losses, schedules, steps


def temperatures(c):
    return c["warmup_teacher_temp"], c["teacher_temp"], c["warmup_teacher_temp_epochs"]


def cross_entropy(student, teacher, centre, temperature, share, student_temp=0.1):
    """The chunked loss of given logits: prototypes are the axes."""
    eye = torch.eye(student.shape[-1])
    return CrossEntropy.apply(student, eye, teacher, eye, centre, (student_temp, temperature), share / len(student))


def recentred(centre, teacher):
    """A step of one centre, from the teacher's logits."""
    model = small(region_weight=0)
    model.dino_loss.center = centre.clone()
    model.recentre([teacher.flatten(0, -2).mean(0, keepdim=True)], torch.zeros(()))
    return model.dino_loss.center


@needs_golden
def test_loss_of_dino():
    g = Golden("dino_loss")
    c = g.config
    centre, V = torch.zeros(1, c["out_dim"]), 2 + c["n_local"]
    pairs = shares(((2, 1), (c["n_local"], 1)), torch.device("cpu"))[0].expand(c["batch"], -1, -1)
    for i, epoch in enumerate(c["epochs"]):
        student = rearrange(g("input/student")[i], "(v b) k -> b v k", v=V).requires_grad_()
        teacher = rearrange(g("input/teacher")[i], "(v b) k -> b v k", v=2)
        loss = cross_entropy(student, teacher, centre, temperature_at(epoch, *temperatures(c)), pairs)
        close(loss, g("out/loss")[i], 1e-5)
        loss.backward()
        close(rearrange(student.grad, "b v k -> (v b) k"), g("out/grad_student")[i], 1e-5)
        centre = recentred(centre, teacher)
        close(centre, g("out/center_after")[i], 1e-5)
    temps = [temperature_at(e, *temperatures(c)) for e in range(c["nepochs"])]
    assert temps == pytest.approx(g("out/teacher_temp_schedule").tolist(), rel=1e-12)


@needs_golden
def test_loss_of_esvit():
    g = Golden("esvit_ddino_loss")
    c = g.config
    V, B, local, tokens = 2 + c["n_local"], c["batch"], c["n_local"], (c["npatch_global"], c["npatch_local"])
    pairs, of_regions = shares(((2, tokens[0]), (local, tokens[1])), torch.device("cpu"))
    centres = [torch.zeros(1, c["out_dim"]) for _ in range(2)]

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
        share = torch.einsum("ri,brij->brij", of_regions, F.one_hot(which, tokens[0]).float()).flatten(2)
        loss = 0.5 * cross_entropy(rearrange(views, "(v b) k -> b v k", v=V), t_views, centres[0], temperature,
                                   pairs.expand(B, -1, -1))
        loss = loss + 0.5 * cross_entropy(by_image(regions), t_regions.flatten(1, 2), centres[1], temperature, share)
        close(loss, g("out/loss")[i], 1e-5)
        loss.backward()
        close(views.grad, g("out/grad_student_cls")[i], 1e-5)
        close(regions.grad, g("out/grad_student_region")[i], 1e-5)
        for k, (teacher, name) in enumerate(((t_views, "center"), (t_regions, "center_grid"))):
            centres[k] = recentred(centres[k], teacher)
            close(centres[k], g(f"out/{name}_after")[i], 1e-5)


@needs_golden
@pytest.mark.parametrize("name", ["schedule_dino", "schedule_esvit"])
def test_schedules(name):
    g = Golden(name)
    for i, c in enumerate(g.config["cases"]):
        total, warmup = c["epochs"] * c["niter_per_ep"], c["warmup_epochs"] * c["niter_per_ep"]
        found = [cosine(step, total, c["base_value"], c["final_value"], warmup) for step in range(total)]
        np.testing.assert_allclose(found, g.arrays[f"out/cosine_{i}"], rtol=1e-12)
    for i, c in enumerate(g.config.get("temps", [])):
        found = [temperature_at(e, *temperatures(c)) for e in range(c["nepochs"])]
        np.testing.assert_allclose(found, g.arrays[f"out/teacher_temp_{i}"], rtol=1e-12)


def still(net):
    return [p for name, p in net.named_parameters() if ".last_layer." in name]


@needs_golden
def test_clipping_and_freezing():
    g = Golden("dino_clip_freeze")
    c = g.config
    net = network(c)
    names = dict(net.named_parameters())
    for name, grad in g.under("input/grads").items():
        names[name].grad = grad.clone()
    norms = {name: p.grad.norm().item() for name, p in names.items()}
    assert list(norms.values()) == pytest.approx(g("out/norms_in_named_parameters_order").tolist(), rel=1e-5)
    optimizer = torch.optim.AdamW(net.parameters(), 0.0, fused=True)
    norm, skipped = clipped_step(optimizer, torch.amp.GradScaler("cpu", enabled=False), c["clip"], still(net))
    assert not skipped and norm.item() == pytest.approx(math.hypot(*norms.values()), rel=1e-5)
    assert {k for k, p in names.items() if p.grad is None} == set(json.loads(str(g.arrays["out/none_grads"])))
    close_grads(net, g.under("grad"), 5e-5)


@needs_golden
@pytest.mark.parametrize("name", ["traj_dino", "traj_esvit"])
def test_trajectory(name):
    """Thirty steps: crops, losses, clipping, freezing, three schedules, the teacher, centres."""
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
        loss, found = model([g("input/global")[batch], g("input/local")[batch]],
                            temperature_at(epoch, *temperatures(c)), dense)
        loss.backward()
        norms = torch.stack([p.grad.norm() for p in student.parameters() if p.grad is not None])
        want = g("out/grad_norms_before_clip")[step]
        assert (norms - want).abs().max() <= 2e-3 * want.max()
        _, skipped = clipped_step(optimizer, scaler, c["clip_grad"],
                                  still(student) if epoch < c["freeze_last_layer"] else ())
        model.follow(momentum)
        model.recentre(found["means"], skipped)
        optimizer.zero_grad()
        reference = g("out/loss")[step].item()
        assert abs(loss.item() - reference) <= max(20 * g("dev64/out/loss")[step].item(), 1e-5 * reference), step
        for key, centre in model.dino_loss.named_buffers():
            if f"out/{key}" in g.arrays:
                close(centre, g(f"out/{key}")[step], 1e-3)
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
    z_t, w_t, centre = torch.randn(B, M, E).double(), torch.randn(K, E).double(), torch.randn(1, K).double()
    share = torch.rand(B, R, M).double() * (torch.rand(B, R, M) < 0.4)
    p = ((z_t @ w_t.T - centre) / 0.05).softmax(-1)
    with torch.enable_grad():
        z1, w1 = z.clone().requires_grad_(), w.clone().requires_grad_()
        direct = (share * -torch.einsum("bmk,brk->brm", p, (z1 @ w1.T / 0.1).log_softmax(-1))).sum()
        (2.5 * direct).backward()
    monkeypatch.setattr(esvit, "AT_ONCE", dict(cpu=few, cuda=few))
    z2, w2 = z.clone().requires_grad_(), w.clone().requires_grad_()
    ours = CrossEntropy.apply(z2, w2, z_t, w_t, centre, (0.1, 0.05), share)
    (2.5 * ours).backward()
    for a, b in ((ours, direct), (z2.grad, z1.grad), (w2.grad, w1.grad)):
        torch.testing.assert_close(a, b)
    with pytest.raises(RuntimeError):                           # gradients are handed over once
        ours.backward()


def book(model):
    """The textbook's form of a model with its weights; weight_norm's new names are read and written."""
    config = model.student.backbone.config
    head = model.student.head
    ref = TextbookEsViT(len(head.last_layer.weight_g), head.mlp[0].out_features, head.mlp[4].out_features,
                        **{k: config[k] for k in ("patch_size", "dim", "depths", "heads", "window")},
                        img_size=config["img_size"][0])
    old = {"last_layer.weight_g": "last_layer.parametrizations.weight.original0",
           "last_layer.weight_v": "last_layer.parametrizations.weight.original1"}
    for net, theirs in ((model.student, ref.student), (model.teacher, ref.teacher)):
        state = net.state_dict()
        for short, long in old.items():
            state = {k.replace(short, long): v for k, v in state.items()}
        theirs.load_state_dict(state)
        net.load_state_dict(theirs.state_dict())
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
        theirs = {k.replace("parametrizations.weight.original0", "weight_g").replace(
            "parametrizations.weight.original1", "weight_v"): p.grad for k, p in ref.student.named_parameters()}
        close_grads(model.student, theirs, 5e-5)
        model.recentre(found["means"], torch.zeros(()))
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
        halves = halves + torch.stack(found["means"]) / 2
    torch.testing.assert_close(halves, torch.stack(means))
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
    parts = found["view"] if not dense else (1 - region_weight) * found["view"] + region_weight * found["region"]
    torch.testing.assert_close(loss.detach(), parts)
    loss.backward()
    assert all(p.grad is None and not p.requires_grad for p in model.teacher.parameters())
    idle = [n for n, p in model.student.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    assert not idle or region_weight == 1 and all(n.startswith("head.") for n in idle)
    assert len(found["means"]) == 1 + dense


def test_shares():
    """18 pairs of 2 + 8 crops, none with itself; a region's share is its crop's, divided."""
    views, regions = shares(((2, 49), (8, 9)), torch.device("cpu"))
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
    eye = head.last_layer.weight()
    assert torch.allclose(eye.norm(dim=1), torch.ones(1))
    z, others = (F.normalize(torch.randn(8, 2, 256), dim=-1) for _ in range(2))
    pairs = torch.tensor([[0.0, 0.5], [0.5, 0.0]]).expand(8, -1, -1) / 8
    for student, teacher in ((z, others), (z, z)):
        loss = CrossEntropy.apply(student, eye, teacher, eye.detach(), torch.zeros(1, 65536), (0.1, 0.04), pairs)
        assert 10.2 < loss < 11.4


def test_published_rates():
    assert [cosine(i, 50, 1e-3, 1e-6, 10) for i in (0, 1, 9, 10)] == pytest.approx([0, 1.111e-4, 1e-3, 1e-3], rel=1e-3)
    assert cosine(49, 50, 1e-3, 1e-6, 10) == pytest.approx(2.54e-6, rel=1e-2)


def test_a_skipped_step_moves_no_centre():
    model = small()
    bad = torch.full((2, 1, 24), float("nan"))
    model.recentre(bad, torch.ones(()))
    assert not model.dino_loss.center.any() and not model.dino_loss.center_grid.any()
    model.recentre(torch.ones(2, 1, 24), torch.zeros(()))
    assert torch.allclose(model.dino_loss.center_grid, torch.tensor(0.1))


def test_a_bad_gradient_skips_the_step():
    model = small()
    optimizer = torch.optim.AdamW(decay_groups(model, 0.04), 0.1, fused=True)
    before = [p.clone() for p in model.student.parameters()]
    for value, want in ((float("inf"), 1), (1.0, 0)):
        for p in model.student.parameters():
            p.grad = torch.ones_like(p) if p.requires_grad else None
        model.student.backbone.norm.weight.grad[0] = value
        _, skipped = clipped_step(optimizer, torch.amp.GradScaler("cpu", enabled=False), 3.0)
        assert skipped == want
        assert all(torch.equal(a, b) for a, b in zip(before, model.student.parameters())) == bool(want)


def test_collapse_is_named():
    """One feature for all images: rank 1. A teacher that says the same of all: entropy ln K, or 0."""
    model = small(region_weight=0)
    z = F.normalize(torch.randn(3, 2, 6), dim=-1)
    found = dict(seen=torch.randn(32, 4, 8), z=z, view=torch.tensor(2.0))
    healthy = told(model, found, 0.05)
    assert healthy["rank"] > 5 and 0 < healthy["entropy"] < healthy["chance"] == math.log(24)
    assert healthy["kl"] == found["view"] - healthy["entropy"]
    assert told(model, dict(found, seen=torch.ones(32, 4, 8)), 0.05)["rank"] == pytest.approx(1, abs=1e-3)
    assert told(model, found, 1e3)["entropy"] == pytest.approx(math.log(24), abs=1e-3)
    assert told(model, found, 1e-4)["entropy"] == pytest.approx(0, abs=1e-2)
    model.dino_loss.center[:] = 3.0
    assert told(model, found, 0.05)["centre"] == pytest.approx(3 * 24 ** 0.5)


# ----------------------------------------------------------------------------------------------------------------
# Crops


def test_crops_of_one_decoded_image(classes):
    """Each image is decoded once; crops follow from (seed, epoch, index) alone, whatever else is in the batch."""
    source = find(str(classes))
    reads, read = [], source.read
    source.read = lambda i: reads.append(i) or read(i)
    crops = esvit.MultiCrops(source, [(2, (16, 16), (0.4, 1.0)), (3, (8, 12), (0.05, 0.4)), (1, (4, 4), (0.05, 0.4))],
                             3, seed=1)
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
    big, local = esvit.recoloured([c.clone() for c in crops], (0.0,) * 3, (1.0,) * 3)
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


def quiet(_):
    pass


@needs_golden
def test_file_of_esvit():
    g = Golden("ckpt_esvit")
    path = str(FOLDER / g.config["checkpoint"])
    for who in ("teacher", "student"):
        model = build_vit(f"{path}:{who}", say=quiet)
        close(model.features(g("input/imgs")), g(f"out/cls_{who}"), 2e-5)
        close(model.encode(g("input/imgs")), g(f"out/region_{who}"), 2e-5)
    assert model.config["img_size"] == (16, 16) and model.config["eps"] == 1e-6


@needs_golden
@pytest.mark.parametrize("name", ["ckpt_dino", "ckpt_esvit"])
def test_official_files_start_a_run(name, capsys):
    """--init: backbone and heads of the file, in student and teacher; then the features are the recorded ones."""
    g = Golden(name)
    model = EsViT(network(g.config), network(g.config))
    path = str(FOLDER / g.config["checkpoint"])
    esvit.start_from(model, path, print)
    text = capsys.readouterr().out
    assert ": head as well" in text and (": head_dense as well" in text) == (name == "ckpt_esvit")
    key = "features" if name == "ckpt_dino" else "cls"
    close(model.student.backbone.features(g("input/imgs")), g(f"out/{key}_teacher"), 2e-5)
    stored = ours(torch.load(path, weights_only=False)["teacher"])
    for net in (model.student, model.teacher):
        assert all(torch.equal(v, stored[k]) for k, v in net.state_dict().items())


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
    same = build_vit(str(tmp_path / "swin.pth"), say=quiet)
    assert same.config["eps"] == 1e-5 and same.config["window"] == 4 and same.config["img_size"] == (16, 16)
    with pytest.raises(SystemExit, match="is a Swin, and here a plain"):
        shape_of(file)
    with pytest.raises(SystemExit, match="does not fit"):
        load_into(ViT(img_size=32, patch_size=4, dim=16, depth=2, heads=2), file, quiet)


# ----------------------------------------------------------------------------------------------------------------
# Runs


TINY = ("--model swin_mini --img-size 16 --patch-size 4 --window 2 --local-crops 2 --local-size 8 --prototypes 16 "
        "--head-hidden 8 --bottleneck 4 --batch-size 8 --workers 0 --log-every 1 --save-every 5 --lr 1e-3").split()


@pytest.fixture
def brief(monkeypatch):
    """Runs in this process are of even smaller networks, and draw no curve."""
    monkeypatch.setitem(SWINS, "swin_mini", dict(dim=8, depths=(1, 2), heads=(1, 2), window=2))
    monkeypatch.setitem(MODELS, "vit_mini", dict(dim=16, depth=2, heads=2, patch_size=4))
    monkeypatch.setattr(esvit.training, "draw_curve", lambda folder: None)


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
    judge = esvit.training.Health.__call__
    for last in (4, 13):
        count = iter(range(10 ** 6))
        monkeypatch.setattr(esvit.training.Health, "__call__", lambda self, *a, n=count, last=last: (
            judge(self, *a), "signal" if next(n) == last else None)[1])
        with pytest.raises(SystemExit) as stop:
            train(tmp_path / "broken", *args)
        assert stop.value.code == 0
    monkeypatch.setattr(esvit.training.Health, "__call__", judge)
    broken = train(tmp_path / "broken", *args)
    assert [r["step"] for r in broken] == [r["step"] for r in whole] == list(range(1, 21))
    assert [r["loss"] for r in broken] == [r["loss"] for r in whole]
    same_run(tmp_path / "whole", tmp_path / "broken")
    assert [r["step"] for r in whole if "region" in r] == list(range(11, 21))
    teacher, student = (build_vit(f"{tmp_path}/whole/last.pt:{who}", say=quiet, img_size=16, window=2)
                        for who in ("teacher", "student"))
    encoder = build_vit(str(tmp_path / "whole" / "encoder.pt"), say=quiet)
    img = torch.randn(2, 3, 16, 16)
    assert torch.equal(encoder(img), teacher(img)) and not torch.equal(encoder(img), student(img))
    assert encoder.config["window"] == 2 and encoder.config["img_size"] == (16, 16)


def test_regions_from_an_epoch_on(classes, tmp_path, monkeypatch, brief):
    """Until then nothing touches their heads and centre, and both heads are the same; then AdamW starts afresh."""
    seen, step = [], esvit.clipped_step

    def watched(optimizer, scaler, clip, still=()):
        names = {id(p): n for n, p in model[0].student.named_parameters()}
        counts = [s["step"].item() for p, s in optimizer.state.items() if names[id(p)].startswith("backbone")]
        dense = model[0].student.head_dense.state_dict()
        follows = all(torch.equal(v, dense[k]) for k, v in model[0].teacher.head_dense.state_dict().items())
        seen.append((max(counts, default=0), model[0].dino_loss.center_grid.any().item(), follows))
        return step(optimizer, scaler, clip, still)
    model, build = [], esvit.build
    monkeypatch.setattr(esvit, "build", lambda cfg: model.append(build(cfg)) or model[0])
    monkeypatch.setattr(esvit, "clipped_step", watched)
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
    process = start(*args, "--out", tmp_path / "broken", **run)
    wait_for(process, tmp_path / "broken", 8)
    kill_9(process)
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
    (["--model", "vit_giant"], "vit_giant is not one of"), (["--local-size", "7"], "patches of 4 do not tile a 7x7"),
    (["--local-size", "4"], "4x4 pixels are smaller than a window of 2 patches of 4"),
    (["--local-size", "8x"], "--local-size 8x is no number"), (["--local-crops", "2", "2"], "need as many numbers"),
    (["--heads", "3"], "--heads is an option of a ViT"), (["--model", "vit_mini"], "--window is an option of a Swin"),
    (["--local-scale", "0.5", "0.1"], "--local-scale is a least and a largest"),
    (["--global-scale", "0.5"], "--global-scale is a least and a largest"),
    (["--region-from", "3"], "--region-from 3 is after the end"), (["--region-weight", "2"], "are at most 1"),
    (["--teacher-temp", "0"], "must be above 0"), (["--decode", "device"], "--decode is workers here"),
    (["--in-chans", "2"], "--in-chans is 1 or 3 or 4"), (["--batch-size", "64"], "40 images, less than one"),
    (["--init", "absent.pth"], "absent.pth does not exist"), (["--prototypes", "1"], "must be at least 2")])
def test_bad_options(classes, tmp_path, brief, args, words):
    with pytest.raises(SystemExit, match=words):
        train(tmp_path, "--data", classes, "--epochs", 2, *args)


def test_a_hot_teacher_is_named(classes, tmp_path, capsys, brief):
    train(tmp_path / "hot", "--data", classes, "--epochs", 0.2, "--teacher-temp", 0.08)
    assert "teachers above a temperature of 0.07 collapse" in capsys.readouterr().out
    train(tmp_path / "usual", "--data", classes, "--epochs", 0.2)
    assert "collapse" not in capsys.readouterr().out


def resolved(*args):
    return esvit.resolve(*parse(esvit.Config, "", args))


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
    model = esvit.build(resolved("--model", "swin_mini", "--img-size", "32", "--local-size", "16", "--drop-path", "0.3",
                                 "--prototypes", "8"))
    rates = [[b.drop_path for layer in net.backbone.layers for b in layer.blocks] for net in (model.student,
                                                                                              model.teacher)]
    assert rates[0][-1] == 0.3 and not any(rates[1])
    assert all(torch.equal(v, model.teacher.state_dict()[k]) for k, v in model.student.state_dict().items())
    model.student.head.mlp[0].weight.data += 1.0
    model.follow(0.9)
    moved = model.student.head.mlp[0].weight - model.teacher.head.mlp[0].weight
    torch.testing.assert_close(moved, torch.full_like(moved, 0.9))
