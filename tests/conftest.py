"""Tiny random models and tokenizers, built here: the tests need no network and no pretrained weights."""

import contextlib
import hashlib
import os
import tempfile
from pathlib import Path

# Before transformers is imported: the tests neither read nor write a person's cache.
os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="protogen-tests-")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest
import torch
from accelerate import debug_launcher
from accelerate.state import AcceleratorState
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoModelForCausalLM,
    BertModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
)

from modeling_protogen import ProtoGenForConditionalGeneration, ProtoGenProcessor

torch.set_num_threads(1)

WORDS = """
the a cat dog bird sat ran flew on under mat tree who what where is was it name three animals color red blue green tell
me about context long short answer one two paris france capital of sky and
""".split()
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<bos> ' + message['content'] + ' <eos> ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'answer' }}{% endif %}"
)


def word_tokenizer(special: list[str], **kwargs) -> PreTrainedTokenizerFast:
    vocabulary = {word: index for index, word in enumerate([*special, *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=special[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    if "[CLS]" in special:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]",
            pair="[CLS] $A [SEP] $B [SEP]",
            special_tokens=[("[CLS]", vocabulary["[CLS]"]), ("[SEP]", vocabulary["[SEP]"])],
        )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **kwargs)


def save_encoder(folder: Path, model_class=BertModel, max_position_embeddings: int = 32) -> Path:
    tokenizer = word_tokenizer(
        ["[UNK]", "[PAD]", "[CLS]", "[SEP]"],
        unk_token="[UNK]",
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_max_length=32,
    )
    torch.manual_seed(1)
    config = model_class.config_class(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=max_position_embeddings,
        pad_token_id=1,
    )
    model_class(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def encoder_dir(tmp_path_factory) -> Path:
    return save_encoder(tmp_path_factory.mktemp("encoder"))


def save_decoder(folder: Path, kind: str, hidden_size: int = 24) -> Path:
    tokenizer = word_tokenizer(
        ["<unk>", "<bos>", "<eos>"],
        unk_token="<unk>",
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<eos>",
        chat_template=CHAT_TEMPLATE if kind == "llama" else None,
    )
    torch.manual_seed(2)
    common = {
        "vocab_size": len(tokenizer),
        "hidden_size": hidden_size,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "initializer_range": 0.3,
    }
    if kind == "llama":
        model = LlamaForCausalLM(LlamaConfig(**common, num_key_value_heads=2, tie_word_embeddings=True))
    elif kind == "mistral":
        model = MistralForCausalLM(MistralConfig(**common, num_key_value_heads=2, sliding_window=4))
    else:
        model = GPTNeoXForCausalLM(GPTNeoXConfig(**common, tie_word_embeddings=False))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session", params=["llama", "neox"])
def decoder_dir(request, tmp_path_factory) -> Path:
    """A random tied Llama with a chat template, and a random GPTNeoX without."""
    return save_decoder(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="session")
def llama_dir(tmp_path_factory) -> Path:
    return save_decoder(tmp_path_factory.mktemp("llama"), "llama")


@pytest.fixture
def decoder(llama_dir):
    return AutoModelForCausalLM.from_pretrained(llama_dir)


@pytest.fixture(scope="session")
def build(encoder_dir):
    """Builds a model and its processor: `build(decoder_dir, **config_fields)`."""

    def build(decoder_dir, **fields):
        torch.manual_seed(0)
        fields = {"chunk_size": 8, "predictor_dim": 64, "num_source_layers": 1, "num_query_layers": 1} | fields
        encoder = None if fields.get("latent_source") in ("decoder", "none") else str(encoder_dir)
        model = ProtoGenForConditionalGeneration.from_encoder_decoder_pretrained(
            encoder, str(decoder_dir), **fields
        ).eval()
        processor = ProtoGenProcessor.from_encoder_decoder_pretrained(
            encoder,
            str(decoder_dir),
            max_answer_length=model.config.max_answer_length,
            aligns_encoder=model.config.aligns_encoder,
        )
        return model, processor

    return build


def in_two_processes(function, *arguments) -> str:
    """
    As `accelerate launch` starts them, but forked from this process, which has imported everything already; returns
    what they print.
    """

    def run():
        AcceleratorState._reset_state(reset_partial_state=True)
        rank = str(torch.distributed.get_rank())
        os.environ |= {"RANK": rank, "LOCAL_RANK": rank}
        with Path(folder, rank).open("w") as out, contextlib.redirect_stdout(out):
            function(*arguments)

    with tempfile.TemporaryDirectory() as folder:
        debug_launcher(run)
        return "".join(path.read_text() for path in Path(folder).iterdir())


def set_dropout(model, p):
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = p
        elif isinstance(module, torch.nn.MultiheadAttention):
            module.dropout = p


def coherent(coherence, state, tokens):
    """A state `(dim,)` moved by the embeddings of the tokens since the text, the last of them first."""
    x, *known = ((v / (v.pow(2).mean() + torch.finfo(v.dtype).eps).sqrt()) for v in (state, *tokens))
    h = coherence.of_state.weight @ x + coherence.of_state.bias
    for part, y in zip(coherence.of_tokens.weight.split(len(state), dim=1), known, strict=False):
        h = h + part @ y
    return state + coherence.out.weight @ (h * torch.sigmoid(h))


def stir_slot_adapters(model):
    """Fresh ones add nothing; nor does a fresh coherence."""
    if model.slot_adapters is not None:
        for low_rank in model.slot_adapters.maps.values():
            torch.nn.init.normal_(low_rank.up.weight, std=0.2)
    if model.coherence is not None:
        torch.nn.init.normal_(model.coherence.out.weight, std=0.5)


class AdaptedFrom(torch.nn.Module):
    """A linear layer that adds a low-rank map of its input from a position on."""

    def __init__(self, layer, low_rank):
        super().__init__()
        self.layer, self.low_rank, self.start = layer, low_rank, 0

    def forward(self, x):
        y = self.layer(x)
        added = x[:, self.start :] @ self.low_rank.down.weight.T @ self.low_rank.up.weight.T
        return torch.cat([y[:, : self.start], y[:, self.start :] + added], dim=1)


def adapted_decoder(model):
    """The decoder that the model came from, its linear layers changed by hand; and those layers."""
    decoder, layers = AutoModelForCausalLM.from_pretrained(model.config.decoder_name_or_path), []
    if model.slot_adapters is not None:
        for key, low_rank in model.slot_adapters.maps.items():
            parent, _, name = key.replace("-", ".").rpartition(".")
            layers.append(AdaptedFrom(decoder.base_model.get_submodule(f"{parent}.{name}"), low_rank))
            setattr(decoder.base_model.get_submodule(parent), name, layers[-1])
    return decoder, layers


def weights_hash(module: torch.nn.Module) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(name.encode() + tensor.detach().float().numpy().tobytes())
    return digest.hexdigest()


INSTRUCTIONS = ["who sat on the mat", "what color is the sky", "name three animals"]
CONTEXTS = [None, "the sky was red and blue", None]
# Where positions cost nothing, drafts are as long and as wide as they may be.
FREE = {"position_cost": 0.0, "slots_cost": 0.0}
ANSWERS = ["the cat sat on the mat", "blue", "cat dog and bird"]
