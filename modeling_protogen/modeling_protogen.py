"""ProtoGen: an encoder predicts `e`, `m` and the answer's length; a frozen decoder writes the answer in one pass."""

import os
import re
from collections.abc import Callable
from dataclasses import dataclass, fields, replace

import torch
import torch.nn.functional as F
from huggingface_hub import CommitInfo, HfApi
from transformers import AutoModel, AutoModelForCausalLM, Cache, PreTrainedModel
from transformers import initialization as init
from transformers.utils import ModelOutput, can_return_tuple

from .anchors import labels_behind, states_behind
from .block_decoding import Drafter
from .coherence import Coherence, unseen
from .configuration_protogen import FITTED_SIZE, ProtoGenConfig
from .frozen_decoder import (
    answer_logits,
    bucket_by_length,
    check_decoder,
    copied_cache,
    embedding_std,
    fingerprint_if_exact,
    keep_special_tokens,
    logits_of,
    num_positions,
    read_prefix,
    sink_ids,
)
from .generation_protogen import ProtoGenGenerationMixin
from .loading import load_weights
from .objectives import IGNORE_INDEX, LOSS_WEIGHTS, duration_nll, error_nll, length_nll, reconstruction_loss
from .proto_predictor import ProtoTokenPrediction, ProtoTokenPredictor, ScaledEmbedding, ScaledLinear
from .proto_tokens import Layout, build_layout, fill_slots, longest_answer
from .publishing import MODEL_FILES, model_card, pin_decoder, publish
from .slot_adapters import FusedDecoder, SlotAdapters

# What a thin checkpoint's decoder is loaded with as well.
LOADING_OPTIONS = (
    *("quantization_config", "device_map", "max_memory", "offload_folder", "offload_buffers"),
    *("cache_dir", "force_download", "proxies", "local_files_only", "token"),
)


@dataclass
class ProtoGenOutput(ModelOutput):
    """
    Output of [`ProtoGenForConditionalGeneration`].

    Args:
        loss (`torch.FloatTensor` of shape `()`, *optional*):
            With `labels` only: the weighted sum of the four below, as the trainer's by default.
        reconstruction_loss (`torch.FloatTensor` of shape `()`, *optional*): see [`reconstruction_loss`]; weight 1.
        length_nll (`torch.FloatTensor` of shape `()`, *optional*): see [`length_nll`]; weight 0.1.
        error_nll (`torch.FloatTensor` of shape `()`, *optional*): see [`error_nll`]; weight 0.1.
        duration_nll (`torch.FloatTensor` of shape `()`, *optional*): with `durations`, see [`duration_nll`]; weight 1.
        answer_logits (`torch.FloatTensor` of shape `(answer_tokens, vocab)`, *optional*):
            The decoder's logits at the answers' positions only, answer after answer: row `i` belongs to the `i`-th
            element of `labels[labels != -100]`. There are no rows for padding, which at a vocabulary's width cost more
            than the rest of a step.
        e (`torch.FloatTensor` of shape `(batch, chunks, num_e_tokens, decoder_dim)`): predicted `e` proto-tokens, of as
            many chunks as the labels need, or of all.
        m (`torch.FloatTensor` of shape `(batch, chunks, decoder_dim)`): `m` proto-tokens.
        log_length_mean (`torch.FloatTensor` of shape `(batch,)`): mean of the natural log of the length in tokens.
        log_length_variance (`torch.FloatTensor` of shape `(batch,)`): its variance, in squared nats.
        error_mean, error_variance (`torch.FloatTensor` of shape `(batch,)`): of the share of wrong tokens.
        duration_logits (`torch.FloatTensor` of shape `(batch, prompt, MAX_DURATION + 1)`, *optional*): of the number of
            answer tokens that each of the prompt's accounts for, with `upsamples_prompt`.
        lengths (`torch.LongTensor` of shape `(batch,)`): answer lengths in tokens that `answer_logits` covers.
        prompt_cache (`Cache`, *optional*): the decoder's keys and values of the prompt, where it was read apart.
    """

    loss: torch.FloatTensor | None = None
    reconstruction_loss: torch.FloatTensor | None = None
    length_nll: torch.FloatTensor | None = None
    error_nll: torch.FloatTensor | None = None
    duration_nll: torch.FloatTensor | None = None
    answer_logits: torch.FloatTensor | None = None
    e: torch.FloatTensor | None = None
    m: torch.FloatTensor | None = None
    log_length_mean: torch.FloatTensor | None = None
    log_length_variance: torch.FloatTensor | None = None
    error_mean: torch.FloatTensor | None = None
    error_variance: torch.FloatTensor | None = None
    duration_logits: torch.FloatTensor | None = None
    lengths: torch.LongTensor | None = None
    prompt_cache: Cache | None = None


