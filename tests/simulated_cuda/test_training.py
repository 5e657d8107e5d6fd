"""Every recipe on the simulated GPU: the host waits for nothing in a step, and results equal those on a CPU."""

from pathlib import Path
from typing import Any

import pytest
import torch

import sae.train.variants  # noqa: F401  (registers the recipes)
from sae.evaluate.papers.claims import PAPERS
from sae.evaluate.papers.parse import load_paper
from sae.tests.recipes import FEW_QUICK
from sae.train.accumulate import reasons_against
from sae.train.parse import parse_width
from sae.train.recipe import RECIPES, find_recipe
from sae.train.variant import RunConfig
from sae.workflows.jobs import ReproduceConfig, jobs_of

from .gpu import Failed, SimulatedGPU

HERE = Path(__file__).parent
# Bounds on how much numbers under autocast may differ from those in float32 after four steps, relative to the largest.
# The latents of the SAE have no bound: near a tie, another latent or expert is chosen.
BOUNDS = {
    "metrics/loss": 0.02, "metrics/l0": 0.005, "metrics/gradient_norm": 0.05, "sae/W_dec": 0.02, "sae/W_enc": 0.02,
}  # fmt: skip
READINGS = [(number, reading.name) for number in PAPERS for reading in load_paper(number).readings]
# Recipes with options that add a component.
VARIED = (
    ("topk", ("k=4", "k_anneal_steps=4", "multi=0.125")),
    ("batchtopk", ("k=2.5", "k_anneal_steps=3", "k_start=7.5")),
    ("jumprelu-tanh", ("ste_to_input=true",)),
    ("soft-frozen-decoder", ("base=topk", "k=4", "cosine=0.999")),
    ("relu", ("normalize=standardize",)),
    ("topk", ("normalize=layer_norm",)),
    ("collapse-08", ("importance=groups",)),
    ("decorrelation", ("block=16",)),
)


def divisible(recipe: str) -> bool:
    with torch.device("meta"):
        return not reasons_against(find_recipe(recipe).make(RunConfig(16, 128, 30, 32, variance=24.0), {}))


@pytest.mark.parametrize("recipe", FEW_QUICK)
def test_a_step_waits_for_nothing_and_a_run_ends_as_on_a_cpu(gpu: SimulatedGPU, recipe: str) -> None:
    """Recipes that support sparse products use them. The saved SAE, the checkpoint, the metrics and the resumed state
    are equal bit for bit."""
    walked = gpu("training.walk", recipe=recipe, sparse=True)
    assert walked["waits"] == walked["unordered"] == []
    assert len(walked["reads"]) == 1  # one read for all metrics of a log
    assert walked["apart"] == {}
    assert walked["dead"] > 0  # AuxK and the mechanisms that restart latents had work to do


@pytest.mark.parametrize("recipe", ["batchtopk", "jumprelu", "hierarchical-adaptive", "switch"])
def test_nor_does_a_step_in_parts(gpu: SimulatedGPU, recipe: str) -> None:
    """With `--accumulate`, also for recipes that read the whole batch before they compute its gradients."""
    walked = gpu("training.walk", recipe=recipe, sparse=True, parts=4)
    assert walked["waits"] == walked["unordered"] == []
    assert walked["apart"] == {}


@pytest.mark.parametrize("sparse", [pytest.param(False, marks=pytest.mark.slow), True])
@pytest.mark.parametrize(
    ("recipe", "options"),
    [("topk", ("k=4", "multi=0.125")), ("batchtopk", ("k=2.5",)), ("jumprelu", ()), ("gated", ()), ("matryoshka", ())],
)
def test_nor_does_one_with_kernels(gpu: SimulatedGPU, recipe: str, options: tuple[str, ...], sparse: bool) -> None:
    walked = gpu("training.walk", recipe=recipe, options=options, sparse=sparse, kernels=True)
    assert walked["waits"] == walked["unordered"] == []
    assert walked["apart"] == {}


COUPLED = ("weight_decay=0.1", "weight_decay_form=coupled", "clip=none")
ON_ALL = ("weight_decay=0.1", "weight_decay_on=all")
REWRITTEN = (("hierarchical-resample", ()), ("hierarchical", ("merge_above=0.3",)))  # latents restart, are merged


