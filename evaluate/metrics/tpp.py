"""TPP, targeted probe perturbation: does ablating the latents of one class hurt only the probe of that class?

Higher is better; 0 means that there is no targeted effect.

Each class of a dataset has a probe that tells it from the other classes, and a set of latents that matter most to this
probe. When the latents of one class are ablated, the intended difference is the accuracy that the probe of this class
loses, and the unintended difference is the mean accuracy that the other probes lose. The metric is the intended minus
the unintended difference, averaged over classes.

Source: SAEBench 0.6.0, `evals/scr_and_tpp` (Karvonen et al. 2025). Ablation is computed without decoding
(probe_readout), and every score has a bootstrap interval.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from ..datasets.labeled import BIOS, REVIEWS, Texts, count_texts, load_texts
from .ablation import THRESHOLDS, Ablation, AblationProblem, AblationScores, DrawTask
from .base import MetricColumn
from .bootstrap import BootstrapWeights
from .probe_readout import ProbeReadout, strongest_latents
from .probes import ProbeTask, one_vs_rest_task

MIN_CLEAN_ACCURACY = 0.6  # a flag names probes with a lower accuracy; 0.5 is chance


@dataclass(frozen=True)
class Tpp(Ablation):
    """The texts are the same as in sparse probing. With rng="saebench", every evaluation draws new negatives."""

    datasets: tuple[str, ...] = (f"{BIOS}_class_set1", REVIEWS)

    name = "tpp"
    type_id = "tpp"
    title = (
        "tpp, targeted probe perturbation by number of latents ablated (accuracy lost by the class's own probe, "
        "minus other probes)"
    )
    category = "tpp_metrics"
    caveat = "Do not rank SAEs by TPP: it gets worse with training (Are SAE Benchmarks Reliable?, arXiv 2605.18229)."
    columns = tuple(
        MetricColumn(f"TPP {n}", "tpp_metrics", f"tpp_threshold_{n}_total_metric", ".3f", "up", 0, 0.5)
        for n in THRESHOLDS
    )

    def count_texts(self, dataset: str) -> int:
        return count_texts(dataset, self.train_set_size, self.test_set_size)

    def problems(self, dataset: str, data: Path | None) -> Iterator[AblationProblem]:
        texts = load_texts(dataset, data, self.train_set_size, self.test_set_size)
        yield AblationProblem(f"{dataset}_tpp_results", texts, tuple(texts["train"]), partial(draw_task, texts))

    def effects(self, difference_PF: Tensor, align_FP: Tensor) -> Tensor:
        return difference_PF.relu() * align_FP.T

    def scores(
        self,
        problem: AblationProblem,
        readout: ProbeReadout,
        effect_PF: Tensor,
        draw_task: DrawTask,
        bootstrap: BootstrapWeights,
        mode: str,
    ) -> AblationScores:
        clean = self.clean_accuracies(problem, readout, bootstrap)
        ablated = self.ablated_accuracies(readout, effect_PF, draw_task, bootstrap)
        per_class = [class_scores(c, clean, after) for c, after in enumerate(ablated)]
        values = {name: torch.stack([scores[name] for scores in per_class]).mean(0) for name in per_class[0]}
        extra = {
            label: {
                "clean_accuracy": float(clean_R[0]),
                **{name: float(score_R[0]) for name, score_R in scores.items()},
            }
            for label, clean_R, scores in zip(problem.probes, clean, per_class, strict=True)
        }
        flags = [
            f"the probe of {label} has an accuracy of {float(clean_R[0]):.3f}, so it has little to lose."
            for label, clean_R in zip(problem.probes, clean, strict=True)
            if clean_R[0] < MIN_CLEAN_ACCURACY
        ]
        return AblationScores(values, extra, flags)

    def clean_accuracies(
        self, problem: AblationProblem, readout: ProbeReadout, bootstrap: BootstrapWeights
    ) -> list[Tensor]:
        """Each probe's accuracy (R,) on its own task, with nothing ablated."""
        tasks = problem.fixed_tasks("test")
        return [bootstrap.accuracy(readout.logit_NP[:, c], task) for c, task in enumerate(tasks)]

    def ablated_accuracies(
        self, readout: ProbeReadout, effect_PF: Tensor, draw_task: DrawTask, bootstrap: BootstrapWeights
    ) -> list[dict[int, list[Tensor]]]:
        """For each class, a dict: number of latents ablated for this class -> the accuracies (R,) of all probes."""
        by_class: list[dict[int, list[Tensor]]] = [{} for _ in effect_PF]
        for by_n, effect_F in zip(by_class, effect_PF, strict=True):
            for n in self.thresholds:
                logit_NP = readout.ablate(strongest_latents(effect_F, n))
                by_n[n] = [bootstrap.accuracy(logit_N, draw_task(probe)) for probe, logit_N in enumerate(logit_NP.T)]
        return by_class


def draw_task(texts: Texts, split: str, probe: int, generator: torch.Generator) -> ProbeTask:
    """The task of telling the class with index `probe` from the other classes."""
    counts = {label: len(texts_of_class) for label, texts_of_class in texts[split].items()}
    return one_vs_rest_task(counts, list(counts)[probe], generator)


def class_scores(target: int, clean: Sequence[Tensor], ablated: dict[int, list[Tensor]]) -> dict[str, Tensor]:
    """The scores of the class with index `target`: name -> values (R,). They are computed from the accuracies (R,) of
    all probes before and after the latents of this class are ablated."""
    scores = {}
    for n, after in ablated.items():
        lost = [before_R - after_R for before_R, after_R in zip(clean, after, strict=True)]
        intended = lost.pop(target)
        unintended = torch.stack(lost).mean(0)
        scores[f"tpp_threshold_{n}_total_metric"] = intended - unintended
        scores[f"tpp_threshold_{n}_intended_diff_only"] = intended
        scores[f"tpp_threshold_{n}_unintended_diff_only"] = unintended
    return scores


@dataclass(frozen=True)
class TppStdlib(Tpp):
    """The same metric on texts from Python's standard library. This metric needs no download."""

    datasets: tuple[str, ...] = ("stdlib/library", "stdlib/subject")
    train_set_size: int = 400
    test_set_size: int = 200

    name = "tpp_stdlib"
    title = Tpp.title + ", of the standard library"
