"""Find the files in a model's folder that decide what the model and its tokenizer compute."""

from collections.abc import Iterator
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from ..common.errors import DamagedError
from ..common.files import parse_json

CONFIG, TOKENIZER = "config.json", "tokenizer.json"
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
MODEL_SUFFIXES = {".json", ".safetensors", ".model", ".bin"}
TRAINING_FILES = {  # files that training and evaluation scripts write next to a model
    "trainer_state.json", "all_results.json", "train_results.json", "eval_results.json", "test_results.json",
    "training_args.bin", "optimizer.bin", "scheduler.bin",
}  # fmt: skip
# Files of transformers' tokenizers with other suffixes. They are not read if there is a tokenizer.json.
TOKENIZER_FILES = {
    "vocab.txt", "merges.txt", "bpe.codes", "dict.txt", "prophetnet.tokenizer", "source.spm", "target.spm",
    "vocab.bpe", "qwen.tiktoken",
}  # fmt: skip


def deciding_files(folder: Path) -> tuple[list[str], list[str], list[str]]:
    """The names of the files that decide what a model computes, in the order in which the model's digest covers them.

    In the folder itself, these are the JSON files, the weights and the tokenizer's files; in its subfolders, only
    weights that an index names. Files that training writes next to a model, hidden files, and .bin weights next to
    safetensors are left out.

    Earlier versions used the second or the third list. The second list lacks the weights in subfolders and the
    tokenizer's text files; the third list has all JSON files and weights in the folder.

    Raises DamagedError if an index is not valid JSON or names a file outside the folder, OSError if an index cannot be
    read.
    """
    inside = sorted(path.name for path in folder.iterdir() if path.is_file())
    every = [name for name in inside if Path(name).suffix in MODEL_SUFFIXES]
    has_safetensors = any(name.endswith(".safetensors") for name in every)
    top = [
        name
        for name in every
        if name not in TRAINING_FILES and not name.startswith(".") and not (has_safetensors and name.endswith(".bin"))
    ]
    texts = [] if TOKENIZER in inside else [name for name in inside if name in TOKENIZER_FILES]
    named = [name for name in named_weights(folder) if (folder / name).is_file()]
    return sorted({*top, *texts, *named}), top, every


def named_weights(folder: Path) -> list[str]:
    """The weights files that transformers reads from a folder, as paths relative to the folder, as in an index.

    Raises DamagedError if the index cannot be read, or names a file outside the folder.
    """
    used = next((name for name in (explicit_weights(folder), *WEIGHTS) if name and (folder / name).is_file()), None)
    files = [used] if used else []
    for name in {*WEIGHTS, *files}:
        if name.endswith(".index.json") and (folder / name).is_file():  # an index that is not used is checked too
            weight_map = checked_weight_map(read_foreign(folder / name), str(folder / name))
            files = sorted(set(weight_map.values())) if name == used else files
    return files


def read_foreign(path: Path) -> Any:
    """The content of a JSON file of a model. Raises DamagedError if the file is not JSON, OSError if the file cannot be
    read.
    """
    return parse_json(path.read_bytes(), path, "Download the model again.")


def explicit_weights(folder: Path) -> str | None:
    """The weights file named in config.json itself, as transformers 5 allows."""
    try:
        content = read_foreign(folder / CONFIG)
    except (DamagedError, FileNotFoundError):  # reported when the configuration is loaded
        return None
    name = content.get("transformers_weights") if isinstance(content, dict) else None
    if not isinstance(name, str):
        return None
    check_inside(name, str(folder / CONFIG))
    return name


def checked_weight_map(index: Any, where: str) -> dict[str, str]:
    """The weight map of an index: {tensor: path of its file in the folder of the model}.

    Raises DamagedError if the index has no weight map, or names a file outside the folder.
    """
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(v, str) for v in weight_map.values()):
        raise DamagedError(
            f"{where} does not say which file contains which tensor: expected a weight_map from tensor names to file "
            "names. Download the model again."
        )
    for name in sorted(set(weight_map.values())):
        check_inside(name, where)
    return weight_map


def check_inside(name: str, where: str) -> None:
    """Raise DamagedError if a path in a model's file leads out of the model's folder."""
    parts = [*PurePosixPath(name).parts, *PureWindowsPath(name).parts]
    if ".." in parts or PurePosixPath(name).is_absolute() or PureWindowsPath(name).anchor or not parts or "\0" in name:
        raise DamagedError(
            f"{where} names weights outside the folder of the model: {name!r}. They are not read. Download the model "
            f"again, or copy the weights into the model's folder and correct the path in {where}."
        )


def pickled_weights(folder: Path) -> Iterator[Path]:
    """The weights in a folder that are not safetensors and that torch.load would read."""
    for name in named_weights(folder):
        if not name.endswith(".safetensors") and (folder / name).is_file():
            yield folder / name
