"""
House rules that a machine can check: who imports whom, how long a file may be, what a page looks like; that what is
written about the files is true, that the tools for readers work, that a method can be pasted. A new file in more/,
dense/ or nets/ falls under them by itself: see test_a_new_method_needs_no_edit.
"""
import ast
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tokenize
import tomllib
from importlib import import_module
from pathlib import Path

import pytest
import setuptools

from runtime import options
from tools import analyze
from tools.flatten import defined, module_file, needed

ROOT = Path(__file__).parents[1]
FOLDERS = ("images", "nets", "weights", "runtime", "tools", "more", "dense")
ENV = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}

# What a file of a room may import: the arrow points down only. Nothing imports a script (a file of the top level, of
# more/ or dense/) but those named here.
BASE = {"vit", "data", "images", "nets", "weights", "runtime"}
MAY_IMPORT = {"vit": set(), "data": {"images"}, "images": {"data", "images"}, "nets": {"vit", "nets"},
              "weights": {"vit", "nets", "weights"}, "runtime": BASE, "tools": BASE | {"tools"}}
LENT = {"mae.py": {"distill"}, "tools/pictures.py": {"mae"}, "more/hiera_mae.py": {"more"},
        "more/hiera_distill.py": {"distill"}}
ANYTHING = {"tools/bench.py"}                                   # it compares them all

# Lines of a file or folder at most. A number is raised in a commit of its own that says what a reader gets for it.
BUDGET = {"mae.py": 300, "moco_v3.py": 290, "esvit.py": 407, "distill.py": 480, "finetune.py": 375, "probe.py": 400,
          "vit.py": 436, "data.py": 230, "README.md": 335, "runtime": 1395, "images": 2080, "weights": 1501,
          "tools": 2079}
EACH = {"more": 300, "dense": 300, "nets": 300, "docs/paste.md": 60}
COMMENTED = ("vit.py", "mae.py", "moco_v3.py", "esvit.py", "distill.py")       # comments per line of code: 0.2 or more


def files_of(root):
    """All files of the house, without tests, as paths relative to it."""
    return sorted(path.relative_to(root) for folder in ("", *FOLDERS) for path in (root / folder).glob("*.py"))


def is_script(path):
    """Whether a file is a script that trains or evaluates."""
    return str(path) not in ("vit.py", "data.py") and path.parent.name in ("", "more", "dense")


def lines_of(path):
    return len(path.read_text().splitlines())


def imported(root, path):
    """The modules of ours that a file imports, also inside functions, by their full names: mae, images.augment."""
    ours = {".".join(file.with_suffix("").parts) for file in files_of(root)}
    found = set()
    for node in ast.walk(ast.parse((root / path).read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute here"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:                                      # of a module, or of something in a module
            package = name.rpartition(".")[0]
            fitting = [n for n in (name, f"{name}.__init__", package, f"{package}.__init__") if n in ours]
            found.update(n.removesuffix(".__init__") for n in fitting[:1])
    return found


def wrong_imports(root):
    wrong = []
    for path in files_of(root):
        allowed = BASE if is_script(path) else MAY_IMPORT[path.parts[0].removesuffix(".py")]
        allowed = allowed | LENT.get(str(path), set())
        for module in imported(root, path):
            if module.split(".")[0] not in allowed and str(path) not in ANYTHING:
                wrong.append(f"{path} may not import {module}")
    return wrong


def circles(root):
    """Modules that import themselves by way of others."""
    arrows = {".".join(path.with_suffix("").parts).removesuffix(".__init__"): imported(root, path)
              for path in files_of(root)}

    def reaches(start, goal, seen):
        return any(n == goal or n not in seen and reaches(n, goal, seen | {n}) for n in arrows.get(start, ()))
    return [module for module in arrows if reaches(module, module, {module})]


def over_budget(root):
    counts = {}
    for name, most in BUDGET.items():
        path = root / name
        count = sum(map(lines_of, path.glob("*.py"))) if path.is_dir() else lines_of(path)
        counts[name] = count, most
    for name, most in EACH.items():
        path = root / name
        for file in sorted(path.glob("*.py")) if path.is_dir() or not path.exists() else [path]:
            counts[str(file.relative_to(root))] = lines_of(file), most
    vit = (root / "vit.py").read_text().splitlines()
    second = next(i for i, line in enumerate(vit) if line.startswith("# Second half"))
    counts["vit.py, what a plain ViT needs"] = second, 250
    return [f"{name} has {count} lines of {most}: delete something" for name, (count, most) in counts.items()
            if count > most]


def bad_pages(root):
    """Files without a docstring on top, and functions that are too long."""
    bad = []
    for path in files_of(root):
        text = (root / path).read_text()
        tree = ast.parse(text)
        if text and not ast.get_docstring(tree):
            bad.append(f"{path}: the header is a runbook, and there is none")
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                count, most = node.end_lineno - node.lineno + 1, 70 if node.name == "main" else 60
                if count > most:
                    bad.append(f"{path}: {node.name} has {count} lines of {most}")
    return bad


def comments_per_line(path):
    """Lines with a comment, over lines of code: not empty, no comment alone, not in a docstring."""
    text = path.read_text()
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    comments = {token.start[0] for token in tokens if token.type == tokenize.COMMENT}
    code = sum(bool(line.strip()) and not line.strip().startswith("#") for line in text.splitlines())
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.Module)) and ast.get_docstring(node):
            code -= node.body[0].end_lineno - node.body[0].lineno + 1
    return len(comments) / code


