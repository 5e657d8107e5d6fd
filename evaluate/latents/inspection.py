"""One run, opened to be looked at: its SAE, the model and held-out text, and what evaluations said of it."""

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...cache.catalog import list_caches
from ...cache.layout import Hook
from ...common.device import resolve_device, resolve_dtype
from ...common.errors import DamagedError, SaeError, UsageError
from ...common.files import read_json
from ...harvest.architectures import check_layers, hook_width
from ...train.sae import SAE, load_sae
from ..context import EvalContext
from ..datasets.labelled import class_name
from ..inputs import check_tokens, find_eval_cache, make_context, row_of_run
from ..metrics.activation_examples import TokenText
from ..metrics.base import MetricResult
from ..metrics.packing import TOKENS_PER_ENCODE, encode_float32
from ..metrics.probes import wilson_interval
from ..metrics.registry import METRICS
from ..results import read_result_file
from ..rows import EvalRow

DEFAULT_TOKENS = 100_000  # of held-out text, unless asked otherwise
MIN_PROBE_ACCURACY = (
    0.6  # accuracy of a probe on one latent, above which it tells something of its class; 0.5 is chance
)


@dataclass(frozen=True)
class InspectedRun:
    """`row` has the results that are of this very SAE; `labels` are what they call a latent."""

    folder: Path
    sae: SAE
    hook: Hook
    ctx: EvalContext
    words: TokenText
    row: EvalRow
    labels: dict[int, list[str]]

    @property
    def tokens(self) -> int:
        """Of the text, special ones included."""
        return int(self.ctx.contexts.length.sum())


def open_run(folder: Path, tokens: int | None = None, device: str = "auto", dtype: str = "auto") -> InspectedRun:
    """Open a run folder with at most about `tokens` tokens of its cache's held-out text.

    Raises UsageError when it is no trained run or its cache is gone, DamagedError when its files contradict each other.
    """
    check_tokens(tokens)
    device = resolve_device(device)
    sae = load_sae(folder)
    cache = find_eval_cache(folder, sae, list_caches())
    tokens = DEFAULT_TOKENS if tokens is None else tokens
    ctx = make_context(cache, tokens=tokens, device=device, dtype=resolve_dtype(dtype, device))
    hook = Hook(sae.origin["layer"], sae.origin.get("site", "resid_post"))
    try:
        check_layers(ctx.model_config, [hook.layer], cache.identity["model"]["name"])
    except UsageError as error:
        raise DamagedError(f"{folder}/sae.json was overwritten: {error}") from None
    if (width := hook_width(hook, ctx.model_config)) != sae.d_in:
        raise DamagedError(f"{folder} takes activations of {sae.d_in} numbers, but {hook} of the model has {width}.")
    row = row_of_run(folder, sae)
    row.results |= results_of_weights(folder, row.weights)
    sae.to(device)
    return InspectedRun(folder, sae, hook, ctx, TokenText(ctx.tokenizer), row, latent_labels(row.results, sae.d_sae))


def results_of_weights(folder: Path, weights: str) -> dict[str, MetricResult]:
    """The results in evaluations/ that are of these weights; files that hold no result are passed over."""
    found = {}
    for name, metric in METRICS.items():
        path = folder / "evaluations" / f"{name}.json"
        with contextlib.suppress(DamagedError, AttributeError):
            if read_json(path, "eval_config")["eval_config"].get("weights") == weights:
                found[name] = read_result_file(path, metric)
    return found


LabelCandidate = tuple[
    float, int, str
]  # by what labels of a latent are ordered, the largest first; the latent; its label


def latent_labels(results: dict[str, MetricResult], d_sae: int) -> dict[int, list[str]]:
    """What evaluations call a latent: the letter that absorption's probes found it to spell, autointerp's explanation,
    and the classes of texts that sparse probing found it for (`classes_told`), those that it tells best first.

    A result that was changed by hand, so that it cannot be read, is passed over.
    """
    told: list[LabelCandidate] = []
    for name, read in LABEL_SOURCES.items():
        with contextlib.suppress(ArithmeticError, AttributeError, LookupError, TypeError, ValueError):
            told += [one for one in read(results[name]) if 0 <= one[1] < d_sae] if name in results else []
    found: dict[int, list[str]] = {}
    for _, latent, text in sorted(told, key=lambda one: one[0], reverse=True):
        found.setdefault(latent, []).append(text)
    return found


