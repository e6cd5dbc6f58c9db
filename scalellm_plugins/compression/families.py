"""What is known about architectures: which tensors are linear layers, which are an MLP's channels.

A table instead of guesses from shapes: a router, an embedding or a convolution is a matrix, too,
and a server that finds integers where it expects bf16 fails late or, worse, answers nonsense.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import msgspec
from msgspec.structs import replace

from scalellm_plugins.errors import CheckpointError

_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)\.(weight|bias)")


class Family(msgspec.Struct, frozen=True):
    """Layers named `model.layers.N.…`, with a gated MLP; module names are within a layer.

    Attributes:
        fused: groups of linear layers that vLLM runs as one, so that they share a scheme.
        rows: whose output rows are channels of the MLP, and how often: a fused gate and up
            projection holds every channel twice, gates first.
        columns: whose input columns are the channels.
        per_layer: keys of config.json that are lists with an entry for each layer.
        norms: of every layer.
        biases: {key of config.json: linear layers that have a bias where it is true}; "": always.
        tied: whether `lm_head` is the embedding where config.json does not say so.
    """

    fused: tuple[tuple[str, ...], ...]
    rows: Mapping[str, int]
    columns: str = "mlp.down_proj"
    per_layer: tuple[str, ...] = ("layer_types", "no_rope_layers")
    norms: tuple[str, ...] = ("input_layernorm", "post_attention_layernorm")
    biases: Mapping[str, tuple[str, ...]] = {}
    tied: bool = False

    @property
    def linears(self) -> frozenset[str]:
        """Every linear layer of a decoder layer."""
        return frozenset(name for group in self.fused for name in group)

    def promised(self, config: Mapping[str, Any]) -> list[str]:
        """Every tensor that a model of such a config.json has; servers give one that is not there
        random numbers, or whatever was in memory, and many say nothing."""
        biased = [
            module
            for key, modules in self.biases.items()
            if not key or config.get(key)
            for module in modules
        ]
        within = [f"{module}.weight" for module in (*sorted(self.linears), *self.norms)]
        within += [f"{module}.bias" for module in biased]
        names = ["model.embed_tokens.weight", "model.norm.weight"]
        if not config.get("tie_word_embeddings", self.tied):
            names.append("lm_head.weight")
        layers = range(config["num_hidden_layers"])
        return names + [f"model.layers.{layer}.{name}" for layer in layers for name in within]


_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_HEAD_NORMS = ("self_attn.q_norm", "self_attn.k_norm")
_SPLIT = Family(
    fused=(
        _QKV,
        ("self_attn.o_proj",),
        ("mlp.gate_proj", "mlp.up_proj"),
        ("mlp.down_proj",),
    ),
    rows={"mlp.gate_proj": 1, "mlp.up_proj": 1},
)
_FUSED = Family(
    fused=(
        ("self_attn.qkv_proj",),
        ("self_attn.o_proj",),
        ("mlp.gate_up_proj",),
        ("mlp.down_proj",),
    ),
    rows={"mlp.gate_up_proj": 2},
)
_ATTENTION_BIAS = {"attention_bias": (*_QKV, "self_attn.o_proj")}
_LLAMA = replace(
    _SPLIT,
    biases=_ATTENTION_BIAS | {"mlp_bias": ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")},
)
FAMILIES: Mapping[str, Family] = {
    "llama": _LLAMA,
    "granite": _LLAMA,
    "smollm3": replace(_LLAMA, tied=True),
    "mistral": _SPLIT,
    "qwen2": replace(_SPLIT, biases={"": _QKV}),
    "qwen3": replace(_SPLIT, norms=(*_SPLIT.norms, *_HEAD_NORMS), biases=_ATTENTION_BIAS),
    "olmo2": replace(
        _SPLIT,
        norms=("post_attention_layernorm", "post_feedforward_layernorm", *_HEAD_NORMS),
        biases=_ATTENTION_BIAS,
    ),
    "phi3": _FUSED,
}
"""model_type of config.json → family. Each is loaded again by transformers in the tests."""


BY_NUMBER = {"use_sliding_window": "layer_types", "no_rope_layer_interval": "no_rope_layers"}
"""Keys by which layers differ → the list that says which. Without it a layer's number does, and
that is what changes when others are dropped."""


class Place(msgspec.Struct, frozen=True):
    """Where a tensor belongs: `module` of decoder layer `layer` ("mlp.up_proj"), weight or bias."""

    layer: int
    module: str
    kind: str


def place_of(name: str) -> Place | None:
    """Take a tensor's name apart; None if it is no weight or bias of a decoder layer."""
    match = _LAYER.fullmatch(name)
    return match and Place(int(match[1]), match[2], match[3])


def family_of(config: Mapping[str, Any]) -> Family:
    """Find the family of a config.json.

    Raises:
        CheckpointError: the architecture is not in the table, or the model is quantized already.
    """
    kind = str(config.get("model_type"))
    if (quantized := config.get("quantization_config")) is not None:
        named = isinstance(quantized, dict) and quantized.get("quant_method")
        method = named or "an unnamed method"
        raise CheckpointError(
            f"this checkpoint is quantized already (quantization_config: {method}). "
            "Compress the bf16 or fp16 model that it was made from."
        )
    if kind not in FAMILIES:
        raise CheckpointError(
            f"model_type {kind!r} is not known to `scalellm compress`; known: "
            f"{', '.join(sorted(FAMILIES))}. A mixture of experts is not, either."
        )
    return FAMILIES[kind]


def check_droppable(config: Mapping[str, Any]) -> None:
    """Refuse to drop layers of a model whose layers are told apart by their numbers.

    Raises:
        CheckpointError: it is one, and config.json has no list of them.
    """
    for key, listed in BY_NUMBER.items():
        if config.get(key) and not isinstance(config.get(listed), list):
            raise CheckpointError(
                f"--drop-layers would renumber layers that {key} tells apart by number: write "
                f"the list {listed} into config.json first (loading and saving with a recent "
                "transformers does)"
            )
