"""Shared fixtures: the reference data of SAEBench (fixtures/saebench/README.md) and a browser."""

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
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
SINK = 652  # the token " value"


class Reference:
    """Inputs and results of SAEBench. Each file is read only once."""

    def __init__(self) -> None:
        self._read: dict[Path, Any] = {}

    def json(self, path: str) -> Any:
        """The content of a file such as `problem/problem` or `scr/results`. Do not modify it."""
        file = FOLDER / f"{path}.json"
        if file not in self._read:
            self._read[file] = json.loads(file.read_text())
        return self._read[file]

    def arrays(self, name: str) -> dict[str, Tensor]:
        """The arrays of the metric `name`, or of a file such as `problem/contexts`. Do not modify them."""
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


@pytest.fixture
def record_comparison(record_property) -> Callable[..., None]:
    """Record a line of the table that benchmarks/peers/saebench_reference.py --accept prints.

    `pairs` holds pairs of SAEBench's number and ours; the first pair is printed in full. For tensors, the difference
    is relative to their largest element. `equal` maps each quantity that must match exactly to whether it does.
    """

    def note(metric: str, what: str, pairs: Sequence[tuple[Any, Any]], equal: dict[str, bool] | None = None) -> None:
        arrays = [[torch.as_tensor(side, dtype=torch.float64) for side in pair] for pair in pairs]
        relative = [
            float((ours - reference).abs().max() / reference.abs().max().clamp(min=1e-30)) for reference, ours in arrays
        ]
        largest = f"{max(relative):.1e} of {len(relative)}" if relative else ""
        shown = [f"{float(side):.6f}" if side.ndim == 0 else "" for side in arrays[0]] if arrays else ["", ""]
        exact = ", ".join(f"{name}: {'yes' if same else 'NO'}" for name, same in (equal or {}).items())
        record_property("saebench", [metric, what, *shown, largest, exact])

    return note


BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install 'sae-pipeline[test]'")
    path = next((found for name in BROWSERS if (found := shutil.which(name))), None)
    if path is None:
        pytest.skip(f"needs a browser: one of {', '.join(BROWSERS)} on the PATH")
    with playwright.sync_playwright() as running:
        try:
            opened = running.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-gpu"])
        except playwright.Error as error:
            pytest.skip(f"{path} does not start: {str(error).splitlines()[0]}")
        yield opened
        opened.close()


@pytest.fixture
def opened(browser: Any) -> Iterator[Callable[..., Any]]:
    """Open a page in the browser; `phone` emulates a touch screen.

    Any console message, error or network request of a page fails the test.
    """
    said: list[str] = []
    pages = []

    def open_page(path: Path, width: int = 1300, phone: bool = False) -> Any:
        page = browser.new_page(viewport={"width": width, "height": 800}, has_touch=phone, is_mobile=phone)
        pages.append(page)
        page.set_default_timeout(60_000)
        page.on("console", lambda message: said.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("dialog", lambda dialog: said.append(dialog.message))
        page.on("request", lambda request: said.append(request.url) if request.url.startswith("http") else None)
        page.goto(path.as_uri())
        return page

    yield open_page
    for page in pages:
        page.close()
    assert said == []


@pytest.fixture(scope="session")
def sink_model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of `tiny_model` whose activations at the token SINK have about 40 times the norm of those at other tokens.

    The unembedding is unchanged.
    """
    from transformers import AutoTokenizer, Gemma2ForCausalLM

    folder = tmp_path_factory.mktemp("models") / "sink-gemma"
    model = Gemma2ForCausalLM.from_pretrained(tiny_model, tie_word_embeddings=False)
    with torch.no_grad():
        model.lm_head.weight = torch.nn.Parameter(model.model.embed_tokens.weight.clone())
        model.model.embed_tokens.weight[SINK] *= 50
    model.to(torch.bfloat16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(folder)
    return folder
