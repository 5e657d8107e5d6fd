"""HierarchicalSAE (paper 004) and its five ablations, each of which adds one mechanism to the previous one.

    lambda = lambda_0 (1 - t/T),  lambda_0 = 1/sqrt(d_in)                       (3)  linear
    dead latents restart on tokens with a high loss                                  resample
    p_i    = share of the last 100 steps in which i fired; dead is p_i < 0.01   (4)  window
    alpha  = clamp(2.5 / L_recon, 0.1, 2)                                       (5)  adaptive
    L      = |x - x_hat|^2 + lambda alpha |f|_1                                 (6)
    W_enc,i <- (W_enc,i + W_enc,j)/2 where cos(i, j) > 0.9, every 100 steps     (7)  hierarchical

`recipes.py` defines the ablations, in the paper's order, with their options, and the baselines. `window.py` implements
(4), `penalty.py` (5) and `merging.py` (7).

lambda ends at zero, so the result is close to a dense autoencoder (the paper's L0 is 1,735 of 2,304). The paper's best
result is that of `hierarchical-linear`. With `--l0 N` the run ends with N latents per token. This deviates from (3),
where the penalty ends at zero. Here lambda falls for a twentieth of the run, and is then adjusted so that L0 reaches N.

Paper: section 4.2 sets lambda_0 = 1/sqrt(k), but k is the dictionary width in section 4.1 and 320 in section 5.4.
Section 5.4 also gives 1/sqrt(2304), "based on input dimension". The paper's dictionary is as wide as its input (2304),
so both of these readings give the same number; k = 320 makes lambda_0 2.7 times as large. `lambda_by` selects the
reading.

Paper: says that its input is normalized "using per-layer statistics from a 10K token sample", but not which statistics.
We assume that these are the mean and the standard deviation of each dimension (`normalize=standardize`). The losses
that the paper prints are sums over raw activations. So L_recon in (5) is in units of raw activations for any
normalization, unless `alpha_units=input` is set. The target 2.5 presumes a variance of 24, which is that of raw
activations at the paper's layer.

Paper: trains with Adam and weight decay 0.01, added to the gradient, and mentions neither warm-up nor decay of the
learning rate. By default, we use AdamW with weight decay for W_enc only, and this package's learning rate schedule. The
runs with which we reproduce the paper (evaluate/papers/004.toml) use the paper's settings instead.
"""

from . import recipes  # noqa: F401  (registers them)
