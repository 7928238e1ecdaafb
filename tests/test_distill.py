"""Distillation during pre-training: who learns from what, the textbook form, real runs. tests/test_mae_recorded.py
compares it with recorded runs of the reference implementation."""
import os
import shutil
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from test_runs import TINY, finish, rows, same_state, start_and_kill, steps

import distill
import mae
from distill import DistilledMAE, DistillLoss, DistillStudent, LogitsBlock, Teacher, layer_pairs, run_blocks
from mae import MAE
from runtime.options import parse
from runtime.run import decay_groups, finite_step, warmup_cosine
from tools import pictures
from vit import Block, ViT
from weights import load_encoder, load_into, read

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
RUN = SimpleNamespace(mean=MEAN, std=STD, device=torch.device("cpu"), cfg=SimpleNamespace(dtype="fp32"))


def make_student(depth=3, tap=None, heads=4):
    torch.manual_seed(0)
    return MAE(12, 1, 3, tap=tap, img_size=24, patch_size=6, dim=16, depth=depth, heads=heads)


def write_teacher(path, depth=3, dim=24, heads=3, seed=1, **config):
    torch.manual_seed(seed)
    vit = ViT(24, 6, dim=dim, depth=depth, heads=heads)
    with torch.no_grad():
        for p in vit.parameters():                              # attention that says something
            p.add_(torch.randn_like(p) * 0.05 * p.requires_grad)
    torch.save(dict(model=vit.state_dict(), config=dict(heads=heads, img_size=(24, 24), **config)), path)
    return str(path), vit


def make_teacher(path, student, kind="attention", layers=None, heads=None):
    """The teacher of a student; of kind "decoupled", there is one block more to compare."""
    return Teacher(path, heads, kind, layers, student.config, student.depth + (kind == "decoupled"), RUN)


def images(count=2):
    """Images, and an order of their patches."""
    return torch.randn(count, 3, 24, 24), torch.rand(count, 16).argsort(1)


# ----------------------------------------------------------------------------------------------------------------
# The textbook form


def test_thirty_steps_of_the_textbook(tmp_path):
    """Losses before each step and weights after all, against timm's blocks with every logit materialised."""
    pytest.importorskip("timm", reason="the textbook form is built from timm's blocks")
    from textbook import TextbookDistilled, TextbookMAE
    path, vit = write_teacher(tmp_path / "t.pth")
    student = make_student()
    model = DistilledMAE(student, make_teacher(path, student), weight=2.0)
    plain = TextbookMAE(24, 6, 16, 3, 4, 12, 1, 3)
    plain.load_state_dict(student.state_dict())
    plain_teacher = TextbookMAE(24, 6, 24, 3, 3)
    plain_teacher.load_state_dict(vit.state_dict(), strict=False)
    textbook = TextbookDistilled(plain, plain_teacher, 4, 3)
    textbook.adapter.load_state_dict(model.distill_loss.adapters[0].state_dict())
    ours = torch.optim.AdamW(decay_groups(model, 0.05), 1e-3, betas=(0.9, 0.95), fused=True)
    theirs = torch.optim.AdamW(decay_groups(textbook, 0.05), 1e-3, betas=(0.9, 0.95))
    scaler, losses = torch.amp.GradScaler("cpu", enabled=False), []
    for step in range(30):
        torch.manual_seed(step)
        img, noise = torch.randn(4, 3, 24, 24), torch.rand(4, 16)
        for optimizer in (ours, theirs):
            for group in optimizer.param_groups:
                group["lr"] = warmup_cosine(step, 30, 5, 3e-3)
        loss = model(img, noise.argsort(1))
        loss.backward()
        finite_step(ours, scaler)
        ours.zero_grad()
        reference = textbook(img, noise, 2.0)
        reference.backward()
        theirs.step()
        theirs.zero_grad()
        assert loss.item() == pytest.approx(reference.item(), rel=2e-5)
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    state = textbook.model.state_dict()
    for key, value in student.state_dict().items():
        difference = (value - state[key]).abs()
        if key.endswith("qkv.bias"):                            # softmax ignores a key's bias: its gradient is rounding
            difference = torch.cat(difference.chunk(3)[::2])    # noise, and Adam makes a whole step of its sign
        assert difference.max() < 2e-5, key


# ----------------------------------------------------------------------------------------------------------------
# What is compared


@pytest.mark.parametrize("tap", [None, 2])
def test_run_blocks_walks_through_a_network(tmp_path, tap):
    """Logits are counted from 1, states from 0; the tokens are those after `tap` blocks, normed; in the order asked."""
    student, img = make_student(), images()[0]
    extra = LogitsBlock(Block(16, 4))
    x = student.embed(img)
    latent, outputs = run_blocks(student, x, (3, 1, 4), (0, 3, 2), tap, extra)
    states, logits = [], []
    for block in (*student.blocks, extra):
        states.append(x)
        logits.append(block.attn.logits(block.norm1(x)))
        x = block(x) if block is not extra else x
    norms = [block.norm1 for block in student.blocks] + [student.norm]
    expected = [logits[2], logits[0], logits[3], *(norms[k](states[k]) for k in (0, 3, 2))]
    assert len(outputs) == 6
    for ours, theirs in zip(outputs, expected):
        torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(latent, student.norm(states[tap or 3]))
    assert run_blocks(student, student.embed(img))[1] == []


