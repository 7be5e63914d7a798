"""`python -m eval bench=motion_transfer|long_video|latency model=… out=DIR`"""

from __future__ import annotations

from data.app import run_app
from eval.run import main

if __name__ == "__main__":
    kept = (
        "no figures are written; those that bench=claims and bench=drag_ablation had finished are kept for the next run"
    )
    run_app("eval", main, kept)