class ProtoGenForConditionalGeneration(ProtoGenGenerationMixin, PreTrainedModel):
    """
    An encoder that predicts proto-tokens, and a frozen decoder that writes the whole answer from them in one pass.

    The decoder is frozen for good: its parameters never require gradients and it stays in evaluation mode, also after
    `train()` and `from_pretrained`.

    Args:
        config (`ProtoGenConfig`)
        encoder (`PreTrainedModel`, *optional*): built from `config.encoder_config` when left out, unless
            `config.uses_encoder` is False.
        decoder (`PreTrainedModel`, *optional*): built from `config.decoder_config` when left out, unless
            `config.thin`: then it is attached later.
    """

    config_class = ProtoGenConfig
    main_input_name = "input_ids"
    # The loss is a mean over texts, not over the tokens of an accumulated batch.
    accepts_loss_kwargs = False
    _no_split_modules = ["ProtoTokenPredictor"]
    _supports_sdpa = True
    # Of the encoder: the decoder, which is never in training mode, keeps the activations of the answer's positions.
    supports_gradient_checkpointing = True

    def __init__(
        self,
        config: ProtoGenConfig,
        encoder: PreTrainedModel | None = None,
        decoder: PreTrainedModel | None = None,
    ):
        super().__init__(config)
        if decoder is not None:
            check_decoder(decoder)
        if encoder is None and config.uses_encoder:
            encoder = AutoModel.from_config(config.encoder_config)
        self.encoder = encoder
        self.proto_predictor = ProtoTokenPredictor(config)
        if decoder is None and not config.thin:
            decoder = AutoModelForCausalLM.from_config(config.decoder_config)
        self.slot_adapters = None
        if config.slot_adapter_rank:
            shape = decoder
            if shape is None:
                with torch.device("meta"):
                    shape = AutoModelForCausalLM.from_config(config.decoder_config)
            self.slot_adapters = SlotAdapters(config.slot_adapter_rank, shape, config.slot_adapter_modules)
        self.coherence = None
        if config.coherence_dim:
            self.coherence = Coherence(config.decoder_dim, config.coherence_dim, config.draft_length)
        self.decoder = decoder
        self.post_init()
        if config.encoder_name_or_path:
            self._keys_to_ignore_on_load_missing.add(re.escape(self.word_embeddings_name))
        self._prepare_decoder()
        self.graphs = None
        # A reader with the signature of [`read_prefix`] that remembers prompts; training may set one.
        self.prompt_store: Callable | None = None

    @classmethod
    def from_encoder_decoder_pretrained(
        cls,
        encoder_name_or_path: str | None,
        decoder_name_or_path: str,
        *,
        encoder_revision: str | None = None,
        encoder_num_layers: int | None = None,
        decoder_revision: str | None = None,
        encoder_dtype: torch.dtype = torch.float32,
        decoder_dtype: torch.dtype | str = "auto",
        trust_remote_code: bool = False,
        **config_kwargs,
    ) -> "ProtoGenForConditionalGeneration":
        """
        Joins a pretrained encoder and a pretrained decoder with fresh proto-token heads.

        Args:
            encoder_name_or_path (`str`): Hub id or folder of any `AutoModel` encoder; None with a
                `latent_source` that has none.
            decoder_name_or_path (`str`): Hub id or folder of any `AutoModelForCausalLM`.
            encoder_revision (`str`, *optional*): the encoder's revision on the Hub; the newest by default.
            decoder_revision (`str`, *optional*): the decoder's.
            encoder_num_layers (`int`, *optional*): takes the encoder's first layers only; all by default.
            encoder_dtype (`torch.dtype`, defaults to float32): dtype of all that is trained.
            decoder_dtype (`torch.dtype` or `str`, defaults to `"auto"`): dtype of the frozen decoder, that of its
                checkpoint by default. bfloat16 is much faster than float32 where the processor has it.
            trust_remote_code (`bool`, defaults to False): run the code that comes with either of them.
            **config_kwargs: fields of [`ProtoGenConfig`].

        Raises:
            TypeError: if a field is none of the configuration's.
            ValueError: if the decoder cannot serve ([`check_decoder`]).
        """
        unknown = config_kwargs.keys() - {field.name for field in fields(cls.config_class)}
        if unknown:
            raise TypeError(f"{cls.config_class.__name__} has no {', '.join(sorted(unknown))}.")
        encoder = None
        if encoder_name_or_path is not None:
            cut = {} if encoder_num_layers is None else {"num_hidden_layers": encoder_num_layers}
            encoder = load_weights(
                AutoModel.from_pretrained,
                encoder_name_or_path,
                revision=encoder_revision,
                dtype=encoder_dtype,
                trust_remote_code=trust_remote_code,
                **cut,
            )
            config_kwargs["encoder_config"] = encoder.config.to_dict()
        decoder = load_weights(
            AutoModelForCausalLM.from_pretrained,
            decoder_name_or_path,
            revision=decoder_revision,
            dtype=decoder_dtype,
            trust_remote_code=trust_remote_code,
        )
        if "proto_token_std" not in config_kwargs:
            config_kwargs["proto_token_std"] = FITTED_SIZE * embedding_std(decoder)
        config = cls.config_class(
            decoder_config=decoder.config.to_dict(),
            # A folder is found again from elsewhere.
            decoder_name_or_path=os.path.abspath(decoder_name_or_path)
            if os.path.isdir(decoder_name_or_path)
            else decoder_name_or_path,
            decoder_revision=decoder_revision,
            decoder_fingerprint=fingerprint_if_exact(decoder),
            **config_kwargs,
        )
        return cls._from_config(config, encoder=encoder, decoder=decoder, dtype=encoder_dtype)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path,
        *model_args,
        decoder_name_or_path=None,
        encoder_name_or_path=None,
        decoder_kwargs=None,
        ignore_other_decoder=False,
        output_loading_info=False,
        **kwargs,
    ):
        """
        As [`PreTrainedModel.from_pretrained`], but what is not all there is refused. For a thin checkpoint the decoder
        is loaded from `config.decoder_name_or_path` at `config.decoder_revision`, as this model is: in the same
        dtype, with the same attention and the same `LOADING_OPTIONS`.

        Args:
            pretrained_model_name_or_path (`str`): Hub id or folder of the checkpoint.
            decoder_name_or_path (`str`, *optional*): load the decoder from here instead.
            encoder_name_or_path (`str`, *optional*): take the encoder's word embeddings from here, where the checkpoint
                is without them.
            decoder_kwargs (`dict`, *optional*): options of loading that decoder alone. `trust_remote_code` is one of
                them: what is given for this model does not run a decoder's code.
            ignore_other_decoder (`bool`, defaults to False): take a decoder whose weights are not those that the
                checkpoint was trained with.
            output_loading_info (`bool`, defaults to False): return what was missing as well.
            **kwargs: as in transformers: `dtype`, `revision`, `trust_remote_code` and others.

        Raises:
            OSError: if the decoder cannot be found.
            ValueError: if the checkpoint lacks weights or has others, or the decoder is not the one that it was trained
                with.
        """
        ignores_mismatches = kwargs.pop("ignore_mismatched_sizes", False)
        model, info = load_weights(
            super().from_pretrained,
            pretrained_model_name_or_path,
            *model_args,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            **kwargs,
        )
        config = model.config
        if config.encoder_name_or_path:
            model.take_word_embeddings(encoder_name_or_path or config.encoder_name_or_path)
            config.encoder_name_or_path = None  # From here on this model has them.
        check_complete(pretrained_model_name_or_path, info, ignores_mismatches)
        if model.decoder is None:
            name = decoder_name_or_path or config.decoder_name_or_path
            options = {key: kwargs[key] for key in LOADING_OPTIONS if key in kwargs}
            options |= {
                "attn_implementation": config.decoder_config._attn_implementation,
                "revision": None if decoder_name_or_path else config.decoder_revision,
                "dtype": kwargs.get("dtype") or model.dtype,
            }
            try:
                options |= decoder_kwargs or {}
                decoder = load_weights(AutoModelForCausalLM.from_pretrained, name, **options)
            except OSError as error:
                raise OSError(
                    f"{pretrained_model_name_or_path} is a thin checkpoint and its decoder {name!r} cannot be loaded; "
                    "pass decoder_name_or_path=... to load it from another place."
                ) from error
            model.attach_decoder(decoder, ignore_other_decoder)
        return (model, info) if output_loading_info else model

    def attach_decoder(self, decoder: PreTrainedModel, ignore_other_decoder: bool = False):
        """
        Attaches the frozen decoder to a model that was loaded without one.

        Args:
            decoder (`PreTrainedModel`)
            ignore_other_decoder (`bool`, defaults to False): take one of the same shape with other weights.

        Raises:
            ValueError: if its width, its vocabulary or its weights are not those that this model was trained with, or
                it cannot serve ([`check_decoder`]). Weights that are quantised, in float16 or not in memory are not
                compared.
        """
        found, expected = fingerprint_if_exact(decoder), self.config.decoder_fingerprint
        if found is None or found != expected:  # Otherwise it was checked when the model was made.
            check_decoder(decoder)
        found_config, expected_config = decoder.config.get_text_config(), self.config.decoder_text_config
        for field in ("model_type", "hidden_size", "vocab_size"):
            own, wanted = getattr(found_config, field), getattr(expected_config, field)
            if own != wanted:
                raise ValueError(
                    f"this model was trained for a decoder with {field}={wanted}"
                    f" ({self.config.decoder_name_or_path}); the one given has {field}={own}."
                )
        if not ignore_other_decoder and None not in (found, expected) and found != expected:
            raise ValueError(
                f"this model was trained for {self.config.decoder_name_or_path} (fingerprint {expected[:16]}) and the "
                f"decoder given, {decoder.name_or_path}, has other weights ({found[:16]}): give the one that it was "
                "trained with, or ignore_other_decoder=True to take this one."
            )
        self.decoder = decoder
        # What post_init gathers from the children.
        self.all_tied_weights_keys.update(
            {f"decoder.{k}": f"decoder.{v}" for k, v in decoder.all_tied_weights_keys.items()}
        )
        self._no_split_modules |= decoder._no_split_modules
        self._prepare_decoder()

    @property
    def word_embeddings_name(self) -> str:
        """The name among this model's weights of the encoder's word embeddings, which are frozen."""
        words = self.encoder.get_input_embeddings().weight
        return next(f"encoder.{name}" for name, parameter in self.encoder.named_parameters() if parameter is words)

    def take_word_embeddings(self, name: str) -> None:
        """
        Takes the encoder's word embeddings from another model.

        Args:
            name (`str`): Hub id or folder of an encoder.

        Raises:
            OSError: if there is no such model.
            ValueError: if they have another shape.
        """
        theirs = load_weights(AutoModel.from_pretrained, name).get_input_embeddings().weight
        words = self.encoder.get_input_embeddings().weight
        if theirs.shape != words.shape:
            raise ValueError(
                f"this model's encoder has {words.shape[0]} word embeddings of width {words.shape[1]}, and that of "
                f"{name}, where they are to come from, {theirs.shape[0]} of {theirs.shape[1]}."
            )
        with torch.no_grad():
            words.copy_(theirs)

    def save_pretrained(self, save_directory, *, thin=None, state_dict=None, save_original_format=False, **kwargs):
        """
        As [`PreTrainedModel.save_pretrained`], whose arguments it takes.

        Args:
            save_directory (`str` or `Path`)
            thin (`bool`, *optional*, defaults to `config.thin`): leave the frozen decoder out, and the word embeddings
                that are in `config.encoder_name_or_path`.

        Raises:
            ValueError: if a thin checkpoint is wanted but nothing says where the decoder comes from.
        """
        thin = self.config.thin if thin is None else thin
        if thin:
            if not self.config.decoder_name_or_path:
                raise ValueError("a thin checkpoint needs config.decoder_name_or_path, to find the decoder again.")
            state_dict = self.state_dict() if state_dict is None else state_dict
            left_out = ("decoder.", self.word_embeddings_name) if self.config.encoder_name_or_path else "decoder."
            state_dict = {name: tensor for name, tensor in state_dict.items() if not name.startswith(left_out)}
        elif self.decoder is None:
            raise ValueError("there is no decoder to save; attach one, or save with thin=True.")
        was_thin, self.config.thin = self.config.thin, thin
        try:
            super().save_pretrained(
                save_directory, state_dict=state_dict, save_original_format=save_original_format, **kwargs
            )
        finally:
            self.config.thin = was_thin

    def push_to_hub(
        self,
        repo_id: str,
        *,
        thin: bool | None = None,
        commit_message: str = "Upload model",
        private: bool | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        max_shard_size: int | str = "50GB",
    ) -> CommitInfo:
        """
        Uploads the model with its code, its generation config and, where the repository has none, a card.

        Args:
            repo_id (`str`): `org/name`, or `name` for one's own.
            thin (`bool`, *optional*, defaults to `config.thin`): leave the frozen decoder out.
            commit_message (`str`, defaults to `"Upload model"`)
            private (`bool`, *optional*): make a new repository private.
            revision (`str`, *optional*): branch, made if it is missing; `main` by default.
            token (`str` or `bool`, *optional*): the one that is logged in by default.
            max_shard_size (`int` or `str`, defaults to `"50GB"`): as in `save_pretrained`.

        Raises:
            ValueError: if others could not load the decoder that is left out ([`pin_decoder`]).
        """
        thin = self.config.thin if thin is None else thin
        hub = {"private": private, "token": token}
        if thin:
            pin_decoder(self.config, **hub)

        def write(folder, repo_id):
            self.save_pretrained(folder, thin=thin, max_shard_size=max_shard_size)
            if not HfApi(token=token).file_exists(repo_id, "README.md", revision=revision):
                model_card(self, repo_id, thin).save(folder / "README.md")

        return publish(write, repo_id, message=commit_message, replaces=MODEL_FILES, revision=revision, **hub)

    def get_input_embeddings(self) -> torch.nn.Module:
        """The encoder's; without an encoder the decoder's, which are frozen."""
        return self._reader().get_input_embeddings()

    def set_input_embeddings(self, value: torch.nn.Module) -> None:
        self._reader().set_input_embeddings(value)

    def resize_token_embeddings(self, *args, **kwargs):
        """Refused: word embeddings are frozen, so those of new tokens would never learn."""
        raise ValueError(
            "word embeddings are frozen: resize those of the encoder or decoder before the model is made of them."
        )

    def _reader(self) -> PreTrainedModel:
        if self.encoder is not None:
            return self.encoder
        self._check_decoder()
        return self.decoder

    def _prepare_decoder(self):
        if self.decoder is not None:
            keep_special_tokens(self.decoder)
            self.config.decoder_text_config.eos_token_id = self.decoder.config.get_text_config().eos_token_id
        if self.decoder is not None and self.slot_adapters is not None:
            self.slot_adapters.attach(self.decoder)
        self.fused: FusedDecoder | None = None
        self._freeze()

    def fuse_slot_adapters(self) -> None:
        """
        From now on, until it is trained on or gets another decoder, the model writes one-step answers with a second
        copy of the decoder's linear weights, the slot adapters in it. That is faster and takes as much memory again.
        Real tokens are still read by the decoder itself. Call it when the model is where it stays.

        Raises:
            ValueError: if the model has no slot adapters, or the decoder's weights are quantised.
            RuntimeError: if no decoder is attached.
        """
        self._check_decoder()
        if self.slot_adapters is None:
            raise ValueError("there are no slot adapters to fuse: the model has slot_adapter_rank=0.")
        sink_cache, sink = None, self._sink(1)
        if not self.config.decoder_sees_prompt and sink.numel():
            sink_cache, _ = read_prefix(self.decoder, sink, torch.ones_like(sink), [])
        self.fused = FusedDecoder(self.slot_adapters.fused(self.decoder), sink_cache)

    def _freeze(self):
        if self.decoder is not None:
            self.decoder.requires_grad_(False).eval()
        # Fine-tuning would move the vectors of the words that it sees away from those of all others.
        if self.encoder is not None:
            self.encoder.get_input_embeddings().requires_grad_(False)
        if self.config.m_scope == "fixed":
            self.proto_predictor.m_table.requires_grad_(False)

    def train(self, mode: bool = True):
        super().train(mode)
        # `from_pretrained` puts new parameters in place and ends here, in `eval()`.
        self._freeze()
        if mode:
            self.fused = None
        return self

    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, ProtoTokenPredictor):
            init.normal_(module.queries, std=0.02)
        elif isinstance(module, (ScaledLinear, ScaledEmbedding)):
            init.normal_(module.weight, std=module.init_std)

    def predict(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        decoder_prompt_ids: torch.LongTensor | None = None,
        decoder_prompt_mask: torch.Tensor | None = None,
        category_ids: torch.LongTensor | None = None,
        encoder_places: torch.LongTensor | None = None,
        durations: torch.LongTensor | None = None,
        longest: int | None = None,
    ) -> ProtoTokenPrediction:
        """
        The first half of `forward`, from the instruction to proto-tokens.

        Args:
            input_ids (`torch.LongTensor` of shape `(batch, source)`, *optional*): as in `forward`, and so are the next.
            attention_mask (`torch.Tensor` of shape `(batch, source)`, *optional*)
            decoder_prompt_ids (`torch.LongTensor` of shape `(batch, prompt)`, *optional*)
            decoder_prompt_mask (`torch.Tensor` of shape `(batch, prompt)`, *optional*)
            category_ids (`torch.LongTensor` of shape `(batch,)`, *optional*)
            encoder_places (`torch.LongTensor` of shape `(batch, prompt)`, *optional*)
            durations (`torch.LongTensor` of shape `(batch, prompt)`, *optional*)
            longest (`int`, *optional*): predicts the chunks that answers of so many tokens need; all by default.

        Raises:
            ValueError: if the inputs that the configuration asks for are missing.
        """
        cache, decoder_states, next_logits = None, None, None
        states, mask = self.encode(input_ids, attention_mask)
        reads_prompt = self.config.latent_source != "encoder" or self.config.aligns_encoder
        self._check_prompt(decoder_prompt_ids, reads_prompt)
        if self.config.aligns_encoder:
            if encoder_places is None:
                raise ValueError(
                    "latent_source=encoder with upsamples_prompt needs encoder_places; a processor with "
                    "aligns_encoder=True makes them."
                )
            states = states.gather(1, encoder_places[..., None].expand(-1, -1, states.shape[-1]))
            mask = decoder_prompt_mask
            decoder_states = self.decoder.get_input_embeddings()(decoder_prompt_ids)[:, :, None]
        if self.config.uses_decoder_states:
            prompt = decoder_prompt_ids, decoder_prompt_mask
            cache, decoder_states = self.read_prompt(*prompt, self.config.layers_read)
            if self.config.num_autoregressive_tokens:
                last = decoder_states[:, -1, -1, : self.config.decoder_dim].contiguous()
                next_logits = logits_of(self.decoder, last)
        prediction = self.proto_predictor(
            states, mask, decoder_states, decoder_prompt_mask, category_ids, durations, longest
        )
        return replace(prediction, prompt_cache=cache, next_logits=next_logits)

    def read_prompt(
        self, decoder_prompt_ids: torch.LongTensor, decoder_prompt_mask: torch.Tensor, layers: list[int]
    ) -> tuple[Cache, torch.Tensor | None]:
        """
        What the decoder has read of prompts, from the prompt store where there is one.

        Args:
            decoder_prompt_ids (`torch.LongTensor` of shape `(batch, prompt)`): padded on the left.
            decoder_prompt_mask (`torch.Tensor` of shape `(batch, prompt)`)
            layers (`list[int]`): hidden states that are wanted, 0 being the input embeddings.

        Returns:
            The cache of keys and values, and the states `(batch, prompt, layers, decoder_dim)`, None of no layers.
        """
        read = read_prefix if self.prompt_store is None else self.prompt_store
        return read(self.decoder, decoder_prompt_ids, decoder_prompt_mask, layers)

    def encode(
        self, input_ids: torch.LongTensor | None, attention_mask: torch.Tensor | None = None
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """
        The encoder's states `(batch, source, encoder_dim)` and their mask; None for a model without an encoder.

        Args:
            input_ids (`torch.LongTensor` of shape `(batch, source)`): in the encoder's vocabulary.
            attention_mask (`torch.Tensor` of shape `(batch, source)`, *optional*): all is text by default.

        Raises:
            ValueError: if there are no ids for the encoder.
        """
        if self.encoder is None:
            return None, None
        if input_ids is None:
            raise ValueError(f"latent_source={self.config.latent_source} needs input_ids; the processor makes them.")
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        groups = bucket_by_length(attention_mask)
        if len(groups) == 1:
            return self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state, attention_mask
        places = [(rows[:, None], attention_mask[rows].any(0).nonzero()[:, 0]) for rows, _ in groups]
        parts = [
            self.encoder(input_ids=input_ids[place], attention_mask=attention_mask[place]).last_hidden_state
            for place in places
        ]
        states = parts[0].new_zeros(*input_ids.shape, parts[0].shape[-1])
        for place, part in zip(places, parts, strict=True):
            states = states.index_put(place, part)
        return states, attention_mask

    def _check_decoder(self):
        if self.decoder is None:
            raise RuntimeError("no decoder is attached; load with from_pretrained, or call attach_decoder.")

    def _check_prompt(self, decoder_prompt_ids: torch.LongTensor | None, is_needed: bool):
        self._check_decoder()
        if is_needed and decoder_prompt_ids is None:
            raise ValueError("the decoder has to read the prompt: give decoder_prompt_ids; the processor makes them.")

    def decode(
        self,
        prediction: ProtoTokenPrediction,
        lengths: torch.LongTensor,
        decoder_prompt_ids: torch.LongTensor | None = None,
        decoder_prompt_mask: torch.Tensor | None = None,
        *,
        first_tokens: torch.LongTensor | None = None,
    ) -> torch.Tensor:
        """
        The second half of `forward`: logits `(answer_tokens, vocab)` of answers, one after the other.

        Args:
            prediction (`ProtoTokenPrediction`): from `predict`.
            lengths (`torch.LongTensor` of shape `(batch,)`): of the answers, in tokens.
            decoder_prompt_ids (`torch.LongTensor` of shape `(batch, prompt)`, *optional*): as in `forward`.
            decoder_prompt_mask (`torch.Tensor` of shape `(batch, prompt)`, *optional*)
            first_tokens (`torch.LongTensor` of shape `(batch,)`, *optional*): that the answers begin with, where the
                prompt has been read; the decoder's most likely by default.

        Raises:
            ValueError: if a length is impossible, or the decoder is to see a prompt and there is none.
            RuntimeError: if no decoder is attached.
        """
        self._check_prompt(decoder_prompt_ids, self.config.decoder_sees_prompt)
        if self.config.first_tokens == "drafts":
            raise ValueError(
                "this model drafts (first_tokens=drafts) and has learned no whole answers: write with mode=verified or "
                "adaptive, and give anchors where its logits are wanted."
            )
        if prediction.next_logits is None:
            first_tokens = None
        elif first_tokens is None:
            first_tokens = prediction.next_logits.argmax(-1)
        prompt = decoder_prompt_ids, decoder_prompt_mask
        return self.decode_layout(prediction, self.layout(lengths, prediction.e.shape[1]), *prompt, first_tokens)

    def layout(self, lengths: torch.LongTensor, num_chunks: int) -> Layout:
        """
        The slots of answers, as [`build_layout`].

        Args:
            lengths (`torch.LongTensor` of shape `(batch,)`): in tokens.
            num_chunks (`int`): chunks for which there are proto-tokens.
        """
        config = self.config
        return build_layout(lengths, config.arrangement, config.chunk_size, num_chunks, config.num_e_tokens)

    def longest_answers(self, num_tokens: torch.LongTensor) -> torch.LongTensor:
        """
        Tokens of the longest answers that the decoder has positions for.

        Args:
            num_tokens (`torch.LongTensor` of any shape): that stand before the answers.
        """
        config, num_slots = self.config, num_positions(self.decoder) - num_tokens
        return longest_answer(num_slots, config.arrangement, config.chunk_size, config.num_e_tokens)

    def decode_layout(
        self,
        prediction: ProtoTokenPrediction,
        layout: Layout,
        decoder_prompt_ids: torch.LongTensor | None = None,
        decoder_prompt_mask: torch.Tensor | None = None,
        first_tokens: torch.LongTensor | None = None,
        places: torch.LongTensor | None = None,
    ) -> torch.Tensor:
        """
        As `decode`, of answers that are laid out.

        Args:
            prediction (`ProtoTokenPrediction`): from `predict`.
            layout (`Layout`): from `layout`.
            decoder_prompt_ids (`torch.LongTensor` of shape `(batch, prompt)`, *optional*): as in `forward`.
            decoder_prompt_mask (`torch.Tensor` of shape `(batch, prompt)`, *optional*)
            first_tokens (`torch.LongTensor` of shape `(batch,)`, *optional*): as in `decode`.
            places (`torch.LongTensor` of shape `(places,)`, *optional*): slots to predict from, as in
                [`answer_logits`]; all that predict by default.
        """
        config, own, cache = self.config, self.config.num_autoregressive_tokens, prediction.prompt_cache
        slots = fill_slots(layout, prediction.e, prediction.m)
        prefix = decoder_prompt_ids, decoder_prompt_mask
        if not config.decoder_sees_prompt:
            prefix, own, cache = (self._sink(len(slots)), None), 0, None
        if first_tokens is not None:
            prefix = torch.cat([prefix[0], first_tokens[:, None]], dim=1), F.pad(prefix[1], (0, 1), value=1)
        if self.fused is None or own:
            return answer_logits(self.decoder, slots, layout, *prefix, own, cache, places)
        # Real tokens are read by the decoder as it is.
        if self.fused.sink_cache is not None:
            cache = copied_cache(self.fused.sink_cache)
            cache.batch_repeat_interleave(len(slots))
        elif config.decoder_sees_prompt and cache is None:
            cache = self.read_prompt(*prefix, [])[0]
        return answer_logits(self.fused.decoder, slots, layout, *prefix, own, cache, places)

    def _sink(self, batch: int) -> torch.LongTensor:
        return sink_ids(self.config.decoder_config, self.config.sink, batch, self.device)

    def draft_behind(
        self,
        prediction: ProtoTokenPrediction,
        decoder_prompt_ids: torch.LongTensor,
        decoder_prompt_mask: torch.Tensor,
        labels: torch.LongTensor,
        anchors: torch.LongTensor,
    ) -> torch.Tensor:
        """
        Logits `(drafted_tokens, vocab)` of drafts of `config.draft_length` tokens at many places of given answers:
        where [`labels_behind`] has tokens.

        Args:
            prediction (`ProtoTokenPrediction`): from `predict`.
            decoder_prompt_ids (`torch.LongTensor` of shape `(batch, prompt)`): as in `forward`, and so are the next.
            decoder_prompt_mask (`torch.Tensor` of shape `(batch, prompt)`)
            labels (`torch.LongTensor` of shape `(batch, length)`)
            anchors (`torch.LongTensor` of shape `(batch, anchors)`)
        """
        self._check_prompt(decoder_prompt_ids, True)
        size, drafter = self.config.draft_length, Drafter(self, prediction)
        prompt = decoder_prompt_ids, decoder_prompt_mask
        states = states_behind(self.decoder, *prompt, labels, anchors, drafter.slots(size))
        is_drafted = labels_behind(labels, anchors, size) != IGNORE_INDEX
        states = states[:, :, drafter.places(size)].flatten(0, 1)[is_drafted]
        if self.coherence is not None:
            before = labels_behind(labels, anchors - 1, size).clamp_min(0)
            states = self.coherence(states, unseen(self.decoder.get_input_embeddings()(before))[is_drafted])
        return logits_of(self.decoder, states)

    def clamp_lengths(self, lengths: torch.Tensor) -> torch.LongTensor:
        """
        Rounds lengths to the whole numbers that an answer can have.

        Args:
            lengths (`torch.FloatTensor` of any shape): in tokens.

        Raises:
            ValueError: if one is NaN.
        """
        if lengths.isnan().any():
            raise ValueError("a predicted length is NaN: the model's weights are damaged; load it again.")
        return lengths.round().clamp(1, self.config.max_answer_length).long()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        decoder_prompt_ids: torch.LongTensor | None = None,
        decoder_prompt_mask: torch.Tensor | None = None,
        category_ids: torch.LongTensor | None = None,
        labels: torch.LongTensor | None = None,
        length_labels: torch.LongTensor | None = None,
        first_tokens: torch.LongTensor | None = None,
        durations: torch.LongTensor | None = None,
        encoder_places: torch.LongTensor | None = None,
        anchors: torch.LongTensor | None = None,
        return_loss: bool = True,
        return_logits: bool = True,
    ) -> ProtoGenOutput:
        """
        Args:
            input_ids (`torch.LongTensor` of shape `(batch, source)`, *optional*): instruction, in the encoder's
                vocabulary; not needed where latents come from the decoder alone.
            attention_mask (`torch.Tensor` of shape `(batch, source)`, *optional*)
            decoder_prompt_ids (`torch.LongTensor` of shape `(batch, prompt)`, *optional*):
                Prompt in the decoder's vocabulary, padded on the left; used with `decoder_sees_prompt`.
            decoder_prompt_mask (`torch.Tensor` of shape `(batch, prompt)`, *optional*)
            category_ids (`torch.LongTensor` of shape `(batch,)`, *optional*): for `m_scope="per_category"`.
            labels (`torch.LongTensor` of shape `(batch, length)`, *optional*):
                Answer in the decoder's vocabulary, -100 where it has ended. Without labels the answer has its
                predicted length.
            length_labels (`torch.LongTensor` of shape `(batch,)`, *optional*):
                True lengths in tokens, where `labels` are cut; by default the length of `labels`.
            first_tokens (`torch.LongTensor` of shape `(batch,)`, *optional*):
                First token of each answer, by default the decoder's most likely, if `num_autoregressive_tokens` is 2.
            durations (`torch.LongTensor` of shape `(batch, prompt)`, *optional*): with `upsamples_prompt`, the answer's
                tokens that each of the prompt's accounts for, or -100 in all of a row; the most likely by default.
            encoder_places (`torch.LongTensor` of shape `(batch, prompt)`, *optional*): with `upsamples_prompt` and
                `latent_source="encoder"`, the number in `input_ids` of the token that each of the prompt's takes its
                state from.
            anchors (`torch.LongTensor` of shape `(batch, anchors)`, *optional*): numbers of the labels' tokens after
                which drafts begin. Then `answer_logits` are those of the drafts' tokens, in the order of
                [`labels_behind`], and there are no losses.
            return_loss (`bool`, defaults to True): whether to compute the losses when there are labels.
            return_logits (`bool`, defaults to True): whether to run the decoder at all. What compares proto-tokens
                themselves, or lengths, needs neither logits nor the losses.
        """
        if decoder_prompt_ids is not None and decoder_prompt_mask is None:
            decoder_prompt_mask = torch.ones_like(decoder_prompt_ids)
        prompt = decoder_prompt_ids, decoder_prompt_mask
        longest = None if labels is None or anchors is not None else labels.shape[1]
        prediction = self.predict(input_ids, attention_mask, *prompt, category_ids, encoder_places, durations, longest)
        # In training a prompt that is read apart has no backward pass; without gradients one joined pass is faster.
        reads_apart = torch.is_grad_enabled() or self.prompt_store is not None
        reads_apart &= anchors is None and self.config.decoder_sees_prompt and prediction.prompt_cache is None
        if return_logits and reads_apart:
            self._check_prompt(decoder_prompt_ids, True)
            prediction = replace(prediction, prompt_cache=self.read_prompt(*prompt, [])[0])
        mean, variance = prediction.log_length_mean, prediction.log_length_variance
        lengths = self.clamp_lengths(mean.exp()) if labels is None else (labels != IGNORE_INDEX).sum(-1)
        logits = None
        if return_logits and anchors is not None:
            logits = self.draft_behind(prediction, *prompt, labels, anchors)
        elif return_logits:
            logits = self.decode(prediction, lengths, *prompt, first_tokens=first_tokens)
        output = ProtoGenOutput(
            answer_logits=logits,
            e=prediction.e,
            m=prediction.m,
            log_length_mean=mean,
            log_length_variance=variance,
            error_mean=prediction.error_mean,
            error_variance=prediction.error_variance,
            duration_logits=prediction.duration_logits,
            lengths=lengths,
            prompt_cache=prediction.prompt_cache,
        )
        if labels is not None and anchors is None and return_loss and return_logits:
            output.reconstruction_loss = reconstruction_loss(logits, labels)
            output.length_nll = length_nll(mean, variance, lengths if length_labels is None else length_labels)
            output.error_nll = error_nll(output.error_mean, output.error_variance, logits, labels)
            terms = {"reconstruction": output.reconstruction_loss}
            terms |= {"length_nll": output.length_nll, "error_nll": output.error_nll}
            if durations is not None:
                output.duration_nll = duration_nll(output.duration_logits, durations, decoder_prompt_mask)
                terms["duration"] = output.duration_nll
            output.loss = sum(LOSS_WEIGHTS[name] * term for name, term in terms.items())
        return output


def check_complete(name: str, info: dict, ignores_mismatches: bool) -> None:
    """
    Args:
        name (`str`): of the checkpoint.
        info (`dict`): what `from_pretrained` says of loading it.
        ignores_mismatches (`bool`): whether weights of other shapes may stay as they are drawn.

    Raises:
        ValueError: if weights are missing or have other shapes, which would be drawn at random, or are of no use.
    """
    # An encoder's or a decoder's own checkpoint may hold more than the model needs.
    ours = {key for key in info["unexpected_keys"] if not key.startswith(("encoder.", "decoder."))}
    shapes = set() if ignores_mismatches else {key for key, *_ in info["mismatched_keys"]}
    found = {"lacks": info["missing_keys"], "has in other shapes": shapes, "has beyond its configuration": ours}
    wrong = [f"{what} {listed(sorted(keys))}" for what, keys in found.items() if keys]
    if wrong:
        raise ValueError(
            f"the weights and the configuration of {name} do not go together: it {' and '.join(wrong)}; "
            "get the whole checkpoint again, or save it again."
        )


def listed(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


ProtoGenForConditionalGeneration.register_for_auto_class("AutoModel")
