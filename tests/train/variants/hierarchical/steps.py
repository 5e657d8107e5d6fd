"""Steps and variants that the tests of paper 004 share."""

import torch

from sae.train.recipe import find_recipe
from sae.train.sae import SAE
from sae.train.step import Step
from sae.train.variant import RunConfig, Variant


def step_on(sae: SAE, x_BD: torch.Tensor, i: int = 0) -> Step:
    """The step of a forward pass, with all of Adam's moments set to one."""
    optimizer = torch.optim.AdamW(sae.parameters())
    for parameter in sae.parameters():
        optimizer.state[parameter] = {name: torch.ones_like(parameter.data) for name in ("exp_avg", "exp_avg_sq")}
        optimizer.state[parameter]["step"] = torch.ones(())
    with torch.no_grad():
        return Step(torch.tensor(i), sae, optimizer, x_BD, *sae(x_BD))


def firing(f_BF: torch.Tensor, i: int) -> Step:
    """A step with these latents. The pre-activations are NaN, so a result that depends on them would be NaN."""
    sae = SAE(1, f_BF.shape[1])
    x_BD, pre_BF = torch.zeros(len(f_BF), 1), torch.full_like(f_BF, torch.nan)
    return Step(torch.tensor(i), sae, torch.optim.AdamW(sae.parameters()), x_BD, pre_BF, f_BF, x_BD)


def build(name: str, d_in: int = 32, d_sae: int = 64, steps: int = 1000, **options: object) -> Variant:
    torch.manual_seed(0)
    return find_recipe(name).make(RunConfig(d_in, d_sae, steps, 64), options)


def rows(seed: int, count: int = 64) -> torch.Tensor:
    return torch.randn(count, 32, generator=torch.Generator().manual_seed(seed)) / 32**0.5


def reconstructing() -> tuple[SAE, torch.Tensor]:
    """Latents 0 and 1 reconstruct the first two tokens. The reconstruction of the third, (0, 0, 3, 4), is zero."""
    sae = SAE(4, 3, pre_bias=False)
    with torch.no_grad():
        sae.W_dec.copy_(torch.eye(3, 4))
        sae.W_enc.copy_(torch.eye(3, 4).T)
        sae.W_enc[2, 2] = 0
        sae.W_enc[0, 0], sae.W_enc[1, 1] = 1.0, 1.0
        sae.b_enc[2] = -7.0
    return sae, torch.tensor([[1.0, 0, 0, 0], [0.0, 2, 0, 0], [0.0, 0, 3, 4]])
