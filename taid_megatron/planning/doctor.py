"""`taid-megatron doctor`: is this machine ready, and has CONFIG what it needs.

Each check looks and changes nothing (but for one compilation of the native kernel into the cache,
where CONFIG asks for that kernel). A check returns findings; one that failed carries its mend.
"""

from __future__ import annotations

import os
import platform
import resource
import shutil
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from packaging.specifiers import SpecifierSet
from packaging.version import Version

from data_tools.manifest import DataError, Manifest, check_indexed, read_manifest
from taid_megatron.checkpointing.folder import find as find_checkpoint
from taid_megatron.config.batches import train_steps
from taid_megatron.config.checks import EngineAbilities, check
from taid_megatron.config.errors import UserError
from taid_megatron.config.schema import Config
from taid_megatron.planning import stack, tokenizer_ids
from taid_megatron.planning.shape import parameters

State = Literal["ok", "note", "FAIL"]
Manifests = dict[Path, Manifest | Exception | None]
"""By prefix of the data; None where there is none, or why it cannot be read."""

_SHARED_MEMORY = 1 << 30
_OPEN_FILES = 4096
_CHECKPOINT_BYTES = 14
"""Per parameter: a bf16 weight, its fp32 copy and two moments."""
_FP8_CAPABILITY = (8, 9)
_PORT = 29500


@dataclass(frozen=True)
class Finding:
    """One line of the table."""

    what: str
    state: State
    found: str
    mend: str = ""


def examine(config: Config | None) -> list[Finding]:
    """All findings, the machine's first, then the configuration's."""
    found = [*_python(), *_versions(), *_gpus(config), *_compiler(config), *_limits(), *_port()]
    if config is not None:
        manifests = _manifests(config)
        of_data = _fingerprints(manifests)
        found += [*_configuration(config), *_data(config, manifests), *_one_tokenizer(of_data)]
        found += [*_tokenizers(config, of_data), *_teacher(config, of_data), *_disk(config)]
    return found


def checkpoints(path: Path) -> list[Finding]:
    """A row for each checkpoint of a run, or for the one named: every byte read and hashed.

    Raises UserError where there is none.
    """
    from taid_megatron.checkpointing.folder import examine as examine_checkpoints

    found = []
    for checkpoint, faults in examine_checkpoints(path):
        if not faults:
            files = [file.stat().st_size for file in checkpoint.iterdir()]
            what = f"{len(files)} files, {_gib(sum(files))}, every hash is right"
            found.append(Finding(checkpoint.name, "ok", what))
        for fault in faults:
            mend = "restore it from a copy, or remove it: a resume passes over it"
            found.append(Finding(checkpoint.name, "FAIL", fault, mend))
    return found


def passed(findings: list[Finding]) -> bool:
    """Whether nothing failed."""
    return all(finding.state != "FAIL" for finding in findings)


def summary(findings: list[Finding]) -> str:
    """What failed, in a line: of a rank whose table nobody sees."""
    failed = [finding for finding in findings if finding.state == "FAIL"]
    return "doctor: " + " | ".join(f"{one.what}: {one.found}; {one.mend}" for one in failed)


def _python() -> Iterator[Finding]:
    version = platform.python_version()
    if Version(version) in SpecifierSet(">=3.10,<3.14", prereleases=True):
        yield Finding("Python", "ok", version)
    else:
        yield Finding("Python", "FAIL", version, "use Python 3.10 to 3.13")


def _versions() -> Iterator[Finding]:
    for name, wanted in stack.NEEDED.items():
        version = stack.installed(name)
        if version is None:
            mend = f"pip install '{name}{wanted}'"
            yield Finding(name, "FAIL", "not installed", mend)
        else:
            yield _fits(name, version, wanted, "FAIL")
    for name, (_, wanted) in stack.OPTIONAL.items():
        found = stack.optional(name)
        if found is not None:
            package, version = found
            yield _other_cuda(package) or _fits(package, version, wanted, "note")
    engine = stack.optional("Transformer Engine")
    if engine and stack.gpu_platform() is None:
        # megatron-core imports it where it is installed, and it raises without CUDA
        mend = f"pip uninstall {engine[0]}, or install a CUDA build of torch"
        yield Finding("Transformer Engine", "FAIL", "installed beside a CPU build of torch", mend)


