"""The command `sae`, also available as `python -m sae` and therefore with `torchrun -m sae`."""

import signal
import sys


def main() -> None:
    """Run the command line. Ctrl-C is handled even while its modules are still being imported."""
    try:
        from .cli.main import app

        app(prog_name="sae")
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # another one would interrupt the exit
        print("stopped: interrupted before anything was started.", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
