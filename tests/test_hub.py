"""Out to the Hub and back: against a local server that speaks its HTTP API."""

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from conftest import INSTRUCTIONS, weights_hash
from datasets import Dataset, DatasetInfo
from hub_server import TOKEN, Hub
from huggingface_hub import ModelCard, constants
from safetensors.torch import load
from test_bank_dataset import ENTRIES
from test_proto_bank import filled, same

from eval_tasks import command_line
from modeling_protogen import ProtoGenForConditionalGeneration
from trainers.bank_dataset import import_bank
from trainers.protogen_trainer import ProtoGenTrainer, hub_name_of
from trainers.training_args import ProtoGenTrainingArguments

ROOT = Path(__file__).parents[1]
ROWS = [{"instruction": i, "response": "the cat sat"} for i in INSTRUCTIONS]


@pytest.fixture
def hub(monkeypatch):
    hub = Hub()
    hub.create("models/org/llama")
    hub.repos["models/org/llama"]["card"] = {"license": "apache-2.0"}
    monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr("transformers.utils.hub._hf_api", None)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    yield hub
    hub.shutdown()
    hub.server_close()


@pytest.fixture
def protogen(monkeypatch, capsys):
    """Runs a command in this process; returns what it printed, or the error line."""

    def protogen(*arguments):
        try:
            command_line.main([*map(str, arguments)])
        except SystemExit as exit:
            return str(exit.code)
        return capsys.readouterr().out

    return protogen


@pytest.fixture
def trained(build, llama_dir, tmp_path):
    """A model and its processor, and the folder of a training that left them there."""
    model, processor = build(llama_dir, decoder_sees_prompt=True, slot_adapter_rank=2, thin=True)
    model.save_pretrained(tmp_path / "run" / "model")
    processor.save_pretrained(tmp_path / "run" / "model")
    run = {"command": "protogen train --config birds", "data": "org/birds", "decoder": "org/llama", "seed": 7}
    run |= {"losses": {"reconstruction": 1.0}, "encoder_learning_rate": 0.0}
    after = {"eval_exact_match": 0.815, "eval_loss": 0.5, "eval_loss_length_nll": 3.0, "eval_runtime": 1.5}
    (tmp_path / "run" / "metrics.json").write_text(json.dumps({"run": run, "after": after, "log": []}))
    return model, processor, tmp_path / "run"


def card_of(hub, key="models/org/name", revision="main"):
    content = hub.files(key, revision)["README.md"].decode()
    return yaml.safe_load(content.split("---\n")[1]), ModelCard(content)


def test_the_command_publishes_all_that_loading_takes_with_a_card(hub, trained, protogen, tmp_path):
    model, _, run = trained
    hub.create("datasets/org/birds")
    result = {"command": "protogen bench birds", "date": "2026-11-28", "versions": {"torch": "2"}, "machine": "cpu"}
    result |= {"device": "cpu", "model": "m", "revision": None, "data": "20 birds", "seed": 0}
    result |= {"metrics": {"slot_f1": [0.908, 0.9, 0.91], "rival_slot_f1": 0.7}}
    (tmp_path / "birds.json").write_text(json.dumps(result))
    options = ["--full", "--private", "--result", tmp_path / "birds.json", "slot_f1", "--example", "who flew"]
    said = protogen("push", run, "org/name", *options)
    assert hub.hash_of("models/org/name", "main") in said
    assert hub.repos["models/org/name"]["private"]
    files = hub.files("models/org/name")
    assert {"modeling_protogen.py", "processing_protogen.py", "config.json", "generation_config.json"} <= files.keys()
    assert {"processor_config.json", "tokenizer.json", "decoder_tokenizer/tokenizer.json"} <= files.keys()
    weights = load(files["model.safetensors"])
    assert any(name.startswith("decoder.") for name in weights)
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in weights.items())

    metadata, card = card_of(hub)
    assert metadata["base_model"] == ["org/llama"]  # Where the encoder came from, the Hub does not know.
    assert metadata["license"] == "apache-2.0"
    assert metadata["datasets"] == ["org/birds"]
    assert metadata["library_name"] == "transformers"
    assert metadata["widget"] == [{"text": "who flew"}]
    found = {r.metric_type: (r.dataset_name, r.metric_value) for r in card.data.eval_results}
    of_training = "org/birds, held out"
    assert found == {
        "exact_match": (of_training, 0.815),
        "loss": (of_training, 0.5),
        "slot_f1": ("20 birds", 0.908),
    }
    decoder, encoder = (sum(p.numel() for p in part.parameters()) for part in (model.decoder, model.encoder))
    for line in (
        f"| decoder [org/llama](https://huggingface.co/org/llama) | {decoder:,} | frozen |",
        f"| {encoder:,} | frozen |",  # Its learning rate was 0.
        "| command | protogen train --config birds |",
        '| losses | {"reconstruction": 1.0} |',
        "| slot f1 | 0.908 (0.9 to 0.91) |",
        "`protogen bench birds`, 2026-11-28",
        "| exact match | 0.815 |",
        "- Answers end after 8 tokens.",
        'processor("who flew")',
    ):
        assert line in card.text
    assert "rival" not in card.text


