"""ViT, its positions and the files of others against recorded runs of the reference implementations. Sizes, heads and
options come from the recordings. tests/test_mae_recorded.py has what concerns MAE itself."""
import json

import pytest
import torch
import torch.nn.functional as F
from golden import FOLDER, Golden, close, close_grads, needs_golden, read_json

from vit import MODELS, SWINS, ViT, drop_path, pair, resize_positions, sincos_positions
from weights import Weights, encoder_options, is_swin, load_classifier, load_encoder, load_into, read, vit_options

pytestmark = needs_golden


def recordings(pattern):
    """The names of the recordings that are there, without .npz."""
    return sorted(path.stem for path in FOLDER.glob(f"{pattern}.npz"))


def rows_of(pattern, wanted):
    """(file, row) of all rows that are there in JSON files and whose state, {name: shape}, is wanted."""
    found = []
    for path in sorted(FOLDER.glob(f"{pattern}.json")):
        for row, content in read_json(path.stem).items():
            if wanted({name: shape for name, shape, *_ in content["state"]}):
                found.append((path.stem, row))
    return found


def vit_config(c):
    """The options of ViT in a recording's config."""
    return dict(img_size=c["img_size"], patch_size=c["patch_size"], dim=c["embed_dim"], depth=c["depth"],
                heads=c["num_heads"], mlp_ratio=c["mlp_ratio"], eps=c.get("norm_eps", 1e-6))


# ----------------------------------------------------------------------------------------------------------------
# Positions, drop path


@pytest.mark.parametrize("name, order", [("mae", "xy"), ("moco", "yx")])
def test_positions(name, order):
    g = Golden(f"pos_embed_{name}")
    for case in g.config["cases"]:
        if name == "mae":
            dim, side, cls = case
            table = sincos_positions(dim, side, side, order)[0]
            close(table if cls else table[1:], g(f"out/dim{dim}_grid{side}_cls{cls}"), 2e-6)
        elif case[1] == case[2]:                                # its table for other grids does not fit its tokens
            close(sincos_positions(*case, order)[0], g("out/dim{}_h{}_w{}".format(*case)), 2e-6)


def test_resized_positions_by_size():
    g = Golden("pos_embed_interp_mae")
    for i, (old, new) in enumerate(g.config["cases"]):
        close(resize_positions(g(f"input/pos_embed_{i}"), pair(old), pair(new)), g(f"out/pos_embed_{i}"), 2e-5)


