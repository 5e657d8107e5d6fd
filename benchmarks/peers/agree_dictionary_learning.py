"""dictionary_learning's own trainers, started by agree_train.py in an environment that has them.

Each function whose docstring compares a trainer with our recipe removes the difference that the docstring describes.
"""

import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from agree_peer import Peer, answer
from torch import Tensor

# The package imports nnsight for a buffer of activations that is not used here.
sys.modules["nnsight"] = SimpleNamespace(LanguageModel=None)  # type: ignore[assignment]

from dictionary_learning.trainers import batch_top_k, jumprelu, matryoshka_batch_top_k, top_k  # noqa: E402
from dictionary_learning.trainers.batch_top_k import BatchTopKTrainer  # noqa: E402
from dictionary_learning.trainers.gdm import GatedSAETrainer  # noqa: E402
from dictionary_learning.trainers.jumprelu import JumpReluTrainer  # noqa: E402
from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKTrainer  # noqa: E402
from dictionary_learning.trainers.p_anneal import PAnnealTrainer  # noqa: E402
from dictionary_learning.trainers.standard import StandardTrainer, StandardTrainerAprilUpdate  # noqa: E402
from dictionary_learning.trainers.top_k import TopKTrainer  # noqa: E402

Options = dict[str, Any]

# The functions that `median` and `length` replace; they are restored for the next trainer.
MEDIAN = top_k.geometric_median
PROJECTIONS = {
    module: module.remove_gradient_parallel_to_decoder_directions
    for module in (top_k, batch_top_k, matryoshka_batch_top_k, jumprelu)
}


def build(recipe: str, o: Options) -> Any:
    steps, d_in = o["steps"], o["d_in"]
    shared = {
        "steps": steps, "activation_dim": d_in, "dict_size": o["d_sae"], "layer": 0, "lm_name": "", "device": "cpu",
        "lr": o["lr"], "warmup_steps": o["warmup"], "decay_start": round(o["decay_start"] * steps),
    }  # fmt: skip
    match recipe:
        case "relu" | "gated":
            kind = StandardTrainer if recipe == "relu" else GatedSAETrainer
            trainer = kind(l1_penalty=o["l1"], sparsity_warmup_steps=o["l1_warmup"], **shared)
        case "april":
            l1 = o["l1"] / d_in**0.5
            trainer = StandardTrainerAprilUpdate(l1_penalty=l1, sparsity_warmup_steps=o["l1_warmup"], **shared)
        case "p-anneal":
            # The exponent is updated one step later than configured, and the first update has no effect. So N + 1
            # updates of theirs equal N updates of our recipe.
            first = o["start"] * steps
            every = (steps - first) / o["updates"]
            trainer = PAnnealTrainer(
                initial_sparsity_penalty=o["l1"], sparsity_warmup_steps=o["l1_warmup"], sparsity_function="Lp^p",
                anneal_start=round(first - every - 1), anneal_end=round(steps - every - 1),
                n_sparsity_updates=o["updates"] + 1, p_end=o["p_end"], sparsity_queue_length=o["queue"], **shared,
            )  # fmt: skip
        case "jumprelu":
            trainer = JumpReluTrainer(
                target_l0=o["l0"], sparsity_penalty=o["penalty"], sparsity_warmup_steps=o["penalty_warmup"],
                bandwidth=o["bandwidth"], **shared,
            )  # fmt: skip
        case "topk":
            trainer = TopKTrainer(k=o["k"], auxk_alpha=o["aux"], **shared)
        case "batchtopk" | "matryoshka":
            shared |= {"k": o["k"], "auxk_alpha": o["aux"], "threshold_beta": 0.99, "threshold_start_step": -1}
            if recipe == "batchtopk":
                trainer = BatchTopKTrainer(**shared)
            else:
                halves = [2.0**-g for g in range(o["prefixes"] - 1, 0, -1)]
                trainer = MatryoshkaBatchTopKTrainer(group_fractions=[halves[0], *halves], **shared)
    trainer.dead_feature_threshold = o["dead_tokens"]
    top_k.geometric_median = MEDIAN
    for module, theirs in PROJECTIONS.items():
        module.remove_gradient_parallel_to_decoder_directions = theirs
    return trainer


