"""
What frozen features know: a k-NN vote and a linear read-out, no training of the network.

The methods call these between epochs (--probe-every) and at the end of their demos. For MAE compare runs and do not
read the absolute number: its features are made for fine-tuning and their neighbours are poor (a ViT-B that fine-tunes
to 83% may have a k-NN of 11%).
"""
import torch
import torch.distributed as dist
import torch.nn.functional as F

from augment import normalize
from data import CenterCrops, load


@torch.no_grad()
def extract(encode, source, indices, size, channels, mean, std, device, batch=256, workers=0):
    """Features of the evaluation crops of source[indices] -> ((n, D) fp32, labels (n,)) on the CPU, in the order of
    `indices`.

    encode: normalised images (B, C, h, w) -> (B, D). Each process takes every world-th image; all get the whole result.
    """
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    mine = list(indices)[rank::world]
    batches = [mine[i:i + batch] for i in range(0, len(mine), batch)]
    loader = load(CenterCrops(source, size, channels), batches, workers, False)
    parts = []
    for img, labels, failed in loader:
        parts.append((encode(normalize(img.to(device), mean, std)).float().cpu(), labels))
        if failed:
            print(f"warning: {len(failed)} images cannot be read and are replaced, first {failed[0]}", flush=True)
    found = [torch.cat(part) for part in zip(*parts)]                # nothing, where ranks outnumber images
    if world == 1:
        return found
    shares = [None] * world
    dist.all_gather_object(shares, found)
    whole = [torch.empty(len(indices), *part.shape[1:], dtype=part.dtype) for part in shares[0]]
    for r, share in enumerate(shares):
        for part, mine in zip(whole, share):
            part[r::world] = mine
    return whole


def knn(train, train_labels, test, test_labels, k=20, temperature=0.07):
    """Weighted k-NN accuracy in percent (Wu et al. 2018, as in DINO): cosine similarity s, each neighbour votes exp(s /
    t)."""
    train, test = F.normalize(train, dim=1), F.normalize(test, dim=1)
    classes, right = int(train_labels.max()) + 1, 0
    for part, labels in zip(test.split(1024), test_labels.split(1024)):
        similarity, neighbours = (part @ train.T).topk(min(k, len(train)), dim=1)
        weight = (similarity / temperature).exp()
        votes = torch.zeros(len(part), classes).scatter_add_(1, train_labels[neighbours], weight)
        right += (votes.argmax(1) == labels).sum().item()
    return 100 * right / len(test)


def linear(train, train_labels, test, test_labels):
    """Accuracy in percent of ridge regression to one-hot labels, in closed form; the penalty is the one of nine that
    does best on the fifth of the training features it was not fitted on."""
    mean, std = train.mean(0), train.std(0) + 1e-6
    train, test = ((x - mean).div(std).double() for x in (train, test))
    target = F.one_hot(train_labels).double() - 1 / (train_labels.max() + 1)
    held_out = torch.arange(len(train)) % 5 == 0

    def fit(x, y):
        values, vectors = torch.linalg.eigh(x.T @ x)                        # one decomposition serves every penalty
        projected = vectors.T @ (x.T @ y)
        return lambda penalty: vectors @ (projected / (values + penalty * len(x))[:, None])

    tried, penalties = fit(train[~held_out], target[~held_out]), [10.0 ** e for e in range(-5, 4)]
    best = max(penalties, key=lambda p: ((train[held_out] @ tried(p)).argmax(1) == train_labels[held_out]).sum().item())
    return 100 * ((test @ fit(train, target)(best)).argmax(1) == test_labels).double().mean().item()


def probe(encode, train, val, size, channels, mean, std, device, workers, log, step, limit=(5_000, 2_000)):
    """k-NN and linear accuracy of an encoder on two labelled sources, in percent, into the log and on the screen.

    Of large sources `limit` random images are used, always the same: a number to watch during a run, not to publish.
    """
    sets = []
    for source, most in zip((train, val), limit):
        indices = torch.randperm(len(source), generator=torch.Generator().manual_seed(0))[:most].tolist()
        sets += extract(encode, source, indices, size, channels, mean, std, device, workers=workers)
    if log.rank == 0:
        found = dict(knn=round(knn(*sets), 2), linear=round(linear(*sets), 2))
        log.note(step=step, **found)
        print(f"frozen features after step {step}: k-NN {found['knn']:.1f}%, linear {found['linear']:.1f}%", flush=True)
