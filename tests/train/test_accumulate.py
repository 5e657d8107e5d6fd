"""Training on a batch in N parts gives the weights of one part up to rounding, for every recipe that allows it."""

import json
from pathlib import Path

import pytest
import torch

from sae.common.errors import UsageError
from sae.common.files import read_json
from sae.common.schemas import RUN_RECORD
from sae.train.accumulate import reasons_against
from sae.train.loop import Trainer
from sae.train.memory import RunMemory, run_memory
from sae.train.passes import Resized
from sae.train.plan import plan_training
from sae.train.recipe import RECIPES, find_recipe
from sae.train.variant import RunConfig

from ..recipes import SOME
from ..run_records import change_record
from .runs import make_config, train

find_recipe("relu")  # registers them all
REFUSED = {
    "decorrelation": "correlations of latents are those of the whole batch",
    **{name: "pairs of latents are counted" for name in RECIPES if name.startswith("competition")},
    **{name: "utilization of latents" for name in RECIPES if name.startswith("progressive")},
    **{f"collapse-{number:02d}": "the entropy is computed from shares" for number in range(4, 11)},
}
for _baseline in ("competition-baseline", "progressive-baseline"):
    del REFUSED[_baseline]
ACCEPTED = sorted(RECIPES.keys() - REFUSED.keys())
READINGS = [
    "relu pre_bias=false", "topk multi=0.125", "topk k_anneal_steps=6", "batchtopk k_anneal_steps=6", "batchtopk aux=0",
    "collapse-03 loss_units=fvu", "collapse-baseline importance=loss_ema", "collapse-baseline importance=groups",
    "hierarchical stability=mean", "hierarchical-adaptive alpha_ema=0.5",
]  # fmt: skip
STEPS, BOUND = 6, 2e-5


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in (*SOME, *READINGS[::2]) else pytest.mark.slow)
        for name in (*ACCEPTED, *READINGS)
    ],
)
@pytest.mark.parametrize("parts", [4])
def test_weights_are_those_of_one_part(name, parts, make_variant, take) -> None:
    """Weights agree to 2e-5 of the largest element of a tensor after six steps, with dead latents from the third on."""
    trainers = []
    for count in (1, parts):
        variant = make_variant(name, STEPS)
        variant.dead.after_tokens, variant.dead.every = 64, 2
        trainers.append(Trainer(variant, STEPS, "cpu", count))
    for trainer in trainers:
        list(take(trainer, range(STEPS)))
    one, other = (trainer.variant.state_dict() for trainer in trainers)
    for key, value in one.items():
        if value.is_floating_point():
            scale = float(value.abs().max()) or 1.0
            assert float((value - other[key]).abs().max()) <= BOUND * scale, key
        else:
            assert torch.equal(value, other[key]), key
    metrics, others = (trainer.pop_metrics() for trainer in trainers)
    assert metrics.keys() == others.keys()
    for key, number in metrics.items():
        assert others[key] == pytest.approx(number, rel=1e-3, abs=1e-5), key


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_other_recipes_say_why_not(name, sparse_cache) -> None:
    with pytest.raises(UsageError, match=f"{name} cannot be trained with --accumulate: .*{REFUSED[name]}"):
        plan_training(make_config(sparse_cache, name, accumulate=2))


@pytest.mark.parametrize(
    ("written", "reason"),
    [
        ("collapse-baseline batch_norm=pre", "mean and variance"),
        ("collapse-02 contrast_on=activations", "compared over the whole batch"),
        ("collapse-02 gradient_balance=1.0", "length of its gradient"),
        ("collapse-01 jl_on=activations", "projected in the whole batch"),
    ],
)
def test_options_that_need_the_whole_batch_say_so(written, reason, sparse_cache) -> None:
    name, option = written.split()
    assert plan_training(make_config(sparse_cache, name, accumulate=2)).runs
    with pytest.raises(UsageError, match=reason):
        plan_training(make_config(sparse_cache, name, accumulate=2, options=[option]))


def test_a_new_part_is_refused_until_it_says_that_it_adds_up(make_variant) -> None:
    from sae.train.step import LossTerm

    class Median(LossTerm):
        def forward(self, step):
            return step.f_BF.median()

    variant = make_variant("relu")
    assert reasons_against(variant) == []
    variant.add_term("median", 1.0, Median())
    assert reasons_against(variant) == ["not all of its losses are known to be means over tokens"]