def _other_cuda(package: str) -> Finding | None:
    """A package of another CUDA generation than torch's: two runtimes in one process."""
    platform, theirs = stack.gpu_platform(), stack.cuda_of_package(package)
    if platform is None or theirs is None or int(platform.partition(".")[0]) == theirs:
        return None
    mend = f"pip install the one for CUDA {platform.partition('.')[0]} instead"
    return Finding(package, "note", f"for CUDA {theirs}, torch is built for {platform}", mend)


def _fits(name: str, version: str, wanted: str, otherwise: State) -> Finding:
    if Version(version).public and SpecifierSet(wanted).contains(Version(version).public, True):
        return Finding(name, "ok", version)
    mend = f"expected {wanted}: pip install '{name}{wanted}'"
    return Finding(name, otherwise, version, mend)


def _abilities() -> EngineAbilities:
    """What the machine offers. A CPU build of torch need not be imported to know: two seconds."""
    if stack.gpu_platform() is None:
        return EngineAbilities(
            has_cuda=False, has_transformer_engine=False, has_apex=False, gpu_count=0
        )
    from taid_megatron.runtime.distributed import abilities

    return abilities()


def _gpus(config: Config | None) -> Iterator[Finding]:
    machine = _abilities()
    if not machine.has_cuda:
        has_driver = shutil.which("nvidia-smi") is not None
        mend = "install a CUDA build of torch that fits the driver" if has_driver else ""
        state: State = "FAIL" if has_driver else "note"
        found = "a driver, but none that torch can use" if has_driver else "none: runs over gloo"
        yield Finding("GPUs", state, found, mend)
        return
    import torch

    names = sorted({torch.cuda.get_device_name(i) for i in range(machine.gpu_count)})
    state = "ok" if len(names) == 1 else "note"
    mend = "" if len(names) == 1 else "ranks wait for the slowest kind: use one"
    yield Finding("GPUs", state, f"{machine.gpu_count} x {', '.join(names)}", mend)
    yield Finding("NCCL", "ok", ".".join(map(str, torch.cuda.nccl.version())))
    assert machine.compute_capability is not None
    fp8 = machine.compute_capability >= _FP8_CAPABILITY
    yield Finding("FP8", "note", "yes" if fp8 else "not on these GPUs")
    state = "ok" if machine.has_transformer_engine else "note"
    yield Finding("Transformer Engine", state, machine.transformer_engine)
    if config is not None and config.parallel.tensor > machine.gpu_count:
        yield Finding(
            "tensor parallelism",
            "note",
            f"parallel.tensor={config.parallel.tensor}, {machine.gpu_count} GPUs in this node",
            "it crosses nodes, which is slow: lower parallel.tensor",
        )


def _compiler(config: Config | None) -> Iterator[Finding]:
    if config is not None and config.loss.kernel == "native":
        from taid_megatron.losses import native

        try:
            native.load(required=True)
        except ValueError as error:
            mend = "install g++, or set loss.kernel=auto"
            yield Finding("native kernel", "FAIL", str(error), mend)
        else:
            yield Finding("native kernel", "ok", "compiled")
        return
    if config is not None and config.loss.kernel == "triton" and stack.installed("triton") is None:
        mend = "pip install triton, or set loss.kernel=auto"
        yield Finding("Triton kernels", "FAIL", "triton is not installed", mend)
    names = (os.environ.get("CXX"), "g++", "c++", "clang++")
    compiler = next((path for name in names if name and (path := shutil.which(name))), None)
    if compiler:
        yield Finding("C++ compiler", "ok", compiler)
    else:
        mend = "install g++: losses on a CPU then take the native kernel"
        yield Finding("C++ compiler", "note", "none", mend)


