"""`--capture` on the simulated GPU: captured steps equal eager ones bit for bit, and stale values are detected."""

from typing import Any

import pytest

import sae.train.variants  # noqa: F401  (registers the recipes)
from sae.tests.recipes import FEW_QUICK
from sae.train.recipe import RECIPES

from .gpu import SimulatedGPU
from .test_training import VARIED, divisible, line_of

STEPS = 8
SEVERAL = ("topk", "relu", "batchtopk", "jumprelu")


def compare(gpu: SimulatedGPU, *recipes: str, **more: Any) -> dict[str, Any]:
    found = gpu("capturing.compare", recipes=recipes, **more)
    assert found["said"] == [] and 1 <= found["made"] <= found["launched"] < STEPS
    return found


@pytest.mark.parametrize("recipe", FEW_QUICK)
def test_captured_steps_end_where_eager_ones_do(gpu: SimulatedGPU, recipe: str) -> None:
    """Weights, buffers, moments and logged metrics, bit for bit, with periodic work and dead latents in between."""
    assert compare(gpu, recipe)["apart"] == {}


def test_several_recipes_are_one_graph_and_what_resumes_them_another(gpu: SimulatedGPU) -> None:
    assert compare(gpu, *SEVERAL, resumed=True)["apart"] == {}


def test_a_captured_step_is_two_launches(gpu: SimulatedGPU) -> None:
    """One launch copies the batch, the other is the graph of all runs."""
    assert (
        gpu("capturing.launches", recipes=SEVERAL)["captured"]
        == 2
        < gpu("capturing.launches", recipes=["relu"])["eager"]
    )


@pytest.mark.parametrize("recipe", [pytest.param("batchtopk", marks=pytest.mark.slow), "jumprelu"])
def test_so_do_those_in_parts(gpu: SimulatedGPU, recipe: str) -> None:
    assert compare(gpu, recipe, parts=4)["apart"] == {}


@pytest.mark.parametrize("recipe", ["relu", "jumprelu"])
def test_so_do_those_that_steer_l0(gpu: SimulatedGPU, recipe: str) -> None:
    assert compare(gpu, recipe, l0=8)["apart"] == {}


@pytest.mark.parametrize("precision", [pytest.param("float32", marks=pytest.mark.slow), "bfloat16"])
def test_so_do_those_with_kernels(gpu: SimulatedGPU, precision: str) -> None:
    """This also holds after latents are restarted between steps: a graph reads the copies of the weights in place."""
    recipes = ("topk", "batchtopk", "hierarchical-resample", "gated", "matryoshka")
    assert compare(gpu, *recipes, kernels=True, precision=precision, resumed=True)["apart"] == {}


def test_what_mechanisms_have_a_step_compute_in_between_is_of_that_step(gpu: SimulatedGPU) -> None:
    assert compare(gpu, "relu", fault="computes_between")["apart"] == {}


def test_an_annealed_k_makes_a_graph_for_each_of_its_shapes(gpu: SimulatedGPU) -> None:
    found = gpu("capturing.compare", recipes=["topk"], options=("k=4", "k_anneal_steps=8", "multi=0.125"))
    assert found["apart"] == {} and found["said"] == [] and found["made"] == found["launched"] == STEPS // 2


@pytest.mark.slow
@pytest.mark.parametrize(("sparse", "precision"), [(True, "float32"), (False, "bfloat16")])
@pytest.mark.parametrize("recipe", sorted(RECIPES))
def test_the_same_resumed_for_both_kinds_of_products(
    gpu: SimulatedGPU, recipe: str, sparse: bool, precision: str
) -> None:
    assert compare(gpu, recipe, sparse=sparse, precision=precision, resumed=True)["apart"] == {}


@pytest.mark.slow
@pytest.mark.parametrize("recipe", [recipe for recipe in sorted(RECIPES) if divisible(recipe)])
def test_the_same_in_parts_for_every_recipe_that_has_them(gpu: SimulatedGPU, recipe: str) -> None:
    assert compare(gpu, recipe, parts=2)["apart"] == {}


@pytest.mark.slow
@pytest.mark.parametrize("recipe", sorted(RECIPES))
def test_the_same_with_l0(gpu: SimulatedGPU, recipe: str) -> None:
    assert compare(gpu, recipe, l0=8)["apart"] == {}


@pytest.mark.slow
@pytest.mark.parametrize(("recipe", "options"), VARIED)
def test_the_same_with_parts_that_options_add(gpu: SimulatedGPU, recipe: str, options: tuple[str, ...]) -> None:
    found = gpu("capturing.compare", recipes=[recipe], options=options)
    assert found["apart"] == {} and found["said"] == [] and found["launched"] >= 1


# --- the emulator finds what a GPU would do wrong ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fault", "recipe", "apart"),
    [
        ("rebinds_a_counter", "relu", "state/relu/variant.dead.since_F"),
        ("counts_on_the_host", "relu", "state/relu/variant.dead.since_F"),
        ("lists_anew", "topk", "state/topk/variant.sae.W_enc"),
        ("sums_anew", "relu", "logged/7/0/loss"),
    ],
)
def test_what_would_be_stale_is_found(gpu: SimulatedGPU, fault: str, recipe: str, apart: str) -> None:
    """A tensor that a step rebinds, a count kept by the host, or a tensor created anew between steps."""
    found = gpu("capturing.compare", recipes=[recipe], fault=fault)
    assert found["said"] == [] and apart in found["apart"]


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        ("reads_a_value", f"{line_of('step.l0.item()')}: the host reads from the GPU"),
        ("copies_a_list", f"{line_of('torch.tensor([1.0, 2.0], device')}: pageable memory is copied to the GPU"),
        ("waits_for_no_fork", "a stream that did not wait for the capture's has work"),
        ("waits_for_no_join", "unjoined work"),
        ("is_not_capturable", "CUDA graph capture"),
    ],
)
def test_a_step_that_cannot_be_captured_is_taken_eagerly_and_says_why(gpu: SimulatedGPU, fault: str, says: str) -> None:
    found = gpu("capturing.compare", recipes=["relu", "topk"], fault=fault)
    (said,) = found["said"]
    assert said.startswith("Steps are launched one by one, as they cannot be captured in a CUDA graph: ")
    assert says in said
    assert found["apart"] == {} and found["made"] == found["launched"] == 0
