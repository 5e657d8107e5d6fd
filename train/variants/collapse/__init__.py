"""The feature collapse problem (paper 000): a baseline and ten runs, each of which adds a mechanism.

    L = |x - x_hat|^2 + lambda(t) |f|_1 + alpha(t) L_contrast + beta(t) L_orth   (5)

`recipes.py` defines the eleven runs in order, and `options.py` their options. The modules follow the paper's method
section: `monitors.py`, `groups.py` and `orthogonality.py` implement section 4.1; `losses.py`, `l1_controller.py` and
the winner-take-all in `groups.py` implement 4.2; `batch_norm.py` implements 4.3. Every default is our interpretation of
the paper, and works as intended. If the paper's own setting differs from a default, the option can be set to the
paper's setting.

Paper: names five pairs of runs; the split within each pair is ours. The paper states no alpha, no beta, and no rule for
lambda within its bounds. Paper: interprets an absorption of 0 and a split-feature score of 1 as a collapse. But an
absorption of 0 is the best value, and a split-feature score of 1 means that no feature is split. Paper: 100,000 tokens
in batches of 125 are 800 steps, all within its warm-up of 1000 steps.

Shape suffixes here, in addition to those of train/step.py: G groups, M latents in a group, S dimensions of the sketch,
N neighbors or a few tokens, T steps.
"""

from . import recipes  # noqa: F401  (registers them)
