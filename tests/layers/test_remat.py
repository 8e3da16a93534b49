"""What may be said of remat, and of which layers it holds."""

import pytest

from t5x_like.core.errors import UsageError
from t5x_like.layers import remat


@pytest.mark.parametrize(
    ("text", "kinds", "expected"),
    [
        ("full", "aaaa", ["full"] * 4),
        ("products:0.5", "aaaa", ["full", "full", "products", "products"]),
        ("products:0.5,context", "aaaa", ["context", "context", "products", "products"]),
        ("none:0.25,q+k:0.5,full", "aaaa", ["full", "q+k", "q+k", "none"]),
        ("products:0.6", "abab", ["full", "full", "products", "products"]),  # whole periods
        ("context:0.1", "aa", ["full", "full"]),
        ("context@host", "aa", ["context@host"] * 2),
    ],
)
def test_shares_are_of_the_last_layers_first(text, kinds, expected):
    assert list(remat.by_layer(text, kinds)) == expected


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("ful", "did you mean 'full'"),
        ("q+kk", "'kk' is unknown"),
        ("q+q@host", "names 'q' twice"),
        ("products:0", "a share above 0"),
        ("products:half", "a share above 0"),
        ("products:0.7,context:0.5", "of the 0.3 of the layers that are left"),
        ("full,context", "of the 0 of the layers"),
        ("", "is unknown"),
        ("q@disk", "'q@disk' is unknown"),
    ],
)
def test_bad_policies_are_one_line(text, says):
    with pytest.raises(UsageError) as error:
        remat.parse(text)
    assert says in str(error.value) and "\n" not in str(error.value)
    assert "config.model.remat" in str(error.value)