def test_arrows_point_down():
    assert not wrong_imports(ROOT)


def test_no_circles():
    assert not circles(ROOT)


def test_budgets():
    assert not over_budget(ROOT)


def test_pages():
    assert not bad_pages(ROOT)


@pytest.mark.parametrize("name", COMMENTED)
def test_comments(name):
    assert comments_per_line(ROOT / name) >= 0.2


def test_the_rules_find_what_is_wrong(tmp_path):
    """Each rule says something about a house in which it is broken."""
    for folder in FOLDERS:
        (tmp_path / folder).mkdir()
    broken = {"vit.py": '"""V."""\nimport data\n# Second half\n', "data.py": '"""D."""\n', "mae.py": "import probe\n",
              "images/a.py": '"""A."""\ndef f():\n    from runtime import b\n', "images/__init__.py": "",
              "runtime/b.py": '"""B."""\nimport runtime.c\n', "runtime/c.py": '"""C."""\nfrom runtime.b import x\n',
              "tools/t.py": '"""T."""\nfrom mae import MAE\n', "tools/bench.py": '"""B."""\nimport mae\n',
              "more/m.py": '"""M."""\nimport distill\n' + "\n" * 300,
              "probe.py": '"""P."""\ndef f():' + "\n    g()" * 60,
              "distill.py": '"""D."""\n', "moco_v3.py": '"""M."""\n', "esvit.py": '"""E."""\n',
              "finetune.py": '"""F."""\n', "README.md": ""}
    for name, text in broken.items():
        (tmp_path / name).write_text(text)
    assert wrong_imports(tmp_path) == [
        "images/a.py may not import runtime.b", "mae.py may not import probe", "more/m.py may not import distill",
        "tools/t.py may not import mae", "vit.py may not import data"]
    assert set(circles(tmp_path)) == {"runtime.b", "runtime.c"}
    assert over_budget(tmp_path) == ["more/m.py has 302 lines of 300: delete something"]
    assert bad_pages(tmp_path) == ["mae.py: the header is a runbook, and there is none",
                                   "probe.py: f has 61 lines of 60"]
    (tmp_path / "vit.py").write_text('"""V."""\nx = 1  # one\n# two\ny = """no\ndocstring"""\n')
    assert comments_per_line(tmp_path / "vit.py") == pytest.approx(2 / 3)


# ----------------------------------------------------------------------------------------------------------------
# What is written about the files


def pages():
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", pages(), ids=lambda page: page.name)
def test_what_is_written_is_there(page):
    """Links, paths and commands name files that exist, and line counts are right. more/ may have an example's name."""
    text = page.read_text()
    assert not re.search("@[A-Z_]+@", text), "a value was left to be filled in"
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if not link.startswith(("http", "mailto:", "#")):
            assert (page.parent / link.split("#")[0]).exists(), f"{page.name} links {link}"
    for script in re.findall(r"(?:python|torchrun)[^\n|`]*?\s([\w/]+\.py)\b", text):
        assert (ROOT / script).exists(), f"{page.name} runs {script}"
    for module in re.findall(r"python -m ([\w.]+)", text):
        if module.split(".")[0] in FOLDERS and not module.startswith("more."):
            assert module_file(module), f"{page.name} runs -m {module}"
    for path in re.findall(r"`((?:runs|results|tests|tools|runtime|images|weights|nets|docs)/[\w./-]*\w)`", text):
        assert (ROOT / path).exists(), f"{page.name} names {path}"
    for name, count in re.findall(r"^\| \[`([\w/.]+)`\]\([^)]*\) \| (\d+) \|", text, re.M):
        assert lines_of(ROOT / name) == int(count), f"{page.name}: the line count of {name}"


