"""What is sent: bodies as OpenAI's API has them, with `protogen` in each choice."""

import json
from collections.abc import Iterator

from .schemas import ChatRequest, Common
from .writing import Answer

ERROR_TYPES = {401: "authentication_error", 429: "rate_limit_error"}


def error_body(status: int, message: str, code: str | None = None, param: str | None = None) -> dict:
    kind = ERROR_TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def event(content: dict) -> str:
    """A server-sent event."""
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"


def usage(prompt_tokens: int, answers: list[Answer]) -> dict[str, int]:
    written = sum(answer.num_tokens for answer in answers)
    return {"prompt_tokens": prompt_tokens, "completion_tokens": written, "total_tokens": prompt_tokens + written}


def completion_logprobs(answer: Answer, num_top: int) -> dict:
    offsets, texts = [0], [text for text, _ in answer.tokens]
    for text in texts[:-1]:
        offsets.append(offsets[-1] + len(text))
    return {
        "tokens": texts,
        "token_logprobs": [log_p for _, log_p in answer.tokens],
        "top_logprobs": [{text: log_p} for text, log_p in answer.tokens] if num_top else None,
        "text_offset": offsets[: len(texts)],
    }


def chat_logprobs(answer: Answer, num_top: int) -> dict:
    tokens = [{"token": text, "logprob": log_p, "bytes": list(text.encode())} for text, log_p in answer.tokens]
    return {"content": [token | {"top_logprobs": [token] * num_top} for token in tokens], "refusal": None}


class Response:
    """
    The bodies of one response.

    Args:
        request (`Common`)
        id (`str`), created (`int`): of the response; seconds since 1970.
    """

    def __init__(self, request: Common, id: str, created: int):
        self.request = request
        self.is_chat = isinstance(request, ChatRequest)
        chat = "chat.completion.chunk" if request.stream else "chat.completion"
        kind = chat if self.is_chat else "text_completion"
        self.head = {"id": id, "object": kind, "created": created, "model": request.model}

    def whole(self, prompt_tokens: int, answers: list[Answer]) -> dict:
        choices = []
        for index, answer in enumerate(answers):
            text = {"text": answer.text}
            if self.is_chat:
                text = {"message": {"role": "assistant", "content": answer.text, "refusal": None}}
            choices.append({"index": index} | text | self._end(answer))
        return self.head | {"choices": choices, "usage": usage(prompt_tokens, answers)}

    def first(self, num_choices: int) -> Iterator[str]:
        """The events that a stream begins with."""
        if self.is_chat:
            for index in range(num_choices):
                yield self._chunk(index, {"delta": {"role": "assistant", "content": ""}})

    def text(self, text: str) -> str:
        """The event of a piece of a single answer."""
        return self._chunk(0, self._piece(text))

    def last(self, prompt_tokens: int, answers: list[Answer], num_sent: int) -> Iterator[str]:
        """The events that a stream ends with: what has not been sent of each answer yet, and how it ended."""
        for index, answer in enumerate(answers):
            yield self._chunk(index, self._piece(answer.text[num_sent:]), self._end(answer))
        if self.request.stream_options and self.request.stream_options.include_usage:
            yield event(self.head | {"choices": [], "usage": usage(prompt_tokens, answers)})
        yield "data: [DONE]\n\n"

    def _piece(self, text: str) -> dict:
        return {"delta": {"content": text}} if self.is_chat else {"text": text}

    def _chunk(self, index: int, content: dict, end: dict | None = None) -> str:
        end = {"logprobs": None, "finish_reason": None} if end is None else end
        return event(self.head | {"choices": [{"index": index} | content | end]})

    def _end(self, answer: Answer) -> dict:
        logprobs = None
        if self.request.wants_logprobs:
            logprobs = (chat_logprobs if self.is_chat else completion_logprobs)(answer, self.request.num_top)
        return {"logprobs": logprobs, "finish_reason": answer.finish_reason, "protogen": answer.measures}
