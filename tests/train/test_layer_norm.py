"""normalize=layer_norm: each token is normalized by itself, in training, in the saved SAE and in SAELens' files."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import Gemma2Config

from sae.cache.hooks import Hook
from sae.cache.reader import Cache
from sae.common.errors import DamagedError, UsageError
from sae.common.files import read_json
from sae.common.schemas import SAE_RECORD
from sae.evaluate.metrics.base import EvalTarget
from sae.evaluate.metrics.probe_readout import affine_decoder
from sae.evaluate.metrics.sae_statistics import SAEStatistics, splice
from sae.evaluate.run import check_sae_like
from sae.train.activation_functions import ReLU
from sae.train.formats.export import export_sae
from sae.train.formats.import_ import import_sae
from sae.train.plan import plan_training
from sae.train.run import TrainProgress, prepare_trainer, run_training
from sae.train.sae import SAE, fold_normalization, load_sae, save_sae

from ..run_records import change_record
from .runs import make_config, train

D, F = 6, 10


def rows(count: int = 40) -> Tensor:
    """Raw rows (count, 6) in float64 whose means and sizes differ."""
    generator = torch.Generator().manual_seed(1)
    size_B1 = 1 + 30 * torch.rand(count, 1, generator=generator, dtype=torch.float64)
    return size_B1 * torch.randn(count, D, generator=generator, dtype=torch.float64) + size_B1 - 9


def normed_sae(activation: tuple = (), *, pre_bias: bool = True) -> SAE:
    """A float64 SAE with a layer norm, rows of W_dec whose norms are not all 1, and nonzero biases."""
    torch.manual_seed(0)
    sae = SAE(D, F, activation, pre_bias=pre_bias, layer_norm=True).double().requires_grad_(False).eval()
    sae.W_dec.mul_(torch.linspace(0.5, 2, F)[:, None])
    for tensor in (sae.b_enc, sae.b_dec, sae.W_enc):
        tensor.normal_()
    sae.origin = {"model": {"name": "google/gemma-2-2b", "revision": None}, "layer": 12, "site": "resid_post"}
    return sae


def by_hand(sae: SAE, x_BD: Tensor) -> tuple[Tensor, Tensor]:
    """Latents and reconstruction of a relu SAE, row by row."""
    latents, recons = [], []
    for x_D in x_BD:
        mean, deviation = sum(x_D) / D, (sum((x_D - sum(x_D) / D) ** 2) / (D - 1)) ** 0.5
        z_F = ((x_D - mean) / (deviation + 1e-5) - sae.pre_bias * sae.b_dec) @ sae.W_enc + sae.b_enc
        f_F = z_F.clamp(min=0)
        latents.append(deviation * f_F)
        recons.append(deviation * (f_F @ sae.W_dec + sae.b_dec) + mean)
    return torch.stack(latents), torch.stack(recons)


@pytest.mark.parametrize("pre_bias", [True, False])
def test_latents_and_reconstructions_are_in_units_of_the_token(pre_bias: bool) -> None:
    sae, x_BD = normed_sae(pre_bias=pre_bias), rows()
    f_BF, recon_BD = by_hand(sae, x_BD)
    torch.testing.assert_close(sae.encode(x_BD), f_BF)
    torch.testing.assert_close(sae.decode(f_BF, x_BD), recon_BD)
    done = sae(x_BD)
    torch.testing.assert_close(done.f_BF, f_BF)
    torch.testing.assert_close(done.recon_BD, recon_BD)
    torch.testing.assert_close(done.pre_BF.relu() * x_BD.std(-1, keepdim=True), f_BF)
    torch.testing.assert_close(sae.encode(x_BD.view(2, 20, D)), f_BF.view(2, 20, F))


def test_a_token_times_a_number_has_latents_times_that_number() -> None:
    """A number added to all elements of a token shifts the reconstruction and does not change the latents."""
    sae, x_BD = normed_sae(), 100 * rows()
    f_BF, recon_BD = sae.encode(x_BD), sae.decode(sae.encode(x_BD), x_BD)
    y_BD = 3 * x_BD + 7
    torch.testing.assert_close(sae.encode(y_BD), 3 * f_BF, rtol=1e-6, atol=1e-3)
    torch.testing.assert_close(sae.decode(3 * f_BF, y_BD), 3 * recon_BD + 7, rtol=1e-6, atol=1e-3)


def test_a_token_without_variance_has_no_latents_and_is_its_own_reconstruction() -> None:
    sae, x_BD = normed_sae(), torch.tensor([[0.0] * D, [4.0] * D], dtype=torch.float64)
    assert not sae.encode(x_BD).any()
    assert torch.equal(sae.decode(sae.encode(x_BD), x_BD), x_BD)


def test_activations_are_normalized_in_the_precision_they_come_in() -> None:
    """A bfloat16 SAE reads float32 rows whose mean is large.

    If they were rounded first, their differences would be lost.
    """
    sae, x_BD = normed_sae(), rows().float() + 1000
    f_BF = sae.encode(x_BD.double())
    half_BF = sae.bfloat16().encode(x_BD).double()
    assert (half_BF - f_BF).norm() < 0.02 * f_BF.norm()
    sae.double()
    recon_BD = sae.decode(f_BF, x_BD.double()) - 1000
    half_BD = sae.bfloat16().decode(f_BF.bfloat16(), x_BD).double() - 1000
    assert (half_BD - recon_BD).abs().max() < 10  # rounding 1000 itself can give 4, and sums give more
    sae.bfloat16()
    assert sae.decode(f_BF.bfloat16(), x_BD).dtype == torch.bfloat16  # the dtype is that without a layer norm
    sae.float()
    f_BF, x_BD = f_BF.float(), x_BD.bfloat16()
    assert torch.equal(sae.encode(x_BD), sae.encode(x_BD.float()))
    assert torch.equal(sae.decode(f_BF, x_BD), sae.decode(f_BF, x_BD.float()))


def test_a_layer_norm_cannot_be_undone_without_the_token() -> None:
    sae, x_BD = normed_sae(), rows()
    with pytest.raises(UsageError, match=r"call decode\(f, x\) with the activations x that f was encoded from"):
        sae.decode(sae.encode(x_BD))
    with pytest.raises(UsageError, match="6 is its d_in"):
        sae.decode(sae.encode(x_BD), x_BD[:, :5])
    plain = SAE(D, F).double()
    assert torch.equal(plain.decode(plain.encode(x_BD), x_BD), plain.decode(plain.encode(x_BD)))


# --- training and the saved SAE -----------------------------------------------------------------------------------


def test_training_sees_rows_of_mean_0_and_deviation_1(make_trainer, batches: list[Tensor]) -> None:
    step = make_trainer("relu normalize=layer_norm").step(batches[0])
    torch.testing.assert_close(step.x_BD.mean(1), torch.zeros(len(step.x_BD)), rtol=0, atol=1e-5)
    torch.testing.assert_close(step.x_BD.square().sum(1), torch.full((len(step.x_BD),), 31.0), rtol=1e-4, atol=0)
    x_D = batches[0][3].double()
    torch.testing.assert_close(step.x_BD[3].double(), (x_D - x_D.mean()) / x_D.std(), rtol=1e-4, atol=1e-5)


def test_b_dec_starts_at_the_normalized_mean_row_or_at_zero(make_variant, sparse_cache: Cache) -> None:
    mean_D = torch.from_numpy(sparse_cache.mean("layer_00")).float()
    rms = (sparse_cache.statistics("layer_00")["mean_square_norm"] / 32) ** 0.5
    started = make_variant("relu normalize=layer_norm").sae.b_dec
    torch.testing.assert_close(started.data, (mean_D - mean_D.mean()) / rms)
    assert not make_variant("relu normalize=layer_norm b_dec_init=zero").sae.b_dec.any()


@pytest.mark.parametrize("normalize", ["layer_norm", "standardize"])
def test_centering_as_well_is_refused(make_variant, normalize: str) -> None:
    with pytest.raises(UsageError, match=f"center=true has no effect with normalize={normalize}"):
        make_variant(f"relu normalize={normalize}", center=True)


def test_a_recipe_that_centers_by_default_leaves_it_out(make_variant) -> None:
    assert make_variant("switch").optimization.center
    assert not make_variant("switch normalize=layer_norm").optimization.center


@pytest.mark.parametrize("variant", ["relu", "progressive", "jumprelu"])
def test_the_saved_sae_equals_the_trained_one_on_raw_rows(
    sparse_cache: Cache, batches: list[Tensor], tmp_path: Path, variant: str
) -> None:
    options = [f"{variant}.normalize=layer_norm", f"{variant}.lr=0.01"]
    plan = plan_training(make_config(sparse_cache, variant, options=options, steps=4, out=tmp_path))
    run_training(plan)
    (run,) = plan.runs
    trainer = prepare_trainer(run, "cpu", TrainProgress())
    assert trainer.steps_done == 4
    x_BD = 10 * batches[0].float() + 3  # no row of the cache
    with torch.no_grad():
        step = trainer.variant.eval()(trainer.i, x_BD, trainer.optimizer)
        mean_B1, deviation_B1 = x_BD.mean(1, keepdim=True), x_BD.std(1, keepdim=True)
        saved = run.load()
        f_BF = saved.encode(x_BD)
        expected_BD = step.recon_BD * deviation_B1 + mean_B1
        torch.testing.assert_close(f_BF, step.f_BF * deviation_B1, rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(saved.decode(f_BF, x_BD), expected_BD, rtol=1e-5, atol=1e-4)
    assert step.f_BF.any() and trainer.variant.sae.b_dec.any()
    assert read_json(run.folder / "sae.json")["layer_norm"] is True
    assert read_json(run.folder / "sae.json")["format"] == 2  # which earlier versions refuse


def test_an_sae_of_raw_input_is_saved_without_a_layer_norm(sparse_cache: Cache, tmp_path: Path) -> None:
    (folder,) = train(make_config(sparse_cache, "relu", options=["normalize=none"], steps=2, out=tmp_path))
    assert "layer_norm" not in read_json(folder / "sae.json")


def test_sae_json_says_whether_there_is_a_layer_norm(tmp_path: Path) -> None:
    sae, x_BD = normed_sae((ReLU(),)).float(), rows().float()
    save_sae(sae, tmp_path, {"layer": 3})
    assert torch.equal(load_sae(tmp_path).encode(x_BD), sae.encode(x_BD))
    for changes in ({"format": 1}, {"layer_norm": False}):
        save_sae(sae, tmp_path, {"layer": 3})
        change_record(SAE_RECORD, tmp_path / "sae.json", changes)
        with pytest.raises(DamagedError, match="contradicts itself: SAEs with a layer norm have format 2, all"):
            load_sae(tmp_path)
    save_sae(fold_normalization(sae, 1.0, torch.zeros(D)), tmp_path, {"layer": 3})
    assert read_json(tmp_path / "sae.json")["format"] == 1 and "layer_norm" not in read_json(tmp_path / "sae.json")
    change_record(SAE_RECORD, tmp_path / "sae.json", {"format": 3})
    with pytest.raises(UsageError, match="has format 3, but this version reads 1 and 2"):
        load_sae(tmp_path)


# --- evaluation ---------------------------------------------------------------------------------------------------


def test_evaluation_splices_the_reconstruction_of_raw_rows() -> None:
    sae, x_BD = normed_sae().float(), rows(600).float()  # more than a chunk
    stats, counted = SAEStatistics(), torch.ones(1, 600, dtype=torch.bool)
    counted[0, 0] = False
    patched = splice(EvalTarget(sae, Hook(0)), x_BD[None], counted, [(stats, counted)])
    recon_BD = by_hand(sae, x_BD[1:])[1]
    torch.testing.assert_close(patched[0, 1:], recon_BD, rtol=1e-4, atol=1e-3)
    assert torch.equal(patched[0, 0], x_BD[0])


def test_ablation_reads_the_decoder_as_an_affine_map() -> None:
    sae = normed_sae().float()
    assert torch.equal(affine_decoder(sae, D, torch.device("cpu")), sae.W_dec)


def test_an_sae_in_memory_is_accepted_for_evaluation() -> None:
    class Context:
        model_config, device = Gemma2Config(hidden_size=D, num_attention_heads=2), torch.device("cpu")

    check_sae_like("mine", normed_sae().float(), Hook(0), Context())


# --- files of SAELens ---------------------------------------------------------------------------------------------


def saelens_by_hand(folder: Path, x_BD: Tensor) -> tuple[Tensor, Tensor]:
    """Latents and reconstructions as SAELens computes them: it normalizes each token and undoes that in the output."""
    w = {name: tensor.double() for name, tensor in load_file(folder / "sae_weights.safetensors").items()}
    mean_B1, deviation_B1 = x_BD.mean(-1, keepdim=True), x_BD.std(-1, keepdim=True)
    f_BF = (((x_BD - mean_B1) / (deviation_B1 + 1e-5)) @ w["W_enc"] + w["b_enc"]).relu()
    return f_BF, (f_BF @ w["W_dec"] + w["b_dec"]) * deviation_B1 + mean_B1


def test_saelens_files_hold_the_layer_norm(tmp_path: Path) -> None:
    sae, x_BD = normed_sae((ReLU(),)), rows()
    exported = export_sae(sae, "saelens", tmp_path / "exported")
    assert read_json(exported.folder / "cfg.json")["normalize_activations"] == "layer_norm"
    assert "larger by the token's standard deviation" in " ".join(exported.notes)
    f_BF, recon_BD = saelens_by_hand(exported.folder, x_BD)
    ours_BF = sae.encode(x_BD)
    norms_F, deviation_B1 = sae.W_dec.norm(dim=1), x_BD.std(-1, keepdim=True)
    torch.testing.assert_close(f_BF * deviation_B1, ours_BF * norms_F, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(recon_BD, sae.decode(ours_BF, x_BD), rtol=1e-5, atol=1e-4)
    imported = import_sae(exported.folder, out=tmp_path / "runs")
    assert "SAELens' latents multiplied by the token's standard deviation" in " ".join(imported.notes)
    back = load_sae(imported.folder).double()
    torch.testing.assert_close(back.encode(x_BD), f_BF * deviation_B1, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(back.decode(back.encode(x_BD), x_BD), recon_BD, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("to", ["gemma-scope", "dictionary-learning", "sparsify"])
def test_other_formats_refuse_it(tmp_path: Path, to: str) -> None:
    with pytest.raises(UsageError, match=f"{to} cannot store this SAE: it layer-normalizes each token.* saelens can"):
        export_sae(normed_sae((ReLU(),)), to, tmp_path / "exported", approximate="relu")
    assert not (tmp_path / "exported").exists()


def test_an_approximation_keeps_the_layer_norm(sparse_cache: Cache, tmp_path: Path) -> None:
    options = ["progressive.normalize=layer_norm", "progressive.lr=0.01", "progressive.temperature=3.0"]
    plan = plan_training(make_config(sparse_cache, "progressive", options=options, steps=8, out=tmp_path))
    run_training(plan)
    (run,) = plan.runs
    with pytest.raises(UsageError, match="latents of a token depend on each other"):
        export_sae(run.folder, "saelens", tmp_path / "exact")
    with pytest.raises(UsageError, match="No format can store it exactly; saelens can store the nearest topk, "):
        export_sae(run.folder, "gemma-scope", tmp_path / "exact")
    exported = export_sae(run.folder, "saelens", tmp_path / "near", approximate="jumprelu")
    assert exported.check.passed and read_json(exported.folder / "cfg.json")["normalize_activations"] == "layer_norm"
    near, x_BD = import_sae(exported.folder, out=tmp_path / "imported").sae, 10 * rows(64).float().repeat(1, 6)[:, :32]
    torch.testing.assert_close(near.encode(3 * x_BD + 7), 3 * near.encode(x_BD), rtol=1e-3, atol=1e-2)
