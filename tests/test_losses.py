"""Losses against slow formulas, pair by pair."""

import math

import pytest
import torch

from modeling_protogen import ProtoGenOutput
from trainers.losses import DistanceBasedLogisticLoss, LengthNLLLoss, ReconstructionLoss, SigLIPLoss


@pytest.fixture
def pairs():
    torch.manual_seed(0)
    outputs = ProtoGenOutput(e=torch.randn(4, 2, 1, 6), m=torch.randn(4, 2, 6))
    batch = {"bank_e": torch.randn(4, 2, 1, 6), "bank_m": torch.randn(4, 2, 6)}
    for tensor in (outputs.e, outputs.m):
        tensor.requires_grad_()
    return outputs, batch


def unit_vectors(e, m):
    flat = [torch.cat([e[i].flatten(), m[i].flatten()]) for i in range(len(e))]
    return [vector / vector.norm() for vector in flat]


def test_siglip(pairs):
    outputs, batch = pairs
    loss = SigLIPLoss()
    with torch.no_grad():
        loss.bias.fill_(-1.0)
    x, y = unit_vectors(outputs.e, outputs.m), unit_vectors(batch["bank_e"], batch["bank_m"])
    total = 0
    for i in range(4):
        for j in range(4):
            z = 1 if i == j else -1
            total = total + torch.log(1 / (1 + torch.exp(z * (-10 * x[i] @ y[j] + 1))))
    value = loss(outputs, batch)
    torch.testing.assert_close(value, -total / 4)
    value.backward()
    assert loss.log_temperature.grad.abs() > 0
    assert loss.bias.grad.abs() > 0


def test_distance_based_logistic(pairs):
    outputs, batch = pairs
    x, y = unit_vectors(outputs.e, outputs.m), unit_vectors(batch["bank_e"], batch["bank_m"])

    def p(i, j, margin=0.7):
        return (1 + math.exp(-margin)) / (1 + torch.exp((x[i] - y[j]).square().sum() - margin))

    match = sum(-torch.log(p(i, i)) for i in range(4)) / 4
    other = sum(-torch.log(1 - p(i, j)) for i in range(4) for j in range(4) if i != j) / 12
    torch.testing.assert_close(DistanceBasedLogisticLoss(margin=0.7)(outputs, batch), match + other)


@pytest.mark.parametrize("loss", [SigLIPLoss(), DistanceBasedLogisticLoss()])
def test_contrastive_losses_are_finite_and_prefer_the_truth(loss, pairs):
    outputs, batch = pairs
    truth = ProtoGenOutput(e=batch["bank_e"].clone().requires_grad_(), m=batch["bank_m"].clone().requires_grad_())
    value = loss(truth, batch)
    assert value < loss(outputs, batch)
    value.backward()
    assert truth.e.grad.isfinite().all()
    one = {name: tensor[:1] for name, tensor in batch.items()}
    assert loss(ProtoGenOutput(e=outputs.e[:1], m=outputs.m[:1]), one).isfinite()


def test_distance_based_logistic_survives_equal_texts(pairs):
    _, batch = pairs
    same = {name: tensor[:1].expand_as(tensor) for name, tensor in batch.items()}
    outputs = ProtoGenOutput(e=same["bank_e"].clone().requires_grad_(), m=same["bank_m"].clone().requires_grad_())
    value = DistanceBasedLogisticLoss()(outputs, same)
    value.backward()
    assert value.isfinite()
    assert outputs.e.grad.isfinite().all()


def test_reconstruction_is_the_mean_over_texts_of_the_mean_over_tokens():
    logits = torch.randn(4, 7)
    labels = torch.tensor([[1, 2, 3], [4, -100, -100]])
    surprise = -logits.log_softmax(-1)
    expected = ((surprise[0, 1] + surprise[1, 2] + surprise[2, 3]) / 3 + surprise[3, 4]) / 2
    torch.testing.assert_close(ReconstructionLoss()(ProtoGenOutput(logits=logits), {"labels": labels}), expected)


def test_length_nll_takes_true_lengths_or_those_of_the_labels():
    outputs = ProtoGenOutput(log_length_mean=torch.tensor([1.0, 2.0]), log_length_variance=torch.tensor([0.5, 2.0]))
    labels = torch.tensor([[1, 2, 3], [4, -100, -100]])

    def direct(lengths):
        terms = zip(lengths, (1.0, 2.0), (0.5, 2.0), strict=True)
        return sum(((math.log(n) - mean) ** 2 / var + math.log(var)) / 2 for n, mean, var in terms) / 2

    loss = LengthNLLLoss()
    assert loss(outputs, {"labels": labels}).item() == pytest.approx(direct([3, 1]), rel=1e-5)
    batch = {"labels": labels, "length_labels": torch.tensor([30, 1])}
    assert loss(outputs, batch).item() == pytest.approx(direct([30, 1]), rel=1e-5)
