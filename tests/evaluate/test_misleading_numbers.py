"""Bad SAEs that are the best by some number: the number to use instead, and where the note on it is shown."""

import json
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

import sae
from sae.cache.reader import Cache
from sae.cli.main import app
from sae.common.errors import UsageError
from sae.evaluate.compare import compare_runs, to_csv, to_records
from sae.evaluate.latents.inspection import open_run
from sae.evaluate.metrics.base import encode_finite
from sae.evaluate.pages.dashboard import run_section
from sae.evaluate.plan import EvaluateConfig, plan_evaluation
from sae.evaluate.tables import notes
from sae.train.activation_functions import ReLU
from sae.train.sae import SAE, save_sae

ASKED = {"suite": "core", "tokens": 300, "device": "cpu"}
QUALITY = "core.reconstruction_quality."


class Decoded:
    """An SAE whose encoder is the identity and whose decoder is a given function."""

    def __init__(self, decode) -> None:
        self.decode = decode
        self.seen: list[Tensor] = []

    def encode(self, x: Tensor) -> Tensor:
        self.seen.append(x)
        return x


def counted_rows(cache: Cache) -> Tensor:
    """The activations (T, D) at the tokens that core counts, in float64."""
    recorder = Decoded(lambda f: f)
    sae.evaluate_saes({"recorder": recorder}, cache=cache, layer=1, references=False, **ASKED)
    return torch.cat(recorder.seen[2:]).double()  # the first two calls check the SAE and count its latents


def linear(kind: str, x_TD: Tensor) -> SAE:
    """An SAE that returns the mean, zeros, or its input exactly."""
    made = SAE(32, 64, [ReLU()]).eval().requires_grad_(False)
    eye = torch.eye(32)
    made.W_enc.copy_(torch.cat([eye, -eye], 1))
    made.W_dec.copy_(torch.cat([eye, -eye]))
    if kind != "perfect":
        made.b_enc.fill_(-1e6)
        made.b_dec.copy_(x_TD.mean(0) if kind == "mean" else torch.zeros(32))
    return made


def expected_fve(x_TD: Tensor) -> dict[str, float]:
    mean = x_TD.mean(0)
    variance = (x_TD - mean).square().sum(1).mean()
    return {"mean": 0.0, "zeros": -float(mean.square().sum() / variance), "perfect": 1.0}


@pytest.mark.parametrize("mode", ["0.6.0", "2024-12"])
def test_the_mean_explains_nothing_zeros_less_and_a_perfect_sae_everything(tiny_cache, mode):
    x_TD = counted_rows(tiny_cache)
    saes = {kind: linear(kind, x_TD) for kind in ("mean", "zeros", "perfect")}
    rows = sae.evaluate_saes(saes, cache=tiny_cache, layer=1, references=False, mode=mode, **ASKED)
    for row in rows:
        assert row.flat()[QUALITY + "fve"] == pytest.approx(expected_fve(x_TD)[row.name], abs=1e-6), row.name
    quality = rows[0].results["core"].metrics["reconstruction_quality"]
    if mode == "0.6.0":  # SAEBench's number is kept; its denominator is not the variance
        square = x_TD.square().sum(1).mean()
        error = (x_TD - x_TD.mean(0)).square().sum(1).mean()
        own = float(1 - error / (square - (square / 32) ** 2))
        assert quality["explained_variance"] == pytest.approx(own, rel=1e-5)
        assert abs(quality["explained_variance"]) > 0.01  # although the SAE explains nothing
    else:
        assert quality["explained_variance"] == pytest.approx(0, abs=1e-5)  # one batch, so its mean is that of the text
    (note,) = [one for one in rows[0].results["core"].notes if "explained_variance (" in one]
    assert f"explained_variance ({quality['explained_variance']:.4f}) is SAEBench" in note
    assert f"Use fve ({quality['fve']:.4f})" in note


def test_the_sound_number_and_the_note_reach_every_file_of_a_finished_run(tiny_cache, home):
    x_TD = counted_rows(tiny_cache)
    origin = {"model": tiny_cache.identity["model"], "layer": 1, "cache": str(tiny_cache.folder)}
    for kind in ("mean", "zeros", "perfect"):
        save_sae(linear(kind, x_TD), home / kind, {**origin, "fingerprint": tiny_cache.fingerprint})
    folders = [home / kind for kind in ("mean", "zeros", "perfect")]
    words = ["evaluate", *map(str, folders), "--suite", "core", "--tokens", "300", "--device", "cpu", "--no-references"]
    printed = CliRunner().invoke(app, [*words, "--json"])
    assert printed.exit_code == 0, printed.output
    rows = {row["name"]: row for row in json.loads(printed.stdout)}
    compared = {record["run"]: record for record in to_records(compare_runs(folders, references=False))}
    for kind, fve in expected_fve(x_TD).items():
        file = json.loads((home / kind / "evaluations" / "core.json").read_text())
        for found in (rows[kind], compared[kind]):
            assert found[QUALITY + "fve"] == pytest.approx(fve, abs=1e-6)
            assert [one for one in found["notes"] if re.search(r"explained_variance \(.*Use fve", one)]
        assert file["eval_result_metrics"]["reconstruction_quality"]["fve"] == pytest.approx(fve, abs=1e-6)
        assert "Use fve" in file["eval_result_unstructured"]["notes"][0]
    assert any("hardly better than the mean" in one or "negative" in one for one in rows["mean"]["notes"])
    assert "Use fve" in to_csv(compare_runs(folders, references=False))
    shown = CliRunner().invoke(app, words)
    beside = CliRunner().invoke(app, ["compare", *map(str, folders)])
    for printed in (shown, beside):
        assert re.search(r"^note     core, mean.*: L0 is 0", printed.output, re.MULTILINE)


