import pytest
import torch
import torch.nn.functional as F
from golden import Golden, needs_golden

from data import find
from probe import extract, knn, linear


def clusters(n, spread, seed=0):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % 5
    centres = F.one_hot(torch.arange(5), 8).float()
    return centres[labels] + spread * torch.randn(n, 8, generator=generator), labels


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


@needs_golden
def test_knn_of_dino():
    g = Golden("dino_knn")
    sets = [g(f"input/{s}_{x}") for s in ("train", "test") for x in ("features", "labels")]
    for k in g.config["ks"]:
        assert knn(*sets, k=k, temperature=g.config["T"]) == pytest.approx(g(f"out/top1_top5_k{k}")[0].item(), abs=1e-3)


def test_features_come_in_the_order_asked_for(classes):
    source = find(str(classes))
    mean, std = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)
    indices = [31, 2, 17, 5, 39]
    x, y = extract(lambda img: img.flatten(1), source, indices, (16, 16), 3, mean, std, torch.device("cpu"), batch=2)
    one, _ = extract(lambda img: img.flatten(1), source, [17], (16, 16), 3, mean, std, torch.device("cpu"))
    assert y.tolist() == [1, 0, 0, 0, 1] and torch.equal(x[2], one[0])
