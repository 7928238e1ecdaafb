"""Reading the recorded runs of the reference implementations, where they are at hand (../shared/golden or $GOLDEN)."""
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

FOLDER = Path(os.environ.get("GOLDEN", Path(__file__).parents[2] / "shared" / "golden"))
DATA = Path(os.environ.get("SAMPLE_DATA", Path(__file__).parents[2] / "shared" / "data"))

# For a test, or as the pytestmark of a file. conftest.py skips what bears it where there are no recordings;
# `make test-golden` runs what bears it and nothing else.
needs_golden = pytest.mark.golden


def recordings(*patterns, ext="npz"):
    """The names, without suffix, of the recordings that are there and match: recordings("mae_forward_*")."""
    return sorted({path.stem for pattern in patterns for path in FOLDER.glob(f"{pattern}.{ext}")})


def each_recording(*patterns):
    """Decorator: the test takes `name`, and runs once for each recording that is there and matches."""
    def decorate(test):
        return needs_golden(pytest.mark.parametrize("name", recordings(*patterns))(test))
    return decorate


class Golden:
    """One .npz: g("out/loss") and g.under("state") are its arrays as tensors, g.config["dim"] what made them."""

    def __init__(self, name):
        self.arrays = np.load(FOLDER / f"{name}.npz", allow_pickle=False)
        self.config = json.loads(str(self.arrays["config"]))

    def __call__(self, key):
        return torch.from_numpy(np.array(self.arrays[key]))

    def __contains__(self, key):
        return key in self.arrays.files

    def under(self, prefix):
        return {k[len(prefix) + 1:]: self(k) for k in self.arrays.files if k.startswith(prefix + "/")}


def read_json(name):
    return json.loads((FOLDER / f"{name}.json").read_text())


def close(ours, reference, tolerance):
    """Largest difference within tolerance * largest reference value, the rule of the recordings."""
    reference = torch.as_tensor(reference)
    assert ours.shape == reference.shape, f"{tuple(ours.shape)} is not {tuple(reference.shape)}"
    difference = (ours.detach().double() - reference.double()).abs().max().item()
    allowed = tolerance * reference.abs().max().item()
    assert difference <= allowed, f"differs by {difference:.3g}, allowed is {allowed:.3g}"


def close_grads(model, reference, tolerance):
    """Every gradient of the model against every recorded one; a hundredth of the largest is the floor for noise."""
    ours = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert set(ours) == set(reference)
    floor = 0.01 * max(g.abs().max().item() for g in reference.values())
    for name, g in reference.items():
        difference = (ours[name] - g).abs().max().item()
        allowed = tolerance * max(g.abs().max().item(), floor)
        assert difference <= allowed, f"{name} differs by {difference:.3g}, allowed is {allowed:.3g}"


def close_losses(g, step, loss, norm, noise):
    """A trajectory's loss and gradient norm at a step: fp32 and fp32 may differ by twenty times what the recorded run
    differs from its own float64 twin. noise: relative, of the norm."""
    reference = g("out/loss")[step].item()
    assert abs(loss.item() - reference) <= max(20 * g("dev64/out/loss")[step].item(), 1e-5 * reference)
    assert norm.item() == pytest.approx(g("out/grad_norm")[step].item(), rel=noise)
