"""Equal SAEs have a stability of 1, and random ones that of the null. SAEs that cannot be compared are refused."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from scipy.optimize import linear_sum_assignment
from scipy.sparse import csr_matrix
from torch.nn.functional import normalize

import sae
from sae.cache.hooks import Hook
from sae.cache.reader import Cache
from sae.common.errors import UnavailableError, UsageError
from sae.evaluate.compare import compare_runs
from sae.evaluate.metrics.base import EvalTarget
from sae.evaluate.metrics.latent_correlation import HeldOutRows, Latents
from sae.evaluate.metrics.matched_pairs import match_pair
from sae.evaluate.metrics.stability import Stability, other_seeds
from sae.evaluate.plan import EvaluateConfig
from sae.evaluate.results import write_result
from sae.evaluate.run import evaluate
from sae.evaluate.tables import tables
from sae.train.activation_functions import ReLU, TopK
from sae.train.sae import SAE, save_sae

from ...run_records import write_run_record

pytestmark = pytest.mark.usefixtures("one_thread")
FIXTURES = Path(__file__).parents[1] / "fixtures" / "stability"
D, F = 32, 48


def make_sae(seed: int, activation=None, latents: int = F) -> SAE:
    torch.manual_seed(seed)
    made = SAE(D, latents, [activation or TopK(4)]).requires_grad_(False).eval()
    made.b_enc.copy_(torch.randn(latents) / 4)
    return made


def changed(one: SAE, **tensors: torch.Tensor) -> SAE:
    """A copy of an SAE with some tensors replaced."""
    made = SAE(one.d_in, one.d_sae, [type(a)(**a.options) for a in one.activation]).requires_grad_(False).eval()
    made.load_state_dict(one.state_dict() | tensors)
    return made


def save(folder: Path, cache: Cache, seed: int, one: SAE, **record) -> Path:
    origin = {
        "model": cache.identity["model"],
        "layer": 0,
        "cache": str(cache.folder),
        "fingerprint": cache.fingerprint,
    }
    save_sae(one, folder, origin)
    write_run_record(folder, d_in=D, d_sae=one.d_sae, layer=0, variant="topk", seed=seed, **record)
    return folder


def ask(*runs: Path, **changes) -> EvaluateConfig:
    return replace(EvaluateConfig(runs, suite="stability", device="cpu", references=False), **changes)


def numbers(row, metric: str = "stability") -> dict:
    return row.results[metric].metrics["stability"]


def file_of(run: Path) -> dict:
    return json.loads((run / "evaluations" / "stability.json").read_text())


def test_a_run_against_itself_has_1_also_permuted_or_rescaled(tiny_cache, home):
    one = make_sae(0, ReLU())
    one.b_enc[3] = -1e3  # dead
    order = torch.randperm(F, generator=torch.Generator().manual_seed(0))
    permuted = changed(one, W_enc=one.W_enc[:, order], b_enc=one.b_enc[order], W_dec=one.W_dec[order])
    scale_F = torch.rand(F, generator=torch.Generator().manual_seed(1)) * 4 + 0.1
    rescaled = changed(one, W_enc=one.W_enc * scale_F, b_enc=one.b_enc * scale_F, W_dec=one.W_dec / scale_F[:, None])
    runs = [save(home / f"run-{i}", tiny_cache, i, s) for i, s in enumerate((one, permuted, rescaled))]
    rows = evaluate(ask(*runs))
    for row in rows:
        found = numbers(row)
        assert found["decoder_pw_mcc"] == pytest.approx(1, abs=1e-6)
        assert found["activation_pw_mcc"] == pytest.approx(1, abs=1e-6)  # the dead latent is left out on both sides
        assert found["recurring"] == 1 and found["frac_alive"] == (F - 1) / F
        flags = " ".join(row.results["stability"].flags)
        assert flags.count("Its decoder equals the decoder of run-") == 2
    details = file_of(runs[0])["eval_result_details"]
    position = {int(latent): place for place, latent in enumerate(order)}
    names = file_of(runs[0])["eval_result_unstructured"]["extra"]["seeds"]
    assert sorted(names) == ["run-1", "run-2"]
    expected = [[position[i] if name == "run-1" else i for name in names] for i in range(F)]
    assert [entry["decoder_match"] for entry in details] == expected
    expected[3] = [-1, -1]  # in a file, -1 stands for "no match"
    assert [entry["activation_match"] for entry in details] == expected


class Linear:
    """Latents of both signs, as those of an SAE that keeps the largest |z|."""

    def __init__(self, W_enc: torch.Tensor, W_dec: torch.Tensor) -> None:
        self.W_enc, self.W_dec = W_enc, W_dec

    def encode(self, x):
        return x @ self.W_enc

    def decode(self, f):
        return f @ self.W_dec


def test_the_sign_of_a_latent_does_not_count(tiny_cache):
    torch.manual_seed(0)
    W_enc, W_dec, sign_F = torch.randn(D, 24), torch.randn(24, D), torch.tensor([1.0, -1, -3] * 8)
    saes = {"one": Linear(W_enc, W_dec), "other": Linear(W_enc * sign_F, W_dec / sign_F[:, None])}
    one, other = sae.evaluate_saes(
        saes, cache=tiny_cache, layer=0, systems=dict.fromkeys(saes, "linear"), suite="stability", references=False,
        device="cpu",
    )  # fmt: skip
    found, details = numbers(one), one.results["stability"].details
    assert found["decoder_pw_mcc"] == pytest.approx(1) and found["activation_pw_mcc"] == pytest.approx(1, abs=1e-5)
    assert [entry["decoder_cosine"][0] for entry in details] == pytest.approx(sign_F.sign().tolist())
    assert [entry["activation_correlation"][0] for entry in details] == pytest.approx(sign_F.sign().tolist(), abs=1e-5)
    for row in (one, other):
        assert numbers(row)["recurring"] == 1 and row.results["stability"].extra["signed"] is False


def test_a_latent_and_its_opposite_are_two_unless_latents_are_negative(tiny_cache, home):
    one, other = make_sae(0), make_sae(1)
    other.W_dec[:10] = -one.W_dec[:10]
    runs = [save(home / f"s{seed}", tiny_cache, seed, made) for seed, made in enumerate((one, other))]
    found, _ = evaluate(ask(*runs))
    assert (
        numbers(found)["recurring"] == 0 and numbers(found)["decoder_pw_mcc"] > 10 / F + 0.3
    )  # ten of the cosines are 1
    # If both dictionaries have a latent and its opposite, each of the two is matched with its own, even if the other
    # has the larger absolute cosine.
    one.W_dec[10:20] = -one.W_dec[:10]
    other.W_dec[:20] = one.W_dec[torch.arange(20).roll(10)] + 0.1 * torch.randn(20, D)
    runs = [save(home / f"both{seed}", tiny_cache, seed, made, l0=4) for seed, made in enumerate((one, other))]
    found, _ = evaluate(ask(*runs))
    entries = found.results["stability"].details
    assert [entry["decoder_match"][0] for entry in entries[:20]] == [*range(10, 20), *range(10)]
    assert [entry["recurs"] for entry in entries] == [True] * 20 + [False] * (F - 20)
    assert found.results["stability"].extra["signed"] is True
    # A latent can be matched with its opposite if no other latent is left. Such a match does not count as recurring.
    square = make_sae(0, ReLU(), latents=D)
    square.W_dec.copy_(torch.linalg.qr(torch.randn(D, D)).Q)
    nearly = square.W_dec.clone()
    nearly[0] = -0.85 * square.W_dec[0] + 0.0946 * square.W_dec[1:].sum(0)  # 0.0946 with each other row
    runs = [
        save(home / f"square{seed}", tiny_cache, seed, made, l0=1)
        for seed, made in enumerate((square, changed(square, W_dec=nearly)))
    ]
    for row in evaluate(ask(*runs)):
        entries = row.results["stability"].details
        assert [entry["decoder_match"] for entry in entries] == [[i] for i in range(D)]
        assert entries[0]["decoder_cosine"] == pytest.approx([-0.85], abs=1e-3)
        assert numbers(row)["recurring_threshold"] < 0.85 and numbers(row)["recurring"] == (D - 1) / D


def test_shuffled_rows_have_the_number_of_the_null(tiny_cache, home):
    one = make_sae(0, latents=200)
    order_FD = torch.rand(200, D, generator=torch.Generator().manual_seed(7)).argsort(1)
    W_dec = one.W_dec.gather(1, order_FD)
    shuffled = changed(one, W_dec=W_dec, W_enc=W_dec.T.contiguous())
    runs = [save(home / name, tiny_cache, seed, s) for seed, (name, s) in enumerate({"a": one, "b": shuffled}.items())]
    row, _ = evaluate(ask(*runs, options=["stability.draws=5"]))
    result, found = row.results["stability"], numbers(row)
    low, high = result.intervals["stability"]["decoder_pw_mcc_null"]
    assert low < found["decoder_pw_mcc"] < high < low + 0.08
    kinds = [found["decoder_pw_mcc_null_shuffled"], found["decoder_pw_mcc_null_gaussian"]]
    assert kinds == pytest.approx([found["decoder_pw_mcc"]] * 2, abs=0.01) and found["decoder_pw_mcc_null"] == max(
        kinds
    )
    assert found["activation_pw_mcc"] == pytest.approx(found["activation_pw_mcc_null"], abs=0.06)
    assert found["recurring"] < 0.05
    assert any("decoder PW-MCC of" in flag and "not above" in flag for flag in result.flags)


@pytest.mark.slow
def test_two_frozen_decoders_have_the_number_of_the_null_of_their_covariance(tiny_cache, home):
    """The decoders are drawn with the covariance of the activations and never trained, so they agree as much as the
    Gaussian null does, which is more than the shuffled one."""
    runs = sae.train_saes(
        "frozen-decoder", cache=tiny_cache, layers=[0], seeds=[0, 1], steps=2, batch_size=128, width=160, device="cpu"
    )
    row, _ = sae.evaluate_saes(runs, suite="stability", references=False, device="cpu", options=["stability.draws=5"])
    result, found = row.results["stability"], numbers(row)
    low, high = result.intervals["stability"]["decoder_pw_mcc_null"]
    assert low < found["decoder_pw_mcc"] < high < low + 0.08
    assert found["decoder_pw_mcc"] == pytest.approx(found["decoder_pw_mcc_null_gaussian"], abs=0.015)
    assert found["decoder_pw_mcc_null"] == found["decoder_pw_mcc_null_gaussian"]
    assert found["decoder_pw_mcc_null_shuffled"] < found["decoder_pw_mcc"] - 0.05
    assert any("decoder PW-MCC of" in flag and "not above" in flag for flag in result.flags)


def test_the_null_is_the_larger_one_also_where_rows_have_a_few_large_entries(tiny_cache, home):
    saes = [make_sae(seed, latents=100) for seed in range(2)]
    for one in saes:
        one.W_dec.mul_(torch.rand(100, D) < 2 / D)[torch.arange(100), torch.randint(D, (100,))] += 1
    runs = [save(home / f"s{seed}", tiny_cache, seed, one) for seed, one in enumerate(saes)]
    row, _ = evaluate(ask(*runs))
    found = numbers(row)
    assert found["decoder_pw_mcc_null"] == found["decoder_pw_mcc_null_shuffled"]
    assert found["decoder_pw_mcc_null"] > found["decoder_pw_mcc_null_gaussian"] + 0.1
    assert found["decoder_pw_mcc"] == pytest.approx(found["decoder_pw_mcc_null"], abs=0.05)


def test_the_numbers_are_means_over_the_other_seeds_and_equal_plain_loops(tiny_cache, home):
    saes = [make_sae(seed) for seed in range(3)]
    saes[1].W_dec[:20] = saes[0].W_dec[20:40]  # shared by two of the three
    runs = [save(home / f"s{seed}", tiny_cache, seed, one) for seed, one in enumerate(saes)]
    rows = evaluate(ask(*runs))
    expected = {
        (i, j): plain_pw_mcc(saes[i].W_dec.numpy(), saes[j].W_dec.numpy()) for i in range(3) for j in range(3) if i != j
    }
    for i, row in enumerate(rows):
        result, values = row.results["stability"], [expected[i, j] for j in range(3) if j != i]
        assert sorted(result.extra["decoder_pw_mcc"]) == pytest.approx(sorted(values), abs=1e-6)
        assert numbers(row)["decoder_pw_mcc"] == pytest.approx(np.mean(values), abs=1e-6)
        half = 12.7062 * np.std(values, ddof=1) / 2**0.5  # quantile of t with one degree of freedom
        assert result.intervals["stability"]["decoder_pw_mcc"] == pytest.approx(
            [np.mean(values) - half, np.mean(values) + half], abs=1e-4
        )
        null = result.extra["decoder_pw_mcc_null"]
        half = 4.30265 * np.std(null, ddof=1) * (4 / 3) ** 0.5  # of a fourth draw, from three
        assert result.intervals["stability"]["decoder_pw_mcc_null"] == pytest.approx(
            [np.mean(null) - half, np.mean(null) + half], abs=1e-5
        )
        assert result.n["other_seeds"] == 2 and result.n["latents"] == F
    assert sum(numbers(row)["decoder_pw_mcc"] for row in rows) / 3 == pytest.approx(np.mean(list(expected.values())))
    entries = rows[0].results["stability"].details
    names = rows[0].results["stability"].extra["seeds"]
    assert all(entry["decoder_match"][names.index("s1")] == i + -20 for i, entry in enumerate(entries) if 20 <= i < 40)
    assert not any(entry["recurs"] for entry in entries)  # no latent is in both other seeds


def test_the_decoder_number_is_that_of_saelens():
    """The files in fixtures/stability were written by benchmarks/peers/stability_reference.py."""
    decoders, found = load_file(FIXTURES / "decoders.safetensors"), json.loads((FIXTURES / "results.json").read_text())
    assert len(found["mcc"]) == 6
    for name, expected in found["mcc"].items():
        one, other = (normalize(decoders[f"{name}.{side}"], dim=1) for side in ("one", "other"))
        latents = Latents.of(csr_matrix(np.ones((2, len(one)))))
        assert match_pair(one, other, latents, latents, 100).decoder_mcc == pytest.approx(expected, abs=1e-6)


def plain_pw_mcc(one: np.ndarray, other: np.ndarray) -> float:
    one, other = (rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (one, other))
    cosines = np.abs(one @ other.T)
    return float(cosines[linear_sum_assignment(-cosines)].mean())


def test_what_every_other_seed_has_recurs_and_the_threshold_is_above_the_null(tiny_cache, home):
    saes = [make_sae(seed) for seed in range(3)]
    for other in saes[1:]:
        other.W_dec[5:15] = saes[0].W_dec[:10] + 0.05 * torch.randn(10, D)
    saes[2].W_dec[5] = torch.randn(D)  # latent 0 is in only one of the other seeds
    runs = [save(home / f"s{seed}", tiny_cache, seed, one) for seed, one in enumerate(saes)]
    first, *_ = evaluate(ask(*runs))
    entries = first.results["stability"].details
    assert [entry["index"] for entry in entries if entry["recurs"]] == list(range(1, 10))
    assert numbers(first)["recurring_in_all"] == 9 / F and numbers(first)["recurring_threshold"] == 0.7
    assert numbers(first)["recurring"] == pytest.approx(
        9.5 / F
    )  # the mean over seeds with ten and nine latents: more seeds do not lower it
    assert sorted(first.results["stability"].extra["recurring"]) == pytest.approx([9 / F, 10 / F])
    half = 12.7062 * np.std([9, 10], ddof=1) / F / 2**0.5
    interval = first.results["stability"].intervals["stability"]["recurring"]
    assert interval == pytest.approx([9.5 / F - half, 9.5 / F + half], abs=1e-5)
    low, *_ = evaluate(ask(*runs, options=["stability.threshold=0.05"]))
    threshold = numbers(low)["recurring_threshold"]
    assert 0.3 < threshold < 0.7  # the quantile over matches with random dictionaries
    assert any("reach a cosine of 0.05" in flag for flag in low.results["stability"].flags)


def test_a_result_is_of_the_other_seeds_of_the_command(tiny_cache, home):
    runs = [save(home / f"s{seed}", tiny_cache, seed, make_sae(seed)) for seed in range(3)]
    pair = evaluate(ask(*runs[:2]))
    assert pair[0].results["stability"].n["other_seeds"] == 1
    assert "decoder_pw_mcc" not in pair[0].results["stability"].intervals["stability"]  # no spread of one pair
    written = file_of(runs[0])
    assert evaluate(ask(*runs[1::-1]))[1].results == pair[0].results and file_of(runs[0]) == written
    whole = evaluate(ask(*runs))
    assert [row.results["stability"].n["other_seeds"] for row in whole] == [2, 2, 2]
    backwards = evaluate(ask(*runs[::-1], force=True))
    assert [row.results for row in backwards[::-1]] == [row.results for row in whole]
    assert evaluate(ask(*runs[:2]))[0].results == pair[0].results
    seeds = file_of(runs[0])["eval_config"]["seeds"]
    assert len(seeds) == 1 and seeds == [file_of(runs[1])["eval_config"]["weights"]]
    # Definition 1 counted a latent and its opposite as the same, so a result of definition 1 is measured again.
    (first, _), settings = pair, file_of(runs[0])["eval_config"]
    earlier = replace(first.results["stability"], flags=["of an earlier version"])
    for definition, flags in ((1, first.results["stability"].flags), (2, earlier.flags)):
        write_result(runs[0], Stability(), settings | {"definition": definition}, earlier, {})
        assert evaluate(ask(*runs[:2]))[0].results["stability"].flags == flags


def test_runs_of_two_systems_are_compared_with_their_own_and_beside_each_other(tiny_cache, home):
    runs = [save(home / f"s{seed}", tiny_cache, seed, make_sae(seed)) for seed in range(2)]
    other = [save(home / f"o{seed}", tiny_cache, seed, make_sae(9 + seed, latents=40), l0=4) for seed in range(2)]
    rows = evaluate(ask(*runs, *other))
    assert [row.results["stability"].n["latents"] for row in rows] == [F, F, 40, 40]
    assert [row.results["stability"].extra["seeds"] for row in rows] == [["s1"], ["s0"], ["o1"], ["o0"]]
    ((_, heads, lines),) = tables(rows)
    assert heads[1].startswith("decoder PW-MCC") and lines[0][1].startswith("0.")
    comparison = compare_runs([*runs, *other])
    # the other seeds that a run is compared with are not listed as a difference between runs
    assert not comparison.differences
    assert {column.name for metric, column in comparison.columns} >= {"decoder_pw_mcc", "recurring"}


def test_a_run_without_another_seed_is_an_error_alone_and_none_in_a_suite(tiny_cache, home):
    alone, other = save(home / "alone", tiny_cache, 0, make_sae(0)), save(home / "o", tiny_cache, 0, make_sae(1), l0=4)
    reason = "stability needs at least two runs that differ only by seed, but there is no other seed of alone, o. Name"
    with pytest.raises(UnavailableError, match=reason):
        evaluate(ask(alone, other))
    first, second = evaluate(ask(alone, other, suite="core,stability", tokens=60))
    assert "core" in first.results and str(first.errors["stability"]) == str(second.errors["stability"])


@pytest.mark.parametrize(
    ("option", "sentence"),
    [
        ("threshold=0", "threshold=0: give a cosine above 0"),
        ("threshold=1.5", "at most 1"),
        ("draws=0", "draws=0: give 1 or more"),
        ("tokens=-1", "tokens=-1: give 1 or more"),
    ],
)
def test_options_that_make_no_sense_are_refused(tiny_cache, home, option, sentence):
    runs = [save(home / f"s{seed}", tiny_cache, seed, make_sae(seed)) for seed in range(2)]
    with pytest.raises(UsageError, match=sentence):
        evaluate(ask(*runs, options=[f"stability.{option}"]))


def test_what_cannot_be_compared_says_why(tiny_cache):
    class Half:
        def encode(self, x):
            return x / 2

        def decode(self, f):
            return f

    asked = {"cache": tiny_cache, "layer": 0, "suite": "stability", "references": False, "device": "cpu"}
    pairs: list[tuple[Sequence, str]] = [
        ((Half(), make_sae(0)), "Half has no W_dec"),
        ((make_sae(0), make_sae(1, latents=40)), "the same number of latents, but one has 48, other has 40"),
    ]
    for saes, sentence in pairs:
        with pytest.raises((UsageError, sae.SaeError), match=sentence):
            named = dict(zip(("one", "other"), saes, strict=True))
            sae.evaluate_saes(named, systems=dict.fromkeys(named, "x"), **asked)


def test_outlier_rows_are_left_out_and_counted_and_tokens_limit_the_text(tiny_cache, home):
    runs = [save(home / f"s{seed}", tiny_cache, seed, make_sae(seed)) for seed in range(2)]
    everything, *_ = evaluate(ask(*runs, max_norm=float("inf")))
    masked, *_ = evaluate(ask(*runs, max_norm=1.1))
    every, some = everything.results["stability"], masked.results["stability"]
    assert some.masked is None and some.n["outlier_rows"] > 0
    assert some.n["tokens"] + some.n["outlier_rows"] == every.n["tokens"]
    assert some.metrics != every.metrics
    few, *_ = evaluate(ask(*runs, options=["stability.tokens=100", "stability.batch_contexts=1"]))
    assert few.results["stability"].n["tokens"] == 100


def test_wide_dictionaries_are_matched_by_candidates_and_say_so(tiny_cache, home):
    runs = [save(home / f"s{seed}", tiny_cache, seed, make_sae(seed)) for seed in range(2)]
    exact, *_ = evaluate(ask(*runs))
    wide, *_ = evaluate(ask(*runs, options=["stability.exact_latents=40"]))
    assert numbers(wide)["decoder_pw_mcc"] == pytest.approx(numbers(exact)["decoder_pw_mcc"])  # 48 are all candidates
    flag = "With 48 latents, more than 40, each latent is matched with one of its 64 most similar latents"
    assert any(flag in one for one in wide.results["stability"].flags)
    assert not any("most similar" in one for one in exact.results["stability"].flags)


def test_many_dead_latents_are_said(tiny_cache, home):
    saes = [make_sae(seed) for seed in range(2)]
    for one in saes:
        one.b_enc[:10] = -1e3
    saes[1].W_dec[10:] = saes[0].W_dec[10:]
    runs = [save(home / f"s{seed}", tiny_cache, seed, one) for seed, one in enumerate(saes)]
    row, _ = evaluate(ask(*runs))
    found = numbers(row)
    assert found["frac_alive"] < 0.8 and found["decoder_pw_mcc"] < 0.95
    assert found["decoder_pw_mcc_alive"] == pytest.approx(1)
    assert any("latents do not vary on these tokens" in flag for flag in row.results["stability"].flags)


def test_trained_seeds_are_seeds_of_one_system_and_other_recipes_are_not(tiny_cache, home):
    runs = sae.train_saes(
        ["topk", "relu"], cache=tiny_cache, layers=[0], seeds=[0, 1], steps=5, batch_size=128, width=F, device="cpu"
    )
    rows = sae.evaluate_saes(runs, suite="stability", references=False, device="cpu")
    others = {row.name: row.results["stability"].extra["seeds"] for row in rows}
    names = [run.folder.name for run in runs]
    assert {name: [o for o in names if o != name and o.split("-")[0] == name.split("-")[0]] for name in names} == others


def test_a_latent_that_is_dead_in_the_other_seed_only_counts_as_0(tiny_cache, home):
    whole = make_sae(0, ReLU())
    b_enc = whole.b_enc.clone()
    b_enc[:10] = -1e3
    saes = [whole, changed(whole, b_enc=b_enc)]
    rows = evaluate(ask(*(save(home / f"s{seed}", tiny_cache, seed, one) for seed, one in enumerate(saes))))
    alive = [numbers(row)["frac_alive"] * F for row in rows]
    assert alive[0] >= alive[1] + 9  # one of the ten may be dead in both seeds
    assert [numbers(row)["activation_pw_mcc"] for row in rows] == pytest.approx([alive[1] / alive[0]] * 2, abs=1e-5)
    assert numbers(rows[0])["decoder_pw_mcc"] == pytest.approx(1, abs=1e-6)


def test_other_seeds_are_of_the_same_system_and_read_the_same_rows():
    first = EvalTarget(make_sae(0), Hook(0), system="x", norm_limit=9)
    beside = [replace(first), replace(first, norm_limit=8), replace(first, hook=Hook(1)), replace(first, system="y")]
    assert other_seeds(first, [first, *beside]) == [beside[0]]
    stranger = replace(first, system="")
    assert other_seeds(stranger, [stranger, replace(stranger)]) == []


# --- planted features -------------------------------------------------------------------------------------------------

FEATURES, WIDTH, ACTIVE = 32, 24, 2


def features_or_noise(planted: bool, rows: int, generator: torch.Generator) -> torch.Tensor:
    """Rows (rows, WIDTH): each is a sum of ACTIVE of the FEATURES with random strengths, or Gaussian noise only."""
    if not planted:
        return torch.randn(rows, WIDTH, generator=generator)
    direction_FD = torch.nn.functional.normalize(
        torch.randn(FEATURES, WIDTH, generator=torch.Generator().manual_seed(5))
    )
    chosen = torch.rand(rows, FEATURES, generator=generator).topk(ACTIVE).indices
    strength = 1 + torch.rand(rows, ACTIVE, generator=generator)
    return torch.zeros(rows, FEATURES).scatter(1, chosen, strength) @ direction_FD


def train_on(planted: bool, seed: int) -> SAE:
    torch.manual_seed(seed)
    one, data = SAE(WIDTH, FEATURES, [TopK(ACTIVE)]), torch.Generator().manual_seed(3)
    optimizer = torch.optim.Adam(one.parameters(), lr=0.01)
    for _ in range(500 if planted else 150):
        x_BD = features_or_noise(planted, 256, data)
        loss = (one(x_BD).recon_BD - x_BD).square().sum(1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            one.W_dec.div_(one.W_dec.norm(dim=1, keepdim=True))
    return one.requires_grad_(False).eval()


@pytest.mark.parametrize("planted", [pytest.param(True, marks=pytest.mark.slow), False])
def test_two_seeds_agree_on_planted_features_and_not_on_noise(planted):
    targets = [EvalTarget(train_on(planted, seed), Hook(0), system="x", name=str(seed)) for seed in range(2)]
    rows = HeldOutRows()
    rows.add(features_or_noise(planted, 4000, torch.Generator().manual_seed(4)), {0: targets[0].sae, 1: targets[1].sae})
    outcome, _ = Stability().compare_seeds(targets, [0, 1], rows, "cpu", lambda *_: None).values()
    found = outcome.metrics["stability"]
    if planted:
        assert min(found["decoder_pw_mcc"], found["activation_pw_mcc"], found["recurring"]) > 0.7
        assert max(found["decoder_pw_mcc_null"], found["activation_pw_mcc_null"]) < 0.6
    else:
        assert found["decoder_pw_mcc"] == pytest.approx(found["decoder_pw_mcc_null"], abs=0.06)
        assert found["activation_pw_mcc"] < found["activation_pw_mcc_null"] + 0.1
        assert found["recurring"] < 0.2
