"""SAELens' own trainer, started by agree_train.py in an environment that has it.

Each function whose docstring compares a trainer with our recipe removes the difference that the docstring describes.
"""

import sys
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from agree_peer import Peer, answer
from sae_lens import (
    BatchTopKTrainingSAE,
    BatchTopKTrainingSAEConfig,
    GatedTrainingSAE,
    GatedTrainingSAEConfig,
    JumpReLUTrainingSAE,
    JumpReLUTrainingSAEConfig,
    MatryoshkaBatchTopKTrainingSAE,
    MatryoshkaBatchTopKTrainingSAEConfig,
    StandardTrainingSAE,
    StandardTrainingSAEConfig,
    TopKTrainingSAE,
    TopKTrainingSAEConfig,
)
from sae_lens.config import LoggingConfig, SAETrainerConfig
from sae_lens.training.sae_trainer import SAETrainer
from torch import Tensor, nn

Options = dict[str, Any]


def build(recipe: str, o: Options) -> SAETrainer:
    d_in = o["d_in"]
    dtype = str(torch.get_default_dtype()).removeprefix("torch.")
    shared = {"d_in": d_in, "d_sae": o["d_sae"], "dtype": dtype}
    l1, auxk = {"l1_coefficient": o.get("l1"), "l1_warm_up_steps": o.get("l1_warmup")}, {}
    if "aux" in o:
        auxk = {"k": o["k"], "aux_loss_coefficient": o["aux"]}
    match recipe:
        case "relu":
            sae = StandardTrainingSAE(StandardTrainingSAEConfig(**shared, **l1))
        case "april":
            l1["l1_coefficient"] /= d_in**0.5
            sae = StandardTrainingSAE(StandardTrainingSAEConfig(**shared, **l1, apply_b_dec_to_input=False))
        case "gated":
            sae = GatedTrainingSAE(GatedTrainingSAEConfig(**shared, **l1))
        case "topk":
            sae = TopKTrainingSAE(TopKTrainingSAEConfig(**shared, **auxk))
        case "batchtopk":
            sae = BatchTopKTrainingSAE(BatchTopKTrainingSAEConfig(**shared, **auxk))
        case "matryoshka":
            widths = [o["d_sae"] >> g for g in reversed(range(o["prefixes"]))]
            how = MatryoshkaBatchTopKTrainingSAEConfig(**shared, **auxk, matryoshka_widths=widths)
            sae = MatryoshkaBatchTopKTrainingSAE(how)
        case "jumprelu-step":
            penalty = {"l0_coefficient": o["penalty"], "l0_warm_up_steps": o["penalty_warmup"]}
            sae = JumpReLUTrainingSAE(
                JumpReLUTrainingSAEConfig(
                    **shared, **penalty, jumprelu_bandwidth=o["bandwidth"], apply_b_dec_to_input=False
                )
            )
        case "jumprelu-tanh":  # in the paper's units, as the recipe converts them
            unit = d_in**0.5
            penalty = {"l0_coefficient": o["penalty"] / unit**2, "l0_warm_up_steps": o["steps"]}
            sae = JumpReLUTrainingSAE(
                JumpReLUTrainingSAEConfig(
                    **shared, **penalty, jumprelu_bandwidth=o["bandwidth"] / unit, apply_b_dec_to_input=False,
                    jumprelu_sparsity_loss_mode="tanh", jumprelu_tanh_scale=o["c"] * unit,
                    pre_act_loss_coefficient=o["reach"] / unit, jumprelu_ste_to_input=True,
                )
            )  # fmt: skip
    if recipe.startswith("jumprelu"):  # it is float32 in any case
        sae.threshold = nn.Parameter(sae.threshold.detach().to(torch.get_default_dtype()))
    steps, batch = o["steps"], o["batch"]
    how = SAETrainerConfig(
        total_training_samples=steps * batch, train_batch_size_samples=batch, lr=o["lr"], lr_end=o["lr"],
        lr_warm_up_steps=o["warmup"], lr_decay_steps=round((1 - o["decay_start"]) * steps), adam_beta1=o["beta1"],
        dead_feature_window=o["dead_tokens"] // batch - 1,  # a latent is dead if it is silent for longer
        logger=LoggingConfig(log_to_wandb=False),
    )  # fmt: skip
    return SAETrainer(how, sae, iter(()))