# ----------------------------------------------------------------------------------------------------------------
# Who learns from what


def reached(model, loss):
    model.zero_grad()
    loss.backward(retain_graph=True)
    return {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}


def errors(model, img, order):
    """The two parts of a DistilledMAE's loss, each with its graph."""
    visible = order[:, :model.model.visible]
    x, loss = model.model.embed(img, visible), model.distill_loss
    latent, outputs = run_blocks(model.model, x, loss.attention, loss.hidden, model.model.tap, model.extra)
    return model.model.pixel_error(img, latent, order), loss(outputs, model.teacher(img, visible)).sum()


def error_of_constants(targets):
    """The error of the best prediction that is the same for all images and places: a number for each head of logits
    (B, H, N, N), or for each channel of states (B, N, D)."""
    total = torch.zeros(())
    for target in targets:
        places = (0, 2, 3) if target.dim() == 4 else (0, 1)
        total = total + F.mse_loss(target.mean(places, keepdim=True).expand_as(target), target)
    return total


@pytest.mark.parametrize("kind", ["attention", "hidden", "decoupled"])
def test_every_block_learns(tmp_path, kind):
    """In each mode all trained parameters get a gradient, the teacher gets none, and the loss is the weighted sum."""
    path, _ = write_teacher(tmp_path / "t.pth")
    student = make_student(depth=6, tap=4 if kind == "decoupled" else None)
    teacher = make_teacher(path, student, kind)
    model, (img, order) = DistilledMAE(student, teacher, 3.0, kind == "decoupled"), images()
    loss = model(img, order)
    assert reached(model, loss) == {name for name, p in model.named_parameters() if p.requires_grad}
    assert {int(name.split(".")[2]) for name in reached(model, loss) if name.startswith("model.blocks.")} == {*range(6)}
    assert all(p.grad is None and not p.requires_grad for p in teacher.vit.parameters())
    pixels, distilled = errors(model, img, order)
    torch.testing.assert_close(loss, pixels + 3 * distilled)
    assert (model.parts["pixels"], model.parts["distill"]) == (pixels, distilled)
    from_teacher = reached(model, distilled)                    # the teacher alone reaches every block as well
    assert {int(name.split(".")[2]) for name in from_teacher if name.startswith("model.blocks.")} == {*range(6)}
    found = model.metrics(img)                                  # beside the parts, what they would be by chance
    chance = error_of_constants(teacher(img, order[:, :student.visible]))
    torch.testing.assert_close(found["distill_chance"], chance)
    torch.testing.assert_close(found["chance"], student.metrics(img)["chance"] + 3 * chance)


def test_decoupled_student_learns_as_published(tmp_path):
    """Lightweight.md 2.3 in small: of six blocks and a reduced one, four are below the pixel decoder. Those learn from
    both, the next two from attention alone, the last is norm1 and qkv, the decoder and the norm learn from pixels."""
    path, _ = write_teacher(tmp_path / "t.pth")
    student = make_student(depth=6, tap=4)
    teacher = make_teacher(path, student, "decoupled")
    assert teacher.pairs == dict(attention=[(7, 3)], hidden=[])
    model, (img, order) = DistilledMAE(student, teacher, decoupled=True), images()
    pixels, attention = (reached(model, error) for error in errors(model, img, order))
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert pixels | attention == trained                        # every parameter learns
    blocks = {name: int(name.split(".")[2]) for name in trained if name.startswith("model.blocks.")}
    assert {n for n in blocks if n in pixels and n in attention} == {n for n, b in blocks.items() if b < 4}
    assert {n for n in blocks if n not in pixels} == {n for n, b in blocks.items() if b >= 4}
    assert {*blocks.values()} == {*range(6)}
    extra = {"extra.norm1.weight", "extra.norm1.bias", "extra.attn.qkv.weight", "extra.attn.qkv.bias"}
    assert {n for n in trained if n.startswith("extra.")} == extra
    own = {n for n in pixels if n.startswith(("model.decoder", "model.norm.", "model.mask_token"))}
    assert len(own) > 10 and own.isdisjoint(attention)
    assert {n for n in attention - pixels if "blocks" not in n} == extra | {"distill_loss.adapters.0.weight"}
    grad = model.extra.attn.qkv.weight.grad
    assert not grad[32:].any() and grad[:32].any()              # the values are never asked for


def test_decoupled_tiny_has_the_published_number_of_extra_weights():
    extra = LogitsBlock(Block(192, 12))
    assert sum(p.numel() for p in extra.parameters()) == 2 * 192 + 192 * 576 + 576              # 0.11 M
    found, whole = MAE(tap=8).encoder_checkpoint(), ViT(depth=12)
    assert found["config"]["depth"] == 12
    assert sum(v.numel() for v in found["model"].values()) == sum(p.numel() for p in whole.parameters())


