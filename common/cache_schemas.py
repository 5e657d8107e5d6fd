"""The schema of every record of a cache and of the other records under `activations/`. See schemas.py."""

from typing import Annotated, Any, Literal, NotRequired, TypedDict

from msgspec import Meta

from .records import RecordKind
from .schemas import Count, Sha256, Size
from .zarr_metadata import array_essentials

Crc32c = Annotated[str, Meta(pattern="^[0-9a-f]{8}$")]

REPAIR_HINT = (
    "Run `sae cache repair` to harvest the damaged parts again, or delete the file and run the same `sae harvest`."
)

# --- activations/<name>/ ----------------------------------------------------------------------------------------------


class FileRecord(TypedDict):
    """The record of a chunk's file."""

    bytes: Annotated[Size, Meta(description="size of the file")]
    crc32c: Annotated[
        Crc32c, Meta(description="checksum of the values, or of the whole file if the array is compressed")
    ]


Files = dict[str, FileRecord]


class Adapter(TypedDict):
    """A PEFT adapter that was merged into the model."""

    name: str
    revision: Annotated[str, Meta(description="commit on the Hub, or sha256 of the files of a folder")]


class ModelIdentity(TypedDict):
    """The identity of the language model."""

    name: Annotated[str, Meta(description="Hub id, or a folder's name and 8 digits of its digest; never compared")]
    revision: NotRequired[Annotated[str, Meta(description="commit on the Hub, or sha256 of the files of a folder")]]
    adapters: NotRequired[list[Adapter]]


class DataIdentity(TypedDict):
    """The identity of the text."""

    name: Annotated[str, Meta(description="never compared")]
    revision: NotRequired[Annotated[str, Meta(description="commit on the Hub, or sha256 of the text's files")]]
    column: NotRequired[str | None]
    split: NotRequired[str]
    subset: NotRequired[str]
    spelled_lines: NotRequired[
        Annotated[Count, Meta(description="for python-stdlib: lines per document that give a word's first letter")]
    ]


class CacheIdentity(TypedDict):
    """Everything that determines the bytes of the cache. A missing entry means the value that earlier versions used."""

    format: NotRequired[Size]
    model: ModelIdentity
    dtype: NotRequired[Annotated[str, Meta(description="dtype in which the model computes")]]
    attention: NotRequired[Annotated[str, Meta(description="implementation of attention")]]
    tokenizer: NotRequired[Annotated[Sha256, Meta(description="digest of the serialized tokenizer")]]
    data: DataIdentity
    chat: NotRequired[Annotated[dict[str, Any], Meta(description="digest of the chat template, and roles")]]
    tokens: NotRequired[Annotated[int | str, Meta(description="rows requested, or `up to <number>` by default")]]
    context: NotRequired[Annotated[Size, Meta(description="tokens per context, BOS included")]]
    held_out: NotRequired[Annotated[float | str, Meta(description="share of documents held out, or `by name`")]]
    bos: NotRequired[Annotated[int | None, Meta(description="id of the first token of contexts; null: no such token")]]
    skip: NotRequired[Annotated[list[Count], Meta(description="ids of tokens that are never rows")]]
    skip_positions: NotRequired[
        Annotated[Count, Meta(description="how many positions at the start of a context are never rows")]
    ]
    special_tokens: NotRequired[
        Annotated[str, Meta(description="`text`: special tokens spelled out in documents are tokenized as text")]
    ]
    pack: NotRequired[Annotated[bool, Meta(description="whether a context contains several documents")]]
    seed: NotRequired[
        Annotated[Count, Meta(description="seed for the order of the rows and the choice of held-out documents")]
    ]
    window_rows: NotRequired[Size]
    chunk_rows: NotRequired[Size]
    storage_dtype: NotRequired[str]
    compress: NotRequired[Annotated[dict[str, Any] | None, Meta(description="blosc's settings; null: uncompressed")]]


