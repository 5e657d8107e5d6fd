"""A harvest writes what the model computes, each row once, and nothing that is held out."""

import shutil
import signal
import threading
import time
from collections import Counter, namedtuple
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from sae.cache.context_format import ContextFormat
from sae.cache.hooks import Hook
from sae.cache.layout import Layout, fingerprint_of
from sae.cache.reader import Cache
from sae.cache.writer import CacheWriter
from sae.common.cache_schemas import CACHE_RECORD
from sae.common.errors import DamagedError, Interrupted, UnavailableError, UsageError
from sae.common.files import read_json
from sae.common.locks import writer_lock
from sae.harvest.description import describe_harvest, describe_time
from sae.harvest.hooked import HookedModel
from sae.harvest.model import LanguageModel, find_model, load_model, load_tokenizer
from sae.harvest.module_io import output_tensor
from sae.harvest.plan import HarvestConfig, plan_harvest
from sae.harvest.progress import HarvestProgress
from sae.harvest.run import harvest_activations, run_harvest

from .written import files_of

SPECIAL = {0, 1, 2}  # pad, eos, bos


def layer_rows(cache: Cache, layer: int) -> Tensor:
    """(rows, d_in) float64"""
    chunks = [cache.read_chunk(cache.require_array(layer), n) for n in range(len(cache.chunk_rows))]
    return torch.from_numpy(np.concatenate(chunks)).view(torch.bfloat16).double()


def origins(cache: Cache) -> tuple[np.ndarray, np.ndarray]:
    windows = range(cache.layout.n_windows)
    return tuple(np.concatenate([cache.read_chunk(name, w) for w in windows]) for name in ("row_ctx", "row_pos"))


