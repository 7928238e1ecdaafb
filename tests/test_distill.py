"""Distillation during pre-training: the recorded reference, who learns from what, the textbook form, real runs."""
import json
import shutil

import pytest
import torch
import torch.nn.functional as F
from golden import Golden, close, needs_golden
from test_runs import TINY, finish, kill_9, rows, same_state, start, steps, wait_for

import distill
import mae
from distill import Lesson, Pupil, Teacher, decouple, features, pairs_of, released
from mae import MAE, Distilled
from training import decay_groups, finite_step, warmup_cosine
from vit import ViT
from weights import build_vit

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CPU = torch.device("cpu")


def make_student(depth=3, tap=None, decoupled=False, heads=4):
    torch.manual_seed(0)
    model = MAE(ViT(24, 6, dim=16, depth=depth, heads=heads), 12, 1, 3, tap=tap)
    if decoupled:
        decouple(model)
    return model


def write_teacher(path, depth=3, dim=24, heads=3, seed=1, **config):
    torch.manual_seed(seed)
    vit = ViT(24, 6, dim=dim, depth=depth, heads=heads)
    with torch.no_grad():
        for p in vit.parameters():                              # attention that says something
            p.add_(torch.randn_like(p) * 0.05 * p.requires_grad)
    torch.save(dict(model=vit.state_dict(), config=dict(heads=heads, img_size=(24, 24), **config)), path)
    return str(path), vit


def hear(path, student, kind="attention", layers=None, heads=None):
    return Teacher(path, heads, kind, layers, student.config, MEAN, STD, CPU, torch.float32, str)


def distilled(student, teacher, **options):
    return Distilled(student, Lesson(student.config, teacher.shape, teacher.pairs, **options))


# ----------------------------------------------------------------------------------------------------------------
# The reference


@needs_golden
@pytest.mark.parametrize("name, tolerance", [("attn_last", 2e-5), ("attn_multi", 2e-5), ("attn_noadapter", 1e-5),
                                             ("hidden", 2e-5), ("both", 2e-5)])
def test_recorded(name, tolerance):
    g = Golden(f"maelite_distill_{name}")
    c, state = g.config, g.under("state")
    shape = dict(img_size=c["img_size"], patch_size=c["patch_size"], mlp_ratio=c["mlp_ratio"])
    nets = {who: dict(dim=c[who]["embed_dim"], depth=c[who]["depth"], heads=c[who]["num_heads"])
            for who in ("student", "teacher")}
    student = MAE(ViT(**shape, **nets["student"]), c["decoder_embed_dim"], c["decoder_depth"], c["decoder_num_heads"],
                  c["norm_pix_loss"], c["mask_ratio"])
    student.load_state_dict({k[6:]: v for k, v in state.items() if k.startswith("model.")})
    teacher = ViT(**shape, **nets["teacher"])
    teacher.load_state_dict({k[10:]: v for k, v in state.items() if k.startswith("tch_model.")})
    pairs = {kind: [(i, i) for i in c[f"distill_{short}_idx"]]
             for kind, short in (("attention", "attn"), ("hidden", "hidden"))}
    lesson = Lesson(nets["student"], nets["teacher"], pairs, adapter=c["use_attn_adapter"])
    names = [f"attn_adapter.adapter{i - 1}.weight" for i, _ in pairs["attention"]] + \
            [f"hidden_adapter.adapter{i}.weight" for i, _ in pairs["hidden"]]
    for adapter, key in zip(lesson.adapters, names):
        if c["use_attn_adapter"]:
            adapter.weight.data = state[key]

    img, noise = g("input/imgs"), g("rand/noise")
    order, visible = student.shuffle(img, noise)
    assert torch.equal(order, g("out/ids_shuffle"))
    with torch.no_grad():
        taught = teacher.run_blocks(teacher.embed(img, order[:, :visible]), lesson.attention, lesson.hidden)[1]
    ours = student.run_blocks(student.embed(img, order[:, :visible]), lesson.attention, lesson.hidden)[1]
    for signals, who in ((ours, "student"), (taught, "teacher")):
        for x, kind in zip(signals, [f"attn{i}" for i in lesson.attention] + [f"hidden{i}" for i in lesson.hidden]):
            close(x, g(f"out/{who}_{kind}"), tolerance)
    errors = Distilled(student, lesson)(img, order, taught)
    close(errors[0], g("out/loss_rec"), tolerance)
    parts = errors[1:].split([len(lesson.attention), len(lesson.hidden)])
    for part, kind in zip(parts, ("attn", "hidden")):
        if len(part):
            close(part.sum(), g(f"out/loss_{kind}"), tolerance)
    loss = errors[0] + c["distill_attn_alpha"] * parts[0].sum() + c["distill_hidden_alpha"] * parts[1].sum()
    close(loss, g("out/loss"), tolerance)
    loss.backward()
    grads = {f"model.{k}": p.grad for k, p in student.named_parameters() if p.grad is not None}
    grads |= {key: a.weight.grad for key, a in zip(names, lesson.adapters) if c["use_attn_adapter"]}
    reference = g.under("grad")
    assert set(grads) == set(reference)
    floor = 0.01 * max(v.abs().max().item() for v in reference.values())        # as in close_grads
    for key, v in reference.items():
        assert (grads[key] - v).abs().max().item() <= 5e-5 * max(v.abs().max().item(), floor), key


