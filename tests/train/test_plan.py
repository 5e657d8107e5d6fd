"""Plans: what is rejected, with which message, and what decides a run's folder."""

from pathlib import Path

import pytest

from sae.cache.planned import PlannedCache
from sae.common.errors import UsageError
from sae.train.plan import TrainConfig, plan_training
from sae.train.run import build_variant, run_training

from .runs import make_config, train


def test_duplicates_are_trained_once(sparse_cache) -> None:
    assert len(plan_training(make_config(sparse_cache, "relu", "relu", seeds=[0, 0, 1], layers=[0, 0])).runs) == 2


def rejection(cache, *variants: str, **changes) -> str:
    """Check the message, and that nothing was written."""
    with pytest.raises(UsageError) as refused:
        plan_training(make_config(cache, *variants, **changes))
    assert not Path("runs").exists()
    return str(refused.value)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"options": ["kk=3"]}, "topk has no option kk; did you mean k?"),
        ({"options": ["k=three"]}, "k='three' has the wrong type: expected int."),
        ({"options": ["k=3.5"]}, "k=3.5 has the wrong type: expected int."),
        ({"options": ["k=true"]}, "k=True has the wrong type: expected int."),
        ({"options": ["k=0"]}, "k=0 is out of range: give 1 to 128"),
        ({"options": ["k=129"]}, "k=129 is out of range: give 1 to 128"),
        ({"options": ["k_anneal_steps=13"]}, "k_anneal_steps=13 is longer than the run of 12 steps"),
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
        ({"options": ["warmup=-1"]}, "warmup=-1 is negative."),
        ({"options": ["beta2=1.0"]}, "beta2=1 is out of range"),
        ({"options": ["weight_decay=-1"]}, "weight_decay=-1 is negative"),
        ({"options": ["clip=0"]}, "clip=0 would zero every gradient"),
        ({"options": ["decay_start=2"]}, "decay_start=2 is out of range"),
        (
            {"options": ["normalize=rms"]},
            "normalize=rms is unknown: expected one of unit_ms, standardize, layer_norm, none.",
        ),
        ({"options": ["b_dec_init=median"]}, "b_dec_init=median is unknown: expected one of mean, zero."),
        ({"options": ["k"]}, "--set k has no value"),
        ({"options": ["relu.l1=1"]}, "relu is not one of the variants topk"),
        ({"width": "0"}, "invalid --width 0"),
        ({"width": "wide"}, "invalid --width wide"),
        ({"width": "infx"}, "invalid --width infx"),
        ({"steps": 0}, "--steps 0 would train nothing."),
        ({"batch_size": 0}, "--batch-size 0 is not positive."),
        ({"batch_size": 5000}, "fewer than one batch of 5,000"),
        ({"layers": [7]}, "holds layer 0, layer 1, not layer 7"),
    ],
    ids=lambda value: next(iter(value.values())) if isinstance(value, dict) else "",
)
def test_bad_options_are_rejected(sparse_cache, changes: dict, sentence: str) -> None:
    assert sentence in rejection(sparse_cache, "topk", **changes)


