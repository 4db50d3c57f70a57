"""`taid-data` beside other ways of preparing data: ratios of CPU-seconds in one run.

    python tests/benchmarks/data.py [--megabytes 40] [--vocabulary 32000] [--rounds 3]
                                    [--index-documents 20000000] [--token-megabytes 300]
                                    [--windows 4000] [--json FILE]

The text is that of this Python's own library and packages (*.py), as Parquet with row groups of 500
documents; the tokenizer is a byte-level BPE trained on some of it. Every version runs in a process
of its own, its children counted, and the versions take turns; a ratio is the median over the rounds
of that round's CPU-seconds. Memory is that of all processes of a version together, the largest of
ten samples a second: what they share by a fork counts once, and so do mapped files. What is
compared has to write the same bytes, else the run fails. The last table sets the ratios beside the
targets.

`preprocess_data` follows Megatron-LM's tools/preprocess_data.py: JSON lines through a pool of one
process, `encode` document by document, megatron-core's IndexedDatasetBuilder, a tokenizer in both.
"""

from __future__ import annotations

import argparse
import filecmp
import json
import multiprocessing
import os
import resource
import shutil
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from measure import memory_of_tree, write_json

from data_tools.indexed_writer import IndexedWriter
from data_tools.manifest import WRITE_BYTES, map_blocks

_PASSES = 10
FORK = multiprocessing.get_context("fork")


# ---- measuring -----------------------------------------------------------------------------------


def cpu_seconds() -> float:
    """Of this process and its ended children."""
    own, ended = (
        resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    )
    return own.ru_utime + own.ru_stime + ended.ru_utime + ended.ru_stime


def measure(
    work: Callable[..., object], ready: Callable[[], object] | None = None
) -> dict[str, float]:
    """CPU-seconds and peak bytes of `work` in a process of its own, a fork of this one.

    ready: called there before, its time not counted; `work` takes what it returns.
    """
    receiver, sender = FORK.Pipe(duplex=False)

    def child() -> None:
        given = () if ready is None else (ready(),)
        began = cpu_seconds()
        work(*given)
        sender.send(cpu_seconds() - began)

    process = FORK.Process(target=child)
    process.start()
    peak = 0
    while process.is_alive():
        peak = max(peak, memory_of_tree(os.getpid()))
        process.join(0.1)
    if process.exitcode:
        raise SystemExit(f"a version failed with exit code {process.exitcode}")
    return {"seconds": receiver.recv(), "peak": peak}


def compare(
    versions: dict[str, Callable[..., object]],
    rounds: int,
    ready: dict[str, Callable[[], object]] | None = None,
) -> dict[str, dict[str, float]]:
    """Median CPU-seconds, and of the ratios to the first version, which are taken per round.

    ready: see `measure`, of those versions that need it.
    """
    found: dict[str, list[dict[str, float]]] = {name: [] for name in versions}
    for _ in range(rounds):
        for name, work in versions.items():
            found[name].append(measure(work, (ready or {}).get(name)))
    first = next(iter(versions))
    table = {}
    for name, results in found.items():
        ratios = [
            base["seconds"] / one["seconds"]
            for one, base in zip(results, found[first], strict=True)
        ]
        table[name] = {
            "seconds": statistics.median(one["seconds"] for one in results),
            "speed": statistics.median(ratios),
            "slowest_round": min(ratios),
            "fastest_round": max(ratios),
            "peak": max(one["peak"] for one in results),
        }
    return table


def show(title: str, table: dict[str, dict[str, float]], megabytes: float | None = None) -> None:
    first = next(iter(table))
    print(f"\n{title}; speed: CPU-seconds of '{first}' / those of the row, lowest-highest round")
    for name, row in table.items():
        rate = f"{megabytes / row['seconds']:9.2f} MB/CPU-s" if megabytes else ""
        memory = f"memory {row['peak'] / 2**20:6.0f} MiB" if "peak" in row else ""
        print(
            f"  {name:34s} {row['speed']:7.2f} ({row['slowest_round']:.2f}-"
            f"{row['fastest_round']:.2f}) {rate} {memory}"
        )


# ---- the text ------------------------------------------------------------------------------------


