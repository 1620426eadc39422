"""What errors say."""

import pytest

from scalevit.errors import UserError, require


def test_a_missing_package_is_one_line_with_its_extra() -> None:
    require("json", extra="nothing")
    with pytest.raises(UserError, match=r"'no_such_package' is not installed; pip install 'scalevit\[wandb\]'"):
        require("no_such_package", extra="wandb")