@pytest.mark.parametrize(
    ("recipe", "options", "used"),
    [
        ("jumprelu", (), True),
        *[(*case, True) for case in REWRITTEN],
        ("progressive", (), False),
        pytest.param("relu", (), True, marks=pytest.mark.slow),
        pytest.param("collapse-10", (), False, marks=pytest.mark.slow),
    ],
)
def test_a_run_whose_weights_kernels_update_ends_as_without(
    gpu: SimulatedGPU, recipe: str, options: tuple[str, ...], used: bool
) -> None:
    """Products in bfloat16 read the copies of the weights, also after weights were rewritten between steps. Recipes
    whose mechanisms write weights in a step (orthogonalization, growth) keep the optimizer of torch."""
    walked = gpu("training.with_and_without_kernels", recipe=recipe, options=options, precision="bfloat16")
    assert walked["apart"] == {} and walked["waits"] == []
    assert walked["used"] is used and walked["copied"] == ([True, True] if used else None)


@pytest.mark.parametrize(
    "more",
    [
        {"precision": "float32"},
        {"precision": "bfloat16", "parts": 4},
        pytest.param({"precision": "bfloat16", "l0": 8}, marks=pytest.mark.slow),
        pytest.param({"precision": "bfloat16", "options": COUPLED}, marks=pytest.mark.slow),
        pytest.param({"precision": "bfloat16", "options": ON_ALL}, marks=pytest.mark.slow),
    ],
)
def test_so_does_one(gpu: SimulatedGPU, more: dict[str, Any]) -> None:
    walked = gpu("training.with_and_without_kernels", recipe="jumprelu", **more)
    assert walked["apart"] == {} and walked["waits"] == [] and walked["used"]
    assert walked["copied"] == ([True, True] if more["precision"] == "bfloat16" else [])


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("recipe", sorted(RECIPES))
def test_so_does_every_recipe(gpu: SimulatedGPU, recipe: str, precision: str) -> None:
    walked = gpu("training.with_and_without_kernels", recipe=recipe, precision=precision)
    assert walked["apart"] == {} and walked["waits"] == []


@pytest.mark.parametrize(("recipe", "options"), REWRITTEN)
def test_a_copy_of_a_weight_that_is_stale_is_found(gpu: SimulatedGPU, recipe: str, options: tuple[str, ...]) -> None:
    """The fault: copies are not renewed after the weights were rewritten between steps."""
    walked = gpu(
        "training.with_and_without_kernels", recipe=recipe, options=options, precision="bfloat16",
        fault="renews_no_copies",
    )  # fmt: skip
    assert walked["copied"] == [False, False] and "state/variant.sae.W_enc" in walked["apart"]


@pytest.mark.slow
@pytest.mark.parametrize("recipe", sorted(RECIPES))
def test_the_same_with_dense_products(gpu: SimulatedGPU, recipe: str) -> None:
    walked = gpu("training.walk", recipe=recipe)
    assert walked["waits"] == walked["unordered"] == []
    assert walked["apart"] == {}


@pytest.mark.slow
@pytest.mark.parametrize("recipe", [recipe for recipe in sorted(RECIPES) if divisible(recipe)])
def test_the_same_in_parts_for_every_recipe_that_has_them(gpu: SimulatedGPU, recipe: str) -> None:
    walked = gpu("training.walk", recipe=recipe, sparse=True, parts=2)
    assert walked["waits"] == walked["unordered"] == []
    assert walked["apart"] == {}


