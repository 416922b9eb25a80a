"""The gates: what every notebook and module must keep to, so that the course stays readable as it grows.

Each gate is a function `gate(root) -> list[str]` that looks at `root/nbs`, `root/nanogpt` … and returns one sentence
per violation, with its place. tests/test_gates.py runs each on the repository (must be silent) and on a small bad
example (must speak). A gate that hurts good code is loosened here, with the reason in a comment.
"""
import ast
import json
import re
import shlex
import subprocess
import sys
import tokenize
from functools import cache
from pathlib import Path

HERE = Path(__file__).resolve().parents[1]
GATES = {}

def gate(f):
    GATES[f.__name__] = f
    return f

# ---- reading the tree ------------------------------------------------------------------------------------------------

def notebooks(root):
    return sorted((root/"nbs").glob("*.ipynb"))

def modules(root):
    "The exported modules: all but three that no notebook writes."
    return sorted(p for p in (root/"nanogpt").rglob("*.py") if p.name not in ("_modidx.py", "__init__.py", "__main__.py"))

@cache
def _parse(path, stamp):
    return ast.parse(path.read_text(encoding="utf-8"))

def tree(path):
    return _parse(path, path.stat().st_mtime_ns)

def cells(path):
    "The cells with their source as one string."
    for c in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        yield {**c, "source": "".join(c["source"])}

def code(path):
    return [c for c in cells(path) if c["cell_type"] == "code" and c["source"].strip()]

def markdown(path):
    return [c["source"] for c in cells(path) if c["cell_type"] == "markdown"]

def directives(cell):
    return re.findall(r"^#\|\s*(\w+)", cell["source"], re.M)

def exported(cell):
    return bool({"export", "exports", "exporti"} & set(directives(cell)))

def python(source):
    "The cell as a syntax tree; lines of IPython's own (%magic, !shell) are left out, a cell in another language is empty."
    lines = [] if source.lstrip().startswith("%%") else source.split("\n")
    text = "\n".join("" if line.startswith(("%", "!")) else line for line in lines)
    return compile(text, "cell", "exec", ast.PyCF_ONLY_AST | ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)

def public(name):
    return not name.startswith("_")

DEFS = (ast.FunctionDef, ast.AsyncFunctionDef)

def overload(f):
    return any("overload" in ast.dump(d) for d in f.decorator_list)

def definitions(body, prefix=""):
    "Public functions and classes, and the methods of public classes. What is nested inside a function is its own affair."
    for o in body:
        if isinstance(o, (*DEFS, ast.ClassDef)) and public(o.name) and not overload(o): yield prefix + o.name, o
        if isinstance(o, ast.ClassDef) and public(o.name):
            yield from definitions(o.body, prefix + o.name + ".")
            # __init__ and __call__ carry parameters of our own choosing; the other dunders' are fixed by Python
            yield from ((f"{prefix}{o.name}.{m.name}", m) for m in o.body if isinstance(m, DEFS) and m.name in ("__init__", "__call__"))

def code_lines(source):
    "The numbers of the lines that carry code: blank lines and lines that are only a comment explain, so they are free."
    return {n for n, x in enumerate(source.split("\n"), 1) if x.strip() and not x.lstrip().startswith("#")}

def weight(source, parsed, start=1, end=10**9):
    "Lines of code without docstrings, and without the lines that house style gives to parameters and their explanations."
    # Counting those would punish exactly the functions that explain themselves best.
    free = set()
    for o in ast.walk(parsed):
        if not isinstance(o, (*DEFS, ast.ClassDef)): continue
        if isinstance(o, DEFS): free |= set(range(o.lineno + 1, o.body[0].lineno))
        if ast.get_docstring(o) is not None: free |= set(range(o.body[0].lineno, o.body[0].end_lineno + 1)) - {o.lineno}
    return sum(start <= n <= end for n in code_lines(source) - free)

# ---- the line --------------------------------------------------------------------------------------------------------

def place(name):
    "'03a_corpus' -> ((3, 'a'), 'corpus'): notebooks are ordered by number, then by letter."
    m = re.fullmatch(r"(\d\d)([a-z]?)_([a-z][a-z0-9_]*)", name)
    return ((int(m[1]), m[2]), m[3]) if m else None

def default_exp(path):
    return next((m[1] for c in code(path) if (m := re.search(r"^#\|\s*default_exp\s+(\S+)", c["source"], re.M))), None)