def test_decoupled_export_has_all_blocks_and_a_fresh_norm(tmp_path):
    student, img = make_student(depth=6, tap=4), images()[0]
    torch.nn.init.normal_(student.norm.weight)
    found = student.encoder_checkpoint()
    torch.save(found, tmp_path / "encoder.pt")
    vit = load_encoder(str(tmp_path / "encoder.pt"), say=str)
    assert len(vit.blocks) == found["config"]["depth"] == 6 and found["config"]["final_norm"].startswith("fresh")
    x = student.embed(img)
    for block in student.blocks:
        x = block(x)
    torch.testing.assert_close(vit.encode(img), F.layer_norm(x, (16,), eps=1e-6))
    torch.testing.assert_close(student.features(img), vit.encode(img)[:, 1:].mean(1))
    assert student.norm.weight.std() > 0.1                      # its own stays, it has learnt the tokens after 4 blocks
    plain = make_student()
    assert plain.encoder_checkpoint()["config"] == plain.config
    torch.testing.assert_close(plain.features(img), plain.encode(img)[:, 1:].mean(1))


def test_a_tap_is_one_of_the_blocks():
    """Above the last there are no tokens to read: a wrong number must not make another network than the one meant."""
    for tap in (0, 7):
        with pytest.raises(ValueError, match=f"--distill-tap {tap}"):
            make_student(depth=6, tap=tap)
    (img, order), student = images(), make_student(depth=6, tap=6)
    torch.testing.assert_close(student(img, order), make_student(depth=6)(img, order))


def test_distillation_does_not_change_the_pixels_error(tmp_path):
    path, _ = write_teacher(tmp_path / "t.pth")
    for kind, tap in (("attention", None), ("hidden", None), ("decoupled", 2)):
        student, (img, order) = make_student(tap=tap), images()
        model = DistilledMAE(student, make_teacher(path, student, kind), decoupled=kind == "decoupled")
        model(img, order)
        torch.testing.assert_close(model.parts["pixels"], student(img, order), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind, layers, blocks", [
    ("attention", None, 2), ("attention", ("1:2", "3:1"), 1), ("hidden", None, 3), ("hidden", ("0:0", "3:2", "1:1"), 3),
    ("hidden", ("2:0", "1:1"), 2)])
def test_a_shortened_teacher_says_the_same(tmp_path, kind, layers, blocks):
    """Blocks above the last target are gone, its own is reduced to logits; targets are those of the whole network."""
    path, vit = write_teacher(tmp_path / "t.pth")
    student = make_student()
    teacher, (img, order) = make_teacher(path, student, kind, layers), images()
    for keep in (order[:, :5], None):
        whole = run_blocks(vit, vit.embed(img, keep), teacher.attention, teacher.hidden)[1]
        targets = teacher(img, keep)
        assert len(targets) == len(whole) == len(layers or [0])
        for a, b in zip(targets, whole):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
            assert not a.requires_grad
    assert len(teacher.vit.blocks) == blocks and (teacher.extra is None) == (kind == "hidden")


@pytest.mark.parametrize("kind", ["attention", "hidden", "decoupled"])
def test_the_teacher_is_compiled_with_the_student(tmp_path, kind):
    """Its products are in the graphs of the one network that a run compiles."""
    path, _ = write_teacher(tmp_path / "t.pth", dim=36)
    student, (img, order), graphs = make_student(tap=2 if kind == "decoupled" else None), images(), []
    model = DistilledMAE(student, make_teacher(path, student, kind), decoupled=kind == "decoupled")
    plain = model(img, order), *model.parts.values()
    model.compile(backend=lambda graph, _: graphs.append(graph) or graph.forward)
    torch.testing.assert_close((model(img, order), *model.parts.values()), plain)
    shapes = [tuple(node.meta["example_value"].shape) for graph in graphs for node in graph.graph.nodes
              if isinstance(node.meta.get("example_value"), torch.Tensor)]
    assert any(shape[-1:] == (36,) for shape in shapes)


def test_a_teacher_without_a_final_norm_can_teach_attention(tmp_path):
    path, vit = write_teacher(tmp_path / "t.pth")
    state = {k.replace("norm.", "fc_norm.") if k.startswith("norm.") else k: v for k, v in vit.state_dict().items()}
    torch.save(state, tmp_path / "gap.pth")
    student, img = make_student(), images()[0]
    targets = make_teacher(str(tmp_path / "gap.pth"), student, heads=3)(img)
    torch.testing.assert_close(targets, make_teacher(path, student)(img))


def test_which_network_of_a_file_taught_is_remembered(tmp_path):
    _, vit = write_teacher(tmp_path / "t.pth")
    state = {f"module.backbone.{k}": v for k, v in vit.state_dict().items()}
    torch.save(dict(student=state, teacher=state), tmp_path / "dino.pth")
    student = make_student()
    one, other = (make_teacher(f"{tmp_path}/dino.pth:{key}", student, heads=3) for key in ("student", "teacher"))
    with pytest.raises(SystemExit, match="is not the file that this run began with"):
        other.load_state_dict(one.state_dict())
    one.load_state_dict(one.state_dict())


