"""The house of docs/design.md: which folder may import which, and what a quick command must not load."""

import ast
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MAY_IMPORT = {
    "configs": set(),
    "eval": {"configs"},
    "trainer": {"configs", "eval"},
    "report": {"configs", "eval"},
    "launcher": {"configs", "eval", "trainer", "report"},
}


MOST_LINES, MOST_FILES = 400, 16


def modules() -> dict[str, Path]:
    """Our modules, by the name that imports have for them."""
    files = [file for package in MAY_IMPORT for file in (ROOT / package).rglob("*.py")]
    return {".".join(f.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): f for f in files}


def arrows() -> dict[str, set[str]]:
    """Which of our modules each imports, also inside functions."""
    ours, out = modules(), {}
    for name, file in ours.items():
        found: set[str] = set()
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module:
                whole = {f"{node.module}.{alias.name}" for alias in node.names} & ours.keys()
                found |= whole or {node.module}
            elif isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
        out[name] = (found & ours.keys()) - {name}
    return out


def circle_in(graph: dict[str, set[str]]) -> list[str]:
    """The nodes that form circles, or lie between two; none where there is an order from top to bottom."""
    left = {node: set(targets) for node, targets in graph.items()}
    while free := [node for node, targets in left.items() if not targets & left.keys()]:
        for node in free:
            del left[node]
    return sorted(left)


def test_no_modules_and_no_rooms_import_each_other_in_a_circle() -> None:
    graph, ours = arrows(), modules()
    assert circle_in(graph) == []

    def room(module: str) -> str:  # a folder below a package; a file beside them is a room of its own
        folder = ours[module].relative_to(ROOT).parent.parts
        return module if len(folder) == 1 else ".".join(folder)

    rooms: dict[str, set[str]] = {}
    for module, targets in graph.items():
        rooms.setdefault(room(module), set()).update(room(target) for target in targets)
    assert circle_in({name: targets - {name} for name, targets in rooms.items()}) == []


def test_files_and_folders_are_small_enough_to_take_in() -> None:
    said = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, check=True)
    files = [ROOT / name for name in said.stdout.decode().splitlines() if (ROOT / name).is_file()]
    long = {str(f.relative_to(ROOT)) for f in files if f.suffix == ".py" and f.read_text().count("\n") > MOST_LINES}
    assert long == set()
    folders = Counter(file.parent for file in files if file.parent != ROOT and file.suffix in (".py", ".yaml", ".j2"))
    assert {str(folder): count for folder, count in folders.items() if count > MOST_FILES} == {}


def raises(function: ast.FunctionDef) -> bool:
    """Whether a function's own body raises anew; what is raised in functions inside of it is theirs."""
    left: list[ast.AST] = list(function.body)
    while left:
        node = left.pop()
        if isinstance(node, ast.Raise) and node.exc is not None:
            return True
        if not isinstance(node, ast.FunctionDef | ast.Lambda | ast.ClassDef):
            left += ast.iter_child_nodes(node)
    return False


def test_public_functions_say_what_they_raise() -> None:
    silent = []
    for module, file in modules().items():
        if module.startswith("launcher.cli"):  # their docstrings are what --help shows
            continue
        tree = ast.parse(file.read_text())
        owners = [tree, *(node for node in tree.body if isinstance(node, ast.ClassDef))]
        for node in (node for owner in owners for node in owner.body if isinstance(node, ast.FunctionDef)):
            # YAML's constructors are called by PyYAML; pydantic says for its validators which key is wrong.
            ours = not node.name.startswith(("_", "construct_", "compose_"))
            ours = ours and "validator" not in "".join(map(ast.unparse, node.decorator_list))
            if ours and raises(node) and not re.search(r"[Rr]aises|[Rr]efuse", ast.get_docstring(node) or ""):
                silent.append(f"{file.relative_to(ROOT)}:{node.lineno} {node.name}")
    assert silent == []