def _limits() -> Iterator[Finding]:
    shared = Path("/dev/shm")
    if shared.is_dir():
        free = shutil.disk_usage(shared).free
        enough = free >= _SHARED_MEMORY
        mend = "" if enough else "NCCL wants 1 GiB and more: docker run --ipc=host or --shm-size=8g"
        yield Finding("shared memory", "ok" if enough else "note", f"{_gib(free)} free", mend)
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    many = soft == resource.RLIM_INFINITY or soft >= _OPEN_FILES
    mend = "" if many else f"ulimit -n {_OPEN_FILES}, or many data files and ranks fail to open"
    yield Finding("open files", "ok" if many else "note", f"ulimit -n {soft}", mend)
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if soft != resource.RLIM_INFINITY:
        found = f"ulimit -l {soft // 1024}"
        yield Finding("locked memory", "note", found, "InfiniBand wants ulimit -l unlimited")


def _port() -> Iterator[Finding]:
    if "MASTER_PORT" in os.environ and "RANK" in os.environ:
        return  # torchrun holds it
    port = int(os.environ.get("MASTER_PORT", _PORT))
    with socket.socket() as listener:
        try:
            listener.bind(("", port))
        except OSError as error:
            mend = f"give torchrun another --rdzv-endpoint HOST:PORT or --master-port than {port}"
            yield Finding("port", "note", f"{port}: {error.strerror}", mend)
        else:
            yield Finding("port", "ok", f"{port} is free")


def _configuration(config: Config) -> Iterator[Finding]:
    ranks = int(os.environ["WORLD_SIZE"]) if "WORLD_SIZE" in os.environ else None
    try:
        check(config, ranks, engine=_abilities())
    except UserError as error:
        what, _, mend = str(error).rpartition("; ")
        yield Finding("configuration", "FAIL", what or str(error), mend)
    else:
        yield Finding("configuration", "ok", "its values fit together")


def _manifests(config: Config) -> Manifests:
    found: Manifests = {}
    for part in (*config.data.blend, *(config.data.validation or ())):
        try:
            found[part.prefix] = read_manifest(part.prefix)
        except (DataError, OSError) as error:
            found[part.prefix] = error
    return found


def _data(config: Config, manifests: Manifests) -> Iterator[Finding]:
    limit = config.student.architecture.vocab_size
    for prefix, manifest in manifests.items():
        what = f"data {prefix}"
        try:
            files = check_indexed(prefix)
            if isinstance(manifest, Exception):
                raise manifest
        except (DataError, OSError) as error:
            yield Finding(what, "FAIL", str(error), "see the message")
            continue
        if manifest is None:
            mend = "" if config.data.eod_id is not None else "set data.eod_id"
            state: State = "note" if config.data.eod_id is not None else "FAIL"
            yield Finding(what, state, "no manifest: tokenizer unknown", mend)
            continue
        if manifest.tokenizer.vocab_size > limit:
            found = f"{manifest.tokenizer.vocab_size} ids, the student knows {limit}"
            yield Finding(what, "FAIL", found, "prepare it with the models' tokenizer")
            continue
        yield Finding(what, "ok", f"{files.num_sequences:,} sequences, {manifest.tokens:,} tokens")


def _fingerprints(manifests: Manifests) -> dict[str, Path]:
    """Of the tokenizers that made the data, with a prefix that each made."""
    found: dict[str, Path] = {}
    for prefix, manifest in manifests.items():
        if isinstance(manifest, Manifest):
            found.setdefault(manifest.tokenizer.fingerprint, prefix)
    return found


def _one_tokenizer(of_data: dict[str, Path]) -> Iterator[Finding]:
    if len(of_data) > 1:
        given = ", ".join(f"{prefix}: {value[:8]}" for value, prefix in of_data.items())
        mend = "prepare all of them with one tokenizer"
        yield Finding("tokenizers of the data", "FAIL", given, mend)
    elif of_data:
        yield Finding("tokenizer of the data", "ok", next(iter(of_data))[:16])


