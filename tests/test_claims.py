"""Every fast claim of every method at one seed, under each of its mutants; WEFT_SEED picks another."""

import os

import pytest

import weft
from weft.claim import passed

CARDS = [card for card in weft.methods() if card.variant_of is None]


@pytest.mark.parametrize("card", CARDS, ids=lambda card: card.name)
def test_claims_hold_and_can_fail(card):
    seed = int(os.environ.get("WEFT_SEED", "0"))
    records = weft.check_claims([card.name, *card.variants], mutants=True, seed=seed, workers=1)
    assert records, "no fast claim"
    failed = [record for record in records if not passed(record)]
    assert not failed, failed
