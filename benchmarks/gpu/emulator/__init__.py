"""Run what Triton compiles for NVIDIA's GPUs without one: see README.md."""

from .launcher import emulated
from .machine import Launch, Machine
from .parse import Fault

__all__ = ["Fault", "Launch", "Machine", "emulated"]