@pytest.fixture(scope="module")
def small(tiny_model: Path, sentences: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[HarvestConfig, Cache]:
    """A harvest of both layers, with 600 rows in windows of 256."""
    request = HarvestConfig(
        model=str(tiny_model), dataset=str(sentences), layers=(0, 1), tokens=600, context=32, window=256, held_out=0.2,
        device="cpu", batch_contexts=8, out=tmp_path_factory.mktemp("small") / "cache",
    )  # fmt: skip
    return request, run_harvest(plan_harvest(request))


@pytest.fixture
def again(small: tuple[HarvestConfig, Cache], tmp_path: Path) -> HarvestConfig:
    """The harvest of `small`, already complete, in a separate folder for one test."""
    request, cache = small
    return replace(request, out=Path(shutil.copytree(cache.folder, tmp_path / "again")))


@pytest.fixture
def model(tiny_model: Path) -> LanguageModel:
    source, config = find_model(str(tiny_model))
    return load_model(source, config, dtype="float32", device="cpu")


def test_rows_are_those_of_a_hook_placed_by_hand(tiny_cache: Cache, model: LanguageModel) -> None:
    contexts, (ctx, pos) = tiny_cache.contexts(held_out=False), origins(tiny_cache)
    rows = {layer: layer_rows(tiny_cache, layer) for layer in (0, 1)}
    seen: dict[int, Tensor] = {}
    handles = [
        model.blocks[layer].register_forward_hook(
            lambda _m, _i, out, layer=layer: seen.update({layer: output_tensor(out)})
        )
        for layer in (0, 1)
    ]
    for context in range(0, len(contexts), 29):
        ids = contexts.ids[context, : contexts.length[context]].astype(np.int64)
        with torch.no_grad():
            model.trunk(torch.from_numpy(ids)[None])
        mine = np.flatnonzero(ctx == context)
        assert len(mine) == len(ids) - 1  # all but BOS
        for layer in (0, 1):
            expected = seen[layer][0, pos[mine].astype(np.int64)].double()
            # One context has other matrix products than 32 contexts; this adds float32 noise. Rounding to bfloat16
            # adds half of 2^-7 of the number, or a whole step where the noise crosses a rounding boundary.
            assert torch.allclose(rows[layer][mine], expected, rtol=2**-7, atol=1e-4)
    for handle in handles:
        handle.remove()


def test_every_kept_position_is_one_row(tiny_cache: Cache) -> None:
    contexts, (ctx, pos) = tiny_cache.contexts(held_out=False), origins(tiny_cache)
    kept = ContextFormat(2, tuple(SPECIAL)).row_mask(contexts)
    assert Counter(zip(ctx.tolist(), pos.tolist(), strict=True)) == Counter(map(tuple, np.argwhere(kept).tolist()))
    assert len(ctx) == tiny_cache.rows == 8000
    assert not SPECIAL.intersection(contexts.ids[ctx, pos].tolist()) and (pos < contexts.length[ctx]).all()
    assert int(contexts.length.sum()) - tiny_cache.rows == len(contexts)  # one BOS each, and no other special token


def test_row_ctx_is_an_index_into_the_stored_tokens(tiny_cache: Cache) -> None:
    """A reader that does not know about held-out contexts therefore finds the same token."""
    stored = tiny_cache.read_chunk("tokens/ids", 0)
    ctx, pos = origins(tiny_cache)
    assert np.array_equal(stored[ctx, pos], tiny_cache.contexts(held_out=False).ids[ctx, pos])


def test_rows_are_shuffled_inside_their_window_only(tiny_cache: Cache) -> None:
    ctx, _ = origins(tiny_cache)
    windows = [ctx[w * 2048 : (w + 1) * 2048].astype(int) for w in range(tiny_cache.layout.n_windows)]
    assert all((np.diff(window) < 0).mean() > 0.4 for window in windows)
    assert all(one.max() <= two.min() for one, two in zip(windows, windows[1:], strict=False))


def test_held_out_documents_are_never_harvested(tiny_cache: Cache) -> None:
    harvested, held = tiny_cache.contexts(held_out=False), tiny_cache.contexts(held_out=True)
    assert len(held) and not set(harvested.document.tolist()) & set(held.document.tolist())
    assert origins(tiny_cache)[0].max() < len(harvested)


def test_special_tokens_are_kept_on_request(again: HarvestConfig) -> None:
    cache = run_harvest(plan_harvest(replace(again, keep_special=True, layers=(0,), out=None)))
    contexts, (ctx, pos) = cache.contexts(held_out=False), origins(cache)
    assert cache.rows == 600 == contexts.length.sum()
    assert set(contexts.ids[ctx[pos == 0], 0].tolist()) == {2} and (pos == 0).sum() == len(contexts)


def test_layers_together_are_each_alone(small: tuple[HarvestConfig, Cache], tmp_path: Path) -> None:
    request, both = small
    for layer in (0, 1):
        alone = run_harvest(plan_harvest(replace(request, layers=(layer,), out=tmp_path / str(layer))))
        assert alone.array_digest(f"layer_{layer:02d}") == both.array_digest(f"layer_{layer:02d}") and alone.layers == [
            layer
        ]


def test_a_layer_added_later_is_as_if_harvested_at_once(small: tuple[HarvestConfig, Cache], tmp_path: Path) -> None:
    request, both = small
    folder = tmp_path / "later"
    run_harvest(plan_harvest(replace(request, layers=(1,), out=folder)))
    before = {p: p.stat().st_mtime_ns for p in (folder / "layer_01").iterdir()}
    run_harvest(plan_harvest(replace(request, layers=(0, 1), out=folder)))  # the existing one stays untouched
    assert {p: p.stat().st_mtime_ns for p in (folder / "layer_01").iterdir()} == before
    assert files_of(folder) == files_of(both.folder)


def test_other_sites_are_added_row_for_row(small: tuple[HarvestConfig, Cache], tmp_path: Path) -> None:
    """mlp_out and attn_z of a cached row are those of the position that row_ctx and row_pos name."""
    request, both = small
    folder = Path(shutil.copytree(both.folder, tmp_path / "sites"))
    cache = run_harvest(plan_harvest(replace(request, layers=(1,), sites=("mlp_out", "attn_z"), out=folder)))
    assert cache.hooks == [Hook(0), Hook(1, "attn_z"), Hook(1, "mlp_out"), Hook(1)]
    source, config = find_model(request.model)
    model = load_model(source, config, dtype="float32", device="cpu", attention="eager")
    contexts, (ctx, pos) = cache.contexts(held_out=False), origins(cache)
    for row in range(0, cache.rows, 37):
        ids = torch.from_numpy(contexts.ids[ctx[row], : contexts.length[ctx[row]]].astype(np.int64))[None]
        for hook, x_NSD in model.capture_hooks(ids, cache.hooks).items():
            chunk = cache.read_chunk(hook.array, row // cache.layout.chunk_rows)
            stored = torch.from_numpy(chunk[row % cache.layout.chunk_rows].copy()).view(torch.bfloat16)
            torch.testing.assert_close(stored.float(), x_NSD[0, pos[row]], rtol=2**-7, atol=1e-3)


def test_a_compressed_harvest_holds_the_same_rows(small: tuple[HarvestConfig, Cache]) -> None:
    request, raw = small
    compressed = run_harvest(plan_harvest(replace(request, compress=True, out=None)))
    assert compressed.folder != raw.folder and compressed.layout.compress
    for array in ("layer_00", "layer_01"):
        for chunk in range(len(raw.chunk_rows)):
            assert np.array_equal(compressed.read_chunk(array, chunk), raw.read_chunk(array, chunk))
    assert len(list(compressed.verify())) == len(compressed.manifest["files"])


def test_running_out_of_memory_halves_the_pass(small: tuple[HarvestConfig, Cache], tmp_path: Path, monkeypatch) -> None:
    """Windows that are already committed keep their record. From then on the smaller number is recorded."""
    request, said = replace(small[0], out=tmp_path / "tight"), []
    capture = LanguageModel.capture_hooks
    passes = []

    def tight(model, ids_NS, hooks):
        passes.append(len(ids_NS))
        if len(passes) > 3 and len(ids_NS) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")
        return capture(model, ids_NS, hooks)

    monkeypatch.setattr(LanguageModel, "capture_hooks", tight)
    cache = run_harvest(plan_harvest(request), HarvestProgress(say=said.append))
    assert [line.partition(" These rows can differ in the last bit from rows ")[0] for line in said] == [
        f"cpu is out of memory: continuing with {n} contexts per pass." for n in (4, 2)
    ]
    assert said[1].endswith("harvest into another --out with --batch-contexts 2.")
    made = [
        read_json(p)["made_with"]["batch_contexts"] for p in sorted((cache.folder / "commits").glob("*.layer_01.json"))
    ]
    assert made[0] == 8 and made[-1] == 2
    np.testing.assert_allclose(layer_rows(cache, 1), layer_rows(small[1], 1), rtol=2**-6, atol=1e-2)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory"),
    ],
)
def test_a_context_that_does_not_fit_is_rejected(
    small: tuple[HarvestConfig, Cache], tmp_path: Path, monkeypatch, error
) -> None:
    def full(model, ids_NS, hooks):
        raise error

    monkeypatch.setattr(LanguageModel, "capture_hooks", full)
    with pytest.raises(
        UnavailableError, match="Not even one context of 32 tokens fits into the memory of cpu. Use a smaller"
    ):
        run_harvest(plan_harvest(replace(small[0], out=tmp_path / "none")))


