"""Activations -> sparse autoencoders. A variant is an SAE, terms with coefficients, and mechanisms around the step."""
