"""The gradients taken for the score: swapped in and out of ``.grad``, cleared, noticed when stale.

A *window* is what lies between two steps: one batch, or several micro-batches whose gradients add
up. While a role ("natural" or "adversarial") is scored, each parameter's ``.grad`` is that role's
slot, so that autograd adds to it in place; afterwards ``.grad`` is again what it was before. Where
backward passes would set off a reduction (DistributedDataParallel), the gradients are taken past
``.grad`` instead, and are this process's own.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy
from torch.overrides import TorchFunctionMode

from rgp_optim._checks import check_choice, check_dense, error_text
from rgp_optim._distributed import is_reentrant, local, sharded, shards_beside, take

ROLES = ("natural", "adversarial")
Gradients = dict[Tensor, Tensor]

DONATED = (
    "This loss shares a compiled graph with another, and its backward pass was compiled to write "
    "over what it reads. At the start of the program, before anything is compiled, `import "
    "torch._functorch.config`, set `torch._functorch.config.donated_buffer = False` and "
    "`torch.compiler.config.cache_key_tag = 'kept graphs'`: without the second, PyTorch may take "
    "such code from its cache on disk, and the gradients are wrong without an error. Or give each "
    "loss a forward pass of its own."
)


class Slots:
    """The score gradients of the current window, by role and parameter.

    A window normally ends in `clear`, at the optimizer's ``step`` or ``zero_grad``. It can also end
    unseen: a gradient scaler skips the step, and then the model, not the optimizer, is asked to set
    its gradients to None. So one parameter is watched: when the training gradient that was seen
    there in this window disappears, or is another tensor at the next backward pass, the window is
    over. A ``zero_grad(set_to_none=False)`` of the model cannot be told from an accumulation.
    """

    def __init__(self) -> None:
        self._taken: dict[str, Gradients] = {}
        self._role: str | None = None
        self._watched: Tensor | None = None
        self._training_gradient: Tensor | None = None  # of the watched parameter, in this window
        self._hook: Any = None
        self._factor: _Factor | None = None  # of the losses that were scored in this window

    def __reduce__(self) -> tuple[type[Slots], tuple[()]]:
        """Copy as empty: the copy of a parameter has no gradient either."""
        return Slots, ()

    @property
    def empty(self) -> bool:
        """Whether nothing was taken in this window."""
        self._notice_the_end()
        return not self._taken

    @property
    def busy(self) -> str | None:
        """The role that is being scored right now."""
        return self._role

    def gradients(self, role: str) -> Gradients | None:
        """Return the gradients of ``role`` by parameter; None if none were taken."""
        self._notice_the_end()
        return self._taken.get(role)

    def clear(self) -> None:
        """Forget all gradients: the window is over."""
        self._taken.clear()
        self._training_gradient = None
        self._factor = None

    @property
    def roles(self) -> list[str]:
        """The roles that were taken in this window."""
        self._notice_the_end()
        return [role for role in ROLES if role in self._taken]

    def watch(self, candidates: Iterable[Tensor]) -> None:
        """Watch the first of ``candidates`` that can receive a gradient."""
        p = next((p for p in candidates if p.requires_grad and p.is_leaf and not is_lazy(p)), None)
        if p is None or p is self._watched:
            return
        self._unwatch()
        me = weakref.ref(self)  # a cycle through a parameter's hooks would never be collected

        def after_backward(watched: Tensor) -> None:
            slots = me()
            if slots is not None:
                slots._after_backward(watched)

        self._watched, self._training_gradient = p, None
        self._hook = p.register_post_accumulate_grad_hook(after_backward)  # type: ignore[no-untyped-call]

    def _unwatch(self) -> None:
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    def __del__(self) -> None:
        self._unwatch()

    def note_training_gradient(self) -> None:
        """Remember the watched gradient as one that belongs to this window."""
        if self._watched is not None:
            self._training_gradient = self._watched.grad

    @contextmanager
    def filling(
        self, role: str, params: Sequence[Tensor], keep: Sequence[bool], past_grad: bool
    ) -> Iterator[None]:
        """Let the backward passes inside add to the slots of ``role``.

        Args:
            role: "natural" or "adversarial".
            params: Every parameter of the optimizer.
            keep: Which of them are scored; the others' gradients from inside are dropped.
            past_grad: Take the gradients without the hooks that reduce what comes to ``.grad``.
        """
        self._begin(role)
        start = self._taken.get(role, {})
        with self._swapped(role, params, start, params, past_grad) as taken:
            yield
        self._store(
            role, {p: taken[p] for p, k in zip(params, keep, strict=True) if k and p in taken}
        )

    @contextmanager
    def taking(self, role: str, params: Sequence[Tensor], past_grad: bool) -> Iterator[Gradients]:
        """Yield a dict; at the end it holds what the backward passes inside computed."""
        self._begin(role)
        with self._swapped(role, params, {}, params if past_grad else None, past_grad) as taken:
            yield taken

    def add(self, role: str, gradients: Gradients) -> None:
        """Add ``gradients`` to the slots of ``role``, which owns them from now on."""
        slots = self._taken.get(role, {})
        for p, gradient in gradients.items():
            if p in slots:
                gradient = slots[p].add_(gradient)
            slots[p] = gradient
        self._store(role, slots)

    def spare(self, params: Sequence[Tensor]) -> Gradients:
        """Return the natural slots that can be written over once the masks are known.

        Only those that have the parameter's form and memory that nothing else lies in.
        """
        slots = self._taken.get("natural", {})
        claimed = Claims(t for p in params for t in (p, p.grad) if t is not None)
        spare: Gradients = {}
        for p in params:
            g = slots.get(p)
            if g is not None and _alike(g, p) and not claimed.claim(g):
                spare[p] = g
        return spare

    def _begin(self, role: str) -> None:
        check_choice("role", role, ROLES)
        if self._role is not None:
            rule = "be scored outside any other scoring block"
            raise RuntimeError(error_text(role, rule, f"inside score({self._role!r})"))
        self._notice_the_end()

    @contextmanager
    def _swapped(
        self,
        role: str,
        params: Sequence[Tensor],
        start: Mapping[Tensor, Tensor],
        wanted: Sequence[Tensor] | None,
        past_grad: bool,
    ) -> Iterator[Gradients]:
        """Put ``start`` into ``.grad``; at the end take out what is there and undo the swap.

        With ``wanted``, passes give to these parameters and to nobody else. With ``past_grad``,
        ``.grad`` is empty inside, and what they give is taken before it comes there.
        """
        own = set(params)
        beside = shards_beside(params) if any(sharded(p) for p in params) else []
        open_ones = {p for each in _open.blocks for p in each._wanted or ()}
        beside = [p for p in beside if p not in open_ones]
        outside = [p.grad for p in (*params, *beside)]
        taken: Gradients = {}
        passes = _Passes(self, start if past_grad else {}, wanted, past_grad)
        self._role = role
        try:
            for p in (*params, *([] if wanted is None else beside)):
                p.grad = None if past_grad else start.get(p)
            before = {p: local(g)._version for p, g in start.items()}
            with passes:
                yield taken
            claimed = Claims(g for g in outside if g is not None)
            claimed.add(g for r, gs in self._taken.items() if r != role for g in gs.values())
            if past_grad and any(p.grad is not None for p in params):
                raise RuntimeError(
                    f"score({role!r}): a gradient came to `.grad` past `Tensor.backward`, where it "
                    "cannot be kept apart from the one that the processes reduce. Call "
                    "`loss.backward()` inside the block."
                )
            for p in params:
                g = passes.taken.get(p) if past_grad else p.grad
                if g is not None:
                    copied = _is_view_of_more(g) or claimed.claim(g)
                    taken[p] = g.clone() if copied else g
            if all(g is start.get(p) and local(g)._version == before[p] for p, g in taken.items()):
                raise RuntimeError(
                    f"score({role!r}): no parameter received a gradient. Call `.backward()` inside "
                    "the block, on a loss that depends on the optimizer's parameters: not "
                    "`torch.autograd.grad`, not a detached loss, not with gradient "
                    "synchronisation switched off (with FSDP2 reduce every micro-batch: "
                    "`set_requires_gradient_sync(True)`; in Accelerate "
                    "`GradientAccumulationPlugin(sync_each_batch=True)`)."
                )
        except BaseException:
            self.clear()  # half a gradient would choose a wrong mask
            raise
        finally:
            self._role = None
            for p, gradient in zip((*params, *beside), outside, strict=True):
                if p in own or wanted is not None:
                    p.grad = gradient

    def _check_factor(self, loss: Tensor) -> None:
        """Refuse losses of one window that were multiplied by different scales."""
        factor = _Factor.of(loss)
        if self._factor is None:
            self._factor = factor
        elif not self._factor.is_same(factor):
            found = f"a loss scaled by {factor.value():g}, and one by {self._factor.value():g}"
            hint = (
                "Give all losses that are scored to the same GradScaler, or none. To weigh one "
                "against the other set `alpha`."
            )
            raise ValueError(error_text("score", "get losses on one scale", found, hint))

    def _store(self, role: str, slots: Gradients) -> None:
        try:
            for gradient in slots.values():
                check_dense(f"gradient of the {role} loss", gradient)
        except TypeError:
            self.clear()
            raise
        self._taken[role] = slots
        if slots and self._watched not in slots:
            self.watch(slots)

    def _after_backward(self, watched: Tensor) -> None:
        """Look at the gradient that a backward pass outside of scoring has just left."""
        if self._role is not None:
            return
        seen, now = self._training_gradient, watched.grad
        if seen is not None and now is not None and now is not seen:
            # Wrappers that keep gradients in buckets replace them, and so does create_graph.
            if not (_is_view_of_more(now) or now.requires_grad):
                self._taken.clear()
        self._training_gradient = now

    def _notice_the_end(self) -> None:
        """Forget the gradients if the training gradients that went with them are gone."""
        if self._training_gradient is None or self._watched is None or self._role is not None:
            return
        self._training_gradient = self._watched.grad
        if self._training_gradient is None:  # of all, or of this one, to leave it out of the step?
            scored = (p for gradients in self._taken.values() for p in gradients)
            if all(p.grad is None for p in scored):
                self.clear()


class _Passes(TorchFunctionMode):
    """Sees the backward passes of a scoring block, and says where their gradients go.

    A compiled model that is called inside is compiled once more for it, not for each block: what
    its handler does for other functions must stay this plain.
    """

    def __init__(
        self,
        slots: Slots,
        start: Mapping[Tensor, Tensor],
        wanted: Sequence[Tensor] | None,
        past_grad: bool,
    ) -> None:
        super().__init__()
        self._slots = slots
        self._wanted = wanted
        self._past_grad = past_grad
        self.taken: Gradients = dict(start)

    def __enter__(self) -> _Passes:
        _open.blocks.append(self)
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        _open.blocks.remove(self)
        super().__exit__(*error)  # type: ignore[no-untyped-call]

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is not Tensor.backward:
            return func(*args, **(kwargs or {}))
        try:
            return self._backward(*args, **(kwargs or {}))
        except RuntimeError as error:
            if "donated buffers" not in str(error):
                raise
            raise RuntimeError(DONATED) from error  # torch's own advice leaves out the cache

    def _backward(
        self,
        loss: Tensor,
        gradient: Tensor | None = None,
        retain_graph: bool | None = None,
        create_graph: bool = False,
        inputs: Any = None,
    ) -> None:
        options = {"retain_graph": retain_graph, "create_graph": create_graph}
        blocks = list(_open.blocks)  # those of several optimizers, one inside the other
        wanted = [p for each in blocks for p in each._wanted or () if p.requires_grad]
        asked = inputs
        if inputs is not None:
            asked = [inputs] if isinstance(inputs, Tensor) else list(inputs)
        if asked is None or any(each in set(wanted) for each in asked):  # no attack
            for each in blocks:
                each._slots._check_factor(loss)
        if not self._past_grad:
            # Not FSDP2's shards, which are no leaves of the graph; nor what autograd cannot choose.
            every = all(each._wanted is not None for each in blocks)
            choose = every and not any(sharded(p) for p in wanted) and not is_reentrant(loss)
            if asked is None and choose and wanted:
                asked = wanted
            loss.backward(gradient, inputs=asked, **options)  # type: ignore[no-untyped-call]
            return
        if asked is not None:
            others = [each for each in asked if each not in set(wanted)]
            wanted = [p for p in wanted if p in set(asked)]
            if others:
                keep = {**options, "retain_graph": retain_graph or bool(wanted) or create_graph}
                loss.backward(gradient, inputs=others, **keep)  # type: ignore[no-untyped-call]
            if not wanted:
                return
        gradients = dict(zip(wanted, take(loss, wanted, gradient, **options), strict=True))
        for each in blocks:
            each._add(gradients)

    @torch.no_grad()
    def _add(self, gradients: Mapping[Tensor, Tensor | None]) -> None:
        """Add what a pass gave to this block's parameters."""
        claimed = Claims(self.taken.values())
        for p in self._wanted or ():
            g = gradients.get(p)
            if g is None:
                continue
            if p in self.taken:
                self.taken[p].add_(g)
            else:
                self.taken[p] = g.detach().clone() if claimed.claim(g) else g.detach()