def strangers_environment(hub, folder):
    """Of a process that has nothing cached and knows the local Hub alone."""
    return {n: v for n, v in os.environ.items() if n != "HF_HUB_OFFLINE"} | {
        "HF_ENDPOINT": hub.endpoint,
        "HF_HOME": str(folder / "home"),
        "HF_HUB_DISABLE_XET": "1",
        "OMP_NUM_THREADS": "1",
    }


PULL = """
import json, re, sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("modeling_protogen", "trainers", "eval_tasks"):
            raise ImportError(f"{name} is blocked")
sys.meta_path.insert(0, Blocker())
import huggingface_hub, torch
from transformers import AutoModel, AutoProcessor
torch.set_num_threads(1)
revision, instructions, shut_down = sys.argv[1], json.loads(sys.argv[2]), sys.argv[3]

def answers():
    here = {"trust_remote_code": True, "revision": revision}
    model = AutoModel.from_pretrained("org/name", **here)
    processor = AutoProcessor.from_pretrained("org/name", **here)
    assert type(model).__module__.startswith("transformers_modules")
    return model.generate(**processor(instructions), length=6).tolist()

online = answers()
card = open(huggingface_hub.hf_hub_download("org/name", "README.md")).read()
(code,) = re.findall(r"```python\\n(.*?)```", card, re.DOTALL)
exec(code.replace("trust_remote_code=True", f"trust_remote_code=True, revision={revision!r}"))
import urllib.request
urllib.request.urlopen(shut_down)
huggingface_hub.constants.HF_HUB_OFFLINE = True
print(json.dumps([online, answers()]))
"""


