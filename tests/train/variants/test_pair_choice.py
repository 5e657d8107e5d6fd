"""Papers 002 and 003: steps that compare only some of the pairs of latents."""

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sae.common.errors import UsageError
from sae.evaluate.compared_pairs import compared_pairs, note_of_pairs
from sae.train.kernels.gram_operator import gram
from sae.train.loop import Trainer
from sae.train.recipe import find_recipe
from sae.train.variant import RunConfig
from sae.train.variants.competition import pairs
from sae.train.variants.competition.pairs import PairProducts, PairTable, weighted_sums
from sae.train.variants.competition.penalty import CompetitionLoss
from sae.train.variants.decorrelation import Decorrelation, random_order

from .competition.latents import codes, step_of
from .test_decorrelation import step_with


def latents(count: int) -> Tensor:
    """(40, count) in float64; one latent is silent."""
    torch.manual_seed(0)
    f_BF = (torch.randn(40, count) * (torch.rand(40, count) < 0.3)).relu().double() * torch.linspace(0.1, 5, count)
    f_BF[:, 3] = 0
    return f_BF


# --- decorrelation in blocks ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tau_over", ["alive", "all"])
@pytest.mark.parametrize("count", [24, 26])  # of 26 latents, two are in no block
def test_blocks_are_the_definition_over_the_pairs_within_them(count: int, tau_over: str) -> None:
    """Value, statistics and gradient agree with loops over the pairs in four blocks of six."""
    exact_BF = latents(count).requires_grad_()
    loss = Decorrelation(0.2, tau_over, "blocks", block=6)
    order = random_order(torch.tensor(7), loss.seed, count)[:24].view(4, 6)
    pairs, silent = [], 0
    for block in order.tolist():
        for i, j in ((i, j) for i in block for j in block if i < j):
            norms = exact_BF[:, i].norm() * exact_BF[:, j].norm()
            if norms > 0:
                pairs.append((exact_BF[:, i] @ exact_BF[:, j]) / norms)
            else:
                silent += 1
    values = torch.stack(pairs).detach()
    if tau_over == "all":
        values = torch.cat([values, torch.zeros(silent)])
    tau = float(values.mean() + values.std(correction=0))
    chosen = sorted(pairs, key=Tensor.item, reverse=True)[: round(0.2 * 4 * 15)]
    expected = sum(c - tau for c in chosen if c > tau) / len(chosen)
    expected.backward()

    latents_BF = latents(count).float().requires_grad_()
    step = step_with(latents_BF)
    step.i = torch.tensor(7)
    found = loss(step)
    (3 * found).backward()
    assert found.item() == pytest.approx(expected.item(), rel=1e-4) and expected > 0
    assert float(step.metrics["tau"]) == pytest.approx(tau, rel=1e-4)
    assert int(step.metrics["pairs_over_tau"]) == sum(bool(c > tau) for c in chosen)
    torch.testing.assert_close(latents_BF.grad.double(), 3 * exact_BF.grad, rtol=1e-3, atol=1e-6)
    left_out = [i for i in range(count) if i not in order]
    assert len(left_out) == count - 24 and not latents_BF.grad[:, left_out].any()


@pytest.mark.parametrize("count", [24, 26])
def test_latents_in_bfloat16_are_multiplied_as_they_are(count: int) -> None:
    """On a GPU, bfloat16 latents give the value of float32 latents. The gradient f M and M itself are in bfloat16."""
    results = []
    for dtype in (torch.float32, torch.bfloat16):
        f_BF = latents(count).bfloat16().to(dtype).requires_grad_()
        step = step_with(f_BF)
        step.i = torch.tensor(7)
        value = Decorrelation(0.2, block=6).penalty_in_blocks(step, f_BF)
        (3 * value).backward()
        results.append((value.double(), f_BF.grad.double(), f_BF.grad.dtype))
    (expected, g_BF, _), (found, bfloat16_BF, dtype) = results
    assert dtype == torch.bfloat16 and expected > 0
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(bfloat16_BF, g_BF, rtol=0, atol=1e-2 * float(g_BF.abs().max()))
    assert torch.equal(bfloat16_BF.any(0), g_BF.any(0))  # latents in no block and silent ones have no gradient


def test_products_of_columns_in_bfloat16_are_exact() -> None:
    """The products are exact up to the rounding of float32 sums, and the operator passes torch's `opcheck`."""
    f_GBM = latents(24).bfloat16().unflatten(1, (4, 6)).transpose(0, 1)
    found = gram(f_GBM)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), f_GBM.double().mT @ f_GBM.double(), rtol=1e-6, atol=1e-6)
    for given in (f_GBM, f_GBM.float()):
        torch.library.opcheck(gram, (given,))


