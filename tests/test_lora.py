"""engine/model/lora.py: adapters against peft and merged weights; policies that share a base."""

import copy
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import engine.model.lora as lora
from engine.model.lora import Adapter, add_adapters, read_adapter, trained
from engine.model.packing import pack, token_logprobs
from engine.model.policy import load_model, load_policies, refresh
from engine.sampling.decode_step import prepare_for_decoding
from tests.runs import config_of, run
from tests.test_quantized import write_twins
from tests.tiny import plain_logprobs, sample

ROOT = Path(__file__).resolve().parents[1]
PEFT = ROOT / "tests" / "data" / "peft_adapter"  # by peft 0.21.2: rank 2, alpha 6, three layers
CPU = torch.device("cpu")
NAME = "base_model.model."  # begins peft's names


def adapted_copy(model, adapter, dtype=torch.float32, shift=0.0):
    """A copy of a model with adapters. shift: size of the noise added to them."""
    found = add_adapters(copy.deepcopy(model).to(dtype), adapter, dtype, seed=0).eval()
    move(trained(found), shift)
    return found


@torch.no_grad()
def move(parameters, size):
    generator = torch.Generator().manual_seed(5)
    for parameter in parameters:
        local = parameter.to_local() if hasattr(parameter, "to_local") else parameter
        local.add_(size * torch.randn(local.shape, generator=generator).to(local.dtype))


def scored(model, prompts, completions):
    """Log-probs of all completion tokens, as one vector."""
    batch = pack(model, prompts, completions)
    return token_logprobs(model, batch)[batch.completion_mask]


def plainly_scored(model, prompts, completions):
    """As `scored`, by separate forwards of the library's own model."""
    rows = [(p, c) for p, group in zip(prompts, completions) for c in group]
    return torch.cat([plain_logprobs(model, prompt, ids) for prompt, ids in rows])


def backward(*logprobs):
    """Backward of the same weighted sum of each vector."""
    for each in logprobs:
        (each * torch.linspace(-1, 1, len(each))).sum().backward()


def assert_near(mine, other, tolerance):
    """The norm of the difference is small, relative to the other's norm."""
    assert (mine - other).norm() < tolerance * other.norm()


# Against peft


def test_peft_adapter_equals_its_merged_weights(model, reference, prompts, completions):
    """Log-probs, and the gradients of A and B computed from that of the merged weight."""
    mine, merged = adapted_copy(model, read_adapter(PEFT)), copy.deepcopy(reference)
    files = load_file(PEFT / "adapter_model.safetensors")
    names = {name.removeprefix(NAME).rpartition(".lora_")[0] for name in files}
    a, b = ({n: files[f"{NAME}{n}.lora_{part}.weight"] for n in names} for part in "AB")
    for name in names:
        merged.get_submodule(name).weight.data += 3 * b[name] @ a[name]
    logprobs = scored(mine, prompts, completions)
    expected = plainly_scored(merged, prompts, completions)
    torch.testing.assert_close(logprobs, expected, atol=1e-5, rtol=1e-5)
    assert (logprobs - scored(model, prompts, completions)).abs().max() > 1e-2
    backward(logprobs, expected)
    for name in names:
        layer, gradient = mine.get_submodule(name), merged.get_submodule(name).weight.grad
        assert_near(layer.lora_A.weight.grad, 3 * b[name].T @ gradient, 1e-4)
        assert_near(layer.lora_B.weight.grad, 3 * gradient @ a[name].T, 1e-4)
    assert len(trained(mine)) == 2 * len(names) == 12


def test_adapter_is_written_as_peft_writes_it(tmp_path):
    lora.write_adapter(tmp_path, read_adapter(PEFT))
    mine, theirs = (load_file(f / "adapter_model.safetensors") for f in (tmp_path, PEFT))
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[n], theirs[n]) for n in mine)
    ours, known = (json.loads((f / "adapter_config.json").read_text()) for f in (tmp_path, PEFT))
    assert ours.keys() <= known.keys() and (ours["r"], ours["lora_alpha"]) == (2, 6)


