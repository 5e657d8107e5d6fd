"""benchmarks/equal_l0.py compares systems at equal L0, paired by seed."""

import runpy
from pathlib import Path

import pytest

from sae.common.errors import UsageError
from sae.common.schemas import SAE_RECORD
from sae.evaluate.compared_runs import ComparedRun
from sae.evaluate.metrics.base import MetricResult

SCRIPT = runpy.run_path(str(Path(__file__).parents[2] / "benchmarks" / "equal_l0.py"))


def trained(tmp_path, variant, seed, kl=None, pre_bias=False, **resolved):
    folder = tmp_path / f"{variant}-{seed}-{kl}"
    folder.mkdir()
    spec = {"format": 1, "d_in": 1, "d_sae": 1, "pre_bias": pre_bias, "activation": [{"name": "relu"}]}
    SAE_RECORD.write(folder / "sae.json", {**spec, "sha256": "0" * 64, "origin": {}})
    core = {} if kl is None else {"core": MetricResult({"model_behavior_preservation": {"kl_div_score": kl}})}
    record = {"variant": variant, "layer": 12, "seed": seed, "resolved": {"lr": 3e-4, **resolved}}
    return ComparedRun(folder.name, folder, {}, record, core, {})


def test_a_pair_of_which_one_was_not_measured_has_no_sign(tmp_path):
    made = [trained(tmp_path, "batchtopk", seed, kl) for seed, kl in enumerate((0.9, 0.8, 0.7))]
    made += [trained(tmp_path, "topk", seed, kl) for seed, kl in enumerate((0.8, 0.7, None))]
    ((one, other, *cells, _, sign, differs),) = SCRIPT["lines"](
        SCRIPT["index_runs"](made), [12], [("core", "kl_div_score")]
    )
    assert (one, other, sign, differs) == ("`batchtopk`", "`topk`", "2 of 2", "")
    assert cells[0].startswith("0.1000")


def test_what_differs_beside_the_mechanism_is_told(tmp_path):
    one = trained(tmp_path, "topk", 0, pre_bias=True, weight_decay=0.0, k=32)
    one.record["resolved"]["lr"] = 1e-3
    other = trained(tmp_path, "progressive-baseline", 0, weight_decay=0.01, l1=0.04)
    assert SCRIPT["other_differences"](one, other) == ["lr", "weight_decay", "pre_bias"]
    assert SCRIPT["other_differences"](one, one) == []


def test_two_runs_in_one_place_are_refused(tmp_path):
    two = [trained(tmp_path, "competition", 0, kl) for kl in (0.1, 0.2)]
    with pytest.raises(UsageError, match="the same recipe, layer and seed"):
        SCRIPT["index_runs"](two)