class _Open(threading.local):
    """The blocks that are open in this thread, the innermost last."""

    def __init__(self) -> None:
        self.blocks: list[_Passes] = []


_open = _Open()


class _Factor:
    """What a loss was multiplied by at last, as a gradient scaler does."""

    def __init__(self, scale: Tensor | None) -> None:
        self._scale = scale

    @classmethod
    def of(cls, loss: Tensor) -> _Factor:
        node = loss.grad_fn
        if node is None or node.name() != "MulBackward0":
            return cls(None)
        scale = node._saved_other  # type: ignore[attr-defined]
        if not isinstance(scale, Tensor) or scale.dim() > 0 or scale.requires_grad:
            return cls(None)
        return cls(scale.detach() if scale.dtype == torch.float32 else None)  # or a Python number

    def value(self) -> float:
        return 1.0 if self._scale is None else float(self._scale)

    def is_same(self, other: _Factor) -> bool:
        """Compare; wait for the device only where it is not the same tensor."""
        mine, theirs = self._scale, other._scale
        if mine is None or theirs is None:
            return mine is theirs or self.value() == other.value()
        return mine.data_ptr() == theirs.data_ptr() or self.value() == other.value()


class Claims:
    """Which memory is taken. Autograd can give two parameters one gradient; so can a loop."""

    def __init__(self, tensors: Iterable[Tensor] = ()) -> None:
        self._starts: set[int] = set()
        self.add(tensors)

    def add(self, tensors: Iterable[Tensor]) -> None:
        """Claim the memory of ``tensors``."""
        for tensor in tensors:
            self.claim(tensor)

    def claim(self, tensor: Tensor) -> bool:
        """Claim its memory; tell whether somebody has it already, or it overlaps itself."""
        tensor = local(tensor)
        if tensor.layout != torch.strided or tensor.numel() == 0:
            return False
        steps = zip(tensor.shape, tensor.stride(), strict=True)
        if any(size > 1 and step == 0 for size, step in steps):
            return True
        start = tensor.data_ptr()
        if start in self._starts:
            return True
        if start:  # a wrapper without memory of its own has 0
            self._starts.add(start)
        return False


def _alike(a: Tensor, b: Tensor) -> bool:
    return (a.dtype, a.shape, a.device) == (b.dtype, b.shape, b.device)


def _is_view_of_more(gradient: Tensor) -> bool:
    """Tell whether a gradient lies in a larger buffer, which its owner may overwrite."""
    if gradient.layout != torch.strided or sharded(gradient):  # FSDP2 writes each buffer once
        return False
    return gradient.untyped_storage().nbytes() > gradient.numel() * gradient.element_size()
