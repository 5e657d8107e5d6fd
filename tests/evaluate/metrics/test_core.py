"""The core metric equals its definitions, implemented here in float64 with plain loops and whole forward passes."""

import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from sae.cache.context_format import ContextFormat
from sae.cache.contexts import Contexts
from sae.cache.hooks import Hook
from sae.common.errors import UsageError
from sae.evaluate.artifacts import ArtifactCache
from sae.evaluate.context import EvalContext
from sae.evaluate.metrics.base import EvalTarget
from sae.evaluate.metrics.core import Core
from sae.evaluate.reference_saes import Identity, Zero
from sae.train.activation_functions import BatchTopK, ReLU, TopK
from sae.train.sae import SAE

PAD, EOS, BOS = 0, 1, 2
SKIP = [PAD, EOS, BOS]
LAYER, D_IN, D_SAE = 0, 32, 40


@pytest.fixture(scope="module")
def model(loaded_tiny_model):
    return loaded_tiny_model[1]


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test keeps its artifacts in its own folder."""
    monkeypatch.chdir(tmp_path)


def contexts_of(rows: list[list[int]], width: int) -> Contexts:
    ids = np.zeros((len(rows), width), np.uint32)
    for line, row in zip(ids, rows, strict=True):
        line[: len(row)] = row
    length = np.array([len(row) for row in rows], np.uint16)
    return Contexts(ids, length, np.arange(len(rows), dtype=np.uint32), np.ones(len(rows), bool))


def ragged() -> list[list[int]]:
    """Five contexts of 2 to 12 tokens. One has EOS in the middle, and one at its end."""
    draw = np.random.default_rng(0)
    rows = [[BOS, *draw.integers(300, 8000, n).tolist()] for n in (11, 6, 8, 1, 11)]
    rows[1][3] = EOS
    rows[2][-1] = EOS
    return rows


def make_ctx(model, rows: list[list[int]], width: int = 12, mode: str = "0.6.0") -> EvalContext:
    form, artifacts = ContextFormat(2, tuple(SKIP)), ArtifactCache(Path("shelf"))
    return EvalContext(lambda: model, None, contexts_of(rows, width), form, mode, {}, {}, artifacts)


def random_sae(kind: str, seed: int = 0) -> SAE:
    torch.manual_seed(seed)
    sae = SAE(D_IN, D_SAE, {"relu": [ReLU()], "topk": [TopK(5)], "batchtopk": [BatchTopK(5)]}[kind])
    sae.b_dec.data.normal_(std=0.3)
    sae.b_enc.data.normal_(mean=-2.0)
    sae.b_enc.data[:4] = -1e3  # four latents that never fire
    sae.W_enc.data += 0.05 * torch.randn_like(sae.W_enc)
    if kind == "batchtopk":
        sae.activation[0].threshold.fill_(1.5)
    return sae.eval().requires_grad_(False)


def silent(done: int, total: int, note: str = "") -> None:
    pass


def measure(ctx: EvalContext, *saes: SAE, **settings) -> list[dict]:
    results = Core(**settings).measure(ctx, [EvalTarget(sae, Hook(LAYER)) for sae in saes], silent)
    return [{**result.metrics, "latents": result.details} for result in results]


# --- the definitions, by hand ---------------------------------------------------------------------------------------


def run_by_hand(model, ids: list[int], replace: Callable[[np.ndarray], np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Log-probabilities (S, V) of one context when the residual x (S, D) after LAYER is replaced, and x itself."""
    seen = {}

    def hook(_module, _inputs, output):
        residual = output[0] if isinstance(output, tuple) else output
        seen["x"] = residual[0].double().numpy()
        new = torch.from_numpy(replace(seen["x"]))[None].to(residual.dtype)
        return (new, *output[1:]) if isinstance(output, tuple) else new

    handle = model.blocks[LAYER].register_forward_hook(hook)
    try:
        with torch.no_grad():
            logits = model.model(torch.tensor([ids])).logits[0].double().numpy()
    finally:
        handle.remove()
    logits = logits - logits.max(1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(1, keepdims=True)), seen["x"]


