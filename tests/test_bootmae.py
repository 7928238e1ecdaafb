"""BootMAE: recorded runs of the official code, invariants, the textbook form, and real runs."""
import copy
import json
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from golden import FOLDER, close, close_grads
from golden import Golden as Recording
from torch import nn

from more.bootmae import BootMAE, lr_at, momentum_at, parameter_groups
from nets.blocks import block_mask, order_of
from runtime.run import finite_step
from vit import gather_tokens, patchify

MIM = next((folder for folder in (FOLDER, FOLDER.parent / "golden_mim") if list(folder.glob("bootmae_*.npz"))), FOLDER)


class Golden(Recording):
    """A recording of masked image modelling, which are in a folder of their own."""

    def __init__(self, name):
        self.arrays = np.load(MIM / f"{name}.npz", allow_pickle=False)
        self.config = json.loads(str(self.arrays["config"]))


def each_recording(*patterns):
    found = sorted({path.stem for pattern in patterns for path in MIM.glob(f"{pattern}.npz")})
    return lambda test: pytest.mark.golden(pytest.mark.parametrize("name", found)(test))


# ----------------------------------------------------------------------------------------------------------------
# Recordings


def recorded(g):
    """The network of a recording, with its weights and, if it has some, those of its moving average."""
    c, state = g.config, g.under("state")
    taps = [number + 1 for number in c["fea_list"]]
    model = BootMAE(c["decode_dim"], c["decoder_depth"], weight_mask=c["weight_mask"], taps=(taps[0], taps[-1]),
                    img_size=c["img_size"], patch_size=c["patch_size"], dim=c["embed_dim"], depth=c["depth"],
                    heads=c["num_heads"], mlp_ratio=c["mlp_ratio"], eps=c["norm_eps"])
    model.visible = model.patches - c["mask_num"]
    slow = {k: v for k, v in g.under("state_ema").items() or state.items() if k in model.momentum_encoder.state_dict()}
    missing = model.load_state_dict(state | {f"momentum_encoder.{k}": v for k, v in slow.items()})
    assert not missing.missing_keys and sum(p.numel() for p in model.parameters() if p.requires_grad) <= c["n_params"]
    return model


def recorded_order(g, step):
    masks, noise = g("input/masks")[step].flatten(1).bool(), g("rand/uniform")[step].flatten(1)
    return order_of(masks, noise, int(g("rand/roll")[step]))


@each_recording("bootmae_step*")
def test_step(name):
    """Predictions, targets, both losses, every gradient, groups, and the moving average after it."""
    g = Golden(name)
    c, model, img, order = g.config, recorded(g), g("input/imgs")[0], recorded_order(g, 0)
    assert torch.equal(order, g("out/idx_shuffle"))
    back = order.argsort(1)
    pixels, features = (gather_tokens(x, back) for x in model.predict(img, order, first=1))
    close(pixels, patchify(g("out/pred_pixel"), c["patch_size"]), 1e-5)
    close(features, F.layer_norm(g("out/pred_feature"), features.shape[-1:], eps=1e-6), 1e-5)
    target = F.layer_norm(g("out/ema_feature"), features.shape[-1:], eps=1e-6)
    close(gather_tokens(model.feature_target(img, order, first=1), back), target, 1e-5)
    losses = model(img, order)
    close(losses[0], g("out/loss_pixel")[0], 1e-5)
    close(losses[1], g("out/loss_feature")[0], 1e-5)
    loss = losses[0] + weight_at(c, c["epoch"]) * losses[1]
    close(loss, g("out/loss")[0], 1e-5)
    loss.backward()
    close_grads(model, g.under("grad"), 5e-5)


def weight_at(c, epoch):
    return c["feature_weight"] * min(1, 4 * (epoch + 1) / c["epochs"])
