"""`python -m data step=render|track|encode|pack|all source=sprites|folder|openvid|vidprom out=DIR …`"""

from __future__ import annotations

from data.app import run_app
from data.prepare import main

if __name__ == "__main__":
    run_app("data", main, kept="what is finished is kept; the same command goes on from there")
