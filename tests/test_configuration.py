import re
from dataclasses import fields

import pytest

from modeling_protogen import ProtoGenConfig
from trainers.arguments import ModelArguments

ENCODER = {"model_type": "bert", "hidden_size": 32}
DECODER = {"model_type": "llama", "hidden_size": 16, "num_attention_heads": 2, "bos_token_id": 1, "eos_token_id": 2}
DECODER["num_hidden_layers"] = 4
DECODER_SOURCE = {"decoder_sees_prompt": True, "latent_source": "decoder"}


def config(**fields):
    return ProtoGenConfig(
        encoder_config=dict(ENCODER), decoder_config=dict(DECODER) | fields.pop("decoder", {}), **fields
    )


def test_defaults_and_round_trip(tmp_path):
    built = config(chunk_size=16, max_chunks=2)
    assert built.max_answer_length == 32
    built.save_pretrained(tmp_path)
    again = ProtoGenConfig.from_pretrained(tmp_path)
    assert again.to_dict() == built.to_dict()
    assert (again.encoder_config.hidden_size, again.decoder_config.hidden_size) == (32, 16)


def test_there_is_no_model_by_default(tmp_path):
    with pytest.raises(ValueError, match="decoder_config is missing"):
        ProtoGenConfig()
    with pytest.raises(ValueError, match="decoder_config has no model_type"):
        ProtoGenConfig(latent_source="none", decoder_sees_prompt=True, decoder_config={"hidden_size": 16})
    with pytest.raises(ValueError, match="encoder_config is missing"):
        ProtoGenConfig(decoder_config=dict(DECODER))
    assert ProtoGenConfig(decoder_config=dict(DECODER), latent_source="decoder").encoder_config is None
    with pytest.raises(OSError, match=r"has no config\.json"):
        ProtoGenConfig.from_pretrained(tmp_path)


def test_eos_and_pad_come_from_the_decoder():
    assert config(decoder={"eos_token_id": [2, 7]}, eos_token_id=99).eos_token_ids == [2, 7]
    assert config(decoder={"eos_token_id": [2, 7]}).answer_pad_token_id == 2
    assert config(decoder={"pad_token_id": 5}, pad_token_id=99).answer_pad_token_id == 5
    assert config(decoder={"eos_token_id": None}).eos_token_ids == []


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"arrangement": "m_e"}, "arrangement='m_e' is not one of e_m, e_mN"),
        ({"sink": "pad"}, "sink='pad' is not one of"),
        ({"m_scope": "global"}, "m_scope='global' is not one of"),
        ({"chunk_size": 0}, "chunk_size=0 must be at least 1"),
        ({"max_answer_length": 0}, "max_answer_length=0 must be at least 1"),
        ({"chunk_size": 8, "max_chunks": 2, "max_answer_length": 17}, "does not fit in max_chunks=2 chunks"),
        ({"arrangement": "interleaved", "num_e_tokens": 2}, "num_e_tokens=2 needs arrangement e_m or e_mN"),
        ({"arrangement": "e_only", "m_scope": "shared"}, "e_only has no m"),
        ({"m_scope": "per_category"}, "categories must be given"),
        ({"categories": ["a"]}, "categories must be given with m_scope=per_category, and only then"),
        ({"decoder_sees_prompt": True, "sink": "none"}, "sink=none contradicts it"),
        ({"decoder": {"bos_token_id": None}}, "sink=bos needs a decoder with a bos_token_id"),
        ({"predictor_dim": 96}, "predictor_dim=96 must be a multiple of 64"),
        ({"predictor_dim": 0}, "predictor_dim=0 must be a multiple of 64"),
        ({"num_query_layers": -1}, "num_query_layers=-1 must not be negative"),
        ({"slot_adapter_rank": -1}, "slot_adapter_rank=-1 must not be negative"),
        ({"first_tokens": "prompt"}, "first_tokens='prompt' is not one of slots, decoder, drafts"),
        (DECODER_SOURCE | {"decoder_layers_read": [0, 5]}, r"decoder_layers_read=\[0, 5\] must lie in 0..4"),
        (DECODER_SOURCE | {"decoder_layers_read": [-1]}, r"decoder_layers_read=\[-1\] must lie in 0..4"),
        (DECODER_SOURCE | {"decoder_layers_read": [1], "upsamples_prompt": True}, "upsamples_prompt needs"),
        ({"upsamples_prompt": True, "latent_source": "none", "decoder_sees_prompt": True}, "latent_source=encoder, or"),
        (DECODER_SOURCE | {"decoder_layers_read": [1], "first_tokens": "decoder"}, "needs the last layer, 4"),
        ({"latent_source": "none"}, "latent_source=none lets the instruction speak through the prompt alone"),
        ({"latent_source": "teacher"}, "latent_source='teacher' is not one of"),
        ({"uncertainty_score": "guess"}, "uncertainty_score='guess' is not one of"),
        ({"log_length_variance_range": (1.0, 1.0)}, "is empty"),
    ],
)
def test_impossible_combinations_are_one_clear_error(fields, message):
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        config(**fields)


@pytest.mark.parametrize(
    ("fields", "layers"),
    [
        ({}, []),
        (DECODER_SOURCE, [0, 2, 4]),
        ({"latent_source": "decoder"}, [0, 2, 4]),
        (DECODER_SOURCE | {"latent_source": "both", "decoder_layers_read": [4, 1, 1]}, [1, 4]),
        ({"decoder_sees_prompt": True, "latent_source": "none", "decoder_layers_read": [1]}, []),
        ({"decoder_sees_prompt": True, "upsamples_prompt": True}, []),
    ],
    ids=str,
)
def test_layers_that_are_read(fields, layers):
    assert config(**fields).layers_read == layers


@pytest.mark.parametrize(("latent_source", "own"), [("encoder", 1), ("none", 1), ("decoder", 2), ("both", 2)])
def test_own_tokens_are_the_decoders_where_it_writes_first(latent_source, own):
    seen = {"decoder_sees_prompt": True, "latent_source": latent_source}
    assert config(**seen).num_autoregressive_tokens == 0
    assert config(**seen, first_tokens="decoder").num_autoregressive_tokens == own
    if latent_source != "none":
        assert config(latent_source=latent_source, first_tokens="decoder").num_autoregressive_tokens == 0


def test_without_a_source_nothing_reads_one():
    built = config(decoder_sees_prompt=True, latent_source="none")
    assert (built.num_source_layers, built.num_query_layers) == (0, 0)


def test_the_command_line_has_the_configurations_defaults():
    """But for what the command line decides by the targets, and checkpoints that it writes thin."""
    found = {field.name: field.default for field in fields(ModelArguments)}
    expected = {field.name: field.default for field in fields(ProtoGenConfig) if field.name in found}
    assert {name for name in expected if found[name] != expected[name]} == {"first_tokens", "thin"}


def test_every_field_is_described_with_its_default():
    described = dict(re.findall(r"\n        (\w+) \((.*?)\):", ProtoGenConfig.__doc__, re.DOTALL))
    own = {f.name: f.default for f in fields(ProtoGenConfig) if f.name in ProtoGenConfig.__annotations__}
    # Tied inside the decoder, where its own configuration says so.
    assert described.keys() == own.keys() - {"tie_word_embeddings"}
    for name, entry in described.items():
        default = own[name]
        expected = f'"{default}"' if isinstance(default, str) else str(default)
        assert ("*optional*" if default is None else f"defaults to {expected}") in entry.replace("`", ""), name
