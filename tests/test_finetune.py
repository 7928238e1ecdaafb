"""finetune.py: recorded runs of the reference implementations, the recipes' laws, and real processes."""
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import write_images
from golden import FOLDER, Golden, close, close_grads, needs_golden, read_json
from test_runs import finish, kill_9, rows, same_state, start, wait_for

import finetune
import training
from augment import soft_targets
from finetune import classifier, evaluate, layer_groups, objective, start_from
from sources import find
from vit import MODELS, SWINS, Swin, TwoHeads, ViT, relative_index, resize_relative

ROOT = Path(__file__).parents[1]
TINY = ("--model vit_mini --img-size 16 --patch-size 4 --batch-size 8 --workers 0 --log-every 1 --save-every 3 "
        "--epochs 3 --eval-every 1 --min-crop 0.5").split()


def config(*argv):
    return finetune.resolve(*training.parse(finetune.Config, "", [*map(str, argv)]))


def small(kind=ViT, **options):
    torch.manual_seed(0)
    return kind(**{**dict(img_size=16, patch_size=4, dim=24, depth=3, heads=3, num_classes=5, positions="learned",
                          readout="avg"), **options})


# ----------------------------------------------------------------------------------------------------------------
# Against recordings


def recorded(name, kind=ViT, **options):
    g = Golden(name)
    c = g.config
    model = kind(c["img_size"], c["patch_size"], 3, c["embed_dim"], c["depth"], c["num_heads"], c["mlp_ratio"],
                 c["num_classes"], "learned", "avg" if c["global_pool"] else "cls", **options)
    model.load_state_dict(g.under("state"))
    return g, c, model


@needs_golden
def test_relative_positions_of_mae_lite():
    g, _, model = recorded("maelite_rpe_ft", relative=True, layer_scale=0.1, key_bias=False)
    assert torch.equal(model.blocks[0].attn.relative_position_index, g("out/relative_position_index"))
    img = g("input/imgs")
    close(model.features(img), g("out/features"), 1e-5)
    logits = model(img)
    close(logits, g("out/logits"), 1e-5)
    loss = F.cross_entropy(logits, g("input/soft_target"))
    close(loss, g("out/loss"), 1e-5)
    loss.backward()
    close_grads(model, g.under("grad"), 5e-5)


@needs_golden
@pytest.mark.parametrize("kind", ["hard", "soft"])
def test_label_distillation_of_mae_lite(kind):
    g, c, model = recorded(f"maelite_vit_ft_distill_{kind}", TwoHeads)
    cfg = config("--distill-teacher", "x", "--distill", kind, "--distill-alpha", c["alpha"], "--distill-tau", c["tau"])
    out = model(g("input/imgs"))
    close(out[0], g("out/logits"), 1e-5)
    close(out[1], g("out/logits_kd"), 1e-5)
    targets = soft_targets(g("input/labels"), c["num_classes"], c["smoothing"])
    loss = objective(cfg, out, targets, g("input/teacher_logits"))
    close(loss, g("out/loss"), 1e-5)
    loss.backward()
    close_grads(model, g.under("grad"), 5e-5)
    close(model.eval()(g("input/imgs")), g("out/eval_logits"), 1e-5)


@needs_golden
@pytest.mark.parametrize("file, row, options, decay", [
    ("paramgroups_mae", "finetune/vit_base_patch16/gap/layer_decay=0.65/weight_decay=0.05", "--model vit_base", 0.65),
    ("paramgroups_mae", "finetune/vit_base_patch16/cls/layer_decay=0.75/weight_decay=0.05",
     "--model vit_base --readout cls", 0.75),
    ("paramgroups_maelite", "finetuning_mae_exp/vit_tiny_patch16/gap/layer_decay=0.85/weight_decay=0.05",
     "--recipe default", 0.85),
    ("paramgroups_maelite", "finetuning_exp/vit_tiny_patch16/gap/layer_decay=0.85/weight_decay=0.05", "", 0.85),
    ("paramgroups_maelite", "finetuning_rpe_exp/vit_tiny_patch16_rpe/abs+rel/layer_decay=0.85/weight_decay=0.05",
     "--recipe rpe", 0.85)])
