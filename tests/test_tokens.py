"""Distillation of final tokens: timm's own features as the reference, the losses against their formulas in float64,
what is refused, real runs."""
import hashlib
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from test_distill import write_teacher
from test_runs import TINY, finish, rows, same_state, start_and_kill, steps

import distill
from distill import TokenStudent, TokenTeacher, relation_error
from vit import ViT
from weights import load_encoder, read
from weights.timm_vit import cached_file, load_timm_vit, save_random_timm_vit

timm = pytest.importorskip("timm", reason="the teachers are timm's networks")

ROOT = Path(__file__).parents[1]
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# registers and patch 14; rotary positions, registers, layer scale; another mean; a distillation token; no cls token; a
# register and no cls token
NAMES = ("vit_small_patch14_reg4_dinov2", "vit_tiny_patch16_dinov3_qkvb", "vit_tiny_patch16_224",
         "deit_tiny_distilled_patch16_224", "vit_base_patch16_siglip_224", "vit_wee_patch16_reg1_gap_256")
SMALL = "vit_tiny_patch16_dinov3_qkvb"


def make_run(mean=MEAN, std=STD, dtype="fp32"):
    return SimpleNamespace(mean=mean, std=std, device=torch.device("cpu"), cfg=SimpleNamespace(dtype=dtype))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A function: name -> a file with random weights for timm's model, made once."""
    folder = tmp_path_factory.mktemp("timm")

    def file_of(name):
        path = folder / f"{name}.pth"
        if not path.exists():
            save_random_timm_vit(name, str(path))
        return str(path)
    return file_of


def official(name, state):
    """timm's tensors of a DINOv2 with registers, or of a DINOv3, by their official names and in their official form."""
    state = dict(state)
    if "dinov2" in name:
        half = state["cls_token"] / 2                           # timm adds the position of cls to cls
        state["pos_embed"] = torch.cat([half, state["pos_embed"]], 1)
        state["cls_token"], state["register_tokens"] = half, state.pop("reg_token")
    else:
        state["storage_tokens"] = state.pop("reg_token")
        for key in [key for key in state if key.endswith("q_bias")]:
            q, v = state.pop(key), state.pop(key.replace("q_bias", "v_bias"))
            state[key.replace("q_bias", "qkv.bias")] = torch.cat([q, torch.zeros_like(q), v])
            state[key.replace("q_bias", "qkv.bias_mask")] = torch.ones(3 * len(q))
        state = {key.replace("gamma_1", "ls1.gamma").replace("gamma_2", "ls2.gamma"): t for key, t in state.items()}
        state["rope_embed.periods"] = torch.ones(16)
    return dict(state, mask_token=torch.zeros(1, state["cls_token"].shape[-1]))


# ----------------------------------------------------------------------------------------------------------------
# What the teacher says


@pytest.mark.parametrize("name", NAMES)
def test_tokens_are_timms_own_to_the_bit(files, name):
    """Same patches, same normalisation: after timm's own forward_features only a LayerNorm without weights."""
    network = timm.create_model(name, num_classes=0, dynamic_img_size=True)
    network.load_state_dict(torch.load(files(name)))
    network.requires_grad_(False).eval()
    data = timm.get_pretrained_cfg(name)
    teacher = TokenTeacher(f"timm:{name}", files(name), None, (3, 4), make_run(data.mean, data.std))
    patch = network.patch_embed.patch_size[0]
    img = torch.randn(2, 3, 3 * patch, 4 * patch)
    cls, patches = teacher(img)
    tokens = F.layer_norm(network.forward_features(img), (network.num_features,))
    assert torch.equal(patches, tokens[:, -12:]) and patches.dtype == torch.float32
    assert (cls is None) == (name in NAMES[-2:])
    assert cls is None or torch.equal(cls, tokens[:, 0])
    assert teacher.vit.licence == data.license and not any(p.requires_grad for p in teacher.vit.network.parameters())


