"""One-step answers against the decoder's own where each instruction has one right answer."""

from pathlib import Path

import numpy as np
from tqdm import tqdm
from transformers import AutoModel, AutoProcessor

from eval_tasks import report
from eval_tasks.statistics import mean_with_interval
from trainers.data import DataArguments, load_examples, split_by_instruction


def add_commands(commands) -> None:
    command = commands.add_parser("controlled-world")
    command.add_argument("--run", default="runs/controlled_world")
    command.add_argument("--validation-share", type=float, default=0.1)
    command.add_argument("--result", default="runs/controlled_world.json")
    command.set_defaults(run_command=controlled_world)


def controlled_world(arguments) -> None:
    run = Path(arguments.run)
    model = AutoModel.from_pretrained(run / "model", trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(run / "model", trust_remote_code=True)
    data = run / "data.jsonl"
    _, held_out = split_by_instruction(load_examples(DataArguments(data=str(data))), arguments.validation_share)
    right = {"one_step": [], "autoregressive": []}
    for first in tqdm(range(0, len(held_out), 50), desc="answers", unit="batch"):
        part = held_out[first : first + 50]
        inputs = processor([example.instruction for example in part])
        prompt = inputs["decoder_prompt_ids"]
        written = model.decoder.generate(
            input_ids=prompt,
            attention_mask=inputs["decoder_prompt_mask"],
            do_sample=False,
            max_new_tokens=model.config.max_answer_length,
        )[:, prompt.shape[1] :]
        for name, answers in (("one_step", model.generate(**inputs)), ("autoregressive", written)):
            texts = processor.batch_decode(answers)
            right[name] += [text.strip() == example.answer for text, example in zip(texts, part, strict=True)]
    metrics = {f"{name}_exact_match": mean_with_interval(values) for name, values in right.items()}
    if any(right["autoregressive"]):
        metrics["share_of_autoregressive"] = sum(right["one_step"]) / sum(right["autoregressive"])
    for kind in sorted({example.category for example in held_out}):
        for name, values in right.items():
            of_kind = [value for value, example in zip(values, held_out, strict=True) if example.category == kind]
            metrics[f"{kind}_{name}_exact_match"] = float(np.mean(of_kind))
    content = report.result(
        command=f"protogen world, protogen train, {arguments.command_line}",
        model="a GPTNeoX decoder and a BERT encoder made by the recipe",
        revision=None,
        data=f"{len(held_out)} instructions held out of eval_tasks/studies/controlled_world.py",
        seed=0,
        metrics=metrics,
    )
    report.write_result(arguments.result, content)
