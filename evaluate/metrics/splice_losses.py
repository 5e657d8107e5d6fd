"""KL and CE of a model with an SAE spliced in, per token and summed by context (core).

Shape suffixes: N contexts, S positions, T counted tokens, D d_model, V vocabulary.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ...cache.hooks import Hook
from ...harvest.model import ForwardPass, LanguageModel
from ..context import ContextBatch
from .parts import tokens_at_once, tokens_in_cache
from .sae_statistics import Ratio

RatiosByCategory = dict[str, dict[str, Ratio]]
WHOLE_RESIDUAL = ("resid_pre", "resid_mid", "resid_post")  # sites that contain everything that later blocks read


class TokenLosses(NamedTuple):
    """Losses in nats at each token (T,): KL(original || spliced), and the CE of the next token."""

    kl_T: Tensor
    ce_T: Tensor

    def replace_at(self, place_T: Tensor, others: "TokenLosses") -> "TokenLosses":
        """A copy of these losses in which the values at the tokens where `place_T` is True are replaced by `others`."""
        return TokenLosses(*(own_T.masked_scatter(place_T, new_T) for own_T, new_T in zip(self, others, strict=True)))


def token_losses(original_TV: Tensor, p_TV: Tensor, logits_TV: Tensor, next_T: Tensor) -> TokenLosses:
    """The losses of these logits, given the log-probabilities and the probabilities of the original model."""
    tokens = tokens_in_cache(logits_TV.shape[1], logits_TV.device, len(logits_TV))
    kl, ce = [], []
    for own_TV, own_p_TV, logits, ids_T in zip(
        *(part.split(tokens) for part in (original_TV, p_TV, logits_TV, next_T)), strict=True
    ):
        logp_TV = logits.log_softmax(-1)
        ce.append(-logp_TV.gather(1, ids_T[:, None])[:, 0])
        kl.append(torch.sub(own_TV, logp_TV, out=logp_TV).mul_(own_p_TV).sum(-1))
    return TokenLosses(torch.cat(kl), torch.cat(ce))


def tokens_per_unembed(model: LanguageModel, final_TD: Tensor) -> int:
    """The number of tokens whose logits are computed at a time."""
    return tokens_at_once(model.unembed(final_TD[:1]).shape[-1], final_TD.device)


@dataclass(frozen=True)
class CountedTokens:
    """All or some of the counted tokens of a batch of `contexts` contexts.

    Attributes:
        context_T: the context of each token.
        next_T: the id of the next token.
        has_next_T: False at the last token of a context, whose next token is unknown.
    """

    contexts: int
    context_T: Tensor
    next_T: Tensor
    has_next_T: Tensor

    @classmethod
    def of(cls, batch: ContextBatch) -> "CountedTokens":
        context_T, position_T = batch.counted.nonzero(as_tuple=True)
        has_next_T = position_T + 1 < batch.is_token.sum(1)[context_T]
        return cls(len(batch.ids), context_T, batch.ids.roll(-1, 1)[batch.counted], has_next_T)

    def select(self, chosen_T: Tensor) -> "CountedTokens":
        return CountedTokens(self.contexts, self.context_T[chosen_T], self.next_T[chosen_T], self.has_next_T[chosen_T])

    def losses(
        self,
        model: LanguageModel,
        outputs_TD: Sequence[Tensor],
        tokens: int,
        report: Callable[[float], None] | None = None,
    ) -> list[TokenLosses]:
        """The losses of each final residual (T, D). The first residual belongs to the original model and is the
        reference.

        Logits are computed for `tokens` tokens at a time. A residual that is constant over positions (stride 0) is
        unembedded once. `report` is called with the share of the tokens done so far.
        """
        constant = [output.stride(0) == 0 for output in outputs_TD]
        chunks: list[list[TokenLosses]] = [[] for _ in outputs_TD]
        for start in range(0, len(self.context_T), tokens):
            rows = slice(start, start + tokens)
            if report:
                report(start / len(self.context_T))
            original_TV = model.unembed(outputs_TD[0][rows]).float().log_softmax(-1)
            p_TV = original_TV.exp()
            for of_output, output_TD, is_constant in zip(chunks, outputs_TD, constant, strict=True):
                logits_TV = model.unembed(output_TD[:1] if is_constant else output_TD[rows]).float()
                of_output.append(token_losses(original_TV, p_TV, logits_TV.expand_as(p_TV), self.next_T[rows]))
        return [TokenLosses(*map(torch.cat, zip(*of_output, strict=True))) for of_output in chunks]

    def sum_by_context(self, losses: TokenLosses, kept_T: Tensor | None = None) -> Tensor:
        """For each context, the sums over its tokens (N, 4): KL, CE, tokens, tokens with a next token.

        If `kept_T` is given, only the tokens that it selects are included.
        """
        ce_T = torch.where(self.has_next_T, losses.ce_T, 0)
        columns = [losses.kl_T, ce_T, torch.ones_like(losses.kl_T), self.has_next_T]
        values, context_T = torch.stack([column.double() for column in columns], 1).cpu(), self.context_T.cpu()
        if kept_T is not None:
            values, context_T = values[kept_T.cpu()], context_T[kept_T.cpu()]
        return torch.zeros(self.contexts, 4, dtype=torch.float64).index_add_(0, context_T, values)


def zero_ablated_output(run: ForwardPass, hook: Hook, batch: ContextBatch, constant_D: dict[Hook, Tensor]) -> Tensor:
    """The model's final residual at the counted positions (T, D) when a hook is zeroed at every position.

    If the whole residual stream is zeroed, attention over equal values returns that value, so all positions and texts
    have the same output. If the first batch confirms this, the vector for each hook is stored in `constant_D`, and
    later batches do not run the model for this hook. At other sites, the residual stream still carries the text.
    """
    if hook not in constant_D:
        output_TD = run.run_from(hook, torch.zeros_like(run.activations[hook]))[batch.counted]
        if hook.site not in WHOLE_RESIDUAL or not (output_TD == output_TD[:1]).all():
            return output_TD
        constant_D[hook] = output_TD[0]
    return constant_D[hook].expand(int(batch.counted.sum()), -1)


def loss_ratios(original: Sequence[Tensor], ablated: Sequence[Tensor], spliced: Sequence[Tensor]) -> RatiosByCategory:
    """Raw KL and CE (lower is better), and their scores: 1 for the original model, 0 for the zeroed layer.

    Each argument contains one tensor (N, 4) for each batch, as returned by `CountedTokens.sum_by_context`.
    """
    _, ce_original, tokens, predictions = torch.cat([*original]).T
    (kl_zero, ce_zero, *_), (kl, ce, *_) = torch.cat([*ablated]).T, torch.cat([*spliced]).T
    return {
        "model_behavior_preservation": {
            "kl_div_score": (kl_zero - kl, kl_zero),
            "kl_div_with_ablation": (kl_zero, tokens),
            "kl_div_with_sae": (kl, tokens),
        },
        "model_performance_preservation": {
            "ce_loss_score": (ce_zero - ce, ce_zero - ce_original),
            "ce_loss_with_ablation": (ce_zero, predictions),
            "ce_loss_with_sae": (ce, predictions),
            "ce_loss_without_sae": (ce_original, predictions),
        },
    }
