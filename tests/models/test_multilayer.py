"""The NumPy network: hand-written gradients equal differences and torch's; update rules equal torch's; it learns."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn

from modelwright.base.errors import CheckpointError, ConfigError, DataError
from modelwright.models import NUMPY_OPTIMIZERS
from modelwright.models.multilayer import (
    SGD,
    Adam,
    Momentum,
    Multilayer,
    MultilayerConfig,
    RMSProp,
    check_gradients,
    fit,
)


def make(activation="tanh", loss="cross_entropy", sizes=(4, 6, 5, 3), seed=0):
    model = Multilayer(MultilayerConfig(sizes, activation, loss), seed)
    draw = np.random.default_rng(seed)
    for parameter in model.parameters():
        parameter += draw.normal(0, 0.1, parameter.shape)
    x = draw.normal(size=(7, sizes[0]))
    return model, x, draw.integers(sizes[-1], size=7) if loss == "cross_entropy" else draw.normal(size=(7, sizes[-1]))


@pytest.mark.parametrize("activation", ["relu", "tanh", "sigmoid"])
@pytest.mark.parametrize("loss", ["cross_entropy", "squared"])
def test_gradients_equal_differences_of_the_loss(activation, loss):
    for seed in range(3):
        assert check_gradients(*make(activation, loss, seed=seed)) < 1e-7


def test_the_check_finds_a_wrong_gradient():
    model, x, targets = make()
    right = model.layers[1].backward
    model.layers[1].backward = lambda d_output: 1.01 * right(d_output)
    assert check_gradients(model, x, targets) > 1e-3


@pytest.mark.parametrize("activation", ["relu", "tanh", "sigmoid"])
def test_loss_and_gradients_equal_those_of_torch(activation):
    model, x, labels = make(activation)
    parameters = [torch.tensor(p, requires_grad=True) for p in model.parameters()]
    h = torch.tensor(x)
    for i in range(0, 6, 2):
        h = h @ parameters[i] + parameters[i + 1]
        h = getattr(torch, activation)(h) if i < 4 else h
    expected = nn.functional.cross_entropy(h, torch.tensor(labels))
    expected.backward()
    assert model.backpropagate(x, labels) == pytest.approx(float(expected.detach()))
    for mine, theirs in zip(model.gradients(), parameters, strict=True):
        assert np.allclose(mine, theirs.grad.numpy(), atol=1e-12)


@pytest.mark.parametrize(
    ("mine", "theirs"),
    [
        (SGD(0.1), lambda p: torch.optim.SGD(p, lr=0.1)),
        (Momentum(0.1), lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9)),
        (RMSProp(0.01), lambda p: torch.optim.RMSprop(p, lr=0.01)),
        (Adam(0.01), lambda p: torch.optim.Adam(p, lr=0.01)),
    ],
    ids=list(NUMPY_OPTIMIZERS),
)
def test_update_rules_equal_those_of_torch(mine, theirs):
    draw = np.random.default_rng(0)
    start = [draw.normal(size=(3, 2)), draw.normal(size=2)]
    ours, other = [p.copy() for p in start], [torch.tensor(p, requires_grad=True) for p in start]
    rule = theirs(other)
    for _ in range(20):
        gradients = [draw.normal(size=p.shape) for p in start]
        mine.update(ours, gradients)
        for parameter, gradient in zip(other, gradients, strict=True):
            parameter.grad = torch.tensor(gradient)
        rule.step()
    for a, b in zip(ours, other, strict=True):
        assert np.allclose(a, b.detach().numpy(), atol=1e-10)


@pytest.mark.parametrize("optimizer", NUMPY_OPTIMIZERS)
def test_every_update_rule_learns_a_circle_that_a_linear_model_cannot(optimizer):
    draw = np.random.default_rng(0)
    x = draw.uniform(-1, 1, (600, 2))
    inside = ((x**2).sum(1) < 0.6).astype(np.int64)

    def accuracy(sizes, labels):
        model = Multilayer(MultilayerConfig(sizes))
        history = fit(model, x[:400], labels[:400], optimizer, num_epochs=40, batch_size=16)
        assert history[-1] < history[0]
        return np.mean(model.predict(x[400:]).argmax(1) == inside[400:])

    assert accuracy((2, 24, 2), inside) > 0.93
    assert accuracy((2, 2), inside) < 0.75
    assert accuracy((2, 24, 2), draw.permutation(inside)) < 0.75


def test_a_curve_is_learned_by_squared_error():
    x = np.linspace(-2, 2, 200)[:, None]
    model = Multilayer(MultilayerConfig((1, 32, 1), "tanh", "squared"))
    fit(model, x, np.sin(2 * x), num_epochs=150)
    assert model.loss(x, np.sin(2 * x))[0] < 0.01 < np.var(np.sin(2 * x))


@pytest.mark.peer
def test_handwritten_digits():
    datasets = pytest.importorskip("sklearn.datasets", reason="pip install scikit-learn")
    digits = datasets.load_digits()
    order = np.random.default_rng(0).permutation(len(digits.target))
    x, y = digits.data[order] / 16, digits.target[order]
    model = Multilayer(MultilayerConfig((64, 64, 10)))
    fit(model, x[:1400], y[:1400], num_epochs=25)
    assert np.mean(model.predict(x[1400:]).argmax(1) == y[1400:]) >= 0.96
    control = Multilayer(MultilayerConfig((64, 64, 10)))
    fit(control, x[:1400], np.random.default_rng(1).permutation(y[:1400]), num_epochs=5)
    assert np.mean(control.predict(x[1400:]).argmax(1) == y[1400:]) < 0.3


def test_a_saved_model_loads_as_it_was(tmp_path):
    model, x, _ = make("sigmoid")
    model.save(tmp_path / "model")
    loaded = Multilayer.load(tmp_path / "model")
    assert loaded.config == model.config and np.array_equal(loaded.predict(x), model.predict(x))
    place = tmp_path / "model" / "config.json"
    whole = place.read_text()
    place.write_text(whole.replace("5", "7"))
    with pytest.raises(CheckpointError, match=r"layers.2 is \(6, 5\); config.json asks for \(6, 7\)"):
        Multilayer.load(tmp_path / "model")
    place.write_text(whole)
    (tmp_path / "model" / "model.safetensors").write_bytes(b"short")
    with pytest.raises(CheckpointError, match=r"model.safetensors cannot be read"):
        Multilayer.load(tmp_path / "model")


def test_torch_is_not_imported():
    code = "import sys, modelwright.models.multilayer; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_refusals():
    with pytest.raises(ConfigError, match=r"sizes is \(3,\)"):
        MultilayerConfig((3,))
    with pytest.raises(ConfigError, match="activation is 'gelu'; known: relu, tanh, sigmoid"):
        MultilayerConfig((3, 2), "gelu")
    model, x, labels = make()
    with pytest.raises(DataError, match=r"shape \(7, 3\); expected \(rows, 4\)"):
        model.predict(x[:, :3])
    with pytest.raises(DataError, match="A target is class 3; the network has classes 0 to 2"):
        model.loss(x, np.full(7, 3))
    with pytest.raises(DataError, match="expected one class a row"):
        model.loss(x, labels[:, None])
    with pytest.raises(ConfigError, match="optimizer is 'adamw'; known: adam, momentum"):
        fit(model, x, labels, "adamw")