@pytest.mark.parametrize("name", ["vit_small_patch14_reg4_dinov2", "vit_tiny_patch16_dinov3_qkvb"])
def test_official_layouts(files, name, tmp_path):
    torch.save(official(name, torch.load(files(name))), tmp_path / "official.pth")
    img, run = torch.randn(2, 3, 64, 64), make_run()
    expected = TokenTeacher(f"timm:{name}", files(name), None, (4, 4), run)(img)
    found = TokenTeacher(f"timm:{name}", str(tmp_path / "official.pth"), None, (4, 4), run)(img)
    for ours, theirs in zip(found, expected):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("kind", ["own", "timm"])
def test_another_normalisation_is_undone(files, kind, tmp_path):
    """Pixels in 0..1, normalised for the student: the teacher sees them as it is used to."""
    if kind == "own":
        name, vit = write_teacher(tmp_path / "t.pth", mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))
        name, file, mean, std, patch, features = name, None, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4), 6, vit.encode
    else:
        name, file = "timm:vit_tiny_patch16_224", files("vit_tiny_patch16_224")
        vit = load_timm_vit(name[5:], file)
        mean, std, patch, features = vit.mean, vit.std, 16, vit.network.forward_features
        assert mean == (0.5, 0.5, 0.5)
    pixels = torch.rand(2, 3, 4 * patch, 4 * patch)
    teacher = TokenTeacher(name, file, None, (4, 4), make_run())
    mine, its = (torch.tensor((m, s)).view(2, 3, 1, 1) for m, s in ((MEAN, STD), (mean, std)))
    with torch.no_grad():
        tokens = features((pixels - its[0]) / its[1])
    tokens = F.layer_norm(tokens, tokens.shape[-1:])
    cls, patches = teacher((pixels - mine[0]) / mine[1])
    torch.testing.assert_close(cls, tokens[:, 0], rtol=0, atol=5e-5)
    torch.testing.assert_close(patches, tokens[:, 1:], rtol=0, atol=5e-5)


def test_the_same_patch_responds(tmp_path):
    """An object moves over the student's grid of patches of 8 pixels; the tokens of a teacher with patches of 14 change
    most at the very same place. Its layer scale is at 1e-5, so that each token is of its own patch alone."""
    name = "vit_small_patch14_reg4_dinov2"
    torch.save(timm.create_model(name, num_classes=0).state_dict(), tmp_path / "t.pth")
    teacher = TokenTeacher(f"timm:{name}", str(tmp_path / "t.pth"), None, (3, 5), make_run())
    torch.manual_seed(0)
    empty = torch.randn(1, 3, 24, 40)
    for place in range(15):
        img, row, column = empty.clone(), place // 5 * 8, place % 5 * 8
        img[:, :, row:row + 8, column:column + 8] = torch.randn(3, 8, 8)
        change = (teacher(img)[1] - teacher(empty)[1]).norm(dim=-1)[0]                          # (15,)
        assert change.argmax() == place and change[place] > 2 * change.sort().values[-2]


def test_a_file_of_ours_as_the_teacher(tmp_path):
    """An encoder, and a classifier that has no final norm because it pools before it; another patch size than ours."""
    path, vit = write_teacher(tmp_path / "t.pth")
    img = torch.randn(2, 3, 24, 24)
    cls, patches = TokenTeacher(path, None, None, (4, 4), make_run())(img)
    expected = F.layer_norm(vit.encode(img), (24,))
    torch.testing.assert_close(torch.cat([cls.unsqueeze(1), patches], 1), expected, rtol=0, atol=1e-6)
    small = TokenTeacher(path, None, None, (2, 3), make_run())              # seen at (12, 18) pixels
    resized = F.interpolate(img[:, :, :16], (12, 18), mode="bicubic", antialias=True)
    expected = F.layer_norm(vit.encode(resized), (24,))
    torch.testing.assert_close(small(img[:, :, :16])[1], expected[:, 1:], rtol=0, atol=1e-5)
    state = {k: v for k, v in vit.state_dict().items() if not k.startswith("norm.")}
    state |= {"fc_norm.weight": torch.ones(24), "fc_norm.bias": torch.zeros(24), "head.weight": torch.randn(5, 24),
              "head.bias": torch.zeros(5)}
    teacher = dict(name="timm:x", sha256="0", licence="some-licence")
    torch.save(dict(model=state, config=dict(heads=3, pool="avg", teacher=teacher)), tmp_path / "c.pth")
    vit.norm = torch.nn.Identity()
    classifier = TokenTeacher(str(tmp_path / "c.pth"), None, None, (4, 4), make_run())
    torch.testing.assert_close(classifier(img)[1], F.layer_norm(vit.encode(img), (24,))[:, 1:], rtol=0, atol=1e-6)
    assert classifier.facts["licence"] == "some-licence"        # that of the teacher's own teacher