AXES = re.compile(r"\[[^\]]*\]|\([^)]*[A-Z0-9][^)]*\)|_[A-Z]{1,3}\b")


def test_public_functions_say_the_axes_of_arrays_they_take_or_give() -> None:
    silent = []
    for file in modules().values():
        tree = ast.parse(file.read_text())
        owners = [tree, *(n for n in tree.body if isinstance(n, ast.ClassDef) and not n.name.startswith("_"))]
        for node in (node for owner in owners for node in owner.body if isinstance(node, ast.FunctionDef)):
            named = [*node.args.args, *node.args.kwonlyargs]
            types = [one.annotation for one in named if one.annotation] + ([node.returns] if node.returns else [])
            if node.name.startswith("_") or not re.search(r"NDArray|Tensor\b", " ".join(map(ast.unparse, types))):
                continue
            said = " ".join([node.name, *(one.arg for one in named), ast.get_docstring(node) or ""])
            if not AXES.search(said):
                silent.append(f"{file.relative_to(ROOT)}:{node.lineno} {node.name}")
    assert silent == []


def imports_of(file: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.partition(".")[0])
    return found


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_imports_go_one_way(package: str) -> None:
    for file in (ROOT / package).rglob("*.py"):
        strange = (imports_of(file) & set(MAY_IMPORT)) - MAY_IMPORT[package] - {package}
        assert not strange, f"{file} imports {strange}"


@pytest.mark.parametrize("verb", [[], ["train"], ["prepare"], ["eval"], ["compare"], ["board"], ["init"]])
def test_help_loads_nothing_heavy(verb: list[str]) -> None:
    code = (
        "import sys, contextlib, io\n"
        "from launcher.cli import app\n"
        "with contextlib.redirect_stdout(io.StringIO()) as out:\n"
        f"    app({[*verb, '--help']!r}, standalone_mode=False)\n"
        "assert 'Usage' in out.getvalue()\n"
        "heavy = {'torch', 'transformers', 'scipy', 'numpy', 'pyarrow', 'deepspeed', 'datasets'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_reading_settings_loads_no_torch() -> None:
    code = "import sys, configs; configs.resolve(configs.load_config('demo')); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_every_setting_is_documented_in_the_starter_config(tmp_path: Path) -> None:
    from configs.load import known_keys, load_config
    from launcher.init import run_init

    text = run_init(tmp_path).read_text()
    assert load_config(tmp_path / "vernier.yaml").name == "my-run"
    for key in known_keys():
        assert f"{key.rpartition('.')[2]}:" in text


def test_ranks_exchange_nothing_that_is_unpickled() -> None:
    # torch's collectives of objects, mpi4py's lower-case methods: whoever reaches their port would run code of his own.
    objects = re.compile(r"\w*_object(_list)?$")
    by_mpi = {"bcast", "gather", "allgather", "scatter", "alltoall", "reduce", "allreduce", "send", "recv", "sendrecv"}
    for file in (file for package in MAY_IMPORT for file in (ROOT / package).rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                named, owner = node.func.attr, ast.unparse(node.func.value)
                of_torch = owner in ("dist", "torch.distributed", "deepspeed.comm") and objects.match(named)
                of_mpi = named in by_mpi and ("mpi" in owner.lower() or "communicator" in owner or "COMM_" in owner)
                pickles = bool(of_torch or of_mpi)
                assert not pickles, f"{file}:{node.lineno}: {owner}.{named}"
            named_imports = node.names if isinstance(node, ast.Import | ast.ImportFrom) else ()
            assert not any(alias.name == "pickle" or objects.match(alias.name) for alias in named_imports), file


def test_no_two_test_files_have_one_name() -> None:
    names = Counter(file.name for file in (ROOT / "tests").rglob("test_*.py"))  # pytest imports them by it
    assert [name for name, times in names.items() if times > 1] == []
