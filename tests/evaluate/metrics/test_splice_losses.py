"""The output after zero ablation is one vector if it is equal at all positions. If not, every batch is run."""

from types import SimpleNamespace

import pytest
import torch

from sae.cache.hooks import Hook
from sae.evaluate.metrics.splice_losses import CountedTokens, zero_ablated_output


class FakePass:
    """A pass whose output is always `output` (N, S, D). It asserts that its input is zero."""

    def __init__(self, hook: Hook, output: torch.Tensor) -> None:
        self.activations, self.output, self.runs = {hook: torch.ones(*output.shape)}, output, 0

    def run_from(self, hook: Hook, x_NSD: torch.Tensor) -> torch.Tensor:
        assert not x_NSD.any()
        self.runs += 1
        return self.output


def outputs(hook: Hook, *batches: torch.Tensor) -> tuple[list[torch.Tensor], int]:
    """The zero-ablated outputs of batches of shape (1, 2), in which both tokens count, and the number of model runs."""
    batch, constant_D, found, runs = SimpleNamespace(counted=torch.ones(1, 2, dtype=torch.bool)), {}, [], 0
    for output in batches:
        run = FakePass(hook, output)
        found.append(zero_ablated_output(run, hook, batch, constant_D))
        runs += run.runs
    return found, runs


EQUAL, UNLIKE = torch.tensor([[[1.0, 2.0], [1.0, 2.0]]]), torch.tensor([[[1.0, 2.0], [1.0, 3.0]]])


def test_one_vector_serves_all_batches_where_all_positions_end_alike() -> None:
    found, runs = outputs(Hook(3), EQUAL, UNLIKE)
    assert runs == 1 and all(torch.equal(one, EQUAL[0]) for one in found)


@pytest.mark.parametrize(
    ("hook", "first"), [(Hook(3), UNLIKE), (Hook(3, "mlp_out"), EQUAL)], ids=["positions differ", "not the residual"]
)
def test_elsewhere_every_batch_is_run(hook: Hook, first: torch.Tensor) -> None:
    """With attention sinks or learned positions, the output differs between positions. With a zeroed MLP, it still
    depends on the text."""
    found, runs = outputs(hook, first, UNLIKE + 5)
    assert runs == 2 and torch.equal(found[0], first[0]) and torch.equal(found[1], UNLIKE[0] + 5)


def test_losses_are_in_float32_where_logits_are_not() -> None:
    """This matters for a quantized last layer, for example, which rounds the logits itself."""
    logits_TV = (4 * torch.randn(2, 6, 50, generator=torch.Generator().manual_seed(0))).bfloat16()
    model = SimpleNamespace(unembed=lambda final_TD: final_TD)
    zeros = torch.zeros(6, dtype=torch.int64)
    _, losses = CountedTokens(1, zeros, zeros, zeros == 0).losses(model, [*logits_TV], 4)  # type: ignore[arg-type]
    own_TV, other_TV = logits_TV.double().log_softmax(-1)
    torch.testing.assert_close(losses.kl_T.double(), (own_TV.exp() * (own_TV - other_TV)).sum(-1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(losses.ce_T.double(), -other_TV[:, 0], rtol=1e-5, atol=1e-5)
