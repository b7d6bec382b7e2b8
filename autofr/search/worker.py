"""One of the processes that score the trials of a shared study."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable

from autofr.search.queue import Queue, pause
from autofr.search.trial import Outcome, Proposal


def work(
    queue: Queue,
    score: Callable[[Proposal], Outcome],
    most: int | None = None,
    idle: float = 600.0,
    say: Callable[[str], None] = lambda text: None,
) -> int:
    """Take trials until the search is over, `most` are done, or none came for `idle` seconds.

    Returns: how many were scored.
    Raises: what scoring raises that is of no single trial; that trial is tried again elsewhere.
    """
    who, done, last = f"{socket.gethostname()}-{os.getpid()}", 0, time.monotonic()
    while most is None or done < most:
        found = queue.take(score, who)
        if found == "none":
            if queue.user_attrs.get("state") == "over":
                say("the search has all its trials")
                break
            if time.monotonic() - last > idle:
                say(f"no trial came for {idle:.0f} s")
                break
            time.sleep(pause(last))
            continue
        done += found == "scored"
        last = time.monotonic()
        if found == "lost":
            say("paused or cut off for too long: its trial was given to another worker")
        else:
            say(f"{done} trials")
    return done