def test_resized_positions_of_dino():
    g = Golden("dino_pos_interp")
    patch, pos = g.config["patch_size"], g("input/pos_embed")
    height, width = pair(g.config["img_size"])
    for h, w in g.config["sizes"]:
        ours = resize_positions(pos, (height // patch, width // patch), (h // patch, w // patch), offset=0.1)
        close(ours, g(f"out/pos_w{h}_h{w}"), 2e-5)


def test_drop_path():
    g = Golden("drop_path")
    # The reference keeps a sample where keep + u >= 1, so u >= 1 - keep = rate, up to the last bit of the sum.
    close(drop_path(g("input/x"), g.config["drop_prob"], g("rand/uniform")), g("out/y_train"), 1e-5)
    rate, depth = g.config["rates"]
    rates = [block.drop_path for block in ViT(16, 8, dim=8, depth=depth, heads=2, drop_path=rate).blocks]
    close(torch.tensor(rates), g("out/rates_per_block"), 1e-5)


# ----------------------------------------------------------------------------------------------------------------
# Shapes


def is_network(state):
    """Is this a ViT or Swin by itself? Shared relative positions, and no absolute ones, are not built here."""
    no_heads_of_dino = not any(name.startswith(("head.mlp", "head_dense")) for name in state)
    known = "pos_embed" in state or "layers.0.blocks.0.attn.relative_position_bias_table" in state
    return "patch_embed.proj.weight" in state and known and no_heads_of_dino and not any(
        name.startswith(("rel_pos_bias.", "mask_token", "absolute_pos_embed")) for name in state)


@pytest.mark.parametrize("file, row", rows_of("shapes_*", is_network))
def test_shapes(file, row):
    """Reading infers each published network from its shapes alone; building it gives the same names and shapes."""
    want = read_json(file)[row]
    want["state"] = [entry for entry in want["state"] if not entry[0].endswith("attn_mask")]
    state = {name: torch.empty(shape, device="meta") for name, shape, *_ in want["state"]}
    weights = Weights(state, {}, "", row)
    options = encoder_options(weights, heads=1)
    seen = ("dim", "depths", "heads") if is_swin(weights) else ("dim", "depth")
    for name, ours in (SWINS if is_swin(weights) else MODELS).items():
        if name in row:                                         # our tables have the published sizes
            assert [options[k] for k in seen] == [ours[k] for k in seen]
    # A table of relative positions has a column for each head; elsewhere any number that divides the width will do.
    table = state.get("blocks.0.attn.relative_position_bias_table")
    with torch.device("meta"):
        model, left = load_classifier(weights, 1 if table is None else table.shape[1])
    assert not left
    check_shapes(model, want)


def check_shapes(model, expected):
    assert sum(p.numel() for p in model.parameters()) == expected["n_params"]
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == expected["n_params_trainable"]
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    ours = {(k, tuple(v.shape), k in trained) for k, v in model.state_dict().items()}
    assert ours == {(k, tuple(shape), grad) for k, shape, _, grad in expected["state"]}


# ----------------------------------------------------------------------------------------------------------------
# Forward and backward


@pytest.mark.parametrize("name", [name for name in recordings("*_vit_ft_*") if "distill" not in name])
def test_classifier(name):
    g = Golden(name)
    tolerance = 2e-5 if name == "maelite_vit_ft_cls" else 1e-5
    model = ViT(**vit_config(g.config), num_classes=g.config["num_classes"], positions="learned",
                pool="avg" if g.config["global_pool"] else "cls")
    model.load_state_dict(g.under("state"))
    close(model.features(g("input/imgs")), g("out/features"), tolerance)
    logits = model(g("input/imgs"))
    close(logits, g("out/logits"), tolerance)
    loss = F.cross_entropy(logits, g("input/soft_target"))
    close(loss, g("out/loss"), tolerance)
    loss.backward()
    close_grads(model, g.under("grad"), 5e-5)


# ----------------------------------------------------------------------------------------------------------------
# Files


def quiet(_):
    pass


def public_file(npz, key="checkpoint"):
    """A recording, the path of the file that it names, and the heads of the network in it."""
    g = Golden(npz)
    return g, str(FOLDER / g.config[key]), g.config.get("student", g.config)["num_heads"]


@pytest.mark.parametrize("npz, key, network, out, options", [
    ("ckpt_mae_pretrain_release", "checkpoint", "", "features_cls", {}),
    ("ckpt_mae_pretrain_release", "checkpoint", "", "features_gap", dict(pool="avg")),
    ("ckpt_mae_pretrain_release", "checkpoint", "", "features_gap_resized",
     dict(pool="avg", img_size="resized_img_size")),
    ("ckpt_maelite_last_epoch", "checkpoint", "", "features_cls", {}),
    ("ckpt_maelite_last_epoch", "checkpoint", "", "features_gap", dict(pool="avg")),
    ("ckpt_moco", "checkpoint", "", "features", {}), ("ckpt_moco", "checkpoint_deit_format", "", "features", {}),
    ("ckpt_dino", "checkpoint", "", "features_teacher", {}),
    ("ckpt_dino", "checkpoint", ":student", "features_student", {}),
    ("ckpt_deit", "checkpoint", "", "logits", dict(num_classes="num_classes"))])
def test_public_files(npz, key, network, out, options):
    g, path, heads = public_file(npz, key)
    options = {name: g.config.get(value, value) for name, value in options.items()}
    model = load_encoder(path + network, heads, quiet, **options)
    img = g("input/imgs_resized" if "resized" in out else "input/imgs")
    close(model(img), g(f"out/{out}"), 1e-5)


def test_heads_must_be_known():
    with pytest.raises(SystemExit, match="--heads"):
        vit_options(read(public_file("ckpt_deit")[1]))


def test_distillation_token_is_refused():
    with pytest.raises(SystemExit, match="distillation token"):
        read(public_file("ckpt_deit", "checkpoint_distilled")[1])


def test_missing_keys_are_those_of_the_reference():
    """What the official loader leaves fresh for a pooled classifier: the pool's norm and the head, nothing else."""
    g, path, heads = public_file("ckpt_maelite_last_epoch")
    file = read(path)
    model = ViT(**{**vit_options(file, heads), "pool": "avg", "num_classes": g.config["num_classes"]})
    expected = {k.removeprefix("model.") for k in json.loads(str(g.arrays["out/missing_keys_gap"]))}
    assert set(load_into(model, file, quiet)) == expected
