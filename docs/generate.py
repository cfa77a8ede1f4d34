"""Write what the docs say of settings out of their own help texts: `python docs/generate.py`.

That is docs/run-files.md, and the tables between the markers of docs/choosing.md.
"""

import json
import re
from pathlib import Path
from typing import Any

from tunesmith.jobs.comparison_spec import Comparison
from tunesmith.spec import schema

HERE = Path(__file__).parent
HEADER = """# Run files

Every setting of a run file. All but `data.train` have defaults; a file holds only what differs. On
the command line the same settings are written with dots: `method.rank=32`,
`data.train.0.path=my.csv`. This page is written by `python docs/generate.py`.
"""


def main() -> None:
    """Write the pages beside this file."""
    for name, text in pages().items():
        (HERE / name).write_text(text, encoding="utf-8")


def pages() -> dict[str, str]:
    """Return each page's text by its name."""
    choosing = (HERE / "choosing.md").read_text(encoding="utf-8")
    between = r"(?<=<!-- settings -->\n).*?(?=<!-- end settings -->)"
    filled = re.sub(between, lambda _: comparison_tables(), choosing, flags=re.DOTALL)
    return {"run-files.md": page(), "choosing.md": filled}


def comparison_tables() -> str:
    """Return the settings of a comparison file and of its variants, as Markdown."""
    described = Comparison.model_json_schema()
    parts = described["$defs"]
    variant = ["", "A variant has:", "", *_table(parts["Variant"], parts)]
    section = "`features`, of a variant and in the file of `tunesmith features`, has:"
    features = ["", section, "", *_table(parts["FeatureSettings"], parts)]
    prompting = ["", "`prompting`, of a variant, has:", ""]
    prompting += _table(parts["PromptingSettings"], parts)
    return "\n".join([*_table(described, parts), *variant, *features, *prompting, ""])


def page() -> str:
    """Return the page as Markdown."""
    described = schema()
    parts = described["$defs"]
    lines = [HEADER, "## The run\n", *_table(described, parts)]
    for name, facts in described["properties"].items():
        for part in _parts_of(facts):
            lines += _section(name, part, parts)
    return "\n".join(lines)


def _section(name: str, part: str, parts: dict[str, Any]) -> list[str]:
    described = parts[part]
    own = described["properties"].get("name", {}).get("const")
    title = f"{name}: {{name: {own}}}" if own else name
    lines = [f"\n## `{title}`\n", described.get("description", "").strip(), ""]
    lines += _table(described, parts)
    for key, facts in described["properties"].items():
        for inner in _parts_of(facts):
            lines += _section(f"{name}.{key}", inner, parts)
    return lines


def _table(owner: dict[str, Any], parts: dict[str, Any]) -> list[str]:
    lines = ["| setting | values | default | meaning |", "|---|---|---|---|"]
    for name, facts in owner["properties"].items():
        if "const" in facts:
            continue
        inner = parts[_parts_of(facts)[0]] if _parts_of(facts) else {}
        text = facts.get("description") or inner.get("description", "")
        meaning = " ".join(text.split()).replace("|", "\\|")
        default = "required" if name in owner.get("required", []) else _default(facts)
        values = _values(facts, parts).replace("|", "\\|")
        lines.append(f"| `{name}` | {values} | {default} | {meaning} |")
    return lines


def _default(facts: dict[str, Any]) -> str:
    value = facts.get("default", [])
    if isinstance(value, dict):
        return "below"
    return f"`{'none' if value is None else json.dumps(value)}`".replace('"', "")


def _values(facts: dict[str, Any], parts: dict[str, Any]) -> str:
    if "$ref" in facts or "oneOf" in facts or "discriminator" in facts:
        return "below"
    if "anyOf" in facts:
        found = [_values(option, parts) for option in facts["anyOf"]]
        return " or ".join(dict.fromkeys(found))
    if "enum" in facts:
        return ", ".join(f"`{value}`" for value in facts["enum"])
    if facts.get("type") == "array":
        items = facts.get("items", {})
        return "list" if "$ref" in items or not items else f"list of {_values(items, parts)}"
    kinds = {"null": "none", "integer": "whole number", "number": "number", "string": "text"}
    kinds |= {"boolean": "true, false", "object": "mapping"}
    return f"`{facts['const']}`" if "const" in facts else kinds.get(facts.get("type", ""), "")


def _parts_of(facts: dict[str, Any]) -> list[str]:
    """Return the names of the settings classes that a field holds."""
    options = [*facts.get("oneOf", []), *facts.get("anyOf", [])]
    references = [facts, facts.get("items", {}), *options]
    # One of several, or a list of them: a union inside a union.
    references += [inner for option in options for inner in option.get("oneOf", [])]
    return [r["$ref"].rpartition("/")[2] for r in references if "$ref" in r]


if __name__ == "__main__":
    main()
