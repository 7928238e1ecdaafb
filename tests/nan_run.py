"""mae.py with NaN in the input of rank 1, at the steps named by $NAN_FROM and $NAN_TO: run by test_runs.py."""
import os

import mae
from runtime.run import launch

calls, normalize = iter(range(10 ** 9)), mae.normalize


def poisoned(img, mean, std):
    out, step = normalize(img, mean, std), next(calls)
    if os.environ["RANK"] == "1" and int(os.environ["NAN_FROM"]) <= step < int(os.environ["NAN_TO"]):
        out[0, 0, 0, 0] = float("nan")
    return out


mae.normalize = poisoned
launch(mae.main)
