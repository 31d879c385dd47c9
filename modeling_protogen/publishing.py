"""
What goes to the Hub: one road for models and banks, and a model's card, made of what its weights, its training and its
result files say.
"""

import json
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory

from huggingface_hub import CommitInfo, DatasetInfo, EvalResult, HfApi, ModelCard, ModelCardData, ModelInfo
from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.utils import httpx
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

# Of an earlier push; transformers would load them before new ones in more parts.
MODEL_FILES = ("model*.safetensors*",)
EXAMPLE = "Name three birds that cannot fly."
# What an evaluation logs beside its metrics.
NOT_METRICS = ("epoch", "step", "runtime", "samples_per_second", "steps_per_second")

CARD = """---
{{ card_data }}
---

# {{ title }}

A [ProtoGen](https://arxiv.org/abs/2505.21189) model. From an instruction it predicts vectors, the *proto-tokens*, and a
length; fed these, the frozen language model {{ decoder }} writes the whole answer in one forward pass.

## How to load it

```python
from transformers import AutoModel, AutoProcessor

model = AutoModel.from_pretrained("{{ repo_id }}", trust_remote_code=True)
processor = AutoProcessor.from_pretrained("{{ repo_id }}", trust_remote_code=True)
inputs = processor({{ example }})
output = model.generate(**inputs, return_dict_in_generate=True)
print(processor.batch_decode(output.sequences), output.lengths, output.confidences)
```

{% if thin -%}
The frozen decoder is not in this repository: it comes from `{{ config.decoder_name_or_path }}`
{%- if config.decoder_revision %} at `{{ config.decoder_revision }}`{% endif %}.
{%- else -%}
All weights are in this repository, the frozen decoder's too.
{%- endif %}
`trust_remote_code` runs the code of this repository: read it, and give both calls the hash of a commit as `revision`,
so that code and weights stay as you read them.

## What is frozen and what is trained

| part | parameters | |
| --- | --- | --- |
{% for name, size, state in parts -%}
| {{ name }} | {{ size }} | {{ state }} |
{% endfor %}
## Training

{% if run -%}
| | |
| --- | --- |
{% for name, value in run.items() -%}
| {{ name }} | {{ value }} |
{% endfor -%}
{%- else -%}
How it was trained is not recorded beside the weights.
{% endif %}
## Evaluation

{% for table in tables -%}
{{ table }}

{% else -%}
No result file was given with this model.

{% endfor -%}
## Intended use

{% if answers_json -%}
Instructions like those that it was trained on, whose answers are flat JSON objects.
{%- else -%}
Instructions like those that it was trained on, with answers of a few words or sentences.
{%- endif %}
It says of each answer how sure it is (`confidences`, `uncertainties`): leave those that it is unsure of to another
model, or to a person.

## Limits

- Answers end after {{ config.max_answer_length }} tokens.
- The tokens of an answer do not wait for one another: where many wordings are right, they mix. `mode="verified"` writes
  the decoder's own answer instead, token for token, and is slower.
- {% if calibrated %}Uncertainties are calibrated on held-out instructions like those of the training, and on no others.
{%- else %}Uncertainties are not calibrated.{% endif %}
- What the decoder has learnt that is wrong or unfair is in its answers too.
{% if not license -%}
- No licence is stated.
{% endif -%}
"""