def test_parameter_groups(file, row, options, decay):
    model = finetune.build(config(*options.split()), 1000)
    names = {p: name for name, p in model.named_parameters()}
    ours = {names[p]: (round(group["lr_scale"], 12), group["weight_decay"])
            for group in layer_groups(model, 0.05, decay) for p in group["params"]}
    theirs = {name: (round(v["lr_scale"], 12), v["weight_decay"]) for name, v in read_json(file)[row].items()}
    assert ours == theirs


@needs_golden
def test_trajectory():
    """Thirty steps: layer-wise rates, label smoothing, clipping, fused AdamW; loss before each, weights after."""
    g, c, model = recorded("traj_mae_finetune")
    cfg = config("--layer-decay", c["layer_decay"], "--weight-decay", c["weight_decay"])
    optimizer = finetune.make_optimizer(cfg, model, c["lr"])
    scaler, steps = torch.amp.GradScaler("cpu", enabled=False), c["epochs"] * c["n_batches"]
    rates = sorted(zip(g("out/group_lr_scale").tolist(), g("out/group_weight_decay").tolist()))
    ours = sorted((group["lr_scale"], group["weight_decay"]) for group in optimizer.param_groups)
    assert torch.tensor(ours).allclose(torch.tensor(rates), rtol=1e-6)
    for step in range(steps):
        lr = training.warmup_cosine(step, steps, c["warmup_epochs"] * c["n_batches"], c["lr"], c["min_lr"])
        training.set_lr(optimizer, lr)
        assert max(group["lr"] for group in optimizer.param_groups) == pytest.approx(
            g("out/lr_per_group")[step].max().item(), rel=1e-9)
        targets = soft_targets(g("input/labels")[step % c["n_batches"]], c["num_classes"], c["smoothing"])
        loss = objective(cfg, model(g("input/imgs")[step % c["n_batches"]]), targets, None)
        loss.backward()
        norm, skipped = training.finite_step(optimizer, scaler, c["clip_grad"])
        optimizer.zero_grad()
        reference = g("out/loss")[step].item()
        assert not skipped
        assert abs(loss.item() - reference) <= max(20 * g("dev64/out/loss")[step].item(), 1e-5 * reference)
        assert norm.item() == pytest.approx(g("out/grad_norm_before_clip")[step].item(), rel=2e-4)  # fp32 noise
    state = model.state_dict()
    for key, after in g.under("after").items():
        allowed = max(20 * g(f"dev64/after/{key}").max().item(), 1e-5 * after.abs().max().item())
        assert (state[key] - after).abs().max().item() <= allowed, key


@needs_golden
@pytest.mark.parametrize("row, options", [
    ("finetune_gap", ""), ("rpe_abs+rel", "--recipe rpe"), ("finetune_gap_distilled", "--distill-teacher x")])
def test_shapes_of_mae_lite(row, options):
    """Names and shapes at full size."""
    model = finetune.build(config(*options.split()), 1000)
    theirs = read_json("shapes_maelite")[f"vit_tiny_patch16_{row}_1000"]["state"]
    assert {k: list(v.shape) for k, v in model.state_dict().items()} == {k: v for k, v, *_ in theirs}


@needs_golden
def test_an_mae_lite_file_starts_an_rpe_network():
    """qkv.bias of the file is dropped, q and v start without, branches at a tenth: the features are the reference's."""
    g = Golden("ckpt_maelite_last_epoch")
    c, said = g.config, []
    model = ViT(c["img_size"], c["patch_size"], 3, c["student"]["embed_dim"], c["student"]["depth"],
                c["student"]["num_heads"], num_classes=3, positions="learned", readout="avg", relative=True,
                layer_scale=0.1, key_bias=False)
    start_from(model, str(FOLDER / "ckpt_maelite_last_epoch_ckpt.pth"), said.append)
    assert "attn.qkv.bias" in said[0]
    close(model.features(g("input/imgs")), g("out/features_rpe"), 1e-5)


# ----------------------------------------------------------------------------------------------------------------
# Laws that a fresh clone can check