@pytest.fixture(scope="module")
def peft():
    """The peft library, installed into a folder of its own; our packages do not change."""
    folder = ROOT / "runs" / "peft"  # git ignores runs/
    if not (folder / "peft").is_dir():
        line = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(folder)]
        line += ["peft==0.21.2", "accelerate==1.15.0", "psutil"]
        found = subprocess.run(line, capture_output=True, text=True)
        if found.returncode:
            pytest.skip(f"peft cannot be installed here ({found.stderr.strip()[-200:]})")
    sys.path.append(str(folder))
    yield pytest.importorskip("peft")
    sys.path.remove(str(folder))


@pytest.mark.slow
@pytest.mark.parametrize("writer", ["ours", "peft"])
def test_adapter_equals_peft(writer, peft, model, reference, prompts, completions, tmp_path):
    """Names, log-probs and gradients are equal, for files written by either side."""
    adapter, plain = Adapter(4, 32, "x"), copy.deepcopy(reference)
    ours = adapted_copy(model, adapter, shift=0.05)
    lora.write_adapter(tmp_path, replace(adapter, weights=lora.adapter_weights(ours)))
    if writer == "ours":
        theirs = peft.PeftModel.from_pretrained(plain, tmp_path, is_trainable=True)
    else:
        layers = json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"]
        config = peft.LoraConfig(r=4, lora_alpha=12, target_modules=layers)
        theirs = peft.get_peft_model(plain, config)
        move((p for name, p in theirs.named_parameters() if "lora_" in name), 0.05)
        theirs.save_pretrained(tmp_path)
        ours = adapted_copy(model, read_adapter(tmp_path))
    mine, other = scored(ours, prompts, completions), plainly_scored(theirs, prompts, completions)
    torch.testing.assert_close(mine, other, atol=2e-6, rtol=2e-6)
    backward(mine, other)
    found = {name: p.grad for name, p in ours.named_parameters() if p.requires_grad}
    gradients = {
        name.removeprefix(NAME).replace(".default", ""): parameter.grad
        for name, parameter in theirs.named_parameters() if parameter.requires_grad
    }  # fmt: skip
    assert found.keys() == gradients.keys() and len(found) == 28
    for name, gradient in gradients.items():
        assert_near(found[name], gradient, 1e-5)  # 2e-6 to 4e-6 over seeds


# One base, three policies


@pytest.mark.parametrize("start", [Adapter(4, 8, "x"), read_adapter(PEFT)], ids=["new", "peft"])
def test_three_policies_share_one_base(start, folder, ranks, prompts, completions):
    """pi_ref equals the start of the run to the bit, also after pi_theta has moved."""
    path = str(folder / "model")
    policies = load_policies(path, ranks.device, start, replica=True, reference=True)
    policy, replica, reference = policies
    batch, untouched = pack(policy, prompts, completions), load_model(path, ranks.device)
    if start.weights:
        add_adapters(untouched, start, torch.float32, seed=0)
    with torch.no_grad():
        expected = token_logprobs(untouched, batch)
        assert torch.equal(policy.token_logprobs(batch), expected)
        move(trained(policy), 0.05)
        refresh(replica, policy)
        moved = policy.token_logprobs(batch)
        assert torch.equal(reference.token_logprobs(batch), expected)
        torch.testing.assert_close(token_logprobs(replica, batch), moved, atol=1e-6, rtol=1e-6)
    assert (moved - expected).abs().max() > 0.01 and not trained(reference)
    places = [
        {n: p.data_ptr() for n, p in each.named_parameters() if ".lora_" not in n}
        for each in policies
    ]
    assert places[0] == places[1] == places[2] and len(places[0]) > 40


@pytest.mark.parametrize("adapter", [Adapter(3, 24, "x"), read_adapter(PEFT)], ids=["all", "some"])
def test_fused_layers_use_the_adapters_that_are_copied_in(adapter, model, prompts):
    """adapter: on all layers, or on two of three that are fused."""
    options = {"seeds": [1, 2, 3], "group_size": 1, "max_new_tokens": 12, "end_id": -1}
    hooks, fused = (adapted_copy(model, adapter, shift=shift) for shift in (0.05, 0.5))
    prepare_for_decoding(fused)
    with torch.no_grad():
        for mine, other in zip(trained(fused), trained(hooks), strict=True):
            mine.copy_(other)
    mine, other, plain = (sample(m, prompts, **options) for m in (fused, hooks, model))
    for row in range(3):
        assert mine.completion_ids[row].tolist() == other.completion_ids[row].tolist()
        torch.testing.assert_close(mine.logprobs[row], other.logprobs[row], atol=1e-5, rtol=0)
    assert (mine.logprobs[0][0] - plain.logprobs[0][0]).abs() > 1e-4


