"""Text to tensors and back: the encoder's tokenizer, the decoder's tokenizer and the prompt template."""

import copy
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import CommitInfo
from transformers import AutoConfig, BatchEncoding, BatchFeature, PreTrainedTokenizerBase, ProcessorMixin
from transformers.utils import PROCESSOR_NAME

from .encoder_places import (
    check_offsets,
    places_by_content,
    places_in,
    places_in_message,
    places_in_rendered,
    places_of_tokens,
)
from .key_value_lines import from_lines, to_lines
from .loading import DamagedTokenizer, load_tokenizer
from .objectives import IGNORE_INDEX
from .publishing import publish

ANSWER_FORMATS = ("text", "key_value_lines")
PROMPT_TEMPLATE = "Instruction: {message}\n\nResponse:\n"


@dataclass
class Prompt:
    """
    A prompt of the decoder.

    Args:
        begin (`list[int]`): tokens that begin any text.
        contents (`list[str]`): of its messages.
        pieces (`list[tuple[str, BatchEncoding]]`): what the template makes of these, as it is tokenized.
    """

    begin: list[int]
    contents: list[str]
    pieces: list[tuple[str, BatchEncoding]]

    @property
    def ids(self) -> list[int]:
        return self.begin + [id for _, tokens in self.pieces for id in tokens.input_ids]


