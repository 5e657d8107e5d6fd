"""The command `sae`, also as `python -m sae`, and so for `torchrun -m sae`."""

import signal
import sys


def main() -> None:
    """The command line; Ctrl-C is answered while its modules are still being read, too."""
    try:
        from .cli.main import app

        app(prog_name="sae")
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # one more would break into the exit
        print("stopped: interrupted before anything was begun.", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
