"""Every recipe on the simulated GPU: nothing waits in a step, and the run ends as on a CPU."""

from pathlib import Path

import pytest

import sae.train.variants  # noqa: F401  (registers the recipes)
from sae.train.recipe import RECIPES

from .gpu import Failed, SimulatedGPU

HERE = Path(__file__).parent


@pytest.mark.parametrize("recipe", sorted(RECIPES))
def test_a_step_waits_for_nothing_and_a_run_ends_as_on_a_cpu(gpu: SimulatedGPU, recipe: str) -> None:
    """With products by the kept latents where a recipe has them. The saved SAE, the checkpoint, the metrics and what
    is resumed are equal bit for bit."""
    walked = gpu("training.walk", recipe=recipe, sparse=True)
    assert walked["waits"] == []
    assert walked["apart"] == {}


def line_of(code: str) -> str:
    """Where a mistake stands in faults.py, as the ledger names it."""
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
