"""The dashboard of a run and its text in the terminal: contents, escaping and refused input."""

import base64
import gzip
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from sae.cli.main import app
from sae.common.errors import DamagedError, LeftOutWarning, UsageError
from sae.common.evaluation_schemas import RESULT_RECORD
from sae.evaluate.latents import inspection, stats
from sae.evaluate.latents.inspection import encode_prompt, open_run
from sae.evaluate.latents.passages import PassageWindow
from sae.evaluate.metrics.sparse_probing import SparseProbingStdlib
from sae.evaluate.pages.dashboard import check_window_memory, dashboard_page, sample_latents
from sae.evaluate.pages.terminal import highlight_tokens, text_histogram
from sae.evaluate.plan import EvaluateConfig
from sae.evaluate.results import write_result
from sae.evaluate.run import evaluate
from sae.train.activation_functions import TopK
from sae.train.sae import SAE, save_sae

from ...run_records import change_record, write_run_record

HOSTILE = [
    "</script><script>alert(1)</script>",
    "\u202egnp.exe",
    "\x1b[31mred",
    "\x00",
    " " * 400,
    "a" * 400,
    "<!--",
    "]]>",
]


def quiet(done, total, note=""):
    pass


def make_run(folder: Path, cache, latents: int = 70, layer: int = 1) -> Path:
    """A run folder with a random SAE whose first latent never fires."""
    torch.manual_seed(0)
    sae = SAE(32, latents, [TopK(min(4, latents))])
    sae.b_enc.data[0] = -1e3
    origin = {
        "model": cache.identity["model"],
        "layer": layer,
        "cache": str(cache.folder),
        "fingerprint": cache.fingerprint,
    }
    save_sae(sae, folder, origin)
    return folder


@pytest.fixture
def run(tiny_cache, home) -> Path:
    return make_run(home / "runs" / "one", tiny_cache)


def page_of(run: Path, count: int | None = None) -> str:
    found = open_run(run, 300, "cpu")
    return dashboard_page(found, sample_latents(found.sae.d_sae, count), "2026-11-21", quiet)


def unpacked(html: str, name: str | int):
    (text,) = re.findall(f'id="packed-{name}">([^<]*)</script>', html)
    return json.loads(gzip.decompress(base64.b64decode(text)))


