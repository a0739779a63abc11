"""Attacks: signed gradient steps on the images, within a ball and the range of the pixels."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rgp_optim import _checks as check
from rgp_optim._checks import logits_of, refuse, switched
from rgp_optim._distributed import is_sharded
from rgp_optim.losses import kl_divergence, widen

__all__ = ["kl_attack", "pgd_attack"]

KL_STEP, PGD_STEP = 1 / 4, 0.003 / (8 / 255)  # in units of the radius
Goal = Callable[[Tensor], Tensor]  # a loss, of the logits
START_NOISE = 0.001  # standard deviation, in units of the pixels


def kl_attack(
    model: nn.Module,
    x: Tensor,
    *,
    eps: float = 8 / 255,
    step_size: float | None = None,
    steps: int = 10,
    bounds: tuple[float, float] | None = (0.0, 1.0),
    generator: torch.Generator | int | None = None,
) -> Tensor:
    r"""Find images near ``x`` whose prediction is as far as possible from that of ``x``.

    .. math:: x_{adv} = \arg\max_{\|d\|_\infty \le \epsilon}
              \mathrm{KL}\bigl(p(x) \,\|\, p(x + d)\bigr)

    Projected ascent by the sign of the gradient; p(x) is computed once. As in TRADES, the start
    ``x + 0.001 N(0, 1)`` is not clipped; every later iterate lies in the ball and the bounds.

    The model runs in eval mode (a model from torch.export as it was exported); afterwards ``train``
    and ``eval`` restore the mode of each module. No ``.grad`` changes. Buffers written in eval mode
    are not restored. Of a DistributedDataParallel model the module inside is attacked.

    Args:
        model: Maps images within ``bounds`` to logits, [batch, classes]: normalise inside.
        x: Images, [batch, ...], floating, within ``bounds``. Not changed.
        eps: Radius of the ball, >= 0, at most the width of ``bounds``, in units of ``x``.
        step_size: Length of a step, > 0, in units of ``x``. None is ``eps / 4``.
        steps: Number of steps, >= 0.
        bounds: Lowest and highest value of a pixel; None does not clip. The range of ``x`` is
            validated on the CPU only: a GPU would synchronise.
        generator: For the start: a generator on the device of ``x``, a seed, or None (torch's own).

    Returns:
        The attacked images: shape, dtype and device of ``x``, without a graph.

    Raises:
        TypeError: an argument has the wrong type, or the model returns no tensor.
        ValueError: a number or a pixel is out of range; the logits have the wrong shape, or do not
            depend on ``x`` through autograd.
        RuntimeError: the model uses reentrant activation checkpointing.

    Reference: Gowda et al., CURE, ICLR 2024, Eq. 4; Zhang et al., TRADES, ICML 2019.
    """
    eps, step, draws = _check_inputs(model, x, eps, step_size, KL_STEP, steps, bounds, generator)
    with _frozen(model) as net:
        x = x.detach().clone()
        noise = torch.randn(x.shape, generator=draws, dtype=x.dtype, device=x.device)
        distance = partial(kl_divergence, logits_of(net, x.clone()), reduction="sum")
        return _ascend(net, x + START_NOISE * noise, distance, _ball(x, eps, bounds), step, steps)


def pgd_attack(  # noqa: D417 (what is `kl_attack`'s is described there)
    model: nn.Module,
    x: Tensor,
    target: Tensor,
    *,
    loss: Literal["cross_entropy", "margin"] = "cross_entropy",
    eps: float = 8 / 255,
    step_size: float | None = None,
    steps: int = 20,
    random_start: bool = True,
    bounds: tuple[float, float] | None = (0.0, 1.0),
    generator: torch.Generator | int | None = None,
) -> Tensor:
    r"""Find images near ``x`` that the model assigns to another class than ``target``.

    Projected gradient ascent as in `kl_attack`, on the cross-entropy or on the negative margin

    .. math:: -\bigl(z_y - \max_{j \ne y} z_j\bigr),

    from a point drawn uniformly in the ball and clipped to the bounds; the last iterate is
    returned. The defaults are the field's PGD-20; result tables call ``loss="margin"`` C&W.

    Args:
        model, x, eps, steps, bounds, generator: As in `kl_attack`.
        target: Class indices, [batch], int64, as `kl_adv_loss` takes them; device of ``x``.
        loss: ``"cross_entropy"`` or ``"margin"``.
        step_size: Length of a step, > 0, in units of ``x``. None is ``0.003 * eps / (8 / 255)``.
        random_start: Start from a uniform draw in the ball (True) or from ``x``.

    Returns:
        The attacked images, as `kl_attack` does.

    Raises:
        ValueError: a label is out of range; other errors are those of `kl_attack`.

    Reference: Madry et al., ICLR 2018, Eq. 2.1; Carlini and Wagner, 2017, for the margin.
    """
    eps, step, draws = _check_inputs(model, x, eps, step_size, PGD_STEP, steps, bounds, generator)
    check.target(target, x, probabilities=False)
    check.choice("loss", loss, ("cross_entropy", "margin"), "For C&W use 'margin'.")
    with _frozen(model) as net:
        x, labels = x.detach().clone(), target.clone()
        low, high = _ball(x, eps, bounds)
        start = x
        if random_start:
            draw = torch.rand(x.shape, generator=draws, dtype=x.dtype, device=x.device)
            start = (x + eps * (2 * draw - 1)).clamp(low, high)

        def objective(logits: Tensor) -> Tensor:
            check.classes(labels, logits)
            if loss == "cross_entropy":
                return F.cross_entropy(logits, labels, reduction="sum")
            true = logits.gather(1, labels[:, None]).squeeze(1)
            others = logits.scatter(1, labels[:, None], float("-inf")).amax(1)
            return (others - true).sum()

        return _ascend(net, start, objective, (low, high), step, steps)


def _ascend(
    net: nn.Module, x_adv: Tensor, goal: Goal, ball: tuple[Tensor, Tensor], step: float, steps: int
) -> Tensor:
    """Take ``steps`` signed steps up ``goal``, a sum over the batch, clipped to ``ball``."""
    for _ in range(steps):
        given = x_adv.clone().requires_grad_()  # the model may write into it
        with torch.enable_grad():
            logits = logits_of(net, given)
            wide = widen(logits.detach()).requires_grad_()
            (pull,) = torch.autograd.grad(goal(wide), wide)
        gradient = None
        if logits.requires_grad:
            pull = _scaled(pull, logits.detach()).to(logits.dtype)
            try:
                (gradient,) = torch.autograd.grad(logits, given, pull, allow_unused=True)
            except RuntimeError as error:
                if "use_reentrant" not in str(error):
                    raise
                rule = "checkpoint activations with use_reentrant=False"
                hint = "Reentrant checkpointing gives no gradient of the images alone."
                refuse("model", rule, "use_reentrant=True", hint, RuntimeError)
        if gradient is None:
            hint = "Remove detach(), no_grad() or inference_mode() from the model's forward."
            rule = "depend on the images through autograd"
            refuse("model(x)", rule, "no graph from the logits to x", hint)
        # The sign of a NaN is 0: where the model overflows, the pixel stays.
        x_adv = (x_adv + step * gradient.sign()).clamp_(*ball)
    return x_adv.clamp(*ball)


def _ball(x: Tensor, eps: float, bounds: tuple[float, float] | None) -> tuple[Tensor, Tensor]:
    """Return the lowest and highest pixels within the radius and the bounds.

    In 16 bits rounding could leave the ball by a large part of ``eps``: round inwards there.
    """
    lowest, highest = bounds or (-float("inf"), float("inf"))
    if x.element_size() != 2:
        return (x - eps).clamp_(min=lowest), (x + eps).clamp_(max=highest)
    wide = x.to(torch.float32 if x.device.type == "mps" else torch.float64)  # mps has no float64

    def round_up(value: Tensor) -> Tensor:
        rounded = value.to(x.dtype) + 0.0  # -0 becomes 0
        bits = rounded.view(torch.int16)
        above = torch.where(bits >= 0, bits + 1, bits - 1).view(x.dtype)
        return torch.where(rounded < value, above, rounded)

    return round_up((wide - eps).clamp_(min=lowest)), -round_up(-(wide + eps).clamp_(max=highest))


def _scaled(gradient: Tensor, logits: Tensor) -> Tensor:
    """Scale the gradient by a power of two: its largest entry is then 2**8 or more.

    Only its sign counts, and in float16 the gradient of a confident prediction would underflow.
    Samples may depend on each other, so all rows have one factor. In 16 bits a row below 2**-12 of
    the largest is raised to that: beside the largest it is still lost in rounding.
    """
    exponent = gradient.abs().amax(1, keepdim=True).log2().floor()
    finite = exponent.nan_to_num(nan=-1e4, posinf=-1e4, neginf=-1e4)
    top = F.pad(finite, (0, 0, 0, 1), value=-1e4).amax(0)  # the batch may be empty
    kind = logits.device.type
    autocast = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    exact = ((logits.half() - logits).nan_to_num() == 0).all()  # 16 bits, perhaps widened
    rise = torch.where(exact | autocast, (top - 12 - exponent).clamp(min=0), 0.0)
    return gradient * torch.exp2((8 - top + rise).clamp(max=100))  # finite for a row of zeros


@contextmanager
def _frozen(model: nn.Module) -> Iterator[nn.Module]:
    """Yield the module to run, in eval mode; afterwards restore modes and ``requires_grad``.

    A forward pass through DistributedDataParallel would broadcast buffers, and count as a training
    iteration, after which a static graph no longer reduces.
    """
    inner = getattr(model, "_orig_mod", model)  # torch.compile
    net = inner.module if isinstance(inner, nn.parallel.DistributedDataParallel) else model
    # Gradients exist under torch.inference_mode too, on copies that are ordinary tensors.
    with switched(model), torch.inference_mode(False), torch.no_grad():
        # A compiled backward pass computes the gradient of every parameter that requires one.
        compiled = any(hasattr(m, "_orig_mod") or m._compiled_call_impl for m in net.modules())
        whole = (p for p in net.parameters() if compiled and not is_sharded(p))
        constant = [p for p in whole if p.requires_grad and p.is_leaf]
        try:
            for p in constant:
                p.requires_grad = False
            yield net
        finally:
            for p in constant:
                p.requires_grad = True
            torch.clear_autocast_cache()  # older PyTorch would go on with weights without a graph


def _check_inputs(
    model: Any, x: Any, eps: Any, step: Any, share: float, steps: Any, bounds: Any, draws: Any
) -> tuple[float, float, torch.Generator | None]:
    """Return radius, step and generator; refuse what does not fit the bounds."""
    check.model(model)
    check.tensor("x", x, hint="Pass pixels as floats in [0, 1]: for bytes, x / 255.")
    eps = check.real("eps", eps)
    step = share * eps if step is None else check.real("step_size", step, strict=True)
    check.count("steps", steps)
    if draws is not None and not isinstance(draws, torch.Generator):
        draws = torch.Generator(x.device).manual_seed(check.count("generator", draws))
    if bounds is None:
        return eps, step, draws
    if not isinstance(bounds, (tuple, list)) or len(bounds) != 2 or not bounds[0] < bounds[1]:
        refuse("bounds", "be (lowest, highest), or None", bounds)
    lowest, highest = bounds
    pixels = (lowest, highest) == (0, 1)
    if eps > highest - lowest:
        hint = "Pixels are in [0, 1]: write 8 / 255." if pixels else "It is in units of `x`."
        refuse("eps", f"be at most {highest - lowest:g}, the width of `bounds`", eps, hint)
    if x.device.type == "cpu" and x.numel():
        low, high = (value.item() for value in x.detach().aminmax())
        if not (low >= lowest and high <= highest):
            hint = "Normalise inside the model, or give the range of `x` as `bounds`."
            if pixels and low >= 0 and 1 < high <= 255:
                hint = "For pixels from 0 to 255, pass x / 255."
            found = f"values from {low:.3g} to {high:.3g}"
            refuse("x", f"be in [{lowest:g}, {highest:g}]", found, hint)
    return eps, step, draws
