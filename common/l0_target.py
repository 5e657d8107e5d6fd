"""The sentence about an SAE whose L0 misses its target, shown after training and wherever the L0 is measured."""

MISSED_BY = 0.1  # an L0 misses its target if it differs from the target by more than this share of the target


def missed_l0(name: str, l0: float | None, target: float | None, *, held_out: bool = False) -> list[str]:
    """One sentence if an L0 differs from its target by more than a tenth; empty otherwise, or if either is unknown.

    The L0 is measured on held-out text, or over the last steps of training.
    """
    if not target or l0 is None or not abs(l0 / target - 1) > MISSED_BY:
        return []
    said = f"has L0 {l0:.1f} on held-out text" if held_out else f"ended at L0 {l0:.1f}"
    return [
        f"{name} {said}, {l0 / target - 1:+.0%} from its target {target:g}. Train longer, or compare it with SAEs of "
        "its own L0."
    ]
