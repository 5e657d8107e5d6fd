"""Passages for scoring an explanation by detection and fuzzing: in half of them the latent fires.

Source: Paulo et al. 2024 (arXiv 2410.13928), and the authors' library delphi. As in delphi, the passages in
which the latent fires are chosen so that they cover the whole range of its activations. The other passages are drawn
from the whole text, among those in which the latent does not fire.

Shape suffixes: R rows of text, S positions, P tokens on which a latent fires, W tokens of a passage.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from .activation_examples import BUFFER, ExampleWindow, LatentExamples, cut_window

MOST, FEWEST = 10, 5  # passages of each kind for one latent; a latent with fewer than FEWEST is not scored
SILENT_DRAWS = 500  # places that are tried to find passages in which the latent does not fire


class BalancedPassage(NamedTuple):
    """A passage, whether the latent fires in it, and the tokens (W,) that are marked for fuzzing.

    In a passage in which the latent fires, the marked tokens are those on which it fires. Each of the other passages
    has the same marks as one in which the latent fires, so that neither the number nor the positions of the marks
    reveal whether the latent fires.
    """

    window: ExampleWindow
    fires: bool
    mark_W: np.ndarray


def select_balanced(
    flat_P: np.ndarray,
    value_P: np.ndarray,
    ids_RS: np.ndarray,
    examples: LatentExamples,
    rng: np.random.Generator,
) -> list[BalancedPassage] | None:
    """Up to `MOST` passages in which the latent fires and equally many in which it does not, in random order.

    Returns None if there are fewer than `FEWEST` passages of either kind.

    At the flat indices `flat_P` (ascending) of `ids_RS`, the latent has the activations `value_P`, all above 0. At all
    other tokens it is 0. Passages of the same kind share no token. In addition, the passages in which the latent fires
    have no token in common with the passages that the explanation was made from.

    In half of the passages, the latent fires on the middle token. To choose these tokens, the tokens on which the
    activation exceeds `examples.threshold` are sorted by activation and divided into `MOST` parts of about the same
    size, and at most one token is drawn from each part. In the other half, the latent fires on no token.
    """
    rows, context = ids_RS.shape
    explained = [window.middle for window in examples.explained]
    position_P = flat_P % context
    whole_P = (position_P >= BUFFER) & (position_P < context - BUFFER) & (value_P > examples.threshold)
    candidates = np.flatnonzero(whole_P & ~overlaps(flat_P, explained))
    firing: list[int] = []
    for tenth in np.array_split(candidates[np.argsort(value_P[candidates], kind="stable")], MOST):
        firing += first_separate(flat_P[rng.permutation(tenth)], firing, 1)
    anywhere = rng.integers(rows, size=SILENT_DRAWS) * context
    anywhere += rng.integers(BUFFER, context - BUFFER, size=SILENT_DRAWS)
    before, through = (np.searchsorted(flat_P, anywhere + end) for end in (-BUFFER, BUFFER + 1))
    silent = first_separate(anywhere[before == through], [], len(firing))
    count = min(len(firing), len(silent))
    if count < FEWEST:
        return None
    passages = []
    for with_latent, without in zip(rng.permutation(firing)[:count], silent, strict=False):
        window = cut_window(int(with_latent), flat_P, value_P, ids_RS)
        mark_W = window.values > examples.threshold
        passages.append(BalancedPassage(window, True, mark_W))
        passages.append(BalancedPassage(cut_window(int(without), flat_P, value_P, ids_RS), False, mark_W))
    return [passages[i] for i in rng.permutation(len(passages))]


def overlaps(flat: np.ndarray, others: Sequence[int]) -> np.ndarray:
    """For each token in `flat`, whether the passage around it shares a token with the passage around any of the tokens
    in `others`. Passages do not cross the ends of their row, so passages in different rows never overlap."""
    return (np.abs(flat[:, None] - np.array(others, dtype=np.int64)) <= 2 * BUFFER).any(1)


def first_separate(candidates: Iterable[int], taken: Sequence[int], count: int) -> list[int]:
    """The first `count` candidates that share no token with each other or with the passages in `taken`."""
    found: list[int] = []
    for flat in candidates:
        if len(found) == count:
            break
        if all(abs(int(flat) - other) > 2 * BUFFER for other in (*taken, *found)):
            found.append(int(flat))
    return found
