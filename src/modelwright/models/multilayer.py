"""A multilayer perceptron in NumPy with its backpropagation written by hand.

Nothing here knows automatic differentiation. Each layer has a forward pass, and a backward pass that turns the gradient
of the loss by its output (d_output) into that by its input and by its parameters:

    dense       y = x W + b             d_W = x^T d_y       d_b = sum d_y       d_x = d_y W^T
    relu        y = max(x, 0)           d_x = d_y [x > 0]
    tanh        y = tanh x              d_x = d_y (1 - y^2)
    sigmoid     y = 1 / (1 + e^-x)      d_x = d_y y (1 - y)
    softmax and cross-entropy           d_x = (softmax(x) - one_hot) / B
    mean squared error                  d_x = 2 (x - target) / (B outputs)

`check_gradients` holds them against differences of the loss. Torch is not imported.
Source: Rumelhart, Hinton & Williams 1986; He et al. 2015, arXiv:1502.01852 and Glorot & Bengio 2010 (first weights).
Not done: convolutions, regularisation, other devices: `nn` and `train` are for work, this is for reading.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from modelwright.base import config as settings
from modelwright.base.errors import CheckpointError, ConfigError, DataError
from modelwright.base.files import atomic_folder, read_json, write_json
from modelwright.base.registry import lookup
from modelwright.models import NUMPY_OPTIMIZERS

Floats = NDArray[np.float64]
ACTIVATIONS = ("relu", "tanh", "sigmoid")
LOSSES = ("cross_entropy", "squared")
CONFIG, WEIGHTS = "config.json", "model.safetensors"


@dataclass(frozen=True)
class MultilayerConfig:
    """How a network is built."""

    sizes: tuple[int, ...]  # inputs, hidden layers, outputs
    activation: str = "relu"  # relu, tanh or sigmoid, between dense layers
    loss: str = "cross_entropy"  # cross_entropy (targets are classes) or squared (targets are numbers)

    def __post_init__(self) -> None:
        if len(self.sizes) < 2 or min(self.sizes) < 1:
            raise ConfigError(f"sizes is {self.sizes}; expected inputs, hidden layers and outputs, each at least 1.")
        for name, known in (("activation", ACTIVATIONS), ("loss", LOSSES)):
            if getattr(self, name) not in known:
                raise ConfigError(f"{name} is {getattr(self, name)!r}; known: {', '.join(known)}.")


class Dense:
    """y = x W + b."""

    def __init__(self, weight: Floats, bias: Floats):
        self.weight, self.bias = weight, bias  # (I, O), (O,)
        self.d_weight, self.d_bias = np.zeros_like(weight), np.zeros_like(bias)

    def forward(self, x: Floats) -> Floats:
        """Map (B, I) to (B, O)."""
        self._x = x
        return x @ self.weight + self.bias

    def backward(self, d_output: Floats) -> Floats:
        """Set the parameters' gradients and return that by the input."""
        self.d_weight = self._x.T @ d_output
        self.d_bias = d_output.sum(0)
        return d_output @ self.weight.T


class Relu:
    """y = max(x, 0)."""

    def forward(self, x: Floats) -> Floats:
        """Apply to every number."""
        self._is_open = x > 0
        return np.where(self._is_open, x, 0.0)

    def backward(self, d_output: Floats) -> Floats:
        """Let the gradient through where the input was positive."""
        return np.where(self._is_open, d_output, 0.0)


class Tanh:
    """y = tanh x."""

    def forward(self, x: Floats) -> Floats:
        """Apply to every number."""
        self._y = np.tanh(x)
        return self._y

    def backward(self, d_output: Floats) -> Floats:
        """Scale by the slope 1 - y^2."""
        return d_output * (1 - self._y**2)


class Sigmoid:
    """y = 1 / (1 + e^-x)."""

    def forward(self, x: Floats) -> Floats:
        """Apply to every number."""
        self._y = 0.5 * (1 + np.tanh(0.5 * x))  # the same function, without overflow
        return self._y

    def backward(self, d_output: Floats) -> Floats:
        """Scale by the slope y (1 - y)."""
        return d_output * self._y * (1 - self._y)


def cross_entropy(logits: Floats, labels: NDArray[np.int64]) -> tuple[float, Floats]:
    """Return the mean of -log softmax(logits)[label] and its gradient by the logits (B, classes)."""
    rows = np.arange(len(logits))
    shifted = logits - logits.max(1, keepdims=True)  # softmax does not change, exp cannot overflow
    log_total = np.log(np.exp(shifted).sum(1))
    loss = float(np.mean(log_total - shifted[rows, labels]))
    d_logits = np.exp(shifted - log_total[:, None])
    d_logits[rows, labels] -= 1
    return loss, d_logits / len(logits)


