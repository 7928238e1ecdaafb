"""A method and its local imports as one runnable file:  python flatten.py mae.py > mae_single.py"""
import ast
import sys
from pathlib import Path


def needed(nodes, names):
    """Those of a file's definitions that `names`, and what they mention in turn, come to."""
    found, names = [], set(names)
    for _ in nodes:
        for node in nodes:
            own = [node.name] if hasattr(node, "name") else [t.id for t in getattr(node, "targets", [])]
            if node not in found and names & set(own):
                found.append(node)
                names |= {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}
    return found


def flatten(path, asked, imports, bodies):
    """Append to imports what `path` needs from elsewhere, and to bodies its code, after that of its local imports. Of a
    script, one with a Config, only what is `asked` for; asked None: it is the entry, and whole."""
    source, entry = path.read_text(), asked is None
    lines, nodes = source.splitlines(), ast.parse(source).body
    used = nodes if entry or "class Config" not in source else needed(nodes, asked)
    for node in nodes:
        keep = node in used
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            name = node.module if isinstance(node, ast.ImportFrom) else node.names[0].name
            local, keep = path.parent / f"{name}.py", False
            if not local.exists():
                imports.append(ast.unparse(node))
            elif local.name not in bodies:
                flatten(local, [a.name for a in node.names], imports, bodies)
            if local.exists() and isinstance(node, ast.Import):             # `import training`: its names are here now
                imports.append(f"import sys\n{name} = sys.modules[__name__]")
        elif isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'":
            keep = entry
        elif entry and node.lineno == 1:                                    # the docstring: it goes to the very top
            keep = False
        if not keep:
            first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))])
            lines[first - 1:node.end_lineno] = [""] * (node.end_lineno - first + 1)
    bodies[path.name] = f"# {'=' * 40} {path.name}\n\n" + "\n".join(lines).strip()


if __name__ == "__main__":
    if len(sys.argv) != 2 or not Path(sys.argv[1]).exists():
        raise SystemExit(__doc__)
    file, imports, bodies = Path(sys.argv[1]), [], {}
    flatten(file, None, imports, bodies)
    nodes = [n for body in bodies.values() for n in ast.parse(body).body]
    names = [n.name for n in nodes if hasattr(n, "name")] + [t.id for n in nodes if isinstance(n, ast.Assign)
                                                             for t in n.targets if isinstance(t, ast.Name)]
    if len(names) > len(set(names)):
        raise SystemExit(f"defined twice: {', '.join(sorted(n for n in set(names) if names.count(n) > 1))}")
    print(f'"""{ast.get_docstring(ast.parse(file.read_text()), clean=False)}"""', *dict.fromkeys(imports), sep="\n")
    print("", *bodies.values(), sep="\n\n\n")
