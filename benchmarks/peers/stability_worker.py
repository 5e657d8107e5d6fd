"""Compute SAELens' MCC of pairs of decoders, for stability_reference.py. Runs in SAELens' environment."""

import json
import sys
from importlib.metadata import version
from pathlib import Path

from sae_lens.synthetic.evals import mean_correlation_coefficient
from safetensors.torch import load_file

decoders = load_file(Path(sys.argv[1]))
names = sorted({name.rpartition(".")[0] for name in decoders})
scores = {name: mean_correlation_coefficient(decoders[f"{name}.one"], decoders[f"{name}.other"]) for name in names}
print(json.dumps({"sae-lens": version("sae-lens"), "mcc": scores}))
