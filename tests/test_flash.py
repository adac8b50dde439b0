"""What a GPU computes with flash attention over unequal rows, on a CPU with a slow double of it."""

import copy

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import engine.model.attention
import engine.sampling.decode_step
from engine.model.attention import GroupLayout
from engine.model.packing import pack, token_logprobs
from engine.sampling.decode_step import prepare_for_decoding
from engine.sampling.sampler import Sampler
from tests.test_blocks import flex_of_a_copy
from tests.test_packing import (  # noqa: F401  tests that hold for it as well
    test_gradients_equal_separate_forwards,
    test_token_logprobs_equal_separate_forwards,
)
from tests.test_sampler import (  # noqa: F401
    test_a_sample_depends_on_its_seed_alone,
    test_greedy_ids_equal_generate,
    test_rows_that_are_done_leave_and_others_stay_themselves,
    test_what_was_sampled_from_equals_a_fresh_forward,
)
from tests.tiny import collect, sample

# a CPU computes it without a kernel, which is what the tests want
pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")


def slow_varlen(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k,
    *, scale=None, window_size=(-1, -1), enable_gqa=False,
):
    """`torch.nn.attention.varlen.varlen_attn` as documented, one sequence after the other."""
    assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
    assert enable_gqa == (query.shape[1] != key.shape[1])
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    outputs = []
    for row in range(len(cu_seq_q) - 1):
        at, of = (slice(int(c[row]), int(c[row + 1])) for c in (cu_seq_q, cu_seq_k))
        q, k, v = (x[s].transpose(0, 1) for x, s in ((query, at), (key, of), (value, of)))
        assert q.shape[1] <= max_q and k.shape[1] <= max_k
        scores = (q @ k.mT).float() * (scale or q.shape[2] ** -0.5)
        if window_size == (-1, 0):
            hidden = torch.ones_like(scores).tril(k.shape[1] - q.shape[1]) == 0
            scores = scores.masked_fill(hidden, -torch.inf)
        outputs.append((scores.softmax(-1).to(v.dtype) @ v).transpose(0, 1))
    return torch.cat(outputs)


@pytest.fixture(autouse=True)
def flash(monkeypatch):
    """The paths of a GPU."""
    calls = []

    def varlen(*args, **options):
        calls.append(args)
        return slow_varlen(*args, **options)

    for module in (engine.model.attention, engine.sampling.decode_step):
        monkeypatch.setattr(module, "has_flash", lambda x: True)
    monkeypatch.setattr(engine.model.attention, "varlen_attn", varlen)
    yield
    assert calls


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_a_step_compiles_to_one_graph_that_draws_the_same(model, prompts, monkeypatch, backend):
    """As a GPU runs it: flash attention, shared products, trial steps, no break in the graph."""
    options = {"slots": 2, "group_size": 2, "prompt_room": 30, "max_new_tokens": 9, "end_id": 7}
    plain = collect(Sampler(model, **options), prompts, list(range(6)))

    monkeypatch.setattr(engine.sampling.decode_step, "flex_attention", flex_of_a_copy)
    replica = copy.deepcopy(model)
    prepare_for_decoding(replica)
    prepare_for_decoding(replica)  # a second sampler on the same model
    sampler = Sampler(replica, **options)
    step = torch.compile(sampler.step, dynamic=False, fullgraph=True, backend=backend)

    def with_trial(room):
        """A trial before each step, as before a CUDA graph is recorded."""
        done = sampler.done.clone()
        sampler.done.fill_(True)
        step(sampler.max_new_tokens)
        sampler.done.copy_(done)
        step(sampler.max_new_tokens)

    monkeypatch.setattr(sampler, "step", with_trial)
    monkeypatch.setattr(sampler, "compact", lambda: None)
    found = collect(sampler, prompts, list(range(6)))
    for mine, other in zip(found.completion_ids, plain.completion_ids, strict=True):
        assert mine.tolist() == other.tolist()
    for mine, other in zip(found.logprobs, plain.logprobs, strict=True):
        torch.testing.assert_close(mine, other, atol=1e-5, rtol=1e-5)


def test_shared_products_follow_the_weights_that_are_copied_in(model, prompts, completions):
    replica, other = copy.deepcopy(model), copy.deepcopy(model)
    prepare_for_decoding(replica)
    with torch.no_grad():
        for mine, new in zip(replica.parameters(), other.parameters(), strict=True):
            new.add_(0.1 * torch.randn_like(new))
            mine.copy_(new)
        packed = pack(model, prompts, completions)
        expected = token_logprobs(other, packed)
        torch.testing.assert_close(token_logprobs(replica, packed), expected)
        assert not torch.allclose(token_logprobs(model, packed), expected)
    assert list(replica.state_dict()) == list(other.state_dict())


class Added(TorchDispatchMode):
    """Notes the dtypes in which index_add adds up."""

    def __init__(self):
        super().__init__()
        self.dtypes = set()

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        if "index_add" in str(function):
            self.dtypes.add(arguments[0].dtype)
        return function(*arguments, **options or {})


def test_gradients_of_shared_keys_add_up_in_fp32():
    """With G = 40 a prompt's keys are in 41 sequences. A GPU's index_add rounds at each sum."""
    layout = GroupLayout((7,), ((3,) * 40,))
    q, gradient = (torch.randn(1, 4, 127, 16).bfloat16() for _ in range(2))
    k, v = (torch.randn(1, 2, 127, 16).bfloat16().requires_grad_() for _ in range(2))
    keys = layout.sequences[0]
    with Added() as added:
        layout.attend(None, q, k, v, 0.25).backward(gradient)
    assert added.dtypes == {torch.float32}
    parts = torch.randn(len(keys), 2, 16).bfloat16()  # of one size, as those of a prompt's keys
    exact, by_one = torch.zeros(127, 2, 16, dtype=torch.float64), torch.zeros(127, 2, 16).bfloat16()
    for key, part in zip(keys, parts):
        exact[key] += part
        by_one[key] += part
    in_fp32 = torch.zeros(127, 2, 16).index_add(0, keys, parts.float()).bfloat16()
    off, coarse = (float((x - exact)[:7].norm() / exact[:7].norm()) for x in (in_fp32, by_one))
    assert off < 2**-8 and coarse > 2 * off


def test_quantised_layers_are_left_alone(model, prompts):
    """Layers without `weight`, here each in a module of its own."""
    replica = copy.deepcopy(model)
    for layer in replica.model.language_model.layers:
        for name in ("q_proj", "k_proj", "v_proj"):
            setattr(layer.self_attn, name, torch.nn.Sequential(getattr(layer.self_attn, name)))
    prepare_for_decoding(replica)
    options = {"group_size": 1, "max_new_tokens": 5, "end_id": -1, "temperature": 0}
    mine, other = (sample(m, prompts, **options).completion_ids for m in (replica, model))
    assert [ids.tolist() for ids in mine] == [ids.tolist() for ids in other]
