# SPDX-License-Identifier: Apache-2.0
"""The hook: registration in any order of imports, and nothing broken by a broken installation."""

import os
import shutil
import subprocess
import sys
import textwrap
from importlib.util import find_spec
from pathlib import Path

import pytest

PACKAGE = Path(find_spec("anomalib_cpr").origin).parent  # of the checkout, or as it was installed
ENTRY_POINTS = "[torch.backends]\nanomalib_cpr = _anomalib_cpr_hook:autoload\n"
HOOK_FILES = ("__init__.py", "_autoload.py", "registration.py")
SWITCHES = ("ANOMALIB_CPR_AUTOLOAD", "TORCH_DEVICE_BACKEND_AUTOLOAD", "PYTHONPATH")


def run_python(site: Path, code: str, **environment):
    """Run code in a fresh process that finds the installation in `site` first."""
    variables = {name: value for name, value in os.environ.items() if name not in SWITCHES}
    variables.update(PYTHONPATH=str(site), PYTHONWARNINGS="ignore", PYTHONDONTWRITEBYTECODE="1", **environment)
    # A distribution found twice counts once, the first one: an editable installation beside it does not interfere.
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env=variables,
        cwd=site,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


def must_run(site: Path, code: str, **environment) -> str:
    result = run_python(site, code, **environment)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout + result.stderr


def install(folder: Path, files=None) -> Path:
    """What `pip install --target` leaves: the package and its metadata."""
    metadata = folder / "anomalib_cpr-0.1.0.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: anomalib-cpr\nVersion: 0.1.0\n", encoding="utf-8")
    (metadata / "entry_points.txt").write_text(ENTRY_POINTS, encoding="utf-8")
    shutil.copy(PACKAGE.parent / "_anomalib_cpr_hook.py", folder)
    if files is None:
        shutil.copytree(PACKAGE, folder / "anomalib_cpr", ignore=shutil.ignore_patterns("__pycache__"))
    else:
        (folder / "anomalib_cpr").mkdir()
        for name in files:
            shutil.copy(PACKAGE / name, folder / "anomalib_cpr" / name)
    return folder


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    return install(tmp_path_factory.mktemp("target"))


@pytest.fixture
def toy(tmp_path):
    """A torch and an anomalib of a few lines, with the real hook: every order of imports in milliseconds."""
    site = install(tmp_path / "site", HOOK_FILES)
    sources = {
        "torch/__init__.py": """
            from importlib.metadata import entry_points
            for point in entry_points(group="torch.backends"):
                if point.name == "anomalib_cpr":
                    point.load()()
            finished = True
            """,
        "anomalib/__init__.py": "",
        "anomalib/models/__init__.py": """
            from .components import AnomalibModule
            import anomalib.data
            ALLOWED_MODULES = {"anomalib.models"}
            __all__ = ["AnomalibModule"]
            """,
        "anomalib/models/components.py": """
            import torch
            assert torch.finished
            class AnomalibModule: ...
            """,
        "anomalib/data/__init__.py": """
            import torch
            class MVTecAD: ...
            __all__ = ["MVTecAD"]
            """,
        "anomalib_cpr/lightning_model.py": """
            import torch
            from anomalib.data import MVTecAD
            from anomalib.models.components import AnomalibModule
            class Cpr(AnomalibModule): ...
            """,
        "anomalib_cpr/torch_model.py": "class CprModel: ...\n",
        "anomalib_cpr/mvtec.py": "from anomalib.data import MVTecAD\nclass MVTec(MVTecAD): ...\n",
        "anomalib_cpr/drawn_data.py": "from anomalib.data import MVTecAD\nclass DrawnParts(MVTecAD): ...\n",
        "anomalib_cpr/explain_visualizer.py": "class ExplanationVisualizer: ...\n",
    }
    for name, source in sources.items():
        (site / name).parent.mkdir(parents=True, exist_ok=True)
        (site / name).write_text(textwrap.dedent(source), encoding="utf-8")
    return site


CHECK = """
import sys
import anomalib.data, anomalib.models, anomalib_cpr
assert anomalib.models.Cpr is anomalib_cpr.Cpr
assert anomalib.data.MVTec is anomalib_cpr.MVTec
assert anomalib.data.DrawnParts is anomalib_cpr.DrawnParts
assert "anomalib_cpr" in anomalib.models.ALLOWED_MODULES
assert "Cpr" in anomalib.models.__all__ and "MVTec" in anomalib.data.__all__
assert not [finder for finder in sys.meta_path if getattr(finder, "package", "") == "anomalib_cpr"]
"""