def weights(trainer: Any) -> dict[str, Tensor]:
    ae = trainer.ae
    if hasattr(ae, "W_enc"):
        found = {"W_enc": ae.W_enc, "W_dec": ae.W_dec}
    else:
        found = {"W_enc": ae.encoder.weight.T, "W_dec": ae.decoder.weight.T}
    if isinstance(trainer, GatedSAETrainer):
        gate = {"r_mag": ae.r_mag, "b_gate": ae.gate_bias, "b_mag": ae.mag_bias}
        return found | {"b_dec": ae.decoder_bias} | {f"activation.0.{name}": bias for name, bias in gate.items()}
    found["b_enc"] = ae.b_enc if hasattr(ae, "b_enc") else ae.encoder.bias
    found["b_dec"] = ae.b_dec if hasattr(ae, "b_dec") else ae.bias
    if hasattr(ae, "threshold") and not isinstance(trainer, TopKTrainer):  # our topk has none
        found["activation.0.threshold"] = ae.threshold
    return found


def step(trainer: Any, number: int, x_BD: Tensor) -> dict[str, float]:
    """Run one `update`, and return the losses that it computes."""
    if isinstance(trainer, (StandardTrainer, StandardTrainerAprilUpdate, GatedSAETrainer, JumpReluTrainer)):
        losses = trainer.loss(x_BD, step=number, logging=True).losses  # changes nothing that training reads
        trainer.update(number, x_BD)
        mse = losses["l2_loss"] if isinstance(trainer, JumpReluTrainer) else losses["mse_loss"]
        return {"loss": losses["loss"], "mse": mse} | ({"gate": losses["aux_loss"]} if "aux_loss" in losses else {})

    seen: dict[str, float] = {}
    own = {name: getattr(trainer, name) for name in ("loss", "get_auxiliary_loss") if hasattr(trainer, name)}
    for name, function in own.items():
        setattr(trainer, name, noting(function, seen, name))
    trainer.update(number, x_BD)
    for name, function in own.items():
        setattr(trainer, name, function)
    if isinstance(trainer, PAnnealTrainer):
        name, rest = "lp", trainer.scaled_lp_loss.item()
    else:
        name, rest = "aux", trainer.auxk_alpha * seen["get_auxiliary_loss"]
    return {"loss": seen["loss"], "mse": seen["loss"] - rest, name: rest}


def noting(function: Callable[..., Tensor], seen: dict[str, float], name: str) -> Callable[..., Tensor]:
    def noted(*given: Any, **named: Any) -> Tensor:
        value = function(*given, **named)
        seen[name] = value.item()
        return value

    return noted


def rate(trainer: Any, o: Options) -> None:
    """The learning rate warms up as t/w, so the first step moves nothing. Ours warms up as (t+1)/w."""
    (theirs,) = trainer.scheduler.lr_lambdas
    earlier = lambda t: theirs(t + 1) if t < o["warmup"] else theirs(t)  # noqa: E731
    trainer.scheduler = torch.optim.lr_scheduler.LambdaLR(trainer.optimizer, earlier)


def penalty_warmup(trainer: Any, o: Options) -> None:
    """The penalty warms up as t/w, so the first step has none. Ours warms up as (t+1)/w."""
    theirs = trainer.sparsity_warmup_fn
    trainer.sparsity_warmup_fn = lambda t: theirs(t + 1)


def pre_bias(trainer: Any, o: Options) -> None:
    """The encoder's input is x - b_dec. In Conerly et al. and in our recipe the encoder's input is x."""
    trainer.ae.encode = lambda x_BD: trainer.ae.encoder(x_BD).relu()


def power(trainer: Any, o: Options) -> None:
    """The penalty is f^p, whose slope at 0 is infinite. Our recipe's penalty is (f + 1e-6)^p where f > 0."""
    theirs = trainer.lp_norm
    trainer.lp_norm = lambda f_BF, p: theirs(torch.where(f_BF > 0, f_BF + 1e-6, 0.0), p)


