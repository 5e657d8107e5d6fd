"""Open a run to inspect its latents. An opened run consists of the SAE, the model, held-out text, and the labels that
evaluations gave to latents."""

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...cache.hooks import Hook
from ...cache.outliers import outlier_mask
from ...common.device import resolve_device, resolve_dtype
from ...common.errors import DamagedError, SaeError, UsageError, warn_left_out
from ...common.evaluation_schemas import RESULT_RECORD
from ...common.formatting import format_count
from ...harvest.architectures import check_layers, hook_width
from ...train.sae import SAE, load_sae, read_run_record, require_result_of
from ..compared_runs import ComparedRun, read_references
from ..context import EvalContext
from ..datasets.labeled import class_name
from ..inputs import check_tokens, find_eval_cache, make_context, row_of_run
from ..metrics.activation_examples import TokenText
from ..metrics.base import MetricResult, outlier_flags
from ..metrics.explanation_scores import BALANCED_SCORES
from ..metrics.packing import TOKENS_PER_ENCODE, encode_float32
from ..metrics.registry import METRICS
from ..results import read_result_record, result_of
from ..rows import EvalRow, notes_beside
from ..statistics import proportion_interval
from ..tables import describe_model
from .stats import LatentStats

DEFAULT_TOKENS = 100_000  # number of tokens of held-out text
MIN_PROBE_ACCURACY = 0.6  # accuracy of a one-latent probe above which the latent gets the label; chance is 0.5

# One label, as (sort key, latent, text). Labels are sorted with the largest key first.
LabelCandidate = tuple[float, int, str]


@dataclass(frozen=True)
class InspectedRun:
    """A run that has been opened for inspection.

    Attributes:
        hook: where the SAE reads.
        row: the row of the run, with the results that were measured with these weights.
        compared: the run and the settings of its results, in the form that comparisons with other runs use.
        labels: latent -> its labels from evaluations (`latent_labels`).
    """

    folder: Path
    sae: SAE
    hook: Hook
    ctx: EvalContext
    token_text: TokenText
    row: EvalRow
    compared: ComparedRun
    labels: dict[int, list[str]]

    @property
    def where(self) -> str:
        """Where the SAE reads: `blocks.12.hook_resid_post of gemma-2-mini (7637a2a4)`."""
        return f"{self.hook.name} of {describe_model(self.sae.origin['model'])}"

    @property
    def norm_limit(self) -> float | None:
        """Activations with a larger norm are outlier rows. No latent counts as firing at an outlier row."""
        return self.row.target.norm_limit

    @property
    def tokens(self) -> int:
        """The number of tokens of the text, including special ones."""
        return int(self.ctx.contexts.length.sum())


def open_run(
    folder: Path, tokens: int | None = None, device: str = "auto", dtype: str = "auto", model: str | None = None
) -> InspectedRun:
    """Open a run folder for inspection. About `tokens` tokens of the held-out text of its cache are used.

    `model` is the model's folder, if it has moved since the harvest.

    Raises UsageError if the folder is not a trained run or if its cache is missing, and DamagedError if the files in
    the folder contradict each other.
    """
    check_tokens(tokens)
    device = resolve_device(device)
    sae = load_sae(folder)
    cache = find_eval_cache(folder, sae, model=model)
    tokens = DEFAULT_TOKENS if tokens is None else tokens
    ctx = make_context(
        cache, tokens=tokens, device=device, dtype=resolve_dtype(dtype, device), model=model, origin=sae.origin
    )
    hook = Hook.from_record(sae.origin)
    try:
        check_layers(ctx.model_config, [hook.layer], cache.model)
    except UsageError as error:
        raise DamagedError(f"{folder}/sae.json was overwritten: {error}") from None
    if (width := hook_width(hook, ctx.model_config)) != sae.d_in:
        raise DamagedError(
            f"The SAE in {folder} takes activations of width {sae.d_in}, but {hook} of the model has width {width}."
        )
    row = row_of_run(folder, sae, cache)
    results, settings = read_results(row)
    row.results |= results
    compared = compared_run(row, settings)
    row.notes = notes_of_run(row, compared)
    sae.to(device)
    labels = latent_labels(row.results, sae.d_sae)
    return InspectedRun(folder, sae, hook, ctx, TokenText(ctx.tokenizer), row, compared, labels)


