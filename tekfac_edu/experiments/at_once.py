"""One run or many at a time on one device: a race and a search do not see the difference.

    with AtOnce(4, device="cuda") as runs:
        results = runs.map(lambda seed: runs.train(configuration.replace(seed=seed), ...), seeds)

One at a time happens here, in this process. Several happen in worker processes, each with one run
at a time; a worker keeps its decoded images from one run to the next. Ctrl-C and SIGTERM reach none
of them, even if sent to all: the parent lets go of their leash, and each saves its run; a second
Ctrl-C kills them. A parent that dies lets go, too.
"""

import multiprocessing
import os
import signal
import threading
from collections import defaultdict
from concurrent.futures import (
    FIRST_EXCEPTION,
    CancelledError,
    Executor,
    Future,
    ProcessPoolExecutor,
    ThreadPoolExecutor,
    wait,
)
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from functools import partial
from multiprocessing import connection, resource_tracker
from pathlib import Path
from queue import LifoQueue

import torch

from tekfac_edu.arguments import whole_number
from tekfac_edu.experiments import training
from tekfac_edu.experiments.interruption import Interruption
from tekfac_edu.experiments.processes import processes

CONTEXT: multiprocessing.context.BaseContext = multiprocessing.get_context("spawn")  # CUDA: no fork
LOOK = 0.2  # seconds between two looks at whether the user wants to stop


class InTurn(Executor):
    """Does at once, here, what is submitted; what it raises comes out of `submit`."""

    def submit(self, function, /, *arguments, **named):
        done = Future()
        done.set_result(function(*arguments, **named))
        return done


class AtOnce:
    """Up to `at_once` runs at a time, for as long as the block lasts.

    Parameters
    ----------
    at_once : how many.
    options : passed on to `train` (data_folder, device, bar, tensorboard).

    Raises
    ------
    ValueError
        If at_once is no whole number from 1 on, or more than 1 under torchrun.
    """

    def __init__(self, at_once, **options):
        ranks = int(os.environ.get("WORLD_SIZE", "1"))
        self.several = whole_number("at_once", at_once, 1) > 1
        if self.several and ranks > 1:
            raise ValueError(
                f"at_once={at_once} is for one process; torchrun started {ranks}, which share each "
                "run: leave out one of the two"
            )
        self.options = options | ({"bar": False} if self.several else {})
        self.at_once, self.stopping = int(at_once), False
        self.folders = defaultdict(threading.Lock)  # one run in a folder at a time

    def __enter__(self):
        with ExitStack() as stack:  # what has been begun is ended if the rest fails
            # once for all runs: torchrun's processes cannot meet twice
            stack.enter_context(processes(self.options.get("device")))
            self.free = LifoQueue()  # the last one used has begun already
            if self.several:
                self._begin_workers(stack)
            else:
                self.lines = InTurn()
                self.free.put(InTurn())
            self.stack = stack.pop_all()
        return self

    def _begin_workers(self, stack):
        self.interruption = stack.enter_context(Interruption())
        self.others = set(multiprocessing.active_children())
        resource_tracker.ensure_running()  # begun by a deaf thread, it would let signals in again
        held, self.leash = CONTEXT.Pipe(duplex=False)
        stack.callback(held.close)
        begin = partial(_begin, held, max(1, torch.get_num_threads() // self.at_once))
        for _ in range(self.at_once):
            worker = ProcessPoolExecutor(1, CONTEXT, begin)
            stack.callback(worker.shutdown)
            self.free.put(worker)
        self.lines = ThreadPoolExecutor(self.at_once, initializer=_be_deaf)
        stack.callback(self.lines.shutdown, cancel_futures=True)
        stack.callback(self.let_go)

    def __exit__(self, kind, error, trace):
        if kind is KeyboardInterrupt and self.several:
            self.stopping = True
            for child in set(multiprocessing.active_children()) - self.others:
                child.kill()
        self.stack.close()

    def let_go(self):
        """Ask every run to save itself and stop, and begin no other."""
        self.stopping = True
        self.leash.close()

    def map(self, function, items):
        """function of every item, up to `at_once` at a time, begun in their order.

        Returns
        -------
        list

        Raises
        ------
        Interrupted
            After Ctrl-C or SIGTERM, when every run has saved itself.
        ChildProcessError
            If a process died; the message names its run. The other runs have saved themselves.
        Exception
            Of a function, as it is; the other runs have saved themselves.
        """
        lines = [self.lines.submit(function, item) for item in items]
        waiting = set(lines) if self.several else set()
        while waiting:
            done, waiting = wait(waiting, LOOK, FIRST_EXCEPTION)
            if self.interruption.asked or any(line.exception() for line in done):
                self.let_go()
                for line in lines:
                    line.cancel()
                waiting = wait(lines).not_done
        errors = [CancelledError() if line.cancelled() else line.exception() for line in lines]
        if not any(errors):
            return [line.result() for line in lines]
        for error in errors:
            if not isinstance(error, None | CancelledError | training.Interrupted):
                raise error
        saved = [str(error) for error in errors if isinstance(error, training.Interrupted)]
        raise training.Interrupted("\n".join(saved) or "stopped; the same command goes on")

    def train(self, configuration, folder):
        """`train` in a free worker; what is finished is only read. To be called within `map`."""
        with self.folders[folder]:
            if (Path(folder) / "record.json").exists():
                return training.train(configuration, folder, **self.options)
            return self.call(folder, training.train, configuration, folder, **self.options)

    def call(self, name, function, *arguments, **named):
        """What a function of a module returns, or raises, in a free worker."""
        worker = self.free.get()
        try:
            if self.stopping:
                raise CancelledError
            if self.several:
                function, arguments = _work, (function, *arguments)
            return worker.submit(function, *arguments, **named).result()
        except BrokenProcessPool:
            raise ChildProcessError(
                f"the process of {name} died (killed? out of memory?); the same command continues"
            ) from None
        finally:
            self.free.put(worker)


def _be_deaf():
    """Processes begun in this thread never get SIGINT or SIGTERM, not even while they import."""
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})


# in a worker

WORKING = threading.Lock()


def _begin(leash, threads):
    torch.set_num_threads(threads)
    threading.Thread(target=_stop_when_let_go, args=(leash,), daemon=True).start()


def _stop_when_let_go(leash):
    connection.wait([leash])  # nothing is ever sent
    Interruption.everywhere.set()
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        with WORKING:  # until the run has saved itself; nobody asks for its result
            os._exit(1)


def _work(function, *arguments, **named):
    with WORKING:
        if Interruption.everywhere.is_set():  # it is too late to begin
            raise CancelledError
        return function(*arguments, **named)
