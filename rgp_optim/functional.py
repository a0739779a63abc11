r"""Score, select, conserve: the method as functions, for people who write their own optimizer.

This layer checks the arguments and chooses the backend; it is the only place that does. The maths
of each backend is that of `rgp_optim._reference`.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Literal, Protocol

import torch
from torch import Tensor
from torch._compile import _disable_dynamo  # as torch.optim uses it: imports no compiler

from rgp_optim._checks import check_choice, check_fraction, check_tensor, error_text

__all__ = ["Backend", "Scope", "conserve_", "rgp_score", "rgp_topk_masks", "topk_mask"]

Backend = Literal["auto", "cpu", "triton", "torch"]
Scope = Literal["tensor", "global"]

SCOPES = ("tensor", "global")


class Selection(Protocol):
    """What a backend selected in a list of tensors; `rgp_optim._reference.Selection` says how."""

    def masks(self) -> list[Tensor]: ...
    def apply_(
        self,
        targets: Sequence[Tensor | None],
        weights: Sequence[Tensor | None],
        saved: Sequence[Tensor | None],
    ) -> None: ...
    def conserve_(
        self, weights: Sequence[Tensor | None], saved: Sequence[Tensor | None]
    ) -> None: ...


@dataclass(frozen=True)
class _Provider:
    """A module with the functions of `_reference`, and what it runs on.

    Attributes:
        name: The module, in this package; imported when it is used for the first time.
        needs: A package that it needs besides torch.
        devices: Types of device, or None: all that torch has.
        dtypes: Of the tensors, or None: all.
    """

    name: str
    needs: str | None = None
    devices: frozenset[str] | None = None
    dtypes: frozenset[torch.dtype] | None = None

    @property
    def module(self) -> ModuleType:
        return _module(self.name)

    def obstacle(self, tensors: Sequence[Tensor]) -> str | None:
        """Say what keeps this backend from running on ``tensors``; None if nothing does."""
        if self.devices is not None:
            for device in {tensor.device for tensor in tensors}:
                if device.type not in self.devices:
                    return f"a tensor on {device}; it runs on {sorted(self.devices)}"
        if self.dtypes is not None:
            for dtype in {tensor.dtype for tensor in tensors}:
                if dtype not in self.dtypes:
                    return f"a {dtype} tensor; it runs on {sorted(map(str, self.dtypes))}"
        if self.needs is not None:  # it works on the memory itself
            if not _installed(self.needs):
                return f"{self.needs} is not installed"
            for kind in {type(tensor) for tensor in tensors} - {Tensor, torch.nn.Parameter}:
                return f"a {kind.__name__}; it runs on plain tensors"
            devices = sorted({str(tensor.device) for tensor in tensors})
            if len(devices) > 1:
                return f"one threshold for tensors on {' and '.join(devices)}"
        return None


@cache
def _module(name: str) -> ModuleType:
    return import_module(f"rgp_optim.{name}")


@cache
def _installed(package: str) -> bool:
    try:
        return find_spec(package) is not None
    except (ImportError, ValueError):  # hidden on purpose
        return False


# Triton's interpreter runs the kernels on CPUs, slowly: for tests.
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

# Fastest first: "auto" takes the first that runs.
_PROVIDERS = {
    "cpu": _Provider("_cpu", "numpy", frozenset({"cpu"})),
    "triton": _Provider(
        "_triton",
        "triton",
        frozenset({"cuda", "cpu"} if _INTERPRETED else {"cuda"}),
        frozenset({torch.float32, torch.bfloat16, torch.float16}),
    ),
    "torch": _Provider("_reference"),
}


def check_backend(backend: str) -> str:
    """Return ``backend`` if it is known."""
    return check_choice("backend", backend, ("auto", *_PROVIDERS))


def _provider(backend: str, tensors: Sequence[Tensor]) -> ModuleType:
    """Choose the module that does the work. Called at each use, never at import."""
    if backend == "auto":
        return next(p.module for p in _PROVIDERS.values() if p.obstacle(tensors) is None)
    obstacle = _PROVIDERS[backend].obstacle(tensors)
    if obstacle is not None:
        rule = "be able to run on these tensors"
        raise RuntimeError(
            error_text("backend", rule, f"backend = {backend!r}, {obstacle}", "Use 'auto'.")
        )
    return _PROVIDERS[backend].module


def rgp_score(g_nat: Tensor, g_adv: Tensor, *, alpha: float, backend: Backend = "auto") -> Tensor:
    r"""Score each weight by how hard the natural and the adversarial loss pull on it.

    .. math:: s_i = \alpha\,|g^{\mathrm{nat}}_i| + (1 - \alpha)\,|g^{\mathrm{adv}}_i|

    The products and the sum are rounded one by one. A term whose factor is 0 is left out, also
    where its gradient is infinite or NaN.

    Args:
        g_nat: Gradient of the natural loss. Any shape; any floating or complex dtype.
        g_adv: Gradient of the adversarial loss. Shape, dtype and device of ``g_nat``.
        alpha: Share of the natural term, dimensionless, in [0, 1]. 1 ignores ``g_adv``.
        backend: ``"auto"`` takes the fastest that runs on these tensors; a named one must run.

    Returns:
        Scores >= 0, shape of ``g_nat``, float32 (float64 for float64 gradients), in loss units per
        unit of weight.

    Raises:
        TypeError: a gradient is not a dense floating tensor.
        ValueError: ``alpha`` is outside [0, 1], or the two gradients do not match.
        RuntimeError: the named backend cannot run on these tensors.

    Reference: Gowda et al., CURE, ICLR 2024, Eq. 6.
    """
    _check_pair(g_nat, g_adv, "g_nat", "g_adv")
    check_fraction("alpha", alpha)
    check_backend(backend)
    with torch.no_grad():
        scores: Tensor = _provider(backend, [g_nat]).rgp_score(g_nat, g_adv, float(alpha))
    return scores


def topk_mask(score: Tensor, *, update_fraction: float, backend: Backend = "auto") -> Tensor:
    r"""Mark the ``k = max(1, round(update_fraction * n))`` highest of n scores.

    Exactly k are marked, except that a score of 0 never is. Ties go to the lowest index, counted in
    row-major order whatever the strides. NaN ranks above infinity, so that it is seen. 1 marks
    everything, zeros included; 0 marks nothing. ``round`` takes a half to the even integer.

    Args:
        score: Scores of one tensor. Any shape; float16, bfloat16, float32 or float64.
        update_fraction: Share of the weights that is updated, dimensionless, in [0, 1]. The paper's
            p is the percentage conserved: ``update_fraction = 1 - p / 100``.
        backend: ``"auto"`` takes the fastest that runs on these tensors; a named one must run.

    Returns:
        A mask, bool, shape and device of ``score``: True where the weight is updated.

    Raises:
        TypeError: ``score`` is not a dense tensor of a real floating dtype.
        ValueError: ``update_fraction`` is outside [0, 1].
        RuntimeError: the named backend cannot run on these tensors.

    Reference: Gowda et al., CURE, ICLR 2024, Algorithm 1.
    """
    return topk_masks([score], [update_fraction], [0], backend)[0]


@_disable_dynamo  # what follows works on memory, not on operations that could be traced
def topk_masks(
    scores: Sequence[Tensor],
    fractions: Sequence[float],
    pools: Sequence[int],
    backend: str = "auto",
) -> list[Tensor]:
    """Do what `topk_mask` does for a list of scores; those of one pool share a threshold."""
    for score in scores:
        check_tensor("score", score)
        if score.is_complex():
            raise TypeError(error_text("score", "have a real dtype", f"score: {score.dtype}"))
    for fraction in fractions:
        check_fraction("update_fraction", fraction)
    check_backend(backend)
    masks: dict[int, Tensor] = {}
    with torch.no_grad():
        for indices in _by_device(scores, pools):
            mine = [scores[i] for i in indices]
            got = _provider(backend, mine).topk_masks(
                mine, [fractions[i] for i in indices], [pools[i] for i in indices]
            )
            masks.update(zip(indices, got, strict=True))
    return [masks[i] for i in range(len(scores))]


def rgp_topk_masks(
    g_nats: Sequence[Tensor | None],
    g_advs: Sequence[Tensor | None],
    *,
    alpha: float | Sequence[float],
    update_fraction: float | Sequence[float],
    scope: Scope = "tensor",
    backend: Backend = "auto",
) -> list[Tensor]:
    r"""Score and select over the tensors of a model: which weights are updated, which conserved.

    The rule is `topk_mask`'s over `rgp_score`'s scores: for each tensor on its own
    (``scope="tensor"``, the paper), or for all weights together (``scope="global"``: n is the sum
    of the sizes, and ties go to the tensor that comes first).

    Args:
        g_nats: Gradients of the natural loss, one for each tensor; any shapes, floating or complex
            dtypes and devices. None counts as 0; a pair of two None is refused.
        g_advs: Gradients of the adversarial loss, each with shape, dtype and device of its partner.
        alpha: Share of the natural term, in [0, 1]; one number, or one for each tensor.
        update_fraction: Share of the weights that is updated, in [0, 1]; one number, or, under
            ``scope="tensor"``, one for each tensor.
        scope: ``"tensor"`` or ``"global"``.
        backend: ``"auto"`` takes the fastest that runs on these tensors; a named one must run.

    Returns:
        One mask for each tensor, bool, its shape and device: True where the weight is updated.

    Raises:
        TypeError: a gradient is not a dense floating tensor.
        ValueError: a number is outside [0, 1], lengths or gradients do not match, the scope is
            unknown, or several fractions are given under ``scope="global"``.
        RuntimeError: the named backend cannot run on these tensors.

    Reference: Gowda et al., CURE, ICLR 2024, Eq. 6 and Algorithm 1.
    """
    count = len(g_nats)
    if len(g_advs) != count:
        found = f"{len(g_advs)} against {count}"
        raise ValueError(error_text("g_advs", "have as many entries as `g_nats`", found))
    for i, (g_nat, g_adv) in enumerate(zip(g_nats, g_advs, strict=True)):
        _check_pair(g_nat, g_adv, f"g_nats[{i}]", f"g_advs[{i}]")
    check_choice("scope", scope, SCOPES)
    check_backend(backend)
    alphas = _per_tensor("alpha", alpha, count)
    fractions = _per_tensor("update_fraction", update_fraction, count)
    if scope == "global" and len(set(fractions)) > 1:
        rule = "be one number under scope='global', where all tensors share a threshold"
        raise ValueError(error_text("update_fraction", rule, update_fraction))
    pools = [0] * count if scope == "global" else list(range(count))
    return select(g_nats, g_advs, alphas, fractions, pools, backend).masks()


@_disable_dynamo
def select(
    g_nats: Sequence[Tensor | None],
    g_advs: Sequence[Tensor | None],
    alphas: Sequence[float],
    fractions: Sequence[float],
    pools: Sequence[int],
    backend: str = "auto",
) -> Selection:
    """Do what `rgp_topk_masks` does, by pools of one threshold; for arguments known to match."""
    pairs = zip(g_nats, g_advs, strict=True)
    some = [g_nat if g_nat is not None else g_adv for g_nat, g_adv in pairs]
    parts: list[tuple[list[int], Selection]] = []
    with torch.no_grad():
        for indices in _by_device([g for g in some if g is not None], pools):
            mine = [[each[i] for i in indices] for each in (g_nats, g_advs)]
            module = _provider(backend, [g for each in mine for g in each if g is not None])
            settings = [[each[i] for i in indices] for each in (alphas, fractions, pools)]
            parts.append((indices, module.select(*mine, *settings)))
    return parts[0][1] if len(parts) == 1 else _Parts(parts)


def selection_of(masks: Sequence[Tensor]) -> Selection:
    """Return the selection that given masks make."""
    selection: Selection = _provider("auto", masks).Selection(list(masks))
    return selection


def _by_device(tensors: Sequence[Tensor], pools: Sequence[int]) -> list[list[int]]:
    """Return positions by device; those of pools over several devices come together."""
    if len({tensor.device for tensor in tensors}) == 1:
        return [list(range(len(tensors)))]
    homes: dict[int, set[torch.device]] = {}
    for tensor, pool in zip(tensors, pools, strict=True):
        homes.setdefault(pool, set()).add(tensor.device)
    groups: dict[torch.device | None, list[int]] = {}
    for i, (tensor, pool) in enumerate(zip(tensors, pools, strict=True)):
        groups.setdefault(tensor.device if len(homes[pool]) == 1 else None, []).append(i)
    return list(groups.values())


class _Parts:
    """Selections of several devices as one."""

    def __init__(self, parts: list[tuple[list[int], Selection]]) -> None:
        self._parts = parts

    def masks(self) -> list[Tensor]:
        masks: dict[int, Tensor] = {}
        for indices, part in self._parts:
            masks.update(zip(indices, part.masks(), strict=True))
        return [masks[i] for i in range(len(masks))]

    def apply_(
        self,
        targets: Sequence[Tensor | None],
        weights: Sequence[Tensor | None],
        saved: Sequence[Tensor | None],
    ) -> None:
        for indices, part in self._parts:
            part.apply_(*([each[i] for i in indices] for each in (targets, weights, saved)))

    def conserve_(self, weights: Sequence[Tensor | None], saved: Sequence[Tensor | None]) -> None:
        for indices, part in self._parts:
            part.conserve_(*([each[i] for i in indices] for each in (weights, saved)))


def conserve_(weights: Sequence[Tensor], saved: Sequence[Tensor], masks: Sequence[Tensor]) -> None:
    """Put back the saved value of each weight outside its mask, in place and bit for bit.

    Args:
        weights: Tensors after the optimizer's step; any shapes, dtypes and devices. Changed in
            place.
        saved: Their values before the step; the same shapes, dtypes and devices.
        masks: True where the new value stays, False where the saved one returns; bool, same shapes.

    Raises:
        TypeError: an entry is not a dense tensor.
        ValueError: lengths, shapes, dtypes or devices do not match. Nothing is changed then.

    Reference: Gowda et al., CURE, ICLR 2024, Algorithm 1: what is not updated is conserved.
    """
    if not len(weights) == len(saved) == len(masks):
        found = f"{len(weights)} weights, {len(saved)} saved, {len(masks)} masks"
        raise ValueError(error_text("saved", "match `weights` and `masks` in length", found))
    for i, (weight, old, mask) in enumerate(zip(weights, saved, masks, strict=True)):
        check_tensor(f"weights[{i}]", weight)
        _check_match(weight, old, f"weights[{i}]", f"saved[{i}]")
        check_tensor(f"masks[{i}]", mask, floating=False)
        if mask.dtype != torch.bool or mask.shape != weight.shape or mask.device != weight.device:
            rule = f"be a bool tensor with shape and device of `weights[{i}]`"
            raise ValueError(error_text(f"masks[{i}]", rule, _describe(mask)))
    with torch.no_grad():
        selection_of(masks).conserve_(weights, saved)


def _per_tensor(name: str, value: float | Sequence[float], count: int) -> list[float]:
    """Return one checked fraction for each tensor."""
    if isinstance(value, Sequence) and not isinstance(value, str):
        if len(value) != count:
            rule = f"be a number, or one for each of the {count} tensors"
            raise ValueError(error_text(name, rule, value))
        return [check_fraction(f"{name}[{i}]", each) for i, each in enumerate(value)]
    return [check_fraction(name, value)] * count


def _check_pair(g_nat: Tensor | None, g_adv: Tensor | None, name: str, partner: str) -> None:
    """Refuse a pair of gradients that do not belong to one tensor."""
    if g_nat is None and g_adv is None:
        hint = "Leave out a tensor without gradients."
        raise ValueError(error_text(name, f"be a tensor where `{partner}` is None", "None", hint))
    if g_nat is None or g_adv is None:
        check_tensor(*((name, g_nat) if g_adv is None else (partner, g_adv)))
    else:
        check_tensor(name, g_nat)
        _check_match(g_nat, g_adv, name, partner)


def _check_match(first: Tensor, second: Tensor, name: str, partner: str) -> None:
    """Refuse two tensors of different shape, dtype or device."""
    check_tensor(partner, second)
    if (first.shape, first.dtype, first.device) != (second.shape, second.dtype, second.device):
        found = f"{_describe(second)} against {_describe(first)}"
        raise ValueError(error_text(partner, f"match `{name}` in shape, dtype and device", found))


def _describe(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} {tensor.dtype} on {tensor.device}"
