"""Check that SAEDashboard builds a page from an export: `python formats_dashboard.py RUN PYTHON PAGE`.

PYTHON is the interpreter of an environment with SAEDashboard:

    python -m venv env-dashboard && env-dashboard/bin/pip install sae-dashboard==0.8.0 torch==2.13.0 'pyarrow<21'
    env-dashboard/bin/pip uninstall torchvision     # unless it fits the build of torch

The run is exported for SAELens, loaded by `SAE.load_from_disk`, and passed to SAEDashboard's own SaeVisRunner with
gemma-2-mini and held-out contexts of the run's cache. `--worker FOLDER` runs SAEDashboard's side.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

FEATURES, CONTEXTS = 8, 64


def worker(folder: Path, weights: Path, page: Path) -> None:
    import torch
    from sae_dashboard.data_writing_fns import save_feature_centric_vis
    from sae_dashboard.sae_vis_data import SaeVisConfig
    from sae_dashboard.sae_vis_runner import SaeVisRunner
    from sae_lens import SAE, HookedSAETransformer
    from safetensors.torch import load_file
    from transformerlens_model import load_model

    torch.set_num_threads(1)
    model = load_model(weights, HookedSAETransformer)
    sae = SAE.load_from_disk(folder / "sae")
    tokens = load_file(folder / "tokens.safetensors")["tokens"].long()
    config = SaeVisConfig(hook_point=sae.cfg.metadata.hook_name, features=range(FEATURES), minibatch_size_tokens=16)
    vis = SaeVisRunner(config).run(encoder=sae, model=model, tokens=tokens)
    vis.model = model
    save_feature_centric_vis(vis, page)
    built = [vis.feature_data_dict[n].feature_tables_data is not None for n in range(FEATURES)]
    print(f"{page}: {page.stat().st_size:,} bytes, {sum(built)} features")


def main(run: Path, python: str, page: Path) -> None:
    import torch
    from safetensors.torch import save_file

    from sae.harvest.mini import WEIGHTS
    from sae.train.formats.export import export_sae
    from sae.train.formats.verify import find_run_cache
    from sae.train.sae import load_sae

    cache = find_run_cache(load_sae(run).origin)
    assert cache is not None, "the cache of the run was not found"
    contexts = cache.contexts(held_out=True)
    whole = contexts.ids[contexts.length == contexts.length.max()][:CONTEXTS]
    with tempfile.TemporaryDirectory() as place:
        print(export_sae(run, "saelens", Path(place) / "sae").check)
        save_file({"tokens": torch.from_numpy(whole.astype("int64"))}, Path(place) / "tokens.safetensors")
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        command = [python, __file__, "--worker", place, str(WEIGHTS), str(page.resolve())]
        subprocess.run(command, check=True, env=environment)


if __name__ == "__main__":
    args = [Path(word) for word in sys.argv[2:]]
    worker(*args) if sys.argv[1] == "--worker" else main(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]))
