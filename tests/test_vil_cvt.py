"""ViL and CvT, EsViT's other backbones: against the recorded reference runs, against plain attention and convolutions,
and as their users run them. Sizes of recordings come from the recordings."""
import os
import re
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from einops import rearrange
from golden import FOLDER, Golden, close, close_grads, needs_golden
from test_esvit import TINY, rows, same_run, train
from test_runs import finish, start, start_and_kill, steps, wait_for
from torch import nn

import esvit
import finetune
import probe
import runtime.run
from nets import chunk_attention, cvt
from nets.chunk_attention import ChunkAttention, FullAttention, chunk_layout
from nets.cvt import CVTS, CvT, CvtAttention, MapBatchNorm
from nets.naming import PYRAMIDS
from nets.vil import VILS, ViL
from tools import analyze
from weights import encoder_options, export, layer_of, load_encoder, load_into, read

CPU = torch.device("cpu")
DENSE = Path(os.environ.get("GOLDEN_DENSE", FOLDER.parent / "golden_dense"))
KINDS = {"vil": ViL, "cvt": CvT}


def each_dense(*patterns):
    """Decorator as golden.each_recording, for recordings of dense networks."""
    names = sorted({path.stem for pattern in patterns for path in DENSE.glob(f"{pattern}.npz")})

    def decorate(test):
        return needs_golden(pytest.mark.parametrize("name", names)(test))
    return decorate


@pytest.fixture(autouse=True)
def dense_recordings(monkeypatch):
    monkeypatch.setattr("golden.FOLDER", DENSE)


@pytest.fixture
def brief(monkeypatch):
    """Runs in this process are of even smaller networks, and draw no curve."""
    monkeypatch.setitem(PYRAMIDS, "vil_mini", (ViL, dict(VILS["vil_mini"], dims=(8, 12), depths=(1, 2))))
    monkeypatch.setitem(PYRAMIDS, "cvt_mini", (CvT, dict(dims=(8, 12), depths=(1, 2), heads=(1, 2), window=4)))
    monkeypatch.setattr(runtime.run, "draw_curve", lambda folder: None)


def small(kind, **options):
    """A network of two stages; of a ViL the first one is sparse."""
    torch.manual_seed(0)
    own = dict(sparse=(True, False), global_tokens=(1, 0)) if kind is ViL else {}
    return kind(**{**dict(img_size=24, patch_size=2, dims=(8, 12), depths=(1, 2), heads=(2, 3), window=4), **own,
                   **options})


# ----------------------------------------------------------------------------------------------------------------
# Recorded runs


def vil_of(c):
    """The options of ViL in a recording's config: l1,h3,d96,... is a stage; after the first full one all are full."""
    stages = [dict(re.findall(r"([a-z])(\d+)", stage)) for stage in c["arch"].split("_")]

    def each(letter, default=0):
        return tuple(int(stage.get(letter, default)) for stage in stages)
    sparse = each("s")
    first_full = sparse.index(0) if 0 in sparse else len(sparse)
    return dict(img_size=c.get("img_size", 224), patch_size=each("p")[0], dims=each("d"), depths=each("n"),
                heads=each("h"), sparse=tuple(i < first_full for i in range(len(stages))), global_tokens=each("g"),
                window=each("f")[0], relative=not each("a", 1)[0], mode=c.get("mode", 0), exact=c.get("sw_exact", 0),
                share=c.get("sharew", True), avg_pool=c.get("avg_pool", False))


def cvt_of(c):
    return dict(img_size=c.get("crop_sizes", [224])[0], patch_size=c["PATCH_STRIDE"][0], dims=tuple(c["DIM_EMBED"]),
                depths=tuple(c["DEPTH"]), heads=tuple(c["NUM_HEADS"]), window=c["WINDOW_SIZE"][0],
                relative=c["REL_POS_EMBED"])


