"""Folders are split by weight: what the gateway imports, and which way the arrow points."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

SERVICE = Path(__file__).parent.parent.parent / "service"
HEAVY = ("torch", "transformers", "peft", "vllm", "onnxruntime")


@pytest.mark.parametrize("module", ["service.api.app", "service.cli", "workers.app", "workers.sweep", "workers.runner"])
def test_the_gateway_and_the_queue_load_no_gpu_stack(module: str) -> None:
    code = f"import sys, {module}; print([m for m in {HEAVY!r} if m in sys.modules])"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert loaded.stdout.strip() == "[]"


def imported(file: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
    return names


def test_service_never_imports_workers() -> None:
    files = list(SERVICE.rglob("*.py"))
    assert len(files) > 10
    offenders = [str(f) for f in files if any(n.split(".")[0] == "workers" for n in imported(f))]
    assert offenders == []


def test_the_domain_is_pure() -> None:
    allowed = {"pydantic", "service.domain", "service.errors"}
    for file in (SERVICE / "domain").rglob("*.py"):
        for name in imported(file):
            assert name.split(".")[0] in sys.stdlib_module_names or any(name.startswith(a) for a in allowed), (
                file,
                name,
            )


def test_celery_is_named_in_one_module_of_the_gateway() -> None:
    users = [f.name for f in SERVICE.rglob("*.py") if any(n.split(".")[0] in ("celery", "kombu") for n in imported(f))]
    assert users == ["jobs.py"]


def test_settings_is_the_only_reader_of_the_environment() -> None:
    readers = [f.name for f in SERVICE.rglob("*.py") if "os.environ" in f.read_text() or "os.getenv" in f.read_text()]
    assert readers == []


def test_a_store_that_is_a_folder_loads_nothing_of_object_stores() -> None:
    code = """
import sys
from service.settings import Settings
from workers.adapter_store import adapter_store, local_copies
from workers.vllm_plugin.held_copies import HeldCopies
settings = Settings(_env_file=None, adapter_store="file:///somewhere")
HeldCopies(local_copies(settings), adapter_store(settings))
print([m for m in ("fsspec", "s3fs", "torch", "vllm") if m in sys.modules])
"""
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert loaded.stdout.strip() == "[]"
