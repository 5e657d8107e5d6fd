"""Single latents: inspect a run, compute their statistics, steer a model with them."""