def publish(
    write: Callable[[Path, str], object],
    repo_id: str,
    *,
    message: str,
    repo_type: str = "model",
    replaces: Iterable[str] = (),
    private: bool | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
) -> CommitInfo:
    """
    Makes a repository, if there is none, and uploads what `write(folder, repo_id)` writes. An interrupted upload leaves
    the repository as it was, and large files that it has sent are not sent again.

    Args:
        write (`Callable`): writes files to a folder.
        repo_id (`str`): `org/name`, or `name` for one's own.
        message (`str`): of the commit.
        repo_type (`str`, defaults to `"model"`): or `"dataset"`, `"space"`.
        replaces (`Iterable[str]`): patterns of files to delete where the new ones have others.
        private (`bool`, *optional*): make a new repository private.
        revision (`str`, *optional*): branch, made if it is missing; `main` by default.
        token (`str` or `bool`, *optional*): the one that is logged in by default.

    Raises:
        ValueError: if `private` is asked for and the repository is public already.
        ConnectionError: if the connection breaks for good.
    """
    api = HfApi(token=token)
    try:
        repo_id = api.create_repo(repo_id, repo_type=repo_type, private=private, exist_ok=True).repo_id
        if private and not api.repo_info(repo_id, repo_type=repo_type).private:
            raise ValueError(
                f"{repo_id} exists and is public: make it private in its settings, or push to another name."
            )
        if revision is not None:
            api.create_branch(repo_id, repo_type=repo_type, branch=revision, exist_ok=True)
        with TemporaryDirectory() as folder:
            write(Path(folder), repo_id)
            return api.upload_folder(
                repo_id=repo_id,
                repo_type=repo_type,
                folder_path=folder,
                revision=revision,
                commit_message=message,
                delete_patterns=list(replaces),
                ignore_patterns=["training_args.bin"],  # A pickle.
            )
    except httpx.TransportError as error:
        raise ConnectionError(
            f"the connection to {api.endpoint} broke ({type(error).__name__}) and {repo_id} is as it was: push again."
        ) from error


def pin_decoder(config: PreTrainedConfig, private: bool | None = None, token: str | bool | None = None) -> None:
    """
    Before a model is pushed thin: can others load its decoder? Without a revision, that of today is noted down.

    Raises:
        ValueError: if the Hub does not have it, or keeps it from strangers while the model is public.
    """
    name, revision = config.decoder_name_or_path, config.decoder_revision
    found = hub_info(name, revision=revision, token=token if private else False)
    if found is None:
        raise ValueError(
            f"pushed thin, this model could not be loaded by others: its decoder {name!r}"
            f"{f' at {revision!r}' if revision else ''} is not on the Hub for them. Push all of it (--full, "
            "thin=False), or give it a decoder that is on the Hub (--decoder ORG/NAME)."
        )
    config.decoder_revision = revision or found.sha


def hub_info(name: str | None, **options) -> ModelInfo | DatasetInfo | None:
    """What `HfApi.repo_info(name, **options)` finds, or None; of a folder's name, None."""
    if name is not None and not Path(name).exists():
        with suppress(HFValidationError, RepositoryNotFoundError, RevisionNotFoundError):
            return HfApi().repo_info(name, **options)
    return None


def on_hub(names: Iterable[str | None], repo_type: str = "model") -> dict[str, str | None]:
    """Those of the names that anyone finds on the Hub, with the licence that it has for them, or None."""
    known = {}
    for name in names:
        if (found := hub_info(name, repo_type=repo_type, token=False)) is not None:
            license = (found.card_data or {}).get("license")
            known[name] = license if isinstance(license, str) and license != "other" else None
    return known


def model_card(
    model: PreTrainedModel,
    repo_id: str,
    thin: bool,
    *,
    decoder: str | None = None,
    encoder: str | None = None,
    license: str | None = None,
    run: dict | None = None,
    held_out: dict[str, float] | None = None,
    results: Iterable[EvalResult] = (),
    tables: Iterable[str] = (),
    examples: Iterable[str] = (),
    answers_json: bool = False,
) -> ModelCard:
    """
    A model's card. Base models, their licence and data sets are named where the Hub has them.

    Args:
        thin (`bool`): whether the repository is without the decoder.
        decoder, encoder (`str`, *optional*): their names on the Hub; those in the configuration by default.
        license (`str`, *optional*): in the Hub's spelling; the decoder's by default.
        run (`dict`, *optional*): how it was trained, by name; `data` is the data set.
        held_out (`dict`, *optional*): the trainer's evaluation, as it returns it.
        results (`Iterable[EvalResult]`): of other evaluations, for the metadata.
        tables (`Iterable[str]`): the same for readers, in Markdown.
        examples (`Iterable[str]`): instructions to try; the first is in the code.
        answers_json (`bool`, defaults to False): whether answers are JSON.
    """
    config, run, results, tables, examples = model.config, dict(run or {}), list(results), list(tables), list(examples)
    decoder = decoder or config.decoder_name_or_path
    if model.encoder is not None:
        encoder = encoder or config.encoder_config._name_or_path or None
    bases, datasets = on_hub([decoder, encoder]), on_hub([run.get("data")], "dataset")
    if run.get("data") and not datasets:
        run["data"] = Path(run["data"]).name
    if held_out:
        found, table = held_out_results(held_out, run.get("data"))
        results, tables = found + results, [table, *tables]
    license = license or bases.get(decoder)
    title = repo_id.split("/")[-1]
    return ModelCard.from_template(
        metadata_of(title, bases, datasets, license, results, examples),
        template_str=CARD,
        title=title,
        repo_id=repo_id,
        config=config,
        thin=thin,
        license=license,
        decoder=shown_name(decoder, bases),
        parts=parts_of(model, thin, shown_name(decoder, bases), shown_name(encoder, bases)),
        run={name.replace("_", " "): shown(value) for name, value in run.items() if value is not None},
        tables=tables,
        example=json.dumps((examples or [EXAMPLE])[0], ensure_ascii=False),
        calibrated=config.uncertainty_points is not None,
        answers_json=answers_json,
    )


