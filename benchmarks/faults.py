"""What autofr says, and what it keeps, when processes, databases, disks and models fail.

Runs tests/test_faults.py and writes down what every test has noted. The tests of a shared study
need PostgreSQL, those of a full disk need root.

Example: `python benchmarks/faults.py`
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import types
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import torch
from protocol import write

ROOT = Path(__file__).parents[1]


def main() -> None:
    """Run the tests and write the table; exit 1 where one of them fails."""
    with tempfile.TemporaryDirectory() as place:
        report = Path(place) / "report.xml"
        command = ["-m", "pytest", "-q", "-p", "no:xdist", "-o", "junit_family=xunit1", "-m", ""]
        command += [f"--junitxml={report}"]
        done = subprocess.run(
            [sys.executable, *command, *sys.argv[1:], "tests/test_faults.py"], cwd=ROOT, check=False
        )
        suite = ElementTree.parse(report).getroot()
    if done.returncode:
        sys.exit("a law does not hold: nothing is written")
    found = [item.attrib["value"] for item in suite.iter("property")]
    rows = [json.loads(text) for text in found]
    skipped = len([*suite.iter("skipped")])
    note = (
        "Faults that tests/test_faults.py brings about in real processes, what autofr said, and"
        " what it kept: nothing finished is lost, nothing counts twice."
        f"{f' {skipped} of its tests were skipped here.' if skipped else ''}"
    )
    cpu = types.SimpleNamespace(_execution_device=torch.device("cpu"))
    write("faults", cpu, "python benchmarks/faults.py", rows, note)


if __name__ == "__main__":
    main()