@pytest.mark.parametrize(
    ("variant", "options", "sentence"),
    [
        ("relu", ["l1_warmup=-1"], "l1_warmup=-1 is negative."),
        ("collapse-07", ["alpha_warmup=-1"], "alpha_warmup=-1 is negative."),
        ("progressive", ["anneal_steps=-1"], "anneal_steps=-1 is negative."),
        ("switch", ["normalize=layer_norm", "center=true"], "center=true has no effect with normalize=layer_norm"),
        ("collapse-07", ["groups=7"], "128 latents cannot be divided into 7 equal groups"),
        ("collapse-02", ["contrast_power=-1"], "invalid contrast_power=-1: expected a positive exponent."),
        ("matryoshka", ["prefixes=99"], "invalid prefixes=99: 128 latents allow 1 to 8 prefixes"),
        ("switch", ["experts=3"], "128 latents cannot be divided into 3 equal experts"),
        ("jumprelu", ["l0=0", "bandwidth=0"], "invalid l0=0: expected a positive number of latents per token"),
        ("jumprelu-tanh", ["bandwidth=-1"], "bandwidth=-0.1"),
        ("decorrelation", ["fraction=2"], "invalid fraction=2: expected a share of the pairs"),
        ("progressive", ["temperature=0"], "invalid temperature=0: expected a positive number."),
        ("progressive", ["competition=max"], "competition=max is unknown: expected one of softmax_peak, softmax, "),
    ],
    ids=lambda value: value if isinstance(value, str) and len(value) < 16 else "",
)
def test_bad_options_of_other_recipes_are_rejected(sparse_cache, variant: str, options: list, sentence: str) -> None:
    assert sentence in rejection(sparse_cache, variant, options=options)


def test_type_errors_and_build_errors_are_reported_together(sparse_cache) -> None:
    said = rejection(
        sparse_cache, "collapse-10", options=["near=here", "groups=7", "gamma=-1", "lr=-1", "beta=x", "budgett=1"]
    )
    for sentence in (
        "near=here is unknown: expected one of encoder, decoder.", "7 equal groups",
        "invalid gamma=-1: expected 0 or more",
        "lr=-1 is not positive",
        "beta='x' has the wrong type: expected float", "collapse-10 has no option budgett; did you mean budget?",
    ):  # fmt: skip
        assert sentence in said


def test_an_unknown_variant_is_rejected_with_a_suggestion() -> None:
    with pytest.raises(UsageError, match="unknown variant 'topkk'; did you mean topk?"):
        plan_training(TrainConfig(["topkk"]))


def test_all_problems_are_reported_at_once(sparse_cache) -> None:
    said = rejection(
        sparse_cache,
        "topk",
        "relu",
        options=["topk.k=1000", "lr=0", "warmup=-9", "topk.aux=x", "relu.l1_warm=1", "beta1=2"],
    )
    for sentence in (
        "The variant topk cannot be built", "k=1000 is out of range", "lr=0 is not positive",
        "warmup=-9 is negative.", "aux='x' has the wrong type: expected float", "beta1=2 is out of range",
        "The variant relu cannot be built", "relu has no option l1_warm; did you mean l1_warmup?",
    ):  # fmt: skip
        assert sentence in said


def test_durations_longer_than_the_run_are_allowed_and_noted(sparse_cache) -> None:
    """Papers print such warm-ups. The note says how far the coefficient gets."""
    options = ["warmup=15", "decay_start=1.0", "l1_warmup=48"]
    lines = plan_training(make_config(sparse_cache, "relu", options=options)).describe()
    assert [line for line in lines if line.startswith("note")] == [
        "note     relu: l1_warmup=48 is longer than the run of 12 steps: only 25% of it takes place",
        "note     relu: warmup=15 is longer than the run of 12 steps: the learning rate reaches 80% of 0.0003",
    ]
    assert plan_training(make_config(sparse_cache, "topk", options=["k_anneal_steps=12"])).runs
    short = plan_training(make_config(sparse_cache, "relu", options=["warmup=12", "l1_warmup=12"])).describe()
    assert not [line for line in short if line.startswith("note")]


def test_none_is_the_string_in_options_that_have_it_and_else_nothing(sparse_cache) -> None:
    """`normalize` accepts the string "none", `clip` and `warmup` can be None, and other options can be neither."""
    config = make_config(sparse_cache, "collapse-03", "relu", options=["normalize=none", "clip=None", "warmup=none",
                                                                       "collapse-03.l1_controller=NONE"])  # fmt: skip
    shared = {"normalize": "none", "clip": None, "warmup": None}
    runs = plan_training(config).runs
    assert [run.options for run in runs] == [shared | {"l1_controller": "none"}, shared]
    built = build_variant(runs[0])
    assert built.optimization.normalize == "none" and built.optimization.clip is None
    assert built.options["l1_controller"] == "none"
    assert "lr=None has the wrong type: expected float" in rejection(sparse_cache, "relu", options=["lr=none"])
    given = plan_training(make_config(sparse_cache, "relu", options={"normalize": None, "clip": None}))
    assert given.runs[0].options == {"normalize": "none", "clip": None}


