"""What sampling is asked to do: a portrait, a driver, and where the results go; one, or a CSV file of many."""

from __future__ import annotations

import csv
import os
import pathlib
import tempfile
import unicodedata
from typing import NamedTuple

from svdp_jax.config import ConfigError

COLUMNS = ("source", "driving", "output")  # of a file of jobs
ENDINGS = (".mp4", ".json", "_concat.mp4")  # of what is written for a job


class Job(NamedTuple):
    """One portrait with one driver."""

    source: pathlib.Path
    driving: pathlib.Path
    output: pathlib.Path

    @property
    def name(self) -> str:
        return f"{self.source.stem}--{self.driving.stem}"

    @property
    def results(self) -> list[pathlib.Path]:
        """The files that are written, in the order of ENDINGS."""
        return [self.output / f"{self.name}{ending}" for ending in ENDINGS]


def read(path: pathlib.Path, output: pathlib.Path) -> list[Job]:
    """The jobs of a CSV file; `output` is for those that name none. ConfigError where the file is none, or two jobs would write one file."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(f"--jobs {path} cannot be read: {error}") from error
    if not rows or not {"source", "driving"} <= set(rows[0]) <= set(COLUMNS):
        raise ConfigError(f"--jobs {path}: needs a first line with the columns source,driving and, if need be, output, and a line for each job")
    jobs: list[Job] = []
    written: set[pathlib.Path] = set()
    for line, row in enumerate(rows, start=2):
        if not row["source"] or not row["driving"]:
            raise ConfigError(f"--jobs {path}, line {line}: source and driving must both be there")
        job = Job(pathlib.Path(row["source"]), pathlib.Path(row["driving"]), pathlib.Path(row.get("output") or output))
        folder = job.output.resolve()
        if twice := next((result for result in job.results if folder / result.name in written), None):
            raise ConfigError(f"--jobs {path}, line {line}: {twice} would be written by two jobs; give them outputs of their own")
        written |= {folder / result.name for result in job.results}
        jobs.append(job)
    return jobs


def make_writable(job: Job) -> None:
    """Makes the directory of a job's results; ConfigError if nothing can be written there, or a folder has the name of one."""
    try:
        job.output.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=job.output).close()
        longest = os.pathconf(job.output, "PC_NAME_MAX") - len(f"._concat.mp4.{'0' * 32}.partial")
    except OSError as error:
        raise ConfigError(f"--output {job.output} cannot be written: {error.strerror}") from error
    unwritable = any(unicodedata.category(character) in ("Cc", "Cs") for character in job.name)  # control characters, bytes that are no text
    if unwritable or len(os.fsencode(job.name)) > longest:
        raise ConfigError(f"--output: no file can be called {ascii(job.name[:60])}... after source and driver; give them shorter, readable names")
    for path in job.results:
        if path.is_dir():
            raise ConfigError(f"--output {job.output} cannot be written: {path.name} is a folder there; move it or choose another directory")
