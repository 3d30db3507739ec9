"""Who may import whom. The layers are those of the project: errors <- model facts <- core <- ..."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = "internvl_triton"

# A module may import its own layer and those above it in this list.
LAYERS = {
    "errors": {"errors"},
    "model facts": {"checkpoint_layout", "model_spec", "published_models"},
    "core": {
        "limits",
        "lora",
        "media",
        "messages",
        "program",
        "prompt",
        "resizing",
        "safetensors_file",
        "sampling",
        "stop_strings",
        "tiling",
        "token_bytes",
        "top_log_probs",
        "vector_code",
    },
    "tensor contract": {"tensor_contract"},
    "edge": {
        "answer",
        "artifacts",
        "canary",
        "checkpoint",
        "client",
        "cpu_llm",
        "fake_transport",
        "feature_cache",
        "freed_memory",
        "gpu_deployment",
        "gpu_triton_server",
        "grpc_poller",
        "grpc_transport",
        "guides",
        "keep_serving",
        "libpython",
        "llm_tensors",
        "postprocessing",
        "stage_metrics",
        "step_metrics",
        "stub_watchdog",
        "supervisor",
        "preprocessing",
        "random_checkpoint",
        "tensorrt_vision_engine",
        "tiny_tokenizer",
        "tokenizer",
        "triton_adapter",
        "triton_config",
        "triton_server",
        "vision_engine",
        "vision_runtime",
    },
}
# What the upper layers may import from outside when they are imported themselves.
FOREIGN = {
    "errors": set(),
    "model facts": set(),
    "core": {"numpy", "PIL"},
    "tensor contract": {"numpy"},
}
LEAVES = {
    "benchmarks",
    "build",
    "clients",
    "demo",
    "deploy",
    "export",
    "gateway",
    "model_repository",
}


def layer_of(module: str) -> str | None:
    return next((layer for layer, modules in LAYERS.items() if module in modules), None)


def dotted_name(file: Path) -> str:
    """`internvl_triton/cpu_llm/engine.py` -> `internvl_triton.cpu_llm.engine`."""
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def package_modules() -> list[Path]:
    files = sorted((ROOT / PACKAGE).rglob("*.py"))
    return [file for file in files if file != ROOT / PACKAGE / "__init__.py"]


def leaf_modules() -> list[Path]:
    return sorted(file for leaf in LEAVES for file in (ROOT / leaf).rglob("*.py"))


def runs_on_import(tree: ast.Module) -> Iterator[ast.AST]:
    """Every node outside functions and `if TYPE_CHECKING:`."""
    waiting: list[ast.AST] = list(tree.body)
    while waiting:
        node = waiting.pop()
        yield node
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            waiting += node.orelse
            continue
        waiting += ast.iter_child_nodes(node)


def imported(file: Path, *, on_import_only: bool = False) -> set[str]:
    """Absolute dotted names of what `file` imports; `from a import b` gives `a.b`."""
    tree = ast.parse(file.read_text(), str(file))
    names: set[str] = set()
    for node in runs_on_import(tree) if on_import_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            package = file.relative_to(ROOT).parent.parts
            base = package[: len(package) - node.level + 1] if node.level else ()
            prefix = ".".join([*base, *([node.module] if node.module else [])])
            names |= {f"{prefix}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("file", package_modules(), ids=dotted_name)
def test_package_module_has_a_layer_and_imports_only_upwards(file: Path) -> None:
    module = file.relative_to(ROOT / PACKAGE).with_suffix("").parts[0]
    layer = layer_of(module)
    assert layer, f"{module} is new: add it to its layer in LAYERS, in {Path(__file__).name}"
    order = list(LAYERS)
    for name in imported(file):
        top, *rest = name.split(".")
        assert top not in LEAVES, f"{dotted_name(file)} imports {name}: the package knows no leaf"
        if top != PACKAGE or not rest or not (other := layer_of(rest[0])):
            continue
        assert order.index(other) <= order.index(layer), (
            f"{dotted_name(file)} ({layer}) imports {name} ({other}), which is below it"
        )


@pytest.mark.parametrize("file", package_modules(), ids=dotted_name)
def test_upper_layers_need_no_foreign_library_to_be_imported(file: Path) -> None:
    layer = layer_of(file.relative_to(ROOT / PACKAGE).with_suffix("").parts[0])
    if layer not in FOREIGN:
        return
    tops = {name.split(".")[0] for name in imported(file, on_import_only=True)}
    foreign = tops - sys.stdlib_module_names - {PACKAGE}
    assert foreign <= FOREIGN[layer], (
        f"{dotted_name(file)} ({layer}) imports {sorted(foreign - FOREIGN[layer])} on import;"
        f" allowed: {sorted(FOREIGN[layer])}"
    )


@pytest.mark.parametrize("file", leaf_modules(), ids=dotted_name)
def test_leaf_imports_no_other_leafs_internals(file: Path) -> None:
    own = file.relative_to(ROOT).parts[0]
    for name in imported(file):
        parts = name.split(".")
        if parts[0] not in LEAVES - {own} or len(parts) == 1:
            continue
        inside = ROOT / parts[0] / parts[1]
        is_inside = len(parts) > 2 or inside.is_dir() or inside.with_suffix(".py").exists()
        assert not is_inside, (
            f"{dotted_name(file)} imports {name}: import what {parts[0]}/__init__.py offers"
        )


def test_imported_reads_every_form(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    file = tmp_path / "a" / "b" / "c.py"
    file.parent.mkdir(parents=True)
    file.write_text(
        "import os.path\nfrom . import d\nfrom ..e import f\n"
        "def g():\n    import torch\n"
        "if TYPE_CHECKING:\n    import onnx\n"
    )
    assert imported(file) == {"os.path", "a.b.d", "a.e.f", "torch", "onnx"}
    assert imported(file, on_import_only=True) == {"os.path", "a.b.d", "a.e.f"}
