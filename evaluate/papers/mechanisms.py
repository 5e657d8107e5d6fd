"""Whether the mechanism that a claim is about had any effect in the runs.

In the paper's NNN.toml, a system that adds a mechanism to another system, its ablation, names that system (`adds_to`)
and the scalar in metrics.jsonl that counts how often the mechanism acted (`counter`). The mechanism was idle if the
counter was 0 at the end of every run. It was also idle if the weights of every run were equal, bit for bit, to the
weights of the ablation's run with the same layer and seed.
"""

from collections.abc import Sequence

from .claims import Claim, Paper
from .runs import SystemRun


def idle_mechanism(system: str, paper: Paper, runs: Sequence[SystemRun]) -> str:
    """A phrase with the evidence that the mechanism of a system had no effect; "" if there is no such evidence.

    `runs` are of one layer.
    """
    about = paper.systems[system]
    own = [run for run in runs if run.system == system]
    if about.counter and own:
        counts = [[line[about.counter] for line in run.log if about.counter in line] for run in own]
        if all(count and count[-1] == 0 for count in counts):
            return f"`{about.counter}` of {system} stayed 0 until the end"
    if are_equal(own, [run for run in runs if run.system == about.adds_to]):
        return f"the weights of {system} equal those of {about.adds_to}, bit for bit"
    return ""


def are_equal(runs: Sequence[SystemRun], others: Sequence[SystemRun]) -> bool:
    """Whether each run has the same weights as the other system's run with the same seed. False unless each system has
    a single recipe."""
    if len({run.recipe for run in runs}) != 1 or len({run.recipe for run in others}) != 1:
        return False
    weights = {run.seed: run.weights for run in others}
    return all(run.weights and weights.get(run.seed) == run.weights for run in runs)


def inactive_mechanism(claim: Claim, paper: Paper, runs: Sequence[SystemRun]) -> str:
    """If the mechanisms that the claim is about had no effect, a phrase that says so; else "". There are two cases in
    which a claim is about mechanisms that had no effect:

    - The claim compares two systems of one family, and all mechanisms by which they differ were idle.
    - The claim is about a system alone, or compares it with a system of another family. The system's own mechanism was
      idle, and the paper makes the same claim about the system without this mechanism: judging both claims would count
      the same run twice. The same applies to several idle mechanisms of the system.

    `runs` are of one layer.
    """
    system, against = claim.system, claim.against
    between = mechanisms_between(system, against, paper)
    if between:
        phrases = [idle_mechanism(one, paper, runs) for one in between]
        return "; ".join(phrases) if all(phrases) else ""
    phrases = []
    for one, without in zip(chain := family(system, paper), chain[1:], strict=False):
        if not (phrase := idle_mechanism(one, paper, runs)):
            return ""
        phrases.append(phrase)
        for other in paper.claims:
            same = other.system, other.metric, other.entries, other.against
            if same == (without, claim.metric, claim.entries, against):
                return f"{'; '.join(phrases)}; see {other.id}"
    return ""


def mechanisms_between(system: str, against: str, paper: Paper) -> list[str]:
    """The mechanisms by which two systems of one family differ, as the ids of the systems that add them. Empty if the
    two systems belong to different families."""
    own, other = family(system, paper), family(against, paper)
    if not set(own) & set(other):
        return []
    return [one for one in own if one not in other] + [one for one in other if one not in own]


def family(system: str, paper: Paper) -> list[str]:
    """A system and its successive ablations: the system that lacks one of its mechanisms (`adds_to`), the ablation of
    that system, and so on."""
    systems = []
    while system:
        systems.append(system)
        system = paper.systems[system].adds_to
    return systems