FIRST = [
    "import torch",
    "import anomalib",
    "import anomalib.data",
    "import anomalib.models",
    "import anomalib.models.components",  # torch is imported while anomalib.models is half imported
    "import anomalib_cpr",
    "import anomalib_cpr.lightning_model",  # anomalib is imported while the plugin's own module is half imported
    "import anomalib_cpr.mvtec",
    "from anomalib_cpr import Cpr",
    "from anomalib_cpr import *",
    "import anomalib_cpr, torch, anomalib_cpr, anomalib_cpr.registration as r; r.register(); r.register()",
    "import threading; t = threading.Thread(target=__import__, args=('anomalib.models',)); t.start(); t.join()",
]


@pytest.mark.parametrize("first", FIRST)
def test_toy_registers_in_any_order(toy, first):
    assert must_run(toy, first + CHECK) == ""


@pytest.mark.parametrize("first", ["import torch", "import anomalib.models.components", "import anomalib.data"])
def test_toy_registers_without_any_import_of_the_package(toy, first):
    must_run(toy, f"{first}\nimport anomalib.models\nassert anomalib.models.Cpr and anomalib.data.MVTec")


@pytest.mark.parametrize("first", ["import torch", "import anomalib.models"])
def test_toy_opt_out_until_explicit_import(toy, first):
    code = f"""
        {first}
        import sys, anomalib.models
        assert not [name for name in sys.modules if name.startswith("anomalib_cpr")]
        assert not hasattr(anomalib.models, "Cpr")
        import anomalib_cpr
        assert anomalib.models.Cpr is anomalib_cpr.Cpr
        """
    must_run(toy, code, ANOMALIB_CPR_AUTOLOAD="0")


def test_toy_explicit_import_beats_opt_out_also_before_torch(toy):
    must_run(toy, "import anomalib_cpr, torch" + CHECK, ANOMALIB_CPR_AUTOLOAD="0")


def test_toy_never_replaces_what_anomalib_has(toy):
    with (toy / "anomalib/models/__init__.py").open("a", encoding="utf-8") as file:
        file.write("class Cpr(AnomalibModule): ...\n")
    with (toy / "anomalib/data/__init__.py").open("a", encoding="utf-8") as file:
        file.write("class MVTec: ...\n")
    code = """
        import sys, anomalib.data, anomalib.models
        import anomalib_cpr.registration
        anomalib_cpr.registration.register()
        assert anomalib.models.Cpr.__module__ == "anomalib.models"
        assert anomalib.data.MVTec.__module__ == "anomalib.data"
        # A second subclass of that name would take get_model("cpr") away from anomalib's own.
        assert "anomalib_cpr.lightning_model" not in sys.modules
        """
    must_run(toy, code)


@pytest.mark.parametrize(
    ("broken", "source", "reason"),
    [
        ("lightning_model", "def (", "SyntaxError"),
        ("lightning_model", "import no_such_library", "No module named 'no_such_library'"),
        ("lightning_model", "import sys; sys.exit(3)", "SystemExit: 3"),
        ("lightning_model", "", "has no attribute 'Cpr'"),
        ("mvtec", "def (", "SyntaxError"),
    ],
)
def test_toy_broken_module_is_one_warning(toy, broken, source, reason):
    (toy / f"anomalib_cpr/{broken}.py").write_text(source, encoding="utf-8")
    output = must_run(
        toy,
        """
        import torch, anomalib.data, anomalib.models
        import anomalib_cpr.registration
        anomalib_cpr.registration.register()
        assert len(anomalib_cpr.registration.failures()) == 1
        assert anomalib.data.MVTecAD and anomalib.models.AnomalibModule
        """,
    )
    assert output.count("anomalib-cpr doctor") == 1
    assert reason in output


def test_toy_broken_registration_is_silent(toy):
    (toy / "anomalib_cpr/registration.py").write_text("def (", encoding="utf-8")
    assert must_run(toy, "import torch, anomalib.models") == ""


