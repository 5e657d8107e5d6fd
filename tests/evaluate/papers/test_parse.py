"""Reading the files of claims: what is parsed and what is refused."""

import dataclasses

import pytest

from sae.common.errors import UsageError
from sae.evaluate.papers.parse import CLAIMS_FOLDER, load_paper, parse_paper

GOOD = (CLAIMS_FOLDER / "003.toml").read_text(encoding="utf-8")


def changed(before, after):
    assert before in GOOD
    return GOOD.replace(before, after, 1)


READING = '[[reading]]\nname = "field"\n'
SUBSTITUTES = 'substitutes = [{ claims = ["runs"], what = "(2)", why = "it costs too much" }]\n'


def words(lines):
    """The file with claim `runs` as a comparison in words, and `lines` in place of its metric."""
    claim = GOOD.split('id = "runs"')[1].split("[[")[0]
    why = next(line for line in claim.split("\n") if line.startswith("why"))
    spoken = claim.replace("value = 9", 'says = "less"').replace('metric = "none"', lines).replace(why, "")
    return GOOD.replace(claim, spoken)


def measured(before="", after="", more=""):
    """The file with claim `runs` about our L0. `more` holds further lines of a second claim, with the value 9."""
    claim = GOOD.split('id = "runs"')[1].split("[[")[0]
    why = next(line for line in claim.split("\n") if line.startswith("why"))
    asked = claim.replace('metric = "none"', 'metric = "core.sparsity.l0"').replace(why, "").replace(before, after)
    other = f'[[claim]]\nid = "more"\nwhere = ""\nquote = "9"\nvalue = 9\nmetric = "core.sparsity.l0"\n{more}\n'
    return GOOD.replace(claim, asked) + (other if more else "")


