"""Compile a GPU's code without a GPU: Inductor lowers it, ptxas compiles it.

    python -m tests.gpu_emulation decode --gpu h200
    python -m tests.gpu_emulation decode --gpu 4090 --steps 3b:4 7b:4
    python -m tests.gpu_emulation train --gpu a100
    python -m tests.gpu_emulation interpret

`decode` lowers decoding steps. `train` lowers a text layer, a vision block and the head, forward
and backward. Both compile every Triton kernel and print a JSON line for each candidate of its
autotuning: warps, stages, bytes of shared memory, registers and spilled bytes of a thread. Steps
that differ only in sizes have the same kernels except flex attention, so only that one is compiled
again. `interpret` runs that kernel in Triton's interpreter, in fp32 on the CPU, and prints the
largest difference from `DecodeStep._attend_whole`.

Fake are:
- `torch.cuda`: one device with the properties of an H200, an A100 or an RTX 4090 (`GPUS`).
- CUDA in C++ (`FAKE_CUDA`) and Triton's driver: they name a device and do nothing.
- Tensors: they have shapes and no memory. Inductor's modules are kept and do not run.
- Inductor does not fold constants or pad products, as both would run kernels.

Real are Dynamo, AOTAutograd, Inductor's lowering and fusion, Triton's compiler and ptxas. It does
not show speed, which candidate autotuning takes, what libraries compute, or CUDA graphs.

It patches torch for its whole process, so it runs as a program. It needs g++ and pip, which
installs Triton into a folder of its own.
"""

import argparse
import ctypes
import io
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import dataclass, replace
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

FOLDER = Path(__file__).resolve().parents[1] / "runs" / "gpu_emulation"  # git ignores runs/
TORCH, TRITON = "2.13", "3.7.1"  # with CUDA, this torch requires this Triton
LIBRARY = FOLDER / f"fake_cuda-{version('torch')}.so"
FAKE_CUDA = """
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
namespace c10::impl {
struct Guard final : NoOpDeviceGuardImpl<DeviceType::CUDA> {
  // device 0 instead of -1: backward looks up its own stream by it
  Stream getStream(Device) const noexcept override {
    return Stream(Stream::DEFAULT, Device(DeviceType::CUDA, 0));
  }
};
C10_REGISTER_GUARD_IMPL(CUDA, Guard)
}
namespace at {
struct CUDAHooks final : CUDAHooksInterface {
  CUDAHooks(CUDAHooksArgs) {}
  bool isBuilt() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
};
REGISTER_CUDA_HOOKS(CUDAHooks)
}
"""


class Unavailable(Exception):
    """This machine cannot run the emulation; the message says why."""


def prepare() -> None:
    """Put Triton and the fake CUDA into FOLDER unless they are there. Raises Unavailable."""
    if not version("torch").startswith(f"{TORCH}."):
        raise Unavailable(f"it needs torch {TORCH}; this is {version('torch')}")
    if not shutil.which("g++"):
        raise Unavailable("g++ is missing")
    if not (FOLDER / "triton" / f"triton-{TRITON}.dist-info").exists():
        pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--upgrade", "--target"]
        call([*pip, FOLDER / "triton", f"triton=={TRITON}"])
    if not LIBRARY.exists():
        (FOLDER / "fake_cuda.cpp").write_text(FAKE_CUDA)
        torch = Path(find_spec("torch").origin).parent
        paths = [f"-I{torch / 'include'}", f"-L{torch / 'lib'}", f"-Wl,-rpath,{torch / 'lib'}"]
        files = [FOLDER / "fake_cuda.cpp", "-lc10", "-ltorch_cpu", "-ltorch", "-o", LIBRARY]
        call(["g++", "-shared", "-fPIC", "-std=c++20", "-w", *paths, *files])


def call(command: list) -> None:
    """Run a command. Raises Unavailable with the last error it prints."""
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if "error" in line.lower()]
        raise Unavailable((errors or [f"{command[0]} failed"])[-1])


if __name__ == "__main__":  # before torch is imported, which looks for CUDA only once
    try:
        prepare()
    except Unavailable as reason:
        sys.exit(str(reason))
    ctypes.CDLL(str(LIBRARY))
    sys.path.insert(0, str(FOLDER / "triton"))
    if "interpret" in sys.argv:  # Triton reads this when it is imported
        os.environ["TRITON_INTERPRET"] = "1"

