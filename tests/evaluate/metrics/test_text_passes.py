"""The model's passes over a text are kept: what is read back is what was computed, and nothing is run again."""

import pytest
import torch

from sae.cache.layout import Hook
from sae.evaluate.metrics import text_passes
from sae.evaluate.metrics.base import EvalTarget
from sae.evaluate.metrics.core import Core
from sae.harvest.model import LanguageModel

from .test_core import make_ctx, model, own_folder, ragged, random_sae, silent  # noqa: F401  (fixtures)


@pytest.fixture
def passes(monkeypatch) -> list[str]:
    """The model's own passes over text, as they happen."""
    ran: list[str] = []

    def count(name: str) -> None:
        own = getattr(LanguageModel, name)

        def counted(self, ids_NS, *args):
            if ids_NS.shape != (2, 4):  # of the check of a hook
                ran.append(name)
            return own(self, ids_NS, *args)

        monkeypatch.setattr(LanguageModel, name, counted)

    count("forward")
    count("capture_hooks")
    return ran


def measure(model, hooks=None, kind="relu", **settings):  # noqa: F811
    settings = {"batch_contexts": 2, "reconstruction_batches": 1} | settings
    targets = [EvalTarget(random_sae(kind), hook) for hook in hooks or [Hook(0)]]
    return Core(**settings).measure(make_ctx(model, ragged()), targets, silent)


@pytest.mark.parametrize("hook", [Hook(0), Hook(1, "mlp_out")], ids=str)
def test_a_further_sae_needs_no_pass_of_the_model(model, passes, hook):  # noqa: F811
    """Also where the model starts again before the hook, at the output of the block before."""
    first = measure(model, [hook])
    assert passes.count("forward") == 1 and passes.count("capture_hooks") > 1
    passes.clear()
    assert measure(model, [hook]) == first and passes == []
    other = measure(model, [hook], "topk")
    assert passes == [] and other != first


def test_another_hook_batch_or_number_of_losses_runs_what_is_missing(model, passes):  # noqa: F811
    measure(model)
    for settings, missing in (({"hooks": [Hook(0), Hook(1)]}, 3), ({"batch_contexts": 5}, 1),
                              ({"reconstruction_batches": 3}, 2), ({"hooks": [Hook(1)]}, 0)):  # fmt: skip
        passes.clear()
        found = measure(model, **settings)
        assert len(passes) == missing, settings
        assert measure(model, **settings) == found and len(passes) == missing


def test_a_damaged_file_is_computed_again(model, passes):  # noqa: F811
    first, ctx = measure(model), make_ctx(model, ragged())
    for path in ctx.artifacts.folder.glob("text_pass-*.safetensors"):
        path.write_bytes(path.read_bytes()[:-4] + b"\1\2\3\4")
    passes.clear()
    assert measure(model) == first and len(passes) == 3
    passes.clear()
    assert measure(model) == first and passes == []


@pytest.mark.parametrize(("name", "value"), [("MAX_BYTES", 3000), ("free_space", lambda _: 12_000)])
def test_passes_over_a_text_that_is_too_long_are_not_kept(model, passes, monkeypatch, name, value):  # noqa: F811
    """The five contexts are 36 positions with their padding: of 2 x 32 numbers, 9,216 bytes."""
    kept = measure(model)
    for path in make_ctx(model, []).artifacts.folder.glob("text_pass-*"):
        path.unlink()
    monkeypatch.setattr(text_passes, name, value)
    assert measure(model) == kept
    assert not list(make_ctx(model, []).artifacts.folder.glob("text_pass-*"))


def test_a_resumed_pass_is_the_pass(model):  # noqa: F811
    ids_NS, hook = torch.tensor([[2, 400, 500], [2, 600, 700]]), Hook(0)
    run = model.forward(ids_NS, [hook])
    again = model.resume(ids_NS, [hook], run.kept, run.final)
    assert torch.equal(again.final, run.final) and torch.equal(again.activations[hook], run.activations[hook])
    assert torch.equal(again.run_from(hook, run.activations[hook]), run.run_from(hook, run.activations[hook]))