def test_the_model_never_runs_more_than_a_window_ahead(
    small: tuple[HarvestConfig, Cache], tmp_path: Path, monkeypatch
) -> None:
    """There is memory for two windows: one waits to be written while the next is computed, and there is no third."""
    request = replace(small[0], window=128, out=tmp_path / "slow")
    second, done = threading.Event(), [0]
    write_window = CacheWriter.write_window

    def slow(writer, window, rows, made_with):
        if window == 0:
            assert second.wait(30)
            time.sleep(0.3)  # enough time to compute a third window
            assert done[-1] == 256
        write_window(writer, window, rows, made_with)

    def computed(rows: int, total: int) -> None:
        done.append(rows)
        if rows == 256:
            second.set()

    monkeypatch.setattr(CacheWriter, "write_window", slow)
    run_harvest(plan_harvest(request), HarvestProgress(computed))
    assert done == [0, 128, 256, 384, 512, 600]


def test_the_same_command_twice_writes_nothing(again: HarvestConfig) -> None:
    def state() -> dict[Path, int]:
        return {p: p.stat().st_mtime_ns for p in again.out.rglob("*") if p.name[0] != "."}

    before = state()
    assert run_harvest(plan_harvest(again)).layers == [0, 1]
    assert {p: t for p, t in state().items() if p != again.out} == {p: t for p, t in before.items() if p != again.out}


