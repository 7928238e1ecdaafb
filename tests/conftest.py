import signal

import numpy as np
import pytest
import torch
from golden import FOLDER
from PIL import Image

torch.set_num_threads(1)            # the networks here are tiny: a second thread costs more than it brings


def pytest_runtest_setup(item):
    if item.get_closest_marker("golden") and not FOLDER.is_dir():
        pytest.skip(f"recorded reference runs not found in {FOLDER}")


@pytest.fixture(autouse=True)
def signals_as_they_were():
    """A script's main installs signal handlers; pytest wants its own back."""
    numbers = signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP, signal.SIGALRM
    before = [signal.getsignal(number) for number in numbers]
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    for number, handler in zip(numbers, before):
        signal.signal(number, handler)


def write_images(folder, count, side=24, suffix=".png", seed=0):
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    for i in range(count):
        coarse = rng.integers(0, 256, (3, 3, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC).save(folder / f"{i:03}{suffix}")


@pytest.fixture(scope="session")
def classes(tmp_path_factory):
    """train/ and val/ with classes a and b: 40 and 8 images."""
    root = tmp_path_factory.mktemp("classes")
    for k, name in enumerate("ab"):
        write_images(root / "train" / name, 20, seed=k)
        write_images(root / "val" / name, 4, seed=10 + k)
    return root
