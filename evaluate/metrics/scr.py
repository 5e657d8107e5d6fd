"""SCR, spurious correlation removal: does ablating the latents of an unwanted attribute remove a probe's bias from it?

Higher is better: 0 means no effect, 1 means that all of the bias is removed.

A *biased* probe is trained on texts of two classes in which a second attribute always coincides with the class (male
professors and female nurses), so it also reads the attribute. The biased probe is therefore less accurate on the class
than a probe that is trained on the class alone. The latents that matter most to a probe of the attribute are ablated.
The score is the share of the accuracy gap between the biased and the unbiased probe that the ablation closes. In the
other direction, the latents of the class are ablated and the accuracy on the attribute is measured.

Source: SHIFT of Marks et al. 2024, as automated by SAEBench 0.6.0, `evals/scr_and_tpp` (Karvonen et al. 2025). The
tasks of a pair of classes contain all of its texts, so only the probes depend on random numbers. Ablation is computed
without decoding (probe_readout), and every score has a bootstrap interval.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..datasets.labeled import BIOS, REVIEWS, find_dataset, load_quadrants
from .ablation import THRESHOLDS, Ablation, AblationProblem, AblationScores, DrawTask
from .base import MetricColumn
from .bootstrap import BootstrapWeights, bootstrap_interval
from .probe_readout import ProbeReadout, strongest_latents
from .probes import ProbeTask

PROBES = ("attribute", "class", "biased")
ATTRIBUTE, CLASS, BIASED = range(3)
# The texts of each probe's task, by quadrant of class and attribute: (c+, a+) is PP, (c+, a-) is NP, (c-, a+) is PN and
# (c-, a-) is NN. "/2" means the first half of a quadrant.
POSITIVE = {ATTRIBUTE: ("PP/2", "PN"), CLASS: ("PP/2", "NP"), BIASED: ("PP",)}
NEGATIVE = {ATTRIBUTE: ("NP", "NN/2"), CLASS: ("PN", "NN/2"), BIASED: ("NN",)}
DIRECTIONS = {CLASS: ATTRIBUTE, ATTRIBUTE: CLASS}  # task to read -> task whose latents are ablated
MIN_ROOM = 1e-3  # missing accuracy below which the score is 0, as in SAEBench since 2025-02-14
CLASS_NAMES = {  # as in the names of SAEBench's results
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
    """`scr_metric` is the score of the harder direction. A pair of classes has no `scr_metric` if its biased probe is
    equally bad at both tasks."""

    datasets: tuple[str, ...] = tuple(CLASS_NAMES)

    name = "scr"
    type_id = "scr"
    title = "scr, spurious correlation removal by number of latents ablated (0: nothing, 1: all of the bias)"
    category = "scr_metrics"
    caveat = (
        "Do not rank SAEs by SCR: when many latents are ablated, it falls although the ground truth rises (Are SAE "
        "Benchmarks Reliable?, arXiv 2605.18229)."
    )
    columns = tuple(
        MetricColumn(f"SCR {n}", "scr_metrics", f"scr_metric_threshold_{n}", ".3f", "up", 0, 1) for n in THRESHOLDS
    )

    def count_texts(self, dataset: str) -> int:
        of_a_pair = 6 * (
            self.train_set_size // 4 + self.test_set_size // 4
        )  # PP and NN get 2 quarters of a set's texts each, NP and PN 1 quarter each
        return len(getattr(find_dataset(dataset), "pairs", ())) * of_a_pair

    def problems(self, dataset: str, data: Path | None) -> Iterator[AblationProblem]:
        for pair, texts in load_quadrants(dataset, data, self.train_set_size, self.test_set_size).items():
            names = "_".join(CLASS_NAMES.get(dataset, {}).get(label, label) for label in pair)
            yield AblationProblem(f"{dataset}_scr_{names}_results", texts, PROBES, self.draw)

    def draw(self, split: str, probe: int, _: torch.Generator) -> ProbeTask:
        return quadrant_task({"train": self.train_set_size, "test": self.test_set_size}[split] // 4, probe)

    def effects(self, difference_PF: Tensor, align_FP: Tensor) -> Tensor:
        return (difference_PF * align_FP.T).abs()

    def scores(
        self,
        problem: AblationProblem,
        readout: ProbeReadout,
        effect_PF: Tensor,
        draw_task: DrawTask,
        bootstrap: BootstrapWeights,
        mode: str,
    ) -> AblationScores:
        tasks = problem.fixed_tasks("test")

        def accuracy(logit_NP: Tensor, probe: int, task: int) -> Tensor:
            return bootstrap.accuracy(logit_NP[:, probe], tasks[task])

        biased = {task: accuracy(readout.logit_NP, BIASED, task) for task in DIRECTIONS}
        clean = {task: accuracy(readout.logit_NP, task, task) for task in DIRECTIONS}
        ablated = {
            task: {
                n: accuracy(readout.ablate(strongest_latents(effect_PF[spurious], n)), BIASED, task)
                for n in self.thresholds
            }
            for task, spurious in DIRECTIONS.items()
        }
        extra = {
            PROBES[task]: {"own_probe": float(clean[task][0]), "biased_probe": float(biased[task][0])}
            for task in DIRECTIONS
        }
        return AblationScores(scr_scores(biased, clean, ablated, mode), extra, pair_flags(biased, clean))


def quadrant_task(size: int, probe: int) -> ProbeTask:
    """The task of a probe. The quadrants PP and NN have 2 * size texts each; NP and PN have `size` texts each."""
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
    """The scores of a pair of classes: name -> values (R,). They are computed from accuracies (R,) on each task.

    `biased` is the accuracy of the biased probe, `clean` is the accuracy of the task's own probe, and
    `ablated[task][n]` is the accuracy of the biased probe without n latents of the other task. `scr_metric` is the
    score of the task at which the biased probe is worse; if it is equally bad at both, there is no `scr_metric`. A
    score is 0 if `clean` exceeds `biased` by less than MIN_ROOM. In mode 2024-12, a score is always the quotient, and
    0/0 gives no score.
    """
    scores = {}
    for number, task in enumerate(DIRECTIONS, 1):
        other = DIRECTIONS[task]
        room_R = clean[task] - biased[task]
        for n, after_R in ablated[task].items():
            score_R = (after_R - biased[task]) / room_R
            if mode != "2024-12":
                score_R = torch.where(room_R < MIN_ROOM, 0.0, score_R)
            if score_R[0].isfinite():
                scores[f"scr_dir{number}_threshold_{n}"] = score_R
                if biased[task][0] < biased[other][0]:
                    scores[f"scr_metric_threshold_{n}"] = score_R
    return scores


def pair_flags(biased: Mapping[int, Tensor], clean: Mapping[int, Tensor]) -> list[str]:
    """Sentences that say why the scores of a pair may not be meaningful."""
    if biased[CLASS][0] == biased[ATTRIBUTE][0]:
        return ["the biased probe is equally good at both tasks, so this pair has no scr_metric."]
    harder = min(DIRECTIONS, key=lambda task: float(biased[task][0]))
    room_R = clean[harder] - biased[harder]
    low, high = bootstrap_interval(room_R)
    if low >= MIN_ROOM:
        return []
    return [
        f"at the {PROBES[harder]}, the biased probe is not clearly worse than that task's own probe (by "
        f"{float(room_R[0]):.3f}, 95 %: {low:.3f} to {high:.3f}), but the scores are shares of this difference."
    ]


@dataclass(frozen=True)
class ScrStdlib(Scr):
    """The same metric on texts from Python's standard library. This metric needs no download.

    The classes of a pair are two subjects. The attribute is whether a text is a docstring or code.
    """

    datasets: tuple[str, ...] = ("stdlib/subject",)
    train_set_size: int = 400
    test_set_size: int = 240

    name = "scr_stdlib"
    title = Scr.title + ", of the standard library"
