"""The runs of a paper's systems: their logs, and the gates that a run must pass to count."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ...common.files import digest_of
from ...common.learning_rate import peak_share
from ...train.sae import read_sae_record
from ..compare_charts import read_metrics_log
from ..compared_runs import ComparedRun
from ..metrics.base import MetricResult

MIN_ALIVE = 0.10  # an SAE in which a smaller share of the latents fires has collapsed
VARIANCE_TOLERANCE = 0.10  # allowed difference between explained variance on held-out text and in the last steps


@dataclass(frozen=True)
class SystemRun:
    """A run of one of the paper's systems.

    Attributes:
        log: its metrics.jsonl.
        weights: digest of its SAE, equal for two runs only if their SAEs are equal bit for bit; "" if unknown.
        printed_warmup: the steps of warm-up that the paper prints, or None.
    """

    system: str
    recipe: str
    run: ComparedRun
    log: Sequence[Mapping[str, float]]
    weights: str = ""
    printed_warmup: int | None = None

    @property
    def layer(self) -> int:
        return self.run.record["layer"]

    @property
    def seed(self) -> int:
        return self.run.record["seed"]

    @property
    def resolved(self) -> Mapping[str, Any]:
        """Every option of the run, including defaults."""
        return self.run.record.get("resolved", {})

    @property
    def steps_done(self) -> int:
        return int(self.log[-1].get("step", 0)) if self.log else 0

    @property
    def warmup(self) -> int:
        """The number of steps over which the learning rate rises; by default 1,000, or a tenth of the run if that is
        less."""
        warmup = self.resolved.get("warmup")
        return min(1000, self.run.record["steps"] // 10) if warmup is None else warmup

    @property
    def peak_share(self) -> float:
        """The largest learning rate that the run reached, as a share of the peak of its schedule."""
        return peak_share(self.steps_done, self.warmup, self.resolved.get("decay_start", 1.0))

    @property
    def is_within_warmup(self) -> bool:
        """Whether the run ended before its warm-up ended."""
        return self.warmup > self.steps_done

    def failed_gates(self) -> list[str]:
        """Why nothing can be concluded from this run, as sentences; empty if it passes every gate."""
        record, core, failed = self.run.record, self.run.results.get("core"), []
        last = self.log[-1] if self.log else {}
        if record["steps"] < 1 or self.steps_done < record["steps"]:
            failed.append(f"it completed only {self.steps_done:,} of {record['steps']:,} steps")
        if self.is_within_warmup and self.warmup > (self.printed_warmup or 0):
            failed.append(f"its learning rate never reached its peak, because it has {self.warmup:,} warm-up steps")
        alive = core.sound.metrics.get("misc_metrics", {}).get("frac_alive") if core is not None else None
        if alive is None and "dead" in last:  # mode 2024-12 has no frac_alive
            alive = 1 - last["dead"]
        if alive is not None and alive < MIN_ALIVE:
            failed.append(f"{1 - alive:.0%} of its latents are dead")
        if core is not None:
            trained, held_out = last.get("explained_variance"), explained_variance(core)
            if trained is not None and held_out is not None and abs(held_out - trained) > VARIANCE_TOLERANCE:
                failed.append(
                    f"it explains {held_out:.3f} of the variance on held-out text, but {trained:.3f} in training"
                )
        return failed


def explained_variance(core: MetricResult) -> float | None:
    """1 - (sum of squared errors) / (sum of squared deviations from the mean), without outlier rows, as in training."""
    return core.sound.metrics.get("reconstruction_quality", {}).get("fve")


def load_system_run(system: str, recipe: str, run: ComparedRun) -> SystemRun:
    """A run with its log and the digest of its SAE. Reads no weights: sae.json has their checksum."""
    sae = read_sae_record(run.folder)
    weights = digest_of({key: sae[key] for key in ("sha256", "activation", "pre_bias")})
    return SystemRun(system, recipe, run, read_metrics_log(run.folder), weights)
