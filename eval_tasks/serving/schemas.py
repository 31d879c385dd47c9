"""What a request may say; what is not here is refused."""

from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from modeling_protogen.generation_protogen import MODES


def encodable(text: str) -> str:
    """JSON can hold half a surrogate pair, which is no text."""
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise ValueError("this is no Unicode text: half of a surrogate pair stands alone")
    return text


def listed(value):
    """A single one may stand for a list of one."""
    return [value] if isinstance(value, str) else value


def parts(content):
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


Text = Annotated[str, AfterValidator(encodable)]
Stop = Annotated[Text, Field(min_length=1, max_length=200)]


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class Extension(Strict):
    """What ProtoGen knows and OpenAI does not: `context`, and options of [`ProtoGenGenerationConfig`]."""

    context: Text | None = None
    mode: Literal[tuple(MODES)] | None = None
    length: int | None = Field(None, ge=1)
    num_length_sigmas: float | None = Field(None, ge=-10, le=10)
    abstain_above: float | None = None
    num_candidates: int | None = Field(None, ge=1, le=64)
    candidate_noise: float | None = Field(None, ge=0)
    num_refinements: int | None = Field(None, ge=1, le=64)
    confidence_threshold: float | None = Field(None, ge=0, le=1)
    block_size: int | None = Field(None, ge=1)


class StreamOptions(Strict):
    include_usage: bool = False


class TextFormat(Strict):
    type: Literal["text"]


class Common(Strict):
    """
    Fields of both kinds of requests. Sampling is as in the model's own configuration by default. Of what is not
    supported, the value without effect is accepted, because clients send it.
    """

    model: str
    n: int = Field(1, ge=1, le=128)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    stop: Annotated[list[Stop], Field(max_length=4), BeforeValidator(listed)] | None = None
    seed: int | None = Field(None, ge=-(2**63), le=2**63 - 1)
    stream: bool = False
    stream_options: StreamOptions | None = None
    response_format: TextFormat | None = None
    user: Text | None = None
    presence_penalty: Literal[0] | None = None
    frequency_penalty: Literal[0] | None = None
    logit_bias: Annotated[dict, Field(max_length=0)] | None = None
    protogen: Extension = Extension()

    @property
    def options(self) -> dict:
        """Options of `generate`; what is not given is left to the model's own configuration."""
        options = self.protogen.model_dump(exclude={"context"}, exclude_none=True)
        draws = {name: value for name in ("temperature", "top_p") if (value := getattr(self, name)) is not None}
        if self.temperature == 0:
            options["do_sample"] = False
        elif draws and draws != {"top_p": 1}:
            options |= {"do_sample": True} | draws
        if self.longest is not None:
            options["max_new_tokens"] = self.longest
        if self.stop:
            options["stop_strings"] = self.stop
        return options


class CompletionRequest(Common):
    """Each prompt is an instruction."""

    prompt: Annotated[list[Text], Field(min_length=1, max_length=128), BeforeValidator(listed)]
    max_tokens: int | None = Field(None, ge=1)
    logprobs: int | None = Field(None, ge=0, le=1)
    echo: Literal[False] | None = None
    best_of: Literal[1] | None = None
    suffix: None = None

    @property
    def longest(self) -> int | None:
        return self.max_tokens

    @property
    def instructions(self) -> list[str]:
        return self.prompt

    @property
    def wants_logprobs(self) -> bool:
        return self.logprobs is not None

    @property
    def num_top(self) -> int:
        return self.logprobs or 0


class TextPart(Strict):
    type: Literal["text"]
    text: Text


class Message(Strict):
    role: Literal["system", "user", "assistant"]
    content: Annotated[list[TextPart], BeforeValidator(parts)]


class ChatRequest(Common):
    """The chat takes an instruction's place."""

    messages: list[Message] = Field(min_length=1, max_length=1000)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=1)

    @model_validator(mode="after")
    def consistent(self) -> "ChatRequest":
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise ValueError("max_tokens and max_completion_tokens say the same: give one of them.")
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true.")
        return self

    @property
    def longest(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    @property
    def instructions(self) -> list[list[dict[str, str]]]:
        return [[{"role": m.role, "content": "".join(part.text for part in m.content)} for m in self.messages]]

    @property
    def wants_logprobs(self) -> bool:
        return bool(self.logprobs)

    @property
    def num_top(self) -> int:
        return self.top_logprobs or 0
