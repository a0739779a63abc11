"""Attacks: gradients with respect to the images only, the model left as it was."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rgp_optim._checks import check_choice, check_count, check_real, check_tensor, error_text
from rgp_optim._distributed import sharded
from rgp_optim.losses import check_target, kl_divergence, widen

__all__ = ["kl_attack", "pgd_attack"]

PGD_STEP = 0.003  # at a radius of 8/255
START_NOISE = 0.001  # standard deviation of the KL attack's start, in units of the pixels


def kl_attack(
    model: nn.Module,
    x: Tensor,
    *,
    eps: float = 8 / 255,
    step_size: float | None = None,
    steps: int = 10,
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""Find images near ``x`` whose prediction is as far as possible from that of ``x``.

    .. math:: x_{adv} = \arg\max_{\|d\|_\infty \le \epsilon}
              \mathrm{KL}\bigl(p(x) \,\|\, p(x + d)\bigr)

    Projected gradient ascent by the sign of the gradient, from ``x + 0.001 N(0, 1)``, within the
    ball and [0, 1]; p(x) is computed once. The model is in eval mode meanwhile; afterwards its
    modes, buffers and gradients are what they were. Of a model in DistributedDataParallel, the
    module inside is attacked: nothing is reduced or broadcast.

    Args:
        model: Maps images to logits, [batch, classes]. It sees images in [0, 1]: one that wants
            normalised images should normalise inside.
        x: Images, [batch, ...], floating, in [0, 1] (checked on the CPU; elsewhere that would wait
            for the device). Not changed.
        eps: Radius of the ball, in [0, 1], in units of the pixels.
        step_size: Length of a step, > 0, in units of the pixels. None is ``eps / 4``.
        steps: Number of steps, >= 0.
        generator: Of the start's noise, on the device of ``x``; None is torch's own.

    Returns:
        The attacked images, shape, dtype and device of ``x``, without a graph.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: a number or a pixel is out of its range, or the logits have the wrong shape.

    Reference: Gowda et al., CURE, ICLR 2024, Eq. 4; Zhang et al., TRADES, ICML 2019.
    """
    _check_model(model)
    _check_images(x)
    eps = _check_eps(eps)
    step = eps / 4 if step_size is None else check_real("step_size", step_size, strict=True)
    steps = check_count("steps", steps)
    with _frozen(model) as net:
        x = x.detach().clone()
        noise = torch.randn(x.shape, generator=generator, dtype=x.dtype, device=x.device)
        clean = _logits(net, x)

        def distance(logits: Tensor) -> Tensor:
            return kl_divergence(clean, logits, reduction="sum")

        return _ascend(net, x, x + START_NOISE * noise, distance, eps, step, steps)


