"""
Which of the encoder's tokens each token of the decoder's prompt stands for: by the characters that both hold, as the
tokenizers say them.

*Places* are numbers of the encoder's tokens; 0, its first token, also means that there is none.
"""

from transformers import BatchEncoding, PreTrainedTokenizerBase


def check_offsets(*tokenizers: PreTrainedTokenizerBase) -> None:
    """
    Raises:
        ValueError: if one does not say which characters its tokens hold.
    """
    for tokenizer in tokenizers:
        if not tokenizer.is_fast:
            raise ValueError(
                f"aligns_encoder needs to know which characters a token holds, and {type(tokenizer).__name__} does not "
                "say: take an encoder and a decoder with fast tokenizers."
            )


def places_in(encoding: BatchEncoding, text: str, number: int = 0) -> list[int]:
    """For each character of the first, or the second (`number=1`), text of an encoding the place of its token."""
    places, texts = [0] * len(text), encoding.sequence_ids(0)
    # Of two tokens that share a character the first has it.
    for token, (start, end) in reversed([*enumerate(encoding[0].offsets)]):
        if texts[token] == number:
            places[start:end] = [token] * (end - start)
    return places


def places_in_message(encoding: BatchEncoding, instruction: str, context: str, message: str) -> list[int]:
    """
    For each character of a message its place.

    Args:
        encoding (`BatchEncoding`): of instruction and context, as a pair.
        message (`str`): the instruction and, after an empty line, the context or its beginning.
    """
    of_context = places_in(encoding, context, number=1)
    # What decoding has changed in a context that was cut is no longer that text.
    pairs = enumerate(zip(message[len(instruction) + 2 :], context, strict=False))
    same = next((at for at, (found, own) in pairs if found != own), len(context))
    return fitted([*places_in(encoding, instruction), 0, 0, *of_context[:same]], len(message))


def places_by_content(places: list[int], contents: list[str]) -> list[list[int]]:
    """The places of the characters of a chat's contents, joined by empty lines, content by content."""
    found, start = [], 0
    for content in contents:
        found.append(places[start : start + len(content)])
        start += len(content) + 2
    return found


def fitted(places: list[int], length: int) -> list[int]:
    return (places + [0] * length)[:length]


def places_in_rendered(rendered: str, pieces: list[str | int], texts: list[str], places: list[list[int]]) -> list[int]:
    """
    For each character of what a template makes of texts its place.

    Args:
        pieces (`list[str | int]`): what the template writes, and numbers of texts, in their order.
        texts (`list[str]`), places (`list[list[int]]`): of each of their characters. A template may strip texts.
    """
    found, at = [0] * len(rendered), 0
    for piece in pieces:
        words = piece if isinstance(piece, str) else texts[piece].strip()
        start = rendered.find(words, at)
        if start < 0:  # Templates may write other things for other texts.
            continue
        at = start + len(words)
        if not isinstance(piece, str):
            first = texts[piece].find(words)
            found[start:at] = places[piece][first : first + len(words)]
    return found


def places_of_tokens(text: str, offsets: list[tuple[int, int]], places: list[int]) -> list[int]:
    """For each token of a text the place of its first character that is no space; `places` of all its characters."""
    first = [next((at for at in range(*span) if not text[at].isspace()), None) for span in offsets]
    return [0 if at is None else places[at] for at in first]
