"""The locator against tomllib (which paths exist) and against an emitter that knows its own lines."""

import tomllib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from torchtitan_deltaproduct.config.locate import locate, read_toml
from torchtitan_deltaproduct.errors import ConfigError

TRICKY = """# [not.a.table]
title = "a # no comment [x]"   # a comment
'quoted key' = 1
"with.dot" . 'b c'.d = '''
[fake]
x = 1 '''''
[training]
  steps = 10
  mix = [ # open
    "one", [1, 2],
    { a = 1, "b c" = [3] }, # inline
  ]
  text = \"\"\"
\\\"\"\" [fake] \"\"\\
  = 3\"\"\"\"\"
[training.dataloader]
num_workers = 2
when = 1979-05-27 07:32:00Z # date
[[runs]]
name = "a"
[runs.nested]
z = +inf
[[runs]]
name = "b"
[[runs.deep]]
k = 1
"""


def paths_of(value, path=()):
    children = ()
    if isinstance(value, dict | list):
        children = value.items() if isinstance(value, dict) else enumerate(value)
    for name, child in children:
        yield (*path, name)
        yield from paths_of(child, (*path, name))


def test_tricky_document():
    lines = locate(TRICKY)
    assert set(lines) == set(paths_of(tomllib.loads(TRICKY)))
    expected = {
        ("title",): 2,
        ("quoted key",): 3,
        ("with.dot", "b c", "d"): 4,
        ("training",): 7,
        ("training", "steps"): 8,
        ("training", "mix"): 9,
        ("training", "mix", 0): 10,
        ("training", "mix", 1, 1): 10,
        ("training", "mix", 2, "b c"): 11,
        ("training", "text"): 13,
        ("training", "dataloader"): 16,
        ("training", "dataloader", "num_workers"): 17,
        ("runs", 0): 19,
        ("runs", 0, "nested", "z"): 22,
        ("runs", 1, "name"): 24,
        ("runs", 1, "deep", 0, "k"): 26,
    }
    assert {path: lines[path] for path in expected} == expected


def test_windows_line_ends():
    assert locate("a = 1\r\n[t]\r\nb = 2\r\n") == {("a",): 1, ("t",): 2, ("t", "b"): 3}


def test_empty_document():
    assert locate("") == locate("# only a comment") == {}


word = st.text(st.sampled_from("ab_-1"), min_size=1, max_size=4)
nasty = st.text(st.sampled_from("ab =.#[]{}'\",\n\\\té"), max_size=12)


@st.composite
def key(draw, number):
    """One part of a key that no other part equals."""
    form = draw(st.sampled_from(["bare", "basic", "literal"]))
    if form == "bare":
        name = draw(word) + f"k{number}"
        return name, name
    name = draw(nasty) + f"k{number}"
    if form == "literal":
        name = name.replace("'", "").replace("\n", "")
        return name, f"'{name}'"
    return name, '"' + escaped(name) + '"'


def escaped(text):
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n").replace("\t", "\\t")


@st.composite
def string(draw):
    text = draw(nasty)
    form = draw(st.sampled_from(["basic", "literal", "long basic", "long literal"]))
    if form == "basic":
        return f'"{escaped(text)}"'
    if form == "literal":
        return "'" + text.replace("'", "").replace("\n", "") + "'"
    if form == "long basic":
        body = text.replace("\\", "\\\\").replace('"""', '""\\"')
        return '"""' + ("\n" if draw(st.booleans()) else "") + body.rstrip('"') + '"""'
    return "'''" + text.replace("'''", "''").rstrip("'") + draw(st.sampled_from(["", "'", "''"])) + "'''"