ENTRIES = 'entries = ["a"]'
NO_READING = GOOD[: GOOD.index("[[reading]]")] + GOOD[GOOD.index("[[system]]") :]
# Quotes of an unreported number, a claim, another place of the same claim, and a contradiction.
QUOTES = ("Adaptive τ", "Through nine", "documented through", "eliminating manual")


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (changed("value = 9", "value = 8"), "claim runs: its quote does not contain the value 8"),
        (changed('id = "runs"', 'id = "steps"'), "Two tables of claim have the name steps."),
        (
            changed('id = "runs"', 'id = "runs"\nmetrics = "none"'),
            "claim runs: unknown key metrics; did you mean metric?",
        ),
        (changed('id = "runs"\n', ""), "claim 2: id is missing."),
        (changed("value = 9", 'value = "9"'), "claim runs: value = '9' has the wrong type."),
        (
            changed('system = "full"\nmetric = "none"', 'system = "half"\nmetric = "none"'),
            "claim steps: there is no system half",
        ),
        (
            changed('"full"\nmetric = "none"', '"full"\nmetric = "core.sparsity.l7"'),
            "unknown metric core.sparsity.l7. Expected a number of a metric",
        ),
        (
            changed('"full"\nmetric = "none"', '"full"\nmetric = "core.sparsity.l0"'),
            "give `why` (the reason that no metric measures it)",
        ),
        (changed("value = 9", 'value = 9\nunit = "km"'), "unknown unit km"),
        (changed("value = 9", 'value = 9\nunit = "pp"'), "pp is the unit of a change"),
        (changed("value = 9", "value = 9\nagainst_value = 7"), "no claim about a system has the value 7"),
        (changed("value = 9", "value = 9\nlayers = [6]"), "layers (6,) are not all among the paper's"),
        (changed('mode = "2024-12"', 'mode = "2023"'), "mode = 2023 is unknown"),
        (changed("Tokenizes text", "Tokenizes  text"), "no white space except single spaces"),
        (changed("Tokenizes text", "Tokenizes text " * 12), "at most 160 are allowed"),
        (changed("follows =", 'claims = ["stepz"]\nfollows ='), "there is no claim stepz; did you mean steps?"),
        (changed("value = 9\n", ""), "claim runs: give a value. If the paper compares in words"),
        (
            changed("value = 9", 'value = 9\nsays = "more"'),
            "claim runs: says = more is a comparison in words. Leave out",
        ),
        (changed("value = 9", 'says = "most"'), "claim runs: says = 'most' has the wrong type."),
        (changed("value = 9", "value = 9\nmargin = 0.1"), "claim runs: give a margin (the largest difference"),
        (changed("value = 9", 'says = "equal"'), "claim runs: give a margin (the largest difference"),
        (changed("value = 9", 'says = "equal"\nmargin = 0'), "claim runs: margin = 0 is not positive."),
        (changed("value = 9", 'says = "equal"\nmargin = 0.1\nunit = "x"'), "claim runs: a margin is a difference"),
        (words('metric = "core.sparsity.l0"'), "claim runs: says = less needs `against`"),
        (changed("value = 9", 'value = 9\nrestates = "step"'), "there is no other claim step; did you mean steps?"),
        (changed("value = 9", 'value = 9\nrestates = "runs"'), "claim runs: restates: there is no other claim runs"),
        (
            changed("value = 9", 'value = 9\ncopy_of = "steps"'),
            "copy_of = steps, but the two numbers differ by more than 5%",
        ),
        (
            changed("value = 9", 'value = 9\nrestates = "steps"\ncopy_of = "steps"'),
            "claim runs: it has both restates = steps and copy_of = steps. Leave one out.",
        ),
        (
            changed("value = 0", 'value = 0\nrestates = "runs"').replace("value = 9", 'value = 9\nrestates = "steps"'),
            "claim runs: restates = steps is itself a repetition. Name runs instead.",
        ),
        (
            changed("value = 9", 'value = 9\nagainst = "off"\nrestates = "steps"'),
            "it restates steps, which is about full and no other system.",
        ),
        (
            words('metric = "core.sparsity.l0"\nagainst = "off"\nrestates = "steps"'),
            "it restates steps, which is about none, not core.sparsity.l0.",
        ),
        (
            changed('id = "off"', 'id = "off"\nadds_to = "fool"'),
            "system off: adds_to: there is no system fool; available: full, off.",
        ),
        (
            changed('id = "off"', 'id = "off"\nadds_to = "full"'),
            "system full: adds_to leads back to full: full -> off -> full.",
        ),
        (
            changed(READING, READING + SUBSTITUTES.replace('"runs"', '"run"')),
            "reading field, substitutes '(2)': there is no claim run; did you mean runs?",
        ),
        (
            changed(READING, READING + SUBSTITUTES.replace("what", "wat")),
            "reading 1, substitutes 1: unknown key wat; did you mean what?",
        ),
        (changed("value = 9", "value = true"), "claim runs: value = True has the wrong type."),
        (changed("value = 9", "value = inf"), "claim runs: value = inf has the wrong type."),
        (changed("value = 9", "value = 9\nlayers = [true]"), "claim runs: layers = [True] has the wrong type."),
        (changed("value = 9", 'value = 9\nlayers = [5, "12"]'), "claim runs: layers = [5, '12'] has the wrong type."),
        (
            changed("value = 9", 'value = 9\nagainst = "of"'),
            "claim runs: there is no system of; did you mean off?",
        ),
        (
            GOOD.replace("also = [\n", 'also = [\n    { where = "", quote = "Several runs." },\n'),
            "claim runs: its quote does not contain the value 9: Several runs.",
        ),
        (
            changed("value = 9", 'says = "less"\nagainst_value = 9'),
            "claim runs: says = less is a comparison in words. Leave out value and against_value.",
        ),
        (
            measured("value = 9", 'value = 9\nagainst = "off"'),
            "claim runs: a change against off needs a unit (%, pp or x)",
        ),
        (measured('system = "full"\n', ""), "claim runs: a measured claim needs a system. Choose from full, off."),
        (
            measured("value = 9", 'value = 9\nagainst = "off"\nagainst_value = 9', f"{ENTRIES}\nsystem = 'off'"),
            "claim runs: no claim about off has the value 9.",
        ),
        (
            measured("value = 9", 'value = 9\nrestates = "more"', ENTRIES),
            "claim runs: it restates more, which is about core.sparsity.l0 of a, not core.sparsity.l0.",
        ),
        (NO_READING, "There is no reading. Give at least one."),
        (changed('name = "literal"', 'name = "field"'), "Two tables of reading have the name field."),
        (changed('id = "off"', 'id = "full"'), "Two tables of system have the name full."),
        (
            changed('id = "off"', 'id = "off"\nadds_to = "off"'),
            "system full: adds_to leads back to off: full -> off -> off.",
        ),
        (
            changed('"core.correlation.mean"', '"core.correlation.men"'),
            "unreported correlation reduction, in percent: ",
        ),
        *((changed(f'"{start} ', f'"{start}  '), "no white space except single spaces") for start in QUOTES),
        (GOOD + "\n[nothing]\n", "unknown key nothing"),
        ("number = ", "is not valid TOML"),
    ],
)
def test_what_is_wrong_is_said(text, sentence):
    with pytest.raises(UsageError) as caught:
        parse_paper(text, "claims/003.toml")
    assert sentence in str(caught.value)


