"""The folder of a model: what is wrong with it is one line that names the cause."""

import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen2_5_VLForConditionalGeneration

from engine import configs
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
        (model / name).unlink(missing_ok=True)  # it may be mapped
        (model / name).write_text(text)

    return change


def without(name):
    return lambda model: (model / name).unlink()


def values(name, **changes):
    """A change of a JSON file; None removes a key."""

    def change(model):
        found = json.loads((model / name).read_text()) | changes
        kept = {key: value for key, value in found.items() if value is not None}
        (model / name).write_text(json.dumps(kept))

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


def without_vision(state):
    return {name: value for name, value in state.items() if "visual" not in name}


def other_head(state):
    state["lm_head.weight"] = state["model.embed_tokens.weight"] + 1


def cut(model):
    half = (model / WEIGHTS).read_bytes()[:-1000]
    (model / WEIGHTS).unlink()
    (model / WEIGHTS).write_bytes(half)


def pickled(model):
    torch.save(load_file(model / WEIGHTS), model / "pytorch_model.bin")
    (model / WEIGHTS).unlink()


def adapter(model):
    (model / WEIGHTS).rename(model / "adapter_model.safetensors")
    (model / ADAPTER).write_text(json.dumps({"base_model_name_or_path": "/no/base"}))


def sharded(model):
    whole = Qwen2_5_VLForConditionalGeneration.from_pretrained(model)
    whole.save_pretrained(model, max_shard_size="300KB")


def all_of(*changes):
    return lambda model: [change(model) for change in changes]


LORA = "a LoRA adapter of /no/base, which is not there; give that model with --model and"
WRAPPED = r"_mod.model.*: a wrapped model was saved; remove the prefix"
REFUSED = {  # a change of the folder, and what the line names
    "adapter": (adapter, LORA),
    "bare adapter": (all_of(adapter, without(CONFIG)), LORA),
    "pickle": (pickled, "pytorch_model.bin; convert them to safetensors"),
    "pointer": (write(WEIGHTS, POINTER), f"{WEIGHTS} is a git-lfs pointer; .*git lfs pull"),
    "pointer of a shard": (
        lambda m: (sharded(m), write("model-00002-of-00003.safetensors", POINTER)(m)),
        "model-00002-of-00003.safetensors is a git-lfs pointer"),
    "pointer of text": (write(TOKENIZER, POINTER), f"{TOKENIZER} is a git-lfs pointer"),
    "not tied": (
        values(CONFIG, tie_word_embeddings=False),
        "lm_head.weight is missing, and tie_word_embeddings is not true in config.json"),
    "tie not set": (values(CONFIG, tie_word_embeddings=None), "tie_word_embeddings is not true"),
    "DDP": (prefixed("module."), "module.model.*: a wrapped model was saved"),
    "compiled": (prefixed("_orig_mod."), WRAPPED),
    "no weights": (without(WEIGHTS), f"no {WEIGHTS} and no {WEIGHTS}.index.json"),
    "cut weights": (cut, "no weights in safetensors that can be read"),
    "shard lost": (
        lambda m: (sharded(m), without(WEIGHTS)(m), without("model-00002-of-00003.safetensors")(m)),
        "No such file or directory: .*model-00002-of-00003.safetensors"),
    "a weight": (
        tensors(lambda s: s.__delitem__("model.norm.weight")),
        "1 weights are missing, such as .*norm.weight; fetch all files"),
    "vision": (tensors(without_vision), "30 weights are missing, such as .*visual"),
    "surplus": (tensors(lambda s: s.update(score=torch.zeros(2))), "score has no place in the"),
    "other shape": (
        tensors(lambda s: s.update({"model.norm.weight": torch.zeros(63)})), r"\[63\].*\[64\]"),
    "more layers": (sizes(num_hidden_layers=4), "24 weights are missing, such as .*layers.2"),
    "fewer layers": (sizes(num_hidden_layers=1), "layers.1.* has no place in the model of config"),
    "wider": (sizes(intermediate_size=97), r"\[64, 96\], and by config.json it is \[64, 97\]"),
    "heads": (sizes(num_attention_heads=3), "hidden_size must be divisible by num_heads"),
    "word for size": (sizes(hidden_size="x"), "'hidden_size' expected int"),
    "larger vocabulary": (sizes(vocab_size=1000), r"embed_tokens.*\[1000, 64\]"),
    "small vocabulary": (sizes(vocab_size=700), "806 tokens, and vocab_size is 700"),
    "no config": (without(CONFIG), "no config.json in this folder"),
    "config": (write(CONFIG, '{"model_type"'), "no config.json that can be read"),
    "token id": (values(CONFIG, image_token_id="x"), "'image_token_id' expected int"),
    "another model": (values(CONFIG, model_type="llama"), "a llama; the known kinds are qwen2_5"),
    "tokenizer": (lambda m: [p.unlink() for p in m.glob("token*")], "no tokenizer with <.im_end.>"),
    "tokenizer file": (write(TOKENIZER, "null"), "no tokenizer that can be read"),
    "processor": (without(PROCESSOR), "no image processor that can be read"),
    "processor file": (write(PROCESSOR, "[]"), "no image processor that can be read"),
    "patch": (values(PROCESSOR, patch_size=7), "patch_size is 7 in .* and 14 in config.json"),
    "merge": (values(PROCESSOR, merge_size="x"), "merge_size is x in .* and 2 in config.json"),
    "no template": (without(TEMPLATE), "no tokenizer with .* chat template"),
    "template syntax": (write(TEMPLATE, "{% for"), "no chat template that can be read"),
    "template name": (write(TEMPLATE, "{{ a.b.c }}"), "no chat template that can be read"),
    "template text": (write(TEMPLATE, "no image"), "template makes 0 placeholders"),
}  # fmt: skip


