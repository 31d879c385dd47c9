"""Runs each method on each task of the harness, and compares the answers."""

import html
import time
from pathlib import Path

import lm_eval.tasks
import numpy as np
import pandas as pd
from lm_eval.api.model import LM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.tasks import TaskManager
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from modeling_protogen.processing_protogen import text_ids

from . import plots
from .abstention import coverage_curve, equal_bins, expected_calibration_error, ranking_metrics
from .baselines.writing import Writer
from .retention import f1_retention, retention_metrics
from .sentence_encoder import sentence_embeddings
from .statistics import mean_with_interval
from .text_metrics import information_bits


class WriterLM(LM):
    """A way to write answers as a model of the harness, for tasks that have answers written."""

    def __init__(self, write: Writer, batch_size: int = 1):
        super().__init__()
        self.write, self.batch_size = write, batch_size

    def generate_until(self, requests) -> list[str]:
        answers = []
        for first in tqdm(range(0, len(requests), self.batch_size), desc="answers"):
            part = [request.args for request in requests[first : first + self.batch_size]]
            kwargs = normalize_gen_kwargs(part[0][1])
            stop = handle_stop_sequences(kwargs["until"], eos=None)
            written = self.write([context for context, _ in part], [None] * len(part), kwargs["max_gen_toks"])
            answers += [postprocess_generated_text(text, stop, None) for text in written.texts]
        return answers

    def loglikelihood(self, requests):
        raise ValueError("this method writes answers, it cannot score given ones; take a task that generates.")

    loglikelihood_rolling = loglikelihood


def task_manager(tasks: list[str], data_dir: str | None) -> TaskManager:
    """
    Finds these tasks. The harness takes 20 seconds to list all that it has, so they are sought among those here and the
    ones that those are made of first.
    """
    here, harness = Path(__file__).parent, Path(lm_eval.tasks.__file__).parent
    paths = [str(here), *(str(harness / name) for name in ("mmlu", "mmlu_pro", "gsm8k", "triviaqa"))]
    metadata = {"data_dir": data_dir}
    found = TaskManager(include_path=paths, include_defaults=False, metadata=metadata)
    if {*tasks} <= {*found.all_tasks}:
        return found
    return TaskManager(include_path=str(here), metadata=metadata)


def evaluate_cell(lm: LM, task: str, manager: TaskManager, **options) -> dict:
    """
    One method on one task or group.

    Args:
        options: of `lm_eval.simple_evaluate`: `limit`, `num_fewshot`, `apply_chat_template`, ...

    Returns:
        `seconds_an_example`, and `samples`: for each answer its `task`, `doc_id`, `filter`, `prompt`, `answer` (the
        number of the chosen one, where it is a choice) and `target`, its `metrics` by name, and `uncertainty` and
        `token_confidences` where the method gives them, `category` where the task has some.
    """
    start = time.perf_counter()
    found = lm_eval.simple_evaluate(
        model=lm, tasks=[task], task_manager=manager, bootstrap_iters=0, log_samples=True, **options
    )
    seconds = time.perf_counter() - start
    samples = [sample_of(subtask, sample) for subtask, logged in sorted(found["samples"].items()) for sample in logged]
    documents = {(sample["task"], sample["doc_id"]) for sample in samples}
    return {"seconds_an_example": seconds / len(documents), "samples": samples}


def sample_of(task: str, logged: dict) -> dict:
    context, options = logged["arguments"][0]
    if isinstance(options, dict):
        answer = logged["resps"][0][0]
    else:  # The options are choices, and responses their log-likelihoods.
        options, answer = {}, str(int(np.argmax([score for score, _ in logged["filtered_resps"]])))
    return {
        "task": task,
        "doc_id": logged["doc_id"],
        "filter": logged["filter"],
        "prompt": context,
        "answer": answer,
        "target": str(logged["target"]),
        # What is not one number is for a metric of all answers, such as micro F1.
        "metrics": {name: float(logged[name]) for name in logged["metrics"] if np.ndim(logged[name]) == 0},
        "category": logged["doc"].get("category") or logged["doc"].get("subject") or "",
        **{name: options[name] for name in ("uncertainty", "token_confidences") if name in options},
    }


