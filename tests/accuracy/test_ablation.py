"""Does the table of methods have a line for each, and nothing else?"""

from __future__ import annotations

from pathlib import Path

from tests.accuracy import ablation


def test_every_method_has_its_line() -> None:
    text = ablation.README.read_text(encoding="utf-8")
    body = text.split(ablation.BEGIN)[1].split(ablation.END)[0]
    names = [row.split("|")[1].strip().strip("`") for row in body.splitlines()[2:]]
    why = "run python -m tests.accuracy.ablation, which measures what is new"
    assert names == [line.name for line in ablation.lines()], why
    assert ablation.table({}).count(" - |") == len(names)


def test_a_table_replaces_the_last_one(tmp_path: Path) -> None:
    path = tmp_path / "README.md"
    path.write_text(f"above\n{ablation.BEGIN}old\n{ablation.END}below\n", encoding="utf-8")
    names = [line.name for line in ablation.lines()]
    ablation.write(dict.fromkeys(names, 0.25), path)
    text = path.read_text(encoding="utf-8")
    assert text.startswith(f"above\n{ablation.BEGIN}| method |")
    assert text.endswith(f"|\n{ablation.END}below\n")
    assert all(f"| `{name}` | " in text for name in names)
    assert text.count("0.2500") == len(names)