@pytest.fixture
def spoilt(folder, tmp_path):
    """The tiny model's folder with a change."""

    def spoil(change):
        shutil.copytree(folder / "model", tmp_path / "model")
        change(tmp_path / "model")
        return str(tmp_path / "model")

    return spoil


@pytest.mark.parametrize("case", REFUSED)
def test_spoilt_folder_is_refused_in_one_line(case, spoilt, folder, tmp_path, capfd):
    change, named = REFUSED[case]
    model = spoilt(change)
    capfd.readouterr()
    said = refusal(config_of("predict", folder, tmp_path / "out", model=model, limit=1))
    assert said.startswith(f"--model {model}: ") and re.search(named, said), said
    assert said.count(f"--model {model}: ") == 1
    assert "huggingface.co" not in said or case == "processor"
    assert capfd.readouterr().err == ""  # the library's own report stays away


LOSE = {  # what in a folder is not used, though one might expect it
    "adapter": (write(ADAPTER, "{}"), "the LoRA adapter in this folder is not used"),
    "head": (tensors(other_head), "lm_head.weight is not used: config.json ties it"),
    "shards": (sharded, "model.safetensors is read, and the shards of .*index.json are not"),
}


@pytest.mark.parametrize("case, stage", [*((case, "predict") for case in LOSE), ("head", "sft")])
def test_what_is_not_used_is_one_warning(case, stage, spoilt, folder, tmp_path, capsys):
    change, named = LOSE[case]
    model = spoilt(change)
    short = {"max_steps": 1} if stage == "sft" else {"limit": 1, "max_new_tokens": 2}
    run(config_of(stage, folder, tmp_path / "out", model=model, **short))
    lines = [line for line in capsys.readouterr().out.splitlines() if "--model" in line]
    assert len(lines) == 1 and re.match(f"warning: --model {model}: {named}", lines[0]), lines


def test_photograph_of_a_warned_model(spoilt, photo, tmp_path, capsys):
    options = {"out": str(tmp_path), "workers": 0, "max_new_tokens": 2}
    model = spoilt(LOSE["adapter"][0])
    run(configs.PredictConfig(model=model, image=(str(photo),), **options))
    assert f"warning: --model {model}: {LOSE['adapter'][1]}" in capsys.readouterr().out


def test_single_file_wins_over_shards(spoilt):
    """As the warning says."""
    raised = tensors(lambda s: s.update({"model.norm.weight": s["model.norm.weight"] + 5}))
    model = spoilt(all_of(sharded, raised))
    loaded = load_model(model, torch.device("cpu")).model.language_model.norm.weight
    assert torch.equal(loaded, load_file(f"{model}/{WEIGHTS}")["model.norm.weight"])


def test_shards_alone_are_read(spoilt, folder):
    model = spoilt(all_of(sharded, without(WEIGHTS)))
    one, other = (load_model(str(path), torch.device("cpu")) for path in (model, folder / "model"))
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    assert all(torch.equal(mine, expected) for mine, expected in pairs)


def test_chat_template_of_older_folders_is_read(spoilt, folder):
    """It is in chat_template.json alone."""
    text = (folder / "model" / TEMPLATE).read_text()
    apart = write("chat_template.json", json.dumps({"chat_template": text}))
    assert read_tokenizer(spoilt(all_of(without(TEMPLATE), apart))).chat_template == text


def test_folder_above_the_model_is_recognised(folder, tmp_path):
    found = refusal(config_of("predict", folder, tmp_path / "x", model=str(folder)))
    assert f"is {folder / 'model'} meant?" in found


@pytest.mark.parametrize("name", ["/no/model", "./model", "no/such/model", "modle", "runs/modle"])
def test_folder_that_is_not_there_is_said_first(name):
    """A name with one slash may be one of the hub's, which is asked too."""
    with pytest.raises(InputError, match=f"^--model {name}: there is no such folder"):
        read_model_config(name)
    assert read_from_model(str.lower, "Qwen/Qwen2.5-VL", "name") == "qwen/qwen2.5-vl"