def letter_labels(result: MetricResult) -> Iterator[LabelCandidate]:
    for letter in result.details:
        for latent in letter["main_latents"]:
            f1 = letter["f1_k_sparse"][len(letter["main_latents"]) - 1]
            yield math.inf, int(latent), f"first letter {letter['first_letter']} (F1 {f1:.2f})"


def explanation_labels(result: MetricResult) -> Iterator[LabelCandidate]:
    for entry in (result.extra or {}).values():
        if entry["explanation"]:
            score = "" if entry["score"] is None else f" (score {entry['score']:.2f})"
            yield math.inf, int(entry["latent"]), f"{entry['explanation']}{score}"


def class_labels(result: MetricResult) -> Iterator[LabelCandidate]:
    """Of sparse probing, the latents that tell a class by themselves: test accuracy, latent, what to call it.

    Such a latent is the one whose mean differs most between texts of the class and others, and is larger for the class.
    The probe on it alone must be right on more than TELLING of all such texts: its 95 % interval over the test texts
    lies above. (One latent that fires in a fifth of a class's texts and in no others has 0.6.) A result of before
    latents were kept tells none.
    """
    for name, scores in (result.extra or {}).items():
        dataset = name.removesuffix("_results")
        for label, chosen in scores.get("sae_top_1_latents", {}).items():
            accuracy = scores["sae_top_1_test_accuracy"][label]
            ((latent, difference),) = chosen.items()
            if difference > 0 and wilson_interval(accuracy, result.n["test_texts_per_task"])[0] > MIN_PROBE_ACCURACY:
                text = f"{class_name(dataset, label)} (class of {dataset}, accuracy {accuracy:.2f})"
                yield accuracy, int(latent), text


LABEL_SOURCES = {
    "absorption": letter_labels, "autointerp": explanation_labels, "sparse_probing": class_labels,
    "sparse_probing_stdlib": class_labels,
}  # fmt: skip


def check_latents(latents: Sequence[int], d_sae: int, name: str) -> None:
    """UsageError unless every one is a latent."""
    for latent in latents:
        if not 0 <= latent < d_sae:
            raise UsageError(f"{name} has latents 0 to {d_sae - 1:,}; there is no latent {latent}.")


@torch.no_grad()
def encode_prompt(open_run: InspectedRun, prompt: str) -> tuple[list[int], Tensor]:
    """The token ids of a prompt (S,) as the model reads it, and the activations there (S, F), zero at special tokens.

    Raises UsageError for a prompt without tokens, or longer than the model reads.
    """
    ids = open_run.ctx.tokenizer(prompt.encode("utf-8", "replace").decode(), verbose=False)["input_ids"]
    kept = [token not in open_run.ctx.special_ids for token in ids]
    if not any(kept):
        raise UsageError("--prompt has no tokens. Give it some text.")
    most = getattr(open_run.ctx.model.config, "max_position_embeddings", len(ids))
    if len(ids) > most:
        raise UsageError(f"--prompt has {len(ids):,} tokens, and the model reads {most:,}. Give a shorter one.")
    device = open_run.ctx.model.device
    x_SD = open_run.ctx.model.capture_hooks(torch.tensor([ids], device=device), [open_run.hook])[open_run.hook][0]
    f_SF = torch.cat([encode_float32(open_run.sae, part) for part in x_SD.split(TOKENS_PER_ENCODE)])
    if not torch.isfinite(f_SF).all():
        raise SaeError("The SAE gives activations on this prompt that are not finite, so there is nothing to show.")
    return ids, torch.where(torch.tensor(kept, device=device)[:, None], f_SF, 0).cpu()


def training_record(open_run: InspectedRun) -> dict[str, Any]:
    """What the run says of its training: run.json, or {} where the SAE came without one."""
    path = open_run.folder / "run.json"
    return read_json(path) if path.exists() else {}
