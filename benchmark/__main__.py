"""`python -m benchmark`."""

if __name__ == "__main__":  # before the slow imports
    from utils.startup import begin

    begin("benchmark")

from benchmark.run import main
from utils.cli import command

if __name__ == "__main__":
    command("benchmark", main)
