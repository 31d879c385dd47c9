"""
Slot adapters: low-rank weights in the frozen decoder's linear layers that act where proto-tokens stand and nowhere else
(gated LoRA, https://arxiv.org/abs/2507.11851). What the decoder computes for a real token is bit for bit what it
computes without them, as real tokens never see the slots behind them.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple

import torch
from torch import nn
from transformers import Cache, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from .proto_predictor import ScaledLinear

# Positions at the end of the running pass that hold proto-tokens.
NUM_SLOTS: ContextVar[int] = ContextVar("num_slots", default=0)


@contextmanager
def slots_at_the_end(num_slots: int) -> Iterator[None]:
    """In here the last `num_slots` positions of a decoder's pass are slots, padding behind them included."""
    token = NUM_SLOTS.set(num_slots)
    try:
        yield
    finally:
        NUM_SLOTS.reset(token)


class LowRank(nn.Module):
    """A linear map of low rank, zero at the start (Hu et al., 2021, https://arxiv.org/abs/2106.09685)."""

    def __init__(self, in_features: int, out_features: int, rank: int):
        super().__init__()
        self.down = ScaledLinear(in_features, rank, init_std=in_features**-0.5, bias=False)
        self.up = ScaledLinear(rank, out_features, init_std=0.0, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.up(self.down(x))

    def add_at_slots(self, layer: nn.Module, inputs: tuple[torch.Tensor], output: torch.Tensor) -> torch.Tensor | None:
        """A forward hook of the layer that this map stands beside."""
        num_slots = NUM_SLOTS.get()
        if not num_slots:
            return None
        (x,) = inputs
        if x.dim() != 3:
            raise ValueError(
                f"slot adapters need layers that read (batch, length, dim); one of this decoder's reads {x.dim()} "
                "dimensions, as mixtures of experts do: set slot_adapter_rank=0."
            )
        # Rows, as a linear layer on a slice of three dimensions takes a CPU twice the time.
        at_slots = x[:, -num_slots:].reshape(-1, x.shape[-1])
        added = self(at_slots.to(self.down.weight.dtype)).to(output.dtype).view(len(x), num_slots, -1)
        if num_slots == x.shape[1]:
            return output + added
        output[:, -num_slots:].add_(added)
        return output


class SlotAdapters(nn.Module):
    """
    A low-rank map beside linear layers inside the decoder, whose output is added at the slots. The language-model
    head has none.

    Args:
        rank (`int`): of each map.
        decoder (`PreTrainedModel`): gives the layers' names and shapes; `attach` makes it take the maps in.
        modules (`list[str]`, *optional*): last parts of the names of the layers that have one, as `down_proj` or
            `29.mlp.down_proj`; all by default.

    Raises:
        ValueError: if the decoder has no layer of such a name.
    """

    def __init__(self, rank: int, decoder: PreTrainedModel, modules: list[str] | None = None):
        super().__init__()
        shapes = {name: shape for name, (_, shape) in _linear_layers(decoder).items()}
        for module in modules or ():
            if not any(f".{name}".endswith(f".{module}") for name in shapes):
                known = dict.fromkeys(name.rpartition(".")[2] for name in shapes)
                raise ValueError(
                    f"slot_adapter_modules: none of this decoder's linear layers is called {module}; "
                    f"they are called {', '.join(known)}."
                )
        chosen = shapes if modules is None else [n for n in shapes if f".{n}".endswith(tuple(f".{m}" for m in modules))]
        self.maps = nn.ModuleDict({name.replace(".", "-"): LowRank(*shapes[name], rank) for name in chosen})
        self.handles = []

    def _layers(self, decoder: PreTrainedModel) -> Iterator[tuple[nn.Module, LowRank]]:
        for name, (layer, _) in _linear_layers(decoder).items():
            if (key := name.replace(".", "-")) in self.maps:
                yield layer, self.maps[key]

    def attach(self, decoder: PreTrainedModel) -> None:
        """From now on this decoder's passes inside [`slots_at_the_end`], and no other's, go through these maps."""
        while self.handles:
            self.handles.pop().remove()
        for layer, low_rank in self._layers(decoder):
            self.handles.append(layer.register_forward_hook(low_rank.add_at_slots))

    @torch.no_grad()
    def fused(self, decoder: PreTrainedModel) -> PreTrainedModel:
        """
        A decoder that computes at every position what this one computes at slots, with the maps added to its linear
        layers' weights; it shares all others.

        Raises:
            ValueError: if the weights are quantised.
        """
        if not all(layer.weight.is_floating_point() for layer, _ in self._layers(decoder)):
            raise ValueError("slot adapters cannot be fused into quantised weights; leave them beside the decoder.")
        shared = [*decoder.parameters(), *decoder.buffers(), *self.maps.values()]
        fused = copy.deepcopy(decoder, {id(part): part for part in shared})
        for layer, low_rank in self._layers(fused):
            added = low_rank.up.weight.float() @ low_rank.down.weight.float()
            if isinstance(layer, Conv1D):
                added = added.T
            layer.weight = nn.Parameter((layer.weight + added).to(layer.weight.dtype), requires_grad=False)
            layer._forward_hooks.clear()
        return fused


class FusedDecoder(NamedTuple):
    """
    Args:
        decoder (`PreTrainedModel`): from [`SlotAdapters.fused`].
        sink_cache (`Cache`, *optional*): keys and values of the sink that one text begins with, where the decoder sees
            no prompt.
    """

    decoder: PreTrainedModel
    sink_cache: Cache | None


def _linear_layers(decoder: PreTrainedModel) -> dict[str, tuple[nn.Module, tuple[int, int]]]:
    """From their names to the linear layers below the head, and how many features go in and out."""
    layers = {}
    for name, module in decoder.base_model.named_modules():
        if isinstance(module, nn.Linear):
            layers[name] = module, (module.in_features, module.out_features)
        elif isinstance(module, Conv1D):
            layers[name] = module, (module.nx, module.nf)
    return layers
