"""What llm-compressor does well: rounding and pruning that look at what the model does with text.

GPTQ (arXiv 2210.17323), AWQ (arXiv 2306.00978) and SparseGPT (arXiv 2301.00774) are its; here are
their recipes for the formats of `recipe.py`, so that OUT is what the same `--scheme` writes without
them. It is an optional extra, and wants other versions of transformers and compressed-tensors than
vLLM: an environment of its own, in which vLLM is not needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from scalellm_plugins.errors import CheckpointError

from .calibration import WINDOW, Row
from .container import writing
from .plan import quantization_config
from .recipe import Recipe

MISSING = (
    "--method {method} needs llm-compressor, which wants other versions of transformers and "
    "compressed-tensors than vLLM. In an environment of its own, without vLLM: "
    "pip install '.[calibrated]' in this project's folder; then the same command there"
)


def require(method: str) -> None:
    """Raise if llm-compressor is not here, or cannot do this here.

    Raises:
        CheckpointError: says what to do.
    """
    try:
        import llmcompressor  # noqa: F401
        import torch
    except ImportError:
        raise CheckpointError(MISSING.format(method=method)) from None
    if method == "awq" and not torch.accelerator.is_available():
        raise CheckpointError(
            "--method awq: llm-compressor (0.14) does it only where there is a GPU or another "
            "accelerator, and there is none here. On CPUs: --method gptq"
        )


def modifier(recipe: Recipe, ignored: Sequence[str]) -> Any:
    """Return llm-compressor's recipe."""
    if recipe.method == "sparsegpt":
        from llmcompressor.modifiers.pruning import SparseGPTModifier

        return SparseGPTModifier(
            sparsity=0.5, mask_structure="2:4", targets=["Linear"], ignore=["lm_head", *ignored]
        )
    config = quantization_config(recipe, ignored)
    said = {"config_groups": config["config_groups"], "ignore": config["ignore"]}
    if recipe.method == "awq":
        from llmcompressor.modifiers.awq import AWQModifier

        return AWQModifier(**said)
    from llmcompressor.modifiers.quantization import GPTQModifier

    return GPTQModifier(**said)


def write(
    source: Path, recipe: Recipe, ignored: Sequence[str], rows: Sequence[Row], folder: Path
) -> None:
    """Write a whole checkpoint to `folder`.

    Args:
        source: the checkpoint that it is made of.
        ignored: names of linear layers that stay as they are.
        rows: token ids to look at.
    """
    from datasets import Dataset
    from llmcompressor import oneshot

    from .models import load_model, load_tokenizer

    _be_quiet()
    ids = [row.ids for row in rows]
    data = Dataset.from_dict({"input_ids": ids, "attention_mask": [[1] * len(one) for one in ids]})
    model, tokenizer = load_model(source), load_tokenizer(source)
    with writing(folder):
        oneshot(
            model=model,
            tokenizer=tokenizer,
            dataset=data,
            recipe=modifier(recipe, ignored),
            max_seq_length=WINDOW,
            num_calibration_samples=len(ids),
            output_dir=str(folder),
            # Zeros as they are: there are kernels for sparse files on few devices only.
            save_compressed=recipe.method != "sparsegpt",
        )


def _be_quiet() -> None:
    """Bars are enough: it logs two lines per matrix."""
    from loguru import logger

    logger.disable("llmcompressor")
