"""
One-step decoding as CUDA graphs: where a model is small, a GPU waits for the next of a pass's many kernels to be
launched; a recorded pass is launched at once.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F

from .frozen_decoder import copied_cache
from .one_step_decoding import token_mask
from .proto_predictor import ProtoTokenPrediction
from .proto_tokens import predicting_positions


class Recording:
    """A function of tensors as a CUDA graph: a call copies its arguments to where the graph reads them."""

    def __init__(self, function: Callable, **arguments: torch.Tensor):
        self.arguments = {name: argument.clone() for name, argument in arguments.items()}
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):  # What libraries load or choose in their first runs cannot be recorded.
                function(**self.arguments)
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.output = function(**self.arguments)

    def __call__(self, **arguments: torch.Tensor):
        """What the function returns; the next call overwrites it."""
        for name, argument in arguments.items():
            self.arguments[name].copy_(argument)
        self.graph.replay()
        return self.output


class OneStepGraphs:
    """
    The two halves of a model's `forward`, `predict` and `decode`, recorded for each shape that comes: instructions and
    prompts padded to multiples of a length, answers to one of a few lengths.

    Args:
        model (`ProtoGenForConditionalGeneration`): on its GPU for good.
        answer_lengths (`list[int]`): in tokens, ascending, up to `config.max_answer_length`.
        input_multiple (`int`): in tokens.

    Raises:
        ValueError: for the arrangement `halves`, where a longer answer does not hold a shorter one.
    """

    def __init__(self, model, answer_lengths: list[int], input_multiple: int):
        if model.config.arrangement == "halves":
            raise ValueError("CUDA graphs write longer answers and cut them; arrangement=halves cannot be cut.")
        self.model, self.answer_lengths, self.input_multiple = model, answer_lengths, input_multiple
        self.predictions: dict[tuple, Recording] = {}
        self.answers: dict[tuple, Recording] = {}
        self.shape = None

    def predict(self, *inputs: torch.Tensor | None) -> ProtoTokenPrediction:
        """As [`ProtoGenForConditionalGeneration.predict`]; the next call overwrites all but the expected error."""
        names = ("input_ids", "attention_mask", "decoder_prompt_ids", "decoder_prompt_mask")
        names += ("category_ids", "encoder_places")
        given = {name: self._padded(name, x) for name, x in zip(names, inputs, strict=True) if x is not None}
        self.shape = tuple((name, *tensor.shape) for name, tensor in given.items())
        if self.shape not in self.predictions:
            self.predictions[self.shape] = Recording(self.model.predict, **given)
        prediction = self.predictions[self.shape](**given)
        # `generate` may return it as it is.
        kept = ("error_mean", "log_duration_confidence")
        return replace(prediction, **{name: getattr(prediction, name).clone() for name in kept})

    def _padded(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        if name == "category_ids":
            return tensor
        missing = -tensor.shape[1] % self.input_multiple
        if name.startswith("decoder") or name == "encoder_places":  # A prompt ends where the answer begins.
            return F.pad(tensor, (missing, 0))
        return F.pad(tensor, (0, missing), value=self.model.encoder.config.pad_token_id if name == "input_ids" else 0)

    def decode(
        self,
        prediction: ProtoTokenPrediction,
        lengths: torch.LongTensor,
        *_,
        first_tokens: torch.LongTensor | None = None,
    ) -> torch.Tensor:
        """As [`ProtoGenForConditionalGeneration.decode`], of what `predict` returned last, prompt included."""
        first = {} if first_tokens is None else {"first_tokens": first_tokens}
        longest = lengths.max().item()
        length = next(length for length in self.answer_lengths if length >= longest)
        key = (self.shape, length)
        if key not in self.answers:
            self.answers[key] = self._record_answers(self.predictions[self.shape], length, first)
        return self.answers[key](**first)[:, :longest][token_mask(lengths)]

    def _record_answers(self, predicted: Recording, length: int, first: dict[str, torch.Tensor]) -> Recording:
        """Logits `(batch, length, vocab)`, made from where the recorded prediction leaves what it found."""
        prediction = predicted.output
        lengths = torch.full((len(prediction.e),), length, device=prediction.e.device)
        layout = self.model.layout(lengths, prediction.e.shape[1])
        prompt = [predicted.arguments.get(name) for name in ("decoder_prompt_ids", "decoder_prompt_mask")]
        # Numbers of the slots, which are the same in all rows: a mask would be counted on the CPU.
        own = self.model.config.num_autoregressive_tokens
        places = predicting_positions(layout, own)[0].nonzero()[:, 0] - own

        def logits(first_tokens=None):
            cache = prediction.prompt_cache
            own_cache = replace(prediction, prompt_cache=None if cache is None else copied_cache(cache))
            return self.model.decode_layout(own_cache, layout, *prompt, first_tokens, places)

        return Recording(logits, **first)
