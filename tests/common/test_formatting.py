"""Numbers, paths and long values as text."""

from pathlib import Path

import pytest

from sae.common.formatting import format_bytes, format_count, format_duration, shell_paths, shorten_values


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0 s"), (119, "119 s"), (120, "2.0 min"), (7200, "2.0 h"), (172_800, "2.0 days")]
)
def test_a_duration_has_at_least_two_of_its_unit(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


def test_counts_and_sizes() -> None:
    assert [format_count(n, "run") for n in (0, 1, 2000)] == ["0 runs", "1 run", "2,000 runs"]
    assert [format_bytes(n) for n in (5e4, 99e6, 1e8, 2.5e12)] == ["0.1 MB", "99.0 MB", "0.10 GB", "2,500.00 GB"]


def test_paths_are_shortened_to_a_pattern_only_if_a_shell_would_find_the_same_paths(tmp_path: Path) -> None:
    folder = tmp_path / "two words"
    runs = [folder / name for name in "abc"]
    for run in runs:
        run.mkdir(parents=True)
    pattern, listed = f"'{folder}'/*", [f"'{run}'" for run in runs]
    (folder / ".hidden").touch()  # `*` does not match it
    assert shell_paths(runs) == pattern
    assert shell_paths(runs[:2]) == " ".join(listed[:2])
    (folder / "d").mkdir()
    assert shell_paths(runs) == " ".join(listed)


def test_two_paths_are_written_out_even_if_they_are_all(tmp_path: Path) -> None:
    runs = [tmp_path / "a", tmp_path / "b"]
    for run in runs:
        run.mkdir()
    assert shell_paths(runs) == f"{runs[0]} {runs[1]}"


@pytest.mark.parametrize("value", ["x" * 5000, "a b " * 1250], ids=["a word", "words"])
def test_a_long_value_is_shown_without_its_middle(value: str) -> None:
    said = shorten_values(f"--set k={value}: {value!r} is no number.\nGive another.")
    assert len(said) < 6000 and " characters) ... " in said
    assert said.startswith(f"--set k={value[:100]}") and said.endswith(" is no number.\nGive another.")


def test_a_message_of_words_that_people_write_is_whole() -> None:
    message = " ".join(["/a/path/of/two/hundred/characters".ljust(200, "x")] * 19)
    assert shorten_values(f"{message}\n{message}") == f"{message}\n{message}"
