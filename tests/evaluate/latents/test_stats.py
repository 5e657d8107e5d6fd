"""Statistics of single latents, compared with numbers worked by hand and with other implementations."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import sparse
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from sae.cache.hooks import Hook
from sae.common.errors import SaeError, UsageError
from sae.evaluate.inputs import make_context
from sae.evaluate.latents import stats as module
from sae.evaluate.latents.passages import PassageTable, PassageWindow, quantile_passages
from sae.evaluate.latents.stats import (
    BINS,
    ActivationStats,
    Histogram,
    coactive_latents,
    direct_logits,
    latent_stats,
    logit_effects,
    nearest_latents,
)
from sae.harvest.model import LanguageModel, find_model, load_model
from sae.train.activation_functions import TopK
from sae.train.sae import SAE

FAMILIES = ("gemma", "llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "gpt2", "gpt_neox")


def quiet(done, total, note=""):
    pass


def every(f_NSF):
    return torch.ones(f_NSF.shape[:2], dtype=torch.bool)


@given(st.lists(st.floats(0, 2.0**15, width=32), min_size=1, max_size=60), st.integers(1, 7))
def test_a_histogram_in_one_pass_is_that_of_all_values(values, size):
    found = Histogram(1)
    f_TK = torch.tensor(values)[:, None]
    for part in f_TK.split(size):
        found.add(part)
    width = float(found.width)
    edges = np.arange(BINS + 1) * width
    positive = [value for value in values if value > 0]
    assert found.count_KB[0].tolist() == np.histogram(positive, edges)[0].tolist()
    assert math.log2(width).is_integer() and sum(found.count_KB[0]) == len(positive)
    if width > 2.0**-20:
        assert max(positive) >= BINS / 2 * width  # no wider than it has to be


def test_histograms_of_latents_do_not_touch_each_other():
    found = Histogram(2)
    found.add(torch.tensor([[1.0, 0.0], [1.0, 100.0]]))
    assert found.width.tolist() == [1 / 16, 4.0]
    assert found.count_KB[0, 16] == 2 and found.count_KB[1, 25] == 1 and found.count_KB.sum() == 3


def of_one_latent(rows):
    """Activations (N, S, 1) of one latent, and the statistics collected from them one context at a time."""
    f_NSF = torch.tensor(rows, dtype=torch.float32)[..., None]
    found = ActivationStats(1, torch.tensor([0]))
    for number, f_SF in enumerate(f_NSF):
        found.add(f_SF[None], every(f_SF[None]), number)
    return f_NSF, found


def test_counts_means_and_passages_by_hand():
    _, found = of_one_latent([[0, 1, 3], [0, 0, 0], [0, 5, 0]])
    assert (found.fired_F.tolist(), found.sum_K.tolist(), found.peak_K.tolist()) == ([3], [9.0], [5.0])
    assert found.l0.tolist() == [0, 1, 1, 0, 0, 0, 0, 1, 0]
    best, second = found.top.passages(0)
    assert (best.context, best.position, best.value) == (2, 1, 5)
    assert (second.context, second.position, second.value) == (0, 2, 3)
    assert second.start == 0 and second.inside(3).tolist() == [0, 1, 3]
    assert second.values.sum() == 4  # positions outside the context are 0


def test_positions_that_do_not_count_do_not_fire():
    found = ActivationStats(1, torch.tensor([0]))
    found.add(torch.tensor([[[7.0], [2.0]]]), torch.tensor([[False, True]]), 0)
    assert found.fired_F.tolist() == [1] and found.peak_K.tolist() == [2.0] and found.l0.tolist() == [1]
    (only,) = found.top.passages(0)
    assert only.position == 1 and only.values.max() == 2


@pytest.mark.parametrize("tokens", [1, 2, 5, 9, 64])
def test_top_passages_are_those_of_sorting_everything(tokens):
    generator = torch.Generator().manual_seed(0)
    f_NSF = torch.randn(37, 9, 6, generator=generator).relu()
    window = PassageWindow.of(tokens)
    found = ActivationStats(6, torch.tensor([4, 1]), window)
    for start in range(0, 37, 5):
        part = f_NSF[start : start + 5]
        found.add(part, every(part), start)
    for place, latent in enumerate([4, 1]):
        peaks = f_NSF[..., latent].amax(1).sort(descending=True)
        own = found.top.passages(place)
        assert [p.context for p in own] == peaks.indices[:10].tolist()
        assert [p.value for p in own] == peaks.values[:10].tolist()
        for p in own:
            assert len(p.inside(9)) == min(tokens, 9)  # the passage has the requested length, or is the whole context
            assert p.start == min(max(0, p.position - window.before), max(0, 9 - tokens))
            assert p.inside(9).tolist() == f_NSF[p.context, p.start : p.start + tokens, latent].tolist()
            assert p.value == f_NSF[p.context, p.position, latent] and not p.values[9 - p.start :].any()


def test_the_sample_draws_tokens_alike():
    """The latent fires at three tokens of context 0 and one of context 1; each is drawn a quarter of the time."""
    drawn = {}
    found = ActivationStats(1, torch.tensor([0]))
    fires = torch.tensor([[1, 1, 0, 1], [0, 0, 1, 0]], dtype=torch.float32)[..., None]
    for _ in range(800):
        key_NK, at_NK = found.sample_keys(fires)
        context = int(key_NK.argmax())
        place = (context, int(at_NK[context]))
        drawn[place] = drawn.get(place, 0) + 1
    assert drawn.keys() == {(0, 0), (0, 1), (0, 3), (1, 2)}
    assert max(abs(count - 200) for count in drawn.values()) < 62  # five standard deviations


@given(st.integers(1, 300), st.integers(1, 200))
def test_a_window_is_of_the_asked_size_and_no_longer_than_a_context(tokens, context):
    asked = PassageWindow.of(tokens)
    limited = asked.limited_to(context)
    assert asked.width == tokens and limited.width == min(tokens, context)
    position_P = torch.arange(context)
    start_P = limited.starts(position_P, context)
    assert ((start_P <= position_P) & (position_P < start_P + limited.width)).all()  # every passage contains its token
    assert start_P.min() >= 0 and (start_P + limited.width).max() <= context
    assert tokens < 2 or asked.before >= asked.after


def test_a_window_of_no_tokens_is_refused():
    with pytest.raises(UsageError, match="--passage 0"):
        PassageWindow.of(0)


def test_quantiles_are_of_the_order_by_activation():
    found = PassageTable(1, 11)
    f_NSK = torch.arange(1, 12.0)[:, None, None]
    found.offer(torch.rand(11, 1), torch.zeros(11, 1, dtype=torch.int64), f_NSK, 0)
    assert [p.value for p in quantile_passages(found, 0)] == [10, 8, 6, 4, 2]
    assert quantile_passages(PassageTable(1, 3), 0) == []


def test_activations_that_are_not_finite_are_refused():
    found = ActivationStats(1, torch.tensor([0]))
    with pytest.raises(SaeError, match="not finite"):
        found.add(torch.tensor([[[math.inf]]]), torch.ones(1, 1, dtype=torch.bool), 0)


def test_neighbours_by_hand():
    W_dec_FD = torch.tensor([[2.0, 0], [3, 4], [0, 1], [-1, 0]])
    found = nearest_latents(W_dec_FD, torch.tensor([0, 2]), quiet)
    assert found.entries(0) == [(1, pytest.approx(0.6)), (2, 0.0), (3, -1.0)]
    assert found.entries(1)[0] == (1, pytest.approx(0.8)) and sorted(found.entries(1)[1:]) == [(0, 0.0), (3, 0.0)]


def test_latents_that_fire_together_by_hand():
    f_TF = np.array([[3, 4, 0], [0, 3, 0], [4, 0, 0], [0, 0, 0]], dtype=np.float32)
    found, jaccard = coactive_latents(sparse.csc_array(f_TF), torch.arange(3), quiet)
    assert found.entries(0) == [(1, pytest.approx(12 / 25))]  # latent 2 has cosine 0, so it is not listed
    assert found.entries(1) == [(0, pytest.approx(12 / 25))] and found.entries(2) == []
    assert jaccard[0, 0] == pytest.approx(1 / 3)


@pytest.mark.parametrize("cells", [1, 50, module.BLOCK_ELEMENTS])
def test_lists_do_not_depend_on_the_size_of_blocks(cells, monkeypatch):
    generator = torch.Generator().manual_seed(1)
    W_dec_FD = torch.randn(20, 5, generator=generator)
    f_TF = torch.randn(30, 20, generator=generator).relu()
    monkeypatch.setattr(module, "BLOCK_ELEMENTS", cells)
    unit = torch.nn.functional.normalize(W_dec_FD, dim=1)
    near = nearest_latents(W_dec_FD, torch.arange(20), quiet)
    expected = (unit @ unit.T).fill_diagonal_(-2).sort(1, descending=True)
    assert near.index.equal(expected.indices[:, :8])
    together, jaccard = coactive_latents(sparse.csc_array(f_TF.numpy()), torch.arange(20), quiet)
    column = torch.nn.functional.normalize(f_TF, dim=0)
    assert together.index.equal((column.T @ column).fill_diagonal_(-1).sort(1, descending=True).indices[:, :8])
    one, other = f_TF[:, 3] > 0, f_TF[:, together.index[3, 2]] > 0
    assert float(jaccard[3, 2]) == pytest.approx(float((one & other).sum() / (one | other).sum()))


@pytest.fixture(scope="module")
def model(tiny_model) -> LanguageModel:
    source, config = find_model(str(tiny_model))
    found = load_model(source, config, dtype="float32", device="cpu")
    found.trunk.norm.weight.data.normal_(generator=torch.Generator().manual_seed(0))
    return found


def test_direct_logits_are_the_unembedding_of_a_weighted_direction(model):
    rows_KD = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    expected = (rows_KD * (1 + model.trunk.norm.weight)) @ model.model.lm_head.weight.T  # Gemma's norm weighs by 1 + w
    torch.testing.assert_close(direct_logits(model, rows_KD), expected, rtol=1e-4, atol=1e-4)


def test_direct_logits_are_what_a_small_step_does_to_the_logits(model):
    """They differ only in the component along the residual: the norm removes it, and it scales every logit alike."""
    x_D, row_D = torch.randn(2, 32, generator=torch.Generator().manual_seed(0))

    def logits(x_D):
        return model.model.lm_head(model.trunk.norm(x_D))

    now_V, change_V = torch.autograd.functional.jvp(logits, x_D, row_D)
    back = (x_D @ row_D) / (x_D @ x_D)
    torch.testing.assert_close(
        direct_logits(model, row_D[None])[0] / x_D.square().mean().sqrt(), change_V + back * now_V, rtol=1e-3, atol=1e-4
    )


@pytest.mark.parametrize("kind", FAMILIES)
def test_direct_logits_of_every_family_are_a_step_before_its_final_norm(kind):
    """The LayerNorm of GPT-2 and GPT-NeoX also subtracts the mean of a direction and adds a bias."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 12, "hidden_size": 16, "intermediate_size": 8, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
    ends = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}
    like = AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**sizes, **heads, **ends)).eval()
    for parameter in like.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model, (x_D, row_D) = LanguageModel(like), torch.randn(2, 16)
    final = lambda x_D: like.get_output_embeddings()(model.norm(x_D))  # noqa: E731
    _, change_V = torch.autograd.functional.jvp(final, x_D, row_D + 3)
    _, own_V = torch.autograd.functional.jvp(final, x_D, x_D)  # scaling x changes only the effect of eps
    size_D, direction_D = (
        y_D - y_D.mean() if isinstance(model.norm, torch.nn.LayerNorm) else y_D for y_D in (x_D, row_D + 3)
    )
    back = (size_D @ direction_D) / (size_D @ size_D)
    along_V = direct_logits(model, size_D[None])[0]
    found_V = (direct_logits(model, (row_D + 3)[None])[0] - back * along_V) / size_D.square().mean().sqrt()
    torch.testing.assert_close(found_V, change_V, rtol=1e-3, atol=1e-3)
    assert own_V.abs().max() < 1e-3


