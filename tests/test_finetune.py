"""finetune.py: recorded runs of the reference implementations, the recipes' laws, and real processes."""
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import write_images
from golden import FOLDER, Golden, close, close_grads, each_recording, needs_golden, read_json, recordings
from test_parity import rows_of, vit_config
from test_runs import finish, kill_9, rows, same_state, start, wait_for
from test_runtime import Source

import finetune
from data import CenterCrops, decode
from finetune import (
    LabelTeacher,
    evaluate,
    make_classifier,
    make_optimizer,
    objective,
    open_classifier,
    resolve,
    start_from,
)
from images.augment import IMAGENET_MEAN, IMAGENET_STD, normalize
from images.datasets import class_numbers, open_dataset
from images.mixing import soft_targets
from nets.beit import BeitViT, TwoHeads
from nets.naming import PYRAMIDS
from runtime.run import Run, finite_step, warmup_cosine
from vit import MODELS, Swin, ViT

ROOT = Path(__file__).parents[1]
TINY = ("--model vit_mini --img-size 16 --patch-size 4 --batch-size 8 --workers 0 --log-every 1 --save-every 3 "
        "--epochs 3 --eval-every 1 --min-crop 0.5").split()


def config(*argv):
    return resolve([*map(str, argv)])


def small(kind=ViT, **options):
    torch.manual_seed(0)
    return kind(**{**dict(img_size=16, patch_size=4, dim=24, depth=3, heads=3, num_classes=5, positions="learned",
                          pool="avg"), **options})


# ----------------------------------------------------------------------------------------------------------------
# Against recordings. Sizes, rates and what there is to compare come from the files.


def recorded(name, kind=ViT):
    g = Golden(name)
    model = kind(**vit_config(g.config), num_classes=g.config["num_classes"], positions="learned",
                 pool="avg" if g.config["global_pool"] else "cls")
    model.load_state_dict(g.under("state"))
    return g, g.config, model


@each_recording("maelite_vit_ft_distill_*")
def test_label_distillation_of_mae_lite(name):
    g, c, model = recorded(name, TwoHeads)
    cfg = config("--distill-teacher", "x", "--distill", c["distill_type"], "--distill-alpha", c["alpha"],
                 "--distill-tau", c["tau"])
    out = model(g("input/imgs"))
    close(out[0], g("out/logits"), 1e-5)
    close(out[1], g("out/logits_kd"), 1e-5)
    targets = soft_targets(g("input/labels"), c["num_classes"], c["smoothing"])
    loss = objective(cfg, out, targets, g("input/teacher_logits"))
    close(loss, g("out/loss"), 1e-5)
    loss.backward()
    close_grads(model, g.under("grad"), 5e-5)
    close(model.eval()(g("input/imgs")), g("out/eval_logits"), 1e-5)


# The recipes of the experiments that have one of their own; the others are the model's.
RECIPE_OF_EXPERIMENT = {"finetuning_mae_exp": "default", "finetuning_rpe_exp": "rpe"}


def options_of_network(row, names):
    """The command line of the network that a recorded row is about: named like vit_base_patch16, its pool by norms."""
    model = next(model for model in MODELS if model in row)
    return ["--model", model, "--patch-size", re.search(r"patch(\d+)", row)[1], "--pool",
            "avg" if "fc_norm.weight" in names else "cls"]


def fine_tuning_rows():
    """(file, row) of all recorded parameter groups of fine-tuned ViTs with absolute positions."""
    found = []
    for name in recordings("paramgroups_*", ext="json"):
        for row, groups in read_json(name).items():
            if row.startswith("finetun") and "pos_embed" in groups and not any("rel_pos_bias" in n for n in groups):
                found.append((name, row))
    return found


