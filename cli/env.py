"""`sae env`: the report for bug reports."""

from .console import cli_command
from .printing import print_line


@cli_command
def env() -> None:
    """Print versions, machine and folders, to paste into a bug report. Never prints an access token."""
    from ..common.environment import describe_environment

    for line in describe_environment():
        print_line(line)