class ProtoGenProcessor(ProcessorMixin):
    """
    Prepares instructions for the encoder and for the decoder, and answers as labels.

    The encoder reads an instruction and its context as a pair. The decoder's prompt is one user message, the
    instruction and the context joined by an empty line, in `prompt_template` where one is given, otherwise in the
    decoder tokenizer's chat template, or in a plain one when it has none. What does not fit is cut from the end of the
    context, never from the instruction.

    A chat, a list of messages with `role` and `content`, may take an instruction's place. The encoder reads the
    contents joined by empty lines; the decoder reads the chat in its template.

    Control tokens in instructions, contexts, messages and answers are text: only templates make real ones. A byte order
    mark before a text is not part of it. Half a character (a lone surrogate) is refused.

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
        aligns_encoder (`bool`, defaults to False): whether to return `encoder_places`, for a model with
            `latent_source="encoder"` and `upsamples_prompt`; needs fast tokenizers.
        vocabularies (`dict[str, str]`, *optional*): checksums of the tokenizers' vocabularies, by argument, which
            saving notes. Tokenizers with others are refused.
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
        aligns_encoder: bool = False,
        vocabularies: dict[str, str] | None = None,
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
        if aligns_encoder and not for_encoder:
            raise ValueError("aligns_encoder needs an encoder: leave it out for a model without one.")
        self.aligns_encoder = aligns_encoder
        self.vocabularies = vocabularies
        super().__init__(tokenizer, decoder_tokenizer, **kwargs)
        for part, sha256 in (vocabularies or {}).items():
            found = getattr(self, part)
            if vocabulary_sha256(found) != sha256:
                raise ValueError(
                    f"the {part} from {found.name_or_path} has another vocabulary than the one that the model was "
                    "trained with: give that one."
                )
        if aligns_encoder:
            check_offsets(tokenizer, decoder_tokenizer)

    @classmethod
    def from_encoder_decoder_pretrained(
        cls,
        encoder_name_or_path: str | None,
        decoder_name_or_path: str,
        *,
        encoder_revision: str | None = None,
        decoder_revision: str | None = None,
        trust_remote_code: bool = False,
        max_input_length: int | None = None,
        max_prompt_length: int = 1024,
        max_answer_length: int = 64,
        **kwargs,
    ) -> "ProtoGenProcessor":
        """
        Loads the tokenizers of an encoder and a decoder.

        Args:
            encoder_name_or_path (`str`): Hub id or folder; None for a model without an encoder.
            decoder_name_or_path (`str`): Hub id or folder.
            encoder_revision (`str`, *optional*): the encoder's revision on the Hub; the newest by default.
            decoder_revision (`str`, *optional*): the decoder's.
            trust_remote_code (`bool`, defaults to False): run the code that comes with either of them.
            max_input_length (`int`, *optional*): the encoder's window in tokens, where its tokenizer or configuration
                has no smaller one.
            max_prompt_length (`int`, defaults to 1024): longest prompt of the decoder in tokens; as long as an answer
                leaves room for in its window, where that is less.
            max_answer_length (`int`, defaults to 64): longest answer in tokens.
            **kwargs: other arguments of the processor.

        Raises:
            ValueError: if an answer of `max_answer_length` leaves no room for a prompt.
        """
        of_decoder = {"revision": decoder_revision, "trust_remote_code": trust_remote_code}
        decoder_config = AutoConfig.from_pretrained(decoder_name_or_path, **of_decoder).get_text_config()
        # MPT and BLOOM have none. One position is the `e` before the answer.
        positions = getattr(decoder_config, "max_position_embeddings", None)
        if positions is not None:
            max_prompt_length = min(max_prompt_length, positions - max_answer_length - 1)
        if max_prompt_length < 1:
            raise ValueError(
                f"max_answer_length={max_answer_length} leaves no room for a prompt: {decoder_name_or_path} has "
                f"{positions} positions."
            )
        kwargs |= {"max_prompt_length": max_prompt_length, "max_answer_length": max_answer_length}
        decoder_tokenizer = load_tokenizer(decoder_name_or_path, **of_decoder)
        if encoder_name_or_path is None:
            # A second object: saving takes each one apart by itself.
            return cls(copy.deepcopy(decoder_tokenizer), decoder_tokenizer, for_encoder=False, **kwargs)
        source = {"revision": encoder_revision, "trust_remote_code": trust_remote_code}
        tokenizer = load_tokenizer(encoder_name_or_path, **source)
        config = AutoConfig.from_pretrained(encoder_name_or_path, **source)
        # RoBERTa counts positions from its padding id on, so the last two are out of reach.
        offset = config.pad_token_id + 1 if "roberta" in config.model_type else 0
        window = min(tokenizer.model_max_length, config.max_position_embeddings - offset)
        if max_input_length is not None:
            window = min(window, max_input_length)
        return cls(tokenizer, decoder_tokenizer, max_input_length=window, **kwargs)

    @classmethod
    def get_processor_dict(cls, pretrained_model_name_or_path, **kwargs):
        fields, unused = super().get_processor_dict(pretrained_model_name_or_path, **kwargs)
        if not fields:
            raise OSError(f"{pretrained_model_name_or_path} has no {PROCESSOR_NAME}: save the processor there.")
        return fields, unused

    @classmethod
    def _load_tokenizer_from_pretrained(cls, sub_processor_type, pretrained_model_name_or_path, subfolder="", **kwargs):
        # Where one is missing, `ProcessorMixin` takes the other in its place.
        folder = subfolder if sub_processor_type == "tokenizer" else os.path.join(subfolder, sub_processor_type)
        try:
            return load_tokenizer(pretrained_model_name_or_path, subfolder=folder, **kwargs)
        except DamagedTokenizer:
            raise
        except (OSError, ValueError) as error:
            raise OSError(
                f"{os.path.join(pretrained_model_name_or_path, folder)} has no whole tokenizer, and the processor "
                f"needs one there ({sub_processor_type}): save the processor again, or get the whole checkpoint."
            ) from error

    def __call__(
        self,
        text: str | list[dict[str, str]] | list[str | list[dict[str, str]]],
        context: str | list[str | None] | None = None,
        answer: str | list[str | list[int]] | None = None,
        return_tensors: str = "pt",
    ) -> BatchFeature:
        """
        Args:
            text (`str`, `list[dict]`, or a list of these): instructions, or chats.
            context (`str` or `list[str | None]`, *optional*): text that the instruction speaks of.
            answer (`str` or `list[str | list[int]]`, *optional*): becomes `labels` and `length_labels`; a list of ids
                is taken as it is.
            return_tensors (`str`, defaults to `"pt"`): nothing else.

        Returns:
            `BatchFeature` of PyTorch tensors: `input_ids` and `attention_mask` `(batch, source)` for the encoder,
            `decoder_prompt_ids` and `decoder_prompt_mask` `(batch, prompt)`, padded on the left; with answers `labels`
            `(batch, length)`, -100 after the end, and `length_labels` `(batch,)`, the uncut length in tokens; with
            `aligns_encoder` `encoder_places` `(batch, prompt)`, for each of the prompt's tokens the number of the
            encoder's that holds its first character, 0 where there is none.

        Raises:
            ValueError: if an instruction is empty or longer than a window, a chat is not one or has a context, or the
                lists differ in length.
        """
        if return_tensors != "pt":
            raise ValueError("ProtoGenProcessor makes PyTorch tensors only: return_tensors='pt'.")
        if isinstance(text, dict):
            raise ValueError("a message alone is no chat: give a list of messages.")
        if not isinstance(text, Iterable):
            raise ValueError(f"text must be an instruction, a chat, or a list of these; got {text!r}.")
        is_one = isinstance(text, str) or (len(text) > 0 and isinstance(text[0], dict))
        instructions = [text] if is_one else list(text)
        if not instructions:
            raise ValueError("there is no instruction: give at least one.")
        contexts = [context] * len(instructions) if context is None or isinstance(context, str) else list(context)
        if len(contexts) != len(instructions):
            raise ValueError(f"{len(instructions)} instructions, but {len(contexts)} contexts.")
        contexts = [plain_text(part or "", f"context {row}").strip() for row, part in enumerate(contexts)]
        instructions = [
            checked_instruction(row, *pair) for row, pair in enumerate(zip(instructions, contexts, strict=True))
        ]

        pairs = list(zip(instructions, contexts, strict=True))
        encodings = [self._encode(*pair) for pair in pairs] if self.for_encoder else []
        prompts, places = [self._encode_prompt(*pair) for pair in pairs], []
        if self.aligns_encoder:
            places = [self._places(*each) for each in zip(instructions, contexts, encodings, prompts, strict=True)]
        batch = self.inputs_of_ids([prompt.ids for prompt in prompts], [each.input_ids for each in encodings], places)
        if answer is not None:
            answers = [answer] if isinstance(answer, str) else list(answer)
            if len(answers) != len(instructions):
                raise ValueError(f"{len(instructions)} instructions, but {len(answers)} answers.")
            batch.update(self.encode_answers(answers))
        return batch

    def inputs_of_ids(
        self, prompt_ids: list[list[int]], input_ids: list[list[int]] = (), encoder_places: list[list[int]] = ()
    ) -> BatchFeature:
        """
        The model's inputs of texts that are tokens already, as a call of the processor makes them of texts.

        Args:
            prompt_ids (`list[list[int]]`): in the decoder's vocabulary.
            input_ids (`list[list[int]]`, *optional*): in the encoder's, where the model has one.
            encoder_places (`list[list[int]]`, *optional*): with `aligns_encoder`, of each prompt's tokens.
        """
        batch = {}
        if input_ids:
            batch |= self.tokenizer.pad({"input_ids": input_ids}, padding_side="right", return_tensors="pt")
        batch["decoder_prompt_ids"], batch["decoder_prompt_mask"] = pad_left(prompt_ids)
        if encoder_places:
            batch["encoder_places"], _ = pad_left(encoder_places)
        return BatchFeature(batch)

    def encode_answers(self, answers: list[str | list[int]]) -> dict[str, torch.LongTensor]:
        """
        Answers as labels, with EOS, cut at `max_answer_length`.

        Args:
            answers (`list[str]` or `list[list[int]]`): texts, or token ids, which end as they do: with EOS, or cut
                already.

        Returns:
            `labels` `(batch, length)` padded with -100, and `length_labels` `(batch,)`: lengths before the cut.
        """
        if len(answers) == 0:
            raise ValueError("there is no answer: give at least one.")
        eos = [self.decoder_tokenizer.eos_token_id]

        def tokens(row, answer):
            if isinstance(answer, list):
                return answer
            text = plain_text(answer, f"answer {row}")
            if self.answer_format == "key_value_lines":
                text = plain_text(to_lines(text), f"answer {row}")
            return text_ids(self.decoder_tokenizer, text) + eos

        ids = [tokens(row, answer) for row, answer in enumerate(answers)]
        longest = min(self.max_answer_length, max(len(row) for row in ids))
        labels = torch.full((len(ids), longest), -100)
        for label, row in zip(labels, ids, strict=True):
            label[: len(row)] = torch.tensor(row[:longest])
        return {"labels": labels, "length_labels": torch.tensor([len(row) for row in ids])}

    def fits(self, instruction: str | list[dict[str, str]]) -> bool:
        """
        Whether it fits in both windows whole; what does not is refused.

        Args:
            instruction (`str` or `list[dict[str, str]]`): or a chat.
        """
        try:
            if self.for_encoder:
                self._encode(instruction, "")
            self._encode_prompt(instruction, "")
        except ValueError:
            return False
        return True

    def decoder_prompt_length(self, instruction: str, context: str | None = None) -> int:
        """
        Tokens of the decoder's prompt, as it is cut.

        Args:
            instruction (`str`)
            context (`str`, *optional*)
        """
        return len(self._encode_prompt(instruction, (context or "").strip()).ids)

    def _encode(self, instruction: str | list[dict[str, str]], context: str) -> BatchEncoding:
        if not isinstance(instruction, str):
            instruction = chat_text(contents_of(instruction))
        encoding = self.tokenizer(instruction, split_special_tokens=True)
        length = len(encoding.input_ids)
        if length > self.max_input_length:
            raise ValueError(
                f"an instruction has {length} tokens and the encoder reads {self.max_input_length}: shorten it, or "
                f"pass long material as context, which is cut to fit. It begins: {instruction[:60]!r}"
            )
        room = self.max_input_length - length
        if not context or room < 4:  # separators of the second text
            return encoding
        limit = {"truncation": "only_second", "max_length": self.max_input_length}
        return self.tokenizer(instruction, context, split_special_tokens=True, **limit)

    def _encode_prompt(self, instruction: str | list[dict[str, str]], context: str) -> Prompt:
        prompt = self._whole_prompt(instruction, context)
        excess = len(prompt.ids) - self.max_prompt_length
        while excess > 0 and context:
            context_ids = text_ids(self.decoder_tokenizer, context)
            context = self.decoder_tokenizer.decode(context_ids[: max(0, len(context_ids) - excess)]).strip()
            prompt = self._whole_prompt(instruction, context)
            excess = len(prompt.ids) - self.max_prompt_length
        if excess > 0:
            raise ValueError(
                f"an instruction makes a prompt of {len(prompt.ids)} decoder tokens and max_prompt_length is "
                f"{self.max_prompt_length}: shorten it. It begins: {str(instruction)[:60]!r}"
            )
        return prompt

    def _whole_prompt(self, instruction: str | list[dict[str, str]], context: str) -> Prompt:
        # A chat template writes the tokens that begin a text itself.
        begin = [] if self._has_chat_template else self.decoder_tokenizer("").input_ids
        is_text = isinstance(instruction, str)
        contents = [user_message(instruction, context)] if is_text else contents_of(instruction)
        return Prompt(begin, contents, rendered_pieces(self.decoder_tokenizer, self._template(instruction), contents))

    def _template(self, instruction: str | list[dict[str, str]]) -> Callable[[list[str]], str]:
        """From a chat's contents to the prompt: of the roles of this one, or of one user message."""
        chat = [{"role": "user"}] if isinstance(instruction, str) else instruction
        return lambda contents: self.apply_chat_template(
            [message | {"content": content} for message, content in zip(chat, contents, strict=True)]
        )

    def _places(
        self, instruction: str | list[dict[str, str]], context: str, encoding: BatchEncoding, prompt: Prompt
    ) -> list[int]:
        """For each token of a prompt the number of the encoder's token, of these encodings, that it stands for."""
        contents = prompt.contents
        if isinstance(instruction, str):
            places = [places_in_message(encoding, instruction, context, *contents)]
        else:
            places = places_by_content(places_in(encoding, chat_text(contents)), contents)
        template = template_pieces(self._template(instruction), len(contents))
        rendered = "".join(text for text, _ in prompt.pieces)
        places = places_in_rendered(rendered, template, contents, places)
        found, start = [0] * len(prompt.begin), 0
        for text, tokens in prompt.pieces:
            found += places_of_tokens(text, tokens[0].offsets, places[start : start + len(text)])
            start += len(text)
        return found

    @property
    def _has_chat_template(self) -> bool:
        return self.prompt_template is None and self.decoder_tokenizer.chat_template is not None

    def apply_chat_template(
        self,
        conversation: list[dict[str, str]] | list[list[dict[str, str]]],
        tokenize: bool = False,
        add_generation_prompt: bool = True,
        return_tensors: str = "pt",
    ) -> str | list[str] | BatchFeature:
        """
        Args:
            conversation (`list[dict]` or `list[list[dict]]`): one chat or several; messages have `role` and `content`.
            tokenize (`bool`, defaults to False): return the model's inputs, as calling the processor does, instead of
                the decoder's prompts as text.
            add_generation_prompt (`bool`, defaults to True): ends the text where the answer begins.
            return_tensors (`str`, defaults to `"pt"`): of inputs; there are no others.

        Raises:
            ValueError: if the model has no chat template, and the chat more than one user message; or if inputs are to
                be without the generation prompt.
            jinja2.TemplateError: if the chat template does not take these messages.
        """
        if tokenize:
            if not add_generation_prompt:
                raise ValueError("inputs end where the answer begins: tokenize needs add_generation_prompt.")
            return self(conversation, return_tensors=return_tensors)
        if conversation and not isinstance(conversation[0], dict):
            return [
                self.apply_chat_template(chat, add_generation_prompt=add_generation_prompt) for chat in conversation
            ]
        if self._has_chat_template:
            return self.decoder_tokenizer.apply_chat_template(
                conversation, add_generation_prompt=add_generation_prompt, tokenize=False
            )
        if [message["role"] for message in conversation] != ["user"]:
            raise ValueError(
                "this model's prompt has one user message and the chat has others: leave out the system prompt and "
                "earlier turns, as examples of fewshot_as_multiturn are."
            )
        template = self.prompt_template or PROMPT_TEMPLATE
        return template.replace("{message}", conversation[0]["content"])

    def batch_decode(self, sequences, skip_special_tokens: bool = True, **kwargs) -> list[str]:
        """
        Answers as text.

        Args:
            sequences (`torch.LongTensor` of shape `(batch, length)` or `list[list[int]]`): in the decoder's vocabulary;
                -100 is passed over, as labels have it.
            skip_special_tokens (`bool`, defaults to True): leave EOS and its like out.
            **kwargs: as in the tokenizer's `batch_decode`.
        """
        texts = self.decoder_tokenizer.batch_decode(
            [without_padding(row) for row in sequences], skip_special_tokens=skip_special_tokens, **kwargs
        )
        return [self._finished(text) for text in texts]

    def decode(self, sequence, skip_special_tokens: bool = True, **kwargs) -> str:
        """
        One answer as text.

        Args:
            sequence (`torch.LongTensor` of shape `(length,)` or `list[int]`): as in `batch_decode`.
            skip_special_tokens (`bool`, defaults to True)
            **kwargs: as there.
        """
        (text,) = self.batch_decode([sequence], skip_special_tokens, **kwargs)
        return text

    def _finished(self, text: str) -> str:
        return from_lines(text) if self.answer_format == "key_value_lines" else text

    def save_pretrained(self, save_directory: str | Path, push_to_hub: bool = False, **kwargs) -> list[str]:
        """As in transformers, which offline would take a tokenizer for the other without a `config.json` beside it."""
        parts = ("tokenizer", "decoder_tokenizer")
        self.vocabularies = {part: vocabulary_sha256(getattr(self, part)) for part in parts}
        written = super().save_pretrained(save_directory, push_to_hub, **kwargs)
        (Path(save_directory) / "decoder_tokenizer" / "config.json").write_text("{}\n")
        return written

    def push_to_hub(self, repo_id: str, *, commit_message: str = "Upload processor", **hub) -> CommitInfo:
        """
        Uploads the processor with its code.

        Args:
            repo_id (`str`): `org/name`, or `name` for one's own.
            commit_message (`str`, defaults to `"Upload processor"`)
            **hub: `private`, `revision` and `token` as in [`publish`].
        """
        return publish(lambda folder, _: self.save_pretrained(folder), repo_id, message=commit_message, **hub)

    @property
    def model_input_names(self) -> list[str]:
        names = ["input_ids", "attention_mask", "decoder_prompt_ids", "decoder_prompt_mask"]
        return [*names, "encoder_places"] if self.aligns_encoder else names