def test_a_bare_option_goes_to_the_variants_that_have_it(sparse_cache) -> None:
    runs = plan_training(
        make_config(sparse_cache, "relu", "topk", options=["k=8", "lr=1e-3", "topk.lr=2e-3", "warmup=none"])
    ).runs
    assert [run.options for run in runs] == [{"lr": 1e-3, "warmup": None}, {"k": 8, "lr": 2e-3, "warmup": None}]


def test_widths_are_numbers_multiples_and_kilos(sparse_cache) -> None:
    widths = {
        text: plan_training(make_config(sparse_cache, "relu", width=text)).runs[0].config.d_sae
        for text in ("96", "4x", "1.5x", "2k")
    }
    assert widths == {"96": 96, "4x": 128, "1.5x": 48, "2k": 2048}


def test_a_started_run_cannot_be_changed(sparse_cache, another_cache) -> None:
    (folder,) = train(make_config(sparse_cache, "relu"))
    for changes, flag in [
        ({"steps": 99}, "--steps"),
        ({"options": ["l1=1"]}, "--set"),
        ({"seeds": (3,)}, "--seed"),
        ({"variants": ["topk"], "width": "4x"}, "--variant, --width"),
        ({"layers": [0]}, "--layer"),
        ({"site": "mlp_out"}, "--site"),
        ({"model": "gpt2"}, "--model"),
        ({"batch_size": 32}, "--batch-size"),
        ({"l0": [8]}, "--l0"),
        ({"paper_exact": True}, "--paper-exact"),
        ({"shuffle_seed": 1}, "--shuffle-seed"),
        ({"out": Path("elsewhere")}, "--out"),
        ({"compiled": True}, "--compile"),
    ]:
        out = "Leave them out" if "," in flag else "Leave it out"
        with pytest.raises(UsageError, match=f"^{flag} cannot be changed once a run has started. {out}"):
            plan_training(TrainConfig(resume=[folder], **changes))
    with pytest.raises(UsageError, match="was not trained on the cache"):
        plan_training(TrainConfig(resume=[folder], caches=[another_cache.folder]))
    with pytest.raises(UsageError, match="is not a run folder"):
        plan_training(TrainConfig(resume=[folder.parent]))


def test_the_folder_is_named_by_everything_that_decides_the_result(sparse_cache, another_cache) -> None:
    base = make_config(sparse_cache, "relu")
    variations = [
        base, make_config(sparse_cache, "relu", steps=13), make_config(sparse_cache, "relu", options=["lr=1e-3"]),
        make_config(sparse_cache, "relu", shuffle_seed=1), make_config(another_cache, "relu"),
        make_config(sparse_cache, "relu", batch_size=32),
    ]  # fmt: skip
    assert len({plan_training(config).runs[0].name for config in variations}) == len(variations)
    assert (
        plan_training(base).runs[0].name
        == plan_training(make_config(sparse_cache, "relu", log_every=1, checkpoint_every=1)).runs[0].name
    )


# --- planning on a cache that is still to be harvested ------------------------------------------------------------


def planned(cache) -> PlannedCache:
    """The planned cache of a harvest plan."""
    return PlannedCache(cache.folder, cache.identity, cache.layout, {hook.array: 32 for hook in cache.hooks})