def test_a_decoupled_student_starts_from_any_file(tmp_path):
    """--init: the extra block is no part of the network that a file fills; every block of that must be in the file."""
    plain, student = make_student(depth=6), make_student(depth=6, tap=4)
    torch.nn.init.normal_(plain.blocks[0].norm1.weight)
    torch.save(dict(model=plain.state_dict(), config=plain.config), tmp_path / "plain.pt")
    load_into(student, read(str(tmp_path / "plain.pt")), str)
    assert torch.equal(student.blocks[0].norm1.weight, plain.blocks[0].norm1.weight)
    with pytest.raises(SystemExit, match="lacks"):
        load_into(make_student(depth=7, tap=4), read(str(tmp_path / "plain.pt")), str)


@pytest.mark.parametrize("kind", ["attention", "hidden", "decoupled"])
def test_the_teacher_is_in_no_state_dict(tmp_path, kind):
    path, _ = write_teacher(tmp_path / "t.pth")
    student = make_student(tap=2 if kind == "decoupled" else None)
    teacher = make_teacher(path, student, kind)
    before = {k: v.clone() for k, v in teacher.vit.state_dict().items()}
    model = DistilledMAE(student, teacher, decoupled=kind == "decoupled")
    extra = {f"extra.{k}" for k in LogitsBlock(Block(16, 4)).state_dict()} if kind == "decoupled" else set()
    assert set(model.state_dict()) == {f"model.{k}" for k in student.state_dict()} | extra | {
        "distill_loss.adapters.0.weight"}
    assert list(teacher.state_dict()) == ["sha256"] and len(teacher.state_dict()["sha256"]) == 64
    model.train()
    model(*images()).backward()
    parts = [part for part in (teacher.vit, teacher.extra) if part is not None]
    assert all(p.grad is None and not p.requires_grad for part in parts for p in part.parameters())
    assert all(torch.equal(v, before[k]) for k, v in teacher.vit.state_dict().items()) and not teacher.vit.training
    own = {id(p) for p in model.parameters()}
    assert not any(id(p) in own for part in parts for p in part.parameters())


def test_adapters_start_as_published():
    """Torch's own start of a 12 -> 12 convolution: uniform within 1 / sqrt(12), and no bias."""
    shape, pairs = dict(heads=12, dim=192), dict(attention=[(12, 12)], hidden=[])
    weight = DistillLoss(shape, shape, pairs).adapters[0].weight
    assert weight.shape == (12, 12, 1, 1) and 0.25 < weight.abs().max() <= 12 ** -0.5
    weight = DistillLoss(shape, dict(heads=12, dim=64), dict(attention=[], hidden=[(12, 12)])).adapters[0].weight
    assert weight.shape == (64, 192) and 0.07 < weight.abs().max() <= 192 ** -0.5
    assert not list(DistillLoss(shape, shape, pairs, adapter=False).parameters())
    other = DistillLoss(shape, dict(heads=16, dim=192), pairs, adapter=False)       # other sizes need one
    assert [tuple(p.shape) for p in other.parameters()] == [(16, 12, 1, 1)]


def test_the_extra_block_starts_as_the_others(tmp_path):
    """As one block more of the network it is put on: MAE's Xavier over the stacked matrix, or a plain ViT's 0.02."""
    path, _ = write_teacher(tmp_path / "t.pth")
    student, vit = make_student(depth=2, tap=1), ViT(24, 6, dim=16, depth=2, heads=4)
    mae_block = DistilledMAE(student, make_teacher(path, student, "decoupled"), decoupled=True).extra
    teacher = Teacher(path, None, "attention", None, vit.config, 3, RUN)
    for block, other in ((mae_block, student.blocks[0]), (DistillStudent(vit, teacher, True).extra, vit.blocks[0])):
        assert block.attn.qkv.weight.std().item() == pytest.approx(other.attn.qkv.weight.std().item(), rel=0.15)
        assert not block.attn.qkv.bias.any() and (block.norm1.weight == 1).all() and not block.norm1.bias.any()
    assert mae_block.attn.qkv.weight.abs().max() <= (6 / (16 + 48)) ** 0.5


def test_adapters_decay(tmp_path):
    path, _ = write_teacher(tmp_path / "t.pth")
    student = make_student()
    model = DistilledMAE(student, make_teacher(path, student))
    plain, decayed = decay_groups(model, 0.05)
    weight = model.distill_loss.adapters[0].weight
    assert any(p is weight for p in decayed["params"]) and decayed["weight_decay"] == 0.05