def vocabulary_sha256(tokenizer: PreTrainedTokenizerBase) -> str:
    """A checksum of the tokens and their ids."""
    return hashlib.sha256(json.dumps(sorted(tokenizer.get_vocab().items())).encode()).hexdigest()


def checked_instruction(row: int, instruction: str | list[dict[str, str]], context: str) -> str | list[dict[str, str]]:
    """
    The instruction or chat, of plain texts.

    Raises:
        ValueError: if there is nothing to read, or a chat is malformed.
    """
    if isinstance(instruction, list) and instruction:
        return checked_chat(row, instruction, context)
    text = plain_text(instruction or "", f"instruction {row}")
    if not text.strip():
        raise ValueError(f"instruction {row} is empty; give some text.")
    return text


def checked_chat(row: int, chat: list[dict[str, str]], context: str) -> list[dict[str, str]]:
    for message in chat:
        if not isinstance(message, dict) or not all(isinstance(message.get(key), str) for key in ("role", "content")):
            raise ValueError(f"chat {row} must hold messages with role and content, both text; got {message!r}.")
    if not any(message["content"].strip() for message in chat):
        raise ValueError(f"instruction {row} is empty; give some text.")
    if context:
        raise ValueError(f"chat {row} has a context beside it; put it into a message.")
    return [message | {"content": plain_text(message["content"], f"chat {row}")} for message in chat]


