"""What the hosts' tests share with the others."""

from tests.convert.conftest import assert_same, digits  # noqa: F401  # fixtures