def test_low_precision_keeps_the_targets_in_fp32(files):
    exact, rough = (TokenTeacher(f"timm:{SMALL}", files(SMALL), None, (2, 2), make_run(dtype=dtype))
                    for dtype in ("fp32", "bf16"))
    img = torch.randn(2, 3, 32, 32)
    with torch.autocast("cpu", torch.bfloat16):
        found = rough(img)
    for ours, theirs in zip(found, exact(img)):
        assert ours.dtype == torch.float32 and F.cosine_similarity(ours, theirs, -1).min() > 0.99


# ----------------------------------------------------------------------------------------------------------------
# What the student learns


class FixedTeacher:
    """A teacher that says what it is given."""

    def __init__(self, cls, patches):
        self.answer, self.vit = (cls, patches), SimpleNamespace(has_cls=cls is not None, width=patches.shape[-1])

    def __call__(self, img):
        return self.answer


def make_student(patch_loss="features", with_cls=True, images=5):
    torch.manual_seed(0)
    vit = ViT(12, 6, dim=16, depth=2, heads=4)
    cls, patches = torch.randn(images, 24) if with_cls else None, torch.randn(images, 4, 24) + torch.randn(24)
    return TokenStudent(vit, FixedTeacher(cls, patches), patch_loss), torch.randn(images, 3, 12, 12)


def relation_textbook(tokens, targets):
    """Patch by patch, in float64: KL(teacher || student) of the softmax of cosines / 0.07."""
    total = []
    for ours, theirs in zip(tokens.double(), targets.double()):
        for i in range(len(ours)):
            p, q = (torch.stack([x[i] @ y / x[i].norm() / y.norm() / 0.07 for y in x]).softmax(0)
                    for x in (theirs, ours))
            total.append(sum(p[j] * (p[j].log() - q[j].log()) for j in range(len(p))))
    return sum(total) / len(total)


@pytest.mark.parametrize("patch_loss", ["features", "relations", "both"])
@pytest.mark.parametrize("with_cls", [True, False])
def test_the_loss_is_the_formula(patch_loss, with_cls):
    model, img = make_student(patch_loss, with_cls)
    loss = model(img)
    cls, patches = model.teacher.answer
    tokens, parts = model.model.encode(img).double(), {}
    model.double()
    if with_cls:
        parts["cls"] = ((model.cls_head[1](model.cls_head[0](tokens[:, 0])) - cls) ** 2).mean()
    if patch_loss != "relations":
        parts["patch"] = ((model.patch_head[1](model.patch_head[0](tokens[:, 1:])) - patches) ** 2).mean()
    if patch_loss != "features":
        parts["relation"] = relation_textbook(tokens[:, 1:], patches)
    assert loss.item() == pytest.approx(sum(parts.values()).item(), rel=1e-5)
    assert model.parts.keys() == parts.keys()
    for name, part in parts.items():
        assert model.parts[name].item() == pytest.approx(part.item(), rel=1e-5)


@pytest.mark.parametrize("patch_loss", ["features", "relations", "both"])
def test_every_parameter_learns(patch_loss):
    """The whole depth and the final norm; heads are there only if something is asked of them."""
    model, img = make_student(patch_loss)
    model(img).backward()
    trained = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert not [name for name, grad in trained.items() if grad is None or not grad.any()]
    assert (model.patch_head is None) == (patch_loss == "relations")
    assert not [name for name in model.state_dict() if "teacher" in name]


