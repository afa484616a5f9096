"""Sums as exact as float64's, with it and without."""

import pytest
import torch

from peft_many.algebra.total import FiniteCheck, Total


def without_float64(*shape):
    total = Total(*shape, device=torch.device("cpu"))
    total.sum = total.sum.float()
    total.lost = torch.zeros_like(total.sum)
    return total


def test_two_parts_in_float32_are_nearly_as_exact_as_float64():
    parts = (
        torch.randn(2000, 5, 3, generator=torch.Generator().manual_seed(0)) * 10.0 ** torch.arange(-3.0, 2)[:, None]
    )
    expected = parts.double().sum(0)
    for total, bound in ((Total(5, 3, device=torch.device("cpu")), 1e-15), (without_float64(5, 3), 1e-12)):
        for part in parts:
            total.add(part[:2])
            total.add(part[2:], start=2)
        scale = parts.double().abs().sum(0)
        assert total.value().dtype == torch.float64
        assert ((total.value() - expected).abs() / scale).max() < bound
    naive = torch.zeros(5, 3)
    for part in parts:
        naive += part
    assert ((naive - expected).abs() / scale).max() > 1e-9


def test_the_first_number_that_is_not_finite_is_named():
    numbers = {"a": torch.tensor(1.0), "b": torch.tensor(torch.inf), "c": torch.tensor(torch.nan).double()}
    FiniteCheck({"a": numbers["a"]}, "'{}' is wrong.").refuse()
    FiniteCheck({}, "'{}' is wrong.").refuse()
    with pytest.raises(RuntimeError, match="'b' is wrong"):
        FiniteCheck(numbers, "'{}' is wrong.").refuse()


def test_numbers_are_checked_as_they_were_when_they_were_asked_for():
    number = torch.zeros(())
    asked = FiniteCheck({"a": number}, "'{}' is wrong.")
    number.fill_(torch.nan)
    assert asked.arrived
    asked.refuse()