@pytest.mark.parametrize(
    ("count", "block", "blocks"), [(24, 256, 1), (23, 16, 1), (25, 16, 2), (22, 6, 4), (26, 6, 4), (24, 2, 12)]
)
def test_a_block_has_about_as_many_latents_as_it_was_given(count: int, block: int, blocks: int) -> None:
    """The number of blocks is `count` / `block`, rounded, and one below 1.5. All blocks have the same size."""
    loss, shapes = Decorrelation(0.2, block=block), []
    choose = loss.choose
    loss.choose = lambda corr_GMM, step: shapes.append(tuple(corr_GMM.shape)) or choose(corr_GMM, step)
    loss(step_with(latents(count).float()))
    assert shapes == [(blocks, count // blocks, count // blocks)]


def test_over_many_steps_blocks_have_the_value_and_the_gradient_of_all_pairs() -> None:
    latents_BF = latents(24).float().requires_grad_()
    exact = Decorrelation(0.3, pair_choice="exact")(step_with(latents_BF))
    (to_all,) = torch.autograd.grad(exact, latents_BF)
    loss, value, to_blocks = Decorrelation(0.3, block=12), 0.0, torch.zeros(40, 24)
    for i in range(200):
        step = step_with(latents_BF)
        step.i = torch.tensor(i)
        found = loss(step)
        value += found.item() / 200
        to_blocks += torch.autograd.grad(found, latents_BF)[0] / 200
    assert value == pytest.approx(exact.item(), rel=0.05)
    cosine = torch.nn.functional.cosine_similarity(to_blocks.flatten(), to_all.flatten(), dim=0)
    assert cosine > 0.95 and float(to_blocks.norm() / to_all.norm()) == pytest.approx(1, abs=0.15)


def test_a_random_order_is_one_and_differs_by_step_and_seed() -> None:
    """Every pair of 32 latents is in the same block of four about equally often."""
    orders = [random_order(torch.tensor(i), torch.tensor(5), 32) for i in range(400)]
    assert all(order.sort().values.tolist() == list(range(32)) for order in orders)
    assert len({tuple(order.tolist()) for order in orders}) == 400
    assert random_order(torch.tensor(3), torch.tensor(6), 32).tolist() != orders[3].tolist()
    together = torch.zeros(32, 32)
    for order in orders:
        block_F = order.argsort() // 4
        together += block_F[:, None] == block_F
    often = together[~torch.eye(32, dtype=torch.bool)] / 400  # 3/31, standard deviation .015
    assert often.mean() == pytest.approx(3 / 31) and 0.03 < often.min() and often.max() < 0.18
    ranks = torch.stack([order.argsort() for order in orders]).double() - 15.5
    for latent in (0, 1, 5):  # an order is unrelated to the previous one, even shifted by some latents
        alike = (ranks[1:, : 32 - latent] * ranks[:-1, latent:]).mean() / ranks.square().mean()
        assert abs(alike) < 0.05


def test_runs_of_different_seeds_have_other_orders() -> None:
    seeds = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        variant = find_recipe("decorrelation").make(RunConfig(6, 24, 80, 40), {})
        seeds.append(int(variant.terms["decorrelation"].seed))
    assert seeds[0] != seeds[1]


class LargestTensor(TorchDispatchMode):
    """Records the number of elements of the largest tensor that any operation returns."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        found = func(*args, **(kwargs or {}))
        sizes = [one.untyped_storage().nbytes() // one.element_size() for one in tree_leaves(found) if _is_tensor(one)]
        self.elements = max([self.elements, *sizes])
        return found


def _is_tensor(one: object) -> bool:
    return isinstance(one, Tensor)


@pytest.mark.parametrize(
    ("name", "options", "square"),
    [
        ("decorrelation", {"block": 32}, False),
        ("decorrelation", {"pair_choice": "exact"}, True),
        ("competition", {"k": 4, "pairs": 8}, False),
        ("competition", {"k": 4, "pair_store": "dense"}, True),
    ],
)
def test_no_step_makes_a_matrix_of_all_pairs(name: str, options: dict, square: bool) -> None:
    """With 512 latents, weights have 4,096 elements, a batch 8,192, and a matrix of all pairs 262,144."""
    trainer = Trainer(find_recipe(name).make(RunConfig(8, 512, 100, 16), options), 100, "cpu")
    with LargestTensor() as largest:
        for _ in range(2):
            trainer.step(torch.randn(16, 8))
    assert (largest.elements >= 512 * 512) == square


# --- competition in turns ---------------------------------------------------------------------------------------------


def table_of(turns: int, latents: int = 48, pairs: int = 6) -> tuple[PairTable, list]:
    table = PairTable(latents, pairs * latents, turns=turns)
    steps = [step_of(codes(seed, latents=latents)) for seed in range(4)]
    for step in steps:
        table.after_step(step)
    table.every_n_steps(steps[-1])
    table.after_step(steps[0])
    return table, steps


@pytest.mark.parametrize("target", ["cofire", "absorption"])
@pytest.mark.parametrize("direction", ["symmetric", "child_only"])
def test_turns_together_are_the_whole_table(target: str, direction: str) -> None:
    """Over three steps, the mean loss, the mean gradient and the total count equal those of the whole table."""
    options = {"tau": 0.2, "reduction": "sum", "target": target, "direction": direction}
    (whole, steps), (thirds, _) = table_of(1), table_of(3)
    sae = steps[0].sae
    value = CompetitionLoss(whole, 4 / 48, **options)(step_of(steps[0].f_BF, sae))
    (expected,) = torch.autograd.grad(value, sae.W_dec)
    total, gradient, counts = 0.0, torch.zeros_like(expected), []
    for i in (4, 5, 6):
        step = step_of(steps[0].f_BF, sae, i)
        found = CompetitionLoss(thirds, 4 / 48, **options)(step)
        total += found.item() / 3
        gradient += torch.autograd.grad(found, sae.W_dec)[0] / 3
        counts.append(int(step.metrics["pairs_above"]))
    once = step_of(steps[0].f_BF, sae)
    CompetitionLoss(whole, 4 / 48, **options)(once)
    assert sum(counts) == once.metrics["pairs_above"] > 3 and min(counts) > 0
    assert total == pytest.approx(value.item(), rel=1e-5)
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-6)


def test_a_mean_over_active_pairs_is_over_those_compared() -> None:
    """The diagonal is not divided by turns. Its weight relative to the pairs is the same as with the whole table."""
    table, steps = table_of(2)
    for diagonal in (False, True):
        loss = CompetitionLoss(table, 4 / 48, tau=0.2, diagonal=diagonal)
        step = step_of(steps[0].f_BF, steps[0].sae, 3)
        weight_P, rows = table.conditional()[1::2], steps[0].sae.W_dec.detach()
        passes = weight_P >= 0.2
        inner = (rows[table.first_P[1::2]] * rows[table.second_P[1::2]]).sum(1)
        total = 2 * 2 * (weight_P * inner.square())[passes].sum() / (4 / 48)
        count = 2 * 2 * passes.sum()
        if diagonal:
            fires = table.rates() >= 1e-5
            total += (rows.square().sum(1).square() / (4 / 48))[fires].sum()
            count += fires.sum()
        assert loss(step).item() == pytest.approx(float(total / count), rel=1e-5)


def test_sums_by_latent_are_those_of_a_dense_product() -> None:
    generator = torch.Generator().manual_seed(0)
    from_P, to_P = torch.randint(0, 9, (2, 60), generator=generator)
    weight_P, rows_FX = torch.randn(60, generator=generator), torch.randn(9, 5, generator=generator)
    from_P[:5] = to_P[:5] = 0
    to_P[to_P == 4] = 3  # latent 4 is in no pair
    dense_FF = torch.zeros(9, 9).index_put_((to_P, from_P), weight_P, accumulate=True)
    found = weighted_sums(weight_P, rows_FX, from_P, to_P)
    torch.testing.assert_close(found, dense_FF @ rows_FX)
    assert not found[4].any()


def test_turns_have_to_divide_the_table() -> None:
    config = RunConfig(8, 27, 100, 8)
    with pytest.raises(UsageError, match="turns=8 does not divide the table's 3 pairs for each of 27 latents"):
        find_recipe("competition").make(config, {"pairs": 3, "k": 4})
    with pytest.raises(UsageError, match="invalid turns=0: expected 1 or more"):
        find_recipe("competition").make(config, {"turns": 0, "k": 4})
    made = find_recipe("competition").make(config, {"pairs": 3, "k": 4, "turns": 9})
    assert made.terms["competition"].pairs.turns == 9


def test_a_table_of_all_pairs_is_compared_in_every_step() -> None:
    assert PairTable(8, 8 * 16, turns=8).turns == 1


# --- runs and pages ---------------------------------------------------------------------------------------------------


def test_a_run_of_an_earlier_version_compares_all_that_it_did() -> None:
    config = RunConfig(8, 64, 100, 8)
    for name, later in (("decorrelation", ("pair_choice", "block")), ("competition", ("turns",))):
        recipe = find_recipe(name)
        new = recipe.make(config, {"k": 4} if name == "competition" else {})
        stored = {n: v for n, v in new.options.items() if n not in later} | vars(new.optimization)
        old = recipe.make(config, {}, stored)
        if name == "decorrelation":
            assert [n for n, _ in new.named_buffers() if n.endswith("seed")] == ["terms.decorrelation.seed"]
            assert old.terms[name].pair_choice == "exact" and old.changed["pair_choice"] == ("exact", "blocks")
            assert not [n for n, _ in old.named_buffers() if n.endswith("seed")]
        else:
            assert old.terms[name].pairs.turns == 1 and old.changed["turns"] == (1, 8)


def test_paper_exact_compares_all_pairs() -> None:
    config = RunConfig(8, 64, 100, 8, paper_exact=True)
    assert find_recipe("decorrelation").make(config, {}).options["pair_choice"] == "exact"
    assert find_recipe("competition").make(config, {"k": 4}).options["pair_store"] == "dense"


def test_pages_say_which_pairs_a_step_compared() -> None:
    def record(name: str, **options: object) -> dict:
        return {"variant": name, "resolved": options}

    blocks = record("decorrelation", pair_choice="blocks", block=64)
    assert compared_pairs(blocks) == "those in random blocks of 64 latents"
    assert note_of_pairs(blocks) == [
        "decorrelation: a training step compared only some pairs of latents: those in random blocks of 64 latents."
    ]
    for exact in (record("decorrelation"), record("decorrelation", pair_choice="exact", block=256)):
        assert compared_pairs(exact) == "all" and note_of_pairs(exact) == []
    table = {"pair_store": "table", "pairs": 16}
    assert compared_pairs(record("competition", **table)) == "16 for each latent, kept in a table"
    for turns in (2, 8):
        said = f"one in {turns} of 16 for each latent, kept in a table"
        assert compared_pairs(record("competition", **table, turns=turns)) == said
    assert compared_pairs(record("competition", pair_store="dense", pairs=16, turns=8)) == "all"
    assert compared_pairs(record("relu")) is None and note_of_pairs({}) == []


@pytest.mark.parametrize(("latents", "every"), [(11, True), (12, False)])
def test_pages_say_that_one_block_has_all_pairs(latents: int, every: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    made = find_recipe("decorrelation").make(RunConfig(8, latents, 100, 16), {"block": 8})
    compared, choose = [], Decorrelation.choose
    monkeypatch.setattr(
        Decorrelation, "choose", lambda loss, c, step: compared.append(c.shape) or choose(loss, c, step)
    )
    Trainer(made, 100, "cpu").step(torch.randn(16, 8))
    assert (compared[0] == (1, latents, latents)) == every
    assert (compared_pairs({"variant": "decorrelation", "d_sae": latents, "resolved": made.options}) == "all") == every


@pytest.mark.parametrize(("latents", "every"), [(17, True), (18, False)])
def test_pages_say_that_a_table_has_all_pairs(latents: int, every: bool) -> None:
    made = find_recipe("competition").make(RunConfig(8, latents, 100, 16), {"k": 2, "pairs": 8})
    table = made.terms["competition"].pairs
    assert (len(table.first_P) == latents * (latents - 1) // 2 and table.turns == 1) == every
    assert (compared_pairs({"variant": "competition", "d_sae": latents, "resolved": made.options}) == "all") == every


@pytest.mark.parametrize("name", [f"collapse-{number:02d}" for number in range(6, 11)])
def test_no_step_takes_a_qr(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = Trainer(find_recipe(name).make(RunConfig(8, 64, 100, 16), {}), 100, "cpu")
    monkeypatch.setattr(torch.linalg, "qr", None)
    trainer.step(torch.randn(16, 8))


@pytest.mark.parametrize("fixed", [False, True])
def test_products_of_rows_in_bfloat16_are_those_in_float64_up_to_rounding(
    fixed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU under autocast, rows are in bfloat16, and sums are in float32 and rounded once.

    If `fixed`, only the left rows have a gradient.
    """
    torch.manual_seed(0)
    weight_FX, (first_P, second_P) = torch.randn(9, 40).bfloat16().float(), torch.triu_indices(9, 9, 1)
    results = []
    for rows_FX, dtype in ((weight_FX.double(), torch.float64), (weight_FX, torch.bfloat16)):
        monkeypatch.setattr(pairs, "row_dtype", lambda rows, dtype=dtype: dtype)
        rows_FX.requires_grad_()
        products_P = PairProducts.apply(rows_FX, rows_FX.detach() if fixed else rows_FX, first_P, second_P)
        products_P.square().mean().backward()
        results.append((products_P.detach().double(), rows_FX.grad.double()))
    (expected_P, expected_FX), (found_P, found_FX) = results
    torch.testing.assert_close(found_P, expected_P, rtol=8e-3, atol=1e-5)
    torch.testing.assert_close(found_FX, expected_FX, rtol=0, atol=1e-2 * float(expected_FX.abs().max()))