import torch  # noqa: E402
import torch._dynamo  # noqa: E402
import torch._functorch.config  # noqa: E402
import torch._inductor.config  # noqa: E402
from torch._dynamo import device_interface  # noqa: E402
from torch._inductor.codecache import PyCodeCache  # noqa: E402
from torch._inductor.fx_passes import joint_graph, post_grad  # noqa: E402
from torch._inductor.graph import GraphLowering  # noqa: E402
from torch._inductor.runtime import triton_helpers  # noqa: E402
from torch._subclasses import FakeTensorMode  # noqa: E402

import engine.sampling.decode_step  # noqa: E402
from engine.model.attention import GroupLayout  # noqa: E402
from engine.model.lora import Adapter, add_adapters  # noqa: E402
from engine.model.packing import head_logprobs  # noqa: E402
from engine.model.quantized import pack_layers  # noqa: E402
from engine.sampling.sampler import Sampler  # noqa: E402
from tests.bench_models import SIZES, random_model  # noqa: E402
from tests.gpu_interpreter import kernel_of, run_kernel  # noqa: E402
from tests.test_blocks import random_step  # noqa: E402


@dataclass(frozen=True)
class GPU:
    """The properties of a device that compilers read."""

    capability: tuple[int, int]
    processors: int
    shared_memory: int  # most bytes of a block
    threads: int  # most threads of a processor

    @property
    def arch(self) -> int:
        return 10 * self.capability[0] + self.capability[1]


GPUS = {
    "h200": GPU((9, 0), 132, 232448, 2048),
    "a100": GPU((8, 0), 108, 166912, 2048),
    "4090": GPU((8, 9), 128, 101376, 1536),
}
MODELS = {  # fields that differ from the 3B
    "3b": {}, "3b-lora": {},
    "7b": {"hidden_size": 3584, "num_attention_heads": 28, "num_key_value_heads": 4,
           "intermediate_size": 18944, "vocab_size": 152064},
    "32b-awq": {"hidden_size": 5120, "num_attention_heads": 40, "num_key_value_heads": 8,
                "intermediate_size": 27648, "vocab_size": 152064},
}  # fmt: skip
# MODEL:G; G = 1 is greedy, as in a prediction
STEPS = ("32b-awq:1", "3b:1", "3b:4", "3b:8", "3b:9", "3b:16", "7b:4", "3b-lora:4")
INTERPRETED = ("3b:1", "3b:4", "3b:9", "3b:16")
ATTENTION = "triton_tem"  # begins the name of its kernel, the only one made from a template
LAYERS = 2  # so that kernels between two layers are compiled too
# options of Inductor that run kernels during compilation, or replace Triton's compiler
OFF = ("joint_graph_constant_folding", "shape_padding", "fx_graph_cache",
       "use_static_triton_launcher")  # fmt: skip
KERNEL = re.compile(r"^(triton_\w+) = async_compile\.triton\('\w+', '''(.*?)'''", re.S | re.M)


def pretend(gpu: GPU) -> None:
    """Make torch and Triton compile for this GPU without running anything."""
    for name in OFF:
        setattr(torch._inductor.config, name, False)
    torch._inductor.config.compile_threads = 1
    torch._functorch.config.enable_autograd_cache = False
    torch._functorch.config.force_non_lazy_backward_lowering = True
    for passes in (joint_graph, post_grad):
        passes.lazy_init()
        passes.lazy_init = always(None)
    interface = device_interface.CudaInterface
    for name, answer in answers_of(gpu).items():
        setattr(torch.cuda, name, always(answer))
        setattr(interface, name, staticmethod(always(answer)))
    for name in ("current_device", "get_device_properties"):
        setattr(interface.Worker, name, staticmethod(getattr(torch.cuda, name)))
    torch.version.cuda = "13.0"
    for device in ("cuda", "cuda:0"):
        device_interface.register_interface_for_device(device, interface)
    pretend_to_triton(gpu)


def always(answer):
    """A function that always returns this."""
    return lambda *arguments, **options: answer


