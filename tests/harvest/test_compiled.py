"""`sae harvest --compile`. The compiler only traces and generates no code, so the rows keep their bits."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from sae.common.errors import UsageError
from sae.harvest import compiled
from sae.harvest.plan import HarvestConfig, plan_harvest
from sae.harvest.run import run_harvest


@pytest.fixture
def config(tiny_model: Path, sentences: Path, tmp_path: Path) -> HarvestConfig:
    """Contexts of different lengths, a block with a hook inside, which is not compiled, and a block without one."""
    return HarvestConfig(
        model=str(tiny_model), dataset=str(sentences), layers=(0, 1), modules=("model.layers.1.mlp:output",),
        tokens=300, context=16, window=128, held_out=0.1, device="cpu", batch_contexts=4, out=tmp_path / "eager",
    )  # fmt: skip


@pytest.mark.slow
def test_rows_differ_by_the_rounding_of_the_compiler_alone_and_records_say_so(
    config: HarvestConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiled, "BACKEND", "eager")
    eager = run_harvest(plan_harvest(config)).folder
    traced = run_harvest(plan_harvest(replace(config, compiled=True, out=tmp_path / "compiled"))).folder
    files = sorted(path.relative_to(eager) for path in eager.glob("*/c.*"))
    assert files and all((eager / file).read_bytes() == (traced / file).read_bytes() for file in files)
    for folder, expected in ((eager, None), (traced, True)):
        assert json.loads((folder / "harvest.json").read_text()).get("compiled") is expected
        commit = json.loads(min((folder / "commits").glob("*.json")).read_text())
        assert commit["made_with"].get("compiled") is expected


@pytest.mark.parametrize("fault", ["no compiler", pytest.param("wrong code", marks=pytest.mark.slow)])
def test_what_cannot_be_compiled_is_refused(config: HarvestConfig, monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    def backend(module, inputs):
        if fault == "no compiler":
            raise RuntimeError("a compiler was not found")
        return lambda *given: [2 * y for y in module(*given)]

    monkeypatch.setattr(compiled, "BACKEND", backend)
    said = (
        "cannot be compiled here .*a compiler was not found"
        if fault == "no compiler"
        else "% from those of the uncompiled model"
    )
    with pytest.raises(UsageError, match=rf"{said}.*Leave out --compile"):
        run_harvest(plan_harvest(replace(config, compiled=True)))
