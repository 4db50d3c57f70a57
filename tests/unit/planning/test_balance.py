"""The balanced split against all splits."""

from __future__ import annotations

from itertools import product

import pytest

from taid_megatron.planning.balance import balance


def slowest(own, others, student, teacher, beside) -> float:
    return max(
        fixed + a * student + b * teacher for a, b, fixed in zip(own, others, beside, strict=True)
    )


@pytest.mark.parametrize(
    ("num_student", "num_teacher", "student", "teacher", "beside"),
    [
        (4, 6, 1.0, 0.5, [0.0, 0.0, 2.3]),
        (5, 7, 0.3, 0.7, [0.1, 0.0, 1.9]),
        (3, 0, 1.0, 0.0, [0.0, 1.5]),
        (2, 5, 1.0, 1.0, [0.0, 9.0, 0.0]),
    ],
)
def test_no_split_has_a_faster_slowest_stage(
    num_student, num_teacher, student, teacher, beside
) -> None:
    own, others = balance(num_student, num_teacher, student, teacher, beside)
    assert (sum(own), sum(others)) == (num_student, num_teacher)
    best = min(
        slowest(a, b, student, teacher, beside)
        for a in product(range(num_student + 1), repeat=len(beside))
        if sum(a) == num_student
        for b in product(range(num_teacher + 1), repeat=len(beside))
        if sum(b) == num_teacher
    )
    assert slowest(own, others, student, teacher, beside) == pytest.approx(best)
