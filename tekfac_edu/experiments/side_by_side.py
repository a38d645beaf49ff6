"""Many runs at once on one device: worker processes, each with one run at a time.

A worker keeps its decoded images from one run to the next. Ctrl-C and SIGTERM reach none of them,
even if sent to all: the parent lets go of each worker's leash, and each saves its run; a second
Ctrl-C kills them. A parent that dies lets go, too.
"""

import multiprocessing
import os
import signal
import threading
import traceback
from collections import deque
from contextlib import contextmanager
from multiprocessing import connection, resource_tracker
from pathlib import Path

import torch

from tekfac_edu.arguments import whole_number
from tekfac_edu.experiments.interruption import Interruption
from tekfac_edu.experiments.training import Interrupted, train

CONTEXT = multiprocessing.get_context("spawn")  # CUDA cannot be forked
LOOK = 0.2  # seconds between two looks at whether the user wants to stop


def check_at_once(at_once):
    """at_once as an int; ValueError if it is none, or more than 1 under torchrun."""
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    if whole_number("at_once", at_once, 1) > 1 and ranks > 1:
        raise ValueError(
            f"at_once={at_once} is for one process; torchrun started {ranks}, which share each "
            "run: leave out one of the two"
        )
    return int(at_once)


def one_run(configuration, folder, how):
    """A run for `side_by_side`, inside a line: `record = yield from one_run(...)`."""
    how = how | {"bar": False}
    if (Path(folder) / "record.json").exists():
        return train(configuration, folder, **how)  # only reads
    return (yield folder, configuration, folder, how)


def side_by_side(lines, at_once, function=None):
    """Work through several lines of runs, up to `at_once` runs at a time.

    Parameters
    ----------
    lines : generators. Each yields a run, (its name, *arguments), and is sent what the function
        returned. First runs begin in the order of the lines; later ones queue up behind.
    at_once : processes.   function : of a module, called in a process; None: `train_with`.

    Returns
    -------
    list : what the generators return

    Raises
    ------
    Interrupted
        After Ctrl-C or SIGTERM, when every run has saved itself.
    ChildProcessError
        If a process died; the message names its run. The other runs have saved themselves.
    Exception
        Of a function or a generator, as it is; the other runs have saved themselves.
    """
    function = function or train_with
    lines, ready = list(lines), deque()
    results = [None] * len(lines)

    def advance(number, answer):
        try:
            ready.append((number, *lines[number].send(answer)))
        except StopIteration as end:
            results[number] = end.value

    threads = max(1, torch.get_num_threads() // at_once)
    crew, idle, busy = [], [], {}  # busy: {worker: (number of the line, name)}
    with Interruption() as interruption:
        try:
            for number in range(len(lines)):
                advance(number, None)
            while ready or busy:
                if interruption.asked:
                    raise Interrupted("\n".join(_stop(busy)) or "stopped; the same command goes on")
                for number, name, *arguments in list(ready):
                    if len(busy) == at_once:
                        break
                    if name in (other for _, other in busy.values()):
                        continue  # asked for twice: what runs now will have finished it
                    ready.remove((number, name, *arguments))
                    if not idle:
                        crew.append(Worker(threads))
                        idle.append(crew[-1])
                    worker = idle.pop()
                    busy[worker] = number, name
                    worker.begin(name, function, arguments)
                for worker in _ready(busy):
                    number, name = busy.pop(worker)
                    answer = worker.answer(name)
                    idle.append(worker)
                    advance(number, answer)
        except Exception:
            _stop(busy)
            raise
        finally:
            for worker in busy:  # a second Ctrl-C
                worker.process.kill()
            for worker in crew:
                worker.leash.close()
                worker.pipe.close()
            for worker in crew:
                worker.process.join()
    return results


def train_with(configuration, folder, how):
    """`train`, with its named arguments in a dictionary."""
    return train(configuration, folder, **how)


class Worker:
    """A process, the pipe to it, and its leash: a pipe that says "stop" by being closed."""

    def __init__(self, threads):
        self.pipe, theirs = CONTEXT.Pipe()
        held, self.leash = CONTEXT.Pipe(duplex=False)
        self.process = CONTEXT.Process(target=_work, args=(theirs, held, threads), daemon=True)
        try:
            with _deaf():
                self.process.start()
        except BaseException:  # a second Ctrl-C: nobody will know this worker
            self.pipe.close()
            raise
        theirs.close()
        held.close()

    def begin(self, name, function, arguments):
        """Let it call the function."""
        try:
            self.pipe.send((function, arguments))
        except OSError:
            raise self._death(name) from None

    def answer(self, name):
        """Wait for what the function returns or raises."""
        try:
            returned, error = self.pipe.recv()
        except (EOFError, OSError):
            raise self._death(name) from None
        if error is not None:
            raise error
        return returned

    def _death(self, name):
        self.process.join()
        code = self.process.exitcode
        how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
        return ChildProcessError(
            f"the process of {name} {how} (out of memory?); the same command continues"
        )


def _ready(busy):
    """The workers that have something to say, after a short while at most."""
    pipes = {worker.pipe: worker for worker in busy}
    return [pipes[pipe] for pipe in connection.wait(list(pipes), LOOK)]


def _stop(busy):
    """Ask all to save their runs, wait for it, and return what they say."""
    for worker in busy:
        worker.leash.close()
    said = []
    for worker in list(busy):
        try:
            worker.answer(busy[worker][1])
        except Exception as error:
            said.append(str(error))
        del busy[worker]
    return said


@contextmanager
def _deaf():
    """Processes begun in this block never get SIGINT or SIGTERM, not even while they import."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    resource_tracker.ensure_running()  # else it begins in the block, and lets both in again
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


# in the worker


def _work(pipe, leash, threads):
    torch.set_num_threads(threads)
    threading.Thread(target=_stop_when_let_go, args=(leash,), daemon=True).start()
    while True:
        try:
            function, arguments = pipe.recv()
        except (EOFError, OSError):
            return
        returned = raised = None
        try:
            if not Interruption.everywhere.is_set():  # else it is too late to begin
                returned = function(*arguments)
        except BaseException as error:
            error.add_note(traceback.format_exc())  # where it was raised
            raised = error
        try:
            pipe.send((returned, raised))
        except OSError:  # the parent has gone
            return


def _stop_when_let_go(leash):
    connection.wait([leash])  # nothing is ever sent
    Interruption.everywhere.set()
