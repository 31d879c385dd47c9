"""
Prefixes of answers, prompts mostly, as the frozen decoder reads them: without gradients, and on a CPU rows of like
lengths together, where reading padding takes as long as reading text.
"""

import torch
import torch.nn.functional as F
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer
from transformers.utils import ModelOutput

from .proto_tokens import position_ids

# A pass over more tokens costs a CPU no less a token. A GPU is faster with few passes, padding and all.
GROUP_TOKENS = 512


def new_cache(decoder: PreTrainedModel) -> DynamicCache:
    """An empty cache that [`cut_cache`] can cut, also where a layer attends to a sliding window."""
    cache = DynamicCache(config=decoder.config)
    cache.activate_past_recording()
    return cache


def keeps_all_positions(cache: Cache) -> bool:
    """Whether no layer keeps a part of what it read only, as those do that attend to a sliding window."""
    return all(type(layer) is DynamicLayer for layer in cache.layers)


def padded_left(part: torch.Tensor, length: int) -> torch.Tensor:
    """Keys, values or states `(..., positions, dim)` with zeros before them, `(..., length, dim)`."""
    return F.pad(part, (0, 0, length - part.shape[-2], 0))


def cut_cache(cache: Cache, length: int) -> None:
    """Forgets what was read after the first `length` positions."""
    # Counted from its end: 0 would be nothing left.
    if cache.get_seq_length() > length:
        cache.crop(length - cache.get_seq_length())


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
    cut_cache(cache, start)
    logits = decoder(
        attention_mask=attention_mask,
        logits_to_keep=predicts[:, start:] if predicts.dim() == 2 else predicts,
        past_key_values=cache,
        use_cache=True,
        **{name: tensor[:, start:] for name, tensor in inputs.items()},
    ).logits
    cut_cache(cache, length)
    return logits


def rows_of_like_lengths(mask: torch.Tensor) -> list[tuple[torch.LongTensor, int]]:
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


def states_of(output: ModelOutput, layers: list[int]) -> torch.Tensor:
    """A pass's hidden states of these layers, 0 being the embeddings: `(batch, length, layers, dim)`."""
    return torch.stack([output.hidden_states[layer] for layer in layers], dim=2)


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
        cache = new_cache(decoder)
        output = decoder.base_model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=position_ids(mask),
            past_key_values=cache,
            use_cache=True,
            output_hidden_states=bool(layers),
        )
        return cache, states_of(output, layers) if layers else None

    longest, groups = prefix_ids.shape[1], rows_of_like_lengths(prefix_mask)
    if len(groups) == 1:
        return read(slice(None), longest)
    cache = new_cache(decoder)
    if not keeps_all_positions(cache):
        return read(slice(None), longest)

    # Back in the order of the batch.
    places = torch.cat([rows for rows, _ in groups]).argsort()

    def joined(parts):
        return torch.cat([padded_left(part, longest) for part in parts])[places]

    caches, states = zip(*(read(*group) for group in groups), strict=True)
    for number, parts in enumerate(zip(*(part.layers for part in caches), strict=True)):
        cache.update(joined([layer.keys for layer in parts]), joined([layer.values for layer in parts]), number)
    if not layers:
        return cache, None
    return cache, joined([part.transpose(1, 2) for part in states]).transpose(1, 2)
