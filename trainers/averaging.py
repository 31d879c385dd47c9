"""An exponential moving average of the trained weights, which evaluation and the finished model take."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from transformers import TrainerCallback


class WeightAverage(TrainerCallback):
    """
    `average = decay * average + (1 - decay) * weights` after each step of the optimiser; early on with a smaller decay,
    `(1 + steps) / (10 + steps)`, so that the start is soon forgotten.

    Args:
        parameters (`dict[str, nn.Parameter]`): the trained ones, by name.
        decay (`float`): in 0..1.
    """

    def __init__(self, parameters: dict[str, nn.Parameter], decay: float):
        self.parameters, self.decay = parameters, decay
        self.weights = {name: parameter.detach().clone() for name, parameter in parameters.items()}

    @torch.no_grad()
    def on_step_end(self, args, state, control, **kwargs):
        decay = min(self.decay, (1 + state.global_step) / (10 + state.global_step))
        # One call for all of them: on a GPU hundreds of small ones take longer than the step's other work.
        torch._foreach_lerp_(list(self.weights.values()), list(self.parameters.values()), 1 - decay)

    def load(self, weights: dict[str, torch.Tensor]) -> None:
        for name, weight in self.weights.items():
            weight.copy_(weights[name])

    @torch.no_grad()
    def swap(self) -> None:
        """The averages take the place of the weights, and the weights theirs."""
        for name, parameter in self.parameters.items():
            kept = parameter.detach().clone()
            parameter.copy_(self.weights[name])
            self.weights[name].copy_(kept)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The model has the averages as its weights in here."""
        self.swap()
        try:
            yield
        finally:
            self.swap()
