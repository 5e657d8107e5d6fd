"""Load only the language tower of a model that also reads images or sound.

The complete transformers class is built, so that the tower's tensors keep their names from the whole model. But the
other parts are replaced by placeholders before any memory is allocated, their tensors are not read, and files that
contain only such tensors are neither opened nor downloaded.
"""

import contextlib
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModel
from transformers.models.auto import modeling_auto
from transformers.utils import cached_file

from ..cache.model_files import checked_weight_map
from ..common.errors import UsageError
from ..common.files import parse_json

INDEX = "model.safetensors.index.json"


class LeftOut(nn.Module):
    """A placeholder for a part of a model that text does not need. The placeholder keeps plain attributes, such as
    sizes.
    """

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.__dict__ |= {name: value for name, value in vars(part).items() if not name.startswith("_")}

    def forward(self, *_: Any, **__: Any) -> Any:
        raise UsageError("This part of the model reads images or sound and was not loaded.")


def is_multimodal(config: Any) -> bool:
    """Whether a configuration describes a model that contains a language model as only one of its parts."""
    return config.get_text_config() is not config


def tower_class(config: Any, with_unembedding: bool) -> Any:
    """A subclass of transformers' class for a multimodal configuration, whose instances have only the language tower.

    Raises UsageError if transformers has no such class.
    """
    names = ("MULTIMODAL_LM", "IMAGE_TEXT_TO_TEXT", "CAUSAL_LM", "SEQ_TO_SEQ_CAUSAL_LM")
    mappings = [getattr(modeling_auto, f"MODEL_FOR_{name}_MAPPING", {}) for name in names]
    if not with_unembedding:
        mappings.insert(0, AutoModel._model_mapping)
    for mapping in mappings:
        if type(config) in mapping and not isinstance(whole := mapping[type(config)], tuple):
            break
    else:
        raise UsageError(f"transformers has no model with text output for {type(config).__name__}. Choose another.")

    def init(self: Any, config: Any, *args: Any, **options: Any) -> None:
        whole.__init__(self, config, *args, **options)
        leave_out_other_parts(self)

    # transformers looks up tensor names by the name of the class.
    names_of_class = {"__module__": whole.__module__, "__qualname__": whole.__qualname__, "__doc__": whole.__doc__}
    return type(whole.__name__, (whole,), {**names_of_class, "__init__": init})


def leave_out_other_parts(model: Any) -> list[str]:
    """Replace all but the language tower and the unembedding, in place. Returns the names of the replaced modules.

    The tower is the module with the text configuration. Every module is left out unless it is inside the tower,
    contains the tower, or is the unembedding.
    """
    path = tower_path(model)
    unembedding = model.get_output_embeddings()
    left_out, parent = [], model
    for step in path.split("."):
        for name, part in list(parent.named_children()):
            if name != step and part is not unembedding:
                setattr(parent, name, LeftOut(part))
                left_out.append(name)
        for name in list(parent._parameters):
            parent._parameters[name] = None
            left_out.append(name)
        parent = getattr(parent, step)
    return left_out


def tower_path(model: Any) -> str:
    """The path of the outermost module that has the text configuration."""
    kind = type(model.config.get_text_config())
    for name, part in model.named_modules():
        if name and isinstance(getattr(part, "config", None), kind):
            return name
    raise UsageError(
        f"{type(model).__name__} has no module that its text configuration describes, so it is not supported."
    )


@contextlib.contextmanager
def needed_files(location: str, revision: dict[str, str], config: Any, tower: Any) -> Iterator[str]:
    """A folder with the weight files that the tower needs, or `location` itself if it needs all of them.

    A file is not needed if all its tensors belong to omitted parts.
    """
    index = read_index(location, revision)
    if index is None:
        yield location
        return
    with torch.device("meta"):
        other_parts = set(leave_out_other_parts(tower.__mro__[1](config)))
    weight_map = index["weight_map"]
    files = {file for tensor, file in weight_map.items() if not other_parts & set(tensor.split("."))}
    if files == set(weight_map.values()):
        yield location
        return
    with tempfile.TemporaryDirectory() as temporary:
        for file in files:
            path, link = Path(str(cached_file(location, file, **revision))), Path(temporary) / file
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(path.absolute())
        kept = {tensor: file for tensor, file in weight_map.items() if file in files}
        (Path(temporary) / INDEX).write_text(json.dumps({**index, "weight_map": kept}), encoding="utf-8")
        (Path(temporary) / "generation_config.json").write_text("{}", encoding="utf-8")  # transformers requests it
        yield temporary


def read_index(location: str, revision: dict[str, str]) -> dict[str, Any] | None:
    """The index of a model that is split into several safetensors files; None if there is no index.

    Raises DamagedError if the index names a file outside the folder of the model.
    """
    with contextlib.suppress(OSError):
        path = Path(str(cached_file(location, INDEX, **revision)))
        index: dict[str, Any] = parse_json(path.read_bytes(), path, "Download the model again.")
        checked_weight_map(index, str(path))
        return index
    return None