def test_closed_form_numbers():
    """The classifier and the RPE classifier filled by a rule, in float64, to eight digits."""
    img = torch.sin(0.1 * torch.arange(2 * 3 * 32 * 32, dtype=torch.float64)).view(2, 3, 32, 32)
    for options, readout, expected in [
            ({}, "avg", [-0.09848781586259622, 0.17740996447035645, -0.06446382544507293]),
            ({}, "cls", [0.11768495444567098, -0.44954226702319156, 0.6932651150758573]),
            (dict(relative=True, layer_scale=0.1, key_bias=False), "avg",
             [-0.01813307835076002, -0.018731666619081766, -0.07960344163428805])]:
        model = ViT(32, 8, 3, 24, 2, 3, num_classes=5, positions="learned", readout=readout, **options).double()
        names = dict(model.named_parameters())
        for k, name in enumerate(sorted(set(names) - {"pos_embed"})):
            p = names[name].data
            p.copy_(0.05 * torch.sin(k + 0.37 * torch.arange(p.numel()).double()).view(p.shape))
            if name.endswith("weight") and "norm" in name.split(".")[-2]:
                p += 1
        model.pos_embed.data.copy_((0.02 * torch.cos(0.1 * torch.arange(17 * 24).double())).view(1, 17, 24))
        for block in model.blocks if options else ():
            block.gamma_1.data.fill_(0.1), block.gamma_2.data.fill_(0.1)
        torch.testing.assert_close(model(img)[0, :3], torch.tensor(expected, dtype=torch.float64), rtol=1e-8,
                                   atol=1e-10)


def test_relative_index():
    assert relative_index(2, 2).tolist() == [[11, 9, 9, 9, 9], [10, 4, 3, 1, 0], [10, 5, 4, 2, 1], [10, 7, 6, 4, 3],
                                             [10, 8, 7, 5, 4]]
    assert relative_index(2, 3)[1].tolist() == [16, 7, 6, 5, 2, 1, 0]


def test_relative_positions_depend_on_the_offset_alone():
    """The table's rows act as the sum q k^T + b(query - key) does, also for a slice of queries and as logits."""
    model = small(relative=True, img_size=(16, 24)).eval()
    for block in model.blocks:
        torch.nn.init.normal_(block.attn.relative_position_bias_table)
    x, attn = torch.randn(2, 25, 24), model.blocks[0].attn
    out, logits = attn(x, with_logits=True)
    torch.testing.assert_close(attn(x), out)
    torch.testing.assert_close(attn(x, first=3), out[:, 3:])
    torch.testing.assert_close(attn.logits(x), logits)
    q, k, _ = (t.view(2, 25, 3, 8).transpose(1, 2) for t in attn.qkv(x).chunk(3, -1))
    share = logits - q @ k.transpose(2, 3) / math.sqrt(8)
    at = {(r, c): 1 + r * 6 + c for r in range(4) for c in range(6)}
    torch.testing.assert_close(share[0, :, at[1, 2], at[0, 4]], share[1, :, at[3, 0], at[2, 2]])
    with pytest.raises(ValueError, match="whole images of its own size"):
        model(torch.randn(1, 3, 16, 16))


def test_tables_of_relative_positions_grow():
    """A table linear in the offsets stays linear inside; cls's rows stay; the same grid returns the same tensor."""
    h, w = 5, 7
    y, x = torch.meshgrid(torch.arange(2 * h - 1.), torch.arange(2 * w - 1.), indexing="ij")
    table = torch.cat([torch.stack([y.flatten(), x.flatten()], 1), torch.full((3, 2), 9.0)])
    assert resize_relative(table, (h, w), (h, w)) is table
    bigger = resize_relative(table, (h, w), (9, 13))
    assert bigger.shape == (17 * 25 + 3, 2) and torch.equal(bigger[-3:], table[-3:])
    rows_ = bigger[:-3].view(17, 25, 2)
    expected = (torch.arange(17) + 0.5) * 9 / 17 - 0.5
    # The cubic of torch, a = -0.75, bends even a straight line, by up to 0.04 of a step.
    torch.testing.assert_close(rows_[4:-4, 12, 0], expected[4:-4], rtol=0, atol=0.05)


