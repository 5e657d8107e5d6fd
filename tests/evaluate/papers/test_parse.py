"""How the files of claims are read, and what is refused."""

import dataclasses

import pytest

from sae.common.errors import UsageError
from sae.evaluate.papers.parse import CLAIMS_FOLDER, load_paper, parse_paper

GOOD = (CLAIMS_FOLDER / "003.toml").read_text(encoding="utf-8")


def changed(before, after):
    assert before in GOOD
    return GOOD.replace(before, after, 1)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (changed("value = 9", "value = 8"), "claim runs: its quote does not contain the value 8"),
        (changed('id = "runs"', 'id = "steps"'), "Two of claim are called steps."),
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
            "unknown metric core.sparsity.l7: expected a number of a metric",
        ),
        (
            changed('"full"\nmetric = "none"', '"full"\nmetric = "core.sparsity.l0"'),
            "give `why`, the reason that no metric of ours measures it",
        ),
        (changed("value = 9", 'value = 9\nunit = "km"'), "unknown unit km"),
        (changed("value = 9", 'value = 9\nunit = "pp"'), "pp is the unit of a change"),
        (changed("value = 9", "value = 9\nagainst_value = 7"), "no claim about a system has the value 7"),
        (changed("value = 9", "value = 9\nlayers = [6]"), "layers (6,) are not all among the paper's"),
        (changed('mode = "2024-12"', 'mode = "2023"'), "mode = 2023 is unknown"),
        (changed("Tokenizes text", "Tokenizes  text"), "white space other than single spaces"),
        (changed("Tokenizes text", "Tokenizes text " * 12), "at most 160 are allowed"),
        (changed("follows =", 'claims = ["stepz"]\nfollows ='), "there is no claim stepz; did you mean steps?"),
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
