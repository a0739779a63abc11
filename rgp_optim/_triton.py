"""The GPU backend: tables of what is where, the launches of `_kernels`, and what was selected.

A plan has what does not change from step to step; the settings of its groups and the addresses of
its tensors are tables of their own. All are copied to the device without waiting for it, kept for
the next steps, and awaited by each stream that reads them.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._compile import _disable_dynamo

from rgp_optim import _kernels as kernels
from rgp_optim import _reference
from rgp_optim._checks import error_text
from rgp_optim._kernels import CODES, MIXED, OPTIONS, WORD
from rgp_optim._reference import rgp_score, topk_masks, update_count

__all__ = ["Selection", "rgp_score", "select", "topk_masks"]

HALF_WIDTH = 4.5  # half the window, in standard deviations of the sample's count
EXACTNESS = 8  # its edges are found as exactly as an eighth of that
LIST_SHARE = 128  # one weight in so many has a place in the list,
LIST_LEAST = 1024  # and so many more
HOST = torch.device("cpu")  # named: a program may have another default device
ALL_K = -1  # P_K of a pool of which everything is selected
NONE, SOME, EACH = (int(each.value) for each in (kernels.NONE, kernels.SOME, kernels.EACH))
KEPT = 16  # tables of each kind that a plan keeps
CAPTURES = 32  # tables of addresses that CUDA graphs can have of a plan

Column = Sequence[Tensor | None]


# Tables on the device.


class _Tables:
    """Tables that are copied to the device on one stream and read on any."""

    def __init__(self, device: torch.device, *values: Any, dtypes: Sequence[torch.dtype]) -> None:
        self.device = device
        self.on_device = [_copied(v, d, device) for v, d in zip(values, dtypes, strict=True)]
        if device.type == "cuda":
            stream = torch.cuda.current_stream(device)
            self._arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._arrived.record(stream)
            self._awaited = {stream}

    def get(self) -> list[Tensor]:
        """Return the tables for use on the current stream."""
        if self.device.type == "cuda" and not _capturing(self.device):
            stream = torch.cuda.current_stream(self.device)
            if stream not in self._awaited:  # once is enough
                stream.wait_event(self._arrived)
                for table in self.on_device:
                    table.record_stream(stream)
                self._awaited.add(stream)
        return self.on_device


def _copied(values: Any, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Copy numbers to the device without waiting for it."""
    table = torch.as_tensor(values, dtype=dtype, device=HOST)
    return table if device.type == "cpu" else table.pin_memory().to(device, non_blocking=True)


def _capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


