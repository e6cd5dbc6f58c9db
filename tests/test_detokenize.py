"""Incremental detokenizing: token for token what vLLM's own detokenizer yields."""

from __future__ import annotations

import json
import random
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

tokenizers = pytest.importorskip("tokenizers")
from tokenizers import AddedToken, Tokenizer, decoders, models  # noqa: E402

from scalellm_plugins.errors import ConfigError  # noqa: E402
from scalellm_plugins.frontends import detokenize, token_table  # noqa: E402
from scalellm_plugins.frontends.detokenize import Detokenizer, escape  # noqa: E402
from scalellm_plugins.frontends.token_table import ends_unfinished  # noqa: E402

DEMO_MODEL = Path(__file__).parents[1] / "examples" / "demo_model"

SPECIAL = ["<s>", "<|user said|>", "<|終|>", "é", "</s>"]
"""Special tokens. "é" is a letter of the byte-level alphabet: it decodes to half a character."""
ADDED = ["<tool>", " spaced out ", "naïve", '"quoted\\"\n', "\N{REPLACEMENT CHARACTER}", "ĠĠ"]
PIECES = ["h", " world", "wörld", "😀", "你好", '"', "\\", "\n\t", "\x7f", "\u2028", "\x00", "�"]
"""What the byte-level vocabulary has whole, beside every single byte."""
TORN = [
    b"\xf0\x9f",
    b"\x98\x80",
    b"\xe4\xbd",
    b"a\xe4",
    b"\xa0b",
    b"\xff\xfe",
    b"\xe4a",
    b"\xed\xa0",
]


def byte_level(decoder: decoders.Decoder | None = None, gap: int = 0) -> Tokenizer:
    """GPT-2's kind: all bytes, PIECES, TORN, added tokens; ids below `gap` are no tokens."""
    letters = {byte: chr(code) for code, byte in token_table._byte_of_character.items()}
    entries = [bytes([byte]) for byte in range(256)]
    entries += [piece.encode() for piece in PIECES if len(piece.encode()) > 1] + TORN
    vocab = {"".join(letters[b] for b in entry): id_ for id_, entry in enumerate(entries, gap)}
    tokenizer = Tokenizer(models.BPE(vocab, []))
    tokenizer.decoder = decoder or decoders.ByteLevel()
    return with_added(tokenizer)


def with_added(tokenizer: Tokenizer) -> Tokenizer:
    tokenizer.add_special_tokens([AddedToken(content, special=True) for content in SPECIAL])
    tokenizer.add_tokens([AddedToken(content, special=False) for content in ADDED])
    return tokenizer


def byte_fallback() -> Tokenizer:
    """Llama 2's kind: ▁ for spaces, "<0xE4>" for bytes that no token has."""
    words = ["▁hello", "▁", "llo", "▁world", "ö", "你", "�", "▁▁"]
    vocab = {word: id_ for id_, word in enumerate([f"<0x{b:02X}>" for b in range(256)] + words)}
    tokenizer = Tokenizer(models.BPE(vocab, [], byte_fallback=True))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)])
    return with_added(tokenizer)


def word_piece() -> Tokenizer:
    """BERT's kind: spaces between words, and none before punctuation (clean-up)."""
    words = ["[UNK]", "hello", "##llo", "world", ".", "n't", "'", "s", "##ö", "你"]
    tokenizer = Tokenizer(
        models.WordPiece({word: id_ for id_, word in enumerate(words)}, unk_token="[UNK]")
    )
    tokenizer.decoder = decoders.WordPiece(prefix="##", cleanup=True)
    return with_added(tokenizer)


def metaspace() -> Tokenizer:
    tokenizer = Tokenizer(models.Unigram([("▁hello", 0.0), ("▁", 0.0), ("ö", 0.0), ("lo", 0.0)]))
    tokenizer.decoder = decoders.Metaspace()
    return with_added(tokenizer)


MAKERS = {
    "demo model": lambda: Tokenizer.from_file(str(DEMO_MODEL / "tokenizer.json")),
    "byte-level": byte_level,
    "byte-level, in a sequence": lambda: byte_level(decoders.Sequence([decoders.ByteLevel()])),
    "byte-level, with holes": lambda: byte_level(gap=1000),
    "byte fallback": byte_fallback,
    "word piece": word_piece,
    "metaspace": metaspace,
}
TABLES = [name for name in MAKERS if name.startswith(("demo", "byte-level"))]


