"""Files written by an earlier commit still open and evaluate to the same numbers; runs resume to the same SAEs.

A step that rounds differently from that commit's leads to another SAE, within the bounds of train/step_version.py.

fixtures/<commit>/README.md says what was written and how. This test uses only what must stay stable: the command line,
`sae.load_sae`, `sae.open_cache`, the files on disk and those bounds. It imports nothing else from the package, so no
change inside the package can change this test.

In the text files of the fixtures, @HOME@ stands for the SAE_HOME they were written in. Each test copies them into a new
home and replaces @HOME@ with its path.
"""

import contextlib
import hashlib
import io
import json
import platform
import runpy
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file

import sae
from sae.train.step_version import RoundingBounds, rounding_bounds

FIXTURES = Path(__file__).parent / "fixtures" / "9a9a639"
OLD, HOME = FIXTURES / "home", "@HOME@"
EXPECTED: dict[str, Any] = json.loads((FIXTURES / "expected.json").read_text())
TRAININGS = {training["name"]: training for training in EXPECTED["trainings"]}
FINISHED = sorted(path.name for path in (OLD / "finished").iterdir())
INTERRUPTED = sorted(run for training in TRAININGS.values() for run in training["runs"])

# Needed by --resume: each logged metric is the mean since the previous line.
LOG_FLAGS = ["--log-every", "50", "--checkpoint-every", "95"]
# On the CPU that made the fixtures, all evaluated numbers are the same bit for bit. Other CPUs round differently: 1e-5
# holds with AVX-512 and with AVX2; without either, a gradient's norm and a rank differ by 2e-5.
CLOSE = 5e-5 if platform.machine() in ("x86_64", "AMD64") else 1e-4
REHARVESTED = 1e-2  # tolerance where rows are harvested again: bfloat16 has eight significant bits
OTHER_ROWS = RoundingBounds(REHARVESTED, REHARVESTED, 0.1)
TIMINGS = {"waited_for_data"}


class Ran(NamedTuple):
    """The output of some commands, and whether all of them exited with 0."""

    good: bool
    output: str

    def of(self, name: str) -> str:
        """The output of the last command that mentions `name`."""
        return next((part for part in reversed(self.output.split("$ sae ")) if name in part), self.output)


def call(home: Path, *commands: list[str]) -> Ran:
    """Run commands as `python -m sae` would, with SAE_HOME=home, on one thread of the CPU."""
    failed, said, threads = 0, io.StringIO(), torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        patch.setenv("SAE_HOME", str(home))
        patch.chdir(home)
        patch.setattr(torch.cuda, "is_available", lambda: False)
        for command in commands:
            words = [word.replace(HOME, str(home)) for word in command]
            print("$ sae", *words)
            patch.setattr(sys, "argv", ["sae", *words])
            try:
                runpy.run_module("sae", run_name="__main__")
            except SystemExit as end:
                if end.code:
                    failed += 1
                    print("exit code", end.code)
    torch.set_num_threads(threads)
    return Ran(not failed, said.getvalue())


def text_of(path: Path, home: Path) -> str:
    """The content of a text file of the fixtures, with @HOME@ replaced by `home`."""
    return path.read_text().replace(HOME, str(home))


def copy(folder: Path, to: Path, home: Path) -> None:
    """Copy a folder of the fixtures into a home."""
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            target = to / path.relative_to(folder)
            target.parent.mkdir(parents=True, exist_ok=True)
            if path.suffix in (".json", ".jsonl", ".toml"):
                target.write_text(text_of(path, home))
            else:
                shutil.copyfile(path, target)


def old_home(home: Path, *, finished: bool = False) -> Path:
    """Copy the home that the earlier commit wrote, with its runs either interrupted or finished.

    In the repository its folders have other names, because git ignores activations/ and runs/.
    """
    home = home.resolve()
    home.mkdir(parents=True, exist_ok=True)
    for name, to in (("model", "model"), ("caches", "activations"), ("trained", "runs")):
        copy(OLD / name, home / to, home)
    for name in ("sentences.jsonl", "config.toml"):
        (home / name).write_text(text_of(OLD / name, home))
    if finished:
        for run in (home / "runs").iterdir():
            shutil.rmtree(run / "checkpoints", ignore_errors=True)
        copy(OLD / "finished", home / "runs", home)
        copy(OLD / "references", home / "activations" / "evaluation" / "references", home)
        for run in (OLD / "evaluations").iterdir():
            copy(run, home / "runs" / run.name / "evaluations", home)
    return home


