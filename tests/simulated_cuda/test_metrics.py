"""The tests of every metric also pass on the simulated GPU."""

from pathlib import Path

import pytest

from .gpu import SimulatedGPU

# Files of tests/evaluate/metrics -> the metrics that they measure.
GROUPS = {
    ("test_core.py", "test_splice_losses.py"): {"core"},
    ("test_absorption.py",): {"absorption"},
    ("test_stability.py",): {"core", "stability"},
    ("test_sparse_probing.py", "test_scr.py", "test_tpp.py"): {"sparse_probing"},
    ("test_sae_probes.py",): {"sae_probes"},
    ("test_ravel.py",): {"core", "ravel", "ravel_facts"},
    ("test_unlearning.py",): {"core", "unlearning"},
    ("test_autointerp.py", "test_local_judge.py"): {"autointerp"},
    ("test_saebench_core.py", "test_saebench_scr_tpp.py"): {"core", "scr", "tpp"},
}
# Tests that put CPU tensors into the objects that are measured.
OF_THE_CPU = (
    "test_outlier_rows_are_left_out_and_saebench_s_number_counts_them",
    "test_the_latent_of_a_class_is_found_and_separates_it",
)


@pytest.mark.slow
@pytest.mark.parametrize(("files", "metrics"), GROUPS.items())
def test_a_metric_measures_the_same_on_a_gpu(
    gpu: SimulatedGPU, tmp_path: Path, files: tuple[str, ...], metrics: set[str]
) -> None:
    found = gpu(
        "metric_tests.run", files=files, folder=tmp_path / "tests", expression=f"not ({' or '.join(OF_THE_CPU)})"
    )
    assert found["failed"] == {} and len(found["passed"]) > 5
    assert found["measured"].keys() == metrics
