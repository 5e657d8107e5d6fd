"""Core matches SAEBench 0.6.0 on a Gemma 2, which runs in TransformerLens there and in transformers here."""

import numpy as np
import pytest
import torch

from sae.cache.context_format import ContextFormat
from sae.cache.contexts import Contexts
from sae.cache.hooks import Hook
from sae.evaluate.artifacts import ArtifactCache
from sae.evaluate.context import EvalContext
from sae.evaluate.metrics.base import EvalTarget
from sae.evaluate.metrics.core import Core

KINDS = ("relu", "topk", "jumprelu")
COUNTS = ("total_tokens_eval_reconstruction", "total_tokens_eval_sparsity_variance", "frac_alive",
          "freq_over_1_percent", "freq_over_10_percent")  # fmt: skip


@pytest.fixture(scope="module")
def contexts(saebench) -> torch.Tensor:
    return saebench.arrays("problem/contexts")["tokens"].long()


@pytest.fixture(scope="module")
def ours(saebench, contexts, tmp_path_factory):
    """The results of each SAE, spliced at the counted positions only and at all positions."""
    about = saebench.json("problem/problem")
    batches = max(about["reconstruction_batches"], about["sparsity_batches"])
    ids = contexts[: about["contexts_per_batch"] * batches].numpy().astype(np.uint32)
    n, width = ids.shape
    text = Contexts(ids, np.full(n, width, np.uint16), np.arange(n, dtype=np.uint32), np.ones(n, bool))
    form, artifacts = ContextFormat(2, (0, 1, 2)), ArtifactCache(tmp_path_factory.mktemp("shelf"))
    ctx = EvalContext(lambda: saebench.model, None, text, form, "0.6.0", {}, {}, artifacts)
    metric = Core(about["contexts_per_batch"], about["reconstruction_batches"], about["sparsity_batches"])
    asked = [(kind, everywhere) for kind in KINDS for everywhere in (False, True)]
    targets = [EvalTarget(saebench.saes[kind], Hook(about["layer"]), everywhere) for kind, everywhere in asked]
    found = metric.measure(ctx, targets, lambda done, total, note="": None)
    return {
        (kind, "everywhere" if all_ else "rewound"): result for (kind, all_), result in zip(asked, found, strict=True)
    }


def test_the_model_is_the_same(saebench, contexts):
    reference = saebench.arrays("core")
    run = saebench.model.forward(contexts[:2], [Hook(0)])
    torch.testing.assert_close(run.activations[Hook(0)], reference["residual"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(saebench.model.unembed(run.final)[:, :, :64], reference["logits"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("variant", ["rewound", "everywhere"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_scalar_is_saebenchs(saebench, ours, record_comparison, kind, variant):
    reference = saebench.json("core/results")[kind][variant]["eval_result_metrics"]
    mine = ours[kind, variant].metrics
    flat = {name: (value, mine[group].get(name)) for group, own in reference.items() for name, value in own.items()}
    pairs = [flat[name] for name in ("ce_loss_score", *(flat.keys() - {"ce_loss_score", *COUNTS}))]
    counts = all(reference == ours for reference, ours in map(flat.get, COUNTS))
    record_comparison("core", f"{kind}, {variant}: ce_loss_score", pairs, {"counts": counts})
    for category, numbers in reference.items():
        for name, value in numbers.items():
            tolerance = 0 if name in COUNTS else 1e-6
            # A ratio of differences amplifies the rounding of the means that are subtracted.
            if name.endswith("_score") or name == "explained_variance":
                tolerance = 5e-6
            assert mine[category][name] == pytest.approx(value, rel=tolerance), (category, name)


@pytest.mark.parametrize("kind", KINDS)
def test_the_latents_that_fire_are_counted_alike(saebench, ours, contexts, kind):
    """SAEBench's L0 is a float32 mean. Multiplied by the number of tokens and rounded, it is the same count."""
    reference = saebench.json("core/results")[kind]["rewound"]["eval_result_metrics"]["sparsity"]["l0"]
    tokens = int((contexts[:12] > 2).sum())
    fired = ours[kind, "rewound"].metrics["sparsity"]["l0"] * tokens
    assert fired == pytest.approx(round(fired), abs=1e-9)
    assert round(reference * tokens) == round(fired)


@pytest.mark.parametrize("kind", KINDS)
def test_every_latent_is_saebenchs(saebench, ours, record_comparison, kind):
    reference, details = saebench.arrays("core"), ours[kind, "rewound"].details
    names = details[0].keys() - {"index"}
    columns = {
        name: torch.tensor([-1 if entry[name] is None else entry[name] for entry in details], dtype=torch.float32)
        for name in names
    }
    record_comparison(
        "core", f"{kind}: columns of 512 latents", [(reference[f"{kind}.rewound.{n}"], columns[n]) for n in names]
    )
    for name, mine in columns.items():
        exact = name in ("feature_density", "consistent_activation_heuristic", "encoder_bias")
        tolerance = {"rtol": 0, "atol": 1e-7} if exact else {"rtol": 1e-6, "atol": 1e-6}
        torch.testing.assert_close(mine, reference[f"{kind}.rewound.{name}"], **tolerance)
