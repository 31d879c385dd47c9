"""Cross-entropy of the answer read off the proto-tokens themselves, without a pass of the decoder."""

import torch
import torch.nn.functional as F
from torch import nn

from modeling_protogen.modeling_protogen import ProtoGenForConditionalGeneration, ProtoGenOutput
from modeling_protogen.objectives import IGNORE_INDEX, mean_over_texts
from modeling_protogen.proto_predictor import ProtoTokenPrediction

# Tokens drawn by chance that the batch's own are told apart from.
NUM_NEGATIVES = 2048


class TokenHeadLoss(nn.Module):
    """
    Cross-entropy of the answer's tokens under an auxiliary head: the decoder's output embeddings `E` applied to the
    proto-tokens, scaled to unit mean square, with a learned inverse temperature `s`:

        L = 1/B sum_i 1/N_i sum_t -log softmax_V(s E e_it / rms(e_it))[y_it]

    over a vocabulary `V` of the batch's own tokens and some drawn by chance. It trains the predictor at a fraction of a
    step's price, and needs one vector a token (`arrangement=e_only`, `chunk_size=1`).

    References:
        Jean et al., 2015, "On Using Very Large Target Vocabulary for Neural Machine Translation",
        https://arxiv.org/abs/1412.2007.

    Relations:
        [`ReconstructionLoss`] reads the same vectors through the decoder.

    Inputs:
        `outputs.e` `(batch, length, 1, dim)`; `batch["labels"]` `(batch, length)`, -100 after the end;
        `batch["decoder_prompt_ids"]` `(batch, prompt)`; `batch["output_embeddings"]` `(vocab, dim)`.
    """

    needs = {"output_embeddings"}

    def __init__(self):
        super().__init__()
        self.log_scale = nn.Parameter(torch.tensor(0.5).log())

    def forward(self, outputs: ProtoGenOutput, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        labels, embeddings = batch["labels"], batch["output_embeddings"]
        is_token = labels != IGNORE_INDEX
        negatives = torch.randint(len(embeddings), (NUM_NEGATIVES,), device=labels.device)
        vocabulary = torch.cat([labels[is_token], batch["decoder_prompt_ids"].flatten(), negatives]).unique()
        vectors = F.rms_norm(outputs.e[:, : labels.shape[1], 0][is_token].float(), outputs.e.shape[-1:])
        logits = self.log_scale.exp() * vectors @ embeddings[vocabulary].float().T
        nll = F.cross_entropy(logits, torch.searchsorted(vocabulary, labels[is_token]), reduction="none")
        return mean_over_texts(nll, is_token)


def head_tokens(vectors: torch.Tensor, embeddings: torch.Tensor) -> torch.LongTensor:
    """The head's most likely tokens of all the vocabulary: proto-tokens `(..., dim)` to `(...)`."""
    # On a slice of three dimensions a CPU would copy the whole output layer for each call.
    rows = vectors.to(embeddings.dtype).flatten(end_dim=-2)
    return (rows @ embeddings.T).max(-1).indices.view(vectors.shape[:-1])


def head_answers(
    model: ProtoGenForConditionalGeneration, prediction: ProtoTokenPrediction
) -> tuple[torch.LongTensor, torch.LongTensor]:
    """The head's answers `(batch, longest)`, and their predicted lengths `(batch,)`."""
    lengths = model.clamp_lengths(prediction.log_length_mean.exp())
    table = model.decoder.get_output_embeddings().weight
    return head_tokens(prediction.e[:, : lengths.max(), 0], table), lengths
