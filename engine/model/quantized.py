"""Linear layers in 4 bits, as in AWQ checkpoints: the 32B and 72B rows of Table 1.

transformers needs further packages for `quant_method: "awq"`. Importing this module registers a
quantizer in their place: `from_pretrained` then replaces the linear layers of the language model's
decoder. Head, embedding and vision tower stay as they are.

Layout "gemm" with zero points: the weight of input i and output o is (q - zero) * scale, with q in
0..15. Each group of inputs has a zero and a scale for every output. Such weights are frozen; LoRA
adapters on them can be trained.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from hicodet import InputError

PER_WORD = 8  # values of 4 bits in an int32
# of quantization_config
SUPPORTED = {"quant_method": "awq", "version": "gemm", "bits": "4", "zero_point": "true"}


def unpack(words: Tensor) -> Tensor:
    """(..., N) int32 -> (..., 8 N) int32, each of 0..15.

    From its lowest four bits up, a word holds columns 0, 2, 4, 6, 1, 3, 5, 7 of its eight.
    """
    # not a constant: a compiler would unpack all layers in one kernel
    column = torch.arange(PER_WORD, dtype=torch.int32, device=words.device)
    shifts = 4 * (column // 2 + 4 * (column % 2))
    return (words[..., None] >> shifts & 15).flatten(-2)


class PackedLinear(nn.Module):
    """A frozen linear layer in 4 bits; it keeps the bias of the layer that it replaces."""

    def __init__(self, linear: nn.Linear, group_size: int):
        super().__init__()
        rows, columns = linear.in_features, linear.out_features
        groups, words = rows // group_size, columns // PER_WORD
        packed = {"dtype": torch.int32, "device": linear.weight.device}
        self.qweight = nn.Buffer(torch.empty(rows, words, **packed))
        self.qzeros = nn.Buffer(torch.empty(groups, words, **packed))
        self.scales = nn.Buffer(torch.empty(groups, columns, **packed | {"dtype": torch.float16}))
        self.bias = linear.bias
        self.in_features, self.out_features = rows, columns

    def forward(self, x: Tensor) -> Tensor:
        packed = self.qweight, self.qzeros, self.scales
        if not x.requires_grad:
            return F.linear(x, unpacked_weight(*packed, x.dtype).T, self.bias)
        product = _PackedProduct.apply(x, *packed)
        return product if self.bias is None else product + self.bias


def unpacked_weight(qweight: Tensor, qzeros: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """(in, out): exact in fp32, then rounded once."""
    zeros, scales = unpack(qzeros)[:, None], scales.float()[:, None]
    words = qweight.unflatten(0, (len(zeros), -1))  # (groups, group, out / 8)
    # in one expression, so that the unpacked integers are freed before the result is used
    return ((unpack(words) - zeros) * scales).flatten(0, 1).to(dtype)


class _PackedProduct(torch.autograd.Function):
    """x W; backward unpacks W again, so that no unpacked weight is kept in between."""

    @staticmethod
    def forward(ctx, x: Tensor, *packed: Tensor) -> Tensor:
        ctx.save_for_backward(*packed)
        return x @ unpacked_weight(*packed, x.dtype)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return grad @ unpacked_weight(*ctx.saved_tensors, grad.dtype).T, None, None, None


def pack_layers(model: nn.Module, group_size: int) -> None:
    """Replace the linear layers of the language model's decoder by empty packed layers.

    Raises InputError if the groups do not divide a layer's inputs, or words its outputs.
    """
    for name, linear in list(model.model.language_model.layers.named_modules()):
        if type(linear) is nn.Linear:
            if linear.in_features % group_size or linear.out_features % PER_WORD:
                size = f"{linear.in_features} inputs and {linear.out_features} outputs"
                raise InputError(
                    f"quantization_config: group_size {group_size} does not fit the {size} of "
                    f"layers.{name}"
                )
            packed = PackedLinear(linear, group_size)
            model.model.language_model.layers.set_submodule(name, packed)


class PackedConfig(QuantizationConfigMixin):
    """`quantization_config` of config.json. Raises InputError naming a key that does not fit."""

    def __init__(self, values: dict):
        found = {key: str(values.get(key, "missing")).lower() for key in (*SUPPORTED, "group_size")}
        for key, supported in SUPPORTED.items():
            if found[key] != supported:
                raise InputError(
                    f"quantization_config: {key} is {found[key]}; only {supported} can be read"
                )
        size = found["group_size"]
        if not size.isdecimal() or int(size) < 1:
            raise InputError(f"quantization_config: group_size is {size}; must be at least 1")
        self.quant_method, self.group_size = "awq", int(size)

    @classmethod
    def from_dict(cls, values: dict):
        """Called by the library."""
        return cls(values)


class PackedQuantizer(HfQuantizer):
    """Hooks that `from_pretrained` calls for a model in 4 bits."""

    requires_calibration = True  # only reads such models
    is_trainable = False

    def is_serializable(self) -> bool:
        return False

    def _process_model_before_weight_loading(self, model, **kwargs):
        pack_layers(model, self.quantization_config.group_size)

    def _process_model_after_weight_loading(self, model, **kwargs):
        for parameter in model.parameters():  # 5.17 leaves some in the dtype of the files
            parameter.data = parameter.data.to(model.config.dtype)


# assigned directly, as the library's register functions refuse a name that is taken
AUTO_QUANTIZER_MAPPING["awq"] = PackedQuantizer
AUTO_QUANTIZATION_CONFIG_MAPPING["awq"] = PackedConfig


def is_packed(config) -> bool:
    """Whether a model of this configuration has quantised weights."""
    return getattr(config, "quantization_config", None) is not None
