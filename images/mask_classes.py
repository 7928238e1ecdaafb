"""
What masks mean: which number or colour of a mask's file is which class.

A set has a list of lines, its classes.txt: (name, (R, G, B) or None). In index masks number n means line n, from 0. A
line called "ignore" stands for pixels that do not count, and so does the number 255.
"""
import io

import numpy as np
from PIL import Image

IGNORED = 255


class MaskError(ValueError):
    """A mask that cannot mean what was said about it: the run ends, because others are likely to be alike."""


class Classes:
    """What masks mean. lines: (name, (R, G, B) or None) in the order of index masks; "ignore" is no class.

    names: of the classes; numbers (256,): what an index means, IGNORED or -1 for one that there is not.
    """

    def __init__(self, lines):
        kept = [(name, colour) for name, colour in lines if name != "ignore"]
        self.names, self.colours = [name for name, _ in kept], [colour for _, colour in kept]
        self.numbers, count = np.full(256, -1), 0
        self.numbers[IGNORED] = IGNORED
        self.by_colour = {}                                     # R * 65536 + G * 256 + B -> class
        for index, (name, colour) in enumerate(lines):
            self.numbers[index] = IGNORED if name == "ignore" else count
            if colour:
                self.by_colour[colour[0] << 16 | colour[1] << 8 | colour[2]] = self.numbers[index]
            count += name != "ignore"

    def read(self, data, name):
        """The bytes of a mask's file -> classes, uint8 (h, w). MaskError for what is no class."""
        img = Image.open(io.BytesIO(data)) if isinstance(data, bytes) else data
        if img.mode in ("P", "L", "1", "I", "I;16"):
            return self.of_indices(np.array(img, np.int64), name)
        if not self.by_colour:
            raise MaskError(f"{name} has colours ({img.mode}), and an index mask was expected, grey or palette, whose "
                            "numbers are classes: save it so, or give colours in classes.txt, as `road 128 64 128`")
        pixels = np.array(img.convert("RGB")).astype(np.int64)
        packed = pixels[..., 0] << 16 | pixels[..., 1] << 8 | pixels[..., 2]                    # (h, w)
        colours = np.array(sorted(self.by_colour))
        place = np.searchsorted(colours, packed).clip(max=len(colours) - 1)
        strange = colours[place] != packed
        if strange.any():
            first = packed[strange][0]
            raise MaskError(f"{name} has pixels of colour {first >> 16} {first >> 8 & 255} {first & 255}, which no "
                            "class in classes.txt has: add a line for it (called ignore, if it does not count)")
        return np.array([self.by_colour[colour] for colour in colours], np.uint8)[place]

    def of_indices(self, indices, name):
        """Numbers (h, w) as they lie in a file -> classes, uint8 (h, w)."""
        found = np.where((indices >= 0) & (indices < 256), self.numbers[indices.clip(0, 255)], -1)
        if (found < 0).any():
            raise MaskError(f"{name} has the label {indices[found < 0][0]}, and there are {len(self.names)} classes, "
                            f"the last one {self.names[-1]}: add a line to classes.txt (called ignore, if it does not "
                            "count)")
        return found.astype(np.uint8)


def read_lines(text, where):
    """The text of a classes.txt -> (name, colour or None) of each line. A line that is neither ends in a sentence."""
    lines = []
    for line in filter(str.strip, text.splitlines()):
        words = line.replace(",", " ").split()
        tail = [word for word in words[-3:] if word.isdecimal() and int(word) < 256]
        colour = tuple(map(int, tail)) if len(words) > 3 and len(tail) == 3 else None
        lines.append((" ".join(words[:-3] if colour else words), colour))
    coloured = sum(colour is not None for _, colour in lines)
    names = [name for name, _ in lines if name != "ignore"]
    if not names or coloured not in (0, len(lines)) or len(set(names)) < len(names) or len(lines) > 255:
        raise SystemExit(f"{where} has {len(lines)} lines, {coloured} of them with a colour: at most 255 were "
                         "expected, each with another name, and all with R G B or none")
    return lines
