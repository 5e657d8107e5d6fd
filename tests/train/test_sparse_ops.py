"""Products over the selected latents equal the dense ones: forward, every gradient, and which of the two is used."""

import pytest
import torch

from sae.common.precision import PRECISIONS
from sae.train import sparse_ops
from sae.train.activation_functions import BatchTopK, ReLU, TopK
from sae.train.sae import SAE

D_IN, D_SAE, BATCH = 6, 40, 32
both = pytest.mark.parametrize(
    "activation", [TopK(3), BatchTopK(2.5), BatchTopK(0.5)], ids=["topk", "batchtopk", "few"]
)


def tensors(monkeypatch, ways: dict[str, dict[str, float]], activation, pre_bias: bool) -> dict[str, torch.Tensor]:
    """A forward pass and the gradients of a loss that uses all of it.

    `ways` sets the n/k from which products are sparse.
    """
    monkeypatch.setattr(sparse_ops, "SPARSE_FROM", ways)
    torch.manual_seed(0)
    sae = SAE(D_IN, D_SAE, [activation], pre_bias=pre_bias).double()
    for parameter in sae.parameters():
        torch.nn.init.normal_(parameter)
    x_BD, weight_BD, weight_BF = torch.randn(BATCH, D_IN), torch.randn(BATCH, D_IN), torch.randn(BATCH, D_SAE)
    done = sae(x_BD.double())
    assert (sae.sparse_activation() is not None) == bool(ways)
    loss = (done.recon_BD * weight_BD).sum() + done.recon_BD.square().sum()
    loss = loss + (done.f_BF.square() * weight_BF).sum() + (done.pre_BF.relu() * weight_BF).sum()
    loss.backward()
    return {name: getattr(done, name) for name in ("pre_BF", "f_BF", "recon_BD")} | {
        f"gradient of {name}": p.grad for name, p in sae.named_parameters()
    }


