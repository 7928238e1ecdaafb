"""
The reader's path: every function that one training step enters, from the command line to the weight update.

python -m tools.path mae.py --data FOLDER          any method and its options; it makes one step and stops

The list is the trace of a real step, so it cannot lie. Images are decoded in the main process, so that this is seen,
too. A function counts with all its lines, docstring and comments included.
"""
import ast
import os
import runpy
import sys
import tempfile
from pathlib import Path

from runtime.run import Run, launch

ROOT = Path(__file__).parents[1]
# A network that a CPU is done with in a moment, for any folder of eight images; the user's own options come after it.
SMALL = "--model vit_mini --img-size 32 --patch-size 4 --batch-size 8 --workers 0 --device cpu --no-compile".split()
OF_SCRIPT = {"esvit.py": "--local-size 16 --local-crops 2 --prototypes 64".split()}


class StepDone(BaseException):
    """Raised in the place of what follows the first step. No script catches it."""


def lines_of_functions(path):
    """-> {line that a function's frame starts at: (name, number of lines)} of a file; decorators belong to it."""
    found = {}
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, (ast.FunctionDef, ast.Lambda)):
            decorators = [decorator.lineno for decorator in getattr(node, "decorator_list", [])]
            first = min([node.lineno, *decorators])
            found[first] = getattr(node, "name", "lambda"), node.end_lineno - first + 1
    return found


def trace_one_step(script, options):
    """Run a script up to its first weight update -> {(file, first line)} of this repository's functions it entered."""
    entered = set()

    def on_call(frame, event, argument):
        if event == "call":
            entered.add((frame.f_code.co_filename, frame.f_code.co_firstlineno))

    def stop(run):
        raise StepDone

    Run.end_step, sys.argv = stop, [script, *options]
    sys.setprofile(on_call)
    try:
        runpy.run_path(str(ROOT / script), run_name="__main__")
    except StepDone:
        pass
    finally:
        sys.setprofile(None)
    places = {ROOT, *ROOT.iterdir()} - {ROOT / "tools"}
    return {(Path(name), line) for name, line in entered if Path(name).parent in places}


def main(argv):
    if not argv or not (ROOT / argv[0]).is_file():
        raise SystemExit(__doc__.strip())
    script, *options = argv
    with tempfile.TemporaryDirectory() as out:
        entered = trace_one_step(script, [*SMALL, *OF_SCRIPT.get(script, []), "--out", out, *options])
    files = total = 0
    for path in sorted({path for path, _ in entered}, key=lambda path: (len(path.parts), path)):
        functions = lines_of_functions(path)
        found = [(line, *functions[line]) for where, line in sorted(entered) if where == path and line in functions]
        lines = sum(count for _, _, count in found)
        if found:
            print(f"{os.path.relpath(path, ROOT)}: {lines} lines")
            for line, name, count in found:
                print(f"    {line:4} {name} ({count})")
            files, total = files + 1, total + lines
    print(f"{script}: {total} lines of functions in {files} files")


if __name__ == "__main__":
    launch(lambda: main(sys.argv[1:]))
