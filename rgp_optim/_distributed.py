"""One mask on every rank, and the one that a single process would choose.

Gradients of a score lie in *pieces*, one for each rank: the r-th is the r-th stretch of the whole
in row-major order. FSDP2 keeps them like that. Where each rank has its own gradient of the whole
(DDP), a reduce-scatter averages them into pieces: half the bytes of an all-reduce. The selection
then counts, over all pieces, how many scores share their leading bits with the k-th highest, eight
bits a round; only these counts travel. What was selected stays in its piece under FSDP2, and is
gathered as bits for DDP, so that no two ranks can differ.
"""

from __future__ import annotations

import gc
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor
from torch import distributed as dist
from torch.utils.weak import WeakTensorKeyDictionary

from rgp_optim._bits import pack_bits, unpack_bits
from rgp_optim._checks import error_text
from rgp_optim._reference import rgp_score, update_count

BUCKET = 2**25  # weights that are reduced together: what is copied for it at a time
BINS = 256  # eight bits of a score
REENTRANT = "CheckpointFunctionBackward"
UNREDUCED = (
    "A backward pass without gradient synchronisation has left gradients that are not reduced yet, "
    "and they would be added to the score. Reduce every micro-batch: leave "
    "`set_requires_gradient_sync(True)` and `set_requires_all_reduce(True)`; in Accelerate "
    "`GradientAccumulationPlugin(sync_each_batch=True)`."
)


def local(tensor: Tensor) -> Tensor:
    """Return this process's shard, or the tensor itself where it is not sharded."""
    to_local = getattr(tensor, "to_local", None)
    shard: Tensor = tensor if to_local is None else to_local()
    return shard


def sharded(tensor: Tensor) -> bool:
    """Tell whether this is a DTensor."""
    return hasattr(tensor, "to_local")


def initialised() -> bool:
    """Tell whether this process is one of a group, be it the only one."""
    return dist.is_available() and dist.is_initialized()


@dataclass(frozen=True)
class Ring:
    """The processes that hold the pieces of a tensor.

    Attributes:
        group: Their process group.
        rank: Which piece this process holds.
        size: Number of pieces.
    """

    group: Any
    rank: int
    size: int

    def sum_(self, tensor: Tensor) -> Tensor:
        """Add up over the processes, in place."""
        if self.size > 1:
            dist.all_reduce(tensor, group=self.group)
        return tensor


ALONE = Ring(None, 0, 1)


class Ranks:
    """The processes that train one model together, each with the whole of it or a shard."""

    def __init__(self, group: Any = None) -> None:
        self._group = group
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
        if self._group is not None:
            raise TypeError(
                "A process group cannot be pickled, and this optimizer has one. Save "
                "`state_dict()` and build the optimizer anew."
            )
        return Ranks, ()

    @property
    def ring(self) -> Ring:
        """All of them."""
        if not initialised():
            return ALONE
        group = self._group if self._group is not None else dist.group.WORLD
        return Ring(group, dist.get_rank(group), dist.get_world_size(group))


def ring_of(name: str, tensor: Any) -> Ring:
    """Return who holds the pieces of a DTensor.

    Raises:
        RuntimeError: it is not in pieces along its first dimension.
    """
    placements, mesh = tensor.placements, tensor.device_mesh
    shards = [dim for dim, placement in enumerate(placements) if placement.is_shard()]
    whole = [dim for dim, placement in enumerate(placements) if placement.is_replicate()]
    if len(shards) + len(whole) < len(placements):
        rule = "be whole or sharded, not partial sums on each process"
        hint = "Tensor parallelism leaves them so and cannot be scored: use `fully_shard` alone."
        raise RuntimeError(error_text(name, rule, _placements(tensor), hint))
    if not shards:
        return ALONE
    if len(shards) > 1 or not placements[shards[0]].is_shard(0):
        rule = "be sharded over one dimension of the mesh, along its own first dimension"
        hint = "Use `fully_shard` alone: no tensor parallelism, no other `Shard(dim)`."
        raise RuntimeError(error_text(name, rule, _placements(tensor), hint))
    return _ring_over(mesh, shards[0])


def replicas_of(tensor: Any, everyone: Ring) -> list[Ring]:
    """Return the processes that should hold the same as this one: none, one or more rings."""
    if not sharded(tensor):
        return [everyone]
    dims = enumerate(tensor.placements)
    return [_ring_over(tensor.device_mesh, d) for d, place in dims if place.is_replicate()]