def test_thirty_steps_of_the_textbook(tmp_path):
    """Losses before each step and weights after all, against timm's blocks with every logit materialised."""
    pytest.importorskip("timm", reason="the textbook form is built from timm's blocks")
    from textbook import TextbookDistilled, TextbookMAE
    path, vit = write_teacher(tmp_path / "t.pth")
    student = make_student()
    teacher = hear(path, student)
    model = distilled(student, teacher)
    plain = TextbookMAE(24, 6, 16, 3, 4, 12, 1, 3)
    plain.load_state_dict(student.state_dict())
    plain_teacher = TextbookMAE(24, 6, 24, 3, 3)
    plain_teacher.load_state_dict(vit.state_dict(), strict=False)
    textbook = TextbookDistilled(plain, plain_teacher, 4, 3)
    textbook.adapter.load_state_dict(model.lesson.adapters[0].state_dict())
    ours = torch.optim.AdamW(decay_groups(model, 0.05), 1e-3, betas=(0.9, 0.95), fused=True)
    theirs = torch.optim.AdamW(decay_groups(textbook, 0.05), 1e-3, betas=(0.9, 0.95))
    scaler, losses = torch.amp.GradScaler("cpu", enabled=False), []
    for step in range(30):
        torch.manual_seed(step)
        img, noise = torch.randn(4, 3, 24, 24), torch.rand(4, 16)
        for optimizer in (ours, theirs):
            for group in optimizer.param_groups:
                group["lr"] = warmup_cosine(step, 30, 5, 3e-3)
        order, visible = student.shuffle(img, noise)
        loss = (model(img, order, teacher(img, order[:, :visible])) * torch.tensor([1.0, 2.0])).sum()
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
# Who learns from what


def reached(model, loss):
    model.zero_grad()
    loss.backward(retain_graph=True)
    return {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}


def test_decoupled_student_learns_as_published(tmp_path):
    """Lightweight.md 2.3 in small: of six blocks and a reduced one, four are below the pixel decoder. Those learn from
    both, the next two from attention alone, the last is norm1 and qkv, the decoder and the norm learn from pixels."""
    path, _ = write_teacher(tmp_path / "t.pth")
    student = make_student(depth=7, tap=4, decoupled=True)
    teacher = hear(path, student)
    assert teacher.pairs == dict(attention=((7, 3),), hidden=())
    model = distilled(student, teacher)
    img, noise = torch.randn(2, 3, 24, 24), torch.rand(2, 16)
    order, visible = student.shuffle(img, noise)
    errors = model(img, order, teacher(img, order[:, :visible]))
    pixels, attention = reached(model, errors[0]), reached(model, errors[1])
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert pixels | attention == trained                        # every parameter learns
    blocks = {name: int(name.split(".")[2]) for name in trained if name.startswith("model.blocks.")}
    assert {n for n in blocks if n in pixels and n in attention} == {n for n, b in blocks.items() if b < 4}
    assert {n for n in blocks if n not in pixels} == {n for n, b in blocks.items() if b >= 4}
    assert {n.removeprefix("model.blocks.6.") for n, b in blocks.items() if b == 6} == {
        "norm1.weight", "norm1.bias", "attn.qkv.weight", "attn.qkv.bias"}
    own = {n for n in pixels if n.startswith(("model.decoder", "model.norm.", "model.mask_token"))}
    assert len(own) > 10 and own.isdisjoint(attention)
    assert {n for n in attention - pixels if "blocks" not in n} == {"lesson.adapters.0.weight"}
    grad = student.blocks[6].attn.qkv.weight.grad
    assert not grad[32:].any() and grad[:32].any()              # the values are never asked for