@pytest.mark.parametrize("recipe", finetune.RECIPES)
def test_recipes_build_and_learn(recipe, tmp_path):
    """Every row makes a network in which every parameter gets a gradient."""
    cfg = config("--recipe", recipe, "--model", "vit_mini", "--img-size", 16, "--patch-size", 4,
                 *(["--distill-teacher", "x"] if recipe == "distill" else []))
    torch.manual_seed(0)
    model = finetune.build(cfg, 3)
    out = model(torch.randn(4, 3, 16, 16))
    targets = soft_targets(torch.tensor([0, 1, 2, 1]), 3, cfg.smoothing)
    objective(cfg, out, targets, torch.randn(4, 3) if cfg.distill_teacher else None).backward()
    assert not [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert sum(len(g["params"]) for g in layer_groups(model, 0.05, 0.75)) == len(list(model.parameters()))


def test_published_counts():
    count = {name: sum(p.numel() for p in finetune.build(config(*options.split()), 1000).parameters())
             for name, options in (("plain", ""), ("rpe", "--recipe rpe"), ("two", "--distill-teacher x"))}
    assert count == dict(plain=5_717_416, rpe=5_825_128, two=5_910_800)


def test_starts():
    """Head deviations of the recipes; BEiT's shrinking branches; the rates of the published learning-rate rule."""
    for recipe, std in (("improved", 0.02), ("mae_base", 2e-5), ("rpe", 2e-5)):
        torch.manual_seed(0)
        model = finetune.build(config("--recipe", recipe), 1000)
        assert model.head.weight.std().item() == pytest.approx(std, rel=0.02) and not model.head.bias.any()
    spread = [block.mlp.fc2.weight.std().item() * math.sqrt(2 * k) for k, block in enumerate(model.blocks, 1)]
    assert spread == pytest.approx([0.02] * 12, rel=0.02)
    scales = sorted({group["lr_scale"] for group in layer_groups(model, 0.05, 0.85)})
    assert scales == pytest.approx([0.85 ** k for k in range(13, -1, -1)])
    for recipe, peak in (("improved", 4e-3), ("mae_base", 2e-3), ("mae_large", 4e-3), ("transfer", 0.1)):
        cfg = config("--recipe", recipe)
        assert training.plan(cfg, 1_281_167, 1)[1] == pytest.approx(peak)
    assert training.plan(config("--recipe", "transfer", "--blr", 0.01), 50_000, 1)[1] == pytest.approx(0.02)
    assert config("--recipe", "transfer").warmup_epochs == 10 and config("--epochs", 20).warmup_epochs == 2


# ----------------------------------------------------------------------------------------------------------------
# Evaluation


def test_evaluation_is_exact(classes):
    """Against counting by hand, with classes of unequal size and a batch that does not divide them."""
    source = find(str(classes), "val")
    source = type("Part", (), dict(labels=source.labels[:7], classes=source.classes, __len__=lambda s: 7, where="x",
                                   read=staticmethod(source.read), name=staticmethod(source.name)))()
    model = small(num_classes=2)
    torch.nn.init.normal_(model.head.weight)
    mean, std = (0.5,) * 3, (0.25,) * 3
    found = evaluate(model, source, (16, 16), mean, std, torch.device("cpu"), batch=3)
    crops, labels, _ = finetune.CenterCrops(source, (16, 16), 3).__getitems__(range(7))
    logits = model((crops / 255 - 0.5) / 0.25)
    right = (logits.argmax(1) == labels).float()
    assert found["test_acc1"] == pytest.approx(100 * right.mean().item(), abs=1e-6) and found["test_acc5"] == 100
    each = [100 * right[labels == k].mean().item() for k in (0, 1)]
    assert found["test_class_acc"] == pytest.approx(sum(each) / 2, abs=1e-6)
    assert found["test_loss"] == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-5)
    assert model.training                                       # as it was


