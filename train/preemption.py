"""A request to stop, noticed after the step, or the validation, that is under way: Slurm sends USR1 before the time
limit, TERM on preemption.
"""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class PreemptionSignal:
    """Inside the block SIGTERM and SIGUSR1 set `received`; afterwards the former handlers are back.

    Signals can only be handled in the main thread; elsewhere `received` stays False.
    """

    def __init__(self) -> None:
        self.received = False
        self._former: dict[signal.Signals, Any] = {}

    def __enter__(self) -> PreemptionSignal:
        if threading.current_thread() is threading.main_thread():
            self._former = {number: signal.signal(number, self._handle) for number in SIGNALS}
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.received = True
