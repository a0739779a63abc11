"""CURE (Conserve, Update, Revise; ICLR 2024) for any adversarial training loop in PyTorch."""

from rgp_optim import functional
from rgp_optim.attacks import kl_attack, pgd_attack
from rgp_optim.groups import rgp_param_groups
from rgp_optim.losses import consistency_loss, kl_adv_loss
from rgp_optim.optimizer import RGPSelectiveOptimizer
from rgp_optim.reviser import ConsistencyReviser

__version__ = "0.1.0"

__all__ = [
    "ConsistencyReviser",
    "RGPSelectiveOptimizer",
    "__version__",
    "consistency_loss",
    "functional",
    "kl_adv_loss",
    "kl_attack",
    "pgd_attack",
    "rgp_param_groups",
]
