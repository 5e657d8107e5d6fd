"""The schemas of a run's records: one schema for each of the run's JSON files. The schemas of an evaluation are in
evaluation_schemas.py, the schemas of a cache in cache_schemas.py.

Field names are the names on disk. A `NotRequired` field is absent if it does not apply, and may be absent if an earlier
version wrote the record. The first line of each docstring is the file's path. `python benchmarks/records_page.py` makes
docs/reference/records.md from the three files.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, NotRequired, TypedDict

from msgspec import Meta

from .records import RecordKind

Count = Annotated[int, Meta(ge=0)]
Size = Annotated[int, Meta(ge=1)]
Sha256 = Annotated[str, Meta(pattern="^[0-9a-f]{64}$")]
Precision = Literal["float32", "tf32", "bfloat16"]

# --- activations/, beside the caches ----------------------------------------------------------------------------------


class RememberedModels(TypedDict):
    """activations/.models.json

    It can be deleted at any time.
    """

    files: Annotated[
        dict[str, tuple[int, int, int, int, int, Sha256]],
        Meta(description="path of a large file -> size, mtime and ctime (both in ns), inode, device, sha256"),
    ]
    folders: Annotated[
        dict[str, list[str]],
        Meta(description="sha256 of the files of a model's folder -> the paths at which the folder was found"),
    ]


MODELS_RECORD = RecordKind(RememberedModels, "Delete it: it is created again.")
# --- runs/<name>/ -----------------------------------------------------------------------------------------------------


class RecordedAdapter(TypedDict):
    """A PEFT adapter that was merged into the model."""

    name: str
    revision: Annotated[str | None, Meta(description="commit on the Hub, or sha256 of the files of a folder")]


class RecordedModel(TypedDict):
    """A language model."""

    name: Annotated[str, Meta(description="id on the Hub, or a folder's name and the first 8 digits of its digest")]
    revision: NotRequired[
        Annotated[
            str | None, Meta(description="commit on the Hub, or sha256 of the files of a folder; null: not known")
        ]
    ]
    adapters: NotRequired[list[RecordedAdapter]]


class SAEOrigin(TypedDict, total=False):
    """What an SAE was trained on, as far as known."""

    model: RecordedModel
    layer: Annotated[int, Meta(ge=0, description="zero-based block")]
    site: Annotated[str, Meta(description="site in the layer, such as resid_post or mlp.gate_proj.output")]
    hook_name: Annotated[str, Meta(description="layer and site in one: blocks.12.hook_resid_post")]
    variant: str
    seed: Count
    training_tokens: Annotated[Count, Meta(description="steps * batch_size of run.json")]
    cache: Annotated[str | None, Meta(description="folder of the cache, which holds the text to evaluate on")]
    fingerprint: Annotated[str | None, Meta(description="fingerprint of that cache")]
    context: Annotated[int | None, Meta(description="tokens in a context")]
    bos: Annotated[int | None, Meta(description="id of the token that begins contexts; null: no token")]
    norm_limit: Annotated[
        float | None, Meta(description="rows with a larger norm are outliers and were not trained on; null: no limit")
    ]
    format: Annotated[str, Meta(description="for an imported SAE: format of its files, such as saelens")]
    prepend_bos: Annotated[bool, Meta(description="for an imported SAE: whether a BOS token began its contexts")]
    bos_token: Annotated[str, Meta(description="for an imported SAE: the BOS token, if its files name one")]
    dataset: Annotated[str, Meta(description="for an imported SAE: the text that it was trained on")]


class SavedActivation(TypedDict):
    """A function in the chain from pre-activations to latents. Its options, such as `k`, are stored beside its name."""

    name: str


class SavedSAE(TypedDict):
    """sae.json"""

    format: int
    d_in: Annotated[Size, Meta(description="width of the activations")]
    d_sae: Annotated[Size, Meta(description="number of latents")]
    pre_bias: Annotated[bool, Meta(description="whether the encoder subtracts b_dec from its input")]
    layer_norm: NotRequired[Annotated[bool, Meta(description="whether the encoder layer-normalizes tokens; format 2")]]
    activation: list[SavedActivation]
    sha256: Annotated[Sha256, Meta(description="digest of sae.safetensors")]
    run: NotRequired[
        Annotated[
            Sha256,
            Meta(description="digest of what determines the run's result; its checkpoints record the same digest"),
        ]
    ]
    origin: NotRequired[SAEOrigin]


SAE_RECORD = RecordKind(
    SavedSAE,
    "Delete sae.json and give the run folder to `sae train --resume`, or repeat the `sae train` command: sae.json and "
    "sae.safetensors are written again from the last checkpoint. (If the SAE was imported, delete its folder and "
    "import it again.)",
)


class RecordedSource(TypedDict):
    """The source of this package."""

    sha256: Annotated[Sha256, Meta(description="digest of its files")]
    commit: str | None
    changed: Annotated[bool | None, Meta(description="whether it differs from the commit or the wheel")]


class RecordedEnvironment(TypedDict, total=False):
    """The machine and the packages."""

    versions: dict[str, str]
    source: RecordedSource
    python: str
    platform: str
    cpu: str
    cores: int | None
    gpus: list[str]
    cuda: str | None
    matmul_precision: str
    variables: Annotated[dict[str, str], Meta(description="environment variables that change what is computed")]


class AskedOptions(TypedDict, total=False):
    """The options of the `sae train` command, under the names of TrainConfig."""

    log_every: Annotated[Size | None, Meta(description="steps between lines of metrics.jsonl; null: the default")]
    precision: Annotated[Precision, Meta(description="--precision, if it was given")]


class ImportSource(TypedDict):
    """The files that an SAE was imported from."""

    format: str
    sha256: Annotated[dict[str, Sha256], Meta(description="path in the folder -> digest of the file")]
    path: Annotated[str, Meta(description="a local folder, or a folder in the repository")]
    repository: NotRequired[Annotated[str, Meta(description="repository on the Hub")]]
    revision: NotRequired[Annotated[str, Meta(description="commit on the Hub")]]
    overrides: NotRequired[
        Annotated[dict[str, Any], Meta(description="`layer` and `model`, if options replaced the values in the files")]
    ]


class ImportCheck(TypedDict):
    """The comparison of an imported SAE with the SAE computed directly from the original files."""

    rows: Annotated[Count, Meta(description="number of rows on which the two were compared")]
    what: Annotated[str, Meta(description="source of the rows")]
    l0: float
    different: Annotated[Count, Meta(description="latents that are active in only one of the two")]
    rounded: Annotated[Count, Meta(description="rows left out because float32 rounding decides which latents fire")]
    error_f: Annotated[float, Meta(description="relative error of the latents")]
    error_x: Annotated[float, Meta(description="relative error of the reconstructions")]
    worst: Annotated[float, Meta(description="largest error that passes")]
    passed: bool


class RunRecord(TypedDict):
    """run.json

    The fields from `variant` to `accumulate` determine the result. The run folder's name ends with the first 6 digits
    of the digest of these fields.
    """

    format: int
    variant: str
    options: NotRequired[
        Annotated[dict[str, Any], Meta(description="options that were given; absent if the SAE was imported")]
    ]
    layer: Annotated[int, Meta(ge=0, description="zero-based block")]
    site: str
    seed: NotRequired[Annotated[Count, Meta(description="seed of the initial weights")]]
    order_seed: NotRequired[Annotated[Count, Meta(description="seed of the order of batches (--shuffle-seed)")]]
    d_in: Size
    d_sae: Size
    steps: NotRequired[Size]
    batch_size: NotRequired[Annotated[Size, Meta(description="tokens in a step")]]
    l0: NotRequired[Annotated[float, Meta(description="--l0, if it was given")]]
    literal: NotRequired[Annotated[bool, Meta(description="--paper-exact")]]
    cache: NotRequired[Annotated[Sha256, Meta(description="digest of everything that determines the training rows")]]
    compiled: NotRequired[Annotated[bool, Meta(description="--compile")]]
    precision: NotRequired[
        Annotated[
            Precision,
            Meta(
                description="precision of matrix products; absent: the one in `asked`, or else bfloat16 for a run of "
                "an earlier version on a GPU, and float32 for any other run"
            ),
        ]
    ]
    accumulate: NotRequired[Annotated[int, Meta(ge=2, description="--accumulate at the start of the run; absent: 1")]]
    accumulate_since: NotRequired[
        Annotated[
            list[tuple[Count, Size]],
            Meta(description="for each resumption with another --accumulate: [first step, value]"),
        ]
    ]
    step_version: NotRequired[
        Annotated[Size, Meta(description="version in train/step_version.py when the run began; absent: 1")]
    ]
    step_version_since: NotRequired[
        Annotated[
            list[tuple[Count, Size]],
            Meta(description="for each resumption under another step_version: [first step, version]"),
        ]
    ]
    resolved: NotRequired[Annotated[dict[str, Any], Meta(description="every option, given or default")]]
    paper: NotRequired[str]
    cache_folders: NotRequired[Annotated[list[str], Meta(min_length=1)]]
    ring: NotRequired[Annotated[int, Meta(description="for a run with --stream: tokens on disk at a time")]]
    asked: NotRequired[AskedOptions]
    device: NotRequired[str]
    kernels: NotRequired[
        Annotated[bool, Meta(description="whether the kernels of train/kernels were used at the start of the run")]
    ]
    environment: NotRequired[RecordedEnvironment]
    threads: NotRequired[Annotated[int, Meta(description="number of torch's threads")]]
    imported_from: NotRequired[ImportSource]
    check: NotRequired[ImportCheck]
    notes: NotRequired[Annotated[list[str], Meta(description="messages of the import")]]
    metadata: NotRequired[Annotated[dict[str, Any], Meta(description="everything else in the imported files")]]


RUN_RECORD = RecordKind(
    RunRecord,
    "Restore run.json from a copy. If there is no copy: a finished SAE can be evaluated without run.json, so delete "
    "that file; an unfinished run has to be deleted and started again.",
)

# Entries that some older runs lack, either in run.json or in its object `resolved`. Each value here describes the
# earlier behavior: a run without the entry equals a run with this value.
LATER_ENTRIES: Mapping[str, Any] = {
    "weight_decay_on": "encoder",
    "weight_decay_form": "decoupled",
    "importance_share": 0.5,
    "contrast_on": "decoder",
    "orth_on": "decoder",
    "near_scope": "group",
    "init": "transpose",
    "diagonal": False,
    "tau_over": "alive",
    "lambda_by": "d_in",
    "restart_share": 0.9,
    "terms": "w",
    "alpha_units": "raw",
    "merge_average": "all",
    "dead_by": "tokens",
    "below": 0.01,
    "stability": "any",
    "precision": "float32",
    "pair_choice": "exact",
    "block": 256,
    "turns": 1,
}


class Checkpoint(TypedDict):
    """checkpoints/step-<step>/state.json"""

    format: int
    step: Annotated[Count, Meta(description="optimizer steps taken; also in the folder's name and in the tensor `i`")]
    sha256: Annotated[Sha256, Meta(description="digest of state.safetensors")]
    step_version: NotRequired[
        Annotated[Size, Meta(description="version of the training steps before this checkpoint; absent: 1")]
    ]
    run: NotRequired[
        Annotated[Sha256, Meta(description="digest of the fields from `variant` to `accumulate` in its run.json")]
    ]


CHECKPOINT_RECORD = RecordKind(
    Checkpoint, "Delete this checkpoint's folder and resume: training continues from the previous checkpoint."
)