def test_a_classifier_comes_back_whole(tmp_path):
    """Plain, with relative positions, with two heads, also at another image size; a file without a head is refused."""
    img = torch.randn(2, 3, 16, 16)
    for kind, options in ((ViT, {}), (ViT, dict(readout="cls")), (TwoHeads, {}), (ViT, dict(relative=True)),
                          (ViT, dict(relative=True, layer_scale=0.1, key_bias=False))):
        model = small(kind, **options).eval()
        for p in model.parameters():
            torch.nn.init.normal_(p, std=0.3)
        path = str(tmp_path / "x.pt")
        torch.save(dict(method="finetune", config=dict(model.config), model=model.state_dict()), path)
        back, _ = classifier(path, None, None, str)
        assert type(back) is kind
        torch.testing.assert_close(back(img), model(img))
        assert classifier(path, None, (24, 16), str)[0](torch.randn(1, 3, 24, 16)).shape == (1, 5)
    encoder = small(num_classes=0, readout="cls")
    torch.save(dict(config=encoder.config, model=encoder.state_dict()), path)
    with pytest.raises(SystemExit, match="has no head that fits: it is an encoder"):
        classifier(path, None, None, str)


def test_heads_in_a_file_are_left_out(tmp_path):
    """A projector, and a head that would fit by chance."""
    model, said = small(), []
    state = small(readout="cls").state_dict()
    fresh = model.head.weight.clone()
    torch.save(dict(config=dict(heads=3), model={**state, "head.0.weight": torch.ones(9, 24)}), tmp_path / "x.pt")
    start_from(model, str(tmp_path / "x.pt"), said.append)
    assert torch.equal(model.head.weight, fresh) and torch.equal(model.blocks[2].mlp.fc1.weight,
                                                                 state["blocks.2.mlp.fc1.weight"])
    assert "left out as the recipe wants: head.weight, head.bias, head.0.weight" in said[0]


def test_a_file_tells_the_shape(tmp_path):
    """--init of an encoder of 24 pixels and patch 8, one channel: nothing else need be said."""
    model = ViT(24, 8, 1, **{k: MODELS["vit_midi"][k] for k in ("dim", "depth", "heads")})
    path = tmp_path / "x.pt"
    torch.save(dict(config=dict(model.config, mean=(0.4,), std=(0.3,)), model=model.state_dict()), path)
    cfg = config("--init", path)
    assert (cfg.mean, cfg.std) == ((0.4,), (0.3,))
    assert (cfg.model, cfg.heads, cfg.patch_size, cfg.in_chans, cfg.img_size) == ("vit_midi", 8, 8, 1, (24, 24))
    assert config("--init", path, "--img-size", 32).img_size == (32, 32)
    assert config("--demo", "--init", path).patch_size == 8


def test_layers_of_a_swin():
    """Blocks count through the stages; a merging learns at the rate of the block before it."""
    model = finetune.build(config("--model", "swin_mini", "--img-size", 32), 7)
    names = {p: name for name, p in model.named_parameters()}
    found = {names[p]: round(math.log(group["lr_scale"], 0.5)) for group in layer_groups(model, 0.05, 0.5)
             for p in group["params"]}
    assert found.keys() == set(names.values()) and set(found.values()) == set(range(8))
    order = [name for name in found if name.endswith(("norm1.weight", "downsample.norm.weight"))]
    assert sorted((7 - found[name], name) for name in order) == [
        (1, "layers.0.blocks.0.norm1.weight"), (2, "layers.0.blocks.1.norm1.weight"),
        (2, "layers.0.downsample.norm.weight"), (3, "layers.1.blocks.0.norm1.weight"),
        (4, "layers.1.blocks.1.norm1.weight"), (4, "layers.1.downsample.norm.weight"),
        (5, "layers.2.blocks.0.norm1.weight"), (6, "layers.2.blocks.1.norm1.weight")]
    assert found["patch_embed.norm.weight"] == 7 and found["norm.weight"] == found["head.bias"] == 0
    assert sum(p.numel() for p in finetune.build(config("--model", "swin_tiny"), 1000).parameters()) == 28_288_354
    assert config("--model", "swin_lite").recipe == "improved" and config("--model", "swin_lite").window == 7


