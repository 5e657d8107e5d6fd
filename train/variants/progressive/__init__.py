"""Competitive progressive autoencoders (paper 001): a run starts with a quarter of the latents and enables more.

    L     = |x - D(alpha(z))|^2 + l1 |alpha(z)|_1,  z = ReLU(x W_enc + b_enc)                     (2)
    v_i   <- 0.9 v_i + 0.1 1[f_i > 0.01],  rho = mean of v over the enabled latents               (3)
    n     <- n + 5, or min(7, max(2, 0.1 n rho)), or min(10, max(4, 0.15 n rho)), by rho          (4)
    alpha = softmax(z / T) z                                                                      (5)
    T     = T_base (1 + (exp(exp(rho) - 1) - 1) s), within [0.05, 0.3], momentum 0.99             (6)

The options for the paper's own equations are `utilization=mean n_ref=none interval=1 competition=softmax cut=0`.
`PAPER_EXACT` in `recipes.py` explains why each of these settings does not work as intended. The defaults are our own
interpretations of the equations, which do work as intended. The paper's text also implies `l1_on=both` (7),
`anneal_steps=2000` (section 4.3), `init=uniform` and `normalize=layer_norm` (section 5). The runs with which we
reproduce the paper (evaluate/papers/001.toml) set these options.

Paper: does not state the units of its loss. We use this package's units: |x|^2 = 1 on average, with errors summed over
d_in. The paper's numbers suggest `reconstruction=mean normalize=none`, but its section 5 says `normalize=layer_norm`.
tau and T are in units of the SAE's input. So relative to |x|, the same 0.01 and 0.1 are 48 times smaller under a layer
norm, where |x| is sqrt(2304), than for inputs where |x| is 1.
"""

from . import recipes  # noqa: F401  (registers them)
