"""Pictures of a run: a sheet of images in titled columns, and the curve of the loss."""
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