@needs_golden
@pytest.mark.parametrize("file, row", fine_tuning_rows())
def test_parameter_groups(file, row):
    reference = read_json(file)[row]
    rates = re.search("layer_decay=([^/]+)/weight_decay=([^/]+)", row)
    options = ["--layer-decay", rates[1], "--weight-decay", rates[2], *options_of_network(row, reference)]
    if row.split("/")[0] in RECIPE_OF_EXPERIMENT:
        options += ["--recipe", RECIPE_OF_EXPERIMENT[row.split("/")[0]]]
    cfg = config(*options)
    model = make_classifier(cfg, 10)
    names = {p: name for name, p in model.named_parameters()}
    ours = {names[p]: (round(group["lr_scale"], 12), group["weight_decay"])
            for group in make_optimizer(cfg, model, 1.0).param_groups for p in group["params"]}
    assert ours == {name: (round(v["lr_scale"], 12), v["weight_decay"]) for name, v in reference.items()}


@each_recording("traj_mae_finetune*")
def test_trajectory(name):
    """Some steps: layer-wise rates, label smoothing, clipping, fused AdamW; loss before each, weights after."""
    g, c, model = recorded(name)
    cfg = config("--layer-decay", c["layer_decay"], "--weight-decay", c["weight_decay"])
    optimizer = make_optimizer(cfg, model, c["lr"])
    for group in optimizer.param_groups:
        group["betas"] = tuple(c["betas"])
    scaler, steps = torch.amp.GradScaler("cpu", enabled=False), len(g("out/loss"))
    run = SimpleNamespace(optimizer=optimizer)
    rates = sorted(zip(g("out/group_lr_scale").tolist(), g("out/group_weight_decay").tolist()))
    ours = sorted((group["lr_scale"], group["weight_decay"]) for group in optimizer.param_groups)
    assert torch.tensor(ours).allclose(torch.tensor(rates), rtol=1e-6)
    for step in range(steps):
        batch = step % c["n_batches"]
        lr = warmup_cosine(step, c["epochs"] * c["n_batches"], c["warmup_epochs"] * c["n_batches"], c["lr"],
                           c["min_lr"])
        Run.set_lr(run, lr)
        assert max(group["lr"] for group in optimizer.param_groups) == pytest.approx(
            g("out/lr_per_group")[step].max().item(), rel=1e-9)
        targets = soft_targets(g("input/labels")[batch], c["num_classes"], c["smoothing"])
        loss = objective(cfg, model(g("input/imgs")[batch]), targets, None)
        loss.backward()
        norm, skipped = finite_step(optimizer, scaler, c["clip_grad"])
        optimizer.zero_grad()
        reference = g("out/loss")[step].item()
        assert not skipped
        assert abs(loss.item() - reference) <= max(20 * g("dev64/out/loss")[step].item(), 1e-5 * reference)
        assert norm.item() == pytest.approx(g("out/grad_norm_before_clip")[step].item(), rel=2e-4)  # fp32 noise
    state = model.state_dict()
    for key, after in g.under("after").items():
        allowed = max(20 * g(f"dev64/after/{key}").max().item(), 1e-5 * after.abs().max().item())
        assert (state[key] - after).abs().max().item() <= allowed, key


def is_classifier(state):
    """A ViT as it is fine-tuned: with absolute positions, relative ones in every block or none, and a head."""
    return {"pos_embed", "head.weight", "head.bias"} <= state.keys() and "mask_token" not in state and not any(
        name.startswith("rel_pos_bias.") for name in state)


@needs_golden
@pytest.mark.parametrize("file, row", rows_of("shapes_mae*", is_classifier))
def test_shapes_of_fine_tuned_networks(file, row):
    """Names and shapes at full size, as our recipes build them."""
    theirs = {name: shape for name, shape, *_ in read_json(file)[row]["state"]}
    patch = theirs["patch_embed.proj.weight"][-1]
    options = [*options_of_network(row, theirs), "--img-size", math.isqrt(theirs["pos_embed"][1] - 1) * patch]
    if "head_dist.weight" in theirs:
        options += ["--distill-teacher", "x"]
    if "blocks.0.attn.relative_position_bias_table" in theirs:
        options += ["--recipe", "rpe" if "blocks.0.gamma_1" in theirs else "rpe_d2"]
    model = make_classifier(config(*options), theirs["head.weight"][0])
    assert {name: list(tensor.shape) for name, tensor in model.state_dict().items()} == theirs