def commands_of(script, folder):
    """Run a runbook with a python and a torchrun that only write down what they were asked -> [(module, options)]."""
    calls, programs = folder / "calls", folder / "programs"
    calls.mkdir()
    programs.mkdir()
    for name in ("python", "torchrun"):
        (programs / name).write_text(f"#!/bin/bash\nprintf '%s\\0' \"$@\" > {calls}/$BASHPID\n")
        (programs / name).chmod(0o755)
    env = ENV | dict(PATH=f"{programs}:{os.environ['PATH']}", HOST="first", SLURM_JOB_NAME="job", OUT=str(folder))
    subprocess.run(["bash", str(script)], cwd=folder, env=env, check=True, capture_output=True, timeout=60)
    found = []
    for call in calls.iterdir():
        words = call.read_text().split("\0")[:-1]
        at = next(i for i, word in enumerate(words) if word.endswith(".py") or word == "-m")
        name = words[at + 1] if words[at] == "-m" else words[at]
        file = module_file(name) if words[at] == "-m" else ROOT / name
        assert file and file.exists(), f"{script.name} starts {name}"
        found.append((name.removesuffix(".py"), words[at + 2:] if words[at] == "-m" else words[at + 1:]))
    return found


def read_options(name, argv, monkeypatch):
    """Read options as a script does, up to the files that they name, which need not exist."""
    module = import_module(name)
    if name == "tools.analyze":
        for command, (_, *rest) in analyze.COMMANDS.items():
            monkeypatch.setitem(analyze.COMMANDS, command, (lambda cfg, files, *extra: None, *rest))
        return module.main(argv)
    if hasattr(module, "resolve"):
        if "--init" in argv:                                    # this file says what is not given: here nothing
            at = argv.index("--init")
            argv = argv[:at] + argv[at + 2:]
        return module.resolve(argv)
    if not hasattr(module, "RECIPES"):
        return None                                             # a tool with a parser of its own
    cfg = options.parse(module.Config, name, module.__doc__, module.RECIPES, module.DEMO, argv)
    return module.complete(cfg) if hasattr(module, "complete") else cfg


@pytest.mark.parametrize("script", sorted((ROOT / "runs").glob("*.sh")), ids=lambda path: path.name)
def test_runbooks(script, tmp_path, monkeypatch):
    """Each command starts a file that exists with options that it has."""
    assert lines_of(script) <= 15
    commands = commands_of(script, tmp_path)
    monkeypatch.chdir(tmp_path)
    for name, argv in commands:
        read_options(name, argv, monkeypatch)
    assert commands


def test_a_wrong_runbook_is_found(tmp_path, monkeypatch):
    script = tmp_path / "wrong.sh"
    script.write_text('set -e\nmore="--epochs 3 --mask-ration 1"\npython mae.py $more &\nwait\n')
    (name, argv), = commands_of(script, tmp_path)
    assert (name, argv) == ("mae", ["--epochs", "3", "--mask-ration", "1"])
    with pytest.raises(SystemExit, match="--mask-ration"):
        read_options(name, argv, monkeypatch)


def test_imports_without_warnings():
    names = [".".join(path.with_suffix("").parts) for path in files_of(ROOT) if not path.stem.startswith("__")]
    code = f"import torchvision; import {', '.join(names)}"     # torchvision's own warnings are not ours
    subprocess.run([sys.executable, "-W", "error", "-c", code], cwd=ROOT, env=ENV, check=True)


# ----------------------------------------------------------------------------------------------------------------
# Tools for readers

SCRIPTS = [str(path) for path in files_of(ROOT) if is_script(path) and "class Config" in (ROOT / path).read_text()]


