"""Ctrl-C and SIGTERM ask a run to stop after its current step; a second Ctrl-C stops it at once."""

import signal
import threading


class Interruption:
    """While the block lasts, the signals set `asked`; only the main thread can receive them.

    Further SIGTERMs change nothing: `timeout` and job schedulers send several. Where no signal
    arrives, as in a worker process, `everywhere` asks every block, also those to come.
    """

    everywhere = threading.Event()

    def __init__(self):
        self.signalled = False
        self.before = {}

    @property
    def asked(self):
        """Whether to stop."""
        return self.signalled or self.everywhere.is_set()

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self.before[number] = signal.signal(number, self._ask)
        return self

    def __exit__(self, *error):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _ask(self, number, frame):
        if self.signalled and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signalled = True