def _teacher(config: Config, of_data: dict[str, Path]) -> Iterator[Finding]:
    teacher = config.teacher
    if teacher is None:
        return
    if teacher.hf is not None:
        yield Finding("teacher", "ok", str(teacher.hf))  # read with the configuration
        return
    if teacher.checkpoint is None:
        yield Finding("teacher", "note", "an architecture alone: random weights")
        return
    try:
        checkpoint = find_checkpoint(teacher.checkpoint)
        state = checkpoint.state()
        vocabulary, tokenizer = state["architecture"]["vocab_size"], state.get("tokenizer")
    except (UserError, OSError, ValueError, KeyError) as error:
        mend = "name a step_* folder, or a run folder that has one"
        found = str(error).removesuffix(f"; {mend}")
        if not isinstance(error, UserError):  # which names the folder itself
            found = f"{teacher.checkpoint}: {found}"
        yield Finding("teacher", "FAIL", found, mend)
        return
    yield Finding("teacher", "ok", f"{checkpoint.path}, {vocabulary} token ids")
    if tokenizer is not None and of_data and tokenizer not in of_data:
        found = f"{tokenizer[:16]}, the data's is {next(iter(of_data))[:16]}"
        mend = "prepare the data with the tokenizer that the teacher was trained with"
        yield Finding("teacher's tokenizer", "FAIL", found, mend)


def _tokenizers(config: Config, of_data: dict[str, Path]) -> Iterator[Finding]:
    """The files that come with the models against the one that made the data."""
    if len(of_data) != 1:
        return
    models = {"student": config.student.hf, "teacher": config.teacher and config.teacher.hf}
    files = {name: tokenizer_ids.find(folder) for name, folder in models.items() if folder}
    every = [file for found in files.values() for file in found]
    the_data_s = next((file for file in every if file.fingerprint in of_data), None)
    for name, found in files.items():
        what = f"{name}'s tokenizer"
        if any(file.fingerprint in of_data for file in found):
            yield Finding(what, "ok", "the one that made the data")
        elif not found:
            yield Finding(what, "note", "none in its folder: not compared with the data's")
        else:
            yield _other_tokenizer(what, found[0], the_data_s)


def _other_tokenizer(
    what: str, own: tokenizer_ids.TokenizerFile, the_data_s: tokenizer_ids.TokenizerFile | None
) -> Finding:
    """Another file than the data's: it may hold the same ids, written another way."""
    mend = f"prepare the data with {own.path}"
    different = tokenizer_ids.difference(own, the_data_s) if the_data_s else None
    if different is None:
        found = "another file than the one that made the data; ids could not be compared"
        return Finding(what, "note", found, mend)
    if different:
        return Finding(what, "FAIL", different, mend)
    return Finding(what, "ok", "another file than the data's, the same ids")


def _disk(config: Config) -> Iterator[Finding]:
    folder = config.run.folder.absolute()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    one = _CHECKPOINT_BYTES * parameters(config.student.architecture)
    every = config.checkpoint.every
    count = 1 if every is None else max(1, -(-train_steps(config) // every))
    found = f"{_gib(free)} free, {count} checkpoints of {_gib(one)}"
    if free < one:
        yield Finding("disk", "FAIL", found, "free some, or set run.folder to a larger disk")
    elif free < count * one:
        mend = "not all of them fit: raise checkpoint.every, keep fewer, or watch the disk"
        yield Finding("disk", "note", found, mend)
    else:
        yield Finding("disk", "ok", found)


def _gib(size: float) -> str:
    return f"{size / 2**30:.3g} GiB"


def network() -> list[Finding]:
    """Findings of the links between torchrun's ranks; to be called on all of them."""
    from taid_megatron.planning.network import examine as measured

    found = measured()
    if found is None:
        mend = "torchrun --nproc-per-node N -m taid_megatron doctor --network"
        return [Finding("network", "FAIL", "one rank: nothing to measure", mend)]
    rate = 16 / 1024 / found.all_reduce
    ranks = f"all-reduce of 16 MiB in {found.all_reduce * 1e3:.1f} ms, {rate:.3g} GiB/s"
    findings = [Finding("network", "ok", ranks)]
    for rank, after, times in found.slow_links():
        what = f"{times:.1f} times the median"
        mend = "look at the cable, the switch port and the load of both hosts"
        findings.append(Finding(f"link {rank} to {after}", "FAIL", what, mend))
    suspect = found.suspect()
    if suspect is not None:
        mend = "take its node out, or look at its load"
        findings.append(Finding(f"rank {suspect}", "FAIL", "both its links are slow", mend))
    return findings
