"""The process that has the simulated GPU: python -m sae.tests.simulated_cuda.worker LIBRARY.

It reads calls from its input, as pickles (module of this folder, function, arguments), and writes (True, result) or
(False, traceback). The library has to be loaded before torch, so no process of the tests itself can have it.
"""

import ctypes
import importlib
import os
import pickle
import sys
import traceback


def main() -> None:
    ctypes.CDLL(sys.argv[1], mode=ctypes.RTLD_GLOBAL)
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what is printed does not get among the answers
    import torch

    from .functions import install

    install()
    torch.set_num_threads(1)
    calls = sys.stdin.buffer
    while True:
        try:
            module, function, arguments = pickle.load(calls)
        except EOFError:
            return
        try:
            called = getattr(importlib.import_module(f".{module}", __package__), function)
            answer = (True, called(**arguments))
        except BaseException:
            answer = (False, traceback.format_exc())
        pickle.dump(answer, answers)
        answers.flush()


if __name__ == "__main__":
    main()