def recorded(g):
    """The network of a recording with its weights, and the two linear heads that stand for DINO's."""
    if "arch" in g.config:
        model = ViL(**vil_of(g.config))
    else:
        model = CvT(**cvt_of(g.config))
        for stage, side in enumerate(g.config["WINDOW_SIZE"]):  # here a window of its own for each stage
            dim, heads = model.config["dims"][stage], model.config["heads"][stage]
            for attn, _ in model.get_submodule(f"stage{stage}")[1]["layers"]:
                attn.fn = CvtAttention(dim, heads, side, model.config["relative"])
    state = {k: v for k, v in g.under("state").items() if not k.endswith(("relative_position_index", "rel_pos_idx"))}
    if g.config.get("sharew"):                                  # files have shared weights under both names
        state = {k: v for k, v in state.items() if "_global." not in k}
    names = ("head", "head_dense")
    heads = nn.ModuleDict({name: nn.Linear(*state[f"{name}.weight"].T.shape) for name in names})
    heads.load_state_dict({k: v for k, v in state.items() if k.startswith("head")})
    model.load_state_dict({k: v for k, v in state.items() if not k.startswith("head")})
    return model, heads


def replay(g, out, loss_tolerance, grad_tolerance):
    """Features, regions in their order, loss and every gradient; then evaluation, and the last four blocks."""
    model, heads = recorded(g)
    crops = [g(f"input/crop{i}") for i in range(len(g("out/npatch")))]
    views, regions = zip(*map(model.view_and_regions, crops))
    assert [x.shape[1] for x in regions] == g("out/npatch").tolist()
    views, regions = torch.cat(views), torch.cat([x.flatten(0, 1) for x in regions])
    found = dict(head=heads["head"](views), dense=heads["head_dense"](regions), region=regions)
    for name, x in zip(("head", "head_dense", "region"), found.values()):
        close(x, g(f"out/{name}"), out)
    loss = sum((x * g(f"input/weight_{name}")).mean() for name, x in found.items())
    close(loss, g("out/loss"), loss_tolerance)
    loss.backward()
    for p in model.parameters():
        if not p.numel():                                       # positions of no global token
            p.grad = None
    parts = {name: part for name, part in model.named_children() if name != "head"}
    close_grads(nn.ModuleDict(parts | dict(heads.items())), g.under("grad"), grad_tolerance)
    model.eval()
    close(model.features(crops[0]), g("out/eval_features"), out)
    if "out/eval_last4" in g:
        close(probe.features(model, crops[0], "avg", 4), g("out/eval_last4"), out)
    return model


@each_dense("vil_2262*", "vil_3stage*", "vil_ape*", "vil_rpe*", "vil_mode*")
def test_vil(name, monkeypatch):
    g = Golden(name)
    if "rand/modes" in g:                                       # drawn: 1 to 8, the chunk itself not counted
        drawn = iter(g("rand/modes").split(1))
        monkeypatch.setattr(chunk_attention, "draw_neighbour", lambda device: (n := next(drawn) - 1) + (n >= 4))
    replay(g, 5e-5, 2e-3, 2e-4)


@each_dense("cvt_plain", "cvt_rpe")
def test_cvt(name):
    """Not here: CvT's stem and its shift, which no published network uses."""
    g = Golden(name)
    model, _ = recorded(g)
    assert {m.eps for m in model.modules() if isinstance(m, nn.LayerNorm)} == {g.config["ln_eps"]}
    assert {m.eps for m in model.modules() if isinstance(m, MapBatchNorm)} == {g.config["bn_eps"]}
    x = torch.linspace(-3, 3, 13)
    assert torch.equal(cvt.QuickGELU()(x), x * torch.sigmoid(1.702 * x)) and g.config["act"] == "x*sigmoid(1.702x)"
    state = replay(g, 5e-4, 5e-3, 5e-3).state_dict()            # 5e-3 is for gains before a BatchNorm: nearly zero
    for key, value in g.under("after").items():
        close(state[key], value, 5e-5)


