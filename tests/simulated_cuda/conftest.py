"""The simulated GPU as a fixture."""

from collections.abc import Iterator

import pytest

from .build import CannotSimulate, build_hooks
from .gpu import SimulatedGPU


@pytest.fixture(scope="session")
def gpu(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SimulatedGPU]:
    """A simulated GPU in a separate process. Tests that use it are skipped where it cannot be built."""
    assert request.config.cache is not None
    try:
        library = build_hooks(request.config.cache.mkdir("simulated_cuda"))
    except CannotSimulate as reason:
        pytest.skip(f"no simulated GPU: {reason}")
    one = SimulatedGPU(library, tmp_path_factory.mktemp("simulated_cuda") / "log")
    yield one
    one.close()