@each_recording("ckpt_maelite_last_epoch*")
def test_an_mae_lite_file_starts_an_rpe_network(name, capsys):
    """qkv.bias of the file is dropped, q and v start without, branches at a tenth: the features are the reference's."""
    g = Golden(name)
    model = BeitViT(**vit_config({**g.config, **g.config["student"]}), num_classes=g.config["num_classes"],
                    positions="learned", pool="avg", relative=True, layer_scale=0.1, key_bias=False)
    start_from(model, str(FOLDER / g.config["checkpoint"]))
    left_out, missing = capsys.readouterr().out.splitlines()
    assert re.search(rf"left out as the recipe wants: (.*, )?blocks \({g.config['student']['depth']}\)", left_out)
    assert "attn.q_bias" in missing and "qkv" not in missing
    close(model.features(g("input/imgs")), g("out/features_rpe"), 1e-5)


# ----------------------------------------------------------------------------------------------------------------
# Laws that a fresh clone can check


@pytest.mark.parametrize("recipe", finetune.RECIPES)
def test_recipes_build_and_learn(recipe, tmp_path):
    """Every row makes a network in which every parameter gets a gradient."""
    cfg = config("--recipe", recipe, "--model", "vit_mini", "--img-size", 16, "--patch-size", 4,
                 *(["--distill-teacher", "x"] if recipe == "distill" else []))
    torch.manual_seed(0)
    model = make_classifier(cfg, 3)
    out = model(torch.randn(4, 3, 16, 16))
    targets = soft_targets(torch.tensor([0, 1, 2, 1]), 3, cfg.smoothing)
    objective(cfg, out, targets, torch.randn(4, 3) if cfg.distill_teacher else None).backward()
    assert not [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert sum(len(g["params"]) for g in make_optimizer(cfg, model, 1.0).param_groups) == len(list(model.parameters()))


def test_published_counts():
    count = {name: sum(p.numel() for p in make_classifier(config(*options.split()), 1000).parameters())
             for name, options in (("plain", ""), ("rpe", "--recipe rpe"), ("two", "--distill-teacher x"))}
    assert count == dict(plain=5_717_416, rpe=5_825_128, two=5_910_800)


def peak(monkeypatch, out, images, *options):
    """The peak learning rate of a run over a set of so many images."""
    monkeypatch.setattr("runtime.run.train_and_val", lambda *_: (Source(images), None))
    run = Run(config(*options, "--out", out, "--device", "cpu"), "finetune")
    run.datasets()
    return run.peak


def test_starts(monkeypatch, tmp_path):
    """Head deviations of the recipes; BEiT's shrinking branches; the rates of the published learning-rate rule."""
    for recipe, std in (("improved", 0.02), ("mae_base", 2e-5), ("rpe", 2e-5)):
        torch.manual_seed(0)
        model = make_classifier(config("--recipe", recipe), 1000)
        assert model.head.weight.std().item() == pytest.approx(std, rel=0.02) and not model.head.bias.any()
    spread = [block.mlp.fc2.weight.std().item() * math.sqrt(2 * k) for k, block in enumerate(model.blocks, 1)]
    assert spread == pytest.approx([0.02] * 12, rel=0.02)
    cfg = config("--recipe", "rpe")
    scales = sorted({group["lr_scale"] for group in make_optimizer(cfg, model, 1.0).param_groups})
    assert scales == pytest.approx([0.85 ** k for k in range(13, -1, -1)])
    for recipe, expected in (("improved", 4e-3), ("mae_base", 2e-3), ("mae_large", 4e-3), ("transfer", 0.1)):
        assert peak(monkeypatch, tmp_path, 1_281_167, "--recipe", recipe) == pytest.approx(expected)
    assert peak(monkeypatch, tmp_path, 50_000, "--recipe", "transfer", "--blr", 0.01) == pytest.approx(0.02)
    assert config("--recipe", "transfer").warmup_epochs == 10 and config("--epochs", 20).warmup_epochs == 2


# ----------------------------------------------------------------------------------------------------------------
# Evaluation


def test_evaluation_is_exact(classes):
    """Against counting by hand, with classes of unequal size and a batch that does not divide them."""
    source = open_dataset(str(classes), "val")
    source = type("Part", (), dict(labels=source.labels[:7], classes=source.classes, __len__=lambda s: 7, where="x",
                                   read=staticmethod(source.read), name=staticmethod(source.name)))()
    model = small(num_classes=2)
    torch.nn.init.normal_(model.head.weight)
    mean, std = (0.5,) * 3, (0.25,) * 3
    found = evaluate(model, source, (16, 16), mean, std, torch.device("cpu"), batch=3)
    crops, labels, _ = CenterCrops(source, (16, 16), 3).__getitems__(range(7))
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
    for kind, options in ((ViT, {}), (ViT, dict(pool="cls")), (TwoHeads, {}), (BeitViT, dict(relative=True)),
                          (BeitViT, dict(relative=True, layer_scale=0.1, key_bias=False))):
        model = small(kind, **options).eval()
        for p in model.parameters():
            torch.nn.init.normal_(p, std=0.3)
        path = str(tmp_path / "x.pt")
        torch.save(dict(method="finetune", config=dict(model.config), model=model.state_dict()), path)
        back, _ = open_classifier(path, None, None)
        assert type(back) is kind
        torch.testing.assert_close(back(img), model(img))
        assert open_classifier(path, None, (24, 16))[0](torch.randn(1, 3, 24, 16)).shape == (1, 5)
    encoder = small(num_classes=0, pool="cls")
    torch.save(dict(config=encoder.config, model=encoder.state_dict()), path)
    with pytest.raises(SystemExit, match="has no head that fits: it is an encoder"):
        open_classifier(path, None, None)


def test_heads_in_a_file_are_left_out(tmp_path, capsys):
    """A projector, and a head that would fit by chance."""
    model, path = small(), tmp_path / "x.pt"
    state = small(pool="cls").state_dict()
    fresh = model.head.weight.clone()
    torch.save(dict(config=dict(heads=3), model={**state, "head.0.weight": torch.ones(9, 24)}), path)
    start_from(model, str(path))
    assert torch.equal(model.head.weight, fresh)
    assert torch.equal(model.blocks[2].mlp.fc1.weight, state["blocks.2.mlp.fc1.weight"])
    assert "left out as the recipe wants: head (3)" in capsys.readouterr().out


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
    cfg = config("--model", "swin_mini", "--img-size", 32, "--layer-decay", 0.5)
    model = make_classifier(cfg, 7)
    names = {p: name for name, p in model.named_parameters()}
    found = {names[p]: round(math.log(group["lr_scale"], 0.5))
             for group in make_optimizer(cfg, model, 1.0).param_groups for p in group["params"]}
    assert found.keys() == set(names.values()) and set(found.values()) == set(range(8))
    order = [name for name in found if name.endswith(("norm1.weight", "downsample.norm.weight"))]
    assert sorted((7 - found[name], name) for name in order) == [
        (1, "layers.0.blocks.0.norm1.weight"), (2, "layers.0.blocks.1.norm1.weight"),
        (2, "layers.0.downsample.norm.weight"), (3, "layers.1.blocks.0.norm1.weight"),
        (4, "layers.1.blocks.1.norm1.weight"), (4, "layers.1.downsample.norm.weight"),
        (5, "layers.2.blocks.0.norm1.weight"), (6, "layers.2.blocks.1.norm1.weight")]
    assert found["patch_embed.norm.weight"] == 7 and found["norm.weight"] == found["head.bias"] == 0
    assert sum(p.numel() for p in make_classifier(config("--model", "swin_tiny"), 1000).parameters()) == 28_288_354
    assert config("--model", "swin_lite").recipe == "improved" and config("--model", "swin_lite").window == 7


def test_a_swin_is_fine_tuned(classes, tmp_path, monkeypatch, capsys):
    """From EsViT's encoder, whose tensors all arrive; judged anew from its file; refused where it has no place."""
    options = dict(dim=8, depths=(1, 2), heads=(1, 2), window=2)
    monkeypatch.setitem(PYRAMIDS, "swin_mini", (Swin, options))
    swin, path = Swin(16, 4, **options), tmp_path / "encoder.pt"
    torch.save(dict(method="esvit", config=dict(swin.config, mean=(0.4,) * 3, std=(0.3,) * 3),
                    model=swin.state_dict()), path)
    masks = {"layers.1.blocks.1.attn_mask": torch.zeros(1)}
    torch.save(dict(model=swin.state_dict() | masks), tmp_path / "official.pth")
    official = make_classifier(config("--init", tmp_path / "official.pth"), 2)
    assert official.norm.eps == 1e-5 and make_classifier(config("--model", "swin_mini"), 2).norm.eps == 1e-6
    args = [arg for arg in TINY if arg not in ("--model", "vit_mini")]
    cfg = config("--init", path, *args)
    assert (cfg.model, cfg.window, cfg.img_size, cfg.mean) == ("swin_mini", 2, (16, 16), (0.4,) * 3)
    model = make_classifier(cfg, 2)
    start_from(model, str(path))
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in swin.state_dict().items())
    finetune.main(["--init", str(path), "--data", str(classes), *args, "--epochs", "1", "--out", str(tmp_path / "a")])
    assert "missing, so fresh: head.weight, head.bias; not expected: none" in capsys.readouterr().out
    logged = rows(tmp_path / "a")[-1]
    finetune.main(["--eval", str(tmp_path / "a/encoder.pt"), "--data", str(classes), "--workers", "0"])
    assert f"top-1 {logged['test_acc1']:.3f}%" in capsys.readouterr().out
    assert "--heads is no option of swin_mini" in refused("--init", path, "--heads", 2)
    assert "--pool is no option of swin_tiny" in refused("--model", "swin_tiny", "--readout", "cls")
    assert "--distill-teacher is no option of swin_tiny" in refused("--model", "swin_tiny", "--distill-teacher", path)
    assert "--window is no option of vit_tiny" in refused("--window", 7)


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
    whole, broken = ({r["step"]: r["test_loss"] for r in rows(tmp_path / name) if "test_acc1" in r}
                     for name in ("whole", "broken"))
    assert whole == broken and set(whole) == {5, 10, 15}
    assert len([r for r in rows(tmp_path / "whole") if "test_acc1" in r]) == 3                  # of one process
    assert torch.load(tmp_path / "whole/best.pt")["config"]["classes"] == ["a", "b"]


