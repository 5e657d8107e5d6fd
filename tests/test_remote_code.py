"""Python code in a model, a tokenizer, an adapter or a dataset is never run, whatever stdin answers."""

import ast
import contextlib
import io
import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig, dynamic_module_utils

from sae.common.errors import SaeError, UsageError
from sae.common.remote_code import never_asking
from sae.evaluate.metrics.local_judge import LocalJudge
from sae.harvest.adapters import find_adapter
from sae.harvest.datasets import open_text
from sae.harvest.in_memory import activations
from sae.harvest.model import find_model, load_model, load_tokenizer
from sae.workflows.published import local_model_config

ROOT = Path(__file__).parents[1]
LOADERS = {
    "from_pretrained", "from_config", "load_dataset", "load_dataset_builder", "get_class_from_dynamic_module",
    "custom_object_save", "get_dataset_config_names", "load_metric", "pipeline", "torch_hub_load",
}  # fmt: skip


@pytest.fixture
def hostile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], Path]:
    """Put own.py into a folder; importing it writes the file `ran`. Stdin answers every question with "y"."""
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 50))
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    code = f"""open({str(tmp_path / "ran")!r}, "w").write("ran")
from transformers import ByT5Tokenizer, Gemma2ForCausalLM, PretrainedConfig
class OwnConfig(PretrainedConfig): model_type = "own"
class OwnModel(Gemma2ForCausalLM): config_class = OwnConfig
class OwnTokenizer(ByT5Tokenizer): pass
"""

    def put(folder: Path) -> Path:
        (folder / "own.py").write_text(code)
        return folder

    return put


def edited(folder: Path, file: str = "config.json", **changes: Any) -> Path:
    content = json.loads((folder / file).read_text()) | changes
    (folder / file).write_text(json.dumps(content))
    return folder


OWN_MODEL = {"AutoConfig": "own.OwnConfig", "AutoModel": "own.OwnModel", "AutoModelForCausalLM": "own.OwnModel"}


def test_the_code_is_run_if_transformers_is_asked_as_usual(
    hostile: Callable[[Path], Path], tiny_model: Path, tmp_path: Path
) -> None:
    """If it were not, the other tests would prove nothing."""
    folder = hostile(shutil.copytree(tiny_model, tmp_path / "model"))
    AutoConfig.from_pretrained(edited(folder, model_type="own", auto_map=OWN_MODEL))
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize("model_type", ["own", "gemma2"])
@pytest.mark.parametrize("where", ["config", "tokenizer", "tokenizer, as a list", "everywhere"])
def test_code_of_a_model_folder_is_not_run(
    hostile: Callable[[Path], Path], tiny_model: Path, tmp_path: Path, model_type: str, where: str
) -> None:
    folder = hostile(shutil.copytree(tiny_model, tmp_path / "model"))
    if where in ("config", "everywhere"):
        edited(folder, model_type=model_type, auto_map=OWN_MODEL)
    if where != "config":
        own: Any = ["own.OwnTokenizer", None] if "list" in where else {"AutoTokenizer": ["own.OwnTokenizer", None]}
        edited(folder, "tokenizer_config.json", tokenizer_class="OwnTokenizer", auto_map=own)
        if model_type == "own":
            edited(folder, model_type=model_type, auto_map={})
            (folder / "tokenizer.json").unlink()
    try:
        source, config = find_model(str(folder))
        load_tokenizer(source)
        load_model(source, config, dtype="float32", device="cpu")
        activations(["a text"], model=str(folder), layer=0, device="cpu")
    except UsageError as error:
        assert "needs its own Python code, which is never run here" in str(error) or "does not know" in str(error)
    else:
        assert model_type == "gemma2", "only an architecture that transformers has can be loaded without its code"
    local_model_config(str(folder))
    assert not (tmp_path / "ran").exists() and not (tmp_path / "modules").exists()