def test_bf16_keeps_a_small_update_only_where_adapters_are_fused(model):
    """Each weight moves by 1e-6, as in one step; measured as a mean over six million outputs.

    With hooks or merged weights, rounding loses most of the update.
    """
    adapter, generator = Adapter(4, 8, "x"), torch.Generator().manual_seed(0)
    x, found = torch.randn(60_000, 64, generator=generator).bfloat16(), []
    direction = torch.randn(96, 4, generator=generator)
    for size in (0.0, 1e-6):
        hooks = adapted_copy(model, adapter, torch.bfloat16)
        layer = hooks.model.language_model.layers[0].mlp.gate_proj
        a = layer.lora_A.weight.detach().float()
        layer.lora_B.weight.data = (size / (2 * direction @ a).std() * direction).bfloat16()
        fused, merged = copy.deepcopy(hooks), copy.deepcopy(model).bfloat16()
        merged.load_state_dict(dict(lora.merged_weights(hooks)), strict=False)  # the head is tied
        prepare_for_decoding(fused)
        forms = [m.model.language_model.layers[0].mlp.gate_proj for m in (fused, hooks, merged)]
        with torch.no_grad():
            found.append([form(x).float() for form in forms])
    expected = x.float() @ (2 * layer.lora_B.weight.detach().float() @ a).T
    kept = [
        float(((after - before) * expected).sum() / expected.square().sum())
        for before, after in zip(*found)
    ]
    assert 0.9 < kept[0] < 1.1 and max(kept[1:]) < 0.3, kept


# A base in 4 bits


@pytest.fixture(scope="module")
def twins(folder, tmp_path_factory):
    """packed/ and plain/: one model in 4 bits, and the same weights in floating point."""
    out = tmp_path_factory.mktemp("twins")
    write_twins(folder, out)
    return out


def test_packed_base_trains_as_its_twin_and_keeps_no_unpacked_weight(twins, prompts, completions):
    found, options = [], {"group_size": 1, "temperature": 0, "max_new_tokens": 8, "end_id": -1}
    for name in ("packed", "plain"):
        base = load_model(str(twins / name), CPU, torch.float32)
        policy, kept = adapted_copy(base, Adapter(4, 32, "x"), shift=0.05), {}

        def note(tensor, kept=kept):
            kept[tensor.untyped_storage().data_ptr()] = tensor  # held, so its address is not reused
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            logprobs = scored(policy, prompts, completions)
        for tensor in [*policy.parameters(), *policy.buffers()]:
            kept.pop(tensor.untyped_storage().data_ptr(), None)
        backward(logprobs)
        gradients = [parameter.grad for parameter in trained(policy)]
        ids = torch.stack(sample(policy, prompts, **options).completion_ids)
        size = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
        found.append((logprobs, gradients, ids, size))
    (logprobs, gradients, ids, size), (*expected, activations) = found
    torch.testing.assert_close(logprobs, expected[0], atol=2e-6, rtol=2e-6)
    for mine, other in zip(gradients, expected[1], strict=True):
        assert_near(mine, other, 1e-5)
    assert torch.equal(ids, expected[2]) and size <= activations


def test_packed_base_is_exported_as_an_adapter_alone(twins, folder, tmp_path):
    """Its predictions are those of the plain twin with the adapter."""
    options = {"model": str(twins / "packed"), "lora_rank": 4, "learning_rate": 1e-2}
    run(config_of("sft", folder, tmp_path / "run", max_steps=3, **options))
    adapter, lines = str(tmp_path / "run" / "adapter"), []
    assert not (tmp_path / "run" / "model").exists()
    for named in ({"model": adapter}, {"model": str(twins / "plain"), "adapter": adapter}):
        out = tmp_path / f"test{len(lines)}"
        run(config_of("predict", folder, out, max_new_tokens=12, **named))
        lines.append((out / "predictions.jsonl").read_text())
    assert lines[0] == lines[1]
