r"""Score and select: the method as functions, for people who write their own optimizer.

This layer checks the arguments and chooses the backend; no other module does. The specification of
every backend is `rgp_optim._reference`.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from functools import partial
from importlib import import_module
from types import ModuleType
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo  # as torch.optim uses it: imports no compiler

from rgp_optim import _checks as check
from rgp_optim import _reference
from rgp_optim._checks import refuse
from rgp_optim._reference import Entries, Entry, by_pool

__all__ = ["Backend", "Scope", "rgp_score", "rgp_topk_masks", "topk_mask"]

Backend = Literal["auto", "cpu", "triton", "torch"]
Scope = Literal["tensor", "global"]
SCOPES = ("tensor", "global")
BACKENDS = ("auto", "cpu", "triton", "torch")

_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # on the CPU, slowly: for tests
_faults: dict[tuple[str, torch.device], str | None] = {}


def rgp_score(g_nat: Tensor, g_adv: Tensor, *, alpha: float) -> Tensor:
    r"""Score each weight by how hard the natural and the adversarial loss pull on it.

    .. math:: s_i = \alpha\,|g^{\mathrm{nat}}_i| + (1 - \alpha)\,|g^{\mathrm{adv}}_i|

    Each product and the sum are rounded. A factor of 0 leaves its term out, infinite or NaN too.

    Args:
        g_nat: Gradient of the natural loss. Any shape; float16, bfloat16, float32 or float64.
        g_adv: Gradient of the adversarial loss. Shape, dtype and device of ``g_nat``.
        alpha: Share of the natural term, dimensionless, in [0, 1]. 1 ignores ``g_adv``.

    Returns:
        Scores >= 0, shape of ``g_nat``, float32 (float64 for float64), in loss units per weight.

    Raises:
        TypeError: a gradient is not a dense tensor of a real floating dtype.
        ValueError: the gradients do not match, or ``alpha`` is outside [0, 1].

    Reference: Gowda et al., CURE, ICLR 2024, Eq. 6.
    """
    _check_pair(g_nat, g_adv, "g_nat", "g_adv")
    with torch.no_grad():
        return _reference.rgp_score(g_nat, g_adv, check.fraction("alpha", alpha))


def topk_mask(score: Tensor, *, update_fraction: float, backend: Backend = "auto") -> Tensor:
    r"""Mark the ``k = max(1, round(update_fraction * n))`` highest of n scores.

    Exactly k are marked, but never a score of 0. Ties go to the lowest index, in row-major order
    whatever the strides. NaN ranks above infinity, so it surfaces. 1 marks everything, zeros
    included; 0 marks nothing. ``round`` takes a half to the even integer.

    Args:
        score: Scores of one tensor. Any shape; float16, bfloat16, float32 or float64.
        update_fraction: Share of the weights that is updated, dimensionless, in [0, 1]. The paper's
            p is the percentage conserved: ``update_fraction = 1 - p / 100``.
        backend: ``"auto"`` takes the fastest that runs on this tensor; a named one must run.

    Returns:
        A mask, bool, shape and device of ``score``: True where the weight is updated.

    Raises:
        TypeError: ``score`` is not a dense tensor of a real floating dtype.
        ValueError: ``update_fraction`` is outside [0, 1], or the backend is unknown.
        RuntimeError: the named backend cannot run on this tensor.

    Reference: Gowda et al., CURE, ICLR 2024, Algorithm 1.
    """
    check.tensor("score", score)
    check.choice("backend", backend, BACKENDS)
    fraction = check.fraction("update_fraction", update_fraction)
    return select([Entry(score, None, None, fraction)], backend=backend)[0]


def rgp_topk_masks(
    g_nats: Sequence[Tensor | None],
    g_advs: Sequence[Tensor | None],
    *,
    alpha: float,
    update_fraction: float,
    scope: Scope = "tensor",
    backend: Backend = "auto",
) -> list[Tensor]:
    r"""Apply `topk_mask` to the `rgp_score` of each tensor of a model, or of all together.

    Args:
        g_nats: Gradients of the natural loss, one per tensor; any shapes and real floating dtypes.
            None counts as 0; a pair of two None is refused.
        g_advs: Gradients of the adversarial loss, each with shape, dtype and device of its partner.
        alpha: Share of the natural term, dimensionless, in [0, 1].
        update_fraction: As in `topk_mask`.
        scope: ``"tensor"``, the paper's, or ``"global"``: one threshold for all, which are on one
            device; n is the sum of the sizes, and ties go to the earlier tensor.
        backend: As in `topk_mask`.

    Returns:
        One mask per tensor, as in `topk_mask`.

    Raises:
        ValueError: lengths or gradients do not match, the scope is unknown, or several devices
            share a threshold. Other errors as in `topk_mask`.

    Reference: Gowda et al., CURE, ICLR 2024, Eq. 6 and Algorithm 1.
    """
    count = len(g_nats)
    if len(g_advs) != count:
        refuse("g_advs", "have as many entries as `g_nats`", f"{len(g_advs)} against {count}")
    for i, (g_nat, g_adv) in enumerate(zip(g_nats, g_advs, strict=True)):
        _check_pair(g_nat, g_adv, f"g_nats[{i}]", f"g_advs[{i}]")
    check.choice("scope", scope, SCOPES)
    check.choice("backend", backend, BACKENDS)
    alpha = check.fraction("alpha", alpha)
    fraction = check.fraction("update_fraction", update_fraction)
    pools = [0] * count if scope == "global" else list(range(count))
    pairs = zip(g_nats, g_advs, pools, strict=True)
    return select([Entry(a, b, alpha, fraction, pool) for a, b, pool in pairs], backend=backend)


def select(entries: Entries, *, backend: str = "auto") -> list[Tensor]:
    """Score and select without checks, for the optimizer; a pool must be on one device."""
    if len({each.pool for each in entries}) < len(entries):
        homes = {(each.pool, each.present.device) for each in entries}
        if len(homes) > len(dict(homes)):
            rule = "be 'tensor' where weights that share a threshold lie on several devices"
            refuse("scope", rule, ", ".join(sorted({str(device) for _, device in homes})))
    return _run("select", entries, backend=backend)


@_disable_dynamo  # backends work on memory, not on operations that could be traced
@torch.no_grad()
def _run(name: str, rows: Sequence[tuple[Any, ...]], *, backend: str = "auto") -> list[Any]:
    """Call a function of `_reference`, or a backend's, once per device; one result per row."""
    tensors = [[t for t in row if isinstance(t, Tensor)] for row in rows]
    results: dict[int, Any] = {}
    for indices in by_pool([first.device for first, *_ in tensors]):
        module = _module(backend, name, [t for i in indices for t in tensors[i]])
        found = getattr(module, name)([rows[i] for i in indices])
        results |= zip(indices, found or (), strict=False)
    return [results.get(i) for i in range(len(rows))]


