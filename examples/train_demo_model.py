"""Train the demo model from scratch: a small Llama with its own tokenizer, on two CPU cores.

The text comes from `demo_text.py`; the result is an ordinary Hugging Face checkpoint (config,
bf16 safetensors, byte-level BPE tokenizer, chat template) that vLLM or transformers can load:

    python examples/train_demo_model.py --out examples/demo_model

The learning rate follows the share of the budget that is used up: of the minutes, or with
`--steps` of a fixed number of steps, which makes a run repeatable on the same machine.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.nn import functional
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

sys.path.insert(0, str(Path(__file__).resolve().parent))

import demo_text

PAD, BEGIN, END = "<|pad|>", "<|begin|>", "<|end|>"
TOKEN_KINDS = ("bos", "eos", "pad")
SPECIAL_TOKENS = [PAD, BEGIN, END, "<|system|>", "<|user|>", "<|assistant|>"]
CHAT_TEMPLATE = (
    "<|begin|>"
    "{%- for message in messages %}"
    "{%- if message['role'] not in ['system', 'user', 'assistant'] %}"
    "{{- raise_exception('The demo model knows the roles system, user and assistant only.') }}"
    "{%- endif %}"
    "{{- '<|' + message['role'] + '|>' + message['content'] | trim + '<|end|>' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|assistant|>' }}{%- endif %}"
)
VOCABULARY = 2048  # tokens; all 256 bytes are among them, so any text can be written
STEP_TOKENS = 2048  # tokens of one step, in packed rows
ROW = 128  # tokens of most packed rows: attention is dear on a CPU
LONG_ROW = 512  # tokens of the rows of every LONG_EVERY-th step, for long conversations
LONG_EVERY = 6
TOKENIZER_SAMPLE = 30_000  # conversations the tokenizer learns its merges from
WARM_UP = 0.03  # share of the budget in which the learning rate rises
IGNORE = -100  # label of a token that is not learned
MAX_BYTES = 12_000_000  # the weights live in the repository


def build_tokenizer(seed: int) -> PreTrainedTokenizerFast:
    """Train the byte-level BPE tokenizer; each digit is a token, so sums look alike at any size."""
    tokenizer = Tokenizer(models.BPE())
    # Signs stand alone too: "3+4" and "3 + 4" then share their tokens but for the spaces.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.Split(Regex(r"[-+*/=]"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    conversations = islice(demo_text.training_conversations(seed), TOKENIZER_SAMPLE)
    tokenizer.train_from_iterator(
        (message["content"] for messages in conversations for message in messages), trainer
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BEGIN,
        eos_token=END,
        pad_token=PAD,
        clean_up_tokenization_spaces=False,
        model_max_length=4096,
        chat_template=CHAT_TEMPLATE,
    )


def build_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Make the untrained model; every matrix dimension is a multiple of 128."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.convert_tokens_to_ids(BEGIN),
        eos_token_id=tokenizer.convert_tokens_to_ids(END),
        pad_token_id=tokenizer.convert_tokens_to_ids(PAD),
        initializer_range=0.03,
    )
    return LlamaForCausalLM(config)


@dataclass
class Batch:
    """Packed rows: all tensors have the shape (rows, tokens); `document` numbers conversations."""

    tokens: Tensor
    labels: Tensor
    positions: Tensor
    document: Tensor

    def mask(self) -> Tensor:
        """Return the attention mask: earlier tokens of the same conversation only."""
        same = self.document[:, None, :, None] == self.document[:, None, None, :]
        width = self.tokens.shape[1]
        return same & torch.ones(width, width, dtype=torch.bool).tril()


class Encoder:
    """Turns conversations into token ids and into labels for what the assistant says."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.backend = tokenizer.backend_tokenizer
        self.ids = {t: tokenizer.convert_tokens_to_ids(t) for t in SPECIAL_TOKENS}

    def encode(self, chats: list[list[demo_text.Message]]) -> list[tuple[list[int], list[int]]]:
        """Return (tokens, labels) of each conversation, written as the chat template writes it."""
        texts = [message["content"] for chat in chats for message in chat]
        encoded = iter(self.backend.encode_batch_fast(texts, add_special_tokens=False))
        result = []
        for chat in chats:
            tokens, labels = [self.ids[BEGIN]], [IGNORE]
            for message in chat:
                body = [*next(encoded).ids, self.ids[END]]
                tokens += [self.ids[f"<|{message['role']}|>"], *body]
                learned = message["role"] == "assistant"
                labels += [IGNORE, *(body if learned else [IGNORE] * len(body))]
            result.append((tokens, labels))
        return result


