"""`python -m utils.benchmark`."""

if __name__ == "__main__":  # before the imports, which take seconds
    from utils.startup import begin

    begin("utils.benchmark")

from utils.benchmark.cli import main
from utils.cli import command

if __name__ == "__main__":
    command("utils.benchmark", main)
