"""`scalellm compress` from end to end: what it writes, what it refuses, a kill in the middle."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("compressed_tensors")

from safetensors.torch import load_file, save_file  # noqa: E402

from scalellm_plugins.compression import families  # noqa: E402
from scalellm_plugins.compression.quantize import unpack  # noqa: E402

from .compression_parts import (  # noqa: E402
    DEMO,
    INDEX,
    compress,
    copy_of_demo,
    refusal,
    sharded_demo,
    tiny,
    write_text,
)


def loaded(folder: Path) -> Any:
    """By transformers, which must find every tensor that it expects and no other."""
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype="auto", output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    return model.eval()


@pytest.mark.parametrize(
    "options",
    [
        "int4",
        "int4 --asymmetric",
        "int4 --group-size 32",
        "int8",
        "int8 --group-size channel",
        "w8a8",
    ],
)
def test_weights_are_off_by_half_a_step(tmp_path: Path, options: str) -> None:
    """As compressed-tensors unpacks them; fails for words, scales or names of another layout."""
    assert compress(DEMO, tmp_path / "out", "--scheme", *options.split()) == 0
    before = loaded(DEMO).state_dict()
    model = loaded(tmp_path / "out")
    with torch.inference_mode():
        model(input_ids=torch.tensor([[1]]))  # before it, weights are still compressed
    stored = load_file(tmp_path / "out" / "model.safetensors")
    for name, module in model.named_modules():
        if not hasattr(module, "quantization_scheme"):
            continue
        old, new = before[f"{name}.weight"].float(), module.weight.float()
        scale = stored[f"{name}.weight_scale"].float()
        step = scale.repeat_interleave(old.shape[1] // scale.shape[1], dim=1)
        off = (old - new).abs()
        # bf16 holds the products with eight bits; few weights are clipped by the search.
        within = off <= step * 0.5 + new.abs() / 256
        assert within.float().mean() > 0.97, name
        assert (off / step).max() < 8, name
    assert torch.equal(model.lm_head.weight, before["lm_head.weight"])


def test_every_file_but_the_weights_is_copied(tmp_path: Path) -> None:
    assert compress(DEMO, tmp_path / "out", "--scheme", "w8a8") == 0
    assert not (tmp_path / "out.partial").exists()
    for path in DEMO.iterdir():
        if path.name not in ("config.json", "model.safetensors"):
            assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()
    report = json.loads((tmp_path / "out" / "compression.json").read_text())
    size = (tmp_path / "out" / "model.safetensors").stat().st_size
    assert 0 < size - report["bytes"][1] < 20_000


def test_shards_give_the_same_tensors(tmp_path: Path) -> None:
    source = sharded_demo(tmp_path / "model", 3)
    for model, out in ((DEMO, "one"), (source, "three")):
        assert compress(model, tmp_path / out, "--scheme", "int4") == 0
    one = load_file(tmp_path / "one" / "model.safetensors")
    index = json.loads((tmp_path / "three" / INDEX).read_text())["weight_map"]
    three = {n: load_file(tmp_path / "three" / shard)[n] for n, shard in index.items()}
    assert one.keys() == three.keys()
    assert all(torch.equal(one[name], three[name]) for name in one)
    loaded(tmp_path / "three")


def test_dropped_layers_and_cut_channels(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The smaller model computes what the same cuts in memory compute."""
    text = write_text(tmp_path / "text.jsonl")
    options = ("--drop-layers", 2, "--prune-ffn", 0.25, "--calibration", text)
    assert compress(sharded_demo(tmp_path / "model", 4), tmp_path / "out", *options) == 0
    said = capsys.readouterr().err
    assert all(part in said for part in ("out.partial/model into memory: ", "speed: 12"))
    report = json.loads((tmp_path / "out" / "compression.json").read_text())
    dropped, after = report["dropped_layers"], loaded(tmp_path / "out")
    assert dropped == sorted(sorted(range(5), key=report["influence"].__getitem__)[:2])
    assert (after.config.num_hidden_layers, after.config.intermediate_size) == (3, 384)
    assert after.lm_head.weight is after.model.embed_tokens.weight
    assert report["quality"]["kl"] > 0
    assert report["quality"]["perplexity"][0] < 1.5, "what the model was taught to say"
    assert len(report["speed"]["rounds"][0]) == 5

    before = loaded(DEMO)
    kept = [layer for i, layer in enumerate(before.model.layers) if i not in dropped]
    for old, new in zip(kept, after.model.layers, strict=True):
        # Each kept column names its channel: they are all different.
        same = (old.mlp.down_proj.weight.T[:, None] == new.mlp.down_proj.weight.T[None]).all(-1)
        gone = ~same.any(1)
        assert int(gone.sum()) == 128
        old.mlp.down_proj.weight.data[:, gone] = 0
    before.model.layers = torch.nn.ModuleList(kept)
    ids = torch.arange(8, 40)[None]
    with torch.inference_mode():
        old, new = (m(input_ids=ids, use_cache=False).logits.float() for m in (before, after))
    assert (old - new).abs().max() < 0.1 * old.abs().max()


