"""CompeteSAE (paper 002): pairs of latents that fire together are penalized for similar decoder directions.

    c_ij  = P(f_i | f_j) / (k/n)                                                                  (3)
    alpha = min(1, t / t_w)                                                                       (4)
    L     = |x - x_hat|^2 + l1 |f|_1 + strength alpha sum_ij max(c_ij, c_ji) <f_i, f_j>^2         (5)

P(f_i | f_j) = J_ij / p_j, so max(c_ij, c_ji) = J_ij / min(p_i, p_j) / (k/n): how often the rarer latent of a pair
brings the other, over chance. It is symmetric, and so is <f_i, f_j>: the direction of (3) has no effect on (5).

The paper's own settings are `tau_on=lift reduction=sum pair_store=dense`, and `diagonal=true` for a sum that holds
i = j. Two of them have no effect as intended (`PAPER_EXACT` of `recipes.py`). The defaults are readings that work.

Paper: (5) is a sum over all i, j. By default tau is on P instead of c, the sum is the mean over the pairs that pass,
and i = j is left out: c_ii = P(f_i | f_i) / (k/n) = n/k, so that the diagonal is (n/k) sum_i |f_i|^4, a constant of
unit rows.

The dense J has n^2 entries, 1.4 GB at n = 18432, and its products take n (2B + 6d) / 10Bd = 7 times the operations of
the rest of a step. With k latents per token few pairs ever pass, so `pair_store=table` follows a fixed number of pairs
and looks for better ones now and then. A step counts how often they fire together, and penalizes one in `turns` of
them, in turn: the rows of all would be read from memory in every step. Pairs that pass stay so for many steps, as beta
averages over about a hundred, so each is penalized before it has changed.

Paper: states two numbers of steps, of k and of every result, and prints the L1 baseline's numbers as those of "no
competition"; `competition-off` is the same model without (5), `competition-baseline` the other one. It prints no
warm-up of lambda_1, which ours has unless `l1_warmup=0`. It writes E(x), so the encoder does not see x - b_dec. It does
not state the activation or the units of its loss: what its baseline's explained variance of 0.293 points to is
`reconstruction=mean normalize=none`.

`pairs.py` is (3), `penalty.py` is (4) and (5), `recipes.py` has the options and the recipes.

Shape suffixes here: S pairs in the shape of their store, P pairs in a table, I a block of latents, X d_in or tokens.
"""

from . import recipes  # noqa: F401  (registers them)
