"""
One method and everything it stands on as one runnable file:  python -m tools.flatten mae.py > mae_single.py
"""
import ast
import signal
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
HERE = "sys.modules[__name__]"                                  # what a module of ours is in the flat file


def module_file(name):
    """The file of a module of this repository, or None: runtime.run has runtime/run.py, weights weights/__init__.py."""
    path = ROOT.joinpath(*name.split("."))
    files = [file for file in (path.with_suffix(".py"), path / "__init__.py") if file.exists()]
    return files[0] if files else None


def defined(node):
    """The names that a statement at the top of a file defines or imports."""
    if isinstance(node, (ast.Import, ast.ImportFrom)):
        return {(alias.asname or alias.name).split(".")[0] for alias in node.names}
    if isinstance(node, ast.Assign):
        return {part.id for target in node.targets for part in ast.walk(target) if isinstance(part, ast.Name)}
    return {node.name} if hasattr(node, "name") else set()


def needed(nodes, names):
    """Those of a file's statements that define `names`, and what these mention in turn."""
    found, names = [], set(names)
    for _ in nodes:
        for node in nodes:
            if node not in found and names & defined(node):
                found.append(node)
                names |= {part.id for part in ast.walk(node) if isinstance(part, ast.Name)}
    return [node for node in nodes if node in found]


def blank(lines, node):
    """Remove a statement, a function with its decorators, from the lines of a file."""
    first = min([node.lineno, *(decorator.lineno for decorator in getattr(node, "decorator_list", []))])
    lines[first - 1:node.end_lineno] = [""] * (node.end_lineno - first + 1)


def flatten(path, asked, imports, bodies):
    """Append to `imports` what a file needs from elsewhere, and to `bodies` its code, after that of the files that it
    imports. Of a script, which has a Config, only what is `asked` for; asked None: it is the entry, and whole."""
    source, entry = path.read_text(), asked is None
    lines, nodes = source.splitlines(), ast.parse(source).body
    kept = nodes if entry or "class Config" not in source else needed(nodes, asked)
    bodies[path] = ""                                           # so that it is not begun a second time
    for node in nodes:
        main = isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'"
        docstring = node is nodes[0] and isinstance(node, ast.Expr)
        if docstring and entry or main and not entry or node not in kept and not docstring:
            blank(lines, node)                                  # the entry's docstring goes to the very top
            continue
        for inner in ast.walk(node):                            # some imports stand inside functions
            if isinstance(inner, (ast.Import, ast.ImportFrom)) and take_import(inner, imports, bodies, inner is node):
                blank(lines, inner)
    del bodies[path]                                            # now it comes after what it imports
    bodies[path] = f"# {'=' * 40} {path.relative_to(ROOT)}\n\n" + "\n".join(lines).strip()


def take_import(node, imports, bodies, at_top):
    """Flatten the modules of ours that an import names, or, if it is at the top, append it to `imports` -> whether the
    import is no longer needed where it stands."""
    package = getattr(node, "module", None)
    ours = module_file(package or node.names[0].name)
    for alias in node.names if ours or at_top else ():
        whole = f"{package}.{alias.name}" if package else alias.name
        if not ours:
            imports.append(ast.unparse(type(node)(names=[alias], module=package, level=0)))
        elif module_file(whole):                                # a module is imported, and its names stand in this file
            flatten_once(whole, [], imports, bodies)
            imports += ["import sys", f"{alias.asname or alias.name} = {HERE}"]
        elif alias.asname:
            raise SystemExit(f"from {package} import {alias.name} as {alias.asname}: flattening cannot rename")
    if ours and package:
        flatten_once(package, [alias.name for alias in node.names], imports, bodies)
    return ours or at_top


def flatten_once(module, names, imports, bodies):
    file = module_file(module)
    if file not in bodies:
        flatten(file, names, imports, bodies)


def main(argv):
    if len(argv) != 1 or not (ROOT / argv[0]).is_file():
        raise SystemExit(__doc__.strip())
    entry, imports, bodies = ROOT / argv[0], [], {}
    flatten(entry, None, imports, bodies)
    code = "\n".join([*dict.fromkeys(imports), "", "", "\n\n\n".join(bodies.values())])
    names = [name for node in ast.parse(code).body for name in sorted(defined(node))]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise SystemExit(f"defined twice, so one file cannot hold both: {', '.join(twice)}")
    print(f'"""{ast.get_docstring(ast.parse(entry.read_text()), clean=False)}"""\n{code}')


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)               # so that `| head` ends it quietly
    main(sys.argv[1:])
