"""What every test session does."""

import gc


def pytest_collection_finish(session):
    """Measurements collect garbage first; what importing and collecting made stays, and need not be looked at."""
    gc.collect()
    gc.freeze()
