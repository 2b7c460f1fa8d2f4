"""`python -m utils.benchmark`."""

from utils.benchmark.cli import main
from utils.cli import command

if __name__ == "__main__":
    command("utils.benchmark", main)