def test_code_that_a_part_of_a_configuration_names_is_not_run(
    hostile: Callable[[Path], Path], tiny_model: Path, tmp_path: Path
) -> None:
    """transformers loads the configuration of a backbone without passing trust_remote_code on."""
    backbone = hostile(shutil.copytree(tiny_model, tmp_path / "backbone"))
    edited(backbone, model_type="own", auto_map=OWN_MODEL)
    outer = tmp_path / "outer"
    outer.mkdir()
    (outer / "config.json").write_text(json.dumps({"model_type": "detr", "backbone": str(backbone)}))
    with pytest.raises(SaeError):
        find_model(str(outer))
        activations(["a text"], model=str(outer), layer=0, device="cpu")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("where", ["config", "tokenizer"])
def test_code_that_a_local_judge_brings_is_not_run(
    hostile: Callable[[Path], Path], tiny_model: Path, tmp_path: Path, where: str
) -> None:
    folder = hostile(shutil.copytree(tiny_model, tmp_path / "model"))
    (folder / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text((folder / "own.py").read_text())
    if where == "config":
        edited(folder, model_type="own", auto_map=OWN_MODEL)
    else:
        own = {"AutoTokenizer": ["own.OwnTokenizer", None]}
        edited(folder, "tokenizer_config.json", tokenizer_class="OwnTokenizer", auto_map=own)
    with contextlib.suppress(SaeError):
        LocalJudge(str(folder), "cpu", "float32").answer_all([[{"role": "user", "content": "a"}]], lambda *_: None)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("kind", ["PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "CPT", "XLORA"])
def test_code_that_an_adapter_names_is_not_run(
    hostile: Callable[[Path], Path], tiny_model: Path, tmp_path: Path, kind: str
) -> None:
    (tmp_path / "adapter").mkdir()
    folder = hostile(tmp_path / "adapter")
    shutil.copy(tiny_model / "model.safetensors", folder / "adapter_model.safetensors")
    shutil.copy(tiny_model / "tokenizer_config.json", folder)
    edited(folder, "tokenizer_config.json", auto_map={"AutoTokenizer": ["own.OwnTokenizer", None]})
    record = {
        "peft_type": kind, "task_type": "CAUSAL_LM", "num_virtual_tokens": 2, "prompt_tuning_init": "TEXT",
        "prompt_tuning_init_text": "a", "tokenizer_name_or_path": str(folder), "inference_mode": False,
        "tokenizer_kwargs": {"trust_remote_code": True}, "adapters": {"0": str(folder)},
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(record))
    with pytest.raises(UsageError, match=f"{kind}, which peft cannot merge"):
        find_adapter(str(folder))
        find_model(str(tiny_model), adapters=[str(folder)])
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("as_hub", [False, True])
def test_the_loading_script_of_a_dataset_is_not_run(
    hostile: Callable[[Path], Path], tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, as_hub: bool
) -> None:
    import datasets
    import huggingface_hub

    folder = tmp_path / "words"
    folder.mkdir()
    (hostile(folder) / "own.py").rename(folder / "words.py")
    (folder / "data.jsonl").write_text('{"text": "some words"}\n')
    (folder / "dataset_infos.json").write_text("{}")
    if as_hub:  # the library `datasets` loads a folder in place of the repository
        load = datasets.load_dataset
        monkeypatch.setattr(
            huggingface_hub.HfApi, "dataset_info", lambda *_, **__: type("Info", (), {"sha": "0" * 40})()
        )
        monkeypatch.setattr(datasets, "load_dataset", lambda _, **more: load(str(folder), **more))
    name = "some/words" if as_hub else str(folder)
    tokenizer = load_tokenizer(find_model(str(tiny_model))[0])
    try:
        text = open_text(name, tokenizer=tokenizer, revision=None, split="train", column="text", seed=0)
        assert [document.text for document in text.documents] == ["some words"]
    except SaeError:
        pass
    assert not (tmp_path / "ran").exists()


def nodes_of(path: Path) -> list[ast.AST]:
    """All syntax nodes of a file that mentions one of LOADERS; none of any other file."""
    text = path.read_text()
    return list(ast.walk(ast.parse(text))) if any(name in text for name in LOADERS) else []


def loading_calls(path: Path) -> list[ast.Call]:
    """The calls in a file by which a library loads something that can contain Python code."""
    found = []
    for node in nodes_of(path):
        name = getattr(node.func, "attr", getattr(node.func, "id", "")) if isinstance(node, ast.Call) else ""
        if name in LOADERS and isinstance(node, ast.Call):
            found.append(node)
    return found


def refuses(call: ast.Call) -> bool:
    """Whether a call passes trust_remote_code=False."""
    given = {word.arg: word.value for word in call.keywords}
    value = given.get("trust_remote_code")
    return isinstance(value, ast.Constant) and value.value is False


def is_ours(call: ast.Call) -> bool:
    """Whether a call is one of common/remote_code.py, by its bare name."""
    return isinstance(call.func, ast.Name)


def is_peft(call: ast.Call) -> bool:
    """PeftModel has no trust_remote_code: it runs no code, and harvest/adapters.py checks the kind of the adapter."""
    return ast.unparse(call.func) == "peft.PeftModel.from_pretrained"


def tracked(*folders: str) -> list[Path]:
    listed = subprocess.run(["git", "ls-files", "*.py"], cwd=ROOT, capture_output=True, text=True).stdout.split()
    names = listed or [str(path.relative_to(ROOT)) for path in ROOT.rglob("*.py")]
    return [ROOT / name for name in names if not name.startswith(folders) and (ROOT / name).exists()]


def test_no_loading_call_forgets_to_refuse_code() -> None:
    """Checks the package and its benchmarks. Tests load their own files, and peers have their own model classes."""
    own = ROOT / "common" / "remote_code.py"
    assert len([call for call in loading_calls(own) if refuses(call)]) == 3
    forgotten = [
        f"{path.relative_to(ROOT)}:{call.lineno} {ast.unparse(call.func)}"
        for path in tracked("tests/", "benchmarks/peers/", "docs/")
        for call in loading_calls(path)
        if not (refuses(call) or is_ours(call) or is_peft(call))
    ]
    assert forgotten == []
    imports = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in tracked("tests/", "benchmarks/peers/", "docs/")
        for node in nodes_of(path)
        if isinstance(node, ast.ImportFrom) and "remote_code" not in (node.module or "")
        for alias in node.names
        if alias.name in LOADERS
    ]
    assert imports == [], "the bare names mean those of common/remote_code.py"


@pytest.mark.parametrize(
    ("source", "is_right"),
    [
        ("AutoModel.from_pretrained('x')", False),
        ("AutoModel.from_pretrained('x', trust_remote_code=True)", False),
        ("AutoModel.from_pretrained('x', trust_remote_code=trust)", False),
        ("AutoModel.from_pretrained('x', **options)", False),
        ("datasets.load_dataset('x', trust_remote_code=False)", True),
        ("from_pretrained(AutoModel, 'x')", True),
    ],
)
def test_every_form_of_call_is_read(tmp_path: Path, source: str, is_right: bool) -> None:
    (tmp_path / "some.py").write_text(source)
    (call,) = loading_calls(tmp_path / "some.py")
    assert (refuses(call) or is_ours(call)) == is_right


def test_transformers_cannot_ask_while_something_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.dynamic_module_utils import resolve_trust_remote_code

    asked: list[object] = []
    monkeypatch.setattr("builtins.input", lambda *words: asked.append(words) or "y")
    with never_asking(), pytest.raises(ValueError, match="custom code"):
        resolve_trust_remote_code(None, "model", False, True)
    assert not asked
    assert resolve_trust_remote_code(None, "model", False, True) and asked  # without the guard it asks
