"""
All that we assume of a frozen decoder: what its forward takes, how logits follow from its states, how it reads a prefix
and remembers it, and where proto-tokens come after that. On a CPU prefixes of similar lengths are read together, as
reading padding takes as long there as reading text.

A cache is a `DynamicCache()`, in which layers with a sliding window keep all their keys and values too and mask those
outside of it: what a text takes back may move others into it.
"""

import copy
import hashlib
import inspect
import sys

import torch
import torch.nn.functional as F
from transformers import Cache, DynamicCache, GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.utils import ModelOutput

from .proto_tokens import Layout, position_ids, predicting_positions
from .slot_adapters import slots_at_the_end

# What a decoder's `forward` must take. Where it takes no `position_ids` it counts the mask itself (BLOOM, MPT).
NEEDED_INPUTS = ("inputs_embeds", "attention_mask", "past_key_values", "logits_to_keep")
# A pass over more tokens costs a CPU no less a token. A GPU is faster with few passes, padding and all.
GROUP_TOKENS = 512


@torch.no_grad()
def embedding_std(decoder: PreTrainedModel) -> float:
    """Standard deviation of the input embeddings' elements as the first layer gets them; Gemma scales them up."""
    embed = decoder.get_input_embeddings()
    ids = torch.arange(min(1000, embed.weight.shape[0]), device=embed.weight.device)
    scale = embed(ids).float().std() / embed.weight[ids].float().std()
    return (scale * embed.weight.float().std()).item()


def logits_of(decoder: PreTrainedModel, states: torch.Tensor, tokens: torch.LongTensor | None = None) -> torch.Tensor:
    """
    The logits `(..., vocab)` that the decoder makes of its last states `(..., dim)`: its output layer, then the scaling
    of Granite or Cohere, or the soft-capping of Gemma. With `tokens` `(..., number)` those of these alone.
    """
    head = decoder.get_output_embeddings()
    if tokens is None:
        # On a slice of three dimensions a CPU would copy the whole output layer for each call.
        logits = head(states.flatten(end_dim=-2)).unflatten(0, states.shape[:-1])
    else:
        logits = (head.weight[tokens] @ states[..., None])[..., 0]
        if head.bias is not None:
            logits = logits + head.bias[tokens]
    config = decoder.config.get_text_config()
    if (divisor := getattr(config, "logits_scaling", None)) is not None:
        logits = logits / divisor
    if (factor := getattr(config, "logit_scale", None)) is not None:
        logits = logits * factor
    if (cap := getattr(config, "final_logit_softcapping", None)) is not None:
        logits = cap * torch.tanh(logits / cap)
    return logits


def keep_special_tokens(decoder: PreTrainedModel) -> None:
    """
    Leaves special tokens alone in the decoder's generation configuration: its own `generate` then writes what its
    logits say, without penalties or suppressed tokens, until any of its EOS. These go to its configuration as well,
    which may name one of them and is what a checkpoint keeps.
    """
    own, config = decoder.generation_config, decoder.config.get_text_config()
    if own.eos_token_id is not None:
        config.eos_token_id = own.eos_token_id
    special = {"bos_token_id": own.bos_token_id, "pad_token_id": own.pad_token_id, "eos_token_id": config.eos_token_id}
    decoder.generation_config = GenerationConfig(**special)


@torch.no_grad()
def check_decoder(decoder: PreTrainedModel) -> None:
    """
    Raises:
        ValueError: if the model cannot serve as a decoder; the message says why.
    """
    name = type(decoder).__name__
    missing = [x for x in NEEDED_INPUTS if x not in inspect.signature(type(decoder).forward).parameters]
    if missing:
        raise ValueError(
            f"{name} cannot be the frozen decoder: its forward takes no {', '.join(missing)}; choose a causal language "
            "model with attention in all of its layers."
        )
    kinds = {type(layer) for layer in DynamicCache(config=decoder.config).layers}
    if other := kinds - {DynamicLayer, DynamicSlidingWindowLayer}:
        raise ValueError(
            f"{name} cannot be the frozen decoder: some of its layers keep more than keys and values of each token "
            f"({', '.join(sorted(kind.__name__ for kind in other))}), as a recurrent state, which cannot be cut back "
            "to a prefix; choose a causal language model with attention in all of its layers."
        )
    if is_deepspeed_zero3_enabled() or decoder.device.type == "meta":  # It cannot run yet.
        return
    ids = torch.arange(4, device=decoder.device)[None]
    expected = decoder(ids, use_cache=False).logits
    output = decoder.base_model(ids, use_cache=False)
    if "last_hidden_state" not in output:
        raise ValueError(
            f"{name} cannot be the frozen decoder: its base model, {type(decoder.base_model).__name__}, gives no "
            "last_hidden_state; choose another causal language model."
        )
    found = logits_of(decoder, output.last_hidden_state)
    if not torch.allclose(found, expected, atol=1e-2, rtol=1e-2):
        raise ValueError(
            f"{name} cannot be the frozen decoder: it changes its logits after the output layer in a way that is not "
            "known here; `logits_of` in modeling_protogen/frozen_decoder.py is where to add it."
        )


