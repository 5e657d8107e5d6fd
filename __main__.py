"""The command `sae`, also available as `python -m sae` and therefore with `torchrun -m sae`."""

import signal
import sys


def main() -> None:
    """Run the command line. Ctrl-C is handled even while the modules of `sae` are still being imported."""
    try:
        from .cli.main import app

        app(prog_name="sae")
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second Ctrl-C would interrupt the exit
        print("stopped: interrupted before anything was started.", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
