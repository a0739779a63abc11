"""Several processes: gradients past DDP, averages over ranks, whole scores of sharded parameters.

Under DistributedDataParallel each rank has its own gradients for the score, which are averaged in
one all-reduce per dtype. Sharded parameters (FSDP2, tensor parallelism) have their scores gathered.
Either way every rank selects in the same whole tensors, with the ordinary backend.
"""

from __future__ import annotations

import gc
import math
import weakref
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from rgp_optim._checks import refuse

ONCE = (
    "Scoring runs the graph of a loss more than once, and this graph cannot: give `natural` and "
    '`adversarial` forward passes of their own (see "One graph per loss" in the recipes).'
)
LOOK_AT = 10_000  # nodes of a graph, in the first scored pass
_INTS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Refused(RuntimeError):
    """An error of this package in a backward pass, with its own way out."""


def is_sharded(tensor: Tensor) -> bool:
    """Tell whether a tensor is a DTensor."""
    return hasattr(tensor, "to_local")


def local(tensor: Any) -> Any:
    """Return this rank's shard of a DTensor, or the tensor (or None) itself."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def initialised() -> bool:
    """Tell whether this process belongs to a process group."""
    return dist.is_available() and dist.is_initialized()


class Ranks:
    """The processes that train one model together; a copy of an optimizer keeps its group."""

    def __init__(self, group: Any = None) -> None:
        self.group = group
        self._models: weakref.WeakSet[Any] = weakref.WeakSet()  # those that can join early
        if group is not None and not (initialised() and isinstance(group, dist.ProcessGroup)):
            rule = "be a ProcessGroup that this process belongs to, or None (all processes)"
            hint = "Call `torch.distributed.init_process_group` first."
            refuse("process_group", rule, type(group).__name__, hint, TypeError)

    def __deepcopy__(self, _: Any) -> Ranks:
        return self

    def __reduce__(self) -> tuple[type[Ranks], tuple[()]]:
        if self.group is not None:
            hint = "Save `state_dict()` and build the optimizer again."
            refuse("process_group", "be None in a pickle", f"{self.group}", hint, TypeError)
        return Ranks, ()

    @property
    def size(self) -> int:
        return dist.get_world_size(self.group) if initialised() else 1

    def refuse_join(self, first: bool) -> None:
        """Refuse a step within ``join()``: a rank without batches averages no scores."""
        if first:
            kind = torch.nn.parallel.DistributedDataParallel
            self._models = weakref.WeakSet(o for o in gc.get_objects() if issubclass(type(o), kind))
        if any(model._join_config.enable for model in self._models):
            raise RuntimeError(
                "step() within `DistributedDataParallel.join()`: ranks that have no batch left "
                "cannot average scores. Give each rank as many batches, with `DistributedSampler` "
                "or `drop_last=True`, and leave out `join()`."
            )

    def average(self, gradients: Sequence[Tensor]) -> list[Tensor]:
        """Return the means over all ranks: contiguous tensors, one all-reduce per dtype."""
        means: dict[int, Tensor] = {}
        for dtype in dict.fromkeys(g.dtype for g in gradients):
            indices = [i for i, g in enumerate(gradients) if g.dtype == dtype]
            flat = torch.cat([gradients[i].reshape(-1) for i in indices])
            flat.div_(self.size)  # before the sum, which could overflow
            dist.all_reduce(flat, group=self.group)
            pieces = torch.split(flat, [gradients[i].numel() for i in indices])
            for i, piece in zip(indices, pieces, strict=True):
                means[i] = piece.view(gradients[i].shape)
        return [means[i] for i in range(len(gradients))]

    def differing(self, tensors: Mapping[str, Tensor | None], device: torch.device) -> list[str]:
        """Return the names of the tensors whose bits differ between ranks; waits for the device."""
        sums = torch.stack([_hash(t).to(device) for t in tensors.values()])
        bounds = torch.stack([sums, -sums])
        dist.all_reduce(bounds, op=dist.ReduceOp.MAX, group=self.group)
        apart = (bounds[0] != -bounds[1]).tolist()
        return [name for name, differs in zip(tensors, apart, strict=True) if differs]


def _hash(tensor: Tensor | None) -> Tensor:
    """Return a number that depends on all bits of a tensor and their places; 0 for None."""
    if tensor is None:
        return torch.zeros((), dtype=torch.int64)
    plain = tensor.detach().to_dense() if tensor.is_sparse else tensor.detach()
    plain = torch.view_as_real(plain.resolve_conj()) if plain.is_complex() else plain
    bits = plain.contiguous().view(_INTS[plain.element_size()]).flatten()
    places = torch.arange(1, bits.numel() + 1, device=bits.device) * 0x1E3779B97F4A7C15
    return ((bits + 1) * (places ^ (places >> 31))).sum()


def shard(gradient: Any, p: Any) -> Any:
    """Return this rank's part of a gradient, sharded as its parameter; partial sums are reduced."""
    if is_sharded(p) and is_sharded(gradient):
        gradient = gradient.redistribute(placements=p.placements)
    return local(gradient)