def run_tool(root, module, *options):
    return subprocess.run([sys.executable, "-m", module, *options], cwd=root, env=ENV, capture_output=True, text=True)


@pytest.mark.parametrize("name", ["mae.py", "moco_v3.py", "esvit.py"])
def test_path(name, classes):
    """What a reader of one training step has to read. The bound is MAE's; the others' functions are longer."""
    text = run_tool(ROOT, "tools.path", name, "--data", str(classes)).stdout
    last = text.splitlines()[-1]
    script, lines, files = re.fullmatch(r"(\S+): (\d+) lines of functions in (\d+) files", last).groups()
    sums = [int(count) for count in re.findall(r"^\S+: (\d+) lines$", text, re.M)]
    assert script == name and sum(sums) == int(lines) and len(sums) == int(files)
    for function in ("main", "update", "forward", "batch_keys"):
        assert re.search(rf"^ +\d+ {function} \(\d+\)$", text, re.M), f"{function} was not entered"
    if name == "mae.py":
        assert int(files) <= 8 and int(lines) <= 900


@pytest.mark.parametrize("name", SCRIPTS)
def test_flattened(name):
    """One file without an import of ours; test_runs.py runs mae.py's, test_moco.py moco_v3.py's."""
    done = run_tool(ROOT, "tools.flatten", name)
    assert not done.returncode, done.stderr
    tree = ast.parse(done.stdout)
    compile(tree, name, "exec")
    assert ast.get_docstring(tree, clean=False) == ast.get_docstring(ast.parse((ROOT / name).read_text()), clean=False)
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            modules = [getattr(node, "module", None) or alias.name for alias in node.names]
            assert not any(map(module_file, modules)), ast.unparse(node)
    guards = [node for node in tree.body if isinstance(node, ast.If) and "__main__" in ast.unparse(node.test)]
    assert guards == tree.body[-1:]


def test_flattening_refuses_two_of_a_name(tmp_path):
    (tmp_path / "tools").mkdir()
    shutil.copy(ROOT / "tools" / "flatten.py", tmp_path / "tools")
    files = {"a.py": '"""A."""\nfrom b import g\ndef f():\n    return g()\n',
             "b.py": '"""B."""\nimport math\n@staticmethod\ndef g():\n    import c\n    return c.x\n',
             "c.py": "x, y = 1, 2\n"}
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    done = run_tool(tmp_path, "tools.flatten", "a.py")
    names = {}
    exec(done.stdout, names)
    assert done.stdout.count("import") == 2 and names["y"] == 2 and "@staticmethod\ndef g" in done.stdout
    (tmp_path / "c.py").write_text("x, f = 1, 2\n")
    done = run_tool(tmp_path, "tools.flatten", "a.py")
    assert done.stderr.strip() == "defined twice, so one file cannot hold both: f"


