import pytest

from modeling_protogen import ProtoGenConfig

ENCODER = {"model_type": "bert", "hidden_size": 32}
DECODER = {"model_type": "llama", "hidden_size": 16, "num_attention_heads": 2, "bos_token_id": 1, "eos_token_id": 2}


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
        ({"arrangement": "e_only", "m_position_offsets": True}, "e_only has no m"),
        ({"m_scope": "per_category"}, "categories must be given"),
        ({"categories": ["a"]}, "categories must be given with m_scope=per_category, and only then"),
        ({"decoder_sees_prompt": True, "sink": "none"}, "sink=none contradicts it"),
        ({"decoder": {"bos_token_id": None}}, "sink=bos needs a decoder with a bos_token_id"),
        ({"num_pooling_heads": 5}, "does not divide the width 32"),
        ({"latent_source": "both"}, "latent_source=both needs the prompt in the decoder"),
        ({"latent_source": "teacher"}, "latent_source='teacher' is not one of"),
        ({"latent_dim": 0}, "latent_dim=0 must be at least 1"),
        ({"uncertainty_score": "guess"}, "uncertainty_score='guess' is not one of"),
        ({"proto_token_noise": -0.1}, "must not be negative"),
        ({"log_length_variance_range": (1.0, 1.0)}, "is empty"),
    ],
)
def test_impossible_combinations_are_one_clear_error(fields, message):
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        config(**fields)
