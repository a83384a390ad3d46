import pytest

from tests.conftest import write_small_store
from tests.train.tiny import walks


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A store of 31 users."""
    path = tmp_path_factory.mktemp("reliability") / "store"
    write_small_store(path, **walks(31))
    return str(path)