@cache
def tokenizer_of(name: str) -> Tokenizer:
    return MAKERS[name]()


@cache
def detokenizer_of(name: str) -> Detokenizer:
    return Detokenizer.build(tokenizer_of(name))


@cache
def difficult_ids(name: str) -> list[int]:
    """Return added tokens and those that leave a character unfinished."""
    tokenizer = tokenizer_of(name)
    size = tokenizer.get_vocab_size() + 1000
    torn = [id_ for id_ in range(size) if tokenizer.decode([id_]).endswith("�")]
    return sorted({*torn[:400], *tokenizer.get_added_tokens_decoder()})


@st.composite
def ids_of(draw: st.DrawFn, name: str, invalid: bool = True) -> list[int]:
    size = max(tokenizer_of(name).get_vocab().values()) + 1
    kinds = [st.integers(0, size - 1), st.sampled_from(difficult_ids(name)), st.just(size + 7)]
    if invalid:
        kinds.append(st.sampled_from([-1, -size, 2**32 - 1, 2**32, 2**70]))
    return draw(st.lists(st.one_of(kinds), max_size=24))


@st.composite
def requests(draw: st.DrawFn) -> tuple[str, list[int], list[int], dict[str, bool]]:
    name = draw(st.sampled_from(sorted(MAKERS)))
    options = {
        "skip_special_tokens": draw(st.booleans()),
        "spaces_between_special_tokens": draw(st.booleans()),
    }
    return name, draw(ids_of(name, invalid=False)), draw(ids_of(name)), options


def vllm_steps(
    tokenizer: Tokenizer, prompt: list[int], output: list[int], options: dict[str, bool]
) -> list[str]:
    """Return what vLLM's detokenizer yields for each token."""
    from vllm import SamplingParams
    from vllm.v1.engine.detokenizer import FastIncrementalDetokenizer

    request = SimpleNamespace(
        request_id="r", prompt_token_ids=prompt, sampling_params=SamplingParams(**options)
    )
    theirs = FastIncrementalDetokenizer(SimpleNamespace(_tokenizer=tokenizer), request)
    return [theirs.decode_next(token_id) for token_id in output]


def ids_in(name: str, *tokens: str) -> list[int]:
    ids = [tokenizer_of(name).token_to_id(token) for token in tokens]
    assert None not in ids
    return ids


@pytest.mark.vllm
@given(requests())
def test_equals_vllm_token_by_token(request_: tuple) -> None:
    name, prompt, output, options = request_
    expected = vllm_steps(tokenizer_of(name), prompt, output, options)
    ours = detokenizer_of(name)

    stream = ours.stream(prompt, **options)
    assert [stream.feed(token_id) for token_id in output] == expected
    stream = ours.stream(prompt, **options)
    assert [stream.feed_json(token_id) for token_id in output] == [escape(t) for t in expected]
    assert ours.text(prompt, output, **options) == "".join(expected)


@pytest.mark.vllm
@given(st.sampled_from(TABLES), st.text(max_size=40), st.data())
def test_text_cut_anywhere_equals_vllm(name: str, text: str, data: st.DataObject) -> None:
    """Real text, split into prompt and output between any two tokens, also within a character."""
    letters = {byte: chr(code) for code, byte in token_table._byte_of_character.items()}
    ids = ids_in(name, *(letters[byte] for byte in text.encode()))
    cut = data.draw(st.integers(0, len(ids)))
    options = {"skip_special_tokens": True, "spaces_between_special_tokens": True}
    expected = vllm_steps(tokenizer_of(name), ids[:cut], ids[cut:], options)
    stream = detokenizer_of(name).stream(ids[:cut])
    assert [stream.feed(token_id) for token_id in ids[cut:]] == expected
    if not cut and name == "demo model":  # the others have a letter as a special token
        assert "".join(expected) == text.rstrip("�")


@pytest.mark.vllm
def test_vllms_own_tokenizer_object_gets_a_table() -> None:
    from vllm.tokenizers import get_tokenizer

    tokenizer = get_tokenizer(str(DEMO_MODEL))
    detokenizer = Detokenizer.build(tokenizer)
    assert detokenizer.kind == "table"
    ids = tokenizer.encode("Grüße 😀", add_special_tokens=False)
    assert detokenizer.text([], ids) == "Grüße 😀"