def test_a_new_method_needs_no_edit(tmp_path, classes):
    """A dummy in more/ is under the rules, is installed, starts, can be traced and flattened, and changes no rule."""
    for folder in ("", *FOLDERS, "docs", "tests"):
        (tmp_path / folder).mkdir(exist_ok=True)
        for path in (ROOT / folder).glob("*.*"):
            if path.suffix in (".py", ".md", ".toml"):
                shutil.copy(path, tmp_path / folder)
    (tmp_path / "more" / "dummy.py").write_text((ROOT / "moco_v3.py").read_text())
    assert wrong_imports(tmp_path) == wrong_imports(ROOT) and not circles(tmp_path)
    assert over_budget(tmp_path) == over_budget(ROOT) and bad_pages(tmp_path) == bad_pages(ROOT)
    settings = tomllib.loads((tmp_path / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert "more" in setuptools.find_namespace_packages(str(tmp_path), include=settings["packages"]["find"]["include"])
    traced = run_tool(tmp_path, "tools.path", "more/dummy.py", "--data", str(classes))
    assert re.search(r"^more/dummy.py: \d+ lines$", traced.stdout, re.M), traced.stderr
    flat = run_tool(tmp_path, "tools.flatten", "more/dummy.py")
    assert not flat.returncode and "class MoCo" in flat.stdout
    assert "--momentum" in run_tool(tmp_path, "more.dummy", "--help").stdout


# ----------------------------------------------------------------------------------------------------------------
# Pasting a method: docs/paste.md with torch, einops and vit.py alone, in an empty folder

PASTE = (ROOT / "docs" / "paste.md").read_text()
LOOP, PARTS = re.findall("```python\n(.*?)```", PASTE, re.S)
PARTS = dict(re.findall(r"^# ([^:]+):[^\n]*\n(.*?)(?=^# |\Z)", PARTS, re.S | re.M))        # {method: its lines}
ROWS = re.findall(r"^\| ([A-Z].*?) \| (.*?) \| (.*?) \|$", PASTE, re.M)                   # method, files, definitions
ASKED = {"MAE": {"MAE"}, "MoCo v3": {"MoCo"}, "EsViT, DINO": {"EsViT", "Network"},
         "A teacher alone": {"DistillStudent"}, "D-MAE, D²-MAE": {"MAE", "DistilledMAE"}}
PASTED = {"torch", "einops", "vit"} | sys.stdlib_module_names


def modules_of(node):
    return {(getattr(node, "module", None) or alias.name).split(".")[0] for alias in node.names}


def pasted(asked, files):
    """-> the text of method.py: the imports that docs/paste.md allows, the definitions of what is asked for, and of all
    that these need; the names of the definitions; and the modules that they need."""
    parts, names, modules = [], [], set()
    for file in files:
        text = (ROOT / file).read_text()
        nodes = ast.parse(text).body
        imports = [node for node in nodes if isinstance(node, (ast.Import, ast.ImportFrom))]
        parts += [ast.unparse(node) for node in imports if modules_of(node) <= PASTED]
        here = set().union(*(defined(node) for node in nodes if node not in imports))
        for node in needed(nodes, asked & here):
            if node in imports:
                modules |= modules_of(node)
                continue
            first = min([node.lineno, *(decorator.lineno for decorator in getattr(node, "decorator_list", []))])
            parts.append("\n".join(text.splitlines()[first - 1:node.end_lineno]))
            names += defined(node)
    return "\n\n\n".join(parts) + "\n", names, modules


def test_paste_lists_the_definitions():
    assert list(PARTS) == [method for method, _, _ in ROWS] == list(ASKED)
    assert len(LOOP.splitlines()) <= 15
    before = set()
    for method, files, text in ROWS:
        listed = set(re.findall(r"`(\w+)`", text))
        if "the row above" in text:
            listed |= before
        _, names, modules = pasted(ASKED[method], re.findall(r"`(\w+\.py)`", files))
        assert listed == set(names), method
        assert modules <= PASTED, f"{method} needs {modules - PASTED}"
        before = listed


@pytest.mark.parametrize("method, files", [row[:2] for row in ROWS], ids=[row[0] for row in ROWS])
def test_paste(method, files, tmp_path):
    """The loop of docs/paste.md makes two steps; the loss falls, and nothing else of ours is imported."""
    part = PARTS[method]
    if method.startswith("D-MAE"):
        part = PARTS["A teacher alone"] + part
    shutil.copy(ROOT / "vit.py", tmp_path)
    (tmp_path / "method.py").write_text(pasted(ASKED[method], re.findall(r"`(\w+\.py)`", files))[0])
    first = "import torch\ntorch.manual_seed(0)\nfrom vit import *\nfrom method import *\n"
    (tmp_path / "part.py").write_text(first + part)
    (tmp_path / "loop.py").write_text(LOOP + "import json, sys\nprint(json.dumps([getattr(m, '__file__', None) or '' "
                                      "for m in sys.modules.values()]))\n")
    done = subprocess.run([sys.executable, "loop.py"], cwd=tmp_path, env=ENV, capture_output=True, text=True)
    assert not done.returncode, done.stderr
    *steps, imports = done.stdout.splitlines()
    losses = [float(re.fullmatch(r"step \d+: loss (\d+\.\d+)", line)[1]) for line in steps]     # "nan" does not match
    # EsViT's targets move with its teacher, so its loss need not fall in one step; it must be another one.
    moves = losses[1] != losses[0] if method.startswith("EsViT") else losses[1] < losses[0]
    assert len(losses) == 2 and moves, losses
    ours = {path for path in map(Path, json.loads(imports)) if ROOT in path.parents and ".venv" not in path.parts}
    assert not ours and (tmp_path / "model.pt").exists()
