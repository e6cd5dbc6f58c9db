"""How long a step takes on a named GPU, and how much KV cache fits on it. Pure arithmetic.

The model is the usual roofline (Williams et al., CACM 2009) taken per part of a decoder step, and
the parts are added, because they are kernels that run one after the other:

    linear layers   max(weight bytes / bandwidth, FLOPs / peak)
    attention       max(KV bytes / bandwidth, FLOPs / peak)
    sampling        logits written and read / bandwidth
    all-reduce      two per layer under tensor parallelism: latency + bytes / link
    launch floor    a constant per step and a constant per layer

Datasheet figures are never reached, so every achievable fraction is a named field of `Gpu`. Units
are SI throughout: seconds, bytes, FLOP/s, tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from scalellm_plugins.errors import ConfigError, closest_first

TERA = 1e12
GIGA = 1e9
GIB = 1 << 30

ACTIVATION_RESERVE_BYTES = 2 * GIB
"""What a serving process holds besides weights and KV cache: CUDA context, graphs, activations."""

LOGITS_PASSES = 4
"""Times that the float32 logits cross memory: written, then read for penalties, softmax, sample."""


@dataclass(frozen=True)
class Gpu:
    """One card. `peak_flops` is dense bf16 with float32 accumulation, FLOP/s.

    The achievable fractions: large bf16 GEMMs reach 60-75 % of the dense peak on Hopper under its
    power limit, and weight-streaming GEMMs of a decode step 60-80 % of the memory bandwidth (the
    "model bandwidth utilization" of Databricks' "LLM Inference Performance Engineering: Best
    Practices", 2023); attention prefill reaches less than a GEMM (FlashAttention-2, -3).
    """

    name: str
    peak_flops: float
    memory_bandwidth: float
    """Bytes/s."""
    memory_bytes: int
    link_bandwidth: float
    """Bytes/s per direction between two cards: half of NVLink's or PCIe's advertised total."""
    gemm_efficiency: float = 0.65
    attention_efficiency: float = 0.45
    bandwidth_efficiency: float = 0.70
    allreduce_latency_s: float = 8e-6
    """One small all-reduce in one shot over NVLink, s."""
    launch_floor_s: float = 300e-6
    """Per step: graph launch, input copies, sampler kernels, tokens back to the host, s."""
    layer_floor_s: float = 15e-6
    """Per layer: norms, rotary embedding, cache writes, gaps between kernels in a graph, s."""


@dataclass(frozen=True)
class Model:
    """A decoder's shape. Sizes follow the names in its Hugging Face `config.json`."""

    name: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    tied_embeddings: bool = False
    experts: int = 1
    experts_per_token: int = 1
    dtype_bytes: int = 2
    tensor_parallel: int = 1
    """Cards that the preset runs on, unless told otherwise."""

    @property
    def attention_params(self) -> int:
        """Parameters of all attention projections (q, k, v, o)."""
        return self.layers * self.hidden * self.head_dim * 2 * (self.heads + self.kv_heads)

    @property
    def expert_params(self) -> int:
        """Parameters of one expert (the whole MLP of a dense model) over all layers."""
        return self.layers * 3 * self.hidden * self.intermediate

    @property
    def head_params(self) -> int:
        """Parameters of the output head; the input embedding has as many."""
        return self.vocab * self.hidden

    @property
    def params(self) -> int:
        """All parameters, norms left out (below 0.01 %)."""
        embeddings = self.head_params * (1 if self.tied_embeddings else 2)
        router = self.layers * self.hidden * self.experts if self.experts > 1 else 0
        return self.attention_params + self.experts * self.expert_params + router + embeddings

    @property
    def active_params(self) -> int:
        """Parameters that one token multiplies with, the output head included."""
        return (
            self.attention_params + self.experts_per_token * self.expert_params + self.head_params
        )

    @property
    def weight_bytes(self) -> int:
        """All weights, bytes."""
        return self.params * self.dtype_bytes

    def kv_bytes_per_token(self, tensor_parallel: int = 1) -> int:
        """K and V of one token on one card, bytes. More cards than KV heads replicate them."""
        heads = max(1, self.kv_heads // tensor_parallel)
        return 2 * self.layers * heads * self.head_dim * self.dtype_bytes


def _gpus(*gpus: Gpu) -> dict[str, Gpu]:
    return {gpu.name: gpu for gpu in gpus}


_NVLINK4 = 450 * GIGA
_PCIE4 = 32 * GIGA
_PCIE_LATENCY = 30e-6

GPUS: dict[str, Gpu] = _gpus(
    # NVIDIA A100 datasheet, 80 GB SXM: 312 TFLOP/s, 2,039 GB/s, NVLink 600 GB/s.
    Gpu("a100", 312 * TERA, 2039 * GIGA, 80 * 10**9, 300 * GIGA, gemm_efficiency=0.75),
    # NVIDIA H100 datasheet, SXM: 1,979 TFLOP/s with sparsity (989 dense), 3.35 TB/s, 80 GB,
    # NVLink 900 GB/s.
    Gpu("h100", 989 * TERA, 3350 * GIGA, 80 * 10**9, _NVLINK4),
    # NVIDIA H200 datasheet, SXM: H100's arithmetic, 4.8 TB/s, 141 GB.
    Gpu("h200", 989 * TERA, 4800 * GIGA, 141 * 10**9, _NVLINK4),
    # NVIDIA HGX B200 datasheet: 4.5 PFLOP/s with sparsity (2.25 dense), 8 TB/s, 180 GB usable
    # (1.44 TB for eight), NVLink 1.8 TB/s.
    Gpu("b200", 2250 * TERA, 8000 * GIGA, 180 * 10**9, 900 * GIGA),
    # NVIDIA L40S datasheet: 362 TFLOP/s dense, 864 GB/s, 48 GB, PCIe 4.0 ×16.
    Gpu(
        "l40s",
        362 * TERA,
        864 * GIGA,
        48 * 10**9,
        _PCIE4,
        gemm_efficiency=0.6,
        bandwidth_efficiency=0.8,
        allreduce_latency_s=_PCIE_LATENCY,
    ),
    # NVIDIA L4 datasheet: 121 TFLOP/s dense, 300 GB/s, 24 GB, PCIe 4.0 ×16, 72 W.
    Gpu(
        "l4",
        121 * TERA,
        300 * GIGA,
        24 * 10**9,
        _PCIE4,
        gemm_efficiency=0.5,
        bandwidth_efficiency=0.8,
        allreduce_latency_s=_PCIE_LATENCY,
    ),
    # NVIDIA Ada GPU architecture whitepaper: 165.2 TFLOP/s with float32 accumulation, 1,008 GB/s,
    # 24 GB, PCIe 4.0 ×16.
    Gpu(
        "rtx4090",
        165.2 * TERA,
        1008 * GIGA,
        24 * 10**9,
        _PCIE4,
        gemm_efficiency=0.85,
        bandwidth_efficiency=0.85,
        allreduce_latency_s=_PCIE_LATENCY,
    ),
)
"""Cards by the name that `scalellm.sim.gpu` takes."""


def _models(*models: Model) -> dict[str, Model]:
    return {model.name: model for model in models}


MODELS: dict[str, Model] = _models(
    # Qwen/Qwen3-0.6B, config.json.
    Model("0.6b", 28, 1024, 16, 8, 128, 3072, 151936, tied_embeddings=True),
    # meta-llama/Llama-3.2-1B, config.json.
    Model("1b", 16, 2048, 32, 8, 64, 8192, 128256, tied_embeddings=True),
    # meta-llama/Llama-3.1-8B, config.json.
    Model("8b", 32, 4096, 32, 8, 128, 14336, 128256),
    # Qwen/Qwen3-30B-A3B, config.json (`intermediate` is moe_intermediate_size).
    Model("30b-a3b", 48, 2048, 32, 4, 128, 768, 151936, experts=128, experts_per_token=8),
    # Qwen/Qwen3-32B, config.json.
    Model("32b", 64, 5120, 64, 8, 128, 25600, 151936, tensor_parallel=2),
    # meta-llama/Llama-3.1-70B, config.json.
    Model("70b", 80, 8192, 64, 8, 128, 28672, 128256, tensor_parallel=4),
)
"""Models by the name that `scalellm.sim.model` takes."""


def gpu_preset(name: str) -> Gpu:
    """Return the card called `name`, upper or lower case.

    Raises:
        ConfigError: there is none; the text lists those that there are.
    """
    gpu = GPUS.get(name.lower())
    if gpu is None:
        raise ConfigError(_unknown("scalellm.sim.gpu", name, GPUS))
    return gpu


def model_preset(name: str, tensor_parallel: int | None = None) -> Model:
    """Return the model called `name`, on `tensor_parallel` cards if that is given.

    Raises:
        ConfigError: there is none, or its heads do not divide among so many cards.
    """
    model = MODELS.get(name.lower())
    if model is None:
        raise ConfigError(_unknown("scalellm.sim.model", name, MODELS))
    if tensor_parallel is None:
        return model
    if model.heads % tensor_parallel:
        raise ConfigError(
            f"scalellm.sim.tensor_parallel: {tensor_parallel} cards do not divide the "
            f"{model.heads} attention heads of {model.name}. Valid: divisors of {model.heads}"
        )
    return replace(model, tensor_parallel=tensor_parallel)


def _unknown(option: str, value: str, valid: dict[str, Gpu] | dict[str, Model]) -> str:
    return f"{option}: {value!r} is unknown. Valid: {', '.join(closest_first(value, valid))}"


class Roofline:
    """The step times of one model on one kind of card, with everything constant precomputed."""

    def __init__(self, gpu: Gpu, model: Model) -> None:
        self.gpu = gpu
        self.model = model
        cards = model.tensor_parallel
        bandwidth = gpu.memory_bandwidth * gpu.bandwidth_efficiency
        self._dense_read_s = (
            (model.attention_params + model.head_params) * model.dtype_bytes / cards / bandwidth
        )
        self._expert_read_s = model.expert_params * model.dtype_bytes / cards / bandwidth
        gemm = gpu.peak_flops * gpu.gemm_efficiency * cards
        self._token_flops_s = 2 * (model.active_params - model.head_params) / gemm
        self._row_flops_s = 2 * model.head_params / gemm
        self._row_sample_s = LOGITS_PASSES * 4 * model.vocab / bandwidth
        self._kv_read_s = model.kv_bytes_per_token(cards) / bandwidth
        self._pair_flops_s = (4 * model.layers * model.heads * model.head_dim) / (
            gpu.peak_flops * gpu.attention_efficiency * cards
        )
        self._expert_miss = 1 - model.experts_per_token / model.experts
        self._reduce_floor_s = 0.0
        self._token_reduce_s = 0.0
        if cards > 1:
            reduces = 2 * model.layers
            self._reduce_floor_s = reduces * gpu.allreduce_latency_s
            message = model.hidden * model.dtype_bytes
            # A ring moves 2 (n - 1) / n of the message over every link.
            self._token_reduce_s = reduces * message * 2 * (cards - 1) / cards / gpu.link_bandwidth
        self.floor_s = gpu.launch_floor_s + model.layers * gpu.layer_floor_s + self._reduce_floor_s
        """Seconds that any step takes, weights aside."""

    def step_seconds(
        self,
        prefill_tokens: int,
        decode_seqs: int,
        context_tokens: int,
        *,
        prefill_pairs: int = 0,
        prefill_rows: int = 0,
    ) -> float:
        """Seconds of one step.

        Args:
            prefill_tokens: prompt tokens computed in this step, over all its prefill chunks.
            decode_seqs: sequences that compute one token each.
            context_tokens: tokens of KV cache read, over all sequences: for a decode its length,
                for a prefill chunk what is computed before it plus the chunk.
            prefill_pairs: (query, key) pairs of the prefill chunks; a chunk of n tokens after c
                computed ones has n c + n (n + 1) / 2.
            prefill_rows: prefill chunks that end their prompt, and so sample a token.
        """
        tokens = prefill_tokens + decode_seqs
        if not tokens:
            return 0.0
        rows = decode_seqs + prefill_rows
        weights = self._dense_read_s
        if self._expert_miss:
            # Expected share of experts that `tokens` tokens touch when routing is uniform.
            share = 1 - self._expert_miss**tokens
            weights += self._expert_read_s * self.model.experts * share
        else:
            weights += self._expert_read_s
        linear = max(weights, tokens * self._token_flops_s + rows * self._row_flops_s)
        # A decode's pairs are left out: one query per key read is bound by the read, 33-fold.
        attention = max(context_tokens * self._kv_read_s, prefill_pairs * self._pair_flops_s)
        return (
            self.floor_s
            + linear
            + attention
            + rows * self._row_sample_s
            + tokens * self._token_reduce_s
        )

    def kv_capacity_bytes(self, utilization: float) -> int:
        """Bytes of KV cache on one card when the server may use `utilization` of its memory.

        Raises:
            ConfigError: the weights alone do not fit; the text names the fewest cards that do.
        """
        free = self._free_bytes(self.model.tensor_parallel, utilization)
        if free > 0:
            return free
        cards = self.model.tensor_parallel
        enough = next(
            (
                n
                for n in range(cards + 1, self.model.heads + 1)
                if self.model.heads % n == 0 and self._free_bytes(n, utilization) > 0
            ),
            None,
        )
        remedy = f"set scalellm.sim.tensor_parallel to {enough}" if enough else "use a larger card"
        raise ConfigError(
            f"scalellm.sim.model: {self.model.name} ({self.model.weight_bytes / GIGA:.1f} GB) does "
            f"not fit on {cards} × {self.gpu.name} at {utilization:.0%} of "
            f"{self.gpu.memory_bytes / GIGA:.0f} GB: {remedy}"
        )

    def _free_bytes(self, cards: int, utilization: float) -> int:
        usable = int(self.gpu.memory_bytes * utilization)
        return usable - self.model.weight_bytes // cards - ACTIVATION_RESERVE_BYTES
