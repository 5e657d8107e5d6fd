"""The schema of every record: what each JSON file of a run and an evaluation holds. cache_schemas.py: of a cache.

Field names are those on disk. `NotRequired` fields are absent where they say nothing, or in records of earlier
versions. The first line of each docstring is the file's path. `docs/records.md` is made from both files by
`python benchmarks/records_page.py`.
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
        Meta(description="path of a large file -> size, times of change (ns), inode, device, sha256"),
    ]
    folders: Annotated[
        dict[str, list[str]], Meta(description="sha256 of the files of a model's folder -> where it was seen")
    ]


class EvaluationData(TypedDict):
    """activations/evaluation/**/<kind>-<digest>.json

    It describes the .safetensors file beside it, which holds tensors that do not depend on an SAE, such as probes.
    """

    kind: str
    depends: Annotated[dict[str, Any], Meta(description="everything that decides the tensors; its digest is the name")]
    sha256: Annotated[Sha256, Meta(description="of the .safetensors file")]


class PinnedDataset(TypedDict):
    """activations/evaluation/datasets/<name>.json"""

    dataset: Annotated[str, Meta(description="id on the Hub")]
    commit: Annotated[str, Meta(description="the one that is read")]


MODELS_RECORD = RecordKind(RememberedModels, "Delete it: it is made again.")
DATA_RECORD = RecordKind(EvaluationData, "Delete it: what it describes is computed again.")
DATASET_RECORD = RecordKind(PinnedDataset, "Delete it to use the latest commit of the dataset.")

# --- data/ ------------------------------------------------------------------------------------------------------------


class UnpackedData(TypedDict):
    """data/<name>-<version>/contents.json

    Labelled texts that `sae data get` unpacked from the package of another project.
    """

    name: str
    version: str
    source: str
    sha256: Annotated[Sha256, Meta(description="of the package's file")]
    files: Annotated[dict[str, Sha256], Meta(description="path in the folder -> sha256 of that file")]


UNPACKED_RECORD = RecordKind(UnpackedData, "Run `sae data get sae-probes` again: it replaces what is damaged.")

# --- runs/<name>/ -----------------------------------------------------------------------------------------------------


class RecordedAdapter(TypedDict):
    """A PEFT adapter that was merged into the model."""

    name: str
    revision: Annotated[str | None, Meta(description="commit on the Hub, or sha256 of the files of a folder")]


class RecordedModel(TypedDict):
    """A language model."""

    name: Annotated[str, Meta(description="id on the Hub; of a folder, its name and 8 digits of its digest")]
    revision: NotRequired[
        Annotated[
            str | None, Meta(description="commit on the Hub, or sha256 of the files of a folder; null: not known")
        ]
    ]
    adapters: NotRequired[list[RecordedAdapter]]


class SAEOrigin(TypedDict, total=False):
    """What an SAE was trained on, as far as it is known."""

    model: RecordedModel
    layer: Annotated[int, Meta(ge=0, description="zero-based block")]
    site: Annotated[str, Meta(description="of the layer, such as resid_post or mlp.gate_proj.output")]
    hook_name: Annotated[str, Meta(description="layer and site in one: blocks.12.hook_resid_post")]
    variant: str
    seed: Count
    training_tokens: Annotated[Count, Meta(description="steps * batch_size of run.json")]
    cache: Annotated[str | None, Meta(description="folder of the cache, which holds the text to evaluate on")]
    fingerprint: Annotated[str | None, Meta(description="of that cache")]
    context: Annotated[int | None, Meta(description="tokens in a context")]
    bos: Annotated[int | None, Meta(description="id of the token that begins contexts; null: none does")]
    norm_limit: Annotated[
        float | None, Meta(description="rows with a larger norm are outliers and were not trained on; null: no limit")
    ]
    format: Annotated[str, Meta(description="of the files of an imported SAE, such as saelens")]
    prepend_bos: Annotated[bool, Meta(description="of an imported SAE: whether a BOS token began its contexts")]
    bos_token: Annotated[str, Meta(description="of an imported SAE: that token")]
    dataset: Annotated[str, Meta(description="of an imported SAE: the text that it was trained on")]


class SavedActivation(TypedDict):
    """A function of the chain from pre-activations to latents. Its options, such as `k`, stand beside its name."""

    name: str


class SavedSAE(TypedDict):
    """sae.json"""

    format: int
    d_in: Annotated[Size, Meta(description="width of the activations")]
    d_sae: Annotated[Size, Meta(description="number of latents")]
    pre_bias: Annotated[bool, Meta(description="whether the encoder subtracts b_dec from its input")]
    layer_norm: NotRequired[Annotated[bool, Meta(description="whether it layer-normalizes each token; format 2 only")]]
    activation: list[SavedActivation]
    sha256: Annotated[Sha256, Meta(description="of sae.safetensors")]
    run: NotRequired[Annotated[Sha256, Meta(description="digest of what decides the run, as in its checkpoints")]]
    origin: NotRequired[SAEOrigin]


SAE_RECORD = RecordKind(
    SavedSAE,
    "Delete sae.json and give the run folder to `sae train --resume`, or repeat the `sae train` command: sae.json and "
    "sae.safetensors are written again from the last checkpoint. (If the SAE was imported, delete its folder and "
    "import it again.)",
)


class RecordedSource(TypedDict):
    """The source of this package."""

    sha256: Annotated[Sha256, Meta(description="of its files")]
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
    sha256: Annotated[dict[str, Sha256], Meta(description="of each file, by its path in the folder")]
    path: Annotated[str, Meta(description="a folder, or a folder of the repository")]
    repository: NotRequired[Annotated[str, Meta(description="on the Hub")]]
    revision: NotRequired[Annotated[str, Meta(description="commit on the Hub")]]
    overrides: NotRequired[
        Annotated[dict[str, Any], Meta(description="`layer` and `model` where --layer and --model replaced the files'")]
    ]


class ImportCheck(TypedDict):
    """How an imported SAE was compared with one computed from the files."""

    rows: Annotated[Count, Meta(description="activations that both were computed on")]
    what: Annotated[str, Meta(description="where the rows are from")]
    l0: float
    different: Annotated[Count, Meta(description="latents that are active on one side only")]
    rounded: Annotated[Count, Meta(description="rows left out because float32 rounding decides which latents fire")]
    error_f: Annotated[float, Meta(description="relative error of the latents")]
    error_x: Annotated[float, Meta(description="relative error of the reconstructions")]
    worst: Annotated[float, Meta(description="largest error that passes")]
    passed: bool


class RunRecord(TypedDict):
    """run.json

    Everything from `variant` to `accumulate` decides the result. The run folder's name ends with the first 6 digits of
    the digest of these fields.
    """

    format: int
    variant: str
    options: NotRequired[Annotated[dict[str, Any], Meta(description="options that were given; absent: imported")]]
    layer: Annotated[int, Meta(ge=0, description="zero-based block")]
    site: str
    seed: NotRequired[Annotated[Count, Meta(description="of the initial weights")]]
    order_seed: NotRequired[Annotated[Count, Meta(description="of the order of batches: --shuffle-seed")]]
    d_in: Size
    d_sae: Size
    steps: NotRequired[Size]
    batch_size: NotRequired[Annotated[Size, Meta(description="tokens in a step")]]
    l0: NotRequired[Annotated[float, Meta(description="--l0, if it was given")]]
    literal: NotRequired[Annotated[bool, Meta(description="--paper-exact")]]
    cache: NotRequired[Annotated[Sha256, Meta(description="over everything that decides the rows")]]
    compiled: NotRequired[Annotated[bool, Meta(description="--compile")]]
    precision: NotRequired[
        Annotated[
            Precision,
            Meta(
                description="of products; absent: float32, or of a run on a GPU of an earlier version bfloat16, unless "
                "`asked` names it"
            ),
        ]
    ]
    accumulate: NotRequired[Annotated[int, Meta(ge=2, description="--accumulate it began with; absent: 1")]]
    accumulate_since: NotRequired[
        Annotated[
            list[tuple[Count, Size]],
            Meta(description="step -> --accumulate from there on, if a resumed run was given another"),
        ]
    ]
    step_version: NotRequired[Annotated[Size, Meta(description="train/step_version.py, when the run began; absent: 1")]]
    step_version_since: NotRequired[
        Annotated[
            list[tuple[Count, Size]],
            Meta(description="step -> step_version from there on, if the run was resumed with another"),
        ]
    ]
    resolved: NotRequired[Annotated[dict[str, Any], Meta(description="every option, given or default")]]
    paper: NotRequired[str]
    cache_folders: NotRequired[Annotated[list[str], Meta(min_length=1)]]
    ring: NotRequired[Annotated[int, Meta(description="tokens on disk at a time, of a run with --stream")]]
    asked: NotRequired[AskedOptions]
    device: NotRequired[str]
    environment: NotRequired[RecordedEnvironment]
    threads: NotRequired[Annotated[int, Meta(description="of torch")]]
    imported_from: NotRequired[ImportSource]
    check: NotRequired[ImportCheck]
    notes: NotRequired[Annotated[list[str], Meta(description="what the import said")]]
    metadata: NotRequired[Annotated[dict[str, Any], Meta(description="everything else in the imported files")]]


RUN_RECORD = RecordKind(
    RunRecord,
    "Restore run.json from a copy. Without one, delete it to keep a finished SAE, which can be evaluated without it; "
    "an unfinished run has to be deleted and started again.",
)

# Entries of run.json and of its `resolved` that are newer than some runs, each with the value that does what was done
# before there was the entry: a run that lacks one and a run that has this value are alike.
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
    sha256: Annotated[Sha256, Meta(description="of state.safetensors")]
    step_version: NotRequired[Annotated[Size, Meta(description="of the steps before it; absent: 1")]]
    run: NotRequired[
        Annotated[Sha256, Meta(description="digest of what decides the run: `variant` to `compiled` of its run.json")]
    ]


CHECKPOINT_RECORD = RecordKind(
    Checkpoint, "Delete this checkpoint's folder and resume: training goes on from the one before it."
)


class Unstructured(TypedDict):
    """What SAEBench has no fields for."""

    intervals: Annotated[
        dict[str, dict[str, list[float | None]]],
        Meta(description="95 % intervals [low, high] under the names of eval_result_metrics"),
    ]
    n: Annotated[dict[str, int], Meta(description="how many tokens, texts, ... were measured")]
    flags: Annotated[list[str], Meta(description="sentences about numbers that mean less than they seem to")]
    extra: Annotated[Any, Meta(description="anything else that the metric keeps")]
    notes: NotRequired[Annotated[list[str], Meta(description="sentences about SAEBench's names that mislead")]]


class MaskedPart(Unstructured):
    """The rest of the result without outlier rows. Its numbers are the categories masked_<category>."""

    details: list[dict[str, Any]]


class UnstructuredResult(Unstructured):
    """What SAEBench has no fields for. It also holds the record's content digest."""

    absent: NotRequired[
        Annotated[
            list[list[str | int]],
            Meta(description="where a number does not exist, and -1 stands for it: the keys that lead to it"),
        ]
    ]
    masked: NotRequired[Annotated[MaskedPart | None, Meta(description="the rest of the result without outlier rows")]]


