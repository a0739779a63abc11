"""Param groups: which parameters are selected in, and with which settings."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from rgp_optim._checks import check_count, check_fraction, error_text

__all__ = ["rgp_param_groups"]

KEYS = (
    "rgp_update_fraction",
    "rgp_alpha",
    "rgp_select",
    "rgp_step",
)
MISSPELT = {"update_fraction": "rgp_update_fraction", "select": "rgp_select"}
ALLOWED = "Allowed are rgp_update_fraction, rgp_alpha and options of the inner optimizer."


@dataclass(frozen=True)
class Settings:
    """The checked ``rgp_*`` settings of a param group."""

    update_fraction: float
    alpha: float
    select: bool | None

    @classmethod
    def of(cls, group: Mapping[str, Any]) -> Settings:
        """Read and check them; a value that breaks its rule, or a misspelt name, raises."""
        hint = "It is a setting of a param group, a fraction: conserving 30 % is 0.7."
        _check_keys("param_groups", group)
        check_count("rgp_step", group["rgp_step"])
        select = group["rgp_select"]
        if select is not None and not isinstance(select, bool):
            rule = "be None (two or more dimensions), True (all) or False (none)"
            raise TypeError(error_text("rgp_select", rule, f"rgp_select = {select!r}"))
        return cls(
            check_fraction("rgp_update_fraction", group["rgp_update_fraction"], hint),
            check_fraction("rgp_alpha", group["rgp_alpha"], "It is a setting of a param group."),
            select,
        )

    def selects(self, p: Tensor) -> bool:
        """Tell whether weights are selected in this parameter, or all of it is updated."""
        return p.dim() >= 2 if self.select is None else self.select


def rgp_param_groups(
    model: nn.Module, *, leave_out: Iterable[str] = (), **options: Any
) -> list[dict[str, Any]]:
    """Build param groups from a model: in which tensors weights are selected, and which stay free.

    Selected is every parameter with two or more dimensions outside the modules left out; biases,
    normalisation and what is left out is always updated. The groups carry the parameters' names::

        groups = rgp_param_groups(model, leave_out=["fc"], rgp_update_fraction=0.5)
        opt = RGPSelectiveOptimizer(torch.optim.SGD(groups, lr=0.1))

    Args:
        model: The model; frozen parameters come along, as in ``model.parameters()``.
        leave_out: Names of modules or parameters, as in ``model.named_modules()``; what they
            contain is left out too. Tied weights are left out if any of their names is.
        **options: Settings of the selected group, such as ``rgp_update_fraction``, ``rgp_alpha``,
            ``lr``.

    Returns:
        At most two param groups: the selected parameters (``rgp_select=True``), then the others
        (``rgp_select=False``). One that would be empty is missing.

    Raises:
        ValueError: a name in ``leave_out`` does not exist in the model; an option is no setting of
            a param group, or is set here already.
        TypeError: ``model`` is no module, or ``leave_out`` is a string.
    """
    if not isinstance(model, nn.Module):
        hint = "Pass the model itself, not its parameters."
        raise TypeError(error_text("model", "be a torch.nn.Module", type(model).__name__, hint))
    for name in ("params", "rgp_select"):
        if name in options:
            hint = f"The model and `leave_out` decide it. {ALLOWED}"
            raise ValueError(error_text("options", f"not contain '{name}'", name, hint))
    _check_keys("options", options)
    if isinstance(leave_out, str):
        rule, hint = "be a list of names", f"Write [{leave_out!r}]."
        raise TypeError(error_text("leave_out", rule, f"leave_out = {leave_out!r}", hint))
    names = tuple(leave_out)
    parameters = list(model.named_parameters(remove_duplicate=False))  # each name of tied weights
    known = {n for n, _ in [*model.named_modules(remove_duplicate=False), *parameters]}
    for name in names:
        if name not in known or not name:
            hint = f"The model has {', '.join(n for n, _ in model.named_children())}."
            raise ValueError(error_text("leave_out", "name modules of the model", name, hint))
    outside = {
        p
        for name, p in parameters
        if any(name == left or name.startswith(f"{left}.") for left in names)
    }
    selected: list[tuple[str, Tensor]] = []
    free: list[tuple[str, Tensor]] = []
    for name, p in model.named_parameters():
        (selected if p.dim() >= 2 and p not in outside else free).append((name, p))
    groups: list[dict[str, Any]] = [
        {"params": selected, "rgp_select": True, **options},
        {"params": free, "rgp_select": False},
    ]
    return [group for group in groups if group["params"]]


def _check_keys(name: str, keys: Iterable[str]) -> None:
    """Refuse settings that nothing would read; ``alpha`` alone is one of ASGD and RMSprop."""
    for key in keys:
        if key in MISSPELT:
            hint = f"Write '{MISSPELT[key]}'."
            raise ValueError(error_text(name, "name its settings rgp_*", key, hint))
        if key.startswith("rgp_") and key not in KEYS:
            hint = f"Known are {', '.join(KEYS)}."
            raise ValueError(error_text(name, "have rgp_* settings that exist", key, hint))