def make_inputs(folder: Path, megabytes: float, vocabulary: int) -> None:
    """corpus.parquet, corpus.jsonl, bpe.json, bytes (of text). Texts come in a fixed order."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from data_tools.tokenizers import train_tokenizer

    paths = sysconfig.get_paths()
    files = sorted({*Path(paths["purelib"]).rglob("*.py"), *Path(paths["stdlib"]).rglob("*.py")})
    # By hash: a mix of packages, whatever their names.
    files.sort(key=lambda file: xxhash.xxh3_64_intdigest(file.name.encode()))
    texts: list[str] = []
    size = 0
    for file in files:
        raw = file.read_bytes()
        try:
            text = raw.decode("utf-8")
        except UnicodeDecodeError:
            continue
        if text:
            texts.append(text)
            size += len(raw)
        if size >= megabytes * 1e6:
            break
    table = pa.table({"text": texts})
    pq.write_table(table, folder / "corpus.parquet", row_group_size=500)
    with (folder / "corpus.jsonl").open("w") as stream:
        stream.writelines(json.dumps({"text": text}) + "\n" for text in texts)
    train_tokenizer(texts[:: max(1, len(texts) // 1200)], folder / "bpe.json", vocabulary)
    (folder / "bytes").write_text(str(size))


# ---- tokenizing ----------------------------------------------------------------------------------


def taid_data(folder: Path, out: str, engine: str) -> None:
    from data_tools.prepare import Settings, prepare

    settings = Settings(engine=engine, workers=1, restart=True)
    prepare([folder / "corpus.parquet"], folder / "bpe.json", folder / out, settings)


def tokenizer_alone(folder: Path) -> None:
    """Ids of every text and nothing else, in the batches that taid-data takes."""
    import pyarrow.parquet as pq

    from data_tools.tokenizers import load_tokenizer

    tokenizer = load_tokenizer(folder / "bpe.json")
    for batch in pq.ParquetFile(folder / "corpus.parquet").iter_batches(64):
        tokenizer.encode_batch(batch.column(0).to_pylist())


_megatron_tokenizer: Any = None


def _start_megatron(path: Path) -> None:
    import tokenizers

    global _megatron_tokenizer
    _megatron_tokenizer = tokenizers.Tokenizer.from_file(str(path))
    _megatron_tokenizer.encode_special_tokens = True


def _encode_megatron(line: str) -> list[int]:
    text = json.loads(line)["text"]
    ids = _megatron_tokenizer.encode(text, add_special_tokens=False).ids
    return [*ids, 0]


def preprocess_data(folder: Path) -> None:
    """Source: Megatron-LM, tools/preprocess_data.py, with one worker and --append-eod."""
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    _start_megatron(folder / "bpe.json")  # the script's parent asks it for the vocabulary's size
    builder = IndexedDatasetBuilder(str(folder / "megatron.bin"), dtype=DType.optimal_dtype(32_000))
    with (
        (folder / "corpus.jsonl").open() as lines,
        FORK.Pool(1, _start_megatron, (folder / "bpe.json",)) as pool,
    ):
        for ids in pool.imap(_encode_megatron, lines, 32):
            builder.add_document(ids, [len(ids)])
        pool.close()
        pool.join()
    builder.finalize(str(folder / "megatron.idx"))


def check_equal(folder: Path) -> None:
    """All versions have written the same."""
    for ending in ("bin", "idx"):
        expected = (folder / f"megatron.{ending}").read_bytes()
        for name in ("reference", "fast"):
            if (folder / f"{name}.{ending}").read_bytes() != expected:
                raise SystemExit(f"{name}.{ending} differs from what Megatron-LM's script writes")


# ---- the index -----------------------------------------------------------------------------------


def filled_megatron(folder: Path, documents: int) -> Any:
    """The builder as it is after so many documents: what it knows of them is in its lists."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(str(folder / "theirs.bin"), dtype=np.uint16)
    builder.sequence_lengths = [500] * documents
    builder.document_indices = list(range(documents + 1))
    return builder


def filled_taid(folder: Path, documents: int) -> IndexedWriter:
    """Our writer after so many documents: their lengths are in its spool."""
    step = 1 << 16
    lengths, one = np.full(step, 500, np.int32), np.ones(step, np.int64)
    writer = IndexedWriter(folder / "ours", 32_000)
    for first in range(0, documents, step):
        count = min(step, documents - first)
        writer.add_tables(lengths[:count], one[:count])
    return writer


