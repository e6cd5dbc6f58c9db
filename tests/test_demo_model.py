"""The committed demo model: small, loadable, with a lossless tokenizer, and right."""

from __future__ import annotations

import importlib.util
import json
import sys
from itertools import islice
from pathlib import Path
from types import ModuleType

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
MODEL = EXAMPLES / "demo_model"
MAX_BYTES = 12_000_000


def load_example(name: str) -> ModuleType:
    """Import a script of `examples/` by its path."""
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


demo_text = load_example("demo_text")
evaluate = load_example("evaluate_demo_model")
train = load_example("train_demo_model")

TOKENIZER = transformers.AutoTokenizer.from_pretrained(MODEL)


def ids_of(text: str) -> list[int]:
    return TOKENIZER.encode(text, add_special_tokens=False)


def rendered(messages: list[dict[str, str]], prompt: bool = False) -> str:
    return TOKENIZER.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)


def test_the_weights_are_small_enough_for_the_repository():
    assert sum(f.stat().st_size for f in MODEL.glob("*.safetensors")) <= MAX_BYTES
    assert not list(MODEL.glob("*.bin"))


def test_the_checkpoint_is_an_ordinary_bf16_llama():
    import torch

    config = json.loads((MODEL / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["dtype"] == "bfloat16"
    # Groups of 128 weights are quantized together; vLLM's attention wants such a head size.
    assert config["hidden_size"] % 128 == config["intermediate_size"] % 128 == 0
    assert config["head_dim"] in (32, 64, 128)
    model = transformers.AutoModelForCausalLM.from_pretrained(MODEL, dtype="auto")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_generation_ends_at_the_end_of_a_message():
    generation = json.loads((MODEL / "generation_config.json").read_text())
    assert generation["eos_token_id"] == TOKENIZER.eos_token_id
    assert TOKENIZER.eos_token == train.END
    assert TOKENIZER.pad_token_id != TOKENIZER.eos_token_id


@settings(max_examples=300, deadline=None)
@given(st.text())
def test_the_tokenizer_loses_nothing(text):
    assert TOKENIZER.decode(ids_of(text), clean_up_tokenization_spaces=False) == text


@settings(max_examples=100, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from(["system", "user", "assistant"]), st.text(max_size=40)),
        min_size=1,
        max_size=6,
    )
)
def test_a_conversation_is_the_tokens_of_its_messages_in_a_row(turns):
    messages = [{"role": role, "content": content} for role, content in turns]
    parts = [ids_of(train.BEGIN)]
    for message in messages:
        parts.append(ids_of(rendered([message]).removeprefix(train.BEGIN)))
    assert ids_of(rendered(messages)) == [token for part in parts for token in part]


def test_training_writes_conversations_as_the_chat_template_does():
    chats = list(islice(demo_text.training_conversations(seed=9), 200))
    encoded = train.Encoder(TOKENIZER).encode(chats)
    for chat, (tokens, labels) in zip(chats, encoded, strict=True):
        assert tokens == ids_of(rendered(chat))
        learned = [label for label in labels if label != train.IGNORE]
        answers = [m["content"] + train.END for m in chat if m["role"] == "assistant"]
        assert TOKENIZER.decode(learned, clean_up_tokenization_spaces=False) == "".join(answers)


def test_each_digit_is_a_token():
    assert len(ids_of("1234567890")) == 10


def test_the_template_refuses_an_unknown_role():
    with pytest.raises(Exception, match="roles system, user and assistant"):
        rendered([{"role": "tool", "content": "x"}])


def test_packed_rows_learn_only_answers_and_restart_positions():
    source = train.batches(train.Encoder(TOKENIZER), seed=4)
    widths = set()
    for batch in islice(source, train.LONG_EVERY):
        widths.add(batch.tokens.shape[1])
        starts = batch.tokens == TOKENIZER.bos_token_id
        assert starts[:, 0].all()
        assert ((batch.positions == 0) == starts).all()
        assert (batch.labels[starts] == train.IGNORE).all()
        learned = batch.labels != train.IGNORE
        assert (batch.labels[learned] == batch.tokens[learned]).all()
    assert widths == {train.ROW, train.LONG_ROW}


def test_answers_to_held_out_questions_are_right():
    examples = evaluate.select(limit=5 * len(demo_text.CATEGORIES))
    assert {e.category for e in examples} == set(demo_text.CATEGORIES)
    result = evaluate.score(examples, evaluate.ask_transformers(examples, MODEL))
    assert result["exact_match"] >= 0.95, result["wrong"]


def test_evaluation_fails_below_the_wanted_score(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(evaluate, "ask_transformers", lambda examples, _: ["?"] * len(examples))
    report = tmp_path / "report.json"
    arguments = ["--limit", "19", "--min-exact-match", "0.95", "--json", str(report)]
    assert evaluate.main(arguments) == 1
    assert "below the wanted 95.0%" in capsys.readouterr().err
    assert json.loads(report.read_text())["exact_match"] == 0.0


def test_evaluation_says_when_there_is_no_checkpoint(capsys, tmp_path):
    assert evaluate.main(["--limit", "1", "--model", str(tmp_path)]) == 2
    assert "config.json is missing" in capsys.readouterr().err


def test_evaluation_says_when_there_is_no_server(capsys):
    assert evaluate.main(["--limit", "1", "--url", "http://127.0.0.1:9"]) == 2
    assert "cannot ask http://127.0.0.1:9" in capsys.readouterr().err
