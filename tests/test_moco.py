"""MoCo v3: the recorded reference on one and on two processes, the textbook form, exact parts of a batch, real runs."""
import copy
import json
import math
import shutil
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from golden import FOLDER, Golden, close, close_grads, close_losses, needs_golden, read_json
from test_parity import check_shapes
from test_runs import ROOT, TINY, finish, rows, same_state, start_and_kill, steps
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP

import moco_v3
from moco_v3 import DEMO, RECIPES, BatchNorm, Config, MoCo, momentum_at, two_views
from runtime.options import parse
from runtime.run import finite_step, warmup_cosine
from vit import MODELS, ViT
from weights import load_encoder, read

TINY = [*TINY, "--head-hidden", "32", "--head-dim", "16"]


def small(seed=0, **options):
    torch.manual_seed(seed)
    model = MoCo(ViT(16, 4, dim=16, depth=2, heads=4, positions="sincos_yx"), 8, 20, **options)
    with torch.no_grad():
        for p in model.parameters():                            # no zeros that could hide a mistake, no equal encoders
            p.add_(0.05 * torch.randn_like(p) * (p.dim() < 4))
    return model


def recorded(c):
    """The network of a recording with this config; one process's statistics unless it says that all share them."""
    vit = ViT(c["img_size"], c["patch_size"], 3, c["embed_dim"], c["depth"], c["num_heads"], c["mlp_ratio"],
              positions="sincos_yx", eps=c["norm_eps"])
    return MoCo(vit, c["moco_dim"], c["moco_mlp_dim"], c["moco_t"], c["stop_grad_conv1"],
                sync_bn=c.get("sync_bn", True))


def worlds_of_recordings():
    """Recorded single steps that are there: their names, and how many processes each has. The views of several are
    stacked by rank."""
    found = {}
    for path in sorted(FOLDER.glob("mocov3_*.npz")):
        shape = Golden(path.stem)("input/x1").shape
        found[path.stem] = shape[0] if len(shape) == 5 else 1
    return found


WORLDS = worlds_of_recordings()
ALONE = [name for name, world in WORLDS.items() if world == 1]
TOGETHER = [name for name, world in WORLDS.items() if world > 1]


def same(state, reference, tolerance):
    for name, value in reference.items():
        close(state[name], value, tolerance if value.is_floating_point() else 0)


# ----------------------------------------------------------------------------------------------------------------
# Several processes: one start of them, for each number of them, for all that is asked


def norm_case(seed, rows=12, width=5):
    """Rows with large means, for a BatchNorm with weights of its own."""
    torch.manual_seed(seed)
    x = torch.randn(rows, width) * torch.tensor([1, 0.1, 3, 1, 1]) + 50
    return [t.double() for t in (x, torch.randn(rows, width), torch.rand(width) + 0.5, torch.randn(width))]


def norm_result(layer, x, mix, weight, bias):
    layer.weight.data, layer.bias.data = weight.clone(), bias.clone()
    x = x.clone().requires_grad_()
    y = layer(x)
    (y * mix).square().sum().backward()
    return dict(y=y.detach(), x=x.grad, weight=layer.weight.grad, bias=layer.bias.grad, **dict(layer.named_buffers()))


def views_of(batch=6, seed=5):
    torch.manual_seed(seed)
    return torch.randn(2, batch, 3, 16, 16).double()


def together(one, two):
    """Views as they come: the two of an image next to each other."""
    return torch.stack([one, two], 1).flatten(0, 1)


def step_result(model, views, accum=1, momentum=0.9):
    """views (2, B, ...) -> loss, gradients, state after, and the outputs."""
    loss, outputs = model(together(*views), momentum, accum)
    loss.backward()
    model = getattr(model, "module", model)
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return dict(loss=loss.detach(), grads=grads, state=model.state_dict(), **outputs)