def weights(trainer: SAETrainer) -> dict[str, Tensor]:
    sae = trainer.sae
    found = {"W_enc": sae.W_enc, "W_dec": sae.W_dec, "b_dec": sae.b_dec}
    if isinstance(sae, GatedTrainingSAE):
        return found | {f"activation.0.{name}": getattr(sae, name) for name in ("r_mag", "b_gate", "b_mag")}
    found["b_enc"] = sae.b_enc
    if isinstance(sae, JumpReLUTrainingSAE):
        found["activation.0.threshold"] = sae.threshold
    if isinstance(sae, BatchTopKTrainingSAE):
        found["activation.0.threshold"] = sae.topk_threshold
    return found


def step(trainer: SAETrainer, number: int, x_BD: Tensor) -> dict[str, float]:
    """One `step`, and what `fit` does after it."""
    done = trainer.step(x_BD)
    trainer.n_training_steps += 1
    losses = {name: loss.item() for name, loss in done.losses.items()}
    mse = sum(loss for name, loss in losses.items() if "mse" in name)
    seen = {"loss": done.loss.item(), "mse": mse}
    if "auxiliary_reconstruction_loss" in losses:
        name = "gate" if isinstance(trainer.sae, GatedTrainingSAE) else "aux"
        seen[name] = losses["auxiliary_reconstruction_loss"]
    return seen


def penalty_warmup(trainer: SAETrainer, o: Options) -> None:
    """The penalty warms up as t/w, so the first step has none. Ours warms up as (t+1)/w."""
    for scheduler in trainer.coefficient_schedulers.values():
        scheduler.step()


def free_rows(trainer: SAETrainer, o: Options) -> None:
    """W_dec's rows are not normalized, which affects penalty and top-k. Ours have length 1 and no radial gradient."""
    w_FD = trainer.sae.W_dec

    def project(w_FD: Tensor) -> None:
        w_FD.grad -= (w_FD.grad * w_FD.data).sum(1, keepdim=True) * w_FD.data

    w_FD.register_post_accumulate_grad_hook(project)
    trainer.optimizer.register_step_post_hook(lambda *_: w_FD.data.div_(w_FD.data.norm(dim=1, keepdim=True)))


def dead_now(trainer: SAETrainer, o: Options) -> None:
    """The dead latents are determined in each step. Our list of dead latents is renewed every few steps."""
    theirs, listed = trainer.sae.training_forward_pass, torch.zeros(o["d_sae"], dtype=torch.bool)

    def forward(step_input: Any) -> Any:
        if trainer.n_training_steps % o["dead_every"] == 0:
            listed.copy_(step_input.dead_neuron_mask)
        return theirs(replace(step_input, dead_neuron_mask=listed))

    trainer.sae.training_forward_pass = forward


def negative_aux(trainer: SAETrainer, o: Options) -> None:
    """AuxK uses negative pre-activations unchanged. Our recipe and dictionary_learning set them to 0."""
    theirs = trainer.sae.calculate_topk_aux_loss
    trainer.sae.calculate_topk_aux_loss = lambda **given: theirs(**given | {"hidden_pre": given["hidden_pre"].relu()})


def raw_aux(trainer: SAETrainer, o: Options) -> None:
    """AuxK is the squared error itself. Gao et al. and our recipe divide it by the variance of the residual."""
    theirs = trainer.sae.calculate_topk_aux_loss

    def auxiliary(**given: Any) -> Tensor:
        residual_BD = (given["sae_in"] - given["sae_out"]).detach()
        return theirs(**given) / (residual_BD - residual_BD.mean(0)).square().sum(1).mean()

    trainer.sae.calculate_topk_aux_loss = auxiliary


