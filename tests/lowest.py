"""Prints the lowest versions that setup.py allows, as pip takes them: `make test-oldest` installs these."""

from importlib.metadata import requires

from packaging.requirements import Requirement

for requirement in map(Requirement, requires("paella-diffusers") or []):
    if requirement.marker is None or requirement.marker.evaluate({"extra": "lora"}):
        print(*(f"{requirement.name}=={part.version}" for part in requirement.specifier if part.operator == ">="))
