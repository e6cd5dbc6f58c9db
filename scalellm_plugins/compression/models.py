"""A model in transformers, to look into and to measure: loading, and batches for it."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from scalellm_plugins.errors import CheckpointError

from . import interrupt
from .calibration import Row
from .progress import say

BATCH_TOKENS = 4096
"""Tokens of a batch at most, padding included."""


def load_model(folder: Path) -> Any:
    """Load a checkpoint as it is stored; compressed-tensors are dequantized while loading.

    Raises:
        CheckpointError: transformers cannot, or would not compute with what the files hold: it
            makes up what it does not find.
    """
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    say(f"loading {folder} into memory: {size / 1e6:,.0f} MB")
    logging.disable_progress_bar()
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # bars of libraries, of seconds
            model, info = AutoModelForCausalLM.from_pretrained(
                folder, dtype="auto", output_loading_info=True
            )
    except Exception as error:  # many kinds: its configuration, its quantizer, memory
        interrupt.check()
        raise CheckpointError(f"transformers cannot load {folder}: {error}") from None
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if wrong := sorted(map(str, info[kind])):
            raise CheckpointError(
                f"transformers loads {folder} with {kind.replace('_', ' ')}, so what it computes "
                f"would say nothing: {', '.join(wrong[:5])}"
            )
    return model.eval()


def load_tokenizer(folder: Path) -> Any:
    """Load the checkpoint's tokenizer.

    Raises:
        CheckpointError: there is none, or transformers cannot.
    """
    try:
        return AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # many kinds, and many lines
        interrupt.check()
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        raise CheckpointError(
            f"--calibration needs the tokenizer of {folder}, which transformers cannot load: copy "
            f"tokenizer.json and tokenizer_config.json there ({reason})"
        ) from None


def batches(rows: Sequence[Row]) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """(token ids, mask, scored) of batches, (rows, tokens) each; the mask is 1 where there is a
    token, and `scored` is true where quality is measured.

    Rows are padded on the right, which a causal model does not see.
    """
    for chosen in grouped(rows):
        width = len(chosen[-1])
        ids = torch.zeros(len(chosen), width, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        scored = torch.zeros_like(ids, dtype=torch.bool)
        for place, row in enumerate(chosen):
            ids[place, : len(row)] = torch.tensor(row.ids)
            mask[place, : len(row)] = 1
            scored[place, : len(row)] = torch.tensor(row.scored)
        yield ids, mask, scored


def grouped(rows: Sequence[Row]) -> list[list[Row]]:
    """Rows of like length together, the longest of a group last."""
    groups: list[list[Row]] = [[]]
    for row in sorted(rows, key=len):
        if groups[-1] and (len(groups[-1]) + 1) * len(row) > BATCH_TOKENS:
            groups.append([])
        groups[-1].append(row)
    return groups
