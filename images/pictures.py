"""Pictures of a run: a sheet of images in titled columns, the curve of the loss, and masks in colours."""
import colorsys
import contextlib
import json
import os

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw


def save_sheet(columns, note, path):
    """Save a PNG with a row for each image and a column for each version of it, titles above and a note below ->
    whether that was possible; if not, it warns. columns: title -> uint8 (B, C, h, w), at most 3 channels are shown."""
    parts = []
    for img in columns.values():
        img = img[:, :3].cpu() if img.shape[1] > 2 else img[:, :1].cpu().expand(-1, 3, -1, -1)
        zoom = max(1, round(112 / max(img.shape[-2:])))         # small images are shown larger
        parts.append(F.pad(img.repeat_interleave(zoom, 2).repeat_interleave(zoom, 3), (4, 4, 4, 4), value=255))
    sheet = torch.cat(list(torch.cat(parts, 3)), 1)                                             # (3, B * H, k * W)
    page = Image.new("RGB", (sheet.shape[2], sheet.shape[1] + 36), "white")
    page.paste(Image.fromarray(sheet.permute(1, 2, 0).numpy()), (0, 18))
    pen = ImageDraw.Draw(page)
    for k, title in enumerate(columns):
        pen.text((k * page.width // len(columns) + 6, 3), title, fill="black")
    pen.text((6, page.height - 15), note, fill="black")
    try:
        page.save(path + ".tmp", "PNG")
        os.replace(path + ".tmp", path)
        return True
    except OSError as error:
        with contextlib.suppress(OSError):
            os.remove(path + ".tmp")                            # half of it
        print(f"warning: {path} could not be drawn: {error}")
        return False


def palette(colours):
    """Colours (R, G, B) of classes, or None, for which colours are made -> uint8 (256, 3); the last one, of what is
    ignored, is white."""
    table = torch.full((256, 3), 255, dtype=torch.uint8)
    for k, colour in enumerate(colours):                        # steps of the golden ratio around the circle of hues
        made = colorsys.hsv_to_rgb(k * 0.618034 % 1, 0.75, (0.9, 0.6, 0.75)[k % 3])
        table[k] = torch.tensor(colour or [round(255 * x) for x in made])
    return table


def save_mask(mask, table, path):
    """Save classes uint8 (h, w) as an index PNG that shows its colours: numbers are classes."""
    img = Image.fromarray(mask.numpy())
    img.putpalette(table.flatten().tolist())                    # makes a grey image one with a palette
    img.save(path)


def save_overlay(img, mask, table, path):
    """Save an image uint8 (C, h, w) with half of the colours of its mask uint8 (h, w) over it."""
    grey = img[:3] if img.shape[0] > 2 else img[:1].expand(3, -1, -1)
    mixed = (grey.permute(1, 2, 0).float() + table[mask.long()].float()) / 2
    Image.fromarray(mixed.round().to(torch.uint8).numpy()).save(path)


def save_legend(names, table, path):
    """Save a picture with the colour, the number and the name of each class."""
    page = Image.new("RGB", (320, 18 * len(names) + 8), "white")
    pen = ImageDraw.Draw(page)
    for k, name in enumerate(names):
        pen.rectangle((6, 18 * k + 6, 30, 18 * k + 20), fill=tuple(table[k].tolist()), outline="black")
        pen.text((38, 18 * k + 7), f"{k} {name}".encode("latin-1", "replace").decode("latin-1"), fill="black")
    page.save(path)


def draw_curve(folder):
    """Draw loss.png from the log.jsonl of a run's folder, where matplotlib is installed. It warns where it cannot read
    or write. Of a step that a resumed run repeated, the last row counts."""
    rows, path = {}, os.path.join(folder, "loss.png")
    try:
        from matplotlib.figure import Figure
        with open(os.path.join(folder, "log.jsonl")) as f:
            for line in f:
                with contextlib.suppress(ValueError):           # of a line that a kill cut short
                    row = json.loads(line)
                    if isinstance(row.get("loss"), float):
                        rows[row["step"]] = row
        figure, epochs = Figure(figsize=(6, 3.5), layout="constrained"), [row["epoch"] for row in rows.values()]
        axis = figure.subplots()
        axis.plot(epochs, [row["loss"] for row in rows.values()], label="loss")
        axis.plot(epochs, [row["chance"] for row in rows.values()], "--", color="gray", label="chance")
        axis.set(xlabel="epoch", ylabel="loss", ylim=(0, None))
        axis.legend()
        figure.savefig(path, dpi=150)
    except ImportError:
        return
    except OSError as error:
        print(f"warning: {path} could not be drawn: {error}")