def add_open_metrics(cell: dict, sentence_encoder: str, tokenizer: PreTrainedTokenizerBase, decoder) -> None:
    """
    Adds to each answer of a cell `embedding_similarity`, the cosine of its meaning and the target's, and
    `bits_a_token`, how surprising the decoder finds it by itself; an empty answer has none.

    Args:
        sentence_encoder (`str`): as in `sentence_embeddings`.
        decoder (`PreTrainedModel`): a causal language model.
    """
    samples = [sample for sample in cell["samples"] if sample["answer"].strip()]
    if not samples:
        return
    texts = [sample[name] for name in ("answer", "target") for sample in samples]
    answers, targets = np.split(sentence_embeddings(sentence_encoder, texts), 2)
    for sample, similarity in zip(samples, (answers * targets).sum(1), strict=True):
        ids = text_ids(tokenizer, sample["answer"])
        sample["metrics"]["embedding_similarity"] = float(similarity)
        sample["metrics"]["bits_a_token"] = information_bits(decoder, ids) / len(ids)


def metric_table(cells: dict[tuple[str, str], dict]) -> pd.DataFrame:
    """
    A row for each method, task, answer and metric, with the answer's uncertainty where there is one, the question's
    category, and the target's length in words.
    """
    return pd.DataFrame(
        [
            {
                "method": method,
                "task": task,
                "doc": f"{sample['task']}/{sample['doc_id']}",
                "metric": name if sample["filter"] == "none" else f"{name}_{sample['filter']}",
                "value": value,
                "uncertainty": sample.get("uncertainty"),
                "category": sample["category"],
                "target_words": len(sample["target"].split()),
            }
            for (method, task), cell in cells.items()
            for sample in cell["samples"]
            for name, value in sample["metrics"].items()
        ]
    )


def quality_metrics(table: pd.DataFrame, baseline: str) -> dict[str, list[float]]:
    """
    For each method, task and metric the mean with its interval over answers, and its difference from the baseline's on
    the same questions, with a paired bootstrap interval.
    """
    metrics = {}
    for (task, metric), part in table.groupby(["task", "metric"], sort=False):
        values = part.pivot(index="doc", columns="method", values="value")
        for method in part["method"].unique():
            metrics[f"{method}_{task}_{metric}"] = mean_with_interval(values[method].dropna())
            if method != baseline and baseline in values:
                pairs = (values[method] - values[baseline]).dropna().to_numpy()
                metrics[f"{method}_minus_{baseline}_{task}_{metric}"] = mean_with_interval(pairs)
    return metrics


def main_metric(table: pd.DataFrame, metrics: list[str]) -> pd.DataFrame:
    """The rows of the first of these metrics that each task has."""
    parts = []
    for _, of_task in table.groupby("task", sort=False):
        present = [metric for metric in metrics if metric in set(of_task["metric"])]
        parts.append(of_task[of_task["metric"].isin(present[:1])])
    return pd.concat(parts)


def with_uncertainty(rated: pd.DataFrame) -> pd.DataFrame:
    """
    Keeps the rows of `main_metric` of methods that report uncertainty, and adds `all_tasks`, as many of each task:
    uncertainty is to tell those apart that were trained on from others.
    """
    rated = rated[rated["uncertainty"].notna()]
    if rated["task"].nunique() < 2:
        return rated
    by_task = rated.groupby(["method", "task"], sort=False)
    return pd.concat([rated, by_task.sample(by_task.size().min(), random_state=0).assign(task="all_tasks")])


def uncertainty_metrics(rated: pd.DataFrame, threshold: float) -> dict[str, float]:
    """
    From rows of `main_metric`, for each method that says how sure it is: retention, how well uncertainty tells right
    from wrong, and its calibration as the error that is expected; an error is 1 - value, right is what has at most the
    threshold's.
    """
    metrics = {}
    for (method, task), part in with_uncertainty(rated).groupby(["method", "task"], sort=False):
        errors, uncertainties = errors_and_uncertainties(part)
        found = retention_metrics(errors, uncertainties, threshold)
        found |= ranking_metrics(-errors, uncertainties, -threshold)
        found["calibration_error"] = expected_calibration_error(errors, uncertainties)
        metrics |= {f"{name}_{method}_{task}": value for name, value in found.items()}
    return metrics