def refused(*argv):
    with pytest.raises(SystemExit) as stop:
        finetune.main([*map(str, argv)])
    return str(stop.value.code)


def test_what_cannot_be_run_is_said(classes, tmp_path):
    flat, alone, out = tmp_path / "flat", tmp_path / "alone", tmp_path / "a"
    write_images(flat, 8)
    assert "has 0 classes and its val/ has 0: fine-tuning needs a folder for each class" in refused(
        "--data", flat, *TINY, "--out", out)
    write_images(alone / "train/a", 8)
    assert "has 1 classes and its val/ has 0" in refused("--data", alone, *TINY, "--out", out)
    write_images(alone / "val/b", 2)
    assert "val has 1 classes that" in refused("--data", alone, *TINY, "--out", out)
    assert "--recipe: invalid choice: 'x'" in refused("--recipe", "x")
    assert "--smoothing must be at most" in refused("--smoothing", 1)
    assert "--distill-tau has no effect without --distill-teacher" in refused("--distill-tau", 2)
    assert "needs --pool avg" in refused("--distill-teacher", "x", "--pool", "cls")
    assert "done by the workers" in refused("--rand-augment", 9, "--in-chans", 4)
    assert "done by the workers" in refused("--rand-augment", 9, "--decode", "device")
    assert "--fraction is above 0" in refused("--data", classes, *TINY, "--fraction", 0, "--out", out)
    assert "does not exist: a checkpoint" in refused("--init", tmp_path / "none.pt")
    model = small(num_classes=3)
    torch.save(dict(config=model.config, model=model.state_dict()), tmp_path / "three.pt")
    assert "tells 3 classes apart (not named), and " in refused("--eval", tmp_path / "three.pt", "--data", classes)
    assert "does not exist" in refused("--eval", tmp_path / "three.pt", "--data", tmp_path / "no")
    write_images(tmp_path / "only/train/a", 2)
    assert "has no images to evaluate on" in refused("--eval", tmp_path / "three.pt", "--data", tmp_path / "only")
    assert "flat has 0 ()" in refused("--eval", tmp_path / "three.pt", "--data", flat)
    assert "knows 3 classes, with mean" in refused(
        "--data", classes, *TINY, "--out", out, "--distill-teacher", tmp_path / "three.pt")
    assert "none of vit_mini" in refused("--init", tmp_path / "three.pt")