@pytest.mark.parametrize(
    "lost", ["layer_01/c.1.0", "row_pos/c.2", "layer_00.row_norm/c.0", "tokens/ids/c.0.0", "manifest.json"]
)
def test_the_same_command_restores_lost_files(
    small: tuple[HarvestConfig, Cache], again: HarvestConfig, lost: str
) -> None:
    (again.out / lost).unlink()
    with pytest.raises(DamagedError, match=f"{lost} is .*missing"):
        list(Cache(again.out).verify())
    cache = run_harvest(plan_harvest(again))
    assert files_of(again.out) == files_of(small[1].folder) and len(list(cache.verify())) == len(
        cache.manifest["files"]
    )


@pytest.mark.parametrize("torn", ["layer_01/zarr.json", "row_ctx/zarr.json", "harvest.json"])
def test_the_same_command_restores_a_record_that_it_can_write(
    small: tuple[HarvestConfig, Cache], again: HarvestConfig, torn: str
) -> None:
    (again.out / torn).write_bytes((again.out / torn).read_bytes()[:50])
    run_harvest(plan_harvest(again))
    assert files_of(again.out) == files_of(small[1].folder) | {
        "harvest.json": (again.out / "harvest.json").read_bytes()
    }


def test_a_finished_harvest_takes_no_time(small: tuple[HarvestConfig, Cache]) -> None:
    plan = plan_harvest(small[0])
    assert describe_time(plan) == "none: the cache is finished"
    more = plan_harvest(replace(small[0], sites=("resid_post", "mlp_out")))
    assert "of model time" in describe_time(more)


@pytest.mark.parametrize("share", [None, "2/3"])
def test_a_plan_looks_at_no_window_by_itself(small, tmp_path: Path, monkeypatch, share: str | None) -> None:
    """There can be billions of windows."""
    plan = plan_harvest(replace(small[0], tokens=10**12, window=256, out=tmp_path / "huge", share=share))
    monkeypatch.setattr(Layout, "row_range", lambda *_: pytest.fail("a window was looked at"))
    assert any(" of model time" in line for line in describe_harvest(plan)) and len(plan.windows_of_process) > 10**9


def test_a_plan_says_what_the_folder_holds(small: tuple[HarvestConfig, Cache], again: HarvestConfig) -> None:
    """A finished cache, other statistics, a new site and a half-written cache. Sizes count what is left to write."""
    request, cache = small
    plan = plan_harvest(request)
    said = f"cache    {cache.folder} is finished: it holds layer 0, layer 1, 600 rows; "
    assert describe_harvest(plan)[-1] == said + "nothing is left to do" and plan.bytes_to_write == 0
    assert not any(line.startswith("size") for line in describe_harvest(plan))
    other = plan_harvest(replace(request, max_norm=5.0))
    assert describe_harvest(other)[-1] == said + "only the statistics are computed again, for --max-norm 5.0"
    more = plan_harvest(replace(request, layers=(0,), sites=("resid_post", "mlp_out")))
    assert describe_harvest(more)[-1] == (
        f"cache    {cache.folder} holds layer 0, layer 1; mlp_out of layer 0 is added: 600 rows to harvest"
    )
    per_row = 2 * 32 + 4 + 6  # mlp_out and its norm, row_ctx and row_pos
    assert more.bytes_to_write == 600 * per_row
    assert any(line.startswith(f"size     600 tokens x {per_row} B = ") for line in describe_harvest(more))
    again.out.joinpath("commits/000001.layer_00.json").unlink()
    root = CACHE_RECORD.read(again.out / "zarr.json")
    root["attributes"]["complete"] = []
    CACHE_RECORD.write(again.out / "zarr.json", root)
    assert describe_harvest(plan_harvest(again))[-1] == (
        f"cache    {again.out} is begun: 1 of 3 windows, 256 rows to harvest"
    )