def plain_text(text: str, name: str) -> str:
    """
    A text without a byte order mark before it.

    Raises:
        ValueError: if it is none, or holds half a character; the message names it.
    """
    if not isinstance(text, str):
        raise ValueError(f"{name} must be text; got {text!r}.")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{name} holds half a character, {text[error.start]!r} at place {error.start}: repair or remove it."
        ) from None
    return text.removeprefix("\ufeff")


def without_padding(ids) -> list[int]:
    return [id for id in torch.as_tensor(ids).reshape(-1).tolist() if id != IGNORE_INDEX]


def text_ids(tokenizer, text: str) -> list[int]:
    """Tokens of a text, all of which is text: none is a control token."""
    return tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids


def rendered_ids(tokenizer, render: Callable[[list[str]], str], texts: list[str]) -> list[int]:
    """Tokens of what a template makes of texts; arguments as in [`rendered_pieces`]."""
    return [id for _, tokens in rendered_pieces(tokenizer, render, texts) for id in tokens.input_ids]


def rendered_pieces(tokenizer, render: Callable[[list[str]], str], texts: list[str]) -> list[tuple[str, BatchEncoding]]:
    """
    What a template, which alone makes control tokens, makes of texts: in one piece, or in the pieces that have to be
    tokenized apart.

    Args:
        render (`Callable`): from texts to the template filled with them.
        texts (`list[str]`): what people write.
    """
    # Not all are in `all_special_tokens`: Llama 3 has `<|start_header_id|>` beside them.
    control = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    if not any(token in text for token in control for text in texts):
        text = render(texts)
        return [(text, tokenizer(text, add_special_tokens=False))]
    return [
        (piece, tokenizer(piece, add_special_tokens=False))
        if isinstance(piece, str)
        else (texts[piece], tokenizer(texts[piece], add_special_tokens=False, split_special_tokens=True))
        for piece in template_pieces(render, len(texts))
    ]


def template_pieces(render: Callable[[list[str]], str], number: int) -> list[str | int]:
    """What a template writes, and the numbers of the texts that it writes there, in their order."""
    marks = [chr(0xE000 + row) for row in range(number)]  # of private use
    pieces = re.split(f"([{''.join(marks)}])", render(marks))
    return [marks.index(piece) if piece in marks else piece for piece in pieces]


def chat_text(contents: list[str]) -> str:
    """What is said in a chat, for an encoder, which knows no template."""
    return "\n\n".join(contents)


def contents_of(chat: list[dict[str, str]]) -> list[str]:
    return [message["content"] for message in chat]


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
