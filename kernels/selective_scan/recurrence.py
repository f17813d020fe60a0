"""The arithmetic of a chunk of positions, as the GPU kernels do it: with base-2 exponentials and without a logarithm.

Functions take and return lists, one array for each of several positions, and do one operation for all of them before
the next: a GPU's scheduler then finds independent work in the instructions beside each other. Only elementwise
operations, so that the same functions run inside a kernel and on NumPy arrays.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp

LOG2_E = 1.4426950408889634

# log(1 + e) = e P(e) on [0, 1]; P is a polynomial of least relative error, lowest power first. The logarithm of the
# hardware has a small absolute error only, and step sizes of 1e-3 would lose three digits.
LOG1P_PRECISE = (  # 2e-7 in float32
    0.99999997,
    -0.499994931,
    0.333190969,
    -0.248429824,
    0.191060065,
    -0.136632439,
    0.078225918,
    -0.029505212,
    0.005232686,
)
_LOG1P_SHORT = (0.999991599, -0.499361369, 0.325206685, -0.210048662, 0.101222223, -0.023869118)  # 9e-6

_SLOPE_OVER_STEP = (1.0, -1 / 2, 1 / 6, -1 / 24, 1 / 120, -1 / 720, 1 / 5040)  # (1 - exp(-s)) / s, lowest power first


def softplus(xs: Sequence[Any], *, precise: bool) -> list[Any]:
    """log(1 + exp(x)) = max(x, 0) + log(1 + exp(-|x|)), to a relative error of 2e-7, or 9e-6 if not `precise`.

    To which the rounded exponent adds up to 1e-7 |x| where x is negative.
    """
    es = exp2([jnp.abs(x) * -LOG2_E for x in xs])
    coefficients = LOG1P_PRECISE if precise else _LOG1P_SHORT
    polynomials = [e * coefficients[-1] + coefficients[-2] for e in es]
    for coefficient in coefficients[-3::-1]:
        polynomials = [polynomial * e + coefficient for polynomial, e in zip(polynomials, es, strict=True)]
    above = [jnp.maximum(x, 0.0) for x in xs]
    return [e * polynomial + x for e, polynomial, x in zip(es, polynomials, above, strict=True)]


def softplus_slopes(xs: Sequence[Any], steps: Sequence[Any]) -> list[Any]:
    """Derivatives of `steps = softplus(xs)`: sigmoid(x) = exp(x - softplus(x))."""
    return exp2([(x - step) * LOG2_E for x, step in zip(xs, steps, strict=True)])


def softplus_slopes_of(steps: Sequence[Any], *, precise: bool) -> list[Any]:
    """Derivatives of `steps = softplus(xs)` from the steps alone: sigmoid(x) = 1 - exp(-softplus(x)).

    To a relative error of 3e-7, or 3e-5 if not `precise`. Of small step sizes, for which the difference cancels, a
    series is taken.
    """
    slopes = [1.0 - e for e in exp2([step * -LOG2_E for step in steps])]
    small, coefficients = (0.5, _SLOPE_OVER_STEP) if precise else (0.01, _SLOPE_OVER_STEP[:2])
    series = [step * coefficients[-1] + coefficients[-2] for step in steps]
    for coefficient in coefficients[-3::-1]:
        series = [sum_ * step + coefficient for sum_, step in zip(series, steps, strict=True)]
    return [
        jnp.where(step < small, sum_ * step, slope) for step, sum_, slope in zip(steps, series, slopes, strict=True)
    ]


def decays(steps: Sequence[Any], A_log2: Any) -> list[Any]:
    """exp(step A) for `A_log2` = A log2(e)."""
    return exp2([step * A_log2 for step in steps])


def exp2(xs: Sequence[Any]) -> list[Any]:
    """2 to the power of each."""
    return [jnp.exp2(x) for x in xs]


def advance(h: Any, kept: Sequence[Any], drives: Sequence[Any], Bs: Sequence[Any]) -> list[Any]:
    """One state along a chunk: `h` before the chunk, then after each position.

    Args:
        h: the state before the chunk.
        kept: `decays` of the positions.
        drives: step u.
        Bs: B.
    """
    hs = [h]
    for keep, drive, B in zip(kept, drives, Bs, strict=True):
        # With `+ 0.0` CUDA's assembler fuses this product and not the other with the sum, so that one instruction, not
        # two, leads from state to state.
        hs.append(keep * hs[-1] + (drive * B + 0.0))
    return hs


class Retreat(NamedTuple):
    """One state's part of the gradients of a chunk; lists are in the order of travel."""

    r: Any  # with respect to the state before the chunk
    dA: Any
    dus: list[Any]
    dsteps: list[Any]
    dBs: list[Any]  # of each channel: to be summed over channels
    dCs: list[Any]  # likewise


def retreat(
    r: Any,
    hs: Sequence[Any],
    kept: Sequence[Any],
    dys: Sequence[Any],
    us: Sequence[Any],
    steps: Sequence[Any],
    drives: Sequence[Any],
    Bs: Sequence[Any],
    Cs: Sequence[Any],
    A: Any,
) -> Retreat:
    """One state against the direction of travel.

    Args:
        r: gradient with respect to the state after the chunk that arrives from later positions.
        hs: states, from `advance`.
        kept: `decays` of the positions.
        dys: gradients of y.
        us: u.
        steps: step sizes.
        drives: step u.
        Bs: B.
        Cs: C.
        A: of the state.
    """
    dCs = [dy * h for dy, h in zip(dys, hs[1:], strict=True)]
    dA, dus, dsteps, dBs = 0.0, [], [], []
    for k in reversed(range(len(us))):
        dh = dys[k] * Cs[k] + r
        r = kept[k] * dh
        dexponent, ddrive = r * hs[k], dh * Bs[k]
        dA = dexponent * steps[k] + dA
        dus.append(ddrive * steps[k])
        dsteps.append(ddrive * us[k] + dexponent * A)
        dBs.append(dh * drives[k])
    return Retreat(r, dA, dus[::-1], dsteps[::-1], dBs[::-1], dCs)
