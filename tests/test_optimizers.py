"""Optimizers, and the moving average of the weights."""

import pytest
import torch
from conftest import loaded_after

from unet_ray.config import ModelConfig, OptimizationConfig
from unet_ray.models import build
from unet_ray.training.muon import Muon, orthogonalise
from unet_ray.training.optimizers import average_of, build_optimizer


def test_biases_and_norms_do_not_decay():
    model = build(ModelConfig(base_channels=4, depth=1))
    decayed, kept = build_optimizer(OptimizationConfig(weight_decay=0.1), model).param_groups
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.1, 0)
    assert all(p.ndim > 1 for p in decayed["params"]) and all(p.ndim == 1 for p in kept["params"])


@pytest.mark.parametrize("name", ["adamw", "adam", "sgd", "rmsprop"])
def test_the_steps_are_torchs(name):
    config = OptimizationConfig(optimizer=name, weight_decay=0.1, momentum=0.9)
    model = build(ModelConfig(base_channels=4, depth=1))
    ours = build_optimizer(config, model)
    copies = {p: torch.nn.Parameter(p.detach().clone()) for p in model.parameters()}
    groups = [{**group, "params": [copies[p] for p in group["params"]]} for group in ours.param_groups]
    theirs = type(ours).__base__(groups)
    for step in range(3):
        for parameters, optimizer in ((copies.keys(), ours), (copies.values(), theirs)):
            for parameter in parameters:
                parameter.grad = torch.cos(parameter.detach() + step)
            optimizer.step()
    assert all(torch.equal(parameter, copy) for parameter, copy in copies.items())
    theirs.load_state_dict(ours.state_dict())
    ours.zero_grad()
    assert all(parameter.grad is None for parameter in model.parameters())


def test_training_does_not_import_torchs_compiler():
    code = (
        "import torch; from unet_ray.config import ModelConfig, OptimizationConfig\n"
        "from unet_ray.models import build; from unet_ray.training.optimizers import build_optimizer\n"
        "model = build(ModelConfig(base_channels=4, depth=1))\n"
        "for name in ('adamw', 'adam', 'sgd', 'rmsprop', 'muon'):\n"
        "    optimizer = build_optimizer(OptimizationConfig(optimizer=name), model)\n"
        "    model(torch.zeros(1, 3, 16, 16)).mean().backward()\n"
        "    optimizer.step(); optimizer.zero_grad(); optimizer.load_state_dict(optimizer.state_dict())\n"
    )
    assert not {"torch._dynamo", "sympy", "torchvision"} & loaded_after(code)


def test_muons_steps_are_orthogonal_and_its_other_parameters_take_adamws_steps():
    matrix = torch.randn(8, 36, generator=torch.Generator().manual_seed(0))
    singular = torch.linalg.svdvals(orthogonalise(matrix))
    assert singular.min() > 0.6 and singular.max() < 1.3
    assert torch.allclose(orthogonalise(matrix.T), orthogonalise(matrix).T, atol=1e-6)

    ours, theirs = (torch.nn.Parameter(torch.linspace(-1, 1, 5)) for _ in range(2))
    optimizers = [
        Muon([{"params": [ours], "orthogonal": False, "weight_decay": 0.1}], lr=0.05),
        torch.optim.AdamW([theirs], lr=0.05, weight_decay=0.1),
    ]
    for _ in range(4):
        for parameter, optimizer in zip((ours, theirs), optimizers, strict=True):
            optimizer.zero_grad()
            (parameter**3).sum().backward()
            optimizer.step()
    assert torch.allclose(ours, theirs, atol=1e-6)


@pytest.mark.parametrize("shape", [(8, 36), (36, 8), (16, 16), (1, 5)])
def test_muons_steps_are_the_sources_also_where_directions_are_missing(shape):
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.linalg.qr(torch.randn(side, side, generator=generator))[0] for side in shape)
    rank = min(shape)
    size = torch.logspace(0, -5, rank)
    size[rank // 2 :] = 0 if rank > 1 else 1
    matrix = left[:, :rank] * size @ right[:rank]
    expected = matrix.double() / matrix.double().norm()
    for _ in range(5):
        square = expected @ expected.T
        expected = 3.4445 * expected + (-4.7750 * square + 2.0315 * square @ square) @ expected
    # The source computes in bfloat16, which is off by 1e-2.
    assert torch.allclose(orthogonalise(matrix), expected.float(), atol=1e-3)
    assert not orthogonalise(torch.zeros(shape)).any()


def test_muon_leaves_the_last_layer_biases_and_norms_to_adamw():
    model = build(ModelConfig(base_channels=4, depth=1))
    hidden, head, others = build_optimizer(OptimizationConfig(optimizer="muon"), model).param_groups
    assert hidden["orthogonal"] and all(p.ndim == 4 for p in hidden["params"])
    assert [p is model.head.weight for p in head["params"]] == [True] and not head["orthogonal"]
    assert all(p.ndim == 1 for p in others["params"]) and not others["orthogonal"]
    assert sum(len(g["params"]) for g in (hidden, head, others)) == len(list(model.parameters()))


def test_the_average_of_the_weights_by_hand():
    network = torch.nn.Sequential(torch.nn.Linear(1, 1, bias=False), torch.nn.BatchNorm1d(1, affine=False))
    average = average_of(network, decay=0.9)
    expected = None
    for step in range(30):
        torch.nn.init.constant_(network[0].weight, float(step))
        network[1].running_mean.fill_(10.0 * step)
        average.update_parameters(network)
        decay = min(0.9, (1 + step) / (10 + step))
        expected = float(step) if expected is None else decay * expected + (1 - decay) * step
    assert average.module[0].weight.item() == pytest.approx(expected, rel=1e-5)
    assert average.module[1].running_mean.item() == pytest.approx(10 * expected, rel=1e-5)
