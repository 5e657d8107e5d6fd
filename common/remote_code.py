"""Load models, tokenizers and datasets with transformers and datasets, without ever running code that they contain.

A folder or a repository can name its own Python code (`auto_map`). transformers runs this code if trust_remote_code is
True, and asks on the terminal if trust_remote_code is not set. Every call in this package that loads a model, tokenizer
or dataset goes through this file, which sets trust_remote_code to False. Where transformers loads a part without
passing this setting on, transformers raises an error instead of asking.
tests/test_remote_code.py searches the source code for calls that bypass this file.
"""

import contextlib
import os
from collections.abc import Iterator
from typing import Any


def from_pretrained(kind: Any, location: str | os.PathLike[str], **options: Any) -> Any:
    """Return `kind.from_pretrained(location, ...)`, where `kind` is a class from the transformers library.

    Raises ValueError if the content of `location` can be loaded only by running code from `location`.
    """
    with never_asking():
        return kind.from_pretrained(location, trust_remote_code=False, **options)


def from_config(kind: Any, config: Any, **options: Any) -> Any:
    """Return `kind.from_config(config, ...)`, where `kind` is an Auto class from the transformers library.

    Raises ValueError if the model can be created only by running code from the repository that `config` comes from.
    """
    with never_asking():
        return kind.from_config(config, trust_remote_code=False, **options)


def load_dataset(path: str, **options: Any) -> Any:
    """Return `datasets.load_dataset(path, ...)`.

    Raises RuntimeError if the dataset can be loaded only by running code from its repository.
    """
    import datasets

    return datasets.load_dataset(path, trust_remote_code=False, **options)


@contextlib.contextmanager
def never_asking() -> Iterator[None]:
    """While the context is open, transformers raises an error where it would ask whether to run code.

    transformers loads some parts, such as a backbone named in a configuration, without passing trust_remote_code on.
    """
    from transformers import dynamic_module_utils

    seconds = dynamic_module_utils.TIME_OUT_REMOTE_CODE
    dynamic_module_utils.TIME_OUT_REMOTE_CODE = 0
    try:
        yield
    finally:
        dynamic_module_utils.TIME_OUT_REMOTE_CODE = seconds
