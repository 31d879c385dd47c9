"""
From states of an encoder, of the decoder over the prompt, or of both, to proto-tokens, a length and an error: a small
non-autoregressive decoder.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from transformers import Cache
from transformers.utils import ModelOutput

from .configuration_protogen import FITTED_SIZE, HEAD_DIM, ProtoGenConfig
from .proto_tokens import position_ids

# The log of the predicted variance of an answer's share of wrong tokens stays inside these bounds.
LOG_ERROR_VARIANCE_RANGE = (-8.0, 0.0)
# Answer tokens that one of the prompt accounts for at most.
MAX_DURATION = 32
# Width of the memory of the durations chosen so far.
MEMORY_DIM = 128


@dataclass
class ProtoTokenPrediction(ModelOutput):
    """
    What is predicted for a batch of instructions.

    Args:
        e (`torch.Tensor` of shape `(batch, chunks, num_e_tokens, decoder_dim)`)
        m (`torch.Tensor` of shape `(batch, chunks, decoder_dim)`)
        log_length_mean, log_length_variance (`torch.FloatTensor` of shape `(batch,)`): of the natural log of the
            answer's length in tokens.
        error_mean, error_variance (`torch.FloatTensor` of shape `(batch,)`): of the share of the answer's tokens that
            will be wrong.
        duration_logits (`torch.Tensor` of shape `(batch, prompt, MAX_DURATION + 1)`, *optional*): of the number of
            answer tokens that each of the prompt's accounts for, with `upsamples_prompt`.
        log_duration_confidence (`torch.FloatTensor` of shape `(batch,)`): log-probability of the chosen numbers, all
            together; 0 without them.
        prompt_cache (`Cache`, *optional*): the decoder's keys and values of the prompt, where they were needed.
        next_logits (`torch.Tensor` of shape `(batch, vocab)`, *optional*): the decoder's, after the prompt, where an
            answer begins with its own token and the prompt has been read.
    """

    e: torch.Tensor | None = None
    m: torch.Tensor | None = None
    log_length_mean: torch.Tensor | None = None
    log_length_variance: torch.Tensor | None = None
    error_mean: torch.Tensor | None = None
    error_variance: torch.Tensor | None = None
    log_duration_confidence: torch.Tensor | None = None
    duration_logits: torch.Tensor | None = None
    prompt_cache: Cache | None = None
    next_logits: torch.Tensor | None = None


class ScaledLinear(nn.Linear):
    """A linear layer whose fresh weights have the standard deviation `init_std`."""

    def __init__(self, in_features: int, out_features: int, init_std: float, bias: bool = True):
        self.init_std = init_std
        super().__init__(in_features, out_features, bias)


class ScaledEmbedding(nn.Embedding):
    """A table of vectors whose fresh elements have the standard deviation `init_std`."""

    def __init__(self, num_embeddings: int, embedding_dim: int, init_std: float):
        self.init_std = init_std
        super().__init__(num_embeddings, embedding_dim)


def sinusoids(positions: torch.Tensor, dim: int) -> torch.Tensor:
    """Vaswani et al., 2017, https://arxiv.org/abs/1706.03762, section 3.5: positions `(...)` to `(..., dim)`."""
    rates = torch.exp(torch.arange(0, dim, 2, device=positions.device) * (-math.log(1e4) / dim))
    angles = positions[..., None] * rates
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


