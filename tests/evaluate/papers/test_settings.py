"""The comparison of the settings of runs, read from their records, with those that a paper prints."""

from dataclasses import replace

import pytest

from sae.evaluate.pages.reproduction import reproduction_page
from sae.evaluate.papers.parse import load_paper
from sae.evaluate.papers.report import build_report
from sae.evaluate.papers.settings import NOT_PRINTED, compare_settings

from .test_report import run

PAPER = load_paper("004")
SETUP = replace(
    PAPER.setup, warmup=1000, weight_decay=0.01, weight_decay_on="all", weight_decay_form="coupled", clip=1.0
)
PAPER = replace(
    PAPER, setup=SETUP, systems={**PAPER.systems, "wide": replace(PAPER.systems["full"], id="wide", width="8x")}
)
AS_PRINTED = {
    "lr": 3e-4, "warmup": 1000, "decay_start": 1.0, "clip": 1.0, "weight_decay": 0.01, "weight_decay_on": "all",
    "weight_decay_form": "coupled", "b_dec_init": "zero", "l1_warmup": 0, "l1": 0.04,
}  # fmt: skip
SIZES = {"d_in": 2304, "d_sae": 2304, "steps": 4882, "batch_size": 2048, "site": "resid_post", "layer": 19}
ORIGIN = {
    "model": {"name": "google/gemma-2-2b", "revision": None},
    "context": 128,
    "cache": "/somewhere/gemma-2-2b--openwebtext--01234567",
}


def made(system="full", sizes=(), origin=(), **options):
    one = run(system, "hierarchical", seed=0)
    record = {**one.run.record, **SIZES, **dict(sizes), "resolved": {**AS_PRINTED, **options}}
    return replace(one, run=replace(one.run, record=record, origin={**ORIGIN, **dict(origin)}))


def setting(name, *runs):
    return next(one for one in compare_settings(PAPER, runs) if one.name == name)


def test_a_run_of_what_is_printed_differs_in_nothing():
    settings = compare_settings(PAPER, [made()])
    assert [one.name for one in settings if one.differs] == []
    assert len(settings) == 15 and len({one.name for one in settings}) == 15


@pytest.mark.parametrize(
    ("name", "changed", "printed", "ours"),
    [
        ("model", {"origin": {"model": {"name": "gpt2", "revision": None}}}, "google/gemma-2-2b", "gpt2"),
        ("layer", {"sizes": {"layer": 12}}, "19", "12"),
        ("width", {"sizes": {"d_in": 128, "d_sae": 512}}, "2,304 latents of 2,304 dimensions (1x)",
         "512 latents of 128 dimensions (4x)"),
        ("site", {"sizes": {"site": "mlp_out"}}, "resid_post", "mlp_out"),
        ("steps", {"sizes": {"steps": 1000}}, "4,882", "1,000"),
        ("tokens in a batch", {"sizes": {"batch_size": 512}}, "2,048", "512"),
        ("learning rate", {"lr": 1e-3}, "0.0003", "0.001"),
        ("warm-up of the learning rate", {"warmup": None}, "1,000 steps", "488 steps"),
        ("warm-up of the learning rate", {"warmup": 0}, "1,000 steps", "none"),
        ("fall of the learning rate", {"decay_start": 0.8}, NOT_PRINTED, "linearly to 0, starting at 80% of the run"),
        ("limit of the gradient norm", {"clip": None}, "1", "none"),
        ("weight decay", {"weight_decay_on": "encoder"}, "0.01, coupled, on all parameters", "0.01, coupled, on W_enc"),
        ("weight decay", {"weight_decay_form": "decoupled"}, "0.01, coupled, on all parameters",
         "0.01, decoupled, on all parameters"),
        ("weight decay", {"weight_decay": 0.0}, "0.01, coupled, on all parameters", "none"),
        ("initial b_dec", {"b_dec_init": "mean"}, NOT_PRINTED, "mean"),
        ("warm-up of the L1 penalty", {"l1_warmup": None}, NOT_PRINTED, "244 steps"),
        ("warm-up of the L1 penalty", {"l1_warmup": 50}, NOT_PRINTED, "50 steps"),
        ("pairs compared in a step", {"sizes": {"variant": "decorrelation"}, "pair_choice": "blocks", "block": 64},
         NOT_PRINTED, "those in random blocks of 64 latents"),
        ("pairs compared in a step", {"pair_store": "table", "pairs": 16, "turns": 8}, NOT_PRINTED,
         "one in 8 of 16 for each latent, kept in a table"),
        ("dataset", {"origin": {"cache": "x/gemma-2-mini--stdlib--01234567"}}, "openwebtext", "stdlib"),
        ("context", {"origin": {"context": 64}}, "128", "64"),
    ],
)  # fmt: skip
def test_what_differs_from_the_paper_is_named(name, changed, printed, ours):
    one = setting(name, made(**changed))
    assert (one.printed, one.ours, one.differs) == (printed, ours, True)
    same = [other.name for other in compare_settings(PAPER, [made(**changed)]) if other.differs]
    assert same == [name]  # no other setting differs


