"""Many runs from one file: a list or a product of settings, each point in a directory of its own, and one table of them all.

output: runs/sweep            # each point below it, named by what varies
side_by_side: 2               # points at once; default 1
common: {corpus: [texts/*.txt], num_samples: 8}
product:                      # or points: a list of settings
  model: [gpt2, gpt2-medium]
  estimator: [sampled, exact]
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import pyarrow as pa
import yaml
from rich.console import Console
from rich.table import Table

from fisher_ray.cluster import STARTED_HERE, joined
from fisher_ray.plan import ConfigError, RunConfig, read_settings
from fisher_ray.reduce import SUMMARY_SCHEMA
from fisher_ray.report import number_table, print_table
from fisher_ray.run import open_run
from fisher_ray.shards import RunStore, parquet_bytes
from fisher_ray.storage import StorageError

_KNOWN = ("output", "side_by_side", "common", "product", "points")
# Exit codes of a point that has all its results, but perhaps for quarantined tasks.
_COMPLETE = (0, 4)
# What the columns of the table are called that hold settings.
_SETTING = "setting_"


@dataclass(frozen=True)
class Sweep:
    """What a sweep's file says.

    Attributes:
        points: configurations by name; the name is the last part of each one's output.
    """

    output: str
    side_by_side: int
    points: dict[str, RunConfig]


def read_sweep(path: Path) -> Sweep:
    """Read and check a sweep's file, every point of it.

    Raises:
        ConfigError: naming the setting or the point.
    """
    values = read_settings(path, "the sweep")
    if not isinstance(values, dict) or not isinstance(values.get("output"), str):
        raise ConfigError(f"sweep {path} must hold output, common and one of product and points.")
    unknown = set(values) - set(_KNOWN)
    if unknown:
        raise ConfigError(f"unknown setting {sorted(unknown)[0]!r} in the sweep {path}. Known: {', '.join(_KNOWN)}.")
    if ("product" in values) == ("points" in values):
        raise ConfigError(f"sweep {path} must hold either product (settings with lists of values) or points (a list).")
    side_by_side = values.get("side_by_side", 1)
    if not isinstance(side_by_side, int) or side_by_side < 1:
        raise ConfigError(f"side_by_side must be at least 1, got {side_by_side!r}.")
    common = values.get("common") or {}
    if not isinstance(common, dict):
        raise ConfigError(f"common in the sweep {path} must hold settings by name, got {type(common).__name__}.")
    points: dict[str, RunConfig] = {}
    for point in _points(values, path):
        name = _name(point)
        if name in points:
            raise ConfigError(
                f"two points in the sweep {path} are called {name}. Leave one out, or spell them differently."
            )
        try:
            points[name] = RunConfig.from_dict({**common, **point, "output": f"{values['output'].rstrip('/')}/{name}"})
        except ValueError as error:
            raise ConfigError(f"point {name}: {error}") from error
    return Sweep(values["output"], side_by_side, points)


def _points(values: dict[str, Any], path: Path) -> list[dict[str, Any]]:
    if "points" in values:
        points = values["points"]
        if not isinstance(points, list) or not points or not all(map(_by_name, points)):
            raise ConfigError(f"points in the sweep {path} must be a list of settings by name.")
        return points
    product = values["product"]
    if not _by_name(product) or not all(isinstance(values, list) and values for values in product.values()):
        raise ConfigError(f"product in the sweep {path} must hold settings, each with a list of values.")
    return [dict(zip(product, chosen, strict=True)) for chosen in itertools.product(*product.values())]


def _by_name(settings: Any) -> bool:
    return isinstance(settings, dict) and bool(settings) and all(isinstance(name, str) for name in settings)


def _name(point: dict[str, Any]) -> str:
    """A folder's name that says what varies; a digest of the point where letters had to go."""
    said = ",".join(f"{key}={' '.join(map(str, v)) if isinstance(v, list) else v}" for key, v in sorted(point.items()))
    name = re.sub(r"[^A-Za-z0-9_.,=+-]+", "-", said)
    if name == said and len(name) <= 100:
        return name
    values = json.dumps(point, sort_keys=True, default=str)
    return f"{name[:80]}-{hashlib.sha256(values.encode()).hexdigest()[:8]}"


