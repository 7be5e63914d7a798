"""A request to stop, noticed after the step, or the validation, that is under way: Slurm sends USR1 before the time
limit, TERM on preemption; a user presses Ctrl-C.
"""

from __future__ import annotations

import signal
import threading
import time
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
SAME_PRESS = 1.0  # seconds: a launcher hands on the Ctrl-C that the terminal has sent to its processes too


class PreemptionSignal:
    """Inside the block SIGTERM, SIGUSR1 and SIGINT set `received`, SIGINT sets `interrupted` too; afterwards the former
    handlers are back. A second Ctrl-C raises KeyboardInterrupt at once. A process that was started to ignore SIGINT, as
    in the background of a script, goes on ignoring it.

    Signals can only be handled in the main thread; elsewhere `received` stays False.
    """

    def __init__(self) -> None:
        self.received = False
        self.interrupted: float | None = None  # when, in seconds
        self._former: dict[signal.Signals, Any] = {}

    def __enter__(self) -> PreemptionSignal:
        if threading.current_thread() is threading.main_thread():
            is_deaf = signal.getsignal(signal.SIGINT) == signal.SIG_IGN
            handled = [number for number in SIGNALS if number != signal.SIGINT or not is_deaf]
            self._former = {number: signal.signal(number, self._handle) for number in handled}
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.received = True
        if number != signal.SIGINT:
            return
        if self.interrupted is None:
            self.interrupted = time.monotonic()
        elif time.monotonic() - self.interrupted > SAME_PRESS:
            raise KeyboardInterrupt
