"""Activations -> sparse autoencoders.

plan, run              the runs to train, and their training; streaming trains while the activations are harvested
recipe, variants/      the registry of recipes, and the recipes themselves: one file or folder per paper
variant, sae           a variant: an SAE with its losses, schedules, mechanisms and optimizer settings
loop, step             the training loop, and the state of one step
losses, mechanisms     parts that several recipes use; l0_control is the L0 controller for --l0
checkpoint             the checkpoint format
formats/               SAE files of other libraries
"""
