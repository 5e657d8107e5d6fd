"""Shared fixtures: a random two-block Gemma 2 with the embedded tokenizer, a text, a cache of both, and SAE_HOME."""

import contextlib
import copy
import functools
import gc
import itertools
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import settings
from typer import testing

if TYPE_CHECKING:
    from sae.cache.reader import Cache

    from .worker_process import WorkerProcess

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may use the network
# Tests skip fsync: what a killed process has written survives without it. tests/common/test_files.py checks that the
# package calls it.
os.fsync = lambda descriptor: None
NUMBERS = itertools.count()
TOGETHER = {
    "simulated GPU": re.compile(r"tests/(simulated_cuda/|train/test_precision)"),
    "Triton's interpreter": re.compile(r"tests/train/kernels/"),
    "store": re.compile(
        r"tests/(cache/test_(object_store|store_)|cli/test_store_|harvest/test_harvest_to_|train/test_store)"
    ),
    "standard library": re.compile(r"tests/(harvest/test_datasets|evaluate/(datasets/test_labeled|test_kept_))"),
    "launcher": re.compile(r"tests/(\w+/test_ranks|common/test_process_group|test_launch_scripts)"),
}
"""Groups of test files that share something that takes seconds: a started process or the standard library's text."""
# Building the commands takes 14 ms, and typer's test runner does it for every call.
testing._get_command = functools.cache(testing._get_command)
# The examples are the same in every run, and no test fails because it is slow.
settings.register_profile("suite", deadline=None, derandomize=True, database=None)
settings.load_profile("suite")
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 2)))  # workers have the variable; see pytest_configure


def pytest_configure(config: pytest.Config) -> None:
    """With several workers, use one thread in each worker and in the programs that it starts.

    Workers inherit the variable before numpy is imported. Threads of two programs on two cores would block each other.
    """
    if config.getoption("numprocesses", default=None):
        os.environ["OMP_NUM_THREADS"] = "1"


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Schedule as `--dist loadfile` does, but send all files of a group in TOGETHER to one worker, so that what they
    share is made once. Other values of `--dist` keep xdist's scheduler.
    """
    if config.getvalue("dist") != "loadfile":
        return None
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = super()._split_scope(nodeid)
            return next((name for name, files in TOGETHER.items() if files.match(file)), file)

    return Scheduling(config, log)


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    """Disable garbage collection while tests are collected, and exempt from it all objects that exist afterwards.

    Otherwise Python scans all imported packages and tests again and again, which takes a third of the time of
    collecting the tests, and some of the time of running them.
    """
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


@pytest.fixture
def tmp_path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Like pytest's fixture, but faster: pytest looks through thousands of folders to find the next free number."""
    name = re.sub(r"\W", "_", request.node.name)[:30]
    return tmp_path_factory.mktemp(f"{name}-{next(NUMBERS)}", numbered=False)


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A separate folder for each test, used as SAE_HOME (for activations/ and runs/) and as working directory."""
    monkeypatch.setenv("SAE_HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Use one thread in torch, which is faster for the small matrix products of some test modules."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module", autouse=True)
def no_foreign_recipes() -> Iterator[None]:
    """Remove the recipes that a module's tests, or a script that they import, have registered."""
    yield
    if registry := sys.modules.get("sae.train.recipe"):
        for name, recipe in list(registry.RECIPES.items()):
            if not recipe.declared_by.__module__.startswith("sae.train.variants."):
                del registry.RECIPES[name]


@pytest.fixture(scope="session", autouse=True)
def tokenizers_are_read_once() -> Iterator[None]:
    """Read each tokenizer once: every harvest and evaluation needs one, and it is nearly always the same.

    A caller gets a copy that shares only the Rust tokenizer. A test that changes that one has to copy it first, with
    `copy.deepcopy`.
    """
    loading = sys.modules.get("sae.harvest.loading")
    if loading is None:
        yield
        return
    read, known = loading.from_pretrained, {}

    def from_pretrained(kind: Any, location: Any, **options: Any) -> Any:
        if kind is not loading.AutoTokenizer or options or not Path(location).is_dir():
            return read(kind, location, **options)
        files = tuple((file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in Path(location).iterdir())
        key = (str(location), *sorted(files))
        if key not in known:
            found = read(kind, location)
            backend = getattr(found, "backend_tokenizer", None)
            if backend is None or backend.truncation or backend.padding:
                return found
            while len(known) >= 4:  # keep those of session fixtures and the latest one
                del known[list(known)[-1]]
            known[key] = found
        shared = known[key].backend_tokenizer
        shared.no_truncation()
        shared.no_padding()
        return copy.deepcopy(known[key], {id(shared): shared})

    loading.from_pretrained = from_pretrained
    yield
    loading.from_pretrained = read


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random Gemma 2 of two blocks, width 32, and gemma-2-mini's tokenizer."""
    from transformers import AutoTokenizer, Gemma2Config, Gemma2ForCausalLM

    from sae.harvest.mini import WEIGHTS

    folder = tmp_path_factory.mktemp("models") / "tiny-gemma"
    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=8192, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, query_pre_attn_scalar=16, pad_token_id=0, eos_token_id=1, bos_token_id=2,
    )  # fmt: skip
    model = Gemma2ForCausalLM(config)
    for name, parameter in model.named_parameters():  # with transformers' default init the blocks change almost nothing
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.3 if "embed" in name else 0.2)
    model.to(torch.bfloat16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(WEIGHTS).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def sentences(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A JSONL file of 120 short documents of random words, always the same."""
    import json
    import random

    text = "the quick brown fox jumps over a lazy dog while seven zebras quietly read their yellow books in june"
    words = text.split()
    rng = random.Random(0)
    path = tmp_path_factory.mktemp("text") / "sentences.jsonl"
    lines = [json.dumps({"text": " ".join(rng.choices(words, k=rng.randrange(20, 200)))}) for _ in range(120)]
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture(scope="session")
def tiny_cache(tiny_model: Path, sentences: Path, tmp_path_factory: pytest.TempPathFactory) -> "Cache":
    """A cache of layers 0 and 1 of `tiny_model` on `sentences`, 8,000 rows in four windows of 2,048. Do not modify."""
    from sae.harvest.plan import HarvestConfig, plan_harvest
    from sae.harvest.run import run_harvest

    out = tmp_path_factory.mktemp("activations") / "tiny"
    config = HarvestConfig(
        model=str(tiny_model), dataset=str(sentences), layers=(0, 1), tokens=8000, context=32, window=2048,
        held_out=0.1, device="cpu", out=out,
    )  # fmt: skip
    return run_harvest(plan_harvest(config))


@pytest.fixture(scope="session")
def launcher(tmp_path_factory: pytest.TempPathFactory) -> Iterator["WorkerProcess"]:
    """A process that has imported everything and forks commands; see forked_ranks.py, whose functions it calls."""
    from .worker_process import WorkerProcess

    log = tmp_path_factory.mktemp("launcher") / "log"
    with contextlib.closing(WorkerProcess(["sae.tests.forked_ranks"], log)) as process:
        yield process


@pytest.fixture(scope="session")
def s3_endpoint() -> Iterator[str]:
    """The address of an S3 store on loopback, which runs in a separate process during the tests."""
    from .object_store import running_server

    with running_server() as endpoint:
        yield endpoint


@pytest.fixture
def bucket(s3_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """The address of a new bucket. The environment has fake credentials for it."""
    from .object_store import environment, make_bucket

    for name, value in environment(s3_endpoint).items():
        monkeypatch.setenv(name, value)
    return make_bucket(s3_endpoint)
