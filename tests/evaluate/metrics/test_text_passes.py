"""The model's passes over a text are cached: what is read back equals what was computed, and no pass is repeated."""

from dataclasses import replace

import pytest
import torch

from sae.cache.hooks import Hook
from sae.common.errors import UnavailableError
from sae.evaluate import artifacts
from sae.evaluate.context import ContextBatch
from sae.evaluate.metrics import text_passes
from sae.evaluate.metrics.base import EvalTarget
from sae.evaluate.metrics.core import Core
from sae.evaluate.metrics.text_passes import TextPasses
from sae.harvest.model import ForwardPass, LanguageModel

from .test_core import make_ctx, model, own_folder, ragged, random_sae, silent  # noqa: F401  (fixtures)


@pytest.fixture
def passes(monkeypatch) -> list[str]:
    """The names of the methods that run the model over the text, one entry per pass."""
    ran: list[str] = []

    def count(name: str) -> None:
        own = getattr(LanguageModel, name)

        def counted(self, ids_NS, *args):
            if ids_NS.shape != (2, 4):  # a pass of this shape only checks a hook
                ran.append(name)
            return own(self, ids_NS, *args)

        monkeypatch.setattr(LanguageModel, name, counted)

    count("forward")
    count("capture_hooks")
    return ran


def measure(model, hook, kind="relu"):  # noqa: F811
    core = Core(batch_contexts=2, reconstruction_batches=1)
    return core.measure(make_ctx(model, ragged()), [EvalTarget(random_sae(kind), hook)], silent)


def run(ctx, *hooks, size=2, losses=1):
    """The tensors of the passes over a text in batches of `size` contexts, as core makes them."""
    batches = list(ctx.batches(size, 9))
    kept = TextPasses(ctx, hooks or [Hook(0)], batches)
    found = [kept.whole(batch) if place < losses else kept.activations(batch) for place, batch in enumerate(batches)]
    tensors = [[one.final, *one.activations.values()] if isinstance(one, ForwardPass) else [*one.values()]
               for one in found]  # fmt: skip
    return [part.clone() for parts in tensors for part in parts]


def equal(found, expected):
    return all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize("hook", [Hook(0), Hook(1, "mlp_out")], ids=str)
def test_a_further_sae_needs_no_pass_of_the_model(model, passes, hook):  # noqa: F811
    """This also holds for a hook inside a block, where the model is resumed at the output of the preceding block."""
    first = measure(model, hook)
    assert passes.count("forward") == 1 and passes.count("capture_hooks") > 1
    passes.clear()
    assert measure(model, hook) == first and passes == []
    other = measure(model, hook, "topk")
    assert passes == [] and other != first


def test_another_hook_batch_or_number_of_losses_runs_what_is_missing(model, passes):  # noqa: F811
    ctx = make_ctx(model, ragged())
    run(ctx)
    for hooks, settings, missing in (([Hook(0), Hook(1)], {}, 3), ([Hook(0)], {"size": 5}, 1),
                                     ([Hook(0)], {"losses": 3}, 2), ([Hook(1)], {}, 0),
                                     ([Hook(1, "mlp_out")], {}, 3)):  # fmt: skip
        passes.clear()
        found = run(ctx, *hooks, **settings)
        assert len(passes) == missing, (hooks, settings)
        assert equal(run(ctx, *hooks, **settings), found) and len(passes) == missing


def test_another_model_text_or_shape_has_passes_of_its_own(model, passes):  # noqa: F811
    ctx = replace(make_ctx(model, ragged()), model_identity={"model": "a", "llm_dtype": "float32"})
    run(ctx, size=5)
    for change in ({"model": "b"}, {"llm_dtype": "bfloat16"}, {"adapters": ["c"]}, {"revision": "d"}):
        passes.clear()
        run(replace(ctx, model_identity={**ctx.model_identity, **change}), size=5)
        assert passes == ["forward"], change
    passes.clear()
    other = [[*row[:-1], row[-1] + 1] for row in ragged()]
    run(replace(make_ctx(model, other), model_identity=ctx.model_identity), size=5)
    assert passes == ["forward"]
    ids, whole = torch.arange(300, 306), torch.ones(6, dtype=torch.bool)
    for shape in ((2, 3), (3, 2)):
        batch = ContextBatch(ids.view(shape), whole.view(shape), whole.view(shape), torch.zeros(shape[0]))
        assert TextPasses(ctx, [Hook(0)], [batch]).activations(batch)[Hook(0)].shape == (*shape, 32)


def test_a_damaged_file_is_computed_again(model, passes):  # noqa: F811
    """This holds if all files are damaged, and if only one part of a batch is."""
    ctx = make_ctx(model, ragged())
    first = run(ctx)
    files = sorted(ctx.artifacts.folder.glob("text_pass-*.safetensors"))
    assert len(files) == 4
    for damaged, missing in ((files, 3), *(([one], 1) for one in files)):
        for path in damaged:
            path.write_bytes(path.read_bytes()[:-4] + b"\1\2\3\4")
        passes.clear()
        assert equal(run(ctx), first) and len(passes) == missing
        assert equal(run(ctx), first) and len(passes) == missing


@pytest.mark.parametrize(("name", "value"), [("MAX_BYTES", 9_000), ("free_space", lambda _: 36_000)])
def test_passes_over_a_text_that_is_too_long_are_not_kept(model, monkeypatch, name, value):  # noqa: F811
    """With padding, the five contexts have 36 positions of 2 x 32 numbers, which are 9,216 bytes."""
    ctx = make_ctx(model, ragged())
    kept = run(ctx)
    for path in ctx.artifacts.folder.glob("text_pass-*"):
        path.unlink()
    monkeypatch.setattr(text_passes, name, value)
    assert equal(run(ctx), kept)
    assert not list(ctx.artifacts.folder.glob("text_pass-*"))


def test_a_disk_that_fills_costs_no_result(model, monkeypatch):  # noqa: F811
    ctx, tries = make_ctx(model, ragged()), []

    def full(path, *_):
        tries.append(path)
        raise UnavailableError("The disk is full")

    with monkeypatch.context() as patched:
        patched.setattr(artifacts, "atomic_write", full)
        found = run(ctx)
    assert equal(run(ctx), found) and len(tries) == 1


def test_a_pass_in_bfloat16_takes_half_the_space(model, monkeypatch):  # noqa: F811
    ctx = make_ctx(model, ragged())
    (batch,) = ctx.batches(5, 1)
    x_NSD = torch.ones(*batch.ids.shape, 32)
    monkeypatch.setattr(text_passes, "MAX_BYTES", x_NSD.numel() * 2)
    for one, kept in ((x_NSD, False), (x_NSD.bfloat16(), True)):
        passes = TextPasses(ctx, [Hook(0)], [batch])
        passes.keep(batch, {Hook(0): one}, None)
        assert passes.keeps is kept


def test_a_resumed_pass_is_the_pass(model):  # noqa: F811
    """A resumed pass equals the original one, even in a process that has not run the model yet."""
    ids_NS, hook = torch.tensor([[2, 400, 500], [2, 600, 700]]), Hook(0)
    run = model.forward(ids_NS, [hook])
    del vars(model)["_splicer"]
    again = model.resume(ids_NS, [hook], run.kept, run.final)
    assert torch.equal(again.final, run.final) and torch.equal(again.activations[hook], run.activations[hook])
    assert torch.equal(again.run_from(hook, run.activations[hook]), run.run_from(hook, run.activations[hook]))