def contents(folder: Path, pattern: str = "*") -> dict[str, bytes]:
    """Every file under a folder, except locks."""
    paths = (path for path in folder.rglob(pattern) if path.is_file() and not path.name.startswith("."))
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def content_of(path: str, files: dict[str, bytes]) -> Any:
    """The content of one of these files. A record is returned without its digest, which writing into its cache adds."""
    if not path.endswith(".json"):
        return files.get(path)
    record = json.loads(files[path])
    return {key: value for key, value in record.items() if key != "content_digest"}


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def differences(old: Any, new: Any, but_for: set[str], at: str = "", within: float = CLOSE) -> Iterator[str]:
    """Yield each difference of `new` from `old`. Keys that only `new` has are allowed."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in old.keys() - but_for:
            if key in new:
                yield from differences(old[key], new[key], but_for, f"{at}.{key}", within)
            else:
                yield f"{at}.{key} is gone"
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for number, (one, other) in enumerate(zip(old, new, strict=True)):
            yield from differences(one, other, but_for, f"{at}[{number}]", within)
    elif isinstance(old, float) and isinstance(new, (int, float)) and not isinstance(new, bool):
        if new != pytest.approx(old, rel=within, abs=within * 0.1, nan_ok=True):
            yield f"{at}: {old} then, {new} now"
    elif old != new or type(old) is not type(new):
        yield f"{at}: {old!r} then, {new!r} now"


def assert_close(old: torch.Tensor, new: torch.Tensor, within: float = CLOSE) -> None:
    torch.testing.assert_close(new, old, rtol=within, atol=within)


def assert_finished(run: Path, bounds: RoundingBounds | None = None) -> None:
    """Assert that the run equals, up to rounding, the uninterrupted run of the earlier commit."""
    finished, home = OLD / "finished" / run.name, run.parents[1]
    record, earlier = json.loads((run / "sae.json").read_text()), json.loads(text_of(finished / "sae.json", home))
    record["origin"]["model"]["name"] = earlier["origin"]["model"]["name"]  # the name now contains the digest
    bounds = bounds or rounding_bounds(record["origin"]["variant"])
    assert list(differences(earlier, record, {"sha256"})) == []
    assert record["sha256"] == hashlib.sha256((run / "sae.safetensors").read_bytes()).hexdigest()
    old, new = load_file(finished / "sae.safetensors"), load_file(run / "sae.safetensors")
    assert old.keys() == new.keys()
    assert all(tensor.shape == new[name].shape for name, tensor in old.items())
    one, other = (torch.cat([tensors[name].flatten() for name in sorted(old)]) for tensors in (old, new))
    assert (other - one).norm() <= bounds.weights * one.norm()
    lines = [
        [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()] for folder in (finished, run)
    ]
    assert list(differences(*lines, TIMINGS, within=bounds.metrics)) == []
    loss = [[line["loss"] for line in of_run] for of_run in lines]
    assert loss[1] == pytest.approx(loss[0], rel=bounds.loss)
    assert [line["step"] for line in lines[0]] == [line["step"] for line in lines[1]]


def counted_outliers(home: Path, path: str) -> bool:
    """Whether a result is of a run whose cache has a norm limit. For these, earlier versions counted outlier rows."""
    latest = home / "/".join(path.split("/")[:2]) / "evaluations" / "core.json"
    return path.startswith("runs/") and "norm_limit" in json.loads(latest.read_text())["eval_config"]


def tokenizer_is_the_same(home: Path) -> bool:
    """Whether the tokenizer serializes to the recorded bytes. Another version of `tokenizers` may write others."""
    from transformers import AutoTokenizer

    (cache, *_) = EXPECTED["harvests"]
    recorded = json.loads((OLD / "caches" / cache["folder"] / "zarr.json").read_text())["attributes"]["identity"]
    written = AutoTokenizer.from_pretrained(home / "model").backend_tokenizer.to_str()
    return hashlib.sha256(json.dumps(written).encode()).hexdigest() == recorded["tokenizer"]


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The home of a run that was killed. Tests do not write to it."""
    return old_home(tmp_path_factory.mktemp("interrupted"))


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    return old_home(tmp_path / "finished", finished=True)