def test_a_swin_is_fine_tuned(classes, tmp_path, monkeypatch, capsys):
    """From EsViT's encoder, whose tensors all arrive; judged anew from its file; refused where it has no place."""
    monkeypatch.setitem(SWINS, "swin_mini", dict(dim=8, depths=(1, 2), heads=(1, 2), window=2))
    swin, path = Swin(16, 4, **SWINS["swin_mini"]), tmp_path / "encoder.pt"
    torch.save(dict(method="esvit", config=dict(swin.config, mean=(0.4,) * 3, std=(0.3,) * 3),
                    model=swin.state_dict()), path)
    masks = {"layers.1.blocks.1.attn_mask": torch.zeros(1)}
    torch.save(dict(model=swin.state_dict() | masks), tmp_path / "official.pth")
    official = finetune.build(config("--init", tmp_path / "official.pth"), 2)
    assert official.norm.eps == 1e-5 and finetune.build(config("--model", "swin_mini"), 2).norm.eps == 1e-6
    args = [arg for arg in TINY if arg not in ("--model", "vit_mini")]
    cfg = config("--init", path, *args)
    assert (cfg.model, cfg.window, cfg.img_size, cfg.mean) == ("swin_mini", 2, (16, 16), (0.4,) * 3)
    model = finetune.build(cfg, 2)
    start_from(model, str(path), str)
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in swin.state_dict().items())
    finetune.main(["--init", str(path), "--data", str(classes), *args, "--epochs", "1", "--out", str(tmp_path / "a")])
    assert "missing, so fresh: head.weight, head.bias; not expected: none" in capsys.readouterr().out
    told = rows(tmp_path / "a")[-1]
    finetune.main(["--eval", str(tmp_path / "a/encoder.pt"), "--data", str(classes), "--workers", "0"])
    assert f"top-1 {told['test_acc1']:.3f}%" in capsys.readouterr().out
    assert "--heads is an option of a ViT, and the model is swin_mini" in refused("--init", path, "--heads", 2)
    assert "--readout is an option of a ViT" in refused("--model", "swin_tiny", "--readout", "cls")
    assert "--distill-teacher is an option of a ViT" in refused("--model", "swin_tiny", "--distill-teacher", path)
    assert "--window is an option of a Swin, and the model is vit_tiny" in refused("--window", 7)


# ----------------------------------------------------------------------------------------------------------------
# Runs


@pytest.mark.parametrize("world, options", [
    (1, ["--optimizer", "sgd", "--mixup", 0.8, "--cutmix", 1, "--ema", 0.9, "--rand-augment", 9, "--accum", 2]),
    pytest.param(2, ["--recipe", "rpe", "--warmup-epochs", 0, "--erase", 0.5, "--drop-path", 0.1],
                 marks=pytest.mark.slow)])
def test_killed_and_resumed_is_bitwise_the_same(classes, tmp_path, world, options):
    args = ["--data", classes, *TINY, *options]
    finish(*args, "--out", tmp_path / "whole", world=world, script="finetune.py")
    process = start(*args, "--out", tmp_path / "broken", world=world, script="finetune.py")
    wait_for(process, tmp_path / "broken", 8)
    kill_9(process)
    finish(*args, "--out", tmp_path / "broken", world=world, script="finetune.py")
    same_state(tmp_path / "whole", tmp_path / "broken")
    judged = [{r["step"]: r["test_loss"] for r in rows(tmp_path / name) if "test_acc1" in r}
              for name in ("whole", "broken")]
    assert judged[0] == judged[1] and set(judged[0]) == {5, 10, 15}
    assert torch.load(tmp_path / "whole/best.pt")["config"]["classes"] == ["a", "b"]


def refused(*argv):
    with pytest.raises(SystemExit) as stop:
        finetune.main([*map(str, argv)])
    return str(stop.value.code)


