"""What the hosts' tests share with the others."""

from tests.adapters.conftest import images  # noqa: F401  # fixtures
from tests.convert.conftest import assert_same, digits  # noqa: F401