zero_and_save_, restore_ = partial(_run, "zero_and_save_"), partial(_run, "restore_")


def _module(backend: str, name: str, tensors: Sequence[Any]) -> ModuleType:
    """Choose the module that does the work. Called at each use, never at import."""
    for each in {"auto": ("cpu", "triton"), "torch": ()}.get(backend, (backend,)):
        reason = _unsupported_reason(each, name, tensors)
        reason = reason or _fault(each, tensors[0].device, warn=backend == "auto")
        if reason is None:
            return import_module(f"rgp_optim._{each}")
        if backend != "auto":
            found = f"backend = {backend!r}, {reason}"
            refuse("backend", "be able to run on these tensors", found, "Use 'auto'.", RuntimeError)
    return _reference


def _unsupported_reason(backend: str, name: str, tensors: Sequence[Any]) -> str | None:
    """Say why a backend cannot run on tensors of one device; None if it can."""
    device = tensors[0].device.type
    if device not in (("cpu",) if backend == "cpu" or _INTERPRETED else ("cuda",)):
        return f"tensors on {device}"
    if check.capturing(tensors[0]):  # replays reread the tables
        return "a stream under CUDA graph capture"
    kinds = {type(tensor) for tensor in tensors} - {Tensor, nn.Parameter}
    if kinds:  # a subclass need not have its values in memory
        return f"a {next(iter(kinds)).__name__}"
    if any(tensor.is_neg() for tensor in tensors):  # values are the memory's, negated
        return "a tensor with the negative bit"
    if backend == "triton" and name == "select" and any(t.dtype == torch.float64 for t in tensors):
        return "a float64 tensor"
    return None