@pytest.mark.parametrize("kind", sorted(families.FAMILIES))
def test_every_family_is_loaded_again(tmp_path: Path, kind: str) -> None:
    """Fails where an architecture names its modules or its lists by layer otherwise."""
    source = tiny(tmp_path / "model", kind)
    text = write_text(tmp_path / "text.jsonl")
    options = ("--drop-layers", 1, "--prune-ffn", 0.5, "--calibration", text, "--no-measure")
    assert compress(source, tmp_path / "pruned", *options) == 0
    loaded(tmp_path / "pruned")
    assert compress(source, tmp_path / "int4", "--scheme", "int4") == 0
    loaded(tmp_path / "int4")


def test_out_is_never_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "out").mkdir()
    said = refusal(capsys, DEMO, tmp_path / "out", "--scheme", "int4")
    assert "exists and is not overwritten" in said
    assert not list((tmp_path / "out").iterdir())


_KILLED = """
import os, signal, sys
from scalellm_plugins import cli
from scalellm_plugins.compression.container import Writer
write, left = Writer.write, [int(sys.argv[1])]
def dying(self, name, data):
    left[0] -= 1
    if not left[0]:
        os.kill(os.getpid(), signal.SIGKILL)
    write(self, name, data)
Writer.write = dying
cli.main(sys.argv[2:])
"""


def kill_at(tensor: int, *arguments: object) -> None:
    """Run the command in a process that is killed when it would write that many tensors."""
    command = [sys.executable, "-c", _KILLED, str(tensor), "compress", *map(str, arguments)]
    result = subprocess.run(command, check=False, capture_output=True)
    assert result.returncode == -signal.SIGKILL, result.stderr.decode()


def test_a_killed_run_goes_on(tmp_path: Path) -> None:
    """Twice killed, in different shards; what was finished is not made again."""
    source = sharded_demo(tmp_path / "model", 5)
    arguments = (source, tmp_path / "out", "--scheme", "int4")
    kill_at(40, *arguments)
    model = tmp_path / "out.partial" / "model"
    first = {path: path.stat().st_ino for path in model.glob("*.safetensors")}
    assert 0 < len(first) < 5
    assert list(model.glob("*.tmp")), "it was not killed in the middle of a shard"
    kill_at(30, *arguments)
    assert not (tmp_path / "out").exists()
    assert compress(*arguments) == 0
    assert all((tmp_path / "out" / p.name).stat().st_ino == inode for p, inode in first.items())
    assert compress(source, tmp_path / "other", "--scheme", "int4") == 0
    names = sorted(p.name for p in (tmp_path / "other").iterdir())
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == names
    for name in names:
        if not name.startswith("compression."):
            ours, other = ((tmp_path / folder / name).read_bytes() for folder in ("out", "other"))
            assert ours == other, name


def test_other_commands_do_not_go_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = sharded_demo(tmp_path / "model", 2)
    kill_at(60, source, tmp_path / "out", "--scheme", "int4")
    said = refusal(capsys, source, tmp_path / "out", "--scheme", "int8")
    assert "--scheme: 'int4' then, 'int8' now" in said
    shard = source / "model-00001-of-00002.safetensors"
    tensors = load_file(shard)
    save_file(tensors, shard, {"format": "pt", "again": "yes"})
    assert "has changed since" in refusal(capsys, source, tmp_path / "out", "--scheme", "int4")


