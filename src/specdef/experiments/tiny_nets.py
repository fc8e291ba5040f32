"""The three networks of Appendix B.1 of "Locking Open Weight Models with Spectral Deformation", in tiny.

Not stated in the paper, and chosen here: no biases (its equations have none); targets of the shape of the output, and outputs of
the shape of the input; convolutions along the 4 inputs, 1 -> 4 -> 4 channels, tanh everywhere in the CNN; the transformer of its
equations (1) to (4) with one head, width s = 4, ReLU, no layer norm, eta = 1/2 (one block), every token an output; float64.

Every weight may carry a leading dimension of models, with inputs `[models, samples, ...]`: a sweep is then one training run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from specdef.curvature.factors import Pair
from specdef.spectral.topk import topk_svd

SAMPLES, INPUTS, HIDDEN, TOKENS, CHANNELS = 64, 4, 8, 2, 4
"""Appendix B.1: 64 samples of 4 Gaussian numbers, hidden width 8, sequences of 2; the channels are our choice."""

Activation = Callable[[Tensor], Tensor]


class Linear(nn.Linear):
    """A linear layer without bias whose weight may be `[models, out, in]`."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, bias=False, dtype=torch.float64)

    def forward(self, input: Tensor) -> Tensor:
        """Return x W^T."""
        return input @ _spread(self.weight, 2, input.ndim)


class Conv(nn.Conv1d):
    """A convolution of kernel 3 and padding 1 without bias whose weight may be `[models, out, in, 3]`."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, 3, padding=1, bias=False, dtype=torch.float64)

    def forward(self, input: Tensor) -> Tensor:
        """Return the convolution along the last dimension."""
        wide, length = nn.functional.pad(input, (1, 1)), input.shape[-1]
        # Not Tensor.unfold: its derivative has no batching rule, and torch warns.
        patches = torch.stack([wide[..., i : i + length] for i in range(3)], -1)
        rows = patches.movedim(-3, -2).flatten(-2)
        return (rows @ _spread(self.weight.flatten(-2), 2, rows.ndim)).mT


class MLP(nn.Module):
    """Four linear layers with an activation between them.

    Args:
        sizes: Widths, the input first.
        activation: ReLU in the paper.
        compensated: Append one more linear layer, the C of arXiv 2602.18868 behind the last weight.
    """

    def __init__(
        self,
        sizes: Sequence[int] = (INPUTS, HIDDEN, HIDDEN, HIDDEN, INPUTS),
        activation: Activation = torch.relu,
        *,
        compensated: bool = False,
    ) -> None:
        super().__init__()
        self.inserted = Linear(sizes[-1], sizes[-1]) if compensated else nn.Identity()
        self.layers = nn.ModuleList(Linear(a, b) for a, b in pairwise(sizes))
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        """Return the outputs."""
        for layer in self.layers[:-1]:
            x = self.activation(layer(x))
        out: Tensor = self.inserted(self.layers[-1](x))
        return out


class CNN(nn.Module):
    """Two convolutions and a two-layer perceptron on top."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.ModuleList([Conv(1, CHANNELS), Conv(CHANNELS, CHANNELS)])
        self.head = nn.ModuleList([Linear(CHANNELS * INPUTS, HIDDEN), Linear(HIDDEN, INPUTS)])

    def forward(self, x: Tensor) -> Tensor:
        """Return the outputs."""
        x = x.unsqueeze(-2)
        for conv in self.conv:
            x = torch.tanh(conv(x))
        out: Tensor = self.head[1](torch.tanh(self.head[0](x.flatten(-2))))
        return out


class Transformer(nn.Module):
    """One block of equations (1) to (4): Z + eta W_O W_V Z softmax((W_K Z)^T W_Q Z), then Z + eta W_2 relu(W_1 Z).

    Args:
        activation: Of the feed-forward part.
    """

    def __init__(self, activation: Activation = torch.relu) -> None:
        super().__init__()
        self.query, self.key, self.value, self.output = (Linear(INPUTS, INPUTS) for _ in range(4))
        self.up, self.down = Linear(INPUTS, HIDDEN), Linear(HIDDEN, INPUTS)
        self.scores = nn.Identity()
        self.activation, self.eta = activation, 0.5

    def forward(self, z: Tensor) -> Tensor:
        """Return the block's output, one row per token."""
        scores = self.scores(self.key(z) @ self.query(z).mT)
        mixed = scores.softmax(-2).mT @ self.value(z)
        z = z + self.eta * self.output(mixed)
        out: Tensor = z + self.eta * self.down(self.activation(self.up(z)))
        return out


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """A freshly initialised network and its data.

    Args:
        model: The network.
        inputs: `[64, 4]`, or `[64, 2, 4]` for the transformer.
        targets: Gaussian, of the same shape.
        scaled: The weight whose top singular value the figure multiplies.
        pairs: Blocks and later weights that the bounds go through.
    """

    model: nn.Module
    inputs: Tensor
    targets: Tensor
    scaled: str
    pairs: tuple[Pair, ...]


