"""vLLM on the CPU compiles its small functions only where there is what that takes."""

import sysconfig
from pathlib import Path

import pytest

from workers.vllm_plugin.cpu_platform import compile_backend


def test_without_a_compiler_or_pythons_header_functions_run_as_they_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler = tmp_path / "compiler"
    compiler.write_text("#!/bin/sh\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    assert compile_backend() == "eager"
    (tmp_path / "Python.h").touch()
    assert compile_backend() == "inductor"
    monkeypatch.setenv("CXX", str(tmp_path / "none"))
    assert compile_backend() == "eager"
