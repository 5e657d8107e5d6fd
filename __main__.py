"""`python -m sae`, and so `accelerate launch -m sae`."""

from sae.cli import app

app(prog_name="sae")
