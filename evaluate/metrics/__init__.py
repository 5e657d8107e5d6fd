"""The metrics of `sae evaluate`: one file each, all subclasses of `base.Metric`, listed in `registry`."""
