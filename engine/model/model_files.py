"""The folder of a model: what may be wrong with it is said in one line, before or after loading.

transformers takes what it finds: it draws weights that are missing and leaves out those that it has
no place for. Its loading report tells; `require_complete` turns the report into an error.
"""

import hashlib
import json
import textwrap
from collections.abc import Callable
from pathlib import Path

from safetensors import safe_open
from transformers import AutoConfig
from transformers.utils import (
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    cached_file,
    logging,
)
from transformers.utils.hub import get_checkpoint_shard_files

from hicodet import InputError

LFS_POINTER = b"version https://git-lfs"
WRAPPERS = ("module.", "_orig_mod.")  # of DistributedDataParallel and of torch.compile


def read_from_model(read: Callable, model: str, what: str):
    """read(model), a reader of the library. Raises InputError naming the folder if it cannot."""
    require_folder(model)
    try:
        return read(model)
    except InputError as error:  # of the layers of quantized.py, which do not know the folder
        raise InputError(f"--model {model}: {error}") from None
    except Exception as error:  # the libraries raise some twenty kinds for broken files
        cause = textwrap.shorten(str(error), 200) or type(error).__name__
        raise InputError(f"--model {model}: no {what} that can be read ({cause})") from error


def require_folder(model: str) -> None:
    """Raise InputError if `model` is a path to no folder, or to one whose fault can be told."""
    folder = Path(model)
    if not folder.is_dir():
        if folder.is_absolute() or model.startswith((".", "~")) or model.count("/") != 1:
            raise InputError(f"--model {model}: there is no such folder")
        return  # a hub name
    if fault := folder_fault(folder):
        raise InputError(f"--model {model}: {fault}")


def folder_fault(folder: Path) -> str:
    """Why no model can be loaded from a folder; "" if nothing is known to be wrong."""
    weights = [*folder.glob("*.safetensors")]
    for file in weights:
        with open(file, "rb") as content:
            if content.read(len(LFS_POINTER)) == LFS_POINTER:
                return f"{file.name} is a git-lfs pointer; fetch the weights with `git lfs pull`"
    full = [file for file in weights if file.name != "adapter_model.safetensors"]
    if (folder / "adapter_config.json").is_file() and not full:
        return f"a LoRA adapter of {adapter_base(folder)}; merge it into that model"
    if not full and [*folder.glob("pytorch_model*.bin")]:
        return "weights in pytorch_model.bin; convert them to safetensors"
    if not (folder / "config.json").is_file():
        inside = folder / "model"
        hint = f"; is {inside} meant?" if inside.is_dir() else ""
        return f"no config.json in this folder{hint}"
    return ""


def adapter_base(folder: Path) -> str:
    """The model that a LoRA adapter belongs to."""
    try:
        found = json.loads((folder / "adapter_config.json").read_bytes())
        return str(found["base_model_name_or_path"])
    except (OSError, ValueError, LookupError, TypeError):
        return "an unknown model"


def model_warnings(model: str, config) -> list[str]:
    """What in a model's folder is not used though one might expect it, a line each."""
    folder, lines = Path(model), []
    if not folder.is_dir():
        return lines
    single, index = folder / SAFE_WEIGHTS_NAME, folder / SAFE_WEIGHTS_INDEX_NAME
    if single.is_file() and index.is_file():
        lines.append(f"{single.name} is read, and the shards of {index.name} are not")
    if (folder / "adapter_config.json").is_file():
        lines.append("the LoRA adapter in this folder is not used; the full weights are")
    if config.tie_word_embeddings and heads_differ(weight_files(model)):
        lines.append(
            "lm_head.weight is not used: config.json ties it to the embedding, which differs"
        )
    return [f"warning: --model {model}: {line}" for line in lines]


def heads_differ(files: list[str]) -> bool:
    """Whether a stored lm_head differs from the embedding in its first rows."""
    rows = {}
    for file in files:
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():
                if name.endswith(("lm_head.weight", "embed_tokens.weight")):
                    rows[name.split(".")[-2]] = tensors.get_slice(name)[:64]
    return "lm_head" in rows and bool((rows["lm_head"] != rows.get("embed_tokens")).any())


def read_model_config(model: str):
    """The configuration of a Qwen2.5-VL. Raises InputError for another kind of model."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # it warns of token ids, which Examples checks
    try:
        config = read_from_model(AutoConfig.from_pretrained, model, "config.json")
    finally:
        logging.set_verbosity(verbosity)
    if config.model_type != "qwen2_5_vl":
        raise InputError(f"--model {model}: a {config.model_type}, not a Qwen2.5-VL")
    return config


def weight_files(model: str) -> list[str]:
    """The safetensors files of a folder or of a hub's model."""
    try:
        return [cached_file(model, SAFE_WEIGHTS_NAME)]
    except OSError:  # there are several, which an index lists
        index = cached_file(model, SAFE_WEIGHTS_INDEX_NAME)
        return get_checkpoint_shard_files(model, index)[0]


def weights_fingerprint(model: str) -> str:
    """A hash of the names and first values of a model's weights; few bytes are read.

    Raises InputError if there are none in safetensors.
    """
    return read_from_model(_hash_first_values, model, "weights in safetensors")


def _hash_first_values(model: str) -> str:
    digest = hashlib.sha256()
    for file in weight_files(model):
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():
                values = tensors.get_slice(name)[:1].float().flatten()
                digest.update(name.encode() + values.numpy().tobytes())
    return digest.hexdigest()[:16]


def require_complete(report: dict, model: str) -> None:
    """Raise InputError unless the library's loading report says that all weights fit.

    report: the loading info of from_pretrained, with ignore_mismatched_sizes.
    """
    missing, surplus = sorted(report["missing_keys"]), sorted(report["unexpected_keys"])
    fault = ""
    if wrapped := [name for name in surplus if name.startswith(WRAPPERS)]:
        fault = f"{wrapped[0]}: a wrapped model was saved; remove the prefix from all names"
    elif missing == ["lm_head.weight"]:
        fault = "lm_head.weight is missing, and tie_word_embeddings is not true in config.json"
    elif report["mismatched_keys"]:
        name, found, wanted = min(report["mismatched_keys"])
        fault = f"{name} is {list(found)}, and by config.json it is {list(wanted)}"
    elif missing:
        fault = f"{len(missing)} weights are missing, such as {missing[0]}; fetch all files"
    elif surplus:
        fault = f"{surplus[0]} has no place in the model of config.json"
    if fault:
        raise InputError(f"--model {model}: {fault}")
