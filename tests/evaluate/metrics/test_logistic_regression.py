"""The L1 solver: the bits of scikit-learn's, with numba and without, and who trains where they differ."""

import functools
import sys

import numpy as np
import pytest

from sae.evaluate.metrics import logistic_regression as module
from sae.evaluate.metrics.logistic_regression import (
    compiled_solver,
    saga_epochs,
    solve,
    train_logistic,
    train_with_sklearn,
)


@pytest.fixture(autouse=True)
def forget_solver():
    compiled_solver.cache_clear()
    yield
    compiled_solver.cache_clear()


def problem(texts: int, features: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Sparse positive features that are more often active in texts of class 1; the last one never is."""
    random = np.random.RandomState(seed)
    label = random.permutation(np.arange(texts) % 2)
    x = random.gamma(2, 2, (texts, features)) * (random.rand(texts, features) < 0.2 + 0.2 * label[:, None])
    x[:, -1] = 0
    return x, label


def assert_equal_bits(solver, x, label, strength):
    weight, intercept = solver(x, label, strength)
    expected = train_with_sklearn(x, label, strength, l1=True)
    assert weight.dtype == expected.coef_.dtype == np.float64
    np.testing.assert_array_equal(weight, expected.coef_[0])
    assert intercept == expected.intercept_[0]


@pytest.mark.parametrize("strength", [0.02, 0.3, 2.0])
def test_the_loop_has_the_bits_of_scikit_learn(strength, monkeypatch):
    monkeypatch.setattr(module, "MAX_ITERATIONS", 25)  # of Python's own speed; both stop there
    assert_equal_bits(functools.partial(solve, saga_epochs), *problem(40, 4), strength)


@pytest.mark.parametrize("shape", [(13, 1), (150, 17), (400, 128)])
def test_the_compiled_loop_has_them_too(shape):
    pytest.importorskip("numba", reason="needs numba: pip install 'sae-pipeline[probes]'")
    solver = compiled_solver()
    assert solver is not None
    for strength in (1e5, 3.0, 0.02, 1e-5):
        x, label = problem(*shape, seed=shape[0])
        assert_equal_bits(solver, x, label, strength)
        ours, theirs = (train(x, label, strength, l1=True) for train in (train_logistic, train_with_sklearn))
        np.testing.assert_array_equal(ours.predict_proba(x), theirs.predict_proba(x))
        np.testing.assert_array_equal(ours.predict(x), theirs.predict(x))


def test_scikit_learn_trains_without_numba(monkeypatch):
    monkeypatch.setitem(sys.modules, "numba", None)
    assert compiled_solver() is None
    x, label = problem(40, 4)
    assert train_logistic(x, label, 1.0, l1=True).solver == "saga"


def test_a_loop_of_other_bits_is_not_used(monkeypatch):
    calls = []

    def wrong(x, label, strength):
        calls.append(strength)
        weight, intercept = train_with_sklearn(x, label, strength, l1=True).coef_[0], 0.0
        return weight, intercept

    assert not module.equals_sklearn(wrong) and len(calls) == 1
    monkeypatch.setattr(module, "equals_sklearn", lambda solver: False)
    numba = type(sys)("numba")
    numba.njit = lambda **_: lambda function: function
    monkeypatch.setitem(sys.modules, "numba", numba)
    assert compiled_solver() is None


def test_an_l2_penalty_is_scikit_learn_s_alone(monkeypatch):
    monkeypatch.setattr(module, "compiled_solver", lambda: pytest.fail("asked"))
    x, label = problem(40, 4)
    assert train_logistic(x, label, 1.0, l1=False).solver == "lbfgs"
