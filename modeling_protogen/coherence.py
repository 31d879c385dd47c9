"""What makes the tokens of a draft hang together: each follows from those before it, not from its slot alone."""

import torch
import torch.nn.functional as F
from torch import nn

from .proto_predictor import ScaledLinear


class Coherence(nn.Module):
    """
    Moves the decoder's last state at a slot by two layers that read it and what the slot does not see, the tokens
    between the text and the one that it predicts (after the sampler head of Samragh et al., 2025,
    https://arxiv.org/abs/2507.11851, which reads the last of them). Fresh ones move nothing.

    Args:
        dim (`int`): of the decoder's last states and its input embeddings.
        hidden_dim (`int`): between the layers.
        num_tokens (`int`): that a slot does not see at most, the draft's length.
    """

    def __init__(self, dim: int, hidden_dim: int, num_tokens: int):
        super().__init__()
        self.num_tokens = num_tokens
        self.of_state = ScaledLinear(dim, hidden_dim, init_std=dim**-0.5)
        self.of_tokens = ScaledLinear(num_tokens * dim, hidden_dim, init_std=dim**-0.5, bias=False)
        self.out = ScaledLinear(hidden_dim, dim, init_std=0.0, bias=False)

    def forward(self, states: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """States `(rows, dim)` at slots and embeddings `(rows, num_tokens, dim)` from [`unseen`] to moved states."""
        state, tokens = (F.rms_norm(x.to(self.out.weight.dtype), x.shape[-1:]) for x in (states, tokens))
        return states + self.out(F.silu(self.of_state(state) + self.of_tokens(tokens.flatten(1)))).to(states.dtype)


def unseen(embeddings: torch.Tensor) -> torch.Tensor:
    """
    From the embeddings of the tokens before each place of drafts, `(drafts, size, dim)`, to those of all tokens since
    the text's end, `(drafts, size, size, dim)`: the nearest first, zeros where there are no more.
    """
    size = embeddings.shape[1]
    return torch.stack([F.pad(embeddings[:, : size - back], (0, 0, back, 0)) for back in range(size)], dim=2)