def pgd_attack(
    model: nn.Module,
    x: Tensor,
    target: Tensor,
    *,
    loss: Literal["cross_entropy", "margin"] = "cross_entropy",
    eps: float = 8 / 255,
    step_size: float | None = None,
    steps: int = 20,
    random_start: bool = True,
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""Find images near ``x`` that the model takes for another class than ``target``.

    Projected gradient ascent as in `kl_attack`, on the cross-entropy or on the negative margin

    .. math:: -\bigl(z_y - \max_{j \ne y} z_j\bigr),

    from a point drawn uniformly in the ball; the last iterate is returned. The defaults are the
    field's PGD-20; with ``loss="margin"`` they are what result tables call C&W.

    Args:
        model: As in `kl_attack`.
        x: As in `kl_attack`.
        target: Class indices, [batch], int64, on the device of ``x``; the range is checked on the
            CPU only.
        loss: ``"cross_entropy"`` or ``"margin"``.
        eps: Radius of the ball, in [0, 1], in units of the pixels.
        step_size: Length of a step, > 0, in units of the pixels. None is 0.003 at the default
            radius, and in proportion at others: ``0.003 * eps / (8 / 255)``.
        steps: Number of steps, >= 0.
        random_start: Start from a uniform draw in the ball (True) or from ``x``.
        generator: Of the start, on the device of ``x``; None is torch's own.

    Returns:
        The attacked images, shape, dtype and device of ``x``, without a graph.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: a number, a pixel or a label is out of its range, or shapes do not match.

    Reference: Madry et al., ICLR 2018, Eq. 2.1; Carlini and Wagner, 2017, for the margin.
    """
    _check_model(model)
    _check_images(x)
    check_target(target, x, probabilities=False)
    check_choice("loss", loss, ("cross_entropy", "margin"), "For C&W use 'margin'.")
    eps = _check_eps(eps)
    default = PGD_STEP * (eps / (8 / 255))
    step = default if step_size is None else check_real("step_size", step_size, strict=True)
    steps = check_count("steps", steps)
    with _frozen(model) as net:
        x, labels = x.detach().clone(), target.clone()
        start = x
        if random_start:
            draw = torch.rand(x.shape, generator=generator, dtype=x.dtype, device=x.device)
            start = x + eps * (2 * draw - 1)

        def objective(logits: Tensor) -> Tensor:
            _check_classes(labels, logits)
            if loss == "cross_entropy":
                return F.cross_entropy(logits, labels, reduction="sum")
            true = logits.gather(1, labels[:, None]).squeeze(1)
            others = logits.scatter(1, labels[:, None], float("-inf")).amax(1)
            return (others - true).sum()

        return _ascend(net, x, start, objective, eps, step, steps)


def _ascend(
    model: nn.Module,
    x: Tensor,
    start: Tensor,
    objective: Callable[[Tensor], Tensor],
    eps: float,
    step_size: float,
    steps: int,
) -> Tensor:
    """Climb ``objective`` by signed steps within the ball and [0, 1].

    The objective is a sum over the batch: what one image becomes does not depend on the others. It
    is given logits in float32 at least.
    """
    low, high = _ball(x, eps)
    x_adv = start.clamp(low, high)
    for _ in range(steps):
        x_adv.requires_grad_()
        with torch.enable_grad():
            logits = _logits(model, x_adv)
            wide = widen(logits.detach()).requires_grad_()
            (pull,) = torch.autograd.grad(objective(wide), wide)
        (gradient,) = torch.autograd.grad(logits, x_adv, _scaled(pull).to(logits.dtype))
        # The sign of a NaN is 0: where the model overflows, the pixel stays.
        x_adv = (x_adv.detach() + step_size * gradient.sign()).clamp_(low, high)
    return x_adv


def _ball(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return the lowest and highest pixels within the radius and [0, 1].

    In 16 bits, where rounding could leave the ball by a good part of it, it goes inwards.
    """
    if x.element_size() != 2:
        return (x - eps).clamp_(min=0.0), (x + eps).clamp_(max=1.0)
    wide = x.to(torch.float32 if x.device.type == "mps" else torch.float64)  # mps has no float64
    low, high = (wide - eps).clamp_(min=0.0).to(x.dtype), (wide + eps).clamp_(max=1.0).to(x.dtype)
    # One more, or less, as an integer is the next number: none is negative.
    low.view(torch.int16).add_((wide - low > eps).short())
    high.view(torch.int16).sub_((high - wide > eps).short())
    return low, high


def _scaled(gradient: Tensor) -> Tensor:
    """Scale each row by a power of two, its largest entry to between 2**8 and 2**9.

    In float16 the gradient of an image that the model is sure of would be 0. Only its sign counts,
    and a power of two changes nothing else in wider dtypes.
    """
    exponent = gradient.abs().amax(1, keepdim=True).log2().floor()
    return gradient * torch.exp2((8 - exponent).clamp(max=100))  # finite for a row of zeros


@contextmanager
def _frozen(model: nn.Module) -> Iterator[nn.Module]:
    """Yield what to run, in eval mode; give each of the model's modules its own mode back.

    A forward through DistributedDataParallel counts as a training iteration, after which the ranks
    of a static graph no longer reduce, and broadcasts rank 0's buffers.
    """
    modes = [(module, module.training) for module in model.modules()]
    inner = getattr(model, "_orig_mod", model)  # of torch.compile
    net = inner.module if isinstance(inner, nn.parallel.DistributedDataParallel) else model
    constant = _unwanted(net)
    try:
        model.eval()
        for p in constant:
            p.requires_grad = False
        # Gradients are taken under torch.inference_mode too, on copies that are ordinary tensors.
        with torch.inference_mode(False), torch.no_grad():
            yield net
    finally:
        for module, mode in modes:
            module.training = mode
        for p in constant:
            p.requires_grad = True


def _unwanted(net: nn.Module) -> list[nn.Parameter]:
    """Return the parameters whose gradients would be computed although nobody asks for them.

    A compiled backward pass computes all that could be asked for, where autograd computes what is.
    """
    if not any(_compiled(module) for module in net.modules()):
        return []
    return [p for p in net.parameters() if p.requires_grad and p.is_leaf and not sharded(p)]


def _compiled(module: nn.Module) -> bool:
    return hasattr(module, "_orig_mod") or module._compiled_call_impl is not None


def _logits(model: nn.Module, x: Tensor) -> Tensor:
    """Return the model's output if it is [batch, classes]."""
    logits = check_tensor("model(x)", model(x))
    if logits.dim() != 2 or logits.shape[0] != x.shape[0]:
        found = f"{tuple(logits.shape)} for {x.shape[0]} images"
        raise ValueError(error_text("model(x)", "be logits, [batch, classes]", found))
    if logits.shape[1] < 2:
        rule, hint = "have two classes or more", "Of one logit z make two: [0, z]."
        raise ValueError(error_text("model(x)", rule, f"{tuple(logits.shape)}", hint))
    return logits


def _check_classes(target: Tensor, logits: Tensor) -> None:
    """Refuse labels that no logit belongs to; reading them elsewhere would wait for the device."""
    if target.device.type == "cpu" and target.numel():
        low, high = (int(value) for value in target.aminmax())
        if low < 0 or high >= logits.shape[1]:
            found = f"labels from {low} to {high}"
            hint = "The model has no other classes; leave out images without a label."
            raise ValueError(error_text("target", f"be in [0, {logits.shape[1] - 1}]", found, hint))


def _check_eps(eps: float) -> float:
    """Return the radius if it is one for pixels in [0, 1]."""
    eps = check_real("eps", eps)
    if eps > 1.0:
        hint = "Pixels are in [0, 1]: write 8 / 255."
        raise ValueError(error_text("eps", "be at most 1", eps, hint))
    return eps


def _check_model(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        hint = "The model comes first, then the images."
        raise TypeError(error_text("model", "be a torch.nn.Module", type(model).__name__, hint))


def _check_images(x: Tensor) -> None:
    check_tensor("x", x, hint="Pass pixels as floats in [0, 1]: for bytes, x / 255.")
    if x.is_complex():
        raise TypeError(error_text("x", "be real", str(x.dtype)))
    if x.device.type == "cpu" and x.numel():
        low, high = x.aminmax()
        if not (low >= 0 and high <= 1):
            found = f"values from {low.item():.3g} to {high.item():.3g}"
            hint = "Pass pixels in [0, 1] and normalise inside the model."
            if low >= 0 and 1 < high <= 255:
                hint = "Pass pixels in [0, 1]: for 0 to 255, x / 255."
            raise ValueError(error_text("x", "be in [0, 1]", found, hint))
