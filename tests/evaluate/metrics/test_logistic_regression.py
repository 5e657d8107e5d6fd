"""The L1 solver is bit-identical to scikit-learn's, with and without numba. A loop with other bits is not used."""

import sys

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from sae.evaluate.metrics import logistic_regression as module
from sae.evaluate.metrics.logistic_regression import (
    LogisticModel,
    compiled_trainer,
    logistic_trainer,
    saga_epochs,
    train_with_sklearn,
    trainer_of,
)


@pytest.fixture(autouse=True)
def forget_trainer():
    compiled_trainer.cache_clear()
    yield
    compiled_trainer.cache_clear()


def problem(texts: int, features: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Sparse positive features that are more often active in texts of class 1. The last feature is never active."""
    random = np.random.RandomState(seed)
    label = random.permutation(np.arange(texts) % 2)
    x = random.gamma(2, 2, (texts, features)) * (random.rand(texts, features) < 0.2 + 0.2 * label[:, None])
    x[:, -1] = 0
    return x, label


def sklearn_model(x, label, strength, **options):
    return LogisticRegression(C=strength, random_state=42, max_iter=module.MAX_ITERATIONS, **options).fit(x, label)


def assert_equal_bits(found: LogisticModel, expected: LogisticModel):
    assert found.weight_D.dtype == expected.weight_D.dtype == np.float64
    np.testing.assert_array_equal(found.weight_D, expected.weight_D)
    assert found.intercept == expected.intercept


@pytest.mark.parametrize("strength", [0.02, 0.3, 2.0])
def test_the_loop_has_the_bits_of_scikit_learn(strength, monkeypatch):
    monkeypatch.setattr(module, "MAX_ITERATIONS", 25)  # without numba, the loop is slow; both solvers stop there
    x, label = problem(40, 4)
    assert_equal_bits(trainer_of(saga_epochs, x, label)(strength), train_with_sklearn(x, label, strength, l1=True))


def test_the_compiled_loop_has_them_too():
    pytest.importorskip("numba", reason="needs numba: pip install 'sae-pipeline[probes]'")
    assert compiled_trainer() is not None
    for shape in ((13, 1), (150, 17), (400, 128)):
        x, label = problem(*shape, seed=shape[0])
        train = logistic_trainer(x, label, l1=True)
        for strength in (1e5, 3.0, 0.02, 1e-5, 3.0):  # no strength starts from the solution of another
            assert_equal_bits(train(strength), train_with_sklearn(x, label, strength, l1=True))


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
@pytest.mark.parametrize("options", [{}, {"l1_ratio": 1, "solver": "saga"}])
@pytest.mark.parametrize("shape", [(13, 1), (150, 17)])
def test_logits_and_probabilities_are_those_of_scikit_learn(shape, options, monkeypatch):
    monkeypatch.setattr(module, "MAX_ITERATIONS", 50)
    x, label = problem(*shape)
    for strength in (1e5, 0.1):  # with strength 1e5, some probabilities are exactly 1
        model = sklearn_model(x * 50, label, strength, **options)
        found = train_with_sklearn(x * 50, label, strength, l1=bool(options))
        for at in (x * 50, x[:2]):
            np.testing.assert_array_equal(found.decision(at), model.decision_function(at))
            np.testing.assert_array_equal(found.probability(at), model.predict_proba(at)[:, 1])
            np.testing.assert_array_equal(found.decision(at) > 0, model.predict(at) == 1)


def trained_with_solver(monkeypatch, l1: bool) -> list[str]:
    """The solvers of the scikit-learn models that are fitted when one regression is trained."""
    solvers, fit = [], LogisticRegression.fit
    monkeypatch.setattr(LogisticRegression, "fit", lambda self, *data: solvers.append(self.solver) or fit(self, *data))
    logistic_trainer(*problem(40, 4), l1=l1)(1.0)
    return solvers


def test_scikit_learn_trains_without_numba(monkeypatch):
    monkeypatch.setitem(sys.modules, "numba", None)
    assert compiled_trainer() is None
    assert trained_with_solver(monkeypatch, l1=True) == ["saga"]


def test_a_loop_of_other_bits_is_not_used(monkeypatch):
    calls = []

    def wrong(x, label):
        def train(strength):
            calls.append(strength)
            return train_with_sklearn(x, label, strength, l1=True)._replace(intercept=0.0)

        return train

    assert not module.equals_sklearn(wrong) and len(calls) == 1
    monkeypatch.setattr(module, "equals_sklearn", lambda trainer: False)
    numba = type(sys)("numba")
    numba.njit = lambda **_: lambda function: function
    monkeypatch.setitem(sys.modules, "numba", numba)
    assert compiled_trainer() is None


def test_an_l2_penalty_is_scikit_learn_s_alone(monkeypatch):
    monkeypatch.setattr(module, "compiled_trainer", lambda: pytest.fail("asked"))
    assert trained_with_solver(monkeypatch, l1=False) == ["lbfgs"]
