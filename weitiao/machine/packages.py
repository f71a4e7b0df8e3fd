"""Versions of what the project stands on, those known not to work together, and what to do."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from importlib import metadata

from weitiao.errors import t

NEEDED = ("torch", "transformers", "peft", "tokenizers", "safetensors", "huggingface_hub", "numpy", "pydantic")
OPTIONAL = ("accelerate", "bitsandbytes", "datasets", "torchao", "torchaudio", "torchvision", "trl")
PACKAGES = ("weitiao", *NEEDED, *OPTIONAL)
LEAST = {  # the first version without a known fault
    "torch": ("2.6", "reads pickled weights unsafely (CVE-2025-32434)"),
    "transformers": ("5.3", "another file format, and a config.json may fetch code (CVE-2026-4372)"),
    "torchao": ("0.16", "peft refuses to run beside it"),
    "bitsandbytes": ("0.46.1", "transformers refuses it"),
}


@dataclass(frozen=True)
class Clash:
    """Packages that do not work together or at all here, and what to do."""

    packages: str
    problem: str
    remedy: str


def versions() -> dict[str, str]:
    """Installed versions of what the project stands on, by package name, without importing anything."""
    found = {}
    for name in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def clashes(found: dict[str, str] | None = None) -> list[Clash]:
    """What is known not to work in ``found`` (package -> version), or in what is installed and what that requires."""
    from packaging.version import Version

    if found is None:
        return clashes(versions()) + unmet()
    torch, problems = found.get("torch", ""), []
    for name in NEEDED:
        if name not in found:
            problems.append(Clash(name, t("not installed"), f"pip install {name}"))
    for name, (least, reason) in LEAST.items():
        if name in found and Version(found[name]) < Version(least):
            problems.append(Clash(f"{name} {found[name]}", t(reason), f'pip install -U "{name}>={least}"'))
    if torch and Version(torch) < Version("2.3") and Version(found.get("numpy", "0")) >= Version("2"):
        both = f"torch {torch}, numpy {found['numpy']}"
        problems.append(Clash(both, t("this torch was built for numpy 1"), 'pip install "numpy<2"'))
    for name in ("torchvision", "torchaudio"):
        if torch.endswith("+cpu") and name in found and not found[name].endswith("+cpu"):
            problem = t("a CUDA build beside a CPU build of torch: importing it fails")
            remedy = t("pip uninstall {name} (text needs none), or take both from the same index", name=name)
            problems.append(Clash(f"{name} {found[name]}, torch {torch}", problem, remedy))
    return problems


def unmet() -> list[Clash]:
    """Installed packages whose own requirements the installed versions do not meet."""
    from packaging.requirements import Requirement

    problems = []
    for name, version in versions().items():
        for text in metadata.requires(name) or []:
            needs = Requirement(text)
            if needs.marker and not needs.marker.evaluate({"extra": ""}):
                continue
            with contextlib.suppress(metadata.PackageNotFoundError):
                present = metadata.version(needs.name)
                if not needs.specifier.contains(present, prereleases=True):
                    both = f"{name} {version}, {needs.name} {present}"
                    wanted = f"{needs.name}{needs.specifier}"
                    problems.append(
                        Clash(both, t("{name} needs {wanted}", name=name, wanted=wanted), f'pip install "{wanted}"')
                    )
    return problems
