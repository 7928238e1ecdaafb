"""Against lightly, an independent implementation: DINO's head and loss, and an MAE that was made with it."""
import pytest
import torch

import mae
from esvit import EsViT, Network
from vit import ViT
from weights import load_encoder, load_into, read

pytest.importorskip("lightly", reason="lightly is not installed: it brings many packages (pip install lightly)")
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")           # of lightly's own


def test_dino_loss_and_head():
    """Loss, gradients of the head and the moving centre over three steps; two large and two small crops of four images,
    which our code takes together and theirs one by one."""
    from lightly.loss import DINOLoss
    from lightly.models.modules import DINOProjectionHead
    torch.manual_seed(0)
    model = EsViT(*(Network(ViT(8, 4, dim=16, depth=1, heads=2), 40, dense=False, hidden=24, bottleneck=12)
                    for _ in range(2)))
    heads = {name: DINOProjectionHead(16, 24, 12, 40) for name in ("student", "teacher")}
    for name, head in heads.items():
        own = dict(getattr(model, name).head.state_dict())
        if name == "teacher":                                   # it has followed another student
            own = {k: v + 0.1 * torch.randn_like(v) if "mlp" in k else v for k, v in own.items()}
            model.teacher.head.load_state_dict(own)
        head.load_state_dict({k.replace("mlp.", "layers."): v for k, v in own.items()})
    criterion, crops = DINOLoss(40, teacher_temp=0.04), [torch.randn(2, 4, 3, side, side) for side in (8, 4)]
    for temperature in (0.04, 0.05, 0.07):
        model.zero_grad()
        heads["student"].zero_grad()
        loss, found = model(crops, temperature, False)
        loss.backward()
        with torch.no_grad():
            views = [model.student.features(img)[0] for same in crops for img in same]
            seen = [heads["teacher"](model.teacher.features(img)[0]) for img in crops[0]]
        theirs = criterion(seen, [heads["student"](view) for view in views], teacher_temp=temperature)
        theirs.backward()
        torch.testing.assert_close(loss, theirs, rtol=1e-6, atol=1e-6)
        ours, others = dict(model.student.head.named_parameters()), dict(heads["student"].named_parameters())
        for name, p in ours.items():
            if p.requires_grad:
                other = others[name.replace("mlp.", "layers.")].grad
                # fp32 logits by 0.04: in the gradients are a few more of their rounding errors than in the loss
                torch.testing.assert_close(p.grad, other, rtol=5e-5, atol=1e-5)
        model.update_center(found["means"], torch.zeros(()))
        torch.testing.assert_close(model.dino_loss.center, criterion.center[0], rtol=1e-5, atol=1e-6)


def test_masked_autoencoder(tmp_path):
    """A file of lightly's MAE, encoder and decoder: the encoder's tokens of the visible patches, and the loss."""
    timm = pytest.importorskip("timm", reason="lightly's MAE is made of timm's ViT")
    from lightly.models import utils
    from lightly.models.modules import MAEDecoderTIMM, MaskedVisionTransformerTIMM
    torch.manual_seed(0)

    class Theirs(torch.nn.Module):                              # as in lightly's own example
        def __init__(self):
            super().__init__()
            vit = timm.models.VisionTransformer(24, 6, 3, 0, embed_dim=32, depth=3, num_heads=4)
            self.backbone = MaskedVisionTransformerTIMM(vit=vit)
            self.decoder = MAEDecoderTIMM(num_patches=16, patch_size=6, embed_dim=32, decoder_embed_dim=24,
                                          decoder_depth=2, decoder_num_heads=3, mlp_ratio=4.0)

    theirs, img, order = Theirs().eval(), torch.randn(2, 3, 24, 24), torch.rand(2, 16).argsort(1)
    torch.save(dict(state_dict=theirs.state_dict()), tmp_path / "lightly.ckpt")
    keep, hidden = order[:, :4] + 1, order[:, 4:] + 1           # theirs count cls as 0
    keep = torch.cat([torch.zeros(2, 1, dtype=torch.long), keep], 1)
    encoded = theirs.backbone.encode(images=img, idx_keep=keep)
    x = utils.repeat_token(theirs.decoder.mask_token, (2, 17))
    x = utils.set_at_index(x, keep, theirs.decoder.embed(encoded).type_as(x))
    predicted = theirs.decoder.predict(utils.get_at_index(theirs.decoder.decode(x), hidden))
    target = utils.get_at_index(utils.patchify(img, 6), hidden - 1)
    expected = torch.nn.functional.mse_loss(predicted, utils.normalize_mean_var(target, dim=-1))

    vit = load_encoder(str(tmp_path / "lightly.ckpt"), heads=4, say=str)
    torch.testing.assert_close(vit.encode(img, order[:, :4]), encoded, rtol=1e-5, atol=1e-5)
    ours = mae.MAE(24, 2, 3, img_size=24, patch_size=6, dim=32, depth=3,
                   heads=4)
    load_into(ours, read(str(tmp_path / "lightly.ckpt")), str)
    torch.testing.assert_close(ours(img, order), expected, rtol=1e-5, atol=1e-6)