def test_the_estimate_is_for_the_blocks_up_to_the_last_hook(small: tuple[HarvestConfig, Cache], monkeypatch) -> None:
    """Layer 1 is the output of the second block, so 600 tokens pass through two blocks."""
    monkeypatch.setattr("sae.harvest.plan.block_seconds_per_token", lambda *_, **__: 0.5)
    for layers, seconds in (((0, 1), 600), ((1,), 600), ((0,), 300)):
        assert plan_harvest(replace(small[0], layers=layers, out=None)).estimated_seconds() == seconds


def test_a_long_context_is_timed_without_its_memory(small: tuple[HarvestConfig, Cache], monkeypatch) -> None:
    """The attention scores of 65,535 positions would take 34 GB for each pair of heads, even for short documents."""
    lengths, capture = [], HookedModel.capture

    def short(model, ids_NS, layers):
        lengths.append(ids_NS.shape[1])
        return capture(model, ids_NS[:, :64], layers)

    monkeypatch.setattr(HookedModel, "capture", short)
    assert plan_harvest(replace(small[0], context=65535, out=None)).estimated_seconds() > 0
    assert max(lengths) <= 2048


def test_a_second_harvest_into_the_folder_is_rejected(again: HarvestConfig) -> None:
    with (
        writer_lock(again.out, "sae harvest"),
        pytest.raises(UnavailableError, match=r"is being written by process \d+ on"),
    ):
        run_harvest(plan_harvest(again))


def test_another_harvest_into_the_folder_is_rejected(small: tuple[HarvestConfig, Cache], again: HarvestConfig) -> None:
    with pytest.raises(UsageError, match=r"holds another harvest .*\)\. Different: seed \(0, here 1\)\. Use another"):
        run_harvest(plan_harvest(replace(again, seed=1)))
    assert files_of(again.out) == files_of(small[1].folder)


def test_a_rejected_harvest_changes_nothing(small: tuple[HarvestConfig, Cache], tmp_path: Path) -> None:
    theirs = tmp_path / "theirs" / "deep" / "report.tmp-17"
    theirs.parent.mkdir(parents=True)
    theirs.write_text("a thesis")
    with pytest.raises(UsageError, match="holds deep, but no activation cache"):
        run_harvest(plan_harvest(replace(small[0], out=tmp_path / "theirs")))
    assert [p for p in (tmp_path / "theirs").rglob("*") if p.is_file()] == [theirs]


def test_the_same_harvest_at_another_revision_is_mentioned(small: tuple[HarvestConfig, Cache], home: Path) -> None:
    text = Path(shutil.copy(small[0].dataset, home))
    request = replace(small[0], dataset=str(text), out=None)
    older = run_harvest(plan_harvest(request))
    text.write_text(text.read_text() + '{"text": "one more line"}\n')
    told: list[str] = []
    assert plan_harvest(request, told.append).folder != older.folder
    # An earlier version of a file cannot be restored, so no option for it is named.
    assert told == [f"{older.folder} is the same harvest at another revision."]


def test_tokens_of_a_harvest_that_never_started_are_not_used(
    small: tuple[HarvestConfig, Cache], again: HarvestConfig
) -> None:
    for path in again.out.iterdir():
        if path.name != "tokens":
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    other = run_harvest(plan_harvest(replace(again, seed=1)))
    assert not np.array_equal(other.contexts(held_out=False).ids, small[1].contexts(held_out=False).ids)