def bad_saes(x_TD: Tensor) -> dict[str, object]:
    mean = x_TD.mean(0).float()
    directions = torch.linalg.svd(x_TD - x_TD.mean(0), full_matrices=False)[2][:4].float()
    dense = SAE(32, 4, [ReLU()]).eval().requires_grad_(False)
    dense.W_dec.copy_(directions)
    dense.W_enc.copy_(directions.T)
    dense.b_enc.fill_(1e3)
    dense.b_dec.copy_(mean - 1e3 * directions.sum(0))
    dense.pre_bias = False
    dense.b_enc.sub_(mean @ dense.W_enc)
    return {
        "mean": linear("mean", x_TD),
        "input": Decoded(lambda f: f),
        "double": Decoded(lambda f: 2 * f),
        "half": Decoded(lambda f: f / 2),
        "dense": dense,
        "once infinite": Decoded(lambda f: torch.where(f[:, :1] == x_TD[5, 0].float(), torch.inf, f)),
    }


def test_a_bad_sae_has_a_flag_that_says_what_its_numbers_hide(tiny_cache):
    x_TD = counted_rows(tiny_cache)
    rows = sae.evaluate_saes(bad_saes(x_TD), cache=tiny_cache, layer=1, references=False, **ASKED)
    found = {row.name: row.results["core"] for row in rows}

    def said(name: str, words: str) -> bool:
        return any(words in flag for flag in found[name].flags)

    assert said("mean", "L0 is 0") and said("mean", "KL and CE scores, which compare with a zeroed layer")
    assert found["input"].metrics["reconstruction_quality"]["fve"] == pytest.approx(1)
    assert said(
        "input", "L0 is 32.0 for 32 dimensions. With so many active latents, a mere rotation reconstructs everything"
    )
    for name, scale in (("double", "2.00"), ("half", "0.50")):
        assert found[name].metrics["reconstruction_quality"]["cossim"] == pytest.approx(1)
        assert said(name, f"Reconstructions are {scale} times as long as would fit best")
    assert not said("input", "times as long")
    assert found["dense"].metrics["reconstruction_quality"]["fve"] > 0.1  # "dense" is a PCA of rank 4
    assert said("dense", "Most of the L0 of 4.0 comes from 4 latents that fire at over 99% of the tokens")
    assert said("once infinite", "NaN or infinite at")
    assert found["once infinite"].metrics["reconstruction_quality"]["fve"] is None


def test_weights_that_are_not_finite_are_refused(tiny_cache):
    broken = linear("perfect", torch.zeros(1, 32))
    broken.W_dec[0, 0] = torch.nan
    with pytest.raises(UsageError, match="broken returns NaN or infinity for finite activations"):
        sae.evaluate_saes({"broken": broken}, cache=tiny_cache, layer=1, references=False, **ASKED)


class RarelyInfinite(SAE):
    """An SAE with a latent that overflows on some tokens."""

    def encode(self, x_BD: Tensor) -> Tensor:
        f_BF = super().encode(x_BD)
        f_BF[..., 0] = torch.where(x_BD[..., 0] > 0.2, torch.inf, f_BF[..., 0])
        return f_BF


@pytest.mark.parametrize(
    ("rows", "bad"),
    [([[1.0, 2], [3, 4]], 0), ([[3e38, 3e38], [-3e38, 3e38]], 0), ([[1.0, torch.inf], [-torch.inf, 2]], 2),
     ([[torch.nan, 1], [2, 3]], 1), ([], 0)],
)  # fmt: skip
def test_latents_that_are_not_finite_are_refused_and_large_ones_are_not(rows, bad):
    one, x = Decoded(lambda f: f), torch.tensor(rows).reshape(-1, 2)
    if bad:
        with pytest.raises(sae.SaeError, match=f"NaN or infinite at {bad} of 2 rows"):
            encode_finite(one, x)
    else:
        assert torch.equal(encode_finite(one, x), x)