def test_the_relation_term_in_low_precision():
    x, y = torch.randn(2, 9, 32), torch.randn(2, 9, 48)
    with torch.autocast("cpu", torch.bfloat16):
        rough = relation_error(x, y)
    assert rough.item() == pytest.approx(relation_error(x, y).item(), rel=1e-6)
    assert relation_error(x, x * 3).item() == pytest.approx(0, abs=1e-6)                # lengths do not count


def test_chance_is_the_loss_of_the_best_constant():
    """Heads that say the mean target whatever they see have exactly that loss, and that cosine."""
    model, img = make_student("both")
    cls, patches = model.teacher.answer
    for head, mean in ((model.cls_head, cls.mean(0)), (model.patch_head, patches.mean((0, 1)))):
        torch.nn.init.zeros_(head[1].weight)
        head[1].bias.data.copy_(mean)
    model(img)
    found = model.metrics()
    for name in ("cls", "patch"):
        assert found[f"{name}_chance"].item() == pytest.approx(model.parts[name].item(), rel=1e-5)
        assert found[f"{name}_cos"].item() == pytest.approx(found[f"{name}_cos_chance"].item(), rel=1e-5)
    p = torch.nn.functional.normalize(patches.double(), dim=-1)
    p = (p @ p.transpose(1, 2) / 0.07).softmax(-1)                                      # (B, N, N)
    best = (p * (p.log() - p.mean(0).log())).sum(-1).mean()
    assert found["relation_chance"].item() == pytest.approx(best.item(), rel=1e-4)
    total = sum(found[f"{name}_chance"] for name in ("cls", "patch", "relation"))
    torch.testing.assert_close(found["chance"], total)
    with torch.no_grad():                                       # one vector for all images: no spread
        model.model.patch_embed.proj.weight.zero_()
    model(img)
    assert model.metrics()["spread"] < 1e-3 < found["spread"]


# ----------------------------------------------------------------------------------------------------------------
# What is refused, in words


def refused(call, *arguments):
    with pytest.raises(SystemExit) as stop:
        call(*arguments)
    assert "\n" not in str(stop.value)
    return str(stop.value)


def test_mistaken_command_lines():
    words = {("--teacher", "timm:x", "--teacher-heads", "3"): "no effect with --teacher timm:NAME",
             ("--teacher", "timm:x", "--distill", "attention"): "give --distill tokens",
             ("--teacher", "x", "--teacher-file", "y"): "no effect without --teacher timm:NAME",
             ("--teacher", "x", "--patch-loss", "both"): "no effect without --distill tokens",
             ("--teacher", "timm:x", "--mask-ratio", "0.5"): "leave them out",
             ("--teacher", "timm:x", "--distill-layers", "1:1"): "leave them out",
             ("--distill", "tokens"): "--teacher is required",
             ("--teacher-file", "x"): "no effect without --teacher"}
    for arguments, text in words.items():
        assert text in refused(distill.read_config, list(arguments))


def test_a_teacher_of_timm_for_pixels():
    """mae.py compares attention, which timm's networks do not give."""
    assert "only `distill.py --distill tokens`" in refused(distill.Teacher, "timm:x", None, "hidden", None, {}, 1, None)


def test_recipe():
    cfg = distill.read_config(["--teacher", "timm:x"])
    assert (cfg.distill, cfg.patch_loss, cfg.mask_ratio) == ("tokens", "features", 0)
    assert (cfg.clip_grad, cfg.blr * 512 / 256) == (1, 5e-4)
    assert (cfg.batch_size, cfg.epochs, cfg.warmup_epochs, cfg.weight_decay, cfg.min_crop) == (512, 300, 5, 0.05, 0.14)
    assert distill.read_config(["--teacher", "x", "--distill", "tokens"]).distill == "tokens"