def test_the_page_holds_what_was_measured(run):
    html = page_of(run)
    found = open_run(run, 300, "cpu")
    numbers = stats.latent_stats(found.ctx, found.sae, found.hook, torch.arange(70), quiet)
    table, words, text = (unpacked(html, name) for name in ("table", "words", "text"))
    assert table["latent"] == list(range(70))
    assert table["density"] == [float(f"{value:.4g}") for value in numbers.density.tolist()]
    contexts = found.ctx.contexts
    assert [len(ids) for ids in text] == contexts.length.tolist()
    assert [words[token] for token in text[0]] == [
        found.token_text.display(int(i)).replace("\n", "↵") for i in contexts.ids[0][: len(text[0])]
    ]
    latent = int(numbers.density.argmax())
    entry = unpacked(html, latent // 64)[latent % 64]
    assert sum(entry["bins"]) == int(numbers.activations.fired_F[latent])
    context, start, position, value, levels = entry["top"][0]
    assert value == pytest.approx(table["max"][latent]) and levels[position - start] == 255
    own = numbers.activations.top.passages(latent)[0]
    assert (context, start, position) == (own.context, own.start, own.position)
    assert (np.array(levels) > 0).tolist() == (own.inside(len(text[context])) > 0).tolist()
    assert [other for other, _ in entry["nearest"]] == numbers.nearest.index[latent].tolist()
    assert words[entry["raised"][0][0]] == found.token_text.display(int(numbers.raised.index[latent, 0]))


@pytest.mark.parametrize("tokens", [1, *(pytest.param(count, marks=pytest.mark.slow) for count in (12, 500))])
def test_a_passage_has_as_many_tokens_as_were_asked_for(run, tokens):
    found = open_run(run, 300, "cpu")
    html = dashboard_page(found, sample_latents(70, None), "today", quiet, PassageWindow.of(tokens))
    lengths = found.ctx.contexts.length.tolist()
    shown = [one for place in (0, 1) for entry in unpacked(html, place) for one in entry["top"] + entry["quantiles"]]
    assert len(shown) > 100
    for context, start, position, _, levels in shown:
        assert start <= position < start + len(levels) <= lengths[context]
        whole = lengths[context] == found.ctx.contexts.ids.shape[1]
        assert len(levels) == min(tokens, lengths[context]) or not whole and start > 0
    code, _, _ = sae("dashboard", run, "--tokens", 300, "--device", "cpu", "--passage", tokens)
    assert code == 0 and unpacked((run / "dashboard.html").read_text(), 0) == unpacked(html, 0)


def test_inspect_shows_as_many_tokens_as_were_asked_for(run):
    long, short = (sae("inspect", run, "--latent", 5, "--tokens", 300, "--passage", n)[1] for n in (64, 1))
    found = open_run(run, 300, "cpu")
    numbers = stats.latent_stats(found.ctx, found.sae, found.hook, torch.tensor([5]), quiet, PassageWindow.of(1))
    best = numbers.activations.top.passages(0)[0]
    token = found.token_text.display(int(found.ctx.contexts.ids[best.context, best.position]))
    (line,) = [line for line in short.splitlines() if line.strip().startswith(f"{best.value:.3g} ")][:1]
    assert line.split(None, 1)[1].strip() == f"<<{token}>>".replace("\n", "↵") and len(long) > len(short)


def test_passages_that_do_not_fit_into_memory_are_refused():
    with pytest.raises(UsageError, match=r"smaller --passage, or show fewer latents"):
        check_window_memory(PassageWindow.of(1024), 65_536)
    assert check_window_memory(PassageWindow.of(64), 65_536).width == 64


def test_the_model_is_shown_by_name_and_digest(run):
    """The model is a local folder, whose path is shown nowhere."""
    model = open_run(run, 300, "cpu").sae.origin["model"]
    path, shown = Path(model["name"]), f"tiny-gemma-{model['revision'][:8]}"
    html = page_of(run)
    assert f"blocks.1.hook_resid_post of {shown}, 70 latents" in html
    told = [sae("inspect", run, "--prompt", "the", "--tokens", 300)[2], sae("dashboard", run, "--tokens", 300)[2]]
    assert all(f"of {shown}" in one for one in told)
    assert str(path.parent) not in "".join([html, *told]).replace(str(run), "") or not path.is_absolute()


def test_the_same_run_gives_the_same_page(run):
    assert page_of(run) == page_of(run)


def test_a_dead_latent_has_no_passages_and_is_listed(run):
    html = page_of(run)
    entry = unpacked(html, 0)[0]
    assert entry["top"] == entry["quantiles"] == entry["coactive"] == [] and len(entry["nearest"]) == 8
    assert 'href="#latent-0"' in html


def test_a_smaller_page_holds_some_latents_and_the_numbers_of_all(run):
    html = page_of(run, 5)
    table = unpacked(html, "table")
    assert len(table["latent"]) == 5 and table["latent"] == sorted(table["latent"])
    assert "5 of 70 latents are shown, drawn at random" in html
    whole = unpacked(page_of(run), "table")
    assert table["density"] == [whole["density"][latent] for latent in table["latent"]]


def test_hostile_tokens_end_no_script_and_hide_nothing(run, monkeypatch):
    monkeypatch.setattr(
        "sae.evaluate.metrics.activation_examples.TokenText.text", lambda self, token: HOSTILE[token % len(HOSTILE)]
    )
    html = page_of(run)
    assert "alert" not in html and "\x1b" not in html and "\u202e" not in html
    assert (
        len(re.findall("<script", html)) == len(re.findall("</script>", html)) == 1 + 1 + 3 + 2
    )  # the script, `about`, packed data
    assert set(unpacked(html, "words")) == {
        w.replace("\u202e", "⟨202E⟩").replace("\x1b", "⟨001B⟩").replace("\x00", "⟨0000⟩") for w in HOSTILE
    }


def test_hostile_names_and_labels_are_escaped(tiny_cache, home):
    run = make_run(home / "runs" / "<img src=x>", tiny_cache, 3)
    write_run_record(run, d_in=32, d_sae=3, layer=1, variant="<u>\u202e", resolved={"</dl>": "<i>"})
    html = page_of(run)
    assert "<img" not in html and "<u>" not in html and "</dl><" not in html and "\u202e" not in html
    assert "&lt;img src=x&gt;" in html and "&lt;u&gt;⟨202E⟩" in html


def test_evaluations_stand_on_the_page_if_they_are_of_these_weights(run):
    evaluate(EvaluateConfig(runs=[run], suite="core", tokens=60, device="cpu", references=False))
    assert "KL score" in page_of(run)
    path = run / "evaluations" / "core.json"
    change_record(RESULT_RECORD, path, lambda record: record["eval_config"].update(weights="of another SAE"))
    with pytest.warns(
        LeftOutWarning, match=r"core\.json is left out: .*core\.json is a result of another SAE\. Delete it and run"
    ):
        assert "KL score" not in page_of(run)
    path.write_text("{")
    with pytest.warns(LeftOutWarning, match=r"core\.json is left out: .*core\.json cannot be read"):
        assert "has not been evaluated yet" in page_of(run)


def test_labels_are_what_probes_and_judges_found():
    results = {
        "absorption": inspection.MetricResult(
            {}, [{"first_letter": "s", "main_latents": [62, 4], "f1_k_sparse": [0.3, 0.65, 0.6]}]
        ),
        "autointerp": inspection.MetricResult(
            {},
            extra={
                "4": {"latent": 4, "explanation": "rivers", "score": 0.75},
                "5": {"latent": 5, "explanation": None, "score": None},
                "6": {
                    "latent": 6,
                    "explanation": "lakes",
                    "score": None,
                    "detection": {"balanced_accuracy": 0.5},
                    "fuzzing": {"fires": [True], "predicted": [None]},
                },
            },
        ),
    }
    assert inspection.latent_labels(results, 64) == {
        62: ["first letter s (F1 0.65)"],
        4: ["first letter s (F1 0.65)", "rivers (score 0.75)"],
        6: ["lakes (detection 0.50)"],
    }
    assert inspection.latent_labels({}, 64) == {}


def test_labels_are_of_the_numbers_without_outlier_rows():
    def letter(latent: int) -> inspection.MetricResult:
        entry = {"first_letter": "s", "main_latents": [latent], "f1_k_sparse": [0.5]}
        return inspection.MetricResult({}, [entry], n={"outlier_rows": 1})

    found = {"absorption": letter(3).with_masked(letter(5))}
    assert inspection.latent_labels(found, 64) == {5: ["first letter s (F1 0.50)"]}


def probed(texts: int = 200, **tasks) -> inspection.MetricResult:
    """A result of sparse probing on a dataset "d".

    `tasks` maps a class to its latent, the difference in activation and the accuracy of the probe on that latent.
    """
    scores = {
        "sae_top_1_test_accuracy": {label: accuracy for label, (_, _, accuracy) in tasks.items()},
        "sae_top_1_latents": {label: {str(latent): difference} for label, (latent, difference, _) in tasks.items()},
    }
    return inspection.MetricResult({}, extra={"d_results": scores}, n={"test_texts_per_task": texts})


def test_a_latent_is_labeled_with_the_classes_it_tells():
    found = probed(red=(3, 0.5, 0.7), blue=(3, 0.1, 0.9), green=(4, -2.0, 0.9), grey=(5, 2.0, 0.66), far=(64, 1.0, 1.0))
    red, blue = "red (class of d, accuracy 0.70)", "blue (class of d, accuracy 0.90)"
    labels = inspection.latent_labels({"sparse_probing_stdlib": found}, 64)
    # The more accurate class comes first. Latent 4 fires less for its class; the accuracy of latent 5 may be below 0.6.
    assert labels == {3: [blue, red]}
    both = {"sparse_probing_stdlib": found, "sparse_probing": probed(1000, grey=(5, 2.0, 0.66))}
    assert inspection.latent_labels(both, 64)[5] == [
        "grey (class of d, accuracy 0.66)"
    ]  # with 1000 texts, the accuracy is significantly above 0.6
    absorbed = inspection.MetricResult({}, [{"first_letter": "s", "main_latents": [3], "f1_k_sparse": [0.3]}])
    assert inspection.latent_labels({"absorption": absorbed, **both}, 64)[3] == ["first letter s (F1 0.30)", blue, red]
    old = {"d_results": {"sae_top_1_test_accuracy": {"red": 0.9}}}
    assert inspection.latent_labels({"sparse_probing": inspection.MetricResult({}, extra=old)}, 64) == {}


@pytest.mark.parametrize(
    "scores",
    [
        None,
        [],
        {"sae_top_1_latents": ["red"]},
        {"sae_top_1_latents": {"red": {}}},
        {"sae_top_1_latents": {"red": {"3": 1.0, "4": 1.0}}},
        {"sae_top_1_latents": {"red": {"3": None}}},
        {"sae_top_1_latents": {"red": {"three": 1.0}}},
        {"sae_top_1_test_accuracy": {}},
        {"sae_top_1_test_accuracy": {"red": 7.0}},
        {"sae_top_1_test_accuracy": {"red": None}},
    ],
)
def test_a_result_that_was_changed_by_hand_labels_nothing(scores):
    absorbed = inspection.MetricResult({}, [{"first_letter": "s", "main_latents": [3], "f1_k_sparse": [0.3]}])
    whole = {"sae_top_1_test_accuracy": {"red": 0.9}, "sae_top_1_latents": {"red": {"3": 1.0}}}
    changed = scores if not isinstance(scores, dict) else whole | scores
    probing = inspection.MetricResult({}, extra={"d_results": changed}, n={"test_texts_per_task": 200})
    found = {"absorption": absorbed, "sparse_probing": probing}
    assert inspection.latent_labels(found, 64) == {3: ["first letter s (F1 0.30)"]}
    assert inspection.latent_labels({"absorption": inspection.MetricResult({}, [{"first_letter": "s"}])}, 64) == {}
    for n in ({}, {"test_texts_per_task": 0}):
        assert (
            inspection.latent_labels(
                {"sparse_probing": inspection.MetricResult({}, extra={"d_results": whole}, n=n)}, 64
            )
            == {}
        )


def test_hostile_classes_are_shown_as_what_they_are(run):
    weights = open_run(run, 300, "cpu").row.weights
    hostile = {"</script><b>\u202e\x1b[31m": (5, 1.0, 0.95), "[bold]" + "w" * 200: (5, 1.0, 0.85)}
    write_result(run, SparseProbingStdlib(), {"weights": weights}, probed(**hostile), {})
    html = page_of(run)
    assert "<b>" not in html.split('id="packed-table"')[1] and "\x1b" not in html and "\u202e" not in html
    shown = unpacked(html, "table")["labels"]
    assert shown[5].startswith("</script><b>⟨202E⟩⟨001B⟩[31m (class of d, accuracy 0.95); [bold]www")
    assert [i for i, label in enumerate(shown) if label] == [5]
    code, out, _ = sae("inspect", run, "--latent", 5, "--tokens", 300)
    assert code == 0 and "latent 5   </script><b>⟨202E⟩⟨001B⟩[31m (class of d" in out and "[bold]www" in out
    assert "\x1b" not in out and "\u202e" not in out


def test_curves_are_what_training_logged(run):
    assert "There are no training curves" in page_of(run)
    lines = [
        {"step": n, "tokens": n, "loss": 1 / n, "l0": 4.0, "explained_variance": 0.5, "dead": 0.0} for n in (1, 2, 3)
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    html = page_of(run)
    assert "share of dead latents, in training" in html and "no curves" not in html
    (run / "metrics.jsonl").write_text('{"tokens": 1\n' + "[" * 50_000 + '\n{"step": 1, "tok')
    with pytest.warns(LeftOutWarning, match="Left out: 2 lines of .*metrics.jsonl that cannot be read"):
        assert "There are no training curves" in page_of(run)


def test_a_bar_a_bin():
    assert text_histogram([0, 1, 8, 4, 0, 0]) == " ▁█▄"


def test_active_tokens_stand_between_brackets_where_there_are_no_colors(monkeypatch):
    words, values = ["\x1b[2J", "[red]b", "-" * 80], [0.0, 2.0, 0.0]
    assert highlight_tokens(words, values, 4.0).plain == f"⟨001B⟩[2J<<[red]b>>{'-' * 16}…×80"
    monkeypatch.setenv("FORCE_COLOR", "1")
    text = highlight_tokens(words[:2], values[:2], 4.0)
    assert text.plain == "⟨001B⟩[2J[red]b" and text.spans[0].style.bgcolor is not None


def test_a_prompt_is_encoded_as_text_is(run):
    found = open_run(run, 300, "cpu")
    ids = found.ctx.contexts.ids[0][:9].tolist()
    prompt = found.ctx.tokenizer.decode(ids, skip_special_tokens=True)
    again, f_SF, outlier_norm = encode_prompt(found, prompt)
    assert again == ids and outlier_norm == {}
    x = found.ctx.model.capture_hooks(torch.tensor([ids]), [found.hook])[found.hook][0]
    expected = found.sae.encode(x)
    expected[0] = 0  # BOS
    torch.testing.assert_close(f_SF, expected)


def sae(*arguments: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.stdout, result.stderr


def test_sae_dashboard_and_sae_inspect(run):
    code, out, told = sae("dashboard", run, "--tokens", "300", "--device", "cpu")
    assert code == 0 and str(run / "dashboard.html") in out
    assert "70 of 70 latents" in told and "next     sae inspect" in told
    assert (run / "dashboard.html").read_text().startswith("<!doctype html>")
    code, _, told = sae("dashboard", run, "--tokens", "300", "--device", "cpu", "--latents", 3)
    assert code == 0 and "3 of 70 latents" in told
    code, out, told = sae(
        "inspect", run, "--latent", 0, "--latent", 5, "--prompt", "the quick [bold]fox \x1b[31m", "--tokens", 300
    )
    assert code == 0 and "next     sae dashboard" in told
    assert "does not fire on any" in out and "latent 5" in out and "nearest" in out and "raises" in out
    assert "special token" in out and "\x1b[31m" not in out


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["dashboard", "RUN", "--out", "page.txt"], "ends in .html"),
        (["dashboard", "nowhere"], "no trained SAE"),
        (["inspect", "RUN"], "--latent 12"),
        (["inspect", "RUN", "--latent", "70"], "latents 0 to 69"),
        (["inspect", "RUN", "--prompt", ""], "no tokens"),
        (["inspect", "RUN", "--prompt", "the " * 9000], "the model reads at most 8,192"),
    ],
)
def test_refusals_are_sentences(run, arguments, sentence):
    code, _, told = sae(*(run if argument == "RUN" else argument for argument in arguments))
    assert code == 2 and sentence in told and told.startswith("error: ")
    assert not (run / "dashboard.html").exists()


def test_a_run_whose_files_contradict_the_model_is_damaged(tiny_cache, home):
    with pytest.raises(DamagedError, match="blocks"):
        open_run(make_run(home / "a", tiny_cache, layer=7), 300, "cpu")
    narrow = make_run(home / "b", tiny_cache)
    save_sae(SAE(16, 8), narrow, open_run(narrow, 300, "cpu").sae.origin)
    with pytest.raises(DamagedError, match="width 16"):
        open_run(narrow, 300, "cpu")


def test_a_number_of_latents_that_is_none():
    with pytest.raises(UsageError, match="expected a positive number"):
        sample_latents(10, -1)
