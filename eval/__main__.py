"""`python -m eval bench=motion_transfer|long_video|latency model=… out=DIR`"""

from __future__ import annotations

from data.app import run_app
from eval.run import main

if __name__ == "__main__":
    run_app("eval", main)
