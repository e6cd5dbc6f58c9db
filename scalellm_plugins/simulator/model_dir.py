"""A model directory without weights: a preset's shape and any tokenizer, to be served simulated.

    python -m scalellm_plugins.simulator.model_dir 8b TOKENIZER_DIR OUT_DIR

vLLM takes the architecture, the tokenizer and the longest context from here; the timeline comes
from `scalellm.sim`. A real server could not load it.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

from scalellm_plugins.errors import ConfigError

from .roofline import Model, model_preset

MAX_POSITIONS = 131072
"""Longest context, tokens: Llama 3.1's."""

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "generation_config.json",
)


def make_model_dir(model_preset_name: str, tokenizer_dir: str | Path, out_dir: str | Path) -> Path:
    """Write `out_dir` and return it: `config.json` of a Llama with the preset's shape and the
    tokenizer's vocabulary, and copies of the tokenizer's files. Existing files are replaced.

    Raises:
        ConfigError: an unknown preset, or `tokenizer_dir` holds no `tokenizer.json`.
    """
    model = model_preset(model_preset_name)
    source, out = Path(tokenizer_dir), Path(out_dir)
    if not (source / "tokenizer.json").is_file():
        raise ConfigError(f"tokenizer_dir: {str(source)!r} holds no tokenizer.json")
    out.mkdir(parents=True, exist_ok=True)
    for name in _TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, out / name)
    config = _config(model, source)
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return out


def shape_of(model: Model, vocabulary: int | None = None) -> dict[str, Any]:
    """Return the `config.json` of a Llama with a preset's shape; `vocabulary`: ids, if not its."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "num_hidden_layers": model.layers,
        "hidden_size": model.hidden,
        "num_attention_heads": model.heads,
        "num_key_value_heads": model.kv_heads,
        "head_dim": model.head_dim,
        "intermediate_size": model.intermediate,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "max_position_embeddings": MAX_POSITIONS,
        "tie_word_embeddings": model.tied_embeddings,
        "vocab_size": vocabulary or model.vocab,
    }


def _config(model: Model, source: Path) -> dict[str, Any]:
    config = shape_of(model, vocab_size(source))
    beside = source / "config.json"
    if beside.is_file():
        served = json.loads(beside.read_text(encoding="utf-8"))
        special = ("bos_token_id", "eos_token_id", "pad_token_id")
        config.update({key: served[key] for key in special if served.get(key) is not None})
    return config


def vocab_size(tokenizer_dir: Path) -> int:
    """One more than the largest id in `tokenizer.json`, added tokens included."""
    parsed = json.loads((tokenizer_dir / "tokenizer.json").read_text(encoding="utf-8"))
    vocabulary = parsed["model"]["vocab"]
    largest = len(vocabulary) - 1 if isinstance(vocabulary, list) else max(vocabulary.values())
    added = [token["id"] for token in parsed.get("added_tokens", ())]
    return int(max([largest, *added])) + 1


def main() -> None:
    """The command line above."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("model_preset", help="shape: a name that scalellm.sim.model takes")
    parser.add_argument("tokenizer_dir", type=Path)
    parser.add_argument("out_dir", type=Path)
    args = parser.parse_args()
    print(make_model_dir(args.model_preset, args.tokenizer_dir, args.out_dir))


if __name__ == "__main__":
    main()
