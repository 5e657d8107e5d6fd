"""Fixtures for the tests of commands: the config that a command makes from its flags."""

from collections.abc import Callable, Mapping
from typing import Any

import pytest
from typer.main import get_command
from typer.testing import CliRunner

from sae.cli.config_file import options_of
from sae.cli.main import app
from sae.common.errors import UsageError

Flags = Mapping[str, tuple[str | None, str, Any]]
"""Name of a flag -> the word behind it (None: a switch), the field of the config, and the value expected there."""


@pytest.fixture
def planned_with(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[Any, dict[str, Any]]]:
    """planned_with(function, command, flags, *words) -> the config and the keywords that `function` is called with.

    The command runs with all `flags` at once, and stops at that call. `flags` must name every flag of the command,
    except those in `without`. The fixture checks that the value of each flag is in its field of the config or keyword,
    and is not the default.
    """

    def ask(
        function: str, command: str, flags: Flags, *words: str, without: tuple[str, ...] = ()
    ) -> tuple[Any, dict[str, Any]]:
        missing = options_of(get_command(app).commands[command]).keys() - flags.keys() - set(without)  # type: ignore[attr-defined]
        assert missing == set(), "flags without a field in `flags`"
        calls: list[tuple[Any, dict[str, Any]]] = []

        def stop(config: Any, *_: Any, **keywords: Any) -> None:
            calls.append((config, keywords))
            raise UsageError("That is far enough.")

        monkeypatch.setattr(function, stop)
        typed = [part for name, (word, _, _) in flags.items() for part in (f"--{name}", word) if part is not None]
        result = CliRunner().invoke(app, [command, *words, *typed])
        assert len(calls) == 1, result.output
        config, keywords = calls[0]
        found = vars(config) | keywords
        assert {name: found[field] for name, (_, field, _) in flags.items()} == {
            name: value for name, (_, _, value) in flags.items()
        }
        default = type(config)(*[()] * len(words[:1]))
        same = [field for _, field, value in flags.values() if getattr(default, field, None) == value]
        assert same == [], "values equal to defaults, which do not show that the flag has an effect"
        return config, keywords

    return ask