IDENTITY = {
    "tokens": 601, "context": 33, "held_out": 0.3, "keep_special": True, "pack": True, "compress": True, "seed": 1,
    "window": 512, "storage_dtype": "uint16", "dtype": "bfloat16", "attention": "sdpa",
}  # fmt: skip


@pytest.mark.parametrize("name", IDENTITY)
def test_what_changes_a_byte_changes_the_folder(small: tuple[HarvestConfig, Cache], name: str) -> None:
    request = replace(small[0], out=None)
    assert plan_harvest(replace(request, **{name: IDENTITY[name]})).folder != plan_harvest(request).folder


def test_text_and_model_change_the_folder(small: tuple[HarvestConfig, Cache], tmp_path: Path, tiny_model: Path) -> None:
    request = replace(small[0], out=None)
    folder = plan_harvest(request).folder
    text = Path(shutil.copy(request.dataset, tmp_path))
    assert plan_harvest(replace(request, dataset=str(text))).folder == folder  # its location does not matter
    text.write_text(text.read_text() + '{"text": "one more"}\n')
    assert plan_harvest(replace(request, dataset=str(text))).folder != folder
    copy = Path(shutil.copytree(tiny_model, tmp_path / tiny_model.name))
    assert plan_harvest(replace(request, model=str(copy))).source.revision == plan_harvest(request).source.revision
    assert fingerprint_of(plan_harvest(replace(request, model=str(copy))).identity) == fingerprint_of(
        plan_harvest(request).identity
    )
    renamed = Path(shutil.copy(request.dataset, tmp_path / "renamed.jsonl"))
    assert fingerprint_of(plan_harvest(replace(request, dataset=str(renamed))).identity) == fingerprint_of(
        plan_harvest(request).identity
    )
    (copy / "generation_config.json").write_text("{}")
    assert plan_harvest(replace(request, model=str(copy))).source.revision != plan_harvest(request).source.revision


@pytest.mark.parametrize(
    "change",
    [
        {"layers": (1,)},
        {"layers": (1, 0, 1)},
        {"sites": ("mlp_out",)},
        {"batch_contexts": 3},
        {"max_norm": 4.0},
        {"device": "cpu"},
    ],
)
def test_layers_and_batches_do_not_change_the_folder(small: tuple[HarvestConfig, Cache], change: dict) -> None:
    request = replace(small[0], out=None)
    assert plan_harvest(replace(request, **change)).folder == plan_harvest(request).folder


def test_statistics_are_those_of_the_rows(tiny_cache: Cache) -> None:
    for layer in (0, 1):
        rows = layer_rows(tiny_cache, layer).numpy()
        np.testing.assert_allclose(tiny_cache.mean(f"layer_{layer:02d}"), rows.mean(0), rtol=1e-9, atol=1e-12)
        found = tiny_cache.statistics(f"layer_{layer:02d}")
        assert found["variance"] == pytest.approx(rows.var(0).mean(), rel=1e-9)
        assert found["mean_square_norm"] == pytest.approx((rows**2).sum(1).mean(), rel=1e-9)


Usage = namedtuple("Usage", "total used free")


