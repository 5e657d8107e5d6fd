"""Choose the files of a local folder that belong to a split, by their names, as `datasets` does.

These rules are tried in order; the first that assigns a split to any file is used:

1. `configs` in the YAML header of README.md, whose `data_files` name the files of each split;
2. data/<split>-00000-of-00002.parquet;
3. folders with the name of a split in their name: train/, my-dataset-test/;
4. files with the name of a split in their name: train.jsonl, wiki_validation.parquet.

Otherwise every file belongs to train. Hidden files, READMEs, licenses and the metadata of `datasets` are left out.
"""

import fnmatch
import functools
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..common.errors import DamagedError, UsageError
from ..common.files import parse_json, read_file
from ..common.formatting import format_count
from ..common.tables import FORMATS

FILE_FORMATS = FORMATS | {".txt": "text"}  # suffix -> format
KEYWORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval", "evaluation"),
}  # split -> words for it in file names
SAVE_AGAIN = "Save the dataset again."
ALL = "all"  # a split that contains every file
WHOLE = (*KEYWORDS["train"], ALL)  # names for the whole of an undivided text
SHARD = re.compile(r"data/(?P<split>[^/]*)-\d{5}-of-(?P<shards>\d{5})[^/]*\.[^/]*")
METADATA = {"config.json", "dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}
ABOUT = {"readme", "license", "licence", "copying", "notice"}  # stems of .txt and .json files that are not text

Say = Callable[[str], None]
Splits = dict[str, list[Path]]


@dataclass(frozen=True)
class Configuration:
    """An entry of `configs` in a README.md.

    Attributes:
        patterns: split -> patterns of its files, relative to the folder; empty if the file names decide the split.
        folder: the subfolder that contains the entry's files; "" for the folder itself.
    """

    name: str
    patterns: dict[str, list[str]] = field(default_factory=dict)
    folder: str = ""
    is_default: bool = False


def list_files(path: Path, subset: str | None, split: str, say: Say) -> list[Path]:
    """The files of a text, in order. A folder written by `save_to_disk` lists its own files.

    Raises UsageError for an unknown split or subset, even if the text is a single file.
    """
    if not path.is_dir():
        check_split_of_file(path, split)
        return [path]
    is_dictionary = (path / "dataset_dict.json").is_file()
    is_saved = is_dictionary or ((path / "state.json").is_file() and (path / "dataset_info.json").is_file())
    if is_saved and subset is not None:
        raise UsageError(f"--subset selects a configuration, but {path}, a saved dataset, has none. Leave it out.")
    if is_dictionary:
        return saved_files(path / choose_split(path, saved_list(path / "dataset_dict.json", "splits"), split))
    if is_saved:
        return saved_files(path)
    if not (files := folder_files(path)):
        return []
    if split == ALL and subset is None:
        return files
    splits = splits_of_folder(path, files, subset, say)
    files = splits[choose_split(path, list(splits), split)]
    say_missing_shards(path, files, say)
    return files


def check_split_of_file(path: Path, split: str) -> None:
    """Raise UsageError if a split is requested of a single file whose name does not contain that split or a synonym."""
    words = next((words for words in KEYWORDS.values() if split in words), (split,))
    if split not in WHOLE and not has_word(path.name, [re.escape(word) for word in words], in_folders=False):
        raise UsageError(
            f"{path} is a single file, which is read whole, and its name does not contain the split {split!r}. Leave "
            "--split out, or give the folder with the files of the splits."
        )


def choose_split(path: Path, splits: Sequence[str], split: str) -> str:
    """The split with this name, or with a synonym of it. Raises UsageError if there is none."""
    if split in splits:
        return split
    for name, words in KEYWORDS.items():
        if split in words and name in splits:
            return name
    listed = ", ".join(map(repr, splits))
    raise UsageError(f"{path} has no split {split!r}; its splits are {listed}. Choose one with --split.")


def saved_list(record: Path, key: str) -> list[Any]:
    """The list stored under `key` in a record that `save_to_disk` wrote. Raises UsageError if there is none."""
    try:
        content = parse_json(read_file(record, SAVE_AGAIN), record, SAVE_AGAIN)
    except DamagedError as error:
        raise UsageError(str(error)) from error
    values = content.get(key) if isinstance(content, dict) else None
    if not isinstance(values, list) or not values:
        raise UsageError(f"{record} has no list {key!r}. {SAVE_AGAIN}")
    return values


def saved_files(path: Path) -> list[Path]:
    """The files listed in a folder written by `save_to_disk`."""
    files = []
    for entry in saved_list(path / "state.json", "_data_files"):
        name = entry.get("filename") if isinstance(entry, dict) else None
        if not isinstance(name, str) or not Path(name).name:
            raise UsageError(f"{path / 'state.json'} lists {entry!r:.40}; expected a file. {SAVE_AGAIN}")
        files.append(path / Path(name).name)
    return files


def folder_files(path: Path) -> list[Path]:
    """The files of a known format in a folder and its subfolders, except files that are not part of the text."""
    found = []
    seen = {path.resolve()}
    for folder, folders, names in os.walk(path, onerror=refuse_folder, followlinks=True):
        here = Path(folder)
        folders[:] = [name for name in folders if name[0] != "." and not name.startswith("__")]
        for name in [name for name in folders if (here / name).is_symlink()]:
            target = (here / name).resolve()
            if target in seen or target in path.resolve().parents:  # a cycle of links
                folders.remove(name)
            seen.add(target)
        found += [here / name for name in names if is_text_file(name)]
    return sorted(found)


def refuse_folder(error: OSError) -> None:
    raise UsageError(f"{error.filename} cannot be read: {error.strerror}.") from error


def is_text_file(name: str) -> bool:
    stem, suffix = os.path.splitext(name.lower())
    is_about = name in METADATA or (stem in ABOUT and suffix in (".txt", ".json"))
    return suffix in FILE_FORMATS and name[0] not in ".~" and not is_about


def splits_of_folder(path: Path, files: list[Path], subset: str | None, say: Say) -> Splits:
    """split -> its files, according to the README.md or the file names. Raises UsageError for an unknown subset."""
    configuration = choose_configuration(path, files, read_configurations(path), subset)
    if configuration is None:
        splits = splits_by_name(path, files)
        say_left_out(path, files, splits, say)
        return splits
    if configuration.patterns:
        return splits_by_pattern(path, files, configuration)
    base = path / configuration.folder
    return splits_by_name(base, [file for file in files if file.is_relative_to(base)])


def splits_by_name(path: Path, files: list[Path]) -> Splits:
    """split -> its files, according to file and folder names. A name that contains two splits belongs to both."""
    names = {file: file.relative_to(path).as_posix() for file in files}
    sharded: Splits = {}
    for file, name in names.items():
        if match := SHARD.fullmatch(name):
            sharded.setdefault(match["split"], []).append(file)
    if sharded:
        return {split: sharded[split] for split in [*KEYWORDS, *sorted(sharded)] if split in sharded}
    for in_folders in (True, False):
        splits = {
            split: [file for file, name in names.items() if has_word(name, words, in_folders)]
            for split, words in KEYWORDS.items()
        }
        if any(splits.values()):
            return {split: chosen for split, chosen in splits.items() if chosen}
    return {"train": files}


def has_word(name: str, words: Sequence[str], in_folders: bool) -> bool:
    """Whether one of the words occurs, delimited by separators, in the name of the file at a path.

    With `in_folders`, the names of the folders on the path are searched instead.
    """
    *folders, file = name.split("/")
    word = rf"(?:.*[-._ 0-9])?(?:{'|'.join(words)})"
    if in_folders:
        return any(re.fullmatch(rf"{word}(?:[-._ 0-9].*)?", folder) for folder in folders)
    return re.fullmatch(rf"{word}[-._ 0-9].*", file) is not None


def splits_by_pattern(path: Path, files: list[Path], configuration: Configuration) -> Splits:
    """split -> its files, according to the patterns in a README.md."""
    names = {file: file.relative_to(path).parts for file in files}
    splits: Splits = {}
    for split, patterns in configuration.patterns.items():
        parts = [tuple(os.path.normpath(pattern).split("/")) for pattern in patterns]
        chosen = [file for file, name in names.items() if any(matches(name, pattern) for pattern in parts)]
        if chosen:
            splits[split] = chosen
    return splits


@functools.cache
def matches(name: tuple[str, ...], pattern: tuple[str, ...]) -> bool:
    """Whether a path matches a pattern, part by part; the part ** matches any number of folders."""
    if not pattern:
        return not name
    if pattern[0] == "**" and matches(name, pattern[1:]):
        return True
    if not name or not (pattern[0] == "**" or fnmatch.fnmatchcase(name[0], pattern[0])):
        return False
    return matches(name[1:], pattern if pattern[0] == "**" else pattern[1:])


def read_configurations(path: Path) -> list[Configuration]:
    """The `configs` in the YAML header of a README.md; empty if there are none."""
    import huggingface_hub

    readme = path / "README.md"
    if not readme.is_file() or b"configs:" not in readme.read_bytes():
        return []
    try:
        metadata = huggingface_hub.metadata_load(readme)
    except Exception as error:  # from YAML, the encoding or the system
        raise UsageError(
            f"The YAML header of {readme} cannot be read: {' '.join(str(error).split())[:200]}. Correct it, or remove "
            "README.md to choose the files by their names."
        ) from error
    entries = metadata.get("configs") if isinstance(metadata, dict) else None
    return [read_configuration(entry, readme) for entry in (entries if isinstance(entries, list) else [])]


def read_configuration(entry: Any, readme: Path) -> Configuration:
    """Parse an entry of `configs`. The entry's `data_files` is one pattern, several, or a list of splits with
    patterns.
    """
    entry = entry if isinstance(entry, dict) else {}
    files, name, folder = entry.get("data_files"), entry.get("config_name"), entry.get("data_dir") or ""
    patterns: dict[str, list[str]] = {}
    for one in files if isinstance(files, list) else [files] if files is not None else []:
        one = one if isinstance(one, dict) else {"split": "train", "path": one}
        split, paths = one.get("split"), one.get("path")
        paths = paths if isinstance(paths, list) else [paths]
        if not isinstance(split, str) or not all(isinstance(path, str) for path in paths):
            name = None
            break
        patterns.setdefault(split, []).extend(paths)
    if not isinstance(name, str) or not isinstance(folder, str):
        raise UsageError(
            f"{readme} has a configuration without a config_name, or without data_files that give a path, several "
            "paths, or paths for each split. Correct it, or remove README.md to choose the files by their names."
        )
    return Configuration(name, patterns, folder, bool(entry.get("default")))


def has_files(path: Path, files: list[Path], configuration: Configuration) -> bool:
    """Whether a configuration contains one of these files."""
    if configuration.patterns:
        return bool(splits_by_pattern(path, files, configuration))
    return any(file.is_relative_to(path / configuration.folder) for file in files)


def choose_configuration(
    path: Path, files: list[Path], configurations: list[Configuration], subset: str | None
) -> Configuration | None:
    """The configuration to read; None if no configuration contains an existing file.

    Raises UsageError for an unknown subset, or if the user has to choose one.
    """
    names = [one.name for one in configurations]
    if subset is not None and subset not in names:
        known = f"; its README.md has {', '.join(names)}" if names else ", since it has no README.md with `configs`"
        raise UsageError(f"{path} has no subset {subset!r}{known}. Choose another with --subset, or omit --subset.")
    present = [one for one in configurations if has_files(path, files, one)]
    if subset is not None:
        chosen = [one for one in present if one.name == subset]
        if not chosen:
            raise UsageError(f"No file of the subset {subset!r} is in {path}. Download it, or choose another --subset.")
        return chosen[0]
    chosen = [one for one in configurations if one.is_default or one.name == "default" or len(configurations) == 1]
    if chosen:
        return chosen[0] if chosen[0] in present else None
    if len(present) > 1:
        raise UsageError(
            f"{path} has several configurations. Choose one with --subset: {', '.join(one.name for one in present)}."
        )
    return present[0] if present else None


def say_left_out(path: Path, files: list[Path], splits: Splits, say: Say) -> None:
    """Report files that belong to no split because their names, unlike those of other files, contain no split."""
    belonging = {file for chosen in splits.values() for file in chosen}
    if left_out := [file for file in files if file not in belonging]:
        first = left_out[0].relative_to(path).as_posix()
        say(
            f"{format_count(len(left_out), 'file')} of {path} {'is' if len(left_out) == 1 else 'are'} not read, such "
            f"as {first}: its name does not contain a split, but the names of other files do. --split {ALL} reads "
            "every file."
        )


def say_missing_shards(path: Path, files: list[Path], say: Say) -> None:
    """Report missing shards, such as 00002-of-00003."""
    shards = [match for file in files if (match := SHARD.fullmatch(file.relative_to(path).as_posix()))]
    expected = {int(match["shards"]) for match in shards}
    if len(expected) == 1 and len(shards) == len(files) < (total := expected.pop()):
        say(f"{path} has only {len(files)} of the {total} files of the split {shards[0]['split']!r}.")
