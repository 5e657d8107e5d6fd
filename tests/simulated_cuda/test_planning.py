"""Plans for a GPU: a step is traced as the GPU computes it, and is captured unless there is a reason against it."""

from pathlib import Path

import pytest

from sae.cache.reader import Cache

from .gpu import SimulatedGPU


@pytest.mark.parametrize("recipe", ["relu", "batchtopk"])
def test_a_step_is_traced_on_a_gpu(gpu: SimulatedGPU, recipe: str) -> None:
    """The state is as on a CPU. A step has other temporaries (autocast, dense products). Memory holds two batches."""
    planned = gpu("planning.memory", recipe=recipe)
    (state, step, host, _, _, _), (gpu_state, gpu_step, gpu_host, _, most, batches) = planned["cpu"], planned["cuda"]
    assert gpu_state == state and gpu_host == host
    assert 0.5 * step < gpu_step < 2.5 * step and gpu_step != step
    assert most == gpu_step and batches == 2 * 2 * 256 * 64 + (96 << 20)


def test_the_copies_that_kernels_keep_are_planned(gpu: SimulatedGPU) -> None:
    """They take two bytes for each element of W_dec and W_enc, and 12 for the learning rate and corrections of each
    step. Torch's optimizer, without kernels, also keeps the scale of the gradient."""
    without, kernels = gpu("planning.memory_with_kernels", recipe="relu")
    assert kernels.state - without.state == 2 * 2 * 64 * 512 + 12 * 101 - 4 and kernels.step <= without.step


def test_a_plan_for_a_gpu_says_whether_steps_are_captured_and_why_not(
    gpu: SimulatedGPU, tiny_cache: Cache, tmp_path: Path
) -> None:
    """If memory is too small for the steps of both runs at once, they still share a pass and take turns."""
    lines = gpu("planning.about_steps", cache=tiny_cache.folder, out=tmp_path)
    captured = ["steps    in CUDA graphs"]
    assert lines["a GPU"] == lines["just enough memory"] == captured and lines["a CPU"] == []
    (off,), (compiled,), (foreign,), (little,) = (
        lines[name] for name in ("off", "compiled", "a recipe from elsewhere", "too little memory")
    )
    assert off == "steps    launched one by one: --capture off"
    assert compiled == "steps    launched one by one: --compile and CUDA graphs have not been tried together"
    assert foreign.startswith("steps    launched one by one: own is not a recipe of this package")
    assert little.startswith("steps    launched one by one: 2 runs in one graph take ") and "free on cuda" in little


def test_a_plan_for_a_gpu_says_which_products_are_sparse_and_why(
    gpu: SimulatedGPU, tiny_cache: Cache, tmp_path: Path
) -> None:
    """32 of 2,048 latents are kept. If BatchTopK computes a batch in parts, its products are always dense."""
    lines = gpu("planning.about_products", cache=tiny_cache.folder, out=tmp_path)
    about = "products of topk are {}: width / k is 64, and in {} sparse products are estimated to be faster from "
    assert lines["bfloat16"] == [about.format("dense", "bfloat16") + "a ratio of 257"]
    assert lines["float32"] == [about.format("sparse", "float32") + "a ratio of 39"]
    assert lines["in parts"] == lines["a CPU"] == []


def test_a_plan_for_a_gpu_says_whether_kernels_are_used_and_why_not(
    gpu: SimulatedGPU, tiny_cache: Cache, tmp_path: Path
) -> None:
    """A kernel that fails, or whose results differ from those of torch, is not used."""
    lines = gpu("planning.about_kernels", cache=tiny_cache.folder, out=tmp_path)
    assert lines["a CPU"] == []
    assert lines["with Triton"][0].startswith(
        "kernels  normalize batches, compute errors, select latents, decode them, compute gradients of "
        "JumpReLU and gated SAEs and update the weights, with Triton"
    )
    common = "kernels  normalize batches"
    assert lines["no latents to choose"][0].startswith(f"{common}, compute errors and update the weights, with Triton")
    assert lines["no update of the weights"][0].startswith(f"{common} and compute errors, with Triton")
    assert lines["without Triton"] == ["kernels  not used: the simulated GPU runs no kernels"]
    assert lines["broken"] == ["kernels  not used: they do not work on cuda: no kernel image is available"]
    assert lines["wrong"] == ["kernels  not used: they select other latents than torch on cuda"]
    assert lines["wrong batch"] == ["kernels  not used: they normalize batches differently from torch on cuda"]
    assert lines["wrong error"] == ["kernels  not used: they compute other reconstruction errors than torch on cuda"]
    assert lines["wrong update"] == ["kernels  not used: they update weights differently from torch on cuda"]
