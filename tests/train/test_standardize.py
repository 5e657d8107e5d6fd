"""normalize=standardize: each dimension of the input has mean 0 and variance 1, and the saved SAE takes raw rows."""

from itertools import islice
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sae.cache.loader import BatchLoader
from sae.common.errors import Interrupted, UsageError
from sae.train.activation_functions import BatchTopK
from sae.train.optimization import Optimization
from sae.train.options import read_option_docs
from sae.train.plan import TrainConfig, plan_training
from sae.train.recipe import find_recipe
from sae.train.run import SAMPLE_ROWS, TrainProgress, first_rows, run_training
from sae.train.sae import SAE, fold_normalization, load_sae
from sae.train.variant import RunConfig

from .runs import make_config, train

RECIPES = ("hierarchical-batchtopk", "hierarchical", "relu")


def rows_read(cache, count: int, seed: int = 7) -> torch.Tensor:
    with BatchLoader(cache, "layer_00", 64, seed=seed) as loader:
        return torch.cat([x_BD.clone() for x_BD in islice(loader, -(-count // 64))])[:count].float()


@pytest.mark.parametrize("pre_bias", [True, False])
def test_a_scale_for_each_dimension_is_folded_exactly(pre_bias: bool) -> None:
    """Folding changes neither the latents, nor the threshold that selects them, nor the tensors of the trained SAE."""
    activation = BatchTopK(2)
    activation.threshold.fill_(0.7)
    sae = SAE(6, 10, [activation], pre_bias=pre_bias).double().eval()
    with torch.no_grad():
        for tensor in sae.parameters():
            tensor.copy_(torch.randn(tensor.shape, dtype=torch.float64))
    before = {name: tensor.clone() for name, tensor in sae.state_dict().items()}
    scale_D, mean_D = torch.arange(1.0, 7).double() ** 2, torch.randn(6, dtype=torch.float64)
    raw, x_BD = fold_normalization(sae, scale_D, mean_D), mean_D + 20 * torch.randn(50, 6, dtype=torch.float64)
    f_BF = sae.encode((x_BD - mean_D) / scale_D)
    assert f_BF.any() and float(raw.activation[0].threshold) == pytest.approx(0.7)
    torch.testing.assert_close(raw.encode(x_BD), f_BF)
    torch.testing.assert_close(raw.decode(f_BF), scale_D * sae.decode(f_BF) + mean_D)
    assert all(torch.equal(tensor, before[name]) for name, tensor in sae.state_dict().items())


def test_the_documented_number_of_rows_is_the_one_that_is_read() -> None:
    assert f"from the first {SAMPLE_ROWS:,} rows" in " ".join(read_option_docs(Optimization)["normalize"].split())


def test_a_run_reads_its_first_rows_in_its_own_order(sparse_cache) -> None:
    """1,000 rows come from the first 16 batches.

    5,000 rows are more than the 4,096 of the cache, so they go on into a second epoch.
    """
    run = plan_training(make_config(sparse_cache, "relu", shuffle_seed=7)).runs[0]
    for count in (1000, 5000):
        assert torch.equal(first_rows(run, count), rows_read(sparse_cache, count))
    assert not torch.equal(first_rows(run, 1000), rows_read(sparse_cache, 1000, seed=0))


def test_a_finished_run_encodes_raw_rows_as_training_encoded_standardized_ones(
    sparse_cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Mean and standard deviation of the first 300 rows are computed by hand.

    The saved rows of W_dec are unit rows times that deviation.
    """
    monkeypatch.setattr("sae.train.run.SAMPLE_ROWS", 300)
    sample_ND, x_BD = rows_read(sparse_cache, 300).double(), rows_read(sparse_cache, 3000)[2000:]
    mean_D, sd_D = sample_ND.mean(0).float(), sample_ND.var(0, correction=0).sqrt().float()
    assert sd_D.max() > 1.2 * sd_D.min() and mean_D.norm() > 1
    options = ["normalize=standardize", "weight_decay=0", "warmup=0", "lr=0.01"]
    for folder in train(make_config(sparse_cache, *RECIPES, options=options, shuffle_seed=7, out=tmp_path)):
        state = load_file(folder / "checkpoints" / "step-00000012" / "state.safetensors")
        torch.testing.assert_close(state["variant.mean_D"], mean_D)
        torch.testing.assert_close(state["variant.scale"], sd_D)
        loaded = load_sae(folder)
        torch.testing.assert_close((loaded.W_dec / sd_D).norm(dim=1), torch.ones(128), rtol=1e-5, atol=1e-5)
        W_enc, b_enc, W_dec, b_dec = (state[f"variant.sae.{name}"] for name in ("W_enc", "b_enc", "W_dec", "b_dec"))
        z_BD = (x_BD - mean_D) / sd_D
        pre_BF = (z_BD - (b_dec if loaded.pre_bias else 0)) @ W_enc + b_enc
        threshold = getattr(loaded.activation[0], "threshold", torch.zeros(()))
        f_BF = pre_BF * (pre_BF > threshold)
        assert 0 < (f_BF != 0).float().mean() < 1 and b_enc.any() and b_dec.any()
        torch.testing.assert_close(loaded.encode(x_BD), f_BF, rtol=1e-3, atol=1e-4)
        recon_BD = (f_BF @ W_dec + b_dec) * sd_D + mean_D
        torch.testing.assert_close(loaded.decode(loaded.encode(x_BD)), recon_BD, rtol=1e-3, atol=1e-3)


def test_a_standardized_run_resumes_with_its_own_statistics(sparse_cache, tmp_path: Path) -> None:
    settings = {"options": ["normalize=standardize"], "log_every": 1}
    (whole,) = train(make_config(sparse_cache, "hierarchical", out=tmp_path / "whole", **settings))

    def stop(number: int, *_: object) -> None:
        if number == 6:
            raise Interrupted("stopped")

    plan = plan_training(make_config(sparse_cache, "hierarchical", out=tmp_path / "stopped", **settings))
    with pytest.raises(Interrupted):
        run_training(plan, TrainProgress(step=stop))
    folder = plan.runs[0].folder
    train(TrainConfig(resume=[folder], device="cpu"))
    assert (folder / "sae.safetensors").read_bytes() == (whole / "sae.safetensors").read_bytes()


def test_the_input_has_mean_0_and_variance_1_and_a_constant_dimension_is_only_centered() -> None:
    variant = find_recipe("relu").make(RunConfig(3, 8, 10, 64), {"normalize": "standardize"})
    rows_ND = torch.tensor([[1.0, 10.0, 7.0], [1.5, 50.0, 7.0]])
    variant.set_normalization(torch.full((3,), 99.0), 1e6, rows_ND)
    step = variant(torch.tensor(0), rows_ND, torch.optim.AdamW(variant.parameters()))
    assert step.x_BD.tolist() == [[-1, -1, 0], [1, 1, 0]]
    assert torch.equal(variant.sae.b_dec, (99 - variant.mean_D) / variant.scale)  # the mean of the whole cache


def test_a_router_cannot_be_folded_and_other_inputs_keep_one_scale() -> None:
    with pytest.raises(UsageError, match="normalize=standardize cannot be folded into an SAE with a router"):
        find_recipe("switch").make(RunConfig(8, 64, 10, 64), {"normalize": "standardize"})
    assert find_recipe("switch").make(RunConfig(8, 64, 10, 64), {"normalize": "none"}).scale.shape == ()
