"""TPP, targeted probe perturbation: does ablating the latents of one class hurt the probe of that class alone?

Of each class of a dataset, a probe against the other classes, and the latents that matter to it. Ablating those of one
class, the intended difference is how much accuracy its own probe loses, the unintended one how much the other probes
lose on the mean; the metric is intended minus unintended. (SAEBench, Karvonen et al. 2025.)
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from ..datasets.labelled import BIOS, REVIEWS, Texts, load_texts
from .ablation import THRESHOLDS, Ablation, AblationProblem, AblationScores, DrawTask
from .base import MetricColumn
from .bootstrap import BootstrapWeights
from .probe_readout import ProbeReadout, strongest_latents
from .probes import ProbeTask, one_vs_rest_task

MIN_CLEAN_ACCURACY = 0.6  # accuracy; 0.5 is chance


@dataclass(frozen=True)
class Tpp(Ablation):
    """The texts are those of sparse probing. Each evaluation of an ablation draws negatives (with rng="saebench")."""

    datasets: tuple[str, ...] = (f"{BIOS}_class_set1", REVIEWS)

    name = "tpp"
    type_id = "tpp"
    title = "tpp, targeted probe perturbation by number of latents ablated (accuracy lost by the class's probe alone)"
    category = "tpp_metrics"
    columns = tuple(
        MetricColumn(f"TPP {n}", "tpp_metrics", f"tpp_threshold_{n}_total_metric", ".3f", "up", 0, 0.5)
        for n in THRESHOLDS
    )

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
        draw: DrawTask,
        resample: BootstrapWeights,
        mode: str,
    ) -> AblationScores:
        clean, ablated = self.clean(problem, readout, resample), self.ablated(readout, effect_PF, draw, resample)
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
            f"the probe of {label} is right on {float(clean_R[0]):.3f} of its texts, so it has little to lose."
            for label, clean_R in zip(problem.probes, clean, strict=True)
            if clean_R[0] < MIN_CLEAN_ACCURACY
        ]
        return AblationScores(values, extra, flags)

    def clean(self, problem: AblationProblem, readout: ProbeReadout, resample: BootstrapWeights) -> list[Tensor]:
        """Each probe's accuracy (R,) on its own task, with nothing ablated."""
        return [resample.accuracy(readout.logit_NP[:, c], task) for c, task in enumerate(problem.fixed("test"))]

    def ablated(
        self, readout: ProbeReadout, effect_PF: Tensor, draw: DrawTask, resample: BootstrapWeights
    ) -> list[dict[int, list[Tensor]]]:
        """For each class, and each number of its latents that are ablated, every probe's accuracy (R,)."""
        found: list[dict[int, list[Tensor]]] = [{} for _ in effect_PF]
        for by_n, effect_F in zip(found, effect_PF, strict=True):
            for n in self.thresholds:
                logit_NP = readout.ablated(strongest_latents(effect_F, n))
                by_n[n] = [resample.accuracy(logit_N, draw(probe)) for probe, logit_N in enumerate(logit_NP.T)]
        return found


def draw_task(texts: Texts, split: str, probe: int, generator: torch.Generator) -> ProbeTask:
    counts = {label: len(own) for label, own in texts[split].items()}
    return one_vs_rest_task(counts, list(counts)[probe], generator)


def class_scores(own: int, clean: Sequence[Tensor], ablated: dict[int, list[Tensor]]) -> dict[str, Tensor]:
    """Scores (R,) by name of one class, from the accuracies (R,) of every class's probe, without and with ablation."""
    found = {}
    for n, after in ablated.items():
        lost = [before_R - after_R for before_R, after_R in zip(clean, after, strict=True)]
        intended = lost.pop(own)
        unintended = torch.stack(lost).mean(0)
        found[f"tpp_threshold_{n}_total_metric"] = intended - unintended
        found[f"tpp_threshold_{n}_intended_diff_only"] = intended
        found[f"tpp_threshold_{n}_unintended_diff_only"] = unintended
    return found


@dataclass(frozen=True)
class TppStdlib(Tpp):
    """The same on stand-ins for the Hub, made of the standard library."""

    datasets: tuple[str, ...] = ("stdlib/library", "stdlib/subject")
    train_set_size: int = 400
    test_set_size: int = 200

    name = "tpp_stdlib"
    title = Tpp.title + ", of the standard library"