@each_dense("vil_attention*")
def test_chunk_attention(name):
    g = Golden(name)
    c = g.config
    attn = ChunkAttention(c["dim"], c["heads"], c["nglo"], c["window"], c["rpe"], 0, c["sw_exact"], c["sharew"])
    state = {k: v for k, v in g.under("state").items() if k in attn.state_dict()}
    attn.load_state_dict(state)
    x = g("input/x").requires_grad_()
    y = attn(x, (c["nx"], c["ny"]))
    close(y, g("out/y"), 1e-5)
    (y * g("input/weight")).mean().backward()
    grads = g.under("grad")
    close(x.grad, grads.pop("input"), 5e-5)
    close_grads(attn, grads, 5e-5)


@each_dense("vil_masks")
def test_masks(name):
    g = Golden(name)
    for key in [k for k in g.under("out") if not k.startswith("n_")]:
        kind, *sizes = key.split("_")
        down, across, pad_y, pad_x, side = map(int, sizes)
        exact = dict(zero=0, exact=1, cyclic=-1)[kind]
        _, seen = chunk_layout(down * side - pad_y, across * side - pad_x, side, exact, CPU)
        assert torch.equal(~seen.flatten(2).squeeze(1), g(f"out/{key}")), key


@needs_golden
def test_published_shapes():
    if not DENSE.is_dir():
        pytest.skip(f"recorded reference runs not found in {DENSE}")
    import golden
    for name, row in golden.read_json("shapes_vil_cvt").items():
        with torch.device("meta"):
            model = ViL(**vil_of(row)) if "arch" in row else CvT(**cvt_of(row["spec"]))
        assert {k: list(p.shape) for k, p in model.named_parameters()} == row["shapes"], name
        assert sum(p.numel() for p in model.parameters()) == row["total_without_head"]


@pytest.mark.parametrize("kind, options, count", [
    (ViL, VILS["vil_tiny"], 27_569_352), (CvT, CVTS["cvt_tiny"], 29_303_616), (CvT, CVTS["cvt_deep"], 22_620_160)])
def test_published_parameter_counts(kind, options, count):
    with torch.device("meta"):
        assert sum(p.numel() for p in kind(**options).parameters()) == count


# ----------------------------------------------------------------------------------------------------------------
# Against plain forms, and invariants


