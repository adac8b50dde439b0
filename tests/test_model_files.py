"""Model folders: a fault is one line that names the cause, an unused file is one warning."""

import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen2_5_VLForConditionalGeneration

from engine.data.examples import read_tokenizer
from engine.model.model_files import read_from_model, read_model_config
from engine.model.policy import load_model
from hicodet import InputError
from tests.runs import config_of, refusal, run

TOKENIZER, PROCESSOR = "tokenizer.json", "preprocessor_config.json"
WEIGHTS, TEMPLATE, CONFIG = "model.safetensors", "chat_template.jinja", "config.json"
ADAPTER = "adapter_config.json"
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"


def write(name, text):
    """A change of a model's folder: a file with this text."""

    def change(model):
        (model / name).unlink(missing_ok=True)  # not overwritten: it may be mapped
        (model / name).write_text(text)

    return change


def without(name):
    return lambda model: (model / name).unlink()


def values(name, **changes):
    """A change of a JSON file."""

    def change(model):
        found = json.loads((model / name).read_text())
        (model / name).write_text(json.dumps(found | changes))

    return change


def sizes(**changes):
    """A change of the language model's sizes in config.json; the types of layers are left out."""

    def change(model):
        found = json.loads((model / CONFIG).read_text())
        found["text_config"] = found["text_config"] | changes
        del found["text_config"]["layer_types"]  # as in the Hub's folders
        (model / CONFIG).write_text(json.dumps(found))

    return change


def tensors(edit):
    """A change of the weights: edit(state) changes it, or returns another one."""

    def change(model):
        state = load_file(model / WEIGHTS)
        state = edit(state) or state
        (model / WEIGHTS).unlink()
        save_file(state, model / WEIGHTS, {"format": "pt"})

    return change


def prefixed(prefix):
    return tensors(lambda state: {prefix + name: value for name, value in state.items()})


def other_head(state):
    state["lm_head.weight"] = state["model.embed_tokens.weight"] + 1


def cut(model):
    half = (model / WEIGHTS).read_bytes()[:-1000]
    (model / WEIGHTS).unlink()
    (model / WEIGHTS).write_bytes(half)


def adapter(model):
    (model / CONFIG).unlink()
    (model / WEIGHTS).rename(model / "adapter_model.safetensors")
    (model / ADAPTER).write_text(json.dumps({"base_model_name_or_path": "/no/base"}))


def sharded(model):
    whole = Qwen2_5_VLForConditionalGeneration.from_pretrained(model)
    whole.save_pretrained(model, max_shard_size="300KB")


def all_of(*changes):
    return lambda model: [change(model) for change in changes]


REFUSED = {  # a change of the folder, and what the line names
    "adapter": (adapter, "a LoRA adapter of /no/base, which is not there; give that model with --"),
    "pointer": (write(WEIGHTS, POINTER), f"{WEIGHTS} is a git-lfs pointer; .*git lfs pull"),
    "not tied": (values(CONFIG, tie_word_embeddings=False), "tie_word_embeddings is not true in"),
    "DDP": (prefixed("module."), r"module.model.*: a wrapped model was saved; remove the prefix"),
    "compiled": (prefixed("_orig_mod."), r"_orig_mod.model.*: a wrapped model was saved"),
    "pickle": (all_of(without(WEIGHTS), write("pytorch_model.bin", "")), "convert them to safe"),
    "no weights": (without(WEIGHTS), f"no {WEIGHTS} and no {WEIGHTS}.index.json"),
    "cut weights": (cut, "no weights in safetensors that can be read"),
    "shard lost": (
        all_of(sharded, without(WEIGHTS), without("model-00002-of-00003.safetensors")),
        "No such file or directory: .*model-00002-of-00003.safetensors"),
    "a weight": (
        tensors(lambda s: s.__delitem__("model.norm.weight")),
        "1 weights are missing, such as .*norm.weight; fetch all files"),
    "surplus": (tensors(lambda s: s.update(score=torch.zeros(2))), "score has no place in the"),
    "wider": (sizes(intermediate_size=97), r"\[64, 96\], and by config.json it is \[64, 97\]"),
    "small vocabulary": (sizes(vocab_size=700), "806 tokens, and vocab_size is 700"),
    "no config": (without(CONFIG), "no config.json in this folder"),
    "config": (write(CONFIG, '{"model_type"'), "no config.json that can be read"),
    "another model": (values(CONFIG, model_type="llama"), "llama is not one of qwen2_5"),
    "tokenizer": (lambda m: [p.unlink() for p in m.glob("token*")], "no tokenizer with <.im_end.>"),
    "processor": (without(PROCESSOR), "no image processor that can be read"),
    "patch": (values(PROCESSOR, patch_size=7), "patch_size is 7 in .* and 14 in config.json"),
    "no template": (without(TEMPLATE), "no tokenizer with .* chat template"),
    "template text": (write(TEMPLATE, "no image"), "template makes 0 placeholders"),
}  # fmt: skip


