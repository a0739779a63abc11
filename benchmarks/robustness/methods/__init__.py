"""The methods of the table, by the names used in flags and files."""

from .act import ACT
from .ard import ARD
from .at import AT, PretrainedAT
from .base import Method, Setting
from .cure import CONTROLS, CURE, FRONT, RANKING, REVISION, SHUFFLED, START
from .fat import FAT
from .iad import IAD
from .las_at import LASAT
from .mart import MART
from .st_at import STAT
from .trades import TRADES, PretrainedTRADES

METHODS: dict[str, type[Method]] = {
    "at": AT, "trades": TRADES, "mart": MART, "fat": FAT, "st-at": STAT, "act": ACT, "ard": ARD,
    "iad": IAD, "las-at": LASAT, "cure": CURE, "at-pre": PretrainedAT,
    "trades-pre": PretrainedTRADES, **CONTROLS,
}  # fmt: skip
ROWS = tuple(METHODS)  # of the main table
TABLE = ROWS[:10]  # the paper's rows; the others are controls
METHODS |= {"none": type("Nothing", (PretrainedTRADES,), {"title": "none"})}
METHODS |= {**RANKING, **SHUFFLED, **REVISION, **FRONT, **START}

__all__ = ["METHODS", "ROWS", "TABLE", "Method", "Setting"]