def compare_index(folder: Path, documents: int, rounds: int) -> dict[str, dict[str, float]]:
    """What is left to do once all documents were added. Ours is synced, theirs is not."""
    table = compare(
        {
            "megatron-core": lambda builder: builder.finalize(str(folder / "theirs.idx")),
            "taid-data": lambda writer: writer.finish(),
        },
        rounds,
        {
            "megatron-core": lambda: filled_megatron(folder, documents),
            "taid-data": lambda: filled_taid(folder, documents),
        },
    )
    if not filecmp.cmp(folder / "theirs.idx", folder / "ours.idx", shallow=False):
        raise SystemExit("the index differs from megatron-core's")
    return table


# ---- whole files ---------------------------------------------------------------------------------


def repeated(work: Callable[[], object], passes: int = _PASSES) -> Callable[[], object]:
    """Several short passes outweigh the start of the process and memory that is new to it."""
    return lambda: [work() for _ in range(passes)]


def hash_pass(path: Path) -> None:
    """verify's way through the file, with nothing but the hash."""
    digest = xxhash.xxh3_128()
    for block in map_blocks(path):
        digest.update(block)


def id_pass(path: Path) -> None:
    """verify's way through the file, with nothing but the check of the ids."""
    for block in map_blocks(path):
        np.frombuffer(block, np.uint16).max()


def verify_file(prefix: Path) -> None:
    from data_tools.verify import verify

    verify(prefix)


def merge_files(folder: Path, count: int) -> None:
    from data_tools.merge import merge

    remove_written(folder)
    merge([folder / "big"] * count, folder / "merged")


def copy_by_cp(folder: Path, count: int) -> None:
    remove_written(folder)
    for number in range(count):
        for ending in ("bin", "idx"):
            source = str(folder / f"big.{ending}")
            subprocess.run(["cp", source, str(folder / f"copy{number}.{ending}")], check=True)


def remove_written(folder: Path) -> None:
    """Each pass writes into the memory that the one before it has left."""
    for name in ("copy*", "merged*"):
        for file in folder.glob(name):
            file.unlink()


