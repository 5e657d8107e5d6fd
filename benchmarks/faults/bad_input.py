"""Texts, models and values that cannot be used."""

import gzip
import io
import json
from pathlib import Path

from faults.command import DAMAGED, FAILED, HARVEST, OK, OUTSIDE, USAGE, sae
from faults.inputs import count_commits, read_files
from faults.table import Matrix


def bad_inputs(m: Matrix, rows: list[dict[str, str]]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq
    import zstandard

    m.head("The text and the model")
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    table = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), table, row_group_size=10)
    packed = gzip.compress(lines, mtime=0)
    Path("cut.parquet").write_bytes(table.getvalue()[: len(table.getvalue()) * 2 // 3])
    Path("cut.jsonl.gz").write_bytes(packed[: len(packed) * 2 // 3])
    Path("whole.jsonl.gz").write_bytes(packed)
    squeezed = zstandard.compress(lines * 40)
    Path("cut.jsonl.zst").write_bytes(squeezed[: len(squeezed) * 2 // 3])
    Path("cut.jsonl").write_bytes(lines[: len(lines) * 2 // 3])
    Path("broken.jsonl").write_bytes(lines.replace(b'{"text"', b'{"text', 60).replace(b'{"text', b'{"text"', 59))
    Path("empty.jsonl").write_bytes(b"")
    Path("blank.jsonl").write_text('{"text": ""}\n{"text": "  "}\n{"text": null}\n')
    Path("latin.txt").write_bytes("Käse und Brot".encode("latin-1"))
    Path("directory").mkdir()
    ids = pa.table({"input_ids": [[5, 6, 7], [8, 99_999]]})
    pq.write_table(ids, "ids.parquet")
    pq.write_table(ids.slice(0, 0), "norows.parquet")
    make_odd_texts(rows, lines)
    import datasets

    datasets.DatasetDict({"test": datasets.Dataset.from_list(rows[:3])}).save_to_disk("saved")
    for name, words, code in (
        ("dataset too short", ["--tokens", "1M"], USAGE),
        ("column missing", ["--text-column", "content"], USAGE),
        ("empty file", ["--dataset", "empty.jsonl"], USAGE),
        ("only empty documents", ["--dataset", "blank.jsonl"], USAGE),
        ("table without rows", ["--dataset", "norows.parquet", "--text-column", "input_ids"], USAGE),
        ("empty folder", ["--dataset", "./directory"], USAGE),
        ("no such file", ["--dataset", "./nothing.jsonl"], USAGE),
        ("a dataset of the Hub, without network", ["--dataset", "some/set"], OUTSIDE),
        ("ids of another tokenizer", ["--dataset", "ids.parquet", "--text-column", "input_ids"], USAGE),
        ("Parquet cut in the middle", ["--dataset", "cut.parquet"], USAGE),
        ("gz cut in the middle", ["--dataset", "cut.jsonl.gz", "--tokens", "20k"], USAGE),
        ("zst cut in the middle", ["--dataset", "cut.jsonl.zst", "--tokens", "200k"], USAGE),
        ("JSONL cut in the middle of a line", ["--dataset", "cut.jsonl", "--tokens", "20k"], USAGE),
        ("text that is not UTF-8", ["--dataset", "latin.txt"], USAGE),
        ("a binary file named .jsonl", ["--dataset", "binary.jsonl"], USAGE),
        ("JSONL in which one row in ten is broken", ["--dataset", "tenth.jsonl", "--tokens", "20k"], USAGE),
        ("a column of numbers", ["--dataset", "odd.jsonl", "--text-column", "number"], USAGE),
        ("unknown split of a saved dataset", ["--dataset", "saved", "--split", "dev"], USAGE),
        ("unknown split of a folder", ["--dataset", "split", "--split", "nosuch"], USAGE),
        ("a split of a folder whose files belong to no split", ["--dataset", "unsplit", "--split", "test"], USAGE),
        ("a folder without a file of the default split", ["--dataset", "onlytest"], USAGE),
        ("a split of a single file", ["--dataset", "sentences.jsonl", "--split", "test"], USAGE),
        ("a folder with several configurations", ["--dataset", "configured"], USAGE),
        ("a saved dataset whose state.json is nested 30,000 deep", ["--dataset", "deepsaved"], USAGE),
        ("only a row nested 20,000 deep", ["--dataset", "deep.jsonl"], USAGE),
        ("a JSON array nested 20,000 deep", ["--dataset", "deep.json"], USAGE),
        ("a model folder that does not exist", ["--model", "./nothing"], USAGE),
        ("a model folder without weights", ["--model", "./bare"], OUTSIDE),
        ("truncated weights", ["--model", "./torn"], DAMAGED),
        ("weights that lack a matrix", ["--model", "./lacking"], DAMAGED),
        ("weights whose width differs from the configuration", ["--model", "./wide"], DAMAGED),
        ("gated model without access", ["--model", "google/gemma-2-2b"], OUTSIDE),
        ("NaN in a weight of layer 1", ["--model", "./nan"], FAILED),
    ):
        out = Path("text-" + name.replace(" ", "-"))
        outcome = sae(*HARVEST, *words, "--out", out)
        m.row(name, outcome, code, "nothing is committed", count_commits(out) == 0)
    for name, words, after in (
        ("JSONL with a broken line", ["--dataset", "broken.jsonl"], "the rows of the other lines"),
        ("JSONL with a row nested 20,000 deep and columns of changing types", ["--dataset", "odd.jsonl"],
         "only the text column is read"),
        (
            "a folder with files of train and test, metadata, and files of a file manager",
            ["--dataset", "split"],
            "the rows of the train split",
        ),
        (
            "a folder whose README.md names the files",
            ["--dataset", "configured", "--subset", "b"],
            "the rows of the configuration b",
        ),
        ("Parquet files, the second with an additional column", ["--dataset", "tables"], "the rows of both files"),
        (
            "a folder whose files belong to no split",
            ["--dataset", "unsplit"],
            "the rows of all files, as for the train split",
        ),
    ):  # fmt: skip
        out = Path("read-" + words[1])
        outcome = sae(*HARVEST, *words, "--out", out)
        expected = "unbroken" if words[1] == "broken.jsonl" else "whole"
        m.row(name, outcome, OK, after, rows_of(out) == rows_of(expected), "Segmentation" not in outcome.err)
    whole = sae(*HARVEST, "--dataset", "whole.jsonl.gz", "--out", "from-gz")
    m.row(
        "a complete gz",
        whole,
        OK,
        "the rows of the same lines, not compressed",
        rows_of("from-gz") == rows_of("whole"),
    )
    limited = ["bash", "-c", 'ulimit -v 2200000; exec "$@"', "limited"]
    big = ["harvest", "--model", "./tiny", "--dataset", "long.txt", "--layer", 0, "--device", "cpu", "--out"]
    outcome = sae(
        *big,
        "halved",
        "--tokens",
        20_000,
        "--context",
        3000,
        "--batch-contexts",
        64,
        "--window",
        24_576,
        prefix=limited,
    )
    halved = [line for line in outcome.err.splitlines() if "out of memory" in line]
    m.row(
        "memory too small for a pass",
        outcome._replace(err="\n".join(halved) + "\n"),
        OK,
        "the number of contexts per pass is halved until it fits in memory",
        bool(halved),
    )
    outcome = sae(*big, "toobig", "--tokens", 40_000, "--context", 40_000, "--window", 40_960, prefix=limited)
    m.row(
        "memory too small for one context", outcome, OUTSIDE, "nothing is committed", count_commits(Path("toobig")) == 0
    )


def make_odd_texts(rows: list[dict[str, str]], lines: bytes) -> None:
    """Texts as found in practice: odd rows and columns, splits, and metadata or other files next to them."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    deep, others = "[" * 20_000 + "]" * 20_000, [1, "x", None, [], {"a": 1}, {"b": ["q"]}, 1.5]
    broken = Path("broken.jsonl").read_bytes().splitlines(keepends=True)
    Path("unbroken.jsonl").write_bytes(b"".join(line for line in broken if line.startswith(b'{"text":')))
    sae(*HARVEST, "--dataset", "unbroken.jsonl", "--out", "unbroken")
    odd = [json.dumps(row | {"number": n, "x": others[n % 7]}) for n, row in enumerate(rows)]
    Path("odd.jsonl").write_text("\n".join([*odd[:9], f'{{"x": {deep}, "text": "a"}}', *odd[9:]]))
    Path("tenth.jsonl").write_text("\n".join("null" if n % 10 == 5 else line for n, line in enumerate(odd)))
    Path("binary.jsonl").write_bytes(bytes(range(256)) * 4000)
    Path("deep.jsonl").write_text(f'{{"text": "a", "x": {deep}}}\n')
    Path("deep.json").write_text(f'[{{"text": {deep}}}]')
    for folder in ("split/data", "split/.cache/huggingface", "configured/one", "tables", "deepsaved"):
        Path(folder).mkdir(parents=True)
    Path("deepsaved/state.json").write_text("[" * 30_000)
    Path("deepsaved/dataset_info.json").write_text("{}")
    secret = pa.table({"text": ["a secret of the test split " * 9] * 200})
    pq.write_table(secret, "split/data/test-00000-of-00001.parquet")
    pq.write_table(pa.Table.from_pylist(rows), "split/data/train-00000-of-00001.parquet")
    for name in ("dataset_infos.json", ".cache/huggingface/a.json", "._b.jsonl", "README.md", "LICENSE.txt"):
        Path("split", name).write_text("{}")
    Path("configured/README.md").write_text(
        "---\nconfigs:\n- {config_name: a, data_files: one/a.parquet}\n- {config_name: b, data_files: '*.jsonl'}\n---\n"
    )
    pq.write_table(secret, "configured/one/a.parquet")
    Path("configured/text.jsonl").write_bytes(lines)
    for folder, names in (("unsplit", "ab"), ("onlytest", ("test", "notes"))):
        Path(folder).mkdir()
        half = len(lines.splitlines()) // 2
        for name, part in zip(names, (lines.splitlines(True)[:half], lines.splitlines(True)[half:]), strict=True):
            Path(folder, f"{name}.jsonl").write_bytes(b"".join(part))
    pq.write_table(pa.Table.from_pylist(rows[:60]), "tables/a.parquet")
    pq.write_table(pa.Table.from_pylist([row | {"score": 1} for row in rows[60:]]), "tables/b.parquet")


def rows_of(folder: str) -> dict[str, bytes]:
    """The files that contain the activations, the origin of each row, and the text."""
    return {file: raw for file, raw in read_files(folder).items() if file.startswith(("layer_", "row_", "tokens/"))}


def bad_values(m: Matrix) -> None:
    m.head("Values that make no sense")
    for number, words in enumerate(
        (
            ["--tokens", 0],
            ["--tokens", -5],
            ["--tokens", "many"],
            ["--tokens", "1e30"],
            ["--tokens", "1e12"],
            ["--window", -256],
            ["--window", 0],
            ["--window", 2**53],
            ["--window", 2**33],
            ["--context", 1],
            ["--context", 70_000],
            ["--layer", 99],
            ["--layer", -1],
            ["--layer", "twelve"],
            ["--site", "resid"],
            ["--max-norm", 0],
            ["--max-norm", "nan"],
            ["--device", "toaster"],
            ["--device", "cuda:7"],
            ["--dtype", "float8"],
            ["--attention", "nonsense"],
            ["--held-out", 1],
            ["--held-out", "nan"],
            ["--seed", -1],
            ["--storage-dtype", "int4"],
            ["--batch-contexts", 0],
            ["--dataset", ""],
            ["--model", ""],
            ["--frobnicate", 1],
        )
    ):
        out = Path(f"senseless{number}")
        outcome = sae(*HARVEST, *words, "--out", out)
        code = OUTSIDE if words in (["--tokens", "1e12"], ["--device", "cuda:7"]) else USAGE
        left = [p for p in out.rglob("*") if p.is_file() and p.name[0] != "."]
        m.row(
            f"`{words[0]} {words[1]}`" if words[1] != "" else f'`{words[0]} ""`',
            outcome,
            code,
            "nothing is written",
            not left,
        )


def bad_saes(m: Matrix) -> None:
    """SAEs that learned nothing or have weights that are not numbers: the notes shown next to their results."""
    import torch

    from sae.cache.reader import Cache
    from sae.train.activation_functions import ReLU
    from sae.train.sae import SAE, save_sae

    m.head("SAEs that only look good")
    cache = Cache(Path("whole"))
    origin = {"model": cache.identity["model"], "layer": 1, "cache": str(cache.folder.resolve())}
    origin["fingerprint"] = cache.fingerprint
    x_TD = next(iter(cache.batches(layer=1, batch_size=1024, seed=0)))
    for name, spoil in (
        ("mean", lambda made: (made.b_enc.fill_(-1e6), made.b_dec.copy_(x_TD.mean(0)))),
        ("not-finite", lambda made: made.W_dec[0].fill_(torch.nan)),
    ):
        made = SAE(x_TD.shape[1], 64, [ReLU()]).eval().requires_grad_(False)
        spoil(made)
        save_sae(made, Path(name), origin)
    evaluate = ["evaluate", "--suite", "core", "--tokens", 100, "--no-references", "--device", "cpu"]
    outcome = sae(*evaluate, "mean")
    said = [line for line in outcome.err.splitlines() if line.startswith("note ") and "explained variance" in line]
    m.row(
        "an SAE that returns the mean of the text",
        outcome._replace(err="\n".join(said)),
        OK,
        "its scores are reported, with a note",
        bool(said),
    )
    read = [line for line in outcome.err.splitlines() if line.endswith("(100 requested; whole contexts are read)")]
    m.row(
        "`evaluate --tokens` within a context",
        outcome._replace(err="\n".join(read)),
        OK,
        "whole contexts are read",
        bool(read),
    )
    outcome = sae(*evaluate, "mean", "--json")
    found = json.loads(outcome.out)[0]
    trust = [note for note in found["notes"] if "Trust fve" in note]
    sound = abs(found["core.reconstruction_quality.fve"]) < 0.1
    m.row(
        "SAEBench's `explained_variance` of this SAE",
        outcome._replace(err="\n".join(trust)),
        OK,
        "both numbers are reported, with a note",
        bool(trust),
        sound,
    )
    outcome = sae(*evaluate, "not-finite")
    m.row("NaN in the weights of a run", outcome, DAMAGED, "no result", not Path("not-finite/evaluations").exists())
    outcome = sae(
        *("train", "--variant", "relu", "--l0", 2, "--layer", 1, "--cache", "whole", "--steps", 12, "--batch-size", 64),
        *("--width", 64, "--device", "cpu", "--out", "missed"),
    )
    said = [line for line in outcome.err.splitlines() if "from its target 2." in line]
    m.row(
        "a run whose controller missed its L0",
        outcome._replace(err="\n".join(said)),
        OK,
        "the run is kept, and a note names it",
        bool(said),
    )