def test_too_little_disk_space_is_an_error_before_anything_is_written(
    small: tuple[HarvestConfig, Cache], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = replace(small[0], out=tmp_path / "new")
    needed = int(600 * plan_harvest(request).bytes_per_token * 1.02)
    monkeypatch.setattr(shutil, "disk_usage", lambda _folder: Usage(0, 0, needed - 1000))
    with pytest.raises(
        UnavailableError, match=r"The harvest needs .* MB, but .* MB free. --tokens 59\d would fit"
    ) as refused:
        run_harvest(plan_harvest(request))
    assert refused.value.exit_code == 4 and not [p for p in request.out.iterdir() if p.name[0] != "."]
    # Without --tokens the whole text is requested, and only after cutting is it known to be too much.
    with pytest.raises(UnavailableError, match="would fit"):
        run_harvest(plan_harvest(replace(request, tokens=None, out=tmp_path / "all")))


def test_ctrl_c_keeps_what_is_committed(small: tuple[HarvestConfig, Cache], tmp_path: Path) -> None:
    request = replace(small[0], out=tmp_path / "stopped")

    def stop(done: int, total: int) -> None:
        if done > 256:
            raise KeyboardInterrupt

    with pytest.raises(Interrupted, match="Stopped. 1 of 3 windows are safe; run the same command again") as stopped:
        run_harvest(plan_harvest(request), HarvestProgress(stop))
    assert stopped.value.exit_code == 130
    run_harvest(plan_harvest(request))
    assert files_of(request.out) == files_of(small[1].folder)


@pytest.fixture
def interruptible():
    """A process that a shell starts in the background ignores Ctrl-C at first."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_a_second_ctrl_c_stops_at_once(small: tuple[HarvestConfig, Cache], tmp_path: Path, monkeypatch) -> None:
    """The first Ctrl-C waits until the window is written; the second does not."""
    request, said = replace(small[0], out=tmp_path / "stopped"), []
    writing, let_go, waited_for = threading.Event(), threading.Event(), threading.Event()

    def stuck(writer, window, rows, made_with):
        writing.set()
        if not let_go.wait(120):
            waited_for.set()

    def say(sentence: str) -> None:
        said.append(sentence)
        signal.raise_signal(signal.SIGINT)

    def stop(done: int, total: int) -> None:
        # the first window has been handed over by then, but its thread may start late
        if done > 256 and writing.wait(60):
            raise KeyboardInterrupt

    monkeypatch.setattr(CacheWriter, "write_window", stuck)
    with pytest.raises(Interrupted, match="Stopped. 0 of 3 windows are safe"):
        run_harvest(plan_harvest(request), HarvestProgress(stop, say))
    assert not waited_for.is_set()
    let_go.set()
    assert said == ["Stopping once the window being written is safe; press Ctrl-C again to stop at once."]


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"tokens": 0}, "invalid --tokens 0: expected 1 to"),
        ({"tokens": 2**40 + 1}, r"invalid --tokens 1099511627777: expected 1 to 2\^40"),
        ({"context": 1}, "invalid --context 1: expected 2 to 65,535"),
        ({"context": 65536}, "invalid --context 65536: expected 2 to 65,535"),
        ({"window": 8193}, "invalid --window 8193: expected a multiple of 8,192"),
        ({"window": 0}, "invalid --window 0: expected a multiple"),
        ({"window": 2**33}, "--window 8589934592 exceeds the number of tokens"),
        ({"model": ""}, "--model and --dataset cannot be empty"),
        ({"dataset": ""}, "--model and --dataset cannot be empty"),
        ({"held_out": 1.0}, "invalid --held-out 1.0: expected a share from 0"),
        ({"seed": -1}, "invalid --seed -1: expected 0 to"),
        ({"seed": 2**63}, "invalid --seed 9223372036854775808: expected 0 to"),
        ({"model": "gemma-2-mini", "dataset": None, "held_out": 0.1}, "--held-out has no effect on python-stdlib"),
        ({"model": "./nothere"}, "There is no folder ./nothere"),
        ({"revision": "abc"}, "--revision selects a commit on the Hub"),
        ({"sites": ("resid",)}, "unknown --site resid: expected one of resid_pre, resid_mid, .* output of a module of"),
        ({"modules": ("model.norm",), "sites": (), "layers": (0,), "origins": {"layer": "flag"}}, "--layer 0 has no "),
        ({"text_column": ""}, "--text-column cannot be empty"),
        ({"adapters": ("",)}, "--adapter cannot be empty"),
        ({"split": ""}, "--split cannot be empty"),
        ({"max_norm": float("-inf")}, "--max-norm -inf would mask at least half of the rows"),
        ({"max_norm": 1.0}, "--max-norm 1 would mask at least half of the rows"),
        ({"storage_dtype": "float16"}, "unknown --storage-dtype float16"),
        ({"dtype": "float64"}, "unknown dtype 'float64'"),
        ({"device": "tpu"}, "unknown device 'tpu'"),
        ({"layers": ()}, "There is nothing to harvest: give at least one layer and one site"),
        ({"sites": ()}, "There is nothing to harvest: give at least one layer and one site"),
        ({"layers": ("a",)}, "invalid layer 'a': expected a whole number"),
        ({"tokens": "1k"}, "invalid tokens '1k': expected a whole number"),
        ({"tokens": 1000.5}, "invalid tokens 1000.5: expected a whole number"),
        ({"layers": (0, 2)}, "has no layer 2: its 2 blocks are layers 0 to 1"),
        ({"model": "gemma-2-mini", "layers": (26,)}, "gemma-2-mini has no layer 26: its 26 blocks are layers 0 to 25"),
    ],
)  # fmt: skip
def test_invalid_options_are_rejected(small: tuple[HarvestConfig, Cache], wrong: dict, sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence) as refused:
        plan_harvest(replace(small[0], **wrong))
    assert refused.value.exit_code == 2


def test_modules_that_name_their_layer_need_no_other(small: tuple[HarvestConfig, Cache]) -> None:
    # the default layers lie beyond this model's blocks
    config = replace(small[0], layers=HarvestConfig.layers, sites=(), out=None)
    modules = ("model.layers.1.mlp.gate_proj", "model.embed_tokens")
    hooks = plan_harvest(replace(config, modules=modules)).hooks
    assert hooks == [Hook(0, "model.embed_tokens.output"), Hook(1, "mlp.gate_proj.output")]
    with pytest.raises(UsageError, match="has no layer 5"):
        plan_harvest(replace(config, modules=("model.layers.{layer}.mlp.gate_proj",)))


def test_the_tokenizer_s_own_words_come_back(small: tuple[HarvestConfig, Cache]) -> None:
    """The decoded rows consist of the words of the sentences and nothing else."""
    request, cache = small
    tokenizer = load_tokenizer(find_model(request.model)[0])
    contexts = cache.contexts(held_out=False)
    text = Path(request.dataset).read_text()
    for ids, length in zip(contexts.ids[:20], contexts.length[:20], strict=True):
        assert tokenizer.decode(ids[1:length].tolist()).strip() in text


# --- the public function --------------------------------------------------------------------------------------------


def test_harvest_activations_writes_what_the_plan_of_a_config_writes(
    small: tuple[HarvestConfig, Cache], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config, cache = small
    opened = harvest_activations(
        config.model, layers=[0, 1], dataset=Path(config.dataset), tokens=600, context=32, held_out=0.2,
        device="cpu", out=str(tmp_path / "public"), window=256, batch_contexts=8,
    )  # fmt: skip
    assert files_of(opened.folder) == files_of(cache.folder)
    assert capfd.readouterr() == ("", "")
    said: list[str] = []
    one = harvest_activations(
        config.model, layers=0, sites="mlp_out", dataset=config.dataset, tokens=600, context=32, held_out=0.2,
        device="cpu", out=opened.folder, window=256, batch_contexts=8, progress=HarvestProgress(say=said.append),
    )  # fmt: skip
    assert one.folder == opened.folder and Hook(0, "mlp_out") in one.hooks and one.layers == [0, 1]


@pytest.mark.parametrize(
    ("option", "sentence"),
    [
        ({"contexts": 32}, "harvest_activations has no option 'contexts'; did you mean context?"),
        ({"origins": {}}, "harvest_activations has no option 'origins'"),
        ({"layers": 2}, "has no layer 2: its 2 blocks"),
    ],
)
def test_harvest_activations_rejects_unknown_options(
    small: tuple[HarvestConfig, Cache], option: dict, sentence: str
) -> None:
    with pytest.raises(UsageError, match=sentence):
        harvest_activations(small[0].model, **{"dataset": small[0].dataset, **option})