class CacheAttributes(TypedDict):
    """The attributes of a cache's group."""

    format: Annotated[Size, Meta(description="version of the cache format")]
    fingerprint: Annotated[Sha256, Meta(description="digest of `identity` without names")]
    identity: CacheIdentity
    tokens: Annotated[Sha256, Meta(description="digest of `files` in tokens/commit.json")]
    rows: Size
    window_rows: Annotated[Size, Meta(description="rows shuffled and written together")]
    chunk_rows: Annotated[Size, Meta(description="rows per file")]
    storage_dtype: Literal["bfloat16", "uint16"]
    compress: bool
    complete: Annotated[list[str], Meta(description="arrays whose windows all exist")]
    to_read: NotRequired[Annotated[str, Meta(description="a line of Python that lets zarr-python read the arrays")]]


class CacheGroup(TypedDict):
    """zarr.json"""

    zarr_format: Literal[3]
    node_type: Literal["group"]
    attributes: CacheAttributes


class CodecConfiguration(TypedDict):
    """The settings that are needed to decode a codec's output; blosc needs none, since its output contains them."""

    endian: NotRequired[Literal["little"]]
    chunk_shape: NotRequired[Annotated[list[Size], Meta(min_length=1, description="shape of a block in a shard")]]
    codecs: NotRequired[list["Codec"]]
    index_codecs: NotRequired[list["Codec"]]
    index_location: NotRequired[Literal["start", "end"]]


class Codec(TypedDict):
    """A codec of Zarr."""

    name: str
    configuration: NotRequired[CodecConfiguration]


class RegularGrid(TypedDict):
    """How an array is split into chunks."""

    chunk_shape: Annotated[list[Size], Meta(min_length=1)]


class ChunkGrid(TypedDict):
    """A regular grid of chunks."""

    name: Literal["regular"]
    configuration: RegularGrid


class KeySeparator(TypedDict):
    """The separator between the numbers in a chunk's file name."""

    separator: Literal["."]


class ChunkKeys(TypedDict):
    """How the files of chunks are named."""

    name: Literal["default"]
    configuration: KeySeparator


class ArrayAttributes(TypedDict):
    """The attributes of an array."""

    logical_dtype: NotRequired[
        Annotated[Literal["bfloat16"], Meta(description="type of the values whose bits are stored as uint16")]
    ]


class ZarrArray(TypedDict):
    """<array>/zarr.json"""

    zarr_format: Literal[3]
    node_type: Literal["array"]
    shape: Annotated[list[Count], Meta(min_length=1, description="the first number is the number of rows")]
    data_type: Literal["bfloat16", "uint16", "uint32", "float32", "float64", "bool"]
    chunk_grid: ChunkGrid
    chunk_key_encoding: ChunkKeys
    fill_value: Annotated[Any, Meta(description="what other readers return for a lost chunk; not in the digest")]
    codecs: Annotated[list[Codec], Meta(min_length=1)]
    attributes: ArrayAttributes


class ZarrGroup(TypedDict):
    """tokens/zarr.json"""

    zarr_format: Literal[3]
    node_type: Literal["group"]
    attributes: dict[str, Any]


class Source(TypedDict):
    """The version of this package's source."""

    sha256: NotRequired[Annotated[str, Meta(description="digest of the source files")]]
    commit: NotRequired[str | None]
    changed: NotRequired[Annotated[bool | None, Meta(description="whether the source differs from the commit")]]


# Keys with a hyphen need this form.
WindowMadeWith = TypedDict(
    "WindowMadeWith",
    {
        "batch_contexts": NotRequired[
            Annotated[Size, Meta(description="contexts per forward pass; can affect the last bits of the rows")]
        ],
        "device": NotRequired[str],
        "compiled": NotRequired[Annotated[bool, Meta(description="--compile")]],
        "torch": NotRequired[str],
        "transformers": NotRequired[str],
        "sae-pipeline": NotRequired[str],
        "source": NotRequired[Source],
    },
)


