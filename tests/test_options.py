"""The command line: what is given, what is filled in, what is refused."""
from dataclasses import dataclass, replace
from functools import partial

import pytest

from runtime import options
from runtime.options import ProbeOptions, TrainingOptions, check, fill, opt, parse, read_command_line, shorten


@dataclass
class Config(TrainingOptions, ProbeOptions):
    batch_size: int = opt(8, "images per step, 100% of them", least=1)
    epochs: float | None = opt(10, "epochs", least=0)
    warmup_epochs: float | None = opt(1, "epochs", least=0, shrinks=True)
    blr: float = opt(1e-3, "rate", least=0)
    min_crop: float = opt(0.5, "area", least=0, most=1)
    interpolation: str = opt("bilinear", "how")
    norm_pix: bool = opt(True, "standardise")
    ratio: float = opt(0.5, "share", least=0, most=1)
    temperature: float | None = opt(None, "temperature", above=0)
    anneal_epochs: float | None = opt(None, "epochs", least=0, shrinks=True)
    kind: str | None = opt(None, "kind", choices=("attention", "hidden"), needs="teacher")
    teacher: str | None = opt(None, "file")
    pool: str = opt("cls", "what is read", choices=("cls", "avg"), old="readout")
    views: tuple[int, ...] = opt((2, 8), "how many", least=1, most=10)


def command_line(*argv):
    """Read and check, as scripts without a recipe do."""
    cfg, given = read_command_line(Config, "what it does", [*map(str, argv)])
    return check(cfg, given)


def test_command_line():
    argv = ["--batch_size", "16", "--img-size", "96", "160", "--no-norm_pix", "--blr=1e-4"]
    cfg, given = read_command_line(Config, "", argv)
    assert (cfg.batch_size, cfg.img_size, cfg.norm_pix, cfg.blr, cfg.lr) == (16, (96, 160), False, 1e-4, None)
    assert given == {"batch_size", "img_size", "norm_pix", "blr"}
    assert fill(cfg, given, dict(batch_size=1, epochs=3)) == replace(cfg, epochs=3)
    assert fill(cfg, given, dict(unknown=1)) == cfg             # a recipe's value that this script has no option for


@pytest.mark.parametrize("argv, words", [
    (["--bach-size", "4"], "--bach-size"), (["--batch", "4"], "--batch"), (["--batch-size", "four"], "four"),
    (["x"], "x"), (["--dtype", "fp8"], "fp8"), (["--pool", "mean"], "mean"), (["--in-chans", "rgb"], "rgb")])
def test_bad_command_lines_are_one_sentence(argv, words):
    with pytest.raises(SystemExit, match=words) as stop:
        command_line(*argv)
    assert "\n" not in str(stop.value) and "--help" in str(stop.value)


@pytest.mark.parametrize("argv, words", [
    (["--accum", "0"], "--accum must be at least 1, not 0"), (["--in-chans", "0"], "--in-chans must be at least 1"),
    (["--bits", "33"], "--bits must be at most 32"), (["--img-size", "8", "0"], "must be at least 1"),
    (["--ratio", "-0.1"], "--ratio must be at least 0, not -0.1"), (["--ratio", "1.5"], "--ratio must be at most 1"),
    (["--temperature", "0"], "--temperature must be above 0, not 0"), (["--views", "2", "11"], "must be at most 10"),
    (["--ratio", "nan"], "--ratio must be at least 0, not nan"), (["--temperature", "nan"], "must be above 0"),
    (["--epochs", "nan"], "--epochs must be at least 0"), (["--anneal-epochs", "-1"], "--anneal-epochs must"),
    (["--kind", "hidden"], "--kind has no effect without --teacher: give that as well")])
def test_bounds_and_needs(argv, words):
    with pytest.raises(SystemExit, match=words) as stop:
        command_line(*argv)
    assert "\n" not in str(stop.value)


def test_what_is_just_allowed():
    cfg = command_line("--ratio", 1, "--temperature", 1e-9, "--views", 1, 10, "--kind", "hidden", "--teacher", "x.pth")
    assert (cfg.ratio, cfg.views, cfg.kind, cfg.temperature) == (1, (1, 10), "hidden", 1e-9)
    assert command_line("--ratio", 0).ratio == 0
    assert command_line("--data", "a/b/../set/").data == "a/set"            # one set, however it is typed