def test_mistaken_teachers(files, tmp_path, monkeypatch):
    def words(name, file, mean=MEAN, std=STD, grid=(3, 3)):
        return refused(TokenTeacher, f"timm:{name}", file, None, grid, make_run(mean, std))

    def saved(name, content):
        torch.save(content, tmp_path / name)
        return str(tmp_path / name)

    dinov3, small = files(SMALL), files("vit_small_patch14_reg4_dinov2")
    assert "nearest names are vit_small_patch14_dinov2" in words("vit_smal_patch14_dinov2", dinov3)
    assert "no model called ''" in words("", dinov3) and "has all names" in words("XYZ", dinov3)
    assert "no weights called vit_small_patch14_dinov2.x: of vit_small_patch14_dinov2 it knows" in words(
        "vit_small_patch14_dinov2.x", small)
    assert "does not exist" in words(SMALL, str(tmp_path / "absent.pth"))
    assert "does not fit timm's vit_base_patch16_dinov3: " in words("vit_base_patch16_dinov3", dinov3)
    for name in ("resnet18", "hiera_tiny_224", "beit_base_patch16_224"):
        assert "is no plain ViT" in words(name, dinov3)
    for name, text in (("swin_tiny_patch4_window7_224", "gives no patch tokens"),
                       ("vit_small_r26_s32_224", "cannot see the grid")):
        assert text in words(name, saved("other.pth", timm.create_model(name, num_classes=0).state_dict()))
    assert "sees images of 3 channels, the student of 1: --in-chans 3" in words(SMALL, dinov3, (0.5,), (0.25,))
    state = torch.load(dinov3)
    assert "NaN or infinite weights in norm.weight" in words(SMALL, saved("nan.pth", state | {
        "norm.weight": state["norm.weight"] / 0}))
    assert "holds no weights by name" in words(SMALL, saved("list.pth", [1, 2]))
    assert "holds no weights by name" in words(SMALL, f"{dinov3}:other")
    assert "has patches of 14 pixels, and timm's vit_small_patch16_224 of 16" in words("vit_small_patch16_224", saved(
        "14.pth", torch.load(files("vit_small_patch14_dinov2"))))
    damaged = bytearray(Path(dinov3).read_bytes())
    damaged[len(damaged) // 2] ^= 1
    (tmp_path / "damaged.pth").write_bytes(damaged)
    assert "is damaged" in words(SMALL, str(tmp_path / "damaged.pth"))
    monkeypatch.setitem(sys.modules, "timm", None)
    assert "needs the package timm: pip install" in words(SMALL, dinov3)


def test_biases_without_a_place(files, tmp_path, capfd):
    """timm's DINOv3 without _qkvb drops them, and only prints a line for each block."""
    state = official(SMALL, torch.load(files(SMALL)))
    path = str(tmp_path / "official.pth")
    torch.save(state, path)
    plain = SMALL.removesuffix("_qkvb")
    if not timm.is_model(plain):
        pytest.skip(f"this timm has no {plain}")
    torch.save(state | {"blocks.0.attn.qkv.bias": torch.ones(576)}, path)
    with pytest.raises(ValueError, match="biases of queries and values.*_qkvb"):
        load_timm_vit(plain, path)
    assert "q_bias" not in capfd.readouterr().out


def test_a_name_with_weights_of_several_licences(files, capsys):
    load_timm_vit("vit_base_patch16_224", files("vit_base_patch16_224"))
    said = capsys.readouterr().out
    assert "is taken as vit_base_patch16_224.augreg2_in21k_ft_in1k" in said and "vit_base_patch16_224.mae" in said
    found = load_timm_vit("vit_base_patch16_224.mae", files("vit_base_patch16_224"))
    assert found.mean == MEAN and found.licence == "cc-by-nc-4.0" and "warning" not in capsys.readouterr().out


@pytest.mark.parametrize("place", ["teacher", "model", "net", None])
def test_where_the_weights_are(files, tmp_path, place):
    """Under a key, behind the prefixes of DistributedDataParallel and of torch.compile, in a folder."""
    state = torch.load(files(SMALL))
    behind = {f"module._orig_mod.backbone.{name}": t for name, t in state.items()}
    path = tmp_path / "x.pth"
    torch.save({place: behind, "epoch": 3} if place else behind, path)
    found = load_timm_vit(SMALL, str(path)).network.state_dict()
    assert all(torch.equal(t, found[name]) for name, t in state.items())
    if place == "net":
        safetensors = pytest.importorskip("safetensors.torch", reason="safetensors is not installed")
        (tmp_path / "folder").mkdir()
        safetensors.save_file(state, tmp_path / "folder" / "model.safetensors")
        teacher = TokenTeacher(f"timm:{SMALL}", str(tmp_path / "folder"), None, (2, 2), make_run())
        assert torch.equal(teacher.vit.network.norm.weight, state["norm.weight"])


@pytest.mark.parametrize("change, words", [("missing", "lacks 1 tensors"), ("more", "holds blocks.0.more, which")])
def test_no_weight_is_missing_or_left_over(files, tmp_path, change, words):
    """timm itself takes a file without a bias where its entry has a classifier, and only writes it into its log."""
    name = "vit_tiny_patch16_224"
    state = torch.load(files(name))
    if change == "missing":
        del state["blocks.3.mlp.fc1.bias"]
    else:
        state["blocks.0.more"] = torch.zeros(3)
    state["head.weight"] = torch.zeros(1000, 192)               # is not needed, and is no trouble
    torch.save(state, tmp_path / "t.pth")
    load = torch.nn.Module.load_state_dict
    with pytest.raises(ValueError, match=words):
        load_timm_vit(name, str(tmp_path / "t.pth"))
    assert torch.nn.Module.load_state_dict is load


def test_the_registers_of_another_network(files):
    """DINOv2 without registers is not what a file with registers holds, and the other way round."""
    with pytest.raises(ValueError, match="dinov2.pth (holds|does not fit) .*reg_token|dinov2.pth does not fit"):
        load_timm_vit("vit_small_patch14_dinov2", files("vit_small_patch14_reg4_dinov2"))
    with pytest.raises(ValueError, match="dinov2.pth (lacks|does not fit)"):
        load_timm_vit("vit_small_patch14_reg4_dinov2", files("vit_small_patch14_dinov2"))


def test_the_cache_of_timm(files, tmp_path, monkeypatch):
    """Without --teacher-file a file in one of the caches is taken, and nothing is downloaded where there is none."""
    hub = pytest.importorskip("huggingface_hub")
    monkeypatch.setattr(hub.constants, "HF_HUB_CACHE", str(tmp_path / "hf"))
    monkeypatch.setattr(hub.file_download, "HF_HUB_CACHE", str(tmp_path / "hf"), raising=False)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "torch"))
    with pytest.raises(ValueError, match="--teacher-file FILE .* nothing is downloaded"):
        cached_file(SMALL)
    repo = tmp_path / "hf" / "models--timm--vit_tiny_patch16_dinov3_qkvb.eupe_lvd1689m"
    (repo / "snapshots" / "abc").mkdir(parents=True)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("abc")
    (repo / "snapshots" / "abc" / "pytorch_model.bin").write_bytes(Path(files(SMALL)).read_bytes())
    assert cached_file(SMALL).endswith("pytorch_model.bin")
    assert TokenTeacher(f"timm:{SMALL}", None, None, (2, 2), make_run()).vit.width == 192
    url = tmp_path / "torch" / "checkpoints" / "dinov2_vits14_pretrain.pth"
    url.parent.mkdir(parents=True)
    url.write_bytes(b"x")
    assert cached_file("vit_small_patch14_dinov2") == str(url)


