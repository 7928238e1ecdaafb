"""
Encoders of checkpoints as backbones of dense tasks: for images of another size, with relative positions and layer scale
that they may not have had.
"""
from nets.beit import resize_relative_geometric
from nets.naming import build
from vit import Swin
from weights.reading import encoder_options, grid_of, load_into, read


def build_backbone(path, heads, img_size, drop_path, relative=False, layer_scale=0.0):
    """The network of a file, with random weights, for images of img_size. relative, layer_scale: what a ViT gets that
    has none; fresh tables start at 0, so that with a layer scale of 1 it computes what the file's network does."""
    file = read(path)
    options = encoder_options(file, heads) | dict(img_size=img_size, drop_path=drop_path)
    if "depths" not in options:
        options.update(positions="learned", pool="avg" if "fc_norm.weight" in file.state else "cls",
                       relative=options.get("relative") or relative,
                       layer_scale=options.get("layer_scale") or layer_scale)
    return build(options)


def load_backbone(backbone, path, say=print):
    """Copy the encoder of a file into a backbone. A ViT's tables of relative positions grow as in BEiT's dense tasks,
    not bicubically; heads are another task's."""
    file = read(path)
    kept = {name: tensor for name, tensor in file.state.items() if not name.startswith(("head.", "head_dist."))}
    if not isinstance(backbone, Swin):
        old = grid_of(file, file.state["pos_embed"])
        for name in kept:
            if name.endswith("relative_position_bias_table") and old != backbone.grid:
                kept[name] = resize_relative_geometric(kept[name], old, backbone.grid)
    load_into(backbone, file._replace(state=kept), say)
