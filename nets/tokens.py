"""
Visual words: what BEiT asks for. A tokenizer is a program of torch.export's that somebody has trained: images to a number
for each patch. This file only runs it, and reads what it gives. https://arxiv.org/abs/2106.08254

Shapes: B images, C channels, (h, w) the grid of words.
"""
import torch


def load_tokenizer(path, device="cpu"):
    """Read a program that torch.export.save wrote -> a function of images in 0..1 (B, C, height, width). ValueError where
    it is none."""
    try:
        program = torch.export.load(path)
        return torch.export.passes.move_to_device_pass(program, str(device)).module()
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