def make_big(folder: Path, megabytes: float) -> None:
    """The prepared text repeated to so many MB of tokens, written as `prepare` would."""
    from data_tools.merge import merge

    size = (folder / "reference.bin").stat().st_size
    merge([folder / "reference"] * max(2, int(megabytes * 1e6) // size), folder / "big")
    tokens = (folder / "big.bin").read_bytes()
    with (folder / "big.bin").open(
        "wb", buffering=0
    ) as stream:  # in the blocks that prepare writes
        for first in range(0, len(tokens), WRITE_BYTES):
            stream.write(tokens[first : first + WRITE_BYTES])


# ---- the run -------------------------------------------------------------------------------------


def run(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    measure(lambda: make_inputs(folder, args.megabytes, args.vocabulary))
    megabytes = float((folder / "bytes").read_text()) / 1e6
    results: dict[str, Any] = {"megabytes_of_text": megabytes}
    table = compare(
        {
            "preprocess_data": lambda: preprocess_data(folder),
            "taid-data, tokenizers": lambda: taid_data(folder, "reference", "tokenizers"),
            "tokenizers alone": lambda: tokenizer_alone(folder),
            "taid-data, tiktoken": lambda: taid_data(folder, "fast", "tiktoken"),
        },
        args.rounds,
    )
    check_equal(folder)
    show(f"Tokenizing {megabytes:.0f} MB", table, megabytes)
    results["tokenizing"] = table

    count = args.index_documents
    results["index"] = compare_index(folder, count, args.rounds)
    show(f"Index of {count:,} documents", results["index"])

    measure(lambda: make_big(folder, args.token_megabytes))
    big = (folder / "big.bin").stat().st_size / 1e6
    in_memory = np.fromfile(folder / "big.bin", np.uint16)
    table = compare(
        {
            "xxh3 of memory": repeated(lambda: xxhash.xxh3_128(in_memory)),
            "verify's hash pass": repeated(lambda: hash_pass(folder / "big.bin")),
            "largest id in memory": repeated(lambda: in_memory.max()),
            "verify's id pass": repeated(lambda: id_pass(folder / "big.bin")),
            "taid-data verify, all": repeated(lambda: verify_file(folder / "big")),
        },
        max(5, args.rounds),
    )
    show(f"Verifying {big:.0f} MB of tokens", table, _PASSES * big)
    results["verify"] = table
    table = compare(
        {
            "cp": repeated(lambda: copy_by_cp(folder, 2), 3),
            "taid-data merge": repeated(lambda: merge_files(folder, 2), 3),
        },
        max(5, args.rounds),
    )
    show(f"Merging 2 x {big:.0f} MB of tokens", table, 3 * 2 * big)
    results["merge"] = table
    with FORK.Pool(1) as pool:  # torch is not imported here
        table = pool.apply(windows, (folder / "big", args.windows, args.rounds))
    show("Reading windows of 2,048 tokens, samples per CPU-second", table)
    results["windows"] = table
    results["targets"] = targets(results, count)
    return results


def windows(prefix: Path, samples: int, rounds: int) -> dict[str, dict[str, float]]:
    """megatron-core's GPTDataset against a lean reader over the same index."""
    from windows import measure_windows

    return measure_windows(prefix, samples, rounds)


def targets(results: dict[str, Any], documents: int) -> list[dict[str, Any]]:
    """Prints and returns the ratios that the project set itself, and what came out."""

    def speed(table: str, one: str, other: str) -> float:
        return results[table][one]["speed"] / results[table][other]["speed"]

    tokenizing = results["tokenizing"]
    memory = {
        name: row["peak"] / tokenizing["preprocess_data"]["peak"]
        for name, row in tokenizing.items()
    }
    ours, fast = "taid-data, tokenizers", "taid-data, tiktoken"
    rows = [
        (f"{ours} / preprocess_data", speed("tokenizing", ours, "preprocess_data"), ">=", 1.5),
        (f"{ours} / tokenizers alone", speed("tokenizing", ours, "tokenizers alone"), ">=", 0.95),
        (f"{fast} / {ours}", speed("tokenizing", fast, ours), ">=", 5),
        ("memory, tokenizers / preprocess_data", memory[ours], "<=", 1 / 3),
        ("memory, tiktoken / preprocess_data", memory[fast], "<=", 1 / 3),
        ("index / megatron-core", speed("index", "taid-data", "megatron-core"), ">=", 50),
        (
            "index, all memory in bytes per document",
            results["index"]["taid-data"]["peak"] / documents,
            "<=",
            40,
        ),
        (
            "hash pass / xxh3 of memory",
            speed("verify", "verify's hash pass", "xxh3 of memory"),
            ">=",
            0.8,
        ),
        (
            "id pass / largest id in memory",
            speed("verify", "verify's id pass", "largest id in memory"),
            ">=",
            1,
        ),
        ("merge / cp", speed("merge", "taid-data merge", "cp"), ">=", 0.6),
        *(
            (f"windows, {name}, against GPTDataset", row["speed"], ">=", 5)
            for name, row in results["windows"].items()
            if name.startswith("lean")
        ),
    ]
    print("\nRatios and targets")
    for name, found, relation, target in rows:
        missed = found < target if relation == ">=" else found > target
        end = ", missed" if missed else ""
        print(f"  {name:48s} {found:6.2f}, target {relation} {target:.2f}{end}")
    return [dict(zip(("what", "found", "relation", "target"), row, strict=True)) for row in rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--megabytes", type=float, default=40)
    parser.add_argument("--vocabulary", type=int, default=32_000)
    parser.add_argument("--index-documents", type=int, default=20_000_000)
    parser.add_argument("--token-megabytes", type=float, default=300)
    parser.add_argument("--windows", type=int, default=4000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    began = time.monotonic()
    folder = Path(tempfile.mkdtemp(prefix="taid-data-"))
    try:
        results = run(args, folder)
    finally:
        shutil.rmtree(folder)
    print(f"\n{time.monotonic() - began:.0f} s in all, {sys.platform}")
    write_json(args.json, results)


if __name__ == "__main__":
    main()
