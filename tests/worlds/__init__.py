"""Every operation in every kind of database."""

import pytest

pytest.register_assert_rewrite("tests.worlds.operations")