def read_results(row: EvalRow) -> tuple[dict[str, MetricResult], dict[str, dict[str, Any]]]:
    """The results in the folder evaluations/ of a run, and the settings of each.

    A warning names the results that were damaged or belong to another SAE.
    """
    results, settings = {}, {}
    for name, metric in METRICS.items():
        path = (row.folder or Path()) / "evaluations" / f"{name}.json"
        try:
            if not path.exists():
                continue
            record = read_result_record(path, metric)
            require_result_of(row.record, record, path)
            if record["eval_config"].get("weights") != row.weights:  # unlike the tensors, this digest also covers k
                raise DamagedError(f"{path} is a result of another SAE. {RESULT_RECORD.remedy}")
            results[name], settings[name] = result_of(record, path), record["eval_config"]
        except DamagedError as error:
            warn_left_out(path, error)
    return results, settings


def compared_run(row: EvalRow, settings: dict[str, dict[str, Any]]) -> ComparedRun:
    """The row's run in the form that comparisons use. `settings` has the settings of each of the row's results."""
    folder = row.folder or Path()
    record = read_run_record(folder)
    return ComparedRun(
        row.name, folder, row.record.get("origin", {}), {**record} if record else {}, dict(row.results), settings,
        conditions=row.conditions, is_control=row.is_control, base=row.base,
    )  # fmt: skip


def notes_of_run(row: EvalRow, compared: ComparedRun) -> list[str]:
    """Sentences that compare a run's numbers with its target L0 and with the references that were measured with it."""
    if "core" not in row.results:
        return []
    try:
        references = read_references([compared])
    except DamagedError as error:
        return [*notes_beside(row, []), f"This run is not compared with the PCA: {error}"]
    return notes_beside(row, references)  # the answers at the top of the page compare the run with its controls


def latent_labels(results: dict[str, MetricResult], d_sae: int) -> dict[int, list[str]]:
    """Latent -> its labels: first letters (absorption), explanations (autointerp), classes of texts (sparse probing).

    Classes are sorted by the accuracy of the probe. Results that were edited by hand and cannot be read are skipped.
    """
    candidates: list[LabelCandidate] = []
    for name, read in LABEL_SOURCES.items():
        if name in results:
            with contextlib.suppress(ArithmeticError, AttributeError, LookupError, TypeError, ValueError):
                candidates += [one for one in read(results[name].sound) if 0 <= one[1] < d_sae]
    labels: dict[int, list[str]] = {}
    for _, latent, text in sorted(candidates, key=lambda one: one[0], reverse=True):
        labels.setdefault(latent, []).append(text)
    return labels


def letter_labels(result: MetricResult) -> Iterator[LabelCandidate]:
    """Labels for the latents that absorption's probes use to recognize the first letter of a word. Each label names the
    letter."""
    for letter in result.details:
        for latent in letter["main_latents"]:
            f1 = letter["f1_k_sparse"][len(letter["main_latents"]) - 1]
            yield math.inf, int(latent), f"first letter {letter['first_letter']} (F1 {f1:.2f})"


def explanation_labels(result: MetricResult) -> Iterator[LabelCandidate]:
    """The explanations of autointerp, with their scores."""
    for entry in (result.extra or {}).values():
        if entry["explanation"]:
            balanced = {name: entry.get(name, {}).get("balanced_accuracy") for name in BALANCED_SCORES}
            scores = {"score": entry["score"], **balanced}
            shown = ", ".join(f"{name} {score:.2f}" for name, score in scores.items() if score is not None)
            yield math.inf, int(entry["latent"]), f"{entry['explanation']}{f' ({shown})' if shown else ''}"


