"""The folder of a model: faults are named in one line, before or after loading.

transformers initialises missing weights at random and ignores surplus ones. It reports both, and
`require_complete` turns its report into an error.
"""

import hashlib
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import safe_open
from transformers import AutoConfig
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file, logging
from transformers.utils.hub import get_checkpoint_shard_files

from engine.files import read_object
from engine.model.families import FAMILIES
from engine.model.quantized import is_packed
from hicodet import InputError

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
LFS_POINTER = b"version https://git-lfs"
WRAPPERS = ("module.", "_orig_mod.")  # of DistributedDataParallel and of torch.compile


def read_from_model(read: Callable, model: str, what: str):
    """read(model), a reader of the library. Raises InputError naming the folder if it cannot."""
    try:
        require_folder(model)
        return read(model)
    except InputError as error:  # these do not name the folder
        raise InputError(f"--model {model}: {error}") from None
    except Exception as error:  # the libraries raise about twenty kinds for broken files
        cause = textwrap.shorten(str(error), 200) or type(error).__name__
        absent = "" if Path(model).is_dir() else "there is no such folder here, and "
        said = f"--model {model}: {absent}no {what} that can be read ({cause})"
        raise InputError(said) from error


def require_folder(model: str) -> None:
    """Raise InputError if `model` is a path to no folder, or to one with a known fault."""
    folder = Path(model)
    if not folder.is_dir():
        if folder.is_absolute() or model.startswith((".", "~")) or model.count("/") != 1:
            raise InputError("there is no such folder")
        return  # a hub name
    weights = [*folder.glob("*.safetensors")]
    for file in [*weights, *folder.glob("*.json")]:
        with open(file, "rb") as content:
            if content.read(len(LFS_POINTER)) == LFS_POINTER:
                said = "is a git-lfs pointer; fetch the file with `git lfs pull`"
                raise InputError(f"{file.name} {said}")
    full = [file for file in weights if file.name != ADAPTER_WEIGHTS]
    if not full and [*folder.glob("pytorch_model*.bin")]:
        raise InputError("weights in pytorch_model.bin; convert them to safetensors")
    if not (folder / "config.json").is_file():
        inside = folder / "model"
        hint = f"; is {inside} meant?" if inside.is_dir() else ""
        raise InputError(f"no config.json in this folder{hint}")


def model_and_adapter(model: str, adapter: str) -> tuple[str, str]:
    """The model and the adapter that --model and --adapter name.

    --model may name the folder of a LoRA adapter, which records its base model. Raises InputError
    if that model is not found.
    """
    folder = Path(model)
    full = [file for file in folder.glob("*.safetensors") if file.name != ADAPTER_WEIGHTS]
    if adapter or full or not (folder / ADAPTER_CONFIG).is_file():
        return model, adapter
    base = read_object(folder / ADAPTER_CONFIG).get("base_model_name_or_path")
    if not base or (Path(base).is_absolute() and not Path(base).is_dir()):
        raise InputError(
            f"--model {model}: a LoRA adapter of {base or 'an unnamed model'}, which is not there; "
            f"give that model with --model and the adapter with --adapter {model}"
        )
    return base, model


def model_warnings(model: str, config) -> list[str]:
    """Warnings about files in a model's folder that are not used."""
    folder, lines = Path(model), []
    single, index = folder / SAFE_WEIGHTS_NAME, folder / SAFE_WEIGHTS_INDEX_NAME
    if single.is_file() and index.is_file():
        lines.append(f"{single.name} is read, and the shards of {index.name} are not")
    if (folder / ADAPTER_CONFIG).is_file():
        lines.append("the LoRA adapter in this folder is not used; the full weights are")
    if config.tie_word_embeddings and heads_differ(model):
        lines.append(
            "lm_head.weight is not used: config.json ties it to the embedding, which differs"
        )
    return [f"warning: --model {model}: {line}" for line in lines]


def heads_differ(model: str) -> bool:
    """Whether lm_head and the embedding are both stored, with different first rows."""
    found = []
    for file in weight_files(model):
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():
                if name.endswith(("lm_head.weight", "embed_tokens.weight")):
                    found.append(tensors.get_slice(name)[:64].float())
    return len(found) == 2 and not torch.equal(*found)


@contextmanager
def quiet() -> Iterator[None]:
    """Silence the library's warnings, inside a `with`."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


def read_model_config(model: str):
    """The configuration of a model. Raises InputError for a family that is not in FAMILIES."""
    with quiet():  # about token ids, which Examples checks
        config = read_from_model(AutoConfig.from_pretrained, model, "config.json")
    if config.model_type not in FAMILIES:
        known = ", ".join(FAMILIES)
        raise InputError(f"--model {model}: model_type {config.model_type} is not one of {known}")
    if is_packed(config) and not FAMILIES[config.model_type].packed:
        raise InputError(f"--model {model}: quantised {config.model_type} is not supported")
    return config


def weight_files(model: str) -> list[str]:
    """The safetensors files of a folder or of a hub's model. Raises InputError without any."""
    folder, names = Path(model), (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME)
    if folder.is_dir() and not any((folder / name).is_file() for name in names):
        raise InputError(f"no {names[0]} and no {names[1]} in this folder")
    try:
        return [cached_file(model, SAFE_WEIGHTS_NAME)]
    except OSError:  # there are several files, listed in an index
        index = cached_file(model, SAFE_WEIGHTS_INDEX_NAME)
        return get_checkpoint_shard_files(model, index)[0]


def weights_fingerprint(model: str, adapter: str = "") -> str:
    """A hash of the names and first values of a model's weights; reads few bytes.

    adapter: folder of a LoRA adapter, or "". Raises InputError if there are no weights.
    """

    def first_values(model: str) -> str:
        digest, adapters = hashlib.sha256(), [Path(adapter) / ADAPTER_WEIGHTS] if adapter else []
        for file in [*weight_files(model), *adapters]:
            with safe_open(file, "pt") as tensors:
                for name in tensors.keys():
                    values = tensors.get_slice(name)[:1].float().flatten()
                    digest.update(name.encode() + values.numpy().tobytes())
        return digest.hexdigest()[:16]

    return read_from_model(first_values, model, "weights in safetensors")


def require_complete(report: dict, model: str) -> None:
    """Raise InputError unless all weights of the model were loaded.

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
