"""SCR, spurious correlation removal: does ablating the latents of an unwanted attribute free a probe from it?

Of a pair of classes and a second attribute, a probe is trained where both always go together (male professors against
female nurses), so it reads the attribute along with the class. The latents that matter to a probe of the attribute are
ablated; the score is how much of the accuracy on the class comes back that the biased probe lacks against a probe of the
class itself: 0 nothing, 1 all. In the other direction the class's latents are ablated and the attribute is read.
(SHIFT of Marks et al. 2024, as SAEBench, Karvonen et al. 2025, automates it.)

All texts of a pair are in its tasks, so nothing but the probes depends on random numbers.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..datasets.labelled import BIOS, REVIEWS, load_quadrants
from .ablation import THRESHOLDS, Ablation, AblationProblem, AblationScores, DrawTask
from .base import MetricColumn
from .bootstrap import BootstrapWeights, bootstrap_interval
from .probe_readout import ProbeReadout, strongest_latents
from .probes import ProbeTask

PROBES = ("attribute", "class", "biased")
ATTRIBUTE, CLASS, BIASED = range(3)
# The texts of each probe's task: whole quadrants or their first half; (c+, a+) is PP, (c+, a-) NP.
POSITIVE = {ATTRIBUTE: ("PP/2", "PN"), CLASS: ("PP/2", "NP"), BIASED: ("PP",)}
NEGATIVE = {ATTRIBUTE: ("NP", "NN/2"), CLASS: ("PN", "NN/2"), BIASED: ("NN",)}
DIRECTIONS = {CLASS: ATTRIBUTE, ATTRIBUTE: CLASS}  # what is to be read -> whose latents are ablated
MIN_ROOM = 1e-3  # SAEBench since 2025-02-14
CLASS_NAMES = {  # of the pairs, in the names of SAEBench's results
    f"{BIOS}_class_set1": {
        "21": "professor", "13": "nurse", "1": "architect", "11": "journalist", "25": "surgeon", "22": "psychologist",
        "2": "attorney", "26": "teacher",
    },
    REVIEWS: {
        "24": "Books", "26": "CDs_and_Vinyl", "30": "Software", "6": "Electronics", "18": "Pet_Supplies",
        "11": "Office_Products", "3": "Industrial_and_Scientific", "1": "Toys_and_Games",
    },
}  # fmt: skip


@dataclass(frozen=True)
class Scr(Ablation):
    """A score is absent for a pair whose biased probe is equally bad at both tasks: neither direction is the harder."""

    datasets: tuple[str, ...] = tuple(CLASS_NAMES)

    name = "scr"
    type_id = "scr"
    title = "scr, spurious correlation removal by number of latents ablated (0: nothing, 1: all of the bias)"
    category = "scr_metrics"
    columns = tuple(
        MetricColumn(f"SCR {n}", "scr_metrics", f"scr_metric_threshold_{n}", ".3f", "up", 0, 1) for n in THRESHOLDS
    )

    def problems(self, dataset: str, data: Path | None) -> Iterator[AblationProblem]:
        found = load_quadrants(dataset, data, self.train_set_size, self.test_set_size)
        for pair, texts in found.items():
            labels = "_".join(CLASS_NAMES.get(dataset, {}).get(label, label) for label in pair)
            yield AblationProblem(f"{dataset}_scr_{labels}_results", texts, PROBES, self.task)

    def quadrant_task(self, split: str, probe: int, _: torch.Generator) -> ProbeTask:
        return quadrant_task({"train": self.train_set_size, "test": self.test_set_size}[split] // 4, probe)

    def effects(self, difference_PF: Tensor, align_FP: Tensor) -> Tensor:
        return (difference_PF * align_FP.T).abs()

    def scores(
        self,
        problem: AblationProblem,
        readout: ProbeReadout,
        effect_PF: Tensor,
        draw: DrawTask,
        resample: BootstrapWeights,
        mode: str,
    ) -> AblationScores:
        tasks = problem.fixed("test")

        def accuracy(logit_NP: Tensor, probe: int, target: int) -> Tensor:
            return resample.accuracy(logit_NP[:, probe], tasks[target])

        biased = {target: accuracy(readout.logit_NP, BIASED, target) for target in DIRECTIONS}
        clean = {target: accuracy(readout.logit_NP, target, target) for target in DIRECTIONS}
        ablated = {
            target: {
                n: accuracy(readout.ablated(strongest_latents(effect_PF[spurious], n)), BIASED, target)
                for n in self.thresholds
            }
            for target, spurious in DIRECTIONS.items()
        }
        extra = {
            PROBES[target]: {"own_probe": float(clean[target][0]), "biased_probe": float(biased[target][0])}
            for target in DIRECTIONS
        }
        return AblationScores(scr_scores(biased, clean, ablated, mode), extra, pair_flags(biased, clean))


def quadrant_task(size: int, probe: int) -> ProbeTask:
    """All the texts of a probe's task, in quadrants PP and NN of 2 * size texts, NP and PN of size."""
    starts = {"PP": 0, "NN": 2 * size, "NP": 4 * size, "PN": 5 * size}

    def rows(quadrants: Sequence[str]) -> Tensor:
        lengths = {"PP": 2 * size, "NN": 2 * size}
        return torch.cat([starts[name[:2]] + torch.arange(lengths.get(name, size)) for name in quadrants])

    positive, negative = rows(POSITIVE[probe]), rows(NEGATIVE[probe])
    return ProbeTask(
        torch.cat([positive, negative]), torch.cat([torch.ones(len(positive)), torch.zeros(len(negative))])
    )


