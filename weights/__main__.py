"""
Say what a checkpoint is: where its weights are, what network they make, what else it holds.

python -m weights FILE        FILE:KEY for one network of several
"""

from weights.reading import encoder_options, is_pyramid, kind_of, load_encoder, read, run_as_tool, summary


def main(argv):
    if len(argv) != 1 or argv[0].startswith("-"):
        raise SystemExit("give one file: python -m weights FILE (python -m weights.export FILE --to ... exports it)")
    weights = read(argv[0])
    options = encoder_options(weights, heads=1)
    if not is_pyramid(weights):                                 # whose heads are known
        options["heads"] = weights.config.get("heads") or "not stored"
    print(f"{weights.path}: {weights.layout}")
    print(f"  {'method':<12} {weights.config['method'] or 'not stored'}")
    print(f"  {'network':<12} {kind_of(weights)}")
    for name, value in options.items():
        print(f"  {name:<12} {value}")
    teacher = weights.config.get("teacher")
    if isinstance(teacher, dict):
        print(f"  {'teacher':<12} {teacher.get('name')}, licence {teacher.get('licence')}, "
              f"sha256 {teacher.get('sha256')}")
    print(f"  {'tensors':<12} {summary(weights.state)}")
    try:
        load_encoder(argv[0], heads=options["heads"] if is_pyramid(weights) else weights.config.get("heads") or 1,
                     say=lambda text: None)
    except SystemExit as stop:                                  # some of its parts exist in no network here
        print(f"  {'refused':<12} {stop}")


if __name__ == "__main__":
    run_as_tool(main)
