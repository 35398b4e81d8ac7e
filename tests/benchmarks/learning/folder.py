"""The folder of a run: an interrupted one is taken up again, a finished one makes room for the next."""

import json
import secrets
import shutil
from dataclasses import dataclass
from pathlib import Path

from tests.benchmarks.learning.plan import Plan
from tests.benchmarks.learning.records import Records

RUN, RECORDS, STACK = "run.json", "records.jsonl", "stack"


class OtherRun(Exception):
    """The folder holds an unfinished run of something else."""


@dataclass(frozen=True)
class Run:
    """An opened run."""

    folder: Path
    prefix: str
    """Begins its users' names, so that a service which remembers another run does not know them."""
    records: Records
    resumed: bool

    def finished(self) -> None:
        """The next run begins anew."""
        self.records.put("finished")
        self.records.close()


def open_run(folder: Path, plan: Plan, *, where: str) -> Run:
    """Go on with the folder's run, or begin one.

    Args:
        where: what is measured, so that a run is not taken up against something else.

    Raises:
        OtherRun: an unfinished run of another plan lies there.
    """
    wanted = {"plan": plan.fields(), "where": where}
    file = folder / RUN
    if file.exists():
        found = json.loads(file.read_text())
        records = Records(folder / RECORDS)
        if records.get("finished") is None:
            if {k: found[k] for k in wanted} != wanted:
                records.close()
                raise OtherRun(f"{folder} holds an unfinished run of another plan: finish it, or remove the folder")
            return Run(folder, found["prefix"], records, resumed=True)
        records.close()
    # The users of a finished run are of no more use; what is read of it has been printed.
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    prefix = f"bench-{secrets.token_hex(4)}"
    file.write_text(json.dumps(wanted | {"prefix": prefix}, indent=1))
    return Run(folder, prefix, Records(folder / RECORDS), resumed=False)