def squared_error(outputs: Floats, targets: Floats) -> tuple[float, Floats]:
    """Return the mean of (output - target)^2 and its gradient by the outputs."""
    difference = outputs - targets.reshape(outputs.shape)
    return float(np.mean(difference**2)), 2 * difference / difference.size


class Multilayer:
    """Dense layers with an activation between them.

    >>> model = Multilayer(MultilayerConfig((2, 8, 2)), seed=0)
    >>> model.predict(np.zeros((3, 2))).shape
    (3, 2)
    """

    def __init__(self, config: MultilayerConfig, seed: int = 0):
        self.config = config
        generator = np.random.default_rng(seed)
        gain = 2.0 if config.activation == "relu" else 1.0
        kinds: dict[str, type[Relu | Tanh | Sigmoid]] = {"relu": Relu, "tanh": Tanh, "sigmoid": Sigmoid}
        activation = kinds[config.activation]
        self.layers: list[Dense | Relu | Tanh | Sigmoid] = []
        for inputs, outputs in zip(config.sizes[:-1], config.sizes[1:], strict=True):
            if self.layers:
                self.layers.append(activation())
            weight = generator.normal(0.0, np.sqrt(gain / inputs), (inputs, outputs))
            self.layers.append(Dense(weight, np.zeros(outputs)))

    def dense_layers(self) -> Iterator[Dense]:
        """Yield the layers that have parameters."""
        return (layer for layer in self.layers if isinstance(layer, Dense))

    def parameters(self) -> list[Floats]:
        """Return weight and bias of every dense layer; changing them in place changes the network."""
        return [p for layer in self.dense_layers() for p in (layer.weight, layer.bias)]

    def gradients(self) -> list[Floats]:
        """Return the gradients of the last `backpropagate`, in the order of `parameters`."""
        return [g for layer in self.dense_layers() for g in (layer.d_weight, layer.d_bias)]

    def predict(self, x: Floats) -> Floats:
        """Map (B, inputs) to (B, outputs): logits, or numbers."""
        x = np.asarray(x, dtype=np.float64)
        if x.ndim != 2 or x.shape[1] != self.config.sizes[0]:
            raise DataError(f"The input has shape {x.shape}; expected (rows, {self.config.sizes[0]}). Reshape it.")
        for layer in self.layers:
            x = layer.forward(x)
        return x

    def loss(self, x: Floats, targets: NDArray) -> tuple[float, Floats]:
        """Return the loss of a batch and its gradient by the network's output."""
        outputs = self.predict(x)
        if self.config.loss == "squared":
            return squared_error(outputs, np.asarray(targets, dtype=np.float64))
        labels = np.asarray(targets)
        if labels.dtype.kind not in "iu" or labels.shape != (len(outputs),):
            raise DataError(f"The targets are {labels.dtype} of shape {labels.shape}; expected one class a row.")
        if labels.min() < 0 or labels.max() >= outputs.shape[1]:
            raise DataError(f"A target is class {labels.max()}; the network has classes 0 to {outputs.shape[1] - 1}.")
        return cross_entropy(outputs, labels)

    def backpropagate(self, x: Floats, targets: NDArray) -> float:
        """Return the loss of a batch and leave every parameter's gradient in its layer."""
        loss, gradient = self.loss(x, targets)
        for layer in reversed(self.layers):
            gradient = layer.backward(gradient)
        return loss

    def save(self, folder: str | Path) -> None:
        """Write ``config.json`` and ``model.safetensors``."""
        with atomic_folder(Path(folder)) as work:
            write_json(work / CONFIG, settings.to_dict(self.config))
            save_file({f"layers.{i}": p for i, p in enumerate(self.parameters())}, work / WEIGHTS)

    @classmethod
    def load(cls, folder: str | Path) -> "Multilayer":
        """Read what `save` wrote.

        Raises:
            CheckpointError: A file is damaged, or the weights do not fit the config.
        """
        model = cls(settings.build(MultilayerConfig, read_json(Path(folder) / CONFIG)))
        try:
            found = load_file(Path(folder) / WEIGHTS)
        except (SafetensorError, OSError, json.JSONDecodeError) as error:
            raise CheckpointError(f"{Path(folder) / WEIGHTS} cannot be read: {error}. Save the model again.") from error
        for i, parameter in enumerate(model.parameters()):
            stored = found.get(f"layers.{i}")
            shape = None if stored is None else stored.shape
            if stored is None or shape != parameter.shape:
                raise CheckpointError(
                    f"{Path(folder) / WEIGHTS}: layers.{i} is {shape}; {CONFIG} asks for {parameter.shape}. "
                    "The two belong to different models."
                )
            parameter[...] = stored
        return model


class SGD:
    """w -= rate g."""

    def __init__(self, learning_rate: float = 0.1):
        self.learning_rate = learning_rate

    def update(self, parameters: Sequence[Floats], gradients: Sequence[Floats]) -> None:
        """Change the parameters in place."""
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter -= self.learning_rate * gradient