class WindowCommit(TypedDict):
    """commits/<window>.<array>.json"""

    format: Size
    fingerprint: Annotated[Sha256, Meta(description="fingerprint of the cache")]
    window: Annotated[Count, Meta(description="also in the file's name")]
    array: Annotated[str, Meta(description="also in the file's name")]
    rows: Annotated[Size, Meta(description="rows in this window")]
    made_with: WindowMadeWith
    files: Annotated[Files, Meta(description="this window's files: those of the array, of row_ctx and of row_pos")]


class TokensCommit(TypedDict):
    """tokens/commit.json"""

    format: Size
    contexts: Size
    files: Annotated[Files, Meta(description="the files of the arrays in tokens/")]


class OutlierDimension(TypedDict):
    """A dimension whose root mean square is over 8 times the median."""

    mean: float
    sd: float


class LargestRows(TypedDict):
    """The rows with the largest norms, outlier rows included."""

    norm: Annotated[float, Meta(description="the largest norm")]
    rows: Annotated[Count, Meta(description="number of rows described here")]
    positions: Annotated[list[tuple[int, int]], Meta(description="the most frequent positions: [position, rows]")]
    tokens: Annotated[list[tuple[int, int, str | None]], Meta(description="the most frequent tokens: [id, rows, text]")]
    variance: Annotated[float, Meta(description="elementwise variance of all rows")]
    share: Annotated[float, Meta(description="share of the variance held by the top 0.1 % of rows")]
    share_unmasked: Annotated[float, Meta(description="this share among the rows that are not outliers")]


class Statistics(TypedDict):
    """Statistics of the rows of an array, without outlier rows."""

    count: Annotated[Count, Meta(description="rows that are not outliers")]
    marked: Annotated[Count, Meta(description="outlier rows")]
    max_norm: Annotated[float | None, Meta(description="`--max-norm`: a multiple of the median norm; null: no limit")]
    norm_limit: Annotated[float | None, Meta(description="the norm above which a row is an outlier; null: no limit")]
    variance: Annotated[float, Meta(description="mean of the variances of the dimensions")]
    mean_square_norm: float
    mean_norm: float
    norm_of_mean: float
    norm_quantiles: Annotated[dict[str, float], Meta(description="share of rows -> quantile of the norm")]
    outlier_dimensions: Annotated[
        dict[str, OutlierDimension], Meta(description="number of the dimension -> its statistics")
    ]
    largest: NotRequired[LargestRows]


class Manifest(TypedDict):
    """manifest.json"""

    format: Size
    fingerprint: Annotated[Sha256, Meta(description="fingerprint of the cache")]
    rows: Size
    complete: Annotated[list[str], Meta(description="arrays whose windows all exist")]
    statistics: Annotated[dict[str, Statistics], Meta(description="statistics of each complete array")]
    files: Annotated[
        Files, Meta(description="the files listed in the commits of the complete arrays, and the files in tokens/")
    ]


class UnreadableRows(TypedDict):
    """How many rows of the text could not be read, and why."""

    rows: Count
    first: Annotated[str, Meta(description="why the first of these rows could not be read")]


class Harvest(TypedDict):
    """harvest.json

    The request, from which `sae cache repair` repeats the harvest. Most fields are options of `sae harvest`.
    """

    model: str
    revision: NotRequired[str | None]
    adapters: NotRequired[list[str]]
    dataset: str | None
    dataset_revision: NotRequired[str | None]
    subset: NotRequired[str | None]
    split: NotRequired[str]
    text_column: NotRequired[str]
    chat_column: NotRequired[str | None]
    roles: NotRequired[list[str]]
    tokens: int | None
    context: Size
    bos: NotRequired[str]
    bos_token: NotRequired[Annotated[str | None, Meta(description="the token that contexts begin with, as text")]]
    held_out: float | None
    keep_special: NotRequired[bool]
    skip_positions: NotRequired[Count]
    skip_tokens: NotRequired[list[str]]
    pack: NotRequired[bool]
    window: Size
    storage_dtype: NotRequired[str]
    compress: NotRequired[bool]
    max_norm: NotRequired[float | None]
    dtype: NotRequired[str]
    attention: NotRequired[str]
    batch_contexts: NotRequired[Size]
    compiled: NotRequired[Annotated[bool, Meta(description="--compile")]]
    seed: NotRequired[Count]
    device: NotRequired[str]
    origins: NotRequired[Annotated[dict[str, str], Meta(description="flag -> where it was given")]]
    unreadable: NotRequired[UnreadableRows]
    modules: NotRequired[Annotated[dict[str, str], Meta(description="array -> name of its module in transformers")]]
    environment: NotRequired[Annotated[dict[str, Any], Meta(description="versions, machine and settings")]]


