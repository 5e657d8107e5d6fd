"""The files of a folder that are read as text are those of the split, chosen as `datasets` and the Hub choose them."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sae.common.errors import UsageError
from sae.common.tables import read_rows
from sae.harvest.files import list_files, splits_by_name

WORDS = ["train", "training", "validation", "valid", "dev", "val", "test", "testing", "eval", "evaluation", "wiki"]


@pytest.fixture
def chosen(tmp_path: Path) -> Callable[..., list[str]]:
    """chosen(files, split="train", subset=None, readme="") returns the files chosen from a folder of these files.

    `readme` is the YAML header of its README.md.
    """

    def choose(files: list[str], split: str = "train", subset: str | None = None, readme: str = "", say=print):
        for name in files:
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text("{}")
        if readme:
            (tmp_path / "README.md").write_text(f"---\n{readme}\n---\n# A dataset\n")
        return [file.relative_to(tmp_path).as_posix() for file in list_files(tmp_path, subset, split, say)]

    return choose


@pytest.mark.parametrize(
    ("files", "splits"),
    [
        (["a.jsonl", "b.jsonl", "deeper/c.jsonl"], {"train": ["a.jsonl", "b.jsonl", "deeper/c.jsonl"]}),
        (
            ["data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet",
             "data/test-00000-of-00001.parquet", "data/my_own-00000-of-00001.parquet", "other/a.parquet"],
            {"train": ["data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet"],
             "test": ["data/test-00000-of-00001.parquet"], "my_own": ["data/my_own-00000-of-00001.parquet"]},
        ),
        (["train/0.parquet", "validation/0.parquet"], {"train": ["train/0.parquet"], "dev": ["validation/0.parquet"]}),
        (["train.jsonl", "wiki_val.jsonl", "eval-2.jsonl", "trainer.jsonl"],
         {"training": ["train.jsonl"], "val": ["wiki_val.jsonl"], "test": ["eval-2.jsonl"]}),
        (["en-train-1/a.jsonl", "en-test-1/train.jsonl"],
         {"train": ["en-train-1/a.jsonl"], "evaluation": ["en-test-1/train.jsonl"]}),
        (["a.jsonl", "test.jsonl"], {"test": ["test.jsonl"], "all": ["a.jsonl", "test.jsonl"]}),
    ],
)  # fmt: skip
def test_a_split_is_chosen_by_names(chosen, files: list[str], splits: dict[str, list[str]]) -> None:
    for split, expected in splits.items():
        assert chosen(files, split) == expected


def test_an_unknown_split_is_refused_with_those_that_are_there(chosen) -> None:
    files = ["data/train-00000-of-00001.parquet", "data/test-00000-of-00001.parquet", "data/x-00000-of-00001.parquet"]
    with pytest.raises(UsageError, match="has no split 'nosuch'; its splits are 'train', 'test', 'x'. Choose one with"):
        chosen(files, "nosuch")


def test_a_folder_without_splits_is_train(chosen) -> None:
    with pytest.raises(UsageError, match="has no split 'test'; its splits are 'train'."):
        chosen(["a.jsonl"], "test")


@pytest.mark.parametrize(
    ("name", "splits", "refused"),
    [
        ("a.jsonl", ["train", "training", "all"], ["test", "nosuch", "jsonl", ""]),
        ("wiki_val.jsonl", ["train", "all", "val", "validation", "dev"], ["test", "wiki.val"]),
        ("my-own-2.jsonl", ["own", "my"], ["ow", ".*", "test"]),
    ],
)
def test_a_file_has_the_split_that_its_name_says(
    tmp_path: Path, name: str, splits: list[str], refused: list[str]
) -> None:
    """Without --split, the file is read whole, whatever its name."""
    (tmp_path / name).write_text("{}")
    for split in splits:
        assert list_files(tmp_path / name, None, split, print) == [tmp_path / name]
    for split in refused:
        with pytest.raises(UsageError, match="is a single file, which is read whole, and its name does not contain"):
            list_files(tmp_path / name, None, split, print)


def test_what_is_not_text_of_the_dataset_is_left_out(chosen) -> None:
    left = [
        "dataset_infos.json", "dataset_info.json", "README.txt", "LICENSE", "LICENSE.txt", ".gitattributes",
        ".DS_Store", "Thumbs.db", "._b.jsonl", ".b.jsonl.swp", "b.jsonl~", "~b.jsonl",
        ".ipynb_checkpoints/b-checkpoint.jsonl",
        ".cache/huggingface/download/b.jsonl.metadata", ".cache/huggingface/download/b.json", "__MACOSX/._b.jsonl",
        "__pycache__/b.jsonl", "config.json", "Untitled.ipynb",
    ]  # fmt: skip
    assert chosen(["b.jsonl", "licensed.jsonl", *left]) == ["b.jsonl", "licensed.jsonl"]
    assert chosen([], "all") == ["b.jsonl", "licensed.jsonl"]


def test_links_to_folders_are_followed_and_circles_are_not(chosen, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "b.jsonl").write_text("{}")
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "train").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "back").symlink_to(tmp_path / "set")
    (tmp_path / "set" / "broken.jsonl").symlink_to(tmp_path / "gone")
    assert list_files(tmp_path / "set", None, "train", print) == [tmp_path / "set" / "train" / "b.jsonl"]
    broken = tmp_path / "set" / "broken.jsonl"
    assert broken in list_files(tmp_path / "set", None, "all", print)  # it is listed, so that reading it is refused


def test_missing_shards_are_said(chosen) -> None:
    said: list[str] = []
    files = [f"data/train-0000{n}-of-00003.parquet" for n in (0, 2)]
    assert chosen(files, say=said.append) == files
    assert len(said) == 1 and said[0].endswith("has only 2 of the 3 files of the split 'train'.")
    del said[:]
    chosen(["data/train-00001-of-00003.parquet"], say=said.append)
    assert not said


def test_files_of_no_split_are_said(chosen) -> None:
    said: list[str] = []
    assert chosen(["train.jsonl", "deep/extra.jsonl", "more.jsonl"], say=said.append) == ["train.jsonl"]
    assert len(said) == 1 and "2 files of" in said[0] and "not read, such as deep/extra.jsonl: its name" in said[0]
    del said[:]
    assert len(chosen([], "all", say=said.append)) == 3
    chosen(["test.jsonl"], "test", say=said.append)  # files of another split are not mentioned
    assert len(said) == 1 and "2 files of" in said[0]


def test_a_suffix_in_capitals_is_a_suffix(chosen, tmp_path: Path) -> None:
    assert chosen(["A.JSONL", "b.jsonl", "README.TXT", "License.txt"]) == ["A.JSONL", "b.jsonl"]
    for name, compress in (("C.GZ", gzip.compress), ("D.JSONL", bytes)):
        (tmp_path / name).write_bytes(compress(b'{"text": "a"}\n{"text": "b"}\n'))
        assert [row.values for row in read_rows([tmp_path / name], ["text"])] == [{"text": "a"}, {"text": "b"}]


folder_names = st.builds("{}{}{}/".format, st.sampled_from(["", "my-", "my"]), st.sampled_from(WORDS),
                         st.sampled_from(["", "_2", "s"]))  # fmt: skip
file_names = st.builds("{}{}{}".format, st.sampled_from(["", "x.", "x"]), st.sampled_from(WORDS),
                       st.sampled_from([".jsonl", "-00000-of-00001.jsonl", "s.jsonl"]))  # fmt: skip
paths = st.builds("{}{}{}".format, st.sampled_from(["", "data/"]), st.lists(folder_names, max_size=2).map("".join),
                  file_names)  # fmt: skip


@settings(max_examples=40)
@given(st.lists(paths, unique=True, min_size=1, max_size=5))
def test_the_splits_are_those_of_datasets(tmp_path_factory, names: list[str]) -> None:
    from datasets.data_files import DataFilesDict, get_data_patterns

    folder = tmp_path_factory.mktemp("names")
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("{}")
    theirs = DataFilesDict.from_patterns(get_data_patterns(str(folder)), base_path=str(folder))
    ours = splits_by_name(folder, sorted(file for file in folder.rglob("*") if file.is_file()))
    assert {name: set(map(Path, files)) for name, files in theirs.items()} == {k: set(v) for k, v in ours.items()}
    assert list(theirs) == list(ours)


# README.md


TWO = """
configs:
- config_name: en
  data_files:
  - {split: train, path: en/tr*.parquet}
  - {split: test, path: [en/te*.parquet, "more/**"]}