class Upsampling(nn.Module):
    """
    Spreads the prompt's states over the answer in their order: each is repeated over as many tokens as it accounts for,
    its duration (the fertility of Gu et al., 2018, https://arxiv.org/abs/1711.02281; the length regulator of Ren et
    al., 2019, https://arxiv.org/abs/1905.09263).

    Durations are chosen from left to right, each given those before it, which a gated recurrent unit remembers (the
    aligned decoder of Liu & Lane, 2016, https://arxiv.org/abs/1609.01454). Chosen independently, two neighbours may
    both claim a part of the answer, or neither.
    """

    def __init__(self, dim: int):
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.duration = nn.Linear(dim, MAX_DURATION + 1)
        self.duration_from_memory = nn.Linear(MEMORY_DIM, MAX_DURATION + 1)
        # The unit's three gates (Cho et al., 2014, https://arxiv.org/abs/1406.1078).
        self.gates_from_state = nn.Linear(dim, 3 * MEMORY_DIM)
        self.gates_from_previous = nn.Embedding(MAX_DURATION + 1, 3 * MEMORY_DIM)
        self.gates_from_memory = nn.Linear(MEMORY_DIM, 3 * MEMORY_DIM)
        # Where in a stretch a token is, counted from its beginning and from its end.
        self.from_start = ScaledEmbedding(MAX_DURATION + 1, dim, init_std=1.0)
        self.from_end = ScaledEmbedding(MAX_DURATION + 1, dim, init_std=1.0)

    def forward(
        self,
        states: torch.Tensor,
        mask: torch.BoolTensor,
        positions: torch.LongTensor,
        durations: torch.LongTensor | None = None,
    ) -> tuple[torch.Tensor, torch.LongTensor, dict[str, torch.Tensor]]:
        """
        Args:
            states (`torch.Tensor` of shape `(batch, source, dim)`), mask (`torch.BoolTensor` of shape `(batch,
                source)`)
            positions (`torch.LongTensor` of shape `(queries,)`): of the answer's tokens.
            durations (`torch.LongTensor` of shape `(batch, source)`, *optional*): the true ones, in tokens; by default
                each is the most likely given those before it. A row that begins with -100 has none.

        Returns:
            States `(batch, queries, dim)`, which they are `(batch, queries)`, and of the durations `duration_logits`
            and `log_duration_confidence` as in [`ProtoTokenPrediction`], and their sum `length` `(batch,)`.
        """
        logits, durations = self._durations(states, mask, durations)
        ends = durations.cumsum(1)
        positions = positions.expand(len(states), -1).contiguous()
        source = torch.searchsorted(ends, positions, right=True).clamp_max(states.shape[1] - 1)
        end = ends.gather(1, source)
        start = end - durations.gather(1, source)
        spread = states.gather(1, source[..., None].expand(-1, -1, states.shape[-1]))
        spread = spread + self.from_start((positions - start).clamp(0, MAX_DURATION))
        spread = spread + self.from_end((end - positions).clamp(0, MAX_DURATION))
        chosen = logits.float().log_softmax(-1).gather(-1, durations[..., None])[..., 0]
        of_durations = {"duration_logits": logits, "log_duration_confidence": (chosen * mask).sum(1)}
        return spread, source, of_durations | {"length": durations.sum(1)}

    def _durations(
        self, states: torch.Tensor, mask: torch.BoolTensor, given: torch.LongTensor | None
    ) -> tuple[torch.Tensor, torch.LongTensor]:
        """Logits `(batch, source, MAX_DURATION + 1)` and durations `(batch, source)`, given or chosen."""
        states = self.norm(states)
        logits, gates = self.duration(states).unbind(1), self.gates_from_state(states).unbind(1)
        # Of the gates' dtype under autocast, where states may be narrower.
        memory = states.new_zeros(len(states), MEMORY_DIM, dtype=self.gates_from_previous.weight.dtype)
        previous = torch.zeros_like(mask[:, 0], dtype=torch.long)
        conditioned, durations = [], []
        for place, is_token in enumerate(mask.unbind(1)):
            reset, update, new = (gates[place] + self.gates_from_previous(previous)).chunk(3, -1)
            own_reset, own_update, own_new = self.gates_from_memory(memory).chunk(3, -1)
            candidate = (new + (reset + own_reset).sigmoid() * own_new).tanh()
            memory = torch.lerp(candidate, memory, (update + own_update).sigmoid()) * is_token[:, None]
            conditioned.append(logits[place] + self.duration_from_memory(memory))
            previous = conditioned[-1].argmax(-1) * is_token
            if given is not None:
                previous = torch.where(given[:, 0] >= 0, given[:, place], previous)
            durations.append(previous)
        return torch.stack(conditioned, 1), torch.stack(durations, 1)