class Emitter:
    """Writes a document and remembers the line of everything in it."""

    def __init__(self, draw):
        self.draw, self.text, self.lines, self.keys = draw, "", {}, 0

    def put(self, text):
        self.text += text

    def mark(self, path):
        self.lines.setdefault(path, self.text.count("\n") + 1)

    def gap(self, multiline):
        choices = ["", " ", "\t"] + ([" # x = [\n", "\n\n", " \n\t"] if multiline else [])
        self.put(self.draw(st.sampled_from(choices)))

    def key(self, path):
        parts = self.draw(st.integers(1, 3))
        for index in range(parts):
            self.keys += 1
            name, written = self.draw(key(self.keys))
            path = (*path, name)
            self.mark(path)
            self.put(written)
            if index < parts - 1:
                self.put(self.draw(st.sampled_from([".", " . "])))
        return path

    def assignment(self, path):
        path = self.key(path)
        self.gap(False)
        self.put("=")
        self.gap(False)
        self.value(path, depth=0)

    def value(self, path, depth):
        kinds = ["string", "scalar"] + (["array", "inline"] if depth < 2 else [])
        kind = self.draw(st.sampled_from(kinds))
        if kind == "string":
            self.put(self.draw(string()))
        elif kind == "scalar":
            scalars = ["1", "-2.5e3", "true", "inf", "1979-05-27 07:32:00", "07:32:00", "0xff", "1_000"]
            self.put(self.draw(st.sampled_from(scalars)))
        elif kind == "array":
            self.put("[")
            length = self.draw(st.integers(0, 3))
            for index in range(length):
                self.gap(True)
                self.mark((*path, index))
                self.value((*path, index), depth + 1)
                self.gap(True)
                self.put("," if index < length - 1 or self.draw(st.booleans()) else "")
            self.gap(True)
            self.put("]")
        else:
            self.put("{")
            for index in range(self.draw(st.integers(0, 2))):
                self.put(", " if index else " ")
                self.assignment_inline(path, depth)
            self.put(" }")

    def assignment_inline(self, path, depth):
        path = self.key(path)
        self.put(" = ")
        self.value(path, depth + 1)


@st.composite
def documents(draw):
    emitter = Emitter(draw)
    arrays: dict = {}
    for _ in range(draw(st.integers(0, 5))):
        kind = draw(st.sampled_from(["root", "table", "array", "again"]))
        path = ()
        if kind == "table":
            emitter.put("[")
            path = emitter.key(())
            emitter.put("]")
        elif kind == "array" or (kind == "again" and arrays):
            if kind == "array":
                emitter.keys += 1
                name, written = draw(key(emitter.keys))
            else:
                name, written = draw(st.sampled_from(sorted(arrays)))
            emitter.mark((name,))
            index = arrays[name, written] = arrays.get((name, written), -1) + 1
            emitter.mark((name, index))
            emitter.put(f"[[{written}]]")
            path = (name, index)
        elif emitter.text:
            continue
        emitter.gap(False)
        emitter.put("\n" if kind != "root" else "")
        for _ in range(draw(st.integers(0, 3))):
            emitter.gap(True)
            emitter.put("\n")
            emitter.assignment(path)
            emitter.put(draw(st.sampled_from(["\n", " # [c]\n", "\n\n"])))
    return emitter.text, emitter.lines


@settings(max_examples=300, deadline=None)
@given(documents())
def test_agrees_with_tomllib_and_the_emitter(document):
    text, lines = document
    tree = tomllib.loads(text)
    assert set(locate(text)) == set(paths_of(tree))
    assert locate(text) == lines


def test_a_text_with_a_nul_is_refused_and_one_that_only_writes_about_it_is_not(tmp_path):
    file = tmp_path / "x.toml"
    file.write_text("a = 'back\\u0000slash'\n")
    assert read_toml(file, "a TOML")[0] == {"a": "back\\u0000slash"}
    for text in ('a = "\\u0000"', '[t]\nb = [["x", "\\u0000"]]', '"\\u0000" = 1'):
        file.write_text(text)
        with pytest.raises(ConfigError, match="holds a NUL character"):
            read_toml(file, "a TOML")
