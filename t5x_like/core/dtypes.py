"""The one place that decides number formats: fp32 master weights, bf16 compute on accelerators, fp32 on CPU.

Softmax, norms and losses are fp32 everywhere; each other cast in the code carries a comment. Where sums of gradients
are rounded: docs/numerics.md.
"""

import dataclasses

from t5x_like.core.errors import UsageError

NAMES = ("float32", "bfloat16")
# In which numbers the matrices of layers are multiplied in training: as `compute` says, or in int8 (layers/int8.py), of
# "int8_forward" the forward pass alone, of "int8" also the gradients of activations.
COMPUTE, INT8_FORWARD, INT8 = PRODUCTS = ("compute", "int8_forward", "int8")


@dataclasses.dataclass(frozen=True)
class DtypePolicy:
    """`params`: storage of weights; `compute`: operands of matrix products. Both are numpy dtype names. `products`: a
    name in PRODUCTS, for texts as a whole; what reads a cache, and models that are not of a run, multiply in `compute`.

    float32 means float32 products on every platform (layers/platform.py).
    """

    params: str
    compute: str
    products: str = COMPUTE

    @property
    def told(self) -> str:
        """In words.

        >>> DtypePolicy("float32", "bfloat16", "int8_forward").told
        'float32 parameters, bfloat16 compute, products of layers int8_forward'
        """
        products = "" if self.products == COMPUTE else f", products of layers {self.products}"
        return f"{self.params} parameters, {self.compute} compute{products}"


def policy(*, params: str, compute: str, platform: str, products: str = COMPUTE) -> DtypePolicy:
    """`compute="auto"` is bfloat16 on tpu and gpu and float32 on cpu.

    >>> policy(params="float32", compute="auto", platform="tpu").compute
    'bfloat16'
    """
    if compute == "auto":
        compute = "float32" if platform == "cpu" else "bfloat16"
    for field, name in (("params", params), ("compute", compute)):
        if name == "float16":
            raise UsageError(
                f"config.model.dtype.{field}='float16' needs loss scaling, which does not exist here; use bfloat16, "
                "whose range is that of float32"
            )
        if name not in NAMES:
            raise UsageError(f"config.model.dtype.{field}={name!r} is unknown; use one of {', '.join(NAMES)}")
    if products not in PRODUCTS:
        raise UsageError(f"config.model.dtype.products={products!r} is unknown; use one of {', '.join(PRODUCTS)}")
    return DtypePolicy(params, compute, products)