def test_the_number_that_a_claim_is_set_against_is_one_of_the_claims():
    text = (
        (CLAIMS_FOLDER / "001.toml")
        .read_text(encoding="utf-8")
        .replace("against_value = 90.6\n", "against_value = 90.7\n")
    )
    with pytest.raises(UsageError, match="claim l0: no claim about baseline has the value 90.7."):
        parse_paper(text, "claims/001.toml")


def test_everything_wrong_is_said_at_once():
    text = changed("value = 9", "value = 8").replace('mode = "2024-12"', 'mode = "2023"')
    with pytest.raises(UsageError, match="2023") as caught:
        parse_paper(text, "claims/003.toml")
    assert "its quote does not contain the value 8" in str(caught.value)


def test_an_unknown_paper_is_refused():
    with pytest.raises(UsageError, match="There is no paper 005"):
        load_paper("005")


def test_a_claim_has_the_layers_of_its_paper_unless_it_says_which():
    text = changed("value = 9", "value = 9\nlayers = [12]")
    claims = {claim.id: claim for claim in parse_paper(text, "x").claims}
    assert claims["runs"].layers == (12,)
    assert claims["steps"].layers == (5, 12, 19)
    assert dataclasses.replace(claims["runs"], layers=claims["steps"].layers) == next(
        claim for claim in load_paper("003").claims if claim.id == "runs"
    )


def test_a_comparison_in_words_has_a_direction_and_no_number():
    claims = {
        claim.id: claim for claim in parse_paper(words('metric = "core.sparsity.l0"\nagainst = "off"'), "x").claims
    }
    less = claims["runs"]
    assert (less.says, less.value, less.target, less.effect, less.direction) == ("less", None, None, None, -1)
    assert not less.is_change and claims["steps"].direction == 0
    assert [dataclasses.replace(less, says=says).direction for says in ("more", "equal")] == [1, 0]


def test_a_reading_knows_what_it_substitutes():
    paper = parse_paper(changed(READING, READING + SUBSTITUTES), "x")
    reading, claims = paper.readings[0], {claim.id: claim for claim in paper.claims}
    (one,) = reading.substitutions(claims["runs"])
    assert (one.what, one.why) == ("(2)", "it costs too much")
    assert reading.substitutions(claims["steps"]) == []


TWO = """
[[contradiction]]
what = "Two."
quotes = []
follows = ""
claims = ["runs", "more"]

[[claim]]
id = "more"
where = ""
quote = "%s"
value = %s
system = "full"
metric = "none"
why = "So."
"""


@pytest.mark.parametrize(("number", "same"), [("9.45", True), ("8.56", True), ("9.5", False), ("8.5", False)])
def test_numbers_within_the_verdict_s_tolerance_are_no_contradiction(number, same):
    """The tolerance is 5 % of the larger number: 9 agrees with 9.45 and 8.56, but not with 9.5 and 8.5."""
    text = GOOD + TWO % (number, number)
    if not same:
        assert parse_paper(text, "x").inconsistent(next(c for c in parse_paper(text, "x").claims if c.id == "more"))
        return
    with pytest.raises(UsageError, match=f"9 and {number} differ by at most 5%, .*Leave runs, more out of its claims"):
        parse_paper(text, "x")


def test_numbers_of_two_systems_and_a_change_beside_a_number_are_no_pair():
    for line in ('system = "off"', 'system = "full"\nagainst = "off"'):
        text = GOOD + TWO.replace('system = "full"', line) % (9, 9)
        assert parse_paper(text, "x").inconsistent(next(c for c in parse_paper(text, "x").claims if c.id == "more"))


def test_a_copy_may_be_rounded():
    """8.6 is within 5 % of 9. Copies and restatements are not counted."""
    text = changed("value = 9", 'value = 9\ncopy_of = "more"') + "[[claim]]" + TWO.split("[[claim]]")[1] % (8.6, 8.6)
    paper = parse_paper(text, "x")
    assert [claim.id for claim in paper.claims if not paper.is_counted(claim)] == ["runs"]


def test_what_no_metric_measures_can_be_compared_in_words_with_what_the_paper_leaves_open():
    assert parse_paper(changed("value = 9", 'says = "less"'), "x").claims[1].direction == -1


def test_a_claim_and_its_repetitions_count_once():
    text = changed("value = 9", 'value = 9\nrestates = "steps"')
    paper = parse_paper(text, "x")
    assert [claim.id for claim in paper.claims if not paper.is_counted(claim)] == ["runs"]
