"""Controls: frozen weights never change by a bit and cost no gradient, and rows stay in their cones."""

import shutil

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from sae.common.errors import UsageError
from sae.train import sparse_ops
from sae.train.activation_functions import BatchTopK, TopK
from sae.train.estimate import run_bytes
from sae.train.loop import Trainer
from sae.train.mechanisms import UnitNormDecoder
from sae.train.plan import TrainConfig, plan_training
from sae.train.recipe import find_recipe
from sae.train.run import RunTrainer, TrainProgress, build_variant, prepare_trainer, run_training, set_normalization
from sae.train.sae import SAE, load_sae
from sae.train.step import Step
from sae.train.variant import RunConfig
from sae.train.variants.controls import CovarianceStart, DecoderCone

from ..runs import make_config, train

FROZEN = {"frozen-decoder": "W_dec", "frozen-encoder": "W_enc"}
CONTROLS = [*FROZEN, "soft-frozen-decoder"]
LEARNING = ("warmup=0", "lr=0.02")  # weights move far enough in twelve steps


def start_of(config: TrainConfig) -> SAE:
    """The SAE of a run before its first step. Nothing is written to disk."""
    (run,) = plan_training(config).runs
    trainer = RunTrainer(run, build_variant(run), "cpu")
    set_normalization(trainer, run.cache)
    return trainer.variant.sae


