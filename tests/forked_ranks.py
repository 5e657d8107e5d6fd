"""Run the ranks of one command: COUNT sae-arguments..., or a script with `-c CODE arguments...`.

Like the processes of torchrun, the ranks are separate processes that form a group over gloo. But they are forked from a
process that has already imported everything, because the imports take each process seconds. If a rank dies, the others
go on, as under launchers other than torchrun. The exit codes of the ranks are printed last. COUNT 0 runs the command
without a launcher: in one process, whose exit code is the result.

If $KILL_AT is "PATTERN:N" and $KILL_MARKS an empty folder, a rank is killed once: when it is about to rename the N-th
file whose path matches. Under torchrun, this script is one of its ranks. Otherwise it is a worker process, in which
tests call `launch`, or `start` and later `finish`.

With the word `python` in place of COUNT it runs another program, as in `python -m torch.distributed.run ...`. Python
programs that it starts are forked as well.
"""

import gc
import inspect
import os
import re
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import IO, Any, NoReturn

import accelerate  # noqa: F401
import rich.progress  # noqa: F401
import torch
import torch._dynamo  # noqa: F401  (which groups of processes import)
import transformers.models.gemma2.modeling_gemma2  # noqa: F401
import typer  # noqa: F401

import sae.evaluate.run  # noqa: F401  (before the fork; not sae.cli, which reads its rank when it is imported)
import sae.harvest.run  # noqa: F401
import sae.train.run  # noqa: F401
import sae.train.variants  # noqa: F401
import sae.workflows.published  # noqa: F401
from sae.tests.worker_process import serve

WAIT = 600  # seconds after which a command that is still running is killed
STARTED: dict[int, tuple[IO[bytes], IO[bytes]]] = {}  # stdout and stderr of what `start` has started


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


def run_python(words: list[str]) -> NoReturn:
    """Do what `python words...` does and end this process."""
    code = 1
    torch.set_num_threads(1)  # torch must learn that a forked process has no other threads
    try:
        words = [word for place, word in enumerate(words) if place or word != "-u"]
        if words[0] in ("-c", "-m"):
            sys.argv = words[:1] + words[2:]
            sys.path.insert(0, os.getcwd())
        else:
            sys.argv = words
            sys.path.insert(0, os.path.dirname(words[0]))
        if words[0] == "-c":
            exec(words[1], {"__name__": "__main__"})
        elif words[0] == "-m":
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(words[0], run_name="__main__")
        code = 0
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
        if isinstance(ended.code, str):
            print(ended.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()  # os._exit below would not print it
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def run_rank(words: list[str]) -> NoReturn:
    if "KILL_AT" in os.environ:
        kill_at_rename()
    run_python(words if words[0] == "-c" else ["-m", "sae", *words])


START = subprocess.Popen._execute_child  # type: ignore[attr-defined]
SIGNATURE = inspect.signature(START)


def start_program(process: subprocess.Popen, *values: Any) -> None:
    """Start a program for subprocess.Popen. A Python program is forked from this process; any other starts as usual."""
    arguments = SIGNATURE.bind(process, *values).arguments
    words = arguments["args"]
    if isinstance(words, str) or os.fspath(words[0]) != sys.executable:
        START(process, *values)
        return
    sys.stdout.flush()
    sys.stderr.flush()
    pipes = [arguments[name] for name in ("p2cread", "p2cwrite", "c2pread", "c2pwrite", "errread", "errwrite")]
    if pid := os.fork():
        process.pid, process._child_created = pid, True  # type: ignore[attr-defined]
        process._close_pipe_fds(*pipes)  # type: ignore[attr-defined]
        return
    try:
        for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):  # as a new program would have them
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        for standard, pipe in enumerate((arguments["p2cread"], arguments["c2pwrite"], arguments["errwrite"])):
            if pipe not in (-1, standard):
                os.dup2(pipe, standard)
        os.closerange(3, os.sysconf("SC_OPEN_MAX"))
        if arguments["start_new_session"]:
            os.setsid()
        if arguments["cwd"] is not None:
            os.chdir(arguments["cwd"])
        if arguments["env"] is not None:
            environment = dict(arguments["env"])
            os.environ.clear()
            os.environ.update(environment)
        run_python([os.fspath(word) for word in words[1:]])
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(1)


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


def start(words: list[str], folder: Path, environment: dict[str, str]) -> int:
    """Start ranks in a folder, with these environment variables alone. Returns the ID of a process, for `finish`: with
    COUNT 0 that of the command.
    """
    out, err = tempfile.TemporaryFile(), tempfile.TemporaryFile()
    if not (pid := os.fork()):
        os.dup2(out.fileno(), 1)
        os.dup2(err.fileno(), 2)
        os.chdir(folder)
        os.environ.clear()
        os.environ.update(environment)
        if words[0] == "python":
            subprocess.Popen._execute_child = start_program  # type: ignore[attr-defined]
            run_python(words[1:])
        if words[0] == "0":
            run_rank(words[1:])
        os._exit(main(int(words[0]), words[1:]))
    STARTED[pid] = out, err
    return pid


def finish(pid: int) -> tuple[int, str, str]:
    """Wait for what `start` has started. Returns the exit code, negative after a signal, and stdout and stderr."""
    until = time.monotonic() + WAIT
    while (ended := os.waitpid(pid, os.WNOHANG)) == (0, 0):
        time.sleep(0.02)
        if time.monotonic() > until:
            os.kill(pid, signal.SIGKILL)
    out, err = STARTED.pop(pid)
    with out, err:
        out.seek(0)
        err.seek(0)
        return os.waitstatus_to_exitcode(ended[1]), out.read().decode(), err.read().decode()


def launch(words: list[str], folder: Path, environment: dict[str, str]) -> tuple[int, str, str]:
    """Start ranks and wait for them; see `start` and `finish`."""
    return finish(start(words, folder, environment))


if __name__ == "__main__":
    if "RANK" in os.environ:  # started by torchrun
        run_rank(sys.argv[2:])
    torch.set_num_threads(1)
    gc.freeze()  # the imported modules stay, and no process that is forked has to look through them
    serve("sae.tests")