def threshold_from_0(trainer: SAETrainer, o: Options) -> None:
    """The threshold starts at 0. Our threshold starts at the first batch's minimum. Neither affects training."""
    theirs = trainer.sae.update_topk_threshold

    def update(acts_BF: Tensor) -> None:
        rate = trainer.sae.cfg.topk_threshold_lr
        trainer.sae.cfg.topk_threshold_lr = 1.0 if trainer.n_training_steps == 0 else rate
        theirs(acts_BF)
        trainer.sae.cfg.topk_threshold_lr = rate

    trainer.sae.update_topk_threshold = update


def sum_of_prefixes(trainer: SAETrainer, o: Options) -> None:
    """The losses of the G prefixes are summed. Our recipe averages them."""
    theirs = trainer.sae.mse_loss_fn
    trainer.sae.mse_loss_fn = lambda *given: theirs(*given) / o["prefixes"]


def moving_decoder(trainer: SAETrainer, o: Options) -> None:
    """The gate's own reconstruction trains W_dec and b_dec. The paper and our recipe stop that gradient."""
    sae, theirs = trainer.sae, trainer.sae.calculate_aux_loss

    def auxiliary(**given: Any) -> dict[str, Tensor]:
        # (x - b_dec) W + b_gate = x W + (b_gate - b_dec W), so that b_dec remains only in the reconstruction.
        within = {
            "W_dec": sae.W_dec.detach(),
            "b_dec": sae.b_dec.detach(),
            "b_gate": sae.b_gate - sae.b_dec @ sae.W_enc,
        }
        sae.__dict__.update(within)  # attribute access finds these before the parameters
        sae.cfg.apply_b_dec_to_input = False
        try:
            return theirs(**given)
        finally:
            sae.cfg.apply_b_dec_to_input = True
            for name in within:
                del sae.__dict__[name]

    sae.calculate_aux_loss = auxiliary


def negative(trainer: SAETrainer, o: Options) -> None:
    """Thresholds are clamped at 0 when a step begins. Ours clamps when a step ends, which changes the saved values."""
    trainer.optimizer.register_step_post_hook(lambda *_: trainer.sae.threshold.data.clamp_(min=0))


def reach_of_dead(trainer: SAETrainer, o: Options) -> None:
    """Only dead latents are pulled towards their threshold. In Conerly et al. and in our recipe, all latents are."""
    theirs = trainer.sae.training_forward_pass
    everyone = torch.ones(o["d_sae"], dtype=torch.bool)
    trainer.sae.training_forward_pass = lambda step_input: theirs(replace(step_input, dead_neuron_mask=everyone))


def window_to_input(trainer: SAETrainer, o: Options) -> None:
    """With jumprelu_ste_to_input ("Anthropic's"), the window's gradient also reaches z. Ours only reaches theta."""
    trainer.sae.cfg.jumprelu_ste_to_input = False


TOPK = [free_rows, dead_now, negative_aux, raw_aux]
SAELENS = Peer(
    version("sae-lens"),
    {
        "relu": [penalty_warmup, free_rows],
        "april": [penalty_warmup],
        "gated": [penalty_warmup, free_rows, moving_decoder],
        "topk": TOPK,
        "batchtopk": [*TOPK, threshold_from_0],
        "matryoshka": [*TOPK, threshold_from_0, sum_of_prefixes],
        "jumprelu-step": [penalty_warmup, free_rows, negative],
        "jumprelu-tanh": [penalty_warmup, negative, reach_of_dead, window_to_input],
    },
    build,
    weights,
    step,
)

if __name__ == "__main__":
    answer(SAELENS, Path(sys.argv[1]))