def errors_and_uncertainties(rated: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    return 1 - rated["value"].to_numpy(), rated["uncertainty"].to_numpy()


def side_by_side(cells: dict[tuple[str, str], dict], number: int = 12) -> str:
    """HTML of the first questions of each task with every method's answer; unsure tokens are shaded."""
    parts = []
    for task in dict.fromkeys(task for _, task in cells):
        by_method = {
            method: {(s["task"], s["doc_id"]): s for s in cell["samples"]}
            for (method, of_task), cell in cells.items()
            if of_task == task
        }
        first = next(iter(by_method.values()))
        for key in list(first)[:number]:
            rows = {"target": html.escape(first[key]["target"])}
            rows |= {method: shaded(samples[key]) for method, samples in by_method.items() if key in samples}
            cells_html = "".join(f"<tr><td>{name}</td><td>{text}</td></tr>" for name, text in rows.items())
            parts.append(f"<p>{html.escape(first[key]['prompt'][-400:])}</p><table>{cells_html}</table>")
    return "\n".join(parts)


def shaded(sample: dict) -> str:
    """An answer's tokens on a ground that is the redder the less sure they were."""
    if not sample.get("token_confidences"):
        return html.escape(sample["answer"])
    return "".join(
        f'<span style="background: rgba(255, 60, 60, {0.6 * (1 - confidence):.2f})" title="{confidence:.2f}">'
        f"{html.escape(text)}</span>"
        for text, confidence in sample["token_confidences"]
    )


def draw(cells: dict[tuple[str, str], dict], rated: pd.DataFrame, threshold: float, folder: Path) -> None:
    """The plots of each task, from rows of `main_metric`."""
    for task, of_task in rated.groupby("task", sort=False):
        draw_quality(cells, of_task, task, folder)
    for task, of_task in with_uncertainty(rated).groupby("task", sort=False):
        draw_uncertainty(of_task, threshold, task, folder)


def draw_quality(cells: dict[tuple[str, str], dict], of_task: pd.DataFrame, task: str, folder: Path) -> None:
    """Quality by category, by length and against speed."""
    metric = of_task["metric"].iloc[0].replace("_", " ")
    by_category = {
        category: {method: mean_with_interval(rows["value"]) for method, rows in part.groupby("method", sort=False)}
        for category, part in of_task.groupby("category")
        if part.groupby("method").size().min() > 1
    }
    if len(by_category) > 1:
        plots.bars(by_category, f"{task}: {metric}", folder / f"{task}_categories.png")
    # Up to 1, 2, 4, ... words.
    lengths = 2 ** np.ceil(np.log2(of_task["target_words"].clip(lower=1))).astype(int)
    by_length = of_task.assign(words=lengths).groupby(["words", "method"]).filter(lambda rows: len(rows) > 1)
    if by_length["words"].nunique() > 1:
        path = folder / f"{task}_lengths.png"
        labels = ("words of the target, at most", metric)
        plots.lines(by_length, "words", "value", task, path, line="method", log2=True, labels=labels)
    points = {}
    for method, part in of_task.groupby("method", sort=False):
        rate = 1 / cells[method, task]["seconds_an_example"]
        points[method] = [([rate] * 3, mean_with_interval(part["value"]))]
    labels = ("examples a second", metric)
    plots.curves(points, labels, f"{task}: quality against speed", folder / f"{task}_speed.png", log_x=True)


def draw_uncertainty(of_task: pd.DataFrame, threshold: float, task: str, folder: Path) -> None:
    """F1-retention beside that of a random and of the best order, accuracy against coverage, and calibration."""
    retained, covered, calibrated = {}, {}, {"calibrated": plots.exact_points((0, 1), (0, 1))}
    for method, part in of_task.groupby("method", sort=False):
        errors, uncertainties = errors_and_uncertainties(part)
        orders = {"": uncertainties, ", best order": errors, ", random order": shuffled(uncertainties)}
        for name, order in orders.items():
            curve = f1_retention(errors, order, threshold)
            retained[f"{method}{name}"] = plots.exact_points(curve.retained, curve.value)
        covered[method] = plots.exact_points(*coverage_curve(errors <= threshold, uncertainties))
        calibrated[method] = [
            ([uncertainties[alike].mean()] * 3, mean_with_interval(errors[alike]))
            for alike in equal_bins(uncertainties, min(5, len(errors) // 2))  # an interval needs two
        ]
    labels = ("share of answers kept", f"F1 of an error of at most {threshold}")
    plots.curves(retained, labels, f"{task}: retention", folder / f"{task}_retention.png")
    labels = ("share of answers given", f"share with an error of at most {threshold}")
    plots.curves(covered, labels, f"{task}: abstention", folder / f"{task}_coverage.png")
    labels = ("uncertainty", "error")
    plots.curves(calibrated, labels, f"{task}: calibration", folder / f"{task}_calibration.png")


def shuffled(values: np.ndarray) -> np.ndarray:
    return np.random.default_rng(0).permutation(values)
