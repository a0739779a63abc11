"""rgp_param_groups and the settings of a group."""

import pytest
import torch
from common import make_net
from torch import nn

from rgp_optim import rgp_param_groups


class Transformer(nn.Module):
    """The parameters of a vision transformer's input, and one complex weight."""

    def __init__(self):
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, 4))
        self.pos_embed = nn.Parameter(torch.zeros(1, 5, 4))
        self.tokens = nn.Embedding(6, 4)
        self.proj = nn.Linear(4, 4)
        self.filter = nn.Parameter(torch.zeros(4, 3, dtype=torch.complex64))


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.body, self.head = nn.Embedding(6, 4), nn.Linear(4, 4), nn.Linear(4, 6)
        self.head.weight = self.embed.weight
        self.again = self.body


class Names(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.conv2 = nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)


@pytest.mark.parametrize(
    ("make", "leave_out", "selected"),
    [
        (make_net, (), ["conv.weight", "head.weight"]),
        (make_net, ["head"], ["conv.weight"]),
        (make_net, ("head.weight", "norm"), ["conv.weight"]),
        (Names, ["conv"], ["conv2.weight"]),  # a name is no prefix
        (Transformer, (), ["cls_token", "pos_embed", "tokens.weight", "proj.weight"]),
        (Transformer, ["cls_token", "pos_embed", "tokens"], ["proj.weight"]),
        (Tied, ["embed"], ["body.weight"]),
        (Tied, ["head"], ["body.weight"]),
        (Tied, ["again"], ["embed.weight"]),
        (Tied, ["again.bias"], ["embed.weight", "body.weight"]),
    ],
)
def test_each_parameter_is_in_one_of_two_groups(make, leave_out, selected):
    model = make()
    first, second = rgp_param_groups(model, leave_out=leave_out)
    names = [[name for name, _ in group["params"]] for group in (first, second)]
    assert names[0] == selected
    assert sorted([*names[0], *names[1]]) == sorted(name for name, _ in model.named_parameters())
    assert (first["rgp_select"], second["rgp_select"]) == (True, False)


def test_options_hold_in_both_groups():
    options = dict(rgp_update_fraction=0.5, lr=0.2, alpha=0.9)
    groups = rgp_param_groups(make_net(), **options)
    for group, select in zip(groups, (True, False), strict=True):
        assert {**group, "params": None} == {"params": None, "rgp_select": select, **options}


@pytest.mark.parametrize(
    ("model", "select"), [(nn.Linear(2, 2, bias=False), True), (nn.LayerNorm(3), False)]
)
def test_an_empty_group_is_omitted(model, select):
    assert [group["rgp_select"] for group in rgp_param_groups(model)] == [select]


NET = make_net()
PARAMS = NET.parameters()


@pytest.mark.parametrize(
    ("model", "options", "error", "message"),
    [
        (NET, {"rgp_select": True}, ValueError, "`options` should not contain 'rgp_select'"),
        (NET, {"params": []}, ValueError, "`options` should not contain 'params'.*`leave_out` dec"),
        (NET, {"rgp_fraction": 0.5}, ValueError, "Found `rgp_fraction`. Known are rgp_update_frac"),
        (NET, {"rgp_step": 1}, ValueError, "`options` should have rgp_. settings that exist"),
        (NET, {"update_fraction": 0.5}, ValueError, "Write 'rgp_update_fraction'"),
        (NET, {"leave_out": ["haed"]}, ValueError, "`leave_out` should name modules.*The model ha"),
        (NET, {"leave_out": [""]}, ValueError, "`leave_out` should name modules"),
        (NET, {"leave_out": "head"}, TypeError, r"Write \['head'\]"),
        (PARAMS, {}, TypeError, "`model` should be a torch.nn.Module. Found `generator`"),
    ],
)
def test_refusals(model, options, error, message):
    with pytest.raises(error, match=message):
        rgp_param_groups(model, **options)
