"""Run the whole suite on this machine's GPU and record it: `python tests/gpu_results/record.py FILE [--commit HASH] …`.

The record says which GPU, driver and versions, which commit, and how many tests passed, failed and were skipped (and
why), per test file. Further arguments are pytest's, and so is the exit status.
"""

from __future__ import annotations

import argparse
import collections
import datetime
import importlib.metadata
import json
import platform
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGES = (
    "numpy",
    "numba",
    "numba-cuda",
    "cupy-cuda13x",
    "cuda-core",
    "cuda-bindings",
    "ml-dtypes",
    "torch",
    "pytest",
)


def version(package: str) -> str | None:
    """The installed version of a distribution."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def commit() -> str:
    """The checked-out commit, marked if the tree differs from it."""

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else ""

    head = git("rev-parse", "HEAD")
    return f"{head}{' with changes' if git('status', '--porcelain') else ''}" if head else "unknown"


def machine() -> dict[str, str]:
    """The GPU and its driver."""
    import cupy

    properties = cupy.cuda.runtime.getDeviceProperties(0)
    return {
        "gpu": properties["name"].decode(),
        "compute capability": f"{properties['major']}.{properties['minor']}",
        "driver's CUDA": str(cupy.cuda.runtime.driverGetVersion()),
        "python": platform.python_version(),
    }


def counts(report: Path) -> tuple[dict[str, dict[str, int]], dict[str, int]]:
    """Per test file, how many tests ended how; and the reasons of the skipped ones."""
    files: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    reasons: collections.Counter[str] = collections.Counter()
    for case in ET.parse(report).iter("testcase"):
        outcome = "passed"
        for child in case:
            if child.tag in ("failure", "error", "skipped"):
                outcome = {"failure": "failed", "error": "failed"}.get(child.tag, child.tag)
                if outcome == "skipped":
                    reasons[child.get("message", "")] += 1
        files[case.get("classname", "")][outcome] += 1
    return {name: dict(counter) for name, counter in sorted(files.items())}, dict(reasons.most_common())


def main() -> int:
    """Run pytest with every backend named, so that one that is missing fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--commit", help="the commit under test, where there is no git checkout")
    arguments, for_pytest = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", f"--junitxml={report}"]
        for backend in ("cupy", "numba", "cpu"):
            command += ["--backend", backend]
        done = subprocess.run([*command, *for_pytest], cwd=ROOT)
        files, reasons = counts(report)
    record = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "commit": arguments.commit or commit(),
        "machine": machine(),
        "versions": {package: version(package) for package in PACKAGES},
        "tests": files,
        "skipped because": reasons,
    }
    arguments.file.write_text(json.dumps(record, indent=1) + "\n")
    print(f"wrote {arguments.file}")
    return done.returncode


if __name__ == "__main__":
    sys.exit(main())
