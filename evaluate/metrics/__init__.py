"""The metrics of `sae evaluate`: one file each, all of the shape of `base.Metric`, listed in `registry`."""
