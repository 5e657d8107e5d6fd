"""Unlearning matches SAEBench 0.6.0: frequencies, selected latents, clamping and scores from the same inputs."""

import numpy as np
import pytest
import torch

from sae.cache.hooks import Hook
from sae.evaluate.metrics.base import EvalTarget
from sae.evaluate.metrics.clamping import clamp_latents
from sae.evaluate.metrics.packing import PackedRows, firing_frequencies, select_forget_latents
from sae.evaluate.metrics.unlearning import unlearning_score

KINDS = ("relu", "topk", "jumprelu")
SPECIAL = torch.tensor([0, 1, 2])


def silent(done, total, note=""):
    pass


def test_frequencies(saebench, record_comparison):
    tokens, expected = saebench.arrays("problem/contexts")["tokens"].long(), saebench.arrays("unlearning")
    targets = [EvalTarget(saebench.saes[kind], Hook(0)) for kind in KINDS]
    for name, rows in (("forget", tokens[:10]), ("retain", tokens[10:])):
        frequencies = firing_frequencies(saebench.model, PackedRows(rows, ~torch.isin(rows, SPECIAL)), targets, silent)
        for kind, (share, *_) in zip(KINDS, frequencies, strict=True):
            record_comparison("unlearning", f"{kind}: frequencies, {name}", [(expected[f"{kind}.{name}"], share)])
            np.testing.assert_allclose(share, expected[f"{kind}.{name}"].numpy(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_selection(saebench, record_comparison, kind):
    """The selection is equal except for the order of ties.

    SAEBench leaves it to NumPy's unstable sort; ours puts the last of equal latents first.
    """
    arrays = saebench.arrays("unlearning")
    forget, retain = (arrays[f"{kind}.{name}"].double().numpy() for name in ("forget", "retain"))
    for threshold, expected in saebench.json("unlearning/results")["selected"][kind].items():
        mine = select_forget_latents(forget, retain, float(threshold))
        shares = [f"{forget[latent]:f}" for latent in mine]
        same = shares[: len(expected)] == [f"{forget[latent]:f}" for latent in expected]
        record_comparison("unlearning", f"{kind}: latents chosen at {threshold}", [], {"but for ties": same})
        assert same
        # further latents may be tied with the last of the 40, so only those with a higher share are compared
        above = {latent for latent in expected if f"{forget[latent]:f}" != shares[len(expected) - 1]}
        assert len(above) > 10 and above == set(mine[: len(above)]) and set(expected) <= set(mine)
        for share in set(shares):
            ties = [latent for latent, other in zip(mine, shares, strict=True) if other == share]
            assert ties == sorted(ties, reverse=True)


def test_ties_and_rounding(saebench, record_comparison):
    ties = saebench.json("unlearning/results")["ties"]
    forget, retain = np.array(ties["forget"]), np.array(ties["retain"])
    ours = {threshold: list(select_forget_latents(forget, retain, float(threshold))) for threshold in ties["selected"]}
    record_comparison("unlearning", "ties of rounded frequencies", [], {"order": ours == ties["selected"]})
    assert ours == ties["selected"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("n", "multiplier"), [(10, 25), (20, 200)])
def test_clamp(saebench, record_comparison, kind, n, multiplier):
    arrays, sae = saebench.arrays("unlearning"), saebench.saes[kind]
    chosen = saebench.json("unlearning/results")["selected"][kind]["0.2"][:n]
    x, expected = arrays["residual"], arrays[f"{kind}.clamped.{n}.{multiplier}"]
    (made,) = clamp_latents(x, sae.encode(x)[..., chosen], sae.W_dec[chosen], torch.tensor([float(multiplier)]))
    record_comparison("unlearning", f"{kind}: residual, {n} latents clamped at {multiplier}", [(expected, made)])
    torch.testing.assert_close(made, expected, rtol=1e-5, atol=1e-5)
    assert float((expected - x).abs().max()) > multiplier / 10


def test_scores(saebench, record_comparison):
    cases = saebench.json("unlearning/results")["scores"]
    assert len(cases) == 5
    for name, case in cases.items():
        score = unlearning_score([tuple(right) for right in case["right"]], *case["of"])
        record_comparison("unlearning", f"score, {name}", [(case["score"], score)])
        assert score == pytest.approx(case["score"], abs=1e-7)  # SAEBench's accuracies are float32