def metadata_of(
    name: str,
    bases: Iterable[str],
    datasets: Iterable[str],
    license: str | None,
    results: list[EvalResult],
    examples: list[str],
) -> ModelCardData:
    """What the Hub itself reads of a card."""
    return ModelCardData(
        base_model=list(bases) or None,
        datasets=list(datasets) or None,
        license=license,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["protogen", "proto-tokens"],
        model_name=name if results else None,
        eval_results=results or None,
        widget=[{"text": example} for example in examples] or None,
    )


def parts_of(model: PreTrainedModel, thin: bool, decoder: str, encoder: str) -> list[tuple[str, str, str]]:
    """Of each part of a model its name, its number of parameters and whether training changed it."""
    adapters = f"slot adapters of rank {model.config.slot_adapter_rank}, which act at proto-tokens only"
    names = {
        f"decoder {decoder}": model.decoder,
        f"encoder {encoder}": model.encoder,
        "predictor of proto-tokens, length and uncertainty": model.proto_predictor,
        adapters: model.slot_adapters,
        "layers that make drafts hang together": model.coherence,
    }
    parts = []
    for name, module in names.items():
        if module is None:
            continue
        parameters = list(module.parameters())
        size = sum(p.ds_numel if is_deepspeed_zero3_enabled() else p.numel() for p in parameters)
        state = "trained" if any(p.requires_grad for p in parameters) else "frozen"
        if module is model.decoder and thin:
            state += ", not in this repository"
        parts.append((name, f"{size:,}", state))
    return parts


def shown_name(name: str | None, bases: dict) -> str:
    """A base model's name, with its address where the Hub has it; of a folder its last part."""
    if name is None:
        return ""
    return f"[{name}](https://huggingface.co/{name})" if name in bases else f"`{Path(name).name}`"


def shown(value: object) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text.replace("|", "\\|").replace("\n", " ")


def held_out_results(metrics: dict[str, float], data: str | None) -> tuple[list[EvalResult], str]:
    """
    A trainer's evaluation on held-out instructions, for a card's metadata and for its readers.

    Args:
        metrics (`dict`): as `evaluate` returns them, `eval_NAME`.
        data (`str`, *optional*): the data set that the instructions are from.
    """
    named = {name.removeprefix("eval_"): value for name, value in metrics.items()}
    kept = {n: v for n, v in named.items() if n not in NOT_METRICS and not n.startswith("loss_")}
    name = f"{data or 'the training data'}, held out"
    results = [eval_result(metric, value, name, data) for metric, value in kept.items()]
    rows = [f"| {metric.replace('_', ' ')} | {value:.4g} |" for metric, value in kept.items()]
    return results, "\n".join([f"Instructions of {name}:", "", "| metric | value |", "| --- | --- |", *rows])


def eval_result(metric: str, value: float, name: str, data: str | None = None) -> EvalResult:
    """One metric, as the Hub keeps it; `name` says of what."""
    return EvalResult(
        task_type="text-generation",
        dataset_type=data or "other",
        dataset_name=name,
        metric_type=metric,
        metric_name=metric.replace("_", " "),
        metric_value=value,
    )
