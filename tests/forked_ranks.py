"""Run the ranks of one command: `python forked_ranks.py COUNT sae-arguments...`, or a script with `-c CODE`.

They are processes of their own with a group over gloo, as those of torchrun, but are forked once everything is
imported: the imports take three seconds, and each of torchrun's processes has its own. A rank that dies leaves the
others running, as under launchers other than torchrun. Prints the process of each rank first.
"""

import os
import socket
import sys
from typing import NoReturn

import torch

import sae.evaluate.run  # noqa: F401  (before the fork; not sae.cli, which reads its rank when it is imported)


def run_rank(rank: int, count: int, port: int, words: list[str]) -> NoReturn:
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(count), LOCAL_WORLD_SIZE=str(count),
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
    )  # fmt: skip
    code = 1
    try:
        if words[0] == "-c":
            exec(words[1])
            code = 0
        else:
            from sae.__main__ import main

            sys.argv = ["sae", *words]
            main()
            code = 0
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def main(count: int, words: list[str]) -> int:
    torch.set_num_threads(1)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    pids = []
    for rank in range(count):
        if not (pid := os.fork()):
            run_rank(rank, count, port, words)
        pids.append(pid)
    print("ranks", *pids, file=sys.stderr, flush=True)
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    print("codes", *codes, file=sys.stderr, flush=True)
    return max(map(abs, codes))


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), sys.argv[2:]))
