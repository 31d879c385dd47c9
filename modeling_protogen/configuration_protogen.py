"""Configuration of a ProtoGen model."""

from math import isfinite
from types import UnionType
from typing import Union, get_args, get_origin

from transformers import AutoConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec
from transformers.utils import CONFIG_NAME

from .proto_tokens import ARRANGEMENTS

M_SCOPES = ("per_example", "per_category", "shared", "fixed")
SINKS = ("bos", "none")
LATENT_SOURCES = ("encoder", "decoder", "both", "none")
FIRST_TOKENS = ("slots", "decoder", "drafts")
# Width of an attention head of the predictor.
HEAD_DIM = 64
# How much larger proto-tokens fitted to texts are than the decoder's token embeddings, about.
FITTED_SIZE = 16.0
# One number for an answer, larger where it is less sure: 1 - the geometric mean of its tokens' probabilities, 1 - the
# least of them, 1 - the product of them and of the durations' (`upsamples_prompt`), the mean entropy of its tokens in
# nats, the predicted standard deviation of the log length, and the share of wrong tokens that the error head expects.
UNCERTAINTY_SCORES = ("confidence", "least_confidence", "sequence", "entropy", "length_sigma", "predicted_error")


def category_id(category: str | None, categories: list[str]) -> int:
    """Position of a category; a ValueError says which ones there are."""
    if category not in categories:
        raise ValueError(f"unknown category {category!r}; the model knows {', '.join(categories) or 'none'}.")
    return categories.index(category)


def as_list(token_ids: int | list[int] | None) -> list[int]:
    """Token ids as transformers' configurations have them: one, several or none."""
    return [] if token_ids is None else [token_ids] if isinstance(token_ids, int) else list(token_ids)


def is_of(value: object, kind: object) -> bool:
    """Whether a value is of an annotated type, or will do for it: an integer for a float, a list for a tuple."""
    origin, parts = get_origin(kind) or kind, get_args(kind)
    if origin in (Union, UnionType):
        return any(is_of(value, part) for part in parts)
    if origin in (int, float):
        return isinstance(value, (int, origin)) and not isinstance(value, bool) and isfinite(value)
    if origin in (list, tuple):
        return isinstance(value, (list, tuple)) and all(is_of(part, parts[0]) for part in value)
    if origin is dict and parts:
        return isinstance(value, dict) and all(is_of(part, parts[1]) for part in value.values())
    return isinstance(value, origin)


def require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(f"ProtoGenConfig: {message}")


