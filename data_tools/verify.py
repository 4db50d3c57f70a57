"""Whether prepared files are whole and are the ones that their manifest describes."""

from __future__ import annotations

from pathlib import Path

from data_tools.manifest import (
    DataError,
    FileRecord,
    IndexedFiles,
    Manifest,
    check_indexed,
    hash_file,
    manifest_path,
    read_manifest,
)


def verify(prefix: str | Path) -> tuple[IndexedFiles, Manifest | None]:
    """Checks the index row by row, then counts and hashes against the manifest where there is one.

    Reads both files whole. Raises DataError naming the first file that is wrong.
    """
    files = check_indexed(prefix, deep=True)
    manifest = read_manifest(prefix)
    if manifest:
        _check_counts(files, manifest)
        for record in manifest.outputs:
            _check_output(manifest_path(prefix), record)
    return files, manifest


def _check_counts(files: IndexedFiles, manifest: Manifest) -> None:
    found = (files.num_documents, files.num_tokens, str(files.dtype))
    noted = (manifest.documents, manifest.tokens, manifest.dtype)
    if found != noted:
        raise DataError(
            f"{files.prefix}.idx: (documents, tokens, type) are {found}, the manifest says "
            f"{noted}; these files do not belong together, prepare the data again"
        )


def _check_output(manifest: Path, record: FileRecord) -> None:
    # The manifest's own folder and prefix: prepared files may be renamed together.
    path = manifest.with_name(
        manifest.name.removesuffix(".manifest.json") + Path(record.name).suffix
    )
    size = path.stat().st_size
    if size != record.bytes or hash_file(path) != record.xxh3:
        raise DataError(
            f"{path}: its content ({size} bytes) is not what the manifest describes "
            f"({record.bytes} bytes, xxh3 {record.xxh3}); copy it again or prepare it again"
        )
