"""A 32-bit fingerprint of an array's bits and of where they stand. Not cryptographic, and not a checksum of files.

Sum over all elements of mix(bits, global index) modulo 2^32. Addition of whole numbers is exact in any order, so the
value does not depend on the mesh, the sharding or the number of processes; it is computed where the shards are.
The mix is the finalizer of MurmurHash3 (public domain, github.com/aappleby/smhasher).
"""

import hashlib
import json
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

# More programs in flight than this abort the process on fake CPU devices (jax 0.10: 8 devices, more than 32 programs).
_IN_FLIGHT = 8
_BLOCK = 1 << 16  # words that `part` mixes at a time: its buffers stay in a core's cache
_FACTOR = 0x9E3779B1


def fingerprints(arrays: Mapping[str, jax.Array]) -> dict[str, int]:
    """The fingerprint of each array. All processes of a run call it together, with the same names."""
    names = list(arrays)
    result: dict[str, int] = {}
    for start in range(0, len(names), _IN_FLIGHT):
        group = names[start : start + _IN_FLIGHT]
        values = [_fingerprint(arrays[name]) for name in group]
        result.update({name: int(value) for name, value in zip(group, values, strict=True)})
    return result


def digest(arrays: Mapping[str, jax.Array]) -> str:
    """One text for all arrays of a model, by path."""
    return hashlib.sha256(json.dumps(fingerprints(arrays), sort_keys=True).encode()).hexdigest()


@jax.jit
def _fingerprint(array: jax.Array) -> jax.Array:
    """One program for each (shape, dtype, sharding): a parameter and its moments share one."""
    words = _words(array)
    index = jnp.zeros(words.shape, jnp.uint32)
    for dim, size in enumerate(words.shape):
        # Wraps modulo 2^32 in arrays of more elements, alike on every mesh.
        index = index * jnp.uint32(size % 2**32) + jax.lax.broadcasted_iota(jnp.uint32, words.shape, dim)
    # An odd factor keeps distinct positions distinct; adding one tells zeros at the end from no element at all.
    return jnp.sum(_mix(words + (index + 1) * jnp.uint32(_FACTOR)), dtype=jnp.uint32)


def _words(array: jax.Array) -> jax.Array:
    """The bits of each element as uint32; elements of 64 bits become two."""
    if jnp.issubdtype(array.dtype, jnp.bool_):
        return array.astype(jnp.uint32)
    bits = jax.dtypes.itemsize_bits(array.dtype)
    if bits < 8:
        # Storage of 4-bit and 2-bit numbers is packed. The values of whole numbers say what their bits say.
        if not jnp.issubdtype(array.dtype, jnp.integer):
            array = jax.lax.bitcast_convert_type(array, {4: jnp.uint4, 2: jnp.uint2}[bits])
        return array.astype(jnp.int8).astype(jnp.uint32)
    if bits >= 32:
        return jax.lax.bitcast_convert_type(array, jnp.uint32)
    return jax.lax.bitcast_convert_type(array, {8: jnp.uint8, 16: jnp.uint16}[bits]).astype(jnp.uint32)


def _mix(words: jax.Array) -> jax.Array:
    words = (words ^ (words >> 16)) * jnp.uint32(0x85EBCA6B)
    words = (words ^ (words >> 13)) * jnp.uint32(0xC2B2AE35)
    return words ^ (words >> 16)


def part(array: np.ndarray, start: Sequence[int], shape: Sequence[int]) -> int:
    """What a piece adds to the fingerprint of the whole array of `shape`, in which it begins at the index `start`.

    The fingerprint is the sum of the parts modulo 2^32, whatever the cut. In numpy, a block at a time, for arrays too
    large to hold. Elements of 8, 16 or 32 bits.
    """
    words = np.asarray(array, order="C").view({1: np.uint8, 2: np.uint16, 4: np.uint32}[array.dtype.itemsize])
    # The index of an element times the odd factor, plus one more of it, is a sum over the dims; so it is for numbers
    # modulo 2^32.
    strides = [int(np.prod(shape[dim + 1 :], dtype=object)) for dim in range(len(shape))]
    dims = [
        (np.arange(begin, begin + size, dtype=np.uint64) * (stride * _FACTOR % 2**32)).astype(np.uint32)
        for begin, size, stride in zip(start, words.shape, strides, strict=True)
    ]
    inner, depth = np.full(1, _FACTOR, np.uint32), len(dims)
    while depth and inner.size * dims[depth - 1].size <= _BLOCK:
        depth -= 1
        inner = (dims[depth][:, None] + inner[None, :]).ravel()
    outer = np.zeros(1, np.uint32)
    for dim in dims[:depth]:
        outer = (outer[:, None] + dim[None, :]).ravel()
    return _sum_of_mixed(words.reshape(outer.size, inner.size), outer, inner)


def _sum_of_mixed(words: np.ndarray, outer: np.ndarray, inner: np.ndarray) -> int:
    rows = max(1, _BLOCK // inner.size)
    buffer, shifted = np.empty((2, rows, inner.size), np.uint32)
    total = 0
    for begin in range(0, len(words), rows):
        block = words[begin : begin + rows]
        mixed, other = buffer[: len(block)], shifted[: len(block)]
        np.add(outer[begin : begin + rows, None], inner, out=mixed)
        np.add(mixed, block, out=mixed)
        for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
            np.right_shift(mixed, shift, out=other)
            np.bitwise_xor(mixed, other, out=mixed)
            np.multiply(mixed, np.uint32(factor), out=mixed)
        np.right_shift(mixed, 16, out=other)
        np.bitwise_xor(mixed, other, out=mixed)
        total += int(np.add.reduce(mixed, axis=None, dtype=np.uint32))
    return total % 2**32
