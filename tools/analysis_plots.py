"""The pictures of tools/analyze.py. They need matplotlib, which is imported only when a picture is drawn."""
import importlib.util

import torch
import torch.nn.functional as F

INSTALLED = importlib.util.find_spec("matplotlib") is not None
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]         # Okabe and Ito's


def new_figure(width, height, rows=1, columns=1, **options):
    """An empty figure of width x height inches -> the figure, and its axes, an array (rows, columns)."""
    import matplotlib.figure
    matplotlib.rcParams.update({"font.size": 10, "savefig.dpi": 150, "figure.constrained_layout.use": True,
                                "axes.prop_cycle": matplotlib.cycler(color=COLOURS)})
    figure = matplotlib.figure.Figure((width, height))
    return figure, figure.subplots(rows, columns, squeeze=False, **options)


def draw_cka(value, names):
    """CKA (layers of the first network, layers of the second) as a map; the first layers are at its origin."""
    figure, [[axis]] = new_figure(4.2, 3.7)
    picture = axis.imshow(value.numpy(), cmap="magma", vmin=0, vmax=1, origin="lower")
    down, across = (range(0, count, max(1, (count - 1) // 4)) for count in value.shape)
    axis.set(xlabel=f"layer of {names[1]}", ylabel=f"layer of {names[0]}", xticks=across, yticks=down)
    figure.colorbar(picture, label="CKA")
    return figure


def draw_attention(rows):
    """A column for each network: distance and entropy of every head, block by block, and their means."""
    figure, axes = new_figure(4.2 * len(rows), 5.2, 2, len(rows), sharex="col", sharey="row")
    for row, column in zip(rows, axes.T):
        for axis, name in zip(column, ("distance", "entropy")):
            blocks = range(1, len(row[name]) + 1)
            axis.plot(blocks, row[f"uniform_{name}"], "--", color="gray", label="uniform attention")
            points = [(block, head) for block, heads in zip(blocks, row[name]) for head in heads.tolist()]
            axis.plot(*zip(*points), "o", alpha=0.5, markersize=4, label="a head")
            axis.plot(blocks, [heads.mean().item() for heads in row[name]], label="mean")
            axis.set_xticks(range(1, len(blocks) + 1, 1 + len(blocks) // 13))
        column[0].set_title(row["name"])
        column[1].set_xlabel("block")
    for axis, label in zip(axes[:, 0], ("mean distance, pixels", "entropy, nats")):
        axis.set_ylabel(label)
        axis.set_ylim(0)                                        # set last, because every column widens it
    axes[1, 0].legend(fontsize=9)
    return figure


def draw_maps(img, heads):
    """An image, uint8 (C, h, w), the attention of some heads to it, and below where most of that is."""
    h, w = img.shape[1:]
    figure, axes = new_figure(0.95 * (1 + len(heads)), 0.45 + 1.9 * h / w, 2, 1 + len(heads))
    axes[0, 0].imshow(img[:3].permute(1, 2, 0).numpy(), cmap="gray", vmin=0, vmax=255)
    axes[0, 0].set_title("image", fontsize=9)
    for (top, below), head in zip(axes.T[1:], heads):
        top.imshow(head["attention"].numpy(), cmap="magma", extent=(0, w, h, 0))
        top.set_title(f"head {head['head']}\n{head['bits']:.1f} bit", fontsize=9)
        below.imshow(img[:3].float().mean(0).numpy(), cmap="gray", vmin=0, vmax=255)
        below.imshow(head["mask"].numpy(), cmap="viridis", alpha=0.6, extent=(0, w, h, 0), vmin=-0.2, vmax=1)
    for axis in axes.flat:
        axis.axis("off")
    return figure


def draw_matches(rows, views, names):
    """Two views of each image side by side, a column for each network, with lines between regions that match.
    rows: name, image, grid, matches [(region of the first, of the second, cosine)]; views: pairs of uint8 (C, h, w)."""
    import matplotlib
    images, (height, width) = list(dict.fromkeys(row["image"] for row in rows)), views[0][0].shape[1:]
    gap = width // 16
    figure, axes = new_figure(4.2 * len(names), 0.3 + 2 * len(images) * height / width, len(images), len(names))
    for row, (one, two) in zip(rows, views):
        axis = axes[images.index(row["image"]), names.index(row["name"])]
        both = torch.cat([F.pad(one, (0, gap), value=255), two], 2)                             # (C, h, w + gap + w)
        axis.imshow(both[:3].permute(1, 2, 0).numpy(), cmap="gray", vmin=0, vmax=255)
        (h, w), found = row["grid"], row["matches"]
        for rank, (first, second, _) in reversed([*enumerate(found)]):      # the best is drawn last, on top
            colour = matplotlib.colormaps["viridis"](rank / max(1, len(found) - 1))
            x = [(first % w + 0.5) * width / w, (second % w + 0.5) * width / w + width + gap]
            y = [(first // w + 0.5) * height / h, (second // w + 0.5) * height / h]
            axis.plot(x, y, color=colour)
            ink = "black" if 2 * rank > len(found) else "white"
            for end in zip(x, y):
                axis.text(*end, rank + 1, fontsize=9, ha="center", va="center", color=ink,
                          bbox=dict(boxstyle="circle,pad=0.15", color=colour))
        axis.axis("off")
    for axis, name in zip(axes[0], names):
        axis.set_title(name)
    return figure


def draw_layers(runs):
    """Accuracy at the end against the number of pre-trained blocks kept, a curve for each share of the images."""
    figure, [[axis]] = new_figure(4.2, 3.2)
    fractions = sorted({fraction for fraction, _ in runs}, reverse=True)
    for fraction, marker in zip(fractions, "osD^v" * len(fractions)):
        kept = sorted(k for f, k in runs if f == fraction)
        accuracies = [runs[fraction, k]["last"] for k in kept]
        axis.plot(kept, accuracies, f"-{marker}", label=f"{100 * fraction:g}% of the images")
    axis.set(xlabel="pre-trained blocks kept", ylabel="top-1 accuracy, %", xticks=sorted({k for _, k in runs}))
    axis.legend(fontsize=9)
    return figure