def test_decoupled_tiny_has_the_published_number_of_extra_weights():
    student = MAE(ViT(depth=13))
    decouple(student)
    whole = sum(p.numel() for p in ViT(depth=12).parameters())
    more = sum(p.numel() for p in student.blocks[12].parameters())
    assert more == 2 * 192 + 192 * 576 + 576                    # 0.11 M
    state, config = released(student.encoder_state(), student.config)
    assert config["depth"] == 12 and sum(v.numel() for v in state.values()) == whole


def test_decoupled_export_is_the_first_blocks_and_a_fresh_norm(tmp_path):
    student = make_student(depth=7, tap=4, decoupled=True)
    torch.nn.init.normal_(student.norm.weight)
    state, config = released(student.encoder_state(), student.config)
    torch.save(dict(config=config, model=state), tmp_path / "encoder.pt")
    vit = build_vit(str(tmp_path / "encoder.pt"), say=str)
    img = torch.randn(2, 3, 24, 24)
    assert len(vit.blocks) == 6 and config["final_norm"].startswith("fresh")
    x = student.embed(img)
    for block in student.blocks[:6]:
        x = block(x)
    torch.testing.assert_close(vit.encode(img), F.layer_norm(x, (16,), eps=1e-6))
    torch.testing.assert_close(features(student, img), vit.encode(img)[:, 1:].mean(1))
    plain = make_student()
    assert released(plain.encoder_state(), plain.config)[1] == plain.config
    torch.testing.assert_close(features(plain, img), plain.encode(img)[:, 1:].mean(1))


def test_distillation_does_not_change_the_pixels_error(tmp_path):
    path, _ = write_teacher(tmp_path / "t.pth")
    student = make_student()
    teacher, img, noise = hear(path, student), torch.randn(2, 3, 24, 24), torch.rand(2, 16)
    order, visible = student.shuffle(img, noise)
    errors = distilled(student, teacher)(img, order, teacher(img, order[:, :visible]))
    torch.testing.assert_close(errors[0], student(img, noise), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind, layers", [("attention", None), ("attention", ("1:2", "3:1")), ("hidden", None),
                                          ("hidden", ("0:0", "3:2", "1:1"))])
def test_a_shortened_teacher_says_the_same(tmp_path, kind, layers):
    """Blocks above the last signal are gone, its own is reduced; the signals are those of the whole network."""
    path, vit = write_teacher(tmp_path / "t.pth")
    student = make_student()
    teacher, img = hear(path, student, kind, layers), torch.randn(2, 3, 24, 24)
    order = torch.rand(2, 16).argsort(1)[:, :5]
    for keep in (order, None):
        whole = vit.run_blocks(vit.embed(img, keep), teacher.attention, teacher.hidden)[1]
        said = teacher(img, keep)
        assert len(said) == len(whole) == len(layers or [0])
        for a, b in zip(said, whole):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
            assert not a.requires_grad
    if kind == "attention" and layers is None:
        assert not hasattr(teacher.vit.blocks[-1], "mlp")


def test_a_compiled_teacher_is_what_is_called(tmp_path):
    path, _ = write_teacher(tmp_path / "t.pth")
    teacher, img, graphs = hear(path, make_student()), torch.randn(2, 3, 24, 24), []
    plain = teacher(img)
    teacher.compile(backend=lambda graph, _: graphs.append(graph) or graph.forward)
    torch.testing.assert_close(teacher(img), plain)
    assert graphs


def test_a_teacher_without_a_final_norm_can_teach_attention(tmp_path):
    path, vit = write_teacher(tmp_path / "t.pth")
    state = {k.replace("norm.", "fc_norm.") if k.startswith("norm.") else k: v for k, v in vit.state_dict().items()}
    torch.save(state, tmp_path / "gap.pth")
    student, img = make_student(), torch.randn(2, 3, 24, 24)
    torch.testing.assert_close(hear(str(tmp_path / "gap.pth"), student, heads=3)(img), hear(path, student)(img))


