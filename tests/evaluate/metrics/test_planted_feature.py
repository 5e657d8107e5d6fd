"""Absorption, probing and stability find a planted feature, the first letter c, and name the same latent for it."""

from dataclasses import replace
from typing import NamedTuple

import pytest
import torch

from sae.cache.hooks import Hook
from sae.evaluate.context import EvalContext
from sae.evaluate.metrics.base import EvalTarget, MetricResult
from sae.evaluate.metrics.first_letter import LETTERS, SpellingRows
from sae.evaluate.metrics.latent_correlation import HeldOutRows
from sae.evaluate.metrics.sae_probes import ProbeProblem, SaeProbes, build_result
from sae.evaluate.metrics.stability import Stability
from sae.train.activation_functions import ReLU
from sae.train.sae import SAE

from .planted_letters import PLANTED, planted

pytestmark = pytest.mark.usefixtures("one_thread")

TEST, ABSORBED, SHARE = 8, 2, 0.45  # in 2 of 8 test words with c, another latent takes 0.45 of c
C, D = LETTERS.index("c"), LETTERS.index("d")


class Planted(NamedTuple):
    words: SpellingRows
    seeds: list[SAE]
    place: torch.Tensor  # index of a latent in the first seed -> its index in the second


@pytest.fixture(scope="module")
def found_again() -> Planted:
    """Two seeds of a dictionary, in a random basis. In the second, latents are permuted, and that of d is random."""
    words, one = planted({"c": ABSORBED}, share=SHARE, train=46, test=TEST)
    generator = torch.Generator().manual_seed(0)
    basis_DD = torch.linalg.qr(torch.randn(one.d_in, one.d_in, generator=generator))[0]
    one.W_enc.copy_(basis_DD.T @ one.W_enc)
    one.W_dec.copy_(one.W_dec @ basis_DD)
    one.b_enc.sub_(1e-4)  # latents that are 0 in the old basis are also 0 in the new one, despite rounding
    probe = words.probe._replace(weight_LD=words.probe.weight_LD @ basis_DD)
    turned = {name: getattr(words, name) @ basis_DD for name in ("train_ND", "test_ND", "fresh_ND")}
    order_F = torch.randperm(one.d_sae, generator=generator)
    other = SAE(one.d_in, one.d_sae, [ReLU()]).requires_grad_(False)
    other.load_state_dict(
        {"W_enc": one.W_enc[:, order_F], "b_enc": one.b_enc[order_F], "W_dec": one.W_dec[order_F], "b_dec": one.b_dec}
    )
    place = order_F.argsort()
    row_D = torch.nn.functional.normalize(torch.randn(one.d_in, generator=generator), dim=0)
    other.W_dec[place[D]], other.W_enc[:, place[D]] = row_D, row_D
    return Planted(replace(words, probe=probe, **turned), [one, other], place)


def test_absorption_names_the_latent_and_what_is_absorbed_of_it(found_again):
    for seed, main in zip(found_again.seeds, (C, int(found_again.place[C])), strict=True):
        result = PLANTED.result("0.6.0", seed, found_again.words, torch.device("cpu"))
        entries = {entry["first_letter"]: entry for entry in result.details}
        assert entries["c"]["main_latents"] == [main]
        # 2 / 8 x 0.45: in two of the eight test words, another latent takes 0.45 of c.
        assert entries["c"]["mean_absorption_fraction"] == pytest.approx(0.1125, abs=1e-3)
        assert entries["c"]["num_full_absorption"] == 0  # the c latent still fires
        clean = [entry["mean_absorption_fraction"] for letter, entry in entries.items() if letter not in "cd"]
        assert clean == pytest.approx([0] * 24, abs=1e-3)


def test_a_probe_of_one_latent_names_it_and_separates_the_letter(found_again, ctx: EvalContext):
    words, metric = found_again.words, SaeProbes(ks=(1,))
    x_ND = torch.cat([words.train_ND, words.test_ND])
    letter_N = torch.cat([words.train_letter_N, words.test_letter_N])
    with_c = (letter_N == C).nonzero().flatten()
    others = (letter_N != C).nonzero().flatten()[::25][: len(with_c)]
    chosen = torch.cat([with_c, others])
    label_N = (letter_N[chosen] == C).long().numpy()
    splits = {side: metric.splits(label_N, side) for side in ("sae", "llm")}
    problem = ProbeProblem(x_ND[chosen], label_N, splits, 0)
    model = metric.probe_model(ctx, problem)
    for seed, main in zip(found_again.seeds, (C, int(found_again.place[C])), strict=True):
        scores = {"first letter c": metric.probe_sae(ctx, seed, problem)}
        result = build_result({"first letter c": model}, scores, metric.ks)
        assert result.extra["first letter c"][0]["latents"] == [main]
        assert result.metrics["sae"]["sae_top_1_test_auc"] == 1  # it fires on all c, even if 0.45 is absorbed


@pytest.mark.slow
def test_stability_finds_it_in_the_other_seed_and_not_what_is_planted_in_one(found_again):
    targets = [EvalTarget(seed, Hook(0), system="x", name=str(n)) for n, seed in enumerate(found_again.seeds)]
    rows = HeldOutRows()
    rows.add(found_again.words.train_ND, dict(enumerate(found_again.seeds)))
    outcomes = Stability(draws=1).compare_seeds(targets, [0, 1], rows, "cpu", lambda *_: None)
    first, second = outcomes.values()
    assert isinstance(first, MetricResult) and isinstance(second, MetricResult)
    place, latents = found_again.place.tolist(), found_again.seeds[0].d_sae
    assert first.details[C]["decoder_match"] == [place[C]] == first.details[C]["activation_match"]
    assert second.details[place[C]]["decoder_match"] == [C]
    assert [entry["index"] for entry in first.details if not entry["recurs"]] == [D]
    assert [entry["index"] for entry in second.details if not entry["recurs"]] == [place[D]]
    assert first.metrics["stability"]["recurring"] == second.metrics["stability"]["recurring"] == 1 - 1 / latents
    assert first.metrics["stability"]["recurring_threshold"] < 0.9  # planted latents have cosine 1