def median(trainer: Any, o: Options) -> None:
    """Step 0 sets b_dec to the geometric median of its batch. Our recipe starts b_dec at the mean row of the cache."""
    given = trainer.ae.b_dec.detach().clone()
    top_k.geometric_median = lambda points: given
    trainer.geometric_median = lambda points: given


def length(trainer: Any, o: Options) -> None:
    """The projection of a gradient divides by the row's length + 1e-6, so 2e-6 of the radial part remains."""
    module = sys.modules[type(trainer).__module__]
    theirs = PROJECTIONS[module]
    module.remove_gradient_parallel_to_decoder_directions = lambda w, g, d, f: theirs(w * 1e12, g, d, f)


def dead_now(trainer: Any, o: Options) -> None:
    """Latents that reach the limit are dead at once. Our list of dead latents is renewed every few steps."""
    theirs, listed, calls = trainer.get_auxiliary_loss, torch.zeros_like(trainer.num_tokens_since_fired), 0

    def auxiliary(residual_BD: Tensor, acts_BF: Tensor) -> Tensor:
        nonlocal listed, calls
        now, trainer.num_tokens_since_fired = trainer.num_tokens_since_fired, listed
        value = theirs(residual_BD, acts_BF)
        trainer.num_tokens_since_fired, calls = now, calls + 1
        listed = now.clone() if calls % o["dead_every"] == 0 else listed
        return value

    trainer.get_auxiliary_loss = auxiliary


def few_dead(trainer: Any, o: Options) -> None:
    """AuxK always has full weight. In our recipe, in SAELens and in sparsify, its weight is min(1, dead/k_aux)."""
    theirs = trainer.get_auxiliary_loss

    def auxiliary(residual_BD: Tensor, acts_BF: Tensor) -> Tensor:
        value = theirs(residual_BD, acts_BF)
        return value * min(1.0, trainer.dead_features / trainer.top_k_aux)

    trainer.get_auxiliary_loss = auxiliary


def weighted_mean(trainer: Any, o: Options) -> None:
    """The losses of the G prefixes are divided by G and then averaged (G times too small). Our recipe averages them."""
    trainer.group_weights = [1.0] * len(trainer.group_weights)


def step_of_f(trainer: Any, o: Options) -> None:
    """The penalty counts H(f - theta), so theta gets half its gradient. The paper and our recipe use H(z - theta)."""
    jump, count, seen = jumprelu.JumpReLUFunction, jumprelu.StepFunction, {}

    def of_z(z_BF: Tensor, *rest: Any) -> Tensor:
        seen["z"] = z_BF
        return jump.apply(z_BF, *rest)

    theirs = trainer.loss

    def loss(*given: Any, **named: Any) -> Any:
        jumprelu.JumpReLUFunction = SimpleNamespace(apply=of_z)
        jumprelu.StepFunction = SimpleNamespace(apply=lambda f_BF, *rest: count.apply(seen["z"], *rest))
        try:
            return theirs(*given, **named)
        finally:
            jumprelu.JumpReLUFunction, jumprelu.StepFunction = jump, count

    trainer.loss = loss


def negative(trainer: Any, o: Options) -> None:
    """Thresholds may fall below 0. In our recipe and in SAELens thresholds stop at 0."""
    trainer.optimizer.register_step_post_hook(lambda *_: trainer.ae.threshold.data.clamp_(min=0))


PENALISED, TOPK = [rate, penalty_warmup], [rate, median, length, dead_now, few_dead]
DICTIONARY_LEARNING = Peer(
    version("dictionary-learning"),
    {
        "relu": PENALISED,
        "april": [*PENALISED, pre_bias],
        "p-anneal": [*PENALISED, power],
        "gated": PENALISED,
        "jumprelu": [*PENALISED, length, step_of_f, negative],
        "topk": TOPK,
        "batchtopk": TOPK,
        "matryoshka": [*TOPK, weighted_mean],
    },
    build,
    weights,
    step,
)

if __name__ == "__main__":
    answer(DICTIONARY_LEARNING, Path(sys.argv[1]))
