"""Calibration on records whose errors are known."""

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ANSWERS, CONTEXTS, INSTRUCTIONS

from eval_tasks.calibration import (
    calibrate_length,
    calibrate_uncertainty,
    length_calibration,
    rank_correlations,
    uncertainty_calibration,
)
from eval_tasks.length_calibration import is_covered
from eval_tasks.one_step import one_step_records
from modeling_protogen import ProtoGenForConditionalGeneration, ProtoGenProcessor
from modeling_protogen.configuration_protogen import UNCERTAINTY_SCORES
from modeling_protogen.generation_protogen import interpolate


def test_lengths_are_covered_once_calibrated():
    rng = np.random.default_rng(0)
    mean, variance = rng.normal(5, 0.5, 4000), rng.uniform(0.05, 0.2, 4000)
    lengths = np.round(np.exp(rng.normal(mean - 0.3, 1.7 * np.sqrt(variance))))
    shift, scale = length_calibration(mean[:2000], variance[:2000], lengths[:2000])
    assert shift == pytest.approx(-0.3, abs=0.05)
    assert scale == pytest.approx(1.7, abs=0.1)
    covered = is_covered(mean[2000:] + shift, scale**2 * variance[2000:], lengths[2000:], 0.8)
    assert covered.mean() == pytest.approx(0.8, abs=0.03)


def test_lengths_without_spread_leave_a_model_that_can_be_loaded(build, llama_dir, tmp_path):
    model, _ = build(llama_dir)
    lengths = np.full(20, 16.0)
    records = pd.DataFrame({"log_length_mean": np.log(lengths) - 1, "log_length_variance": 0.1, "length": lengths})
    calibrate_length(model.config, records)
    assert model.config.log_length_shift == pytest.approx(1)
    model.save_pretrained(tmp_path)
    assert ProtoGenForConditionalGeneration.from_pretrained(tmp_path).config.log_length_scale > 0


def test_interpolation_is_numpys():
    points = [[0.1, 0.0], [0.4, 0.2], [0.5, 0.9]]
    x = torch.linspace(-1, 1, 41, dtype=torch.float64)
    np.testing.assert_allclose(interpolate(x, points).numpy(), np.interp(x.numpy(), *np.array(points).T))
    assert interpolate(torch.tensor([3.0, -1.0]), [[0.2, 0.7]]).tolist() == pytest.approx([0.7, 0.7])


def test_the_calibrated_score_is_the_expected_share_of_wrong_tokens():
    rng = np.random.default_rng(0)
    score = rng.uniform(size=6000)
    wrong = rng.binomial(20, score**2) / 20
    points = uncertainty_calibration(score[:4000], wrong[:4000])
    assert points == sorted(points)
    said = interpolate(torch.from_numpy(score[4000:]), points).numpy()
    for low in (0.0, 0.25, 0.5, 0.75):
        near = (score[4000:] >= low) & (score[4000:] < low + 0.25)
        assert said[near].mean() == pytest.approx(wrong[4000:][near].mean(), abs=0.03)


def records_of(model, processor):
    return one_step_records(model, processor, INSTRUCTIONS, [c or "" for c in CONTEXTS], ANSWERS, batch_size=2)


def test_records_are_those_of_the_model(build, llama_dir):
    model, processor = build(llama_dir)
    records = records_of(model, processor)
    for row, (instruction, context, answer) in enumerate(zip(INSTRUCTIONS, CONTEXTS, ANSWERS, strict=True)):
        inputs, record = processor(instruction, context), records.iloc[row]
        label = processor.encode_answers([answer])["labels"][0]
        with torch.no_grad():
            right = model(**inputs, labels=label[None]).answer_logits.argmax(-1) == label
        assert record["agreement"] == pytest.approx(right.float().mean().item())
        assert record["accepted_length"] == [*right.tolist(), False].index(False)
        output = model.generate(**inputs, return_dict_in_generate=True)
        written = output.sequences[0, : output.lengths[0]].tolist()
        hits = [written[i] == token for i, token in enumerate(label.tolist()) if i < len(written)]
        assert record["wrong_share"] == pytest.approx(1 - sum(hits) / len(label))
        assert record["confidence"] == pytest.approx(1 - output.confidences.item(), abs=1e-5)
        least = output.token_confidences[0, : output.lengths[0]].min()
        assert record["least_confidence"] == pytest.approx(1 - least.item(), abs=1e-5)
        with torch.no_grad():
            length = torch.full((1, output.lengths[0]), 5)
            p = model(**inputs, labels=length).answer_logits.softmax(-1)
        entropy = torch.distributions.Categorical(p).entropy().mean().item()
        assert record["entropy"] == pytest.approx(entropy, rel=1e-4)
        assert record["length"] == len(label)
        assert record["target"] == answer


def test_a_calibrated_checkpoint_says_the_calibrated_numbers(build, llama_dir, tmp_path):
    model, processor = build(llama_dir)
    raw = model.generate(**processor(INSTRUCTIONS), return_dict_in_generate=True, output_uncertainty_scores=True)
    records = pd.concat([records_of(model, processor)] * 4).reset_index(drop=True)
    records["length"] = 3 * np.exp(records["log_length_mean"])
    calibrate_length(model.config, records)
    assert model.config.log_length_shift == pytest.approx(np.log(3), abs=1e-5)
    model.config.log_length_scale = 2.0
    records["length_sigma"] *= 2
    records["wrong_share"] = 0.5 * records["length_sigma"].rank(pct=True)
    assert rank_correlations(records)["length_sigma"] == pytest.approx(1)
    calibrate_uncertainty(model.config, records)
    assert model.config.uncertainty_score == "length_sigma"
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    loaded = ProtoGenForConditionalGeneration.from_pretrained(tmp_path)
    inputs = ProtoGenProcessor.from_pretrained(tmp_path)(INSTRUCTIONS)
    output = loaded.generate(**inputs, return_dict_in_generate=True, output_uncertainty_scores=True)
    torch.testing.assert_close(output.predicted_lengths, 3 * raw.predicted_lengths, rtol=1e-4, atol=1e-4)
    sigma = raw.uncertainty_scores["length_sigma"]
    torch.testing.assert_close(output.uncertainty_scores["length_sigma"], 2 * sigma, rtol=1e-4, atol=1e-5)
    assert set(output.uncertainty_scores) == set(UNCERTAINTY_SCORES)
    assert ((output.uncertainties >= 0) & (output.uncertainties <= 0.5)).all()
    # Half of the tokens are right at worst, so all answers may be given where that is enough.
    thresholds = loaded.config.abstention_thresholds
    assert thresholds["0.5"] >= max(point[1] for point in loaded.config.uncertainty_points)
    assert thresholds["0.75"] < thresholds["0.5"]
    assert "0.9" not in thresholds