def test_a_plan_on_a_planned_cache_is_that_of_the_finished_cache(sparse_cache) -> None:
    sizes = dict(layers=[0, 1], seeds=[0, 1], l0=[8], steps=None, options={"lr": 1e-3})
    finished = plan_training(make_config(sparse_cache, "relu", "topk", **sizes))
    ahead = plan_training(make_config(sparse_cache, "relu", "topk", **sizes, caches=[], source=planned(sparse_cache)))
    assert [run.config for run in ahead.runs] == [run.config._replace(variance=None) for run in finished.runs]
    assert [run.options for run in ahead.runs] == [run.options for run in finished.runs]
    assert [len(runs) for runs in ahead.passes] == [len(runs) for runs in finished.passes] == [4, 4]
    for run, later in zip(ahead.runs, finished.runs, strict=True):
        assert run.name == later.name[:-6] + "*"
    assert ahead.describe()[-1].partition(";")[0] == finished.describe()[-1].partition(";")[0]  # the size
    assert ahead.runs[0].config.steps == sparse_cache.rows // 64


def test_a_planned_cache_is_not_trained_on(sparse_cache) -> None:
    plan = plan_training(make_config(sparse_cache, "relu", caches=[], source=planned(sparse_cache)))
    with pytest.raises(UsageError, match="has not been harvested yet. Harvest it, then plan again"):
        run_training(plan)
    with pytest.raises(UsageError, match="has not been harvested yet, so layer_00 has no digest"):
        plan.runs[0].identity()
    with pytest.raises(UsageError, match="covers layer 0, layer 1, not layer 7. Add `--layer 7`"):
        plan_training(make_config(sparse_cache, "relu", layers=[7], caches=[], source=planned(sparse_cache)))


def test_options_that_scale_with_an_unknown_variance_say_so(sparse_cache) -> None:
    plan = plan_training(make_config(sparse_cache, "hierarchical", caches=[], source=planned(sparse_cache)))
    assert any(
        "not scaled because the variance of the activations is not known yet" in line for line in plan.describe()
    )


def test_a_plan_describes_itself(sparse_cache) -> None:
    plan = plan_training(make_config(sparse_cache, "relu", "topk"))
    assert [line.split()[0] for line in plan.describe()] == ["train", "train", "size"]
    assert (
        plan.describe()[0] == f"train    relu 32 -> 128, layer 0, seed 0: 12 steps x 64 tokens -> {plan.runs[0].folder}"
    )
    assert [line.split()[0] for line in plan.describe(time=True)] == [
        "train",
        "train",
        "size",
        "saved",
        "memory",
        "time",
    ]


def test_a_note_that_holds_for_several_runs_is_said_once(sparse_cache) -> None:
    plan = plan_training(make_config(sparse_cache, "competition", seeds=[0, 1]))
    assert [line.split()[0] for line in plan.describe()] == ["train", "train", "note", "size"]


def test_a_plan_with_time_says_how_many_runs_go_on_from_a_checkpoint(sparse_cache) -> None:
    config = make_config(sparse_cache, "relu", "topk")
    first = plan_training(config).runs[0]
    (first.folder / "checkpoints").mkdir(parents=True)
    plan = plan_training(config)
    note = "note     1 run will be resumed; the time includes steps taken so far"
    assert note in plan.describe(time=True) and note not in plan.describe()


def test_a_plan_says_how_many_rows_of_each_array_are_masked(sparse_cache, masked_cache) -> None:
    plan = plan_training(make_config(masked_cache, "topk", "relu", layers=[0, 1]))
    lines = [line for line in plan.describe(time=False) if line.startswith("masked ")]
    counts = [len(masked_cache.outlier_rows(array)) for array in ("layer_00", "layer_01")]
    assert [line.partition(", whose norm ")[0] for line in lines] == [  # once for the runs of an array
        f"masked   {count:,} of 4,096 rows of layer_0{layer}" for layer, count in enumerate(counts)
    ]
    assert all(0 < count < 2048 for count in counts)
    assert "masked" not in "\n".join(plan_training(make_config(sparse_cache, "topk")).describe(time=False))