class Momentum:
    """v = beta v + g; w -= rate v (Polyak 1964)."""

    def __init__(self, learning_rate: float = 0.02, beta: float = 0.9):
        self.learning_rate, self.beta = learning_rate, beta
        self._velocity: list[Floats] = []

    def update(self, parameters: Sequence[Floats], gradients: Sequence[Floats]) -> None:
        """Change the parameters in place."""
        self._velocity = self._velocity or [np.zeros_like(p) for p in parameters]
        for parameter, gradient, velocity in zip(parameters, gradients, self._velocity, strict=True):
            velocity *= self.beta
            velocity += gradient
            parameter -= self.learning_rate * velocity


class RMSProp:
    """s = beta s + (1 - beta) g^2; w -= rate g / (sqrt(s) + epsilon) (Tieleman & Hinton 2012)."""

    def __init__(self, learning_rate: float = 0.002, beta: float = 0.99, epsilon: float = 1e-8):
        self.learning_rate, self.beta, self.epsilon = learning_rate, beta, epsilon
        self._square: list[Floats] = []

    def update(self, parameters: Sequence[Floats], gradients: Sequence[Floats]) -> None:
        """Change the parameters in place."""
        self._square = self._square or [np.zeros_like(p) for p in parameters]
        for parameter, gradient, square in zip(parameters, gradients, self._square, strict=True):
            square += (1 - self.beta) * (gradient**2 - square)
            parameter -= self.learning_rate * gradient / (np.sqrt(square) + self.epsilon)


class Adam:
    """Means of g and g^2, each divided by what it lacks at the start (Kingma & Ba 2015, arXiv:1412.6980)."""

    def __init__(self, learning_rate: float = 0.003, betas: tuple[float, float] = (0.9, 0.999), epsilon: float = 1e-8):
        self.learning_rate, self.betas, self.epsilon = learning_rate, betas, epsilon
        self._mean: list[Floats] = []
        self._square: list[Floats] = []
        self._step = 0

    def update(self, parameters: Sequence[Floats], gradients: Sequence[Floats]) -> None:
        """Change the parameters in place."""
        self._mean = self._mean or [np.zeros_like(p) for p in parameters]
        self._square = self._square or [np.zeros_like(p) for p in parameters]
        self._step += 1
        lacks = [1 - beta**self._step for beta in self.betas]
        for parameter, gradient, mean, square in zip(parameters, gradients, self._mean, self._square, strict=True):
            mean += (1 - self.betas[0]) * (gradient - mean)
            square += (1 - self.betas[1]) * (gradient**2 - square)
            parameter -= self.learning_rate * (mean / lacks[0]) / (np.sqrt(square / lacks[1]) + self.epsilon)


def fit(
    model: Multilayer,
    x: Floats,
    targets: NDArray,
    optimizer: str | SGD | Momentum | RMSProp | Adam = "adam",
    *,
    num_epochs: int = 30,
    batch_size: int = 32,
    seed: int = 0,
) -> list[float]:
    """Train in place, in batches in a new order each epoch; return the mean loss of each epoch.

    Args:
        model: The network.
        x: (rows, inputs).
        targets: A class or numbers for each row.
        optimizer: sgd, momentum, rmsprop or adam at their usual rates, or one with a rate of its own.
        num_epochs: Passes over the rows.
        batch_size: Rows an update.
        seed: Of the order.
    """
    rule = lookup(NUMPY_OPTIMIZERS, optimizer, "optimizer")() if isinstance(optimizer, str) else optimizer
    generator = np.random.default_rng(seed)
    history = []
    for _ in range(num_epochs):
        order = generator.permutation(len(x))
        total = 0.0
        for start in range(0, len(x), batch_size):
            rows = order[start : start + batch_size]
            total += model.backpropagate(x[rows], targets[rows]) * len(rows)
            rule.update(model.parameters(), model.gradients())
        history.append(total / len(x))
    return history


def check_gradients(model: Multilayer, x: Floats, targets: NDArray, step: float = 1e-5) -> float:
    """Return the largest relative error of a parameter's gradient against central differences of the loss.

    For each parameter: ||g - d|| / (||g|| + ||d||), every number of it nudged by ``step`` both ways.
    """
    model.backpropagate(x, targets)
    worst = 0.0
    for parameter, gradient in zip(model.parameters(), [g.copy() for g in model.gradients()], strict=True):
        numeric = np.zeros_like(parameter)
        for place in np.ndindex(parameter.shape):
            kept = parameter[place]
            parameter[place] = kept + step
            above = model.loss(x, targets)[0]
            parameter[place] = kept - step
            below = model.loss(x, targets)[0]
            parameter[place] = kept
            numeric[place] = (above - below) / (2 * step)
        size = np.linalg.norm(gradient) + np.linalg.norm(numeric)
        if size > 0:
            worst = max(worst, float(np.linalg.norm(gradient - numeric) / size))
    return worst
