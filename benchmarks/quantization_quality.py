"""What rounding does to a model's words: KL divergence of its next-token distributions from bf16's.

    python -m scalellm_plugins.benchmarks.quantization_quality [--model DIR] [--text FILE]

The model runs in transformers, its linear layers replaced by the kernels that serve it in vLLM, by
the same rules. Without a text: held-out questions and answers of the demo model.

Per method: the mean KL divergence in nats and its 99th percentile, the share of positions with the
same most likely token, perplexity, and the weights' relative error. For the demo model also how
many of the held-out questions bf16, int8 and int4 answer right, all three in transformers.
"""

from __future__ import annotations

import argparse
import json
import math
import runpy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from scalellm_plugins.config import QuantizationConfig
from scalellm_plugins.kernels import reference, registry
from scalellm_plugins.quantization import asked, rules, weights

_EXAMPLES = Path(__file__).parents[1] / "examples"
CASES: dict[str, tuple[asked.Method, QuantizationConfig]] = {
    "int8": ("scalellm_int8", QuantizationConfig()),
    "int4": ("scalellm_int4", QuantizationConfig()),
    "int4, no search": ("scalellm_int4", QuantizationConfig(search="none")),
    "int4, symmetric": ("scalellm_int4", QuantizationConfig(zero_point="symmetric")),
    "int4, groups of 64": ("scalellm_int4", QuantizationConfig(group_size=64)),
    "int4, groups of 32": ("scalellm_int4", QuantizationConfig(group_size=32)),
}
ANSWERING = ("bf16", "int8", "int4")
"""What answers the questions, too."""


def main() -> None:
    """Measure, print a table, write JSON if asked for."""
    parser = argparse.ArgumentParser(
        prog="quantization_quality", description="KL divergence of quantized models from bf16's."
    )
    parser.add_argument("--model", type=Path, default=_EXAMPLES / "demo_model")
    parser.add_argument("--text", type=Path, help="a file; default: the demo model's questions")
    parser.add_argument("--chunk", type=int, default=512, help="tokens that are read at once")
    parser.add_argument("--most", type=int, default=32, help="chunks")
    parser.add_argument("--questions", type=int, default=760, help="of the demo model; 0: none")
    parser.add_argument("--output", type=Path, help="write the results there, as JSON")
    options = parser.parse_args()
    registry.load_vllm_ops()
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    ids = tokenizer(_text(options.text, tokenizer), add_special_tokens=False)["input_ids"]
    chunks = [ids[i : i + options.chunk] for i in range(0, len(ids), options.chunk)][: options.most]
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.bfloat16).eval()
    base = [_logits(model, chunk) for chunk in chunks]
    asks = options.text is None and options.questions > 0
    judge = _judge(tokenizer, options.questions) if asks else None
    results: dict[str, dict[str, float]] = {"bf16": _compare(base, base, chunks)}
    if judge:
        results["bf16"] |= judge(model)
    for name, (method, settings) in CASES.items():
        model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.bfloat16).eval()
        error = quantize(model, method, settings)
        found = [_logits(model, chunk) for chunk in chunks]
        results[name] = _compare(base, found, chunks) | {"weight_error": error}
        if judge and name in ANSWERING:
            results[name] |= judge(model)
    print("| weights | KL mean | KL p99 | same first | perplexity | weight error | right |")
    print("|---|---|---|---|---|---|---|")
    for name, row in results.items():
        right = f"{row['right']} of {row['questions']}" if "right" in row else ""
        print(
            f"| {name} | {row['kl_mean']:.5f} | {row['kl_p99']:.4f} | {row['same_first']:.2%} "
            f"| {row['perplexity']:.4f} | {row.get('weight_error', 0):.2%} | {right} |"
        )
    if options.output:
        command = f"quantization_quality --chunk {options.chunk} --most {options.most}"
        command += f" --questions {options.questions}"
        record = {"command": command, "tokens": sum(map(len, chunks)), "results": results}
        options.output.write_text(json.dumps(record, indent=1) + "\n")


def quantize(model: Any, method: asked.Method, options: QuantizationConfig) -> float:
    """Replace a transformers model's linear layers; return the relative error of their weights."""
    square, total = 0.0, 0.0
    for name, layer in list(_linear_layers(model)):
        weight = layer.weight.data
        plan = rules.plan(method, options, [name], *weight.shape)
        if plan.bits == 16:
            continue
        kernel: registry.Kernel
        if plan.bits == 8:
            eight = weights.to_int8(weight)
            kernel = registry.int8(eight.q, eight.scales, weight.dtype)
            rounded = reference.int8_weight(eight.q, eight.scales)
        else:
            four = weights.to_int4(
                weight,
                plan.group,
                symmetric=options.zero_point == "symmetric",
                search=options.search == "mse",
            )
            parts = (four.q, four.zeros, four.multipliers, four.steps)
            kernel, rounded = registry.int4(*parts), reference.int4_weight(*parts)
        square += float((rounded - weight).square().sum())
        total += float(weight.double().square().sum())
        layer.forward = _forward(kernel, layer.bias)
    return math.sqrt(square / total)


def _linear_layers(model: Any) -> Iterator[tuple[str, torch.nn.Linear]]:
    for name, layer in model.named_modules():
        if isinstance(layer, torch.nn.Linear) and not name.endswith("lm_head"):
            yield name, layer


def _forward(kernel: registry.Kernel, bias: torch.Tensor | None) -> Any:
    bias = None if bias is None else bias.float()

    def forward(x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = kernel(x.reshape(-1, x.shape[-1]), bias)
        return y.view(*x.shape[:-1], -1)

    return forward


def _logits(model: Any, ids: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        logits: torch.Tensor = model(torch.tensor([ids])).logits[0].float()
    return logits


def _compare(
    base: list[torch.Tensor], found: list[torch.Tensor], chunks: list[list[int]]
) -> dict[str, float]:
    divergences, same, losses = [], [], []
    for one, other, ids in zip(base, found, chunks, strict=True):
        expected, actual = one.log_softmax(-1), other.log_softmax(-1)
        divergences.append((expected.exp() * (expected - actual)).sum(-1))
        same.append(one.argmax(-1) == other.argmax(-1))
        losses.append(-actual[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0])
    divergence = torch.cat(divergences)
    return {
        "kl_mean": float(divergence.mean()),
        "kl_p99": float(divergence.quantile(0.99)),
        "same_first": float(torch.cat(same).float().mean()),
        "perplexity": float(torch.cat(losses).mean().exp()),
    }


def _judge(tokenizer: Any, questions: int) -> Callable[[Any], dict[str, float]]:
    """Return what asks a model the held-out questions: greedy, in batches of like length."""
    evaluation = runpy.run_path(str(_EXAMPLES / "evaluate_demo_model.py"))
    examples = evaluation["select"](questions)

    def judge(model: Any) -> dict[str, float]:
        replies = evaluation["answer"](examples, model, tokenizer)
        found = evaluation["score"](examples, replies)
        return {name: found[name] for name in ("right", "questions")}

    return judge


def _text(file: Path | None, tokenizer: Any) -> str:
    if file is not None:
        return file.read_text()
    evaluation = runpy.run_path(str(_EXAMPLES / "evaluate_demo_model.py"))
    return "".join(
        tokenizer.apply_chat_template(
            [*example.messages, {"role": "assistant", "content": example.answer}], tokenize=False
        )
        for example in evaluation["select"](None)
    )


if __name__ == "__main__":
    main()
