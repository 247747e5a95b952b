"""Print the oldest versions that pyproject.toml admits, as constraints for pip; one given as argument comes first.

python .ci/lower_bounds.py [torch==2.13.0]
"""

import re
import sys
import tomllib
from pathlib import Path

project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
bounds = dict(requirement.split("==") for requirement in sys.argv[1:] if requirement)
for requirement in (*project["dependencies"], *project["optional-dependencies"]["peft"]):
    match = re.match(r"([\w-]+)>=([\d.]+)", requirement)
    if match is None:
        sys.exit(f"{requirement} has no lower bound")
    bounds.setdefault(match[1], match[2])
print("\n".join(f"{name}=={version}" for name, version in bounds.items()))