class Projection(nn.Module):
    """Two-layer perceptron on a normalised input; `output_std` is the scale of its output when fresh."""

    def __init__(self, dim: int, output_dim: int, output_std: float):
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        # The normalised input keeps unit variance in `hidden`, and E[gelu(z)^2] = 0.425.
        self.hidden = ScaledLinear(dim, output_dim, init_std=dim**-0.5)
        self.output = ScaledLinear(output_dim, output_dim, init_std=output_std * (0.425 * output_dim) ** -0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.output(F.gelu(self.hidden(self.norm(x))))


class GaussianHead(nn.Module):
    """Predicts a number's mean, before any link function, and its variance, whose log is bounded: two of `(batch,)`."""

    def __init__(self, dim: int, log_variance_range: tuple[float, float]):
        super().__init__()
        self.log_variance_range = log_variance_range
        self.norm = nn.LayerNorm(dim)
        self.projection = nn.Linear(dim, 2)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        mean, variance_logit = self.projection(self.norm(x)).float().unbind(-1)
        low, high = self.log_variance_range
        return mean, (low + (high - low) * variance_logit.sigmoid()).exp()


class Attention(nn.MultiheadAttention):
    """
    As there, but the output layer is called, not its weights read: where they are offloaded, they come with the call.
    """

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        key_padding_mask: torch.Tensor | None = None,
        need_weights: bool = False,
        attn_mask: torch.Tensor | None = None,
        is_causal: bool = False,
    ) -> tuple[torch.Tensor, None]:
        """
        Keys are read off `value` too. A mask of the keys is boolean, True at padding, or added to the scores; one of
        pairs is added to the scores, and not needed where it is causal; there are not both.
        """
        weight, bias, dim = self.in_proj_weight, self.in_proj_bias, self.embed_dim
        q = F.linear(query, weight[:dim], bias[:dim])
        k, v = F.linear(value, weight[dim:], bias[dim:]).chunk(2, dim=-1)
        q, k, v = (x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for x in (q, k, v))
        mask = None if is_causal else attn_mask
        if key_padding_mask is not None:
            is_text = ~key_padding_mask if key_padding_mask.dtype == torch.bool else key_padding_mask
            mask = is_text[:, None, None]
        dropout = self.dropout if self.training else 0.0
        mixed = F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal)
        return self.out_proj(mixed.transpose(1, 2).flatten(2)), None


def transformer_layer(kind: type[nn.Module], dim: int, dropout: float = 0.1) -> nn.Module:
    """An `nn.TransformerEncoderLayer` or `nn.TransformerDecoderLayer` with [`Attention`]."""
    heads = dim // HEAD_DIM
    layer = kind(dim, heads, 4 * dim, dropout, activation="gelu", batch_first=True, norm_first=True)
    for name, module in list(layer.named_children()):
        if isinstance(module, nn.MultiheadAttention):
            setattr(layer, name, Attention(dim, heads, module.dropout, batch_first=True))
    return layer


