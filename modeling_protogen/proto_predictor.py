"""From states of an encoder, of the decoder over the prompt, or of both, to proto-tokens, a length and an error."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from transformers import Cache

from .configuration_protogen import FITTED_SIZE, ProtoGenConfig

# The log of the predicted variance of an answer's share of wrong tokens stays inside these bounds.
LOG_ERROR_VARIANCE_RANGE = (-8.0, 0.0)


@dataclass
class Prediction:
    """
    What is predicted for a batch of instructions.

    Args:
        e (`torch.Tensor` of shape `(batch, max_chunks, num_e_tokens, decoder_dim)`)
        m (`torch.Tensor` of shape `(batch, max_chunks, decoder_dim)`)
        m_offsets (`torch.Tensor` of shape `(chunk_size, decoder_dim)`, *optional*): added to `m` by position.
        log_length_mean, log_length_variance (`torch.FloatTensor` of shape `(batch,)`): of the natural log of the
            answer's length in tokens.
        error_mean, error_variance (`torch.FloatTensor` of shape `(batch,)`): of the share of the answer's tokens that
            will be wrong.
        prompt_cache (`Cache`, *optional*): the decoder's keys and values of the prompt, where they were needed.
        next_logits (`torch.Tensor` of shape `(batch, vocab)`, *optional*): the decoder's, after the prompt, where its
            states were read.
    """

    e: torch.Tensor
    m: torch.Tensor
    m_offsets: torch.Tensor | None
    log_length_mean: torch.Tensor
    log_length_variance: torch.Tensor
    error_mean: torch.Tensor
    error_variance: torch.Tensor
    prompt_cache: Cache | None = None
    next_logits: torch.Tensor | None = None


class ScaledLinear(nn.Linear):
    """A linear layer whose fresh weights have the standard deviation `init_std`."""

    def __init__(self, in_features: int, out_features: int, init_std: float):
        self.init_std = init_std
        super().__init__(in_features, out_features)


class ScaledEmbedding(nn.Embedding):
    """A table of vectors whose fresh elements have the standard deviation `init_std`."""

    def __init__(self, num_embeddings: int, embedding_dim: int, init_std: float):
        self.init_std = init_std
        super().__init__(num_embeddings, embedding_dim)


class CrossAttention(nn.Module):
    """Multi-head attention of `(batch, num_queries, dim)` over states `(batch, source, dim)`."""

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.query = nn.Linear(dim, dim)
        self.key = nn.Linear(dim, dim)
        self.value = nn.Linear(dim, dim)
        self.output = nn.Linear(dim, dim)

    def forward(self, queries: torch.Tensor, states: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        def split_heads(x):
            return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

        pooled = F.scaled_dot_product_attention(
            split_heads(self.query(queries)),
            split_heads(self.key(states)),
            split_heads(self.value(states)),
            attn_mask=attention_mask.bool()[:, None, None, :],
        )
        return self.output(pooled.transpose(1, 2).flatten(2))


class AttentionPooling(nn.Module):
    """
    Learned queries that read the states once or several times, each time adding what they found (the latent array of
    Jaegle et al., 2021, https://arxiv.org/abs/2103.03206): `(batch, num_queries, dim)`.
    """

    def __init__(self, dim: int, num_queries: int, num_heads: int, num_layers: int):
        super().__init__()
        self.queries = nn.Parameter(torch.empty(num_queries, dim))
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(num_layers))
        self.layers = nn.ModuleList(CrossAttention(dim, num_heads) for _ in range(num_layers))

    def forward(
        self, states: torch.Tensor, attention_mask: torch.Tensor, start: torch.Tensor | None = None
    ) -> torch.Tensor:
        """`start` `(batch, dim)`, where given, is added to all queries."""
        x = self.queries.expand(len(states), -1, -1)
        if start is not None:
            x = x + start[:, None]
        for norm, layer in zip(self.norms, self.layers, strict=True):
            x = x + layer(norm(x), states, attention_mask)
        return x


class Projection(nn.Module):
    """
    Two-layer perceptron on a normalised input; `output_std` is the scale of its output when fresh. With `latent_dim`
    the output lies in an affine subspace of that many dimensions.
    """

    def __init__(self, dim: int, output_dim: int, output_std: float, latent_dim: int | None):
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        # The normalised input keeps unit variance in `hidden`, and E[gelu(z)^2] = 0.425.
        self.hidden = ScaledLinear(dim, output_dim, init_std=dim**-0.5)
        hidden_std = (0.425 * output_dim) ** 0.5
        self.latent = None
        if latent_dim is None:
            self.output = ScaledLinear(output_dim, output_dim, init_std=output_std / hidden_std)
        else:
            self.latent = ScaledLinear(output_dim, latent_dim, init_std=1 / hidden_std)
            self.output = ScaledLinear(latent_dim, output_dim, init_std=output_std * latent_dim**-0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.gelu(self.hidden(self.norm(x)))
        return self.output(x if self.latent is None else self.latent(x))


class Gaussian(nn.Module):
    """Mean (before any link) and variance, whose log stays inside a range, of one number: two of shape `(batch,)`."""

    def __init__(self, dim: int, log_variance_range: tuple[float, float]):
        super().__init__()
        self.log_variance_range = log_variance_range
        self.norm = nn.LayerNorm(dim)
        self.projection = nn.Linear(dim, 2)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        mean, variance_logit = self.projection(self.norm(x)).float().unbind(-1)
        low, high = self.log_variance_range
        return mean, (low + (high - low) * variance_logit.sigmoid()).exp()


class ProtoTokenPredictor(nn.Module):
    """
    Predicts proto-tokens, the answer's length and its error: one learned query for each `e`, each predicted `m`, the
    length and the error. Queries start from the decoder's last prompt state where the decoder's states are read: it
    looks ahead already.
    """

    def __init__(self, config: ProtoGenConfig):
        super().__init__()
        self.config = config
        dim, decoder_dim = config.latent_source_dim, config.decoder_text_config.hidden_size
        self.num_e = config.max_chunks * config.num_e_tokens
        predicts_m = config.m_scope == "per_example" and config.arrangement != "e_only"
        num_queries = self.num_e + (config.max_chunks if predicts_m else 0) + 2
        self.decoder_reading = None
        if config.reads_decoder_states:
            self.decoder_reading = nn.Sequential(nn.LayerNorm(decoder_dim), nn.Linear(decoder_dim, dim))
        num_layers = 0 if config.latent_source == "none" else config.num_pooling_layers
        self.pooling = AttentionPooling(dim, num_queries, config.num_pooling_heads, num_layers)
        # The factor is not in the weights, so that training moves what they give in proportion to its size.
        std = config.proto_token_std / FITTED_SIZE
        self.e_projection = Projection(dim, decoder_dim, std, config.latent_dim)
        self.m_projection = Projection(dim, decoder_dim, std, config.latent_dim) if predicts_m else None
        self.m_table = None
        if config.m_scope != "per_example":
            self.m_table = ScaledEmbedding(len(config.categories or [0]), decoder_dim, std)
        self.m_offsets = None
        if config.m_position_offsets:
            self.m_offsets = ScaledEmbedding(config.chunk_size, decoder_dim, init_std=0.0)
        self.length = Gaussian(dim, config.log_length_variance_range)
        self.error = Gaussian(dim, LOG_ERROR_VARIANCE_RANGE)

    def forward(
        self,
        encoder_states: torch.Tensor | None,
        encoder_mask: torch.Tensor | None,
        decoder_states: torch.Tensor | None = None,
        decoder_mask: torch.Tensor | None = None,
        category_ids: torch.LongTensor | None = None,
    ) -> Prediction:
        """
        Args:
            encoder_states (`torch.Tensor` of shape `(batch, source, encoder_dim)`), encoder_mask (`torch.Tensor` of
                shape `(batch, source)`): None without an encoder.
            decoder_states (`torch.Tensor` of shape `(batch, prompt, decoder_dim)`), decoder_mask (`torch.Tensor` of
                shape `(batch, prompt)`): of the prompt, wherever its padding is; states that are not read are None.
            category_ids (`torch.LongTensor` of shape `(batch,)`, *optional*): needed by `m_scope="per_category"`.
        """
        config, states, mask, start = self.config, encoder_states, encoder_mask, None
        if self.decoder_reading is not None:
            read = self.decoder_reading(decoder_states.to(self.pooling.queries.dtype))
            last = (decoder_mask * torch.arange(read.shape[1], device=read.device)).argmax(-1)
            start = read[torch.arange(len(read), device=read.device), last]
            states = read if states is None else torch.cat([states, read], dim=1)
            mask = decoder_mask if mask is None else torch.cat([mask, decoder_mask], dim=1)
        if states is None:
            states = self.pooling.queries.new_empty(len(decoder_mask), 0, config.latent_source_dim)
        pooled = self.pooling(states, mask, start)
        e = self.e_projection(pooled[:, : self.num_e]).unflatten(1, (config.max_chunks, config.num_e_tokens))
        if self.m_projection is not None:
            m = self.m_projection(pooled[:, self.num_e : -2])
        elif self.m_table is not None:
            if config.m_scope != "per_category":
                category_ids = torch.zeros(len(e), dtype=torch.long, device=e.device)
            elif category_ids is None:
                raise ValueError("m_scope=per_category needs category_ids: positions in config.categories.")
            m = self.m_table(category_ids)[:, None].expand(-1, config.max_chunks, -1)
        else:
            m = e.new_zeros(len(e), config.max_chunks, e.shape[-1])
        offsets = None
        if self.m_offsets is not None:
            offsets = FITTED_SIZE * self.m_offsets(torch.arange(config.chunk_size, device=e.device))

        length_mean, length_variance = self.length(pooled[:, -2])
        error_logit, error_variance = self.error(pooled[:, -1])
        # The bias starts at zero; predictions start at half the longest answer.
        length_mean = length_mean + math.log(max(config.max_answer_length / 2, 1))
        return Prediction(
            e=FITTED_SIZE * e,
            m=FITTED_SIZE * m,
            m_offsets=offsets,
            log_length_mean=length_mean + config.log_length_shift,
            log_length_variance=length_variance * config.log_length_scale**2,
            error_mean=error_logit.sigmoid(),
            error_variance=error_variance,
        )
