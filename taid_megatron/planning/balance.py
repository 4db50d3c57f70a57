"""Layers per stage of student and teacher so that the slowest stage is as fast as can be."""

from __future__ import annotations

import functools
from collections.abc import Sequence

Split = tuple[int, ...]


def balance(
    num_student: int, num_teacher: int, student: float, teacher: float, beside: Sequence[float]
) -> tuple[Split, Split]:
    """Layers per stage (student's, teacher's) with the smallest largest time, exactly.

    num_*: layers to place; student, teacher: seconds of one layer; beside: seconds of a stage's
    other work. The candidate times are few (so many layers of each beside that work), and whether
    one suffices is found by walking through the stages.
    """
    # Only ratios matter, and layouts that differ in their micro-batch share them.
    unit = sum(beside) + num_student * student + num_teacher * teacher
    ratios = tuple(round(fixed / unit, 9) for fixed in beside)
    return _balance(
        num_student, num_teacher, round(student / unit, 9), round(teacher / unit, 9), ratios
    )


@functools.lru_cache(maxsize=256)
def _balance(
    num_student: int, num_teacher: int, student: float, teacher: float, beside: tuple[float, ...]
) -> tuple[Split, Split]:
    candidates = sorted(
        {
            fixed + a * student + b * teacher
            for fixed in beside
            for a in range(num_student + 1)
            for b in range(num_teacher + 1)
            if (fixed + a * student + b * teacher) * len(beside) > 1 - 1e-6
        }
    )
    low, high = 0, len(candidates) - 1
    while low < high:
        middle = (low + high) // 2
        if _fits(candidates[middle], num_student, num_teacher, student, teacher, beside):
            high = middle
        else:
            low = middle + 1
    found = _fits(candidates[low], num_student, num_teacher, student, teacher, beside)
    assert found is not None, "all layers on one stage always fit the largest candidate"
    return found


def _fits(
    limit: float,
    num_student: int,
    num_teacher: int,
    student: float,
    teacher: float,
    beside: Sequence[float],
) -> tuple[Split, Split] | None:
    """A split of which no stage is slower than `limit`; None where there is none.

    For each number of student layers placed so far, keeps the most teacher layers that fit.
    """
    limit *= 1 + 1e-12
    best: dict[int, tuple[int, Split, Split]] = {0: (0, (), ())}
    for fixed in beside:
        reached: dict[int, tuple[int, Split, Split]] = {}
        for placed, (teachers, own, others) in best.items():
            for a in range(num_student - placed + 1):
                room = limit - fixed - a * student
                if room < 0:
                    break
                b = num_teacher - teachers
                if teacher > 0:
                    b = min(b, int(room / teacher))
                if placed + a not in reached or reached[placed + a][0] < teachers + b:
                    reached[placed + a] = (teachers + b, (*own, a), (*others, b))
        best = reached
    teachers, own, others = best.get(num_student, (-1, (), ()))
    return (own, others) if teachers == num_teacher else None
