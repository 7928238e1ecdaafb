"""Quick probes: features in order, k-NN and closed-form linear accuracy."""
import pytest
import torch
import torch.nn.functional as F
from conftest import write_images
from test_heads import clusters

from images.datasets import open_dataset
from nets.heads import knn, linear
from runtime.probes import extract

CPU, HALF, QUARTER = torch.device("cpu"), (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)


def test_identical_features_are_found():
    x, y = clusters(200, 0.5)
    assert knn(x, y, x, y, k=1) == 100


def test_separate_clusters_are_told_apart_and_noise_is_not():
    train, test = clusters(500, 0.1), clusters(200, 0.1, seed=1)
    assert knn(*train, *test) == 100 and linear(*train, *test) == 100
    noise = [torch.randn(n, 8, generator=torch.Generator().manual_seed(n)) for n in (500, 200)]
    for method in (knn, linear):
        assert 8 < method(noise[0], train[1], noise[1], test[1]) < 34       # chance is 20, five deviations are 14


def test_linear_is_ridge_regression():
    """Against torch's own least squares, where the penalty hardly matters."""
    train, test = clusters(2000, 0.4), clusters(1000, 0.4, seed=1)
    mean, std = train[0].mean(0), train[0].std(0)
    a, b = (torch.cat([(x - mean) / std, torch.ones(len(x), 1)], 1) for x in (train[0], test[0]))
    weight = torch.linalg.lstsq(a, F.one_hot(train[1]).float()).solution
    expected = 100 * ((b @ weight).argmax(1) == test[1]).float().mean().item()
    assert linear(*train, *test) == pytest.approx(expected, abs=0.5)


def test_features_come_in_the_order_asked_for(classes):
    source = open_dataset(str(classes))
    indices = [31, 2, 17, 5, 39]
    x, y = extract(lambda img: img.flatten(1), source, indices, (16, 16), 3, HALF, QUARTER, CPU, batch=2)
    one, _ = extract(lambda img: img.flatten(1), source, [17], (16, 16), 3, HALF, QUARTER, CPU)
    assert y.tolist() == [1, 0, 0, 0, 1] and torch.equal(x[2], one[0])


def test_unreadable_images_are_counted(tmp_path):
    """A few are replaced; more than the share that is allowed end in a sentence."""
    for name in "ab":
        write_images(tmp_path / "set" / "train" / name, 6)
    many = open_dataset(str(tmp_path / "set"))
    read, many.read = many.read, lambda i: b"damaged" if i % 9 == 0 else read(i)
    shown = lambda x: x.flatten(1)                                                                  # noqa: E731
    assert len(extract(shown, many, range(12), (4, 4), 3, HALF, QUARTER, CPU, max_unreadable=0.05)[0]) == 12
    with pytest.raises(SystemExit, match="of 240 images under .* could not be read, more than --max-unreadable 0.05"):
        extract(shown, many, list(range(12)) * 20, (4, 4), 3, HALF, QUARTER, CPU, max_unreadable=0.05)
