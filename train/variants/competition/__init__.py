"""CompeteSAE (paper 002): pairs of latents that fire together are penalized for similar decoder directions.

    c_ij  = P(f_i | f_j) / (k/n)                                                                  (3)
    alpha = min(1, t / t_w)                                                                       (4)
    L     = |x - x_hat|^2 + l1 |f|_1 + strength alpha sum_ij max(c_ij, c_ji) <f_i, f_j>^2         (5)

P(f_i | f_j) = J_ij / p_j, so max(c_ij, c_ji) = J_ij / min(p_i, p_j) / (k/n): how often the other latent of a pair fires
when the rarer one does, relative to chance. Both this maximum and <f_i, f_j> are symmetric, so the direction of (3) has
no effect on (5).

The paper's own settings are `tau_on=lift reduction=sum pair_store=dense`, and `diagonal=true` to include i = j in the
sum. Two of these settings do not work as intended (`PAPER_EXACT` in `recipes.py`). The defaults are our own
interpretations of the equations, which do work as intended.

Paper: (5) is a sum over all i, j. By default, tau applies to P instead of c, the sum is replaced by the mean over the
pairs that pass, and i = j is left out. With i = j, c_ii = P(f_i | f_i) / (k/n) = n/k, so the diagonal is (n/k) sum_i
|f_i|^4, a constant for unit rows.

The dense J has n^2 entries, 1.4 GB at n = 18432, and its matrix products take 7 times as many operations as the rest of
a step: n (2B + 6d) / 10Bd = 7. With k latents per token, few pairs ever pass tau. So `pair_store=table` tracks a fixed
number of pairs and searches for better pairs at intervals. Every step counts how often each pair of the table fires
together. But each step penalizes only a fraction 1/`turns` of the pairs, and different ones than the step before. To
penalize all pairs, every step would have to read all their rows from memory. The statistics are averages over about a
hundred steps (beta). A pair that passes tau therefore does so for many steps, and its turn to be penalized comes before
its statistics have changed much.

Paper: for the number of steps, for k and for every result, it states two different values each. The paper prints the L1
baseline's numbers as the results of "no competition"; here `competition-off` is the same model without (5), and
`competition-baseline` is the L1 baseline. The paper mentions no warm-up of lambda_1; the recipes here have one unless
`l1_warmup=0`. The paper writes E(x), so the encoder does not see x - b_dec. It does not state the activation or the
units of the loss; the baseline's explained variance of 0.293 suggests `reconstruction=mean normalize=none`.

`pairs.py` implements (3), `penalty.py` implements (4) and (5), and `recipes.py` defines the options and the recipes.

Shape suffixes here: S pairs, as a matrix in `DensePairs` and as a list in `PairTable`; P the pairs of a table; I a
block of latents; X d_in or tokens.
"""

from . import recipes  # noqa: F401  (registers them)