# --- caches ---------------------------------------------------------------------------------------------------------


def chunk_of(cache: Any, name: str, number: int) -> torch.Tensor:
    """The rows of a chunk. In earlier versions `read_chunk` was called `chunk`."""
    read = getattr(cache, "read_chunk", None) or cache.chunk
    return torch.from_numpy(read(name, number).copy()).view(torch.bfloat16)


def rows_of(cache: Any, name: str) -> torch.Tensor:
    return torch.cat([chunk_of(cache, name, number) for number in range(len(cache.chunk_rows))])


def whole_caches() -> list[str]:
    return [name for name in EXPECTED["caches"] if name != EXPECTED["half"]]


def test_caches_open_and_every_byte_is_as_recorded(interrupted: Path) -> None:
    folders = [f"{HOME}/activations/{name}" for name in whole_caches()]
    ran = call(
        interrupted, ["cache", "list"], *(["cache", verb, folder] for folder in folders for verb in ("info", "verify"))
    )
    assert ran.good, ran.output


@pytest.mark.parametrize("name", whole_caches())
def test_a_cache_gives_the_same_rows(interrupted: Path, name: str) -> None:
    cache = sae.open_cache(interrupted / "activations" / name)
    digests = {
        array: hashlib.sha256(rows_of(cache, array).view(torch.int16).numpy().tobytes()).hexdigest()
        for array in EXPECTED["caches"][name]["rows"]
    }
    assert digests == EXPECTED["caches"][name]["rows"]


@pytest.mark.parametrize("name", whole_caches())
def test_a_cache_gives_the_same_batches(interrupted: Path, name: str) -> None:
    """The batches have the same rows in the same order, and the same rows are masked and replaced by others."""
    cache = sae.open_cache(interrupted / "activations" / name)
    for expected in EXPECTED["caches"][name]["batches"]:
        digest = hashlib.sha256()
        for x_BD in cache.batches(**expected["call"], epochs=2):
            digest.update(x_BD.numpy().tobytes())
        assert digest.hexdigest() == expected["sha256"], expected["call"]


def test_a_harvest_command_finds_its_cache_and_finishes_an_interrupted_one(tmp_path: Path) -> None:
    """This includes gemma-2-mini, which is pinned by its files. `sae cache repair` harvests with the settings in
    harvest.json.
    """
    home = old_home(tmp_path / "home")
    if not tokenizer_is_the_same(home):
        pytest.skip("this version of tokenizers serializes the tokenizer differently, which makes it another harvest")
    activations, half = home / "activations", EXPECTED["half"]
    before, folders = contents(activations), names(activations)
    cache = EXPECTED["harvests"][0]["folder"]
    (named,) = (named for named in EXPECTED["named"] if named["words"][0] == "harvest")
    damaged = activations / cache / "layer_01" / "c.1.0"
    damaged.write_bytes(bytes(damaged.stat().st_size))
    ran = call(
        home,
        ["cache", "repair", f"{HOME}/activations/{cache}"],
        *(harvest["words"] for harvest in EXPECTED["harvests"]),
        ["cache", "verify", f"{HOME}/activations/{half}"],
        ["cache", "verify", f"{HOME}/activations/{cache}"],
        [*named["words"], "--dry-run"],
    )
    assert ran.good, ran.output
    assert names(activations) == folders
    assert named["folder"] in ran.of("--dry-run")
    after = contents(activations)
    mended = tuple(f"{cache}/{path}" for path in ("layer_01/", "layer_01.", "commits/000001.layer_01.json"))
    records = ("/harvest.json", "/zarr.json", "/manifest.json")
    # These include the windows that `half` already had.
    kept = {path for path in before if not path.startswith(mended) and not path.endswith(records)}
    assert {path for path in kept if content_of(path, after) != content_of(path, before)} == set()
    old, new = (chunk_of(sae.open_cache(f / cache), "layer_01", 1) for f in (OLD / "caches", activations))
    assert_close(old.float(), new.float(), REHARVESTED)
    rows = rows_of(sae.open_cache(activations / half), "layer_00")
    assert_close(load_file(FIXTURES / "half.safetensors")["rows"].float(), rows.float(), REHARVESTED)