def answers_of(gpu: GPU) -> dict:
    """Return values of the functions of `torch.cuda` and of Dynamo's interface to it."""
    major, minor = gpu.capability
    properties = SimpleNamespace(
        name="emulated", major=major, minor=minor, warp_size=32, total_memory=80 * 10**9,
        multi_processor_count=gpu.processors, max_threads_per_multi_processor=gpu.threads,
        max_threads_per_block=1024, regs_per_multiprocessor=65536, L2_cache_size=50 * 2**20,
        shared_memory_per_block_optin=gpu.shared_memory, shared_memory_per_block=49152,
        gcnArchName="")  # fmt: skip
    yes = ("is_available", "is_initialized", "is_bf16_supported", "device_count")
    zero = ("current_device", "_exchange_device", "_maybe_exchange_device", "get_raw_stream")
    nothing = ("synchronize", "_lazy_init", "set_rng_state")
    answers = dict.fromkeys(yes, 1) | dict.fromkeys(zero, 0) | dict.fromkeys(nothing)
    return answers | {
        "get_device_properties": properties,
        "get_device_capability": gpu.capability,
        "get_compute_capability": gpu.arch,
        "get_device_name": "emulated",
        "get_rng_state": torch.empty(0),
    }


def pretend_to_triton(gpu: GPU) -> None:
    """Give Triton a driver of this GPU's architecture; it then prints the output of ptxas."""
    from triton import knobs
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    driver.set_active(SimpleNamespace(get_current_target=always(GPUTarget("cuda", gpu.arch, 32))))
    triton_helpers.set_driver_to_gpu = always(None)
    knobs.nvidia.dump_ptxas_log = knobs.compilation.always_compile = True


class Stop(BaseException):
    """Raised where Inductor's code would run."""


@contextmanager
def kept_code() -> Iterator[list[str]]:
    """Fake tensors, and a list of the modules that Inductor writes. The first call ends it."""
    modules = []

    def call(arguments):
        raise Stop

    def keep(graph):
        modules.append(graph.codegen()[0].value)
        return SimpleNamespace(call=call, __file__="", key="")

    torch._dynamo.reset()
    with (
        patch.object(GraphLowering, "compile_to_module", keep),
        FakeTensorMode(allow_non_fake_inputs=True),
        suppress(Stop),
    ):
        yield modules


def model_of(name: str):
    """A model with these shapes and LAYERS layers, its tensors fake, on the GPU."""
    text = SIZES["3b"].text | MODELS[name] | {"num_hidden_layers": LAYERS}
    vision = SIZES["3b"].vision | {"depth": 1, "fullatt_block_indexes": [0]}
    size = replace(SIZES["3b"], text=text, vision=vision)
    model = random_model(size, torch.device("meta"), torch.bfloat16)
    if name.endswith("awq"):
        pack_layers(model, 128)
    if name.endswith("lora"):
        add_adapters(model, Adapter(16, 32, ""), torch.bfloat16, seed=0)
    for module in model.modules():  # `to_empty` takes no fake tensors
        for name, x in module._parameters.items():
            if x is not None:
                module._parameters[name] = torch.nn.Parameter(torch.empty_like(x, device="cuda"))
        for name, x in module._buffers.items():
            module._buffers[name] = torch.empty_like(x, device="cuda")
    return model


def lowered_step(
    name: str, group_size: int, *, slots: int = 16, prompt_room: int = 2338, new: int = 400
) -> str:
    """The module of a decoding step of GRPO, or with a group of one of `predict`."""
    greedy = {"temperature": 0, "repetition_penalty": 1.05} if group_size == 1 else {}
    with kept_code() as modules, torch.no_grad():
        model = model_of(name)
        engine.sampling.decode_step.prepare_for_decoding(model)
        banned = torch.zeros(model.lm_head.out_features, dtype=torch.bool, device="cuda")
        sampler = Sampler(
            model, slots=slots, group_size=group_size, prompt_room=prompt_room,
            max_new_tokens=new, end_id=7, banned=banned, **greedy)  # fmt: skip
        torch.compile(sampler.step, dynamic=False, fullgraph=True)(new)
    (module,) = modules
    return module