@pytest.mark.parametrize(
    "options",
    [
        (),
        ("normalize=layer_norm",),
        pytest.param(("base=topk",), marks=pytest.mark.slow),
        pytest.param(("weight_decay=0.1", "weight_decay_on=all"), marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("name", FROZEN)
def test_the_frozen_part_of_a_finished_run_has_every_bit_of_its_start(name, options, sparse_cache, tmp_path) -> None:
    """The run is trained in one pass with another run. Its tensors that are not frozen have changed."""
    settings = {"l0": [4], "options": [f"{name}.{one}" for one in (*LEARNING, *options)]}
    start = start_of(make_config(sparse_cache, name, out=tmp_path / "none", **settings))
    folder, _ = train(make_config(sparse_cache, name, "topk", out=tmp_path, **settings))
    saved = load_sae(folder)
    assert torch.equal(getattr(saved, FROZEN[name]), getattr(start, FROZEN[name]))
    moved = {"W_dec": "W_enc", "W_enc": "W_dec"}[FROZEN[name]]
    for tensor in (moved, "b_enc"):
        assert not torch.equal(getattr(saved, tensor), getattr(start, tensor)), tensor
    assert (saved.W_dec.norm(dim=1) - 1).abs().max() < 1e-6


@pytest.mark.parametrize("name", CONTROLS)
def test_the_same_after_a_kill_and_a_resume(name, sparse_cache, tmp_path) -> None:
    narrow = [] if name in FROZEN else [f"{name}.cosine=0.95"]
    config = make_config(sparse_cache, name, out=tmp_path, l0=[4], options=[*LEARNING, *narrow])
    start = start_of(config)
    (folder,) = train(config)
    whole = (folder / "sae.safetensors").read_bytes()
    for gone in ("sae.json", "sae.safetensors"):
        (folder / gone).unlink()
    shutil.rmtree(folder / "checkpoints" / "step-00000012")  # as if the run was killed after step 8
    (run,) = plan_training(config).runs
    assert prepare_trainer(run, "cpu", TrainProgress()).steps_done == 8
    train(config)
    assert (folder / "sae.safetensors").read_bytes() == whole
    saved = load_sae(folder)
    if name in FROZEN:
        assert torch.equal(getattr(saved, FROZEN[name]), getattr(start, FROZEN[name]))
    else:
        cosine_F = torch.linalg.vecdot(saved.W_dec.double(), start.W_dec.double())
        assert 0.95 - 1e-6 < cosine_F.min() < 0.96


def test_rows_of_the_soft_frozen_decoder_move_and_never_leave_their_cones(make_trainer, take) -> None:
    trainer = make_trainer("soft-frozen-decoder", k=4, cosine=0.9, lr=2e-2, warmup=0)
    free = make_trainer("batchtopk", k=4, lr=2e-2, warmup=0)
    start_FD = trainer.variant.sae.W_dec.detach().double().clone()
    assert torch.equal(start_FD, free.variant.sae.W_dec.detach().double())
    cosines = []
    for _ in zip(take(trainer, range(30)), take(free, range(30)), strict=True):
        row_FD = trainer.variant.sae.W_dec.detach().double()
        cosine_F = torch.linalg.vecdot(row_FD, start_FD)
        assert cosine_F.min() > 0.9 - 1e-6
        assert (row_FD.norm(dim=1) - 1).abs().max() < 1e-6
        cosines.append(cosine_F)
    metrics = trainer.pop_metrics()
    assert cosines[-1].max() < 1 and metrics["decoder_cosine"] == pytest.approx(float(cosines[-1].mean()), abs=1e-5)
    assert 0 < metrics["rows_at_edge"] <= float((cosines[-1] < 0.9 + 1e-6).float().mean())
    unbound_F = torch.linalg.vecdot(free.variant.sae.W_dec.detach().double(), start_FD)
    assert unbound_F.min() < 0.8, "without the cone, rows turn further than it allows"


def test_a_row_outside_its_cone_is_put_on_the_nearest_edge() -> None:
    """Rows start at (1, 0), the cosine is 0.8. (0.6, 0.8) is moved to (0.8, 0.6), and (0.28, -0.96) to (0.8, -0.6)."""
    sae = SAE(2, 4)
    sae.W_dec.data = torch.tensor([[1.0, 0.0]] * 4)
    cone = DecoderCone(sae, 0.8)
    sae.W_dec.data = torch.tensor([[0.6, 0.8], [0.28, -0.96], [0.96, 0.28], [-1.2, 1.6]])
    step = Step(torch.tensor(0), sae, None, *[torch.zeros(1, 2)] * 4)
    with torch.no_grad():
        cone.after_step(step)
    expected = torch.tensor([[0.8, 0.6], [0.8, -0.6], [0.96, 0.28], [0.8, 0.6]])
    torch.testing.assert_close(sae.W_dec.data, expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(cone.start_FD, torch.tensor([[1.0, 0.0]] * 4))
    assert float(cone.at_edge) == 0.75 and float(cone.mean_cosine) == pytest.approx((3 * 0.8 + 0.96) / 4)


def test_a_cone_that_no_row_leaves_changes_no_bit(make_trainer, take) -> None:
    free, bound = make_trainer("batchtopk", k=4), make_trainer("soft-frozen-decoder", k=4, cosine=0.0)
    for _ in zip(take(free, range(8)), take(bound, range(8)), strict=True):
        assert torch.equal(free.variant.sae.W_dec, bound.variant.sae.W_dec)
    assert float(bound.pop_metrics()["rows_at_edge"]) == 0


def test_rows_are_drawn_with_the_covariance_of_the_activations() -> None:
    """With variances 4 and 1 along the axes, (1, 1) becomes (2, 1), normalized.

    With the same variances along (1, 1) and (1, -1), (1, 0) becomes (3, 1), normalized.
    """
    sae = SAE(2, 2)
    sae.W_dec.data = torch.tensor([[0.5**0.5, 0.5**0.5], [1.0, 0.0]])
    axes_ND = torch.tensor([[2.0, 0], [-2, 0], [0, 1], [0, -1]]) + 7  # the mean has no effect
    CovarianceStart().start_from_rows(sae, axes_ND)
    expected_FD = torch.tensor([[2, 1], [1, 0]]) / torch.tensor([[5**0.5], [1]])
    torch.testing.assert_close(sae.W_dec.data, expected_FD)
    assert torch.equal(sae.W_enc.data, sae.W_dec.data.T)
    sae.W_dec.data = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    CovarianceStart().start_from_rows(sae, axes_ND @ torch.tensor([[0.5**0.5, 0.5**0.5], [0.5**0.5, -(0.5**0.5)]]))
    torch.testing.assert_close(sae.W_dec.data, torch.tensor([[3.0, 1], [1, 3]]) / 10**0.5)


def test_a_run_starts_from_the_covariance_of_its_rows_or_isotropic(sparse_cache, tmp_path) -> None:
    def start(name: str, **changes: object) -> SAE:
        return start_of(make_config(sparse_cache, name, out=tmp_path, width="4096", **changes))

    starts = {init: start("frozen-decoder", options=[f"init={init}"]) for init in ("cov", "iso")}
    plain = start("batchtopk")
    assert torch.equal(starts["iso"].W_dec, plain.W_dec) and torch.equal(starts["iso"].W_enc, plain.W_enc)
    spread = {init: torch.linalg.eigvalsh(torch.cov(one.W_dec.detach().T)) for init, one in starts.items()}
    assert spread["iso"][-1] < 1.5 * spread["iso"][0] and spread["cov"][-1] > 10 * spread["cov"][0]
    assert torch.equal(starts["cov"].W_enc, starts["cov"].W_dec.T)


def step_flops(name: str, **options: object) -> int:
    """The number of floating-point operations in the matrix products of one step."""
    torch.manual_seed(0)
    trainer = Trainer(find_recipe(name).make(RunConfig(32, 128, 40, 64), options), 40, "cpu")
    with FlopCounterMode(display=False) as counter:
        trainer.step(torch.randn(64, 32).bfloat16())
    return counter.get_total_flops()


def test_a_frozen_part_costs_no_gradient_where_products_are_dense() -> None:
    product = 2 * 64 * 32 * 128
    saved = {"frozen-decoder": product, "frozen-encoder": product, "soft-frozen-decoder": 0}
    for base in ("topk", "batchtopk"):
        whole = step_flops(base, k=16)
        assert 4 * product <= whole < 6 * product
        assert {name: whole - step_flops(name, k=16, base=base) for name in saved} == saved


def test_a_frozen_part_costs_no_gradient_where_products_are_sparse(monkeypatch) -> None:
    calls, sums = [], sparse_ops.sum_by_latent
    monkeypatch.setattr(sparse_ops, "sum_by_latent", lambda *given, **how: calls.append(1) or sums(*given, **how))
    counts = {}
    for name in ("batchtopk", *CONTROLS):
        torch.manual_seed(0)
        trainer = Trainer(find_recipe(name).make(RunConfig(32, 128, 40, 64), {"k": 4}), 40, "cpu")
        trainer.step(torch.randn(64, 32).bfloat16())
        counts[name], calls[:] = len(calls), []
    assert counts == {"batchtopk": 2, "soft-frozen-decoder": 2, "frozen-decoder": 1, "frozen-encoder": 1}


def test_what_is_frozen_has_no_moments_on_the_device_or_the_disk(sparse_cache, tmp_path) -> None:
    runs = plan_training(make_config(sparse_cache, *CONTROLS, "batchtopk", out=tmp_path)).runs
    weight = 4 * 32 * 128
    state = {run.recipe.name: run_bytes(run).state for run in runs}
    assert state["frozen-decoder"] == state["frozen-encoder"] == state["batchtopk"] - 2 * weight
    assert state["soft-frozen-decoder"] == state["batchtopk"] + weight + 8  # the starting rows and two scalars
    run_training(plan_training(make_config(sparse_cache, *CONTROLS, out=tmp_path)))
    for run in runs[:3]:
        found = (run.folder / "checkpoints" / "step-00000012" / "state.safetensors").stat().st_size
        assert 1 <= found / state[run.recipe.name] < 1.05


def test_parts_are_those_of_the_base() -> None:
    setting = RunConfig(32, 128, 40, 64)
    for name in CONTROLS:
        for base, kind in (("batchtopk", BatchTopK), ("topk", TopK)):
            ours = find_recipe(name).make(setting, {"base": base, "k": 4})
            theirs = find_recipe(base).make(setting, {"k": 4})
            assert type(ours.sae.activation[0]) is kind and ours.sae.activation[0].k == 4
            assert ours.optimization == theirs.optimization and list(ours.terms) == list(theirs.terms)
            frozen = {n for n, p in ours.sae.named_parameters() if not p.requires_grad}
            assert frozen == ({FROZEN[name]} if name in FROZEN else set())
            assert isinstance(ours.mechanisms[-1], UnitNormDecoder) is (name != "frozen-decoder")


def test_options_that_cannot_work_are_refused() -> None:
    setting = RunConfig(32, 128, 40, 64)
    for cosine in (1.0, 1.5, -0.1):
        with pytest.raises(UsageError, match=f"cosine={cosine:g} is out of range: give at least 0 and below 1"):
            find_recipe("soft-frozen-decoder").make(setting, {"cosine": cosine})
    with pytest.raises(UsageError, match="With base=topk, k has to be a whole number, but it is 2.5"):
        find_recipe("frozen-encoder").make(setting, {"k": 2.5, "base": "topk"})
    with pytest.raises(UsageError, match="base=relu is unknown: expected one of batchtopk, topk"):
        find_recipe("frozen-decoder").make(setting, {"base": "relu"})
