"""The map of papers."""

import pytest

import weft
from weft.errors import UsageError
from weft.literature import papers


def rows(found):
    return [paper["row"] for paper in found]


def test_all_rows_in_order():
    found = papers()
    assert rows(found) == list(range(1, 429))
    for paper in found:
        assert list(paper) == ["row", "title", "family", "mechanism", "methods", "claims"]
        assert paper["title"] and paper["family"] and paper["mechanism"]


def test_methods_and_claims_agree_with_the_cards():
    by_row = {paper["row"]: paper for paper in papers()}
    for card in weft.methods():
        for row in card.papers:
            assert card.name in by_row[row]["methods"]
        for claim in card.claims:
            for row in claim.row if isinstance(claim.row, list) else [claim.row]:
                assert row is None or by_row[row]["claims"] >= 1
    every = {(c.module, q.function): q.row for c in weft.methods() for q in c.claims}.values()
    named = sum(len(row) if isinstance(row, list) else row is not None for row in every)
    assert sum(paper["claims"] for paper in by_row.values()) == named


def test_missing():
    missing = papers(missing=True)
    assert missing and all(paper["methods"] == [] for paper in missing)
    covered = {paper["row"] for paper in papers() if paper["methods"]}
    assert covered == set(range(1, 429)) - set(rows(missing))
    assert 140 in covered


@pytest.mark.parametrize("spelling", ["rule", "rules", "Rules"])
def test_family_spellings(spelling):
    found = papers(family=spelling)
    assert found and all(paper["family"] == "rule" for paper in found)


@pytest.mark.parametrize("spelling", ["lens", "bayes", "compress", "estimators", "optim", "graphs", "ffn"])
def test_families_that_end_in_s(spelling):
    assert papers(family=spelling)


def test_unknown_family_names_the_nearest():
    with pytest.raises(UsageError, match="estimator"):
        papers(family="estimater")


@pytest.mark.parametrize(
    ("query", "row"),
    [
        ("direct feedback alignment", 139),
        ("mono-forward", 140),
        ("fowrard-forwrad algoritm", 2),  # misspelt
        ("noprop", 30),
        ("quantized gradients of activation functions", 144),
        ("reversibl", 331),  # a part of a word
    ],
)
def test_query_finds(query, row):
    found = papers(query)
    assert row in rows(found)[:6]
    scores = [paper["score"] for paper in found]
    assert scores == sorted(scores, reverse=True) and scores[-1] > 0
    assert len(found) < 428


def test_title_weighs_more_than_mechanism():
    found = papers("stationary state feedbacks")
    assert rows(found)[0] == 134


def test_query_with_family_keeps_the_scores():
    everywhere = {paper["row"]: paper["score"] for paper in papers("feedback alignment")}
    for paper in papers("feedback alignment", family="rules"):
        assert paper["score"] == everywhere[paper["row"]]


def test_query_without_anything_in_common():
    assert papers("%%%") == []


def test_empty_query():
    with pytest.raises(UsageError, match="empty"):
        papers("  ")


def test_results_are_the_callers_own():
    papers()[0]["title"] = "changed"
    assert papers()[0]["title"] != "changed"
