"""The heads on frozen features: k-NN votes, accuracies, linear heads, LARS."""
import math

import pytest
import torch
import torch.nn.functional as F
from golden import Golden, close, each_recording
from torch import nn

from nets.heads import LARS, accuracies, fit_heads, knn, knn_counts, sweep, tally, votes
from runtime.run import finite_step


def clusters(n, spread, seed=0):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % 5
    centres = F.one_hot(torch.arange(5), 8).float()
    return centres[labels] + spread * torch.randn(n, 8, generator=generator), labels


@each_recording("dino_knn*")
def test_knn_of_dino(name):
    """Votes, predictions, top-1 and top-5 for every k, from one search."""
    g = Golden(name)
    sets = [g(f"input/{s}_{x}") for s in ("train", "test") for x in ("features", "labels")]
    ks, T, classes = g.config["ks"], g.config["T"], g.config["num_classes"]
    found, counts = votes(*sets[:3], ks, classes, T), knn_counts(*sets, ks, classes, T)
    for k in ks:
        close(found[k].sort(1, descending=True).values, g(f"out/sorted_votes_k{k}"), 2e-5)
        assert torch.equal(found[k].argmax(1), g(f"out/pred_k{k}"))
        numbers, (top1, top5) = accuracies(counts[k]), g(f"out/top1_top5_k{k}").tolist()
        assert numbers["test_acc1"] == pytest.approx(top1, abs=1e-4)
        assert numbers["test_acc5"] == pytest.approx(top5, abs=1e-4)
        assert knn(*sets, k=k, temperature=T) == pytest.approx(top1, abs=1e-4)


@pytest.mark.parametrize("most", [1, 7 * 300, 39 * 300, 2 ** 26])
def test_search_in_parts_is_exact(most):
    """Features of plus and minus one, so that every product is exact: the parts find what one search of all finds."""
    train, test = (torch.randn(n, 64, generator=torch.Generator().manual_seed(n)).sign() for n in (300, 40))
    y, z, ks = torch.arange(300) % 5, torch.arange(40) % 5, (1, 12, 400)                # 400: more than there are
    parts = knn_counts(train, y, test, z, ks, 5, most=most)
    best, places = (test @ train.T / 64).topk(300, 1)                                   # the nearest first
    for k in ks:
        scores = torch.zeros(40, 5).scatter_add(1, y[places[:, :k]], (best[:, :k] / 0.07).exp())
        torch.testing.assert_close(votes(train / 8, y, test / 8, ks, 5)[k], scores)
        assert torch.equal(parts[k], tally(scores, z, min(5, k))) and parts[k][0].sum() == 40


def test_knn_is_the_textbook_loop():
    """One image and one neighbour at a time, in float64."""
    (train, y), (test, z) = clusters(300, 0.6), clusters(60, 0.6, seed=1)
    together, right = knn_counts(train, y, test, z, (1, 10, 100), 5), {1: 0, 10: 0, 100: 0}
    for x, label in zip(test.double().tolist(), z.tolist()):
        cosine = [sum(a * b for a, b in zip(x, t)) / math.hypot(*x) / math.hypot(*t) for t in train.double().tolist()]
        nearest = sorted(range(300), key=lambda i: -cosine[i])                                      # noqa: B023
        for k in right:
            score = [sum(math.exp(cosine[i] / 0.07) for i in nearest[:k] if y[i] == c) for c in range(5)]
            right[k] += score.index(max(score)) == label
    for k, hits in right.items():
        assert 24 < hits < 60 and knn(train, y, test, z, k) == pytest.approx(100 * hits / 60, abs=1e-4)
        assert accuracies(together[k])["test_acc1"] == pytest.approx(knn(train, y, test, z, k), abs=1e-4)


def test_accuracies():
    """Uneven classes, one of them without images, in parts."""
    scores, labels = torch.randn(90, 8, generator=torch.Generator().manual_seed(0)), torch.arange(90) // 7 % 7
    order = scores.argsort(1, descending=True)
    right, five = order[:, 0] == labels, (order[:, :5] == labels[:, None]).any(1)
    each = [right[labels == c].double().mean() for c in range(7)]
    found = accuracies(sum(tally(s, y) for s, y in zip(scores.split(13), labels.split(13))))
    assert found == {k: pytest.approx(100 * float(v), abs=1e-4) for k, v in dict(
        test_acc1=right.double().mean(), test_acc5=five.double().mean(), test_class_acc=sum(each) / 7).items()}
    assert accuracies(tally(scores[:, :2], labels.clamp(max=1)))["test_acc5"] == 100        # fewer classes than five
    assert accuracies(tally(scores * math.nan, labels))["test_acc5"] == 0
    assert tally(torch.zeros(2, 8), torch.tensor([0, 4])).sum(1).tolist() == [2, 1, 2]      # ties go by class


