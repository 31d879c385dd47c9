"""Whatever is put in is taken as it is, or refused in a sentence. Hypothesis searches, the same way each time."""

import shutil
import string

import pytest
import torch
import yaml
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from eval_tasks.recipes import SHARED, RecipeParser, read_recipe
from modeling_protogen import ProtoGenConfig
from trainers.bank_dataset import describe
from trainers.proto_bank import BankEntry, BankInfo, ProtoTokenBank

FEW = settings(
    max_examples=20,
    deadline=None,
    derandomize=True,
    phases=[Phase.generate],
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
PLAIN = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
ANY = st.recursive(PLAIN, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(PLAIN, inner, max_size=3))
OWN_KEYS = st.sampled_from(["chunk_size", "losses", "data", "context_field", "learning_rate", "decoder_layers_read"])


@pytest.fixture(scope="module")
def model_and_processor(encoder_dir, llama_dir):
    from modeling_protogen import ProtoGenForConditionalGeneration, ProtoGenProcessor

    torch.manual_seed(0)
    model = ProtoGenForConditionalGeneration.from_encoder_decoder_pretrained(
        str(encoder_dir), str(llama_dir), chunk_size=8, predictor_dim=64, num_source_layers=1, num_query_layers=1
    )
    return model.eval(), ProtoGenProcessor.from_encoder_decoder_pretrained(str(encoder_dir), str(llama_dir))


# Lone surrogates are no Unicode text.
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=8) | st.text(
    string.ascii_lowercase + " .<>|[]_", max_size=12
)


@FEW
@given(st.lists(TEXT, min_size=2, max_size=3))
def test_a_text_alone_is_answered_as_in_a_batch(model_and_processor, texts):
    """Also one with control tokens, of other scripts, of nothing that is seen."""
    model, processor = model_and_processor
    taken = [text for text in texts if text.strip()]
    for text in {*texts} - {*taken}:
        with pytest.raises(ValueError, match="is empty"):
            processor([text])
    alone = [processor.decode(model.generate(**processor([text]))[0]) for text in taken]
    if taken:
        assert processor.batch_decode(model.generate(**processor(taken))) == alone


@FEW
@given(st.binary(max_size=20) | st.dictionaries(OWN_KEYS | st.text(max_size=5), ANY, max_size=2) | ANY)
def test_a_recipe_is_understood_or_refused_in_a_sentence(tmp_path, recipe):
    path = tmp_path / "recipe.yaml"
    path.write_bytes(recipe if isinstance(recipe, bytes) else yaml.safe_dump(recipe, allow_unicode=True).encode())
    try:
        assert isinstance(read_recipe(str(path)), dict)
        RecipeParser(*SHARED).parse(["--config", str(path), "--use_cpu", "true"])
    except ValueError:
        return


@FEW
@given(st.dictionaries(st.sampled_from(sorted(ProtoGenConfig.__annotations__)), ANY, min_size=1, max_size=2))
def test_a_configuration_is_taken_or_refused_in_a_sentence(fields):
    # What other models' configurations hold is theirs.
    fields = {name: value for name, value in fields.items() if not name.endswith("_config")}
    try:
        config = ProtoGenConfig(**fields)
    except ValueError:
        return
    assert ProtoGenConfig.from_dict(config.to_dict()).to_dict() == config.to_dict()


def answers(folder) -> dict:
    """All that a bank says."""
    bank = ProtoTokenBank(folder)
    bank.verify()
    describe(bank)
    return {id: (bank.row(id), bank[id].e.tolist(), bank[id].m.tolist()) for id in bank.ids}


@pytest.fixture(scope="module")
def bank(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bank")
    bank = ProtoTokenBank(folder, BankInfo("tiny", None, "0" * 64, "e_mN", 4, 1, "per_example", "bos", dim=3))
    generator = torch.Generator().manual_seed(0)
    with bank.writing():
        for number in range(2):
            e, m = torch.randn(1, 1, 3, generator=generator), torch.randn(1, 3, generator=generator)
            bank.append([BankEntry(f"id-{number}", [5, 6, 2], e, m, 1.0, 7)])
    return folder


@FEW
@given(st.data())
def test_a_damaged_byte_of_a_bank_is_named_or_changes_nothing(bank, tmp_path, data):
    folder = shutil.copytree(bank, tmp_path / "bank", dirs_exist_ok=True)
    path = data.draw(st.sampled_from(sorted(path for path in folder.iterdir() if path.stat().st_size)))
    content = bytearray(path.read_bytes())
    at = data.draw(st.integers(0, len(content) - 1))
    bit = data.draw(st.none() | st.integers(0, 7))
    if bit is None:
        content = content[:at]
    else:
        content[at] ^= 1 << bit
    path.write_bytes(bytes(content))
    try:
        after = answers(folder)
    except (ValueError, OSError) as error:
        named = str(error)
    else:
        assert after == answers(bank)
        return
    assert str(folder) in named
