"""weights/card.py: a card says what the checkpoint and the log beside it say, and of the rest that it is not known."""
import json
import re

import pytest
import torch
from test_export import saved, swin, vit

from weights import digest, export, read

CONFIG = dict(data="cifar10", model="vit_mini", epochs=20.0, blr=0.001, norm_pix=False, seed=0, lr=None,
              out="/home/me/out")
LOG = [dict(config=dict(CONFIG, epochs=1.0), commit="old", images=7), dict(step=1, loss=1.0),
       dict(config=CONFIG, commit="c0ffee-dirty", torch="2.14", start=1, steps=3900, images=50000, world=2),
       dict(step=3899, loss=0.25), dict(unreadable="x.jpg", reason="cut"), dict(step=3900, knn=38.9)]


def write_log(folder):
    rows = [json.dumps(row) for row in LOG]
    (folder / "log.jsonl").write_text("\n".join([*rows[:4], '{"step": 4000, "lo', "[1]", *rows[4:]]) + "\n")


def items(text):
    """{section: {name: value}} of a card's lists."""
    found = {}
    for part in text.split("\n## ")[1:]:
        title, *lines = part.splitlines()
        found[title] = dict(re.match(r"\* (.*?): (.*)", line).groups() for line in lines if re.match(r"\* .*?: ", line))
    return found


@pytest.mark.parametrize("to", ["hf", "timm", "safetensors"])
def test_the_run_is_in_the_card(tmp_path, to):
    """Of the latest start and the last row with numbers; --out is nobody's business."""
    pytest.importorskip("safetensors")
    write_log(tmp_path)
    path = saved(tmp_path / "encoder.pt", vit(), "mae", mean=(0.1, 0.2, 0.3))
    export.export(path, to)
    place = tmp_path / f"encoder-{to}" / "README.md" if to in export.FOLDERS else tmp_path / f"encoder.{to}.md"
    text = place.read_text()
    found = items(text)
    assert found["Data"] == dict(data="cifar10", images="50000")
    assert found["Recipe"] == {k: str(v) for k, v in CONFIG.items() if k not in ("out", "lr")}
    assert found["Run"] == dict(commit="c0ffee-dirty", steps="3900", world="2", torch="2.14")
    assert found["Last row of the log"] == dict(step="3900", knn="38.9")
    assert "0.07 million parameters, 2 layers, width 48, heads 12, patches of 8" in found["Network"]["network"]
    assert "less the mean (0.1, 0.2, 0.3)" in found["Network"]["input"] and digest(path) in found["Network"]["file"]
    assert "the mean of the patches is the better one" in found["Network"]["feature"]
    assert str(tmp_path) not in text and "Teacher" not in found
    front = text.split("---\n")[1].splitlines()
    libraries = dict(hf="transformers", timm="timm", safetensors="pytorch")
    assert front == [f"library_name: {libraries[to]}", "pipeline_tag: image-feature-extraction", "tags:", "- vision",
                     "- vit", "- mae"]


def test_the_hub_reads_the_front(tmp_path):
    hub = pytest.importorskip("huggingface_hub")
    pytest.importorskip("yaml")
    out = export.export(saved(tmp_path / "e.pt", swin(num_classes=5)), "timm")
    card = hub.ModelCard.load(f"{out}/README.md")
    assert card.data.to_dict() == dict(library_name="timm", pipeline_tag="image-classification",
                                       tags=["vision", "swin", "finetune"])


def test_what_is_not_known(tmp_path):
    """Of a file of others, whatever log lies there; of last.pt without a log the options that it stores."""
    write_log(tmp_path)
    torch.save(dict(model=vit().state_dict()), tmp_path / "x.pth")
    export.export(str(tmp_path / "x.pth"), "timm", heads=12)
    found = items((tmp_path / "x-timm" / "README.md").read_text())
    unknown = "not known"
    assert found["Data"] == dict(data=unknown, images=unknown) and found["Recipe"] == dict(all=unknown)
    assert found["Run"]["commit"] == unknown and found["Last row of the log"] == dict(all=unknown)
    assert "the usual numbers: the file has none" in found["Network"]["input"]
    (tmp_path / "log.jsonl").unlink()
    export.export(saved(tmp_path / "last.pt", vit(), "mae", epochs=3, data="pets"), "timm")
    found = items((tmp_path / "last-timm" / "README.md").read_text())
    assert found["Data"] == dict(data="pets", images=unknown) and found["Recipe"]["epochs"] == "3"


def test_the_teacher_and_its_licence(tmp_path):
    """It goes along from file to file; of an older run only the teacher's file is known."""
    pytest.importorskip("safetensors")
    teacher = dict(name="dinov2_vits14", sha256="ab" * 32, licence="Apache-2.0")
    first = export.export(saved(tmp_path / "e.pt", vit(), "distill", teacher=teacher), "safetensors")
    assert read(first).config["teacher"] == teacher
    second = export.export(first, "timm")
    for path in (f"{first}.md", f"{second}/README.md"):
        text = open(path).read()
        assert items(text)["Teacher"] == teacher and "read the teacher's licence before you publish this" in text
    out = export.export(saved(tmp_path / "last.pt", vit(), "distill", epochs=1, teacher="/data/base.pth"), "timm")
    assert items(open(f"{out}/README.md").read())["Teacher"] == dict(name="base.pth", sha256="not known",
                                                                     licence="not known")


@pytest.mark.parametrize("to", ["hf", "timm", "safetensors"])
def test_a_disk_that_is_full_at_the_card(tmp_path, to):
    """The tensors fit, the card does not: nothing stays. A file may grow to 256 KB here."""
    import resource
    import signal
    pytest.importorskip("safetensors")
    path = saved(tmp_path / "e.pt", vit(depth=1), "mae", epochs=1, data="x" * 300_000)
    assert (tmp_path / "e.pt").stat().st_size > 300_000
    limit, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (262144, limit[1]))
    try:
        with pytest.raises(SystemExit, match="cannot be written: .*File too large"):
            export.export(path, to)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, handler)
    assert [p.name for p in tmp_path.iterdir()] == ["e.pt"]


def test_a_card_that_exists_is_kept(tmp_path):
    path = saved(tmp_path / "e.pt", vit())
    (tmp_path / "e.safetensors.md").write_text("mine")
    with pytest.raises(SystemExit, match="e.safetensors.md exists: move it away, or give another --out"):
        export.export(path, "safetensors")
    assert (tmp_path / "e.safetensors.md").read_text() == "mine" and len(list(tmp_path.iterdir())) == 2