# --- runs -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def resumed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Ran]:
    """A home in which every interrupted run was resumed, by --resume or by the command that began it.

    A run that cannot be resumed stops the other runs of its command. The rest is then resumed one by one, to find it.
    """
    home = old_home(tmp_path_factory.mktemp("resumed"))
    recipes, *others = EXPECTED["trainings"]
    resume = [word for run in recipes["runs"] for word in ("--resume", f"{HOME}/runs/{run}")]
    ran = call(home, ["train", *resume, *LOG_FLAGS], *(other["words"] for other in others))
    left = [run for run in INTERRUPTED if not (home / "runs" / run / "sae.json").exists()]
    if left:
        again = call(home, *(["train", "--resume", f"{HOME}/runs/{run}", *LOG_FLAGS] for run in left))
        ran = Ran(False, ran.output + again.output)
    return home, ran


@pytest.mark.slow
@pytest.mark.parametrize("run", INTERRUPTED)
def test_an_interrupted_run_resumes_to_the_same_sae(resumed: tuple[Path, Ran], run: str) -> None:
    home, ran = resumed
    assert (home / "runs" / run / "sae.json").exists(), ran.of(run)
    assert_finished(home / "runs" / run, OTHER_ROWS if run in TRAININGS["stream"]["runs"] else None)


@pytest.mark.slow
def test_no_command_started_a_new_run(resumed: tuple[Path, Ran]) -> None:
    home, ran = resumed
    assert ran.good, ran.output
    assert names(home / "runs") == names(OLD / "trained")


def test_a_run_resumes_on_a_cache_that_was_moved(tmp_path: Path) -> None:
    home = old_home(tmp_path / "home")
    run = next(run for run in TRAININGS["recipes"]["runs"] if run.startswith("batchtopk-"))
    moved = home / "elsewhere"
    (home / "activations" / EXPECTED["harvests"][0]["folder"]).rename(moved)
    ran = call(home, ["train", "--resume", f"{HOME}/runs/{run}", "--cache", str(moved), *LOG_FLAGS])
    assert ran.good, ran.output
    path = home / "runs" / run / "sae.json"
    record = json.loads(path.read_text())
    assert record["origin"]["cache"] == str(moved)
    record.pop("content_digest", None)
    record["origin"]["cache"] = json.loads(text_of(OLD / "finished" / run / "sae.json", home))["origin"]["cache"]
    path.write_text(json.dumps(record))
    assert_finished(home / "runs" / run)


@pytest.mark.slow
def test_a_command_finds_the_runs_that_it_made(finished: Path) -> None:
    """The digest in a run folder's name is unchanged, with --literal, --order-seed, --config and all other options."""
    before = contents(finished / "runs")
    named = [named for named in EXPECTED["named"] if named["words"][0] == "train"]
    plans = ([*one["words"], "--dry-run"] for one in named)
    ran = call(finished, *(training["words"] for training in TRAININGS.values()), *plans)
    assert ran.good, ran.output
    assert names(finished / "runs") == names(OLD / "trained")
    after = contents(finished / "runs")
    assert {path for path in before | after if before.get(path) != after.get(path)} == set()
    assert [one["folder"] for one in named if one["folder"] not in ran.output] == []


@pytest.mark.parametrize("run", FINISHED)
def test_a_finished_sae_encodes_the_same(run: str) -> None:
    codes = load_file(FIXTURES / "codes.safetensors")
    loaded = sae.load_sae(OLD / "finished" / run)
    x_BD = next(codes[name] for name in ("x", "wide") if codes[name].shape[1] == loaded.d_in)
    f_BF = loaded.encode(x_BD)
    assert_close(codes[f"{run}.f"], f_BF)
    assert_close(codes[f"{run}.x_hat"], loaded.decode(f_BF))


# --- results --------------------------------------------------------------------------------------------------------


def results(home: Path) -> dict[str, bytes]:
    found = {f"runs/{path}": data for path, data in contents(home / "runs").items() if "/evaluations/" in path}
    references = contents(home / "activations" / "evaluation" / "references")
    return found | {f"references/{path}": data for path, data in references.items()}


