"""Runs from request to folder: what is refused, what survives a kill, a signal, damage and a batch of infinities."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from sae.cache.chunks import write_chunk
from sae.cache.loader import BatchOrder
from sae.cache.reader import open_cache
from sae.common.errors import Interrupted, SaeError, UsageError
from sae.common.files import read_json
from sae.train.checkpoint import restore_checkpoint, save_checkpoint, training_state
from sae.train.plan import TrainConfig, plan_training
from sae.train.run import TrainProgress, run_training
from sae.train.sae import load_sae

NAMES = ["batchtopk", "decorrelation", "relu", "topk"]


def request_of(cache, *variants: str, **changes) -> TrainConfig:
    """Twelve steps of 64 tokens, a checkpoint after every fourth."""
    settings = dict(
        layers=[0],
        caches=[cache.folder],
        steps=12,
        batch_size=64,
        width="128",
        device="cpu",
        checkpoint_every=4,
        log_every=2,
    )
    return TrainConfig(list(variants), **settings | changes)


def train(request: TrainConfig, report: TrainProgress | None = None) -> list[Path]:
    plan = plan_training(request)
    run_training(plan, report or TrainProgress())
    return [run.folder for run in plan.runs]


def checkpoints(folder: Path) -> list[str]:
    return [path.name for path in sorted((folder / "checkpoints").glob("*"))]


def test_a_run_folder_holds_what_a_reader_needs(sparse_cache) -> None:
    (folder,) = train(request_of(sparse_cache, "batchtopk", options=["k=4"]))
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4, 6, 8, 10, 12]
    assert lines[-1]["tokens"] == 12 * 64 and {"loss", "mse", "aux", "l0", "dead", "threshold"} <= lines[0].keys()
    assert all(line["l0"] == 4 for line in lines)
    assert checkpoints(folder) == ["step-00000008", "step-00000012"]  # the last two
    record = read_json(folder / "run.json")
    assert (record["options"], record["resolved"]["k"], record["steps"]) == ({"k": 4}, 4, 12)
    sae = load_sae(folder)
    assert (sae.d_in, sae.d_sae, sae.origin["hook_name"]) == (32, 128, "blocks.0.hook_resid_post")
    assert float(sae.activation[0].threshold) > 0


def test_the_same_command_does_not_train_twice(sparse_cache) -> None:
    request, said = request_of(sparse_cache, "relu"), []
    (folder,) = train(request)
    before = (folder / "sae.safetensors").stat().st_mtime_ns
    assert train(request, TrainProgress(say=said.append)) == [folder]
    assert said == [f"{folder} is already trained."]
    assert (folder / "sae.safetensors").stat().st_mtime_ns == before


def test_what_is_asked_for_twice_is_trained_once(sparse_cache) -> None:
    assert len(plan_training(request_of(sparse_cache, "relu", "relu", seeds=[0, 0, 1], layers=[0, 0])).runs) == 2


def test_layers_seeds_and_batch_sizes_are_streams_of_their_own(sparse_cache, tmp_path: Path) -> None:
    """Two layers and two seeds at once give the bits of one of them alone; seeds and layers differ."""
    folders = train(request_of(sparse_cache, "relu", layers=[0, 1], seeds=[0, 1]))
    (alone,) = train(request_of(sparse_cache, "relu", layers=[1], seeds=[1], out=tmp_path / "alone"))
    weights = [(folder / "sae.safetensors").read_bytes() for folder in folders]
    assert weights[3] == (alone / "sae.safetensors").read_bytes()
    assert len(set(weights)) == 4


# --- what stops a run, and going on ------------------------------------------------------------------------------


def command(cache, out: Path) -> list[str]:
    variants = [word for name in NAMES for word in ("--variant", name)]
    return [
        sys.executable, "-m", "sae", "train", *variants, "--layer", "0", "--cache", str(cache.folder), "--steps", "120",
        "--batch-size", "64", "--width", "128", "--checkpoint-every", "10", "--out", str(out),
    ]  # fmt: skip


def wait_for_checkpoint(process: subprocess.Popen, out: Path, at_least: int) -> None:
    """Until every run of the stream has a whole checkpoint of that step."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if len(list(out.glob(f"*/checkpoints/step-{at_least:08d}/state.json"))) == len(NAMES):
            return
        time.sleep(0.01)
    raise AssertionError(f"no checkpoint {at_least} of all: {process.communicate()}")


