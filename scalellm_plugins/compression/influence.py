"""Which layers and channels matter, by what the model does with text.

Depth: block influence, the mean over tokens of 1 - cos(what enters a layer, what leaves it). A
layer that hardly turns the hidden state is dropped first (ShortGPT, Men et al., arXiv 2403.03853).

Width: a channel of an MLP is as important as what it adds to the hidden state: the L2 norm of its
activation over all tokens, times the norm of its column in the down projection. That is Wanda's
weight × activation (Sun et al., arXiv 2306.11695), summed over the structure that is cut, as FLAP
(An et al., arXiv 2312.11983) does; activations are those of the model whose layers are dropped
already. The same number of channels stays in every layer, because config.json has room for one.
Neither needs gradients.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from .calibration import Row
from .models import batches, grouped
from .plan import Selection
from .progress import track


def select(model: Any, rows: Sequence[Row], drop_layers: int, keep_channels: int) -> Selection:
    """Choose layers and channels. The model loses the layers.

    Args:
        model: a causal LM of transformers, with `model.layers` and gated MLPs.
        rows: token ids of the calibration text.
        drop_layers: how many layers to drop, fewer than there are.
        keep_channels: how many channels of each MLP stay.
    """
    layers = model.model.layers
    influence = block_influence(model, rows) if drop_layers else [0.0] * len(layers)
    measured = tuple(influence) if drop_layers else ()
    dropped = set(sorted(range(len(layers)), key=influence.__getitem__)[:drop_layers])
    kept = tuple(i for i in range(len(layers)) if i not in dropped)
    model.model.layers = torch.nn.ModuleList(layers[i] for i in kept)
    if keep_channels == model.config.intermediate_size:
        return Selection(kept, {}, measured)
    channels, shares = {}, {}
    for layer, importance in zip(kept, channel_importance(model, rows), strict=True):
        best = importance.topk(keep_channels).indices.sort().values
        channels[layer] = tuple(best.tolist())
        shares[layer] = float(importance[best].sum() / importance.sum())
    return Selection(kept, channels, measured, shares)


def block_influence(model: Any, rows: Sequence[Row]) -> list[float]:
    """Block influence of every layer: 0, it only scales; 1, at right angles; at most 2."""
    layers = model.model.layers
    turned = torch.zeros(len(layers), dtype=torch.float64)
    count = 0

    def watch(layer: int) -> Any:
        def hook(_: Any, entered: tuple[Tensor, ...], left: Any) -> None:
            after = left[0] if isinstance(left, tuple) else left
            cosine = torch.cosine_similarity(entered[0].float(), after.float(), dim=-1)
            turned[layer] += ((1.0 - cosine) * mask).sum()

        return hook

    hooks = [layer.register_forward_hook(watch(i)) for i, layer in enumerate(layers)]
    with _watching(hooks):
        for ids, mask, _ in _tracked(rows, "block influence"):
            model.model(input_ids=ids, attention_mask=mask, use_cache=False)
            count += int(mask.sum())
    return [float(value) for value in turned / count]


def channel_importance(model: Any, rows: Sequence[Row]) -> list[Tensor]:
    """Importance of the channels of every layer's MLP: ||activation|| × ||column||, (channels,)."""
    downs = [layer.mlp.down_proj for layer in model.model.layers]
    squares = [torch.zeros(down.weight.shape[1], dtype=torch.float64) for down in downs]

    def watch(layer: int) -> Any:
        def hook(_: Any, entered: tuple[Tensor, ...]) -> None:
            squares[layer] += (entered[0].double().square() * mask.unsqueeze(-1)).sum((0, 1))

        return hook

    hooks = [down.register_forward_pre_hook(watch(i)) for i, down in enumerate(downs)]
    with _watching(hooks):
        for ids, mask, _ in _tracked(rows, "channel importance"):
            model.model(input_ids=ids, attention_mask=mask, use_cache=False)
    return [
        square.sqrt() * down.weight.detach().double().norm(dim=0)
        for square, down in zip(squares, downs, strict=True)
    ]


def _tracked(rows: Sequence[Row], title: str) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    return track(batches(rows), len(grouped(rows)), title)


@contextmanager
def _watching(hooks: Sequence[Any]) -> Iterator[None]:
    try:
        with torch.inference_mode():
            yield
    finally:
        for hook in hooks:
            hook.remove()