def damage(folder: Path, kind: str) -> None:
    """Damage a checkpoint of two shards."""
    shard, other = (folder / f"model-0000{i}-of-00002.safetensors" for i in (1, 2))
    index, config = folder / INDEX, folder / "config.json"
    if kind == "truncated":
        shard.write_bytes(shard.read_bytes()[:-100])
    elif kind == "no header":
        shard.write_bytes(b"\xff" * 4096)
    elif kind == "empty":
        shard.write_bytes(b"")
    elif kind == "missing":
        other.unlink()
    elif kind == "no index":
        other.unlink()
        index.unlink()
    elif kind == "index":
        listed = json.loads(index.read_text())
        name = next(n for n, where in listed["weight_map"].items() if where == shard.name)
        listed["weight_map"][name] = other.name
        index.write_text(json.dumps(listed))
    elif kind == "escape":
        listed = json.loads(index.read_text())
        listed["weight_map"]["x"] = "../x.safetensors"
        index.write_text(json.dumps(listed))
    else:
        key, _, value = kind.partition("=")
        config.write_text(json.dumps(json.loads(config.read_text()) | {key: json.loads(value)}))


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("truncated", "is damaged: its header describes"),
        ("no header", "is cut short or is no safetensors file"),
        ("empty", "is cut short or is no safetensors file"),
        ("missing", "model-00002-of-00002.safetensors is missing, which .*json names .1 of 2"),
        (
            "no index",
            "but shards: .* model.safetensors.index.json, model-00002-of-00002.saf.* again",
        ),
        ("index", "which does not hold it"),
        ("escape", "is no file name"),
        ("num_hidden_layers=6", "lacks model.layers.5."),
        ("num_hidden_layers=4", "holds layer 4"),
        ("intermediate_size=640", "intermediate_size is 640"),
        ('model_type="mixtral"', "model_type 'mixtral' is not known"),
        ('quantization_config={"quant_method": "awq"}', "quantized already .*awq"),
        ('quantization_config="awq"', "quantized already .*unnamed"),
        ("tie_word_embeddings=false", "lacks lm_head.weight"),
    ],
)
def test_damage_is_named_before_anything_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str, said: str
) -> None:
    source = sharded_demo(tmp_path / "model", 2)
    damage(source, kind)
    with pytest.raises(AssertionError, match=said):
        raise AssertionError(refusal(capsys, source, tmp_path / "out", "--scheme", "int4"))
    assert not (tmp_path / "out.partial").exists()


def test_layers_that_differ_by_number_are_not_dropped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, text = copy_of_demo(tmp_path / "model"), write_text(tmp_path / "text.jsonl")
    config = json.loads((source / "config.json").read_text()) | {"no_rope_layer_interval": 4}
    (source / "config.json").write_text(json.dumps(config))
    options = ("--drop-layers", 1, "--calibration", text)
    assert "list no_rope_layers" in refusal(capsys, source, tmp_path / "out", *options)
    config |= {"no_rope_layers": [1, 1, 1, 0, 1]}
    (source / "config.json").write_text(json.dumps(config))
    assert compress(source, tmp_path / "out", *options, "--no-measure") == 0
    made = json.loads((tmp_path / "out" / "config.json").read_text())
    assert len(made["no_rope_layers"]) == 4


@pytest.mark.parametrize("model", ["no/such/folder", "./nothing", "config.json"])
def test_a_model_that_is_not_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], model: str
) -> None:
    said = refusal(capsys, model, tmp_path / "out", "--scheme", "int4")
    assert f"{model} is no folder" in said


def test_a_weight_that_is_no_number_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = copy_of_demo(tmp_path / "model")
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.3.mlp.up_proj.weight"][5, 7] = float("nan")
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    said = refusal(capsys, source, tmp_path / "out", "--scheme", "int4")
    assert "model.layers.3.mlp.up_proj.weight: it has weights that are infinite or not" in said
    assert not list(tmp_path.glob("out*"))


def test_a_second_process_stays_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import fcntl

    (tmp_path / "out.partial").mkdir()
    with (tmp_path / "out.partial" / "lock").open("wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        said = refusal(capsys, DEMO, tmp_path / "out", "--scheme", "int4")
    assert "another process is working" in said


def test_zero_points_are_packed_along_the_outputs(tmp_path: Path) -> None:
    assert compress(DEMO, tmp_path / "out", "--scheme", "int4", "--asymmetric") == 0
    stored = load_file(tmp_path / "out" / "model.safetensors")
    name = "model.layers.0.mlp.down_proj"
    assert stored[f"{name}.weight_zero_point"].shape == (256 // 8, 512 // 128)
    assert unpack(stored[f"{name}.weight_zero_point"], 4, axis=0).unique().numel() > 1
