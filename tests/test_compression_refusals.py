"""`scalellm compress`: what it refuses, and in which words."""

from __future__ import annotations

import io
import json
import logging
import sys
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from safetensors.torch import load_file, save_file  # noqa: E402

from scalellm_plugins.compression import families  # noqa: E402
from scalellm_plugins.compression.calibration import load  # noqa: E402
from scalellm_plugins.compression.models import load_model  # noqa: E402
from scalellm_plugins.errors import CheckpointError  # noqa: E402

from .compression_parts import (  # noqa: E402
    DEMO,
    compress,
    copy_of_demo,
    refusal,
    tiny,
    write_text,
)


def change(folder: Path, gone: str = "", **added: Any) -> Path:
    """Rewrite a checkpoint's only shard."""
    tensors = {k: v for k, v in load_file(folder / "model.safetensors").items() if k != gone}
    save_file(tensors | added, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize(
    "name",
    ["model.embed_tokens.weight", "model.norm.weight", "model.layers.2.input_layernorm.weight"],
)
def test_what_a_server_would_make_up_is_missed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    source = change(copy_of_demo(tmp_path / "model"), gone=name)
    said = refusal(capsys, source, tmp_path / "out", "--scheme", "int4")
    assert f"lacks {name}, which its config promises" in said


@pytest.mark.parametrize("kind", sorted(families.FAMILIES))
@pytest.mark.parametrize("extra", [True, False])
def test_what_a_config_promises_is_what_transformers_expects(kind: str, extra: bool) -> None:
    """Fails where an architecture has other norms or biases, or ties by default."""
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 64}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "pad_token_id": 0}
    flags = {"attention_bias": True, "mlp_bias": True} if extra else {}
    config = transformers.AutoConfig.for_model(kind, **sizes, **heads, **flags)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    expected = set(model.state_dict())
    if config.tie_word_embeddings:
        expected.remove("lm_head.weight")
    written = sizes | flags if kind != "smollm3" else sizes | flags | {"model_type": kind}
    assert set(families.FAMILIES[kind].promised(written)) == expected


def test_nothing_is_measured_on_random_weights(tmp_path: Path) -> None:
    """As transformers has it, it would fill in what is missing, and leave out what it never met."""
    source = change(copy_of_demo(tmp_path / "model"), gone="model.norm.weight")
    with pytest.raises(CheckpointError, match=r"with missing keys, .*model\.norm\.weight"):
        load_model(source)
    change(source, **{"model.norm.weight": torch.ones(256), "model.layers.0.new": torch.ones(1)})
    with pytest.raises(CheckpointError, match=r"with unexpected keys, .*model\.layers\.0\.new"):
        load_model(source)


def test_widths_that_vllm_has_no_kernel_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    odd, out = tiny(tmp_path / "odd", "llama", hidden_size=336), tmp_path / "out"
    for size in ("32", "channel"):
        said = refusal(capsys, odd, out, "--scheme", "int4", "--group-size", size)
        assert "336 outputs" in said
        assert "needs multiples of 32 in vLLM. Take --scheme w8a8, or --ignore '*.mlp" in said
    assert compress(odd, out, "--scheme", "w8a8") == 0
    narrow = tiny(tmp_path / "narrow", "llama", intermediate_size=288)
    said = refusal(capsys, narrow, tmp_path / "int4", "--scheme", "int4")
    assert "groups of 128. Take --group-size 32, or --ignore '*.mlp.down_proj'" in said
    assert compress(narrow, tmp_path / "int4", "--scheme", "int4", "--group-size", 32) == 0
    assert "int4`, on GPUs and CPUs" in capsys.readouterr().out
    assert compress(narrow, tmp_path / "int8", "--scheme", "int8", "--group-size", "channel") == 0
    assert "int8`, on GPUs; on CPUs with --plugins scalellm" in capsys.readouterr().out


def test_a_locale_without_the_letters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, "ascii", write_through=True))
    assert compress(DEMO, tmp_path / "out", "--scheme", "int4") == 0
    print("/tmp/\udcc3\udcbc")  # a file name's bytes
    with pytest.raises(SystemExit):
        compress("--help")
    assert b"x 0.37" in written.getvalue()
    assert b"/tmp/\xc3\xbc\n" in written.getvalue()
    assert b'{"messages": [...]}' in written.getvalue()