class Ring(TypedDict):
    """ring.json"""

    format: Size
    max_norm: NotRequired[float | None]
    norm_limits: NotRequired[
        Annotated[dict[str, float], Meta(description="array -> the norm above which a row is an outlier")]
    ]


class TokenizeState(TypedDict):
    """Where the reading of a text stopped."""

    text: Annotated[Any, Meta(description="position in the text")]
    documents: Count
    rows: Count
    open: Annotated[list[Any], Meta(description="contexts that are not full yet")]


class TokenizeDraft(TypedDict):
    """tokens/draft/state.json"""

    owner: Annotated[Sha256, Meta(description="one digest of both the cache's identity and the version of `datasets`")]
    checksums: Annotated[list[Crc32c], Meta(description="checksums of the files beside it, in order")]
    state: TokenizeState


class ClaimOfText(TypedDict):
    """tokens/claim-000001.json"""

    owner: Annotated[str, Meta(description="process, host and command of the task that tokenizes the text")]
    task: Annotated[str, Meta(description="random; tells tasks apart")]
    beat: Annotated[Count, Meta(description="how often the claim was renewed")]


class Draft(TypedDict):
    """drafts/<window>/state.json"""

    owner: Annotated[Sha256, Meta(description="digest of everything (software too) that determines the draft's bytes")]
    checksums: Annotated[list[Crc32c], Meta(description="checksum of each <number>.safetensors")]
    context: Annotated[Count, Meta(description="the next context to compute")]


def cache_essentials(metadata: dict[str, Any]) -> dict[str, Any]:
    """Those attributes of a cache that this package defines; other programs may add more to the group."""
    return {name: value for name, value in metadata["attributes"].items() if name in CacheAttributes.__annotations__}


def no_essentials(metadata: dict[str, Any]) -> dict[str, Any]:
    """The digest of a group that only holds arrays covers none of its attributes, since anybody may change them."""
    return {}


CACHE_RECORD = RecordKind(CacheGroup, REPAIR_HINT, digest_in="attributes", covered=cache_essentials)
ARRAY_RECORD = RecordKind(ZarrArray, REPAIR_HINT, digest_in="attributes", covered=array_essentials)
GROUP_RECORD = RecordKind(ZarrGroup, REPAIR_HINT, digest_in="attributes", covered=no_essentials)
COMMIT_RECORD = RecordKind(WindowCommit, REPAIR_HINT, indent=None)
TOKENS_RECORD = RecordKind(TokensCommit, REPAIR_HINT)
MANIFEST_RECORD = RecordKind(Manifest, REPAIR_HINT)
HARVEST_RECORD = RecordKind(Harvest, "Run the same `sae harvest` again; it rewrites this file.")
RING_RECORD = RecordKind(
    Ring, "Delete the ring's folder and run the same `sae train --stream` again: its windows are harvested again."
)
TOKENIZE_RECORD = RecordKind(
    TokenizeDraft, "Run the same `sae harvest` again; it reads the text from the beginning.", indent=None
)
CLAIM_RECORD = RecordKind(ClaimOfText, "Delete it: another task then cuts the text into contexts.", indent=None)
DRAFT_RECORD = RecordKind(Draft, "Delete the folder: the window is then computed from its beginning.")
