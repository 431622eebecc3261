"""What every test session does, and what several files of tests use."""

import gc
import sys

import pytest

from weft import cards


def pytest_collection_finish(session):
    """Measurements collect garbage first; what importing and collecting made stays, and need not be looked at."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def said_of(tmp_path, monkeypatch):
    """From a method's source, changes of it and a contract's checks to what each check says: None where it passes."""

    def run(source, checks, *changes):
        for old, new in changes:
            assert source.count(old) == 1, old
            source = source.replace(old, new)
        path = tmp_path / "broken_method.py"
        path.write_text(source, encoding="utf-8")
        monkeypatch.syspath_prepend(tmp_path)
        sys.modules.pop("broken_method", None)
        (card,) = cards.read_cards("broken_method", path)
        said = {}
        for label, check in checks(card):
            try:
                check(card)
            except Exception as error:
                said[label] = f"{type(error).__name__}: {error}"
            else:
                said[label] = None
        return said

    yield run
    sys.modules.pop("broken_method", None)
