"""Activations -> sparse autoencoders.

plan, run              the runs to train, and their training; streaming trains while the activations are harvested
recipe, variants/      the registry, and the recipes: one file or folder per paper
variant, sae           a variant: an SAE with its losses, schedules, mechanisms and optimizer settings
loop, step             the training loop, and the state of one step
losses, mechanisms     parts that several recipes use; l0_control has the L0 controller behind --l0
checkpoint             the checkpoint format
formats/               SAE files of other libraries
"""
