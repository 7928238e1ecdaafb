"""
What reads frozen features: k-NN votes, linear heads and how they learn, one or many at a time; how hits are counted.

Functions of tensors alone; probe.py and dense/ apply them. n, m images, b, B images at a time, D width, C or K classes,
H heads.
"""
import math

import torch
import torch.nn.functional as F
from torch import nn


def tally(scores, labels, top=5):
    """Scores (n, C), labels (n,) -> counts (3, C): images of each class, those right, those with the label among the
    best `top`. Of equal scores the first class wins, a NaN beats all. Counts add up, over batches and processes."""
    own, classes = scores.gather(1, labels[:, None]), torch.arange(scores.shape[1], device=labels.device)
    # The rank of the label, without a sort: how many classes are ahead of it.
    ahead = (~(scores <= own) | (scores == own) & (classes < labels[:, None])).sum(1)           # (n,)
    rows = torch.stack([ahead >= 0, ahead < 1, ahead < top]).float()                              # (3, n)
    return torch.zeros(3, len(classes), device=labels.device).index_add_(1, labels, rows)


def accuracies(counts):
    """Counts (3, C) -> top-1, top-5 and mean-per-class top-1 in percent; classes without images do not count."""
    images, right, five = counts.cpu().double()
    share = dict(test_acc1=right.sum() / images.sum(), test_acc5=five.sum() / images.sum(),
                 test_class_acc=(right / images)[images > 0].mean())
    return {name: round(100 * value.item(), 4) for name, value in share.items()}


def pixel_areas(pred, truth, classes, ignored=255):
    """Predicted and true classes (h, w) of an image -> counts of pixels (3, K): where both agree, predicted, true. What
    is ignored counts nowhere. Counts add up, over images and processes: a mean of images' IoUs is another number."""
    valid = truth != ignored
    pred, truth = pred[valid].long(), truth[valid].long()                                       # (n,)
    kinds = pred[pred == truth], pred, truth
    return torch.stack([torch.bincount(kind, minlength=classes)[:classes] for kind in kinds])


def pixel_scores(areas):
    """Counts (3, K) -> IoU (K,) and accuracy (K,) of each class in percent, NaN where it has no pixel; and a dict of
    mIoU and mAcc, the means over classes that have one, and aAcc, the accuracy of all pixels."""
    both, pred, true = areas.cpu().double()
    iou, acc = 100 * both / (pred + true - both), 100 * both / true
    found = dict(mIoU=iou.nanmean(), aAcc=100 * both.sum() / true.sum(), mAcc=acc.nanmean())
    return iou, acc, {name: round(value.item(), 4) for name, value in found.items()}


def votes(train, train_labels, test, ks, classes, temperature=0.07):
    """Class votes for every k of `ks` from one search -> {k: (b, C)}: each of the k nearest votes exp(cosine /
    temperature) (Wu et al. 2018, as in DINO). train (n, D) and test (b, D) are normalised."""
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")               # TF32 would swap near neighbours
    similarity, nearest = (test @ train.T).topk(min(max(ks), len(train)), 1)                    # (b, largest k)
    torch.set_float32_matmul_precision(precision)
    weight, labels = (similarity / temperature).exp(), train_labels[nearest]
    none = torch.zeros(len(test), classes, device=test.device)                                  # (b, C)
    return {k: none.scatter_add(1, labels[:, :k], weight[:, :k]) for k in ks}


