"""The README's tables and map are held to the code."""

from __future__ import annotations

import re
from pathlib import Path

from scalellm_plugins.features import FEATURES

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_the_feature_table_is_the_code() -> None:
    rows = re.findall(r"^\| `(\w+)` \| (\w+) \| (.+?) \| `.+?` \|$", README, re.MULTILINE)
    assert rows == [(f.name, f.status, f.summary) for f in FEATURES.values()]


def test_the_map_names_what_exists() -> None:
    tree = README.partition("## The tree")[2].partition("```")[2].partition("```")[0]
    folder = ROOT
    named = set()
    for line in tree.splitlines():
        names = re.match(r"( *)((?:[\w.]+/? ?)+?)(?: {2,}|$)", line)
        if not names or not line.strip() or line.startswith(" " * 12):
            continue
        for name in names[2].split():
            path = (folder if names[1] else ROOT) / name
            assert path.exists(), f"the README's map names {path.relative_to(ROOT)}"
            named.add(name.rstrip("/"))
            if not names[1]:
                folder = path
    top = {p.parent.name for p in ROOT.glob("*/*") if p.suffix in (".py", ".lock", ".md")}
    assert {name for name in top if not name.startswith(".")} <= named


def test_the_commands_are_targets_of_the_makefile() -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE))
    assert set(re.findall(r"\bmake ([a-z][a-z-]*)", README)) <= targets | {"alone"}
