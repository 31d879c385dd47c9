"""What the commands that learn can be told, and what they make of it first."""

import re
from dataclasses import dataclass, field, fields
from pathlib import Path

from accelerate import Accelerator

from modeling_protogen import ProtoGenConfig, ProtoGenProcessor
from modeling_protogen.configuration_protogen import FIRST_TOKENS, LATENT_SOURCES
from modeling_protogen.frozen_decoder import decoder_fingerprint
from modeling_protogen.processing_protogen import ANSWER_FORMATS

from .devices import fastest_dtype
from .embedded import resolve
from .proto_bank import BankInfo
from .training_args import ProtoGenTrainingArguments


def config_field(name: str, **metadata):
    """A field of [`ProtoGenConfig`] as an argument: its default, and its entry in the docstring as help."""
    default = next(known.default for known in fields(ProtoGenConfig) if known.name == name)
    entry = re.search(rf"\n        {name} \(.*?\): (.*?)(?=\n        \w|\n\n)", ProtoGenConfig.__doc__, re.DOTALL)
    text = " ".join(re.sub(r"[`\[\]]", "", entry[1]).split())
    return field(default=default, metadata={"help": text[0].upper() + text[1:], **metadata})


@dataclass
class BankArguments:
    """The bank that is fitted, or learned from."""

    bank: str | None = field(default=None, metadata={"help": "Folder of the bank; OUTPUT_DIR/bank by default."})

    def folder(self, output_dir: str | Path) -> Path:
        return Path(self.bank or Path(output_dir) / "bank")


@dataclass
class FitInputArguments:
    """What a fit starts from."""

    fit_num_validation: int = field(
        default=0, metadata={"help": "Held-out answers to fit as well, for retrieval among them."}
    )
    refit_damaged: bool = field(default=False, metadata={"help": "Remove damaged shards and fit their texts again."})
    warm_start: str | None = field(
        default=None, metadata={"help": "Trained model whose predictions the fit starts from; random by default."}
    )
    warm_start_reads_text: bool = field(
        default=False,
        metadata={"help": "The warm start's model reads what is fitted, as one trained on targets: self does."},
    )
    fixed_m: str | None = field(
        default=None, metadata={"help": "Safetensors file with the vector `m` (dim,) for m_scope=fixed."}
    )


@dataclass
class MeaningArguments:
    """What meaning is measured by."""

    sentence_encoder: str = field(
        default="sentence-transformers/all-MiniLM-L6-v2", metadata={"help": "Judges what texts mean."}
    )


@dataclass
class TrainInputArguments(MeaningArguments):
    """What training starts from."""

    start_from: str | None = field(
        default=None, metadata={"help": "Model of an earlier run whose trained weights training starts from."}
    )
    prompt_store: str | None = field(
        default=None,
        metadata={
            "help": "Folder in which training keeps what the decoder has read of prompts, for later epochs and other "
            "runs, at 24 KB a token of prompt for SmolLM2-135M; none by default."
        },
    )


@dataclass
class TargetArguments:
    """What the encoder learns to answer, and to which instructions."""

    targets: str = field(
        default="human",
        metadata={
            "help": "Answers: the data's, the frozen decoder's, both, or the instruction itself, to be written back "
            "(amortised fitting).",
            "choices": ["human", "teacher", "both", "self"],
        },
    )
    instructions: str = field(
        default="data",
        metadata={
            "help": "Instructions to train on: the data's, those that the decoder writes itself, or both. Validation "
            "instructions are always the data's.",
            "choices": ["data", "synthetic", "both"],
        },
    )
    num_synthetic: int = field(default=10_000, metadata={"help": "Instructions that the decoder writes."})
    teacher_answers: str | None = field(
        default=None, metadata={"help": "Folder of the teacher's answers; OUTPUT_DIR/teacher by default."}
    )
    teacher_max_length: int = field(default=64, metadata={"help": "Tokens at which the teacher's answers are cut."})
    teacher_batch_size: int = field(default=32, metadata={"help": "Instructions that the teacher answers at once."})

    def __post_init__(self):
        if self.instructions != "data" and self.targets in ("human", "self"):
            raise ValueError("synthetic instructions have teacher answers only: set targets to teacher or both.")