def test_null_is_no_quantization(tmp_path: Path) -> None:
    source = copy_of_demo(tmp_path / "model")
    config = json.loads((source / "config.json").read_text()) | {"quantization_config": None}
    (source / "config.json").write_text(
        json.dumps(config | {"about": "größer"}, ensure_ascii=False)
    )
    text = write_text(tmp_path / "text.jsonl")
    options = ("--drop-layers", 1, "--calibration", text, "--calibration-tokens", 200)
    assert compress(source, tmp_path / "out", *options) == 0
    assert json.loads((tmp_path / "out" / "compression.json").read_text())["quality"]


def test_without_a_tokenizer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, text = copy_of_demo(tmp_path / "model"), write_text(tmp_path / "text.jsonl")
    for path in source.glob("tokenizer*"):
        path.unlink()
    options = ("--scheme", "int4", "--calibration", text)
    said = refusal(capsys, source, tmp_path / "out", *options)
    assert "--calibration needs the tokenizer of" in said
    assert said.count("\n") == 1
    assert not list(tmp_path.glob("out*"))


GOOD = '{"text": "What is the capital of France?"}\n'


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (GOOD, r"5 tokens in 1 rows are too few|tokens in 1 rows are too few"),
        (
            GOOD + '\n{"txet": "a"}\n',
            r"line 3: no 'messages' and no 'text' in {\"txet\": \"a\"}\. Each",
        ),
        ('["a", "b"]\n', r'line 1: \["a", "b"\] is no object'),
        ('{"text": 3}\n', "line 1: 'text' is 3, no string"),
        ('{"messages": "a"}\n', "'messages' is \"a\", no list of messages"),
        ('{"messages": [{"content": "a"}]}\n', "is no message with a 'role'"),
        ("{'text': 'a'}\n", "line 1: this is no JSON"),
    ],
)
def test_text_that_cannot_be_read_leaves_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, said: str
) -> None:
    path = tmp_path / "text.jsonl"
    path.write_text(text)
    with pytest.raises(AssertionError, match=said):
        raise AssertionError(
            refusal(capsys, DEMO, tmp_path / "out", "--drop-layers", 1, "--calibration", path)
        )
    assert not list(tmp_path.glob("out*"))


def test_lines_end_where_json_lines_do_and_nobody_is_warned(tmp_path: Path) -> None:
    path, said = tmp_path / "text.jsonl", io.StringIO()
    path.write_text(json.dumps({"text": "one\u2028two\x85" * 50}, ensure_ascii=False) + "\n")
    path.write_text(path.read_text() * 12)
    tokenizer = transformers.AutoTokenizer.from_pretrained(DEMO)
    tokenizer.model_max_length = 16
    handler = logging.StreamHandler(said)
    logging.getLogger("transformers").addHandler(handler)
    try:
        assert len(load(path, tokenizer, 100_000).held_out) >= 2
    finally:
        logging.getLogger("transformers").removeHandler(handler)
    assert not said.getvalue()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--drop-layers 5", "--drop-layers 5: the model has 5 layers, .* at most 4"),
        ("--prune-ffn 0.01", r"512 of .* 512 .* from 0\.125 \(keeps 448\) to 0\.875 \(keeps 64\)"),
        ("--prune-ffn 0.99", r"0 of this model's 512 channels would stay, in steps of 64; from"),
        ("--prune-ffn 0.5 --calibration-tokens 0", "--calibration-tokens 0: a number"),
        ("--drop-layers 1 --calibration-tokens -5", "--calibration-tokens -5: a number"),
        ("--drop-layers 1 --group-size 64", "--group-size 64: without --scheme"),
        ("--drop-layers 1 --group-size channel", "--group-size channel: without --scheme"),
        ("--scheme w8a8 --group-size 64", "--group-size 64: --scheme w8a8 is always by channel"),
        ("--scheme int4 --ignore *", "--ignore '.*' leaves nothing for --scheme int4"),
    ],
)
def test_options_are_refused_with_what_would_do(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: str, said: str
) -> None:
    text = write_text(tmp_path / "text.jsonl")
    command = (DEMO, tmp_path / "out", *options.split(), "--calibration", text)
    with pytest.raises(AssertionError, match=said):
        raise AssertionError(refusal(capsys, *command))
    assert not list(tmp_path.glob("out*"))
