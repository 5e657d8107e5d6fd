"""Upload a run to the Hugging Face Hub as a SAELens export with a model card."""

import tempfile
from collections.abc import Callable
from pathlib import Path

from ...common.errors import Interrupted, UsageError
from ...common.files import atomic_write
from ..sae import load_sae
from .export import export_sae
from .hub import REPO_ID, translate_hub_errors
from .model_card import model_card
from .verify import Progress, no_progress


def upload_sae(
    run: Path,
    repo: str,
    *,
    private: bool = False,
    approximate: str | None = None,
    cache: Path | None = None,
    confirm: Callable[[str], bool],
    say: Callable[[str], None] = lambda line: None,
    progress: Progress = no_progress,
) -> str:
    """Upload a run as a SAELens export with a model card, and return its address.

    Before the upload, `confirm` is called with a question; nothing is uploaded unless it returns True. `say` is called
    with the notes, the result of the verification and the files. The other arguments are those of `export_sae`.

    Raises the errors of `export_sae`, and Interrupted if `confirm` returns False.
    """
    from huggingface_hub import HfApi

    if not REPO_ID.fullmatch(repo):
        raise UsageError(f"Invalid --repo {repo}: expected owner/name.")
    model = load_sae(run).origin.get("model", {}).get("name")
    base_model = model if isinstance(model, str) and REPO_ID.fullmatch(model) else None
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "sae"
        exported = export_sae(run, "saelens", folder, approximate=approximate, cache=cache, progress=progress)
        atomic_write(exported.folder / "README.md", model_card(exported, run, repo, base_model).encode())
        for note in exported.notes:
            say(f"note     {note}")
        say(f"checked  {exported.check}")
        for path in exported.files:
            say(f"file     {path.name} ({path.stat().st_size:,} bytes)")
        visibility = "private" if private else "public"
        if not confirm(
            f"Upload these {len(exported.files)} files to https://huggingface.co/{repo} ({visibility} if new)?"
        ):
            raise Interrupted("Canceled; nothing was uploaded.")
        api = HfApi()
        with translate_hub_errors(repo):
            api.create_repo(repo, private=private, exist_ok=True)
            message = f"SAE {run.resolve().name}"
            commit = api.upload_folder(repo_id=repo, folder_path=exported.folder, commit_message=message)
        return f"https://huggingface.co/{repo} at {getattr(commit, 'oid', 'main')}"
