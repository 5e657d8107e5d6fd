"""Letter probes on dense and sparse rows equal those of a plain training loop. Split latents are counted by F1."""

import pytest
import torch

from sae.evaluate.metrics.letter_probes import (
    DenseRows,
    SparseLatents,
    count_split_latents,
    seeded_generator,
    train_letter_probes,
)


def plain_probe(x, letters, *, batch, epochs, weight_decay, l1, generator):
    """Train a probe as SAEBench does, with nn.Linear and torch.optim."""
    linear = torch.nn.Linear(x.shape[1], 26)
    bound = x.shape[1] ** -0.5
    linear.weight.data.uniform_(-bound, bound, generator=generator)
    linear.bias.data.uniform_(-bound, bound, generator=generator)
    answers = torch.nn.functional.one_hot(letters, 26).float()
    loss_of = torch.nn.BCEWithLogitsLoss(pos_weight=(1 - answers).sum(0) / answers.sum(0))
    optimizer = torch.optim.Adam(linear.parameters(), lr=1e-2, weight_decay=weight_decay)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, (1e-5 / 1e-2) ** (1 / epochs))
    for _ in range(epochs):
        order = torch.randperm(len(x), generator=generator)
        for start in range(0, len(x), batch):
            index = order[start : start + batch]
            loss = loss_of(linear(x[index]), answers[index]) + l1 * linear.weight.abs().sum(-1).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        schedule.step()
    return linear.weight.detach(), linear.bias.detach()


@pytest.mark.parametrize("sparse", [False, True])
def test_probes_are_those_of_a_plain_training_loop(sparse):
    torch.manual_seed(0)
    x, letters = torch.randn(130, 40).relu(), torch.arange(130) % 26
    x[5] = 0  # a word on which no latent fires
    rows = SparseLatents.from_dense(x.split(50), 40) if sparse else DenseRows(x)
    settings = {"batch": 32, "epochs": 6, "weight_decay": 1e-4, "l1": 0.01}
    found = train_letter_probes(rows, letters, **settings, generator=seeded_generator(0, "a"))
    weight, bias = plain_probe(x, letters, **settings, generator=seeded_generator(0, "a"))
    torch.testing.assert_close(found.weight_LD, weight, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(found.bias_L, bias, atol=1e-5, rtol=1e-4)
    if sparse:
        chosen = torch.tensor([3, 0, 39])
        assert torch.equal(rows.dense_columns(chosen), x[:, chosen])


@pytest.mark.parametrize(
    ("f1s", "count", "looked_at"),
    [
        ([0.5, 0.54, 0.56, 0.9], 2, 3),
        ([0.9, 0.1], 1, 2),
        ([0.0, 0.0], 1, 2),
        ([0.5, 0.53], 1, 2),  # a gain of exactly 0.03 is not enough
        ([0.1, 0.2, 0.3], 3, 3),
        ([0.7], 1, 1),
    ],
)
def test_latents_are_taken_as_long_as_f1_jumps(f1s, count, looked_at):
    assert count_split_latents(iter(f1s), 0.03) == (count, f1s[:looked_at])