def test_an_sae_whose_latents_overflow_does_not_stop_the_probes_of_the_others(tiny_cache):
    torch.manual_seed(0)
    saes = {"broken": RarelyInfinite(32, 64).eval(), "sound": SAE(32, 64).eval()}
    sizes = [f"{name}_set_size=40" for name in ("train", "test")]
    suite = ("sparse_probing_stdlib", "tpp_stdlib")
    options = [f"{metric}.{size}" for metric in suite for size in sizes] + ["tpp_stdlib.thresholds=2"]
    options += [f"{metric}.datasets=stdlib/kind" for metric in suite]
    broken, sound = sae.evaluate_saes(
        saes, cache=tiny_cache, layer=1, references=False, suite=",".join(suite), options=options, device="cpu"
    )
    for metric in suite:
        assert "latents are NaN or infinite at" in str(broken.errors[metric])
        assert metric in sound.results


@pytest.fixture(scope="module")
def missed(tiny_cache, tmp_path_factory) -> tuple[Path, str]:
    """A run too short for its L0 controller to reach the target, and the output of `sae train`."""
    out = tmp_path_factory.mktemp("missed")
    words = ["train", "--variant", "relu", "--l0", "2", "--steps", "12", "--batch-size", "64", "--width", "64"]
    words += ["--layer", "1", "--cache", str(tiny_cache.folder), "--device", "cpu", "--out", str(out)]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    return next(out.glob("relu-*")), done.output


def test_a_missed_l0_and_a_better_pca_are_noted_wherever_the_numbers_are_seen(missed, home):
    run, printed = missed
    at_end = re.search(
        r"^note     (relu-\S+) ended at L0 [\d.]+, \+\d+% from its target 2\. Train", printed, re.MULTILINE
    )
    assert at_end and at_end[1] == run.name
    words = ["evaluate", str(run), "--suite", "core", "--tokens", "300", "--device", "cpu"]
    shown, as_json = CliRunner().invoke(app, words), CliRunner().invoke(app, [*words, "--json"])
    assert shown.exit_code == 0, shown.output
    own = next(row for row in json.loads(as_json.stdout) if row["name"] == run.name)
    l0 = own["core.sparsity.l0"]
    both = [
        f"{run.name} has L0 {l0:.1f} on held-out text, {l0 / 2 - 1:+.0%} from its target 2. ",
        f"{run.name} explains {own[QUALITY + 'fve']:.3f} of the variance, less than the PCA of equal L0 (pca-",
    ]
    comparison, page = compare_runs([run]), run_section(open_run(run, 300, "cpu"))
    places = {
        "table": shown.output, "json": " ".join(own["notes"]), "compare": " ".join(notes(comparison.runs)),
        "csv": to_csv(comparison), "dashboard": " ".join(page["flags"]),
        "without the references' rows": " ".join(notes(compare_runs([run], references=False).runs)),
        "compare's output": CliRunner().invoke(app, ["compare", str(run)]).output,
    }  # fmt: skip
    for place, text in places.items():
        for sentence in both:
            assert text.count(sentence) == 1, (place, sentence, text)
    references = [row for row in json.loads(as_json.stdout) if row["name"] != run.name]
    assert len(references) == 4 and not any(row["notes"] for row in references)


@pytest.mark.parametrize(
    ("tokens", "text"),
    [
        (60, "64 held-out tokens in 2 contexts of {} (60 requested; whole contexts are read)"),
        (64, "64 held-out tokens in 2 contexts of {}"),
        (10**6, " contexts of {} (1,000,000 requested; there is no more held-out text)"),
    ],
)
def test_the_plan_says_that_whole_contexts_are_read(tiny_cache, missed, home, tokens, text):
    lines = plan_evaluation(EvaluateConfig([missed[0]], "core", tokens, device="cpu")).describe()
    (line,) = [line for line in lines if line.startswith("text ")]
    assert line.endswith(text.format(tiny_cache.folder))


def test_core_reports_progress_inside_its_first_batch(tiny_cache):
    class Calls(list):
        def __call__(self, metric: str):
            return self

        def __enter__(self):
            return lambda *call: self.append(call)

        def __exit__(self, *_):
            pass

    calls = Calls()
    saes = {name: Decoded(lambda f: f) for name in ("one", "two")}
    asked = {**ASKED, "tokens": None, "options": ["core.batch_contexts=8"]}
    sae.evaluate_saes(saes, cache=tiny_cache, layer=1, references=False, progress=calls, **asked)
    assert calls.pop(0)[2] == "loading the model"
    done, total = [call[0] for call in calls], {call[1] for call in calls}
    assert done == sorted(done) and total == {done[-1]}
    first = [call for call in calls if len(call) > 2 and call[2].startswith("batch 1 of ")]
    assert [(call[0], call[2].split(": ")[1]) for call in first] == [
        (0, "model"), (1, "SAE 1 of 2"), (2, "SAE 2 of 2"), (3, "losses"),
    ]  # fmt: skip
