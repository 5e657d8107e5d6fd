"""The five papers: what they claim, what was measured, and the verdict on each claim."""