@gate
def one_notebook_one_module(root):
    "NN_name.ipynb writes name.py, and every module has its notebook."
    bad, known = [], set()
    for p in notebooks(root):
        if not (at := place(p.stem)): bad.append(f"{p.name}: the name must look like 05_attention.ipynb or 03a_tales.ipynb"); continue
        mod = default_exp(p) or ""
        known.add(mod.replace(".", "/"))
        if mod.split(".")[-1] != at[1]: bad.append(f"{p.name}: `#| default_exp {at[1]}` expected, found {mod or 'none'}")
    for p in modules(root):
        if (name := p.relative_to(root/"nanogpt").with_suffix("").as_posix()) not in known: bad.append(f"{name}.py: no notebook writes it")
    return bad

def imports(path, root):
    "The modules of the package that a module imports, anywhere in it, as dotted names inside the package."
    here = path.relative_to(root/"nanogpt").with_suffix("").parts
    for o in ast.walk(tree(path)):
        if isinstance(o, ast.Import): yield from (a.name.split(".", 1)[1] for a in o.names if a.name.startswith("nanogpt."))
        if not isinstance(o, ast.ImportFrom): continue
        base = list(here[:-o.level]) if o.level else (o.module or "").split(".")[:1]
        if not o.level and base != ["nanogpt"]: continue
        rest = (o.module or "").split(".") if o.level else o.module.split(".")[1:]
        target = ".".join(p for p in ([] if base == ["nanogpt"] else base) + rest if p)
        yield from [target] if target else [a.name for a in o.names]

@gate
def import_order(root):
    "A module imports only from modules of earlier notebooks."
    order = {default_exp(p): at[0] for p in notebooks(root) if (at := place(p.stem))}
    bad = []
    for p in modules(root):
        mod = ".".join(p.relative_to(root/"nanogpt").with_suffix("").parts)
        for target in imports(p, root):
            if mod in order and target in order and order[target] >= order[mod]:
                bad.append(f"{mod} imports {target}, which comes later: move the code, or pass the object in")
    return bad

# ---- the package -----------------------------------------------------------------------------------------------------

@gate
def ruff_clean(root):
    "Ruff has nothing to say about the package and the tests."
    folders = [str(root/d) for d in ("nanogpt", "tests") if (root/d).exists()]
    command = [sys.executable, "-m", "ruff", "check", "--no-cache", "--output-format", "concise", "--config", str(HERE/"ruff.toml")]
    r = subprocess.run(command + folders, capture_output=True, text=True, cwd=root)
    return (r.stdout + r.stderr).splitlines() if r.returncode else []

def comment_lines(path):
    with open(path, "rb") as f: return {t.start[0] for t in tokenize.tokenize(f.readline) if t.type == tokenize.COMMENT}

def parameters(f):
    a = f.args
    return [x for x in [*a.posonlyargs, *a.args, a.vararg, *a.kwonlyargs, a.kwarg] if x and x.arg not in ("self", "cls")]

def promises(root):
    "The methods of the package's protocols and the names of their parameters: explained there, once, for all that keep them."
    classes = [c for p in modules(root) for c in tree(p).body if isinstance(c, ast.ClassDef)]
    protocols = [c for c in classes if any("Protocol" in ast.unparse(b) for b in c.bases)]
    return {c.name: {m.name: {x.arg for x in parameters(m)} for m in c.body if isinstance(m, DEFS)} for c in protocols}

def keeps(f, name, protocols):
    "Whether this method carries out one that a protocol explains; the protocol's own methods do not count."
    owner, _, method = name.rpartition(".")
    mine = {x.arg for x in parameters(f)}
    return owner not in protocols and owner != "" and any(mine <= p[method] for p in protocols.values() if method in p)

@gate
def parameters_explained(root):
    "Every parameter of a public function stands on a line of its own, with a comment at its end: shape, meaning, unit."
    # Settings classes need nothing here: their fields carry the help inside arg("…").
    bad, protocols = [], promises(root)
    for p in modules(root):
        comments = comment_lines(p)
        for name, f in definitions(tree(p).body):
            if not isinstance(f, DEFS) or keeps(f, name, protocols): continue
            ends = {d.lineno: d.end_lineno for d in [*f.args.defaults, *f.args.kw_defaults] if d}
            lines = [x.lineno for x in parameters(f)]
            for x in parameters(f):
                where = f"{p.name}:{x.lineno} {name}({x.arg})"
                if lines.count(x.lineno) > 1: bad.append(f"{where}: give it a line of its own")
                elif not comments & {x.lineno, ends.get(x.lineno)}: bad.append(f"{where}: no comment at the line's end")
    return bad

