"""The texts of the probing datasets, their order, and the errors for data that cannot be read."""

import json
import os
import random
from pathlib import Path
from types import SimpleNamespace

import pytest

from sae.common.errors import UnavailableError, UsageError
from sae.evaluate.datasets import hub
from sae.evaluate.datasets.labeled import (
    DATASETS,
    HUB,
    REVIEWS,
    STAND_INS,
    LabeledDataset,
    class_name,
    dataset_version,
    language_of,
    load_quadrants,
    load_texts,
    sample_texts,
)

AG, BIOS, CODE, EUROPARL = "fancyzhx/ag_news", "LabHC/bias_in_bios", "codeparrot/github-code", "Helsinki-NLP/europarl"


COMMIT = "c" * 40


@pytest.fixture
def the_hub(monkeypatch) -> list[str]:
    """Fake a Hub that is reachable and has every dataset at COMMIT. Returns the list of requested datasets."""
    import huggingface_hub

    asked = []

    def dataset_info(self, name, **_):
        asked.append(name)
        return SimpleNamespace(sha=COMMIT, gated=False)

    monkeypatch.setattr(hub, "connection_error", lambda: None)
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", dataset_info)
    return asked


def test_a_home_goes_on_reading_the_commit_that_it_read_first(home, the_hub, monkeypatch):
    assert dataset_version(AG, None) == f"the Hub {COMMIT}" and the_hub == [AG]

    def nobody():
        raise AssertionError("the network was asked")

    monkeypatch.setattr(hub, "connection_error", nobody)
    assert dataset_version(AG, None) == f"the Hub {COMMIT}"
    (record,) = (home / "activations" / "evaluation" / "datasets").iterdir()
    record.unlink()
    with pytest.raises(AssertionError):
        hub.pinned_commit(AG)


