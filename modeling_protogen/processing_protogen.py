"""Text to tensors and back: the encoder's tokenizer, the decoder's tokenizer and the prompt template."""

import copy

import torch
from transformers import AutoConfig, AutoTokenizer, BatchFeature, ProcessorMixin

from .key_value_lines import from_lines, to_lines

ANSWER_FORMATS = ("text", "key_value_lines")
PROMPT_TEMPLATE = "Instruction: {message}\n\nResponse:\n"


class ProtoGenProcessor(ProcessorMixin):
    """
    Prepares instructions for the encoder and for the decoder, and answers as labels.

    The encoder reads `instruction` and `context` as a pair. The decoder's prompt is one user message, the instruction
    and the context joined by an empty line, in `prompt_template` where one is given, otherwise in the decoder
    tokenizer's chat template, or in a plain one when it has none. What does not fit is cut from the end of the context,
    never from the instruction.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): the encoder's.
        decoder_tokenizer (`PreTrainedTokenizerBase`): the decoder's.
        max_input_length (`int`, defaults to 512): the encoder's window in tokens.
        max_prompt_length (`int`, defaults to 1024): longest prompt of the decoder in tokens.
        max_answer_length (`int`, defaults to 64): longest answer in tokens, EOS included; longer labels are cut.
        prompt_template (`str`, *optional*): holds `{message}`, and takes the place of the chat template.
        answer_format (`str`, defaults to `"text"`): with `"key_value_lines"` answers are flat JSON objects of strings
            outside, and `key: value` lines in the decoder; what it writes and cannot be read back stays as it is.
        for_encoder (`bool`, defaults to True): False for a model without an encoder: no `input_ids` then, and
            `tokenizer` is the decoder's too.
        encoder_reads_answer (`bool`, defaults to False): where part of an answer stands already, the encoder reads it
            too: its last tokens, half a window of them at most, after the instruction, whose end gives way.
    """

    def __init__(
        self,
        tokenizer=None,
        decoder_tokenizer=None,
        max_input_length: int = 512,
        max_prompt_length: int = 1024,
        max_answer_length: int = 64,
        prompt_template: str | None = None,
        answer_format: str = "text",
        for_encoder: bool = True,
        encoder_reads_answer: bool = False,
        **kwargs,
    ):
        self.max_input_length = max_input_length
        self.max_prompt_length = max_prompt_length
        self.max_answer_length = max_answer_length
        if prompt_template is not None and "{message}" not in prompt_template:
            raise ValueError(f"prompt_template={prompt_template!r} must hold {{message}}.")
        if answer_format not in ANSWER_FORMATS:
            raise ValueError(f"answer_format={answer_format!r} is not one of {', '.join(ANSWER_FORMATS)}.")
        self.prompt_template = prompt_template
        self.answer_format = answer_format
        self.for_encoder = for_encoder
        self.encoder_reads_answer = encoder_reads_answer
        super().__init__(tokenizer, decoder_tokenizer, **kwargs)

    @classmethod
    def from_encoder_decoder_pretrained(
        cls,
        encoder_name_or_path: str | None,
        decoder_name_or_path: str,
        *,
        encoder_revision: str | None = None,
        decoder_revision: str | None = None,
        max_input_length: int | None = None,
        **kwargs,
    ) -> "ProtoGenProcessor":
        """
        Loads both tokenizers. The encoder's window is the one in its tokenizer and configuration, or the smaller
        `max_input_length`; `encoder_name_or_path=None` is for a model without an encoder.
        """
        decoder_tokenizer = AutoTokenizer.from_pretrained(decoder_name_or_path, revision=decoder_revision)
        if encoder_name_or_path is None:
            # A second object: saving takes each one apart by itself.
            return cls(copy.deepcopy(decoder_tokenizer), decoder_tokenizer, for_encoder=False, **kwargs)
        tokenizer = AutoTokenizer.from_pretrained(encoder_name_or_path, revision=encoder_revision)
        config = AutoConfig.from_pretrained(encoder_name_or_path, revision=encoder_revision)
        # RoBERTa counts positions from its padding id on, so the last two are out of reach.
        offset = config.pad_token_id + 1 if "roberta" in config.model_type else 0
        window = min(tokenizer.model_max_length, config.max_position_embeddings - offset)
        if max_input_length is not None:
            window = min(window, max_input_length)
        return cls(tokenizer, decoder_tokenizer, max_input_length=window, **kwargs)

    def __call__(
        self,
        instruction: str | list[str],
        context: str | list[str | None] | None = None,
        answer: str | list[str | list[int]] | None = None,
        answer_start: list[list[int]] | None = None,
        **kwargs,
    ) -> BatchFeature:
        """
        Args:
            instruction (`str` or `list[str]`)
            context (`str` or `list[str | None]`, *optional*): text that the instruction speaks of.
            answer (`str` or `list[str | list[int]]`, *optional*): becomes `labels` and `length_labels`; a list of ids
                is taken as it is.
            answer_start (`list[list[int]]`, *optional*): tokens of each answer that stand already: the decoder's prompt
                ends with them, and is longer by them than `max_prompt_length` may say.

        Returns:
            `BatchFeature` of PyTorch tensors: `input_ids` and `attention_mask` `(batch, source)` for the encoder,
            `decoder_prompt_ids` and `decoder_prompt_mask` `(batch, prompt)`, padded on the left; with answers `labels`
            `(batch, length)`, -100 after the end, and `length_labels` `(batch,)`, the uncut length in tokens.

        Raises:
            ValueError: if an instruction is empty or longer than a window, or the lists differ in length.
        """
        if kwargs.pop("return_tensors", "pt") != "pt":
            raise ValueError("ProtoGenProcessor makes PyTorch tensors only: return_tensors='pt'.")
        instructions = [instruction] if isinstance(instruction, str) else list(instruction)
        contexts = [context] * len(instructions) if context is None or isinstance(context, str) else list(context)
        if len(contexts) != len(instructions):
            raise ValueError(f"{len(instructions)} instructions, but {len(contexts)} contexts.")
        contexts = [(text or "").strip() for text in contexts]
        for row, text in enumerate(instructions):
            if not text or not text.strip():
                raise ValueError(f"instruction {row} is empty; give some text.")

        batch = {}
        if self.for_encoder:
            encoded = [self._encode(*pair) for pair in zip(instructions, contexts, strict=True)]
            if answer_start is not None and self.encoder_reads_answer:
                encoded = list(map(self._with_answer, encoded, answer_start))
            batch = self._pad_right(encoded)
        prompts = [self._encode_prompt(*pair) for pair in zip(instructions, contexts, strict=True)]
        if answer_start is not None:
            prompts = [prompt + start for prompt, start in zip(prompts, answer_start, strict=True)]
        batch["decoder_prompt_ids"], batch["decoder_prompt_mask"] = pad_left(prompts)
        if answer is not None:
            answers = [answer] if isinstance(answer, str) else list(answer)
            if len(answers) != len(instructions):
                raise ValueError(f"{len(instructions)} instructions, but {len(answers)} answers.")
            batch.update(self.encode_answers(answers))
        return BatchFeature(batch)

    def add_answers(
        self, input_ids: torch.LongTensor, attention_mask: torch.Tensor, answers: list[list[int]]
    ) -> tuple[torch.LongTensor, torch.LongTensor]:
        """
        The encoder's inputs `(batch, source)` of instructions, and of what of their answers stands already, in the
        decoder's vocabulary, as `encoder_reads_answer`; ids and mask, `(batch, longer source)`.
        """
        rows = [ids[mask.bool()].tolist() for ids, mask in zip(input_ids, attention_mask, strict=True)]
        batch = self._pad_right(list(map(self._with_answer, rows, answers)))
        return tuple(batch[name].to(input_ids.device) for name in ("input_ids", "attention_mask"))

    def _pad_right(self, rows: list[list[int]]) -> dict[str, torch.LongTensor]:
        return dict(self.tokenizer.pad({"input_ids": rows}, padding_side="right", return_tensors="pt"))

    def _with_answer(self, ids: list[int], answer: list[int]) -> list[int]:
        if not answer:
            return ids
        text = self.decoder_tokenizer.decode(answer, skip_special_tokens=True)
        end = [id for id in ids[-1:] if id in self.tokenizer.all_special_ids]
        added = self.tokenizer(text, add_special_tokens=False).input_ids[-(self.max_input_length // 2) :] + end
        return ids[: self.max_input_length - len(added)] + added

    def encode_answers(self, answers: list[str | list[int]]) -> dict[str, torch.LongTensor]:
        """
        Answers with EOS, cut at `max_answer_length`. Those given as token ids end as they do: with EOS, or cut already.

        Returns:
            `labels` `(batch, length)` padded with -100, and `length_labels` `(batch,)`: lengths before the cut.
        """
        eos = [self.decoder_tokenizer.eos_token_id]

        def tokens(answer):
            if not isinstance(answer, str):
                return answer
            text = to_lines(answer) if self.answer_format == "key_value_lines" else answer
            return self.decoder_tokenizer(text, add_special_tokens=False).input_ids + eos

        ids = [tokens(answer) for answer in answers]
        longest = min(self.max_answer_length, max(len(row) for row in ids))
        labels = torch.full((len(ids), longest), -100)
        for label, row in zip(labels, ids, strict=True):
            label[: len(row)] = torch.tensor(row[:longest])
        return {"labels": labels, "length_labels": torch.tensor([len(row) for row in ids])}

    def fits(self, instruction: str) -> bool:
        """Whether an instruction fits in both windows whole; what does not is refused."""
        try:
            if self.for_encoder:
                self._encode(instruction, "")
            self._encode_prompt(instruction, "")
        except ValueError:
            return False
        return True

    def decoder_prompt_length(self, instruction: str, context: str | None = None) -> int:
        """Tokens of the decoder's prompt, as it is cut."""
        return len(self._encode_prompt(instruction, (context or "").strip()))

    def _encode(self, instruction: str, context: str) -> list[int]:
        ids = self.tokenizer(instruction).input_ids
        if len(ids) > self.max_input_length:
            raise ValueError(
                f"an instruction has {len(ids)} tokens and the encoder reads {self.max_input_length}: shorten it, or "
                f"pass long material as context, which is cut to fit. It begins: {instruction[:60]!r}"
            )
        room = self.max_input_length - len(ids)
        if not context or room < 4:  # separators of the second text
            return ids
        return self.tokenizer(
            instruction, context, truncation="only_second", max_length=self.max_input_length
        ).input_ids

    def _encode_prompt(self, instruction: str, context: str) -> list[int]:
        ids = self._prompt_ids(instruction, context)
        excess = len(ids) - self.max_prompt_length
        while excess > 0 and context:
            context_ids = self.decoder_tokenizer(context, add_special_tokens=False).input_ids
            context = self.decoder_tokenizer.decode(context_ids[: max(0, len(context_ids) - excess)]).strip()
            ids = self._prompt_ids(instruction, context)
            excess = len(ids) - self.max_prompt_length
        if excess > 0:
            raise ValueError(
                f"an instruction makes a prompt of {len(ids)} decoder tokens and max_prompt_length is "
                f"{self.max_prompt_length}: shorten it. It begins: {instruction[:60]!r}"
            )
        return ids

    def _prompt_ids(self, instruction: str, context: str) -> list[int]:
        message = user_message(instruction, context)
        if self.prompt_template is None and self.decoder_tokenizer.chat_template:
            text = self.decoder_tokenizer.apply_chat_template(
                [{"role": "user", "content": message}], add_generation_prompt=True, tokenize=False
            )
            # The template writes the special tokens itself.
            return self.decoder_tokenizer(text, add_special_tokens=False).input_ids
        template = self.prompt_template or PROMPT_TEMPLATE
        return self.decoder_tokenizer(template.replace("{message}", message)).input_ids

    def batch_decode(self, sequences, skip_special_tokens: bool = True, **kwargs) -> list[str]:
        """Answers as text; `sequences` has shape `(batch, length)` in the decoder's vocabulary."""
        texts = self.decoder_tokenizer.batch_decode(sequences, skip_special_tokens=skip_special_tokens, **kwargs)
        return [self._finished(text) for text in texts]

    def decode(self, sequence, skip_special_tokens: bool = True, **kwargs) -> str:
        """One answer as text; `sequence` has shape `(length,)` in the decoder's vocabulary."""
        return self._finished(
            self.decoder_tokenizer.decode(sequence, skip_special_tokens=skip_special_tokens, **kwargs)
        )

    def _finished(self, text: str) -> str:
        return from_lines(text) if self.answer_format == "key_value_lines" else text

    @property
    def model_input_names(self) -> list[str]:
        return ["input_ids", "attention_mask", "decoder_prompt_ids", "decoder_prompt_mask"]


def user_message(instruction: str, context: str | None) -> str:
    """What is asked, and the text that it speaks of after an empty line."""
    return f"{instruction}\n\n{context}" if context else instruction


def pad_left(rows: list[list[int]]) -> tuple[torch.LongTensor, torch.LongTensor]:
    """Token ids and mask, each `(batch, longest row)`; padding comes first and has id 0."""
    longest = max(len(row) for row in rows)
    ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    return ids, mask


ProtoGenProcessor.register_for_auto_class("AutoProcessor")
