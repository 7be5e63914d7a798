"""`python -m stream image=… prompt=… tracks=… out=… [num_frames=…] [role=student|teacher]`"""

from __future__ import annotations

from data.app import run_app
from stream.run import main

if __name__ == "__main__":
    run_app("stream", main)
