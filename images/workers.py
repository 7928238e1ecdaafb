"""Processes that decode images: signals leave them alone, and where one is killed new ones take over."""
import collections
import ctypes
import itertools
import multiprocessing.connection
import signal
import sys

import torch


class WorkersDied(SystemExit):
    """Processes that decode images die again and again. The message says so."""


def load_in_workers(dataset, keys, workers, pin):
    """Batches follow from their keys, so where a worker dies new ones make what is missing."""
    missing, deaths, broken = collections.deque(), 0, []
    while deaths < 3:
        others = multiprocessing.active_children()
        batches = start_workers(dataset, remembered(keys, missing), workers, pin)
        mine = [process for process in multiprocessing.active_children() if process not in others]
        try:
            for batch in batches:
                missing.popleft()
                deaths = 0
                yield batch
            return
        except (RuntimeError, OSError, EOFError):               # whatever comes first when one of them is gone
            if not kill_if_one_died(mine):
                raise
        keys, missing, deaths = itertools.chain(missing, keys), collections.deque(), deaths + 1
        broken.append(batches)                                  # its clean-up may wait for a lock that a dead one holds
    raise WorkersDied("processes that decode images died three times in a row: memory, or shared memory in /dev/shm, "
                      "may have run out; give fewer --workers")


def remembered(keys, missing):
    for key in keys:
        missing.append(key)
        yield key


def start_workers(dataset, keys, workers, pin):
    # Forked workers share the arrays of the source. The loader draws a number when it starts: from a generator of its
    # own, because from the global one it would change the flips and masks of the first step after a resume.
    batches = iter(torch.utils.data.DataLoader(
        dataset, batch_sampler=keys, num_workers=workers, pin_memory=pin, collate_fn=tuple, generator=torch.Generator(),
        worker_init_fn=quiet_worker, multiprocessing_context="fork" if workers and sys.platform == "linux" else None))
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)               # torch's handler would raise anywhere, even in mid-step
    return batches


def kill_if_one_died(workers):
    """Whether one of these workers has died; then kill the others, and say so."""
    if not multiprocessing.connection.wait([worker.sentinel for worker in workers], timeout=1):
        return False
    print("warning: a process that decodes images has died, as when memory runs out; new ones make what it left")
    for worker in workers:
        worker.kill()
    return True


def quiet_worker(_):
    """Start a worker. It ignores signals: killed by the same Ctrl-C, it would take the unsaved run with it. But it dies
    with the training process (PR_SET_PDEATHSIG), where it would otherwise wait for ever to hand over a batch."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
