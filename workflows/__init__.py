"""Workflows that join several stages: harvesting while training, reproducing a paper, the demo."""