def test_what_cannot_be_run_is_said(classes, tmp_path):
    flat = tmp_path / "flat"
    write_images(flat, 3)
    assert "has no labels" in refused("--data", flat, *TINY, "--out", tmp_path / "a")
    write_images(tmp_path / "alone/train/a", 8)
    assert "no val/ beside it" in refused("--data", tmp_path / "alone", *TINY, "--out", tmp_path / "a")
    write_images(tmp_path / "alone/val/b", 2)
    assert "must be the same: a, b not in both" in refused("--data", tmp_path / "alone", *TINY, "--out", tmp_path / "a")
    assert "--recipe x is not one of improved" in refused("--recipe", "x")
    assert "--smoothing is at most" in refused("--smoothing", 1)
    assert "--distill-tau needs a teacher" in refused("--distill-tau", 2)
    assert "done by the workers" in refused("--rand-augment", 9, "--in-chans", 4)
    assert "--fraction is above 0" in refused("--data", classes, *TINY, "--fraction", 0, "--out", tmp_path / "a")
    assert "does not exist: a checkpoint" in refused("--init", tmp_path / "none.pt")
    model = small(num_classes=3)
    torch.save(dict(config=model.config, model=model.state_dict()), tmp_path / "three.pt")
    assert "tells 3 classes apart (), " in refused("--eval", tmp_path / "three.pt", "--data", classes)
    assert "knows 3 classes, the data has 2" in refused(
        "--data", classes, *TINY, "--out", tmp_path / "a", "--distill-teacher", tmp_path / "three.pt")
    assert "none of vit_mini" in refused("--init", tmp_path / "three.pt")


def test_scratch_teacher_evaluation(classes, tmp_path, capsys):
    """A student of a ViT and of a torchvision network, through main; --eval repeats the last accuracy on two processes
    and at another size; another teacher on resume is refused."""
    from torchvision.models import get_model
    args = ["--data", classes, *TINY, "--epochs", 1]
    finetune.main([*map(str, args), "--out", str(tmp_path / "t")])
    told = rows(tmp_path / "t")[-1]
    assert told["test_acc5"] == 100 and told["step"] == 5
    text = finish("--eval", tmp_path / "t/encoder.pt", "--data", classes, "--workers", 0, world=2, script="finetune.py")
    assert f"top-1 {told['test_acc1']:.3f}%" in text and f"loss {told['test_loss']:.4f}" in text
    finetune.main(["--eval", str(tmp_path / "t/best.pt"), "--data", str(classes), "--img-size", "24", "--workers", "0"])
    assert "24x24 pixels: top-1" in capsys.readouterr().out
    torch.save(get_model("mobilenet_v3_small", num_classes=2).state_dict(), tmp_path / "m.pth")
    for k, teacher in enumerate((tmp_path / "t/best.pt", f"mobilenet_v3_small:{tmp_path / 'm.pth'}")):
        finetune.main([*map(str, args), "--distill-teacher", str(teacher), "--out", str(tmp_path / f"s{k}"),
                       "--img-size", "32", "--distill", ("hard", "soft")[k]])
        assert type(classifier(str(tmp_path / f"s{k}/encoder.pt"), None, None, str)[0]) is TwoHeads
    assert "is not the teacher that this run began with" in refused(
        *args, "--distill-teacher", teacher, "--out", tmp_path / "s0", "--img-size", "32")
    assert "and a plain state dict of it were expected" in refused(
        *args, "--distill-teacher", f"resnet18:{tmp_path / 'm.pth'}", "--out", tmp_path / "s3")


def test_a_signal_during_an_evaluation_loses_nothing(classes, tmp_path):
    """The evaluation is left, the run ends with 0, and the next start judges the same step."""
    code = ("import os, signal, sys; sys.path.insert(0, '.'); import finetune, training; was = finetune.normalize\n"
            "def normalize(*args):\n"
            "    if sys._getframe(1).f_code.co_name == 'evaluate': os.kill(os.getpid(), signal.SIGTERM)\n"
            "    return was(*args)\n"
            "finetune.normalize = normalize; training.launch(lambda: finetune.main(sys.argv[1:]))")
    args = ["--data", str(classes), *TINY, "--out", str(tmp_path)]
    done = subprocess.run([sys.executable, "-c", code, *args], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "stopped by a signal after step 5" in done.stdout, done.stderr
    assert not [row for row in rows(tmp_path) if "test_acc1" in row]
    finetune.main(args)
    assert [row["step"] for row in rows(tmp_path) if "test_acc1" in row] == [5, 10, 15]


def test_demo_and_help():
    text = finish("--help", script="finetune.py")
    assert "row of the table of recipes" in text
    cfg = config("--demo")
    assert cfg.data == "shapes" and cfg.img_size == (48, 48) and cfg.recipe == "small"
