"""What changes at a release, in one place: setup.py, error messages, model cards and the command line read it."""

__version__ = "0.2.0"
DIFFUSERS = "diffusers>=0.42,<0.43"  # the versions that are tested: `registration.py` extends private tables of theirs

AUTHOR = "The paella-diffusers authors"  # as in LICENSE
URL = ""  # of the repository, such as "https://github.com/OWNER/paella-diffusers"; empty until it has one
PIP_TARGET = "."  # what pip installs: "paella-diffusers" once an index has it, until then the checkout that pip runs in


def pip_install(extra: str = "") -> str:
    """The shell command that installs this package, with an extra of setup.py if one is named."""
    command = f'pip install "{PIP_TARGET}[{extra}]"' if extra else f"pip install {PIP_TARGET}"
    return command if PIP_TARGET != "." else f"{command}  # in a checkout of paella-diffusers"


def requirement(extra: str = "") -> str:
    """
    The line of a requirements.txt that installs this version, with an extra if one is named: from an index, or until then
    from a wheel beside it.
    """
    extra = f"[{extra}]" if extra else ""
    if PIP_TARGET != ".":
        return f"{PIP_TARGET}{extra}=={__version__}"
    return f"./paella_diffusers-{__version__}-py3-none-any.whl{extra}  # of `pip wheel --no-deps .` in a checkout"
