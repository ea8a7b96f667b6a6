"""What every optimizer that can be configured has to hold; another is tested once it is listed."""

import copy

import pytest
import torch
from torch import nn

from trainstack.config.schema import OptimSection
from trainstack.optim.optimizer import OPTIMIZERS, build_optimizer, undecayed_matrices

SECTION = OptimSection(
    learning_rate=0.1, weight_decay=0.1, adam_beta1=0.9, adam_beta2=0.95, adam_epsilon=1e-8,
    max_grad_norm=1.0, lr_scheduler_type="constant", lr_scheduler_kwargs={}, warmup_steps=0,
    warmup_ratio=None,
)  # fmt: skip
every_optimizer = pytest.mark.parametrize("name", OPTIMIZERS)


def small_model() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3))


def update(model: nn.Module, optimizer, gradient: float, is_bad: float = 0.0) -> None:
    """One update as a strategy makes it."""
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, gradient)
    optimizer.prepare(torch.tensor(is_bad), None)
    optimizer.step()


def everything(model: nn.Module, optimizer) -> list[torch.Tensor]:
    """Copies of all that an update may change."""
    states = [value for state in optimizer.state.values() for value in state.values()]
    tensors = [*model.parameters(), *(value for value in states if torch.is_tensor(value))]
    return [tensor.detach().clone() for tensor in tensors]


def are_equal(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return len(one) == len(other) and all(map(torch.equal, one, other))


@every_optimizer
@pytest.mark.parametrize("gradient", [float("nan"), float("inf"), 1e3])
def test_a_withheld_update_changes_neither_weights_nor_state_and_the_next_one_does(name, gradient):
    model = small_model()
    optimizer = build_optimizer(model, SECTION, name)
    update(model, optimizer, 1.0)
    before = everything(model, optimizer)
    update(model, optimizer, gradient, is_bad=1.0)
    assert are_equal(everything(model, optimizer), before)
    assert optimizer.updates_done() == 1
    update(model, optimizer, 1.0)
    assert not are_equal(everything(model, optimizer), before)
    assert optimizer.updates_done() == 2


@every_optimizer
def test_a_divisor_divides_the_gradients(name):
    divided, plain = small_model(), small_model()
    for model, gradient, divisor in ((divided, 2.0, 4.0), (plain, 0.5, None)):
        optimizer = build_optimizer(model, SECTION, name)
        for _ in range(3):
            for parameter in model.parameters():
                parameter.grad = torch.full_like(parameter, gradient)
            optimizer.prepare(torch.tensor(0.0), divisor and torch.tensor(divisor))
            optimizer.step()
    assert are_equal([*divided.parameters()], [*plain.parameters()])


class HeadNorm(nn.Module):
    """A norm for each head, as Cohere's; beside it what a model marks, and what RWKV mixes."""

    def __init__(self):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(2, 4)), nn.Parameter(torch.ones(4))


@every_optimizer
def test_matrices_decay_and_norms_do_not_whatever_shape_they_have(name):
    model = small_model()
    model.norm, model.gate = HeadNorm(), nn.Linear(4, 1)
    model.A_log, model.time_mix = nn.Parameter(torch.ones(3, 2)), nn.Parameter(torch.ones(1, 1, 3))
    model.A_log._no_weight_decay = True
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = build_optimizer(model, SECTION, name)
    update(model, optimizer, 0.0)
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert changed == {"0.weight", "gate.weight"}
    assert len(undecayed_matrices(model)) == 3


@every_optimizer
def test_a_first_update_that_is_withheld_leaves_the_weights_as_they_were(name):
    model = small_model()
    optimizer = build_optimizer(model, SECTION, name)
    weights = [parameter.detach().clone() for parameter in model.parameters()]
    update(model, optimizer, float("nan"), is_bad=1.0)
    assert are_equal([p.detach() for p in model.parameters()], weights)
    assert optimizer.updates_done() == 0


@every_optimizer
def test_a_restored_optimizer_makes_the_same_next_update(name):
    model = small_model()
    optimizer = build_optimizer(model, SECTION, name)
    for gradient in (1.0, -0.3, 0.7):
        update(model, optimizer, gradient)
    other = copy.deepcopy(model)
    resumed = build_optimizer(other, SECTION, name)
    assert resumed.tensors(other) == {}, "nothing before the first update"
    stored = {name: tensor.clone() for name, tensor in optimizer.tensors(model).items()}
    resumed.restore(other, stored, optimizer.updates_done())
    for each, its in ((model, optimizer), (other, resumed)):
        update(each, its, 0.2)
    assert are_equal(everything(model, optimizer), everything(other, resumed))


@every_optimizer
def test_matrices_decay_and_vectors_do_not(name):
    model = small_model()
    optimizer = build_optimizer(model, SECTION, name)
    decay = {
        id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]
    }
    for parameter in model.parameters():
        assert decay[id(parameter)] == (0.1 if parameter.dim() >= 2 else 0.0)


@every_optimizer
def test_the_learning_rate_is_set_for_all_parameters(name):
    optimizer = build_optimizer(small_model(), SECTION, name)
    optimizer.set_learning_rate(0.25)
    assert {group["lr"] for group in optimizer.param_groups} == {0.25}
