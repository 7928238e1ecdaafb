"""
Copies of the rows of log.jsonl elsewhere: TensorBoard's event files (--tensorboard), a project of Weights & Biases
(--wandb). Both packages are optional.
"""
import importlib.util
import os
import uuid
from dataclasses import asdict

from runtime.options import fail


class TensorBoard:
    """Event files in the folder of the run. What an earlier start logged after step `start` is taken back."""

    def __init__(self, cfg, start):
        from torch.utils.tensorboard import SummaryWriter
        self.writer = SummaryWriter(cfg.out, purge_step=start + 1 if start else None)

    def write(self, step, numbers):
        for name, value in numbers.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()

    def close(self):
        self.writer.close()


class WeightsAndBiases:
    """A run of the project --wandb. Its id stays in the folder of the run, so that a later start goes on with it."""

    def __init__(self, cfg, start):
        import wandb
        path = os.path.join(cfg.out, "wandb-id")
        if not os.path.exists(path):
            with open(path, "w") as f:
                f.write(uuid.uuid4().hex)
        with open(path) as f:
            self.run = wandb.init(project=cfg.wandb, dir=cfg.out, id=f.read(), resume="allow", config=asdict(cfg))
        self.run.define_metric("*", step_metric="step")         # wandb's own counter could not repeat a step

    def write(self, step, numbers):
        self.run.log(dict(numbers, step=step))

    def close(self):
        self.run.finish()


WRITERS = dict(tensorboard=TensorBoard, wandb=WeightsAndBiases)             # by the option and by its package
OPEN_WRITERS = []                                                           # to be closed when the process leaves


class Writers:
    """The writers that a config asks for. rank: the first process writes, all refuse a package that is missing.
    A writer that fails is named once and given up: the run and its log.jsonl go on."""

    def __init__(self, cfg, rank, start):
        self.cfg, self.start, self.writers = cfg, start, {}
        OPEN_WRITERS.append(self)
        for name in WRITERS:
            if getattr(cfg, name) and importlib.util.find_spec(name) is None:
                fail(f"--{name} needs a package that is not installed: pip install {name}")
            if getattr(cfg, name) and rank == 0:
                self.attempt(name, self.open, name)

    def open(self, name):
        self.writers[name] = WRITERS[name](self.cfg, self.start)

    def attempt(self, name, action, *arguments):
        try:
            action(*arguments)
        except Exception as error:                              # a network, a full disk, a package's own troubles
            self.writers.pop(name, None)
            print(f"warning: --{name} is given up ({' '.join(str(error).split())[:120]}); log.jsonl goes on")

    def write(self, row):
        """Write the numbers of a row, if it has a step."""
        numbers = {name: value for name, value in row.items() if type(value) in (int, float) and name != "step"}
        for name, writer in list(self.writers.items()):
            if "step" in row:
                self.attempt(name, writer.write, row["step"], numbers)

    def close(self):
        for name, writer in list(self.writers.items()):
            self.attempt(name, writer.close)