def work(rank, world, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet{world}", rank=rank, world_size=world)
    found = {}
    for name in TOGETHER:
        if WORLDS[name] == world:
            g = Golden(name)
            model = recorded(g.config)
            model.load_state_dict(g.under("state"))
            views = torch.stack([g("input/x1")[rank], g("input/x2")[rank]])
            found[name] = step_result(DDP(model, broadcast_buffers=False), views, momentum=g.config["moco_m"])
    if world == 2:
        x, mix, weight, bias = norm_case(1)
        found["norm"] = norm_result(BatchNorm(5).double(), x[6 * rank:][:6], mix[6 * rank:][:6], weight, bias)
        for accum in (1, 3):
            net = DDP(small(sync_bn=True).double(), broadcast_buffers=False)
            found[f"accum {accum}"] = step_result(net, views_of()[:, 3 * rank:][:, :3], accum)
    torch.save(found, f"{folder}/{world}-{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    """What the processes of each world found, by the number of processes: a list by rank."""
    folder, found = tmp_path_factory.mktemp("worlds"), {}
    for world in sorted({2, *WORLDS.values()} - {1}):
        torch.multiprocessing.spawn(work, (world, str(folder)), nprocs=world)
        found[world] = [torch.load(folder / f"{world}-{rank}.pt") for rank in range(world)]
    return found


@pytest.fixture
def both(processes):
    return processes[2]


def check_outputs(found, g, prefix, tolerance):
    close(found["loss"], g(f"{prefix}loss"), tolerance)
    for i in range(2):
        close(found["queries"][i], g(f"{prefix}q{i + 1}"), tolerance)
        close(found["keys"][i], g(f"{prefix}k{i + 1}"), tolerance)


@needs_golden
@pytest.mark.parametrize("name", TOGETHER)
def test_recorded_on_several_processes(processes, name):
    g = Golden(name)
    tolerance = 1e-4 if g.config["sync_bn"] else 2e-4
    for rank, found in enumerate(found[name] for found in processes[WORLDS[name]]):
        check_outputs(found, g, f"out/rank{rank}/", tolerance)
        same(found["state"], g.under("after") | g.under(f"after_rank{rank}"), tolerance / 10)
        model = recorded(g.config)
        for key, p in model.named_parameters():
            p.grad = found["grads"].get(key)
        close_grads(model, g.under("grad"), 5e-4)


def test_norm_of_two_processes_is_batchnorm_of_the_whole_batch(both):
    whole, (a, b) = norm_result(nn.BatchNorm1d(5).double(), *norm_case(1)), (found["norm"] for found in both)
    for k in ("y", "x"):
        torch.testing.assert_close(torch.cat([a[k], b[k]]), whole[k], rtol=1e-9, atol=1e-9)
    for k in ("weight", "bias"):                                # each process has its rows' share of these
        torch.testing.assert_close(a[k] + b[k], whole[k], rtol=1e-9, atol=1e-9)
    for k in ("running_mean", "running_var", "num_batches_tracked"):
        for found in (a, b):
            torch.testing.assert_close(found[k], whole[k], rtol=1e-12, atol=0)


@pytest.mark.parametrize("accum", [1, 3])
def test_two_processes_are_one(both, accum):
    """Float64: mean loss, averaged gradients, statistics and momentum encoder of the whole batch on one process, also
    when each process takes its part in three."""
    whole = step_result(small().double(), views_of())
    found = [f[f"accum {accum}"] for f in both]
    torch.testing.assert_close(sum(f["loss"] for f in found) / 2, whole["loss"], rtol=1e-12, atol=0)
    for f in found:
        assert f["grads"].keys() == whole["grads"].keys()
        for name in ("grads", "state"):
            for key, value in whole[name].items():
                torch.testing.assert_close(f[name][key], value, rtol=1e-9, atol=1e-11, msg=key)


# ----------------------------------------------------------------------------------------------------------------
# One process: the reference


@needs_golden
@pytest.mark.parametrize("accum", [1, 3])
@pytest.mark.parametrize("name", ALONE)
def test_recorded(name, accum):
    g = Golden(name)
    model = recorded(g.config)
    model.load_state_dict(g.under("state"))
    found = step_result(model, torch.stack([g("input/x1"), g("input/x2")]), accum, g.config["moco_m"])
    check_outputs(found, g, "out/", 1e-4)
    close_grads(model, g.under("grad"), 5e-4)
    same(model.state_dict(), g.under("after"), 1e-5)


@needs_golden
def test_schedules():
    g = Golden("schedule_moco")
    for i, c in enumerate(g.config["cases"]):
        total = c["epochs"] * c["iters_per_epoch"]
        lr = [warmup_cosine(n, total, c["warmup_epochs"] * c["iters_per_epoch"], c["lr"]) for n in range(total)]
        close(torch.tensor(lr, dtype=torch.float64), g(f"out/lr_{i}"), 1e-12)
        momentum = [momentum_at(n, total, c["moco_m"]) for n in range(total)]
        close(torch.tensor(momentum, dtype=torch.float64), g(f"out/momentum_{i}"), 1e-12)


def rows_of_shapes():
    return list(read_json("shapes_moco")) if FOLDER.is_dir() else []


@needs_golden
@pytest.mark.parametrize("row", rows_of_shapes())
def test_shapes(row):
    """Sizes come from the row's shapes; where it names a network of ours, ours has the published sizes."""
    expected = read_json("shapes_moco")[row]
    shapes = {name: shape for name, shape, *_ in expected["state"]}
    trained = {name for name, _, _, grad in expected["state"] if grad}
    patches, dim = shapes["base_encoder.pos_embed"][1:]
    patch_size = shapes["base_encoder.patch_embed.proj.weight"][-1]
    depth = sum(name.startswith("base_encoder.blocks.") and name.endswith("norm1.weight") for name in shapes)
    options = dict(dim=dim, depth=depth, patch_size=patch_size)
    name = row.split("/")[0]
    if name in MODELS:
        assert options == {k: MODELS[name][k] for k in options}
    options.update(img_size=math.isqrt(patches - 1) * patch_size, heads=1,         # heads have no shape
                   mlp_ratio=shapes["base_encoder.blocks.0.mlp.fc1.weight"][0] / dim)
    hidden, out = shapes["predictor.0.weight"]
    with torch.device("meta"):
        model = MoCo(ViT(**options, positions="sincos_yx"), out, hidden,
                     freeze_patch_embed="base_encoder.patch_embed.proj.weight" not in trained)
    check_shapes(model, expected)


@needs_golden
def test_trajectory():
    """Some optimizer steps: schedules, one group that decays all, a frozen patch projection, both encoders after."""
    g = Golden("traj_moco")
    c = g.config
    model = recorded(c)
    model.load_state_dict(g.under("state"))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], c["lr"], betas=(0.9, 0.999),
                                  weight_decay=c["weight_decay"], fused=True)
    scaler, total = torch.amp.GradScaler("cpu", enabled=False), c["epochs"] * c["n_batches"]
    # fp32 noise of all these steps: a thousandth, or more where the reference itself is as far from float64
    noise = max(1e-3, 3 * (g("dev64/out/grad_norm") / g("out/grad_norm")).max().item())
    for step in range(total):
        lr = warmup_cosine(step, total, c["warmup_epochs"] * c["n_batches"], c["lr"])
        optimizer.param_groups[0]["lr"] = lr
        momentum = momentum_at(step, total, c["moco_m"]) if c["moco_m_cos"] else c["moco_m"]
        assert (lr, momentum) == pytest.approx((g("out/lr")[step].item(), g("out/momentum")[step].item()), rel=1e-12)
        i = step % c["n_batches"]
        loss, _ = model(together(g("input/x1")[i], g("input/x2")[i]), momentum)
        loss.backward()
        norm, skipped = finite_step(optimizer, scaler)
        optimizer.zero_grad()
        assert not skipped
        close_losses(g, step, loss, norm, noise)
    state = model.state_dict()
    for key, after in g.under("after").items():
        if not after.is_floating_point():
            assert state[key] == after
            continue
        allowed = max(20 * g(f"dev64/after/{key}").max().item(), 1e-5 * after.abs().max().item())
        assert (state[key] - after).abs().max().item() <= allowed, key


