"""Ctrl-C and SIGTERM ask a run to stop after its current step; a second Ctrl-C stops it at once."""

import signal
import threading


class Interruption:
    """While the block lasts, the signals set `asked`; only the main thread can receive them."""

    def __init__(self):
        self.asked = False
        self.before = {}

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self.before[number] = signal.signal(number, self._ask)
        return self

    def __exit__(self, *error):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _ask(self, number, frame):
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