- config_name: fr
  data_dir: fr
"""
TWO_FILES = ["en/tr1.parquet", "en/te1.parquet", "more/deep/er.parquet", "fr/train.parquet", "fr/test.parquet"]


def test_a_readme_names_the_files_of_a_split(chosen) -> None:
    assert chosen(TWO_FILES, "train", "en", TWO) == ["en/tr1.parquet"]
    assert chosen([], "test", "en") == ["en/te1.parquet", "more/deep/er.parquet"]
    assert chosen([], "test", "fr") == ["fr/test.parquet"]
    with pytest.raises(UsageError, match="has several configurations. Choose one with --subset: en, fr"):
        chosen([])
    with pytest.raises(UsageError, match="has no subset 'de'; its README.md has en, fr. Choose another with --subset"):
        chosen([], subset="de")
    with pytest.raises(UsageError, match="has no split 'validation'; its splits are 'train', 'test'"):
        chosen([], "validation", "en")


@pytest.mark.parametrize(
    ("readme", "expected"),
    [
        ("license: mit", ["test.jsonl"]),
        ("configs:\n- config_name: default\n  data_files: '*.jsonl'", ["other.jsonl", "test.jsonl"]),
        ("configs:\n- config_name: a\n  data_files: o?her.[j]sonl", ["other.jsonl"]),
        ("configs:\n- {config_name: a, data_files: test.jsonl}\n"
         "- {config_name: b, data_files: other.jsonl, default: true}", ["other.jsonl"]),
        ("configs:\n- {config_name: a, data_files: absent.jsonl}\n"
         "- {config_name: b, data_files: ./other.jsonl}", ["other.jsonl"]),
        ("configs:\n- config_name: default\n  data_files: ../*/secret.jsonl", ["test.jsonl"]),
        ("configs:\n- config_name: default", ["test.jsonl"]),
        ("configs: none", ["test.jsonl"]),
    ],
)  # fmt: skip
def test_the_default_configuration(chosen, readme: str, expected: list[str]) -> None:
    split = "test" if expected == ["test.jsonl"] else "train"
    assert chosen(["other.jsonl", "test.jsonl"], split, readme=readme) == expected


@pytest.mark.parametrize(
    ("readme", "sentence"),
    [
        ("configs: [", "The YAML header of .*README.md cannot be read: "),
        ("configs: " + "[" * 5000, "The YAML header of .*README.md cannot be read: "),
        ("configs:\n- data_files: a", "README.md has a configuration without a config_name, or without data_files"),
        ("configs:\n- {config_name: a, data_files: [{split: 3, path: b}]}", "README.md has a configuration without"),
        ("configs:\n- {config_name: a, data_files: {train: b}}", "README.md has a configuration without"),
        ("configs:\n- 5", "README.md has a configuration without"),
    ],
)  # fmt: skip
def test_an_odd_readme_is_refused(chosen, readme: str, sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence):
        chosen(["a.jsonl"], readme=readme)


def test_a_subset_needs_a_readme(chosen) -> None:
    with pytest.raises(UsageError, match="has no subset 'en', since it has no README.md with `configs`"):
        chosen(["a.jsonl"], subset="en")


# save_to_disk


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("state.json", "[" * 30_000, "state.json cannot be read .nested too deeply"),
        ("state.json", "{}", "state.json has no list '_data_files'. Save the dataset again."),
        ("state.json", '{"_data_files": [{"file": 3}]}', "state.json lists {'file': 3}; expected a file."),
        ("dataset_dict.json", "[" * 30_000, "dataset_dict.json cannot be read .nested too deeply"),
        ("dataset_dict.json", '{"splits": 3}', "dataset_dict.json has no list 'splits'"),
    ],
)
def test_a_damaged_record_of_a_saved_dataset_is_refused(
    chosen, tmp_path: Path, name: str, content: str, sentence: str
) -> None:
    (tmp_path / "dataset_info.json").write_text("{}")
    (tmp_path / name).write_text(content)
    with pytest.raises(UsageError, match=sentence):
        chosen([])


def test_patterns_with_many_stars_are_quick(chosen) -> None:
    stars = "**/" * 40 + "*a" * 40 + "*b"
    readme = f"configs:\n- {{config_name: a, data_files: ['{stars}', 'deep/**']}}"
    names = ["deep/" + "a/" * 30 + "a" * 200 + ".jsonl"]
    assert chosen([*names, "other.jsonl"], readme=readme) == names


def test_a_saved_dataset_lists_its_files(tmp_path: Path) -> None:
    (tmp_path / "dataset_info.json").write_text("{}")
    (tmp_path / "state.json").write_text(json.dumps({"_data_files": [{"filename": "../../b.arrow"}]}))
    assert list_files(tmp_path, None, "train", print) == [tmp_path / "b.arrow"]
    with pytest.raises(UsageError, match="--subset selects a configuration, but .*, a saved dataset, has none"):
        list_files(tmp_path, "en", "train", print)
