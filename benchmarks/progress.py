"""How far a benchmark is: a line for each part that is done, with the seconds since it began, for whoever waits and for a run that is cut off."""

import sys
import time

_BEGUN = time.perf_counter()


def progress(done: str) -> None:
    print(f"{time.perf_counter() - _BEGUN:7.1f} s  {done}", file=sys.stderr, flush=True)