def class_labels(result: MetricResult) -> Iterator[LabelCandidate]:
    """The classes of texts that sparse probing can distinguish from the other texts by a single latent.

    The candidate for a class is the latent whose mean differs most between texts of the class and other texts. This
    latent gets the label if its mean is larger for the class and if a probe on this latent alone has an accuracy whose
    95 % interval over the test texts lies above MIN_PROBE_ACCURACY. (A latent that fires in a fifth of a class's texts
    and in no others has an accuracy of 0.6.) Older results do not record latents, so there are no labels from them.
    """
    for name, scores in (result.extra or {}).items():
        dataset = name.removesuffix("_results")
        for label, chosen in scores.get("sae_top_1_latents", {}).items():
            accuracy = scores["sae_top_1_test_accuracy"][label]
            ((latent, difference),) = chosen.items()
            texts = result.n["test_texts_per_task"]
            if difference > 0 and proportion_interval(round(accuracy * texts), texts)[0] > MIN_PROBE_ACCURACY:
                text = f"{class_name(dataset, label)} (class of {dataset}, accuracy {accuracy:.2f})"
                yield accuracy, int(latent), text


LABEL_SOURCES = {
    "absorption": letter_labels, "autointerp": explanation_labels, "sparse_probing": class_labels,
    "sparse_probing_stdlib": class_labels,
}  # fmt: skip


def check_latents(latents: Sequence[int], d_sae: int, name: str) -> None:
    """Raise UsageError unless the SAE has all these latents."""
    for latent in latents:
        if not 0 <= latent < d_sae:
            raise UsageError(f"There is no latent {latent}: {name} has latents 0 to {d_sae - 1:,}.")


class EncodedPrompt(NamedTuple):
    """The tokens of a prompt and the SAE's activations on them.

    Attributes:
        ids: the token ids (S,).
        f_SF: the activations of all latents, zero at special tokens and outlier rows.
        outlier_norm: position -> norm of the activations, for outlier rows.
    """

    ids: list[int]
    f_SF: Tensor
    outlier_norm: dict[int, float]


@torch.no_grad()
def encode_prompt(run: InspectedRun, prompt: str) -> EncodedPrompt:
    """Encode a prompt.

    Raises UsageError if the prompt has no tokens or is longer than the model's context.
    """
    (ids,) = run.ctx.encode_texts([prompt.encode("utf-8", "replace").decode()])
    counted = run.ctx.context_format.counted(torch.tensor(ids, dtype=torch.int64))
    if not counted.any():
        raise UsageError("--prompt has no tokens. Give it some text.")
    max_tokens = getattr(run.ctx.model.config, "max_position_embeddings", len(ids))
    if len(ids) > max_tokens:
        raise UsageError(f"--prompt has {len(ids):,} tokens, but the model reads at most {max_tokens:,}. Shorten it.")
    device = run.ctx.model.device
    x_SD = run.ctx.model.capture_hooks(torch.tensor([ids], device=device), [run.hook])[run.hook][0]
    f_SF = torch.cat([encode_float32(run.sae, part) for part in x_SD.split(TOKENS_PER_ENCODE)])
    if not torch.isfinite(f_SF).all():
        raise SaeError("Some activations of the SAE on this prompt are not finite.")
    counted_S = counted.to(device)
    outlier_S = outlier_mask(x_SD, run.norm_limit) & counted_S
    norms = {at: float(x_SD[at].float().norm()) for at in outlier_S.nonzero().flatten().tolist()}
    return EncodedPrompt(ids, torch.where((counted_S & ~outlier_S)[:, None], f_SF, 0).cpu(), norms)


def describe_outliers(run: InspectedRun, stats: LatentStats) -> str:
    """A sentence about the outlier rows of the text; empty if there are none."""
    if not (outliers := stats.activations.outliers):
        return ""
    return " ".join(
        [
            f"{format_count(outliers, 'outlier row')} with a norm over {run.norm_limit:.4g} "
            f"{'is' if outliers == 1 else 'are'} left out, because this SAE was not trained on such rows.",
            *outlier_flags(outliers, outliers + len(stats.activations.l0)),
        ]
    )


def training_record(run: InspectedRun) -> dict[str, Any]:
    """The content of run.json, or {} for an imported SAE without one."""
    record = read_run_record(run.folder)
    return {**record} if record else {}