def run_sweep(sweep: Sweep, console: Console) -> int:
    """Run every point, in processes of their own on one Ray cluster, and write one table of all.

    A point that is complete is read back.

    Returns:
        0, or the exit code of the first point that gave another one; the other points are run all the same.
    """
    with joined() as address, _Children() as children, tempfile.TemporaryDirectory() as folder:

        def one(item: tuple[int, tuple[str, RunConfig]]) -> int:
            number, (name, config) = item
            path = Path(folder) / f"{number}.yaml"
            path.write_text(yaml.safe_dump(config.asdict()), encoding="utf-8")
            console.print(f"{name}: begun", highlight=False, soft_wrap=True)
            return children.run(name, path, address, console)

        with ThreadPoolExecutor(sweep.side_by_side) as threads:
            codes = list(threads.map(one, enumerate(sweep.points.items())))
    rows = list(_rows(sweep, codes))
    print_table(console, _table([row for row in rows if row.get("group") is None]))
    if any(row["layer"] is not None for row in rows):
        store = RunStore(sweep.output)
        varied = [(name, pa.string()) for name in rows[0] if name.startswith(_SETTING)]
        schema = pa.schema([("point", pa.string()), ("code", pa.int64()), *varied, *SUMMARY_SCHEMA])
        store.write("summary.parquet", parquet_bytes(pa.Table.from_pylist(rows, schema)))
        console.print(f"all points: {store.uri}/summary.parquet", soft_wrap=True, highlight=False)
    return next((code for code in codes if code), 0)


class _Children:
    """The points at work; a stop of the sweep is passed on to them, and none is begun after it."""

    def __init__(self) -> None:
        self._running: set[subprocess.Popen[str]] = set()
        self._stopped = False

    def __enter__(self) -> _Children:
        self._main = threading.current_thread() is threading.main_thread()
        if self._main:
            self._before = signal.signal(signal.SIGTERM, self._stop)
        return self

    def __exit__(self, *error: object) -> None:
        if self._main:
            signal.signal(signal.SIGTERM, self._before)

    def _stop(self, number: int, frame: FrameType | None) -> None:
        self._stopped = True
        for process in list(self._running):
            with contextlib.suppress(OSError):
                process.send_signal(number)

    def run(self, name: str, config: Path, address: str, console: Console) -> int:
        if self._stopped:
            return 130
        command = [sys.executable, "-m", "fisher_ray.cli", "run", "--config", str(config)]
        process = subprocess.Popen(
            command,
            env={STARTED_HERE: "" if os.environ.get("RAY_ADDRESS") else "1", **os.environ, "RAY_ADDRESS": address},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self._running.add(process)
        if self._stopped:  # between the two
            process.send_signal(signal.SIGTERM)
        try:
            for line in process.stdout or ():
                if line.strip():
                    console.print(f"{name}: {line.rstrip()}", highlight=False, soft_wrap=True)
            return process.wait()
        finally:
            self._running.discard(process)


def _rows(sweep: Sweep, codes: list[int]) -> Iterator[dict[str, Any]]:
    """Each point with what it sets otherwise than others and its summary; one empty row where it has none."""
    told = {name: {k: v for k, v in config.asdict().items() if k != "output"} for name, config in sweep.points.items()}
    first = next(iter(told.values()))
    varied = [setting for setting in first if any(each[setting] != first[setting] for each in told.values())]
    for (name, config), code in zip(sweep.points.items(), codes, strict=True):
        rows: list[dict[str, Any]] = []
        with contextlib.suppress(StorageError):  # there is no run, or it is damaged
            if code in _COMPLETE:  # else what is there may be of other settings, of before the file was changed
                rows = open_run(config.output).summary
        for row in rows or [dict.fromkeys(SUMMARY_SCHEMA.names)]:
            settings = {f"{_SETTING}{setting}": _plain(told[name][setting]) for setting in varied}
            yield {"point": name, "code": code, **settings, **row}


def _plain(value: Any) -> str | None:
    return " ".join(map(str, value)) if isinstance(value, list) else None if value is None else str(value)


def _table(rows: list[dict[str, Any]]) -> Table:
    table = number_table("point", "exit", "layer", "positions", "trace", "entropy rank", "99 % rank", folded="point")
    for row in rows:
        if row["layer"] is None:
            table.add_row(row["point"], str(row["code"]), "-", "-", "-", "-", "-")
            continue
        error = row["trace_error"]
        trace = f"{row['trace']:.4g}" + ("" if error is None else f" ± {error:.2g}")
        numbers = (trace, f"{row['entropy_rank']:.1f}", str(row["trace_rank_99"]))
        table.add_row(row["point"], str(row["code"]), str(row["layer"]), f"{row['positions']:,}", *numbers)
    return table
