"""The GPU's code with flash attention over unequal rows, on a CPU with a substitute."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import engine.model.attention
import engine.sampling.decode_step
from engine.model.attention import GroupLayout
from engine.model.packing import pack, token_logprobs
from engine.sampling.decode_step import prepare_for_decoding
from engine.sampling.sampler import Sampler
from tests.test_blocks import flex_of_a_copy
from tests.test_packing import (  # noqa: F401  these tests run with flash attention too
    test_gradients_equal_separate_forwards,
    test_token_logprobs_equal_separate_forwards,
)
from tests.test_sampler import (  # noqa: F401
    test_greedy_ids_equal_generate,
    test_rows_do_not_depend_on_rows_that_end,
    test_sample_depends_only_on_its_seed,
    test_what_was_sampled_from_equals_a_fresh_forward,
)
from tests.tiny import collect

# without a compiler the CPU computes it plainly, as these tests want
pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")


def masked_varlen(
    q, k, v, ends_q, ends, longest_q, longest, *, scale, window_size=(-1, -1), enable_gqa=False
):
    """`torch.nn.attention.varlen.varlen_attn` as documented, in one call with a mask."""
    assert ends_q.dtype == ends.dtype == torch.int32
    row, column = torch.arange(len(q))[:, None], torch.arange(len(k))[None]
    of_q, of_k = (torch.searchsorted(e, x, right=True) for e, x in ((ends_q, row), (ends, column)))
    left, left_k = ends_q[of_q] - row, ends[of_k] - column  # tokens to the sequence's end
    seen = (of_q == of_k) & (left <= longest_q) & (left_k <= longest)
    if window_size == (-1, 0):
        seen &= left_k >= left
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    grouped = {"enable_gqa": q.shape[1] != k.shape[1]}
    output = F.scaled_dot_product_attention(q, k, v, seen, scale=scale, **grouped)
    return output[0].transpose(0, 1)


@pytest.fixture(autouse=True)
def flash(monkeypatch):
    """Take the GPU's code paths."""
    calls = []

    def varlen(*args, **options):
        calls.append(args)
        return masked_varlen(*args, **options)

    for module in (engine.model.attention, engine.sampling.decode_step):
        monkeypatch.setattr(module, "has_flash", lambda x: True)
    monkeypatch.setattr(engine.model.attention, "varlen_attn", varlen)
    yield
    assert calls


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_step_samples_the_same(model, prompts, monkeypatch, backend):
    """One graph as on a GPU: flash attention, fused products, and trial steps of done rows."""
    options = {"slots": 2, "group_size": 2, "prompt_room": 30, "max_new_tokens": 9, "end_id": 7}
    plain = collect(Sampler(model, **options), prompts, list(range(6)))

    monkeypatch.setattr(engine.sampling.decode_step, "flex_attention", flex_of_a_copy)
    replica = copy.deepcopy(model)
    prepare_for_decoding(replica)
    prepare_for_decoding(replica)  # a second sampler on the same model
    sampler = Sampler(replica, **options)
    step = torch.compile(sampler.step, dynamic=False, fullgraph=True, backend=backend)

    def with_trial(room):
        """A trial with all rows done before each step, as before a CUDA graph is recorded."""
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


def test_fused_products_use_the_weights_that_are_copied_in(model, prompts, completions):
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


class AddedIn(TorchDispatchMode):
    """Collects the dtypes in which index_add adds up."""

    def __init__(self):
        super().__init__()
        self.dtypes = set()

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        if "index_add" in str(function):
            self.dtypes.add(arguments[0].dtype)
        return function(*arguments, **options or {})


def test_gradients_of_shared_keys_add_up_in_fp32():
    """With G = 40 a prompt's keys are in 41 sequences. In bf16 each sum would be rounded."""
    layout = GroupLayout((7,), ((3,) * 40,))
    q, gradient = (torch.randn(1, 4, 127, 16).bfloat16() for _ in range(2))
    k, v = (torch.randn(1, 2, 127, 16).bfloat16().requires_grad_() for _ in range(2))
    with AddedIn() as added:
        layout.attend(None, q, k, v, 0.25).backward(gradient)
    assert added.dtypes == {torch.float32}
