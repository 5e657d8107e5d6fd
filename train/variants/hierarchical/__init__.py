"""HierarchicalSAE (paper 004) and its five ablations, each of which adds one mechanism to the one before.

    lambda = lambda_0 (1 - t/T),  lambda_0 = 1/sqrt(d_in)                       (3)  linear
    dead latents restart on tokens with a high loss                                  resample
    p_i    = share of the last 100 steps in which i fired; dead is p_i < 0.01   (4)  window
    alpha  = clamp(2.5 / L_recon, 0.1, 2)                                       (5)  adaptive
    L      = |x - x_hat|^2 + lambda alpha |f|_1                                 (6)
    W_enc,i <- (W_enc,i + W_enc,j)/2 where cos(i, j) > 0.9, every 100 steps     (7)  hierarchical

`recipes.py` has the ablations in order, their options and the baselines; `window.py` is (4), `penalty.py` is (5),
`merging.py` is (7).

lambda ends at zero: the result is close to a dense autoencoder (the paper's L0 is 1,735 of 2,304), and the paper's best
row is `hierarchical-linear`. With `--l0 N` the run ends with N latents per token. That contradicts (3), whose penalty
ends at zero: lambda falls for a twentieth of the run, and is then whatever N needs.

Paper: lambda_0 is 1/sqrt(k) in 4.2, where k is the width of the dictionary in 4.1 and 320 in 5.4; and 1/sqrt(2304),
"based on input dimension", in 5.4. By d_in and by the width it is the same number, since the width is d_in; by 320 it
is 2.7 times as large (`lambda_by`).

Paper: says that its input is normalized "using per-layer statistics from a 10K token sample", and not with which. As
its letter we read the mean and the standard deviation of each dimension (`normalize=standardize`). It prints losses
that are sums over raw activations; L_recon in (5) is in these units whatever the input, unless `alpha_units=input`, and
2.5 belongs to their variance at its layer, 24.

Paper: trains with Adam and weight decay 0.01, added to the gradient, and states neither warm-up nor decay of the
learning rate. The defaults here are AdamW's decay of W_enc alone and this package's schedule; the paper's readings
(evaluate/papers/004.toml) take what it prints.
"""

from . import recipes  # noqa: F401  (registers them)
