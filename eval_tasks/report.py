"""Result files, and the tables made from them."""

import csv
import datetime
import platform
import re
import time
from importlib.metadata import version
from pathlib import Path

import torch

from trainers.devices import best_device
from trainers.files import write_atomically, write_json
from trainers.text_files import read_json

RESULT_FIELDS = ("command", "date", "versions", "machine", "device", "model", "revision", "data", "seed", "metrics")
PACKAGES = ("torch", "transformers", "accelerate", "datasets")
STARTED = time.monotonic()


def result(command: str, model: str, revision: str | None, data: str, seed: int, metrics: dict) -> dict:
    """
    A result: what was measured, on what, by which command, and in how many seconds; a command that went on where it had
    been interrupted counts its last part.

    Args:
        command (`str`): the command that makes it.
        model, revision, data, seed: what it was made with.
        metrics (`dict`): from a name with its unit to a number, or to `[value, low, high]`.
    """
    # Matrix products in bfloat16 are several times as fast with AMX.
    amx = " AMX" if torch.cpu._is_amx_tile_supported() else ""
    cpu = f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}{amx}"
    return {
        "command": command,
        "date": datetime.date.today().isoformat(),
        "versions": {"python": platform.python_version()} | {name: version(name) for name in PACKAGES},
        "machine": f"{cpu}, {torch.get_num_threads()} threads",
        "device": str(best_device()),
        "seconds": round(time.monotonic() - STARTED),
        "model": model,
        "revision": revision,
        "data": data,
        "seed": seed,
        "metrics": metrics,
    }


def write_result(path: str | Path, content: dict, columns: list[str] = (), beside: str = "") -> None:
    """Writes a result file, and prints its `markdown_table` and where it is."""
    write_json(path, content)
    print(f"\n{markdown_table(content, columns)}\n\nwritten to {path}{beside}")


def write_csv(path: str | Path, rows: list[dict]) -> None:
    """Writes rows with the same keys, or nothing where that fails; makes the folder if there is none."""

    def write(temporary: Path) -> None:
        with open(temporary, "w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)

    write_atomically(Path(path), write)


def read_result(path: str | Path) -> dict:
    """
    Raises:
        FileNotFoundError: if it is missing.
        ValueError: if it is not a result file.
    """
    content = read_json(path)
    missing = [name for name in RESULT_FIELDS if name not in content]
    if missing:
        raise ValueError(f"{path} is not a result file: it lacks {', '.join(missing)}.")
    return content


def format_metric(metric: float | list[float]) -> str:
    """`0.9941`, or `21.3 (20.1 to 22.4)` for a value with its interval."""
    if isinstance(metric, list):
        value, low, high = metric
        return f"{value:.3g} ({low:.3g} to {high:.3g})"
    return f"{metric:.4g}" if isinstance(metric, float) else str(metric)


def markdown_table(content: dict, columns: list[str] = ()) -> str:
    """
    The metrics of a result, one a row, with what made them below. With `columns` each row is a setting: metric
    `SETTING_COLUMN` stands in row SETTING, column COLUMN. All settings have the first column; the others may be blank.
    A result's `messages`, texts by name, may be columns as well.

    Raises:
        ValueError: if no setting has one of the columns.
    """
    metrics = content["metrics"]
    if columns:
        settings = [name.removesuffix(f"_{columns[0]}") for name in metrics if name.endswith(f"_{columns[0]}")]
        cells = metrics | content.get("messages", {})
        unknown = [c for c in columns if not any(f"{setting}_{c}" in cells for setting in settings)]
        if unknown:
            raise ValueError(f"no metric of the result is called SETTING_{unknown[0]}.")
        rows = [[setting, *(format_metric(cells.get(f"{setting}_{c}", "")) for c in columns)] for setting in settings]
        header = ["setting", *(column.replace("_", " ") for column in columns)]
    else:
        rows = [[name.replace("_", " "), format_metric(value)] for name, value in metrics.items()]
        header = ["metric", "value"]
    lines = [f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *rows)]
    versions = ", ".join(f"{name} {number}" for name, number in content["versions"].items())
    revision = f" at {content['revision']}" if content["revision"] else ""
    lines += [
        "",
        f"<sub>`{content['command']}`, {content['date']}; {content['model']}{revision}; {content['data']}; "
        f"seed {content['seed']}; {content['device']}, {content['machine']}; {versions}.</sub>",
    ]
    return "\n".join(lines)


def fill_tables(text: str, results: dict[str, dict]) -> str:
    """
    Replaces the text between `<!-- result NAME -->` and `<!-- end NAME -->` by the table of that result;
    `<!-- result NAME COLUMN ... -->` makes a row of each setting.

    Raises:
        ValueError: if a start marker has no end, or names no result.
    """
    for line in text.splitlines():
        if line.startswith("<!-- result "):
            name, *columns = line.removeprefix("<!-- result ").removesuffix(" -->").split()
            start, end = line, f"<!-- end {name} -->"
            if name not in results:
                raise ValueError(f"there is no result file {name}.json.")
            if end not in text:
                raise ValueError(f"the marker {start!r} has no {end!r} after it.")
            before, rest = text.split(start, 1)
            after = rest.split(end, 1)[1]
            text = f"{before}{start}\n{markdown_table(results[name], columns)}\n{end}{after}"
    return text


def fill_metrics(text: str, results: dict[str, dict]) -> str:
    """
    Replaces the text between `<!-- metric RESULT NAME -->` and the next `<!-- end -->` by that figure.

    Raises:
        ValueError: if there is no such result or figure.
    """

    def shown(match: re.Match) -> str:
        result, name = match["result"], match["name"]
        if result not in results or name not in results[result]["metrics"]:
            raise ValueError(f"there is no metric {name} in a result file {result}.json.")
        return f"{match['start']}{format_metric(results[result]['metrics'][name])}<!-- end -->"

    pattern = r"(?P<start><!-- metric (?P<result>\S+) (?P<name>\S+) -->).*?<!-- end -->"
    return re.sub(pattern, shown, text)