@dataclass
class ModelArguments:
    """The model; names are Hub ids, folders or `embedded:` names. Fields as in `ProtoGenConfig`."""

    encoder: str = field(default="roberta-base", metadata={"help": "Encoder."})
    encoder_revision: str | None = field(default=None, metadata={"help": "Hub revision of the encoder."})
    encoder_num_layers: int | None = field(
        default=None, metadata={"help": "Takes the encoder's first layers only; all by default."}
    )
    decoder: str = field(default="EleutherAI/pythia-160m", metadata={"help": "Frozen decoder."})
    decoder_revision: str | None = field(default=None, metadata={"help": "Hub revision of the decoder."})
    decoder_dtype: str = field(
        default="bfloat16",
        metadata={
            "help": "dtype of the decoder's weights; auto is bfloat16 where the processor computes in it, float32 "
            "elsewhere, where bfloat16 takes several times as long.",
            "choices": ["auto", "bfloat16", "float16", "float32"],
        },
    )
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Run the code that comes with encoder or decoder; give their revisions too."}
    )
    arrangement: str = config_field("arrangement")
    num_e_tokens: int = config_field("num_e_tokens")
    chunk_size: int = config_field("chunk_size")
    max_chunks: int = config_field("max_chunks")
    max_answer_length: int | None = config_field("max_answer_length")
    m_scope: str = config_field("m_scope")
    sink: str = config_field("sink")
    latent_source: str = config_field("latent_source", choices=list(LATENT_SOURCES))
    decoder_layers_read: list[int] | None = config_field("decoder_layers_read")  # noqa: RUF009
    upsamples_prompt: bool = config_field("upsamples_prompt")
    predictor_dim: int = config_field("predictor_dim")
    predictor_dropout: float = config_field("predictor_dropout")
    num_source_layers: int = config_field("num_source_layers")
    num_query_layers: int = config_field("num_query_layers")
    first_tokens: str | None = field(
        default=None,
        metadata={
            "help": "Who writes an answer's first tokens after a prompt: slots or decoder; drafts go on anywhere. "
            "By default drafts with num_anchors, the decoder for the teacher's answers, which are its own, and slots "
            "for others.",
            "choices": list(FIRST_TOKENS),
        },
    )
    slot_adapter_rank: int = config_field("slot_adapter_rank")
    slot_adapter_modules: list[str] | None = config_field("slot_adapter_modules")  # noqa: RUF009
    coherence_dim: int = config_field("coherence_dim")
    decoder_sees_prompt: bool = config_field("decoder_sees_prompt")
    encoder_lora_rank: int = field(
        default=0, metadata={"help": "Trains low-rank adapters in the encoder instead of its weights; 0 = none."}
    )
    max_input_length: int | None = field(default=None, metadata={"help": "The encoder's window in tokens."})
    max_prompt_length: int = field(default=1024, metadata={"help": "Longest prompt in decoder tokens."})
    prompt_template: str | None = field(
        default=None, metadata={"help": "Holds {message}; the decoder's chat template by default."}
    )
    answer_format: str = field(
        default="text",
        metadata={
            "help": "key_value_lines: answers are flat JSON objects of strings, written as lines.",
            "choices": list(ANSWER_FORMATS),
        },
    )
    thin: bool = field(default=True, metadata={"help": "Save checkpoints without the frozen decoder."})

    def __post_init__(self):
        if self.decoder_dtype == "auto":
            self.decoder_dtype = fastest_dtype()

    @property
    def uses_encoder(self) -> bool:
        return self.latent_source in ("encoder", "both")

    @property
    def aligns_encoder(self) -> bool:
        return self.latent_source == "encoder" and self.upsamples_prompt


def bank_info(model_args: ModelArguments, decoder) -> BankInfo:
    return BankInfo(
        decoder=model_args.decoder,
        decoder_revision=model_args.decoder_revision,
        decoder_fingerprint=decoder_fingerprint(decoder),
        arrangement=model_args.arrangement,
        chunk_size=model_args.chunk_size,
        num_e_tokens=model_args.num_e_tokens,
        m_scope=model_args.m_scope,
        sink=model_args.sink,
        dim=decoder.get_input_embeddings().embedding_dim,
    )


def open_accelerator(args: ProtoGenTrainingArguments) -> Accelerator:
    """The processes, and where asked a tracker that writes to OUTPUT_DIR."""
    accelerator = Accelerator(cpu=args.use_cpu, log_with=args.report_to or None, project_dir=args.output_dir)
    accelerator.init_trackers("fit")
    return accelerator


def load_processor(model_args: ModelArguments, max_answer_length: int) -> ProtoGenProcessor:
    return ProtoGenProcessor.from_encoder_decoder_pretrained(
        resolve(model_args.encoder) if model_args.uses_encoder else None,
        resolve(model_args.decoder),
        encoder_revision=model_args.encoder_revision,
        decoder_revision=model_args.decoder_revision,
        trust_remote_code=model_args.trust_remote_code,
        max_input_length=model_args.max_input_length,
        max_prompt_length=model_args.max_prompt_length,
        max_answer_length=max_answer_length,
        aligns_encoder=model_args.aligns_encoder,
        prompt_template=model_args.prompt_template,
        answer_format=model_args.answer_format,
    )
