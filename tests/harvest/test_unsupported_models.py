"""For a model that transformers cannot load as it is, one sentence says why and what to do."""

import json
import shutil
from pathlib import Path

import pytest

from sae.common.errors import UsageError
from sae.harvest.load_errors import translate_load_errors
from sae.harvest.model import find_model


def folder_with(folder: Path, **config: object) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_an_architecture_that_transformers_does_not_know(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="does not know the architecture of .*new. Update transformers"):
        find_model(str(folder_with(tmp_path / "new", model_type="a-new-one")))


def test_code_of_a_model_is_never_run(tmp_path: Path) -> None:
    folder = folder_with(tmp_path / "own", model_type="own", auto_map={"AutoConfig": "own.OwnConfig"})
    (folder / "own.py").write_text("raise SystemExit('this was run')")
    with pytest.raises(UsageError, match="needs its own Python code, which is never run here"):
        find_model(str(folder))


def test_a_gguf_file_is_not_read(tmp_path: Path) -> None:
    folder = tmp_path / "gguf"
    folder.mkdir()
    (folder / "model.Q4_1.gguf").write_bytes(b"GGUF")
    with pytest.raises(UsageError, match="contains model.Q4_1.gguf and no safetensors"):
        find_model(str(folder))


def test_a_quantized_model_names_the_package_that_it_needs(tiny_model: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_model, tmp_path / "quantized")
    with pytest.raises(UsageError, match="is quantized, and transformers needs bitsandbytes"):
        with translate_load_errors(str(folder)):
            raise ImportError("Using `bitsandbytes` 4-bit quantization requires bitsandbytes")
