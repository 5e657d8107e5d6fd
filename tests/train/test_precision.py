"""`--precision`: the dtype of the products of a step, the runs that it distinguishes, and where it is refused."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import sae.train.variants  # noqa: F401  (registers the recipes)
from sae.cache.reader import Cache
from sae.common import precision
from sae.common.errors import DamagedError, UnavailableError, UsageError
from sae.common.files import digest_of
from sae.common.precision import autocast, default_precision, float32_products, recorded_precision, resolve_precision
from sae.common.schemas import RUN_RECORD
from sae.evaluate.neighbours import digest_of_system
from sae.train.checkpoint import load_training_state, training_state
from sae.train.loop import Trainer
from sae.train.memory import run_memory
from sae.train.passes import Resized
from sae.train.plan import TrainConfig, plan_training
from sae.train.recipe import find_recipe
from sae.train.run import run_training
from sae.train.sae import load_sae, read_run_record
from sae.train.variant import RunConfig

from ..recipes import FEW_QUICK
from .runs import make_config, train

STEPS = 4
LIKE_FLOAT32 = 0.02  # share of the loss by which products in bfloat16 may change it


@pytest.fixture
def processor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A function that makes /proc/cpuinfo list the given flags. With None there is no such file."""

    def pretend(flags: str | None) -> None:
        file = tmp_path / "cpuinfo"
        if flags is not None:
            file.write_text(f"processor\t: 0\nmodel name\t: amx_bf16 avx512_bf16\nflags\t\t: fpu {flags} sse\n")
        monkeypatch.setattr(precision, "CPUINFO", file)

    return pretend


