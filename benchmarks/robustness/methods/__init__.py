"""The methods of the table, by the name that flags and files use."""

from .act import ACT
from .ard import ARD
from .at import AT, PretrainedAT
from .base import Method, Setting
from .cure import CONTROLS, CURE
from .fat import FAT
from .iad import IAD
from .las_at import LASAT
from .mart import MART
from .st_at import STAT
from .trades import TRADES, PretrainedTRADES

METHODS: dict[str, type[Method]] = {
    "at": AT,
    "trades": TRADES,
    "mart": MART,
    "fat": FAT,
    "st-at": STAT,
    "act": ACT,
    "ard": ARD,
    "iad": IAD,
    "las-at": LASAT,
    "cure": CURE,
    "at-pre": PretrainedAT,
    "trades-pre": PretrainedTRADES,
    **CONTROLS,
}
TABLE = tuple(METHODS)[:10]  # the paper's rows; the others are controls

__all__ = ["METHODS", "TABLE", "Method", "Setting"]