def test_toy_failing_import_of_anomalib_stays_its_own(toy):
    (toy / "anomalib/models/components.py").write_text("import torch, no_such_library\n", encoding="utf-8")
    result = run_python(toy, "import torch, anomalib.models")
    assert result.stderr.strip().endswith("ModuleNotFoundError: No module named 'no_such_library'")
    assert "doctor" not in result.stderr


@pytest.mark.parametrize(
    ("file", "source", "reason"),
    [
        ("__init__.py", "def (", "SyntaxError"),
        ("_autoload.py", "def (", "SyntaxError"),
        # Zeros, as a crash of the machine leaves them: a SyntaxError, and up to Python 3.11.3 a ValueError.
        ("__init__.py", "\0", "cannot contain null bytes"),
        ("__init__.py", "import no_such_library", "No module named 'no_such_library'"),
        ("__init__.py", "import sys; sys.exit(3)", "SystemExit: 3"),
        ("_autoload.py", "", "cannot import name 'on_package_import'"),
    ],
)
def test_toy_damaged_package_never_breaks_torch(toy, file, source, reason):
    (toy / "anomalib_cpr" / file).write_text(source, encoding="utf-8")
    output = must_run(toy, "import torch, anomalib.models\nassert anomalib.models.AnomalibModule")
    assert output.count("anomalib-cpr is installed, but damaged") == 1
    assert reason in output


def test_damaged_package_leaves_the_real_torch_importable(site, tmp_path):
    broken = shutil.copytree(site, tmp_path / "broken")
    (broken / "anomalib_cpr/__init__.py").write_text("def (", encoding="utf-8")
    assert "damaged (SyntaxError" in must_run(broken, "import torch\nassert torch.ones(2).sum() == 2")


def test_torch_imports_nothing_but_the_hook(site):
    code = """
        import sys, torch
        names = sorted(name for name in sys.modules if name.startswith(("anomalib", "lightning")))
        assert names == ["anomalib_cpr", "anomalib_cpr._autoload"], names
        """
    assert must_run(site, code) == ""


BLOCK = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "{blocked}":
            raise ModuleNotFoundError("No module named '{blocked}'", name="{blocked}")
sys.meta_path.insert(0, Block())
"""


def test_missing_torchvision_breaks_neither_torch_nor_the_package(site):
    code = """
import torch, anomalib, anomalib_cpr
assert torch.ones(2).sum() == 2
try:
    import anomalib.models
except ImportError as error:
    assert "torchvision" in str(error), error
try:
    anomalib_cpr.Cpr
except ImportError as error:
    assert "torchvision" in str(error), error
"""
    must_run(site, BLOCK.format(blocked="torchvision") + code)


def test_missing_anomalib_breaks_neither_torch_nor_the_package(site):
    assert must_run(site, BLOCK.format(blocked="anomalib") + "import torch, anomalib_cpr, anomalib_cpr.cli") == ""


@pytest.mark.parametrize(
    "first",
    [
        "import torch",
        "import anomalib",
        "from anomalib.models import get_model",
        "import anomalib.data",
        "import anomalib_cpr",
        "import lightning",
    ],
)
def test_registers_in_any_order(site, first):
    code = """
from anomalib.models import AnomalibModule, list_models
assert "cpr" in list_models()
assert [cls.__name__ for cls in AnomalibModule.__subclasses__()].count("Cpr") == 1
"""
    assert "WARNING" not in must_run(site, first + code + CHECK)


def test_opt_out(site):
    code = """
        import sys, torch
        from anomalib.models import list_models
        assert not [name for name in sys.modules if name.startswith("anomalib_cpr")]
        assert "cpr" not in list_models()
        import anomalib_cpr
        assert "cpr" in list_models()
        """
    must_run(site, code, ANOMALIB_CPR_AUTOLOAD="0")


def test_broken_model_leaves_anomalib_usable(site, tmp_path):
    broken = shutil.copytree(site, tmp_path / "broken")
    (broken / "anomalib_cpr/lightning_model.py").write_text("def (", encoding="utf-8")
    code = """
        from anomalib.models import get_model, list_models
        assert "padim" in list_models() and "cpr" not in list_models()
        get_model("padim", pre_trained=False)
        """
    output = must_run(broken, code)
    assert output.count("anomalib-cpr doctor") == 1
    assert "SyntaxError" in output
