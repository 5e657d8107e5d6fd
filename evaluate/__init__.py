"""SAE + model -> numbers, tables, pages. Tokens outside, SAEs inside: one pass of the model serves every SAE."""