@pytest.fixture
def damaged(folder, tmp_path):
    """A copy of the tiny model's folder with a change."""

    def damage(change):
        shutil.copytree(folder / "model", tmp_path / "model")
        change(tmp_path / "model")
        return str(tmp_path / "model")

    return damage


@pytest.mark.parametrize("case", REFUSED)
def test_damaged_folder_is_refused_in_one_line(case, damaged, folder, tmp_path, capfd):
    change, named = REFUSED[case]
    model = damaged(change)
    capfd.readouterr()
    said = refusal(config_of("predict", folder, tmp_path / "out", model=model, limit=1))
    assert said.startswith(f"--model {model}: ") and re.search(named, said), said
    assert said.count(f"--model {model}: ") == 1
    assert "huggingface.co" not in said or case == "processor"
    assert capfd.readouterr().err == ""  # without the library's own report


UNUSED = {  # a file or weight of the folder that is not used
    "adapter": (write(ADAPTER, "{}"), "the LoRA adapter in this folder is not used"),
    "head": (tensors(other_head), "lm_head.weight is not used: config.json ties it"),
    "shards": (sharded, "model.safetensors is read, and the shards of .*index.json are not"),
}


@pytest.mark.parametrize("case, stage", [("adapter", "predict"), ("shards", "predict"),
                                         ("head", "predict"), ("head", "sft")])  # fmt: skip
def test_unused_file_is_one_warning(case, stage, damaged, folder, tmp_path, capsys):
    change, named = UNUSED[case]
    model = damaged(change)
    short = {"max_steps": 1} if stage == "sft" else {"limit": 1, "max_new_tokens": 2}
    run(config_of(stage, folder, tmp_path / "out", model=model, **short))
    lines = [line for line in capsys.readouterr().out.splitlines() if "--model" in line]
    assert len(lines) == 1 and re.match(f"warning: --model {model}: {named}", lines[0]), lines


def test_single_file_is_read_and_not_the_shards(damaged):
    raised = tensors(lambda s: s.update({"model.norm.weight": s["model.norm.weight"] + 5}))
    model = damaged(all_of(sharded, raised))
    loaded = load_model(model, torch.device("cpu")).model.language_model.norm.weight
    assert torch.equal(loaded, load_file(f"{model}/{WEIGHTS}")["model.norm.weight"])


def test_shards_alone_are_read(damaged, folder):
    model = damaged(all_of(sharded, without(WEIGHTS)))
    one, other = (load_model(str(path), torch.device("cpu")) for path in (model, folder / "model"))
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    assert all(torch.equal(mine, expected) for mine, expected in pairs)


def test_chat_template_of_older_folders_is_read(damaged, folder):
    """They have it in chat_template.json."""
    text = (folder / "model" / TEMPLATE).read_text()
    apart = write("chat_template.json", json.dumps({"chat_template": text}))
    assert read_tokenizer(damaged(all_of(without(TEMPLATE), apart))).chat_template == text


def test_folder_above_the_model_is_recognised(folder, tmp_path):
    found = refusal(config_of("predict", folder, tmp_path / "x", model=str(folder)))
    assert f"is {folder / 'model'} meant?" in found


@pytest.mark.parametrize("name", ["/no/model", "./model", "modle", "runs/modle"])
def test_missing_folder_is_named(name):
    """A name with one slash may be a name of the hub."""
    with pytest.raises(InputError, match=f"^--model {name}: there is no such folder"):
        read_model_config(name)
    assert read_from_model(str.lower, "Qwen/Qwen2.5-VL", "name") == "qwen/qwen2.5-vl"
