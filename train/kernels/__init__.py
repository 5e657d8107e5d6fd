"""What a training step computes on a GPU by kernels of its own, written in Triton (extra `kernels`)."""
