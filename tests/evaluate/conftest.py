"""What the tests against SAEBench share: its fixtures, and their model, SAEs and texts. fixtures/saebench/README.md"""

import json
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from sae.harvest.model import LanguageModel, find_model, load_model
from sae.train.sae import SAE, load_sae

FOLDER = Path(__file__).parent / "fixtures" / "saebench"
SPECIAL = (0, 1, 2)  # pad, eos, bos
KINDS = ("relu", "topk", "jumprelu")


class Reference:
    """SAEBench's inputs and answers; each is read once."""

    def __init__(self) -> None:
        self._read: dict[Path, Any] = {}

    def json(self, path: str) -> Any:
        """`problem/problem` or `scr/results`: what that file holds. Do not change it."""
        file = FOLDER / f"{path}.json"
        if file not in self._read:
            self._read[file] = json.loads(file.read_text())
        return self._read[file]

    def arrays(self, name: str) -> dict[str, Tensor]:
        """The arrays of a metric, or of `problem/contexts`. Do not change them."""
        file = FOLDER / (f"{name}.safetensors" if "/" in name else f"{name}/arrays.safetensors")
        if file not in self._read:
            self._read[file] = load_file(file)
        return self._read[file]

    @cached_property
    def saes(self) -> dict[str, SAE]:
        return {kind: load_sae(FOLDER / "problem" / "saes" / kind) for kind in KINDS}

    @cached_property
    def model(self) -> LanguageModel:
        source, config = find_model(str(FOLDER / "problem"))
        return load_model(source, config, dtype="float32", device="cpu")

    def texts(self, name: str) -> tuple[Tensor, Tensor]:
        """Tokens (N, S) and activations (N, S, D) of all rows of `bios.train`, `bios.test`, `amazon.train` or
        `amazon.test`; zero at pad, eos and bos."""
        arrays = self.arrays("texts")
        ids_NS, rows_TD = arrays[f"{name}.tokens"].long(), arrays[f"{name}.activations"].float()
        x_NSD = torch.zeros(*ids_NS.shape, rows_TD.shape[1])
        x_NSD[~torch.isin(ids_NS, torch.tensor(SPECIAL))] = rows_TD
        return ids_NS, x_NSD


@pytest.fixture(scope="session")
def saebench() -> Reference:
    return Reference()