def lowered_training() -> Iterator[tuple[str, str]]:
    """Name and module of each part of the 3B's update, forward and backward."""
    layout = GroupLayout((2338, 900), ((400, 300, 200, 100), (50, 60, 70, 80)))
    tokens, patches, sampled = 2338 + 1000 + 900 + 260, 5904, 1000

    def on_gpu(*shape, dtype=torch.bfloat16):
        grad = dtype == torch.bfloat16
        return torch.empty(*shape, dtype=dtype, device="cuda", requires_grad=grad)

    def text_layer(model):
        *tensors, longest_q, longest = layout.sequences
        tensors = [torch.empty_like(x, device="cuda") for x in tensors]
        layout.sequences = (*tensors, longest_q, longest)
        angles = on_gpu(1, tokens, 128).detach(), on_gpu(1, tokens, 128).detach()
        layer = torch.compile(model.model.language_model.layers[0], fullgraph=True, dynamic=True)
        options = {"layout": layout, "position_embeddings": angles}
        layer(on_gpu(1, tokens, 2048), attention_mask=None, **options)

    def vision_block(model):
        angles = (on_gpu(patches, 80, dtype=torch.float32) for _ in range(2))
        ends = on_gpu(100, dtype=torch.int32)
        block = torch.compile(model.model.visual.blocks[0], fullgraph=True, dynamic=True)
        block(on_gpu(patches, 1280), cu_seqlens=ends, max_seqlen=64, position_embeddings=(*angles,))

    def head(model):
        ids, banned = on_gpu(sampled, dtype=torch.long), on_gpu(151936, dtype=torch.bool)
        head_logprobs(model.lm_head, on_gpu(sampled, 2048), ids, 1.0, banned)

    for part in (text_layer, vision_block, head):
        with kept_code() as modules:
            part(model_of("3b").train())
        for way, module in zip(("forward", "backward"), modules, strict=True):
            yield f"{part.__name__} {way}".replace("_", " "), module


def compiled(module: str, wanted: str = "") -> Iterator[dict]:
    """The resources of each kernel and candidate of a module. wanted: how kernel names begin."""
    assert "async_compile.cpp" not in module, "a CPU kernel, which needs a C++ compiler"
    for name, source in KERNEL.findall(module):
        if name.startswith(wanted):
            kernel = getattr(PyCodeCache.load(source), name)
            for candidate in kernel.configs:
                yield {"kernel": name} | resources(kernel, candidate)


def resources(kernel, candidate) -> dict[str, int]:
    """Compile a kernel as this candidate. Registers and spilled bytes are those of a thread."""
    with redirect_stdout(io.StringIO()) as said:  # by ptxas
        binary = kernel._precompile_config(candidate).kernel
    names = {"registers": r"Used (\d+) registers", "spills": r"(\d+) bytes spill stores"}
    found = {name: int(re.search(text, said.getvalue())[1]) for name, text in names.items()}
    taken = {"warps": candidate.num_warps, "stages": candidate.num_stages}
    return taken | {"shared": binary.metadata.shared} | found


def interpreted(model: str, group_size: int) -> float:
    """Largest difference of the flex kernel from scores in memory, on random values."""
    sizes = {"slots": 3, "prompt_room": 300}
    kernels = KERNEL.findall(lowered_step(model, group_size, new=200, **sizes))
    name, source = next(kernel for kernel in kernels if kernel[0].startswith(ATTENTION))
    text = SimpleNamespace(**SIZES["3b"].text | MODELS[model] | {"num_hidden_layers": 1})
    config = SimpleNamespace(text_config=text)
    shapes = SimpleNamespace(config=config, dtype=torch.float32, device="cpu")
    generator = torch.Generator().manual_seed(0)
    with patch.object(engine.sampling.decode_step, "has_flash", lambda x: True):
        step = random_step(shapes, generator, group_size=group_size, completion_room=200, **sizes)
    shape = (step.slots, step.cache.heads, group_size, step.cache.served, 128)
    q = torch.randn(shape, generator=generator)
    found = run_kernel(kernel_of(name, source), source, step, q.flatten(2, 3))
    return float((found.view(shape) - step._attend_whole(q, 0, 128**-0.5)).abs().max())


def decoding(steps: list[str]) -> Iterator[dict]:
    """The rows of `compiled` of these steps."""
    seen = set()
    for step in steps:
        name, group_size = split(step)
        kind = group_size == 1, name.endswith("lora")
        wanted = ATTENTION if kind in seen else ""  # the other kernels differ in sizes alone
        seen.add(kind)
        for row in compiled(lowered_step(name, group_size), wanted):
            yield {"part": step} | row


def split(step: str) -> tuple[str, int]:
    """Model and group size of MODEL:G."""
    name, group_size = step.split(":")
    return name, int(group_size)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.gpu_emulation")
    parser.add_argument("what", choices=("decode", "train", "interpret"))
    parser.add_argument("--gpu", choices=GPUS, default="h200")
    parser.add_argument("--steps", nargs="+", metavar="MODEL:G")
    options = parser.parse_args()
    pretend(GPUS[options.gpu])
    if options.what == "interpret":
        steps = options.steps or INTERPRETED
        rows = ({"part": step, "off": interpreted(*split(step))} for step in steps)
    elif options.what == "decode":
        rows = decoding(options.steps or STEPS)
    else:
        rows = ({"part": part} | row for part, code in lowered_training() for row in compiled(code))
    for row in rows:
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