def batches(encoder: Encoder, seed: int) -> Iterator[Batch]:
    """Yield packed batches without end; a conversation that overflows its row is cut."""
    source = demo_text.training_conversations(seed)
    pending: list[tuple[list[int], list[int]]] = []

    def packed_row(width: int) -> list[list[int]]:
        columns: tuple[list[int], ...] = ([], [], [], [])
        number = 0
        while len(columns[0]) < width:
            if not pending:
                pending.extend(encoder.encode(list(islice(source, 512))))
            tokens, labels = pending.pop()
            new = (tokens, labels, list(range(len(tokens))), [number] * len(tokens))
            for column, values in zip(columns, new, strict=True):
                column.extend(values)
            number += 1
        return [column[:width] for column in columns]

    for step in count(1):
        width = LONG_ROW if step % LONG_EVERY == 0 else ROW
        rows = [packed_row(width) for _ in range(STEP_TOKENS // width)]
        yield Batch(*torch.tensor(rows).unbind(dim=1))


def loss_of(model: LlamaForCausalLM, batch: Batch) -> Tensor:
    """Return the mean cross entropy (nats per token) of the assistant's tokens."""
    hidden = model.model(
        input_ids=batch.tokens, attention_mask=batch.mask(), position_ids=batch.positions
    ).last_hidden_state[:, :-1]
    labels = batch.labels[:, 1:]
    # The vocabulary projection is only paid for tokens that are learned.
    learned = labels != IGNORE
    logits = model.lm_head(hidden[learned])
    return functional.cross_entropy(logits.float(), labels[learned])


def build_optimizers(model: LlamaForCausalLM, learning_rate: float) -> list[torch.optim.Optimizer]:
    """Make Muon for the matrices of the layers and AdamW for the embedding and the norms.

    With so few steps Muon pays off: measured here, it reached in 100 steps about the loss that
    AdamW alone reached in 200. With `match_rms_adamw` both take steps of like size.
    """
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    chosen = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in chosen]
    return [
        torch.optim.Muon(
            matrices, lr=learning_rate, weight_decay=0.2, adjust_lr_fn="match_rms_adamw"
        ),
        torch.optim.AdamW(
            others, lr=0.6 * learning_rate, betas=(0.9, 0.98), weight_decay=0.0, fused=True
        ),
    ]


def schedule(progress: float) -> float:
    """Return the factor of the learning rate at a share of the budget: rise, then cosine fall."""
    if progress < WARM_UP:
        return max(progress / WARM_UP, 0.02)
    share = min((progress - WARM_UP) / (1.0 - WARM_UP), 1.0)
    return 0.01 + 0.99 * 0.5 * (1.0 + math.cos(math.pi * share))


def train(
    model: LlamaForCausalLM,
    source: Iterator[Batch],
    progress_of: Callable[[int, float], float],
    learning_rate: float,
) -> tuple[int, float]:
    """Train until `progress_of(steps, seconds)` reaches 1; return the steps and seconds taken."""
    optimizers = build_optimizers(model, learning_rate)
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    peaks = [group["lr"] for group in groups]
    model.train()
    start = time.monotonic()
    step, mean_loss = 0, 0.0
    while (progress := progress_of(step, time.monotonic() - start)) < 1.0:
        for group, peak in zip(groups, peaks, strict=True):
            group["lr"] = peak * schedule(progress)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = loss_of(model, next(source))
        model.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        step += 1
        mean_loss = loss.item() if step == 1 else 0.95 * mean_loss + 0.05 * loss.item()
        if step % 50 == 0 or step == 1:
            seconds = time.monotonic() - start
            left = seconds * (1.0 / max(progress_of(step, seconds), 1e-6) - 1.0)
            rate = step * STEP_TOKENS / seconds
            print(
                f"step {step:5d}  loss {mean_loss:.4f}  {rate:6.0f} tokens/s"
                f"  elapsed {seconds / 60:5.1f} min  left {max(left, 0.0) / 60:5.1f} min",
                flush=True,
            )
    return step, time.monotonic() - start


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> int:
    """Write the checkpoint in bf16; return the bytes of the weights. Raises ValueError if big."""
    model.to(torch.bfloat16).eval()
    model.config.dtype = torch.bfloat16
    ids = {f"{kind}_token_id": getattr(model.config, f"{kind}_token_id") for kind in TOKEN_KINDS}
    # Servers sample at temperature 1 unless told otherwise: too much for a model of this size.
    model.generation_config = GenerationConfig(do_sample=True, temperature=0.1, **ids)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    # The name that every release of transformers knows for a tokenizer that is all in its JSON.
    path = out / "tokenizer_config.json"
    settings = json.loads(path.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    path.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")
    (out / "model.safetensors").chmod(0o644)  # safetensors writes for the owner only
    size = (out / "model.safetensors").stat().st_size
    if size > MAX_BYTES:
        raise ValueError(f"the weights take {size} bytes, more than the {MAX_BYTES} allowed")
    return size


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description="Train the demo model from scratch on generated text and save it."
    )
    parser.add_argument("--minutes", type=float, default=17.0, help="time budget (default 17)")
    parser.add_argument("--steps", type=int, help="fixed number of steps instead of --minutes")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "demo_model")
    parser.add_argument("--seed", type=int, default=1, help="seed of text and weights (default 1)")
    parser.add_argument("--threads", type=int, help="CPU threads (default: PyTorch's choice)")
    parser.add_argument("--learning-rate", type=float, default=5e-3, help="peak (default 5e-3)")
    args = parser.parse_args()
    if args.minutes <= 0 or (args.steps is not None and args.steps <= 0):
        parser.error("--minutes and --steps must be above zero")
    if args.out.exists() and not args.out.is_dir():
        parser.error(f"--out {args.out} is a file; name a directory")
    return args


def main() -> None:
    """Train and save."""
    args = parse_arguments()
    if args.threads:
        torch.set_num_threads(args.threads)
    transformers_logging.disable_progress_bar()
    torch.manual_seed(args.seed)
    args.out.mkdir(parents=True, exist_ok=True)  # fail now, not after the training
    tokenizer = build_tokenizer(args.seed)
    model = build_model(tokenizer)
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{parameters / 1e6:.2f} million parameters, {torch.get_num_threads()} threads")

    def progress_of(step: int, seconds: float) -> float:
        return step / args.steps if args.steps else seconds / (args.minutes * 60.0)

    source = batches(Encoder(tokenizer), args.seed + 1)
    steps, seconds = train(model, source, progress_of, args.learning_rate)
    size = save(model, tokenizer, args.out)
    summary = {"parameters": parameters, "steps": steps, "minutes": round(seconds / 60, 1),
               "bytes": size}  # fmt: skip
    print(f"saved {args.out}: {json.dumps(summary)}")
    print("Judge it with: python examples/evaluate_demo_model.py --model", args.out)


if __name__ == "__main__":
    main()