class ProtoTokenPredictor(nn.Module):
    """
    Predicts proto-tokens, the answer's length and its error, with a query for each `e`, each predicted `m`, the length
    and the error.

    The source is the decoder's hidden states over the prompt, the encoder's states, or both one after the other. Layers
    of attention in both directions mix it. Queries attend to one another and to the source in a few layers. With
    `upsamples_prompt` they start from the prompt's states, spread over the answer, and may copy the input embeddings
    there into proto-tokens. If `config.aligns_encoder`, the source is the sum of the input embeddings over the prompt
    and of the encoder's states there.
    """

    def __init__(self, config: ProtoGenConfig):
        super().__init__()
        self.config = config
        dim, decoder_dim = config.predictor_dim, config.decoder_dim
        predicts_m = config.m_scope == "per_example" and config.arrangement != "e_only"
        self.queries_per_chunk = config.num_e_tokens + int(predicts_m)

        def reading(width):
            return nn.Sequential(nn.LayerNorm(width), nn.Linear(width, dim))

        layers = [0] if config.aligns_encoder else config.layers_read
        self.widths_read = [config.state_dim(layer) for layer in layers]
        self.decoder_readings = nn.ModuleList(map(reading, self.widths_read))
        self.encoder_reading = reading(config.encoder_config.hidden_size) if config.uses_encoder else None
        self.source_layers = nn.ModuleList(
            transformer_layer(nn.TransformerEncoderLayer, dim, config.predictor_dropout)
            for _ in range(config.num_source_layers)
        )
        self.queries = nn.Parameter(torch.empty(2 + config.max_chunks * self.queries_per_chunk, dim))
        self.query_layers = nn.ModuleList(
            transformer_layer(nn.TransformerDecoderLayer, dim, config.predictor_dropout)
            for _ in range(config.num_query_layers)
        )
        self.upsampling = Upsampling(dim) if config.upsamples_prompt else None
        self.chunk_reading = None
        if config.upsamples_prompt and config.chunk_size > 1:
            width = config.chunk_size * dim
            self.chunk_reading = ScaledLinear(width, dim, init_std=width**-0.5, bias=False)
        self.copy_gate = nn.Linear(dim, 1) if config.upsamples_prompt else None
        # The factor is not in the weights, so that training moves what they give in proportion to its size.
        std = config.proto_token_std / FITTED_SIZE
        self.e_projection = Projection(dim, decoder_dim, std)
        self.m_projection = Projection(dim, decoder_dim, std) if predicts_m else None
        self.m_table = None
        if config.m_scope != "per_example":
            self.m_table = ScaledEmbedding(len(config.categories or [0]), decoder_dim, std)
        self.length = GaussianHead(dim, config.log_length_variance_range)
        self.error = GaussianHead(dim, LOG_ERROR_VARIANCE_RANGE)

    def forward(
        self,
        encoder_states: torch.Tensor | None,
        encoder_mask: torch.Tensor | None,
        decoder_states: torch.Tensor | None = None,
        decoder_mask: torch.Tensor | None = None,
        category_ids: torch.LongTensor | None = None,
        durations: torch.LongTensor | None = None,
        longest: int | None = None,
    ) -> ProtoTokenPrediction:
        """
        Args:
            encoder_states (`torch.Tensor` of shape `(batch, source, encoder_dim)`), encoder_mask (`torch.Tensor` of
                shape `(batch, source)`): None without an encoder; of the prompt's tokens if `config.aligns_encoder`.
            decoder_states (`torch.Tensor` of shape `(batch, prompt, layers, decoder_dim)`), decoder_mask
                (`torch.Tensor` of shape `(batch, prompt)`): of the prompt, wherever its padding is; states that are not
                read are None.
            category_ids (`torch.LongTensor` of shape `(batch,)`, *optional*): needed by `m_scope="per_category"`.
            durations (`torch.LongTensor` of shape `(batch, prompt)`, *optional*): as in [`Upsampling`].
            longest (`int`, *optional*): predicts the chunks that this many tokens need; all by default. What the first
                chunks are does not depend on it.
        """
        config = self.config
        num_chunks = config.max_chunks if longest is None else min(-(-longest // config.chunk_size), config.max_chunks)
        batch = len(decoder_mask if encoder_mask is None else encoder_mask)
        queries = self.queries[: 2 + num_chunks * self.queries_per_chunk].expand(batch, -1, -1)
        source, mask = self._source(encoder_states, encoder_mask, decoder_states, decoder_mask)
        copied, of_durations = None, {}
        if self.upsampling is not None:
            prompt = source[:, : decoder_mask.shape[1]], decoder_mask.bool()
            positions = torch.arange(num_chunks * config.chunk_size, device=source.device)
            spread, places, of_durations = self.upsampling(*prompt, positions, durations)
            if self.chunk_reading is not None:
                spread = self.chunk_reading(spread.unflatten(1, (num_chunks, -1)).flatten(2))
                # The token in the middle of each chunk may be copied.
                places = places[:, config.chunk_size // 2 :: config.chunk_size]
            queries = queries + F.pad(spread.repeat_interleave(self.queries_per_chunk, dim=1), (0, 0, 2, 0))
            embeddings = decoder_states[:, :, 0].to(queries.dtype)
            copied = embeddings.gather(1, places[..., None].expand(-1, -1, embeddings.shape[-1]))[:, :, None]
        causal = nn.Transformer.generate_square_subsequent_mask(queries.shape[1], queries.device, queries.dtype)
        for layer in self.query_layers:
            queries = layer(queries, source, causal, memory_key_padding_mask=~mask, tgt_is_causal=True)
        others, by_chunk = queries[:, :2], queries[:, 2:].unflatten(1, (num_chunks, self.queries_per_chunk))
        e, m = self._proto_tokens(by_chunk, copied, category_ids)
        length_mean, length_variance = self.length(others[:, 0])
        error_logit, error_variance = self.error(others[:, 1])
        # The bias starts at zero; predictions start at half the longest answer.
        length_mean = length_mean + math.log(max(config.max_answer_length / 2, 1))
        if of_durations:
            length_mean = of_durations.pop("length").clamp_min(1).float().log()
        else:
            of_durations["log_duration_confidence"] = torch.zeros_like(length_mean)
        return ProtoTokenPrediction(
            e=e,
            m=m,
            log_length_mean=length_mean + config.log_length_shift,
            log_length_variance=length_variance * config.log_length_scale**2,
            error_mean=error_logit.sigmoid(),
            error_variance=error_variance,
            **of_durations,
        )

    def _proto_tokens(
        self, by_chunk: torch.Tensor, copied: torch.Tensor | None, category_ids: torch.LongTensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        `e` `(batch, chunks, num_e_tokens, decoder_dim)` and `m` `(batch, chunks, decoder_dim)` from the queries of each
        chunk `(batch, chunks, queries, dim)`, its e's and its m where that is predicted, and from the embeddings that
        may be copied `(batch, chunks, 1, decoder_dim)`.
        """
        batch, num_chunks = by_chunk.shape[:2]

        def proto_tokens(projection, part):
            vectors = projection(part)
            if copied is not None:
                vectors = vectors + self.copy_gate(part).sigmoid() * copied
            return FITTED_SIZE * vectors

        e = proto_tokens(self.e_projection, by_chunk[:, :, : self.config.num_e_tokens])
        if self.m_projection is not None:
            return e, proto_tokens(self.m_projection, by_chunk[:, :, -1:])[:, :, 0]
        if self.m_table is None:
            return e, e.new_zeros(batch, num_chunks, e.shape[-1])
        if self.config.m_scope != "per_category":
            category_ids = torch.zeros(batch, dtype=torch.long, device=e.device)
        elif category_ids is None:
            raise ValueError("m_scope=per_category needs category_ids: positions in config.categories.")
        return e, FITTED_SIZE * self.m_table(category_ids)[:, None].expand(-1, num_chunks, -1)

    def _source(
        self,
        encoder_states: torch.Tensor | None,
        encoder_mask: torch.Tensor | None,
        decoder_states: torch.Tensor | None,
        decoder_mask: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.BoolTensor] | tuple[None, None]:
        """Mixed states, the prompt's before the encoder's, `(batch, source, dim)`, and their mask `(batch, source)`."""
        dtype, parts = self.queries.dtype, []
        if len(self.decoder_readings):
            states = decoder_states.to(dtype).unbind(2)
            pairs = zip(self.decoder_readings, states, self.widths_read, strict=True)
            read = sum(reading(state[..., :width]) for reading, state, width in pairs)
            parts.append((read, decoder_mask.bool()))
        if self.encoder_reading is not None:
            parts.append((self.encoder_reading(encoder_states.to(dtype)), encoder_mask.bool()))
        if not parts:
            return None, None
        if self.config.aligns_encoder:
            parts = [(sum(read for read, _ in parts), decoder_mask.bool())]
        source = torch.cat([read + sinusoids(position_ids(mask), read.shape[-1]).to(dtype) for read, mask in parts], 1)
        mask = torch.cat([mask for _, mask in parts], 1)
        for layer in self.source_layers:
            source = layer(source, src_key_padding_mask=~mask)
        return source, mask