@pytest.mark.parametrize("kind", ["attention", "hidden"])
def test_a_student_without_pixels_learns_in_every_block(tmp_path, kind):
    """Attention trains all blocks through the extra one, and no final norm; hidden states train the norm too."""
    path, _ = write_teacher(tmp_path / "t.pth")
    torch.manual_seed(0)
    student, (img, order) = ViT(24, 6, dim=16, depth=4, heads=4), images()
    student.norm.requires_grad_(kind == "hidden")
    last = 5 if kind == "attention" else 4
    teacher = Teacher(path, None, kind, None, student.config, last, RUN)
    assert teacher.pairs[kind] == [(last, 3)]
    model = DistillStudent(student, teacher, kind == "attention")
    for keep in (order[:, :4], None):
        loss = model(img, keep)
        got = reached(model, loss)
        assert got == {name for name, p in model.named_parameters() if p.requires_grad}
        assert {int(name.split(".")[2]) for name in got if name.startswith("model.blocks.")} == {0, 1, 2, 3}
        assert ("model.norm.weight" in got) == (kind == "hidden")
        assert all(p.grad is None for p in teacher.vit.parameters())
        torch.testing.assert_close(model.metrics()["chance"], error_of_constants(teacher(img, keep)))
    assert not any("teacher" in name for name in model.state_dict())


# ----------------------------------------------------------------------------------------------------------------
# What a mistaken teacher gets


def test_mistaken_teachers(tmp_path):
    student = make_student()
    path, vit = write_teacher(tmp_path / "t.pth")
    bare = tmp_path / "bare.pth"
    torch.save(vit.state_dict(), bare)
    grey = ViT(24, 6, 1, dim=24, depth=3, heads=3)
    torch.save(grey.state_dict(), tmp_path / "grey.pth")
    coarse = ViT(24, 12, dim=24, depth=3, heads=3)
    torch.save(coarse.state_dict(), tmp_path / "coarse.pth")
    other, _ = write_teacher(tmp_path / "other.pth", mean=(0.5, 0.5, 0.5))
    for args, words in (
            ((path, "attention", ("3:4",)), r"3:4: layers are 1 to 3 \(student\) and 1 to 3 \(teacher\)"),
            ((path, "attention", ("0:1",)), r"0:1: layers are 1 to 3 \(student\) and 1 to 3"),
            ((path, "hidden", ("4:1",)), r"4:1: layers are 0 to 3 \(student\) and 0 to 3"),
            ((path, "attention", ("²:3",)), "is not STUDENT:TEACHER"),
            ((path, "attention", ("3",)), "3 is not STUDENT:TEACHER, two numbers such as 3:3"),
            ((path, "attention", ("3:1", "3:2")), "names a layer of the student twice"),
            ((str(bare), "attention", None), "does not say how many heads it has.*give --teacher-heads"),
            ((path, "attention", None, 4), "--teacher-heads 4: .* says that it has 3"),
            ((str(tmp_path / "grey.pth"), "attention", None, 3), "was made with --in-chans 1, the student has 3"),
            ((str(tmp_path / "coarse.pth"), "attention", None, 3), "was made with --patch-size 12, the student has 6"),
            ((other, "attention", None), r"was made with --mean \(0.5, 0.5, 0.5\)"),
            ((str(tmp_path / "none.pth"), "attention", None), "does not exist")):
        with pytest.raises(SystemExit, match=words):
            make_teacher(args[0], student, *args[1:])
    assert make_teacher(str(bare), student, heads=3).options["heads"] == 3


@pytest.mark.parametrize("argv, words", [
    (["--distill", "decoupled"], "--distill has no effect without --distill-teacher"),
    (["--distill-teacher", "x", "--distill", "logits"], "--distill: invalid choice: 'logits'"),
    (["--distill-tap", "3"], "--distill-tap has no effect without --distill-teacher"),
    (["--distill-layers", "3:3"], "--distill-layers has no effect without --distill-teacher"),
    (["--teacher-heads", "3"], "--teacher-heads has no effect without --distill-teacher"),
    (["--distill-teacher", "x", "--teacher-heads", "0"], "--teacher-heads must be at least 1, not 0"),
    (["--distill-teacher", "x", "--distill-tap", "0"], "--distill-tap must be at least 1, not 0"),
    (["--distill-weight", "2"], "--distill-weight has no effect without --distill-teacher")])
def test_mistaken_options(argv, words):
    with pytest.raises(SystemExit, match=words):
        parse(mae.Config, "mae", "", mae.RECIPES, mae.DEMO, argv)


def test_recipe():
    cfg = parse(mae.Config, "mae", "", mae.RECIPES, mae.DEMO, ["--distill-teacher", "x"])
    assert (cfg.distill_teacher, cfg.distill_weight, cfg.distill_layers) == ("x", 1, None)
    assert (cfg.epochs, cfg.batch_size, cfg.warmup_epochs) == (400, 4096, 40)
    assert layer_pairs(None, None, 13, 12) == dict(attention=[(13, 12)], hidden=[])             # the default kind
    assert layer_pairs(None, "decoupled", 13, 12) == dict(attention=[(13, 12)], hidden=[])
    assert layer_pairs(("9:12", "0:1"), "hidden", 12, 12) == dict(attention=[], hidden=[(9, 12), (0, 1)])
    cfg = distill.read_config(["--teacher", "x"])
    assert (cfg.epochs, cfg.batch_size, cfg.warmup_epochs, cfg.blr, cfg.min_crop, cfg.interpolation) == (
        400, 4096, 40, 1.5e-4, 0.08, "random")
    assert (cfg.weight_decay, cfg.distill, cfg.mask_ratio, cfg.heads) == (0.05, "attention", 0.75, 12)
    with pytest.raises(SystemExit, match="--teacher is required"):
        distill.main([])