def test_which_network_of_a_file_taught_is_remembered(tmp_path):
    _, vit = write_teacher(tmp_path / "t.pth")
    state = {f"module.backbone.{k}": v for k, v in vit.state_dict().items()}
    torch.save(dict(student=state, teacher=state), tmp_path / "dino.pth")
    student = make_student()
    one, other = (hear(f"{tmp_path}/dino.pth:{key}", student, heads=3) for key in ("student", "teacher"))
    with pytest.raises(SystemExit, match="is not the teacher that this run began with"):
        other.load_state_dict(one.state_dict())
    one.load_state_dict(one.state_dict())


def test_a_decoupled_student_starts_from_any_file(tmp_path):
    """--init: the reduced block, which a file need not have, stays fresh; the rest must be there."""
    plain, student = make_student(depth=6), make_student(depth=7, tap=4, decoupled=True)
    torch.nn.init.normal_(plain.blocks[0].norm1.weight)
    torch.save(dict(model=plain.state_dict(), config=plain.config), tmp_path / "plain.pt")
    fresh = student.blocks[6].attn.qkv.weight.clone()
    distill.start_from(student, str(tmp_path / "plain.pt"), str)
    assert torch.equal(student.blocks[0].norm1.weight, plain.blocks[0].norm1.weight)
    assert torch.equal(student.blocks[6].attn.qkv.weight, fresh)
    with pytest.raises(SystemExit, match="lacks"):
        distill.start_from(make_student(depth=8, tap=4, decoupled=True), str(tmp_path / "plain.pt"), str)


def test_the_teacher_is_in_no_state_dict(tmp_path):
    path, _ = write_teacher(tmp_path / "t.pth")
    student = make_student()
    teacher = hear(path, student)
    before = {k: v.clone() for k, v in teacher.vit.state_dict().items()}
    model = distilled(student, teacher)
    assert set(model.state_dict()) == {f"model.{k}" for k in student.state_dict()} | {"lesson.adapters.0.weight"}
    assert list(teacher.state_dict()) == ["sha256"]
    img, order = torch.randn(2, 3, 24, 24), torch.rand(2, 16).argsort(1)
    model(img, order, teacher(img, order[:, :4])).sum().backward()
    assert all(p.grad is None and not p.requires_grad for p in teacher.vit.parameters())
    assert all(torch.equal(v, before[k]) for k, v in teacher.vit.state_dict().items()) and not teacher.vit.training


def test_adapters_start_as_published():
    """Torch's own start of a 12 -> 12 convolution: uniform within 1 / sqrt(12), and no bias."""
    shape = dict(heads=12, dim=192)
    weight = Lesson(shape, shape, dict(attention=((12, 12),), hidden=())).adapters[0].weight
    assert weight.shape == (12, 12, 1, 1) and 0.25 < weight.abs().max() <= 12 ** -0.5
    assert not list(Lesson(shape, shape, dict(attention=((12, 12),), hidden=()), adapter=False).parameters())


def test_adapters_decay(tmp_path):
    path, _ = write_teacher(tmp_path / "t.pth")
    student = make_student()
    model = distilled(student, hear(path, student))
    plain, decayed = decay_groups(model, 0.05)
    assert any(p is model.lesson.adapters[0].weight for p in decayed["params"]) and decayed["weight_decay"] == 0.05


def test_a_pupil_learns_in_every_block(tmp_path):
    """Without pixels: attention trains all whole blocks through the reduced one, hidden states train the norm too."""
    path, _ = write_teacher(tmp_path / "t.pth")
    img, keep = torch.randn(2, 3, 24, 24), torch.rand(2, 16).argsort(1)[:, :4]
    for kind in ("attention", "hidden"):
        argv = ["--teacher", path, "--distill", kind, "--model", "vit_mini", "--img-size", "24", "--patch-size", "6"]
        student = distill.build(distill.resolve(*mae.training.parse(distill.Config, "", argv)))
        teacher = hear(path, student, kind)
        pupil = Pupil(student, Lesson(student.config, teacher.shape, teacher.pairs))
        for seen in (keep, None):
            got = reached(pupil, pupil(img, seen, teacher(img, seen)).sum())
            assert got == {n for n, p in pupil.named_parameters() if p.requires_grad}


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
            ((path, "attention", ("3:4",)), "3:4: the teacher has layers 1 to 3, none is number 4"),
            ((path, "attention", ("0:1",)), "the student has layers 1 to 3, none is number 0"),
            ((path, "hidden", ("4:1",)), "the student has layers 0 to 3, none is number 4"),
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
            hear(args[0], student, *args[1:])
    assert hear(str(bare), student, heads=3).shape["heads"] == 3