def test_what_the_paper_does_not_print_was_off():
    bare = replace(PAPER, setup=replace(SETUP, warmup=None, weight_decay=None, clip=None))
    off = made(warmup=0, weight_decay=0.0, clip=None)
    settings = {one.name: one for one in compare_settings(bare, [off])}
    for name in ("warm-up of the learning rate", "weight decay", "limit of the gradient norm"):
        assert (settings[name].printed, settings[name].ours, settings[name].differs) == (NOT_PRINTED, "none", False)
    assert settings["fall of the learning rate"].ours == "none"
    zero = replace(PAPER, setup=replace(SETUP, warmup=0))
    assert "none" in [one.printed for one in compare_settings(zero, [off]) if one.name.startswith("warm-up")]
    on = {one.name for one in compare_settings(bare, [made()]) if one.differs}
    assert on == {"warm-up of the learning rate", "weight decay", "limit of the gradient norm"}


def test_a_weight_decay_whose_form_is_not_printed_is_the_one_that_its_readings_train():
    setup = replace(SETUP, weight_decay_on=None, weight_decay_form=None)
    trained = {name: setup.optimization()[name] for name in AS_PRINTED if name.startswith("weight_decay")}
    (one,) = [s for s in compare_settings(replace(PAPER, setup=setup), [made(**trained)]) if s.name == "weight decay"]
    assert (one.printed, one.ours, one.differs) == (one.ours, "0.01, decoupled, on W_enc", False)


def test_values_that_some_systems_alone_have_are_named_with_them():
    runs = [made(), made("linear"), made("l1", lr=1e-3), made("baseline", lr=2e-3)]
    one = setting("learning rate", *runs)
    assert one.ours == "0.0003; 0.001 (l1); 0.002 (baseline)" and one.differs
    again = [made("l1", lr=1e-3), made("baseline"), made("full"), made("l1", lr=1e-3)]  # two seeds count as one system
    assert setting("learning rate", *again).ours == "0.0003; 0.001 (l1)"
    many = [made(name, lr=number / 1000) for number, name in enumerate(PAPER.systems, 1)][:6]
    assert setting("learning rate", *many[:4]).ours.endswith("(linear); 0.004 (resample)")
    assert setting("learning rate", *many).ours.endswith("(linear); 0.004 (resample); and 2 more")


def test_a_system_s_own_width_is_no_difference():
    assert not setting("width", made(), made("wide", sizes={"d_sae": 8 * 2304})).differs
    assert setting("width", made("wide")).differs
    wide, wider = made(sizes={"d_sae": 4 * 2304}), made("linear", sizes={"d_sae": 2880})
    assert setting("width", wider, made(), made()).differs  # 1.25x differs, although the other systems have 1x
    assert setting("width", made(), wider, made("l1"), wider).ours == (
        "2,304 latents of 2,304 dimensions (1x); 2,880 latents of 2,304 dimensions (1.25x) (linear)"
    )
    systems = {**PAPER.systems, "full": replace(PAPER.systems["full"], width="")}  # the width in [ran] applies
    paper = replace(PAPER, setup=replace(SETUP, d_sae=4 * 2304), systems=systems)
    assert [compare_settings(paper, [one])[1].differs for one in (wide, made())] == [False, True]


def test_some_of_the_papers_layers_are_a_difference():
    paper = replace(PAPER, setup=replace(SETUP, layers=(5, 19)))
    assert compare_settings(paper, [made()])[0].differs
    assert not compare_settings(paper, [made(sizes={"layer": 5}), made()])[0].differs


def test_a_setting_that_no_run_records_is_left_out():
    names = [one.name for one in compare_settings(PAPER, [run("full", "hierarchical")])]
    assert names == ["layer", "width", "steps", "tokens in a batch", "warm-up of the learning rate"]
    bare = run("full", "hierarchical")
    bare = replace(bare, run=replace(bare.run, record={**bare.run.record, "resolved": {}}))
    assert [one.name for one in compare_settings(PAPER, [bare])] == names[:-1]
    for folder in ("x/gemma-2-mini--stdlib", "x/a--b--c--d", "x"):  # `sae harvest` does not create such names
        assert "dataset" not in [one.name for one in compare_settings(PAPER, [made(origin={"cache": folder})])]
    assert setting("warm-up of the L1 penalty", made(l1=None, l1_warmup=50)).ours == "50 steps"  # default strength
    topk = made(l1=0)  # there is no warm-up without a penalty
    assert "warm-up of the L1 penalty" not in [one.name for one in compare_settings(PAPER, [topk])]
    assert compare_settings(PAPER, []) == []


def test_the_page_has_the_settings():
    html = reproduction_page(build_report(PAPER, [made(sizes={"layer": 12})], False), "m")
    cells = '<th scope="row">{}</th><td class="text">{}</td><td class="text">{}</td><td class="text">{}</td>'
    assert cells.format("layer", 19, 12, "differs") in html and cells.format("steps", "4,882", "4,882", "") in html
    assert "No run exists yet." in reproduction_page(build_report(PAPER, [], False), "m")
