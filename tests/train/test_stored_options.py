"""A run that has been started keeps its options, whatever the defaults are when it is resumed."""

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from sae.common.errors import DamagedError, UsageError
from sae.common.schemas import LATER_ENTRIES, RUN_RECORD
from sae.evaluate.rows import digest_without_seed
from sae.train.optimization import Optimization
from sae.train.plan import TrainConfig, plan_training
from sae.train.recipe import RECIPES, find_recipe
from sae.train.run import TrainProgress
from sae.train.scaling import ScaleWithNorm
from sae.train.stored_options import stored_options
from sae.train.variant import RunConfig

from .runs import make_config, train

OLD_RUNS = Path(__file__).parents[1] / "compatibility" / "fixtures" / "9a9a639" / "home"


@pytest.fixture
def upgrade(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """A function that replaces a registered recipe by the one that another version of this package might have."""

    def register(
        name: str,
        defaults: Mapping[str, Any] = {},
        *,
        optimization: Mapping[str, Any] = {},
        without: str = "",
        **fields: Any,
    ) -> None:
        old = RECIPES[name]

        def build(config, **options):
            variant = old.build(config, **options)
            variant.optimization = replace(variant.optimization, **optimization)
            return variant

        options = {n: value for n, value in {**old.options, **defaults}.items() if n != without}
        types = {n: type_ for n, type_ in old.types.items() if n != without}
        monkeypatch.setitem(RECIPES, name, replace(old, build=build, options=options, types=types, **fields))

    return register


def halved(config: TrainConfig) -> tuple[Path, bytes]:
    """A run as if stopped after step 8 of 12, and the weights that it should have at its end."""
    (folder,) = train(config)
    weights = (folder / "sae.safetensors").read_bytes()
    for name in ("sae.json", "sae.safetensors"):
        (folder / name).unlink()
    shutil.rmtree(folder / "checkpoints" / "step-00000012")
    return folder, weights


def weights_of(folder: Path) -> bytes:
    return (folder / "sae.safetensors").read_bytes()


def forget(folder: Path, *names: str) -> None:
    """Remove options from a run.json, as if the run had been started before they existed."""
    record = RUN_RECORD.read(folder / "run.json")
    for name in names:
        del record["resolved"][name]
    RUN_RECORD.write(folder / "run.json", record)


@pytest.mark.parametrize("by", ["command", "--resume"])
@pytest.mark.parametrize(
    ("name", "options", "defaults", "optimization"),
    [
        ("relu", [], {"l1": 0.5, "pre_bias": False}, {}),
        ("relu", ["l1=0.1"], {"l1": 0.5}, {"lr": 3e-3, "warmup": 0, "decay_start": 0.1, "clip": None}),
        ("progressive", ["normalize=none"], {"temperature": ScaleWithNorm(0.3), "pace": 40.0}, {}),
        ("topk", [], {"k": 5, "aux": 0.0}, {"weight_decay": 0.5, "weight_decay_on": "all"}),
    ],
    ids=["defaults", "optimizer", "scaled", "k"],
)
def test_a_changed_default_does_not_alter_a_run_that_is_resumed(
    sparse_cache, tmp_path: Path, upgrade, by: str, name: str, options, defaults, optimization
) -> None:
    """Bit for bit the weights of the run that was never stopped, in the same folder; a new run has other weights."""
    config = make_config(sparse_cache, name, options=options)
    folder, weights = halved(config)
    upgrade(name, defaults, optimization=optimization)
    said: list[str] = []
    again = config if by == "command" else TrainConfig(resume=[folder], device="cpu", checkpoint_every=4)
    assert train(again, TrainProgress(say=said.append)) == [folder]
    assert weights_of(folder) == weights
    assert said[0].startswith(f"{folder.name} keeps the options that it was started with: ")
    for option in {**defaults, **optimization}:
        assert (f" {option}=" in said[0]) == (f"{option}=" not in "".join(options)), said[0]
    (new,) = train(replace(config, out=tmp_path / "new"))
    assert new.name == folder.name and weights_of(new) != weights


def test_each_seed_has_what_changed_for_it(sparse_cache, upgrade) -> None:
    config = make_config(sparse_cache, "relu")
    halved(config)
    upgrade("relu", {"l1": 0.5})
    begun, new = plan_training(replace(config, seeds=[0, 1])).runs
    assert begun.changed == {"l1": (0.04, 0.5)} and not new.changed


def test_what_changed_is_named_with_both_values_also_of_a_finished_run(sparse_cache, upgrade) -> None:
    config, said = make_config(sparse_cache, "relu"), []
    folder, _ = halved(config)
    upgrade("relu", {"l1": 0.5}, optimization={"warmup": 3})
    values = "l1=0.04 (0.5 in a new run), warmup=None (3 in a new run)"
    train(config, TrainProgress(say=said.append))
    train(config, TrainProgress(say=said.append))
    assert said == [
        f"{folder.name} keeps the options that it was started with: {values}.",
        f"{folder.name} resumes from step 8.",
        f"{folder} is already trained, with {values}.",
    ]


def test_the_plan_times_and_measures_what_will_be_trained(sparse_cache, upgrade) -> None:
    config = make_config(sparse_cache, "topk")
    halved(config)
    upgrade("topk", {"k": 5})
    plan = plan_training(config)
    assert plan.runs[0].stored is not None and plan.runs[0].stored["k"] == 32 and plan.runs[0].options == {}


def test_an_option_that_is_newer_than_the_run_does_what_was_done_before(sparse_cache, upgrade) -> None:
    """A recipe sets a new option of the optimizer, such as the coupled decay of paper 004.

    Without it, a run's decay was decoupled.
    """
    config = make_config(sparse_cache, "hierarchical-l1", options=["lr=3e-3"])
    folder, weights = halved(config)
    forget(folder, "weight_decay_form", "weight_decay_on")
    upgrade("hierarchical-l1", optimization={"weight_decay_form": "coupled", "weight_decay_on": "all"})
    said: list[str] = []
    train(config, TrainProgress(say=said.append))
    assert weights_of(folder) == weights
    assert "weight_decay_form=decoupled (coupled in a new run)" in said[0]
    assert {name: getattr(Optimization(), name) for name in ("weight_decay_form", "weight_decay_on")} == {
        "weight_decay_form": "decoupled", "weight_decay_on": "encoder",
    }  # fmt: skip


@pytest.mark.parametrize("known", [True, False], ids=["recorded", "newer"])
def test_what_paper_exact_sets_is_kept_too(sparse_cache, upgrade, known: bool) -> None:
    """`--paper-exact` of a newer version sets an option that the run has at its default or was started without."""
    config = make_config(sparse_cache, "relu", paper_exact=True)
    folder, weights = halved(config)
    if not known:
        forget(folder, "l1_warmup")
    upgrade("relu", paper_exact={"l1_warmup": (5, "a reason")})
    said: list[str] = []
    train(config, TrainProgress(say=said.append))
    assert weights_of(folder) == weights and "l1_warmup=None (5 in a new run)" in said[0]


def test_a_run_at_a_given_l0_keeps_it(sparse_cache, upgrade) -> None:
    """`--l0` is stored as k, so the resumed run is given both."""
    config = make_config(sparse_cache, "topk", l0=[6])
    folder, weights = halved(config)
    upgrade("topk", {"k": 5, "multi": 0.5})
    train(config)
    assert weights_of(folder) == weights


def test_an_option_that_the_recipe_lost_is_refused_unless_the_run_is_finished(sparse_cache, upgrade) -> None:
    config = make_config(sparse_cache, "relu")
    folder, _ = halved(config)
    upgrade("relu", without="l1_warmup")
    for again in (config, TrainConfig(resume=[folder], device="cpu")):
        with pytest.raises(UsageError, match="started with l1_warmup=None, which this version's relu does not have"):
            train(again)
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["step-00000008"]


def test_a_finished_run_with_an_option_that_the_recipe_lost_is_finished(sparse_cache, upgrade) -> None:
    config, said = make_config(sparse_cache, "relu"), []
    (folder,) = train(config)
    upgrade("relu", without="l1_warmup")
    train(config, TrainProgress(say=said.append))
    assert said == [f"{folder} is already trained."]


def test_a_value_that_an_option_no_longer_takes_is_refused(sparse_cache) -> None:
    config = make_config(sparse_cache, "relu")
    folder, _ = halved(config)
    record = RUN_RECORD.read(folder / "run.json")
    record["resolved"]["normalize"] = "rms"
    RUN_RECORD.write(folder / "run.json", record)
    with pytest.raises(UsageError, match="normalize=rms is unknown: expected one of unit_ms"):
        train(config)


def test_an_option_that_is_newer_than_the_run_is_scaled_for_the_input_that_the_run_has() -> None:
    """`temperature` is a length, so it is larger for raw rows.

    Stored values stay as they are, even an int where the option is a float.
    """
    recipe, config = find_recipe("progressive"), RunConfig(32, 128, 40, 64, variance=9.0)
    of_raw, of_unit = (recipe.make(config, {"normalize": one}).options["temperature"] for one in ("none", "unit_ms"))
    assert of_raw != of_unit
    for normalize, temperature in (("none", of_raw), ("unit_ms", of_unit)):
        options, problems = recipe.options_before(config, {"normalize": normalize, "lr": 1})
        assert (options["temperature"], problems) == (temperature, []) and type(options["lr"]) is int
    with pytest.raises(UsageError, match="lr=-1 is not positive"):
        recipe.make(config, {}, {"lr": -1.0})


def test_a_run_json_without_its_options_has_none_stored(tmp_path: Path) -> None:
    assert stored_options(None, tmp_path) is None and stored_options({"options": {"l1": 0.1}}, tmp_path) is None


def test_two_values_of_an_option_are_damage(sparse_cache) -> None:
    config = make_config(sparse_cache, "relu", options=["l1=0.1"])
    folder, _ = halved(config)
    record = RUN_RECORD.read(folder / "run.json")
    record["resolved"]["l1"] = 0.2
    RUN_RECORD.write(folder / "run.json", record)
    for again in (config, TrainConfig(resume=[folder], device="cpu")):
        with pytest.raises(DamagedError, match="run.json has two values of l1, one in `options` and one in `resolved`"):
            train(again)


@pytest.mark.parametrize("path", sorted(OLD_RUNS.glob("trained/*-L01-*/run.json")), ids=lambda path: path.parent.name)
def test_a_new_seed_of_a_run_of_an_earlier_version_is_of_the_same_system(path: Path) -> None:
    """`sae evaluate` and `sae compare` group the new seed with the old run.

    For this, each newer option has the value that keeps the old behaviour: its plain default, unless LATER_ENTRIES has
    another value.
    """
    old = json.loads(path.read_text())
    recipe = find_recipe(old["variant"])
    plain = {**asdict(Optimization()), **recipe.options}
    newer = {n: LATER_ENTRIES.get(n, v) for n, v in plain.items() if n not in old["resolved"]}
    new = old | {"seed": 7, "resolved": old["resolved"] | newer}
    assert newer and digest_without_seed(new) == digest_without_seed(old)
    # as in the command that trains more seeds
    given = {name: value for name, value in newer.items() if name in LATER_ENTRIES}
    assert digest_without_seed(new | {"options": old["options"] | given}) == digest_without_seed(old)
    for name in newer:
        assert digest_without_seed(new | {"resolved": new["resolved"] | {name: "other"}}) != digest_without_seed(old)
