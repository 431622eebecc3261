"""The map of papers: every row of ``papers.tsv``, with the methods and claims that this installation holds for it."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weft.errors import UsageError, unknown
from weft.method import methods

if TYPE_CHECKING:
    from collections.abc import Sequence

TABLE = Path(__file__).with_name("papers.tsv")
TITLE = 0.65  # the title's share of the score; the mechanism has the rest
NOISE = 0.2  # of the best score: what only shares a few letters with the query lies below


def papers(query: str | None = None, *, family: str | None = None, missing: bool = False) -> list[dict[str, Any]]:
    """The papers, each with the names of its methods and the number of claims that speak of it.

    Args:
        query: rank by similarity of words and parts of words with title (which weighs more) and mechanism; rows that
            have nothing in common with it are left out.
        family: only this family, as in the table (``rule``) or as the folder is called (``rules``).
        missing: only papers for which no method exists.

    Returns:
        Dicts with ``row, title, family, mechanism, methods, claims``, by row; with a query also ``score``, by score.

    Raises:
        UsageError: for an unknown family or an empty query.
    """
    if query is not None and not query.strip():
        raise UsageError("the query is empty; give words of a title or of a mechanism, or leave it out")
    wanted = None if family is None else _family(family)
    covered = _covered()
    found = [
        {**paper, "methods": covered[paper["row"]][0], "claims": covered[paper["row"]][1]}
        if paper["row"] in covered
        else {**paper, "methods": [], "claims": 0}
        for paper in _table()
    ]
    if query is not None:
        found = _ranked(query, found)
    return [p for p in found if wanted in (None, p["family"]) and not (missing and p["methods"])]


@functools.lru_cache(maxsize=1)
def _table() -> tuple[dict[str, Any], ...]:
    header, *lines = TABLE.read_text(encoding="utf-8").splitlines()
    names = header.split("\t")
    rows = [dict(zip(names, line.split("\t"), strict=True)) for line in lines]
    return tuple({**row, "row": int(row["row"])} for row in rows)


def _family(given: str) -> str:
    """The table's spelling of a family, which a plural or a folder's name may stand for."""
    known = sorted({paper["family"] for paper in _table()})
    for name in known:
        if given.lower().rstrip("s") == name.rstrip("s"):
            return name
    raise UsageError(unknown("family", given, known, "of papers"))


def _covered() -> dict[int, tuple[list[str], int]]:
    """For each row that a card or a claim names: the methods, and how many claims there are."""
    names: dict[int, list[str]] = {}
    claims: dict[int, set[tuple[str, str]]] = {}
    for card in methods():
        for row in card.papers:
            names.setdefault(row, []).append(card.name)
        for claim in card.claims:  # the same for all cards of a file
            for stated in claim.row if isinstance(claim.row, list) else [claim.row]:
                if stated is not None:
                    claims.setdefault(stated, set()).add((card.module, claim.function))
    return {row: (names.get(row, []), len(claims.get(row, ()))) for row in {*names, *claims}}


def _ranked(query: str, found: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows in order of similarity, each with its score; those that have nothing in common with the query fall."""
    import numpy as np
    from sklearn.feature_extraction.text import TfidfVectorizer

    titles, mechanisms = [p["title"] for p in found], [p["mechanism"] for p in found]
    scores = np.zeros(len(found))
    for share, options in (
        (0.5, {"ngram_range": (1, 2), "stop_words": "english"}),
        (0.5, {"ngram_range": (3, 5), "analyzer": "char_wb"}),
    ):
        vectors = TfidfVectorizer(sublinear_tf=True, strip_accents="unicode", **options)
        vectors.fit([*titles, *mechanisms])
        asked = vectors.transform([query])
        for weight, texts in ((TITLE, titles), (1 - TITLE, mechanisms)):
            scores += share * weight * (vectors.transform(texts) @ asked.T).toarray()[:, 0]
    best = scores.max()
    kept = [(float(s), p) for s, p in zip(scores, found, strict=True) if s > NOISE * best]
    return [{**p, "score": round(s, 4)} for s, p in sorted(kept, key=lambda pair: (-pair[0], pair[1]["row"]))]
