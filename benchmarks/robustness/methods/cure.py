"""CURE (Gowda et al., ICLR 2024), and variants without one of its parts."""

from collections.abc import Collection
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from harness.training import BY_NETWORK
from torch import Tensor, nn

from rgp_optim import ConsistencyReviser, RGPSelectiveOptimizer, kl_adv_loss, rgp_param_groups
from rgp_optim.functional import rgp_score, topk_mask
from rgp_optim.optimizer import ScoreInputs

from .base import Setting
from .trades import TRADES, PretrainedTRADES


def signed(s: ScoreInputs) -> Tensor:
    """Return the signed sum, the score of the released ``rgp_soft``."""
    return s.natural.float() * s.alpha + s.adversarial.float() * (1.0 - s.alpha)


def loss_gradient(s: ScoreInputs) -> Tensor:
    """Return the magnitude of the training gradient, the score of the released ``rgp``."""
    return s.gradient.abs()


class RandomScore:
    """Control without a ranking: uniform draws, new at each step, reproducible by seed."""

    def __init__(self, seed: int) -> None:
        self.seed, self.steps = seed, 0
        self.places: dict[Tensor, int] = {}

    def __call__(self, s: ScoreInputs) -> Tensor:
        place = self.places.setdefault(s.parameter, len(self.places))
        mixed = (self.seed * 1_000_003 + self.steps) * 1_000_003 + place
        draw = torch.Generator(s.weight.device).manual_seed(mixed)
        shape = s.weight.shape
        return 1.0 - torch.rand(shape, generator=draw, device=s.weight.device)  # never 0


class MatchedScore(RandomScore):
    """Control of the step's length: a random mask, the gradient rescaled to its norm under RGP's.

    In each tensor the training gradient that the random mask leaves is rescaled to the norm of the
    one that RGP's mask of the same fraction would have left. `rescale` does it, after the mask and
    before the inner step: momentum sees the rescaled gradient, weight decay is not rescaled. If
    ``shuffled``, each weight has the RGP of another, the same one in all steps: the mask changes as
    slowly as RGP's, and momentum finds its weights again.
    """

    def __init__(self, seed: int, update_fraction: float, shuffled: bool) -> None:
        super().__init__(seed)
        self.update_fraction, self.shuffled = update_fraction, shuffled
        self.norms: dict[Tensor, Tensor] = {}

    def __call__(self, s: ScoreInputs) -> Tensor:
        rgp = rgp_score(s.natural, s.adversarial, alpha=s.alpha)
        mask = topk_mask(rgp, update_fraction=self.update_fraction)
        self.norms[s.parameter] = (s.gradient * mask).norm()
        if not self.shuffled:
            return super().__call__(s)
        place = self.places.setdefault(s.parameter, len(self.places))
        draw = torch.Generator().manual_seed(self.seed * 1_000_003 + place)
        order = torch.randperm(rgp.numel(), generator=draw).to(rgp.device)
        return rgp.flatten()[order].view_as(rgp)

    def rescale(self, *_: Any) -> None:
        for parameter, norm in self.norms.items():
            parameter.grad.mul_(norm / parameter.grad.norm().clamp_min(1e-30))


