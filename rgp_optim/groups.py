"""Param groups: which parameters take part in the selection, and with which settings."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from rgp_optim import _checks as check
from rgp_optim._checks import refuse

__all__ = ["rgp_param_groups"]

KEYS = ("rgp_update_fraction", "rgp_alpha", "rgp_select")


@dataclass(frozen=True)
class Settings:
    """The checked ``rgp_*`` settings of a param group."""

    update_fraction: float
    alpha: float
    select: bool | None

    @classmethod
    def of(cls, group: Mapping[str, Any]) -> Settings:
        """Read the settings; a value out of range or a misspelt name raises."""
        _check_keys("param_groups", group)
        fraction, alpha, select = (group[key] for key in KEYS)
        if select is not None and not isinstance(select, bool):
            rule = "be None (two or more dimensions), True (all) or False (none)"
            refuse("rgp_select", rule, f"rgp_select = {select!r}", error=TypeError)
        hint = "It is the fraction updated: to conserve 30 %, write 0.7."
        fraction = check.fraction("rgp_update_fraction", fraction, hint)
        return cls(fraction, check.fraction("rgp_alpha", alpha), select)

    def selects(self, p: Tensor) -> bool:
        """Return whether ``p`` takes part in the selection; complex and integer ones never do."""
        return p.is_floating_point() and (p.dim() >= 2 if self.select is None else self.select)


def rgp_param_groups(
    model: nn.Module, *, leave_out: Iterable[str] = (), **options: Any
) -> list[dict[str, Any]]:
    """Split a model's parameters into a selected group and one that is always updated whole.

    Selected are real parameters with two or more dimensions, also embeddings, class
    tokens, parameters of GRN and ``g`` of ``weight_norm``. Name in ``leave_out`` those to update
    whole, as biases and normalisation are. The groups carry the parameters' names::

        groups = rgp_param_groups(model, leave_out=["cls_token", "pos_embed"], weight_decay=5e-4)
        opt = RGPSelectiveOptimizer(torch.optim.SGD(groups, lr=0.1))

    Each group has its own ``lr``: a loop that sets ``opt.param_groups[0]["lr"]`` changes the
    selected parameters alone. Schedulers set both.

    Args:
        model: The model; frozen parameters are included, as in ``model.parameters()``.
        leave_out: Names of modules, with all that they contain, or of parameters. Tied weights are
            left out if any of their names is.
        **options: Options of both groups: ``lr``, ``weight_decay``, ``rgp_update_fraction``, ...

    Returns:
        The selected group (``rgp_select=True``), then the other (False); an empty one is omitted.

    Raises:
        ValueError: a name in ``leave_out`` does not exist, or an option is misspelt or set here.
        TypeError: ``model`` is not a module, or ``leave_out`` is a string.
    """
    check.model(model)
    for name in {"params", "rgp_select"} & options.keys():
        refuse("options", f"not contain '{name}'", name, "The model and `leave_out` decide it.")
    _check_keys("options", options)
    if isinstance(leave_out, str):
        refuse("leave_out", "be a list of names", leave_out, f"Write [{leave_out!r}].", TypeError)
    left = tuple(leave_out)
    parameters = list(model.named_parameters(remove_duplicate=False))  # each name of tied weights
    known = {n for n, _ in [*model.named_modules(remove_duplicate=False), *parameters]}
    for name in left:
        if name not in known or not name:
            hint = f"The model has {', '.join(n for n, _ in model.named_children())}."
            refuse("leave_out", "name modules of the model", name, hint)
    outside = {p for n, p in parameters if any(n == o or n.startswith(f"{o}.") for o in left)}
    params: dict[bool, list[tuple[str, Tensor]]] = {True: [], False: []}
    for name, p in model.named_parameters():
        params[p.is_floating_point() and p.dim() >= 2 and p not in outside].append((name, p))
    return [{"params": ps, "rgp_select": select, **options} for select, ps in params.items() if ps]


def _check_keys(name: str, keys: Iterable[str]) -> None:
    """Refuse misspelt settings; ``alpha`` is an option of ASGD and RMSprop."""
    for key in keys:
        if key in ("update_fraction", "select"):
            refuse(name, "name its settings rgp_*", key, f"Write 'rgp_{key}'.")
        if key.startswith("rgp_") and key not in KEYS:
            refuse(name, "have rgp_* settings that exist", key, f"Known are {', '.join(KEYS)}.")
