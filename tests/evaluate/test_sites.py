"""SAEs at every site, from harvest to the import of their export, compared with a script that uses only transformers.

The script hooks a module of the transformers model, replaces its activations at the counted tokens by the SAE's
reconstructions, and computes KL, CE and explained variance from the resulting logits and activations.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from sae.cache.hooks import SITES, Hook
from sae.cache.reader import Cache
from sae.common.errors import UsageError
from sae.evaluate.latents.inspection import encode_prompt, open_run
from sae.evaluate.latents.stats import latent_stats
from sae.evaluate.pages.dashboard import dashboard_page
from sae.evaluate.run import evaluate_saes
from sae.harvest.plan import HarvestConfig, plan_harvest
from sae.harvest.run import run_harvest
from sae.train.formats.export import export_sae
from sae.train.formats.import_ import import_sae
from sae.train.run import train_saes
from sae.train.sae import load_sae

pytestmark = pytest.mark.usefixtures("one_thread")

BLOCK = "model.layers.1"
MODULES = {  # the modules of Gemma 2, from the source of transformers
    "resid_pre": (BLOCK, "input"),
    "resid_mid": (f"{BLOCK}.post_attention_layernorm", "output"),
    "resid_post": (BLOCK, "output"),
    "attn_out": (f"{BLOCK}.post_attention_layernorm", "output"),
    "attn_z": (f"{BLOCK}.self_attn.o_proj", "input"),
    "mlp_in": (f"{BLOCK}.mlp", "input"),
    "mlp_hidden": (f"{BLOCK}.mlp.down_proj", "input"),
    "mlp_out": (f"{BLOCK}.post_feedforward_layernorm", "output"),
    "mlp.gate_proj.output": (f"{BLOCK}.mlp.gate_proj", "output"),
    "model.norm.output": ("model.norm", "output"),
}
WIDTHS = {"mlp_hidden": 48, "mlp.gate_proj.output": 48}  # elsewhere 32
LOGIT_SITES = {"resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out"}
QUICK = {"resid_mid", "resid_post", "attn_z", "mlp.gate_proj.output"}  # one of each kind, from export to import
TOKENS = 300


def silent(done: int, total: int, note: str = "") -> None:
    pass


def test_no_site_is_left_out():
    assert set(SITES) <= set(MODULES)


@pytest.fixture(scope="module")
def trained(
    tiny_model: Path, sentences: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Cache, dict[str, Path]]:
    """A cache with every site of layer 1, and a run trained at each site."""
    home = tmp_path_factory.mktemp("sites")
    config = HarvestConfig(
        model=str(tiny_model), dataset=str(sentences), layers=(1,), sites=tuple(SITES), tokens=2048, context=32,
        modules=("model.layers.{layer}.mlp.gate_proj", "model.norm"), window=2048, held_out=0.1, device="cpu",
        max_norm=None,
        out=home / "cache",
    )  # fmt: skip
    cache = run_harvest(plan_harvest(config))
    runs = {}
    for site in MODULES:
        (run,) = train_saes(
            "topk", cache=cache, layers=1, site=site, steps=20, width=64, l0=8, batch_size=256,
            out=home / "runs", device="cpu",
        )  # fmt: skip
        runs[site] = run.folder
    return cache, runs


@pytest.fixture
def cache(trained, home) -> Cache:
    return trained[0]


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32, attn_implementation="eager").eval()


def plain_numbers(
    model: nn.Module, cache: Cache, site: str, reconstruct: Callable[[Tensor], Tensor]
) -> dict[str, float]:
    """KL, CE and explained variance of a reconstruction at a site, computed with plain PyTorch hooks."""
    contexts, special = cache.contexts(held_out=True), torch.tensor([0, 1, 2])
    (path, end), before = MODULES[site], []
    sums, rows, recons = {"kl": 0.0, "ce": 0.0, "tokens": 0, "next": 0}, [], []

    def put(x: Tensor, counted: Tensor) -> Tensor:
        mid = before[-1] + x if site == "resid_mid" else x
        recon = mid.clone()
        recon[counted] = reconstruct(mid[counted])
        rows.append(mid[counted])
        recons.append(recon[counted])
        return recon - before[-1] if site == "resid_mid" else recon

    def hooked(counted: Tensor) -> list[Any]:
        def pre(_module: nn.Module, inputs: tuple[Any, ...]) -> Any:
            return (put(inputs[0], counted), *inputs[1:])

        def post(_module: nn.Module, _inputs: Any, output: Any) -> Any:
            return (put(output[0], counted), *output[1:]) if isinstance(output, tuple) else put(output, counted)

        module = model.get_submodule(path)
        note = model.get_submodule(BLOCK).register_forward_pre_hook(lambda _m, inputs: before.append(inputs[0]))
        return [note, module.register_forward_pre_hook(pre) if end == "input" else module.register_forward_hook(post)]

    for ids, length in zip(contexts.ids, contexts.length, strict=True):
        if sums["tokens"] >= TOKENS:
            break
        ids_S = torch.tensor(ids[: int(length)].astype(int))
        counted_S = ~torch.isin(ids_S, special)
        with torch.no_grad():
            logp = model(ids_S[None], use_cache=False).logits[0].log_softmax(-1)
            handles = hooked(counted_S[None])
            spliced = model(ids_S[None], use_cache=False).logits[0].log_softmax(-1)
        for handle in handles:
            handle.remove()
        kl_S = (logp.exp() * (logp - spliced)).sum(-1)
        sums["kl"] += float(kl_S[counted_S].sum())
        sums["ce"] -= float(spliced[:-1].gather(1, ids_S[1:, None])[:, 0][counted_S[:-1]].sum())
        sums["tokens"] += int(counted_S.sum())
        sums["next"] += int(counted_S[:-1].sum())
    x_TD, recon_TD = torch.cat(rows), torch.cat(recons)
    unexplained = (x_TD - recon_TD).square().sum() / (x_TD - x_TD.mean(0)).square().sum()
    return {
        "kl": sums["kl"] / sums["tokens"], "ce": sums["ce"] / sums["next"], "fve": float(1 - unexplained),
        "tokens": sums["tokens"],
    }  # fmt: skip


def numbers_of(row: Any) -> dict[str, Any]:
    metrics = row.results["core"].metrics
    return {
        "kl": metrics["model_behavior_preservation"]["kl_div_with_sae"],
        "ce": metrics["model_performance_preservation"]["ce_loss_with_sae"],
        "fve": metrics["reconstruction_quality"]["fve"],
        "kl_score": metrics["model_behavior_preservation"]["kl_div_score"],
        "ce_score": metrics["model_performance_preservation"]["ce_loss_score"],
        "tokens": row.results["core"].n["tokens"],
    }


def check_numbers(row: Any, site: str, model: nn.Module, cache: Cache, sae: Any) -> None:
    expected = plain_numbers(model, cache, site, lambda x: sae.decode(sae.encode(x)))
    found = numbers_of(row)
    assert found["tokens"] == expected["tokens"] > TOKENS
    for name in ("kl", "ce", "fve"):
        assert math.isclose(found[name], expected[name], rel_tol=1e-4, abs_tol=1e-5), (name, found, expected)


@pytest.mark.parametrize("sites", [QUICK, pytest.param(set(MODULES), marks=pytest.mark.slow)], ids=["some", "all"])
def test_the_numbers_of_every_site_are_those_of_plain_hooks(trained, model, cache, sites):
    runs = {site: folder for site, folder in trained[1].items() if site in sites}
    rows = evaluate_saes(list(runs.values()), suite="core", tokens=TOKENS, device="cpu", dtype="float32")
    assert len(rows) == 5 * len(runs)
    for site, row in zip(runs, rows, strict=False):
        assert (row.target.hook.site, row.target.sae.d_in) == (site, WIDTHS.get(site, 32))
        check_numbers(row, site, model, cache, load_sae(runs[site]))
    references = {(row.target.hook.site, row.name.split("-")[0]): row for row in rows if row.is_reference}
    for site in runs:
        identity, zero = numbers_of(references[site, "identity"]), numbers_of(references[site, "zero"])
        assert identity["kl_score"] == pytest.approx(1, abs=1e-5) and identity["ce_score"] == pytest.approx(1, abs=1e-4)
        assert zero["kl_score"] == pytest.approx(0, abs=1e-6) and zero["ce_score"] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(
    "site", [site if site in QUICK else pytest.param(site, marks=pytest.mark.slow) for site in MODULES]
)
def test_a_run_is_inspected_exported_imported_and_evaluated_again(trained, model, cache, tmp_path, site):
    run = open_run(trained[1][site], tokens=TOKENS, device="cpu", dtype="float32")
    assert encode_prompt(run, "the quick brown fox")[1].count_nonzero() > 0
    page = dashboard_page(run, torch.arange(8), "2026-11-29", silent)
    assert SITES.get(site, run.hook.name).format(1) in page
    stats = latent_stats(run.ctx, run.sae, run.hook, torch.arange(8), silent)
    assert (stats.raised is not None) == (site in LOGIT_SITES)
    exported = export_sae(trained[1][site], "dictionary-learning", tmp_path / "exported")
    imported = import_sae(exported.folder, cache=cache.folder, out=tmp_path / "runs")
    assert cache.folder.name in imported.check.description
    assert Hook.from_record(imported.sae.origin) == run.hook
    (row,) = evaluate_saes([imported], suite="core", tokens=TOKENS, references=False, device="cpu", dtype="float32")
    check_numbers(row, site, model, cache, imported.sae)


def test_an_object_is_of_the_site_that_it_is_said_to_be(trained, model, cache):
    class Halving:
        def encode(self, x: Tensor) -> Tensor:
            return x

        def decode(self, f: Tensor) -> Tensor:
            return 0.5 * f

    asked = {"cache": cache, "layer": 1, "suite": "core", "tokens": TOKENS, "references": False, "device": "cpu"}
    (row,) = evaluate_saes({"half": Halving()}, site="mlp_hidden", dtype="float32", **asked)
    assert row.flat()["site"] == "mlp_hidden"
    check_numbers(row, "mlp_hidden", model, cache, Halving())
    trained_there = load_sae(trained[1]["mlp_out"])
    with pytest.raises(UsageError, match='was trained at mlp_out of layer 1, not after layer 1: .* site="mlp_out"'):
        evaluate_saes({"one": trained_there}, **asked)
    with pytest.raises(UsageError, match="cannot encode and decode float32 activations of width 48"):
        evaluate_saes({"one": trained_there}, site="mlp_hidden", **asked)