def scr_scores(
    biased: Mapping[int, Tensor], clean: Mapping[int, Tensor], ablated: Mapping[int, Mapping[int, Tensor]], mode: str
) -> dict[str, Tensor]:
    """Scores (R,) by name from accuracies (R,) on each target: of the biased probe, of the target's own, and of the
    biased probe without the n latents of the other task. The metric is the score of the target that the biased probe
    is worse at; where it is equally bad at both there is none. Without room to improve a score is 0; in mode 2024-12 it
    is the quotient whatever that is, and absent where it is 0/0.
    """
    found = {}
    for number, target in enumerate(DIRECTIONS, 1):
        other = next(task for task in DIRECTIONS if task != target)
        room_R = clean[target] - biased[target]
        for n, after_R in ablated[target].items():
            score_R = (after_R - biased[target]) / room_R
            if mode != "2024-12":
                score_R = torch.where(room_R < MIN_ROOM, 0.0, score_R)
            if score_R[0].isfinite():
                found[f"scr_dir{number}_threshold_{n}"] = score_R
                if biased[target][0] < biased[other][0]:
                    found[f"scr_metric_threshold_{n}"] = score_R
    return found


def pair_flags(biased: Mapping[int, Tensor], clean: Mapping[int, Tensor]) -> list[str]:
    """Why the scores of a pair may mean little."""
    if biased[CLASS][0] == biased[ATTRIBUTE][0]:
        return ["the biased probe is equally good at both tasks, so this pair has no scr_metric."]
    target = min(DIRECTIONS, key=lambda target: float(biased[target][0]))
    room_R = clean[target] - biased[target]
    low, high = bootstrap_interval(room_R)
    if low >= MIN_ROOM:
        return []
    return [
        f"the biased probe is not surely worse at the {PROBES[target]} than the probe of it (by {float(room_R[0]):.3f}, "
        f"95 %: {low:.3f} to {high:.3f}), and scores are shares of that difference."
    ]


@dataclass(frozen=True)
class ScrStdlib(Scr):
    """The same on a stand-in for the Hub: pieces of the standard library on two subjects, docstrings or code."""

    datasets: tuple[str, ...] = ("stdlib/subject",)
    train_set_size: int = 400
    test_set_size: int = 240

    name = "scr_stdlib"
    title = Scr.title + ", of the standard library"