# ----------------------------------------------------------------------------------------------------------------
# Real runs


@pytest.fixture(scope="module")
def teacher_file(tmp_path_factory):
    torch.manual_seed(3)
    path = tmp_path_factory.mktemp("teacher") / "teacher.pth"
    torch.save(ViT(16, 4, dim=48, depth=2, heads=3).state_dict(), path)         # a bare file: heads must be told
    return path


@pytest.mark.parametrize("script, options, world", [
    pytest.param("mae.py", ["--distill", "decoupled"], 1, marks=pytest.mark.slow),
    pytest.param("mae.py", [], 2, marks=pytest.mark.slow), ("distill.py", ["--distill", "hidden"], 1),
    pytest.param("distill.py", ["--mask-ratio", "0"], 2, marks=pytest.mark.slow)])
def test_killed_and_resumed_is_bitwise_the_same(classes, teacher_file, tmp_path, script, options, world):
    name = "--distill-teacher" if script == "mae.py" else "--teacher"
    args = ["--data", classes, *TINY, name, teacher_file, "--teacher-heads", 3, *options, "--epochs", 8]    # 40 steps
    finish(*args, "--out", tmp_path / "whole", world=world, script=script)
    out = tmp_path / "broken"
    start_and_kill(*args, out=out, step=12, world=world, script=script)
    moved = tmp_path / "moved.pth"                              # the same file elsewhere is the same teacher
    moved.write_bytes(teacher_file.read_bytes())
    args[args.index(name) + 1] = moved
    finish(*args, "--out", out, "--workers", 1, world=world, script=script)
    got = steps(out)
    assert any(b <= a for a, b in zip(got, got[1:])), "no step was repeated: nothing was resumed"
    whole, broken = ({r["step"]: r["loss"] for r in rows(f) if "loss" in r} for f in (tmp_path / "whole", out))
    assert whole == broken and len(whole) == 40
    if script == "mae.py":                                      # all averaged over the processes
        for row in (row for row in rows(out) if "loss" in row):
            assert row["loss"] == pytest.approx(row["pixels"] + row["distill"], rel=1e-5)
    same_state(tmp_path / "whole", out)
    saved = torch.load(out / "last.pt")
    assert not any("teacher" in k for k in saved["model"]) and list(saved["teacher"]) == ["sha256"]
    encoder = load_encoder(str(out / "encoder.pt"), say=str)
    assert len(encoder.blocks) == 4 and encoder.encode(torch.randn(1, 3, 16, 16)).isfinite().all()
    if world == 1:
        torch.save({k: v + 1 for k, v in torch.load(teacher_file).items()}, moved)
        text = finish(*args, "--out", out, script=script, expect=1)
        assert "is not the file that this run began with" in text and "Traceback" not in text
        torch.save(ViT(16, 4, dim=64, depth=2, heads=4).state_dict(), moved)    # of another size, too
        args[args.index("--teacher-heads") + 1] = 4
        text = finish(*args, "--out", out, script=script, expect=1)
        assert "teacher_heads was 3, is 4" in text and "Traceback" not in text


# ----------------------------------------------------------------------------------------------------------------
# Runs in this process


def train(script, out, teacher, data, *args):
    name = "--distill-teacher" if script is mae else "--teacher"
    script.main([*TINY, "--data", str(data), name, str(teacher), "--teacher-heads", "3", "--out", str(out),
                 *map(str, args)])
    return rows(out)


@pytest.mark.parametrize("kind", [None, "attention", "hidden", "decoupled"])
def test_distilled_runs_can_be_read(classes, teacher_file, tmp_path, kind):
    """Log, last.pt and encoder.pt of a run with each kind of teacher; --distill is attention where it is not given."""
    given = ["--distill", kind] if kind else []
    found = train(mae, tmp_path, teacher_file, classes, "--epochs", 1, "--distill-weight", 2, *given)
    config = found[0]["config"]
    assert config["distill"] == (kind or "attention")
    assert config["distill_tap"] == (3 if kind == "decoupled" else None)                        # two thirds of 4 blocks
    losses = [row for row in found if "loss" in row]
    assert len(losses) == 5 and os.path.exists(tmp_path / "recon.png")
    for row in losses:
        assert row["loss"] == pytest.approx(row["pixels"] + 2 * row["distill"], rel=1e-5)
        assert row["chance"] > 2 * row["distill_chance"] > 0
    saved = torch.load(tmp_path / "last.pt")
    assert not any("teacher" in name for name in saved["model"]) and list(saved["teacher"]) == ["sha256"]
    assert any(name.startswith("extra.") for name in saved["model"]) == (kind == "decoupled")
    found = torch.load(tmp_path / "encoder.pt")
    assert found["method"] == "mae" and found["config"]["depth"] == 4 and found["config"]["mean"] == MEAN
    assert not any(name.startswith(("decoder", "mask_token", "model.", "extra.")) for name in found["model"])
    assert (found["config"].get("final_norm", "") != "") == (kind == "decoupled")
    last = {name.removeprefix("model."): v for name, v in saved["model"].items()}
    for name, value in found["model"].items():                  # as trained, and a fresh norm above the upper blocks
        fresh = kind == "decoupled" and name.startswith("norm.")
        assert torch.equal(value, torch.full_like(value, float(name == "norm.weight")) if fresh else last[name]), name
    encoder = load_encoder(str(tmp_path / "encoder.pt"), say=str)
    assert len(encoder.blocks) == 4 and encoder.encode(torch.randn(1, 3, 16, 16)).isfinite().all()
    again = load_encoder(str(tmp_path / "last.pt"), heads=4, say=str)       # last.pt has the student behind "model."
    assert torch.equal(again.blocks[3].mlp.fc1.weight, encoder.blocks[3].mlp.fc1.weight)


