"""Passages of text around the tokens at which latents fire.

Shape suffixes: N contexts, S positions, K latents, P passages per latent, W positions of a passage.
"""

import math
from functools import cached_property
from typing import NamedTuple, Self

import numpy as np
import torch
from torch import Tensor

from ...common.errors import UsageError

DEFAULT_TOKENS = 64  # length of a passage


class PassageWindow(NamedTuple):
    """How many tokens a passage contains before and after its central token.

    Near the beginning or the end of a context, the passage is shifted to stay inside the context at full length.
    """

    before: int
    after: int

    @classmethod
    def of(cls, tokens: int) -> Self:
        """The window for passages of `tokens` tokens, three quarters of which precede the central token.

        Raises UsageError unless the number is positive.
        """
        if tokens <= 0:
            raise UsageError(f"--passage {tokens}: expected a positive number of tokens, such as {DEFAULT_TOKENS}.")
        return cls(tokens - 1 - tokens // 4, tokens // 4)

    @property
    def width(self) -> int:
        """The number of tokens, W."""
        return self.before + 1 + self.after

    def limited_to(self, context: int) -> Self:
        """This window if it is shorter than a context of `context` tokens, else a window that covers the whole
        context."""
        return self if self.width < context else self._replace(before=context - 1, after=0)

    def starts(self, position_P: Tensor, context: int) -> Tensor:
        """For each of the positions `position_P` (P,) in a context, the first position (P,) of the passage around
        it."""
        return (position_P - self.before).clamp(min=0).clamp(max=max(0, context - self.width))


DEFAULT_WINDOW = PassageWindow.of(DEFAULT_TOKENS)


class Passage(NamedTuple):
    """A token at which a latent fires, with the latent's activations `values` (W,) around it.

    `values[i]` is at position `start + i` of the context; values after the end of the context are zero.
    """

    context: int
    position: int  # of the central token in its context
    start: int  # position of the first token of the passage
    values: np.ndarray

    @property
    def value(self) -> float:
        return float(self.values[self.position - self.start])

    def inside(self, length: int) -> np.ndarray:
        """The activations at the positions that exist in a context of `length` tokens."""
        return self.values[: length - self.start]


class PassageTable:
    """The `count` passages with the largest score for each latent, at most one per context.

    `score` (K, P) is not sorted, and is -inf for missing passages. `context` and `position` (K, P) locate the central
    token, `start` (K, P) is the first position of the passage around it, and `values` (K, P, W) are the activations.
    """

    def __init__(
        self, latents: int, count: int, window: PassageWindow = DEFAULT_WINDOW, device: torch.device | str = "cpu"
    ) -> None:
        self.window = window
        self.score = torch.full((latents, count), -math.inf, device=device)
        self.context = torch.zeros(latents, count, dtype=torch.int64, device=device)
        self.position, self.start = torch.zeros_like(self.context), torch.zeros_like(self.context)
        self.values = torch.zeros(latents, count, window.width, device=device)

    def offer(self, score_NK: Tensor, position_NK: Tensor, f_NSK: Tensor, first: int) -> None:
        """Add the contexts `first`, `first` + 1, ..., each with a score and a central position for every latent."""
        kept = self.score.shape[1]
        index_KP = torch.cat([self.score, score_NK.T], 1).topk(kept, 1).indices
        fresh_KP = index_KP >= kept
        stays_KP = torch.zeros(len(index_KP), kept + 1, dtype=torch.bool, device=index_KP.device)
        stays_KP.scatter_(1, index_KP.clamp(max=kept), True)
        latent, slot = (~stays_KP[:, :kept]).nonzero(as_tuple=True)  # for each new passage, the slot of a dropped one
        context = index_KP[fresh_KP] - kept
        position = position_NK[context, latent]
        start = self.window.starts(position, length := f_NSK.shape[1])
        span = start[:, None] + torch.arange(self.window.width, device=start.device)
        values = f_NSK[context[:, None], span.clamp(max=length - 1), latent[:, None]]
        self.score[latent, slot], self.context[latent, slot] = score_NK[context, latent], context + first
        self.position[latent, slot], self.start[latent, slot] = position, start
        self.values[latent, slot] = torch.where(span < length, values, 0)

    def passages(self, latent: int) -> list[Passage]:
        """The passages of one latent, the best first; `latent` is the index of this latent among the K. `offer` must
        not be called afterwards."""
        score_P, context_P, position_P, start_P, values_PW = (array[latent] for array in self._arrays)
        order = np.argsort(-score_P, kind="stable")
        return [
            Passage(int(context_P[p]), int(position_P[p]), int(start_P[p]), values_PW[p])
            for p in order[score_P[order] > -math.inf]
        ]

    @cached_property
    def _arrays(self) -> list[np.ndarray]:
        return [part.cpu().numpy() for part in (self.score, self.context, self.position, self.start, self.values)]


def quantile_passages(
    passages: PassageTable, latent: int, shares: tuple[float, ...] = (0.9, 0.7, 0.5, 0.3, 0.1)
) -> list[Passage]:
    """The sampled passages of a latent at these quantiles of activation, the strongest first."""
    ordered = sorted(passages.passages(latent), key=lambda passage: passage.value)
    places = dict.fromkeys(round(share * (len(ordered) - 1)) for share in shares) if ordered else {}
    return [ordered[place] for place in places]
