"""Rematerialisation: what the backward pass of a layer finds saved, and what it computes again. Names, and no layer.

`config.model.remat` is one of POLICIES, or points joined by "+", such as "q+k+v+context": the activations that blocks
name with `checkpoint_name`. ":SHARE" is of a part of the layers, and others may follow behind a comma: "products:0.5"
is the last half of a stack's layers, and nothing is saved of the others; "products:0.5,context" saves of these what
attention gives. "POINT@host" moves a point to the host's memory and back.

The last layers save most, because the backward pass begins with them: when it comes to layers that are computed again,
what they need for a while finds room that is free again.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax

from t5x_like.core.config import nearest
from t5x_like.core.errors import UsageError
from t5x_like.layers.attention.kernels import CONTEXT, CUDNN_FORWARD

_policies = jax.checkpoint_policies

# Names that layers give to activations.
POINTS = ("q", "k", "v", CONTEXT, "attention_out", "norm", "mlp_gate", "mlp_up")
SAVED: dict[str, tuple[str, ...]] = {
    "products": POINTS,  # no matrix product and no kernel is computed again: norms, activations and casts are
    "minimal": ("q", "k", "v", CONTEXT, "mlp_gate", "mlp_up"),  # the output of attention is projected again
    "context": (CONTEXT,),  # attention's output, and on accelerators what else its backward pass reads
    "full": (),  # one [B, T, D] a layer
}
# Least memory last. none: all but what a layer itself leaves out (mlp.py: its activation). dots: the products as they
# are, before rotary positions and scales.
POLICIES = ("none", "dots", *SAVED)
HOST = "@host"


@dataclasses.dataclass(frozen=True)
class Share:
    """What is saved of a share of a stack's layers: one of POLICIES, or points, some of them on the host."""

    policy: str
    layers: float

    @property
    def points(self) -> tuple[str, ...]:
        return tuple(self.policy.split("+"))


def parse(text: str, *, path: str = "config.model.remat") -> tuple[Share, ...]:
    """The shares of layers, last layers first; what is left of them, if anything, saves nothing.

    >>> parse("products:0.5,context")
    (Share(policy='products', layers=0.5), Share(policy='context', layers=0.5))
    """
    shares, left = [], 1.0
    for part in text.split(","):
        policy, colon, number = part.strip().partition(":")
        _check_policy(policy, path, text)
        try:
            layers = float(number) if colon else left
        except ValueError:
            layers = -1.0
        if not 0 < layers <= left + 1e-9:
            raise UsageError(
                f"{path}={text!r}: {part.strip()!r} should read POLICY:SHARE, a share above 0 of the {left:g} of the "
                "layers that are left"
            )
        shares.append(Share(policy, layers))
        left -= layers
    return (*shares, Share("full", left)) if left > 1e-9 else tuple(shares)


def _check_policy(policy: str, path: str, text: str) -> None:
    if policy in POLICIES:
        return
    points = [name.removesuffix(HOST) for name in policy.split("+")]
    for point in points:
        if point not in POINTS:
            raise UsageError(f"{path}={text!r}: {point!r} is unknown; {nearest(point, [*POLICIES, *POINTS])}")
        if points.count(point) > 1:
            raise UsageError(f"{path}={text!r} names {point!r} twice; on the device or on the host, name it once")


def by_layer(text: str, kinds: Sequence[Any]) -> tuple[str, ...]:
    """The policy of each layer. Shares are rounded to whole periods of a pattern, so that it stays a loop."""
    period = next(p for p in range(1, len(kinds) + 1) if _repeats(kinds, p))
    found: list[str] = []
    shares = parse(text)
    for number, share in enumerate(shares):
        count = round(share.layers * len(kinds) / period) * period
        left = len(kinds) - len(found)
        found += [share.policy] * (left if number == len(shares) - 1 else min(count, left))
    return tuple(reversed(found))


def _repeats(kinds: Sequence[Any], period: int) -> bool:
    return all(kind == kinds[number % period] for number, kind in enumerate(kinds))


@functools.cache
def policy(name: str) -> Callable[..., Any] | None:
    """For `jax.checkpoint`; None for no remat at all."""
    if name == "none":
        return None
    if name == "dots":
        return _policies.save_from_both_policies(_policies.dots_saveable, _saving((CONTEXT,)))
    return _saving(SAVED[name] if name in SAVED else tuple(name.split("+")))


def _saving(names: tuple[str, ...]) -> Callable[..., Any]:
    """The policy that saves what has these names. cuDNN's kernel gives its results no name: with "context" they are
    saved by their primitive, so that it runs once."""
    device = tuple(name for name in names if not name.endswith(HOST))
    host = tuple(name.removesuffix(HOST) for name in names if name.endswith(HOST))
    if host:
        return _policies.save_and_offload_only_these_names(
            names_which_can_be_saved=list(device),
            names_which_can_be_offloaded=list(host),
            offload_src="device",
            offload_dst="pinned_host",
        )
    by_name = _policies.save_only_these_names(*device)
    if CONTEXT not in device:
        return by_name
    return _policies.save_from_both_policies(by_name, lambda primitive, *_, **__: primitive.name == CUDNN_FORWARD)