def test_a_stream_that_is_killed_and_then_stopped_ends_as_one_that_was_not(sparse_cache, tmp_path: Path) -> None:
    """120 steps = some, SIGKILL, some more, SIGTERM, and the rest, each in a process of its own. Bit for bit."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    said = ""
    for at_least, number in ((10, signal.SIGKILL), (40, signal.SIGTERM)):
        process = subprocess.Popen(command(sparse_cache, stopped), env=environment, stderr=subprocess.PIPE, text=True)
        wait_for_checkpoint(process, stopped, at_least)
        process.send_signal(number)
        _, said = process.communicate(timeout=120)
    assert process.returncode == 130 and "everything is saved" in said and f"sae train --resume {stopped}" in said
    runs = {}
    for out in (whole, stopped):
        request = request_of(sparse_cache, *NAMES, steps=120, checkpoint_every=10, log_every=60, out=out)
        runs[out] = {folder.name: folder for folder in train(request)}
    assert runs[whole].keys() == runs[stopped].keys() and len(runs[whole]) == len(NAMES)
    for name, folder in runs[whole].items():
        for file in ("sae.safetensors", "checkpoints/step-00000120/state.safetensors"):
            assert (runs[stopped][name] / file).read_bytes() == (folder / file).read_bytes(), (name, file)


def test_a_stop_request_saves_and_names_the_command_that_goes_on(sparse_cache, tmp_path: Path) -> None:
    request = request_of(sparse_cache, "relu", "topk", out=tmp_path / "stopped", log_every=1)
    whole = train(request_of(sparse_cache, "relu", "topk", out=tmp_path / "whole"))

    def press(number: int, *_: object) -> None:
        if number == 6:
            signal.raise_signal(signal.SIGINT)

    plan = plan_training(request)
    with pytest.raises(Interrupted, match="Stopped after step 7; everything is saved") as stopped:
        run_training(plan, TrainProgress(step=press))
    folders = [run.folder for run in plan.runs]
    assert stopped.value.exit_code == 130
    assert all(f"--resume {folder}" in str(stopped.value) for folder in folders)
    assert [checkpoints(folder)[-1] for folder in folders] == ["step-00000007"] * 2
    train(TrainConfig(resume=folders, device="cpu"))
    for left, right in zip(folders, whole, strict=True):
        assert (left / "sae.safetensors").read_bytes() == (right / "sae.safetensors").read_bytes()


def test_a_run_killed_between_its_last_checkpoint_and_its_end_is_finished(sparse_cache) -> None:
    request = request_of(sparse_cache, "batchtopk")
    (folder,) = train(request)
    weights = (folder / "sae.safetensors").read_bytes()
    (folder / "sae.json").unlink()
    (folder / "sae.safetensors").unlink()
    (folder / "metrics.jsonl").open("a").write('{"step": 12, "lo')  # cut off by the kill
    train(request)
    assert (folder / "sae.safetensors").read_bytes() == weights
    assert [json.loads(line)["step"] for line in (folder / "metrics.jsonl").open()] == [2, 4, 6, 8, 10, 12]


@pytest.mark.parametrize("damage", ["truncated", "flipped", "bad json", "no json", "no tensors"])
def test_a_damaged_checkpoint_is_passed_over_and_does_not_outlive_the_next(
    sparse_cache, tmp_path: Path, damage: str
) -> None:
    request, said = request_of(sparse_cache, "relu"), []
    (folder,) = train(request)
    weights = (folder / "sae.safetensors").read_bytes()
    (folder / "sae.json").unlink()
    newest = folder / "checkpoints" / "step-00000012"
    data = (newest / "state.safetensors").read_bytes()
    if damage == "truncated":
        (newest / "state.safetensors").write_bytes(data[:-100])
    elif damage == "flipped":
        (newest / "state.safetensors").write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    elif damage == "bad json":
        (newest / "state.json").write_text('{"format": 1, "st')
    elif damage == "no json":
        (newest / "state.json").unlink()
    else:
        (newest / "state.safetensors").unlink()
    train(request, TrainProgress(say=said.append))
    assert "Skipping the checkpoint step-00000012" in said[0] and said[1] == f"{folder.name} resumes from step 8."
    assert (folder / "sae.safetensors").read_bytes() == weights


def test_checkpoints_of_an_abandoned_future_do_not_push_out_whole_ones(training_of, tmp_path: Path) -> None:
    """Two damaged ones with higher numbers, and one that is written now: it must stay."""
    training = training_of("relu")
    for step in (900, 1000):
        save_checkpoint(training, tmp_path, step)
        (tmp_path / "checkpoints" / f"step-{step:08d}" / "state.json").unlink()
    save_checkpoint(training, tmp_path, 50)
    assert restore_checkpoint(training, tmp_path, pytest.fail) == 50


def test_a_checkpoint_of_another_version_is_refused_and_kept(sparse_cache) -> None:
    request = request_of(sparse_cache, "relu")
    (folder,) = train(request)
    (folder / "sae.json").unlink()
    state = folder / "checkpoints" / "step-00000012" / "state.json"
    state.write_text(json.dumps(read_json(state) | {"format": 99}))
    with pytest.raises(UsageError, match="checkpoint of format 99; this version reads 1"):
        train(request)
    assert state.exists()


def test_a_checkpoint_of_other_parts_is_refused(training_of, tmp_path: Path) -> None:
    save_checkpoint(training_of("relu"), tmp_path, 3)
    with pytest.raises(UsageError, match="holds other tensors than this version's variant has"):
        restore_checkpoint(training_of("batchtopk"), tmp_path, pytest.fail)


def test_a_checkpoint_holds_every_tensor_of_the_variant_and_the_optimizer(training_of, batches) -> None:
    training = training_of("batchtopk")
    training.step(batches[0])
    names = set(training_state(training))
    assert {"i", "failed_at", "variant.scale", "variant.mean_D", "variant.sae.activation.0.threshold"} <= names
    for parameter in ("W_enc", "W_dec", "b_enc", "b_dec"):
        assert {f"optimizer.sae.{parameter}.{key}" for key in ("step", "exp_avg", "exp_avg_sq")} <= names


def test_a_batch_of_infinities_ends_the_run_and_keeps_its_last_checkpoint(sparse_cache, tmp_path: Path) -> None:
    """A row of the cache is infinite, and read at a known step. The checkpoint before it is kept."""
    folder = tmp_path / "cache"
    shutil.copytree(sparse_cache.folder, folder)
    cache = open_cache(folder)
    piece = BatchOrder(cache.chunk_rows, 64, 0).spans(9)[5]
    bits = cache.read_chunk("layer_00", piece.chunk).copy()
    bits[piece.start, 3] = torch.tensor(math.inf, dtype=torch.bfloat16).view(torch.int16).numpy().view(np.uint16)
    file, record = write_chunk(folder, cache.array("layer_00"), piece.chunk, bits)
    manifest = read_json(folder / "manifest.json")
    manifest["files"][file] = record  # whole and as recorded: only the values are bad
    (folder / "manifest.json").write_text(json.dumps(manifest))
    said: list[str] = []
    request = request_of(open_cache(folder), "relu", "topk", out=tmp_path / "runs")
    plan = plan_training(request)
    with pytest.raises(SaeError, match=r"not finite at step 9 \(batch 9 of shuffle seed 0\)") as failed:
        run_training(plan, TrainProgress(say=said.append))
    assert failed.value.exit_code == 1 and "--set relu.lr=" in str(failed.value) and len(said) == 2
    for run in plan.runs:
        assert checkpoints(run.folder) == ["step-00000004", "step-00000008"] and not run.done


def test_a_run_that_diverges_does_not_stop_the_others(sparse_cache, tmp_path: Path) -> None:
    (alone,) = train(request_of(sparse_cache, "topk", out=tmp_path / "alone"))
    request = request_of(sparse_cache, "relu", "topk", out=tmp_path / "both", options=["relu.lr=1e30", "relu.warmup=0"])
    plan = plan_training(request)
    runs = plan.runs
    with pytest.raises(SaeError, match="relu.*not finite at step") as failed:
        run_training(plan)
    assert "topk" not in str(failed.value) and "there is no checkpoint yet" in str(failed.value)
    assert not runs[0].done and runs[1].done
    assert (runs[1].folder / "sae.safetensors").read_bytes() == (alone / "sae.safetensors").read_bytes()


# --- what is refused -----------------------------------------------------------------------------------------------


def refusal(cache, *variants: str, **changes) -> str:
    """The sentence, and that nothing was written."""
    with pytest.raises(UsageError) as refused:
        plan_training(request_of(cache, *variants, **changes))
    assert not Path("runs").exists()
    return str(refused.value)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"options": ["kk=3"]}, "topk has no option kk; did you mean k?"),
        ({"options": ["k=three"]}, "k='three' has the wrong type: expected int."),
        ({"options": ["k=3.5"]}, "k=3.5 has the wrong type: expected int."),
        ({"options": ["k=true"]}, "k=True has the wrong type: expected int."),
        ({"options": ["k=0"]}, "k=0 latents cannot be kept of 128: give 1 to 128"),
        ({"options": ["k=129"]}, "k=129 latents cannot be kept of 128: give 1 to 128"),
        ({"options": ["k_anneal_steps=13"]}, "k_anneal_steps=13 is negative or longer than the run of 12 steps."),
        ({"options": ["k_start=64"]}, "k_start=64 has no effect without k_anneal_steps"),
        (
            {"options": ["k_anneal_steps=6", "k_start=31"]},
            "k cannot fall from k_start=31 to k=32: set k_start from 32",
        ),
        ({"options": ["k_anneal_steps=6", "k_start=129"]}, "k cannot fall from k_start=129 to k=32"),
        ({"options": ["lr=0"]}, "lr=0 is not positive."),
        ({"options": ["lr=nan"]}, "lr=nan is not finite."),
        ({"options": ["aux=inf"]}, "aux=inf is not finite."),
        ({"options": ["aux_k=-1"]}, "invalid aux_k=-1: expected 1 or more."),
        ({"options": ["warmup=13"]}, "warmup=13 is negative or longer than the run of 12 steps."),
        ({"options": ["beta2=1.0"]}, "beta2=1 is out of range"),
        ({"options": ["weight_decay=-1"]}, "weight_decay=-1 is negative"),
        ({"options": ["clip=0"]}, "clip=0 would zero every gradient"),
        ({"options": ["decay_start=2"]}, "decay_start=2 is out of range"),
        ({"options": ["normalize=rms"]}, "normalize=rms is unknown: unit_ms, none."),
        ({"options": ["b_dec_init=median"]}, "b_dec_init=median is unknown: mean, zero."),
        ({"options": ["k"]}, "--set k has no value"),
        ({"options": ["relu.l1=1"]}, "relu is not one of the variants topk"),
        ({"width": "0"}, "the width 0 is not positive."),
        ({"width": "wide"}, "invalid --width wide"),
        ({"width": "infx"}, "invalid --width infx"),
        ({"steps": 0}, "--steps 0 would train nothing."),
        ({"batch_size": 0}, "--batch-size 0 is not positive."),
        ({"batch_size": 5000}, "fewer than one batch of 5,000"),
        ({"layers": [7]}, "holds layer 0, layer 1, not layer 7"),
    ],
    ids=lambda value: next(iter(value.values())) if isinstance(value, dict) else "",
)
def test_bad_options_are_refused_with_a_sentence(sparse_cache, changes: dict, sentence: str) -> None:
    assert sentence in refusal(sparse_cache, "topk", **changes)


@pytest.mark.parametrize(
    ("variant", "options", "sentence"),
    [
        ("relu", ["l1_warmup=13"], "l1_warmup=13 is negative or longer than the run of 12 steps."),
        ("collapse-07", ["alpha_warmup=-1"], "alpha_warmup=-1 is negative or longer than the run of 12 steps."),
        ("collapse-07", ["groups=7"], "128 cannot be divided into 7 equal groups"),
        ("collapse-02", ["contrast_power=-1"], "invalid contrast_power=-1: expected a positive exponent."),
        ("matryoshka", ["prefixes=99"], "invalid prefixes=99: 128 latents can be halved into 1 to 8 prefixes"),
        ("switch", ["experts=3"], "128 latents cannot be divided into 3 equal experts"),
        ("jumprelu", ["l0=0", "bandwidth=0"], "invalid l0=0: expected a positive number of latents per token"),
        ("jumprelu-tanh", ["bandwidth=-1"], "bandwidth=-0.1"),
        ("decorrelation", ["fraction=2"], "invalid fraction=2: expected a share of the pairs"),
        ("progressive", ["temperature=0"], "invalid temperature=0: expected a positive number."),
        ("progressive", ["competition=max"], "competition=max is unknown: softmax_peak, softmax, "),
    ],
    ids=lambda value: value if isinstance(value, str) and len(value) < 16 else "",
)
def test_bad_options_of_other_recipes_are_refused_too(sparse_cache, variant: str, options: list, sentence: str) -> None:
    assert sentence in refusal(sparse_cache, variant, options=options)


def test_an_int_is_a_float_where_one_is_meant(sparse_cache) -> None:
    (folder,) = train(request_of(sparse_cache, "jumprelu", options=["threshold=0", "beta1=0"]))
    assert load_sae(folder).activation[0].threshold.dtype == torch.float32


def test_what_the_types_say_and_what_the_builder_finds_is_said_together(sparse_cache) -> None:
    said = refusal(
        sparse_cache, "collapse-10", options=["near=here", "groups=7", "gamma=-1", "lr=-1", "beta=x", "budgett=1"]
    )
    for sentence in (
        "near=here is unknown: encoder, decoder.", "7 equal groups", "invalid gamma=-1: expected 0 or more",
        "lr=-1 is not positive",
        "beta='x' has the wrong type: expected float", "collapse-10 has no option budgett; did you mean budget?",
    ):  # fmt: skip
        assert sentence in said


def test_an_unknown_variant_is_refused_with_the_nearest() -> None:
    with pytest.raises(UsageError, match="no variant 'topkk'; did you mean topk?"):
        plan_training(TrainConfig(["topkk"]))


def test_everything_that_is_wrong_is_said_at_once(sparse_cache) -> None:
    said = refusal(
        sparse_cache,
        "topk",
        "relu",
        options=["topk.k=1000", "lr=0", "warmup=99", "topk.aux=x", "relu.l1_warm=1", "beta1=2"],
    )
    for sentence in (
        "The variant topk cannot be built", "k=1000 latents cannot be kept", "lr=0 is not positive",
        "warmup=99 is negative or longer", "aux='x' has the wrong type: expected float", "beta1=2 is out of range",
        "The variant relu cannot be built", "relu has no option l1_warm; did you mean l1_warmup?",
    ):  # fmt: skip
        assert sentence in said


def test_a_bare_option_goes_to_the_variants_that_have_it(sparse_cache) -> None:
    runs = plan_training(
        request_of(sparse_cache, "relu", "topk", options=["k=8", "lr=1e-3", "topk.lr=2e-3", "warmup=none"])
    ).runs
    assert [run.options for run in runs] == [{"lr": 1e-3, "warmup": None}, {"k": 8, "lr": 2e-3, "warmup": None}]


def test_widths_are_numbers_multiples_and_kilos(sparse_cache) -> None:
    widths = {
        text: plan_training(request_of(sparse_cache, "relu", width=text)).runs[0].config.d_sae
        for text in ("96", "4x", "1.5x", "2k")
    }
    assert widths == {"96": 96, "4x": 128, "1.5x": 48, "2k": 2048}


def test_a_run_that_has_begun_cannot_be_changed(sparse_cache, another_cache) -> None:
    (folder,) = train(request_of(sparse_cache, "relu"))
    for changes, flag in [
        ({"steps": 99}, "--steps"),
        ({"options": ["l1=1"]}, "--set"),
        ({"seeds": (3,)}, "--seed"),
        ({"variants": ["topk"], "width": "4x"}, "--variant, --width"),
    ]:
        with pytest.raises(UsageError, match=f"^{flag} cannot be changed once a run has started"):
            plan_training(TrainConfig(resume=[folder], **changes))
    with pytest.raises(UsageError, match="is not what .* was trained on"):
        plan_training(TrainConfig(resume=[folder], caches=[another_cache.folder]))
    with pytest.raises(UsageError, match="holds no run"):
        plan_training(TrainConfig(resume=[folder.parent]))


def test_defaults_that_have_changed_since_a_run_began_are_named(sparse_cache) -> None:
    request = request_of(sparse_cache, "relu")
    (folder,) = train(request)
    (folder / "sae.json").unlink()
    record = read_json(folder / "run.json")
    record["resolved"]["l1"] = 0.5  # as if the version that began it had another default
    (folder / "run.json").write_text(json.dumps(record))
    with pytest.raises(UsageError, match=r"started with other options \(l1 was 0.5, is 0.04\)"):
        train(request)


def test_the_folder_is_named_by_everything_that_decides_the_result(sparse_cache, another_cache) -> None:
    base = request_of(sparse_cache, "relu")
    variations = [
        base, request_of(sparse_cache, "relu", steps=13), request_of(sparse_cache, "relu", options=["lr=1e-3"]),
        request_of(sparse_cache, "relu", shuffle_seed=1), request_of(another_cache, "relu"),
        request_of(sparse_cache, "relu", batch_size=32),
    ]  # fmt: skip
    assert len({plan_training(request).runs[0].name for request in variations}) == len(variations)
    assert (
        plan_training(base).runs[0].name
        == plan_training(request_of(sparse_cache, "relu", log_every=1, checkpoint_every=1)).runs[0].name
    )
