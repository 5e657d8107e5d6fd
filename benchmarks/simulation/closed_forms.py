"""Closed formulas against which the simulations are checked."""

import math

from sae.cache.mirror import THREADS

from .harvest import Harvest


def undisturbed_seconds(harvest: Harvest) -> float:
    """Time to the last commit for equal processes without failures, if nothing waits for links or the store.

    A process computes its windows one after the other. The last window is then written and committed. If writing takes
    longer than computing, the windows follow each other at the pace of writing.
    """
    c, link = harvest.constants, min(harvest.constants.node_link, THREADS * harvest.constants.connection)
    rounds = math.ceil(harvest.layout.n_windows / harvest.processes)
    computing = harvest.commit_seconds + harvest.window * harvest.token_seconds
    sending = harvest.window_bytes / link + harvest.send_seconds
    writing = harvest.commit_seconds + harvest.writer_seconds + sending + harvest.commit_seconds
    start = c.start + harvest.text_seconds + harvest.asking_seconds
    return start + computing + (rounds - 1) * max(computing, writing) + writing


def expected_seconds_with_failures(seconds: float, rate: float, restart: float) -> float:
    """Expected time to do `seconds` of work, if after each failure the work begins again `restart` seconds later.

    Failures come at `rate` per second, also during a restart (J. Daly, A higher order estimate of the optimum
    checkpoint interval, 2006, equation 13 for one segment).
    """
    return math.exp(rate * restart) * math.expm1(rate * seconds) / rate
