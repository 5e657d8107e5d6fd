"""Run the ranks of one command: COUNT sae-arguments..., or a script with `-c CODE`.

They are processes of their own with a group over gloo, as those of torchrun, but are forked from a process that has
imported everything: the imports take seconds, and each of torchrun's processes has its own. A rank that dies leaves the
others running, as under launchers other than torchrun. Prints the exit codes of the ranks last.

With $KILL_AT="PATTERN:N" and $KILL_MARKS, an empty folder, the rank that is about to give the N-th file of a matching
path its name is killed, once. Started by torchrun, this is one of its ranks. Otherwise it is a worker process, which
calls `launch`.
"""

import os
import re
import signal
import socket
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any, NoReturn

import accelerate  # noqa: F401
import torch
import torch._dynamo  # noqa: F401  (which groups of processes import)
import transformers.models.gemma2.modeling_gemma2  # noqa: F401
import typer  # noqa: F401

import sae.evaluate.run  # noqa: F401  (before the fork; not sae.cli, which reads its rank when it is imported)
from sae.tests.worker_process import serve


def kill_at_rename() -> None:
    pattern, _, number = os.environ["KILL_AT"].rpartition(":")
    marks, replace = Path(os.environ["KILL_MARKS"]), os.replace

    def counted(source: Any, target: Any, **more: Any) -> None:
        if re.search(pattern, str(target)):
            for count in range(1, int(number) + 1):
                try:
                    (marks / str(count)).touch(exist_ok=False)
                except FileExistsError:
                    continue
                if count == int(number):
                    os.kill(os.getpid(), signal.SIGKILL)
                break
        replace(source, target, **more)

    os.replace = counted  # type: ignore[assignment]


def run_rank(words: list[str]) -> NoReturn:
    code = 1
    torch.set_num_threads(1)  # a forked process has no other threads; torch must find out before two threads use it
    if "KILL_AT" in os.environ:
        kill_at_rename()
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
    except BaseException:
        traceback.print_exc()  # which the end below would hide
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def main(count: int, words: list[str]) -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    pids = []
    for rank in range(count):
        if not (pid := os.fork()):
            os.environ.update(
                RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(count), LOCAL_WORLD_SIZE=str(count),
                MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
            )  # fmt: skip
            run_rank(words)
        pids.append(pid)
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    print("codes", *codes, file=sys.stderr, flush=True)
    return max(map(abs, codes))


def launch(words: list[str], folder: Path, environment: dict[str, str]) -> tuple[int, str, str]:
    """Run ranks from a folder, with these environment variables alone: the exit code, stdout and stderr."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        if not (pid := os.fork()):
            os.dup2(out.fileno(), 1)
            os.dup2(err.fileno(), 2)
            os.chdir(folder)
            os.environ.clear()
            os.environ.update(environment)
            os._exit(main(int(words[0]), words[1:]))
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        out.seek(0)
        err.seek(0)
        return code, out.read().decode(), err.read().decode()


if __name__ == "__main__":
    if "RANK" in os.environ:  # started by torchrun
        run_rank(sys.argv[2:])
    torch.set_num_threads(1)
    serve("sae.tests")
