"""The schema of every record: what each JSON file of a cache, a run and an evaluation holds.

Field names are those on disk. `NotRequired` fields are absent where they say nothing, or in records of earlier
versions. `docs/records.md` is made from this file.
"""

from typing import Annotated, TypedDict

from msgspec import Meta

from .records import RecordKind

Count = Annotated[int, Meta(ge=0)]
Sha256 = Annotated[str, Meta(pattern="^[0-9a-f]{64}$")]

# --- runs/<name>/ -----------------------------------------------------------------------------------------------------


class Checkpoint(TypedDict):
    """checkpoints/step-<step>/state.json"""

    format: int
    step: Annotated[Count, Meta(description="optimizer steps taken; also in the folder's name and in the tensor `i`")]
    sha256: Annotated[Sha256, Meta(description="of state.safetensors")]


CHECKPOINT_RECORD = RecordKind(
    Checkpoint, "Delete this checkpoint's folder and resume: training goes on from the one before it."
)

# --- activations/<name>/, while it is harvested -----------------------------------------------------------------------


class Draft(TypedDict):
    """drafts/<window>/state.json"""

    owner: Annotated[Sha256, Meta(description="digest of the harvest, the arrays and what computes them")]
    checksums: Annotated[list[str], Meta(description="CRC-32C of each <number>.safetensors")]
    context: Annotated[Count, Meta(description="the next context to compute")]


DRAFT_RECORD = RecordKind(Draft, "Delete the folder: the window is then computed from its beginning.")