def test_choices_are_shown_and_kept():
    assert command_line("--in-chans", 4).in_chans == 4
    with pytest.raises(SystemExit, match="fp32.*bf16.*fp16"):
        command_line("--dtype", "fp8")


@pytest.mark.parametrize("argv", [["--pool", "avg"], ["--readout", "avg"], ["--readout=avg"]])
def test_an_old_spelling_works(argv):
    cfg, given = read_command_line(Config, "", argv)
    assert cfg.pool == "avg" and given == {"pool"}


def test_help_shows_every_option(capsys):
    with pytest.raises(SystemExit) as stop:
        read_command_line(Config, "what it does", ["--help"], recipe=dict(temperature=0.2, epochs=7))
    text = capsys.readouterr().out
    assert stop.value.code == 0 and "what it does" in text and "100% of them [8]" in text
    assert "temperature [0.2]" in text and "epochs [10]" in text            # the recipe's where there is no default
    assert all("--" + name.replace("_", "-") in text for name in Config.__dataclass_fields__)


RECIPES = {"vit_tiny": dict(epochs=100, warmup_epochs=10, temperature=0.2),
           "vit_mini": dict(epochs=50, warmup_epochs=10, temperature=0.1, anneal_epochs=20)}
DEMO = dict(model="vit_mini", epochs=4, ratio=0.25)


@dataclass
class Recipe(Config):
    epochs: float | None = opt(None, "epochs", least=0)
    warmup_epochs: float | None = opt(None, "epochs", least=0, shrinks=True)


def parsed(*argv):
    return parse(Recipe, "toy", "what it does", RECIPES, DEMO, [*map(str, argv)])


def test_filling_order():
    """What the user gave, else the demo's value, else the recipe's, else the default."""
    plain = parsed()
    assert (plain.model, plain.epochs, plain.temperature, plain.ratio, plain.anneal_epochs) == (
        "vit_tiny", 100, 0.2, 0.5, None)
    assert (plain.out, plain.heads, plain.patch_size) == ("out/toy", 12, 16)
    mini = parsed("--model", "vit_mini", "--temperature", 0.7)
    assert (mini.epochs, mini.temperature, mini.anneal_epochs, mini.patch_size) == (50, 0.7, 20, 4)
    demo = parsed("--demo")
    assert (demo.model, demo.epochs, demo.temperature, demo.ratio, demo.batch_size) == ("vit_mini", 4, 0.1, 0.25, 8)
    assert (demo.out, demo.heads) == ("out/toy-demo", 4)
    both = parsed("--demo", "--ratio", 0.75, "--model", "vit_tiny", "--heads", 3, "--out", "x")
    assert (both.model, both.epochs, both.temperature, both.ratio) == ("vit_tiny", 4, 0.2, 0.75)
    assert (both.heads, both.out) == (3, "x")
    for name in ("vit_base", "vit_giant"):
        with pytest.raises(SystemExit, match=f"--model must be one of vit_tiny, vit_mini, not {name}"):
            parsed("--model", name)
    with pytest.raises(SystemExit, match="--ratio must be at most 1"):
        parsed("--ratio", 2)


def test_a_shorter_run_shortens_what_counts_epochs():
    mini = partial(parsed, "--model", "vit_mini")
    assert (mini().warmup_epochs, mini().anneal_epochs) == (10, 20)
    assert (mini("--epochs", 20).warmup_epochs, mini("--epochs", 20).anneal_epochs) == (2, 2)
    assert mini("--epochs", 20, "--warmup-epochs", 7).warmup_epochs == 7    # given is given
    assert mini("--epochs", 500).warmup_epochs == 10                        # a longer run keeps the recipe's
    assert parsed("--demo", "--epochs", 1).warmup_epochs == 0.1             # shorter than the demo
    cfg = Config(epochs=5, warmup_epochs=0.2)
    assert shorten(cfg, set(), dict(epochs=10)).warmup_epochs == 0.2        # it was less than a tenth
    assert shorten(replace(cfg, epochs=None), set(), dict(epochs=10)) == replace(cfg, epochs=None)


def test_failures_are_told_by_one_process(monkeypatch):
    for rank, code in (("0", "words"), ("3", 1)):
        monkeypatch.setenv("RANK", rank)
        with pytest.raises(SystemExit) as stop:
            options.fail("words")
        assert stop.value.code == code
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(SystemExit, match="patches of 5"), options.value_errors_exit():
        raise ValueError("patches of 5 do not tile")