@pytest.mark.parametrize("name", MAKERS)
def test_kind(name: str) -> None:
    """A byte-level tokenizer that silently loses its table costs 1.5 µs per token."""
    assert detokenizer_of(name).kind == ("table" if name in TABLES else "stream")
    assert detokenizer_of(name).why
    assert "\n" not in detokenizer_of(name).why


class Shouting:
    """A decoder written in Python."""

    def decode_chain(self, tokens: list[str]) -> list[str]:
        return [token.upper() for token in tokens]


@pytest.mark.parametrize(
    ("decoder", "why"),
    [
        (decoders.Sequence([decoders.ByteLevel(), decoders.Strip(" ", 1, 0)]), "ByteLevel+Strip"),
        (decoders.Sequence([]), "not ByteLevel alone"),
        (decoders.Decoder.custom(Shouting()), "a decoder of its own"),
    ],
)
def test_other_decoders_are_left_to_the_library(decoder: decoders.Decoder, why: str) -> None:
    detokenizer = Detokenizer.build(byte_level(decoder))
    assert detokenizer.kind == "stream"
    assert why in detokenizer.why


def test_no_decoder_and_far_apart_ids_are_left_to_the_library() -> None:
    tokenizer = Tokenizer(models.BPE({"a": 0, "b": 1}, []))
    assert Detokenizer.build(tokenizer).kind == "stream"
    assert Detokenizer.build(tokenizer).text([], [0, 1]) == "a b"

    sparse = Tokenizer(models.BPE({"a": 0, "b": 2**31}, []))
    sparse.decoder = decoders.ByteLevel()
    detokenizer = Detokenizer.build(sparse)  # a table would take 32 GB
    assert detokenizer.kind == "stream"
    assert "2,147,483,648" in detokenizer.why
    assert detokenizer.text([], [0, 2**31]) == "ab"


def test_refuses_tokenizers_that_vllm_decodes_otherwise() -> None:
    with pytest.raises(ConfigError, match=r"SimpleNamespace.*--tokenizer-mode"):
        Detokenizer.build(SimpleNamespace(_tokenizer=byte_level()))


def test_wrong_table_is_found_and_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """Were one entry wrong, every answer with that token would be."""
    right = token_table._bytes_of
    monkeypatch.setattr(token_table, "_bytes_of", lambda t: b"X" if t == "Ċĉ" else right(t))
    detokenizer = Detokenizer.build(byte_level())
    assert detokenizer.kind == "stream"
    assert "differs" in detokenizer.why
    newline_tab = ids_in("byte-level", "Ċĉ")
    assert detokenizer.text([], newline_tab) == "\n\t"


def test_wrong_holding_back_is_found_and_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second check, of streams: here a character goes out before it is complete."""
    monkeypatch.setattr(detokenize, "ends_unfinished", lambda data: False)
    detokenizer = Detokenizer.build(byte_level())
    assert detokenizer.kind == "stream"
    assert "after" in detokenizer.why


def test_prompt_that_ends_within_a_character() -> None:
    """DecodeStream then yields the prompt's text too: vLLM's behaviour, kept."""
    first, second = ids_in("byte-level", "ðŁ", "ĺĢ")
    (letter,) = ids_in("byte-level", "h")
    detokenizer = detokenizer_of("byte-level")
    assert detokenizer.stream([letter, first]).feed(second) == "h😀"
    assert detokenizer.text([letter, first], [second]) == "h😀"
    assert detokenizer.stream([letter, first, second]).feed(letter) == "h"
    # A special token behind the half does not complete it.
    (end,) = ids_in("byte-level", "</s>")
    assert detokenizer.stream([letter, first, end]).feed(second) == "h😀"


def test_ids_out_of_range_leave_no_trace() -> None:
    """-1 must not be the last token of the table, and a hole is not an error."""
    first, second = ids_in("byte-level", "ðŁ", "ĺĢ")
    size = max(tokenizer_of("byte-level").get_vocab().values()) + 1
    for name in ("byte-level", "metaspace"):
        stream = detokenizer_of(name).stream([])
        assert [stream.feed(id_) for id_ in (-1, size, 2**32)] == ["", "", ""]
        assert [stream.feed_json(id_) for id_ in (-1, size, 2**32)] == [b"", b"", b""]
    stream = detokenizer_of("byte-level").stream([])
    fed = [stream.feed_json(id_) for id_ in (first, -1, size, 2**32, second)]
    assert fed == [b"", b"", b"", b"", "😀".encode()]
    assert detokenizer_of("byte-level").text([], [first, -1, size, second, -size]) == "😀"
    assert detokenizer_of("byte-level").text([], [first, -1, second]) == "😀"


@pytest.mark.parametrize("name", ["byte-level", "metaspace"])
def test_only_ids_that_cannot_be_are_logged(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A hole in the vocabulary (a padded one has them) is no reason for a line per token."""
    logged: list[object] = []
    monkeypatch.setattr(token_table.logger, "error", lambda message, id_: logged.append(id_))
    stream = detokenizer_of(name).stream([])
    for token_id in (5, 10**6, -1, 2**32 - 1, 2**32):
        stream.feed(token_id)
    assert logged == [-1, 2**32]