def test_a_small_set_makes_the_batch_smaller(tmp_path, capsys):
    """100 images, and a tenth of them, with the recipe's batch of 256: its rule for the learning rate holds, and the
    same command typed again goes on."""
    for name in "ab":
        write_images(tmp_path / "set/train" / name, 50)
        write_images(tmp_path / "set/val" / name, 2)
    args = [arg for arg in TINY if arg not in ("--batch-size", "8")]
    for fraction, images in ((1, 100), (0.1, 10)):
        out = str(tmp_path / str(fraction))
        for _ in range(2):
            finetune.main([*args, "--data", str(tmp_path / "set"), "--out", out, "--fraction", str(fraction)])
            text = capsys.readouterr().out
            assert f"has {images} images, less than one batch: --batch-size is now {images}" in text
        first, *steps = rows(out)
        assert first["config"]["batch_size"] == images and [row["step"] for row in steps if "loss" in row] == [1, 2, 3]
        assert max(row["lr"] for row in steps if "lr" in row) == pytest.approx(1e-3 * images / 256)


def test_scratch_teacher_evaluation(classes, tmp_path, capsys):
    """A student of a ViT and of a torchvision network, through main; --eval repeats the last accuracy on two processes
    and at another size; another teacher on resume is refused."""
    from torchvision.models import get_model
    args = ["--data", classes, *TINY, "--epochs", 1]
    finetune.main([*map(str, args), "--out", str(tmp_path / "t")])
    logged = rows(tmp_path / "t")[-1]
    assert logged["test_acc5"] == 100 and logged["step"] == 5
    text = finish("--eval", tmp_path / "t/encoder.pt", "--data", classes, "--workers", 0, world=2, script="finetune.py")
    assert f"top-1 {logged['test_acc1']:.3f}%" in text and f"loss {logged['test_loss']:.4f}" in text
    finetune.main(["--eval", str(tmp_path / "t/best.pt"), "--data", str(classes), "--img-size", "24", "--workers", "0"])
    assert "24x24 pixels: top-1" in capsys.readouterr().out
    torch.save(get_model("mobilenet_v3_small", num_classes=2).state_dict(), tmp_path / "m.pth")
    for k, teacher in enumerate((tmp_path / "t/best.pt", f"mobilenet_v3_small:{tmp_path / 'm.pth'}")):
        finetune.main([*map(str, args), "--distill-teacher", str(teacher), "--out", str(tmp_path / f"s{k}"),
                       "--img-size", "32", "--distill", ("hard", "soft")[k]])
        assert type(open_classifier(str(tmp_path / f"s{k}/encoder.pt"), None, None)[0]) is TwoHeads
    assert "is not the file that this run began with" in refused(
        *args, "--distill-teacher", teacher, "--out", tmp_path / "s0", "--img-size", "32")
    assert "is no state dict of resnet18 for 2 classes" in refused(
        *args, "--distill-teacher", f"resnet18:{tmp_path / 'm.pth'}", "--out", tmp_path / "s3")