def knn_counts(train, train_labels, test, test_labels, ks, classes, temperature=0.07, most=2 ** 26):
    """Features (n, D) and (m, D) with labels -> {k: counts as `tally` gives them}, from `most` products at a time."""
    train, test, counts = F.normalize(train, dim=1), F.normalize(test, dim=1), dict.fromkeys(ks, 0)
    rows = max(1, most // len(train))
    for part, labels in zip(test.split(rows), test_labels.split(rows)):
        for k, scores in votes(train, train_labels, part, ks, classes, temperature).items():
            counts[k] = counts[k] + tally(scores, labels, min(5, k))       # k votes name at most k classes, as in DINO
    return counts


def knn(train, train_labels, test, test_labels, k=20, temperature=0.07):
    """Weighted k-NN accuracy in percent."""
    classes = int(max(train_labels.max(), test_labels.max())) + 1
    counts = knn_counts(train, train_labels, test, test_labels, (k,), classes, temperature)
    return accuracies(counts[k])["test_acc1"]


def linear(train, train_labels, test, test_labels):
    """Accuracy in percent of ridge regression to one-hot labels, in closed form; the penalty is the one of nine that
    does best on the fifth of the training features it was not fitted on."""
    mean, std = train.mean(0), train.std(0) + 1e-6
    train, test = ((train - mean) / std).double(), ((test - mean) / std).double()
    target = F.one_hot(train_labels).double() - 1 / (train_labels.max() + 1)
    held_out = torch.arange(len(train)) % 5 == 0

    def fit(x, y):
        values, vectors = torch.linalg.eigh(x.T @ x)                        # one decomposition serves every penalty
        projected = vectors.T @ (x.T @ y)
        return lambda penalty: vectors @ (projected / (values + penalty * len(x))[:, None])

    tried, penalties = fit(train[~held_out], target[~held_out]), [10.0 ** e for e in range(-5, 4)]
    best = max(penalties, key=lambda p: ((train[held_out] @ tried(p)).argmax(1) == train_labels[held_out]).sum().item())
    return 100 * ((test @ fit(train, target)(best)).argmax(1) == test_labels).double().mean().item()


def fit_heads(x, labels, classes, rates, epochs, batch, seed=0):
    """Train linear heads for features x (n, D), one for each learning rate, side by side: SGD with momentum, cosine to
    0, from zeros -> weights (H, C, D). Batches are the same for all heads, so that one product serves them."""
    weight = torch.zeros(len(rates) * classes, x.shape[1], device=x.device)                     # (H * C, D)
    momentum, one_hot = torch.zeros_like(weight), torch.eye(classes, device=x.device)
    rate = torch.tensor(rates, device=x.device).repeat_interleave(classes).unsqueeze(1)         # (H * C, 1)
    batch = min(batch, len(x))
    per_epoch = len(x) // batch
    steps = max(1, round(epochs * per_epoch))
    for step in range(steps):
        epoch, at = divmod(step, per_epoch)
        if at == 0:
            generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
            order = torch.randperm(len(x), generator=generator).to(x.device)
        mine = order[at * batch:(at + 1) * batch]
        part = x[mine]                                                                          # (B, D)
        # The classes lie before the batch, because a softmax along few last elements is slow on a CPU.
        error = (weight @ part.T).view(len(rates), classes, batch).softmax(1)                   # (H, C, B)
        error -= one_hot[:, labels[mine]]               # the gradient of cross entropy, so that no graph is needed
        momentum.mul_(0.9).add_(error.flatten(0, 1) @ part, alpha=1 / batch)
        weight.addcmul_(momentum, rate, value=-0.5 * (1 + math.cos(math.pi * step / steps)))
    return weight.view(len(rates), classes, -1)


def sweep(train, train_labels, val, val_labels, rates, classes, epochs=100, batch=128, seed=0):
    """Try learning rates -> the accuracy in percent of each one on a fifth of the training features that its head has
    not seen; the best rate; and of a head trained with that one on all of them the counts on val."""
    mean, std = train.mean(0), train.std(0) + 1e-6
    train, val = (F.pad((x - mean) / std, (0, 1), value=1.0) for x in (train, val))             # the ones are the bias
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed)).to(train.device)
    held_out, kept = order[:len(train) // 5], order[len(train) // 5:]
    heads = fit_heads(train[kept], train_labels[kept], classes, rates, epochs, batch, seed)     # (H, C, D)
    right = 0
    for part in held_out.split(1024):
        right = right + ((heads @ train[part].T).argmax(1) == train_labels[part]).sum(1)        # (H,)
    best = rates[right.argmax().item()]
    head = fit_heads(train, train_labels, classes, (best,), epochs, batch, seed)[0]
    counts = sum(tally(x @ head.T, y) for x, y in zip(val.split(1024), val_labels.split(1024)))
    return (100 * right / len(held_out)).tolist(), best, counts


class LARS(torch.optim.Optimizer):
    """SGD with momentum whose matrices move by a `trust` of their own norm (You et al. 2017), as MAE and MoCo v3 have
    it: biases and other vectors neither scaled nor decayed. trust None: plain SGD with momentum."""

    def __init__(self, params, lr, momentum=0.9, weight_decay=0.0, trust=0.001):
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay, trust=trust))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in (p for p in group["params"] if p.grad is not None):
                g, state = p.grad, self.state[p]
                if p.dim() > 1 and group["trust"] is not None:
                    g = g + group["weight_decay"] * p
                    ours, theirs = p.norm(), g.norm()
                    g = g * torch.where((ours > 0) & (theirs > 0), group["trust"] * ours / theirs, 1.0)
                old = state["momentum_buffer"] if state else torch.zeros_like(p)
                new = group["momentum"] * old + g
                # A step that finite_step found bad leaves all as it was; the host need not ask the device.
                skipped = getattr(self, "found_inf", p.new_zeros(())) > 0
                state["momentum_buffer"] = torch.where(skipped, old, new)
                p.sub_(torch.where(skipped, 0.0, group["lr"] * new))


def make_head(protocol, width, classes):
    """Features (B, width) -> logits (B, classes). MAE's is a BatchNorm without parameters, then the linear layer."""
    layer = nn.Linear(width, classes)
    nn.init.zeros_(layer.bias)
    if protocol != "mae":
        nn.init.normal_(layer.weight, std=0.01)
        return layer
    nn.init.trunc_normal_(layer.weight, std=0.01)
    return nn.Sequential(nn.BatchNorm1d(width, affine=False, eps=1e-6), layer)