@gate
def docstrings(root):
    "Every public function, class and method says in a sentence what holds for it."
    # __init__ and __call__ are described by their class, a method that keeps a protocol's promise by the protocol.
    protocols = promises(root)
    return [f"{p.name}:{o.lineno} {name} has no docstring" for p in modules(root) for name, o in definitions(tree(p).body)
            if ast.get_docstring(o) is None and public(o.name) and not (isinstance(o, DEFS) and keeps(o, name, protocols))]

@gate
def public_names(root):
    "`__all__` is there, and a variable in it is a CONSTANT or a Type: a lower-case one was left over from a cell by accident."
    bad = []
    for p in modules(root):
        body = tree(p).body
        if not any(isinstance(o, ast.Assign) and ast.unparse(o.targets[0]) == "__all__" for o in body):
            bad.append(f"{p.name} has no __all__")
        for o in body:
            if isinstance(o, (*DEFS, ast.ClassDef, ast.Import, ast.ImportFrom)): continue
            bad += [f"{p.name}:{n.lineno} leaves `{n.id}` behind as a public name: _{n.id} keeps it private"
                    for n in ast.walk(o) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store) and public(n.id) and n.id[0].islower()
                    and not inside_scope(o, n)]
    return bad

def inside_scope(statement, name):
    "Whether the name lives in a comprehension, lambda or function inside the statement, so that it does not reach the module."
    own = (*DEFS, ast.ClassDef, ast.Lambda, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
    return any(name in ast.walk(o) for o in ast.walk(statement) if isinstance(o, own))

@gate
def no_star_imports(root):
    "Names are imported one by one, so that a reader can look each of them up."
    star = lambda t: any(isinstance(o, ast.ImportFrom) and o.names[0].name == "*" for o in ast.walk(t))
    bad = [f"{p.name}: import *" for p in (root/"nanogpt").rglob("*.py") if star(tree(p))]
    cells = [(p.name, python(c["source"])) for p in notebooks(root) for c in code(p) if exported(c)]
    return bad + [f"{name}: import * in an exported cell" for name, t in cells if star(t)]

@gate
def no_pickle(root):
    "Nothing is saved as, or loaded from, a format that can run code."
    def uses(t):
        for o in ast.walk(t):
            if isinstance(o, ast.Import): yield from (a.name for a in o.names if a.name.split(".")[0] in banned)
            if isinstance(o, ast.ImportFrom) and (o.module or "").split(".")[0] in banned: yield o.module
            if isinstance(o, ast.Attribute) and (what := ast.unparse(o)) in calls: yield what
            if isinstance(o, ast.keyword) and o.arg == "allow_pickle" and getattr(o.value, "value", None) is not False: yield "allow_pickle"
    banned, calls = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve"}, {"torch.load", "torch.save"}
    files = [(p.name, tree(p)) for d in ("nanogpt", "tests") for p in (root/d).rglob("*.py")]
    files += [(p.name, python(c["source"])) for p in notebooks(root) for c in code(p)]
    return [f"{name} uses {u}: tensors go to safetensors, the rest to JSON" for name, t in files for u in uses(t)]

# ---- the lessons -----------------------------------------------------------------------------------------------------

def asserts(cell):
    "Whether the cell runs and holds an assertion."
    found = lambda pattern: re.search(pattern, cell["source"], re.M)
    return bool(found(r"\bassert\b|\b(test|assert)_\w+\(")) and not found(r"^#\|\s*eval:\s*false")

def claims(path):
    "For each public function or class a notebook exports: whether one of the next three cells that are not exported tests it by name."
    todo = code(path)
    for i, c in enumerate(todo):
        if not exported(c): continue
        after = [x for x in todo[i + 1:] if not exported(x)][:3]
        for o in python(c["source"]).body:
            if isinstance(o, (*DEFS, ast.ClassDef)) and public(o.name):
                yield o.name, any(asserts(x) and re.search(rf"\b{o.name}\b", x["source"]) for x in after)

@gate
def tested_after_claim(root, share=0.95):
    "95 % of what is exported is tested within three cells."
    found = [(p.name, *x) for p in notebooks(root) for x in claims(p)]
    untested = [f"{nb}: {name} is not used in an assertion within the next three cells" for nb, name, ok in found if not ok]
    return untested if len(untested) > (1 - share)*len(found) + 1e-9 else []

@gate
def module_length(root, limit=250):
    "A module is read in one sitting. Blank lines and comment lines are free: nbdev puts some before every cell."
    sizes = {p.name: len(code_lines(p.read_text(encoding="utf-8"))) for p in modules(root)}
    return [f"{n}: {size} lines of code, at most {limit}: split the story" for n, size in sizes.items() if size > limit]

@gate
def function_length(root, usual=25, most=50, share=0.10):
    "Functions have at most 25 lines of code (see `weight`); one in ten may have up to 50."
    sizes = {}
    for p in modules(root):
        src, t = p.read_text(encoding="utf-8"), tree(p)
        own = [f for o in ast.walk(t) if isinstance(o, (ast.Module, ast.ClassDef)) for f in o.body if isinstance(f, DEFS)]
        sizes |= {f"{p.name}:{f.lineno} {f.name}": weight(src, t, f.lineno, f.end_lineno) for f in own}
    long = {k: n for k, n in sizes.items() if n > usual}
    if len(long) <= share*len(sizes): long = {k: n for k, n in long.items() if n > most}
    return [f"{k}: {n} lines of code, at most {usual}; one function in ten may reach {most}" for k, n in long.items()]

@gate
def cell_length(root, usual=25, most=50):
    "A cell fits on a screen: 25 lines of code (see `weight`). An exported cell may reach 50 if it holds a class or one definition."
    # A class cannot be cut into cells, and a function over 25 lines is counted by function_length already.
    bad = []
    for p in notebooks(root):
        for i, c in enumerate(code(p)):
            parsed = python(c["source"])
            defs = [o for o in parsed.body if isinstance(o, (*DEFS, ast.ClassDef))]
            whole = exported(c) and (len(defs) == 1 or any(isinstance(o, ast.ClassDef) for o in defs))
            limit = most if whole or "spec" in directives(c) else usual # a spec cell is folded away: its traps may take their room
            if (n := weight(c["source"], parsed)) > limit:
                bad.append(f"{p.name}: code cell {i} ({c['source'].strip().splitlines()[-1].strip()[:40]}) has {n} lines, at most {limit}")
    return bad

@gate
def notebook_size(root, limit=400_000):
    "A notebook with its pictures opens at once."
    return [f"{p.name}: {p.stat().st_size:,} bytes, at most {limit:,}" for p in notebooks(root) if p.stat().st_size > limit]

@gate
def notebook_shape(root):
    "A lesson opens with its title and one line that sums it up, and ends with what was learned."
    # nbdev's own custom of a first cell that holds `#| default_exp name` and nothing else is fine.
    bad = []
    for p in notebooks(root):
        first = next(c for c in cells(p) if not re.fullmatch(r"\s*#\|\s*default_exp\s+\S+\s*", c["source"]))
        if first["cell_type"] != "markdown" or not first["source"].startswith("# "):
            bad.append(f"{p.name}: the first cell must open with a `# Title`")
        if not re.search(r"^> \S", first["source"], re.M): bad.append(f"{p.name}: no `> one-line summary` under the title")
        if not re.search(r"^## What you learned", "\n".join(markdown(p)), re.M): bad.append(f"{p.name}: no `## What you learned`")
    return bad

@gate
def pictures_described(root):
    "A cell that shows a picture is followed by a cell that says in words what it shows: *Picture:* …"
    bad = []
    for p in notebooks(root):
        cs = list(cells(p))
        for i, c in enumerate(cs):
            if not any("image/png" in o.get("data", {}) for o in c.get("outputs", [])): continue
            after = cs[i + 1] if i + 1 < len(cs) else {"cell_type": "", "source": ""}
            if after["cell_type"] != "markdown" or not after["source"].startswith("*Picture:* "):
                bad.append(f"{p.name}: the picture of cell {i} is not followed by `*Picture:* …`")
    return bad

@gate
def headings(root, most=10):
    "Nobody gets lost: at most ten cells without a heading (the style asks for one per three to eight)."
    bad = []
    for p in notebooks(root):
        run = 0
        for i, c in enumerate(cells(p)):
            run = 0 if c["cell_type"] == "markdown" and re.search(r"^#{1,4} ", c["source"], re.M) else run + 1
            if run == most + 1: bad.append(f"{p.name}: more than {most} cells without a heading, up to cell {i}")
    return bad

def sentences(paragraph):
    "How many sentences end in it. Those inside code, formulas and quotes do not count, nor do abbreviations; in doubt, fewer."
    text = re.sub(r"`[^`]*`|\$[^$]*\$|\"[^\"]*\"|“[^”]*”|https?://\S+|\b(e\.g|i\.e|vs|cf|etc|approx)\.", "x", paragraph)
    return len(re.findall(r"[.!?][\"”’)*_]*(?=\s+[A-Z“\"(*_`x]|\s*$)", text))

@gate
def short_paragraphs(root, most=4):
    "Paragraphs have at most four sentences. Lists, tables, quotes, headings and code are not paragraphs."
    bad = []
    for p in notebooks(root):
        for text in markdown(p):
            text = re.sub(r"```.*?```|\$\$.*?\$\$", "", text, flags=re.S)
            for para in re.split(r"\n\s*\n", text):
                lines = [x for x in para.strip().split("\n") if not re.match(r"\s*([-*+] |\d+[.)] |\||>|#|<|    )", x)]
                if (n := sentences(" ".join(lines))) > most: bad.append(f"{p.name}: {n} sentences in the paragraph “{para.strip()[:50]}…”")
    return bad

@gate
def outputs_calm(root):
    "No stored output shows an error or a warning: what readers see went well."
    bad = []
    for p in notebooks(root):
        for i, c in enumerate(cells(p)):
            for o in c.get("outputs", []):
                text = "".join(o.get("text", ""))
                if o["output_type"] == "error": bad.append(f"{p.name}: cell {i} stores an error: {o.get('ename')}")
                if o.get("name") == "stderr" and re.search(r"\b[A-Z]\w*Warning: ", text): bad.append(f"{p.name}: cell {i} stores a warning")
    return bad

# ---- the words around --------------------------------------------------------------------------------------------------

SKIP = {".git", ".venv", "runs", "build", "dist", "_proc", "_docs", "__pycache__", ".ipynb_checkpoints", ".pytest_cache", ".ruff_cache"}

def texts(root):
    "Every text file that is, or could be, part of the repository."
    for p in sorted(root.rglob("*")):
        parts = p.relative_to(root).parts
        if not p.is_file() or SKIP & set(parts) or any(x.endswith(".egg-info") or x.startswith(".venv") for x in parts): continue
        try: yield p, p.read_text(encoding="utf-8")
        except UnicodeDecodeError: pass

@gate
def no_machine_paths(root):
    "No file names a folder of the machine it was written on."
    # The patterns are put together from pieces, so this file does not match itself. The place of this very checkout and
    # of the user's home count too, when they are deep enough not to be an ordinary word of a path ("/src", "/app").
    own = [str(x) for x in (root.resolve(), Path.home()) if len(x.parts) > 2]
    pattern = "|".join(re.escape(x) for x in ["/" + "work/", "/" + "root/", "/tmp/" + "author", *own])
    return [f"{p.relative_to(root)}: {m[0]}" for p, text in texts(root) if (m := re.search(rf"(?<![\w.])(?:{pattern})", text))]

def readme_lines(root):
    "The commands in the README's ```sh blocks, without comments, prompts and line continuations."
    for p in sorted(root.glob("README*.md")):
        for block in re.findall(r"^```(?:sh|bash|shell|console)\n(.*?)^```", p.read_text(encoding="utf-8"), re.M | re.S):
            for line in block.replace("\\\n", " ").splitlines():
                line = re.sub(r"(^|\s)#.*", "", line).removeprefix("$ ").strip()
                if re.match(r"(make|nanogpt|python -m nanogpt|torchrun)\b", line): yield p.name, re.sub(r"\s+", " ", line)

@gate
def readme_commands(root):
    "The commands in the README are ones the tests know: listed in tests/readme_commands.txt or written in a test."
    listed = root/"tests"/"readme_commands.txt"
    known = {x.strip() for x in listed.read_text(encoding="utf-8").splitlines()} if listed.exists() else set()
    known -= {x for x in known if x.startswith("#")}
    tests = "\n".join(p.read_text(encoding="utf-8") for p in sorted((root/"tests").glob("test_*.py")))
    makefile = (root/"Makefile").read_text(encoding="utf-8") if (root/"Makefile").exists() else ""
    bad = []
    for name, line in readme_lines(root):
        if line not in known and line not in tests: bad.append(f"{name}: `{line}` is in no test and not in tests/readme_commands.txt")
        words = shlex.split(line)
        if words[0] == "make" and not all(re.search(rf"^{re.escape(w)}:", makefile, re.M) for w in words[1:] if "=" not in w):
            bad.append(f"{name}: `{line}` names no target of the Makefile")
    return bad

@gate
def links_lead_somewhere(root):
    "A link to a file in a notebook's prose, or in a text at the top, names a file that is there."
    texts = [(path, t) for path in notebooks(root) for t in markdown(path)]
    texts += [(path, path.read_text(encoding="utf-8")) for path in sorted(root.glob("*.md"))]
    prose = lambda t: re.sub(r"```.*?```|`[^`]*`", "", t, flags=re.S)
    links = [(path, to) for path, t in texts for to in re.findall(r"\]\(([^()\s#]+)[^()\s]*\)", prose(t))]
    return [f"{path.relative_to(root)}: {to} is not there" for path, to in links
            if "://" not in to and not to.startswith("mailto:") and not (path.parent/to).exists()]