def shard_of(whole: Tensor, like: Tensor) -> Tensor:
    """Return this process's shard of a tensor that is to be sharded like another."""
    if not sharded(like):
        return whole
    ring = ring_of("weight", like)
    rows = whole.chunk(ring.size)
    return rows[ring.rank] if ring.rank < len(rows) else whole[:0]


def _ring_over(mesh: Any, dim: int) -> Ring:
    return Ring(mesh.get_group(dim), mesh.get_local_rank(dim), mesh.size(dim))


def check_parameter(p: Tensor) -> None:
    """Refuse parameters of which a process has an unknown part."""
    if sharded(p):
        ring_of("a parameter", p)
    if getattr(p, "_is_flat_param", False) or getattr(p, "_fsdp_flattened", False):
        raise RuntimeError(
            error_text(
                "optimizer",
                "have parameters that keep their shape",
                "a parameter of FullyShardedDataParallel (FSDP1)",
                "Shard the model with `torch.distributed.fsdp.fully_shard` (FSDP2).",
            )
        )


def _placements(tensor: Tensor) -> str:
    return f"placements {tuple(tensor.placements)}"  # type: ignore[attr-defined]


# Backward passes that leave DistributedDataParallel alone.


def take(
    loss: Tensor, params: Sequence[Tensor], gradient: Tensor | None, **options: Any
) -> list[Tensor | None]:
    """Return the gradients of this process's own batch; the next reduction stays what it was.

    DistributedDataParallel reduces in the first ``backward`` after a forward pass, and only there.
    `torch.autograd.grad` does not call its hooks, so that one is left to the loss that is
    minimised. With ``static_graph`` the first pass would be recorded: that is put off.

    Raises:
        RuntimeError: activations are checkpointed in the reentrant way, which it passes by.
    """
    waiting = [ddp for ddp in _parallel(loss) if _records(ddp)]
    for ddp in waiting:
        ddp._static_graph_delay_allreduce_enqueued = True
    try:
        return list(
            torch.autograd.grad(loss, params, gradient, allow_unused=True, **options)
            if params
            else ()
        )
    finally:
        for ddp in waiting:
            ddp._static_graph_delay_allreduce_enqueued = False


def gives_back(losses: Iterable[Tensor], params: Iterable[Tensor]) -> bool:
    """Tell whether gradients that were taken can be put into ``.grad`` through the parameters.

    Not where the pass must go through the graph: DistributedDataParallel has left a node there
    (``static_graph``, ``find_unused_parameters``), hooks of the parameters would run twice, or
    others wait for a gradient (parameters of another optimizer, images).
    """
    mine = set(params)
    if any(p._backward_hooks for p in mine):
        return False
    for loss in losses:
        if _parallel(loss):
            return False
        leaves = (getattr(node, "variable", None) for node in _nodes(loss))
        if any(leaf is not None and leaf not in mine for leaf in leaves):
            return False
    return True


def _records(ddp: Any) -> bool:
    return bool(ddp.static_graph and not ddp._static_graph_delay_allreduce_enqueued)


def _parallel(loss: Tensor) -> list[Any]:
    """Return the DistributedDataParallel modules that left a node in the graph of ``loss``.

    Refuse what `torch.autograd.grad` would leave out in silence.
    """
    found: dict[int, Any] = {}
    for node in _nodes(loss):
        if node.name() == REENTRANT:
            raise RuntimeError(
                "Activations are checkpointed with `use_reentrant=True`, where gradients can only "
                "come through `.grad`, and there DistributedDataParallel would reduce them in "
                "place of the training loss. Set `use_reentrant=False`."
            )
        reference = getattr(node, "ddp_weakref", None)
        if reference is not None and reference() is not None:
            found[id(reference())] = reference()
    return list(found.values())


def is_reentrant(loss: Tensor) -> bool:
    """Tell whether activations are checkpointed in the reentrant way."""
    return any(node.name() == REENTRANT for node in _nodes(loss))