@pytest.mark.parametrize("kind", ["attention", "decoupled"])
def test_distilled_checkpoints_can_be_drawn(classes, teacher_file, tmp_path, kind):
    """From last.pt alone, with the blocks below the decoder that the run had: its own picture once more."""
    train(mae, tmp_path / "run", teacher_file, classes, "--epochs", 1, "--lr", 1e-2, "--distill", kind)
    pictures.main([str(tmp_path / "run" / "last.pt"), "--images", str(classes), "--out", str(tmp_path / "drawn")])
    run, drawn = (Image.open(tmp_path / name / "recon.png") for name in ("run", "drawn"))
    assert run.size == drawn.size and run.tobytes() == drawn.tobytes()


@pytest.mark.parametrize("accum", [1, 2])
def test_the_log_has_the_parts_of_the_loss(classes, teacher_file, tmp_path, accum):
    """Over all passes of a step, as the loss itself."""
    for row in train(mae, tmp_path, teacher_file, classes, "--epochs", 1, "--accum", accum):
        if "loss" in row:
            assert row["loss"] == pytest.approx(row["pixels"] + row["distill"], rel=1e-5)


@pytest.mark.parametrize("kind", ["attention", "hidden"])
@pytest.mark.parametrize("more", [[], ["--mask-ratio", 0], ["--accum", 2, "--repeat", 2]])
def test_a_student_of_the_teacher_alone(classes, teacher_file, tmp_path, kind, more):
    found = train(distill, tmp_path, teacher_file, classes, "--epochs", 2, "--distill", kind, *more)
    losses = [row for row in found if "loss" in row]
    assert len(losses) == 10 and all(row["chance"] > 0 and row["loss"] > 0 for row in losses)
    saved, found = torch.load(tmp_path / "last.pt"), torch.load(tmp_path / "encoder.pt")
    assert not any("teacher" in name for name in saved["model"]) and list(saved["teacher"]) == ["sha256"]
    assert found["method"] == "distill" and found["config"]["depth"] == 4
    assert set(found["model"]) == set(ViT(depth=4).state_dict())
    for name, value in found["model"].items():
        assert torch.equal(value, saved["model"][f"model.{name}"]), name
    trained = not torch.equal(found["model"]["norm.weight"], torch.ones(128))
    assert trained == (kind == "hidden")
    assert not torch.equal(found["model"]["blocks.3.mlp.fc1.bias"], torch.zeros(512))


@pytest.mark.parametrize("script", [mae, distill])
def test_decoupled_students_start_from_a_file(classes, teacher_file, tmp_path, script):
    """--init fills all whole blocks; what the decoupled student's encoder.pt has as final norm is a fresh one."""
    torch.manual_seed(5)
    vit = ViT(16, 4, dim=128, depth=4, heads=4)
    torch.nn.init.normal_(vit.norm.weight)
    torch.save(dict(model=vit.state_dict(), config=vit.config), tmp_path / "init.pt")
    kind = ["--distill", "decoupled"] if script is mae else []
    args = [teacher_file, classes, "--epochs", 1, "--lr", 0, *kind, "--init", tmp_path / "init.pt"]
    train(script, tmp_path / "out", *args)
    found = torch.load(tmp_path / "out" / "encoder.pt")["model"]
    for name, value in vit.state_dict().items():
        if name.startswith("norm."):
            value = torch.full_like(value, float(name == "norm.weight"))
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize("script, kind", [(mae, "attention"), (mae, "hidden"), (mae, "decoupled"),
                                          (distill, "attention"), (distill, "hidden")])
