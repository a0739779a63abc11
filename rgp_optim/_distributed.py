"""Several processes: gradients past DDP, averages over ranks, whole scores of sharded parameters.

Under DistributedDataParallel each rank has its own gradients for the score, which are averaged in
one all-reduce per dtype. Sharded parameters (FSDP2, tensor parallelism) have their scores gathered.
Either way every rank selects in the same whole tensors, with the ordinary backend.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from rgp_optim._checks import error_text

_INTS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def is_sharded(tensor: Tensor) -> bool:
    """Tell whether a tensor is a DTensor."""
    return hasattr(tensor, "to_local")


def local(tensor: Any) -> Any:
    """Return this rank's shard of a DTensor, or the tensor (or None) itself."""
    to_local = getattr(tensor, "to_local", None)
    return tensor if to_local is None else to_local()


def initialised() -> bool:
    """Tell whether this process belongs to a process group."""
    return dist.is_available() and dist.is_initialized()


class Ranks:
    """The processes that train one model together; a copy of an optimizer keeps its group."""

    def __init__(self, group: Any = None) -> None:
        self.group = group
        if group is not None:
            if not initialised():
                rule = "be given after `torch.distributed.init_process_group`"
                raise RuntimeError(error_text("process_group", rule, f"{group}"))
            if not isinstance(group, dist.ProcessGroup):
                rule = "be a ProcessGroup that this process belongs to, or None (all processes)"
                raise TypeError(error_text("process_group", rule, type(group).__name__))

    def __deepcopy__(self, _: Any) -> Ranks:
        return self

    def __reduce__(self) -> tuple[type[Ranks], tuple[()]]:
        if self.group is not None:
            raise TypeError(
                "An optimizer with a `process_group` cannot be pickled. Save `state_dict()` and "
                "build the optimizer again."
            )
        return Ranks, ()

    @property
    def size(self) -> int:
        """Number of processes."""
        return dist.get_world_size(self.group) if initialised() else 1

    def average(self, gradients: Sequence[Tensor]) -> list[Tensor]:
        """Return the means over all ranks: contiguous tensors, one all-reduce per dtype."""
        means: dict[int, Tensor] = {}
        for dtype in dict.fromkeys(g.dtype for g in gradients):
            indices = [i for i, g in enumerate(gradients) if g.dtype == dtype]
            flat = torch.cat([gradients[i].reshape(-1) for i in indices])
            flat.div_(self.size)  # before the sum, which could overflow
            dist.all_reduce(flat, group=self.group)
            pieces = torch.split(flat, [gradients[i].numel() for i in indices])
            means.update(
                (i, g.view(gradients[i].shape)) for i, g in zip(indices, pieces, strict=True)
            )
        return [means[i] for i in range(len(gradients))]

    def differing(self, tensors: Mapping[str, Tensor | None]) -> list[str]:
        """Return the names of the tensors whose bits differ between ranks; waits for the device."""
        if not tensors:
            return []
        device = next((t.device for t in tensors.values() if t is not None), "cpu")
        sums = [
            torch.zeros((), dtype=torch.int64) if t is None else _hash(t) for t in tensors.values()
        ]
        highest = torch.stack([each.to(device) for each in sums])
        lowest = -highest
        for bound in (highest, lowest):
            dist.all_reduce(bound, op=dist.ReduceOp.MAX, group=self.group)
        apart = (highest != -lowest).tolist()
        return [name for name, differs in zip(tensors, apart, strict=True) if differs]


def _hash(tensor: Tensor) -> Tensor:
    """Return a number that depends on all bits of a tensor and their places."""
    plain = tensor.detach().to_dense() if tensor.is_sparse else tensor.detach()
    plain = torch.view_as_real(plain.resolve_conj()) if plain.is_complex() else plain
    bits = plain.contiguous().view(_INTS[plain.element_size()]).flatten()
    places = torch.arange(1, bits.numel() + 1, device=bits.device) * 0x1E3779B97F4A7C15
    return ((bits + 1) * (places ^ (places >> 31))).sum()


def check_parameter(p: Tensor) -> None:
    """Refuse parameters of which this process has an unknown part."""
    if getattr(p, "_is_flat_param", False) or getattr(p, "_fsdp_flattened", False):
        found = "a parameter of FullyShardedDataParallel (FSDP1)"
        hint = "Shard the model with `torch.distributed.fsdp.fully_shard` (FSDP2)."
        raise RuntimeError(
            error_text("optimizer", "have parameters that keep their shape", found, hint)
        )


# Scores of sharded parameters.


def as_parameter(gradient: Tensor, p: Any) -> Tensor:
    """Return a gradient sharded as its parameter; partial sums are reduced."""
    if is_sharded(p) and is_sharded(gradient):
        return gradient.redistribute(placements=p.placements)  # type: ignore[attr-defined, no-any-return]
    return gradient


def whole(shard: Tensor, p: Any) -> Tensor:
    """Gather a tensor that is sharded as the parameter ``p``; every rank of its mesh must call."""
    if not is_sharded(p):
        return shard
    from torch.distributed.tensor import DTensor

    like = DTensor.from_local(
        shard, p.device_mesh, p.placements, run_check=False, shape=p.shape, stride=p.stride()
    )
    return like.full_tensor().contiguous()