class ResultFile(TypedDict):
    """evaluations/<metric>.json, and evaluations/earlier/<metric>-<digest>.json for results with other settings

    The fields are SAEBench's. The digest in the name of an earlier result is that of `eval_config`.
    """

    eval_type_id: Annotated[str, Meta(description="SAEBench's name of the metric")]
    eval_config: Annotated[
        dict[str, Any], Meta(description="everything that decides the result; `weights` is a digest of SAE and hook")
    ]
    eval_id: str
    datetime_epoch_millis: int
    eval_result_metrics: Annotated[
        dict[str, dict[str, float | None]], Meta(description="category -> name -> number; -1 may stand for null")
    ]
    eval_result_details: Annotated[list[dict[str, Any]], Meta(description="one entry per latent, letter or dataset")]
    sae_bench_commit_hash: Annotated[str, Meta(description="version of this package")]
    sae_lens_id: str
    sae_lens_release_id: Annotated[str, Meta(description="name of the run folder")]
    sae_lens_version: str
    sae_cfg_dict: Annotated[dict[str, Any], Meta(description="sae.json, or what describes a reference")]
    eval_result_unstructured: UnstructuredResult


RESULT_RECORD = RecordKind(
    ResultFile,
    "Delete it and run `sae evaluate` again.",
    digest_in="eval_result_unstructured",
)


# --- activations/evaluation/ ------------------------------------------------------------------------------------------


class JudgeAnswers(TypedDict):
    """activations/evaluation/judge-<digest>.json

    The answers that a judge of autointerp gave before it stopped answering, as earlier versions wrote them. They are
    still used. Answers are now lines of judge-<digest>.jsonl (docs/metrics.md).
    """

    answers: Annotated[dict[str, str], Meta(description="digest of the question -> answer")]


JUDGE_ANSWERS_RECORD = RecordKind(JudgeAnswers, "Delete it: the judge is then asked again.")
