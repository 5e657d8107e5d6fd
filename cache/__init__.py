"""Every byte of activations on disk. Imports nothing of the other folders."""
