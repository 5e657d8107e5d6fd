"""Evaluate SAEs: metrics, tables and pages. One pass of the model over a text serves every SAE."""