def test_stopped_and_gone_on_is_the_same(classes, teacher_file, tmp_path, script, kind, monkeypatch):
    """Every mode, in this process: a run that ends by itself after its checkpoint of step 5, and the same once more."""
    args = [teacher_file, classes, "--epochs", 2, "--distill", kind]
    whole = train(script, tmp_path / "whole", *args)

    class Stop(Exception):
        pass

    def stop(step, *_):
        if step == 7:
            raise Stop
        return warmup_cosine(step, *_)

    with monkeypatch.context() as patch, pytest.raises(Stop):
        patch.setattr(script, "warmup_cosine", stop)
        train(script, tmp_path / "broken", *args)
    broken = train(script, tmp_path / "broken", *args)
    whole, broken = ({row["step"]: row["loss"] for row in found if "loss" in row} for found in (whole, broken))
    assert whole == broken and len(whole) == 10
    assert steps(tmp_path / "broken") == [*range(1, 8), *range(6, 11)]
    same_state(tmp_path / "whole", tmp_path / "broken")
    assert [torch.load(tmp_path / name / "encoder.pt")["config"] for name in ("whole", "broken")][0]["depth"] == 4
    with pytest.raises(SystemExit, match="distill was|belongs to a run with other options"):
        train(script, tmp_path / "broken", *args[:-1], "attention" if kind == "hidden" else "hidden")


@pytest.mark.parametrize("script, args, words", [
    (mae, ["--distill-tap", "3"], "--distill-tap"),             # of a student that is not decoupled
    (mae, ["--distill", "decoupled", "--distill-tap", "5"], "--distill-tap 5"),
    (mae, ["--distill-layers", "5:2"], r"5:2: layers are 1 to 4 \(student\)"),
    (mae, ["--distill", "decoupled", "--distill-layers", "6:2"], r"6:2: layers are 1 to 5 \(student\)"),
    (mae, ["--distill", "hidden", "--distill-layers", "4:3"], r"4:3: layers are 0 to 4 .* and 0 to 2 "),
    (mae, ["--img-size", "18"], "patches of 4 do not tile a 18x18 image"),
    (mae, ["--patch-size", "2"], "was made with --patch-size 4, the student has 2"),
    (mae, ["--in-chans", "1"], "was made with --in-chans 3, the student has 1"),
    (distill, ["--mask-ratio", "1"], "--mask-ratio"), (distill, ["--mask-ratio", "1.5"], "--mask-ratio"),
    (distill, ["--mask-ratio", "0.99"], "--mask-ratio 0.99 leaves no patch"),
    (distill, ["--distill", "decoupled"], "--distill: invalid choice: 'decoupled'"),
    (distill, ["--distill-layers", "4:2"], "must name the student's last layer, 5"),
    (distill, ["--distill", "hidden", "--distill-layers", "1:1", "3:2"], "must name the student's last layer, 4"),
    (distill, ["--model", "vit_giant"], "not vit_giant"), (distill, ["--heads", "5"], "5 heads do not divide")])
def test_what_a_run_refuses(classes, teacher_file, tmp_path, script, args, words):
    with pytest.raises(SystemExit, match=words):
        train(script, tmp_path, teacher_file, classes, "--epochs", 1, *args)
    assert not (tmp_path / "last.pt").exists()


def test_the_tap_is_two_thirds_of_the_blocks(classes, teacher_file, tmp_path, monkeypatch):
    """8 of 12, as published, if --distill-tap gives no other."""
    taps = []

    class Noted(MAE):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            taps.append(self.tap)

    monkeypatch.setattr(mae, "MAE", Noted)
    for name, args in (("a", []), ("b", ["--distill-tap", 2]), ("c", ["--distill", "attention"])):
        train(mae, tmp_path / name, teacher_file, classes, "--epochs", 0.2, "--distill", "decoupled", *args)
    assert taps == [3, 2, None] and round(12 * 2 / 3) == 8


# ----------------------------------------------------------------------------------------------------------------
# Longer ones


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler on a CPU")
@pytest.mark.parametrize("script", ["mae.py", "distill.py"])
def test_compiled_with_a_teacher(classes, teacher_file, tmp_path, script):
    name = "--distill-teacher" if script == "mae.py" else "--teacher"
    args = ["--data", classes, *TINY, name, teacher_file, "--teacher-heads", 3, "--epochs", 2]
    for how in ("--compile", "--no-compile"):
        finish(*args, how, "--out", tmp_path / how, script=script)
    a, b = ([r["loss"] for r in rows(tmp_path / how) if "loss" in r] for how in ("--compile", "--no-compile"))
    assert len(a) == 10 and a == pytest.approx(b, rel=1e-4)     # fused kernels round otherwise


@pytest.mark.slow
def test_true_size_base_teacher_in_the_official_layout(classes, tmp_path):
    """mae_pretrain_vit_base.pth's layout with random weights, two processes, exactly as the README has it."""
    torch.manual_seed(0)
    vit = ViT(dim=768, depth=12, heads=12)
    torch.save(dict(model=vit.state_dict()), tmp_path / "base.pth")
    out = tmp_path / "out"
    text = finish("--distill-teacher", tmp_path / "base.pth", "--data", classes, "--epochs", 1, "--batch-size", 4,
                  "--out", out, "--workers", 1, "--log-every", 1, world=2)
    assert "done:" in text and len(steps(out)) == 10
    assert len(load_encoder(str(out / "encoder.pt"), say=str).blocks) == 12
