"""Outlier rows from the harvest to the pages, on a model with a planted attention sink."""

import csv
import io
import json
import math
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from sae.cache.hooks import Hook
from sae.cache.reader import Cache
from sae.cli.main import app
from sae.common.errors import UsageError
from sae.evaluate.compare import compare_runs, comparison_table, to_csv
from sae.evaluate.latents.inspection import encode_prompt, open_run
from sae.evaluate.latents.stats import latent_stats
from sae.evaluate.metrics.base import EvalTarget, MetricResult
from sae.evaluate.metrics.sae_statistics import SAEStatistics, splice
from sae.evaluate.pages.dashboard import dashboard_page
from sae.evaluate.plan import EvaluateConfig, plan_evaluation
from sae.evaluate.reference_saes import Identity
from sae.evaluate.rows import EvalRow, add_notes
from sae.evaluate.run import evaluate, evaluate_saes
from sae.evaluate.tables import tables
from sae.harvest.plan import HarvestConfig, plan_harvest
from sae.harvest.run import run_harvest
from sae.train.activation_functions import BatchTopK
from sae.train.sae import SAE, load_sae, save_sae

SINK = 652  # the token " value", whose activations have 40 times the norm of others


def silent(done: int, total: int, note: str = "") -> None:
    pass


@pytest.fixture(scope="module")
def cache(sink_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Cache:
    """A cache of layer 0; one word in 80 of its text is the sink."""
    rng, folder = random.Random(0), tmp_path_factory.mktemp("sink")
    words = "the quick brown fox jumps over a lazy dog while seven zebras read their yellow books in june".split()
    lines = []
    for _ in range(70):
        document = [rng.choice(words) if rng.random() < 79 / 80 else "value" for _ in range(rng.randrange(20, 60))]
        lines.append(json.dumps({"text": " ".join(document)}))
    (folder / "text.jsonl").write_text("\n".join(lines) + "\n")
    config = HarvestConfig(
        model=str(sink_model), dataset=str(folder / "text.jsonl"), layers=(0,), tokens=3000, context=24, window=1024,
        held_out=0.3, max_norm=10.0, device="cpu", out=folder / "cache",
    )  # fmt: skip
    return run_harvest(plan_harvest(config))


def make_sae(seed: int = 0) -> SAE:
    torch.manual_seed(seed)
    sae = SAE(32, 48, [BatchTopK(5)])
    sae.b_enc.data.fill_(-2.0)
    sae.activation[0].threshold.fill_(1.0)
    return sae.eval().requires_grad_(False)


def make_run(folder: Path, cache: Cache, seed: int = 0, /, **changes: Any) -> Path:
    """A run folder as training leaves it, with `changes` to its origin; "absent" removes an entry."""
    origin = {
        "model": cache.identity["model"], "layer": 0, "cache": str(cache.folder), "fingerprint": cache.fingerprint,
        "norm_limit": cache.statistics("layer_00")["norm_limit"], **changes,
    }  # fmt: skip
    save_sae(make_sae(seed), folder, {name: value for name, value in origin.items() if value != "absent"})
    return folder


def ask(*runs: Path, **changes: Any) -> EvaluateConfig:
    return EvaluateConfig(runs, "core", device="cpu", references=False, **changes)


def result_file(run: Path) -> dict[str, Any]:
    return json.loads((run / "evaluations" / "core.json").read_text())


def measure_by_hand(folder: str, cache: Cache, sae: SAE, limit: float) -> dict[str, float]:
    """KL, CE, EV and L0 computed with forward hooks, one context at a time. Rows over the limit are not replaced."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    kl, ce, squares, l0, rows = [], [], [], [], []
    contexts = cache.contexts(held_out=True)
    for ids, length in zip(contexts.ids, contexts.length, strict=True):
        ids_S = torch.from_numpy(ids[: int(length)].astype("int64"))
        kept: dict[str, Tensor] = {}

        def replace(module: Any, inputs: Any, output: Any, ids_S: Tensor = ids_S, kept: dict = kept) -> Any:
            x = output[0] if isinstance(output, tuple) else output
            kept["x"], kept["mask"] = x[0], (ids_S > 2) & (x[0].norm(dim=1) <= limit)
            x = torch.where(kept["mask"][:, None], sae.decode(sae.encode(x)), x)
            return (x, *output[1:]) if isinstance(output, tuple) else x

        with torch.no_grad():
            original = model(ids_S[None]).logits[0].log_softmax(-1)
            handle = model.model.layers[0].register_forward_hook(replace)
            spliced = model(ids_S[None]).logits[0].log_softmax(-1)
            handle.remove()
        mask = kept["mask"]
        x = kept["x"][mask]
        rows.append(x)
        squares += (x - sae.decode(sae.encode(x))).square().sum(1).tolist()
        l0 += (sae.encode(x) != 0).sum(1).tolist()
        kl += (original.exp() * (original - spliced)).sum(1)[mask].tolist()
        ce += [-float(spliced[at, ids_S[at + 1]]) for at in range(len(ids_S) - 1) if mask[at]]
    x = torch.cat(rows)
    return {
        "kl_div_with_sae": sum(kl) / len(kl),
        "ce_loss_with_sae": sum(ce) / len(ce),
        "fve": 1 - sum(squares) / float((x - x.mean(0)).square().sum()),
        "l0": sum(l0) / len(l0),
    }


def test_both_sets_of_numbers_equal_an_independent_script(cache: Cache, sink_model: Path, home: Path) -> None:
    run = make_run(home / "runs" / "one", cache)
    (row,) = evaluate(ask(run))
    found, limit = row.results["core"], cache.statistics("layer_00")["norm_limit"]
    for numbers, hand in (
        (found.metrics, measure_by_hand(str(sink_model), cache, make_sae(), math.inf)),
        (found.sound.metrics, measure_by_hand(str(sink_model), cache, make_sae(), limit)),
    ):
        flat = {name: value for group in numbers.values() for name, value in group.items()}
        assert {name: flat[name] for name in hand} == pytest.approx(hand, rel=1e-4, abs=1e-6)
    assert found.sound.metrics["correlation"]["quantile_99.9"] < found.metrics["correlation"]["quantile_99.9"]


def test_the_file_the_row_and_the_plan_say_what_was_left_out(cache: Cache, home: Path) -> None:
    run, limit = make_run(home / "runs" / "one", cache), cache.statistics("layer_00")["norm_limit"]
    plan = plan_evaluation(ask(run))
    assert f"masked   outlier rows after layer 0, with a norm over {limit:.4g}" in plan.describe()
    (row,) = evaluate(ask(run))
    sinks = int((cache.contexts(held_out=True).ids == SINK).sum())
    assert row.results["core"].n["outlier_rows"] == sinks > 0
    file, flat = result_file(run), row.flat()
    assert file["eval_config"]["norm_limit"] == limit
    assert file["eval_result_unstructured"]["n"]["outlier_rows"] == sinks
    for category, name in (("sparsity", "l0"), ("reconstruction_quality", "fve"), ("correlation", "mean")):
        masked = file["eval_result_metrics"][f"masked_{category}"][name]
        assert masked == flat[f"core.masked_{category}.{name}"] != file["eval_result_metrics"][category][name]
    assert not plan_evaluation(ask(run)).has_work  # the result is read again
    assert plan_evaluation(ask(run, max_norm=math.inf)).has_work


@pytest.mark.parametrize(
    ("origin", "asked", "expected"),
    [
        ({}, None, "own"),
        ({"norm_limit": 77.0}, None, 77.0),
        ({"norm_limit": None}, None, None),  # trained without a limit
        ({"norm_limit": "absent"}, None, "own"),  # an older version: the limit of the cache applies
        ({"norm_limit": "absent", "cache": "absent", "fingerprint": "absent"}, None, None),  # imported
        ({}, math.inf, None),
        ({}, 5.0, "half"),
    ],
)
def test_where_the_limit_comes_from(cache: Cache, home: Path, origin: dict, asked: float | None, expected: Any) -> None:
    run = make_run(home / "runs" / "one", cache, **origin)
    own = cache.statistics("layer_00")["norm_limit"]
    expected = {"own": own, "half": own / 2}.get(expected, expected)
    plan = plan_evaluation(ask(run, max_norm=asked, cache=cache.folder))
    assert plan.rows[0].target.norm_limit == (None if expected is None else pytest.approx(expected))
    if expected is None:
        assert "masked   no rows: one has no norm limit" in plan.describe()


@pytest.mark.slow
def test_without_a_limit_the_result_is_that_of_saebench_s_names(cache: Cache, home: Path) -> None:
    """Its settings are those of versions without norm limits, so their results stay valid."""
    masked, plain = make_run(home / "runs" / "one", cache), make_run(home / "runs" / "two", cache, norm_limit=None)
    (with_limit,) = evaluate(ask(masked))
    (without,) = evaluate(ask(plain))
    found, expected = with_limit.results["core"], without.results["core"]
    assert (found.metrics, found.details, found.intervals) == (expected.metrics, expected.details, expected.intervals)
    assert "norm_limit" not in result_file(plain)["eval_config"] and expected.masked is None
    (switched_off,) = evaluate(ask(masked, max_norm=math.inf))
    assert switched_off.results["core"] == expected
    assert result_file(masked)["eval_config"].keys() == result_file(plain)["eval_config"].keys()


def test_a_multiple_at_or_below_one_is_refused(cache: Cache, home: Path) -> None:
    with pytest.raises(UsageError, match="half of the rows"):
        plan_evaluation(ask(make_run(home / "runs" / "one", cache), max_norm=1.0))


@pytest.mark.slow
def test_objects_have_the_limit_of_the_cache_or_their_own(cache: Cache) -> None:
    def outliers(sae: SAE | None = None, **options: Any) -> int:
        arguments = {"cache": cache, "layer": 0, "suite": "core", "references": False, "device": "cpu", **options}
        (row,) = evaluate_saes({"mine": sae or make_sae()}, **arguments)
        return row.results["core"].n.get("outlier_rows", 0)

    sinks = int((cache.contexts(held_out=True).ids == SINK).sum())
    assert outliers() == sinks
    assert outliers(max_norm="none") == outliers(norm_limit=1e6) == 0
    assert (lower := outliers(norm_limit=13.0)) > sinks
    trained = make_sae()
    trained.origin = {"norm_limit": 13.0}
    assert outliers(trained) == lower  # the SAE's own limit from training applies


def test_comparisons_show_the_numbers_without_outlier_rows(cache: Cache, home: Path) -> None:
    runs = [make_run(home / "runs" / name, cache, seed) for seed, name in enumerate("ab")]
    rows = evaluate(ask(*runs))
    found = compare_runs(runs)
    sinks = rows[0].results["core"].n["outlier_rows"]
    assert found.masked_note.startswith(f"Outlier rows are left out (up to {sinks:,} per")
    ((title, *_),) = tables(rows)
    assert title.endswith(f" tokens, {sinks:,} outlier rows left out")
    _, lines = comparison_table(found)
    expected = [f"{row.results['core'].sound.metrics['sparsity']['l0']:.1f}" for row in rows]
    assert [line[1].split(" ±")[0] for line in lines[:2]] == expected
    (first, _) = csv.DictReader(io.StringIO(to_csv(found)))
    for name in ("core.sparsity.l0", "core.masked_sparsity.l0"):
        assert float(first[name]) == rows[0].flat()[name]
    other = make_run(home / "runs" / "c", cache, norm_limit=None)
    ((title, *_),) = tables([*rows, *evaluate(ask(other))])
    assert title.endswith(f" tokens, 0 to {sinks:,} outlier rows left out")
    assert compare_runs([other]).masked_note == ""
    with pytest.raises(UsageError, match=r"core, masked rows: [1-9][0-9]* \(a\), 0 \(c\)"):
        compare_runs([runs[0], other])
    mixed = list(csv.DictReader(io.StringIO(to_csv(compare_runs([runs[0], other], mix=True)))))
    assert mixed[1]["core.masked_sparsity.l0"] == mixed[1]["core.sparsity.l0"]


def test_no_latent_s_example_is_an_outlier_row(cache: Cache, home: Path) -> None:
    run = make_run(home / "runs" / "one", cache)
    opened = open_run(run, device="cpu")
    ids, latents = opened.ctx.contexts.ids, torch.arange(48)

    def strongest(limit: float | None) -> list[int]:
        tables = latent_stats(opened.ctx, opened.sae, opened.hook, latents, silent, norm_limit=limit).activations
        places = [p for table in (tables.top, tables.sample) for n in range(48) for p in table.passages(n)]
        return [int(ids[place.context, place.position]) for place in places]

    assert SINK in strongest(None) and SINK not in strongest(opened.norm_limit)
    page = dashboard_page(opened, latents, "2026-11-29", silent)
    assert f"{int((ids == SINK).sum())} outlier rows with a norm over {opened.norm_limit:.4g} are left out" in page
    plain = open_run(make_run(home / "runs" / "two", cache, norm_limit=None), device="cpu")
    assert "outlier" not in dashboard_page(plain, latents, "2026-11-29", silent)


def test_inspect_says_which_tokens_are_outlier_rows(cache: Cache, home: Path) -> None:
    run = make_run(home / "runs" / "one", cache)
    opened = open_run(run, device="cpu")
    ids, f_SF, outlier_norm = encode_prompt(opened, "the value of it")
    (place,) = outlier_norm
    assert ids[place] == SINK and not f_SF[place].any() and f_SF[place + 1].any()
    said = CliRunner().invoke(app, ["inspect", str(run), "--prompt", "the value of it", "--latent", "3"])
    assert said.exit_code == 0, said.output
    assert f"outlier, norm {outlier_norm[place]:.4g} (limit {opened.norm_limit:.4g})" in said.output
    assert "masked   8 outlier rows with a norm over" in said.output


class Shrunk:
    """An SAE with x_hat = factor * x, and x_hat = 0 for rows with a norm over `most`."""

    def __init__(self, factor: float, most: float = math.inf) -> None:
        self.factor, self.most = factor, most

    def encode(self, x: Tensor) -> Tensor:
        return x

    def decode(self, f: Tensor) -> Tensor:
        return self.factor * f * (f.norm(dim=-1, keepdim=True) <= self.most)


def test_no_single_row_decides_which_of_two_saes_explains_more(cache: Cache) -> None:
    """With an outlier row included, leaving out a single row changes which of the two SAEs explains more."""
    torch.manual_seed(0)
    x_NSD = torch.randn(1, 200, 32)
    x_NSD[0, 7] *= 40

    def orders(rows: Tensor) -> set[bool]:
        """Whether the first SAE explains more, over the rows of the mask (200,) and over these without one row."""
        masks = [rows.clone() for _ in range(201)]
        for at in range(200):
            masks[at][at] = False
        explained = []
        for sae in (Shrunk(0.9, most=100), Shrunk(0.8)):
            statistics = [SAEStatistics() for _ in masks]
            splice(
                EvalTarget(sae, Hook(0)),
                x_NSD,
                rows[None],
                list(zip(statistics, [m[None] for m in masks], strict=True)),
            )
            explained.append([one.scalars("0.6.0")["reconstruction_quality"]["fve"] for one in statistics])
        return {one > other for one, other in zip(*explained, strict=True)}

    assert orders(torch.ones(200, dtype=torch.bool)) == {True, False}
    assert orders(x_NSD[0].norm(dim=1) < 100) == {True}


def test_the_limit_is_kept_by_a_saved_sae(cache: Cache, home: Path) -> None:
    run = make_run(home / "runs" / "one", cache)
    assert load_sae(run).origin["norm_limit"] == cache.statistics("layer_00")["norm_limit"]


def labels(rows: Sequence[Any]) -> list[str]:
    return [row.name for row in rows]


@pytest.mark.slow
def test_references_are_fitted_and_measured_without_outlier_rows(cache: Cache, home: Path) -> None:
    runs = [make_run(home / "runs" / "one", cache), make_run(home / "runs" / "two", cache, norm_limit=None)]
    config = EvaluateConfig(runs, "core", device="cpu")
    rows = evaluate(config)
    limits = [row.target.norm_limit for row in rows]
    own = cache.statistics("layer_00")["norm_limit"]
    assert limits == [own, None, *[own] * 4, *[None] * 4]  # each limit has four references
    pca = [row for row in rows if row.name.startswith("pca")]
    assert len({row.folder for row in pca}) == 2
    masked, plain = (row.results["core"].sound.metrics["reconstruction_quality"]["fve"] for row in pca)
    assert masked != plain
    comparison = compare_runs([runs[0]])
    assert len(comparison.references) == 4  # only references measured with the run's limit


def notes_of(rows: Sequence[EvalRow]) -> list[str]:
    add_notes(rows)
    return [note for row in rows for note in row.notes]


def test_an_sae_is_compared_with_the_pca_by_the_ev_and_l0_of_the_table() -> None:
    """The note uses the numbers of the table, which leave out outlier rows and do not use SAEBench's EV."""

    def core(l0: float, fve: float) -> MetricResult:
        return MetricResult({"sparsity": {"l0": l0}, "reconstruction_quality": {"fve": fve, "explained_variance": 0.9}})

    def row(
        name: str, all_rows: MetricResult, sound: MetricResult, reference: bool = False, limit: float | None = None
    ) -> EvalRow:
        target = EvalTarget(Identity(), Hook(0), reference=reference, norm_limit=limit)
        return EvalRow(name, target, results={"core": replace(all_rows, masked=sound)})

    pca = row("pca-32", core(32, 0.1), core(32, 0.5), reference=True)
    worse, better = row("worse", core(900, 0.9), core(32, 0.4)), row("better", core(32, 0.0), core(32, 0.6))
    elsewhere = row("on other rows", core(32, 0.1), core(32, 0.1), limit=7.0)  # no PCA has this limit
    (sentence,) = notes_of([worse, better, elsewhere, pca])
    assert sentence.startswith("worse explains 0.400 of the variance, less than the PCA of equal L0 (pca-32: 0.500).")


def test_an_sae_is_compared_with_the_pca_of_the_same_rows() -> None:
    """Neither SAEBench's `explained_variance`, nor outlier rows, nor a PCA of other rows enter the comparison."""

    def row(name: str, explained: float, over_all_rows: float, limit: float = 9.0, l0: float = 6.0) -> EvalRow:
        def numbers(fve: float) -> MetricResult:
            quality = {"fve": fve, "explained_variance": 5 - 4 * fve}
            return MetricResult({"sparsity": {"l0": l0}, "reconstruction_quality": quality})

        target = EvalTarget(make_sae(), Hook(0), reference=name.startswith("pca"), norm_limit=limit)
        result = numbers(over_all_rows).with_masked(numbers(explained).without_outliers(1, 99))
        return EvalRow(name, target, results={"core": result})

    pca = row("pca-6", 0.5, 0.3)
    sentences = notes_of([pca, row("good", 0.6, 0.2), row("bad", 0.4, 0.9), row("sparser", 0.4, 0.4, l0=5.0)])
    assert len(sentences) == 1
    assert sentences[0].startswith("bad explains 0.400 of the variance, less than the PCA of equal L0 (pca-6: 0.500)")
    assert notes_of([pca, row("other rows", 0.4, 0.4, limit=8.0)]) == []
    (denser,) = notes_of([pca, row("denser", 0.4, 0.9, l0=60.0)])
    assert denser.startswith("denser explains 0.400 of the variance, less than the PCA of smaller L0 (pca-6: 0.500)")