def _nodes(loss: Tensor) -> Iterator[Any]:
    """Yield every node of the graph of ``loss``."""
    seen: set[Any] = set()
    waiting = [loss.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            yield node
            waiting.extend(upstream for upstream, _ in node.next_functions)


# What FSDP2 has of a parameter besides its shard.

_shards: WeakSet[Any] = WeakSet()
_groups: WeakSet[Any] = WeakSet()  # of shards that are reduced together
_looked_up = WeakTensorKeyDictionary()


def shards_beside(params: Sequence[Tensor]) -> list[Tensor]:
    """Return FSDP2's parameters that are not among ``params``; refuse unreduced gradients.

    Raises:
        RuntimeError: a backward pass without gradient synchronisation has left gradients of
            ``params`` that the next pass would add to its own.
    """
    mine = set(params)
    new = [p for p in mine if sharded(p) and p not in _looked_up]
    if new:
        _find_shards()
        _looked_up.update(dict.fromkeys(new))
    for each in _shards:
        whole = getattr(each, "_unsharded_param", None)
        left = each.unsharded_accumulated_grad is not None
        if each.sharded_param in mine and (left or (whole is not None and whole.grad is not None)):
            raise RuntimeError(UNREDUCED)
    for group in _groups:
        if getattr(group, "_partial_reduce_output", None) is not None:
            if any(each.sharded_param in mine for each in group.fsdp_params):
                raise RuntimeError(UNREDUCED)
    return [each.sharded_param for each in _shards if each.sharded_param not in mine]


def _find_shards() -> None:
    """Look for what `fully_shard` has made; a DTensor does not know it."""
    try:
        from torch.distributed.fsdp._fully_shard._fsdp_param import FSDPParam
        from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup
    except ImportError:  # another version of torch keeps them elsewhere
        return
    for thing in gc.get_objects():
        if type(thing) is FSDPParam:
            _shards.add(thing)
        elif type(thing) is FSDPParamGroup:
            _groups.add(thing)


# Gradients into pieces.


@dataclass
class Wanted:
    """A tensor in which weights are selected.

    Attributes:
        natural, adversarial: Its gradients for the score, on this process; of a shard, or not yet
            reduced. None counts as 0.
        like: This process's part of the parameter.
        alpha: Share of the natural gradient.
        fraction: Share of the weights that is updated.
        pool: Those with the same number share a threshold.
        numel: Size of the whole tensor.
        ring: Who holds its pieces; None: every process has the whole.
        score: In place of the gradients: scores of this process's piece; only with a ring.
    """

    natural: Tensor | None
    adversarial: Tensor | None
    like: Tensor
    alpha: float
    fraction: float
    pool: int
    numel: int
    ring: Ring | None
    score: Tensor | None = None


def select(wanted: Sequence[Wanted], everyone: Ring) -> list[Tensor]:
    """Return one mask for each tensor, with the shape of what this process has of it.

    Every process of ``everyone`` must call this with the same list.
    """
    scores: dict[int, Tensor] = {}
    buckets = list(_buckets(wanted, everyone.size))
    for bucket in buckets:
        scores.update(bucket.reduce(wanted, everyone))
    for i, each in enumerate(wanted):
        if each.ring is not None:
            score = each.score
            if score is None:
                score = rgp_score(*_present(each), each.alpha)
            scores[i] = score.reshape(-1)
    rings = [each.ring or everyone for each in wanted]
    of_pool: dict[int, Ring] = {}
    for each, ring in zip(wanted, rings, strict=True):
        if of_pool.setdefault(each.pool, ring) != ring:
            raise RuntimeError(
                "scope='global' needs one threshold over parameters that different processes "
                "hold: some are sharded over one mesh, some over another or not at all. Use "
                "scope='tensor', or shard all of them alike."
            )
    pieces: dict[int, Tensor] = {}
    for ring in dict.fromkeys(rings):
        mine = [i for i, its in enumerate(rings) if its == ring]
        found = _select_in_pieces([scores[i] for i in mine], [wanted[i] for i in mine], ring)
        pieces.update(zip(mine, found, strict=True))
    masks = {i: pieces[i].view(w.like.shape) for i, w in enumerate(wanted) if w.ring is not None}
    masks.update(_gather(buckets, pieces, wanted, everyone))
    return [masks[i] for i in range(len(wanted))]


def _present(wanted: Wanted) -> tuple[Tensor | None, Tensor | None]:
    """Return both gradients, not both None."""
    if wanted.natural is None and wanted.adversarial is None:
        return torch.zeros_like(wanted.like), None
    return wanted.natural, wanted.adversarial


_Segment = tuple[int, int, int]  # which tensor, where it begins in the bucket, its size


@dataclass
class _Bucket:
    """Tensors of one dtype and device that are reduced together, one after the other.

    Attributes:
        segments: Where each lies.
        piece: Weights in the piece of one process: a multiple of 8, so that masks are whole bytes.
        needs: Whether the natural, and whether the adversarial gradient counts.
    """

    segments: list[_Segment]
    piece: int
    needs: tuple[bool, bool]

    def mine(self, rank: int) -> Iterable[tuple[int, int, int]]:
        """Yield tensor, first and last place (exclusive) of what lies in the piece of ``rank``."""
        low = rank * self.piece
        for index, start, numel in self.segments:
            first = min(max(start - low, 0), self.piece)
            last = min(max(start + numel - low, 0), self.piece)
            yield index, first, last

    def reduce(self, wanted: Sequence[Wanted], ring: Ring) -> dict[int, Tensor]:
        """Average the gradients over the processes and return the scores of this one's piece."""
        like = wanted[self.segments[0][0]].like
        pieces: list[Tensor | None] = []
        for role, needed in zip(("natural", "adversarial"), self.needs, strict=True):
            if not needed:
                pieces.append(None)
                continue
            whole = like.new_zeros(self.piece * ring.size)
            for index, start, numel in self.segments:
                gradient = getattr(wanted[index], role)
                if gradient is not None:
                    whole[start : start + numel].view(gradient.shape).copy_(gradient)
            whole.div_(ring.size)  # before the sum, which may be in half precision
            pieces.append(_reduce_scatter(whole, ring))
        scores = {}
        for index, first, last in self.mine(ring.rank):
            g_nat, g_adv = (None if piece is None else piece[first:last] for piece in pieces)
            scores[index] = rgp_score(g_nat, g_adv, wanted[index].alpha)
        return scores


def _buckets(wanted: Sequence[Wanted], size: int) -> Iterable[_Bucket]:
    """Yield the tensors that every process has the whole of, in buckets."""
    kinds: dict[Any, list[int]] = {}
    for i, each in enumerate(wanted):
        if each.ring is None:
            needs = each.alpha > 0.0, each.alpha < 1.0
            kinds.setdefault((each.like.dtype, each.like.device, needs), []).append(i)
    for (*_, needs), indices in kinds.items():
        segments: list[_Segment] = []
        start = 0
        for i in indices:
            if segments and start + wanted[i].numel > BUCKET:
                yield _bucket(segments, start, size, needs)
                segments, start = [], 0
            segments.append((i, start, wanted[i].numel))
            start += wanted[i].numel
        yield _bucket(segments, start, size, needs)


def _bucket(segments: list[_Segment], numel: int, size: int, needs: tuple[bool, bool]) -> _Bucket:
    return _Bucket(segments, -(-numel // (8 * size)) * 8, needs)


def _reduce_scatter(whole: Tensor, ring: Ring) -> Tensor:
    """Return the sum over the processes of this one's piece."""
    piece = whole.numel() // ring.size
    mine = whole.new_empty(piece)
    try:
        _named("reduce_scatter_single", "reduce_scatter_tensor")(mine, whole, group=ring.group)
    except (RuntimeError, NotImplementedError) as error:
        if "support" not in str(error):
            raise
        # an older gloo: twice the bytes
        mine = ring.sum_(whole)[ring.rank * piece : (ring.rank + 1) * piece]
    return mine


def _named(name: str, before: str) -> Any:
    """Return a collective by its name in this version of torch."""
    return getattr(dist, name, None) or getattr(dist, before)


def _gather(
    buckets: Sequence[_Bucket], pieces: Mapping[int, Tensor], wanted: Sequence[Wanted], ring: Ring
) -> dict[int, Tensor]:
    """Return the masks of whole tensors from every process's piece of them, as bits."""
    by_device: dict[torch.device, list[_Bucket]] = {}
    for bucket in buckets:
        by_device.setdefault(pieces[bucket.segments[0][0]].device, []).append(bucket)
    masks: dict[int, Tensor] = {}
    for device, mine in by_device.items():
        packed = []
        for bucket in mine:
            mask = torch.zeros(bucket.piece, dtype=torch.bool, device=device)
            for index, first, last in bucket.mine(ring.rank):
                mask[first:last] = pieces[index]
            packed.append(pack_bits(mask))
        sent = torch.cat(packed)
        got = sent.new_empty(ring.size * sent.numel())
        _named("all_gather_single", "all_gather_into_tensor")(got, sent, group=ring.group)
        columns = torch.split(got.view(ring.size, -1), [bits.numel() for bits in packed], dim=1)
        for bucket, bits in zip(mine, columns, strict=True):
            like = torch.empty(bucket.piece * ring.size, dtype=torch.bool, device=device)
            whole = unpack_bits(bits.reshape(-1), like)
            for index, start, numel in bucket.segments:
                masks[index] = whole[start : start + numel].view(wanted[index].like.shape)
    return masks


# Selection over pieces.


def _select_in_pieces(
    scores: Sequence[Tensor], wanted: Sequence[Wanted], ring: Ring
) -> list[Tensor]:
    """Return the masks of this process's pieces; the rule is `_reference.topk_masks`'s."""
    sizes: dict[int, int] = {}  # by pool
    wide: dict[int, bool] = {}
    for each, score in zip(wanted, scores, strict=True):
        sizes[each.pool] = sizes.get(each.pool, 0) + each.numel
        wide[each.pool] = wide.get(each.pool, False) or score.dtype == torch.float64
    masks: dict[int, Tensor] = {}
    for dtype in (torch.float32, torch.float64):
        mine = [i for i, w in enumerate(wanted) if wide[w.pool] == (dtype == torch.float64)]
        if mine:
            fractions = {wanted[i].pool: wanted[i].fraction for i in mine}
            numbers = {pool: number for number, pool in enumerate(fractions)}
            counts = [update_count(sizes[pool], each) for pool, each in fractions.items()]
            keys = [_keys(scores[i], dtype) for i in mine]
            chosen = _top(keys, [numbers[wanted[i].pool] for i in mine], counts, ring)
            masks.update(zip(mine, chosen, strict=True))
    return [masks[i] for i in range(len(scores))]


def _keys(score: Tensor, dtype: torch.dtype) -> Tensor:
    """Return integers in the order of the scores: NaN on top, all NaN alike, 0 for 0 and -0."""
    score = score.to(dtype) + 0.0
    score = score.masked_fill(score.isnan(), torch.nan)
    bits = score.view(torch.int32 if dtype == torch.float32 else torch.int64)
    return bits ^ ((bits >> (8 * bits.element_size() - 1)) & torch.iinfo(bits.dtype).max)


def _top(
    keys: Sequence[Tensor], pools: Sequence[int], counts: Sequence[int], ring: Ring
) -> list[Tensor]:
    """Mark the ``counts[pool]`` highest keys of each pool, over all pieces, without keys of 0."""
    device = keys[0].device
    width = 8 * keys[0].element_size()
    wanted = _constant(tuple(counts), device)  # still to be found among those that match
    prefix = torch.zeros(len(counts), dtype=torch.int64, device=device)
    left = list(_chunks(keys, pools, device))
    for shift in range(width - 8, -1, -8):
        first = shift == width - 8
        total = torch.zeros(len(counts) * BINS + 1, dtype=torch.int64, device=device)
        for n, (key, pool) in enumerate(left):
            match = None if first else (key >> (shift + 8)) == prefix[pool]
            if match is not None and device.type == "cpu":  # elsewhere this would wait for a number
                key, pool = key[match], pool[match] if isinstance(pool, Tensor) else pool
                left[n], match = (key, pool), None
            digit = (key >> shift) + BINS // 2 if first else (key >> shift) & (BINS - 1)
            place = digit + pool * BINS
            if match is not None:
                place = torch.where(match, place, total.numel() - 1)
            total += _histogram(place, total)
        histogram = ring.sum_(total[:-1].view(len(counts), BINS))
        reaching = histogram.flip(1).cumsum(1).flip(1)  # how many have this digit or a higher one
        digit = (reaching >= wanted[:, None]).sum(1, keepdim=True).sub_(1).clamp_(min=0)
        above = reaching.gather(1, digit) - histogram.gather(1, digit)
        wanted = wanted - above.squeeze(1)
        digit = digit.squeeze(1)
        prefix = digit - BINS // 2 if first else (prefix << 8) + digit
    return _resolve_ties(keys, pools, prefix, wanted, ring)


def _chunks(
    keys: Sequence[Tensor], pools: Sequence[int], device: torch.device
) -> Iterable[tuple[Tensor, Tensor | int]]:
    """Yield keys with their pools: large tensors as they are, small ones together."""
    small = [i for i, key in enumerate(keys) if 0 < key.numel() <= 2**16]
    for i, key in enumerate(keys):
        if key.numel() > 2**16:
            yield key, pools[i]
    if small:
        lengths = _constant(tuple(keys[i].numel() for i in small), device)
        its = _constant(tuple(pools[i] for i in small), device)
        total = sum(keys[i].numel() for i in small)
        yield (
            torch.cat([keys[i] for i in small]),
            torch.repeat_interleave(its, lengths, output_size=total),
        )


@lru_cache(maxsize=64)
def _constant(numbers: tuple[int, ...], device: torch.device) -> Tensor:
    """Return numbers on a device; sending them there waits for it, so it is done once."""
    return torch.tensor(numbers, device=device)


def _histogram(place: Tensor, like: Tensor) -> Tensor:
    """Count the places. On a GPU ``bincount`` would wait for the device."""
    if place.device.type == "cpu":
        return torch.bincount(place, minlength=like.numel())
    place = place.to(torch.int64)
    return torch.zeros_like(like).scatter_add_(0, place, torch.ones_like(place))


def _resolve_ties(
    keys: Sequence[Tensor],
    pools: Sequence[int],
    threshold: Tensor,
    wanted: Tensor,
    ring: Ring,
) -> list[Tensor]:
    """Mark what lies above the threshold, and of its equals the first ``wanted`` of each pool."""
    ties = [key == threshold[pool] for key, pool in zip(keys, pools, strict=True)]
    table = torch.zeros(ring.size, len(keys), dtype=torch.int64, device=threshold.device)
    table[ring.rank] = torch.stack([tie.sum() for tie in ties])
    ring.sum_(table)
    lower = table[: ring.rank].sum(0)  # in earlier pieces of the same tensor
    taken: dict[int, Tensor] = {}  # by pool: equals in the tensors before this one
    masks = []
    for i, (key, pool, tie) in enumerate(zip(keys, pools, ties, strict=True)):
        before = taken.get(pool, torch.zeros_like(wanted[pool]))
        taken[pool] = before + table[:, i].sum()
        allowed = wanted[pool] - before - lower[i]
        among = tie.cumsum(0) <= allowed
        masks.append(((key > threshold[pool]) | (tie & among)) & (key != 0))
    return masks


def average_(tensors: Sequence[Tensor], ring: Ring) -> None:
    """Average each tensor over the processes, in place, in buckets."""
    if ring.size == 1:
        return
    buckets: dict[Any, list[list[Tensor]]] = {}
    room: dict[Any, int] = {}  # left in the last bucket
    for tensor in tensors:
        kind = tensor.dtype, tensor.device
        if room.get(kind, 0) < tensor.numel():
            buckets.setdefault(kind, []).append([])
            room[kind] = BUCKET
        buckets[kind][-1].append(tensor)
        room[kind] -= tensor.numel()
    for bucket in (each for same in buckets.values() for each in same):
        flat = torch.cat([t.reshape(-1) for t in bucket]).div_(ring.size)
        dist.all_reduce(flat, group=ring.group)
        for tensor, part in zip(
            bucket, torch.split(flat, [t.numel() for t in bucket]), strict=True
        ):
            tensor.copy_(part.view(tensor.shape))


# Do the ranks agree?


def differing(numbers: Tensor, ring: Ring) -> list[int]:
    """Return the positions at which the processes hold different int64; waits for all."""
    extremes = torch.stack([numbers, ~numbers])  # the complement turns the order round
    dist.all_reduce(extremes, op=dist.ReduceOp.MAX, group=ring.group)
    found: list[int] = (extremes[0] != ~extremes[1]).nonzero().flatten().tolist()
    return found


def digest(thing: object) -> int:
    """Return a number that is the same in every process for what prints the same."""
    return zlib.crc32(repr(thing).encode())


def fingerprint(tensor: Tensor | None, device: torch.device) -> Tensor:
    """Return the sum of a tensor's bits, or of a mask's places, on ``device``; -1 for None."""
    if tensor is None:
        return torch.full((), -1, dtype=torch.int64, device=device)
    tensor = local(tensor.detach())
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    if tensor.layout != torch.strided:
        tensor = tensor.to_dense()
    if tensor.dtype == torch.bool:  # masks have equal sums: k
        places = torch.arange(1, tensor.numel() + 1, device=tensor.device)
        return (tensor.reshape(-1) * places).sum().to(device)
    ints = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    return tensor.contiguous().view(ints).sum(dtype=torch.int64).to(device)
