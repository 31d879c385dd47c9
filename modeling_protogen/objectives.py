"""The losses that the model itself knows, and what others are made of."""

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

IGNORE_INDEX = -100
# What `model(**batch).loss` adds up, and the trainer by default; durations only with `upsamples_prompt`.
LOSS_WEIGHTS = {"reconstruction": 1.0, "length_nll": 0.1, "error_nll": 0.1, "duration": 1.0}
# Logits that are in float32 at once: what a processor's cache holds. Larger slices are slower on CPUs as well.
MAX_FLOAT_LOGITS = 2**22


def mean_over_texts(values: torch.Tensor, is_token: torch.BoolTensor) -> torch.Tensor:
    """
    The mean over a text's tokens, then the mean over texts, so that equal micro-batches average exactly under gradient
    accumulation.

    Args:
        values (`torch.Tensor` of shape `(tokens,)`): in the order of the true places of `is_token`.
        is_token (`torch.BoolTensor` of shape `(batch, length)`): a text without tokens counts as zero.
    """
    weight = is_token / is_token.sum(-1, keepdim=True).clamp_min(1)
    return (values * weight[is_token]).sum() / len(is_token)


def reconstruction_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """
    Cross-entropy of the answers' tokens, [`mean_over_texts`].

    Args:
        logits (`torch.Tensor` of shape `(answer_tokens, vocab)`): rows in the order of `labels[labels != -100]`.
        labels (`torch.LongTensor` of shape `(batch, length)`): token ids, -100 where there is no token.
    """
    is_token = labels != IGNORE_INDEX
    return mean_over_texts(-log_probabilities(logits, labels[is_token][:, None])[:, 0], is_token)


def argmax_tokens(logits: torch.Tensor, labels: torch.Tensor) -> torch.LongTensor:
    """
    The one-step tokens in the places of the labels `(batch, length)`, -100 where there is none; arguments as in
    [`reconstruction_loss`].
    """
    tokens = labels.clone()
    # `argmax` over bfloat16 is several times slower than `max` on CPUs.
    tokens[labels != IGNORE_INDEX] = logits.detach().max(-1).indices
    return tokens


def log_probabilities(logits: torch.Tensor, ids: torch.LongTensor) -> torch.Tensor:
    """
    Log-probabilities in float32 of some tokens, `(answer_tokens, k)`, without a float32 copy of all logits
    `(answer_tokens, vocab)`: a few rows at a time, made again in the backward pass.

    Args:
        ids (`torch.LongTensor` of shape `(answer_tokens, k)`): the tokens at each position.
    """

    def of_rows(rows, tokens):
        return rows.log_softmax(-1, dtype=torch.float32).gather(1, tokens)

    size = max(1, MAX_FLOAT_LOGITS // logits.shape[-1])
    parts = zip(logits.split(size), ids.split(size), strict=True)
    return torch.cat([checkpoint(of_rows, *part, use_reentrant=False, preserve_rng_state=False) for part in parts])


def gaussian_nll(mean: torch.Tensor, variance: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """
    Gaussian negative log-likelihood `mean(((x - mean)^2 / variance + log variance) / 2)` (Nix & Weigend, 1994), without
    its constant, in float32. Each element's gradient is multiplied by its standard deviation (beta = 0.5 of Seitzer et
    al., 2022, https://arxiv.org/abs/2203.09168): a head that is sure would outweigh all that it shares its input with.

    Args:
        mean, variance, targets (`torch.Tensor` of shape `(batch,)`)
    """
    mean, variance = mean.float(), variance.float()
    nll = F.gaussian_nll_loss(mean, targets, variance, reduction="none")
    weighted = variance.detach().sqrt() * nll
    return (weighted + (nll - weighted).detach()).mean()


def length_nll(mean: torch.Tensor, variance: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """[`gaussian_nll`] of the log length. All arguments have shape `(batch,)`; lengths are in tokens."""
    return gaussian_nll(mean, variance, lengths.float().log())


def error_nll(mean: torch.Tensor, variance: torch.Tensor, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """
    [`gaussian_nll`] of the share of the labels' tokens that the argmax misses, which is data here: no gradient flows to
    the logits.

    Args:
        mean, variance (`torch.Tensor` of shape `(batch,)`): predicted, of the share.
        logits, labels: as in [`reconstruction_loss`].
    """
    wrong = argmax_tokens(logits, labels) != labels
    return gaussian_nll(mean, variance, wrong.sum(-1) / (labels != IGNORE_INDEX).sum(-1))


def duration_nll(logits: torch.Tensor, durations: torch.LongTensor, prompt_mask: torch.Tensor) -> torch.Tensor:
    """
    Cross-entropy of the durations of the prompts' tokens, [`mean_over_texts`] that have durations.

    Args:
        logits (`torch.Tensor` of shape `(batch, prompt, classes)`)
        durations (`torch.LongTensor` of shape `(batch, prompt)`): -100 in all of a row that has none.
        prompt_mask (`torch.Tensor` of shape `(batch, prompt)`): 1 for real tokens.
    """
    mask = prompt_mask.bool() & (durations != IGNORE_INDEX)
    if not mask.any():
        return logits.sum() * 0
    nll = F.cross_entropy(logits[mask].float(), durations[mask], reduction="none")
    return mean_over_texts(nll, mask[mask.any(1)])