@each_recording("lars_*")
def test_lars(name):
    """Stopped and gone on with from its state after half of the steps."""
    g = Golden(name)
    params = {k: nn.Parameter(v) for k, v in g.under("state").items()}
    made = dict(lr=1.0, momentum=g.config["momentum"], weight_decay=g.config["weight_decay"],
                trust=g.config["trust_coefficient"])
    optimizer = LARS(params.values(), **made)
    for step, lr in enumerate(g.config["lr_per_step"]):
        if step == len(g.config["lr_per_step"]) // 2:
            state = optimizer.state_dict()
            optimizer = LARS(params.values(), lr=1.0)
            optimizer.load_state_dict(state)
        for group in optimizer.param_groups:
            group["lr"] = lr
        for k, p in params.items():
            p.grad = g(f"input/grads/{k}")[step]
        optimizer.step()
        for k, p in params.items():
            close(p, g(f"out/{k}")[step], 1e-5)


def test_without_trust_it_is_sgd_and_a_skipped_step_is_none():
    pairs = [[nn.Parameter(torch.randn(4, 3, generator=torch.Generator().manual_seed(0))) for _ in "ab"] for _ in "ab"]
    (ours, *_), (theirs, *_) = pairs
    a, b = LARS([ours], 0.1, trust=None), torch.optim.SGD([theirs], 0.1, momentum=0.9)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    for step in range(6):
        ours.grad = torch.randn(4, 3, generator=torch.Generator().manual_seed(step + 1))
        theirs.grad = ours.grad.clone()
        if step in (0, 3):                                      # the first is bad: there is no momentum yet
            ours.grad[0, 0] = math.nan
        else:
            b.step()
        assert finite_step(a, scaler)[1] == (step in (0, 3))
        torch.testing.assert_close(ours, theirs)


def test_heads_side_by_side_are_single_heads():
    """Each against torch's own layer, loss, SGD and cosine, on the same batches."""
    (x, y), rates = clusters(130, 1.0), (1e-3, 0.03, 1.0)
    x = F.pad(x, (0, 1), value=1.0)
    heads = fit_heads(x, y, 5, rates, epochs=3, batch=32, seed=4)
    for rate, head in zip(rates, heads):
        layer = nn.Linear(9, 5, bias=False)
        nn.init.zeros_(layer.weight)
        optimizer = torch.optim.SGD(layer.parameters(), rate, momentum=0.9)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 12)
        for epoch in range(3):
            order = torch.randperm(130, generator=torch.Generator().manual_seed(4 * 1_000_003 + epoch))
            for batch in order[:128].split(32):
                optimizer.zero_grad()
                F.cross_entropy(layer(x[batch]), y[batch]).backward()
                optimizer.step()
                schedule.step()
        torch.testing.assert_close(head, layer.weight.data, rtol=1e-4, atol=1e-6)
        alone = fit_heads(x, y, 5, (rate,), epochs=3, batch=32, seed=4)[0]
        torch.testing.assert_close(alone, head, rtol=1e-4, atol=1e-6)


def test_sweep():
    """It finds the rate that learns, whatever the scale of the features, and a head that diverges harms no other."""
    (x, y), (a, b) = clusters(500, 0.3), clusters(200, 0.3, seed=1)
    rates = (1e-6, 0.1, 1e38)
    held_out, best, counts = sweep(1e3 * x - 7, y, 1e3 * a - 7, b, rates, 5, epochs=20)
    assert best == 0.1 and held_out[1] > 90 and accuracies(counts)["test_acc1"] > 90
    alone = sweep(1e3 * x - 7, y, 1e3 * a - 7, b, (0.1,), 5, epochs=20)
    assert alone[0] == [held_out[1]] and torch.equal(alone[2], counts)