def test_a_stranger_pulls_a_pinned_revision_and_goes_on_offline(hub, trained, protogen, llama_dir, tmp_path):
    """Thin, in a process without our package; then from its cache, when the server is gone."""
    model, processor, run = trained
    hub.commit("models/org/llama", "main", {p.name: p.read_bytes() for p in llama_dir.iterdir()})
    protogen("push", run, "org/name", "--thin", "--decoder", "org/llama")
    revision = hub.hash_of("models/org/name", "main")
    config = json.loads(hub.files("models/org/name")["config.json"])
    assert config["decoder_name_or_path"] == "org/llama"
    assert config["decoder_revision"] == hub.hash_of("models/org/llama", "main")
    assert f"`org/llama` at `{config['decoder_revision']}`" in card_of(hub)[1].text
    # Both move on: what is pinned stays.
    hub.commit("models/org/llama", "main", {"config.json": b"{}"})
    hub.commit(
        "models/org/name", "main", hub.files("models/org/name") | {"config.json": b"{}", "publishing.py": b"1 / 0"}
    )
    (tmp_path / "pull.py").write_text(PULL)
    command = [sys.executable, "pull.py", revision, json.dumps(INSTRUCTIONS), f"{hub.endpoint}/shut-down"]
    done = subprocess.run(
        command, cwd=tmp_path, env=strangers_environment(hub, tmp_path), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    online, offline = json.loads(done.stdout.splitlines()[-1])
    assert online == offline == model.generate(**processor(INSTRUCTIONS), length=6).tolist()


def test_a_broken_connection_breaks_a_push_off_and_the_same_command_completes_it(hub, trained, protogen):
    _, _, run = trained
    hub.breaks = 1
    said = protogen("push", run, "org/again", "--full")
    assert re.match(r"error: the connection to http://\S+ broke \(\w+\) and org/again is as it was: push again", said)
    assert hub.files("models/org/again").keys() == {".gitattributes"}
    assert "/commit/" in protogen("push", run, "org/again", "--full")
    assert {"model.safetensors", "README.md"} <= hub.files("models/org/again").keys()
    # By its name, in the commands that take one.
    assert "predicted length" in protogen("generate", "org/again", "who sat on the mat", "--dtype", "float32")


@pytest.mark.parametrize("name", ["embedded:smollm2-135m", "org/gone", "org/secret", "a folder", None])
def test_a_thin_model_whose_decoder_others_cannot_load_is_refused(hub, trained, protogen, name):
    model, _, run = trained
    hub.create("models/org/secret", private=True)
    config = json.loads((run / "model" / "config.json").read_text())
    if name != "a folder":
        config["decoder_name_or_path"] = model.config.decoder_name_or_path = name
    (run / "model" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="could not be loaded by others: .* Push all of it .*--decoder ORG/NAME"):
        model.push_to_hub("org/name", thin=True)
    assert "models/org/name" not in hub.repos
    if name == "a folder":
        assert "could not be loaded by others" in protogen("push", run, "org/name")
    if name == "org/secret":  # Who sees the one sees the other.
        model.push_to_hub("org/name", thin=True, private=True)
        assert hub.repos["models/org/name"]["private"]


def test_bad_requests_to_push_are_refused(hub, trained, protogen, tmp_path, monkeypatch):
    _, _, run = trained
    assert "there is no model in" in protogen("push", tmp_path, "org/name", "--full")
    hub.create("models/org/public")
    assert "org/public exists and is public" in protogen("push", run, "org/public", "--full", "--private")
    assert hub.files("models/org/public").keys() == {".gitattributes"}
    (tmp_path / "other.json").write_text("{}")
    assert "is not a result file" in protogen("push", run, "org/name", "--full", "--result", tmp_path / "other.json")
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    assert "401" in protogen("push", run, "org/name", "--full")
    assert "models/org/name" not in hub.repos


def test_model_and_processor_push_by_themselves(hub, trained):
    model, processor, _ = trained
    processor.push_to_hub("name", private=True)
    assert "README.md" not in hub.files("models/me/name")
    model.push_to_hub("name", thin=False, revision="v2")
    files = hub.files("models/me/name", "v2")
    assert {
        "model.safetensors",
        "modeling_protogen.py",
        "generation_config.json",
        "processor_config.json",
    } <= files.keys()
    assert "modeling_protogen.py" not in hub.files("models/me/name", "main")
    card = card_of(hub, "models/me/name", "v2")[1].text
    assert 'AutoModel.from_pretrained("me/name"' in card
    assert "How it was trained is not recorded" in card
    # A card that is there stays, and weights in other files go.
    hub.commit("models/me/name", "v2", files | {"README.md": b"mine", "model-00001-of-00002.safetensors": b""})
    model.push_to_hub("name", thin=False, revision="v2")
    files = hub.files("models/me/name", "v2")
    assert files["README.md"] == b"mine"
    assert [name for name in files if name.endswith(".safetensors")] == ["model.safetensors"]


def test_the_trainer_pushes_what_it_trained_and_what_it_knows_of_it(hub, build, llama_dir, tmp_path):
    model, processor = build(llama_dir, decoder_sees_prompt=True)
    args = ProtoGenTrainingArguments(
        str(tmp_path / "run"),
        max_steps=2,
        save_steps=1,
        use_cpu=True,
        disable_tqdm=True,
        seed=5,
        push_to_hub=True,
        hub_model_id="org/name",
    )
    rows = Dataset.from_list(ROWS)
    given = {"args": args, "train_dataset": rows, "eval_dataset": rows, "processing_class": processor}
    model.config.thin = True
    with pytest.raises(ValueError, match="could not be loaded by others"):
        ProtoGenTrainer(model, **given)
    assert "models/org/name" not in hub.repos
    model.config.thin = False
    trainer = ProtoGenTrainer(model, **given)
    trainer.data_name = "org/birds"
    (tmp_path / "run" / "bank").mkdir(parents=True)
    (tmp_path / "run" / "bank" / "private").touch()
    trainer.train()
    loss = trainer.evaluate()["eval_loss"]
    commit = trainer.push_to_hub(license="mit")
    assert commit.oid == hub.hash_of("models/org/name", "main")
    files = hub.files("models/org/name")
    assert {"model.safetensors", "processor_config.json", "generation_config.json", "publishing.py"} <= files.keys()
    commits = hub.repos["models/org/name"]["commits"].values()
    assert len(commits) == 4  # The first, two checkpoints, the end.
    pushed = set().union(*commits)
    assert not [name for name in pushed if "bank" in name or "checkpoint" in name or name.endswith(".bin")]
    (tmp_path / "pulled").mkdir()
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "pulled" / name).write_bytes(files[name])
    pulled = ProtoGenForConditionalGeneration.from_pretrained(tmp_path / "pulled")
    assert weights_hash(pulled) == weights_hash(model)
    metadata, card = card_of(hub)
    assert metadata["license"] == "mit"
    assert [(r.metric_type, r.metric_value) for r in card.data.eval_results] == [("loss", loss)]
    for line in (
        "| seed | 5 |",
        "| steps | 2 |",
        "| train examples | 3 |",
        "| data | birds |",
        f"| loss | {loss:.4g} |",
    ):
        assert line in card.text