class ProtoGenConfig(PreTrainedConfig):
    """
    Configuration of [`ProtoGenForConditionalGeneration`].

    Args:
        encoder_config (`dict` or `PreTrainedConfig`, *optional*): of the encoder; needed where there is one.
        decoder_config (`dict` or `PreTrainedConfig`, *optional*): of the decoder; needed.
        decoder_name_or_path (`str`, *optional*): Hub id or folder that the frozen decoder came from.
        decoder_revision (`str`, *optional*): its revision: commit, tag or branch.
        decoder_fingerprint (`str`, *optional*): [`decoder_fingerprint`] of its weights, which a decoder that is
            attached later must have.
        thin (`bool`, defaults to False): whether checkpoints leave the frozen decoder out; loading attaches it again
            from `decoder_name_or_path`.
        encoder_name_or_path (`str`, *optional*): where the word embeddings of a thin checkpoint's encoder, which are
            frozen, come from. None keeps them in the checkpoint.
        arrangement (`str`, defaults to `"e_mN"`): how `e` and `m` are laid out over the decoder's positions:
            `e_m`, `e_mN`, `interleaved`, `halves` or `e_only` (table 1 of https://arxiv.org/abs/2505.21189).
        num_e_tokens (`int`, defaults to 1): `e` proto-tokens that open a chunk. More than one needs the arrangement
            `e_m` or `e_mN`.
        chunk_size (`int`, defaults to 64): answer tokens governed by one `(e, m)` pair.
        max_chunks (`int`, defaults to 1): chunks that are laid end to end in one pass.
        max_answer_length (`int`, *optional*, defaults to `chunk_size * max_chunks`): longest answer in decoder tokens,
            EOS included.
        m_scope (`str`, defaults to `"per_example"`): where `m` comes from: `per_example` (predicted), `per_category`
            (one trained vector for each category), `shared` (one trained vector), `fixed` (one random vector that is
            never trained).
        categories (`list[str]`, *optional*): their names, in the order of the trained vectors; needed by
            `per_category`.
        sink (`str`, defaults to `"bos"`): the real token before `e`: the decoder's BOS, or `none`. With
            `decoder_sees_prompt` the prompt is the sink.
        decoder_sees_prompt (`bool`, defaults to False): whether the prompt's own tokens stand before the proto-tokens
            in the decoder.
        first_tokens (`str`, defaults to `"slots"`): who writes an answer's first tokens after a prompt: the
            `slots`, like all others, or the `decoder`, by ordinary next-token prediction (`num_autoregressive_tokens`),
            which is right for its own answers and cannot be trained for others. With `drafts` slots only propose the
            tokens that follow the decoder's own next one, each the token after its own position, as a real token does;
            such a model is trained with `num_anchors`, and writes in the modes `adaptive` and `verified`.
        slot_adapter_rank (`int`, defaults to 0): rank of the low-rank weights that act in the decoder's linear layers
            at the slots only; 0 means none. The decoder's weights stay as they are, and so does all that it computes
            for real tokens.
        slot_adapter_modules (`list[str]`, *optional*): the linear layers that have them, by the last parts of their
            names, as `down_proj`; all of each layer's by default. Fewer cost less time.
        coherence_dim (`int`, defaults to 0): width between two layers that read the decoder's last state at a slot and
            the tokens before that the slot does not see, so that drafts of `adaptive` and `verified` hang together
            ([`Coherence`]); 0 means none.
        latent_source (`str`, defaults to `"encoder"`): what `e`, `m` and the length are predicted from: states of the
            `encoder`, those of the frozen `decoder` over the prompt, `both`, or `none`: trained vectors, the same for
            every instruction, which speaks through the prompt alone then. `decoder` and `none` have no encoder.
        decoder_layers_read (`list[int]`, *optional*): the decoder's hidden states that are read, 0 being its input
            embeddings; these, the middle layer's and the last by default.
        upsamples_prompt (`bool`, defaults to False): whether queries start from the prompt's states, each repeated over
            as many of the answer's tokens as it accounts for, those of a chunk from a mixture of the states at its
            tokens, and may copy an embedding of the prompt: for answers that repeat the prompt's words in their order.
            The loss `duration` trains it. With `latent_source="encoder"` these states are the encoder's, each at the
            prompt's tokens that it stands for, beside their embeddings: the decoder reads the slots, and the prompt
            with `decoder_sees_prompt`, in one pass.
        predictor_dim (`int`, defaults to 384): width of the predictor, a multiple of 64.
        predictor_dropout (`float`, defaults to 0.1): share of the predictor's activations that training drops.
        num_source_layers (`int`, defaults to 0): layers that mix the source's states in both directions.
        num_query_layers (`int`, defaults to 1): layers of queries that attend to one another and to the source.
            Without a source there are none of either.
        proto_token_std (`float`, defaults to 0.32): standard deviation of fresh proto-tokens: about that of fitted
            ones, `FITTED_SIZE` times that of the decoder's input embeddings.
        log_length_variance_range (`tuple[float, float]`, defaults to `(-6.0, 3.0)`): bounds of the log of the predicted
            variance of the log length, which is in squared nats.
        log_length_shift (`float`, defaults to 0.0): added to the mean of the log length, in nats; from calibration.
        log_length_scale (`float`, defaults to 1.0): factor on its standard deviation; from calibration.
        uncertainty_score (`str`, defaults to `"confidence"`): which of `UNCERTAINTY_SCORES` is an answer's uncertainty.
        uncertainty_points (`list[list[float]]`, *optional*): the expected share of wrong tokens at growing values of
            the score, with straight lines between; from calibration. None leaves the score as it is.
        abstention_thresholds (`dict[str, float]`, *optional*): from a share of right tokens to the uncertainty up to
            which held-out answers, all together, had it; from calibration.
        validation_share (`float`, *optional*): share of the instructions that training held out, by a hash of
            them; None before training.

    Raises:
        ValueError: if the fields contradict each other; the message says which and what to change.
    """

    model_type = "protogen"
    # Transformers wants a type by default; without its configuration no model is built here.
    sub_configs_defaults = {
        "encoder_config": SubConfigSpec(config_class=AutoConfig, model_type="bert", optional=True),
        "decoder_config": SubConfigSpec(config_class=AutoConfig, model_type="llama", optional=True),
    }

    encoder_config: dict | PreTrainedConfig | None = None
    decoder_config: dict | PreTrainedConfig | None = None
    decoder_name_or_path: str | None = None
    decoder_revision: str | None = None
    decoder_fingerprint: str | None = None
    thin: bool = False
    encoder_name_or_path: str | None = None
    arrangement: str = "e_mN"
    num_e_tokens: int = 1
    chunk_size: int = 64
    max_chunks: int = 1
    max_answer_length: int | None = None
    m_scope: str = "per_example"
    categories: list[str] | None = None
    sink: str = "bos"
    decoder_sees_prompt: bool = False
    first_tokens: str = "slots"
    slot_adapter_rank: int = 0
    slot_adapter_modules: list[str] | None = None
    coherence_dim: int = 0
    latent_source: str = "encoder"
    decoder_layers_read: list[int] | None = None
    upsamples_prompt: bool = False
    predictor_dim: int = 384
    predictor_dropout: float = 0.1
    num_source_layers: int = 0
    num_query_layers: int = 1
    proto_token_std: float = 0.32
    log_length_variance_range: list[float] | tuple[float, float] = (-6.0, 3.0)
    log_length_shift: float = 0.0
    log_length_scale: float = 1.0
    uncertainty_score: str = "confidence"
    uncertainty_points: list[list[float]] | None = None
    abstention_thresholds: dict[str, float] | None = None
    validation_share: float | None = None
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs):
        for name, kind in ProtoGenConfig.__annotations__.items():
            value, wanted = getattr(self, name), kind.__name__ if isinstance(kind, type) else kind
            require(is_of(value, kind), f"{name}={str(value)[:60]!r} must be {wanted}.")
        if self.max_answer_length is None:
            self.max_answer_length = self.chunk_size * self.max_chunks
        if self.latent_source == "none":
            self.num_source_layers = self.num_query_layers = 0
        # `register_for_auto_class` records one auto class; the model is a sequence-to-sequence one as well.
        self.auto_map = {
            "AutoConfig": "configuration_protogen.ProtoGenConfig",
            "AutoModel": "modeling_protogen.ProtoGenForConditionalGeneration",
            "AutoModelForSeq2SeqLM": "modeling_protogen.ProtoGenForConditionalGeneration",
            "AutoProcessor": "processing_protogen.ProtoGenProcessor",
        }
        kwargs.pop("auto_map", None)
        self._check_models()
        super().__post_init__(**kwargs)
        self._check_values()
        self._check_layout()
        self._check_predictor()

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path, **kwargs):
        fields, unused = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        if not fields:
            raise OSError(f"{pretrained_model_name_or_path} has no {CONFIG_NAME}: it is no model, or not all of one.")
        return fields, unused

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        # Where the model that is being loaded finds its decoder is for the model to know, and no other configuration.
        if not (kwargs.get("return_unused_kwargs") and "decoder_name_or_path" in kwargs):
            return super().from_dict(config_dict, **kwargs)
        found_at = {"decoder_name_or_path": kwargs.pop("decoder_name_or_path")}
        config, unused = super().from_dict(config_dict, **kwargs)
        return config, unused | found_at

    def _check_models(self):
        for name, is_needed in (("decoder_config", True), ("encoder_config", self.uses_encoder)):
            config = getattr(self, name)
            require(config is not None or not is_needed, f"{name} is missing, and without it there is no model.")
            require(
                config is None or isinstance(config, PreTrainedConfig) or "model_type" in config,
                f"{name} has no model_type, so nothing says which model it describes.",
            )

    def _check_values(self):
        choices = {"arrangement": ARRANGEMENTS, "m_scope": M_SCOPES, "sink": SINKS, "latent_source": LATENT_SOURCES}
        choices |= {"first_tokens": FIRST_TOKENS, "uncertainty_score": UNCERTAINTY_SCORES}
        for name, known in choices.items():
            value = getattr(self, name)
            require(value in known, f"{name}={value!r} is not one of {', '.join(known)}.")
        for name in ("num_e_tokens", "chunk_size", "max_chunks", "max_answer_length"):
            require(getattr(self, name) >= 1, f"{name}={getattr(self, name)} must be at least 1.")
        for name in ("slot_adapter_rank", "coherence_dim", "num_source_layers", "num_query_layers"):
            require(getattr(self, name) >= 0, f"{name}={getattr(self, name)} must not be negative.")
        require(0 <= self.predictor_dropout < 1, f"predictor_dropout={self.predictor_dropout} must lie in 0..1.")
        require(self.log_length_scale > 0, f"log_length_scale={self.log_length_scale} must be positive.")
        require(len(self.log_length_variance_range) == 2, "log_length_variance_range must have two numbers.")
        low, high = self.log_length_variance_range
        require(low < high, f"log_length_variance_range={low, high} is empty.")

    def _check_layout(self):
        require(
            self.max_answer_length <= self.chunk_size * self.max_chunks,
            f"max_answer_length={self.max_answer_length} does not fit in max_chunks={self.max_chunks} chunks of "
            f"chunk_size={self.chunk_size} tokens; raise one of them.",
        )
        require(
            self.num_e_tokens == 1 or self.arrangement in ("e_m", "e_mN"),
            f"num_e_tokens={self.num_e_tokens} needs arrangement e_m or e_mN; "
            f"{self.arrangement} places a single e by itself.",
        )
        require(
            self.arrangement != "e_only" or self.m_scope == "per_example",
            "arrangement e_only has no m, so m_scope must stay per_example.",
        )
        require(
            (self.m_scope == "per_category") == bool(self.categories),
            "categories must be given with m_scope=per_category, and only then.",
        )
        require(
            not (self.decoder_sees_prompt and self.sink == "none"),
            "decoder_sees_prompt puts the prompt before e, where it is the attention sink; sink=none contradicts it.",
        )
        require(
            self.decoder_sees_prompt or self.sink == "none" or self.decoder_text_config.bos_token_id is not None,
            "sink=bos needs a decoder with a bos_token_id; this one has none: set sink=none, "
            "or give decoder_config.bos_token_id.",
        )
        require(
            self.first_tokens != "drafts" or (self.decoder_sees_prompt and not self.upsamples_prompt),
            "first_tokens=drafts go on from a text that the decoder reads: set decoder_sees_prompt, and no "
            "upsamples_prompt.",
        )
        require(
            self.latent_source != "none" or self.decoder_sees_prompt,
            "latent_source=none lets the instruction speak through the prompt alone: set decoder_sees_prompt.",
        )

    def _check_predictor(self):
        require(
            self.predictor_dim >= 1 and self.predictor_dim % HEAD_DIM == 0,
            f"predictor_dim={self.predictor_dim} must be a multiple of {HEAD_DIM}, the width of an attention head.",
        )
        last = self.decoder_text_config.num_hidden_layers
        read = self.decoder_layers_read or []
        require(
            all(0 <= layer <= last for layer in read),
            f"decoder_layers_read={read} must lie in 0..{last}, the decoder's number of layers.",
        )
        require(
            not self.upsamples_prompt or self.aligns_encoder or 0 in self.layers_read,
            "upsamples_prompt needs the decoder's input embeddings over the prompt: latent_source=encoder, or decoder "
            "or both with 0 in decoder_layers_read.",
        )
        require(
            not self.upsamples_prompt or self.decoder_dim == self.decoder_text_config.hidden_size,
            "upsamples_prompt copies states of the decoder as proto-tokens; this decoder's embeddings are narrower.",
        )
        require(
            self.num_autoregressive_tokens < 2 or last in self.layers_read,
            f"first_tokens=decoder needs the last layer, {last}, in decoder_layers_read: it is read there.",
        )

    @property
    def decoder_text_config(self) -> PreTrainedConfig:
        """The decoder's configuration; of a multimodal decoder, that of its language model."""
        return self.decoder_config.get_text_config()

    @property
    def decoder_dim(self) -> int:
        """
        Width of the decoder's input embeddings, and so of proto-tokens, and of its last states. Its other states have
        its `hidden_size`, which differs in OPT-350m alone.
        """
        config = self.decoder_text_config
        return getattr(config, "word_embed_proj_dim", config.hidden_size)

    def state_dim(self, layer: int) -> int:
        """
        Width of the decoder's hidden states.

        Args:
            layer (`int`): whose; 0 is the first layer's input.
        """
        config = self.decoder_text_config
        return self.decoder_dim if layer == config.num_hidden_layers else config.hidden_size

    @property
    def uses_encoder(self) -> bool:
        return self.latent_source in ("encoder", "both")

    @property
    def uses_decoder_states(self) -> bool:
        return self.latent_source in ("decoder", "both")

    @property
    def aligns_encoder(self) -> bool:
        """Whether the encoder's states are put on the prompt's tokens, by the characters that both stand for."""
        return self.latent_source == "encoder" and self.upsamples_prompt

    @property
    def layers_read(self) -> list[int]:
        """The decoder's hidden states that proto-tokens are predicted from, in growing order."""
        if not self.uses_decoder_states:
            return []
        last = self.decoder_text_config.num_hidden_layers
        return sorted({0, last // 2, last} if self.decoder_layers_read is None else {*self.decoder_layers_read})

    @property
    def draft_length(self) -> int:
        """Tokens of a draft at most: of an answer all but the first, which the text before it predicts."""
        return self.max_answer_length - 1

    @property
    def num_autoregressive_tokens(self) -> int:
        """
        Tokens at an answer's beginning that the decoder writes as it would token by token: with
        `first_tokens="decoder"` the first after a prompt. Where proto-tokens are predicted from the decoder's states,
        the prompt has been read before they are known; then the first token stands in front of them, and the second is
        the decoder's own too.
        """
        if self.first_tokens != "decoder":
            return 0
        return 1 + int(self.uses_decoder_states) if self.decoder_sees_prompt else 0

    @property
    def eos_token_ids(self) -> list[int]:
        """The decoder's end-of-sequence ids; the top-level ones belong to whichever tokenizer wrote them last."""
        return as_list(self.decoder_text_config.eos_token_id)

    @property
    def answer_pad_token_id(self) -> int:
        """What fills the rows of `generate`'s sequences after the answer's end."""
        # CodeGen and RWKV know none.
        pad = getattr(self.decoder_text_config, "pad_token_id", None)
        return pad if pad is not None else self.eos_token_ids[0] if self.eos_token_ids else 0


ProtoGenConfig.register_for_auto_class("AutoConfig")