@pytest.mark.parametrize("name", FEW_QUICK)
def test_every_recipe_takes_steps_in_bfloat16_on_a_cpu(name, make_variant, batches) -> None:
    """The state is finite, near that of a float32 run, has float32 master weights, and is bit-exact after a resume."""

    def new(kind: str) -> Trainer:
        return Trainer(make_variant(name, STEPS), STEPS, "cpu", precision=kind)

    def take(trainer: Trainer, steps: range) -> dict:
        for number in steps:
            trainer.run_periodic(number, trainer.step(batches[number]))
        return {n: t.clone() for n, t in training_state(trainer).items()}

    whole, other, later = new("bfloat16"), new("float32"), new("bfloat16")
    half = take(whole, range(STEPS // 2))
    state = take(whole, range(STEPS // 2, STEPS))
    take(other, range(STEPS))
    metrics, expected = whole.pop_metrics(), other.pop_metrics()
    assert all(tensor.isfinite().all() for tensor in state.values())
    assert {t.dtype for n, t in state.items() if n.startswith(("variant.sae.", "optimizer."))} == {torch.float32}
    assert abs(metrics["loss"] / expected["loss"] - 1) < LIKE_FLOAT32 and metrics["loss"] != expected["loss"]
    load_training_state(later, half)
    resumed = take(later, range(STEPS // 2, STEPS))
    assert [n for n in state if not torch.equal(state[n], resumed[n])] == []


def test_products_are_rounded_to_bfloat16_and_sums_are_not(make_trainer, batches) -> None:
    """The step's latents are a product of bfloat16 numbers, summed in float32 and rounded once.

    They stay in bfloat16.
    """
    step = Trainer(make_trainer("relu").variant, STEPS, "cpu", precision="bfloat16").step(batches[0])
    fresh = make_trainer("relu").variant.sae
    centered_BD = (step.x_BD - fresh.b_dec).bfloat16().double()
    expected_BF = (centered_BD @ fresh.W_enc.bfloat16().double() + fresh.b_enc).relu()
    assert step.f_BF.dtype == torch.bfloat16
    assert (step.f_BF - expected_BF).abs().max() <= expected_BF.detach().abs().max() * 2**-8
    assert step.recon_BD.dtype == step.x_BD.dtype == torch.float32


def test_the_settings_of_torch_are_a_runs_own_and_are_put_back(make_trainer, batches) -> None:
    """During a step, float32 means float32 and tf32 means tf32, forward and backward.

    Otherwise the user's setting holds.
    """
    backend, seen = torch.backends.cuda.matmul, []

    class Look(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            seen.append(backend.fp32_precision)
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            seen.append(backend.fp32_precision)
            return gradient

    before = (backend.fp32_precision, torch.get_float32_matmul_precision())
    for kind, setting in (("tf32", "tf32"), ("float32", "ieee"), ("bfloat16", "ieee")):
        trainer = Trainer(make_trainer("relu").variant, STEPS, "cpu", precision=kind)
        look_at = trainer.forward_losses

        def forward_losses(x_BD, look_at=look_at):
            step, losses = look_at(x_BD)
            return step, {name: Look.apply(loss) for name, loss in losses.items()}

        trainer.forward_losses = forward_losses  # type: ignore[method-assign]
        trainer.variant.mechanisms[0].after_step = lambda step: seen.append(backend.fp32_precision)  # type: ignore
        seen.clear()
        trainer.step(batches[0])
        # Two losses are seen forward and backward, and then after_step.
        assert set(seen[:-1]) == {setting} and len(seen) == 5 and seen[-1] == before[0]
        assert (backend.fp32_precision, torch.get_float32_matmul_precision()) == before
    with pytest.raises(ZeroDivisionError), float32_products("tf32"):
        1 / 0  # noqa: B018
    assert (backend.fp32_precision, torch.get_float32_matmul_precision()) == before


@pytest.mark.parametrize("parts", [1, 4])
@pytest.mark.parametrize("kind", ["bfloat16", "float32", "tf32"])
def test_every_pass_has_the_precision_of_the_run(make_trainer, batches, kind: str, parts: int) -> None:
    """The passes are those of a step, of its parts, of finding what a batch in parts keeps, and of calibration."""
    trainer, seen = Trainer(make_trainer("batchtopk").variant, STEPS, "cpu", parts, kind), []
    activation = trainer.variant.sae.activation[0]
    set_cut = activation.set_cut

    def look(pre_BF: torch.Tensor) -> tuple[str, torch.dtype]:
        return torch.backends.cuda.matmul.fp32_precision, pre_BF.dtype

    def cut(some, tokens: int) -> None:
        every = list(some)
        seen.extend(map(look, every))
        set_cut(every, tokens)

    activation.set_cut = cut
    trainer.variant.register_forward_hook(lambda _variant, _rows, step: seen.append(look(step.pre_BF)))
    trainer.forward(batches[0])
    assert len(seen) == (1 if parts == 1 else 2 * parts)
    trainer.backward(batches[0])
    expected = ("tf32" if kind == "tf32" else "ieee", torch.bfloat16 if kind == "bfloat16" else torch.float32)
    assert set(seen) == {expected} and len(seen) >= (2 if parts == 1 else 4 * parts)


@pytest.mark.parametrize("of_torch", ["tf32", "ieee"])
def test_a_setting_of_one_backend_alone_is_put_back_too(of_torch: str) -> None:
    """torch refuses to read its general setting while one backend has a setting of its own."""
    backend = torch.backends.cuda.matmul
    before = backend.fp32_precision
    try:
        backend.fp32_precision = of_torch
        with float32_products("float32"):
            assert backend.fp32_precision == "ieee"
        assert backend.fp32_precision == of_torch
    finally:
        backend.fp32_precision = before


def test_the_default_is_bfloat16_on_a_gpu_and_float32_on_a_cpu(processor, make_trainer) -> None:
    """Whatever the processor."""
    processor("avx512_bf16 amx_bf16")
    assert default_precision("cuda:1") == "bfloat16" and default_precision("cpu") == "float32"
    assert resolve_precision(None, "cuda") == "bfloat16" and resolve_precision(None, "cpu") == "float32"
    assert make_trainer("relu").precision == "float32"
    with autocast("bfloat16", "cpu"):
        assert torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") is torch.bfloat16
    with autocast("tf32", "cpu"), autocast("float32", "cpu"):
        assert not torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize(
    ("kind", "flags", "sentence"),
    [
        ("bfloat16", "avx512f", "--precision bfloat16 cannot be used: the processor has neither avx512_bf16 nor "
         r"amx_bf16 \(according to .*\)\. Use --precision float32\."),
        ("bfloat16", None, "it is not known whether the processor multiplies in bfloat16, because .*cpuinfo does"),
        ("tf32", "avx512_bf16", "tf32 cannot be used: the device is cpu, but only GPUs compute products in tf32. Use"),
    ],
)  # fmt: skip
def test_what_the_device_cannot_do_is_refused(sparse_cache, processor, kind, flags, sentence) -> None:
    processor(flags)
    with pytest.raises(UnavailableError, match=sentence):
        plan_training(make_config(sparse_cache, "relu", precision=kind))


@pytest.mark.parametrize("flag", ["avx512_bf16", "amx_bf16"])
def test_a_processor_with_bfloat16_is_found(sparse_cache, processor, flag: str) -> None:
    processor(flag)
    plan = plan_training(make_config(sparse_cache, "relu", precision="bfloat16"))
    assert "products in bfloat16; weights, moments and sums are in float32" in plan.describe()
    assert not any(line.startswith("products") for line in plan_training(make_config(sparse_cache, "relu")).describe())


def test_an_unknown_precision_is_refused(sparse_cache) -> None:
    with pytest.raises(UsageError, match="unknown precision 'fp16': expected float32, tf32 or bfloat16"):
        plan_training(make_config(sparse_cache, "relu", precision="fp16"))


def test_tf32_needs_a_gpu_that_has_it(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    with pytest.raises(UnavailableError, match="it needs a GPU of compute capability 8.0, but cuda:1 has 7.5"):
        resolve_precision("tf32", "cuda:1")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert resolve_precision("tf32", "cuda:1") == "tf32"


def test_a_run_in_bfloat16_is_another_run_and_resumes_as_it_was(sparse_cache: Cache, processor, tmp_path: Path) -> None:
    """A run killed after a checkpoint ends with the same bytes.

    Records of float32 runs have no entry for the precision, as before.
    """
    processor("avx512_bf16")
    config = make_config(sparse_cache, "topk", options=["k=4"], out=tmp_path / "a", precision="bfloat16")
    (run,) = train(config)
    (plain,) = train(replace(config, precision=None))
    assert plan_training(replace(config, precision="float32")).runs[0].folder == plain != run
    records = [read_run_record(folder) or {} for folder in (run, plain)]
    assert [record.get("precision") for record in records] == ["bfloat16", None]
    assert digest_of_system(records[0]) != digest_of_system(records[1])
    assert digest_of_system(records[1]) == digest_of_system({**records[1], "precision": "float32"})
    with torch.no_grad():
        assert not torch.equal(load_sae(run).W_enc, load_sae(plain).W_enc)
    again = tmp_path / "b" / run.name
    shutil.copytree(run, again)
    for name in ("sae.json", "sae.safetensors", "checkpoints/step-00000012"):
        path = again / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    run_training(plan_training(TrainConfig(resume=[again], device="cpu")))
    for name in ("sae.safetensors", "checkpoints/step-00000012/state.safetensors"):
        assert (run / name).read_bytes() == (again / name).read_bytes()


def test_a_started_run_keeps_its_precision(sparse_cache: Cache, processor, tmp_path: Path) -> None:
    processor("avx512_bf16")
    (run,) = train(make_config(sparse_cache, "relu", out=tmp_path, precision="bfloat16"))
    with pytest.raises(UsageError, match="--precision cannot be changed once a run has started"):
        plan_training(TrainConfig(resume=[run], precision="float32", device="cpu"))
    assert plan_training(TrainConfig(resume=[run], device="cpu")).runs[0].config.precision == "bfloat16"
    processor("avx2")
    with pytest.raises(
        UnavailableError, match=f"{run.name} was started with products in bfloat16 and can only continue with them"
    ):
        plan_training(TrainConfig(resume=[run], device="cpu"))
    record = {**(read_run_record(run) or {}), "precision": "float8"}
    (tmp_path / "run.json").write_text(json.dumps(record))
    with pytest.raises(DamagedError, match="precision"):
        RUN_RECORD.read(tmp_path / "run.json")


def test_runs_of_one_command_may_differ_in_their_precision(sparse_cache: Cache, processor, tmp_path: Path) -> None:
    """Runs of different precision are combined only by a resume. They share a pass, and each ends as it does alone."""
    processor("avx512_bf16")
    alone, shared = [], []
    for kind in ("bfloat16", "float32"):
        for out, folders in (("alone", alone), ("shared", shared)):
            config = make_config(sparse_cache, "relu", out=tmp_path / out, precision=kind)
            folders += train(config)
    for folder in shared:
        for name in ("sae.json", "sae.safetensors"):
            (folder / name).unlink()
        for later in (8, 12):
            shutil.rmtree(folder / f"checkpoints/step-{later:08d}")
    plan = plan_training(TrainConfig(resume=shared, device="cpu"))
    assert len(plan.passes) == 1
    run_training(plan)
    for one, other in zip(alone, shared, strict=True):
        assert (one / "sae.safetensors").read_bytes() == (other / "sae.safetensors").read_bytes()


def test_runs_of_earlier_versions_have_the_default_of_their_device(sparse_cache: Cache, tmp_path: Path) -> None:
    """A run on a GPU computed in bfloat16 without recording it.

    The same command finds such a run under its old name.
    """
    assert recorded_precision({"device": "cuda:0", "asked": {}}) == "bfloat16"
    assert recorded_precision({"device": "cpu"}) == recorded_precision({}) == "float32"
    assert recorded_precision({"device": "cuda", "asked": {"precision": "float32"}}) == "float32"
    (run,) = train(make_config(sparse_cache, "relu", out=tmp_path))
    record = {**(read_run_record(run) or {})}
    gpu = {**record, "device": "cuda"}
    assert digest_of_system(gpu) == digest_of_system({**gpu, "precision": "bfloat16"}) != digest_of_system(record)
    named = make_config(sparse_cache, "relu", out=tmp_path, precision="bfloat16")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(precision, "cpu_flags", lambda: {"amx_bf16"})
        assert plan_training(named).runs[0].folder != run  # the run was trained on a CPU
        RUN_RECORD.write(run / "run.json", gpu)
        assert plan_training(named).runs[0].folder == run
    plain = make_config(sparse_cache, "relu", out=tmp_path)
    assert plan_training(plain).runs[0].done  # the command that trained a finished run finds it
    for unfinished in (False, True):
        if unfinished:
            (run / "sae.json").unlink()
        with pytest.raises(
            UsageError,
            match=f"{run.name} was started by an earlier version, which computed products on a GPU in .* bfloat16",
        ):
            plan_training(plain if unfinished else replace(plain, precision="float32"))
    assert RunConfig.from_record(gpu, None).precision == "bfloat16"
    assert "precision" not in RunConfig.from_record(record, None).identity()


def test_memory_is_planned_for_the_precision() -> None:
    def step(kind: str | None) -> int:
        config = RunConfig(64, 512, 100, 256, precision=kind)
        return run_memory(Resized(find_recipe("relu"), {}, None, config), "cpu").step

    assert step("bfloat16") != step("float32") == step(None)


def test_a_digest_covers_the_precision(sparse_cache: Cache, processor) -> None:
    processor("avx512_bf16")
    runs = [plan_training(make_config(sparse_cache, "relu", precision=kind)).runs[0] for kind in (None, "bfloat16")]
    assert runs[1].identity() == {**runs[0].identity(), "precision": "bfloat16"}
    assert all(run.name.endswith(digest_of(run.identity())[:6]) for run in runs)
    assert ["precision" in run.requested for run in runs] == [False, True]