ARCHITECTURES = ("mlp", "cnn", "transformer")


def make_task(architecture: str, seed: int) -> Task:
    """Draw data and Xavier-uniform weights.

    Args:
        architecture: One of `ARCHITECTURES`.
        seed: Of everything drawn.

    Returns:
        The task.

    Raises:
        ValueError: No such architecture.
    """
    if architecture not in ARCHITECTURES:
        raise ValueError(f"architecture must be one of {ARCHITECTURES}, got {architecture!r}.")
    generator = torch.Generator().manual_seed(seed)
    model = {"mlp": MLP, "cnn": CNN, "transformer": Transformer}[architecture]()
    for weight in model.parameters():
        nn.init.xavier_uniform_(weight, generator=generator)
    shape = (SAMPLES, TOKENS, INPUTS) if architecture == "transformer" else (SAMPLES, INPUTS)
    inputs = torch.randn(shape, generator=generator, dtype=torch.float64)
    targets = torch.randn(shape, generator=generator, dtype=torch.float64)
    last = {"mlp": "layers.3.weight", "cnn": "head.1.weight", "transformer": "output.weight"}
    scaled = last[architecture]
    if architecture == "transformer":
        pairs = [Pair(block=f"{name}.weight", through=scaled) for name in ("query", "key", "value")]
        pairs.append(Pair(block="up.weight", through="down.weight"))
        for a, b in (("query", "key"), ("key", "query")):
            pairs.append(Pair(block=f"{a}.weight", through=f"{b}.weight", scores="scores"))
    else:
        blocks = [name for name, _ in model.named_parameters() if name != scaled]
        pairs = [Pair(block=name, through=scaled) for name in blocks]
    return Task(model=model, inputs=inputs, targets=targets, scaled=scaled, pairs=tuple(pairs))


def scale_top(weight: Tensor, scale: float, *, k: int = 1) -> Tensor:
    """Multiply the k largest singular values: U S~ V^T, the paper's scaled reconstruction.

    Args:
        weight: `[out, ...]`, seen as a matrix with `out` rows.
        scale: Factor.
        k: How many.

    Returns:
        The new weight.
    """
    U, S, Vh, _ = topk_svd(weight.flatten(1), k)
    return weight + ((scale - 1) * (U * S) @ Vh).view(weight.shape)


def compensate(mlp: MLP, scale: float) -> MLP:
    """Return an MLP with the same function: the last weight scaled, and C = U S S~^-1 U^T behind it (arXiv 2602.18868).

    Args:
        mlp: The original; unchanged.
        scale: Factor of the last weight's largest singular value.

    Returns:
        A copy with the layer `inserted`.
    """
    weights = {name: p.detach().clone() for name, p in mlp.named_parameters()}
    shapes = [weight.shape for weight in weights.values()]
    sizes = [*(shape[1] for shape in shapes), shapes[-1][0]]
    copy = MLP(sizes, mlp.activation, compensated=True)
    last = f"layers.{len(mlp.layers) - 1}.weight"
    U, _, _, _ = topk_svd(weights[last], 1)
    weights[last] = scale_top(weights[last], scale)
    eye = torch.eye(sizes[-1], dtype=torch.float64)
    copy.load_state_dict(weights | {"inserted.weight": eye - (1 - 1 / scale) * U @ U.T})
    return copy


def _spread(weight: Tensor, matrix_dims: int, ndim: int) -> Tensor:
    """Transpose, with ones between the models and the matrix so that `[models, samples, …]` broadcasts."""
    w = weight.mT
    if weight.ndim == matrix_dims:
        return w
    return w.view(w.shape[0], *(1,) * (ndim - 3), *w.shape[1:])