def test_numbers_of_classes():
    """By name, where the classifier stores them; else folders in order, integers in theirs; parts of them too."""
    names = ["cat", "dog", "emu", "fox"]
    assert class_numbers(names, 4, ["cat", "dog", "emu", "fox"]) == [0, 1, 2, 3]
    assert class_numbers(names, 4, ["emu", "fox"]) == [2, 3] and class_numbers(names, 4, ["ant"]) == [None]
    assert class_numbers(["dog", "cat"], 2, ["cat", "dog"]) == [1, 0]
    assert class_numbers(None, 4, ["a", "b", "c", "d"]) == [0, 1, 2, 3] and class_numbers(None, 4, ["a"]) == [None]
    folders = sorted(map(str, range(12)))                       # 0, 1, 10, 11, 2, ...
    assert class_numbers(None, 12, folders) == [int(name) for name in folders]
    from_one = sorted(map(str, range(1, 13)))
    assert class_numbers(None, 12, from_one) == [int(name) - 1 for name in from_one]
    assert class_numbers(None, 1000, ["10", "007", "999"]) == [10, 7, 999] and class_numbers(None, 9, ["9"]) == [None]
    assert class_numbers(folders, 12, folders) == list(range(12))            # stored names win


def test_a_part_of_the_classes_is_evaluated_by_name(tmp_path, capsys):
    """A file that names no classes and folders 0, 1, 10, 11, 2, ...; 2 of its 12 classes; names from a text file. The
    head finds the nearest of twelve images, one of each class."""
    model, images = small(num_classes=12, dim=96).eval(), []
    for k, name in enumerate(map(str, range(12))):
        for split in ("train", "val"):
            write_images(tmp_path / "numbers" / split / name, 1, side=16, seed=k)
        img = decode((tmp_path / "numbers" / "val" / name / "000.png").read_bytes())
        images.append(normalize(img.unsqueeze(0), IMAGENET_MEAN, IMAGENET_STD))
    with torch.no_grad():
        found = model.features(torch.cat(images))               # |x - found|^2 is least where this logit is largest
        model.head.weight.copy_(found * 100)
        model.head.bias.copy_(found.square().sum(1) * -50)
    torch.save(dict(model=model.state_dict(), heads=3), tmp_path / "bare.pt")
    for name in ("2", "10"):
        shutil.copytree(tmp_path / "numbers" / "val" / name, tmp_path / "part" / "val" / name)
    shutil.copytree(tmp_path / "part" / "val", tmp_path / "part" / "train")
    (tmp_path / "names.txt").write_text("".join(f"{k}\n" for k in (2, 10, 0, 1, 3, 4, 5, 6, 7, 8, 9, 11)))

    def evaluated(data, *more):
        finetune.main([*map(str, ["--eval", tmp_path / "bare.pt", "--heads", 3, "--data", tmp_path / data, *more])])
        return capsys.readouterr().out
    text = evaluated("numbers")
    assert "12 images of" in text and "top-1 100.000%" in text
    assert "its classes: they are taken to be, in this order, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11\n" in text
    text = evaluated("part")
    assert "2 images of" in text and "part, 2 of the 12 classes, 16x16 pixels: top-1 100.000%" in text
    shutil.rmtree(tmp_path / "part" / "train")                  # as ImageNet-A and -V2 are laid out
    assert "part, 2 of the 12 classes" in evaluated("part") and "top-1 100.000%" in evaluated("part/val")
    text = evaluated("numbers", "--class-names", tmp_path / "names.txt")
    assert "top-1 8.333%" in text and "does not name" not in text           # 11 alone is where the head has it


