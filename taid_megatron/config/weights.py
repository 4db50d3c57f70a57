"""Where the models' weights come from: shapes filled in from folders, and what must fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .errors import ConfigError
from .hf import differing, local_folder, read
from .schema import Architecture, Config, Student

Tree = dict[str, Any]


def with_architectures(tree: Tree) -> Tree:
    """The tree with `architecture` beside `hf`, and for a student that starts from its teacher.

    Keys of an architecture that are given stay: they change a shape whose weights are random, and
    are refused by `check_weights` where they do not fit the weights. Raises ConfigError.
    """
    models = {name: dict(tree[name]) for name in ("teacher", "student") if _is_tree(tree, name)}
    for section in models.values():
        if isinstance(section.get("hf"), str):
            folder = local_folder(Path(section["hf"]))
            section["hf"] = str(folder)
            _fill(section, read(folder).model_dump(mode="json"))
        init = section.get("init")
        if isinstance(init, dict) and "source" not in init:
            # `from`, a word of Python's, cannot be a field's name
            section["init"] = {"source" if name == "from" else name: init[name] for name in init}
    student, teacher = models.get("student", {}), models.get("teacher", {})
    layers = _kept_layers(student)
    if layers is not None and _is_tree(teacher, "architecture"):
        _fill(student, {**teacher["architecture"], "num_layers": len(layers)})
    return {**tree, **models}


def source(student: Student) -> str:
    """Where the student's weights start: 'random', 'hf' or 'teacher'."""
    if student.init is not None:
        return student.init.source
    return "hf" if student.hf is not None else "random"


def check_weights(config: Config, teacher_architecture: Architecture | None) -> None:
    """Raise ConfigError where weights would not fit the model that they are meant for.

    teacher_architecture: that of teacher.checkpoint, where it is known.
    """
    student, teacher = config.student, config.teacher
    if student.architecture.num_moe_experts is not None:
        raise ConfigError(
            "student.architecture.num_moe_experts: a mixture of experts can be a teacher, not a "
            "student; set it to null"
        )
    if source(student) == "hf":
        if student.hf is None:
            raise ConfigError("student.init.from=hf needs student.hf; give the folder")
        _check_folder("student", student.hf, student.architecture)
    if teacher is not None and teacher.hf is not None:
        assert teacher.architecture is not None  # the schema has seen to it
        _check_folder("teacher", teacher.hf, teacher.architecture)
    if source(student) == "teacher":
        if teacher is None or (teacher.hf is None and teacher.checkpoint is None):
            raise ConfigError(
                "student.init.from=teacher needs a teacher with weights; give teacher.hf or "
                "teacher.checkpoint"
            )
        whole = teacher.architecture or teacher_architecture
        if whole is not None:
            _check_kept(student, whole)


def _check_folder(model: str, folder: Path, architecture: Architecture) -> None:
    found = read(local_folder(folder))
    if field := differing(found, architecture):
        mend = " (student.init.from=random takes the shape without the weights)"
        raise ConfigError(
            f"{model}.architecture.{field}={getattr(architecture, field)}, the weights in {folder} "
            f"have {getattr(found, field)}; leave it out{mend if model == 'student' else ''}"
        )


def _check_kept(student: Student, teacher: Architecture) -> None:
    assert student.init is not None
    assert student.init.layers is not None
    layers = student.init.layers
    if max(layers) >= teacher.num_layers:
        raise ConfigError(
            f"student.init.layers names layer {max(layers)}, the teacher has 0 to "
            f"{teacher.num_layers - 1}; give layers that it has"
        )
    wanted = teacher.model_copy(update={"num_layers": len(layers)})
    if field := differing(wanted, student.architecture):
        raise ConfigError(
            f"student.architecture.{field}={getattr(student.architecture, field)}, with "
            f"student.init.from=teacher and {len(layers)} layers it is {getattr(wanted, field)}; "
            "set it so"
        )


def _is_tree(tree: Tree, name: str) -> bool:
    return isinstance(tree.get(name), dict)


def _kept_layers(student: Tree) -> list | None:
    init = student.get("init")
    layers = init.get("layers") if isinstance(init, dict) else None
    return layers if isinstance(layers, list) else None


def _fill(section: Tree, found: Tree) -> None:
    given = section.get("architecture")
    if given is None or isinstance(given, dict):
        section["architecture"] = {**found, **(given or {})}
