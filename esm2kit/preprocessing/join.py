"""Join cluster ids and record ids in DuckDB, which spills to disk if the memory limit is reached.

For all kinds of input the result is three arrays over the rows of one staged store. Clusters are in the order of their
representatives in the FASTA, and members in the order of their rows.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import duckdb
import numpy as np

from esm2kit.core.errors import InputError
from esm2kit.core.files import atomic_path
from esm2kit.preprocessing.cluster_tables import cluster_table_path, mapping_table_paths
from esm2kit.preprocessing.ingest import StagedFasta

_FETCH_ROWS = 1 << 20
# with less memory per thread, DuckDB's joins may run out of memory before they can spill
_GB_PER_THREAD = 0.25


class JoinedClusters(NamedTuple):
    """Clusters over the rows of a staged store, as .npy files of int64.

    Args:
        offsets: (C + 1,) array; the members of cluster c are `members[offsets[c] : offsets[c + 1]]`.
        members: (M,) rows.
        representatives: (C,) rows.
    """

    offsets: Path
    members: Path
    representatives: Path


def joined_paths(work: Path) -> JoinedClusters:
    """Return the paths of the joined clusters in the work folder."""
    return JoinedClusters(*(work / f"all_{name}.npy" for name in JoinedClusters._fields))


class Engine:
    """A DuckDB database in the work folder, with a memory limit and a spill folder; a context manager.

    Args:
        work: The work folder.
        memory_gb: Memory limit of DuckDB in GB.
        threads: Largest number of threads.
    """

    def __init__(self, work: Path, memory_gb: float, threads: int) -> None:
        self._path = work / "join.duckdb"
        self._remove()
        threads = max(1, min(threads, int(memory_gb / _GB_PER_THREAD)))
        settings = {"memory_limit": f"{memory_gb}GB", "threads": threads, "temp_directory": str(work / "spill")}
        self._connection = duckdb.connect(str(self._path), config=settings | {"preserve_insertion_order": False})

    def run(self, sql: str) -> None:
        """Execute a statement."""
        self._connection.execute(sql)

    def fetch_rows(self, sql: str) -> list[tuple]:
        """Fetch all rows of a query."""
        return self._connection.execute(sql).fetchall()

    def fetch_value(self, sql: str) -> int:
        """Fetch the single value of a query."""
        return self.fetch_rows(sql)[0][0]

    def fetch_arrays(self, sql: str) -> Iterator[list[np.ndarray]]:
        """Yield the integer columns of a query in blocks of rows."""
        with self._connection.sql(sql).to_arrow_reader(_FETCH_ROWS) as reader:
            for batch in reader:
                yield [column.to_numpy() for column in batch.columns]

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *_: object) -> None:
        self._connection.close()
        self._remove()

    def _remove(self) -> None:
        """Delete the database and the write-ahead log of a killed call, which DuckDB would replay."""
        for path in (self._path, self._path.with_suffix(".duckdb.wal")):
            path.unlink(missing_ok=True)


def create_unique_view(engine: Engine, view: str, staged: StagedFasta) -> int:
    """Create a view of the records without repeats; the first of equal records is kept.

    Args:
        engine: The database.
        view: Name of the view, with columns row, id, residues and hash.
        staged: The records.

    Returns:
        The number of repeated records.

    Raises:
        InputError: Records with the same id have different sequences.
    """
    keys = f"(SELECT file_row_number AS row, * FROM read_parquet('{escape_sql(staged.keys)}', file_row_number = true))"
    # group by hashes first: numbers need less time and memory than text, and only repeated ids remain
    engine.run(
        f"CREATE TABLE {view}_repeated AS SELECT id, min(row) AS first, min(hash) <> max(hash) OR "
        f"min(residues) <> max(residues) AS differ FROM {keys} k SEMI JOIN (SELECT hash(id) AS same "
        f"FROM {keys} GROUP BY same HAVING count(*) > 1) ON same = hash(k.id) GROUP BY id HAVING count(*) > 1"
    )
    if found := engine.fetch_rows(
        f"SELECT k.id, r.first, k.row FROM {keys} k JOIN {view}_repeated r USING (id) JOIN {keys} f ON f.row = r.first "
        f"WHERE r.differ AND (k.hash, k.residues) <> (f.hash, f.residues) ORDER BY k.row LIMIT 1"
    ):
        name, first, row = found[0]
        raise InputError(
            f"{staged.locate(row)}: id '{name}' has another sequence than in {staged.locate(first)}. Rename or remove "
            "one of the two records.",
            code="clusters.ambiguous-id",
            name=name,
        )
    if not engine.fetch_value(f"SELECT count(*) FROM {view}_repeated"):
        engine.run(f"CREATE VIEW {view} AS SELECT * FROM {keys}")
        return 0
    engine.run(
        f"CREATE TABLE {view}_dropped AS SELECT row FROM {keys} k JOIN {view}_repeated r USING (id) "
        "WHERE k.row > r.first"
    )
    engine.run(f"CREATE VIEW {view} AS SELECT k.* FROM {keys} k ANTI JOIN {view}_dropped d ON d.row = k.row")
    return engine.fetch_value(f"SELECT count(*) FROM {view}_dropped")


def join_singletons(engine: Engine, records: StagedFasta, work: Path) -> dict[str, int]:
    """Make each record a cluster of its own; returns the counts of omitted records."""
    repeats = create_unique_view(engine, "records", records)
    engine.run("CREATE TABLE clusters AS SELECT row AS cluster, row AS representative FROM records")
    engine.run("CREATE VIEW pairs AS SELECT cluster, representative AS row FROM clusters")
    return {"repeated_records": repeats, **_write_arrays(engine, records, work)}


def join_mapping(
    engine: Engine, records: StagedFasta, uniref50: StagedFasta, mapping: Path, work: Path
) -> dict[str, int]:
    """Join the esm2nv files: cluster representatives, records to sample from, and the mapping between them.

    Args:
        engine: The database.
        records: The sampler FASTA.
        uniref50: Keys of the train FASTA, which gives the order of the clusters.
        mapping: Path of mapping.tsv for error messages; its content is read from `mapping_table_paths(work)`.
        work: Folder of the result, at `joined_paths(work)`.

    Returns:
        Counts of omitted records.

    Raises:
        InputError: An id is missing in one of the files, a record is a member of two clusters, or an id has two
            sequences.
    """
    clusters, members = mapping_table_paths(work)
    repeats = create_unique_view(engine, "records", records)
    repeats_50 = create_unique_view(engine, "uniref50", uniref50)
    engine.run(
        f"CREATE TABLE found AS SELECT c.line, c.cluster AS id, u.row AS cluster, r.row AS representative, "
        f"u.hash = r.hash AND u.residues = r.residues AS equal FROM read_parquet('{escape_sql(clusters)}') c "
        "LEFT JOIN uniref50 u ON u.id = c.cluster LEFT JOIN records r ON r.id = c.cluster"
    )
    # the first line is a header, unless its first column names a record
    engine.run("DELETE FROM found WHERE line = (SELECT min(line) FROM found) AND cluster IS NULL")
    train = uniref50.files[0]["path"]
    for name, line in engine.fetch_rows("SELECT id, line FROM found WHERE cluster IS NULL ORDER BY line LIMIT 1"):
        raise InputError(
            f"{mapping}: line {line:,}: cluster '{name}' is not in {train}. Add its record, or remove the line.",
            code="clusters.unknown",
            path=mapping,
            line=line,
            name=name,
        )
    for name, row in engine.fetch_rows(
        "SELECT id, cluster FROM found WHERE representative IS NULL ORDER BY line LIMIT 1"
    ):
        remedy = "If the sampler FASTA has no representatives, pass both files: --sampler_fasta sampler train."
        raise InputError(
            f"{uniref50.locate(row)}: '{name}' is not in {records.files[0]['path']}. {remedy}",
            code="clusters.not-in-sampler",
            name=name,
        )
    for name, row, other in engine.fetch_rows(
        "SELECT id, cluster, representative FROM found WHERE NOT equal ORDER BY line LIMIT 1"
    ):
        found = f"{records.locate(other)}: id '{name}' has another sequence than in {uniref50.locate(row)}"
        raise InputError(f"{found}. Correct one of the two records.", code="clusters.ambiguous-id", name=name)
    for name, first, second in engine.fetch_rows(
        "SELECT any_value(id), min(line), max(line) AS last FROM found GROUP BY cluster HAVING count(*) > 1 "
        "ORDER BY last LIMIT 1"
    ):
        raise InputError(
            f"{mapping}: line {second:,}: cluster '{name}' is also on line {first:,}. Merge the two lines.",
            code="clusters.twice",
            path=mapping,
            line=second,
            name=name,
        )
    for name, row in engine.fetch_rows(
        "SELECT u.id, u.row FROM uniref50 u ANTI JOIN found f ON f.cluster = u.row ORDER BY u.row LIMIT 1"
    ):
        raise InputError(
            f"{uniref50.locate(row)}: '{name}' has no line in {mapping}. Add one, or remove the record.",
            code="clusters.no-line",
            path=mapping,
            name=name,
        )
    engine.run("CREATE VIEW clusters AS FROM found")
    engine.run(
        f"CREATE TABLE pairs AS SELECT c.cluster, m.line, r.row FROM read_parquet('{escape_sql(members)}') m "
        "JOIN found c USING (line) LEFT JOIN records r ON r.id = m.member"
    )
    engine.run(f"CREATE VIEW members AS FROM read_parquet('{escape_sql(members)}')")
    _check_members_exist(engine, mapping, records, "members", "records", "id")
    return {"repeated_records": repeats + repeats_50, **_write_arrays(engine, records, work, mapping)}


def join_cluster_tsv(engine: Engine, records: StagedFasta, tables: list[Path], work: Path) -> dict[str, int]:
    """Join MMseqs2's clusters with the FASTA that was clustered.

    Args:
        engine: The database.
        records: The FASTA.
        tables: One cluster TSV, whose members are sampled. Or two, the finer (90%) and the coarser (50%, clustered
            from the representatives of the finer), in which case those representatives are sampled. The paths are for
            error messages; the content is read from `cluster_table_path(work, level)`.
        work: Folder of the result, at `joined_paths(work)`.

    Returns:
        Counts of omitted records.

    Raises:
        InputError: An id is not in the FASTA, the two levels do not match, or a record is a member of two clusters.
    """
    repeats = create_unique_view(engine, "records", records)
    coarse = tables[-1]
    for level in range(len(tables)):
        engine.run(f"CREATE VIEW level_{level} AS FROM read_parquet('{escape_sql(cluster_table_path(work, level))}')")
    coarse_view = f"level_{len(tables) - 1}"
    if len(tables) == 2:
        for name, line in engine.fetch_rows(
            "SELECT m.member, m.line FROM level_1 m ANTI JOIN level_0 c ON c.cluster = m.member ORDER BY m.line LIMIT 1"
        ):
            raise InputError(
                f"{coarse}: line {line:,}: member '{name}' is not the representative of a cluster in {tables[0]}. "
                "Pass the finer level first, and cluster the coarser level from its representatives.",
                code="clusters.levels",
                path=coarse,
                line=line,
                name=name,
            )
        for name, line in engine.fetch_rows(
            "SELECT c.cluster, c.line FROM level_0 c ANTI JOIN level_1 m ON m.member = c.cluster "
            "ORDER BY c.line LIMIT 1"
        ):
            raise InputError(
                f"{tables[0]}: line {line:,}: '{name}' is not in a cluster of {coarse}. Cluster both levels again.",
                code="clusters.levels",
                path=tables[0],
                line=line,
                name=name,
            )
    # for headers of the form sp|accession|name, MMseqs2 writes only the accession
    engine.run(
        r"CREATE VIEW names AS SELECT id AS name, row FROM records UNION ALL SELECT regexp_extract(id, "
        r"'^(?:sp|tr|up|ur|gi|gb|ref|pdb|lcl)\|([^|]+)(?:\||$)', 1) AS name, row FROM records WHERE contains(id, '|')"
    )
    engine.run(
        f"CREATE TABLE clusters AS SELECT c.cluster AS id, c.line, n.row AS cluster, n.row AS representative FROM "
        f"(SELECT cluster, min(line) AS line FROM {coarse_view} GROUP BY cluster) c "
        "LEFT JOIN names n ON n.name = c.cluster"
    )
    for name, line in engine.fetch_rows("SELECT id, line FROM clusters WHERE cluster IS NULL ORDER BY line LIMIT 1"):
        fasta = records.files[0]["path"]
        raise InputError(
            f"{coarse}: line {line:,}: '{name}' is not in {fasta}. Pass the FASTA that was clustered.",
            code="clusters.unknown",
            path=coarse,
            line=line,
            name=name,
        )
    engine.run(
        f"CREATE TABLE pairs AS SELECT c.cluster, m.line, n.row FROM {coarse_view} m "
        "JOIN clusters c ON c.id = m.cluster LEFT JOIN names n ON n.name = m.member"
    )
    _check_members_exist(engine, coarse, records, coarse_view, "names", "name")
    return {"repeated_records": repeats, **_write_arrays(engine, records, work, coarse)}


def _check_members_exist(
    engine: Engine, table: Path, records: StagedFasta, members: str, names: str, name: str
) -> None:
    for (line,) in engine.fetch_rows("SELECT min(line) FROM pairs WHERE row IS NULL HAVING count(*) > 0"):
        [(absent,)] = engine.fetch_rows(
            f"SELECT min(member) FROM {members} WHERE line = {line} AND member NOT IN (SELECT {name} FROM {names})"
        )
        fasta = records.files[0]["path"]
        raise InputError(
            f"{table}: line {line:,}: member '{absent}' is not in {fasta}. Add its record, or remove the id.",
            code="clusters.unknown",
            path=table,
            line=line,
            name=absent,
        )


def _write_arrays(engine: Engine, records: StagedFasta, work: Path, table: Path | None = None) -> dict[str, int]:
    """Write `clusters` (cluster, representative) and `pairs` (cluster, row) as arrays; returns the omitted records."""
    files = joined_paths(work)
    num_clusters = engine.fetch_value("SELECT count(*) FROM clusters")
    with NpyWriter(files.representatives) as writer:
        for (rows,) in engine.fetch_arrays("SELECT representative FROM clusters ORDER BY cluster"):
            writer.append(rows)
    # one byte per record: whether it is in a cluster
    is_clustered = np.zeros(records.num_records, dtype=bool)
    previous, last_row = -1, -1
    with NpyWriter(files.members) as member_writer, NpyWriter(files.offsets) as offset_writer:
        offset_writer.append(np.zeros(1, np.int64))
        for ordered, rows in engine.fetch_arrays("SELECT cluster, row FROM pairs ORDER BY cluster, row"):
            is_new = np.diff(ordered, prepend=previous) != 0
            once = is_new | (np.diff(rows, prepend=last_row) != 0)  # an id may occur twice on a line
            previous, last_row = ordered[-1], rows[-1]
            rows = rows[once]
            starts = np.flatnonzero(is_new[once]) + member_writer.size
            offset_writer.append(starts if member_writer.size else starts[1:])
            member_writer.append(rows)
            is_clustered[rows] = True
        offset_writer.append(np.array([member_writer.size]))
    assert offset_writer.size == num_clusters + 1, "every cluster has members"
    if np.count_nonzero(is_clustered) < member_writer.size:
        _raise_shared_member(engine, table)
    is_clustered[np.load(files.representatives, mmap_mode="r")] = True
    return {"unclustered_records": int(records.num_records - np.count_nonzero(is_clustered))}


def _raise_shared_member(engine: Engine, table: Path | None) -> None:
    [(name, first, second)] = engine.fetch_rows(
        "SELECT r.id, a.id, b.id FROM (SELECT row, min(cluster) AS a, max(cluster) AS b FROM pairs GROUP BY row "
        "HAVING min(cluster) < max(cluster) ORDER BY row LIMIT 1) p JOIN records r USING (row) "
        "JOIN clusters a ON a.cluster = p.a JOIN clusters b ON b.cluster = p.b"
    )
    raise InputError(
        f"{table}: '{name}' is a member of two clusters, '{first}' and '{second}'. Remove it from one of them.",
        code="clusters.twice",
        path=table,
        name=name,
    )


class NpyWriter:
    """Writes a one-dimensional .npy file of int64 in pieces and atomically; a context manager."""

    def __init__(self, path: Path) -> None:
        self._atomic = atomic_path(path)
        self.size = 0

    def __enter__(self) -> "NpyWriter":
        self._file = open(self._atomic.__enter__(), "wb")
        self._write_header()
        return self

    def _write_header(self) -> None:
        # numpy pads the header for the longest shape, so the final header has the same length as that of size 0
        header = {"descr": "<i8", "fortran_order": False, "shape": (self.size,)}
        np.lib.format.write_array_header_1_0(self._file, header)

    def append(self, values: np.ndarray) -> None:
        """Append (n,) integers."""
        # tofile would hide the reason of a failed write
        self._file.write(np.ascontiguousarray(values, dtype="<i8").data)
        self.size += values.size

    def __exit__(self, *error: Any) -> None:
        try:
            if error[0] is None:
                self._file.seek(0)
                self._write_header()
        finally:
            self._file.close()
            self._atomic.__exit__(*error)


def escape_sql(path: Path) -> str:
    """Escape a path for an SQL string."""
    return str(path).replace("'", "''")
