"""The schemas of the records of an evaluation: results, data shared by SAEs, labelled texts. See schemas.py."""

from typing import Annotated, Any, NotRequired, TypedDict

from msgspec import Meta

from .records import RecordKind
from .schemas import Sha256

# --- runs/<name>/evaluations/ -----------------------------------------------------------------------------------------


class Unstructured(TypedDict):
    """Results for which SAEBench has no fields."""

    intervals: Annotated[
        dict[str, dict[str, list[float | None]]],
        Meta(description="95 % intervals [low, high] under the names of eval_result_metrics"),
    ]
    n: Annotated[dict[str, int], Meta(description="how many tokens, texts, ... were measured")]
    flags: Annotated[list[str], Meta(description="sentences that warn about misleading numbers")]
    extra: Annotated[Any, Meta(description="everything else that the metric records")]
    notes: NotRequired[Annotated[list[str], Meta(description="sentences about misleading names in SAEBench")]]


class MaskedPart(Unstructured):
    """Further results without outlier rows. The numbers themselves are in the categories masked_<category>."""

    details: list[dict[str, Any]]


class UnstructuredResult(Unstructured):
    """The record's content digest, and results for which SAEBench has no fields."""

    absent: NotRequired[
        Annotated[
            list[list[str | int]],
            Meta(description="for each undefined number, which is written as -1: the keys that lead to it"),
        ]
    ]
    masked: NotRequired[
        Annotated[MaskedPart | None, Meta(description="the other parts of the result, without outlier rows")]
    ]


class ResultFile(TypedDict):
    """evaluations/<metric>.json, and evaluations/earlier/<metric>-<digest>.json for results with other settings

    The fields are SAEBench's. The digest in the name of an earlier result is the digest of its `eval_config`.
    """

    eval_type_id: Annotated[str, Meta(description="SAEBench's name of the metric")]
    eval_config: Annotated[
        dict[str, Any],
        Meta(description="everything that determines the result; `weights` is one digest of both the SAE and the hook"),
    ]
    eval_id: str
    datetime_epoch_millis: int
    eval_result_metrics: Annotated[
        dict[str, dict[str, float | None]], Meta(description="category -> name -> number; -1 may mean null")
    ]
    eval_result_details: Annotated[list[dict[str, Any]], Meta(description="one entry per latent, letter or dataset")]
    sae_bench_commit_hash: Annotated[str, Meta(description="version of this package")]
    sae_lens_id: str
    sae_lens_release_id: Annotated[str, Meta(description="name of the run folder")]
    sae_lens_version: str
    sae_cfg_dict: Annotated[dict[str, Any], Meta(description="sae.json, or the description of a reference")]
    eval_result_unstructured: UnstructuredResult


RESULT_RECORD = RecordKind(
    ResultFile,
    "Delete it and run `sae evaluate` again.",
    digest_in="eval_result_unstructured",
)


# --- activations/evaluation/ ------------------------------------------------------------------------------------------


class EvaluationData(TypedDict):
    """activations/evaluation/**/<kind>-<digest>.json

    This record describes the .safetensors file beside it, which holds tensors that do not depend on an SAE, such as
    probes.
    """

    kind: str
    depends: Annotated[
        dict[str, Any], Meta(description="everything that determines the tensors; the file is named after its digest")
    ]
    sha256: Annotated[Sha256, Meta(description="digest of the .safetensors file")]


class PinnedDataset(TypedDict):
    """activations/evaluation/datasets/<name>.json"""

    dataset: Annotated[str, Meta(description="id on the Hub")]
    commit: Annotated[str, Meta(description="the commit that is read")]


class JudgeAnswers(TypedDict):
    """activations/evaluation/judge-<digest>.json

    The file in which earlier versions stored the answers that an autointerp judge gave before it stopped answering.
    These answers are still used. New answers are stored in judge-<digest>.jsonl instead (docs/reference/metrics.md).
    """

    answers: Annotated[dict[str, str], Meta(description="digest of the question -> answer")]


DATA_RECORD = RecordKind(EvaluationData, "Delete it: the tensors that it describes are computed again.")
DATASET_RECORD = RecordKind(PinnedDataset, "Delete it to use the latest commit of the dataset.")
JUDGE_ANSWERS_RECORD = RecordKind(JudgeAnswers, "Delete it: the judge is then asked again.")

# --- data/ ------------------------------------------------------------------------------------------------------------


class UnpackedData(TypedDict):
    """data/<name>-<version>/contents.json

    Labelled texts that `sae data get` unpacked from the package of another project.
    """

    name: str
    version: str
    source: str
    sha256: Annotated[Sha256, Meta(description="digest of the package's file")]
    files: Annotated[dict[str, Sha256], Meta(description="path in the folder -> sha256 of that file")]


UNPACKED_RECORD = RecordKind(UnpackedData, "Run `sae data get sae-probes` again: it replaces damaged files.")
