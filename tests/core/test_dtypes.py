"""Which number formats a run may name."""

import pytest

from t5x_like.core.dtypes import policy
from t5x_like.core.errors import UsageError


@pytest.mark.parametrize("field", ["params", "compute"])
def test_float16_is_refused_in_one_line(field):
    names = {"params": "float32", "compute": "auto"} | {field: "float16"}
    with pytest.raises(UsageError) as error:
        policy(**names, platform="gpu")
    text = str(error.value)
    assert f"config.model.dtype.{field}='float16'" in text and "bfloat16" in text and "\n" not in text