def test_prompt_ids_that_are_none_raise_as_in_vllm() -> None:
    with pytest.raises(OverflowError):
        detokenizer_of("byte-level").stream([5, -1])


def test_library_stream_recovers_from_an_invalid_prefix() -> None:
    """Byte fallback decodes "A" again as U+FFFD once an invalid byte follows: the stream resets."""
    a, invalid, word = ids_in("byte fallback", "<0x41>", "<0xFF>", "llo")
    stream = detokenizer_of("byte fallback").stream([])
    assert [stream.feed(id_) for id_ in (a, invalid, word, a)] == ["A", "", "llo", "A"]


@given(st.integers(1, 6).flatmap(lambda n: st.binary(min_size=n, max_size=n)), st.binary())
@example(b"\xef\xbf\xbd", b"")
@example(b"\xf4\x90\x80\x80", b"")
@example(b"\x80\x80\x80\x80", b"\xf0")
def test_last_bytes_tell_whether_text_is_unfinished(tail: bytes, before: bytes) -> None:
    whole = before + tail
    assert ends_unfinished(whole) == whole.decode("utf-8", "replace").endswith("�")


def test_rust_and_python_read_broken_utf8_alike() -> None:
    """The table reads bytes as UTF-8 with Python's codec, the library with Rust's."""
    letters = {byte: chr(code) for code, byte in token_table._byte_of_character.items()}
    rng = random.Random(5)
    edges = [0x00, 0x41, 0x7F, 0x80, 0x8F, 0x90, 0x9F, 0xA0, 0xBF, 0xC0, 0xC1, 0xC2, 0xDF, 0xE0]
    edges += [0xE1, 0xEC, 0xED, 0xEE, 0xEF, 0xF0, 0xF1, 0xF3, 0xF4, 0xF5, 0xF8, 0xFF]
    tokenizer = tokenizer_of("byte-level")
    for _ in range(3000):
        data = bytes(rng.choices(edges, k=12))
        ids = ids_in("byte-level", *(letters[byte] for byte in data))
        assert tokenizer.decode(ids) == data.decode("utf-8", "replace")


@given(st.text())
@example('"\\/\b\f\n\r\t\x00\x1f\x7f\u2028\ufffd😀')
def test_escape(text: str) -> None:
    escaped = escape(text)
    assert json.loads(b'"' + escaped + b'"') == text
    plain = json.dumps(text, ensure_ascii=False)[1:-1]
    assert escaped == plain.encode()


def test_escape_writes_the_bytes_that_vllm_writes() -> None:
    pydantic_core = pytest.importorskip("pydantic_core")
    text = "".join(map(chr, (*range(0x3000), 0xFFFD, 0xFFFF, 0x1F600, 0x10FFFF)))
    assert b'"' + escape(text) + b'"' == pydantic_core.to_json(text)


def test_streams_do_not_share_state() -> None:
    first, second = ids_in("byte-level", "ðŁ", "ĺĢ")
    (h,) = ids_in("byte-level", "h")
    detokenizer = detokenizer_of("byte-level")
    one, other = detokenizer.stream([]), detokenizer.stream([])
    assert one.feed_json(first) == b""
    assert other.feed_json(h) == b"h"
    assert one.feed_json(second) == "😀".encode()


@given(st.sampled_from(TABLES), st.integers(0, 2**32))
def test_right_table_passes_its_own_check(name: str, seed: int) -> None:
    """Whatever streams are drawn: a check that refuses a right table takes the speed away."""
    tokenizer = tokenizer_of(name)
    table = token_table.TokenTable(tokenizer, max(tokenizer.get_vocab().values()) + 1)
    assert detokenize._difference(table, tokenizer, seed) is None