class CURE(TRADES):
    title = "CURE"
    warm = True
    # Of ResNet-18; d = 0.999 at this rate spans 6.4 % of the published run.
    official: ClassVar[dict[str, Any]] = {
        "loss": "trades", "beta": 5.0, "update_fraction": 0.7, "alpha": 0.1, "gamma": 1.0,
        "rate": 0.2, "horizon": 0.064, "score": "rgp", "scope": "tensor", "conserve": "weights",
    }  # fmt: skip
    networks: ClassVar[dict[str, dict[str, Any]]] = BY_NETWORK

    def __init__(self, model: nn.Module, setting: Setting, **options: Any) -> None:
        super().__init__(model, setting, **options)
        how = {key: self.options[key] for key in ("rate", "horizon")}
        how |= {"total_steps": setting.total_steps, "seed": setting.seed}
        self.reviser = ConsistencyReviser(model, **how) if self.options["gamma"] > 0 else None
        self.optimizer.reviser = self.reviser

    def make_optimizer(self) -> RGPSelectiveOptimizer:
        self.score = self.rule()
        how = {k: self.options[k] for k in ("update_fraction", "alpha", "scope", "conserve")}
        inner = self.setting.new_optimizer(self.groups())
        if isinstance(self.score, MatchedScore):
            inner.register_step_pre_hook(self.score.rescale)
        return RGPSelectiveOptimizer(inner, score=self.score, **how)

    def groups(self) -> list[dict[str, Any]]:
        """Return the param groups; the released mode ``rgp`` selects in norms and biases too."""
        if self.options["loss"] == "trades":
            return rgp_param_groups(self.model, leave_out=self.left_out())
        (head,) = self.left_out()
        named = list(self.model.named_parameters())
        outside = [(n, p) for n, p in named if n.rpartition(".")[0] == head]
        inside = [(n, p) for n, p in named if n.rpartition(".")[0] != head]
        return [{"params": inside, "rgp_select": True}, {"params": outside, "rgp_select": False}]

    def rule(self) -> Any:
        """Return the score: CURE's, or a control's."""
        name = self.options["score"]
        if name == "random":
            return RandomScore(self.setting.seed)
        if name in ("matched", "shuffled"):
            share = self.options["update_fraction"]
            return MatchedScore(self.setting.seed, share, name == "shuffled")
        if name == "inverse":
            return lambda s: -rgp_score(s.natural, s.adversarial, alpha=s.alpha)
        return {"rgp": "rgp", "signed": signed}.get(name, loss_gradient)

    def left_out(self) -> list[str]:
        """Return the layers that the released rules leave out: all but ``conv1``, or the head."""
        layers = [n for n, m in self.model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)]
        if self.options["score"] == "signed":
            return [name for name in layers if not name.endswith("conv1")]
        return layers[-1:] if self.options["score"] == "loss_gradient" else []

    def begin_epoch(self, epoch: int) -> None:
        if isinstance(self.score, RandomScore):
            self.score.steps = self.setting.steps_before(epoch)

    def step(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        x_adv = self.perturb(x, y)
        self.model.train()
        logits, logits_adv = self.model(x), self.model(x_adv)
        natural, adversarial = F.cross_entropy(logits, y), F.cross_entropy(logits_adv, y)
        loss = kl_adv_loss(logits, logits_adv, y, beta=self.options["beta"])
        if self.options["loss"] == "ce":
            alpha = self.options["alpha"]
            loss = alpha * natural + (1 - alpha) * adversarial
        if self.options["score"] == "signed":  # as released: the second loss is the KL term
            adversarial = (loss - natural) / self.options["beta"]
        if self.reviser is not None:
            loss = loss + self.options["gamma"] * self.reviser(x, x_adv, logits, logits_adv)
        self.optimizer.zero_grad()
        if self.options["score"] not in ("random", "gradient", "loss_gradient"):
            loss = self.optimizer.scored(loss, natural=natural, adversarial=adversarial)
        loss.backward()
        self.optimizer.step()
        if isinstance(self.score, RandomScore):
            self.score.steps += 1
        return {"loss": loss.detach(), "loss_adversarial": adversarial.detach()}


def variant(name: str, named: Collection[str] = (), **changes: Any) -> type[CURE]:
    """Return CURE with other settings, as a row of its own."""
    networks = {
        network: {key: value for key, value in settings.items() if key not in changes}
        for network, settings in CURE.networks.items()
    }
    body = {"title": name, "official": {**CURE.official, **changes}, "networks": networks}
    return type(name, (CURE,), {**body, "named": named})


CONTROLS = {
    "trades-pre-revision": variant("TRADES, pre-trained, + revision", update_fraction=1.0),
    "cure-no-revision": variant("CURE without revision", gamma=0.0),
    "cure-random": variant("CURE, random mask", score="random"),
    "random-no-revision": variant("Random mask without revision", score="random", gamma=0.0),
    "cure-gradients": variant("CURE, gradients conserved", conserve="gradients"),
    "cure-update": variant("CURE, whole gradient in the state", conserve="update"),
    "cure-global": variant("CURE, global scope", scope="global"),
    "cure-signed": variant("CURE, signed score", score="signed"),
    "cure-loss": variant("CURE, training gradient as score", score="loss_gradient"),
    # No KL, the loss's own gradient, and BatchNorm and biases too.
    "released-rgp": variant(
        "CURE as released, rgp", loss="ce", score="loss_gradient", conserve="gradients"
    ),
    "released-rgp-soft": variant(
        "CURE as released, rgp_soft", score="signed", conserve="gradients"
    ),
}

# What the score ranks: no revision, all else alike.
SCORES = ("rgp", "gradient", "random", "matched", "inverse")
RANKING = {
    f"{score}-{share}": variant(f"{score}, {share}", score=score, update_fraction=share, gamma=0.0)
    for share in (0.7, 0.5, 0.3, 0.1)
    for score in SCORES
}
SHUFFLED = {
    f"shuffled-{s}": variant(f"shuffled, {s}", score="shuffled", update_fraction=s, gamma=0.0)
    for s in (0.7, 0.3)
}
# The averaging time of the revision, under each mask.
REVISION = {
    "trades-pre-revision-0.3": variant("No mask, horizon 0.3", update_fraction=1.0, horizon=0.3),
    "cure-revision-0.3": variant("RGP, horizon 0.3", horizon=0.3),
    "cure-random-revision-0.3": variant("Random mask, horizon 0.3", score="random", horizon=0.3),
}
# A smaller beta: all weights updated, under RGP's mask, and CURE.
FRONT: dict[str, type[TRADES]] = {}
for beta in (1.0, 2.0, 3.0, 3.5, 4.5):
    body = {"title": f"none, β {beta:g}", "official": {"beta": beta}, "named": ["beta"]}
    FRONT[f"none-beta{beta:g}"] = type("Front", (PretrainedTRADES,), body)
    FRONT[f"rgp-beta{beta:g}"] = variant(f"rgp, β {beta:g}", ["beta"], beta=beta, gamma=0.0)
    FRONT[f"cure-beta{beta:g}"] = variant(f"CURE, β {beta:g}", ["beta"], beta=beta)
# The learning rate rises over the whole run: the preset says so.
START = {
    "trades-pre-slow": type("Slow", (PretrainedTRADES,), {"title": "TRADES, slow start"}),
    "cure-slow": variant("CURE, slow start"),
}