class _Kept(OrderedDict[Any, Any]):
    """The last few of something, by what they were made from."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self.most = most

    def find(self, key: Any) -> Any:
        """Return what is kept, or None."""
        found = self.pop(key, None)
        if found is not None:
            self[key] = found
        return found

    def keep(self, key: Any, value: Any) -> Any:
        self[key] = value
        while len(self) > self.most:
            self.popitem(last=False)
        return value


class _Plan:
    """All that does not change from step to step: who is where, and what is sampled."""

    def __init__(
        self,
        sizes: Sequence[int],
        layouts: Sequence[tuple[int, int]],
        dtypes: Sequence[torch.dtype],
        pools: Sequence[int],
        device: torch.device,
    ) -> None:
        self.device = device
        self.code = CODES[dtypes[0]] if len(set(dtypes)) == 1 else MIXED
        members: dict[int, list[int]] = {}
        for i, pool in enumerate(pools):
            members.setdefault(pool, []).append(i)
        self.groups = [_Group([(i, sizes[i]) for i in mine]) for mine in members.values()]
        self.groups.sort(key=lambda group: group.whole)  # those that are counted come first
        tensors = [[0] * kernels.T_WIDTH.value for _ in sizes]
        chunk_tensor: list[int] = []
        chunk_start: list[int] = []
        samples = []
        self.rows: list[list[int]] = []
        runs = self.room = self.counted = self.listed = 0
        for number, group in enumerate(self.groups):
            base, first = 0, len(chunk_tensor)
            for i, size in group.members:
                tensors[i] = [size, number, base, *layouts[i], CODES[dtypes[i]]]
                base += size
                starts = range(0, size, kernels.CHUNK.value)
                chunk_tensor += [i] * len(starts)
                chunk_start += starts
            chunks = 0 if group.whole else len(chunk_tensor) - first
            samples.append(group.sample())
            group.sampled = len(samples[-1][0])
            self.rows.append([first, chunks, runs, group.sampled, self.room, group.room])
            runs += group.sampled
            self.room += group.room
            self.counted += chunks
            self.listed += not group.whole
        self.chunks = len(chunk_tensor)
        run_tensor, run_start = (torch.cat(each) for each in zip(*samples, strict=True))
        long, short = torch.int64, torch.int32
        self.tables = _Tables(
            device, tensors, chunk_tensor, chunk_start, run_tensor, run_start,
            dtypes=(long, short, long, short, long),
        )  # fmt: skip
        self._settings = _Kept(KEPT)
        self._addresses = _Kept(KEPT)
        self._captured: dict[tuple[int, ...], Tensor] = {}
        self._in_graphs: list[_Tables] = []
        # Host memory for the tables of captured steps: none can be pinned during a capture.
        shape = CAPTURES if device.type == "cuda" else 0, len(sizes) * kernels.A_WIDTH.value
        self._staged = list(torch.empty(shape, dtype=long, device=HOST, pin_memory=shape[0] > 0))

    def settings(self, alphas: Sequence[float], fractions: Sequence[float]) -> _Tables:
        """Return the tables of what is asked of each pool and tensor."""
        key = tuple(alphas), tuple(fractions)
        found: _Tables | None = self._settings.find(key)
        if found is None:
            if _capturing(self.device):
                raise RuntimeError(_EAGER_FIRST)
            rows = []
            for group, row in zip(self.groups, self.rows, strict=True):
                k, *ranks = group.ranks(fractions[group.members[0][0]])
                first, chunks, run, runs, place, room = row
                only = group.members[0][0] if len(group.members) == 1 else -1
                rows.append([group.size, k, first, chunks, run, runs, *ranks, place, room, only])
            shares = [[a, 1.0 - a] for a in alphas]
            types = torch.int64, torch.float32
            found = self._settings.keep(key, _Tables(self.device, rows, shares, dtypes=types))
        return found

    def tables_with(self, settings: _Tables) -> list[Tensor]:
        """Return the tables of the plan and of settings; a graph that is captured keeps both."""
        if _capturing(self.device) and settings not in self._in_graphs:
            self._in_graphs.append(settings)
            _in_graphs.add(self)
        return [*settings.get(), *self.tables.get()]

    def addresses(self, *columns: Column) -> Tensor:
        """Return the table of where the tensors are; five columns, as `_kernels` numbers them."""
        flat = tuple(
            0 if t is None else t.data_ptr() for row in zip(*columns, strict=True) for t in row
        )
        if _capturing(self.device):
            return self._capture(flat)
        found: _Tables | None = self._addresses.find(flat)
        if found is None:
            made = _Tables(self.device, flat, dtypes=(torch.int64,))
            found = self._addresses.keep(flat, made)
        return found.get()[0]

    def _capture(self, flat: tuple[int, ...]) -> Tensor:
        """Return a table that a graph copies to the device at each replay."""
        if flat not in self._captured:
            if not self._staged:
                raise RuntimeError(
                    "step() was captured in CUDA graphs too often with the same parameters: its "
                    "tables of addresses are used up. Capture it once and replay that graph."
                )
            staged = self._staged.pop()
            staged.copy_(torch.tensor(flat, dtype=torch.int64, device=HOST))
            self._captured[flat] = staged
            _in_graphs.add(self)
        return self._captured[flat].to(self.device, non_blocking=True)


@dataclass
class _Group:
    """Tensors that share a threshold, by number and size."""

    members: list[tuple[int, int]]
    sampled: int = 0  # runs

    def __post_init__(self) -> None:
        self.size = sum(size for _, size in self.members)
        chunk = kernels.CHUNK.value
        if sum(-(-size // chunk) * chunk for _, size in self.members) > kernels.PLACES.value:
            rule = f"have fewer than 2**{kernels.PLACE_BITS.value} weights with one threshold"
            found = f"{self.size} weights in {len(self.members)} tensors"
            hint = "Use backend='torch', or scope='tensor'."
            raise RuntimeError(error_text("backend 'triton'", rule, found, hint))
        self.runs = sum(-(-size // kernels.RUN.value) for _, size in self.members)
        self.whole = self.runs <= kernels.SAMPLE.value // kernels.RUN.value
        self.room = 0 if self.whole else self.size // LIST_SHARE + LIST_LEAST

    def sample(self) -> tuple[Tensor, Tensor]:
        """Return tensor and start of each run that is sampled; of a small group, all of them."""
        numbers = torch.tensor([i for i, _ in self.members], device=HOST)
        sizes = torch.tensor([size for _, size in self.members], device=HOST)
        runs = -(-sizes // kernels.RUN.value)  # what lies behind a tensor's end is left out
        ends = runs.cumsum(0)
        wanted = min(kernels.SAMPLE.value // kernels.RUN.value, self.runs)
        chosen = torch.arange(wanted, device=HOST)
        if not self.whole:  # one at random in each of equal strata
            edges = torch.arange(wanted + 1, device=HOST) * self.runs // wanted
            generator = torch.Generator(HOST).manual_seed(self.runs)
            draws = torch.rand(wanted, generator=generator, dtype=torch.float64, device=HOST)
            chosen = edges[:-1] + (draws * edges.diff()).long()
        member = torch.searchsorted(ends, chosen, right=True)
        return numbers[member], (chosen - (ends - runs)[member]) * kernels.RUN.value

    def ranks(self, fraction: float) -> tuple[int, int, int, int]:
        """Return k, and ranks in the sample above and below it, and how exactly to find them."""
        k = ALL_K if fraction == 1.0 else update_count(self.size, fraction)
        if self.whole or k <= 0:
            return k, 0, 0, 0
        sampled = self.sampled * kernels.RUN.value
        expected = sampled * k / self.size
        half = HALF_WIDTH * (expected * (1 - k / self.size)) ** 0.5 + kernels.RUN.value
        below = int(expected + half) + 1
        return (
            k,
            max(int(expected - half), 0),
            below if below <= sampled else self.size + 1,
            max(1, int(half / EXACTNESS)),
        )


_EAGER_FIRST = (
    "A CUDA graph can capture step() only after an eager step with the same parameters and "
    "settings: run a few steps before the capture, as torch.cuda.graph asks for."
)
_plans = _Kept(8)
_in_graphs: set[_Plan] = set()  # replays read their tables: they are kept for good


def _plan(*key: Any) -> _Plan:
    """Return the plan for these arguments; the last few are kept."""
    found: _Plan | None = _plans.find(key)
    if found is None:
        if _capturing(key[-1]):
            raise RuntimeError(_EAGER_FIRST)
        found = _plans.keep(key, _Plan(*key))
    return found


# Select.


@_disable_dynamo
def select(
    g_nats: Sequence[Tensor | None],
    g_advs: Sequence[Tensor | None],
    alphas: Sequence[float],
    fractions: Sequence[float],
    pools: Sequence[int],
) -> Selection:
    """Score and select; what `_reference.select` returns, as bits."""
    pairs, layouts = [], []
    for g_nat, g_adv, alpha in zip(g_nats, g_advs, alphas, strict=True):
        some = g_adv if g_nat is None else g_nat
        assert some is not None
        layout = _layout(some)
        if layout is None or (g_nat is not None and g_adv is not None and not _alike(g_nat, g_adv)):
            g_nat = None if g_nat is None else g_nat.contiguous()
            g_adv = None if g_adv is None else g_adv.contiguous()
            some, layout = some.contiguous(), (1, 1)
        layouts.append(layout)
        pairs.append((some, g_nat if alpha > 0.0 else None, g_adv if alpha < 1.0 else None))
    likes = [some for some, _, _ in pairs]
    plan = _plan(
        tuple(like.numel() for like in likes),
        tuple(layouts),
        tuple(like.dtype for like in likes),
        tuple(pools),
        likes[0].device,
    )
    nats, advs = [nat for _, nat, _ in pairs], [adv for _, _, adv in pairs]
    return Selection(plan, plan.settings(alphas, fractions), likes, nats, advs)


def _layout(tensor: Tensor) -> tuple[int, int] | None:
    """Return inner and outer of the memory order, as `_row_major` takes them, if it has any."""
    if tensor.is_contiguous():
        return 1, 1
    if tensor.dim() == 2 and tensor.t().is_contiguous():
        return tensor.shape[0], tensor.shape[1]
    if tensor.dim() > 2 and tensor.movedim(1, -1).is_contiguous():
        return tensor.shape[1], tensor[0, 0].numel()
    return None


def _alike(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.stride() == b.stride()


class Selection:
    """What was selected; see `_reference.Selection`. One bit for each weight."""

    def __init__(
        self, plan: _Plan, settings: _Tables, likes: list[Tensor], nats: Column, advs: Column
    ) -> None:
        self._plan, self._settings = plan, settings
        self._likes = [(t.shape, t.stride(), t.dtype) for t in likes]
        self._none: list[None] = [None] * len(likes)
        self._gradients: tuple[Column, Column] | None = (nats, advs)
        self._both = _presence(nats) == _presence(advs) == EACH
        self._bits = self._empty(plan.chunks * (kernels.CHUNK.value // WORD), torch.int32)
        self._state = self._empty(len(plan.groups) * kernels.S_WIDTH.value, torch.int64)
        if plan.chunks == 0:
            return
        tables = plan.tables_with(settings)
        pools, shares, tensors, chunk_tensor, chunk_start, run_tensor, run_start = tables
        addresses = plan.addresses(nats, advs, self._none, self._none, self._none)
        with self._guard():
            kernels._bracket[(len(plan.groups),)](
                pools, tensors, shares, addresses, run_tensor, run_start, self._state,
                CODE=plan.code, **_threaded("_bracket"),
            )  # fmt: skip
            if plan.counted:
                counts = self._empty(plan.counted * 4, torch.int64)
                kernels._count[(plan.counted,)](
                    pools, tensors, shares, addresses, chunk_tensor, chunk_start, counts,
                    self._state, CODE=plan.code, ALIGNED=_aligned(nats, advs), BOTH=self._both,
                    **OPTIONS["_count"],
                )  # fmt: skip

    @_disable_dynamo
    def masks(self) -> list[Tensor]:
        """Return the masks: True where a weight is updated."""
        self._finish(self._none, self._none, self._none)
        masks = [
            torch.empty_strided(shape, stride, dtype=torch.bool, device=self._plan.device)
            for shape, stride, _ in self._likes
        ]
        self._use_bits(2, masks, self._none, self._none)
        return masks

    @_disable_dynamo
    def apply_(self, targets: Column, weights: Column, saved: Column) -> None:
        """Set the targets to 0, in place, where conserved, and copy each weight to ``saved``."""
        masked = [self._fits(i, target) for i, target in enumerate(targets)]
        kept = [self._fits(i, *pair) for i, pair in enumerate(zip(weights, saved, strict=True))]
        columns = _only(targets, masked), *_pairs(_only(weights, kept), _only(saved, kept))
        if self._gradients is not None:
            self._finish(*columns)
        else:
            self._use_bits(1, *columns)
        if not all(masked + kept):  # in another memory order than their gradients
            self._plainly().apply_(
                _only(targets, masked, False),
                _only(weights, kept, False),
                _only(saved, kept, False),
            )

    @_disable_dynamo
    def conserve_(self, weights: Column, saved: Column) -> None:
        """Put back, in place and bit for bit, the saved value of each weight outside its mask."""
        self._finish(self._none, self._none, self._none)
        kept = [self._fits(i, *pair) for i, pair in enumerate(zip(weights, saved, strict=True))]
        self._use_bits(0, self._none, *_pairs(_only(weights, kept), _only(saved, kept)))
        if not all(kept):
            self._plainly().conserve_(_only(weights, kept, False), _only(saved, kept, False))

    def _plainly(self) -> _reference.Selection:
        return _reference.Selection(self.masks())

    def _fits(self, i: int, *tensors: Tensor | None) -> bool:
        """Tell whether tensors lie in memory as the gradients of entry i do, or are missing."""
        if any(t is None for t in tensors):
            return True
        _, stride, dtype = self._likes[i]
        return all(
            t is not None and type(t) is Tensor and t.stride() == stride and t.dtype == dtype
            for t in tensors
        )  # a subclass may have no memory of its own

    def _finish(self, targets: Column, weights: Column, saved: Column) -> None:
        """Write the bits, once, and what goes with them."""
        if self._gradients is None:
            return
        columns = (*self._gradients, targets, weights, saved)
        self._gradients = None
        plan = self._plan
        if plan.chunks == 0:
            return
        tables = plan.tables_with(self._settings)
        pools, shares, tensors, chunk_tensor, chunk_start, _, _ = tables
        addresses = plan.addresses(*columns)
        entries = self._empty(plan.room + 1, torch.int64)
        with self._guard():
            kernels._mask[(plan.chunks,)](
                pools, tensors, shares, addresses, chunk_tensor, chunk_start, entries, self._state,
                self._bits, CODE=plan.code, ALIGNED=_aligned(*columns), BOTH=self._both,
                TARGET=_presence(targets), SAVED=_presence(saved), **OPTIONS["_mask"],
            )  # fmt: skip
            if plan.listed:
                kernels._resolve[(plan.listed,)](
                    pools, tensors, addresses, chunk_tensor, chunk_start, entries, self._state,
                    self._bits, CODE=plan.code, **_threaded("_resolve"),
                )  # fmt: skip

    def _use_bits(self, what: int, targets: Column, weights: Column, saved: Column) -> None:
        plan = self._plan
        if plan.chunks == 0:
            return
        tensors, chunk_tensor, chunk_start, _, _ = plan.tables.get()
        addresses = plan.addresses(self._none, self._none, targets, weights, saved)
        with self._guard():
            kernels._use_bits[(plan.chunks,)](
                tensors, addresses, chunk_tensor, chunk_start, self._bits, CODE=plan.code,
                WHAT=what, **OPTIONS["_use_bits"],
            )  # fmt: skip

    def _empty(self, size: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(size, dtype=dtype, device=self._plan.device)

    def _guard(self) -> Any:
        device = self._plan.device
        return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _threaded(kernel: str) -> dict[str, Any]:
    """Return the options of a kernel that wants to know its threads."""
    return {"THREADS": 32 * OPTIONS[kernel]["num_warps"], **OPTIONS[kernel]}


def _only(column: Column, flags: Sequence[bool], wanted: bool = True) -> list[Tensor | None]:
    """Return the column with None where the flag is another."""
    return [t if flag is wanted else None for t, flag in zip(column, flags, strict=True)]


def _pairs(weights: Column, saved: Column) -> tuple[Column, Column]:
    """Return both columns with None where either has it."""
    whole = [w is not None and s is not None for w, s in zip(weights, saved, strict=True)]
    return _only(weights, whole), _only(saved, whole)


def _presence(column: Column) -> int:
    """Tell how many of a column's tensors are there, as the kernels want to know it."""
    there = sum(t is not None for t in column)
    if there == 0:
        return NONE
    return EACH if there == len(column) else SOME


def _aligned(*columns: Column) -> bool:
    """Tell whether all tensors begin where loads of 16 bytes can."""
    return all(t is None or t.data_ptr() % 16 == 0 for column in columns for t in column)