def test_without_the_hub_the_commit_is_that_of_the_copy(home, monkeypatch):
    """`datasets` reads the copy that was written last. If its commit is not the pinned one, it is refused."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", home / "cache")
    with pytest.raises(UnavailableError, match="ag_news could not be read: .*offline.*ag_news/train.jsonl"):
        dataset_version(AG, None)
    for number, commit in enumerate(("a" * 40, "b" * 40)):
        copy = home / "cache" / "fancyzhx___ag_news" / "default" / "0.0.0" / commit
        copy.mkdir(parents=True)
        os.utime(copy, (1e9 + number,) * 2)
    assert dataset_version(AG, None) == f"the Hub {'b' * 40}"
    os.utime(copy.parent / ("a" * 40), (2e9,) * 2)
    taken = SimpleNamespace(cache_files=[{"filename": str(copy.parent / ("a" * 40) / "ag_news-train.arrow")}])
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: taken)
    with pytest.raises(
        UnavailableError,
        match="is pinned to commit bbbbbbbbbbbb, but the copy on this machine is of commit aaaaaaaaaaaa",
    ):
        load_texts(AG, None)


def write(data: Path, name: str, split: str, rows: list[dict]) -> Path:
    path = data / name / f"{split}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def biographies(professions: int = 28, each: int = 9) -> list[dict]:
    """Biographies in which professions and genders alternate. `hard_text` identifies the row."""
    rows = [(p, g) for _ in range(each) for p in range(professions) for g in (1, 0)]
    return [{"hard_text": f"{i}:{p}:{g}", "profession": p, "gender": g, "more": i} for i, (p, g) in enumerate(rows)]


def test_a_sample_is_the_one_that_pandas_draws():
    pandas = pytest.importorskip("pandas")
    texts = [f"text {i}" for i in range(57)]
    for count in (1, 20, 57):
        drawn = pandas.DataFrame({"text": texts}).sample(n=count, random_state=42)["text"].tolist()
        assert sample_texts(texts, count) == drawn


def test_classes_are_saebench_s_and_balanced_over_the_second_attribute(home):
    rows = biographies()
    for split in ("train", "test"):
        write(home, BIOS, split, rows)
    found = load_texts(f"{BIOS}_class_set2", home, 24, 16)
    assert list(found) == ["train", "test"] and list(found["train"]) == ["11", "13", "14", "18", "19"]
    of = {g: [row["hard_text"] for row in rows if (row["profession"], row["gender"]) == (13, g)] for g in (0, 1)}
    assert found["train"]["13"] == sample_texts(of[0], 6) + sample_texts(of[1], 6)
    assert found["test"]["13"] == sample_texts(of[0], 4) + sample_texts(of[1], 4)
    with pytest.raises(UsageError, match=r"9 texts of profession 11 with gender 0 in train, but 10 are needed"):
        load_texts(f"{BIOS}_class_set2", home, 40, 16)


def test_one_label_is_sampled_where_there_is_no_second_attribute(home):
    rows = [{"text": f"{i}", "label": i % 4} for i in range(40)]
    for split in ("train", "test"):
        write(home, AG, split, rows)
    found = load_texts(AG, home, 16, 8)
    assert found["train"]["2"] == sample_texts([row["text"] for row in rows if row["label"] == 2], 8)
    assert [len(texts) for texts in found["test"].values()] == [4, 4, 4, 4]


def test_code_is_cut_and_shuffled_one_language_after_the_other(home):
    languages = ["C", "Python", "HTML", "Java", "PHP", "Rust"]
    rows = [{"code": f"{'x' * 150}{i}".ljust(534 + i % 7), "language": languages[i % 6]} for i in range(300)]
    write(home, CODE, "train", rows)
    found = load_texts(CODE, home, 8, 4)
    kept = {
        name: [row["code"][150:] for row in rows if row["language"] == name and len(row["code"]) > 534]
        for name in languages[:5]
    }
    read = {name: [] for name in languages[:5]}  # reading stops when every language has more texts than are needed
    for row in rows:
        if row["language"] in read and len(row["code"]) > 534:
            read[row["language"]].append(row["code"][150:])
            if min(map(len, read.values())) > 6:
                break
    rng = random.Random(42)
    for name, texts in read.items():
        assert texts == kept[name][: len(texts)]
        rng.shuffle(texts)
        assert (found["train"][name], found["test"][name]) == (texts[:4], texts[4:6])
    with pytest.raises(UsageError, match="texts of C in train, but 80 are needed"):
        load_texts(CODE, home, 120, 40)


def test_the_hub_s_code_has_its_language_from_its_path():
    assert [language_of(path) for path in ("a/b.h", "c.py", "d.html", "E.java", "f.phpt", "g.rs")] == [
        "C", "Python", "HTML", "Java", "PHP", None,
    ]  # fmt: skip


def test_languages_come_from_one_side_of_their_pairs(home):
    for pair in ("en-fr", "fr-it", "de-en", "es-fr", "nl-pt"):
        rows = [{"translation": {side: f"{pair} {side} {i}" for side in pair.split("-")}} for i in range(30)]
        write(home, f"{EUROPARL}/{pair}", "train", rows)
    found = load_texts(EUROPARL, home, 12, 8)
    rng = random.Random(42)
    for language, pair in (("en", "en-fr"), ("fr", "fr-it"), ("de", "de-en"), ("es", "es-fr"), ("nl", "nl-pt")):
        expected = [f"{pair} {language} {i}" for i in range(11)]  # one more than is needed
        rng.shuffle(expected)
        assert (found["train"][language], found["test"][language]) == (expected[:6], expected[6:10])


def test_quadrants_are_first_rows(home):
    rows = biographies(each=9)
    for split in ("train", "test"):
        write(home, BIOS, split, rows)
    found = load_quadrants(f"{BIOS}_class_set1", home, 16, 8)
    assert list(found) == [("21", "13"), ("1", "11"), ("25", "22"), ("2", "26")]

    def first(profession: int, gender: int, count: int) -> list[str]:
        return [r["hard_text"] for r in rows if (r["profession"], r["gender"]) == (profession, gender)][:count]

    assert found["21", "13"]["train"] == {
        "PP": first(21, 0, 8), "NN": first(13, 1, 8), "NP": first(21, 1, 4), "PN": first(13, 0, 4),
    }  # fmt: skip
    assert found["2", "26"]["test"]["PP"] == first(2, 0, 4)
    with pytest.raises(UsageError, match="9 texts of profession 21 with gender 0 in train, but 11 are needed"):
        load_quadrants(f"{BIOS}_class_set1", home, 20, 8)
    with pytest.raises(UsageError, match="has no pairs of classes"):
        load_quadrants(AG, home)


def test_what_cannot_be_read_has_a_sentence(home, monkeypatch):
    with pytest.raises(UsageError, match="did you mean fancyzhx/ag_news"):
        load_texts("fancyzhx/ag_new", home)
    with pytest.raises(UnavailableError, match=r"ag_news could not be read: .*ag_news/train.jsonl \(or .parquet\)"):
        load_texts(AG, home)
    write(home, AG, "train", [{"text": "a", "topic": 1}])
    with pytest.raises(UsageError, match="no column 'label'; its columns are 'text', 'topic'"):
        load_texts(AG, home)
    (home / AG / "train.jsonl").write_text('{"text": "a", "lab')
    with pytest.raises(UsageError, match="No row of .*train.jsonl can be read as JSON .1 tried; first: train"):
        load_texts(AG, home)
    with pytest.raises(UsageError, match="test_set_size=2 is too small for every class"):
        load_texts(AG, home, 4000, 2)


@pytest.mark.parametrize("wrong", [5, None, ["a"]])
def test_a_row_whose_text_is_no_text_has_a_sentence(home, wrong):
    write(home, AG, "train", [{"text": wrong, "label": 0}])
    write(home, "codeparrot/github-code", "train", [{"code": wrong, "language": "C"}])
    write(home, "Helsinki-NLP/europarl/en-fr", "train", [{"translation": {"en": wrong}}])
    for name in (AG, "codeparrot/github-code", "Helsinki-NLP/europarl"):
        with pytest.raises(UsageError, match=f"{name} has a row in train with .* Expected a text"):
            load_texts(name, home)


def test_labels_and_translations_of_another_kind_have_a_sentence(home):
    write(home, AG, "train", [{"text": "a", "label": [0]}])
    with pytest.raises(UsageError, match="has 0 texts of label 0 in train"):
        load_texts(AG, home)
    write(home, "codeparrot/github-code", "train", [{"code": "a", "language": ["C"]}])
    with pytest.raises(UsageError, match="has 0 texts of C in train"):
        load_texts("codeparrot/github-code", home)
    write(home, "Helsinki-NLP/europarl/en-fr", "train", [{"translation": "a"}])
    with pytest.raises(UsageError, match="None in column translation.en. Expected a text"):
        load_texts("Helsinki-NLP/europarl", home)


def test_a_row_that_cannot_be_read_has_a_sentence(home):
    """Only the columns that are read matter. A bad row is never skipped, because that would change the sample."""
    deep = "[" * 20_000 + "]" * 20_000
    file = write(home, AG, "train", [{"text": f"{i}", "label": i % 4, "more": [1, "a", {}][i % 3]} for i in range(40)])
    write(home, AG, "test", [{"text": f"{i}", "label": i % 4} for i in range(40)])
    assert len(load_texts(AG, home, 16, 8)["train"]["2"]) == 8
    lines = file.read_text()
    nested = f'{{"text": "a", "label": 1, "x": {deep}}}'
    for bad, problem in ((nested, "nested more than 200 levels"), ("null", "expected an")):
        file.write_text(lines + bad)
        with pytest.raises(UsageError, match=f"cannot be read: train.jsonl line 41: .*{problem}.* Correct or remove"):
            load_texts(AG, home, 16, 8)


def test_a_gated_dataset_names_its_page(monkeypatch, the_hub):
    import datasets
    from huggingface_hub.errors import GatedRepoError

    def gated(*_, **__):
        raise GatedRepoError("no", response=SimpleNamespace(status_code=403, headers={}, request=None))

    monkeypatch.setattr(datasets, "load_dataset", gated)
    with pytest.raises(UnavailableError, match="accept its terms at https://huggingface.co/datasets/fancyzhx/ag_news"):
        load_texts(AG, None)


def test_the_hub_is_asked_for_what_is_not_in_the_folder(monkeypatch, home, the_hub):
    import datasets

    asked = []

    def load_dataset(path, **options):
        asked.append((path, options.get("name"), options["split"], options["streaming"], options.get("revision")))
        if path == "parquet":
            return datasets.Dataset.from_list(
                [
                    {"code": "y" * 600, "path": f"{i}{end}"}
                    for i in range(9)
                    for end in (".c", ".py", ".html", ".java", ".php")
                ]
            )  # fmt: skip
        if options.get("name"):
            return datasets.Dataset.from_list([{"translation": dict.fromkeys(options["name"].split("-"), "z")}] * 9)
        return datasets.Dataset.from_list([{"text": f"{i}", "label": i % 4} for i in range(16)])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    write(home, AG, "test", [{"text": f"{i}", "label": i % 4} for i in range(16)])
    assert len(load_texts(AG, home, 8, 8)["train"]["0"]) == 4
    assert asked == [(AG, None, "train", False, COMMIT)]  # the file is read without `datasets`
    del asked[:]
    assert set(load_texts(EUROPARL, None, 4, 4)["train"]) == {"en", "fr", "de", "es", "nl"}
    assert asked[0] == (EUROPARL, "en-fr", "train", True, COMMIT)
    assert load_texts(CODE, None, 4, 4)["test"]["HTML"] == ["y" * 450] * 2


def test_a_result_is_pinned_to_its_texts(home, the_hub):
    assert dataset_version(AG, home) == dataset_version(AG, None) == f"the Hub {COMMIT}"
    write(home, AG, "train", [{"text": "a", "label": 0}])
    half = dataset_version(AG, home)
    assert half.startswith("sha256 ") and half.endswith(f", the Hub {COMMIT}")
    write(home, AG, "test", [{"text": "a", "label": 0}])
    write(home, "codeparrot/github-code", "train", [])
    assert "the Hub" not in dataset_version("codeparrot/github-code", home)  # it has no other split
    before = dataset_version(AG, home)
    assert before.startswith("sha256 ")
    write(home, AG, "test", [{"text": "b", "label": 0}])
    assert dataset_version(AG, home) != before
    assert dataset_version("stdlib/kind", home).startswith("python 3.")


@pytest.mark.parametrize("name", STAND_INS)
def test_stand_ins_are_balanced_and_train_never_meets_test(name):
    found = load_texts(name, None, 400, 200)
    assert [len(texts) for texts in found["train"].values()] == [200] * len(DATASETS[name].classes)
    assert [len(texts) for texts in found["test"].values()] == [100] * len(DATASETS[name].classes)
    for label in found["train"]:
        assert not set(found["train"][label]) & set(found["test"][label])
    assert all(len(text) >= 60 for classes in found.values() for texts in classes.values() for text in texts)
    assert found == load_texts(name, None, 400, 200)


def test_stand_ins_have_quadrants():
    for pair in load_quadrants("stdlib/subject", None, 400, 200).values():
        assert {q: len(texts) for q, texts in pair["train"].items()} == {"PP": 200, "NN": 200, "NP": 100, "PN": 100}
        assert "import " not in " ".join(pair["test"]["PP"][:3])  # a docstring
        assert any("return " in text or " = " in text for text in pair["test"]["NN"])  # code


FIELDS = [*["classes"] * 5, "languages", "classes", "subsets"]


def test_classes_that_are_numbers_have_names():
    for name, source in HUB.items():
        if isinstance(source, LabeledDataset) and source.label != "rating":
            names = [class_name(name, str(number)) for number in source.classes]
            assert len({*names}) == len(names) and not any(own.isdecimal() for own in names)
    assert [class_name(f"{BIOS}_class_set1", str(pair[0])) for pair in HUB[f"{BIOS}_class_set1"].pairs] == [
        "professor", "architect", "surgeon", "attorney"
    ]  # fmt: skip
    assert class_name(f"{BIOS}_class_set2", "13") == "nurse" and class_name(REVIEWS, "6") == "Electronics"
    assert class_name(f"{REVIEWS}_sentiment", "5.0") == "5.0" and class_name("stdlib/kind", "code") == "code"
    assert class_name("of another time", "7") == "7"


def test_there_are_eight_datasets_and_36_tasks():
    parts = [getattr(HUB[name], field) for name, field in zip(HUB, FIELDS, strict=True)]
    assert [len(part) for part in parts] == [5, 5, 5, 5, 2, 5, 4, 5]
