"""Print docs/configuration.md."""

from utils.config.documentation import documentation

print(documentation(), end="")