def test_batchtopk_keeps_the_same_latents_in_parts(make_variant, batches) -> None:
    """Each part keeps the latents that its rows keep in the whole batch, not the largest of the part."""
    variant = make_variant("batchtopk", k=8)
    whole = Trainer(variant, 10, "cpu").forward(batches[0])
    seen, forward = [], type(variant).forward

    def record(self, i, x_BD, optimizer):
        step = forward(self, i, x_BD, optimizer)
        seen.append(step.f_BF.detach())
        return step

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(type(variant), "forward", record)
        Trainer(variant, 10, "cpu", 4).backward(batches[0])
    f_BF = torch.cat(seen)
    assert torch.equal(f_BF > 0, whole.f_BF > 0) and len({int((part > 0).sum()) for part in seen}) > 1
    torch.testing.assert_close(f_BF, whole.f_BF)
    assert variant.sae.activation[0].cut is None


@pytest.mark.slow
def test_a_step_in_parts_takes_less_memory() -> None:
    def memory(parts: int) -> RunMemory:
        return run_memory(
            Resized(find_recipe("topk"), {}, None, RunConfig(64, 512, 100, 1024, accumulate=parts)), "cpu"
        )

    found = [memory(parts) for parts in (1, 2, 4, 8)]
    steps = [one.step for one in found]
    assert len({one.state for one in found}) == 1
    assert steps == sorted(steps, reverse=True) and steps[-1] < steps[0] / 3


# --- runs -----------------------------------------------------------------------------------------------------------


def test_the_number_of_parts_belongs_to_the_run(sparse_cache, tmp_path: Path) -> None:
    folders = [
        train(make_config(sparse_cache, "batchtopk", accumulate=parts, out=tmp_path / str(parts), options=["k=4"]))[0]
        for parts in (None, 1, 2)
    ]
    records = [read_json(folder / "run.json") for folder in folders]
    assert [record.get("accumulate") for record in records] == [None, None, 2]
    assert folders[0].name == folders[1].name != folders[2].name
    lines = [json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1]) for folder in folders]
    assert lines[0]["threshold"] == pytest.approx(lines[2]["threshold"], rel=1e-4)
    one, other = ((folder / "sae.json").read_bytes() for folder in folders[1:])
    assert json.loads(one)["origin"]["training_tokens"] == json.loads(other)["origin"]["training_tokens"]


def test_a_run_in_parts_is_killed_and_resumed_bit_for_bit(sparse_cache, tmp_path: Path) -> None:
    sizes = dict(accumulate=4, options=["k=4"])
    (whole,) = train(make_config(sparse_cache, "batchtopk", out=tmp_path / "whole", **sizes))
    config = make_config(sparse_cache, "batchtopk", out=tmp_path / "out", **sizes)
    from sae.train.progress import TrainProgress

    def stop(step: int, *_: object) -> None:
        if step == 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(config, TrainProgress(step=stop))
    (folder,) = train(config)
    assert (folder / "sae.safetensors").read_bytes() == (whole / "sae.safetensors").read_bytes()


def test_a_run_goes_on_in_its_last_number_of_parts(sparse_cache, tmp_path: Path) -> None:
    config = make_config(sparse_cache, "batchtopk", out=tmp_path, options=["k=4"])
    (folder,) = train(config)
    change_record(RUN_RECORD, folder / "run.json", {"accumulate_since": [[4, 2], [8, 4]]})
    (folder / "sae.json").unlink()
    assert plan_training(config).runs[0].config.accumulate == 4


@pytest.mark.parametrize(
    ("sizes", "match"),
    [
        ({"accumulate": 3}, "--accumulate 3 does not divide a batch of 64 tokens into equal parts. Give a divisor"),
        ({"accumulate": 128}, "does not divide a batch of 64 tokens"),
        ({"accumulate": 2, "compiled": True}, "--accumulate cannot be combined with --compile"),
    ],
)
def test_impossible_parts_are_rejected(sparse_cache, sizes, match) -> None:
    with pytest.raises(UsageError, match=match):
        plan_training(make_config(sparse_cache, "relu", **sizes))
