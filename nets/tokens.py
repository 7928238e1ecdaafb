"""
Visual words: what BEiT asks for. A tokenizer is a program of torch.export's that somebody has trained: images to a
number for each patch. This file only runs it, and reads what it gives. https://arxiv.org/abs/2106.08254

Shapes: B images, C channels, (h, w) the grid of words.
"""
import json
import os

import numpy as np
import torch


def load_tokenizer(path, device="cpu"):
    """Read a program that torch.export.save wrote -> a function of images in 0..1 (B, C, height, width). ValueError
    where it is none."""
    try:
        from torch.export.passes import move_to_device_pass  # here, because it takes a while to import
        return move_to_device_pass(torch.export.load(path), str(device)).module()
    except Exception as error:                                  # damaged files raise almost anything
        reason = str(error).split("\n")[0] or type(error).__name__
        raise ValueError(f"{path} is no program of torch.export.save, which a tokenizer has to be ({reason})") from None


@torch.no_grad()
def words_of(tokenizer, img, grid):
    """uint8 images (B, C, height, width) -> the numbers of their words (B, h, w), on the grid (h, w) that is expected.
    The program answers with (B, h, w) or (B, h * w) whole numbers. Raises ValueError for any other answer."""
    try:
        words = tokenizer(img.float() / 255)
    except Exception as error:                                  # whatever the program raises: it is not ours
        reason = str(error).split("\n")[0] or type(error).__name__
        raise ValueError(f"the tokenizer takes no images of {tuple(img.shape)}, in 0..1: {reason}") from None
    if not torch.is_tensor(words) or words.is_floating_point() or words.is_complex():
        raise ValueError("the tokenizer has to answer with whole numbers, the words, and it gives something else")
    if tuple(words.shape[1:]) not in (tuple(grid), (grid[0] * grid[1],)) or len(words) != len(img):
        raise ValueError(f"the tokenizer answers with {tuple(words.shape)} for {len(img)} images, and {grid[0]} x "
                         f"{grid[1]} words of each were expected: give one for this image and patch size")
    return words.long().view(len(img), *grid)


class Words:
    """What is asked of a batch: the words of its images, on the grid (h, w), numbers below `vocab`.

    path: a program (see load_tokenizer), or the words of each whole image, numbers.npy (images, h, w), as `tools.pack
    words` writes them, beside numbers.json, which says of which images. images, names: how many the training set has,
    and the digest of their names. ValueError where the file is for another set, grid or vocabulary.
    """

    def __init__(self, path, grid, vocab, images, names, device="cpu"):
        self.path, self.grid, self.vocab, self.table, self.program = path, grid, vocab, None, None
        if not os.path.isfile(path):
            raise ValueError(f"--tokenizer {path} does not exist: give a program of torch.export.save, or the .npy "
                             "that `python -m tools.pack words` writes with one (whose licence is your own matter)")
        if not path.endswith(".npy"):
            self.program = load_tokenizer(path, device)
            return
        table = read_table(path, images, names)
        if table.shape[1:] != tuple(grid):
            raise ValueError(f"{path} has {table.shape[1]} x {table.shape[2]} words of each image, and {grid[0]} x "
                             f"{grid[1]} were expected: one for each patch of the network's last map")
        self.table = self.last = torch.from_numpy(table).to(device)
        self.check()

    def check(self):
        """Raise ValueError where a word of the last images is none of the head's."""
        least, most = self.last.min().item(), self.last.max().item()
        if least < 0 or most >= self.vocab:
            raise ValueError(f"{self.path} has words from {least} to {most}, and the head knows 0 to {self.vocab - 1}: "
                             "give --vocab, one more than its highest word")

    def __call__(self, img, numbers):
        """uint8 images (B, C, height, width), their numbers in the set (B,) -> words (B, 1, h, w), those that the head
        has. last: as they were, for `check`, which a GPU would have to be waited for."""
        self.last = words_of(self.program, img, self.grid) if self.program else self.table[numbers].long()
        return self.last.clamp(0, self.vocab - 1).unsqueeze(1)


def read_table(path, images, names):
    """The words of a set's images, an array (images, h, w) of whole numbers. ValueError where it is another set's."""
    try:
        table = np.load(path, allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise ValueError(f"{path} cannot be read as an array of NumPy's: {error}") from None
    if table.ndim != 3 or table.dtype.kind not in "iu":
        raise ValueError(f"{path} has shape {table.shape} of {table.dtype}, and whole numbers (images, rows, columns) "
                         "were expected")
    if len(table) != images:
        raise ValueError(f"{path} has the words of {len(table)} images, and the training set has {images}: make them "
                         "again for this set, with `python -m tools.pack words`")
    note = path.removesuffix(".npy") + ".json"
    if os.path.exists(note):
        with open(note) as f:
            if json.load(f).get("names") != names:
                raise ValueError(f"{path} is of other images than the training set, or of another order: make it again "
                                 "for this set, with `python -m tools.pack words`")
    return table
