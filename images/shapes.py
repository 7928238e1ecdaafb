"""Drawn shapes, and scenes of them with masks: images without files, for trying things out (--demo, --data shapes)."""
import numpy as np
from PIL import Image


class Shapes:
    """Ten classes of pictures, drawn when they are read; number k is always the same, and no two are alike. Shape and
    texture (classes 0 to 5) or layout (6 to 9) tell the class; colour, place, size, turn and background are random."""
    classes = ["striped disc", "dotted disc", "striped square", "dotted square", "striped triangle", "dotted triangle",
               "disc above square", "disc below square", "disc beside square", "disc inside square"]
    value_range = None

    def __init__(self, split="train", length=None, side=64):
        self.where, self.side, self.skipped = f"shapes ({split})", side, {}
        self.first, usual = (0, 10_000) if split == "train" else (1_000_000, 2_000)
        self.images = np.arange(length or usual)
        self.labels = (self.first + self.images) % 10

    def __len__(self):
        return len(self.images)

    def name(self, i):
        return f"{self.classes[self.labels[i]]}/{self.images[i]:07}"
    relative = name

    def read(self, i):
        rng = np.random.default_rng((7, self.first + int(self.images[i])))
        side, label = self.side, int(self.labels[i])
        y, x = np.mgrid[:side, :side] / (side - 1) * 2 - 1                                      # both in -1..1
        slope, bump = rng.normal(size=(3, 2)), rng.normal(size=3)
        picture = 0.5 + 0.12 * (slope[:, 0, None, None] * x + slope[:, 1, None, None] * y + bump[:, None, None])

        def outline(kind, cx, cy, r, turn):                     # distance of each pixel to the edge, positive inside
            u = (x - cx) * np.cos(turn) + (y - cy) * np.sin(turn)
            v = (y - cy) * np.cos(turn) - (x - cx) * np.sin(turn)
            if kind == "disc":
                return r - np.hypot(u, v)
            if kind == "square":
                return 0.85 * r - np.maximum(abs(u), abs(v))
            return 0.55 * r - np.maximum(v, 0.866 * abs(u) - 0.5 * v)

        def paint(distance, colour):
            cover = np.clip(distance * side / 2 + 0.5, 0, 1)                                    # one pixel of soft edge
            return picture * (1 - cover) + colour * cover

        turn, (cx, cy) = rng.uniform(0, 2 * np.pi), rng.uniform(-0.25, 0.25, 2)
        colour = rng.uniform(0, 1, (3, 1, 1))
        if label < 6:
            angle, pitch, phase = rng.uniform(0, np.pi), rng.uniform(0.16, 0.26), rng.uniform(0, 6.28, 2)
            stripes = np.sin(2 * np.pi * (x * np.cos(angle) + y * np.sin(angle)) / pitch + phase[0])
            across = np.sin(2 * np.pi * (y * np.cos(angle) - x * np.sin(angle)) / pitch + phase[1])
            ink = stripes > 0 if label % 2 == 0 else stripes * across > 0.15
            edge = outline(("disc", "square", "triangle")[label // 2], cx, cy, rng.uniform(0.5, 0.7), turn)
            other = (colour + rng.uniform(0.35, 0.65, (3, 1, 1))) % 1
            picture = paint(edge, np.where(ink, colour, other))
        else:
            gap, r = rng.uniform(0.32, 0.42), rng.uniform(0.24, 0.3)
            dx, dy = {6: (0, -gap), 7: (0, gap), 8: (gap * rng.choice([-1, 1]), 0), 9: (0, 0)}[label]
            picture = paint(outline("square", cx - dx, cy - dy, 2 * r if label == 9 else r, turn), colour)
            picture = paint(outline("disc", cx + dx, cy + dy, r, 0), (colour + rng.uniform(0.3, 0.7, (3, 1, 1))) % 1)
        picture = picture + rng.normal(0, 0.01, picture.shape)
        return Image.fromarray((picture.clip(0, 1) * 255).astype(np.uint8).transpose(1, 2, 0))


class Scenes(Shapes):
    """Drawn scenes with masks: two to four striped discs, plain squares and dotted triangles, some before others."""
    classes, colours, labels = ["background", "disc", "square", "triangle"], [None] * 4, None

    def __init__(self, split="train", length=None, side=96):
        super().__init__(split, length or (1_000 if split == "train" else 100), side)
        self.where, self.labels = f"drawn scenes ({split})", None

    def name(self, i):
        return f"scene{self.first + int(self.images[i]):07}"
    relative = name

    def draw(self, i):
        """-> image uint8 (h, w, 3) and mask uint8 (h, w)."""
        rng, side = np.random.default_rng((11, self.first + int(self.images[i]))), self.side
        y, x = np.mgrid[:side, :side] / (side - 1) * 2 - 1
        slope = rng.normal(0, 0.15, (3, 2))
        picture = rng.uniform(0.2, 0.8, (3, 1, 1)) + slope[:, :1, None] * x + slope[:, 1:, None] * y
        mask = np.zeros((side, side), np.uint8)
        for _ in range(rng.integers(2, 5)):
            kind, (cx, cy) = int(rng.integers(1, 4)), rng.uniform(-0.7, 0.7, 2)
            r, turn = rng.uniform(0.25, 0.45), rng.uniform(0, 2 * np.pi)
            u = (x - cx) * np.cos(turn) + (y - cy) * np.sin(turn)
            v = (y - cy) * np.cos(turn) - (x - cx) * np.sin(turn)
            edge = {1: r - np.hypot(u, v), 2: 0.85 * r - np.maximum(abs(u), abs(v)),
                    3: 0.6 * r - np.maximum(v, 0.866 * abs(u) - 0.5 * v)}[kind]                # positive inside
            waves = np.sin(25 * u), np.sin(25 * u) * np.sin(25 * v)
            ink = {1: waves[0] > 0, 2: np.ones_like(u, bool), 3: waves[1] > 0}[kind]
            colour, other = rng.uniform(0, 1, (2, 3, 1, 1))
            picture = np.where(edge > 0, np.where(ink, colour, other), picture)
            mask[edge > 0] = kind
        picture = picture + rng.normal(0, 0.04, picture.shape)
        return (picture.clip(0, 1) * 255).astype(np.uint8).transpose(1, 2, 0), mask

    def read(self, i):
        return Image.fromarray(self.draw(i)[0])

    def mask(self, i):
        return self.draw(i)[1]
