"""Compare the settings of runs, read from their records, with the settings that the paper prints."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..compared_pairs import ALL_PAIRS, compared_pairs
from ..tables import describe_model
from .claims import Paper, PaperSetup
from .runs import SystemRun

NOT_PRINTED = "not printed"
MAX_VALUES = 4  # maximum number of values of a setting that are listed
L1_WARMUP_SHARE = 20  # by default, the warm-up of a penalty takes a 20th of the run, as in sae.train.variant


@dataclass(frozen=True)
class Setting:
    """One setting: the paper's printed value, our value, and whether the two differ."""

    name: str
    printed: str
    ours: str
    differs: bool


@dataclass(frozen=True)
class SettingRow:
    """One setting. `printed` is the paper's value, or None if the paper prints no value; in this case, runs are
    compared with `unprinted`. `ours` reads a run's value, and `show` formats a value."""

    name: str
    printed: Any
    ours: Callable[[SystemRun], Any]
    show: Callable[[Any], str] = str
    unprinted: Any = None


def compare_settings(paper: Paper, runs: Sequence[SystemRun]) -> list[Setting]:
    """Every setting by which runs and paper can be compared. Settings that are not recorded by any run are left out."""
    if not runs:
        return []
    settings = [layer_setting(paper, runs), width_setting(paper, runs)]
    for row in setting_rows(paper.setup):
        systems: dict[Any, list[str]] = {}  # value -> the systems that have it
        for run in runs:
            if (value := row.ours(run)) is not None:
                systems.setdefault(value, [])
                systems[value] += [run.system] if run.system not in systems[value] else []
        if systems:
            expected = row.unprinted if row.printed is None else row.printed
            printed = NOT_PRINTED if row.printed is None else row.show(row.printed)
            settings.append(Setting(row.name, printed, show_values(systems, row.show), set(systems) != {expected}))
    return settings


def show_values(systems: dict[Any, list[str]], show: Callable[[Any], str]) -> str:
    """The values, the most frequent first. Each of the other values is followed by the systems that have it."""
    ordered = sorted(systems, key=lambda value: -len(systems[value]))
    texts = [show(ordered[0]), *(f"{show(value)} ({', '.join(systems[value])})" for value in ordered[1:MAX_VALUES])]
    return "; ".join(texts) + (f"; and {len(ordered) - MAX_VALUES} more" if len(ordered) > MAX_VALUES else "")


def setting_rows(setup: PaperSetup) -> list[SettingRow]:
    """The settings that `[ran]` contains or could contain, and where to find them in run.json."""

    def option(name: str) -> Callable[[SystemRun], Any]:
        return lambda run: run.resolved.get(name)

    def plain(value: Any) -> str:
        return f"{value:,}" if isinstance(value, int) else f"{value:g}" if isinstance(value, float) else str(value)

    return [
        SettingRow("model", setup.reads_as, model_name),
        SettingRow("site", setup.site, lambda run: run.run.record.get("site")),
        SettingRow("steps", setup.steps, lambda run: run.run.record["steps"], plain),
        SettingRow("tokens in a batch", setup.batch_size, lambda run: run.run.record["batch_size"], plain),
        SettingRow("learning rate", setup.lr, option("lr"), plain),
        SettingRow("warm-up of the learning rate", setup.warmup, warmup, steps, 0),
        SettingRow("fall of the learning rate", None, option("decay_start"), describe_fall, 1.0),
        SettingRow("limit of the gradient norm", setup.clip, limit, lambda norm: f"{norm:g}" if norm else "none", 0.0),
        SettingRow("weight decay", describe_decay(vars(setup)), lambda run: describe_decay(run.resolved), str, "none"),
        SettingRow("initial b_dec", None, option("b_dec_init"), str, "zero"),
        SettingRow("warm-up of the L1 penalty", None, l1_warmup, steps, 0),
        SettingRow("pairs compared in a step", None, lambda run: compared_pairs(run.run.record), str, ALL_PAIRS),
        SettingRow("dataset", setup.dataset.split("/")[-1], dataset_name),
        SettingRow("context", setup.context, lambda run: run.run.origin.get("context"), plain),
    ]  # fmt: skip


def warmup(run: SystemRun) -> int | None:
    """The steps over which the learning rate rises; None if they are not recorded."""
    return run.warmup if "warmup" in run.resolved else None


def limit(run: SystemRun) -> float | None:
    """The limit of the gradient's norm; 0 if there is no limit, None if it is unknown."""
    return (run.resolved["clip"] or 0.0) if "clip" in run.resolved else None


def model_name(run: SystemRun) -> str | None:
    return describe_model(run.run.origin["model"]) if "model" in run.run.origin else None


def steps(value: int) -> str:
    return f"{value:,} steps" if value else "none"


def describe_fall(start: float) -> str:
    """A phrase that says from which point of the run the learning rate falls."""
    return "none" if start >= 1 else f"linearly to 0, starting at {start:.0%} of the run"


def describe_decay(options: Any) -> str | None:
    """A description of weight decay: its size, its form, and the parameters that it applies to; None if it is not
    recorded."""
    if (value := options.get("weight_decay")) is None:
        return None
    if not value:
        return "none"
    on, form = options.get("weight_decay_on") or "encoder", options.get("weight_decay_form") or "decoupled"
    return f"{value:g}, {form}, on {'W_enc' if on == 'encoder' else 'all parameters'}"


def l1_warmup(run: SystemRun) -> int | None:
    """The number of steps over which the L1 penalty rises; None for a recipe without L1 penalty."""
    if "l1_warmup" not in run.resolved or run.resolved.get("l1") == 0:
        return None
    given = run.resolved["l1_warmup"]
    return run.run.record["steps"] // L1_WARMUP_SHARE if given is None else given


def dataset_name(run: SystemRun) -> str | None:
    """The dataset as named by the cache's folder: <model>--<dataset>--<digest>."""
    parts = Path(str(run.run.origin.get("cache", ""))).name.split("--")
    return parts[1] if len(parts) == 3 else None


def layer_setting(paper: Paper, runs: Sequence[SystemRun]) -> Setting:
    layers = sorted({run.layer for run in runs})
    printed, ours = (", ".join(map(str, some)) for some in (paper.setup.layers, layers))
    return Setting("layer", printed, ours, set(layers) != set(paper.setup.layers))


def width_setting(paper: Paper, runs: Sequence[SystemRun]) -> Setting:
    """The widths. Widths count as different if d_sae / d_in of a run differs from d_sae / d_in of its system in the
    paper."""
    setup = paper.setup
    systems: dict[Any, list[str]] = {}
    differs = False
    for run in runs:
        width = run.run.record["d_sae"], run.run.record.get("d_in", 0)
        systems.setdefault(width, [])
        systems[width] += [run.system] if run.system not in systems[width] else []
        multiple = paper.systems[run.system].width.removesuffix("x")
        expected = float(multiple) if multiple else setup.d_sae / setup.d_in
        differs = differs or not width[1] or abs(width[0] / width[1] - expected) > 1e-6 * expected

    def show(width: tuple[int, int]) -> str:
        d_sae, d_in = width
        return f"{d_sae:,} latents" + (f" of {d_in:,} dimensions ({d_sae / d_in:g}x)" if d_in else "")

    return Setting("width", show((setup.d_sae, setup.d_in)), show_values(systems, show), differs)