def test_class_names_that_cannot_be_read(classes, tmp_path):
    model = small(num_classes=2)
    for name, more in (("bare.pt", {}), ("named.pt", dict(classes=["a", "b"]))):
        torch.save(dict(config=dict(model.config, **more), model=model.state_dict()), tmp_path / name)
    (tmp_path / "latin.txt").write_bytes(b"\xe9\n\xff\n")
    args = ["--data", classes, "--class-names"]
    for path in (tmp_path / "no.txt", tmp_path / "latin.txt"):
        assert "cannot be read as a text file" in refused("--eval", tmp_path / "bare.pt", *args, path)
    assert "leave --class-names out" in refused("--eval", tmp_path / "named.pt", *args, tmp_path / "latin.txt")


def test_a_teachers_classes_are_found_by_name(classes, tmp_path):
    """Its logits in the order of our classes; other classes are refused."""
    model = small(num_classes=2)
    img, found = torch.randn(3, 3, 16, 16), {}
    for name, names in (("same", ["a", "b"]), ("turned", ["b", "a"]), ("none", None), ("other", ["a", "c"])):
        torch.save(dict(config=dict(model.config, classes=names), model=model.state_dict()), tmp_path / name)
        cfg = SimpleNamespace(distill_teacher=str(tmp_path / name), teacher_heads=None, dtype="fp32")
        run = SimpleNamespace(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), device=torch.device("cpu"),
                              train=open_dataset(str(classes)))
        if name == "other":
            with pytest.raises(SystemExit, match=r"tells 2 classes apart \(a, c\), and .* has 2 \(a, b\)"):
                LabelTeacher(cfg, 2, run)
        else:
            found[name] = LabelTeacher(cfg, 2, run)(img)
    assert torch.equal(found["same"], found["none"]) and torch.equal(found["turned"], found["same"].flip(1))
    assert not torch.equal(found["turned"], found["same"])