@pytest.mark.parametrize("argv, words", [
    (["--distill", "decoupled"], "--distill needs a teacher: give --distill-teacher FILE"),
    (["--distill-teacher", "x", "--distill", "logits"], "--distill is attention, hidden or decoupled, not logits"),
    (["--distill-teacher", "x", "--distill-tap", "3"], "--distill-tap goes with --distill decoupled"),
    (["--teacher-heads", "3"], "--teacher-heads needs a teacher"),
    (["--distill-weight", "2"], "--distill-weight needs a teacher")])
def test_mistaken_options(argv, words):
    with pytest.raises(SystemExit, match=words):
        mae.resolve(*mae.training.parse(mae.Config, "", argv))


def test_recipe():
    cfg = mae.resolve(*mae.training.parse(mae.Config, "", ["--distill-teacher", "x"]))
    assert (cfg.distill, cfg.distill_weight, cfg.distill_layers) == ("attention", 1, None)
    assert (cfg.epochs, cfg.batch_size) == (400, 4096)
    cfg = mae.resolve(*mae.training.parse(mae.Config, "", ["--distill-teacher", "x", "--distill", "decoupled"]))
    assert cfg.distill_tap == 8
    assert pairs_of(None, "attention", 13, 12) == dict(attention=((13, 12),), hidden=())
    with pytest.raises(SystemExit, match="whom to learn from"):
        distill.resolve(*mae.training.parse(distill.Config, "", []))


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
    process = start(*args, "--out", out, world=world, script=script)
    wait_for(process, out, 12)
    kill_9(process)
    moved = tmp_path / "moved.pth"                              # the same file elsewhere is the same teacher
    moved.write_bytes(teacher_file.read_bytes())
    args[args.index(name) + 1] = moved
    finish(*args, "--out", out, "--workers", 1, world=world, script=script)
    got = steps(out)
    assert any(b <= a for a, b in zip(got, got[1:])), "no step was repeated: nothing was resumed"
    whole, broken = ({r["step"]: r["loss"] for r in rows(f) if "loss" in r} for f in (tmp_path / "whole", out))
    assert whole == broken and len(whole) == 40
    same_state(tmp_path / "whole", out)
    saved = torch.load(out / "last.pt")
    assert not any("teacher" in k for k in saved["model"]) and list(saved["teacher"]) == ["sha256"]
    encoder = build_vit(str(out / "encoder.pt"), say=str)
    assert len(encoder.blocks) == 4 and encoder.encode(torch.randn(1, 3, 16, 16)).isfinite().all()
    if world == 1:
        torch.save({k: v + 1 for k, v in torch.load(teacher_file).items()}, moved)
        text = finish(*args, "--out", out, script=script, expect=1)
        assert "is not the teacher that this run began with" in text and "Traceback" not in text
        torch.save(ViT(16, 4, dim=64, depth=2, heads=4).state_dict(), moved)    # of another size, too
        args[args.index("--teacher-heads") + 1] = 4
        text = finish(*args, "--out", out, script=script, expect=1)
        assert "teacher_heads was 3, is 4" in text and "Traceback" not in text


def test_distilled_checkpoints_can_be_drawn_and_read(classes, teacher_file, tmp_path):
    args = ["--data", classes, *TINY, "--distill-teacher", teacher_file, "--teacher-heads", 3, "--epochs", 1]
    for kind in ("attention", "decoupled"):
        out = tmp_path / kind
        finish(*args, "--distill", kind, "--out", out)
        row = [r for r in rows(out) if "loss" in r][-1]
        assert row["loss"] == pytest.approx(row["pixels"] + row["taught"], rel=1e-5) and row["taught_chance"] > 0
        finish("--visualize", out / "last.pt", "--images", classes, "--out", tmp_path / f"{kind}-drawn")
        assert (tmp_path / f"{kind}-drawn" / "recon.png").exists()
        assert json.loads((out / "log.jsonl").read_text().splitlines()[0])["config"]["distill"] == kind


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
    assert len(build_vit(str(out / "encoder.pt"), say=str).blocks) == 12