# ----------------------------------------------------------------------------------------------------------------
# Real runs


@pytest.mark.parametrize("world", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_killed_and_resumed_is_bitwise_the_same(classes, files, tmp_path, world):
    """kill -9 and the same command again; the teacher's file may lie elsewhere, but must be the same, with its name."""
    teacher = ["--teacher", f"timm:{SMALL}", "--teacher-file", files(SMALL), "--patch-loss", "both"]
    args = ["--data", classes, *TINY, "--epochs", 6, "--warmup-epochs", 1]                      # 30 steps
    whole, out = tmp_path / "whole", tmp_path / "broken"
    text = finish(*args, *teacher, "--out", whole, world=world, script="distill.py")
    digest = hashlib.sha256(Path(files(SMALL)).read_bytes()).hexdigest()
    assert f"teacher timm:{SMALL}: 192 wide, patches of 16, sha256 {digest[:12]}" in text
    assert "licence fair-noncommercial-research-license, which may bind the student" in text
    start_and_kill(*args, *teacher, out=out, step=12, world=world, script="distill.py")
    moved = tmp_path / "moved.pth"
    moved.write_bytes(Path(files(SMALL)).read_bytes())
    teacher[3] = moved
    finish(*args, *teacher, "--out", out, "--workers", 1, world=world, script="distill.py")
    got = steps(out)
    assert any(b <= a for a, b in zip(got, got[1:])), "no step was repeated: nothing was resumed"
    first, second = ({r["step"]: r["loss"] for r in rows(f) if "loss" in r} for f in (whole, out))
    assert first == second and len(first) == 30
    same_state(whole, out)
    last = rows(out)[-1]
    assert last["loss"] == pytest.approx(last["cls"] + last["patch"] + last["relation"], rel=1e-5)
    assert {"chance", "cls_chance", "patch_cos", "patch_cos_chance", "relation_chance", "spread"} <= last.keys()
    facts = dict(name=f"timm:{SMALL}", licence="fair-noncommercial-research-license", sha256=digest)
    saved, encoder = torch.load(out / "last.pt"), torch.load(out / "encoder.pt")
    assert saved["teacher"] == facts == encoder["config"]["teacher"]
    assert not any("head" in name for name in encoder["model"]) and "norm.weight" in encoder["model"]
    assert load_encoder(str(out / "encoder.pt"), say=str).depth == 4
    said = subprocess.check_output([sys.executable, "-m", "weights", out / "encoder.pt"], text=True, cwd=ROOT)
    assert f"timm:{SMALL}, licence fair-noncommercial-research-license, sha256 {digest}" in said
    if world == 1:                                              # the teacher is known after fine-tuning, too
        finish("--data", classes, "--init", out / "encoder.pt", "--epochs", 1, "--batch-size", 8, "--workers", 0,
               "--out", tmp_path / "tuned", script="finetune.py")
        for path in (tmp_path / "tuned" / "best.pt", out / "last.pt"):
            assert read(str(path)).config["teacher"] == facts
        torch.save({k: v + 1 if "norm.weight" in k else v for k, v in torch.load(moved).items()}, moved)
        text = finish(*args, *teacher, "--out", out, script="distill.py", expect=1)
        assert "is not the file that this run began with" in text and "Traceback" not in text


@pytest.mark.slow
def test_the_teacher_is_compiled_with_the_student(files):
    """Compiled, the same loss and the same gradients."""
    torch.manual_seed(0)
    vit = ViT(32, 16, dim=16, depth=2, heads=4)
    teacher = TokenTeacher(f"timm:{SMALL}", files(SMALL), None, vit.grid, make_run())
    teacher.vit.network.blocks = teacher.vit.network.blocks[:2]         # compiled in seconds
    model = TokenStudent(vit, teacher, "both")
    img, results = torch.randn(2, 3, 32, 32), []
    for net in (model, torch.compile(model, dynamic=False)):
        model.zero_grad()
        loss = net(img)
        loss.backward()
        results.append((loss.detach(), [p.grad.clone() for p in model.parameters() if p.grad is not None]))
        assert model.metrics()["chance"] > 0
    torch.testing.assert_close(results[0][0], results[1][0])
    for eager, compiled in zip(results[0][1], results[1][1]):
        torch.testing.assert_close(eager, compiled, rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_the_demo_learns_what_a_random_teacher_says(tmp_path):
    text = finish("--demo", "--out", tmp_path / "demo", script="distill.py")
    assert "done:" in text and (tmp_path / "demo" / "teacher.pth").exists()
    first, last = ([row for row in rows(tmp_path / "demo") if "loss" in row][i] for i in (0, -1))
    for name in ("cls", "patch"):
        assert first[f"{name}_cos"] < first[f"{name}_cos_chance"] < 0.9 < last[f"{name}_cos"]
    assert last["loss"] < 0.2 * last["chance"]