@needs_golden
def test_official_file():
    """All of it has a place here, and its two encoders are told apart by name."""
    c = Golden("ckpt_moco").config
    path = str(FOLDER / c["checkpoint"])
    state = {k.removeprefix("module."): v for k, v in torch.load(path, weights_only=True)["state_dict"].items()}
    model = recorded(c)
    model.load_state_dict(state)
    img = Golden("ckpt_moco")("input/imgs")
    for key, encoder in (("", model.base_encoder), (":momentum_encoder", model.momentum_encoder)):
        found = load_encoder(path + key, c["num_heads"], str, eps=c["norm_eps"])
        torch.testing.assert_close(found(img), encoder.features(img))


# ----------------------------------------------------------------------------------------------------------------
# One process: the textbook, invariants


def test_same_as_textbook():
    """Twelve steps beside four separate passes of timm's ViT with torch's BatchNorm, in float64, where Adam makes no
    steps of rounding noise: losses, every weight, every buffer."""
    pytest.importorskip("timm", reason="the textbook form is built from timm's ViT")
    from textbook import TextbookMoCo
    ours = small(seed=3).double()
    plain = TextbookMoCo(16, 4, 16, 2, 4, 8, 20).double()
    plain.load_state_dict(ours.state_dict())
    optimizers = [torch.optim.AdamW((p for p in m.parameters() if p.requires_grad), 1e-3, weight_decay=0.1)
                  for m in (ours, plain)]
    for _ in range(12):
        one, two = torch.randn(2, 8, 3, 16, 16).double()
        losses = ours(together(one, two), 0.9)[0], plain(one, two, 0.9)
        torch.testing.assert_close(*losses, rtol=1e-9, atol=0)
        for loss, optimizer in zip(losses, optimizers):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    torch.testing.assert_close(ours.state_dict(), dict(plain.state_dict()), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("accum", [2, 3, 4, 6, 12])
def test_parts_of_a_batch_are_the_batch(accum):
    """Float64: loss, every gradient, statistics and momentum encoder; parts need not respect the views."""
    whole, parts = step_result(small().double(), views_of()), step_result(small().double(), views_of(), accum)
    torch.testing.assert_close(parts, whole, rtol=1e-9, atol=1e-11)
    other = step_result(small().double(), views_of()[:, :3])    # while half a batch is something else
    assert abs(other["loss"] - whole["loss"]) > 0.01


def test_parts_keep_less():
    """What the backbone's first block saves for its gradient is saved for one part at a time."""
    def saved(accum):
        sizes = []
        model = small()
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
            model(torch.randn(12, 3, 16, 16), 0.9, accum)
        return sum(sizes)
    assert saved(3) < saved(1) / 3


@pytest.mark.parametrize("affine", [True, False])
def test_norm_is_batchnorm1d(affine):
    x, mix, _, _ = norm_case(0)
    layers = [BatchNorm(5, affine).double(), nn.BatchNorm1d(5, affine=affine).double()]
    assert layers[0].state_dict().keys() == layers[1].state_dict().keys()
    for step in range(3):
        inputs = [(x + step).requires_grad_() for _ in layers]
        outputs = [layer(t) for layer, t in zip(layers, inputs)]
        for y in outputs:
            (y * mix).square().sum().backward()
        torch.testing.assert_close(*outputs, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(inputs[0].grad, inputs[1].grad, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(*(dict(layer.state_dict()) for layer in layers), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(*(layer.eval()(x) for layer in layers))
    # In fp32, and from 16 bits, the statistics are fp32's: a mean of 1000 does not drown a deviation of 0.1.
    far = torch.randn(4096, 1) * 0.1 + 1000
    assert abs(BatchNorm(1)(far).std() - 1) < 0.01 and BatchNorm(1)(far.bfloat16()).dtype == torch.float32


def test_features_are_the_vits():
    """The shortened last block gives the cls token that the whole network gives, and its gradients."""
    vit, img = small().double().base_encoder, torch.randn(3, 3, 16, 16).double()
    grads = []
    for out in (vit.features(img), MoCo.encode(vit, img)):
        grads.append(torch.autograd.grad(out.square().sum(), [p for p in vit.blocks.parameters()]) + (out.detach(),))
    torch.testing.assert_close(*grads)


def test_loss_by_hand():
    """Each query against the keys of the other view, one softmax over them, 2 tau, both directions."""
    model, (q, k) = small(temperature=0.3), torch.randn(2, 2, 5, 8).double()
    expected = 0.0
    for one, other in ((q[0], k[1]), (q[1], k[0])):
        for i in range(5):
            s = torch.stack([F.cosine_similarity(one[i], other[j], dim=0) / 0.3 for j in range(5)])
            expected -= s.log_softmax(0)[i] / 5 * 2 * 0.3
    torch.testing.assert_close(model.contrast(q, k), expected)
    same_everywhere = torch.ones(2, 64, 8)
    chance = model.contrast(same_everywhere, same_everywhere).item()
    assert chance == pytest.approx(4 * 0.3 * math.log(64))
    outputs = dict(features=q, projections=q, queries=q, keys=k)
    assert model.metrics(outputs, 64)["chance"] == pytest.approx(chance)


def test_who_learns():
    """Queries alone; the momentum encoder follows before its keys are made; positions and, frozen, patches stay."""
    for frozen in (False, True):
        model = small(freeze_patch_embed=frozen)
        before = copy.deepcopy(model.state_dict())
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 0.1, weight_decay=0.5)
        found = step_result(model, torch.randn(2, 6, 3, 16, 16))
        assert all(g.any() for g in found["grads"].values())
        patch = {f"base_encoder.patch_embed.proj.{k}" for k in ("weight", "bias")}
        fixed = {"base_encoder.pos_embed"} | (patch if frozen else set())
        own = {k for k, _ in model.named_parameters() if not k.startswith("momentum_encoder.")}
        assert set(found["grads"]) == own - fixed
        optimizer.step()
        after = model.state_dict()
        assert {k for k in own if torch.equal(before[k], after[k])} == fixed
        for key, value in after.items():                        # the weights of before the step are what it follows
            if key.startswith("momentum_encoder.") and "running" not in key and "tracked" not in key:
                base = before[key.replace("momentum", "base")]
                torch.testing.assert_close(value, 0.9 * before[key] + 0.1 * base)
        model.update_ema(0.0)                                   # also outside of a step it becomes no part of a graph
        for slow, online in zip(model.momentum_encoder.parameters(), model.base_encoder.parameters()):
            assert torch.equal(slow, online) and not slow.requires_grad and slow.is_leaf


def test_views_are_normalised_apart():
    """A second view that is brighter throughout must not reach the statistics of the first."""
    model, (one, two) = small(), torch.randn(2, 6, 3, 16, 16)
    a, b = (model(together(one, second), 0.5)[1] for second in (two, 3 * two + 1))
    torch.testing.assert_close(a["projections"][0], b["projections"][0])
    assert not torch.allclose(a["projections"][1], b["projections"][1])


def test_initialisation():
    """Xavier on every linear layer of the ViT, on q, k and v as three matrices; torch's own start in the heads."""
    torch.manual_seed(0)
    model = MoCo(ViT(dim=192, depth=1, positions="sincos_yx"), 256, 512)
    vit = model.base_encoder
    for module, bound in ((vit.blocks[0].attn.qkv, (6 / 384) ** 0.5), (vit.blocks[0].attn.proj, (6 / 384) ** 0.5),
                          (vit.blocks[0].mlp.fc1, (6 / 960) ** 0.5), (vit.patch_embed.proj, (6 / 960) ** 0.5),
                          (vit.head[0], 192 ** -0.5), (model.predictor[0], 256 ** -0.5)):
        assert module.weight.abs().max().item() == pytest.approx(bound, rel=2e-3) and module.weight.abs().max() <= bound
        assert module.weight.std().item() == pytest.approx(bound / 3 ** 0.5, rel=0.02)
        assert module.bias is None or not module.bias.any()
    assert vit.cls_token.std().item() == pytest.approx(1e-6, rel=0.3)
    for a, b in zip(vit.parameters(), model.momentum_encoder.parameters()):
        assert torch.equal(a, b) and not b.requires_grad


def test_collapse_is_named():
    """What the log says of features that point everywhere, of a few directions, and of one point."""
    model, n = small(), 512
    torch.manual_seed(0)
    everywhere, few = torch.randn(2, n, 64), torch.randn(2, n, 3) @ torch.randn(3, 64)
    point = torch.ones(2, n, 64) + 1e-4 * torch.randn(2, n, 64)
    found = [model.metrics(dict(features=x, projections=x, queries=x, keys=x.flip(0)), n)
             for x in (everywhere, few, point)]
    assert found[0]["spread"].item() == pytest.approx(1, abs=0.02) and found[2]["spread"] < 1e-3
    assert found[0]["rank"] > 55 and 2 < found[1]["rank"] <= 3 + 1e-3 and found[2]["rank"] < 1.1
    assert [round(s["positive"].item(), 3) for s in found] == [1, 1, 1]      # a query is the other view's key here
    assert abs(found[0]["negative"]) < 0.01 and found[2]["negative"] > 0.999
    pairs = F.normalize(few[0], dim=1) @ F.normalize(few[0], dim=1).T
    assert found[1]["negative"].item() == pytest.approx(
        sum((p.sum() - p.trace()).item() for p in (pairs, F.normalize(few[1], dim=1) @ F.normalize(few[1], dim=1).T))
        / 2 / (n * (n - 1)), abs=1e-5)
    names = "features", "projections", "queries", "keys"
    broken = model.metrics(dict.fromkeys(names, everywhere * float("nan")), n)
    assert broken["spread"] == 0                                # and not an exception from a decomposition


def test_two_views():
    """Images stay where they are; of each pair the first is always blurred, the second seldom, and only the second is
    ever solarised: white turns black."""
    torch.manual_seed(0)
    img = torch.zeros(400, 3, 32, 32, dtype=torch.uint8)
    img[:] = torch.arange(400).view(400, 1, 1, 1) // 8          # of brightness 0 to 49, with a white line
    img[:, :, 16] = 255
    views = two_views(img, (0.0,) * 3, (1 / 255,) * 3)
    assert torch.corrcoef(torch.stack([views[:, 0, 0, 0], torch.arange(400.0)]))[0, 1] > 0.8
    first, second = views[::2], views[1::2]
    near, far = ((v[:, 0, 15, 5] - v[:, 0, 8, 5]).abs() > 0.3 for v in (first, second))
    assert near.float().mean() > 0.7 and far.float().mean() < 0.2
    dark = [(v[:, :, 16].mean((1, 2)) < v[:, :, 8].mean((1, 2))).float().mean() for v in (first, second)]
    assert dark[0] == 0 and 0.1 < dark[1] < 0.3


def test_a_non_finite_batch_leaves_no_trace():
    """The step is skipped; the momentum encoder takes in the same weights again; statistics stay finite."""
    model = small()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2, fused=True)
    views = torch.randn(12, 3, 16, 16)
    views[3, 0, 0, 0] = float("nan")
    before = copy.deepcopy(model.state_dict())
    model(views, 0.9)[0].backward()
    assert finite_step(optimizer, torch.amp.GradScaler("cpu", enabled=False))[1] == 1
    for key, value in model.state_dict().items():
        assert value.isfinite().all(), key
        if key.startswith(("base_encoder", "predictor")) and "tracked" not in key and "running" not in key:
            assert torch.equal(value, before[key]), key


def test_autocast():
    """bf16 products, fp32 loss and statistics; gradients near the exact ones, in parts as near as at once."""
    views, grads = torch.randn(12, 3, 16, 16, generator=torch.Generator().manual_seed(0)), []
    for half, accum in ((False, 1), (True, 1), (True, 3)):
        model = small()
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            loss, outputs = model(views, 0.9, accum)
        assert loss.dtype == outputs["queries"].dtype == torch.float32
        loss.backward()
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    assert min(F.cosine_similarity(grads[0], g, dim=0) for g in grads[1:]) > 0.95


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler on a CPU")
def test_compiled_is_the_same():
    """In parts, whose compiled backbone is run again for its gradient."""
    plain, compiled, views = small(), small(), torch.randn(2, 6, 3, 16, 16)
    compiled.compile(dynamic=False)
    torch.testing.assert_close(step_result(compiled, views, 3), step_result(plain, views), rtol=1e-3, atol=1e-5)


def test_what_is_called_is_compiled():
    model, graphs = small(), []
    model.compile(backend=lambda graph, _: graphs.append(graph) or graph.forward)
    model(torch.randn(8, 3, 16, 16), 0.9)
    assert len(graphs) >= 2                                     # one of each encoder


# ----------------------------------------------------------------------------------------------------------------
# Options, real runs


def resolved(*argv):
    return parse(Config, "moco", "", RECIPES, DEMO, list(argv))


def test_recipes():
    cfg = resolved()
    expected = dict(model="vit_tiny", heads=12, epochs=400, batch_size=1024, warmup_epochs=40, warmup_lr=1e-6,
                    blr=1.5e-4, out="out/moco", freeze_patch_embed=False, head_hidden=4096, head_dim=256,
                    interpolation="bilinear", min_crop=0.08, weight_decay=0.1, momentum=0.99, temperature=0.2)
    assert {k: getattr(cfg, k) for k in expected} == expected
    for name in ("vit_small", "vit_base"):
        cfg = resolved("--model", name)
        assert (cfg.heads, cfg.epochs, cfg.batch_size, cfg.warmup_epochs, cfg.warmup_lr, cfg.freeze_patch_embed) == (
            12, 300, 4096, 40, 0, True)
    # In a run that is shorter than its recipe the warm-up is at most a tenth, whatever the recipe's share.
    assert resolved("--epochs", "50").warmup_epochs == 5
    assert resolved("--epochs", "50", "--model", "vit_base").warmup_epochs == 5
    assert resolved("--epochs", "500", "--model", "vit_base").warmup_epochs == 40
    assert resolved("--epochs", "50", "--warmup-epochs", "10").warmup_epochs == 10
    assert resolved("--model", "vit_small", "--no-freeze-patch-embed").freeze_patch_embed is False
    cfg = resolved("--demo", "--epochs", "1")
    assert (cfg.data, cfg.model, cfg.out) == ("shapes", "vit_mini", "out/moco-demo")
    assert set(RECIPES) <= set(MODELS)


@pytest.mark.parametrize("args, words", [
    (["--model", "vit_huge"], "--model must be one of .*, not vit_huge"),
    (["--temperature", "0"], "--temperature must be above 0"), (["--momentum", "1.1"], "--momentum must be at most 1"),
    (["--min-crop", "2"], "--min-crop must be at most 1"), (["--in-chans", "2"], "bands is 3, and --in-chans is 2"),
    (["--interpolation", "cubic"], "--interpolation.*bicubic"),
    (["--batch-size", "1"], "--batch-size must be at least 2"), (["--accum", "3"], "does not divide"),
    (["--batch-size", "64"], "40 images, less than one"), (["--patch-size", "5"], "patches of 5 do not tile"),
    (["--heads", "5"], "5 heads do not divide"), (["--head-dim", "0"], "--head-dim must be at least 1"),
    (["--init", "absent.pth"], "absent.pth does not exist"),
    (["--warmup-epochs", "3"], "--epochs 2 must be more than --warmup-epochs 3"),
    (["--mask-ratio", "0.5"], "unrecognized arguments: --mask-ratio")])
def test_bad_options(classes, tmp_path, args, words):
    with pytest.raises(SystemExit, match=words):
        moco_v3.main([*TINY, "--data", str(classes), "--epochs", "2", "--out", str(tmp_path), *args])


def test_outputs(classes, tmp_path):
    """Both files, what others read of them, and a new run that starts from them."""
    args = [*TINY, "--data", str(classes), "--epochs", "2"]
    moco_v3.main([*args, "--out", str(tmp_path / "a"), "--probe-every", "1", "--accum", "2"])
    found = rows(tmp_path / "a")
    assert found[0]["config"]["batch_size"] == 8 and found[0]["config"]["freeze_patch_embed"] is False
    logged = {"loss", "chance", "spread", "rank", "positive", "negative", "lr", "momentum", "grad_norm", "skipped"}
    assert logged <= set([row for row in found if "loss" in row][-1])
    assert [row["step"] for row in found if "knn" in row] == [0, 5, 10]
    last = torch.load(tmp_path / "a" / "last.pt")["model"]
    img = torch.randn(2, 3, 16, 16)
    released, online, slow = (load_encoder(str(tmp_path / "a" / name), say=str)
                              for name in ("encoder.pt", "last.pt", "last.pt:momentum_encoder"))
    assert torch.equal(released(img), online(img)) and not torch.equal(slow(img), online(img))
    assert torch.equal(slow.norm.weight, last["momentum_encoder.norm.weight"])
    assert released.config["heads"] == 4 and read(str(tmp_path / "a" / "encoder.pt")).config["method"] == "moco_v3"
    moco_v3.main([*args, "--out", str(tmp_path / "b"), "--init", str(tmp_path / "a" / "last.pt"), "--lr", "0",
                  "--warmup-lr", "0", "--epochs", "1"])
    other = torch.load(tmp_path / "b" / "last.pt")["model"]
    for key, value in last.items():
        if key.startswith("base_encoder.") and "running" not in key and "tracked" not in key:
            assert torch.equal(other[key], value) and torch.equal(other[key.replace("base", "momentum")], value), key


@pytest.mark.parametrize("args", [
    ["--img-size", "16", "24", "--in-chans", "1"], ["--dtype", "bf16", "--clip-grad", "1"],
    ["--dtype", "fp16", "--accum", "4", "--in-chans", "4", "--freeze-patch-embed"]])
def test_other_settings(classes, tmp_path, args):
    moco_v3.main([*TINY, "--data", str(classes), "--epochs", "1", "--out", str(tmp_path), *args])
    assert all(isinstance(row["loss"], float) for row in rows(tmp_path) if "loss" in row)


@pytest.mark.parametrize("world", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_killed_and_resumed_is_bitwise_the_same(classes, tmp_path, world):
    """The momentum encoder and both encoders' statistics among the rest; with one process, in parts."""
    def run(*args):
        args = ["--data", classes, *TINY, "--epochs", 4, "--accum", 3 - world, *args]       # 20 steps
        return moco_v3.main(list(map(str, args))) if world == 1 else finish(*args, world=world, script="moco_v3.py")

    run("--out", tmp_path / "whole")
    out = tmp_path / "broken"
    start_and_kill("--data", classes, *TINY, "--epochs", 4, "--accum", 3 - world, out=out, step=6, world=world,
                   script="moco_v3.py")
    run("--out", out, "--workers", 1)
    got = steps(out)
    assert any(b <= a for a, b in zip(got, got[1:])), "no step was repeated: nothing was resumed"
    whole, broken = ({r["step"]: r["loss"] for r in rows(f) if "loss" in r} for f in (tmp_path / "whole", out))
    assert whole == broken and len(whole) == 20
    same_state(tmp_path / "whole", out)
    assert any(k.startswith("momentum_encoder.head.1.running") for k in torch.load(out / "last.pt")["model"])


def test_flattened(classes, tmp_path):
    """tools.flatten's one file, alone in an empty folder, starts and says what it would do."""
    text = subprocess.run([sys.executable, "-m", "tools.flatten", "moco_v3.py"], capture_output=True, text=True,
                          cwd=ROOT, check=True).stdout
    (tmp_path / "single.py").write_text(text)
    args = ["--data", str(classes), *TINY, "--epochs", "1", "--out", "single"]
    subprocess.run([sys.executable, "single.py", *args], cwd=tmp_path, check=True, env={"OMP_NUM_THREADS": "1"})
    moco_v3.main([*args[:-1], str(tmp_path / "several")])
    single, several = ([r["loss"] for r in rows(tmp_path / name) if "loss" in r] for name in ("single", "several"))
    assert single == several and len(single) == 5 and json.dumps(single)
