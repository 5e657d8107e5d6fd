"""Logistic regressions equal to scikit-learn's. With an L1 penalty, training is much faster if numba is installed.

An L1 probe on many latents reaches the iteration limit before it converges, so its AUC depends on every step. Only the
same steps, rounded in the same places, produce the AUC that sae-probes reports. scikit-learn's loop makes three passes
over the features of a text. Latents are mostly zero, and zeros matter in only one of these passes.

Source: SAGA, Defazio et al. 2014, arXiv 1407.0202, section 4, as scikit-learn 1.9 computes it in float64 (`_sag_fast`).
`compiled_trainer` compares the two implementations on this machine before it uses the compiled loop.

Shape suffixes: M texts, D features, Z numbers that are not zero.
"""

import functools
import math
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple, Self

import numpy as np
from scipy.special import expit

SEED, MAX_ITERATIONS = 42, 1000
TOLERANCE = 1e-4  # as in scikit-learn: stop if no weight changes by more than this share of the largest weight


class LogisticModel(NamedTuple):
    """A trained regression: weights (D,) and the intercept."""

    weight_D: np.ndarray
    intercept: float

    def decision(self, x_MD: np.ndarray) -> np.ndarray:
        """The logits (M,), bit for bit equal to LogisticRegression.decision_function; positive predicts class 1."""
        return (x_MD @ self.weight_D[:, None])[:, 0] + self.intercept

    def probability(self, x_MD: np.ndarray) -> np.ndarray:
        """The probability of class 1 (M,), bit for bit equal to LogisticRegression.predict_proba."""
        return expit(self.decision(x_MD))


class TrainingTexts(NamedTuple):
    """The training texts as the loop reads them. This form does not depend on C."""

    value_Z: np.ndarray  # the numbers that are not zero, text by text
    index_Z: np.ndarray  # the feature of each
    start_M: np.ndarray  # index of each text's first number, then the total (M + 1,)
    label_M: np.ndarray  # float64
    features: int
    step: float

    @classmethod
    def of(cls, x_MD: np.ndarray, label_M: np.ndarray) -> Self:
        row_M, index_Z = np.nonzero(x_MD)
        start_M = np.searchsorted(row_M, np.arange(len(x_MD) + 1))
        largest = np.einsum("ij,ij->i", x_MD, x_MD).max()
        step = float(1.0 / (2 * (0.25 * (largest + 1))))
        return cls(x_MD[row_M, index_Z], index_Z, start_M, label_M.astype(np.float64), x_MD.shape[1], step)


Train = Callable[[float], LogisticModel]  # C -> the regression trained with this C
Trainer = Callable[[np.ndarray, np.ndarray], Train]


def logistic_trainer(x_MD: np.ndarray, label_M: np.ndarray, *, l1: bool) -> Train:
    """A function that fits the regression to float64 rows with labels 0 or 1.

    With L1 it uses the compiled loop if that is available.
    """
    trainer = compiled_trainer() if l1 else None
    return trainer(x_MD, label_M) if trainer else functools.partial(train_with_sklearn, x_MD, label_M, l1=l1)


def train_with_sklearn(x_MD: np.ndarray, label_M: np.ndarray, strength: float, *, l1: bool) -> LogisticModel:
    """Train with scikit-learn alone, by saga with an L1 penalty or by lbfgs with an L2 penalty, even if it does not
    converge."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    penalty: dict[str, Any] = {"l1_ratio": 1, "solver": "saga"} if l1 else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        model = LogisticRegression(C=strength, random_state=SEED, max_iter=MAX_ITERATIONS, **penalty).fit(x_MD, label_M)
    return LogisticModel(model.coef_[0], float(model.intercept_[0]))


@functools.cache
def compiled_trainer() -> Trainer | None:
    """A trainer with a compiled loop. None if numba is not installed, or if the trainer's results differ from
    scikit-learn's in any bit."""
    try:
        import numba
    except ImportError:
        return None
    trainer = functools.partial(trainer_of, numba.njit(nogil=True)(saga_epochs))
    return trainer if equals_sklearn(trainer) else None