def code_by_hand(sae: SAE, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The latents f and the reconstruction x_hat of one token."""
    w = {name: value.double().numpy() for name, value in sae.state_dict().items()}
    z = np.maximum((x - w["b_dec"]) @ w["W_enc"] + w["b_enc"], 0)
    if isinstance(sae.activation[0], TopK):
        z[np.argsort(z)[:-5]] = 0
    if isinstance(sae.activation[0], BatchTopK):
        z[z <= 1.5] = 0
    return z, z @ w["W_dec"] + w["b_dec"]


def by_hand(model, rows: list[list[int]], sae: SAE, size: int, reconstruction_batches: int) -> dict:
    """All numbers of evaluation.md 2.3 and 2.4, computed from contexts without padding."""
    kl, kl_zero, ce = [], [], {"own": [], "sae": [], "zero": []}
    per_token = {name: [] for name in ("l0", "l1", "in", "out", "ratio", "mse", "cos", "legacy", "sse")}
    biases, batch_sse, batch_square, every_x, every_f = [], [], [], [], []
    fired, contexts_fired = np.zeros(sae.d_sae), np.zeros(sae.d_sae)
    for number, start in enumerate(range(0, len(rows), size)):
        counted = []
        for ids in rows[start : start + size]:
            keep = [t for t, token in enumerate(ids) if token not in SKIP]

            def splice(x, keep=keep):
                new = x.copy()
                for t in keep:
                    new[t] = code_by_hand(sae, x[t])[1]
                return new

            own, x = run_by_hand(model, ids, lambda x: x)
            if number < reconstruction_batches:
                spliced, zeroed = run_by_hand(model, ids, splice)[0], run_by_hand(model, ids, np.zeros_like)[0]
                for t in keep:
                    kl.append((np.exp(own[t]) * (own[t] - spliced[t])).sum())
                    kl_zero.append((np.exp(own[t]) * (own[t] - zeroed[t])).sum())
                    if t + 1 < len(ids):
                        for name, logp in (("own", own), ("sae", spliced), ("zero", zeroed)):
                            ce[name].append(-logp[t, ids[t + 1]])
            codes = [(x[t], *code_by_hand(sae, x[t])) for t in keep]
            counted += codes
            fired += sum((f > 0).astype(float) for _, f, _ in codes)
            contexts_fired += (sum((f > 0).astype(float) for _, f, _ in codes) > 0).astype(float)
        mean_x = np.mean([x for x, _, _ in counted], axis=0)
        for x, f, recon in counted:
            sse = ((x - recon) ** 2).sum()
            per_token["l0"].append((f != 0).sum())
            per_token["l1"].append(f.sum())
            per_token["in"].append(np.linalg.norm(x))
            per_token["out"].append(np.linalg.norm(recon))
            per_token["ratio"].append(np.linalg.norm(recon) / np.linalg.norm(x))
            per_token["mse"].append(sse / len(counted))
            per_token["cos"].append(x @ recon / np.linalg.norm(x) / np.linalg.norm(recon))
            per_token["legacy"].append(1 - sse / ((x - mean_x) ** 2).sum())
            per_token["sse"].append(sse)
        biases.append(np.mean([r @ r for _, _, r in counted]) / np.mean([x @ r for x, _, r in counted]))
        batch_sse.append(np.mean([((x - r) ** 2).sum() for x, _, r in counted]))
        batch_square.append(np.mean([x @ x for x, _, _ in counted]))
        every_x += [x for x, _, _ in counted]
        every_f += [f for _, f, _ in counted]
    mean = {name: np.mean(values) for name, values in per_token.items()}
    kl, kl_zero, ce = np.mean(kl), np.mean(kl_zero), {name: np.mean(values) for name, values in ce.items()}
    x, f, square = np.array(every_x), np.array(every_f), np.mean(batch_square)
    density = fired / len(f)
    encoder, decoder = sae.W_enc.double().numpy().T, sae.W_dec.double().numpy()

    def largest(rows: np.ndarray) -> list[float]:
        unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
        return [max(unit[i] @ unit[j] for j in range(len(unit)) if j != i) for i in range(len(unit))]

    in_encoder, in_decoder = largest(encoder), largest(decoder)
    alive = [i for i in range(sae.d_sae) if fired[i]]
    pairs = [
        abs(f[:, i] @ f[:, j]) / np.linalg.norm(f[:, i]) / np.linalg.norm(f[:, j])
        for i, j in itertools.combinations(alive, 2)
    ]
    unit = decoder / np.linalg.norm(decoder, axis=1, keepdims=True)
    cosines = [abs(a @ b) for a, b in itertools.combinations(unit, 2)]
    share = np.linalg.svd(unit, compute_uv=False)
    share = share / share.sum()

    def spread(values: list[float]) -> dict[str, float]:
        quantiles = {f"quantile_{q}": np.percentile(values, float(q)) for q in ("50", "90", "99", "99.9")}
        return {"mean": np.mean(values), "sd": np.std(values), **quantiles}

    def rank(values: list[float]) -> list[float]:
        return [
            sum(other < value for other in values) + sum(other == value for other in values) / 2 for value in values
        ]

    return {
        "model_behavior_preservation": {
            "kl_div_score": (kl_zero - kl) / kl_zero,
            "kl_div_with_ablation": kl_zero,
            "kl_div_with_sae": kl,
        },
        "model_performance_preservation": {
            "ce_loss_score": (ce["zero"] - ce["sae"]) / (ce["zero"] - ce["own"]),
            "ce_loss_with_ablation": ce["zero"],
            "ce_loss_with_sae": ce["sae"],
            "ce_loss_without_sae": ce["own"],
        },
        "reconstruction_quality": {
            "explained_variance": 1 - np.mean(batch_sse) / (square - (square / D_IN) ** 2),
            "explained_variance_legacy": mean["legacy"],
            "mse": mean["mse"],
            "cossim": mean["cos"],
            "fve": 1 - np.sum(per_token["sse"]) / ((x - x.mean(0)) ** 2).sum(),
            "mse_elementwise": mean["sse"] / D_IN,
        },
        "shrinkage": {
            "l2_norm_in": mean["in"],
            "l2_norm_out": mean["out"],
            "l2_ratio": mean["ratio"],
            "relative_reconstruction_bias": np.mean(biases),
        },
        "sparsity": {"l0": mean["l0"], "l1": mean["l1"], "activation_variance": f.var(0).mean()},
        "token_stats": {
            "total_tokens_eval_reconstruction": sum(len(ids) for ids in rows[: size * reconstruction_batches]),
            "total_tokens_eval_sparsity_variance": sum(len(ids) for ids in rows),
        },
        "misc_metrics": {
            "frac_alive": np.mean(density > 0),
            "freq_over_1_percent": np.mean(density > 0.01),
            "freq_over_10_percent": np.mean(density > 0.1),
            "normalized_freq_over_1_percent": density[density > 0.01].sum() / density.sum(),
            "normalized_freq_over_10_percent": density[density > 0.1].sum() / density.sum(),
            "average_max_encoder_cosine_sim": np.mean(in_encoder),
            "average_max_decoder_cosine_sim": np.mean(in_decoder),
        },
        "correlation": {
            **spread(pairs),
            "latents": len(alive),
            "latents_dead": sae.d_sae - len(alive),
            "spearman_decoder": np.corrcoef(
                rank(pairs), rank([unit[i] @ unit[j] for i, j in itertools.combinations(alive, 2)])
            )[0, 1],
        },
        "dictionary": {
            **{f"decoder_cosine_{name}": value for name, value in spread(cosines).items()},
            "effective_rank": np.exp(-(share * np.log(share)).sum()),
        },
        "latents": [
            {
                "index": i,
                "feature_density": density[i],
                "consistent_activation_heuristic": fired[i] / contexts_fired[i] if fired[i] else None,
                "encoder_bias": float(sae.b_enc[i]),
                "encoder_norm": np.linalg.norm(encoder[i]),
                "encoder_decoder_cosine_sim": encoder[i]
                @ decoder[i]
                / np.linalg.norm(encoder[i])
                / np.linalg.norm(decoder[i]),
                "max_decoder_cosine_sim": in_decoder[i],
                "max_encoder_cosine_sim": in_encoder[i],
            }
            for i in range(sae.d_sae)
        ],
    }


def assert_same(found: dict, expected: dict, tolerance: float = 2e-5) -> None:
    assert found.keys() == expected.keys()
    for category in expected.keys() - {"latents"}:
        assert found[category] == pytest.approx(expected[category], rel=tolerance, abs=1e-6), category
    assert len(found["latents"]) == len(expected["latents"])
    for one, other in zip(found["latents"], expected["latents"], strict=True):
        absent = {name for name, value in other.items() if value is None}
        assert {name for name, value in one.items() if value is None} == absent
        numbers = {name: value for name, value in other.items() if value is not None}
        assert {name: one[name] for name in numbers} == pytest.approx(numbers, rel=tolerance, abs=1e-6)


# --- laws -----------------------------------------------------------------------------------------------------------


def test_a_text_of_one_token_has_no_next_one(model):
    (found,) = measure(make_ctx(model, [[BOS, 400]]), random_sae("relu"))
    assert set(found["model_performance_preservation"].values()) == {None}
    assert found["model_behavior_preservation"]["kl_div_with_sae"] > 0


@pytest.mark.parametrize(("kind", "size", "batches"), [("relu", 2, 2), ("topk", 5, 1), ("batchtopk", 3, 1)])
def test_every_number_is_the_definition(model, kind, size, batches):
    sae = random_sae(kind)
    (found,) = measure(make_ctx(model, ragged()), sae, batch_contexts=size, reconstruction_batches=batches)
    expected = by_hand(model, ragged(), sae, size, batches)
    assert 0 < expected["correlation"]["latents_dead"] < D_SAE  # so that dead latents are tested
    assert_same(found, expected)


def test_several_saes_in_one_pass_equal_each_alone(model):
    saes = [random_sae(kind, seed) for seed, kind in enumerate(("relu", "topk", "batchtopk"))]
    ctx = make_ctx(model, ragged())
    assert measure(ctx, *saes, batch_contexts=2) == [measure(ctx, sae, batch_contexts=2)[0] for sae in saes]


def test_layers_are_spliced_where_they_stand(model):
    """SAEs at layers 0 and 1 give the same results together as alone. After layer 1, only the unembedding follows."""
    sae, ctx = random_sae("relu"), make_ctx(model, ragged())
    both = Core().measure(ctx, [EvalTarget(sae, Hook(0)), EvalTarget(sae, Hook(1))], silent)
    alone = [Core().measure(ctx, [EvalTarget(sae, Hook(layer))], silent)[0] for layer in (0, 1)]
    for one, other in zip(both, alone, strict=True):
        assert one.metrics == other.metrics
    assert both[0].metrics["shrinkage"]["l2_norm_in"] != both[1].metrics["shrinkage"]["l2_norm_in"]


@pytest.mark.parametrize("layer", [0, 1])
def test_the_identity_scores_one_and_zero_scores_zero(model, layer):
    targets = [EvalTarget(Identity(), Hook(layer)), EvalTarget(Zero(), Hook(layer), everywhere=True)]
    identity, zero = Core().measure(make_ctx(model, ragged()), targets, silent)
    for result, score in ((identity, 1), (zero, 0)):
        assert result.metrics["model_behavior_preservation"]["kl_div_score"] == pytest.approx(score, abs=1e-5)
        assert result.metrics["model_performance_preservation"]["ce_loss_score"] == pytest.approx(score, abs=1e-5)
    assert identity.metrics["reconstruction_quality"]["fve"] == 1
    assert identity.metrics["reconstruction_quality"]["mse"] == 0
    assert zero.metrics["sparsity"] == {"l0": 0, "l1": 0, "activation_variance": 0}
    assert zero.metrics["reconstruction_quality"]["cossim"] is None  # 0/0 has no value
    assert zero.metrics["correlation"] == {"mean": None, "latents": 0, "latents_dead": D_IN}


def test_a_zeroed_gemma_says_every_token_is_equally_likely(model):
    """Without biases and with RMSNorm, a zeroed residual stays zero. So CE is ln V, and KL is ln V minus the entropy of
    the model."""
    (found,) = measure(make_ctx(model, ragged()), random_sae("relu"))
    assert found["model_performance_preservation"]["ce_loss_with_ablation"] == pytest.approx(math.log(8192), abs=1e-5)
    rows, entropy = ragged(), []
    for ids in rows:
        logp, _ = run_by_hand(model, ids, lambda x: x)
        entropy += [-(np.exp(logp[t]) * logp[t]).sum() for t, token in enumerate(ids) if token not in SKIP]
    expected = math.log(8192) - np.mean(entropy)
    assert found["model_behavior_preservation"]["kl_div_with_ablation"] == pytest.approx(expected, abs=1e-5)


def test_more_padding_changes_nothing(model):
    sae = random_sae("relu")
    (narrow,) = measure(make_ctx(model, ragged(), width=12), sae)
    (wide,) = measure(make_ctx(model, ragged(), width=40), sae)
    assert wide == narrow


def test_specials_change_what_follows_them_but_are_not_counted(model):
    """A trailing EOS adds one CE target but no counted token, so all means over tokens stay the same."""
    sae, rows = random_sae("relu"), ragged()
    longer = [*rows[:-1], [*rows[-1], EOS]]
    (before,), (after,) = (measure(make_ctx(model, r, width=13), sae) for r in (rows, longer))
    for category in ("reconstruction_quality", "shrinkage", "sparsity", "misc_metrics", "correlation"):
        assert after[category] == pytest.approx(before[category], rel=1e-5)
    assert after["model_behavior_preservation"] == pytest.approx(before["model_behavior_preservation"], rel=1e-5)
    one, other = (r["model_performance_preservation"]["ce_loss_without_sae"] for r in (before, after))
    assert one != pytest.approx(other, rel=1e-4)


def test_a_batch_without_a_counted_token_is_passed_over(model):
    sae, rows = random_sae("relu"), ragged()
    (alone,) = measure(make_ctx(model, rows), sae, batch_contexts=5)
    (followed,) = measure(make_ctx(model, [*rows, [BOS, EOS]]), sae, batch_contexts=5)
    assert followed == alone
    with pytest.raises(UsageError, match="held-out text contains only special tokens"):
        measure(make_ctx(model, [[BOS, EOS]]), sae)


def test_the_modes_differ_as_the_table_says(model):
    """Mode 2024-12 has only the legacy explained variance and no misc metrics. All other numbers are the same."""
    sae = random_sae("topk")
    (now,) = measure(make_ctx(model, ragged()), sae)
    (then,) = measure(make_ctx(model, ragged(), mode="2024-12"), sae)
    quality = now["reconstruction_quality"]
    assert then["reconstruction_quality"].pop("explained_variance") == quality.pop("explained_variance_legacy")
    quality.pop("explained_variance")
    now.pop("misc_metrics")
    assert then == now


def test_mse_depends_on_the_batch_and_mse_elementwise_does_not(model):
    """With batches of n tokens each, SAEBench's mse is mse_elementwise times D / n."""
    rows, sae = [ragged()[0]] * 4, random_sae("relu")  # eleven counted tokens each
    for size in (1, 2, 4):
        (found,) = measure(make_ctx(model, rows), sae, batch_contexts=size)
        quality = found["reconstruction_quality"]
        assert quality["mse"] == pytest.approx(quality["mse_elementwise"] * D_IN / (11 * size), rel=1e-6)


def test_every_interval_holds_its_number(model):
    ctx = make_ctx(model, ragged())
    (found,) = Core().measure(ctx, [EvalTarget(random_sae("relu"), Hook(LAYER))], silent)
    for category, group in found.intervals.items():
        for name, (low, high) in group.items():
            assert (low + high) / 2 == pytest.approx(found.metrics[category][name], rel=1e-5), name
    assert found.n == {"documents": 5, "contexts": 5, "tokens": 35}


def test_contexts_of_one_document_are_one_draw(model):
    """Repeating every context in its document leaves the intervals as they are; more documents would narrow them."""
    once = make_ctx(model, ragged())
    twice = replace(once, contexts=once.contexts.select(np.arange(5).repeat(2)))
    sae = EvalTarget(random_sae("relu"), Hook(LAYER))
    alone, again = (Core().measure(ctx, [sae], silent)[0] for ctx in (once, twice))
    assert again.n == {"documents": 5, "contexts": 10, "tokens": 70}
    for category, group in alone.intervals.items():
        for name, interval_once in group.items():
            assert again.intervals[category][name] == pytest.approx(interval_once, rel=1e-4), name


def test_degenerate_saes_are_flagged(model):
    dead = random_sae("relu")
    dead.b_enc.fill_(-1e3)
    targets = [
        EvalTarget(dead, Hook(LAYER)),
        EvalTarget(random_sae("topk"), Hook(LAYER)),
        EvalTarget(Zero(), Hook(LAYER), True, reference=True),
    ]
    found = Core().measure(make_ctx(model, ragged()), targets, silent)
    assert "L0 is 0" in found[0].flags[0]
    assert not any("L0 is 0" in flag for flag in found[1].flags)
    assert found[2].flags == []