def whole(part: Tensor, p: Any) -> Tensor:
    """Gather a tensor that is sharded as the parameter ``p``; every rank of its mesh must call."""
    if not is_sharded(p):
        return part
    from torch.distributed.tensor import DTensor

    like = DTensor.from_local(
        part, p.device_mesh, p.placements, run_check=False, shape=p.shape, stride=p.stride()
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


def take(
    role: str, loss: Tensor, params: Sequence[Tensor], grad: Tensor
) -> Sequence[Tensor | None]:
    """Return the gradients of ``loss`` with respect to ``params``; keep the graph.

    Nothing arrives in ``.grad``, and DistributedDataParallel, which reduces what arrives there
    once per forward pass, keeps that reduction for the training loss. FSDP2 reduces only what goes
    through ``.grad``: there it is emptied for the pass and put back.
    """
    nodes = _scored_nodes(loss) if initialised() else set()
    groups = _fsdp_groups() if any(is_sharded(p) for p in params) else []
    try:
        if groups:
            return _take_sharded(loss, params, grad, groups, nodes)
        with _first_pass_unrecorded(nodes):
            return torch.autograd.grad(loss, params, grad, retain_graph=True, allow_unused=True)
    except (Refused, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise RuntimeError(
            f"scored: the backward pass of the {role} loss failed. {ONCE} It failed with "
            f"{type(error).__name__}: {error}"
        ) from error


def repeated(losses: Mapping[str, Tensor], node: Any) -> list[str]:
    """Return the roles whose graph runs again for another loss.

    ``node`` is that of the training loss. A graph too large to look at counts as repeated.
    """
    graphs = {role: _scored_nodes(loss, LOOK_AT) for role, loss in losses.items()}
    graphs["training"] = _nodes(node, LOOK_AT)
    found = []
    for role in losses:
        inner = {each for each in graphs[role] if each.next_functions}
        others = [graph for name, graph in graphs.items() if name != role]
        if len(graphs[role]) >= LOOK_AT or any(inner & graph for graph in others):
            found.append(role)
    return found


def _take_sharded(
    loss: Tensor, params: Sequence[Tensor], grad: Tensor, groups: Sequence[Any], nodes: set[Any]
) -> list[Tensor | None]:
    """Run a backward pass through FSDP2's hooks and take what it leaves in ``.grad``."""
    reached = [each.sharded_param for group in groups for each in group.fsdp_params]
    reached += [node.variable for node in nodes if hasattr(node, "variable")]
    outside = {p: p.grad for p in (*params, *reached)}
    _refuse_unreduced(groups, params)
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
    from torch.distributed._composable_state import _module_state_mapping
    from torch.distributed.fsdp import FSDPModule

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
            raise Refused(
                "FSDP2 holds gradients that are not reduced yet and would be added to the score. "
                "Reduce every micro-batch: leave `set_requires_gradient_sync(True)` and "
                "`set_requires_all_reduce(True)`; in Accelerate use "
                "`GradientAccumulationPlugin(sync_each_batch=True)`. With autocast use FSDP2's "
                "`MixedPrecisionPolicy` or `torch.autocast(..., cache_enabled=False)`: a weight "
                "that several forward passes share through the cache is reduced too early."
            )


@contextmanager
def _first_pass_unrecorded(nodes: set[Any]) -> Iterator[None]:
    """Keep a DDP model with ``static_graph`` from recording this pass as its first."""
    models = {node.ddp_weakref() for node in nodes if hasattr(node, "ddp_weakref")} - {None}
    static = [ddp for ddp in models if ddp.static_graph]
    waiting = [ddp for ddp in static if not ddp._static_graph_delay_allreduce_enqueued]
    try:
        for ddp in waiting:
            ddp._static_graph_delay_allreduce_enqueued = True
        yield
    finally:
        for ddp in waiting:
            ddp._static_graph_delay_allreduce_enqueued = False


def _nodes(root: Any, limit: float = math.inf) -> set[Any]:
    """Return the nodes of a graph, the nearest to its root first, ``limit`` of them or a few more.

    Once a node has been seen from Python PyTorch frees its graph recursively: 100,000 nodes in a
    row would end the process.
    """
    found: set[Any] = set()
    waiting = deque([root])
    while waiting and len(found) < limit:
        node = waiting.popleft()
        if node is not None and node not in found:
            found.add(node)
            waiting += [upstream for upstream, _ in node.next_functions]
    return found


def _scored_nodes(loss: Tensor, limit: float = math.inf) -> set[Any]:
    """Return the nodes of a loss's graph; refuse reentrant checkpoints among them."""
    nodes = _nodes(loss.grad_fn, limit)
    if any(type(node).__name__ == "CheckpointFunctionBackward" for node in nodes):
        raise Refused(
            "Activations are checkpointed with `use_reentrant=True`, which loses gradients when a "
            "loss is scored. Set `use_reentrant=False`."
        )
    return nodes