def decoder_fingerprint(decoder: PreTrainedModel) -> str:
    """
    Identifies a decoder by its weights, wherever they were loaded from: SHA-256 of at most 1,024 evenly spaced
    elements of each parameter, as bfloat16, so that float32 and bfloat16 copies agree.
    """
    digest = hashlib.sha256()
    for name, parameter in sorted(decoder.named_parameters()):
        values = parameter.detach().flatten()
        sample = values[:: max(1, len(values) // 1024)][:1024].to("cpu", torch.bfloat16)
        digest.update(name.encode())
        digest.update(sample.contiguous().view(torch.int16).numpy().tobytes())
    return digest.hexdigest()


def fingerprint_if_exact(decoder: PreTrainedModel) -> str | None:
    """
    [`decoder_fingerprint`], or None of weights that are not all here as they were trained: quantised, rounded to
    float16 (which bfloat16 does not follow from), on a disk, or spread by ZeRO-3.
    """
    has_all = all(p.dtype in (torch.float32, torch.bfloat16) and not p.is_meta for p in decoder.parameters())
    # What transformers loads without quantising has no `hf_quantizer` at all.
    is_exact = has_all and getattr(decoder, "hf_quantizer", None) is None and not is_deepspeed_zero3_enabled()
    return decoder_fingerprint(decoder) if is_exact else None


def padded_left(part: torch.Tensor, length: int) -> torch.Tensor:
    """Keys, values or states `(..., positions, dim)` with zeros before them, `(..., length, dim)`."""
    return F.pad(part, (0, 0, length - part.shape[-2], 0))


def crop_cache(cache: Cache, length: int) -> None:
    """Forgets what was read after the first `length` positions."""
    if cache.get_seq_length() > length:
        cache.crop(length - cache.get_seq_length())


def copied_cache(cache: Cache) -> Cache:
    """The same keys and values, to which a pass may add its own without changing the cache."""
    copied = copy.copy(cache)
    copied.layers = [copy.copy(layer) for layer in cache.layers]
    return copied


def move_right(cache: Cache, ids: torch.LongTensor, shifts: torch.LongTensor, length: int) -> torch.LongTensor:
    """
    Moves each row of the cache, and of the tokens in it `(batch, positions)`, to the right by `shifts` `(batch,)`; the
    last `length` positions stay. Returns the tokens.
    """
    start = ids.shape[1] - length
    if not shifts.any():
        for layer in cache.layers if start else ():
            layer.keys, layer.values = layer.keys[..., start:, :], layer.values[..., start:, :]
        return ids[:, start:]
    places = (torch.arange(start, ids.shape[1], device=ids.device) - shifts[:, None]).clamp_min(0)
    for layer in cache.layers:
        rows, heads = (torch.arange(number, device=layer.keys.device) for number in layer.keys.shape[:2])
        index = rows[:, None, None], heads[:, None], places[:, None].to(rows.device)
        layer.keys, layer.values = layer.keys[index], layer.values[index]
    return ids.gather(1, places)


def logits_after(
    decoder: PreTrainedModel,
    cache: Cache | None,
    start: int,
    attention_mask: torch.Tensor,
    predicts: torch.Tensor,
    **inputs: torch.Tensor,
) -> torch.Tensor:
    """
    The decoder's logits `(positions, vocab)` where `predicts`. With a cache of the inputs' first positions it reads
    from position `start` only, and leaves the cache as it was.

    Args:
        attention_mask (`torch.Tensor` of shape `(batch, length)`)
        predicts (`torch.Tensor` of shape `(batch, length)`): or places from the end, `(places,)`, the same in all rows.
        inputs: tensors of shape `(batch, length, ...)`.
    """
    if cache is None:
        return decoder(attention_mask=attention_mask, logits_to_keep=predicts, use_cache=False, **inputs).logits
    length = cache.get_seq_length()
    crop_cache(cache, start)
    logits = decoder(
        attention_mask=attention_mask,
        logits_to_keep=predicts[:, start:] if predicts.dim() == 2 else predicts,
        past_key_values=cache,
        use_cache=True,
        **{name: tensor[:, start:] for name, tensor in inputs.items()},
    ).logits
    crop_cache(cache, length)
    return logits


def bucket_by_length(mask: torch.Tensor) -> list[tuple[torch.LongTensor, int]]:
    """
    Groups of the rows of a mask `(batch, length)`: the rows' numbers, and how many positions the longest has. As many
    rows of growing lengths in each as make `GROUP_TOKENS` positions; all in one group on a GPU.
    """
    lengths = mask.sum(1)
    if mask.device.type != "cpu":
        return [(torch.arange(len(mask), device=mask.device), mask.shape[1])]
    groups = []
    for row in lengths.argsort(stable=True):
        if not groups or (len(groups[-1]) + 1) * lengths[row] > GROUP_TOKENS:
            groups.append([])
        groups[-1].append(row)
    return [(torch.stack(rows), lengths[rows[-1]].item()) for rows in groups]


def num_positions(decoder: PreTrainedModel) -> int:
    """How many positions the decoder's table has; `sys.maxsize` where it has none, as rotary ones have no end."""
    config = decoder.config.get_text_config()
    last = getattr(config, "max_position_embeddings", None)
    return sys.maxsize if last is None or getattr(config, "rope_parameters", None) is not None else last


def check_positions(decoder: PreTrainedModel, mask: torch.Tensor) -> None:
    """
    Args:
        mask (`torch.Tensor` of shape `(batch, length)`): which positions the decoder is about to have read.

    Raises:
        ValueError: if a row has more than the decoder's table.
    """
    last = num_positions(decoder)
    if mask.shape[1] <= last:
        return
    longest = int(mask.sum(1).max())
    if longest > last:
        raise ValueError(
            f"the decoder has {last} positions, and a prompt with its answer takes {longest}: shorten one of them; the "
            "processor's max_prompt_length bounds prompts."
        )


def longest_pair_masked(decoder: PreTrainedModel) -> int:
    """
    Tokens of the longest text over which a decoder goes by a mask of pairs ([`pair_mask`]) alone: its smallest window;
    0 where it makes its mask itself, from distances (ALiBi).
    """
    config = decoder.config.get_text_config()
    takes_positions = "position_ids" in inspect.signature(type(decoder.base_model).forward).parameters
    if not takes_positions or getattr(config, "alibi", False):
        return 0
    windows = [getattr(config, name, None) for name in ("sliding_window", "window_size")]
    return min((window for window in windows if window), default=sys.maxsize)


def slot_positions(decoder: PreTrainedModel, tokens_before: torch.LongTensor, size: int) -> torch.LongTensor:
    """
    The positions of slots behind anchors, `(batch, anchors * size)`.

    Args:
        tokens_before (`torch.LongTensor` of shape `(batch, anchors)`): that each anchor follows from.
        size (`int`): slots behind each.
    """
    positions = (tokens_before[..., None] + torch.arange(size, device=tokens_before.device)).flatten(1)
    # No text goes beyond the decoder's last position, and what slots there predict means nothing.
    return positions.clamp_max(num_positions(decoder) - 1)


def states_of(output: ModelOutput, layers: list[int]) -> torch.Tensor:
    """
    A pass's hidden states of these layers, 0 being the first layer's input: `(batch, length, layers, dim)`, narrower
    ones with zeros at their end.
    """
    states = [output.hidden_states[layer] for layer in layers]
    widest = max(state.shape[-1] for state in states)
    return torch.stack([F.pad(state, (0, widest - state.shape[-1])) for state in states], dim=2)


@torch.no_grad()
def read_prefix(
    decoder: PreTrainedModel, prefix_ids: torch.LongTensor, prefix_mask: torch.Tensor, layers: list[int]
) -> tuple[Cache, torch.Tensor | None]:
    """
    Keys and values of a prefix `(batch, prefix)`, padded on the left, and the decoder's hidden states of these layers
    `(batch, prefix, layers, dim)`, None of none. What they are at padding is of no meaning.
    """

    def read(rows, length):
        ids, mask = prefix_ids[rows, -length:], prefix_mask[rows, -length:]
        check_positions(decoder, mask)
        cache = DynamicCache()
        output = decoder.base_model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=position_ids(mask),
            past_key_values=cache,
            use_cache=True,
            output_hidden_states=bool(layers),
        )
        return cache, states_of(output, layers) if layers else None

    longest, groups = prefix_ids.shape[1], bucket_by_length(prefix_mask)
    if len(groups) == 1:
        return read(slice(None), longest)

    # Back in the order of the batch.
    places = torch.cat([rows for rows, _ in groups]).argsort()

    def joined(parts):
        return torch.cat([padded_left(part, longest) for part in parts])[places]

    caches, states = zip(*(read(*group) for group in groups), strict=True)
    cache = DynamicCache()
    for number, parts in enumerate(zip(*(part.layers for part in caches), strict=True)):
        cache.update(joined([layer.keys for layer in parts]), joined([layer.values for layer in parts]), number)
    if not layers:
        return cache, None
    return cache, joined([part.transpose(1, 2) for part in states]).transpose(1, 2)


def sink_ids(decoder_config: PreTrainedConfig, sink: str, batch: int, device: torch.device) -> torch.LongTensor:
    """The prefix of a decoder that sees no prompt: `(batch, 1)` BOS ids, or `(batch, 0)` for `sink="none"`."""
    if sink == "none":
        return torch.empty(batch, 0, dtype=torch.long, device=device)
    return torch.full((batch, 1), decoder_config.get_text_config().bos_token_id, device=device)


def joined_inputs(
    decoder: PreTrainedModel,
    slots: torch.Tensor,
    layout: Layout,
    prefix_ids: torch.LongTensor,
    prefix_mask: torch.Tensor | None = None,
    num_autoregressive_tokens: int = 0,
) -> tuple[dict[str, torch.Tensor], torch.BoolTensor]:
    """
    `[prefix][slots]` as the decoder takes it in one pass, and a mask `(batch, prefix + slots)` of the positions that
    predict an answer token. Arguments as in [`answer_logits`].
    """
    if prefix_mask is None:
        prefix_mask = torch.ones_like(prefix_ids)
    mask = torch.cat([prefix_mask.long(), layout.mask.long()], dim=1)
    check_positions(decoder, mask)
    prefix = decoder.get_input_embeddings()(prefix_ids)
    inputs = {
        "inputs_embeds": torch.cat([prefix, slots.to(decoder.dtype)], dim=1),
        "attention_mask": mask,
        "position_ids": position_ids(mask),
    }
    return inputs, F.pad(
        predicting_positions(layout, num_autoregressive_tokens), (prefix_ids.shape[1] - num_autoregressive_tokens, 0)
    )


def answer_logits(
    decoder: PreTrainedModel,
    slots: torch.Tensor,
    layout: Layout,
    prefix_ids: torch.LongTensor,
    prefix_mask: torch.Tensor | None = None,
    num_autoregressive_tokens: int = 0,
    prefix_cache: Cache | None = None,
    places: torch.LongTensor | None = None,
) -> torch.Tensor:
    """
    Runs the frozen decoder over `[prefix][slots]` and returns the logits at the answers' positions.

    Args:
        decoder (`PreTrainedModel`): a causal language model.
        slots (`torch.Tensor` of shape `(batch, slots, dim)`): proto-tokens in their slots.
        layout (`Layout`): what the slots are.
        prefix_ids (`torch.LongTensor` of shape `(batch, prefix)`): sink or prompt; padded on the left; may be empty.
        prefix_mask (`torch.Tensor` of shape `(batch, prefix)`, *optional*): 1 for real tokens; all by default.
        num_autoregressive_tokens (`int`): answer tokens that the prefix's last positions predict, as after a prompt.
        prefix_cache (`Cache`, *optional*): keys and values of the prefix, but for the tokens that it may lack at the
            end, from [`read_prefix`]. In training this saves the prefix's backward pass; without gradients one joined
            pass is faster.
        places (`torch.LongTensor` of shape `(places,)`, *optional*):
            Slots to predict from in all rows alike; -1 is the prefix's last position.

    Returns:
        `torch.Tensor` of shape `(answer_tokens, vocab)`, in the decoder's dtype, ordered text after text; with `places`
        of shape `(batch, places, vocab)`.
    """
    inputs, predicts = joined_inputs(decoder, slots, layout, prefix_ids, prefix_mask, num_autoregressive_tokens)
    if places is not None:
        predicts = places - slots.shape[1]
    # The prefix's last positions are read again where they predict. A boolean mask gathers the answer positions into
    # one contiguous matrix before the language-model head: no logits at other positions, and none of the slowness of a
    # linear layer on a strided bfloat16 slice on CPUs.
    start = prefix_ids.shape[1] - num_autoregressive_tokens
    with slots_at_the_end(slots.shape[1]):
        return logits_after(decoder, prefix_cache, start, predicts=predicts, **inputs)