def trainer_of(loop: Callable[..., tuple[np.ndarray, float]], x_MD: np.ndarray, label_M: np.ndarray) -> Train:
    """A function that trains with a loop such as `saga_epochs`."""
    texts, first = TrainingTexts.of(x_MD, label_M), first_random()

    def train(strength: float) -> LogisticModel:
        return LogisticModel(*loop(*texts, 1.0 / strength / len(x_MD), first, TOLERANCE, MAX_ITERATIONS))

    return train


@functools.cache
def first_random() -> int:
    """The initial state of the random generator that draws the texts. It is the same as in scikit-learn."""
    return int(np.random.RandomState(SEED).randint(1, np.iinfo(np.int32).max))


def saga_epochs(
    value_Z: np.ndarray, index_Z: np.ndarray, start_M: np.ndarray, label_M: np.ndarray, features: int, step: float,
    penalty: float, random: int, tolerance: float, max_iterations: int,
) -> tuple[np.ndarray, float]:  # fmt: skip
    """Run all epochs, each with as many random draws as there are texts. Returns the weights and the intercept."""
    texts = len(start_M) - 1
    weight_D, gradient_D, before_D = np.zeros(features), np.zeros(features), np.zeros(features)
    memory_M, seen_M = np.zeros(texts), np.zeros(texts, np.bool_)
    step_sum, penalty_sum = np.zeros(texts + 1), np.zeros(texts + 1)
    intercept, intercept_gradient, seen = 0.0, 0.0, 0
    for _ in range(max_iterations):
        for turn in range(texts + 1):
            if turn > 0:  # finish the previous update: step along the mean gradient, then soft threshold
                along = step_sum[turn] - step_sum[turn - 1]
                threshold = penalty_sum[turn] - penalty_sum[turn - 1]
                for d in range(features):
                    moved = weight_D[d] - along * gradient_D[d]
                    above, below = moved - threshold, -moved - threshold
                    weight_D[d] = (above if above > 0 else 0.0) - (below if below > 0 else 0.0)
            if turn == texts:
                break
            random ^= (random << 13) & 0xFFFFFFFF
            random ^= random >> 17
            random ^= (random << 5) & 0xFFFFFFFF
            text = (random & 0x7FFFFFFF) % texts
            if not seen_M[text]:
                seen_M[text] = True
                seen += 1
            product = 0.0
            for z in range(start_M[text], start_M[text + 1]):
                product += weight_D[index_Z[z]] * value_Z[z]
            logit, label = product + intercept, label_M[text]
            if logit > -37:
                power = math.exp(-logit)
                gradient = ((1 - label) - label * power) / (1 + power)
            else:
                gradient = math.exp(logit) - label
            change, share = gradient - memory_M[text], 1 - 1.0 / seen
            memory_M[text] = gradient
            for z in range(start_M[text], start_M[text + 1]):
                d, correction = index_Z[z], value_Z[z] * change
                weight_D[d] -= correction * step * share
                gradient_D[d] += correction
            intercept_gradient += change
            intercept -= step * intercept_gradient / seen + change * (step * share)
            step_sum[turn + 1] = step_sum[turn] + step / seen
            penalty_sum[turn + 1] = penalty_sum[turn] + step * penalty
        largest, largest_change = 0.0, 0.0
        for d in range(features):
            largest = max(largest, abs(weight_D[d]))
            largest_change = max(largest_change, abs(weight_D[d] - before_D[d]))
            before_D[d] = weight_D[d]
        if (largest != 0 and largest_change / largest <= tolerance) or (largest == 0 and largest_change == 0):
            break
    return weight_D, intercept


def equals_sklearn(trainer: Trainer) -> bool:
    """Whether the trainer and scikit-learn give results that are equal bit for bit on a small problem. This depends on
    numba's compiler and on the compiler that built scikit-learn."""
    random = np.random.RandomState(0)
    label_M = np.arange(150) % 2
    x_MD = random.gamma(2, 2, (150, 24)) * (random.rand(150, 24) < 0.2 + 0.2 * label_M[:, None])
    train = trainer(x_MD, label_M)
    for strength in (100.0, 0.5):
        found, expected = train(strength), train_with_sklearn(x_MD, label_M, strength, l1=True)
        if not (np.array_equal(found.weight_D, expected.weight_D) and found.intercept == expected.intercept):
            return False
    return True