@pytest.mark.parametrize("relative", [True, False])
@pytest.mark.parametrize("grid", [(8, 12), (7, 10), (3, 5)])
def test_chunks_are_full_attention_with_a_mask(relative, grid):
    """In float64: logits of all pairs of tokens, all but those in neighbouring chunks masked, offsets by arithmetic."""
    torch.manual_seed(0)
    h, w, side, heads, tokens = *grid, 4, 2, 2
    attn = ChunkAttention(12, heads, tokens, side, relative, 0, 0, True).double()
    for p in attn.parameters():
        nn.init.normal_(p, std=0.3)
    x = torch.randn(2, tokens + h * w, 12).double()
    q, (k, v) = attn.query(x), attn.kv(x).chunk(2, -1)
    q, k, v = (rearrange(t, "b n (h d) -> b h n d", h=heads) for t in (q, k, v))
    logits = q @ k.mT / 6 ** 0.5
    y, x_ = torch.arange(h * w) // w, torch.arange(h * w) % w
    near = ((y[:, None] // side - y // side).abs() <= 1) & ((x_[:, None] // side - x_ // side).abs() <= 1)
    if relative:
        down, across = y[:, None] - y + 2 * side - 1, x_[:, None] - x_ + 2 * side - 1
        index = (down * (4 * side - 1) + across).clamp(0, (4 * side - 1) ** 2 - 1)
        bias = torch.zeros(heads, *logits.shape[-2:]).double()
        bias[:, tokens:, tokens:] = attn.local_relative_position_bias_table[index].permute(2, 0, 1)
        bias[:, :tokens, tokens:] = attn.g2l_relative_position_bias[0].unsqueeze(2)
        bias[:, tokens:, :tokens] = attn.g2l_relative_position_bias[1].unsqueeze(1)
        bias[:, :tokens, :tokens] = attn.g2g_relative_position_bias
        logits = logits + bias
    mask = torch.ones(logits.shape[-2:], dtype=torch.bool)
    mask[tokens:, tokens:] = near
    want = logits.masked_fill(~mask, float("-inf")).softmax(-1) @ v
    torch.testing.assert_close(attn(x, grid), attn.proj(rearrange(want, "b h n d -> b n (h d)")))




def test_full_attention_matches_torch():
    torch.manual_seed(0)
    ours, ref = FullAttention(24, 3, 1, (3, 4)), nn.MultiheadAttention(24, 3, batch_first=True)
    for name in ("local_relative", "g2l_relative", "g2g_relative"):
        nn.init.zeros_(next(p for n, p in ours.named_parameters() if n.startswith(name)))
    ref.in_proj_weight.data, ref.in_proj_bias.data = ours.qkv.weight.data, ours.qkv.bias.data
    ref.out_proj.weight.data, ref.out_proj.bias.data = ours.proj.weight.data, ours.proj.bias.data
    x = torch.randn(2, 13, 24)
    torch.testing.assert_close(ours(x, (3, 4)), ref(x, x, x, need_weights=False)[0])
    assert ours(torch.randn(1, 5, 24), (2, 2)).shape == (1, 5, 24)          # relative positions are resized


def test_training_draws_one_neighbour():
    """Mode 1: by torch's generator, one for all images; evaluation sees all nine chunks."""
    torch.manual_seed(0)
    attn = ChunkAttention(8, 2, 0, 2, False, 1, 0, True)
    x = torch.randn(1, 36, 8, requires_grad=True)

    def reach():
        attn(x, (6, 6))[0, 14].sum().backward()                 # a token of the chunk in the middle
        seen = x.grad[0].abs().sum(1) > 1e-12
        x.grad = None
        return rearrange(seen, "(y a x b) -> (y x) (a b)", y=3, a=2, x=3).all(1)
    drawn = set()
    for seed in range(64):
        torch.manual_seed(seed)
        first = reach()
        torch.manual_seed(seed)
        assert torch.equal(first, reach()) and first[4] and first.sum() == 2
        drawn.add(tuple(first.tolist()))
    assert len(drawn) == 8
    attn.eval()
    assert reach().all()


def test_cvt_attention_is_convolution_and_windows():
    """In float64, one window at a time: padding is zeros of the map, seen like tokens; the scale is the width's."""
    torch.manual_seed(0)
    attn = CvtAttention(12, 3, 4, False).double().eval()
    bn = attn.qkv["bn"]
    for t in (bn.running_mean, bn.weight.data, bn.bias.data):
        nn.init.normal_(t)
    x = torch.randn(2, 5 * 6, 12).double()
    img = F.pad(rearrange(x, "b (h w) d -> b d h w", h=5), (0, 2, 0, 3))
    img = F.batch_norm(F.conv2d(img, attn.qkv["dw"].weight, padding=1, groups=12), bn.running_mean, bn.running_var,
                       bn.weight, bn.bias)
    qkv = F.conv2d(img, attn.qkv["pw"].weight, attn.qkv["pw"].bias)
    out = torch.zeros(2, 12, 8, 8).double()
    for top in (0, 4):
        for left in (0, 4):
            part = qkv[:, :, top:top + 4, left:left + 4]
            q, k, v = rearrange(part, "b (k h d) y x -> k b h (y x) d", k=3, h=3)
            y = (q @ k.mT / 12 ** 0.5).softmax(-1) @ v
            out[:, :, top:top + 4, left:left + 4] = rearrange(y, "b h (y x) d -> b (h d) y x", y=4)
    want = F.conv2d(out, attn.proj_out.weight, attn.proj_out.bias)[:, :, :5, :6]
    torch.testing.assert_close(attn(x, (5, 6)), want.flatten(2).mT)


def test_batch_norm_is_torchs():
    torch.manual_seed(0)
    ours, ref = MapBatchNorm(6), nn.BatchNorm2d(6)
    for _ in range(2):
        x = torch.randn(3, 6, 4, 5) * 3 + 1
        torch.testing.assert_close(ours(x), ref(x))
    for (name, a), b in zip(ours.state_dict().items(), ref.state_dict().values()):
        torch.testing.assert_close(a, b, msg=name)
    before = ours.running_mean.clone()
    x[0, 0] = torch.nan                                         # this step is skipped
    ours(x)
    assert ours.running_mean.isfinite().all() and torch.equal(ours.running_mean[0], before[0])


def half_of_the_maps(rank, folder):
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
    norm, whole = MapBatchNorm(6), nn.BatchNorm2d(6)
    torch.manual_seed(0)
    x, weight = torch.randn(4, 6, 3, 5) * 2 + 1, torch.randn(4, 6, 3, 5)
    mine = slice(2 * rank, 2 * rank + 2)
    ours, theirs = x[mine].clone().requires_grad_(), x.clone().requires_grad_()
    out, want = norm(ours), whole(theirs)
    torch.testing.assert_close(out, want[mine])
    (out * weight[mine]).sum().backward()
    (want * weight).sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad[mine], atol=1e-5, rtol=1e-4)
    for a, b in zip(norm.buffers(), whole.buffers()):
        torch.testing.assert_close(a, b)
    dist.destroy_process_group()


def test_batch_norm_over_two_processes(tmp_path):
    torch.multiprocessing.spawn(half_of_the_maps, (str(tmp_path),), 2)


@pytest.mark.parametrize("kind", KINDS.values())
def test_any_size_and_channels(kind):
    model = small(kind, in_chans=1).eval()
    assert model.grid == (6, 6)
    for height, width in ((24, 24), (16, 28), (10, 12)):
        img = torch.randn(2, 1, height, width)
        view, regions = model.view_and_regions(img)
        h, w = model.grid_of(height, width)
        assert regions.shape == (2, h * w, 12) and torch.equal(model(img), view)
        torch.testing.assert_close(view, regions.mean(1))
        assert len(model.block_outputs(img)) == model.depth == 3
    with pytest.raises(ValueError, match="patches of 2 do not tile a 25x24 image"):
        model(torch.randn(1, 1, 25, 24))
    with pytest.raises(ValueError, match="heads do not divide the width"):
        small(kind, heads=(3, 3))


def test_what_networks_refuse():
    with pytest.raises(ValueError, match="2x8 image is too small for 2 stages of a ViL"):
        small(ViL)(torch.randn(1, 3, 2, 8))
    with pytest.raises(ValueError, match="mode and exact of a ViL are -1, 0 or 1, not 2"):
        small(ViL, mode=2)
    with pytest.raises(ValueError, match="need square maps, not 8 x 12"):
        small(ViL, relative=False)(torch.randn(1, 3, 16, 24))
    with pytest.raises(ValueError, match="need maps that large: a map here has 3"):
        small(CvT, relative=True)(torch.randn(1, 3, 12, 12))


@pytest.mark.parametrize("kind", KINDS.values())
def test_every_parameter_learns_and_has_a_layer(kind):
    model = small(kind, num_classes=3, relative=kind is ViL)
    (model(torch.randn(4, 3, 24, 24)) * torch.randn(4, 3)).sum().backward()
    still = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    # A stage's global tokens end with it, so what they look at in its last block does not matter.
    assert still == (["layer1.1.attn.g2g_relative_position_bias"] if kind is ViL else [])
    layers = {name: layer_of(model, name) for name, _ in model.named_parameters()}
    assert set(layers.values()) == {0, 1, 2, 3, 4}
    first, second = dict(vil=("layer1.0.", "layer2.0."), cvt=("stage0.0.", "stage1.0."))[kind.__name__.lower()]
    assert {n for name, n in layers.items() if name.startswith(first)} == {0}
    assert {n for name, n in layers.items() if name.startswith(second)} == {1}      # it belongs to the block before
    assert {n for name, n in layers.items() if name.startswith(("norm", "head"))} == {4}


@pytest.mark.parametrize("kind", KINDS.values())
def test_drop_path(kind):
    model, img = small(kind, drop_path=0.5), torch.randn(2, 3, 24, 24)
    rates = [m.rate for m in model.modules() if hasattr(m, "rate")]
    assert rates == [0, 0, 0.25, 0.25, 0.5, 0.5]                # attention and MLP of a block have the same
    assert torch.equal(model.eval()(img), model(img)) and not torch.equal(model.train()(img), model(img))


# ----------------------------------------------------------------------------------------------------------------
# As their users run them


def arguments(model):
    at = TINY.index("--model")
    return [*TINY[:at + 1], model, *TINY[at + 2:]]


@pytest.mark.parametrize("model", ["vil_mini", "cvt_mini"])
def test_stopped_and_resumed_is_bitwise_the_same(model, classes, tmp_path, monkeypatch, brief):
    args = ["--model", model, "--data", classes, "--epochs", 2, "--region-from", 1, "--drop-path", 0.1]
    whole = train(tmp_path / "whole", *args)
    check, count = runtime.run.StopCheck.__call__, iter(range(10 ** 6))

    def stop_at(self, *arguments):
        reason, log_now = check(self, *arguments)
        return "signal" if next(count) == 6 else reason, log_now
    monkeypatch.setattr(runtime.run.StopCheck, "__call__", stop_at)
    with pytest.raises(SystemExit) as stop:
        train(tmp_path / "broken", *args)
    assert stop.value.code == 0
    monkeypatch.setattr(runtime.run.StopCheck, "__call__", check)
    broken = train(tmp_path / "broken", *args)
    assert [r["loss"] for r in broken] == [r["loss"] for r in whole] and len(whole) == 10
    same_run(tmp_path / "whole", tmp_path / "broken")
    encoder = load_encoder(str(tmp_path / "whole" / "encoder.pt"), say=str)
    assert type(encoder) is KINDS[model[:3]] and encoder.config["window"] == 2


@pytest.mark.slow
@pytest.mark.parametrize("model, world", [("vil_mini", 2), ("cvt_mini", 2)])
def test_killed_and_resumed_is_bitwise_the_same(model, world, classes, tmp_path):
    args = ["--data", classes, *arguments(model), "--epochs", 8, "--region-from", 3]            # 40 steps
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


def test_recipes():
    for model in ("vil_tiny", "cvt_tiny"):                      # as published
        cfg = esvit.complete(esvit.parse(esvit.Config, "esvit", "", esvit.RECIPES, esvit.DEMO, ["--model", model]))
        assert (cfg.batch_size, cfg.epochs, cfg.region_from, cfg.drop_path, cfg.window) == (1024, 300, 200, 0.1, 7)
    assert VILS["vil_tiny"]["mode"] == 1


@pytest.mark.parametrize("model, args, words", [
    ("vil_mini", ["--local-size", "7"], "patches of 4 do not tile a 7x7"),
    ("vil_mini", ["--local-size", "4", "--window", "1"], "--window must be at least 2"),
    ("cvt_mini", ["--heads", "3"], "--heads is an option of a ViT"),
    ("vil_mini", ["--patch-size", "8", "--local-size", "8"], "8x8 image is too small for 2 stages of a ViL")])
def test_bad_options(model, args, words, classes, tmp_path, brief):
    with pytest.raises(SystemExit, match=words):
        train(tmp_path, "--model", model, "--data", classes, "--epochs", 2, *args)


def saved(path, model, **config):
    torch.save(dict(method="esvit", model=model.state_dict(), config=dict(model.config, **config)), path)
    return str(path)


@pytest.mark.parametrize("kind", KINDS.values())
def test_files(kind, tmp_path):
    """encoder.pt, official files (all tensors, no config) behind prefixes, another image size, what is refused."""
    model = small(kind, img_size=(24, 32), num_classes=3).eval()
    img = torch.randn(2, 3, 24, 32)
    path = saved(tmp_path / "encoder.pt", model)
    again = load_encoder(path, say=str)
    assert torch.equal(again(img), model.features(img))
    for name, value in encoder_options(read(path)).items():
        assert value == model.config[name], name
    larger = load_encoder(path, say=str, img_size=(32, 32))
    assert larger.config["img_size"] == (32, 32) and larger(torch.randn(1, 3, 32, 32)).isfinite().all()
    official = kind(**(VILS["vil_tiny"] if kind is ViL else CVTS["cvt_tiny"]) | dict(depths=(1, 1, 1, 1)))
    state = official.state_dict()
    if kind is ViL:
        state |= {k.replace(part, f"{part}_global"): t for k, t in state.items() for part in ("query", "kv")
                  if f".{part}." in k}
        state["layer1.1.attn.relative_position_index"] = torch.zeros(49, 441, dtype=torch.long)
    torch.save(dict(student={f"module.{k}": t for k, t in state.items()}), tmp_path / "official.pth")
    if kind is CvT:                                             # only published widths and depths tell the heads
        with pytest.raises(SystemExit, match="does not say the heads of each stage"):
            load_encoder(str(tmp_path / "official.pth"), say=str)
    else:
        found = load_encoder(str(tmp_path / "official.pth"), say=str)
        assert found.config["heads"] == (3, 6, 12, 24) and found.config["share"] and found.config["window"] == 7
        assert found.config["img_size"] == (224, 224)
    first = next(name for name in model.state_dict() if name.endswith("mlp.fc2.weight") or ".net.2.weight" in name)
    short = {k: t for k, t in model.state_dict().items() if k != first}
    torch.save(dict(model=short, config=model.config), tmp_path / "short.pt")
    with pytest.raises(SystemExit, match="lacks"):
        load_encoder(str(tmp_path / "short.pt"), say=str)


def test_heads_of_a_cvt_must_agree(tmp_path):
    """Its tensors fit with any heads."""
    file = read(saved(tmp_path / "a.pt", small(CvT)))
    with pytest.raises(SystemExit, match=r"trained with \(2, 3\) heads and the network here has \(1, 3\)"):
        load_into(small(CvT, heads=(1, 3)), file, str)


@pytest.mark.parametrize("model", ["vil_mini", "cvt_mini"])
def test_downstream(model, classes, tmp_path):
    """Fine-tuning, its evaluation, the probes, correspondences, attention, safetensors; ONNX is test_onnx."""
    options = dict({**VILS, **CVTS}[model], img_size=16, window=2)
    file = saved(tmp_path / "encoder.pt", KINDS[model[:3]](**options))
    common = ["--data", str(classes), "--workers", "0", "--device", "cpu"]
    finetune.main(["--init", file, *common, "--epochs", "1", "--batch-size", "8", "--out", str(tmp_path / "ft")])
    best = str(tmp_path / "ft" / "best.pt")
    finetune.main(["--eval", best, *common])
    for protocol in (["--protocol", "knn"], ["--protocol", "dino", "--epochs", "1", "--batch-size", "8"]):
        probe.main([file, *protocol, *common, "--out", str(tmp_path / protocol[1])])
    with pytest.raises(SystemExit, match="has no cls token"):
        probe.main([file, "--pool", "cls", *common, "--out", str(tmp_path / "cls")])
    for command in ("correspond", "attention", "summary"):
        files = ["--data", str(classes), "--workers", "0", "--device", "cpu"] if command != "summary" else []
        analyze.main([command, file, *files, "--out", str(tmp_path / "analyze")])
    with pytest.raises(SystemExit, match=f"has the network {KINDS[model[:3]].__name__}, which timm does not support"):
        export.export(best, "timm")
    pytest.importorskip("safetensors", reason="safetensors is not installed")
    out = export.export(best, "safetensors")
    ours, theirs = (load_encoder(path, say=str) for path in (best, out))
    img = torch.randn(2, 3, 16, 16)
    assert torch.equal(ours(img), theirs(img))


@pytest.mark.parametrize("kind", KINDS.values())
def test_onnx(kind, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    model = small(kind, num_classes=3).eval()
    out = export.export(saved(tmp_path / "a.pt", model), "onnx")
    img = torch.randn(3, 3, 24, 24)
    logits, = onnxruntime.InferenceSession(out).run(None, dict(image=img.numpy()))
    torch.testing.assert_close(torch.from_numpy(logits), model(img).detach(), rtol=1e-4, atol=1e-5)