@pytest.mark.slow
@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("recipe", sorted(RECIPES))
def test_under_autocast_a_run_ends_near_that_of_a_cpu(gpu: SimulatedGPU, recipe: str, sparse: bool) -> None:
    """The products of the GPU run are in bfloat16, those of the CPU run in float32."""
    walked = gpu("training.walk", recipe=recipe, sparse=sparse, autocast=True)
    assert walked["waits"] == walked["unordered"] == []
    apart = {name: share for name, share in walked["apart"].items() if share > BOUNDS.get(name, float("inf"))}
    assert apart == {} and walked["apart"]["metrics/loss"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize(("recipe", "options"), VARIED)
def test_the_same_with_parts_that_options_add(
    gpu: SimulatedGPU, recipe: str, options: tuple[str, ...], sparse: bool
) -> None:
    walked = gpu("training.walk", recipe=recipe, options=options, sparse=sparse)
    assert walked["waits"] == walked["unordered"] == []
    assert walked["apart"] == {}


@pytest.mark.slow
@pytest.mark.parametrize(("number", "reading"), READINGS, ids=[f"{number}-{reading}" for number, reading in READINGS])
def test_the_same_for_every_system_of_a_paper_in_every_reading(gpu: SimulatedGPU, number: str, reading: str) -> None:
    config = ReproduceConfig([number], model="synthetic", reading=reading)
    jobs = {(job.recipe, job.options): job for job in jobs_of(load_paper(number), config, on_paper_model=False)}
    for job in jobs.values():
        walked = gpu(
            "training.walk", recipe=job.recipe, options=job.options, paper_exact=job.paper_exact,
            d_sae=4 * parse_width(job.width, find_recipe(job.recipe), 16), sparse=True,
        )  # fmt: skip
        # With a coefficient of 0 the gradients are zeros, which do not show whether the order changes a result.
        told = [line for line in walked["unordered"] if "aux=0.0" not in job.options or "zeros tell" not in line]
        assert walked["waits"] == told == [], job
        assert walked["apart"] == {}, job


def line_of(code: str) -> str:
    """The line of a mistake in faults.py, in the format of the ledger."""
    (number,) = [n for n, text in enumerate((HERE / "faults.py").read_text().splitlines(), 1) if code in text]
    return f"tests/simulated_cuda/faults.py:{number}"


@pytest.mark.parametrize(
    ("fault", "code", "kind"),
    [
        ("reads_a_value", "step.l0.item()", "the host reads from the GPU"),
        ("branches_on_a_value", "if step.l0 > 1e9", "the host reads from the GPU"),
        ("indexes_by_a_mask", "step.f_BF[step.fired_F", "the host reads from the GPU"),
        ("copies_a_list", "torch.tensor([1.0, 2.0], device", "pageable memory is copied to the GPU"),
        ("moves_a_tensor", ".to(step.x_BD.device)", "pageable memory is copied to the GPU"),
    ],
)
def test_what_waits_in_a_step_is_named_by_its_line(gpu: SimulatedGPU, fault: str, code: str, kind: str) -> None:
    (wait,) = gpu("faults.walk_with", fault=fault)["waits"]
    assert wait.startswith(f"{line_of(code)}: {kind}")


@pytest.mark.parametrize(
    ("fault", "code"),
    [
        ("adds_by_an_index", "index_add_(0, some_of(step, 3), step.x_BD[:, 0])"),
        ("scatters_to_a_place_twice", "scatter_(0, some_of(step, 3)"),
        ("scatters_a_sum", "scatter_add(0, some_of(step, 3)"),
        ("puts_at_a_place_twice", "[some_of(step, 3)] = "),
        ("sums_cumulatively", "step.x_BD.cumsum(0)"),
    ],
)
def test_what_can_have_other_bits_in_a_second_run_is_named_by_its_line(
    gpu: SimulatedGPU, fault: str, code: str
) -> None:
    (found,) = gpu("faults.walk_with", fault=fault)["unordered"]
    assert found.startswith(f"{line_of(code)}: a GPU can give other bits in a second run: ")


def test_what_has_the_same_bits_in_any_order_is_none(gpu: SimulatedGPU) -> None:
    assert gpu("faults.walk_with", fault="keeps_the_order")["unordered"] == []


def test_a_tensor_of_the_cpu_in_a_step_is_named_by_its_line(gpu: SimulatedGPU) -> None:
    with pytest.raises(Failed) as error:
        gpu("faults.walk_with", fault="mixes_devices")
    assert "found at least two devices, cuda:0 and cpu!" in str(error.value)
    assert line_of("step.x_BD * torch.ones(") in str(error.value)


def test_a_read_in_a_backward_pass_is_named_by_its_line(gpu: SimulatedGPU) -> None:
    (wait,) = gpu("faults.waits_in_backward")
    assert wait.startswith(f"{line_of('gradient_BD * float(')}: the host reads from the GPU")


def test_another_value_on_the_gpu_is_found(gpu: SimulatedGPU) -> None:
    apart = gpu("faults.walk_with", fault="changes_a_value")["apart"]
    assert {"state/variant.sae.b_enc", "sae/b_enc", "metrics/loss"} <= apart.keys()