def test_logit_effects_are_both_ends_of_the_direct_logits(model):
    rows_KD = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    effect = direct_logits(model, rows_KD).sort(1)
    up, down = logit_effects(model, rows_KD, quiet)
    assert up.index[:, 0].tolist() == effect.indices[:, -1].tolist()
    assert down.index[:, 0].tolist() == effect.indices[:, 0].tolist()
    assert down.value[1, 0] == pytest.approx(float(effect.values[1, 0]))


@pytest.mark.parametrize("site", ["resid_post", "mlp_out", "attn_z"])
def test_everything_of_a_few_latents_is_that_of_all(tiny_cache, site):
    ctx = make_context(tiny_cache, tokens=300)
    torch.manual_seed(0)
    sae, latents = SAE(32, 12, [TopK(3)]).eval(), torch.tensor([2, 7])
    whole, few = (latent_stats(ctx, sae, Hook(1, site), chosen, quiet) for chosen in (torch.arange(12), latents))
    x = torch.cat(
        [ctx.model.capture_hooks(b.ids, [Hook(1, site)])[Hook(1, site)][b.counted] for b in ctx.batches(4, 99)]
    )
    f_TF = sae.encode(x)
    assert whole.density.tolist() == few.density.tolist() == ((f_TF > 0).double().mean(0)).tolist()
    torch.testing.assert_close(whole.mean[latents], few.mean)
    fired_F = (f_TF > 0).sum(0)
    assert 0 < int(fired_F[latents].min()) < len(x) / 2  # a mean over all tokens would be another number
    torch.testing.assert_close(few.mean, (f_TF.sum(0) / fired_F)[latents].double(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(few.activations.peak_K, f_TF.amax(0)[latents], rtol=1e-5, atol=1e-6)
    for name in ("nearest", "coactive"):
        assert getattr(whole, name).index[latents].equal(getattr(few, name).index)
    assert whole.activations.top.position[latents].equal(few.activations.top.position)
    assert (few.raised is None) == (site == "attn_z")