def own_part(mask: Tensor, p: Any) -> Tensor:
    """Return this rank's part of a whole mask."""
    if not is_sharded(p):
        return mask
    from torch.distributed.tensor import DTensor, Replicate

    everywhere = [Replicate()] * p.device_mesh.ndim
    replicas = DTensor.from_local(mask, p.device_mesh, everywhere, run_check=False)
    return replicas.redistribute(placements=p.placements).to_local().clone()


# Gradients for the score, which must reach nothing else.


def take(loss: Tensor, params: Sequence[Tensor], grad: Tensor, walk: bool) -> list[Tensor | None]:
    """Return the gradients of ``loss`` with respect to ``params``; keep the graph.

    Nothing arrives in ``.grad``, and DistributedDataParallel, which reduces what arrives there
    once per forward pass, keeps that reduction for the training loss. FSDP2 reduces only what goes
    through ``.grad``: there it is emptied for the pass and put back.

    Raises:
        RuntimeError: activations are checkpointed with ``use_reentrant=True``, which loses
            gradients under nested passes. Looked for if ``walk``, or where a gradient is missing.
    """
    if any(is_sharded(p) for p in params) and (groups := _fsdp_groups()):
        return _take_sharded(loss, params, grad, groups)
    nodes = list(_nodes(loss)) if walk or initialised() else []
    _refuse_reentrant(nodes)
    with _first_pass_unrecorded(nodes):
        taken = torch.autograd.grad(loss, params, grad, retain_graph=True, allow_unused=True)
    if not nodes and any(g is None for g in taken):
        _refuse_reentrant(_nodes(loss))
    return list(taken)


def _take_sharded(
    loss: Tensor, params: Sequence[Tensor], grad: Tensor, groups: Sequence[Any]
) -> list[Tensor | None]:
    """Run a backward pass through FSDP2's hooks and take what it leaves in ``.grad``."""
    nodes = list(_nodes(loss))
    _refuse_reentrant(nodes)
    _refuse_unreduced(groups, params)
    reached = [each.sharded_param for group in groups for each in group.fsdp_params]
    reached += [node.variable for node in nodes if hasattr(node, "variable")]
    outside = {p: p.grad for p in (*params, *reached)}
    try:
        for p in outside:
            p.grad = None
        loss.backward(grad, retain_graph=True)  # type: ignore[no-untyped-call]
        _refuse_unreduced(groups, params)
        return [p.grad for p in params]
    finally:
        for p, gradient in outside.items():
            p.grad = gradient


def _fsdp_groups() -> list[Any]:
    """Return FSDP2's groups of parameters that are reduced together, of all models."""
    try:
        from torch.distributed._composable_state import _module_state_mapping
        from torch.distributed.fsdp import FSDPModule
    except ImportError:
        return []
    modules = [module for module in list(_module_state_mapping) if isinstance(module, FSDPModule)]
    states = dict.fromkeys(module._get_fsdp_state() for module in modules)
    found: list[Any] = []
    for state in states:
        groups = getattr(state, "_fsdp_param_groups", None)  # torch 2.12 and newer
        found += [state._fsdp_param_group] if groups is None else groups
    return [group for group in found if group is not None]


def _refuse_unreduced(groups: Sequence[Any], params: Sequence[Tensor]) -> None:
    """Refuse gradients that FSDP2 holds back: they would be added to the score."""
    scored = set(params)
    for group in groups:
        held = getattr(group, "_partial_reduce_output", None) is not None
        for each in group.fsdp_params:
            unsharded = getattr(each, "_unsharded_param", None)
            held |= each.unsharded_accumulated_grad is not None
            held |= unsharded is not None and unsharded.grad is not None
        if held and any(each.sharded_param in scored for each in group.fsdp_params):
            raise RuntimeError(
                "FSDP2 holds gradients that are not reduced yet and would be added to the score. "
                "Reduce every micro-batch: leave `set_requires_gradient_sync(True)` and "
                "`set_requires_all_reduce(True)`; in Accelerate use "
                "`GradientAccumulationPlugin(sync_each_batch=True)`. With autocast use FSDP2's "
                "`MixedPrecisionPolicy` or `torch.autocast(..., cache_enabled=False)`: a weight "
                "that several forward passes share through the cache is reduced too early."
            )


def _refuse_reentrant(nodes: Iterator[Any] | Sequence[Any]) -> None:
    if any(type(node).__name__ == "CheckpointFunctionBackward" for node in nodes):
        raise RuntimeError(
            "Activations are checkpointed with `use_reentrant=True`, which loses gradients when a "
            "loss is scored. Set `use_reentrant=False`."
        )


@contextmanager
def _first_pass_unrecorded(nodes: Sequence[Any]) -> Iterator[None]:
    """Keep a DDP model with ``static_graph`` from recording this pass as its first."""
    references = [getattr(node, "ddp_weakref", None) for node in nodes]
    models = {id(r()): r() for r in references if r is not None and r() is not None}
    waiting = [
        ddp
        for ddp in models.values()
        if ddp.static_graph and not ddp._static_graph_delay_allreduce_enqueued
    ]
    try:
        for ddp in waiting:
            ddp._static_graph_delay_allreduce_enqueued = True
        yield
    finally:
        for ddp in waiting:
            ddp._static_graph_delay_allreduce_enqueued = False


def _nodes(loss: Tensor) -> Iterator[Any]:
    """Yield every node of the graph of ``loss``."""
    seen: set[Any] = set()
    waiting: list[Any] = [loss.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            yield node
            waiting.extend(upstream for upstream, _ in node.next_functions)