@both
@pytest.mark.parametrize("pre_bias", [True, False])
def test_sparse_products_equal_dense_ones(activation, pre_bias, monkeypatch) -> None:
    gathered = tensors(monkeypatch, {"cpu": {"float32": 1}}, activation, pre_bias)
    dense = tensors(monkeypatch, {}, activation, pre_bias)
    assert gathered.keys() == dense.keys()
    assert all((dense[f"gradient of {name}"] != 0).any() for name in ("W_enc", "W_dec", "b_enc", "b_dec"))
    for name, tensor in dense.items():
        torch.testing.assert_close(gathered[name], tensor, rtol=1e-12, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")
        assert gathered[name].stride() == tensor.stride(), name  # the optimizer and checkpoints see the same layout


def test_by_hand() -> None:
    """There are two tokens and three latents.

    The first token keeps latents 0 and 2 with values 2 and 3, the second keeps latent 2 with value 5. No token keeps
    latent 1.
    """
    at = sparse_ops.SelectedLatents.of(torch.tensor([0, 2, 5]), 2, 3)
    assert [t.tolist() for t in at[1:-1]] == [[0, 0, 1], [0, 2, 2], [0, 2], [0, 1, 2], [0, 1, 1]]
    value_N = torch.tensor([2.0, 3.0, 5.0], requires_grad=True)
    w_FD = torch.tensor([[1.0, 0.0], [7.0, 7.0], [1.0, 1.0]], requires_grad=True)
    recon_BD = sparse_ops.decode(sparse_ops.KeptLatents(value_N, at), w_FD)
    assert recon_BD.tolist() == [[5, 3], [5, 5]]
    recon_BD.backward(torch.tensor([[1.0, 0.0], [0.0, 10.0]]))
    assert value_N.grad.tolist() == [1, 1, 10]
    assert w_FD.grad.tolist() == [[2, 0], [0, 0], [3, 50]]


def test_a_gradient_that_is_one_number_reaches_every_row() -> None:
    """The gradient of a sum is one number that is expanded without being written out."""
    at = sparse_ops.SelectedLatents.of(torch.tensor([0, 2, 5]), 2, 3)
    w_FD = torch.ones(3, 4, requires_grad=True)
    sparse_ops.decode(sparse_ops.KeptLatents(torch.tensor([2.0, 3.0, 5.0]), at), w_FD).sum().backward()
    assert w_FD.grad.tolist() == [[2.0] * 4, [0.0] * 4, [8.0] * 4]


@pytest.mark.parametrize("frozen", ["W_enc", "W_dec"])
def test_frozen_weights_get_no_gradient_and_cost_no_product(monkeypatch, frozen: str) -> None:
    monkeypatch.setattr(sparse_ops, "SPARSE_FROM", {"cpu": {"float32": 1}})
    sums, sum_by_latent = [], sparse_ops.sum_by_latent
    monkeypatch.setattr(sparse_ops, "sum_by_latent", lambda *a, **k: sums.append(a) or sum_by_latent(*a, **k))
    sae = SAE(D_IN, D_SAE, [TopK(3)])
    getattr(sae, frozen).requires_grad_(False)
    sae.run(torch.randn(BATCH, D_IN)).recon_BD.square().sum().backward()
    assert len(sums) == 1 and [name for name, p in sae.named_parameters() if p.grad is None] == [frozen]


def test_threads_do_not_change_a_bit(monkeypatch) -> None:
    """Each sum is computed by one thread in one order, which makes a resumed run exact."""

    def gradients() -> list[torch.Tensor]:
        torch.manual_seed(0)
        sae = SAE(64, 512, [BatchTopK(8.0)])
        sae(torch.randn(256, 64)).recon_BD.square().sum().backward()
        return [p.grad for p in (sae.W_dec, sae.b_enc)]

    one = gradients()
    torch.set_num_threads(2)
    two = gradients()
    torch.set_num_threads(1)
    assert all(torch.equal(*pair) for pair in zip(one, two, strict=True))


def test_on_a_cpu_a_measured_ratio_decides() -> None:
    for precision in PRECISIONS:
        assert sparse_ops.sparse_is_faster(128, 8, "cpu", precision)
        assert not sparse_ops.sparse_is_faster(127, 8, "cpu", precision)
    assert not sparse_ops.sparse_is_faster(2**20, 1, "mps", "float32")


@pytest.mark.parametrize(
    ("precision", "row_bytes", "flops", "expected"),
    [("bfloat16", 2, 790e12, 257), ("tf32", 4, 395e12, 257), ("float32", 4, 60e12, 39)],
)
def test_on_a_gpu_bytes_and_flops_decide(precision: str, row_bytes: int, flops: float, expected: int) -> None:
    """Sparse if four gathers of k rows per token take at most 1 / 1.4 of the time of four dense products."""
    d_in, tokens, k = 2304, 4096, 100
    for d_sae in (expected * k // 2, expected * k - k, expected * k + k, expected * k * 2):
        gathers = 4 * tokens * k * d_in * row_bytes / 4.3e12
        products = 4 * 2 * tokens * d_sae * d_in / flops
        assert sparse_ops.sparse_is_faster(d_sae, k, "cuda", precision) == (1.4 * gathers <= products)
        assert sparse_ops.sparse_is_faster(d_sae, k, "cuda", precision) == (d_sae > expected * k)


def test_chains_and_evaluation_are_dense() -> None:
    assert SAE(D_IN, D_SAE, [TopK(2)]).sparse_activation()
    assert SAE(D_IN, D_SAE, [TopK(2)]).eval().sparse_activation() is None
    assert SAE(D_IN, D_SAE, [ReLU(), TopK(2)]).sparse_activation() is None
    assert SAE(D_IN, D_SAE, [ReLU()]).sparse_activation() is None
    assert SAE(D_IN, D_SAE, [TopK(3)]).sparse_activation() is None
