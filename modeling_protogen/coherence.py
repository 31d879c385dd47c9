"""What makes the tokens of a draft hang together: each follows from the one before it, not from its slot alone."""

import torch
import torch.nn.functional as F
from torch import nn

from .proto_predictor import ScaledLinear


class Coherence(nn.Module):
    """
    Moves the decoder's last state at a slot by two layers that read it and the token before the one that it predicts
    (the sampler head of Samragh et al., 2025, https://arxiv.org/abs/2507.11851). Fresh ones move nothing.

    Args:
        dim (`int`): of the decoder's last states and its input embeddings.
        hidden_dim (`int`): between the layers.
    """

    def __init__(self, dim: int, hidden_dim: int):
        super().__init__()
        self.of_state = ScaledLinear(dim, hidden_dim, init_std=dim**-0.5)
        self.of_token = ScaledLinear(dim, hidden_dim, init_std=dim**-0.5, bias=False)
        self.out = ScaledLinear(hidden_dim, dim, init_std=0.0, bias=False)

    def forward(self, states: torch.Tensor, embeddings: torch.Tensor) -> torch.Tensor:
        """States `(rows, dim)` at slots and embeddings `(rows, dim)` of the tokens before to moved states."""
        state, token = (F.rms_norm(x.to(self.out.weight.dtype), x.shape[-1:]) for x in (states, embeddings))
        return states + self.out(F.silu(self.of_state(state) + self.of_token(token))).to(states.dtype)
