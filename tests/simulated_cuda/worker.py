"""The process that has the simulated GPU: python -m sae.tests.simulated_cuda.worker LIBRARY.

The library must be loaded before torch, so a process that runs tests cannot load it.
"""

import ctypes
import sys

from sae.tests.worker_process import serve


def main() -> None:
    ctypes.CDLL(sys.argv[1], mode=ctypes.RTLD_GLOBAL)
    import torch

    from .functions import install

    install()
    torch.set_num_threads(1)
    assert __package__ is not None
    serve(__package__)


if __name__ == "__main__":
    main()