@pytest.fixture
def evaluations() -> Callable[[str], list[str]]:
    """Find the evaluation command that contains a word."""

    def find(word: str) -> list[str]:
        (found,) = (one["words"] for one in EXPECTED["evaluations"] if word in " ".join(one["words"]))
        return found

    return find


@pytest.mark.slow
def test_results_are_read_back_and_not_measured_again(finished: Path, evaluations: Callable[[str], list[str]]) -> None:
    """Nor does showing them measure anything. Results of another --mode are restored from evaluations/earlier/."""
    before = results(finished)
    kept = [evaluations("--tokens 1k"), evaluations("core,absorption")]
    if platform.python_version() == EXPECTED["made_with"]["python"]:  # the metric reads files of the standard library
        kept.append(evaluations("scr_stdlib"))
    (run,) = (one["runs"][0] for one in EXPECTED["evaluations"] if "2024-12" in one["words"])
    few = [word for word in kept[0] if "/runs/" in word]
    pages = [
        ["compare", *few, "--out", f"{HOME}/compare.html"],
        ["dashboard", f"{HOME}/runs/{run}"],
        ["inspect", f"{HOME}/runs/{run}", "--latent", "3"],
        ["export", f"{HOME}/runs/{run}", "--to", "saelens", "--out", f"{HOME}/exported"],
    ]
    ran = call(finished, *kept, *pages)
    assert ran.good, ran.output
    assert {"compare.html", "exported"} <= names(finished)
    after = results(finished)
    changed = {path for path in before | after if before.get(path) != after.get(path)}
    assert {path for path in changed if not counted_outliers(finished, path)} == set()

    ran = call(finished, evaluations("2024-12"))
    assert ran.good, ran.output
    (aside,) = (path for path in before if path.startswith(f"runs/{run}/evaluations/earlier/core-"))
    after = results(finished)
    assert after[f"runs/{run}/evaluations/core.json"] == before[aside]
    assert set(before.values()) <= set(after.values())  # moved, not lost
    new = [path for path, content in after.items() if content not in before.values()]
    assert all(counted_outliers(finished, path) for path in new)  # nothing else was measured again


def bootstrap_ends(result: dict[str, Any]) -> dict[tuple[str, int], float]:
    """Remove the intervals over words from a result of absorption. Returns (number, end) -> value."""
    means = result["eval_result_unstructured"]["intervals"].pop("mean", {})
    return {(name, end): value for name, ends in means.items() for end, value in enumerate(ends) if value is not None}


@pytest.mark.slow
def test_measuring_again_gives_the_same_numbers(finished: Path, evaluations: Callable[[str], list[str]]) -> None:
    before = results(finished)
    again = [evaluations("--tokens 1k"), evaluations("core,absorption")]
    ran = call(finished, *([*words, "--force"] for words in again))
    assert ran.good, ran.output
    after = results(finished)
    assert {path for path in after.keys() ^ before.keys() if not counted_outliers(finished, path)} == set()
    changed = sorted(path for path in before if before[path] != after[path])
    assert len([path for path in changed if path.startswith("runs/")]) == 6
    assert len([path for path in changed if path.startswith("references/")]) == 6
    for path in changed:
        if path.startswith("references/pca-"):  # the signs of eigenvectors are not those of another CPU
            continue
        old, new = json.loads(before[path]), json.loads(after[path])
        flags = [result["eval_result_unstructured"].pop("flags") for result in (old, new)]
        assert len(flags[0]) <= len(flags[1]), path  # their wording may change, and later versions add some
        # The notes on SAEBench's names; old files have none, so they are derived from the numbers.
        new["eval_result_unstructured"].pop("notes", None)
        if path.endswith("/core.json"):  # earlier versions did not keep the values by document
            assert old["eval_result_unstructured"].pop("extra") is None and new["eval_result_unstructured"].pop("extra")
        if path.endswith("/absorption.json"):  # earlier versions drew other bootstrap samples
            ends = [bootstrap_ends(result) for result in (old, new)]
            assert ends[0].keys() == ends[1].keys() and all(abs(ends[0][k] - ends[1][k]) < 0.05 for k in ends[0]), path
        assert list(differences(old, new, {"eval_id", "datetime_epoch_millis", "sae_bench_commit_hash"}, path)) == []
