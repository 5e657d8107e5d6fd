"""The five papers: their claims, our measurements, and the verdict on each claim."""