def _fault(backend: str, device: torch.device, warn: bool) -> str | None:
    """Import a backend, and compare the kernels with the reference once per device."""
    if (backend, device) not in _faults:
        fault = None
        try:
            module = import_module(f"rgp_optim._{backend}")
            if backend == "triton" and not _agrees(module, device):
                fault = "whose masks differ from the reference's"
        except Exception as error:  # a driver, a compiler: whatever it is, the reference runs
            fault = f"which raises {type(error).__name__}: {error}"
        _faults[backend, device] = fault
        if fault and warn:
            text = f"The backend {backend!r}, {fault}, is not used on {device}. Weights are "
            text += "selected by a sort: the same masks, slower."
            warnings.warn(text, RuntimeWarning, stacklevel=2)
    return _faults[backend, device]


def _agrees(kernels: ModuleType, device: torch.device) -> bool:
    """Run selections with ties, zeros, NaN and subnormals, and one step's masking, both ways."""
    draws = torch.Generator().manual_seed(0)
    size = 3_000_000 if device.type == "cuda" else 5000  # ties in many programs
    g_nat = torch.randn(size, generator=draws, device="cpu").round(decimals=1)
    g_nat[:3], g_nat[-6:-3] = float("nan"), 0.0
    # The interpreter of the kernels takes subnormals of bfloat16 for zeros.
    for dtype, tiny in ((torch.float32, 1e-40), (torch.bfloat16, 1e-4), (torch.float16, 6e-8)):
        g_nat[3:6] = tiny
        results = []
        for module in (kernels, _reference):
            flat = g_nat.to(device, dtype, copy=True)
            nat = [flat, flat[:700].view(7, 100).t().clone(), flat.clone()[1:]]  # not aligned
            adv = [g.flip(0) for g in nat]
            masks = module.select([Entry(*pair, 0.3, 0.4) for pair in zip(nat, adv, strict=True)])
            settings = (0.3, 0.0, 1.0), (0.999, 0.1, 0.7), range(3)
            masks += module.select(list(map(Entry, nat, adv, *settings)))
            masks += module.select([Entry(g, None, None, 0.6, i) for i, g in enumerate(nat)])
            weights = [*nat, nat[0].double()]
            gradients = [g.flip(0).log() for g in weights]  # half are NaN
            rows = [*zip(masks, gradients, weights, strict=False)]
            saved = [old.neg() for old in module.zero_and_save_(rows)]
            module.restore_([*zip(masks, weights, saved, strict=False)])
            results.append([*masks, *gradients, *weights])
        pairs = zip(*results, strict=True)
        if not all(torch.equal(a.nan_to_num(7), b.nan_to_num(7)) for a, b in pairs):
            return False
    return True


def _check_pair(g_nat: Tensor | None, g_adv: Tensor | None, name: str, partner: str) -> None:
    """Refuse a pair of gradients that do not belong to one tensor."""
    if g_nat is None and g_adv is None:
        hint = "Leave out a tensor without gradients."
        refuse(name, f"be a tensor where `{partner}` is None", "None", hint)
    for tensor, each in ((g_nat, name), (g_adv, partner)):
        if tensor is not None:
            check.tensor(each, tensor)
    if g_nat is not None and g_adv is not None:
        check.match(g_nat, g_adv, name, partner)
