"""Text -> activations: the language model, its text, and the embedded gemma-2-mini."""