def test_evaluation_of_the_demos_file(tmp_path, capsys):
    """--eval FILE --demo: on the images that the demo draws, at the size of the file, which is not the demo's."""
    model = small(num_classes=10)
    torch.save(dict(config=model.config, model=model.state_dict()), tmp_path / "best.pt")
    finetune.main(["--eval", str(tmp_path / "best.pt"), "--demo"])
    assert "2,000 images of shapes, 16x16 pixels: top-1" in capsys.readouterr().out


def test_a_signal_during_an_evaluation_loses_nothing(classes, tmp_path):
    """The evaluation is left, the run ends with 0, and the next start evaluates the same step."""
    code = ("import os, signal, sys, time; sys.path.insert(0, '.'); import finetune, runtime.probes, runtime.run\n"
            "def normalize(*args):\n"                            # of evaluation crops; training has its own
            "    os.kill(os.getpid(), signal.SIGTERM)\n"
            "    time.sleep(60)\n"
            "runtime.probes.normalize = normalize; runtime.run.launch(lambda: finetune.main(sys.argv[1:]))")
    args = ["--data", str(classes), *TINY, "--save-every", "99", "--out", str(tmp_path)]
    done = subprocess.run([sys.executable, "-c", code, *args], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "stopped by a signal after step 5" in done.stdout, done.stderr
    assert torch.load(tmp_path / "last.pt")["step"] == 5
    assert not [row for row in rows(tmp_path) if "test_acc1" in row]
    finetune.main(args)
    assert [row["step"] for row in rows(tmp_path) if "test_acc1" in row] == [5, 10, 15]


def test_demo_and_help():
    text = finish("--help", script="finetune.py")
    assert "row of the table of recipes" in text
    cfg = config("--demo")
    assert cfg.data == "shapes" and cfg.img_size == (48, 48) and cfg.recipe == "small"
    assert config("--readout", "cls").pool == config("--pool", "cls").pool == "cls"             # its name before