def test_a_data_set_of_the_hub_is_known_by_its_files():
    files = {f"hf://datasets/org/birds@abc/{name}.parquet": {"num_bytes": 1, "checksum": None} for name in "ab"}
    assert hub_name_of(Dataset.from_list(ROWS)) is None
    assert hub_name_of(Dataset.from_dict({}, info=DatasetInfo(download_checksums=files))) == "org/birds"


def test_a_bank_goes_out_and_comes_back_by_the_same_road(hub, protogen, tmp_path):
    filled(tmp_path / "bank", ENTRIES)
    push = ("bank", "push", tmp_path / "bank", "org/birds", "--private", "--license", "mit", "--no-text")
    assert "datasets/org/birds/commit/" in protogen(*push)
    assert hub.repos["datasets/org/birds"]["private"]
    files = hub.files("datasets/org/birds")
    assert yaml.safe_load(files["README.md"].decode().split("---")[1])["license"] == "mit"
    # Files of an earlier push would be rows twice.
    hub.commit("datasets/org/birds", "main", files | {"data/train-00001-of-00002.parquet": b""})
    protogen(*push)
    assert hub.files("datasets/org/birds").keys() == files.keys()
    back = import_bank("org/birds", tmp_path / "back")
    assert all(same(back[one.id], one) for one in ENTRIES)


def test_the_walkthrough_from_an_empty_folder(hub, build, llama_dir, protogen, tmp_path):
    """The commands of docs/walkthrough.md, in processes of their own, with a tiny model in place of the one there."""
    model, processor = build(llama_dir, decoder_sees_prompt=True)
    model.save_pretrained(tmp_path / "model", thin=False)
    processor.save_pretrained(tmp_path / "model")
    protogen("push", tmp_path / "model", "org/snips", "--full")
    page = (ROOT / "docs" / "walkthrough.md").read_text()
    (commands,) = re.findall(r"```bash\n(.*?)```", page, re.DOTALL)
    (ask,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    install, commands = commands.split("\n", 1)
    assert install.startswith("pip install")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    folder = tmp_path / "empty"
    folder.mkdir()
    (folder / "ask.py").write_text(ask.replace("8000", port))
    environment = strangers_environment(hub, tmp_path) | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PROTOGEN": str(ROOT),
    }
    # `kill %%` needs job control.
    script = ["bash", "-emc", commands.replace("8000", port)]
    done = subprocess.run(script, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-1500:] + done.stderr[-3000:]
    assert "predicted length" in done.stdout
    assert "valid_json" in done.stdout
    (row,) = processor.batch_decode(model.generate(**processor("Book a table for two in Rome")))
    *text, confidence = done.stdout.splitlines()[-1].split()
    assert " ".join(text) == row
    assert 0 < float(confidence) < 1
