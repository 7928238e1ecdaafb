"""
The model card beside every export: what the network is, how and on what it was made, how that went. It tells what the
checkpoint and the log.jsonl beside it tell; the rest is "not known".
"""
import json
import os

from weights.reading import digest, file_and_key, weights_file

LIBRARIES = dict(hf="transformers", timm="timm", safetensors="pytorch", onnx="onnx")
UNKNOWN = "not known"


def run_of(weights):
    """What is known of the run that wrote a checkpoint: its first row in the log, the options under "config", and its
    last row; {} where there is none. Each resume adds a first row, of which the latest counts."""
    first, last = {}, {}
    path = os.path.join(os.path.dirname(weights_file(file_and_key(weights.path)[0])), "log.jsonl")
    ours = weights.config.get("method")                         # no log is that of a file of others
    if not ours or not os.path.isfile(path) or not os.access(path, os.R_OK):
        return first, last
    with open(path, encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                row = json.loads(line)
            except ValueError:                                  # it was cut short
                continue
            if isinstance(row, dict) and isinstance(row.get("config"), dict):
                first = row
            elif isinstance(row, dict) and "step" in row:
                last = row
    return first, last


def section(title, values):
    """A heading, and a dict as a list, in lines."""
    return ["", f"## {title}", "", *(f"* {name}: {value}" for name, value in values.items() or [("all", UNKNOWN)])]


def teacher_section(teacher):
    """teacher: a dict of name, sha256 and licence, as encoder.pt has it, or the name of a file, or None."""
    if not teacher:
        return []
    found = teacher if isinstance(teacher, dict) else dict(name=os.path.basename(teacher))
    return section("Teacher", {name: found.get(name) or UNKNOWN for name in ("name", "sha256", "licence")}) + [
        "", "The network learned from this one: read the teacher's licence before you publish this."]


def network_facts(weights, model, facts):
    """What the network is, what it takes and gives, and what file it is from: a dict."""
    c, million = model.config, sum(p.numel() for p in model.parameters()) / 1e6
    where = os.path.basename(os.path.normpath(weights.path))
    found = dict(
        network=f"{type(model).__name__}, {million:.2f} million parameters, {model.depth} layers, width {model.width}, "
                f"heads {c['heads']}, patches of {c['patch_size']}, {c['num_classes'] or 'no'} classes",
        input=f"{c['in_chans']} channels, {' x '.join(map(str, c['img_size']))} pixels in 0 to 1, less the mean "
              f"{facts['mean']}, divided by {facts['std']}",
        feature="cls, after the last norm" if model.pool == "cls" else "the mean of the patches",
        file=f"{where}, sha256 {digest(weights.path)}")
    if not weights.config.get("mean"):
        found["input"] += " (the usual numbers: the file has none)"
    if facts.get("method") == "mae" and model.pool == "cls" and not c["num_classes"]:
        found["feature"] += "; the mean of the patches is the better one, as no loss of this method looks at cls"
    if "final_norm" in facts:
        found["last norm"] = facts["final_norm"]
    return found


def card(weights, model, facts, to, notes):
    """The text of a card, in Markdown. to: the format; notes: how to open this export, and what is special about it."""
    method, kind, (first, last) = facts.get("method", UNKNOWN), type(model).__name__, run_of(weights)
    stored = weights.config if "epochs" in weights.config else {}           # last.pt has the options of its run
    options = {k: v for k, v in first.get("config", stored).items() if v is not None and k != "out"}
    task = "image-classification" if model.config["num_classes"] else "image-feature-extraction"
    lines = ["---", f"library_name: {LIBRARIES[to]}", f"pipeline_tag: {task}", "tags:", "- vision", f"- {kind.lower()}"]
    if method != UNKNOWN:
        lines.append(f"- {method}")
    lines += ["---", "", f"# {kind}, method {method}"]
    lines += section("Network", network_facts(weights, model, facts))
    lines += [f"* {note}" for note in notes]
    lines += section("Data", dict(data=options.get("data", UNKNOWN), images=first.get("images", UNKNOWN)))
    lines += section("Recipe", options)
    lines += section("Run", {name: first.get(name, UNKNOWN) for name in ("commit", "steps", "world", "torch")})
    lines += section("Last row of the log", last)
    lines += teacher_section(facts.get("teacher") or options.get("teacher") or options.get("distill_teacher"))
    lines += ["", "## Licence", "", "Not stated: that of the data, of a teacher or of the first weights may decide it."]
    return "\n".join(lines) + "\n"
